"""What the numbers of an index case are made of, as a table: queries, head weights, keys, key scales, drawn by their labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance.cases import values

Array: TypeAlias = np.ndarray[Any, Any]

# Per operand: the power of two that brings `bell` (and the heads' weighted sum) into the format's usual range.
OPERAND_SCALE = {"e4m3": 1.0, "int8": 0.25, "bf16": 2.0**-7, "f16": 2.0**-7, "f32": 2.0**-7}
WEIGHT_SCALE = {"e4m3": 2.0**-24, "int8": 2.0**-20, "bf16": 2.0**-20, "f16": 2.0**-20, "f32": 2.0**-20}
# Significand bits of the `cancel` weights: more than bfloat16 has, in float32 more than float16 and TF32 have.
CANCEL_BITS = {"f32": 11, "f16": 10, "bf16": 7}


@dataclass(frozen=True)
class Drawn:
    """What a draw may depend on; `label` is new for every array, `common` the same for all keys of a case."""

    label: str
    shape: tuple[int, ...]  # q: rows, heads, dim; weights: rows, heads; a key: keys, dim; its scale: keys
    operand: str
    weight: str
    scaled: bool  # keys have scales
    power_of_two: bool
    common: str


Draw: TypeAlias = Callable[[Drawn], Array]


@dataclass(frozen=True)
class Content:
    """Four draws; `exact`: every product and partial sum is a small multiple of one power of two."""

    q: Draw
    weights: Draw
    key: Draw
    scale: Draw
    exact: bool = False


def _integers(low: int, high: int) -> Draw:
    return lambda d: values.integers(d.label, d.shape, low, high).astype(np.float64)


def _bell(d: Drawn) -> Array:
    return np.asarray(values.bell(d.label, d.shape) * OPERAND_SCALE[d.operand])


def _codes(d: Drawn) -> Array:
    return values.float8_codes(d.label, d.shape)


def _pairs_of_heads(d: Drawn) -> Array:
    # Heads come in pairs with equal queries and weights a and d - a: the score is sum d * dot, d in the low bits of a.
    rows, heads, dim = d.shape
    return np.repeat(values.integers(d.label, (rows, heads // 2, dim), -1, 1), 2, axis=1).astype(np.float64)


def _pairs_of_weights(d: Drawn) -> Array:
    bits, shape = CANCEL_BITS[d.weight], (d.shape[0], d.shape[1] // 2)
    a = (1 << bits) + values.integers(d.label, shape, 0, (1 << bits) - 1)
    difference = values.integers(d.label.removesuffix("weights") + "difference", shape, 1, 3)
    return np.stack([a, difference - a], axis=2).reshape(d.shape) * 2.0**-bits


def _signed_powers(d: Drawn) -> Array:
    sign = values.integers(d.label.removesuffix("weights") + "sign", d.shape, 0, 3)
    return np.asarray(np.where(sign == 0, -1.0, 1.0) * 2.0 ** values.integers(d.label, d.shape, -2, 1))


def _signs(d: Drawn) -> Array:
    return np.asarray(1.0 - 2 * values.integers(d.label, d.shape, 0, 1))


def _mostly_positive(d: Drawn) -> Array:
    # Three quarters of the weights are positive, so that a large key has a large score, yet signs matter.
    return np.asarray((values.fine_bell(d.label, d.shape) + 25000) * WEIGHT_SCALE[d.operand])


def _both_signs(d: Drawn) -> Array:
    return np.asarray(values.fine_bell(d.label, d.shape) * WEIGHT_SCALE[d.operand])


def _small_bell(d: Drawn) -> Array:
    return np.asarray(values.bell(d.label, d.shape) * 2.0**-10)


def _clustered(d: Drawn) -> Array:
    # One common key, and only the last eight dimensions differ: all scores share their leading bits.
    common = values.bell(d.common, (1, d.shape[1])) * OPERAND_SCALE[d.operand]
    key = np.repeat(common, d.shape[0], axis=0)
    key[:, -8:] = values.bell(d.label, (d.shape[0], 8)) * OPERAND_SCALE[d.operand]
    return key


def _below_zero(d: Drawn) -> Array:
    # Every other key gets a score of either sign, which a scale of 0 then makes +0.0 or -0.0.
    key = -values.integers(d.label, d.shape, 0, 2).astype(np.float64)
    if d.scaled:
        key[::2] = values.integers(f"{d.label}/mixed", key[::2].shape, -2, 2)
    return key


def _ones(d: Drawn) -> Array:
    return np.ones(d.shape)


def _drawn(d: Drawn) -> Array:
    return values.scales(d.label, d.shape, d.power_of_two).astype(np.float64) if d.scaled else np.ones(d.shape)


def _same(d: Drawn) -> Array:
    return np.full(d.shape, 0.7421875) if d.scaled else np.ones(d.shape)


def _powers(d: Drawn) -> Array:
    # They vary from key to key, so that a scale read from the neighbour shows in exact cases too.
    return _with_zeros(2.0 ** values.integers(d.label, d.shape, -1, 1), d, 5)


def _ones_and_zeros(d: Drawn) -> Array:
    return _with_zeros(np.ones(d.shape), d, 2)


def _with_zeros(factor: Array, d: Drawn, every: int) -> Array:
    # A scale of 0 is legal: +0.0 or -0.0, whatever the key.
    if d.scaled:
        factor[::every] = 0
    return factor


# fmt: off
CONTENTS: Mapping[str, Content] = MappingProxyType({
    #                     q                weights            key               scale
    "natural":   Content(_bell,            _mostly_positive,  _bell,            _drawn),
    "clustered": Content(_bell,            _mostly_positive,  _clustered,       _same),
    "codes":     Content(_codes,           _both_signs,       _codes,           _drawn),
    "lattice":   Content(_integers(-2, 2), _signed_powers,    _integers(-2, 2), _powers,         exact=True),
    # So few values that many keys share the score at the boundary.
    "ties":      Content(_integers(-1, 1), _signs,            _integers(-1, 1), _ones,           exact=True),
    "cancel":    Content(_pairs_of_heads,  _pairs_of_weights, _integers(-1, 1), _ones,           exact=True),
    "plateau":   Content(_integers(0, 2),  _small_bell,       _below_zero,      _ones_and_zeros, exact=True),
})
# fmt: on
