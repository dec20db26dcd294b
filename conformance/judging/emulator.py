"""What an honest chip with the declared numerics would return, in NumPy: the yardstick for errors, never the truth.

It models the accumulator (rounded or truncated, aligned to the largest exponent of a group) and every declared rounding, and
nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.arrays import NUMPY_DTYPES
from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.judging import oracle
from dsa_portable.profile import Accumulator, Profile

Array: TypeAlias = np.ndarray[Any, Any]
Float32: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

BLOCK = 256  # keys per step of a reduced accumulator


def rounded(values: Array, dtype: str) -> Float32:
    """float32 values rounded to the named dtype and back."""
    if dtype in ("float32", "float64"):
        return values.astype(np.float32)
    with np.errstate(over="ignore"):
        return values.astype(np.float32).astype(NUMPY_DTYPES[dtype]).astype(np.float32)


def stored(dots: Array, profile: Profile) -> Float32:
    """Dot products as the profile's intermediate keeps them: scaled by a power of two, rounded, scaled back."""
    factor = np.float32(2.0**profile.intermediate_exponent)
    return np.asarray(rounded(dots * factor, profile.intermediate) / factor)


def dot(a: Array, b: Array, accumulator: Accumulator) -> Float32:
    """[m, n]: a [m, d] times b [n, d] transposed, summed as the accumulator sums."""
    a, b = a.astype(np.float32), b.astype(np.float32, copy=False)
    if accumulator.bits >= 24:
        return np.asarray(a @ b.T)
    blocks = [_reduced(a, b[first : first + BLOCK], accumulator) for first in range(0, len(b), BLOCK)]
    return np.concatenate([np.empty((len(a), 0), np.float32), *blocks], axis=1)


def _reduced(a: Array, b: Array, accumulator: Accumulator) -> Float32:
    """The bits of `_aligned`, from machine code where numba is installed."""
    compiled = _compiled()
    # A group's cut products are whole units, none above 2^bits: as long as they sum to no more than 2^24, any order is exact.
    if compiled is not None and accumulator.group << accumulator.bits <= 1 << 24:
        total = compiled(a, np.ascontiguousarray(b.T), accumulator.bits, accumulator.group, accumulator.rounding == "RZ")
        # An infinite or undefined product has no unit, so order matters again; no such total becomes finite later.
        if np.isfinite(total).all():
            return total
    return _aligned(a, b, accumulator)


def _aligned(a: Array, b: Array, accumulator: Accumulator) -> Float32:
    """Dot products of few keys, which stay in the cache: each group of products is cut to a common unit and added."""
    total = np.zeros((len(a), len(b)), np.float32)
    cut = np.trunc if accumulator.rounding == "RZ" else np.rint
    for first in range(0, a.shape[1], accumulator.group):
        group = slice(first, first + accumulator.group)
        products = a.T[group, :, None] * b.T[group, None, :]
        largest = np.maximum(abs(products).max(axis=0), abs(total))
        # One unit in the last kept place, for the whole group: 2^(exponent of the largest - bits), and no subnormal.
        unit = np.ldexp(np.float32(1), np.maximum(np.frexp(largest)[1] - accumulator.bits, -126))
        per_unit = 1 / unit
        products *= per_unit
        total = (cut(total * per_unit) + cut(products, out=products).sum(axis=0)) * unit
    return total


@cache
def _compiled() -> Callable[..., Float32] | None:
    """`_aligned_in_loops` in machine code; None without numba, or where it may write its cache nowhere (RuntimeError)."""
    try:
        from numba import njit

        compiled: Callable[..., Float32] = njit(cache=True, nogil=True)(_aligned_in_loops)
    except (ImportError, RuntimeError):
        return None
    return compiled


def _aligned_in_loops(a: Array, b: Array, bits: int, group: int, truncate: bool) -> Float32:
    """`_aligned` of a [m, d] and b [d, n], in the loops that numba compiles: the innermost becomes vector instructions."""
    (m, d), n = a.shape, b.shape[1]
    totals = np.zeros((m, n), np.float32)
    largest, added = np.empty(n, np.float32), np.empty(n, np.float32)
    unit, per_unit = np.empty(n, np.float32), np.empty(n, np.float32)
    for i in range(m):
        total = totals[i]
        for first in range(0, d, group):
            last = min(first + group, d)
            for j in range(n):
                largest[j] = abs(total[j])
                added[j] = 0
            for k in range(first, last):
                for j in range(n):
                    largest[j] = max(largest[j], abs(a[i, k] * b[k, j]))
            for j in range(n):
                # Powers of two by their exponent fields: frexp's exponent is the field - 126, and 2^-126 has the field 1.
                field = max((largest.view(np.int32)[j] >> 23) + 1 - bits, 1)
                unit.view(np.int32)[j] = field << 23
                per_unit.view(np.int32)[j] = (254 - field) << 23
            for k in range(first, last):
                for j in range(n):
                    scaled = a[i, k] * b[k, j] * per_unit[j]
                    added[j] += np.trunc(scaled) if truncate else np.rint(scaled)
            for j in range(n):
                carried = total[j] * per_unit[j]
                total[j] = ((np.trunc(carried) if truncate else np.rint(carried)) + added[j]) * unit[j]
    return totals


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
                dots = stored(dot(call.arrays["q"][row], keys[tile], accumulator), profile)
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
