"""What several attention faults share: sizes that a port assumes, calls changed in one respect, reads without a check."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.faults.implementation import Array, SparseAttend

TILE, SPLITS, PAGE, HEADS = 64, 8, 64, 64
LATENT = 512  # dimensions of a key that are not rotated
# The layout of the same shape whose scales and rotated part stand in the other order.
OTHER_ORDER = {
    "v32_fp8_656_nsr": "ascend_656_nrs_fp8",
    "v32_fp8_656_nsr_f32": "ascend_656_nrs_fp8",
    "ascend_656_nrs_fp8": "v32_fp8_656_nsr_f32",
    "ascend_656_nrs_int8": "v32_fp8_656_nsr_f32",
}


class Unchecked(SparseAttend):
    """Not a fault by itself: what lies outside the table or the memory is read somewhere inside, as on a lucky day."""

    def page(self, call: Call, request: int, page: Array) -> Array:
        """Within the table."""
        return super().page(call, request, np.minimum(page, call.batch["block_table"].shape[1] - 1))

    def slots(self, call: Call, request: int, positions: Array) -> Array:
        """Within the memory."""
        return np.asarray(super().slots(call, request, positions) % memory_rows(call))


def memory_rows(call: Call) -> int:
    """Keys that the memory has room for, pages flattened."""
    kv = call.arrays["kv"]
    return int(kv.size // kv.shape[-1])


def with_length(call: Call, request: int, length: int) -> Call:
    """The call with another number of keys in one request."""
    lengths = call.batch["seqlens_k"].copy()
    lengths[request] = length
    return replace(call, batch={**call.batch, "seqlens_k": lengths})


def with_arrays(call: Call, **arrays: Array) -> Call:
    """The call with other arrays."""
    return replace(call, arrays={**call.arrays, **arrays})
