"""What is allowed: the top-k certificate, the population check, and the five attention checks. docs/judging.md derives each.

The constants are the suite's, the same for every vendor, who may widen a profile and not these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.profile import SMALLEST_NORMAL, UNIT_ROUNDOFF, WIDE, Accumulator, Profile

Array: TypeAlias = np.ndarray[Any, Any]
Float64: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

KAPPA = 3.0  # judging 4.2: error per row and head against the emulator's
SLOPE = 1.5e-3  # judging 4.3: bias beyond what the emulator's accounts for
# Roundings of a logit, or of an output, beyond those of its dot product: the scale and its own rounding, a change of base (2),
# the subtraction of the maximum (2), and the rescaling and division at the end (2).
EXTRA_OPERATIONS = 8
# Half the distance between the smallest subnormals of the output formats: rounding near zero costs that much.
HALF_SUBNORMAL = {"float32": 2.0**-150, "tfloat32": 2.0**-137, "bfloat16": 2.0**-134, "float16": 2.0**-25}
TILE = 64  # keys that a normaliser in 16 bits sums in float32 between two roundings, at least


def gamma(operations: float, unit_roundoff: float) -> float:
    """n*u / (1 - n*u): what n roundings can do to a sum of magnitudes (Higham, Accuracy and Stability, 3.1)."""
    product = operations * unit_roundoff
    return product / (1 - product) if product < 1 else float("inf")


def dot_gamma(accumulator: Accumulator, length: int, extra: int = 0) -> float:
    """gamma of a dot product of this length, and of `extra` operations (judging 3.1).

    An aligned group cuts each of its products and the running sum, `guard` bits below the last place, and the sum once more.
    """
    summed = min(length, accumulator.promotion or length)
    groups = math.ceil(summed / accumulator.group) if accumulator.group > 1 else 0
    cuts = (summed + groups) * 2.0**-accumulator.guard + groups if groups else summed
    found = gamma(cuts + extra, accumulator.unit_roundoff)
    if accumulator.promotion:
        found += gamma(math.ceil(length / accumulator.promotion), UNIT_ROUNDOFF["float32"]) * (1 + found)
    return found + _rounding(accumulator.product) * (1 + found)


def magnitude(operands: Float64, accumulator: Accumulator, dtype: str) -> Float64:
    """|operands| as an aligned accumulator of products in this format takes them: a subnormal's exponent is the smallest."""
    size = abs(operands)
    if accumulator.group == 1 or dtype not in SMALLEST_NORMAL:
        return np.asarray(size)
    return np.where(size > 0, np.maximum(size, SMALLEST_NORMAL[dtype]), 0.0)


def score_bound(
    profile: Profile,
    scores: Float64,
    weighted: Float64,
    products: Float64,
    *,
    heads: int,
    dim: int,
    dots_exact: bool,
    exact: bool,
    operand_unit: float = 0.0,
    scale_unit: Float64 | float = 0.0,
    lost: Float64 | float = 0.0,
) -> Float64:
    """eps_j of judging 3.1: |computed - true score| for every order of summation the profile allows.

    weighted = scale * sum |w| relu(q.k), products = scale * sum |w| |q|.|k|, each by its `magnitude`. `exact`: a case in which
    nothing before the final rounding can round; `dots_exact`: int8 products in an accumulator that holds them; `operand_unit`:
    what rounding to qk_compute does to a product; `scale_unit`: what rounding to scale_compute does to each key's scale;
    `lost`: `index_lost`.
    """
    logit = 0.0 if profile.logit in WIDE and exact else UNIT_ROUNDOFF[profile.logit]
    if exact:
        return (logit + scale_unit) * abs(scores)
    dots = 0.0 if dots_exact else dot_gamma(profile.accumulator, dim)
    dots += operand_unit * (1 + dots)
    unit_sum = UNIT_ROUNDOFF[profile.head_sum]
    head_sum = gamma(heads + 2, unit_sum) + _rounding(profile.intermediate)
    bound = dots * products + head_sum * (weighted + dots * products) + (2 * unit_sum + logit) * abs(scores)
    return bound + scale_unit * (abs(scores) + bound) + lost


