"""What an honest chip with the declared numerics would return, in NumPy: the yardstick for errors, never the truth.

It models the accumulator (accumulator.py) and every declared rounding, and nothing else.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.judging import oracle
from dsa_portable.conformance.judging.accumulator import Float32, dot, rounded
from dsa_portable.profile import Accumulator, Profile

Array: TypeAlias = np.ndarray[Any, Any]


def stored(dots: Array, profile: Profile) -> Float32:
    """Dot products as the profile's intermediate keeps them: scaled by a power of two, rounded, scaled back."""
    factor = np.float32(2.0**profile.intermediate_exponent)
    return np.asarray(rounded(dots * factor, profile.intermediate) / factor)


def index_scores(call: Call, profile: Profile) -> dict[int, Float32]:
    """Row -> float32 scores of the positions it sees, from its start on; rows of no request are absent."""
    scores: dict[int, Float32] = {}
    spans = list(oracle.rows(call))
    weights = rounded(call.arrays["weights"], profile.head_sum)
    exact = call.arrays["q"].dtype == np.int8 and profile.accumulator.bits >= 24
    accumulator = Accumulator() if exact else profile.accumulator
    for request in range(len(call.batch["seqlens_k"])):
        mine = [span for span in spans if span[1] == request and span[2] < span[3]]
        if not mine:
            continue
        low, high = min(span[2] for span in mine), max(span[3] for span in mine)
        wide_keys, wide_scale = oracle.index_keys(call, request, np.arange(low, high))
        keys, scale = wide_keys.astype(np.float32), rounded(wide_scale, profile.scale_compute)
        for row, _, start, end in mine:
            parts = []
            for first in range(start, end, oracle.TILE):
                tile = slice(first - low, min(first + oracle.TILE, end) - low)
                dots = stored(dot(call.arrays["q"][row], keys[tile], accumulator, call.arrays["q"].dtype.name), profile)
                total = rounded(weights[row] @ np.maximum(dots, 0), profile.head_sum)
                parts.append(rounded(total * scale[tile], profile.logit))
            scores[row] = np.concatenate(parts)
    return scores


def attention(
    q: Array, kv: Array, softmax_scale: float, value_dim: int, sink: Array | None, profile: Profile
) -> tuple[Array, Array]:
    """(out [Hq, value_dim] in q's dtype, lse [Hq]) of one row over all of kv [n >= 1, Dqk], given in float64."""
    keys = rounded(kv, profile.kv_compute)
    logits = rounded(dot(q, keys, profile.accumulator) * np.float32(softmax_scale), profile.logit)
    top = logits.max(axis=1)
    exact_p = np.exp(logits - top[:, None])
    p = rounded(exact_p, profile.p)
    total = (p if profile.normaliser == "rounded" else exact_p).sum(axis=1)
    lse = top + np.log(total)
    with np.errstate(over="ignore"):
        total = total if sink is None else total + np.exp(sink - top)
    out = dot(p, np.ascontiguousarray(keys[:, :value_dim].T), profile.accumulator) / total[:, None]
    return out.astype(q.dtype), lse
