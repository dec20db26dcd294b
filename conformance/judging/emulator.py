"""What an honest chip with the declared numerics would return, in NumPy: the yardstick for errors, never the truth.

It models the accumulator (accumulator.py) and every declared rounding, and nothing else.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.judging import oracle
from dsa_portable.conformance.judging.accumulator import Float32, dot, rounded
from dsa_portable.profile import SMALLEST_NORMAL, WIDE, Profile

Array: TypeAlias = np.ndarray[Any, Any]
Float64: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]


TILE = 64  # keys between two renewals of the running maximum and of a normaliser that is kept in 16 bits
SPLITS = 2  # of the keys, where what splits leave is rounded before they are merged


def held(values: Array, dtype: str, profile: Profile) -> Float32:
    """The values as the chip keeps them in this format: rounded, and subnormals flushed where it does that."""
    kept = rounded(values, dtype)
    if profile.subnormals == "flushed":
        kept = np.where(abs(kept) < SMALLEST_NORMAL[dtype], np.float32(0), kept)
    return kept


def stored(dots: Array, profile: Profile) -> Float32:
    """Dot products as the profile's intermediate keeps them: scaled by a power of two, rounded, scaled back."""
    factor = np.float32(2.0**profile.intermediate_exponent)
    return np.asarray(held(dots * factor, profile.intermediate, profile) / factor)


def index_operands(q: Array, codes: Float64, scale: Float64, profile: Profile) -> tuple[Float32, Float32, Float32, str]:
    """(q, keys, what is left of their scales, format of the products): codes, or keys dequantised and rounded to qk_compute."""
    single, factor = q.astype(np.float32), held(scale, profile.scale_compute, profile)
    if profile.qk_compute in WIDE:
        return single, codes.astype(np.float32), factor, q.dtype.name
    keys = held(codes.astype(np.float32) * factor[:, None], profile.qk_compute, profile)
    return held(single, profile.qk_compute, profile), keys, np.ones_like(factor), profile.qk_compute


def orders(dim: int) -> list[Any]:
    """Three orders in which a kernel may sum a dot product: from the first dimension, from the last, and in strides."""
    return [slice(None), slice(None, None, -1), np.argsort(np.arange(dim) * 7919 % 104729)]


def index_scores(call: Call, profile: Profile, order: Any = slice(None)) -> dict[int, Float32]:
    """Row -> float32 scores of the positions it sees, from its start on; rows of no request are absent.

    `order`: of the dimensions, one of `orders`.
    """
    scores: dict[int, Float32] = {}
    spans = list(oracle.rows(call))
    weights = held(call.arrays["weights"], profile.head_sum, profile)
    for request in range(len(call.batch["seqlens_k"])):
        mine = [span for span in spans if span[1] == request and span[2] < span[3]]
        if not mine:
            continue
        low, high = min(span[2] for span in mine), max(span[3] for span in mine)
        codes, scales = oracle.index_keys(call, request, np.arange(low, high))
        queries, keys, scale, operands = index_operands(call.arrays["q"], codes, scales, profile)
        queries, keys = queries[..., order], keys[:, order]
        for row, _, start, end in mine:
            parts = []
            for first in range(start, end, oracle.TILE):
                tile = slice(first - low, min(first + oracle.TILE, end) - low)
                dots = stored(dot(queries[row], keys[tile], profile.accumulator, operands), profile)
                total = held(weights[row] @ np.maximum(dots, 0), profile.head_sum, profile)
                parts.append(held(total * scale[tile], profile.logit, profile))
            scores[row] = np.concatenate(parts)
    return scores


def attention_row(call: Call, row: int, request: int, profile: Profile) -> Float64:
    """kv [n, Dqk] of a row, with the scales of a packed cache as the profile keeps them."""
    return oracle.attention_row(call, row, request, lambda scale: held(scale, profile.scale_compute, profile))[0]