def index_lost(profile: Profile, heads: int, dim: int, per_head: Float64) -> Float64 | float:
    """What scores lose below the smallest normal of a format; per_head = scale * sum max(1, |w|)."""
    kept = 2.0**-profile.intermediate_exponent
    # A sum of float16 numbers is a float16 number down to the last place; only scaled and multiplied ones lose something.
    lost = kept * _subnormal(profile.intermediate) + dim * _subnormal(profile.accumulator.product)
    if profile.subnormals == "kept":
        return lost * per_head
    smallest = max(
        SMALLEST_NORMAL[profile.intermediate] * kept, *(SMALLEST_NORMAL[f] for f in (profile.head_sum, profile.logit))
    )
    return lost * per_head + (heads + 1) * smallest * (1 + per_head)


def margin(scores: Float64, bound: Float64, selected: Array) -> float | None:
    """v = max over selected i and unselected j of (s_j - s_i) / (eps_i + eps_j): the certificate holds iff v <= 1.

    None where nothing is selected or nothing unselected. Where eps is 0 on both sides v is 0 or +-inf. Found by Dinkelbach's
    iteration: each step solves the separable problem max(s_j - v eps_j) - min(s_i + v eps_i), and the ratio at its solution
    rises to the maximum.
    """
    chosen = np.zeros(len(scores), bool)
    chosen[selected] = True
    if chosen.all():
        return None
    s_in, e_in, s_out, e_out = scores[chosen], bound[chosen], scores[~chosen], bound[~chosen]
    if not len(s_in):
        return None
    v = -np.inf
    for _ in range(60):
        t = 0.0 if v == -np.inf else v
        i, j = int(np.argmin(s_in + t * e_in)), int(np.argmax(s_out - t * e_out))
        gap, room = s_out[j] - s_in[i], e_in[i] + e_out[j]
        ratio = gap / room if room > 0 else (np.inf if gap > 0 else 0.0 if gap == 0 else -np.inf)
        if ratio <= v:
            break
        v = ratio
        if v == np.inf:
            break
    return float(v)


def exchanged_limit(emulated: int) -> float:
    """Judging 3.3: keys exchanged against the float64 set over all selective rows of a case, given the emulator's number."""
    return 4 * emulated + 3 * math.sqrt(emulated) + 2


def score_error_limit(emulated: float, profile: Profile, typical: float) -> float:
    """Judging 3.3: RMS error of returned scores, given the emulator's and the scores' own RMS."""
    return 4 * max(emulated, UNIT_ROUNDOFF[profile.logit] / 2 * typical)


def slope_excess(slope: float, emulated: float) -> float:
    """Judging 4.3: how far a bias lies outside what the emulator's accounts for: any part of its lean, none included."""
    return abs(slope - float(np.clip(slope, np.minimum(0.0, emulated), np.maximum(0.0, emulated))))


@dataclass(frozen=True)
class RowBound:
    """Judging 4.1 and 4.4 for one row: how far the output [Hq, value_dim] and the lse [Hq] may lie from the truth."""

    out: Float64
    lse: Float64


