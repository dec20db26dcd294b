"""How a backend computes, as data: the suite derives its error bounds from this declaration, and a wider one is visible.

A profile must lie in an envelope (`exact`, `exact-p16`, `reduced`, `bf16-logits`); outside all of them no level is granted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

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

    bits: int = 24  # of significand
    rounding: str = "RN"  # to nearest, or "RZ", towards zero
    group: int = 1  # products that are aligned and added at a time, with the running sum; 1: nothing is aligned
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
    intermediate: str = "float32"  # index: a dot product between the accumulator and the next step
    intermediate_exponent: int = 0  # it is kept times 2 to this: -10 for a chip that divides by 1024 before it stores float16
    head_sum: str = "float32"  # index: the sum over heads, and the weights that enter it
    logit: str = "float32"  # index: the score that is compared; attention: the logit before exp
    p: str = "float32"  # attention: the probabilities that enter P V
    normaliser: str = "float32"  # attention: "float32" sums unrounded P, "rounded" sums P after rounding
    kv_compute: str = "float32"  # attention: what q and the (dequantised) kv are rounded to before they are multiplied
    scale_compute: str = "float32"  # what key and tile scales are rounded to
    exp_ulp: float = 4.0  # attention: error of exp in units of 2^-24
    finite_max: float = 3.4028234663852886e38  # intermediates, as they are kept, beyond this are outside the promise
    subnormals: str = "kept"  # or "flushed"
    ties: str = "any"  # "lowest": of equal scores at the boundary the lowest positions are kept
    deterministic: bool = False  # the same bits from the same call, whatever the batch mates
    qk_compute: str = "float32"  # index: below float32, what q and the keys times their scales are rounded to before they meet
    maximum: str = "float32"  # attention: the running maximum that is subtracted before exp
    rescale_threshold: float = 0.0  # attention: the maximum is renewed where a logit exceeds it by more; P may reach e to this
    normaliser_sum: str = "float32"  # attention: the normaliser as it is kept from a tile of at least 64 keys to the next
    partials: str = "float32"  # attention: the output of a split of the keys, before splits are merged
    lse: str = "float32"  # attention: what lse is rounded to before it is returned, or merges splits


WIDE = frozenset({"float32", "float64"})
SIXTEEN = WIDE | {"tfloat32", "float16", "bfloat16"}
ATTENTION = ("p", "kv_compute", "maximum", "normaliser_sum", "partials", "lse")
# What a field says where it is not float32's way, and of which operator: {} is its value.
_BOTH, _INDEX, _ATTENTION = ("lightning_index", "sparse_attend"), ("lightning_index",), ("sparse_attend",)
WORDS: Mapping[str, tuple[tuple[str, ...], str]] = MappingProxyType(
    {
        "accumulator": (_BOTH, "{}"),
        "intermediate": (_INDEX, "dot products kept in {}"),
        "intermediate_exponent": (_INDEX, "dot products kept times 2^{}"),
        "head_sum": (_INDEX, "weights and their sums in {}"),
        "qk_compute": (_INDEX, "q and the dequantised keys rounded to {}"),
        "logit": (_BOTH, "logits in {}"),
        "p": (_ATTENTION, "P in {}"),
        "normaliser": (_ATTENTION, "the normaliser sums {} P"),
        "kv_compute": (_ATTENTION, "q and kv rounded to {}"),
        "maximum": (_ATTENTION, "running maximum in {}"),
        "rescale_threshold": (_ATTENTION, "rescaled only where a logit exceeds the maximum by {}"),
        "normaliser_sum": (_ATTENTION, "normaliser kept in {}"),
        "partials": (_ATTENTION, "partial outputs of splits in {}"),
        "lse": (_ATTENTION, "lse kept in {}"),
        "scale_compute": (_BOTH, "scales in {}"),
        "exp_ulp": (_ATTENTION, "exp within {} units of 2^-24"),
        "finite_max": (_BOTH, "nothing promised beyond {}"),
        "subnormals": (_BOTH, "subnormals {}"),
        "ties": (_INDEX, "ties to the {}"),
        "deterministic": (_BOTH, "deterministic"),
    }
)


def differences(operator: str, profile: Profile) -> str:
    """In words, where the operator's profile differs from float32 throughout."""
    plain, found = Profile(), []
    for name, (operators, words) in WORDS.items():
        value = getattr(profile, name)
        if value != getattr(plain, name) and (operator in operators or operator not in _BOTH):
            found.append(words.format(_summing(value) if isinstance(value, Accumulator) else value))
    return "; ".join(found) or "float32 throughout"


def _summing(accumulator: Accumulator) -> str:
    cut = "truncated" if accumulator.rounding == "RZ" else "rounded"
    words = [f"dot products summed in {accumulator.bits} bits, {cut}"]
    words += [f"{accumulator.group} aligned at a time"] * (accumulator.group > 1)
    words += [f"{accumulator.guard} guard bits"] * (accumulator.guard > 0)
    words += [f"promoted to float32 every {accumulator.promotion}"] * (accumulator.promotion > 0)
    words += [f"each product rounded to {accumulator.product}"] * (accumulator.product != "float32")
    return ", ".join(words)


@dataclass(frozen=True)
class Envelope:
    """How far a profile may go: `bits` of an accumulator at least, the formats of each field, float32 where none is named."""

    operators: tuple[str, ...]
    bits: int = 24
    formats: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def holds(self, profile: Profile) -> bool:
        """True where nothing goes further. Fields that the operator does not use keep their defaults or do not matter."""
        used = [name for name, (operators, _) in WORDS.items() if set(operators) & set(self.operators)]
        formats = {name: getattr(profile, name) for name in used if name in FORMATS}
        formats["product"] = profile.accumulator.product
        inside = all(value in self.formats.get(name, WIDE) for name, value in formats.items())
        return inside and profile.accumulator.bits >= self.bits and profile.exp_ulp <= 64


# The fields that name a format.
FORMATS = ("intermediate", "head_sum", "logit", "scale_compute", "qk_compute", *ATTENTION)
_P16 = dict.fromkeys(ATTENTION, SIXTEEN)
_REDUCED = {"intermediate": WIDE | {"float16"}, "product": SIXTEEN, "qk_compute": SIXTEEN}
# The narrowest first; per operator, since a profile is one operator's.
ENVELOPES: tuple[tuple[str, Envelope], ...] = (
    ("exact", Envelope(_INDEX)),
    ("exact", Envelope(_ATTENTION)),
    ("exact-p16", Envelope(_ATTENTION, formats=_P16)),
    ("reduced", Envelope(_INDEX, 13, _REDUCED)),
    ("reduced", Envelope(_ATTENTION, 13, {**_REDUCED, **_P16})),
    ("bf16-logits", Envelope(_INDEX, 13, {**_REDUCED, "logit": SIXTEEN})),
)
ENVELOPE_NAMES = tuple(dict.fromkeys(name for name, _ in ENVELOPES))


def envelope(operator: str, profile: Profile) -> str | None:
    """The narrowest envelope that holds the profile, or None: `exact` < `exact-p16` < `reduced` < `bf16-logits`."""
    named = operator if operator in _BOTH else "lightning_index"
    return next((name for name, e in ENVELOPES if named in e.operators and e.holds(profile)), None)
