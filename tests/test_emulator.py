"""The yardstick: its accumulator against fractions, its roundings against ml_dtypes, its errors against the proven bound."""

from __future__ import annotations

import sys
from dataclasses import astuple, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_portable.arrays import NUMPY_DTYPES
from dsa_portable.conformance.cases.lightning_index import IndexCase
from dsa_portable.conformance.cases.sparse_attend import AttendCase
from dsa_portable.conformance.judging import accumulator as accumulator_module
from dsa_portable.conformance.judging import bounds, emulator, oracle
from dsa_portable.conformance.judging.accumulator import BLOCK, aligned, dot, rounded
from dsa_portable.profile import SMALLEST_NORMAL, Accumulator, Profile

Array: TypeAlias = np.ndarray[Any, Any]

# --- the accumulator, slowly: rational numbers, one rounding at a time ---


def exponent(x: Fraction) -> int:
    """e with 2^(e-1) <= |x| < 2^e."""
    e = abs(x.numerator).bit_length() - x.denominator.bit_length()
    return e + 1 if abs(x) >= Fraction(2) ** e else e


def power_of(x: Fraction, smallest: Fraction) -> Fraction:
    """2^exponent of an operand, whose format has no exponent below that of `smallest`; 0 of 0."""
    return max(Fraction(2) ** (exponent(x) - 1), smallest) if x else Fraction(0)


def slow_dot(a: list[Fraction], b: list[Fraction], accumulator: Accumulator, smallest: Fraction = Fraction(0)) -> Fraction:
    """The words of Accumulator's docstring, without promotion."""
    cut = int if accumulator.rounding == "RZ" else round  # int() goes toward zero, round() to the nearest even.

    def narrow(x: Fraction) -> Fraction:
        unit = Fraction(2) ** (exponent(x) - accumulator.bits) if x else Fraction(1)
        return cut(x / unit) * unit

    def single(x: Fraction) -> Fraction:
        unit = Fraction(2) ** (exponent(x) - 24) if x else Fraction(1)
        return round(x / unit) * unit

    total, size = Fraction(0), accumulator.group
    for first in range(0, len(a), size):
        group = list(zip(a[first : first + size], b[first : first + size], strict=True))
        terms = [total, *(x * y for x, y in group)]
        largest = max(power_of(total, Fraction(0)), *(power_of(x, smallest) * power_of(y, smallest) for x, y in group))
        if largest and size > 1:
            unit = largest / Fraction(2) ** (accumulator.bits - 1 + accumulator.guard)
            terms = [cut(x / unit) * unit for x in terms]
        total = narrow(sum(terms, Fraction(0)) if size > 1 else single(terms[0] + single(terms[1])))
    return total


def test_the_slow_model_by_hand() -> None:
    assert [exponent(Fraction(x)) for x in ("1", "1/2", "3/4", "-5", "8")] == [1, 0, 0, 3, 4]
    one, three, nine = Fraction(1), Fraction(3), Fraction(9)
    # Three bits under 9 = 1001b: the unit is 2, so 9 becomes 8 (or 8, the even of 8 and 10), and 3 becomes 2 or 4.
    assert slow_dot([nine, three], [one, one], Accumulator(3, "RZ", 2)) == 10
    assert slow_dot([nine, three], [one, one], Accumulator(3, "RN", 2)) == 12
    assert slow_dot([-nine, three], [one, one], Accumulator(3, "RZ", 2)) == -6
    # 3 * 3 has the exponent 1 + 1: the unit is 1, 9 and 3 are kept, and only their sum 12 = 1100b is cut, to itself.
    assert slow_dot([three, three], [three, one], Accumulator(3, "RZ", 2)) == 12
    # A guard bit keeps 1 beside 8, 9 = 1001b is then cut to 8.
    assert slow_dot([nine, three], [one, one], Accumulator(3, "RZ", 2, guard=1)) == 12
    # One at a time 3 and 9 are added exactly: 12 = 1100b.
    assert slow_dot([three, nine], [one, one], Accumulator(3, "RZ", 1)) == 12
    assert slow_dot([three, Fraction(10)], [one, one], Accumulator(3, "RZ", 1)) == 12
    # Where no exponent is below that of 4, a 1 counts as large as a 4.
    assert slow_dot([one], [one], Accumulator(2, "RZ", 2), smallest=Fraction(4)) == 0


