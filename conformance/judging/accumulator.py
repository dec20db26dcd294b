"""Dot products as a declared accumulator sums them, in NumPy, and the roundings of formats.

Matrix units align: of a group of products and the running sum, each is cut to one unit, that of the largest exponent, where a
product's exponent is the sum of its operands' (what is carried in 1.5 * 1.5 is not seen); the exact sum of these is cut to
the accumulator's bits. Bit for bit an H100 (tests/h100_accumulator.npz).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.arrays import NUMPY_DTYPES
from dsa_portable.profile import SMALLEST_NORMAL, Accumulator

Array: TypeAlias = np.ndarray[Any, Any]
Float32: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

BLOCK = 256  # keys per step of a reduced accumulator
# A float's kind -> the integer of its size, and how many bits its significand has.
_FIELDS: dict[type, tuple[type, int]] = {np.float32: (np.int32, 24), np.float64: (np.int64, 53)}


def rounded(values: Array, dtype: str) -> Float32:
    """float32 values rounded to the named dtype and back; tfloat32 is float32 with 11 bits of significand."""
    single = values.astype(np.float32)
    if dtype in ("float32", "float64"):
        return single
    if dtype == "tfloat32":
        return narrowed(single, 11, "RN")
    with np.errstate(over="ignore"):
        return np.asarray(single.astype(NUMPY_DTYPES[dtype]).astype(np.float32))


def narrowed(values: Array, bits: int, rounding: str) -> Array:
    """float32 or float64 values with so many bits of significand, to the nearest even (RN) or towards zero (RZ)."""
    integer, held = _FIELDS[values.dtype.type]
    if bits >= held:
        return values
    lost = held - bits
    fields: Array = np.ascontiguousarray(values).view(integer)
    if rounding == "RN":
        fields = fields + ((1 << (lost - 1)) - 1) + (fields >> lost & 1)
    return np.where(np.isfinite(values), (fields >> lost << lost).view(values.dtype), values)


def dot(a: Array, b: Array, accumulator: Accumulator, operands: str = "float32") -> Float32:
    """[m, n]: a [m, d] times b [n, d] transposed; `operands` is the format in which both are multiplied."""
    a, b = a.astype(np.float32), b.astype(np.float32, copy=False)
    if accumulator.bits >= 24 and accumulator.product == "float32":
        return np.asarray(a @ b.T)
    n, step = len(b), accumulator.promotion or max(1, a.shape[1])
    total = np.zeros((len(a), n), np.float32)
    for first in range(0, n, BLOCK):
        block = slice(first, first + BLOCK)
        for begin in range(0, a.shape[1], step):
            part = slice(begin, begin + step)
            total[:, block] += _partial(a[:, part], b[block, part], accumulator, operands)
    return total


def _partial(a: Array, b: Array, accumulator: Accumulator, operands: str) -> Float32:
    """The bits of `aligned`, from machine code where numba is installed."""
    compiled = _compiled() if accumulator.bits < 24 and accumulator.product == "float32" else None
    if compiled is not None and _integers_of(accumulator) is np.float32:
        powers = np.ascontiguousarray(power(a, operands)), np.ascontiguousarray(power(b, operands).T)
        bits, guard, group = accumulator.bits, accumulator.guard, accumulator.group
        a_rows, b_columns = np.ascontiguousarray(a), np.ascontiguousarray(b.T)
        total = compiled(a_rows, b_columns, *powers, bits, guard, group, accumulator.rounding == "RZ")
        # An infinite or undefined product has no unit, so order matters again; no such total becomes finite later.
        if np.isfinite(total).all():
            return total
    return aligned(a, b, accumulator, operands)


def _integers_of(accumulator: Accumulator) -> type:
    """The float that holds a group's sum in units exactly, in any order: a product has at most one bit more than is kept."""
    return np.float32 if accumulator.group << (accumulator.bits + accumulator.guard + 1) <= 1 << 24 else np.float64


def power(values: Array, dtype: str) -> Float32:
    """2^exponent of float32 values as they stand in the named format, where subnormals have the smallest one; 0 of 0."""
    exponent = (np.ascontiguousarray(values).view(np.int32) & 0x7F800000).view(np.float32)
    return np.asarray(np.where(values == 0, np.float32(0), np.maximum(exponent, np.float32(SMALLEST_NORMAL[dtype]))))


