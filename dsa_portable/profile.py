"""How a backend computes, as data: the suite derives its error bounds from this declaration, and a wider one is visible.

A profile must lie in a named envelope (`exact`, `reduced`, `bf16-logits`); outside all of them no level is granted.
"""

from __future__ import annotations

from dataclasses import dataclass

# Unit roundoff of the formats a profile may name (round to nearest); tfloat32 is what matrix units read of a float32.
UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "tfloat32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# Smallest normal number of each, and of the operands of products: lost by a chip that flushes subnormals.
SMALLEST_NORMAL = {
    "float64": 2.0**-1022,
    "float32": 2.0**-126,
    "tfloat32": 2.0**-126,
    "float16": 2.0**-14,
    "bfloat16": 2.0**-126,
    "float8_e4m3fn": 2.0**-6,
    "int8": 1.0,
}


@dataclass(frozen=True)
class Accumulator:
    """How a dot product is summed. `bits=24, rounding="RN"` is float32.

    `group` products and the running sum are aligned to the largest exponent, cut to `bits` + `guard` bits and added exactly;
    the sum is cut to `bits`. A group of 1 aligns nothing: each sum is cut. `rounding` is that of every cut, `RN` or `RZ`.
    Hopper's FP8 tensor cores are Accumulator(14, "RZ", 32), and (14, "RZ", 32, promotion=128) where a kernel adds every 128
    products to a float32 (measured on an H100; DeepSeek-V3 report, 3.3.2).
    """

    bits: int = 24
    rounding: str = "RN"
    group: int = 1
    guard: int = 0  # bits kept below the last place while a group is aligned: 2 in Hopper's bf16 and fp16 units
    promotion: int = 0  # after so many products the sum is added to a float32 and starts anew; 0: never
    product: str = "float32"  # what each product is rounded to before it is added

    @property
    def unit_roundoff(self) -> float:
        """Relative error of one addition."""
        return 2.0 ** (-self.bits if self.rounding == "RN" else 1 - self.bits)


@dataclass(frozen=True)
class Profile:
    """The numerics a backend promises for one (device, operator, operand format, phase)."""

    accumulator: Accumulator = Accumulator()
    intermediate: str = "float32"  # a dot product between the accumulator and the next step
    intermediate_exponent: int = 0  # it is kept times 2 to this: -10 for a chip that divides by 1024 before it stores float16
    head_sum: str = "float32"  # index: the sum over heads, and the weights that enter it
    logit: str = "float32"  # index: the score that is compared; attention: the logit before exp
    p: str = "float32"  # attention: the probabilities that enter P V
    normaliser: str = "float32"  # attention: "float32" sums unrounded P, "rounded" sums P after rounding
    kv_compute: str = "float32"  # attention: what the (dequantised) kv is rounded to before it is multiplied
    scale_compute: str = "float32"  # what key and tile scales are rounded to
    exp_ulp: float = 4.0  # attention: error of exp in units of 2^-24
    finite_max: float = 3.4028234663852886e38  # intermediates, as they are kept, beyond this are outside the promise
    subnormals: str = "kept"  # or "flushed"
    ties: str = "any"  # "lowest": of equal scores at the boundary the lowest positions are kept
    deterministic: bool = False  # the same bits from the same call, whatever the batch mates


def envelope(operator: str, profile: Profile) -> str | None:
    """The narrowest envelope that holds the profile, or None: `exact` < `reduced` < `bf16-logits`."""
    wide = {"float32", "float64"}
    sixteen = wide | {"bfloat16", "float16"}
    if profile.scale_compute not in wide or profile.head_sum not in wide or profile.exp_ulp > 64:
        return None
    if operator == "sparse_attend" and not (profile.p in sixteen and profile.kv_compute in sixteen and profile.logit in wide):
        return None
    fp32 = profile.accumulator.bits >= 24 and profile.intermediate in wide
    if fp32 and profile.logit in wide:
        return "exact"
    if profile.accumulator.bits < 13 or profile.intermediate not in wide | {"float16"}:
        return None
    if profile.logit in wide:
        return "reduced"
    return "bf16-logits" if profile.logit in sixteen else None


ENVELOPES = ("exact", "reduced", "bf16-logits")
