"""What faults do with memory: arrays read and written as if they were contiguous, and what an earlier call has left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.cases.surroundings import STRIDES

Array: TypeAlias = np.ndarray[Any, Any]


def _from_its_first_byte(laid: Array) -> Array:
    """The same shape over the same memory, each number behind the one before; no layout of STRIDES ends earlier."""
    strides = np.empty(laid.shape, np.bool_).strides
    return np.lib.stride_tricks.as_strided(laid, laid.shape, [stride * laid.itemsize for stride in strides])


def as_contiguous(call: Call, *names: str) -> Call:
    """The call as it is seen by a kernel that reads these arrays, `batch.` before those of the batch, without their strides."""

    def seen(arrays: Mapping[str, Array], prefix: str = "") -> dict[str, Array]:
        return {
            name: _from_its_first_byte(STRIDES[call.strides](array, lambda a: a)) if prefix + name in names else array
            for name, array in arrays.items()
        }

    return replace(call, arrays=seen(call.arrays), batch=seen(call.batch, "batch."))


def written_as_contiguous(call: Call, result: Array) -> Array:
    """What the caller finds in an array of the call's strides that a kernel without strides has written this result to."""
    if not call.options.get("out"):
        return result
    laid: Array = STRIDES[call.strides](np.full_like(result, -1), lambda a: a)
    _from_its_first_byte(laid)[...] = result
    return np.array(laid, order="C")


def remembered(earlier: dict[Any, Array], call: Call, name: str) -> dict[str, Array]:
    """The call's batch with an array of the first call that had so many rows and requests, as a graph that was captured has."""
    shape = len(call.arrays["q"]), len(call.batch["seqlens_k"])
    return {**call.batch, name: earlier.setdefault(shape, call.batch[name])}
