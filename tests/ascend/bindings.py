"""`python bindings.py FOLDER < calls.json`: calls of torch.ops.npu over stub libraries, each to its results or its error.

torch_npu renames a device for the whole process, and takes seconds to import: one process of its own for all calls.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from dsa_portable.backends.ascend import schemas
from dsa_portable.conformance.hosts.ascend import stubs

stubs.load(Path(sys.argv[1]))

import torch  # noqa: E402
import torch_npu  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402


def argument(value: Any, device: str) -> Any:
    """{"dtype": ..., "shape": ...} as a tensor; anything else as it is."""
    if isinstance(value, dict):
        return torch.empty(value["shape"], dtype=getattr(torch, value["dtype"]), device=device)
    return value


def called(operator: str, arguments: dict[str, Any], device: str) -> Any:
    """[[dtype, shape], ...] of the results, or the error's type and first line."""
    # Without a mode, a tensor on npu would be a real one.
    with FakeTensorMode() if device == "npu" else nullcontext():
        try:
            ready = {name: argument(value, device) for name, value in arguments.items()}
            found = getattr(torch.ops.npu, operator)(**ready)
        except Exception as error:
            return [type(error).__name__, str(error).partition("\n")[0]]
        results = found if isinstance(found, tuple) else (found,)
        assert {tensor.device.type for tensor in results} == {device}
        return [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in results]


def real() -> str:
    """What a real tensor on an NPU comes to."""
    try:
        return str(torch.empty(4, device="npu"))
    except RuntimeError as error:
        return str(error)


def schema(operator: str) -> str | None:
    packet = getattr(torch.ops.npu, operator, None)
    return None if packet is None else str(packet.default._schema)


report = {
    "version": torch_npu.__version__,
    "available": torch.npu.is_available(),
    "devices": torch.npu.device_count(),
    "real": real(),
    "schemas": {operator: schema(operator) for operator in schemas.OPERATORS},
    "generation": schemas.generation_of(schema),
    "unknown": schema("npu_no_such_operator"),
    "calls": {title: called(*call) for title, call in json.load(sys.stdin).items()},
}
print(json.dumps(report))
