"""merge against the formula in float64, and against one attention over all the keys."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_portable import InvalidArgument, merge, sparse_attend
from dsa_portable.arrays import as_kind, to_numpy

NDArray = npt.NDArray[Any]
INF, NAN = math.inf, math.nan


def f32(*numbers: float) -> NDArray:
    return np.array(numbers, np.float32)


def one_row(lses: Sequence[float], outs: Sequence[float], sink: float | None) -> tuple[float, float]:
    """(out, lse) of one row and head, by the formula; exact in float64 for lses that lie within 600 of one another."""
    seen = [(lse, out) for lse, out in zip(lses, outs, strict=True) if lse > -INF]
    if not seen:
        return 0.0, -INF
    top = max(lse for lse, _ in seen)
    total = math.fsum(math.exp(lse - top) for lse, _ in seen)
    weight = 0.0 if sink is None else INF if sink - top > 700 else math.exp(sink - top)
    return math.fsum(math.exp(lse - top) * out for lse, out in seen) / (total + weight), top + math.log(total)


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[float], list[float], float | None]:
    parts = draw(st.integers(1, 4))
    lse = st.one_of(st.floats(-300, 300, width=32), st.just(-INF))
    sink = draw(st.one_of(st.none(), st.floats(-300, 300, width=32), st.sampled_from([-INF, INF])))
    return (
        draw(st.lists(lse, min_size=parts, max_size=parts)),
        draw(st.lists(st.floats(-4, 4, width=32), min_size=parts, max_size=parts)),
        sink,
    )


@given(st.lists(rows(), min_size=1, max_size=1))
@settings(deadline=None, max_examples=300)
def test_formula(drawn: list[tuple[list[float], list[float], float | None]]) -> None:
    lses, outs, sink = drawn[0]
    out, lse = merge(
        [np.full((1, 1, 2), o, np.float32) for o in outs],
        [np.full((1, 1), value, np.float32) for value in lses],
        None if sink is None else f32(sink),
    )
    true_out, true_lse = one_row(lses, outs, sink)
    assert out.dtype == lse.dtype == np.float32
    # exp(x) carries the rounding of x, up to 600 * 2^-24.
    np.testing.assert_allclose(out, np.full((1, 1, 2), true_out), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(lse, [[true_lse]], rtol=1e-6, atol=1e-6)


def test_rows_heads_and_sinks_do_not_mix() -> None:
    rng = np.random.default_rng(0)
    outs = [rng.normal(size=(3, 2, 4)).astype(np.float32) for _ in range(3)]
    lses = [rng.normal(size=(3, 2)).astype(np.float32) * 3 for _ in range(3)]
    sink = f32(0.5, -2)
    out, lse = merge(outs, lses, sink)
    for t, h, d in np.ndindex(3, 2, 4):
        true_out, true_lse = one_row([part[t, h] for part in lses], [part[t, h, d] for part in outs], float(sink[h]))
        assert out[t, h, d] == pytest.approx(true_out, rel=1e-5, abs=1e-6)
        assert lse[t, h] == pytest.approx(true_lse, rel=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_parts_dtype_comes_back(dtype: Any) -> None:
    parts = [np.full((1, 1, 2), value, dtype) for value in (1, 3)]
    out, lse = merge(parts, [np.zeros((1, 1), np.float32)] * 2)
    assert out.dtype == dtype
    assert out.astype(np.float32).tolist() == [[[2, 2]]]
    assert lse.tolist() == [[f32(math.log(2))[0]]]


def test_empty_rows() -> None:
    nothing = np.full((1, 1), -INF, np.float32)
    for sink in (None, f32(0), f32(-INF), f32(INF)):
        out, lse = merge([np.zeros((1, 1, 2), np.float32)] * 2, [nothing] * 2, sink)
        assert out.tolist() == [[[0, 0]]]
        assert lse.tolist() == [[-INF]]


@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
def test_a_part_that_saw_nothing_is_not_read(poison: float) -> None:
    out, lse = merge(
        [np.full((1, 1, 1), 2, np.float32), np.full((1, 1, 1), poison, np.float32)], [f32(7)[None], f32(-INF)[None]]
    )
    assert out.tolist() == [[[2]]]
    assert lse.tolist() == [[7]]


def test_sinks_at_the_ends() -> None:
    out, lse = [np.full((1, 2, 1), 3, np.float32)], [np.full((1, 2), 5, np.float32)]
    assert merge(out, lse, f32(-INF, INF))[0].tolist() == [[[3], [0]]]
    assert merge(out, lse, f32(-INF, INF))[1].tolist() == [[5, 5]]
    assert merge(out, lse, f32(5, 1e30))[0].tolist() == [[[1.5], [0]]]


KINDS = ["numpy", pytest.param("torch", marks=pytest.mark.skipif(find_spec("torch") is None, reason="needs torch"))]


def merged(
    lses: Sequence[float], outs: Sequence[float], sink: NDArray | None = None, *, array_kind: str = "numpy", heads: int = 1
) -> tuple[NDArray, NDArray]:
    """merge of parts of one row and `heads` heads, all alike, through arrays of a kind; back in NumPy."""
    out, lse = merge(
        [as_kind(np.full((1, heads, 1), value, np.float32), array_kind) for value in outs],
        [as_kind(np.full((1, heads), value, np.float32), array_kind) for value in lses],
        None if sink is None else as_kind(sink, array_kind),
    )
    return to_numpy(out)[0, :, 0], to_numpy(lse)[0]


@pytest.mark.parametrize("array_kind", KINDS)
@pytest.mark.parametrize("sink", [None, -INF, 3.0, INF])
@pytest.mark.parametrize("lses", [(INF,), (NAN,), (2, INF), (INF, 2), (NAN, 2), (-INF, INF), (INF, INF), (NAN, INF)])
def test_an_lse_that_is_no_number_is_never_dropped(lses: tuple[float, ...], sink: float | None, array_kind: str) -> None:
    out, lse = merged(lses, [1] * len(lses), None if sink is None else f32(sink), array_kind=array_kind)
    assert np.isnan([*out, *lse]).all()


@pytest.mark.parametrize("array_kind", KINDS)
@pytest.mark.parametrize("bad", [INF, math.nan])
def test_an_lse_that_is_no_number_spoils_its_row_and_head_alone(bad: float, array_kind: str) -> None:
    outs = [np.full((2, 2, 3), value, np.float32) for value in (1, 3)]
    lses = [np.full((2, 2), 5, np.float32) for _ in outs]
    for sink in (None, f32(5, 5)):
        passed = None if sink is None else as_kind(sink, array_kind)
        clean = merge([as_kind(out, array_kind) for out in outs], [as_kind(lse, array_kind) for lse in lses], passed)
        spoilt = [lse.copy() for lse in lses]
        spoilt[1][0, 1] = bad
        found = merge([as_kind(out, array_kind) for out in outs], [as_kind(lse, array_kind) for lse in spoilt], passed)
        for ours, theirs in zip(map(to_numpy, found), map(to_numpy, clean), strict=True):
            assert np.isnan(ours[0, 1]).all()
            theirs = theirs.copy()
            theirs[0, 1] = np.nan
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("array_kind", KINDS)
def test_a_sink_of_nan_spoils_out_of_its_head_alone(array_kind: str) -> None:
    sink = f32(math.nan, 0)
    out, lse = merged([0, 0], [1, 3], sink, array_kind=array_kind, heads=2)
    assert out[1] == pytest.approx(4 / 3)
    np.testing.assert_array_equal(lse, np.full(2, math.log(2), np.float32))
    out, lse = merged([-INF, -INF], [1, math.nan], sink, array_kind=array_kind, heads=2)
    assert (out.tolist(), lse.tolist()) == ([0, 0], [-INF, -INF])


@pytest.mark.parametrize("array_kind", KINDS)
def test_what_a_large_sink_leaves_is_kept(array_kind: str) -> None:
    """exp(90) overflows float32; exp(-90) does not vanish beside 1e30."""
    out, lse = merged([0, -2], [1e30, -1e30], f32(90, 95, 500, INF), array_kind=array_kind, heads=4)
    left = 1e30 - 1e30 * math.exp(-2)
    np.testing.assert_allclose(out[:2], [left * math.exp(-90), left * math.exp(-95)], rtol=1e-3)
    assert out[2:].tolist() == [0, 0]
    np.testing.assert_allclose(lse, math.log(1 + math.exp(-2)), rtol=1e-6)


def test_no_overflow_where_exp_of_lse_would() -> None:
    out, lse = merge([np.full((1, 1, 1), v, np.float32) for v in (1, 3)], [np.full((1, 1), 1000, np.float32)] * 2)
    assert out.tolist() == [[[2]]]
    assert lse.tolist() == [[f32(1000 + math.log(2))[0]]]


def test_shards_of_one_attention() -> None:
    """Two shards, each a request of its own with local positions, against all keys at once."""
    rng = np.random.default_rng(1)
    q, kv = rng.normal(size=(4, 2, 8)).astype(np.float32), rng.normal(size=(10, 8)).astype(np.float32)
    indices = np.sort(np.argsort(rng.random((4, 10)))[:, :5]).astype(np.int32)
    sink = f32(0.3, 1)
    options: dict[str, Any] = {"softmax_scale": 0.35, "value_dim": 6, "return_lse": True}
    whole, whole_lse = sparse_attend(q, kv, indices, attn_sink=sink, **options)
    left, right = np.where(indices < 6, indices, -1), np.where(indices < 6, -1, indices - 6)
    parts = [sparse_attend(q, kv[:6], left, **options), sparse_attend(q, kv[6:], right, **options)]
    out, lse = merge([p[0] for p in parts], [p[1] for p in parts], sink)
    np.testing.assert_allclose(out, whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, whole_lse, rtol=1e-6)
    twice, _ = merge([p[0] for p in parts], [p[1] for p in parts])
    assert not np.allclose(twice, whole, rtol=1e-3)


def test_inputs_are_not_written_to() -> None:
    outs, lses, sink = [np.ones((1, 1, 2), np.float32)] * 2, [np.zeros((1, 1), np.float32)] * 2, f32(0)
    for array in (*outs, *lses, sink):
        array.flags.writeable = False
    merge(outs, lses, sink)


OUT, LSE = np.zeros((2, 3, 4), np.float32), np.zeros((2, 3), np.float32)


@pytest.mark.parametrize(
    ("outs", "lses", "sink", "words"),
    [
        ([], [], None, ("0 outs and 0 lses", "pass pairs")),
        ([OUT, OUT], [LSE], None, ("2 outs and 1 lses", "pass pairs")),
        ([OUT], [LSE.astype(np.float16)], None, ("lses is float16 [2, 3]", "float32 is accepted")),
        ([OUT.astype(np.float64)], [LSE], None, ("outs is float64 [2, 3, 4]", "float32 or bfloat16 or float16")),
        ([OUT], [LSE[:1]], None, ("lses is float32 [1, 3]", "its Tq is 1", "outs has Tq = 2")),
        ([OUT], [LSE[0]], None, ("lses is float32 [3]", "[Tq, Hq]")),
        ([OUT], [LSE], f32(0, 0), ("attn_sink is float32 [2]", "its Hq is 2", "Hq = 3")),
        ([OUT, OUT[:1]], [LSE, LSE[:1]], None, ("float32 [1, 3, 4] on cpu beside float32 [2, 3, 4]", "parts of one call")),
        (
            [OUT, OUT.astype(np.float16)],
            [LSE, LSE],
            None,
            ("float16 [2, 3, 4] on cpu beside float32", "one shape, dtype and device"),
        ),
        ([[0.0]], [LSE], None, ("outs is list [0.0]", "NumPy array or a torch tensor")),
    ],
)
def test_refused(outs: Any, lses: Any, sink: Any, words: tuple[str, ...]) -> None:
    merge([OUT], [LSE], f32(0, 0, 0))
    with pytest.raises(InvalidArgument) as caught:
        merge(outs, lses, sink)
    message = str(caught.value)
    assert message.startswith("merge: ")
    assert re.fullmatch(r"(?:(?!\w\. ).)*\.", message), message
    for word in words:
        assert word in message


def test_one_stacked_array_is_a_sequence() -> None:
    stacked: Any = np.arange(8, dtype=np.float32).reshape(2, 1, 1, 4)
    lses: Any = np.zeros((2, 1, 1), np.float32)
    assert merge(stacked, lses)[0].tolist() == [[[2, 3, 4, 5]]]
