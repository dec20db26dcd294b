"""Arrays in .npz files: what NumPy has no dtype for is stored as its bits, under `name@dtype`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsa_portable.arrays import NUMPY_DTYPES

Arrays = Mapping[str, np.ndarray[Any, Any]]


def can_hold(array: np.ndarray[Any, Any]) -> bool:
    """True for NumPy's own numbers and the contract's dtypes; other packages' dtypes may have NumPy's kinds."""
    return (array.dtype.isbuiltin == 1 and array.dtype.kind in "biuf") or array.dtype.name in NUMPY_DTYPES


def save(path: Path, arrays: Arrays, *, compress: bool = False) -> None:
    """Write the arrays, whole or not at all."""
    stored = {}
    for name, array in arrays.items():
        native = array.dtype.kind in "biuf"
        stored[name if native else f"{name}@{array.dtype.name}"] = array if native else array.view(f"u{array.dtype.itemsize}")
    write: Any = np.savez_compressed if compress else np.savez
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(aside, "wb") as file:
        write(file, **stored)
    os.replace(aside, path)


def load(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays that `save` wrote, in their own dtypes."""
    found = {}
    with np.load(path, allow_pickle=False) as stored:
        for key in stored.files:
            name, _, dtype = key.partition("@")
            found[name] = stored[key].view(NUMPY_DTYPES[dtype]) if dtype else stored[key]
    return found
