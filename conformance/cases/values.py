"""Numbers that are the same bytes on every machine: Philox words, integer arithmetic, exact scaling; no libm, no distributions.

A stream's name (case and argument) is its key, so any array of any case can be made alone and in any order.
"""

from __future__ import annotations

import hashlib
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.arrays import NUMPY_DTYPES

Array: TypeAlias = np.ndarray[Any, Any]

# The code that has no negative, and that no symmetric quantiser makes: legal in a cache all the same.
LOWEST_INT8 = -128


def words(name: str, count: int) -> Array:
    """uint64 [count], the Philox-4x64 words whose key is the first 128 bits of sha256(name)."""
    key = np.frombuffer(hashlib.sha256(name.encode()).digest()[:16], "<u8")
    return np.random.Philox(key=key).random_raw(count).astype("<u8", copy=False)


def bell(name: str, shape: tuple[int, ...]) -> Array:
    """int32 in -510 .. 510, bell-shaped (the sum of four bytes, centred); standard deviation 147.8."""
    count = int(np.prod(shape))
    halves = words(name, -(-count // 2)).view("<u4")[:count]
    pairs = (halves & 0x00FF00FF) + ((halves >> 8) & 0x00FF00FF)
    sums = (pairs + (pairs >> 16)) & 0xFFFF
    return np.asarray(sums.astype(np.int32) - 510).reshape(shape)


def fine_bell(name: str, shape: tuple[int, ...]) -> Array:
    """int32 in -131070 .. 131070, bell-shaped (four 16-bit words, centred); standard deviation 37,837, so up to 17 bits."""
    count = int(np.prod(shape))
    quarters = words(name, count).view("<u2").reshape(count, 4)
    return np.asarray(quarters.sum(axis=1, dtype=np.int32) - 131070).reshape(shape)


def integers(name: str, shape: tuple[int, ...], low: int, high: int) -> Array:
    """int64 in low .. high inclusive, uniform to within 2^-32 (multiply-shift of 32-bit words)."""
    count = int(np.prod(shape))
    halves = words(name, count) >> np.uint64(32)
    offsets = (halves * np.uint64(high - low + 1)) >> np.uint64(32)
    return np.asarray(offsets.astype(np.int64) + low).reshape(shape)


def permutation(name: str, count: int) -> Array:
    """int64 [count], a permutation of 0 .. count-1: the order of `count` words, ties (none in practice) by position."""
    return np.argsort(words(name, count), kind="stable")


def subset(name: str, population: int, count: int) -> Array:
    """int64 [count], distinct numbers below `population`, in random order."""
    return permutation(name, population)[:count]


def float8_codes(name: str, shape: tuple[int, ...]) -> Array:
    """float64 numbers, uniform over the 254 codes of float8_e4m3fn that are no NaN: +-448, subnormals and -0.0 among them."""
    codes = integers(name, shape, 0, 253)
    signed = np.where(codes < 127, codes, codes + 1).astype(np.uint8)
    return np.asarray(signed.view(NUMPY_DTYPES["float8_e4m3fn"]).astype(np.float64))


def cast(values: Array, dtype: str) -> Array:
    """To a named dtype: exact float32 values rounded to nearest even, float8 clamped to +-448 first, int8 as integers."""
    target = NUMPY_DTYPES[dtype]
    if dtype.startswith("float8"):
        values = np.clip(values, -448, 448)
    return values.astype(np.float32).astype(target) if dtype != "int8" else values.astype(np.int8)


_POWERS = np.array([2.0**-4, 2.0**-3, 2.0**-2, 2.0**-1])


def scales(name: str, shape: tuple[int, ...], power_of_two: bool, dtype: str = "float32") -> Array:
    """Positive scales in 2^-4 .. 2^0: powers of two, or with a full random significand, which nothing may round away."""
    values = _POWERS[integers(f"{name}/exponent", shape, 0, 3)]
    if not power_of_two:
        values = values * (1 + integers(f"{name}/significand", shape, 0, (1 << 23) - 1) * 2.0**-23)
    return values.astype(np.float32).astype(NUMPY_DTYPES[dtype])