@dataclass(frozen=True)
class Operands:
    """One row's operands and truth in float64: q [Hq, D], kv [n >= 1, D], p [Hq, n] as they enter the output, out, lse."""

    q: Float64
    kv: Float64
    softmax_scale: float
    value_dim: int
    p: Float64
    out: Float64
    lse: Float64
    kv_unit: float  # what rounding to scale_compute and kv_compute does to this row's kv, 0 where they change nothing
    q_unit: float  # the same for q

    @property
    def values(self) -> Float64:
        """[n, value_dim]."""
        return self.kv[:, : self.value_dim]

    @cached_property
    def dots(self) -> Float64:
        """[Hq, n]: q . k."""
        return np.asarray(self.q @ self.kv.T)

    @cached_property
    def largest(self) -> Float64:
        """[Hq]: the largest |logit|."""
        return np.asarray(self.softmax_scale * abs(self.dots).max(axis=1))

    @cached_property
    def one_by_one(self) -> Float64:
        """[Hq]: relative error of a float32 normaliser to which one P after the other is added, from either end.

        At least that of a random walk, half a unit a step; but once the sum is large, thousands of small P round the same way,
        or are lost.
        """
        logits = self.softmax_scale * self.dots
        p = np.exp(logits - logits.max(axis=1, keepdims=True)).astype(np.float32)
        exact = p.sum(axis=1, dtype=np.float64)
        sums = [np.cumsum(order, axis=1, dtype=np.float32)[:, -1] for order in (p, p[:, ::-1])]
        walk = np.full(len(p), 2.0**-25 * math.sqrt(p.shape[1] / 2))
        return np.asarray(np.maximum.reduce([walk, *(abs(total / exact - 1) for total in sums)]))

    @cached_property
    def square_dots(self) -> Float64:
        """[Hq, n]: sum_d q_d^2 k_d^2."""
        return np.asarray((self.q * self.q) @ (self.kv * self.kv).T)

    @cached_property
    def value_squares(self) -> Float64:
        """[n, value_dim]."""
        return self.values * self.values


def attention_bound(profile: Profile, row: Operands, dtype: str) -> RowBound:
    """Bound (B) and lse bound (L) of one row."""
    q, kv, p, out, lse, v = row.q, row.kv, row.p, row.out, row.lse, row.values
    (count, dim), sizes_v = kv.shape, abs(v)
    u_p = _rounding(profile.p)
    sizes = [magnitude(operand, profile.accumulator, dtype) for operand in (q, kv)]
    magnitudes = row.softmax_scale * (sizes[0] @ sizes[1].T).max(axis=1)
    operands = row.kv_unit + row.q_unit + row.kv_unit * row.q_unit
    lam = (dot_gamma(profile.accumulator, dim, EXTRA_OPERATIONS) + operands + _rounding(profile.logit)) * magnitudes
    total = p.sum(axis=1)
    # sum p |v - o| <= sqrt(sum p * sum p (v - o)^2), expanded so that it is one matrix product; the sink is a key of value 0.
    spread = p @ row.value_squares - 2 * out * out + total[:, None] * out * out
    spread = np.sqrt(np.maximum(spread, 0) * np.maximum(total[:, None], 0)) + (1 - total)[:, None].clip(0) * abs(out)
    # A split's lse is at most this large where its share counts; merging multiplies by e to its error.
    merged = _rounding(profile.lse) * (row.largest + math.log(count))
    # Beyond e^600 the bound says nothing, and must not become inf times 0.
    theta = np.expm1(np.minimum(2 * lam + 2 * merged, 600)) + 2 * profile.exp_ulp * 2.0**-24
    sums = 2 * dot_gamma(profile.accumulator, count, EXTRA_OPERATIONS)
    summed = normaliser_gamma(profile, count)
    bound = (
        theta[:, None] * spread + (u_p + row.kv_unit + sums + _rounding(profile.partials)) * (p @ sizes_v) + summed * abs(out)
    )
    rounding = UNIT_ROUNDOFF[dtype]
    bound = bound * (1 + rounding) + rounding * abs(out) + HALF_SUBNORMAL[dtype] + _subnormal(profile.partials)
    # P as it is stored is smaller than its share by what the maximum was rounded up.
    stored = np.exp(np.minimum(_rounding(profile.maximum) * row.largest, 600))[:, None]
    bound = bound + smallest_held(profile) * stored * (1 + sizes_v.max(axis=0))
    bound = bound + stored * _subnormal(profile.p) * sizes_v.sum(axis=0)
    if profile.subnormals == "flushed":
        flushed = SMALLEST_NORMAL[profile.p] if profile.p in HALF_SUBNORMAL else 0.0
        bound = bound + SMALLEST_NORMAL[dtype] + stored * flushed * sizes_v.sum(axis=0)
    lse_bound = (
        2 * lam
        + dot_gamma(profile.accumulator, count, EXTRA_OPERATIONS)
        + profile.exp_ulp * 2.0**-23
        + (4 * 2.0**-24 + _rounding(profile.lse)) * abs(lse)
        + merged
        + summed
    )
    return RowBound(bound, lse_bound + (u_p if profile.normaliser == "rounded" else 0.0))


