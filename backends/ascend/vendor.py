"""The one door to the vendor: each call is checked against the documents, then made by name on torch.ops.npu."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dsa_portable.backends.ascend import constraints, device

# What the adapter and the batch ask of the device besides the vendor's operators, by aten's names: a test sees no other.
DEVICE_OPERATORS = (
    "add",
    "arange",
    "bitwise_and",
    "bitwise_not",
    "bmm",
    "cast",
    "cat",
    "clamp",
    "copy",
    "fill",
    "floor_divide",
    "ge",
    "index",
    "index_select",
    "log",
    "lt",
    "minimum",
    "mul",
    "relu",
    "remainder",
    "searchsorted",
    "sigmoid",
    "sort",
    "sub",
    "where",
)
INT_MAX = 2**31 - 1


def call(operator: str, **arguments: Any) -> Any:
    """The operator's results. Raises Unsupported for what the product's documents do not allow, before anything runs."""
    constraints.check(operator, device.product(), constraints.FACTS[operator](arguments))
    return getattr(import_module("torch").ops.npu, operator)(**arguments)
