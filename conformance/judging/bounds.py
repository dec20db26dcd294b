"""What is allowed: the top-k certificate, the population check, and the five attention checks. docs/judging.md derives each.

The constants are the suite's, the same for every vendor, who may widen a profile and not these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.profile import SMALLEST_NORMAL, UNIT_ROUNDOFF, Accumulator, Profile

Array: TypeAlias = np.ndarray[Any, Any]
Float64: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

KAPPA = 3.0  # judging 4.2: error per row and head against the emulator's
SLOPE = 1.5e-3  # judging 4.3: bias beyond what the emulator's accounts for
# Roundings of a logit, or of an output, beyond those of its dot product: the scale and its own rounding, a change of base (2),
# the subtraction of the maximum (2), and the rescaling and division at the end (2).
EXTRA_OPERATIONS = 8
# Half the distance between the smallest subnormals of the output formats: rounding near zero costs that much.
HALF_SUBNORMAL = {"float32": 2.0**-150, "bfloat16": 2.0**-134, "float16": 2.0**-25}


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
    flushed: Float64 | float = 0.0,
) -> Float64:
    """eps_j of judging 3.1: |computed - true score| for every order of summation the profile allows.

    weighted = scale * sum |w| relu(q.k), products = scale * sum |w| |q|.|k|, each by its `magnitude`. `exact`: a case in which
    nothing before the final rounding can round; `dots_exact`: int8 products in an accumulator that holds them; `flushed` =
    scale * sum max(1, |w|).
    """
    logit = 0.0 if profile.logit in ("float32", "float64") and exact else UNIT_ROUNDOFF[profile.logit]
    if exact:
        return logit * abs(scores)
    dots = 0.0 if dots_exact else dot_gamma(profile.accumulator, dim)
    unit_sum = UNIT_ROUNDOFF[profile.head_sum]
    head_sum = gamma(heads + 2, unit_sum) + (UNIT_ROUNDOFF[profile.intermediate] if profile.intermediate != "float32" else 0.0)
    bound = dots * products + head_sum * (weighted + dots * products) + (2 * unit_sum + logit) * abs(scores)
    if profile.subnormals == "flushed":
        smallest = max(SMALLEST_NORMAL[f] for f in (profile.intermediate, profile.head_sum, profile.logit))
        bound = bound + (heads + 1) * smallest * (1 + flushed)
    return bound


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
    kv_unit: float  # unit roundoff of kv_compute where it changes this row's kv, else 0

    @property
    def values(self) -> Float64:
        """[n, value_dim]."""
        return self.kv[:, : self.value_dim]

    @cached_property
    def dots(self) -> Float64:
        """[Hq, n]: q . k."""
        return np.asarray(self.q @ self.kv.T)

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
    count, dim = kv.shape
    u_p = _rounding(profile.p)
    sizes = [magnitude(operand, profile.accumulator, dtype) for operand in (q, kv)]
    magnitudes = row.softmax_scale * (sizes[0] @ sizes[1].T).max(axis=1)
    lam = (dot_gamma(profile.accumulator, dim, EXTRA_OPERATIONS) + row.kv_unit + _rounding(profile.logit)) * magnitudes
    total = p.sum(axis=1)
    # sum p |v - o| <= sqrt(sum p * sum p (v - o)^2), expanded so that it is one matrix product; the sink is a key of value 0.
    spread = p @ row.value_squares - 2 * out * out + total[:, None] * out * out
    spread = np.sqrt(np.maximum(spread, 0) * np.maximum(total[:, None], 0)) + (1 - total)[:, None].clip(0) * abs(out)
    # Beyond e^600 the bound says nothing, and must not become inf times 0.
    theta = np.expm1(np.minimum(2 * lam, 600)) + 2 * profile.exp_ulp * 2.0**-24
    sums = 2 * dot_gamma(profile.accumulator, count, EXTRA_OPERATIONS)
    bound = theta[:, None] * spread + (u_p + row.kv_unit + sums) * (p @ abs(v))
    rounding = UNIT_ROUNDOFF[dtype]
    bound = bound * (1 + rounding) + rounding * abs(out) + HALF_SUBNORMAL[dtype]
    # What a float32 exponent cannot hold may become 0: a sink that outweighs every key by more than 2^126, say.
    bound = bound + SMALLEST_NORMAL["float32"] * (1 + abs(v).max(axis=0))
    if profile.p in HALF_SUBNORMAL and profile.p != "float32":
        bound = bound + HALF_SUBNORMAL[profile.p] * abs(v).sum(axis=0)
    if profile.subnormals == "flushed":
        bound = bound + SMALLEST_NORMAL[dtype] + count * SMALLEST_NORMAL["float32"] * abs(v).max(axis=0)
    lse_bound = (
        2 * lam + dot_gamma(profile.accumulator, count, EXTRA_OPERATIONS) + profile.exp_ulp * 2.0**-23 + 4 * 2.0**-24 * abs(lse)
    )
    return RowBound(bound, lse_bound + (u_p if profile.normaliser == "rounded" else 0.0))


def _rounding(dtype: str) -> float:
    return UNIT_ROUNDOFF[dtype] if dtype != "float32" else 0.0


def _logit_walk(profile: Profile, row: Operands) -> Float64:
    """[Hq, n], tau^2 of judging 4.2: what rounding leaves in a logit if it is a random walk, squared.

    A step rounds the running sum, which wanders by the products and drifts to the dot product.
    """
    unit = profile.accumulator.unit_roundoff
    steps = row.square_dots + row.dots**2 / 3
    return np.asarray(unit * unit * row.kv.shape[1] * row.softmax_scale**2 * steps)


def error_floor(profile: Profile, row: Operands, dtype: str) -> Float64:
    """[Hq], judging 4.2: the error per head below which no backend is accused, however lucky the emulator was.

    Half an output rounding or eight additions of the whole; what random roundings of the logits leave,
    sqrt(sum (p_j tau_j |v_j - o|)^2), which rules where few keys share the softmax; half a rounding of every probability; one
    rounding of lse (the keys' own), which exp(x - lse) and merging splits by lse cost.
    """
    v, out = row.values, row.out
    distance = row.value_squares.sum(axis=1) - 2 * (out @ v.T) + (out * out).sum(axis=1, keepdims=True)
    squared = row.p * row.p
    logits = np.sqrt((squared * _logit_walk(profile, row) * np.maximum(distance, 0)).sum(axis=1))
    probabilities = _rounding(profile.p) / 2 * np.sqrt(squared @ row.value_squares.sum(axis=1))
    relative = np.maximum(max(UNIT_ROUNDOFF[dtype] / 2, 8 * profile.accumulator.unit_roundoff), 2.0**-24 * abs(row.lse))
    whole = relative * np.linalg.norm(out, axis=1)
    # Outputs that a sink has pressed to the end of float32's range keep no relative accuracy, as in (B).
    tiny = SMALLEST_NORMAL["float32"] * np.sqrt(v.shape[1]) * (1 + abs(v).max())
    return np.asarray(np.maximum.reduce([whole, logits, probabilities, np.full(len(out), tiny)]))


def lse_floor(profile: Profile, row: Operands) -> Float64:
    """[Hq], judging 4.4: the error that random roundings leave in lse, which no lucky emulator may undercut.

    sqrt(sum_j p_j^2 (tau_j^2 + that of kv + that of p_j, if the normaliser sums it rounded)), exp's error, and two roundings.
    """
    scaled = row.softmax_scale**2 * row.square_dots
    p = np.exp(row.softmax_scale * row.dots - row.lse[:, None])
    u_p = _rounding(profile.p) if profile.normaliser == "rounded" else 0.0
    walk = _logit_walk(profile, row) + row.kv_unit**2 * scaled + u_p**2
    return np.asarray(np.sqrt((p * p * walk).sum(axis=1)) + 2.0**-24 * (profile.exp_ulp + 2 * abs(row.lse)))