def aligned(a: Array, b: Array, accumulator: Accumulator, operands: str = "float32", start: Array | float = 0.0) -> Float32:
    """[m, n] of a [m, d] and b [n, d] from a running sum of `start` on, without promotion; few keys, to stay in the cache."""
    kind: Any = _integers_of(accumulator) if accumulator.group > 1 else np.float32
    powers: tuple[Array, Array] = power(a, operands).astype(kind), power(b, operands).astype(kind)
    a, b = a.astype(kind, copy=False), b.astype(kind, copy=False)
    total: Array = np.zeros((len(a), len(b)), kind) + np.asarray(start, kind)
    kept, cut = accumulator.bits - 1 + accumulator.guard, np.trunc if accumulator.rounding == "RZ" else np.rint
    for first in range(0, a.shape[1], accumulator.group):
        group = slice(first, first + accumulator.group)
        products = a.T[group, :, None] * b.T[group, None, :]
        if accumulator.product != "float32":
            products = rounded(products, accumulator.product).astype(kind)
        if accumulator.group == 1:
            total = narrowed(total + products[0], accumulator.bits, accumulator.rounding)
            continue
        largest = np.maximum((powers[0].T[group, :, None] * powers[1].T[group, None, :]).max(axis=0), abs(total))
        # One unit in the last kept place, for the whole group, and no subnormal of float32.
        unit = np.ldexp(kind(1), np.maximum(np.frexp(largest)[1] - 1 - kept, -126))
        per_unit = 1 / unit
        products *= per_unit
        summed = cut(total * per_unit) + cut(products, out=products).sum(axis=0)
        total = narrowed(summed, accumulator.bits, accumulator.rounding) * unit
    return np.asarray(total, np.float32)


@cache
def _compiled() -> Callable[..., Float32] | None:
    """`_in_loops` in machine code; None without numba, or where it may write its cache nowhere (RuntimeError)."""
    try:
        from numba import njit

        compiled: Callable[..., Float32] = njit(cache=True, nogil=True)(_in_loops)
    except (ImportError, RuntimeError):
        return None
    return compiled


def _in_loops(a: Array, b: Array, a_power: Array, b_power: Array, bits: int, guard: int, group: int, truncate: bool) -> Float32:
    """`aligned` of a [m, d] and b [d, n], in the loops that numba compiles: the innermost becomes vector instructions."""
    (m, d), n = a.shape, b.shape[1]
    lost, infinite = np.int32(24 - bits), np.int32(0x7F800000)
    half = np.int32(0 if truncate else (1 << (23 - bits)) - 1)
    odd = np.int32(0 if truncate else 1)
    totals = np.zeros((m, n), np.float32)
    largest, added = np.empty(n, np.float32), np.empty(n, np.float32)
    unit, per_unit = np.empty(n, np.float32), np.empty(n, np.float32)
    for i in range(m):
        total = totals[i]
        for first in range(0, d, group):
            last = min(first + group, d)
            if group == 1:
                for j in range(n):
                    added[j] = total[j] + a[i, first] * b[first, j]
                    unit[j] = 1
            else:
                for j in range(n):
                    largest[j] = abs(total[j])
                    added[j] = 0
                for k in range(first, last):
                    for j in range(n):
                        largest[j] = max(largest[j], a_power[i, k] * b_power[k, j])
                for j in range(n):
                    # Powers of two by their exponent fields: 2^-126 has the field 1.
                    field = max((largest.view(np.int32)[j] >> 23) + 1 - bits - guard, 1)
                    unit.view(np.int32)[j] = field << 23
                    per_unit.view(np.int32)[j] = (254 - field) << 23
                for k in range(first, last):
                    for j in range(n):
                        scaled = a[i, k] * b[k, j] * per_unit[j]
                        added[j] += np.trunc(scaled) if truncate else np.rint(scaled)
                for j in range(n):
                    carried = total[j] * per_unit[j]
                    added[j] += np.trunc(carried) if truncate else np.rint(carried)
            for j in range(n):
                whole = added.view(np.int32)[j]
                if whole & infinite != infinite:
                    added.view(np.int32)[j] = (whole + half + (whole >> lost & odd)) >> lost << lost
                total[j] = added[j] * unit[j]
    return totals