ACCUMULATORS = [
    Accumulator(13, "RZ", 32),
    Accumulator(14, "RZ", 32),
    Accumulator(13, "RN", 8),
    Accumulator(14, "RN", 1),
    Accumulator(14, "RZ", 16, guard=2),
]


def named(accumulator: Accumulator) -> str:
    return "-".join(str(x) for x in astuple(accumulator))


def operands(raw: bytes, exponents: int | None) -> tuple[list[float], list[float]]:
    """Two vectors from any bytes: float8_e4m3fn, or bfloat16 with so many different exponents."""
    if exponents is None:
        numbers = np.frombuffer(raw, ml_dtypes.float8_e4m3fn).astype(np.float64)
        numbers[np.isnan(numbers)] = 0
    else:
        words = np.frombuffer(raw[: len(raw) // 2 * 2], "<u2").astype(np.int64)
        sign, significand = np.where(words & 0x8000, -1.0, 1.0), 128 + (words & 0x7F)
        numbers = sign * significand * 2.0 ** ((words >> 7 & 0xFF) % exponents - exponents // 2 - 7.0)
    half = len(numbers) // 2
    return numbers[:half].tolist(), numbers[half : 2 * half].tolist()


VECTORS = st.builds(operands, st.binary(min_size=4, max_size=280), st.sampled_from([None, 1, 4, 40]))


def fast_dot(a: list[float], b: list[float], accumulator: Accumulator, operands: str = "float32") -> Fraction:
    return Fraction(float(dot(np.array([a]), np.array([b]), accumulator, operands)[0, 0]))


@pytest.mark.parametrize("accumulator", ACCUMULATORS, ids=named)
@settings(deadline=None)
@given(vectors=VECTORS)
def test_dot_is_the_slow_model(accumulator: Accumulator, vectors: tuple[list[float], list[float]]) -> None:
    a, b = vectors
    exact = [Fraction(x) for x in a], [Fraction(y) for y in b]
    assert fast_dot(a, b, accumulator) == slow_dot(*exact, accumulator)
    as_float8 = fast_dot(a, b, accumulator, "float8_e4m3fn")
    assert as_float8 == slow_dot(*exact, accumulator, Fraction(SMALLEST_NORMAL["float8_e4m3fn"]))


RECORDED = np.load(Path(__file__).with_name("h100_accumulator.npz"))
TENSOR_CORES = {
    "float8_e4m3fn": Accumulator(14, "RZ", 32),
    "bfloat16": Accumulator(24, "RZ", 16, guard=2),
    "float16": Accumulator(24, "RZ", 16, guard=2),
}


@pytest.mark.parametrize("recorded", [name.removesuffix(" sum") for name in RECORDED if name.endswith(" sum")])
def test_the_accumulator_is_an_h100s_bit_for_bit(recorded: str) -> None:
    """tl.dot on an H100 SXM, triton 3.6.0: (K, spread of exponents, a running sum or none, max_num_imprecise_acc or 0)."""
    operands, _, _, running, promotion = recorded.split()
    a, b = (RECORDED[f"{recorded} {side}"].view(NUMPY_DTYPES[operands]).astype(np.float32) for side in "ab")
    expected, chip = RECORDED[f"{recorded} sum"], TENSOR_CORES[operands]
    if running == "running":
        found = aligned(a, b, chip, operands, RECORDED[f"{recorded} start"])
    elif chip.bits < 24:
        found = dot(a, b, replace(chip, promotion=int(promotion)), operands)
    else:
        found = aligned(a, b, chip, operands)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_each_part_of_the_recorded_accumulator_matters() -> None:
    def differ(recorded: str, chip: Accumulator) -> bool:
        operands = recorded.split()[0]
        a, b = (RECORDED[f"{recorded} {side}"].view(NUMPY_DTYPES[operands]).astype(np.float32) for side in "ab")
        return not np.array_equal(aligned(a, b, chip, operands), RECORDED[f"{recorded} sum"])

    float8, half = "float8_e4m3fn 128 wide fresh 0", "float16 128 wide fresh 0"
    for changes in ({"bits": 13}, {"bits": 15}, {"rounding": "RN"}, {"group": 16}, {"guard": 1}):
        assert differ(float8, replace(TENSOR_CORES["float8_e4m3fn"], **changes)), changes
    for changes in ({"bits": 23}, {"rounding": "RN"}, {"group": 8}, {"guard": 1}, {"guard": 3}):
        assert differ(half, replace(TENSOR_CORES["float16"], **changes)), changes


def test_dot_gives_one_number_for_each_pair_of_rows() -> None:
    drawn = np.random.default_rng(1)
    a, b = (drawn.standard_normal((n, 40)).astype(ml_dtypes.bfloat16) for n in (3, BLOCK + 5))
    for accumulator in (*ACCUMULATORS, Accumulator()):
        found = dot(a, b, accumulator)
        assert found.shape == (3, len(b))
        assert found.dtype == np.float32
        for i, j in ((0, 0), (2, 3), (1, BLOCK - 1), (1, BLOCK), (2, len(b) - 1)):
            np.testing.assert_allclose(found[i, j], dot(a[i : i + 1], b[j : j + 1], accumulator)[0, 0], rtol=1e-5)
    assert dot(a, b[:0], ACCUMULATORS[0]).shape == (3, 0)


def test_rounding_group_and_bits_all_matter() -> None:
    drawn = np.random.default_rng(2)
    a, b = (drawn.standard_normal((8, 128)).astype(ml_dtypes.bfloat16) for _ in range(2))
    changed = [ACCUMULATORS[0], Accumulator(14, "RZ", 32), Accumulator(13, "RN", 32), Accumulator(13, "RZ", 16), Accumulator()]
    results = [dot(a, b, accumulator) for accumulator in changed]
    for i, one in enumerate(results):
        assert not any(np.array_equal(one, other) for other in results[:i])


@pytest.mark.parametrize("accumulator", [*ACCUMULATORS, Accumulator()], ids=named)
@pytest.mark.parametrize("power", [-40, -57, -62, -70, -80])
def test_tiny_products_are_lost_and_never_become_nan(accumulator: Accumulator, power: int) -> None:
    a = np.full((2, 40), 2.0**power)
    found = dot(a, a, accumulator)
    expected = 40 * 2.0 ** (2 * power)
    assert (abs(found - expected) <= max(2.0**-120, expected / 256)).all()


# --- machine code: the bits of the definition ---

SPECIAL = [0.0, -0.0, 1.0, -1.5, 2.0**-149, -(2.0**-127), 2.0**-126, 2.0**63, -1e38, 3e38, np.inf, -np.inf, np.nan]


def spread(drawn: np.random.Generator, shape: tuple[int, int], exponents: tuple[int, int]) -> Array:
    """Numbers of both signs whose exponents fill this range."""
    return np.ldexp(drawn.uniform(1, 2, shape) * drawn.choice([-1, 1], shape), drawn.integers(*exponents, shape))


OPERANDS: dict[str, Any] = {
    "e4m3": lambda drawn, shape: (drawn.standard_normal(shape) * 64).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn),
    "int8": lambda drawn, shape: drawn.integers(-128, 128, shape).astype(np.int8),
    "bf16": lambda drawn, shape: spread(drawn, shape, (-9, 9)).astype(ml_dtypes.bfloat16),
    "f32": lambda drawn, shape: drawn.uniform(1, 2, shape).astype(np.float32),
    "f32, far apart": lambda drawn, shape: spread(drawn, shape, (-40, 40)).astype(np.float32),
    "cancelling": lambda drawn, shape: drawn.choice([1, -1, 1 + 2.0**-7], shape).astype(np.float32),
    "subnormal": lambda drawn, shape: spread(drawn, shape, (-82, -58)).astype(np.float32),
    "zeros": lambda drawn, shape: drawn.choice([0.0, -0.0], shape).astype(np.float32),
    "almost overflowing": lambda drawn, shape: spread(drawn, shape, (58, 61)).astype(np.float32),
}
INFINITE: dict[str, Any] = {
    "overflowing": lambda drawn, shape: spread(drawn, shape, (50, 65)).astype(np.float32),
    "special": lambda drawn, shape: drawn.choice(SPECIAL, shape, p=[0.2, 0.2, *[0.6 / 11] * 11]).astype(np.float32),
    "any bits": lambda drawn, shape: drawn.integers(0, 2**32, shape, np.uint32).view(np.float32),
}


def bits_of(values: Array) -> Array:
    """float32 as integers; every NaN is the same."""
    return np.where(np.isnan(values), np.float32(np.nan), values).view(np.uint32)


@pytest.mark.parametrize("rounding", ["RZ", "RN"])
@pytest.mark.parametrize("group", [1, 4, 8, 16, 32])
@pytest.mark.parametrize("operand", [*OPERANDS, *INFINITE])
def test_machine_code_gives_the_bits_of_the_definition(operand: str, group: int, rounding: str) -> None:
    pytest.importorskip("numba")
    for bits in range(8, 24):
        drawn, accumulator = np.random.default_rng(bits), Accumulator(bits, rounding, group)
        for m, n, d in ((3, 37, 77), (2, 16, 128), (1, 1, 33)):
            a, b = ({**OPERANDS, **INFINITE}[operand](drawn, (rows, d)).astype(np.float32) for rows in (m, n))
            with np.errstate(all="ignore"):
                found, expected = dot(a, b, accumulator), aligned(a, b, accumulator)
            np.testing.assert_array_equal(bits_of(found), bits_of(expected), f"{bits} bits, {(m, n, d)}")


@pytest.mark.parametrize("operand", OPERANDS)
def test_machine_code_runs_where_sums_are_exact_and_finite(operand: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    a, b = (OPERANDS[operand](np.random.default_rng(n), (n, 128)) for n in (3, BLOCK + 5))
    monkeypatch.setattr(accumulator_module, "aligned", lambda *_: pytest.fail("The definition was called."))
    for accumulator in (*ACCUMULATORS, Accumulator(18, "RN", 32), Accumulator(22, "RZ", 2)):
        assert np.isfinite(dot(a, b, accumulator)).all()
    for accumulator in (Accumulator(19, "RN", 32), Accumulator(23, "RZ", 4), Accumulator(18, "RZ", 32, guard=1)):
        with pytest.raises(pytest.fail.Exception):
            dot(a, b, accumulator)


def njit_without_a_cache(**_: Any) -> None:
    raise RuntimeError("cannot cache function: no locator available")


@pytest.mark.parametrize("numba", [None, SimpleNamespace(njit=njit_without_a_cache)], ids=["no numba", "no cache"])
def test_without_numba_the_definition_runs(numba: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", numba)
    monkeypatch.setattr(accumulator_module, "_compiled", accumulator_module._compiled.__wrapped__)
    a, b = (OPERANDS["e4m3"](np.random.default_rng(n), (n, 40)).astype(np.float32) for n in (2, 5))
    for accumulator in ACCUMULATORS:
        np.testing.assert_array_equal(dot(a, b, accumulator), aligned(a, b, accumulator))
    monkeypatch.setattr(accumulator_module, "aligned", lambda *_: np.zeros((2, 5), np.float32))
    assert not dot(a, b, ACCUMULATORS[0]).any()


# --- the proven bound ---


def share_of_bound(a: list[float], b: list[float], accumulator: Accumulator, bits: int | None = None) -> float:
    """|emulated - exact| over dot_gamma * sum |a_i b_i|; `bits`: the error is that of an accumulator of so many bits."""
    exact = sum((Fraction(x) * Fraction(y) for x, y in zip(a, b, strict=True)), Fraction(0))
    magnitude = sum(abs(Fraction(x) * Fraction(y)) for x, y in zip(a, b, strict=True))
    error = abs(fast_dot(a, b, replace(accumulator, bits=bits or accumulator.bits)) - exact)
    bound = bounds.dot_gamma(accumulator, len(a)) * float(magnitude)
    return float(error) / bound if bound else float(error > 0)


BOUNDED = [
    *ACCUMULATORS,
    Accumulator(13, "RZ", 4),
    Accumulator(18, "RZ", 16),
    Accumulator(13, "RZ", 1),
    Accumulator(14, "RZ", 32, promotion=64),
    Accumulator(13, "RZ", 8, promotion=8),
    Accumulator(14, "RZ", 32, product="tfloat32"),
    Accumulator(product="bfloat16"),
    Accumulator(),
]


@pytest.mark.parametrize("accumulator", BOUNDED, ids=named)
@settings(deadline=None)
@given(vectors=VECTORS)
def test_the_bound_holds(accumulator: Accumulator, vectors: tuple[list[float], list[float]]) -> None:
    assert share_of_bound(*vectors, accumulator) <= 1


def adversaries(length: int) -> dict[str, list[float]]:
    """Products (of one operand with 1) that an aligned sum cuts as much as it can."""
    almost, small = 2 - 2.0**-7, 2.0**-12 - 2.0**-20
    at_group_ends = [2.0 ** (i // 32) * (64 if i % 32 == 31 else 2.0**-7 * almost) for i in range(length)]
    return {
        "all just below a power of two": [almost] * length,
        "one large, all others just below its unit": [1.0, *[small] * (length - 1)],
        "one large at the end": [*[small] * (length - 1), 1.0],
        "growing by a half": [almost * 1.5 ** (i // 2) for i in range(length)],
        "growing, large at every group's end": at_group_ends,
        "cancelling": [almost * (-1) ** i for i in range(length)],
        "cancelling after growth": [almost * 2.0 ** (i // 8) * (-1) ** (i // 16) for i in range(length)],
    }


@pytest.mark.parametrize("accumulator", BOUNDED, ids=named)
@pytest.mark.parametrize("length", [1, 2, 31, 33, 64, 128])
def test_the_bound_holds_against_adversaries(accumulator: Accumulator, length: int) -> None:
    for name, products in adversaries(length).items():
        a = [float(np.float32(x).astype(ml_dtypes.bfloat16)) for x in products]
        assert share_of_bound(a, [1.0] * length, accumulator) <= 1, name


@pytest.mark.parametrize("accumulator", ACCUMULATORS[:2], ids=named)
def test_the_bound_is_no_idle_one(accumulator: Accumulator) -> None:
    """An adversary uses a good part of it, and an accumulator that is three bits shorter than declared breaks it."""
    unit = 2.0 ** (1 - accumulator.bits)
    a = [1.0, *[unit * (1 - 2.0**-8)] * 31]
    # It cuts 31 products, and the bound has 34 cuts: 32, the running sum's and the last.
    assert 0.98 * 31 / 34 < share_of_bound(a, [1.0] * 32, accumulator) <= 1
    shorter = [1.0, *[8 * unit * (1 - 2.0**-8)] * 31]
    assert share_of_bound(shorter, [1.0] * 32, accumulator, accumulator.bits - 3) > 1


# --- roundings ---

BITS32 = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64).map(lambda x: np.array(x, np.uint32).view(np.float32))


@given(BITS32)
def test_rounded_is_what_ml_dtypes_and_numpy_round_to(drawn: Array) -> None:
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(rounded(drawn, "bfloat16"), drawn.astype(ml_dtypes.bfloat16).astype(np.float32))
        np.testing.assert_array_equal(rounded(drawn, "float16"), drawn.astype(np.float16).astype(np.float32))
        np.testing.assert_array_equal(rounded(drawn, "float32"), drawn)


def test_rounded_by_hand() -> None:
    values = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 257, 65519, 65520, 1e38, -np.inf])
    assert rounded(values, "bfloat16").tolist()[:3] == [1.0, 1 + 2.0**-6, 256.0]
    assert rounded(values, "float16").tolist()[2:] == [257.0, 65504.0, np.inf, np.inf, -np.inf]
    assert rounded(values, "float32").tolist()[:4] == values.tolist()[:4]


def test_an_intermediate_is_scaled_before_it_is_rounded() -> None:
    dots = np.array([70000.0, 2.0**-26, 1025.0 / 1024], np.float32)
    half = Profile(intermediate="float16")
    with np.errstate(over="ignore"):
        assert emulator.stored(dots, half).tolist() == [np.inf, 0.0, 1025 / 1024]
    scaled = emulator.stored(dots, replace(half, intermediate_exponent=-2))
    assert scaled.tolist() == [70016.0, 0.0, 1025 / 1024]


# --- whole profiles ---

INDEX = IndexCase("small", "Small.", (), "e4m3/f32/f32", ((3, 30), (2, 17)), heads=4, head_dim=48, topk=8, page_size=4)
ATTEND = AttendCase("small", "Small.", (), "f32", ((2, 200),), heads=4, dims=(48, 32), topk=160, sink=True, holes=False)


def index_scores(profile: Profile) -> Array:
    return np.concatenate([scores for _, scores in sorted(emulator.index_scores(INDEX.build(), profile).items())])


def attended(profile: Profile) -> Array:
    """Output and lse of row 0."""
    call = ATTEND.build()
    row, request, _, _ = next(oracle.rows(call))
    kv, _ = oracle.attention_row(call, row, request)
    q, sink = call.arrays["q"][row], call.arrays["attn_sink"]
    out, lse = emulator.attention(q, kv, call.options["softmax_scale"], 32, sink, profile)
    return np.concatenate([out.ravel(), lse])


def test_the_exact_profile_is_plain_float32_in_the_index() -> None:
    for case in (INDEX, replace(INDEX, content="lattice")):
        call = case.build()
        found = emulator.index_scores(call, Profile())
        assert sorted(found) == [row for row, _, start, end in oracle.rows(call) if end > start]
        for row, request, start, end in oracle.rows(call):
            keys, scale = (x.astype(np.float32) for x in oracle.index_keys(call, request, np.arange(start, end)))
            dots = np.maximum(call.arrays["q"][row].astype(np.float32) @ keys.T, 0)
            plain = (call.arrays["weights"][row] @ dots) * scale
            assert found[row].dtype == np.float32
            if case.exact:
                np.testing.assert_array_equal(found[row], plain)
            else:
                np.testing.assert_allclose(found[row], plain, rtol=0, atol=1e-6 * abs(plain).max())


def test_the_exact_profile_is_plain_float32_in_attention() -> None:
    call = replace(ATTEND, format="bf16").build()
    for row, request, _, _ in oracle.rows(call):
        kv, _ = oracle.attention_row(call, row, request)
        q, keys, sink = call.arrays["q"][row].astype(np.float32), kv.astype(np.float32), call.arrays["attn_sink"]
        logits = q @ keys.T * np.float32(call.options["softmax_scale"])
        top = logits.max(axis=1)
        p = np.exp(logits - top[:, None])
        with np.errstate(over="ignore"):
            plain = p @ keys[:, :32] / (p.sum(axis=1) + np.exp(sink - top))[:, None]
        out, lse = emulator.attention(call.arrays["q"][row], kv, call.options["softmax_scale"], 32, sink, Profile())
        assert out.dtype == call.arrays["q"].dtype
        np.testing.assert_allclose(out.astype(np.float32), plain, rtol=2.0**-8, atol=1e-5 * abs(plain).max())
        np.testing.assert_allclose(lse, top + np.log(p.sum(axis=1)), rtol=1e-6)


def test_a_row_without_keys_or_request_is_absent() -> None:
    case = replace(INDEX, requests=((3, 1), (2, 0), (1, 5)), padding_rows=2)
    assert {row: len(scores) for row, scores in emulator.index_scores(case.build(), Profile()).items()} == {2: 1, 5: 5}


INDEX_ROUNDINGS = [
    {"accumulator": ACCUMULATORS[0]},
    {"intermediate": "float16", "intermediate_exponent": -8},
    {"head_sum": "bfloat16"},
    {"logit": "bfloat16"},
    {"scale_compute": "bfloat16"},
    {"qk_compute": "tfloat32"},
    {"qk_compute": "bfloat16"},
    {"qk_compute": "tfloat32", "accumulator": Accumulator(product="bfloat16")},
    {"accumulator": replace(ACCUMULATORS[0], promotion=32)},
    {"accumulator": replace(ACCUMULATORS[0], guard=1)},
]
ATTEND_ROUNDINGS = [
    {"accumulator": ACCUMULATORS[0]},
    {"logit": "bfloat16"},
    {"p": "bfloat16"},
    {"p": "bfloat16", "normaliser": "rounded"},
    {"kv_compute": "bfloat16"},
    {"kv_compute": "tfloat32"},
    {"maximum": "bfloat16", "p": "bfloat16"},
    {"rescale_threshold": 2.0, "p": "bfloat16"},
    {"normaliser_sum": "bfloat16"},
    {"partials": "bfloat16"},
    {"lse": "bfloat16"},
    {"exp_ulp": 64.0},
    {"accumulator": Accumulator(product="bfloat16")},
    {"accumulator": replace(ACCUMULATORS[0], promotion=32)},
]
PROMISES: list[dict[str, Any]] = [
    {"finite_max": 65504.0},
    {"ties": "lowest"},
    {"deterministic": True},
]


@pytest.mark.parametrize(("result", "roundings"), [(index_scores, INDEX_ROUNDINGS), (attended, ATTEND_ROUNDINGS)])
def test_every_declared_rounding_is_modelled_and_nothing_else(result: Any, roundings: list[dict[str, Any]]) -> None:
    exact = result(Profile())
    others = [result(Profile(**fields)) for fields in roundings]
    for i, other in enumerate(others):
        assert not np.array_equal(exact, other), roundings[i]
        assert not any(np.array_equal(other, earlier) for earlier in others[:i]), roundings[i]
        np.testing.assert_allclose(other, exact, rtol=0, atol=0.05 * abs(exact[np.isfinite(exact)]).max())
    for promise in PROMISES:
        np.testing.assert_array_equal(result(Profile(**promise)), exact)


@pytest.mark.parametrize("profile", [Profile(), Profile(partials="bfloat16")], ids=["whole", "splits"])
def test_what_a_large_sink_leaves_is_kept(profile: Profile) -> None:
    """exp(sink) overflows float32; the keys' share of 8e-40 does not vanish beside 2^100."""
    q, kv = np.zeros((3, 2), np.float32), np.array([[1.0, 2.0**100]] * 2)
    out, lse = emulator.attention(q, kv, 0.5, 2, np.array([90.0, 400.0, np.nan], np.float32), profile)
    np.testing.assert_allclose(out[0, 1], 2.0**101 * np.exp(-90.0), rtol=1e-3)
    assert out[1].tolist() == [0, 0]
    assert np.isfinite(out[:2]).all()
    np.testing.assert_allclose(lse, np.log(2), rtol=1e-6)


def test_a_sink_of_infinity_leaves_nothing() -> None:
    q, kv = np.ones((3, 4), np.float32), np.ones((5, 4))
    out, lse = emulator.attention(q, kv, 0.5, 2, np.array([-np.inf, 0.0, np.inf], np.float32), Profile())
    assert out[0].tolist() == [1, 1]
    np.testing.assert_allclose(out[1], 5 / (5 + np.exp(-2.0)), rtol=1e-6)
    assert out[2].tolist() == [0, 0]
    np.testing.assert_allclose(lse, 2 + np.log(5), rtol=1e-6)