def smallest_held(profile: Profile) -> float:
    """What a float32 exponent cannot hold may become 0: a sink that outweighs every key by more than 2^126, say.

    Beside a maximum that is renewed late everything is larger by e to the threshold, and so overflows by so much earlier.
    """
    return SMALLEST_NORMAL["float32"] * math.exp(profile.rescale_threshold)


def leaves_exact(profile: Profile) -> bool:
    """True where an exact case of attention is exact under the profile: P is 1, sums of ones are kept, and nothing is merged.

    A maximum that is rounded or renewed late makes P other than 1; a 16-bit sum or partial output rounds what is exact.
    """
    kept = (profile.maximum, profile.normaliser_sum, profile.partials, profile.lse)
    return profile.rescale_threshold == 0 and set(kept) <= WIDE


def normaliser_gamma(profile: Profile, count: int) -> float:
    """Relative error of a normaliser that is rounded after every TILE keys, at worst; infinite where that is no bound."""
    return gamma(math.ceil(count / TILE) + 1, _rounding(profile.normaliser_sum))


def _normaliser_lean(profile: Profile, count: int) -> float:
    """What `normaliser_gamma` bounds is no random walk: tiles add nearly equal sums, which round the same way each time.

    So an honest error may be as large as the bound, which is KAPPA times this.
    """
    return _rounding(profile.normaliser_sum) / KAPPA * math.ceil(count / TILE)


def drift(accumulator: Accumulator, length: int) -> float:
    """What truncation takes of a sum on average, relative to it: half a unit of the running sum at each cut.

    0 below 24 bits, where the emulator truncates itself; above, it is float32.
    """
    if accumulator.rounding == "RN" or accumulator.bits < 24:
        return 0.0
    return math.ceil(length / accumulator.group) * accumulator.unit_roundoff / 2


def slope_room(profile: Profile, row: Operands) -> float:
    """Judging 4.3: how far a row's slope may lean beyond the emulator's, where a normaliser or lse is kept in 16 bits.

    The normaliser scales all heads alike. An lse moves weight between splits, or to the sink, by chance in each head.
    """
    moved = _rounding(profile.lse) * abs(row.lse) * np.maximum(0.25, 1 - row.p.sum(axis=1)) / math.sqrt(3)
    return _normaliser_lean(profile, len(row.kv)) + KAPPA * float(np.linalg.norm(moved)) / len(moved)


def unit_of(before: Float64, after: Array, dtype: str) -> float:
    """Unit roundoff of rounding to a format, where it changes something."""
    return _rounding(dtype) if (before != after).any() else 0.0


def scale_unit(scale: Float64, kept: Array, dtype: str) -> Float64 | float:
    """[n]: the same for each key's scale by itself, which may lie below the smallest normal and lose more."""
    if dtype in WIDE:
        return 0.0
    lost = np.divide(abs(kept - scale), scale, out=np.zeros(len(scale)), where=scale > 0)
    return np.where(lost > 0, np.maximum(lost, _rounding(dtype)), 0.0)


