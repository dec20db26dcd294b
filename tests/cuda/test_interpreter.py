"""Triton's interpreter as conformance/hosts/triton.py repairs it: narrow numbers are numbers, and rounded as chips round."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
import triton
import triton.language as tl

from dsa_portable.arrays import from_numpy, to_numpy
from dsa_portable.conformance.hosts import triton as host

NDArray = npt.NDArray[Any]

pytestmark = [
    pytest.mark.skipif(not host.requested(), reason="there is a chip in place of the interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
N = 4096
BF16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)


@triton.jit  # type: ignore[untyped-decorator]
def arithmetic(a, b, product, total, larger, N: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, N)
    left, right = tl.load(a + place), tl.load(b + place)
    tl.store(product + place, left * right)
    tl.store(total + place, left + right)
    tl.store(larger + place, tl.maximum(left, right))


@triton.jit  # type: ignore[untyped-decorator]
def reductions(a, total, largest, ROWS: tl.constexpr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.arange(0, ROWS)
    values = tl.load(a + row[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(total + row, tl.sum(values, axis=1))
    tl.store(largest + row, tl.max(values, axis=1))


@triton.jit  # type: ignore[untyped-decorator]
def cast(a, result, N: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, N)
    tl.store(result + place, tl.load(a + place).to(result.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator]
def dot(a, b, result, N: tl.constexpr, OUT: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, N)
    square = place[:, None] * N + place[None, :]
    tl.store(result + square, tl.dot(tl.load(a + square), tl.load(b + square), out_dtype=OUT))


def patterns(seed: int, dtype: np.dtype[Any], rows: int = 1) -> NDArray:
    """Numbers of random bits: subnormal, infinite and NaN among them."""
    found = np.random.default_rng(seed).integers(0, 256, (rows, N * dtype.itemsize)).astype(np.uint8).view(dtype)
    return found[0] if rows == 1 else found


def same(found: Any, expected: NDArray) -> None:
    """Equal numbers, and NaN where there is NaN."""
    np.testing.assert_array_equal(to_numpy(found).astype(np.float32), expected.astype(np.float32))


def casts(values: NDArray, dtype: str) -> Any:
    """What the kernel makes of numbers."""
    result = torch.empty(len(values), dtype=getattr(torch, dtype))
    cast[(1,)](from_numpy(values), result, N=len(values))
    return result


def test_bfloat16_arithmetic() -> None:
    a, b = patterns(0, BF16), patterns(1, BF16)
    product, total, larger = (torch.empty(N, dtype=torch.bfloat16) for _ in range(3))
    arithmetic[(1,)](from_numpy(a), from_numpy(b), product, total, larger, N=N)
    same(product, a * b)
    same(total, a + b)
    numbers = ~(np.isnan(a.astype(np.float32)) | np.isnan(b.astype(np.float32)))
    same(larger[torch.from_numpy(numbers)], np.maximum(a, b)[numbers])


def test_bfloat16_reductions() -> None:
    """Small integers, whose sums a bfloat16 holds."""
    values = np.random.default_rng(0).integers(-3, 4, (8, 16))
    total, largest = (torch.empty(8, dtype=torch.bfloat16) for _ in range(2))
    reductions[(1,)](from_numpy(values.astype(BF16)), total, largest, ROWS=8, N=16)
    same(total, values.sum(axis=1))
    same(largest, values.max(axis=1))


def test_a_cast_to_bfloat16_rounds_to_nearest_even() -> None:
    values = patterns(2, np.dtype(np.float32))
    same(casts(values, "bfloat16"), values.astype(BF16))
    halves = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8], np.float32)
    same(casts(halves, "bfloat16"), np.array([1, 1 + 2**-6, 1 + 2**-7, -1]))


@pytest.mark.parametrize("dtype", [BF16, E4M3], ids=str)
def test_a_cast_to_float32_is_exact(dtype: np.dtype[Any]) -> None:
    values = patterns(3, dtype)
    same(casts(values, "float32"), values)


def test_a_cast_to_float8_saturates_and_rounds_to_nearest_even() -> None:
    values = (np.random.default_rng(4).standard_normal(N) * np.exp2(np.arange(N) % 24 - 14)).astype(np.float32)
    same(casts(values, "float8_e4m3fn"), np.clip(values, -448, 448).astype(E4M3))
    edges = np.array([449, -1e9, np.inf, -np.inf, 1 + 2**-4, 1 + 3 * 2**-4, 15.75, 2**-10], np.float32)
    same(casts(edges, "float8_e4m3fn"), np.array([448, -448, 448, -448, 1, 1.25, 16, 0]))


def test_int8_products_are_exact() -> None:
    a, b = (np.random.default_rng(seed).integers(-128, 128, (64, 64)).astype(np.int8) for seed in (5, 6))
    result = torch.empty((64, 64), dtype=torch.int32)
    dot[(1,)](from_numpy(a), from_numpy(b), result, N=64, OUT=tl.int32)
    np.testing.assert_array_equal(to_numpy(result), a.astype(np.int32) @ b.astype(np.int32))


@pytest.mark.parametrize("dtype", [BF16, E4M3], ids=str)
def test_products_of_narrow_numbers_are_those_of_the_numbers(dtype: np.dtype[Any]) -> None:
    a, b = (np.random.default_rng(seed).integers(-8, 9, (64, 64)).astype(dtype) for seed in (7, 8))
    result = torch.empty((64, 64))
    dot[(1,)](from_numpy(a), from_numpy(b), result, N=64, OUT=tl.float32)
    same(result, a.astype(np.float32) @ b.astype(np.float32))


def test_a_second_repair_changes_nothing() -> None:
    interpreter = import_module("triton.runtime.interpreter")
    before = dict(vars(interpreter.InterpreterBuilder)), dict(vars(interpreter.ReduceOps))
    host.repair()
    assert (dict(vars(interpreter.InterpreterBuilder)), dict(vars(interpreter.ReduceOps))) == before
