"""Planted faults of arithmetic: what a reduced-precision profile could hide, and what one that declares float32 could skip."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance.faults.implementation import LightningIndex, SparseAttend
from dsa_portable.conformance.judging.emulator import rounded
from dsa_portable.profile import Accumulator, Profile

Array: TypeAlias = np.ndarray[Any, Any]

# One profile of each envelope and each way into it; every index fault below is planted under all of them.
PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        "exact": Profile(ties="lowest"),
        "reduced: 13 bits, aligned truncation": Profile(accumulator=Accumulator(13, "RZ", 32), ties="lowest"),
        "reduced: float16 intermediate": Profile(
            intermediate="float16", intermediate_exponent=-10, finite_max=65504.0, ties="lowest"
        ),
        "bf16-logits": Profile(logit="bfloat16", ties="lowest"),
    }
)


class HeadDropped(LightningIndex):
    """One index head does not count."""

    code, title = "I89", "one head dropped"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "certificate"

    def weights(self, weights: Array) -> Array:
        """Without head 5."""
        return np.where(np.arange(len(weights)) == 5, np.float32(0), weights)


class DimensionDropped(LightningIndex):
    """One of the dimensions does not count, as when a tail tile is one short."""

    code, title = "I90", "one dimension dropped"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "certificate"

    def operands(self, q: Array, k: Array) -> tuple[Array, Array]:
        """Without the last dimension."""
        return np.where(np.arange(q.shape[1]) == q.shape[1] - 1, np.float32(0), q), k


class ScalePowerOfTwo(LightningIndex):
    """Key scales pass through ue8m0 and lose their significand."""

    code, title, stands_for = "I35", "key scales cut to powers of two", "FlashMLA#184"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "certificate"

    def scale(self, scale: Array) -> Array:
        """Rounded down to a power of two."""
        return np.asarray((scale.astype(np.float32).view(np.uint32) & np.uint32(0xFF800000)).view(np.float32))


class HeadSumBfloat16(LightningIndex):
    """The sum over heads is kept in bfloat16."""

    code, title = "I10", "head sum in bfloat16"
    killed_by, rule = "index-e4m3-f32-f32-prefill-cancel", "certificate"

    def head_sum(self, weights: Array, dots: Array) -> Array:
        """Rounded after every head."""
        total = np.zeros(dots.shape[1], np.float32)
        for weight, dot in zip(weights, dots, strict=True):
            total = rounded(total + weight * dot, "bfloat16")
        return total


class WeightsBfloat16(LightningIndex):
    """Weights are rounded to bfloat16 on the way in."""

    code, title = "I6", "head weights rounded to bfloat16"
    killed_by, rule = "index-e4m3-f32-f32-prefill-cancel", "certificate"

    def weights(self, weights: Array) -> Array:
        """As bfloat16."""
        return rounded(weights, "bfloat16")


class KVBfloat16(SparseAttend):
    """Keys and values are rounded to bfloat16 where float32 is declared."""

    code, title = "A80", "keys and values in bfloat16 where float32 is declared"
    killed_by, rule = "attend-f32-decode-flat", "rms"

    def kv(self, kv: Array) -> Array:
        """As bfloat16."""
        return rounded(kv, "bfloat16")


class ProbabilitiesBfloat16(SparseAttend):
    """Probabilities are rounded to bfloat16 where float32 is declared."""

    code, title = "A81", "probabilities in bfloat16 where float32 is declared"
    killed_by, rule = "attend-f32-decode-flat", "rms"

    def probabilities(self, shares: Array) -> Array:
        """As bfloat16."""
        return rounded(shares, "bfloat16")


class BothBfloat16(KVBfloat16, ProbabilitiesBfloat16):
    """Keys, values and probabilities are all rounded to bfloat16 where float32 is declared."""

    code, title = "A82", "keys, values and probabilities in bfloat16 where float32 is declared"
    killed_by, rule = "attend-f32-decode-flat", "rms"


INDEX_FAULTS = (HeadDropped, DimensionDropped, ScalePowerOfTwo, HeadSumBfloat16, WeightsBfloat16)
ATTEND_FAULTS = (KVBfloat16, ProbabilitiesBfloat16, BothBfloat16)
