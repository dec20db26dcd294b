"""NumPy arrays and torch tensors look the same from here: dtype by name, device by name, host memory shared and never copied.

torch is never imported: a torch tensor can only reach us from a caller who has imported it already.
"""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

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
    """True for what the operators take as an array: a NumPy array or a torch tensor."""
    return isinstance(value, np.ndarray) or is_torch(value)


def dtype_name(array: Array) -> str:
    """The dtype's name as the contract spells it, e.g. `float8_e4m3fn`; the same for NumPy and torch."""
    return str(array.dtype).removeprefix("torch.")


def device_name(array: Array) -> str:
    """The kind of device the array lives on: `cpu`, `cuda`, `npu`, ... (a NumPy array lives on `cpu`)."""
    return str(array.device.type) if is_torch(array) else "cpu"


def on_host(array: Array) -> bool:
    """True where the host can read the array's values without a device synchronisation."""
    return device_name(array) == "cpu"


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
    """The same host memory as a torch tensor; torch must have been imported already."""
    torch = sys.modules["torch"]
    bits = _BITS.get(array.dtype.name)
    if bits is None:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(NUMPY_DTYPES[bits])).view(getattr(torch, array.dtype.name))


def kind(array: Array) -> str:
    """`torch` or `numpy`."""
    return "torch" if is_torch(array) else "numpy"


def as_kind(array: Array, wanted: str) -> Array:
    """The same memory as the wanted kind (`torch` or `numpy`) of array; what is no array passes through."""
    if not is_array(array) or kind(array) == wanted:
        return array
    return to_numpy(array) if wanted == "numpy" else from_numpy(array)


def describe(array: object) -> str:
    """`float32 [3, 4] on cpu`, for error messages."""
    if not is_array(array):
        return f"{type(array).__name__} {array!r}"
    return f"{dtype_name(array)} {list(array.shape)} on {device_name(array)}"  # type: ignore[attr-defined]