def _rounding(dtype: str) -> float:
    """Unit roundoff of a format that rounds float32 values, else 0."""
    return 0.0 if dtype in WIDE else UNIT_ROUNDOFF[dtype]


def _subnormal(dtype: str) -> float:
    """Half the smallest subnormal of a format that rounds float32 values, else 0."""
    return 0.0 if dtype in WIDE else HALF_SUBNORMAL[dtype]


def _logit_walk(profile: Profile, row: Operands) -> Float64:
    """[Hq, n], tau^2 of judging 4.2: what rounding leaves in a logit if it is a random walk, squared.

    A step rounds the running sum, which wanders by the products and drifts to the dot product; truncation leans as well.
    """
    unit, dim = profile.accumulator.unit_roundoff, row.kv.shape[1]
    steps = unit * unit * dim * (row.square_dots + row.dots**2 / 3)
    return np.asarray(row.softmax_scale**2 * (steps + (drift(profile.accumulator, dim) * row.dots) ** 2))


def error_floor(profile: Profile, row: Operands, dtype: str) -> Float64:
    """[Hq], judging 4.2: the error per head below which no backend is accused, however lucky the emulator was.

    Half an output rounding (of a split's output too); eight additions of the whole; what a normaliser that takes one P after
    another loses, or what truncation or a rounded normaliser takes of it; what random roundings of the logits and of exp leave,
    sqrt(sum (p_j tau_j |v_j - o|)^2), which rules where few keys share the softmax; half a rounding of every probability; one
    rounding of lse (the keys' own), which exp(x - lse) and merging splits by lse cost.
    """
    v, out = row.values, row.out
    distance = row.value_squares.sum(axis=1) - 2 * (out @ v.T) + (out * out).sum(axis=1, keepdims=True)
    squared = row.p * row.p
    walk = _logit_walk(profile, row) + (profile.exp_ulp * 2.0**-24) ** 2
    logits = np.sqrt((squared * walk * np.maximum(distance, 0)).sum(axis=1))
    probabilities = _rounding(profile.p) / 2 * np.sqrt(squared @ row.value_squares.sum(axis=1))
    count = len(v)
    share = max(UNIT_ROUNDOFF[dtype], _rounding(profile.partials)) / 2
    sums = max(8 * profile.accumulator.unit_roundoff, drift(profile.accumulator, count), _normaliser_lean(profile, count))
    relative = np.maximum(max(share, sums), max(2.0**-24, _rounding(profile.lse)) * abs(row.lse))
    relative = np.maximum(relative, row.one_by_one)
    whole = relative * np.linalg.norm(out, axis=1)
    # Outputs that a sink has pressed to the end of float32's range keep no relative accuracy, as in (B).
    tiny = smallest_held(profile) * np.sqrt(v.shape[1]) * (1 + abs(v).max())
    return np.asarray(np.maximum.reduce([whole, logits, probabilities, np.full(len(out), tiny)]))


def lse_floor(profile: Profile, row: Operands) -> Float64:
    """[Hq], judging 4.4: the error that random roundings leave in lse, which no lucky emulator may undercut.

    sqrt(sum_j p_j^2 (tau_j^2 + that of kv + that of p_j, if the normaliser sums it rounded)), exp's error, and two roundings.
    """
    scaled = row.softmax_scale**2 * row.square_dots
    p = np.exp(row.softmax_scale * row.dots - row.lse[:, None])
    u_p = _rounding(profile.p) if profile.normaliser == "rounded" else 0.0
    walk = _logit_walk(profile, row) + (row.kv_unit**2 + row.q_unit**2) * scaled + u_p**2
    kept = 2.0**-24 * (profile.exp_ulp + 2 * abs(row.lse)) + _rounding(profile.lse) * abs(row.lse)
    kept = kept + row.one_by_one
    return np.asarray(np.sqrt((p * p * walk).sum(axis=1)) + kept + _normaliser_lean(profile, len(row.kv)))