def attention(
    q: Array, kv: Array, softmax_scale: float, value_dim: int, sink: Array | None, profile: Profile
) -> tuple[Array, Array]:
    """(out [Hq, value_dim] in q's dtype, lse [Hq]) of one row over all of kv [n >= 1, Dqk], given in float64."""
    keys, queries = held(kv, profile.kv_compute, profile), held(q, profile.kv_compute, profile)
    operands = q.dtype.name if profile.kv_compute in WIDE else profile.kv_compute
    logits = dot(queries, keys, profile.accumulator, operands) * np.float32(softmax_scale)
    logits, values = held(logits, profile.logit, profile), keys[:, :value_dim]
    if profile.partials in WIDE and profile.lse in WIDE:
        weighted, total, top = _online(logits, values, profile, operands)
        lse = top + np.log(total)
        kept, total = beside_sink(total, top, sink)
        return (weighted * kept[:, None] / total[:, None]).astype(q.dtype), lse
    outs, lses = [], []
    for split in np.array_split(np.arange(len(kv)), min(SPLITS, len(kv))):
        weighted, total, top = _online(logits[:, split], values[split], profile, operands)
        outs.append(held(weighted / total[:, None], profile.partials, profile))
        lses.append(held(top + np.log(total), profile.lse, profile))
    top = np.maximum.reduce(lses)
    shares = [np.exp(lse - top) for lse in lses]
    lse = top + np.log(np.sum(shares, axis=0))
    kept, total = beside_sink(np.sum(shares, axis=0), top, sink)
    merged = sum(share[:, None] * out for share, out in zip(shares, outs, strict=True)) * kept[:, None] / total[:, None]
    return merged.astype(q.dtype), held(lse, profile.lse, profile)


def beside_sink(total: Array, top: Array, sink: Array | None) -> tuple[Array, Array]:
    """(what the keys are multiplied by [Hq], the normaliser [Hq]) with the sink in it, in units of the larger of top and sink.

    In units of top alone, exp(sink - top) overflows beyond 88, and nothing is left of keys that still have a share.
    """
    if sink is None:
        return np.ones_like(total), total
    sink = np.minimum(sink, np.finfo(np.float32).max)  # inf - inf is NaN
    largest = np.maximum(top, sink)
    kept = np.exp(top - largest)
    return kept, total * kept + np.exp(sink - largest)


def _online(logits: Float32, values: Float32, profile: Profile, operands: str) -> tuple[Array, Array, Array]:
    """(P V [Hq, value_dim], sum of P [Hq], the maximum that was subtracted [Hq]), in one pass over the keys."""
    tiled = profile.rescale_threshold > 0 or not {profile.maximum, profile.normaliser_sum} <= WIDE
    size = TILE if tiled else len(values)
    top = np.full(len(logits), -np.inf, np.float32)
    total, weighted = np.zeros_like(top), np.zeros((len(logits), values.shape[1]), np.float32)
    for first in range(0, len(values), size):
        tile = slice(first, first + size)
        highest = held(logits[:, tile].max(axis=1), profile.maximum, profile)
        renewed = np.where(highest > top + np.float32(profile.rescale_threshold), highest, top)
        shrink, top = np.exp(top - renewed), renewed
        shares = exp(logits[:, tile] - top[:, None], profile)
        p = held(shares, profile.p, profile)
        summed = (p if profile.normaliser == "rounded" else shares).sum(axis=1)
        total = held(total * shrink + summed, profile.normaliser_sum, profile)
        block = dot(p, np.ascontiguousarray(values[tile].T), profile.accumulator, operands)
        weighted = weighted * shrink[:, None] + block
    return weighted, total, top


def exp(x: Float32, profile: Profile) -> Float32:
    """e^x with the error that the profile allows, 0 at 0: it swings with the fraction of x log2(e), as a polynomial's does."""
    swing = np.sin(np.float32(2 * np.pi * np.log2(np.e)) * x)
    return np.asarray(np.exp(x) * (1 + np.float32(profile.exp_ulp * 2.0**-24) * swing), np.float32)
