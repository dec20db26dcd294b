"""The honest population: right kernels that compute in other ways, each with the profile that it would honestly declare.

Each is an edit of the honest kernel, as a fault is; what it computes with stands beside what it declares. None may be accused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance.judging.accumulator import Float32, aligned, dot, narrowed, rounded
from dsa_portable.conformance.selftest.plant import Edit, Fault, Kernel, kernel
from dsa_portable.profile import Accumulator, Profile

Array: TypeAlias = np.ndarray[Any, Any]
Sums: TypeAlias = Callable[[Array, Array, Accumulator], Float32]

# --- orders of summation: a [m, d] times b [n, d] transposed ---


def in_order(a: Array, b: Array, accumulator: Accumulator) -> Float32:
    """The first dimension first."""
    return dot(a, b, accumulator)


def interleaved(a: Array, b: Array, accumulator: Accumulator) -> Float32:
    """In strides, as threads take them."""
    order = np.argsort(np.arange(a.shape[1]) * 7907 % 104723)
    return dot(a[:, order], b[:, order], accumulator)


def blocks_of(size: int) -> Sums:
    """Partial sums of so many products, added in float32."""

    def blocks(a: Array, b: Array, accumulator: Accumulator) -> Float32:
        total = np.zeros((len(a), len(b)), np.float32)
        for first in range(0, a.shape[1], size):
            total = total + dot(a[:, first : first + size], b[:, first : first + size], accumulator)
        return total

    return blocks


def one_by_one(a: Array, b: Array, accumulator: Accumulator) -> Float32:
    """One float32 product after the other, as without a matrix unit."""
    a, b, total = a.astype(np.float32), b.astype(np.float32), np.zeros((len(a), len(b)), np.float32)
    for d in range(a.shape[1]):
        total += a[:, d, None] * b[None, :, d]
    return total


def as_a_tree(a: Array, b: Array, accumulator: Accumulator) -> Float32:
    """float32 halves of the products, added pairwise."""
    if a.shape[1] <= 8:
        return one_by_one(a, b, accumulator)
    half = a.shape[1] // 2
    return as_a_tree(a[:, :half], b[:, :half], accumulator) + as_a_tree(a[:, half:], b[:, half:], accumulator)


def in_float64(a: Array, b: Array, accumulator: Accumulator) -> Float32:
    """Better than anything that is declared."""
    return np.asarray(a.astype(np.float64) @ b.astype(np.float64).T, np.float32)


def truncating(a: Array, b: Array, accumulator: Accumulator, running: Array | float = 0.0) -> Float32:
    """Truncation to 24 bits, which judging takes for float32, is real: groups are exact, and each sum with them is cut."""
    total: Array = np.zeros((len(a), len(b))) + running
    for first in range(0, a.shape[1], accumulator.group):
        group = slice(first, first + accumulator.group)
        products = a[:, group].astype(np.float64) @ b[:, group].astype(np.float64).T
        total = narrowed(total + products, accumulator.bits, accumulator.rounding)
    return np.asarray(total, np.float32)


# --- the index ---


def dequantised(q: Array, keys: Array, scale: Array, how: Profile) -> Float32:
    """Dot products of operands rounded to qk_compute, the scale inside them."""
    wide = keys * rounded(scale, how.scale_compute)[:, None]
    return dot(rounded(q, how.qk_compute), rounded(wide, how.qk_compute), how.accumulator)


def heads_in_turn(w: Array, dots: Array) -> Array:
    """One head after the other, in float32."""
    total = np.zeros(dots.shape[1], np.float32)
    for head in range(len(w)):
        total += w[head] * np.maximum(dots[head], 0)
    return total


def by_partition(ranked: Array, topk: int) -> Array:
    """Whichever of equal scores a partition leaves in front."""
    return np.argpartition(-ranked, topk - 1)[:topk] if topk < len(ranked) else np.arange(len(ranked))


# --- attention ---


@dataclass(frozen=True)
class Way:
    """How the keys are walked: what no profile says, since it may not matter."""

    tile: int = 64  # 0: all keys at once
    splits: int = 1
    sums: Sums = in_order
    passes: int = 1  # 2: the maximum of all keys first
    base_two: bool = False  # exp2 of logits times log2(e)
    by_lse: bool = True  # splits are weighted by lse, or by maximum and sum
    backwards: bool = False
    across: bool = False  # the reduced accumulator runs on from tile to tile
    scaled_query: bool = False  # softmax_scale multiplies q, in float32
    minus_lse: bool = False  # P is exp(x - lse) in a second pass
    slack: float = 0.0  # exp is wrong by so many units of 2^-24, always upwards, but for exp(0) = 1


def attend(
    q: Array, kv: Array, width: int, softmax_scale: np.float32, sink: Array | None, how: Profile, way: Way
) -> tuple[Array, Array]:
    """(out [Hq, width] in q's dtype, lse [Hq]) of one row over kv [n, Dqk], as `way` walks and `how` rounds."""
    kv = kv[::-1] if way.backwards else kv
    query = rounded(q, how.kv_compute)
    query, after = (query * softmax_scale, np.float32(1)) if way.scaled_query else (query, softmax_scale)
    x: Array = np.asarray(way.sums(query, kv, how.accumulator) * after, np.float32)
    splits = np.array_split(np.arange(len(kv)), min(way.splits, len(kv)))
    parts = [_walk(x[:, split], np.ascontiguousarray(kv[split, :width]), how, way) for split in splits]
    if len(parts) == 1:
        weighted, total, top = parts[0]
        lse = rounded(top + np.log(total), how.lse)
        return (rounded(weighted / (total + _sink(sink, top))[:, None], how.partials)).astype(q.dtype), lse
    if not way.by_lse:
        top = np.maximum.reduce([part[2] for part in parts])
        factors = [np.exp(part[2] - top) for part in parts]
        total = sum(factor * part[1] for factor, part in zip(factors, parts, strict=True))
        weighted = sum(factor[:, None] * part[0] for factor, part in zip(factors, parts, strict=True))
        return (weighted / (total + _sink(sink, top))[:, None]).astype(q.dtype), rounded(top + np.log(total), how.lse)
    lses = [rounded(top + np.log(total), how.lse) for _, total, top in parts]
    outs = [rounded(weighted / total[:, None], how.partials) for weighted, total, _ in parts]
    top = np.maximum.reduce(lses)
    shares = [np.exp(lse - top) for lse in lses]
    total = np.asarray(np.sum(shares, axis=0), np.float32)
    merged = sum(share[:, None] * out for share, out in zip(shares, outs, strict=True))
    return (merged / (total + _sink(sink, top))[:, None]).astype(q.dtype), rounded(top + np.log(total), how.lse)


def _sink(sink: Array | None, top: Array) -> Any:
    return np.float32(0) if sink is None else np.exp(sink - top)


def _exp(x: Array, way: Way) -> Array:
    found = np.exp2(x * np.float32(np.log2(np.e))) if way.base_two else np.exp(x)
    return np.asarray(np.where(x == 0, np.float32(1), found * np.float32(1 + way.slack * 2.0**-24)), np.float32)


def _walk(x: Array, values: Array, how: Profile, way: Way) -> tuple[Array, Array, Array]:
    """(P V, sum of P, the maximum that was subtracted) of one split."""
    size = way.tile or len(values)
    top = np.full(len(x), -np.inf, np.float32)
    if way.passes == 2:
        top = rounded(x.max(axis=1), how.maximum)
    if way.minus_lse:
        top = np.asarray(x.max(axis=1) + np.log(np.exp(x - x.max(axis=1)[:, None]).sum(axis=1)), np.float32)
    total, weighted = np.zeros_like(top), np.zeros((len(x), values.shape[1]), np.float32)
    for first in range(0, len(values), size):
        tile = slice(first, first + size)
        renewed = top
        if way.passes == 1 and not way.minus_lse:
            highest = rounded(x[:, tile].max(axis=1), how.maximum)
            renewed = np.where(highest > top + np.float32(how.rescale_threshold), highest, top)
        shrink, top = np.exp(top - renewed), renewed
        shares = _exp(x[:, tile] - top[:, None], way)
        p = rounded(shares, how.p)
        summed = (p if how.normaliser == "rounded" else shares).sum(axis=1)
        total = rounded(total * shrink + summed, how.normaliser_sum)
        columns = np.ascontiguousarray(values[tile].T)
        if way.across:
            weighted = _running_on(p, columns, how.accumulator, weighted * shrink[:, None])
        else:
            weighted = weighted * shrink[:, None] + way.sums(p, columns, how.accumulator)
    return weighted, total, top


def _running_on(p: Array, columns: Array, accumulator: Accumulator, running: Array) -> Array:
    if accumulator.bits >= 24:
        return truncating(p, columns, accumulator, running)
    step = 128
    blocks = range(0, len(columns), step)
    done = [aligned(p, columns[b : b + step], accumulator, "bfloat16", running[:, b : b + step]) for b in blocks]
    return np.concatenate(done, axis=1)


# --- the table ---


@dataclass(frozen=True)
class Honest:
    """A right kernel: edits of kernel.py, what it computes with, and what it declares (the same where nothing is said)."""

    operator: str
    name: str
    computes: Profile
    edits: tuple[Edit, ...]
    way: Way | None = None
    declares: Profile | None = None

    @property
    def profile(self) -> Profile:
        """What it is judged by."""
        return self.declares or self.computes

    def kernel(self) -> Kernel:
        """A fresh one."""
        first, *more = self.edits or ((_START, _START),)
        fault = Fault("", self.name, *first, more=tuple(more))
        return kernel(self.computes, fault, {**globals(), "WAY": self.way})


# What edits take hold of in kernel.py.
_START = "# What the row sees."
_DOT = "dot(q[heads][:, ::-1], keys[:, ::-1], profile.accumulator)"
_HEADS = "w[heads] @ np.maximum(dots, 0)"
_FOUND = "rounded(total * rounded(scale, profile.scale_compute), profile.logit)"
_SELECT = 'np.argsort(-ranked, kind="stable")[:topk]'
_SORT = "np.sort(best)"
_ATTEND = 'q = call.arrays["q"][row].astype(np.float32)'
_SCALES: Edit = ("np.repeat(scales, ", "np.repeat(rounded(scales, profile.scale_compute), ")
_ATTENDED = f"""outputs[row], lses[row] = attend(
                call.arrays["q"][row], kv, value_dim, softmax_scale, sink, profile, WAY
            )
            continue
            {_ATTEND}"""


def _sums(name: str) -> Edit:
    return _DOT, f"{name}(q[heads], keys, profile.accumulator)"


PLAIN = Profile(ties="lowest")
RZ13, RZ14 = Accumulator(13, "RZ", 32), Accumulator(14, "RZ", 32)
BFLOAT, HALF = (
    replace(PLAIN, logit="bfloat16"),
    replace(PLAIN, intermediate="float16", intermediate_exponent=-10, finite_max=65504.0),
)
HIGHEST: Edit = (_SELECT, 'np.argsort(ranked, kind="stable")[::-1][:topk]')
PARTITION: Edit = (_SELECT, "by_partition(ranked, topk)")
IN_TURN: Edit = (_HEADS, "heads_in_turn(w[heads], dots)")
IN_FLOAT64: Edit = (_HEADS, "(w[heads].astype(np.float64) @ np.maximum(dots, 0)).astype(np.float32)")
BY_SCORE: Edit = (_SORT, '(np.sort(best) if options.get("sorted", True) else best)')
SCALE_FIRST: tuple[Edit, ...] = (
    (_HEADS, "w[heads] @ (np.maximum(dots, 0) * rounded(scale, profile.scale_compute))"),
    (_FOUND, "rounded(total, profile.logit)"),
)
SCALE_IN_WEIGHTS: tuple[Edit, ...] = (
    (_HEADS, "(w[heads][:, None] * rounded(scale, profile.scale_compute) * np.maximum(dots, 0)).sum(axis=0)"),
    (_FOUND, "rounded(total, profile.logit)"),
)
DEQUANTISED: tuple[Edit, ...] = (
    (_DOT, "dequantised(q[heads], keys, scale, profile)"),
    (_FOUND, "rounded(total, profile.logit)"),
)


def summed(*accumulator: Any, **more: Any) -> Profile:
    """float32 but for the accumulator."""
    return replace(PLAIN, accumulator=Accumulator(*accumulator, **more))


# name: (computes, edits, declares or None)
_INDEX: Mapping[str, tuple[Profile, tuple[Edit, ...], Profile | None]] = {
    "float32, dimensions last to first": (PLAIN, (), None),
    "float32, first to last": (PLAIN, (_sums("in_order"),), None),
    "float32, interleaved": (PLAIN, (_sums("interleaved"),), None),
    "float32, blocks of 16": (PLAIN, (_sums("blocks_of(16)"),), None),
    "float32, blocks of 64": (PLAIN, (_sums("blocks_of(64)"),), None),
    "float32, one by one": (PLAIN, (_sums("one_by_one"), IN_TURN), None),
    "float32, as a tree": (PLAIN, (_sums("as_a_tree"),), None),
    "float64 throughout": (PLAIN, (_sums("in_float64"), IN_FLOAT64), None),
    "float32, heads in turn": (PLAIN, (IN_TURN,), None),
    "float32, scale before the head sum": (PLAIN, SCALE_FIRST, None),
    "float32, scale in the weights": (PLAIN, SCALE_IN_WEIGHTS, None),
    "float32, ties to the highest": (replace(PLAIN, ties="any"), (HIGHEST,), None),
    "float32, ties as they fall": (replace(PLAIN, ties="any"), (PARTITION,), None),
    "float32, unsorted by score": (PLAIN, (BY_SCORE,), None),
    "float32, subnormals flushed is declared": (PLAIN, (), replace(PLAIN, subnormals="flushed")),
    "float32, truncated in 24 bits": (summed(24, "RZ", 16, guard=2), (_sums("truncating"),), None),
    "13 bits, truncated": (summed(13, "RZ", 32), (), None),
    "13 bits, truncated, interleaved": (summed(13, "RZ", 32), (_sums("interleaved"),), None),
    "13 bits, rounded, groups of 8": (summed(13, "RN", 8), (), None),
    "13 bits, rounded one by one": (summed(13, "RN", 1), (), None),
    "14 bits, truncated": (summed(14, "RZ", 32), (), None),
    "14 bits, truncated, first to last": (summed(14, "RZ", 32), (_sums("in_order"),), None),
    "14 bits, truncated, groups of 16": (summed(14, "RZ", 16), (), None),
    "14 bits, rounded one by one": (summed(14, "RN", 1), (), None),
    "14 bits, truncated, a guard bit": (summed(14, "RZ", 32, guard=1), (), None),
    "14 bits, truncated, promoted every 32": (summed(14, "RZ", 32, promotion=32), (_sums("in_order"),), None),
    "14 bits, truncated, promoted every 64": (summed(14, "RZ", 32, promotion=64), (_sums("interleaved"),), None),
    "14 bits, truncated, promoted every 96": (summed(14, "RZ", 32, promotion=96), (), None),
    "14 bits declared, promoted every 64": (summed(14, "RZ", 32, promotion=64), (), summed(14, "RZ", 32)),
    "14 bits declared, float32 computed": (PLAIN, (), summed(14, "RZ", 32)),
    "13 bits declared, 14 computed": (summed(14, "RZ", 32), (), summed(13, "RZ", 32)),
    "13 bits declared, float64 computed": (PLAIN, (_sums("in_float64"),), summed(13, "RZ", 32)),
    "float16 intermediate": (HALF, (), None),
    "float16 intermediate, heads in turn": (HALF, (IN_TURN, _sums("in_order")), None),
    "float16 intermediate declared, float32 computed": (PLAIN, (), HALF),
    "float16 intermediate of 14 bits": (replace(HALF, accumulator=RZ14), (), None),
    "bfloat16 logits": (BFLOAT, (), None),
    "bfloat16 logits, ties to the highest": (replace(BFLOAT, ties="any"), (HIGHEST,), None),
    "bfloat16 logits of 13 bits": (replace(BFLOAT, accumulator=RZ13), (), None),
    "bfloat16 logits declared, float32 computed": (PLAIN, (), BFLOAT),
    "bfloat16 logits of a float16 intermediate": (replace(HALF, logit="bfloat16"), (), None),
    "keys dequantised to bfloat16": (replace(PLAIN, qk_compute="bfloat16"), DEQUANTISED, None),
    "keys dequantised to tfloat32": (replace(PLAIN, qk_compute="tfloat32"), DEQUANTISED, None),
    "keys dequantised in float32": (PLAIN, DEQUANTISED, None),
    "bfloat16 operands declared, float32 computed": (PLAIN, (), replace(PLAIN, qk_compute="bfloat16")),
    "products of dequantised keys rounded to bfloat16": (
        replace(PLAIN, qk_compute="tfloat32", accumulator=Accumulator(product="bfloat16")),
        DEQUANTISED,
        None,
    ),
    "scales in bfloat16": (replace(PLAIN, scale_compute="bfloat16"), (), None),
}

SIXTEEN = replace(PLAIN, p="bfloat16")
FLOAT16 = replace(PLAIN, p="float16")
HOPPER = replace(SIXTEEN, accumulator=Accumulator(24, "RZ", 16, guard=2))
# name: (computes, way, declares or None)
_ATTENTION: Mapping[str, tuple[Profile, Way, Profile | None]] = {
    "float32, all keys at once": (PLAIN, Way(tile=0), None),
    "float32, tiles of 16": (PLAIN, Way(tile=16), None),
    "float32, tiles of 64": (PLAIN, Way(), None),
    "float32, tiles of 128, backwards": (PLAIN, Way(tile=128, backwards=True), None),
    "float32, tiles of 256, exp2": (PLAIN, Way(tile=256, base_two=True), None),
    "float32, two passes": (PLAIN, Way(passes=2), None),
    "float32, two passes, exp of logit - lse": (PLAIN, Way(minus_lse=True), None),
    "float32, one product after the other": (PLAIN, Way(sums=one_by_one), None),
    "float32, as a tree": (PLAIN, Way(tile=128, sums=as_a_tree), None),
    "float32, normaliser one P after the other": (PLAIN, Way(tile=1, sums=in_float64), None),
    "float32, blocks of 32": (PLAIN, Way(sums=blocks_of(32)), None),
    "float64 sums": (PLAIN, Way(sums=in_float64), None),
    "float32, split 2 by lse": (PLAIN, Way(splits=2), None),
    "float32, split 8 by lse": (PLAIN, Way(splits=8), None),
    "float32, split 32 by lse": (PLAIN, Way(splits=32), None),
    "float32, split 8 by maximum and sum": (PLAIN, Way(splits=8, by_lse=False), None),
    "float32, scaled query": (PLAIN, Way(scaled_query=True), None),
    "float32, exp off by 3 units": (PLAIN, Way(slack=3.0), None),
    "float32, exp off by 60 units": (replace(PLAIN, exp_ulp=64.0), Way(slack=60.0), None),
    "float32, rescaled above 5.5": (replace(PLAIN, rescale_threshold=5.5), Way(), None),
    "P in bfloat16, tiles of 64": (SIXTEEN, Way(), None),
    "P in bfloat16, all keys at once": (SIXTEEN, Way(tile=0), None),
    "P in bfloat16, tiles of 16, exp2": (SIXTEEN, Way(tile=16, base_two=True), None),
    "P in bfloat16, two passes": (SIXTEEN, Way(tile=128, passes=2), None),
    "P in bfloat16, exp of logit - lse": (SIXTEEN, Way(minus_lse=True), None),
    "P in bfloat16, split 2 by lse": (SIXTEEN, Way(splits=2), None),
    "P in bfloat16, split 8 by lse": (SIXTEEN, Way(splits=8, base_two=True), None),
    "P in bfloat16, split 32 by maximum and sum": (SIXTEEN, Way(splits=32, by_lse=False), None),
    "P in bfloat16, summed after rounding": (replace(SIXTEEN, normaliser="rounded"), Way(), None),
    "P in bfloat16, summed after rounding, split 8": (replace(SIXTEEN, normaliser="rounded"), Way(splits=8, tile=32), None),
    "P in bfloat16, rescaled above 5.5": (replace(SIXTEEN, rescale_threshold=5.5), Way(tile=128), None),
    "P in bfloat16, rescaled above 5.5, split 2": (replace(SIXTEEN, rescale_threshold=5.5), Way(splits=2), None),
    "P in float16, tiles of 64": (FLOAT16, Way(), None),
    "P in float16, split 8": (FLOAT16, Way(splits=8, tile=128), None),
    "P in float16, rescaled above 8": (replace(FLOAT16, rescale_threshold=8.0), Way(), None),
    "P in tfloat32, kv in tfloat32": (replace(PLAIN, p="tfloat32", kv_compute="tfloat32"), Way(), None),
    "P and kv in bfloat16": (replace(SIXTEEN, kv_compute="bfloat16"), Way(), None),
    "P and kv in float16": (replace(FLOAT16, kv_compute="float16"), Way(tile=128), None),
    "P in bfloat16 declared, float32 computed": (PLAIN, Way(), SIXTEEN),
    "P in bfloat16 declared, float64 sums computed": (PLAIN, Way(tile=0, sums=in_float64), SIXTEEN),
    "split outputs in bfloat16": (replace(SIXTEEN, partials="bfloat16"), Way(splits=8), None),
    "split outputs in float16": (replace(FLOAT16, partials="float16"), Way(splits=2), None),
    "split outputs and lse in bfloat16": (replace(SIXTEEN, partials="bfloat16", lse="bfloat16"), Way(splits=4), None),
    "lse in float16": (replace(SIXTEEN, lse="float16"), Way(splits=8), None),
    "lse in bfloat16, returned": (replace(SIXTEEN, lse="bfloat16"), Way(), None),
    "maximum in bfloat16": (replace(SIXTEEN, maximum="bfloat16"), Way(), None),
    "maximum in float16, two passes": (replace(FLOAT16, maximum="float16"), Way(passes=2), None),
    "normaliser in float16": (replace(FLOAT16, normaliser_sum="float16"), Way(), None),
    "normaliser in bfloat16, tiles of 128": (replace(SIXTEEN, normaliser_sum="bfloat16"), Way(tile=128), None),
    "normaliser in bfloat16, tiles of 64, backwards": (replace(SIXTEEN, normaliser_sum="bfloat16"), Way(backwards=True), None),
    "24 bits, truncated": (HOPPER, Way(sums=truncating), None),
    "24 bits, truncated, running on, P in float32": (replace(HOPPER, p="float32"), Way(sums=truncating, across=True), None),
    "14 bits, truncated": (replace(SIXTEEN, accumulator=RZ14), Way(tile=0), None),
    "14 bits, truncated, tiles in float32": (replace(SIXTEEN, accumulator=RZ14), Way(), None),
    "14 bits, truncated, running on": (replace(SIXTEEN, accumulator=RZ14), Way(across=True), None),
    "14 bits, truncated, promoted every 128": (replace(SIXTEEN, accumulator=replace(RZ14, promotion=128)), Way(tile=0), None),
    "13 bits, rounded, groups of 8": (replace(SIXTEEN, accumulator=Accumulator(13, "RN", 8)), Way(), None),
    "14 bits declared, float32 computed": (SIXTEEN, Way(), replace(SIXTEEN, accumulator=RZ14)),
    "products rounded to bfloat16": (replace(SIXTEEN, accumulator=Accumulator(product="bfloat16")), Way(), None),
    "scales in bfloat16": (replace(SIXTEEN, scale_compute="bfloat16"), Way(), None),
}

_EDITS = ((_ATTEND, _ATTENDED), _SCALES)
KERNELS: Mapping[str, Honest] = MappingProxyType(
    {
        **{f"index: {n}": Honest("lightning_index", n, c, edits, None, d) for n, (c, edits, d) in _INDEX.items()},
        **{f"attend: {n}": Honest("sparse_attend", n, c, _EDITS, way, d) for n, (c, way, d) in _ATTENTION.items()},
    }
)
