"""A pretend NPU in pure Python: tensors that say `npu:0` over CPU memory, and the vendor's operators by their own schemas.

It shows that an adapter moves nothing to the host and mixes no devices, and which aten operators it asks for. What the vendor's
operators return is the reference's. torch alone is needed; where this device is made, the real torch_npu cannot be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as tree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "npu"
# Operators that only look at the same memory in another way: no device has to compute them.
VIEWS = frozenset(
    (
        *("alias", "as_strided", "detach", "expand", "lift_fresh", "permute", "reshape", "select", "slice", "split", "squeeze"),
        *("t", "transpose", "unsqueeze", "view", "_reshape_alias", "_unsafe_view", "empty", "empty_strided", "new_empty"),
    )
)
# What is one operator below torch under several names.
SAME = {"_to_copy": "cast", "clone": "copy", "new_full": "fill", "new_zeros": "fill", "zeros_like": "fill", "zero": "fill"}


class PretendTensor(torch.Tensor):
    """CPU memory `raw` behind a tensor that says npu:0; whatever meets another device is an error."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> PretendTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.shape,
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=torch.device(NAME, 0),
        )
        made.raw = raw
        return made

    def __repr__(self, **options: Any) -> str:
        return f"{NAME}:{self.raw!r}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        options = dict(kwargs or {})
        name = func._schema.name
        target = options.get("device")
        to_host = name == "aten::_to_copy" and target is not None and torch.device(target).type == "cpu"
        crossing = to_host or name in ("aten::copy_", "aten::_to_copy")
        leaves = tree.tree_leaves((args, options))
        strangers = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, cls) and x.dim()]
        if strangers and not crossing:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found npu:0 and cpu in {name}")
        if to_host or name == "aten::_local_scalar_dense":
            HOST_READS.append(name)
        if name.startswith("aten::") and (short := name.removeprefix("aten::").rstrip("_")) not in VIEWS:
            USED.add(SAME.get(short, short))
        plain_args, plain_options = tree.tree_map(_plain, (args, options))
        found = func(*plain_args, **plain_options)
        if to_host:
            return found
        if func._schema.is_mutable:
            return options.get("out", args[0])
        return tree.tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, found)


# Names of aten operators that were asked for, and reads of device values by the host, since they were last cleared.
USED: set[str] = set()
HOST_READS: list[str] = []
_KEEP: list[Any] = []


def _plain(value: Any) -> Any:
    if isinstance(value, PretendTensor):
        return value.raw
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


class _Module:
    """What torch asks of torch.npu."""

    def __init__(self, soc_name: str) -> None:
        self.soc_name = soc_name

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def synchronize(self, device: object = None) -> None:
        pass

    def get_device_name(self, device: object = 0) -> str:
        return self.soc_name

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


def setup(soc_name: str, operators: Mapping[str, tuple[str, Callable[..., Any]]]) -> _Module:
    """Make the device of this process; `operators` maps a vendor operator's name to its schema and its CPU function."""
    module = _Module(soc_name)
    _setup_privateuseone_for_python_backend(rename=NAME, backend_module=module)
    aten = torch.library.Library("aten", "IMPL")

    def empty(size: Any, *, dtype: Any = None, **options: Any) -> torch.Tensor:
        return PretendTensor(torch.empty(size, dtype=dtype))

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, **options: Any) -> torch.Tensor:
        return PretendTensor(torch.empty_strided(size, stride, dtype=dtype))

    aten.impl("empty.memory_format", empty, "PrivateUse1")
    aten.impl("empty_strided", empty_strided, "PrivateUse1")
    vendor = torch.library.Library("npu", "FRAGMENT")
    for name, (schema, function) in operators.items():
        vendor.define(schema)
        vendor.impl(name, function, "CPU")
    _KEEP.extend((aten, vendor))
    return module
