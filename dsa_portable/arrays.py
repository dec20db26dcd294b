"""NumPy arrays and torch tensors look the same from here: dtype by name, device by name, host memory shared and never copied.

torch is imported by `from_numpy` alone, on its first call: any other tensor comes from a caller who has imported it already.
"""

from __future__ import annotations

import importlib
import operator
import reprlib
import sys
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from dsa_portable.errors import InvalidArgument

# A NumPy array or a torch tensor; both have shape, dtype, ndim and indexing, and no type covers the two.
Array: TypeAlias = Any

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
}

# dtypes that NumPy knows only through ml_dtypes cross to torch as the integer of the same width.
_BITS = {"bfloat16": "int16", "float8_e4m3fn": "uint8", "float8_e4m3fnuz": "uint8"}


def is_torch(array: object) -> bool:
    """True for a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def is_array(value: object) -> bool:
    """True for what the operators take as an array: a NumPy array, but none that would lose its mask, or a torch tensor."""
    return (isinstance(value, np.ndarray) and not isinstance(value, np.ma.MaskedArray)) or is_torch(value)


def strange(array: Array) -> str:
    """Why the array is not plain numbers in memory, and what makes it so; empty where it is, as nearly always."""
    if not is_torch(array):
        return ""
    if array.layout is not sys.modules["torch"].strided:
        return "is not stored densely; call .to_dense()"
    return "holds its numbers with the other sign; call .resolve_neg()" if array.is_neg() else ""


class _Memory:
    """Where a tensor's bytes lie, as NumPy asks for it; nothing is read, which on a device nobody could."""

    def __init__(self, array: Array) -> None:
        size = array.element_size()
        self.__array_interface__ = {
            "version": 3,
            "data": (array.data_ptr(), False),
            "shape": tuple(array.shape),
            "strides": tuple(stride * size for stride in array.stride()),
            "typestr": f"|V{size}",
        }


def _memory(array: Array) -> np.ndarray[Any, Any] | None:
    """The array's addresses; None where it has none, as a compiler's tensor."""
    if not is_torch(array):
        return np.asarray(array)
    if type(array).__name__ not in ("Tensor", "Parameter") or array.device.type == "meta" or not array.numel():
        return None
    return np.asarray(_Memory(array))


def overlap(array: Array, other: Array) -> bool:
    """Whether two arrays of one device share a byte; False where that is not found soon, or not known."""
    one, two = _memory(array), _memory(other)
    if one is None or two is None or not np.may_share_memory(one, two):
        return False
    try:
        return np.shares_memory(one, two, max_work=10_000)  # type: ignore[arg-type]  # NumPy's stubs know two values alone
    except np.exceptions.TooHardError:
        return False


def overlaps_itself(array: Array) -> bool:
    """Whether two of the array's numbers lie in one place, as after a broadcast."""
    found = _memory(array)
    if found is None or not found.size:
        return False
    reach = found.itemsize
    for stride, size in sorted((abs(s), n) for s, n in zip(found.strides, found.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def dtype_name(array: Array) -> str:
    """The dtype's name as the contract spells it, e.g. `float8_e4m3fn`; the same for NumPy and torch."""
    return str(array.dtype).removeprefix("torch.")


def device_name(array: Array) -> str:
    """The kind of device the array lives on: `cpu`, `cuda`, `npu`, ... (a NumPy array lives on `cpu`)."""
    return str(array.device.type) if is_torch(array) else "cpu"


def device_of(array: Array) -> str:
    """The very device the array lives on: `cpu`, `cuda:1`, ..."""
    return str(array.device) if is_torch(array) else "cpu"


def on_host(array: Array) -> bool:
    """True where the host can read the array's values without a device synchronisation."""
    return device_name(array) == "cpu"


def readable(array: Array) -> bool:
    """True where the array has values that the host can read now; a compiler's fake tensor on the host has none."""
    return on_host(array) and not (is_torch(array) and array.untyped_storage().device.type == "meta")


def namespace(array: Array) -> Any:
    """The module (`numpy` or `torch`) whose `where`, `searchsorted` and `arange` take this array."""
    return sys.modules["torch"] if is_torch(array) else np


def to_numpy(array: Array) -> np.ndarray[Any, Any]:
    """The same host memory as a NumPy array; a device tensor is copied to the host first."""
    if not is_torch(array):
        return np.asarray(array)
    torch = sys.modules["torch"]
    name, tensor = dtype_name(array), array.detach().cpu()
    bits = _BITS.get(name)
    view = tensor.view(getattr(torch, bits)) if bits else tensor
    host: np.ndarray[Any, Any] = view.numpy()
    return host.view(NUMPY_DTYPES[name]) if bits else host


def from_numpy(array: np.ndarray[Any, Any]) -> Array:
    """The same host memory as a torch tensor. Raises ImportError without torch, InvalidArgument for negative strides."""
    torch = importlib.import_module("torch")
    if any(stride < 0 for stride in array.strides):
        raise InvalidArgument(f"an array, {describe(array)}, has a negative stride, which torch cannot share; pass a copy.")
    bits = _BITS.get(array.dtype.name)
    if bits is None:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(bits)).view(getattr(torch, array.dtype.name))


def kind(array: Array) -> str:
    """`torch` or `numpy`."""
    return "torch" if is_torch(array) else "numpy"


def as_kind(array: Array, wanted: str) -> Array:
    """The same memory as the wanted kind (`torch` or `numpy`) of array; what is no array passes through."""
    if not is_array(array) or kind(array) == wanted:
        return array
    return to_numpy(array) if wanted == "numpy" else from_numpy(array)


def host_as_kind(array: Array, wanted: str) -> Array:
    """The same host memory as the wanted kind of array; what is no array or lives on a device passes through."""
    return as_kind(array, wanted) if is_array(array) and on_host(array) else array


def beside(array: Array, other: Array) -> Array:
    """The array where `other` lives and of its kind; host memory is shared or copied to a device, never the reverse."""
    if device_of(array) != device_of(other) and not on_host(array):
        raise InvalidArgument(
            f"{describe(array)} meets {describe(other)}, but one device is accepted; move the second to the first."
        )
    array = as_kind(array, kind(other))
    return array.to(other.device) if is_torch(other) else array


def cast(array: Array, dtype: str) -> Array:
    """The array in another dtype, by the contract's name of it."""
    return array.to(getattr(sys.modules["torch"], dtype)) if is_torch(array) else array.astype(NUMPY_DTYPES[dtype])


def row_numbers(rows: int, other: Array) -> Array:
    """int32 [rows], 0, 1, 2, ..., where `other` lives."""
    if is_torch(other):
        torch = sys.modules["torch"]
        return torch.arange(rows, dtype=torch.int32, device=other.device)
    return np.arange(rows, dtype=np.int32)


def as_int(value: object) -> int | None:
    """The integer that value is, NumPy's scalars included; None for a bool, an array (it may be on a device) or a fraction."""
    if isinstance(value, bool) or is_array(value):
        return None
    symbolic = getattr(sys.modules.get("torch"), "SymInt", ())
    try:
        # operator.index would fix the number that a compiler leaves open.
        number: int = value if isinstance(value, symbolic) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None
    return number


def describe(array: object) -> str:
    """`float32 [3, 4] on cpu`, for error messages."""
    if not is_array(array):
        return f"{type(array).__name__} {reprlib.repr(array)}"
    return f"{dtype_name(array)} {list(array.shape)} on {device_of(array)}"  # type: ignore[attr-defined]
