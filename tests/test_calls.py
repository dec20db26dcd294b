"""What the operators refuse before any backend is chosen, and what they accept, cast and write to."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from numpy.lib.stride_tricks import as_strided

from dsa_portable import Batch, DSAError, InvalidArgument, Unsupported, lightning_index, merge, registry, sparse_attend
from dsa_portable.formats import LAYOUTS
from dsa_portable.operators import AttendRequest, IndexRequest

NDArray = npt.NDArray[Any]
BF16, E4M3, FNUZ, FP4 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float4_e2m1fn
TQ, TK, H, D, DQK = 3, 6, 2, 8, 8


def zeros(*shape: int, dtype: Any = np.float32) -> NDArray:
    return np.zeros(shape, dtype)


def table(*rows: list[int]) -> NDArray:
    return np.array(rows, np.int32)


SHARED = zeros(1000)
INDEX: dict[str, Any] = {"q": zeros(TQ, H, D), "k": zeros(TK, D), "weights": zeros(TQ, H), "topk": 4}
QUANTISED: dict[str, Any] = {
    **INDEX,
    "q": zeros(TQ, H, D, dtype=E4M3),
    "k": zeros(TK, D, dtype=E4M3),
    "k_scale": zeros(TK),
}
ATTEND: dict[str, Any] = {
    "q": zeros(TQ, H, DQK),
    "kv": zeros(TK, DQK),
    "indices": zeros(TQ, 4, dtype=np.int32),
    "softmax_scale": 0.1,
    "value_dim": 6,
}
PAGES: dict[str, Any] = {"batch": Batch.of([TQ], [TK], block_table=table([0, 1]), page_size=4)}
CACHE: dict[str, Any] = {
    **PAGES,
    "q": zeros(TQ, H, 128, dtype=E4M3),
    "k": zeros(2, 4, 132, dtype=np.uint8),
    "k_layout": "idx_fp8_132_planar",
    "weights": zeros(TQ, H),
    "topk": 4,
}
KV_CACHE: dict[str, Any] = {
    **PAGES,
    "q": zeros(TQ, H, 576, dtype=BF16),
    "kv": zeros(2, 4, 656, dtype=np.uint8),
    "kv_layout": "v32_fp8_656_nsr",
    "indices": zeros(TQ, 4, dtype=np.int32),
    "softmax_scale": 0.1,
}
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "index": (lightning_index, INDEX),
    "quantised": (lightning_index, QUANTISED),
    "index cache": (lightning_index, CACHE),
    "attend": (sparse_attend, ATTEND),
    "kv cache": (sparse_attend, KV_CACHE),
}
Refusal = tuple[str, dict[str, Any], tuple[str, ...]]

RANKS_AND_DTYPES: list[Refusal] = [
    ("index", {"q": None}, ("q is None", "required")),
    ("index", {"q": [[0.0]]}, ("q is list [[0.0]]", "NumPy array or a torch tensor")),
    ("index", {"q": zeros(TQ, D)}, ("q is float32 [3, 8]", "[Tq, H, D] is accepted")),
    ("index", {"q": zeros(TQ, H, D, dtype=np.float64)}, ("q is float64", "float8_e4m3fn or int8 or float32", "cast it")),
    ("index", {"q": zeros(TQ, H, D, dtype=ml_dtypes.float8_e5m2)}, ("q is float8_e5m2", "cast it")),
    ("index", {"q": zeros(TQ, H, D).astype(np.dtype(np.float32).newbyteorder("S"))}, ("q is >f4", "float32")),
    ("index", {"k": zeros(TK, D, dtype=np.float16)}, ("q is float32", "k holds float16", "nothing is cast silently")),
    ("index", {"k": zeros(TK, D + 1)}, ("k is float32 [6, 9]", "its D is 9", "q has D = 8")),
    ("index", {"k": zeros(1, TK, D)}, ("k is float32 [1, 6, 8]", "[Tk, D] (flat, as there is no block_table)")),
    ("index", {"k": zeros(TK, D), **PAGES}, ("k is float32 [6, 8]", "[num_pages, page_size, D] (paged, as the batch")),
    ("index", {"k": zeros(TK, 132, dtype=np.uint8)}, ("k is uint8", "name its layout")),
    ("index", {"weights": zeros(TQ, H, dtype=np.int8)}, ("weights is int8", "float32 or bfloat16 or float16")),
    ("index", {"weights": zeros(TQ, H + 1)}, ("its H is 3", "q has H = 2")),
    ("index", {"weights": zeros(TQ + 1, H)}, ("its Tq is 4", "q has Tq = 3")),
    ("index", {"weights": zeros(TQ, H, dtype=FNUZ)}, ("weights is float8_e4m3fnuz", "float32 or bfloat16 or float16")),
    ("index", {"q": zeros(TQ, 0, D), "weights": zeros(TQ, 0)}, ("its H is 0", "at least 1")),
    ("index", {"q": zeros(TQ, H, 0), "k": zeros(TK, 0)}, ("its D is 0", "at least 1")),
    ("quantised", {"k_scale": zeros(TK, dtype=np.float64)}, ("k_scale is float64", "float32 or float16")),
    ("quantised", {"k_scale": zeros(TK + 1)}, ("k_scale is float32 [7]", "its Tk is 7", "k has Tk = 6")),
    ("quantised", {"k_scale": zeros(TK, 1)}, ("k_scale is float32 [6, 1]", "[Tk]")),
    ("attend", {"q": zeros(TQ, H, DQK, dtype=np.int8)}, ("q is int8", "float32 or bfloat16 or float16")),
    ("attend", {"kv": zeros(TK, DQK, dtype=BF16)}, ("q is float32", "kv holds bfloat16", "pass one dtype")),
    ("attend", {"kv": zeros(TK, DQK, dtype=FNUZ)}, ("kv is float8_e4m3fnuz", "float32 or bfloat16 or float16")),
    ("attend", {"kv": zeros(TK, 1, DQK)}, ("kv is float32 [6, 1, 8]", "[Tk, Dqk] (flat")),
    ("attend", {"indices": zeros(TQ, 4, dtype=np.int64)}, ("indices is int64 [3, 4]", "int32 is accepted")),
    ("attend", {"indices": zeros(TQ, 1, 4, dtype=np.int32)}, ("indices is int32 [3, 1, 4]", "[Tq, topk]")),
    ("attend", {"indices": zeros(TQ, 0, dtype=np.int32)}, ("its topk is 0", "at least 1")),
    ("attend", {"attn_sink": zeros(H, dtype=BF16)}, ("attn_sink is bfloat16", "float32 is accepted")),
    ("attend", {"attn_sink": zeros(H + 1)}, ("its Hq is 3", "q has Hq = 2")),
    ("attend", {"attn_sink": 0.0}, ("attn_sink is float 0.0", "NumPy array or a torch tensor")),
    ("attend", {"topk_length": zeros(TQ, dtype=np.int64)}, ("topk_length is int64", "int32 is accepted")),
    ("attend", {"topk_length": zeros(1, dtype=np.int32)}, ("topk_length is int32 [1]", "its Tq is 1")),
    ("kv cache", {"q": zeros(TQ, H, 576)}, ("q is float32", "kv holds bfloat16")),
]

SCALARS: list[Refusal] = [
    *(("index", {"topk": v}, (f"topk is {v!r}", "an int >= 1 is accepted")) for v in (0, -1, True, 4.0, None, np.array(4))),
    *(("index", {"sorted": v}, (f"sorted is {v!r}", "a bool is accepted")) for v in (None, 1, "False")),
    *(("index", {"return_scores": v}, (f"return_scores is {v!r}", "a bool is accepted")) for v in (None, 0)),
    *(("attend", {"return_lse": v}, (f"return_lse is {v!r}", "a bool is accepted")) for v in (None, 1)),
    *(
        ("attend", {"softmax_scale": v}, (f"softmax_scale is {reprlib.repr(v)}", "a finite float > 0"))
        for v in (
            math.nan,
            math.inf,
            0.0,
            -0.5,
            None,
            True,
            "0.1",
            1e300,
            1e-50,
            10**400,
            np.float16(0),
            np.float32(math.nan),
            np.array(0.1),
        )
    ),
    *(("attend", {"value_dim": v}, (f"value_dim is {v!r}", "an int in 1 .. 8")) for v in (0, 9, 512, True, 4.0)),
]

LAYOUTS_AND_SCALES: list[Refusal] = [
    ("index", {"k_layout": "idx_132"}, ("'idx_132' is not known", "idx_fp8_132_planar")),
    ("index", {"k_layout": "v32_fp8_656_nsr"}, ("k_layout is 'v32_fp8_656_nsr'", "a cache of sparse_attend", "own")),
    ("kv cache", {"kv_layout": "idx_fp8_132_planar"}, ("kv_layout is 'idx_fp8_132_planar'", "a cache of lightning_index")),
    ("index cache", {"k": zeros(2, 4, 656, dtype=np.uint8)}, ("132 bytes per token are accepted", "v32_fp8_656_nsr")),
    ("kv cache", {"kv": zeros(2, 4, 132, dtype=np.uint8)}, ("656 bytes per token are accepted", "idx_fp8_132_planar")),
    ("kv cache", {"kv": zeros(2, 4, 584, dtype=np.uint8)}, ("656 bytes per token are accepted", "no layout has 584")),
    ("kv cache", {"kv": zeros(2, 4, 656, dtype=np.int8)}, ("the cache is int8", "uint8 is accepted")),
    ("index cache", {"batch": None, "k": zeros(8, 132, dtype=np.uint8)}, ("stored page by page", "with a block_table")),
    ("index cache", {"q": zeros(TQ, H, 64, dtype=E4M3)}, ("its D is 128", "q has D = 64")),
    ("index cache", {"q": zeros(TQ, H, 128, dtype=BF16)}, ("q is bfloat16", "k holds float8_e4m3fn")),
    ("index cache", {"k_scale": zeros(2, 4)}, ("k_scale was passed", "holds its own scales", "pass k_scale=None")),
    ("quantised", {"k_scale": None}, ("k_scale is missing for float8_e4m3fn keys", "pass it")),
    ("index", {"k_scale": zeros(TK)}, ("k_scale is passed for float32 keys", "fold it into the keys")),
    (
        "index",
        {"q": zeros(TQ, H, D, dtype=np.int8), "k": zeros(TK, D, dtype=np.int8)},
        ("k_scale is missing for int8 keys", "pass it"),
    ),
]

BATCHES: list[Refusal] = [
    ("index", {"batch": [TQ, TK]}, ("batch is list [3, 6]", "a Batch or None", "Batch.of()")),
    ("index", {"batch": Batch.of([TQ + 1], [TK])}, ("cu_seqlens_q ends at 4", "q has 3 rows")),
    ("index", {"batch": Batch.of([TQ], [TK + 1])}, ("cu_seqlens_k ends at 7", "there are 6 keys")),
    ("index", {"k": zeros(1, 4, D), **PAGES}, ("block_table names page 1", "the cache has 1 pages")),
    ("index", {"k": zeros(2, 8, D), **PAGES}, ("batch.page_size is 4", "pages of 8", "batch.with_pages()")),
    (
        "index",
        {"batch": Batch.of([TQ], [TK], key_start=table([0])[0], key_end=table([1])[0])},
        ("key_start and key_end have 1 entries", "q has 3 rows"),
    ),
]

OUTS: list[Refusal] = [
    ("index", {"out": zeros(TQ, 4)}, ("out for indices is float32 [3, 4]", "int32 [3, 4] on cpu is accepted")),
    ("index", {"out": zeros(TQ, 5, dtype=np.int32)}, ("out for indices is int32 [3, 5]", "int32 [3, 4]")),
    ("index", {"out": [zeros(TQ, 4, dtype=np.int32)]}, ("out for indices is list",)),
    ("index", {"out": ()}, ("out has 0 arrays", "returns indices", "one array for each")),
    ("index", {"out": zeros(TQ, 4, dtype=np.int32), "return_scores": True}, ("out has 1 arrays", "indices and scores")),
    ("attend", {"out": zeros(TQ, H, DQK)}, ("out for out is float32 [3, 2, 8]", "float32 [3, 2, 6]")),
    (
        "attend",
        {"out": (zeros(TQ, H, 6), zeros(TQ, H, dtype=BF16)), "return_lse": True},
        ("out for lse is bfloat16", "float32 [3, 2]"),
    ),
    ("attend", {"out": np.broadcast_to(np.float32(0), (TQ, H, 6))}, ("read-only", "a writeable array")),
    ("attend", {"out": ATTEND["q"][:, :, :6]}, ("out for out is float32", "shares memory with q", "another array")),
    ("index", {"out": as_strided(zeros(1, 4, dtype=np.int32), (TQ, 4), (0, 4))}, ("share memory with each other",)),
    (
        "attend",
        {"out": (SHARED[: TQ * H * 6].reshape(TQ, H, 6), SHARED[: TQ * H].reshape(TQ, H)), "return_lse": True},
        ("out for out", "shares memory with out for lse"),
    ),
    ("index", {"q": np.ma.masked_array(INDEX["q"], INDEX["q"] > 0)}, ("q is MaskedArray", "convert it first")),
    ("index", {"topk": 2**31}, ("topk is 2147483648", "1 .. 2147483647")),
    ("index", {"k_layout": []}, ("cache layout [] is not known",)),
]


@pytest.fixture
def no_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that gets as far as choosing a backend fails the test."""

    def reached(*_: object) -> None:
        raise AssertionError("the call was not refused")

    monkeypatch.setattr(registry, "select", reached)


def check_message(error: DSAError, operator: str, words: tuple[str, ...]) -> None:
    message = str(error)
    assert re.fullmatch(r"(?:(?!\w\. ).)*\.", message), f"not one sentence: {message}"
    for word in words:
        assert word in message
    assert message.startswith((f"{operator}: ", "Batch: ", "cache layout", *LAYOUTS)), f"no argument is named: {message}"


@pytest.mark.usefixtures("no_backend")
@pytest.mark.parametrize(
    ("call", "changes", "words"), [*RANKS_AND_DTYPES, *SCALARS, *LAYOUTS_AND_SCALES, *BATCHES, *OUTS], ids=lambda v: str(v)[:40]
)
def test_refused(call: str, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    operator, arguments = CALLS[call]
    with pytest.raises(InvalidArgument) as caught:
        operator(**{**arguments, **changes})
    check_message(caught.value, operator.__name__, words)


RESERVED: list[tuple[str, dict[str, Any], str, tuple[str, ...]]] = [
    ("index", {"q": zeros(TQ, H, D, dtype=FNUZ)}, "format", ("q is float8_e4m3fnuz", "only reserves")),
    ("quantised", {"k": zeros(TK, D, dtype=FNUZ)}, "format", ("k is float8_e4m3fnuz", "only reserves")),
    ("index", {"q": zeros(TQ, H, D, dtype=FP4)}, "format", ("q is float4_e2m1fn", "only reserves")),
    ("index", {"index_space": "slots"}, "index_space", ("index_space is 'slots'", "to_slots()")),
    ("attend", {"index_space": "flat"}, "index_space", ("index_space is 'flat'", "from_flat()")),
]


@pytest.mark.usefixtures("no_backend")
@pytest.mark.parametrize(("call", "changes", "capability", "words"), RESERVED, ids=lambda v: str(v)[:30])
def test_reserved(call: str, changes: dict[str, Any], capability: str, words: tuple[str, ...]) -> None:
    operator, arguments = CALLS[call]
    with pytest.raises(Unsupported) as caught:
        operator(**{**arguments, **changes})
    check_message(caught.value, operator.__name__, words)
    assert caught.value.capability == capability


@pytest.mark.usefixtures("no_backend")
@pytest.mark.parametrize("call", CALLS)
def test_the_unchanged_calls_are_not_refused(call: str) -> None:
    """What every refusal above starts from does reach the choice of a backend."""
    operator, arguments = CALLS[call]
    with pytest.raises(AssertionError, match="not refused"):
        operator(**arguments)


def test_errors_are_what_python_calls_them() -> None:
    assert issubclass(InvalidArgument, ValueError)
    assert issubclass(Unsupported, NotImplementedError)


# --- accepted --------------------------------------------------------------------------------------------------------------


def random_call(seed: int = 0, **changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    arrays = {"q": (TQ, H, D), "k": (TK, D), "weights": (TQ, H)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in arrays.items()} | {"topk": 4} | changes


def scores_of(call: Mapping[str, Any]) -> NDArray:
    scores: NDArray = np.einsum("th,ths->ts", call["weights"], np.maximum(np.einsum("thd,sd->ths", call["q"], call["k"]), 0))
    return scores


def test_dense_is_causal_from_the_bottom_right() -> None:
    call, scores = random_call(), scores_of(random_call())
    for row, indices in enumerate(lightning_index(**call).tolist()):
        seen = TK - TQ + row + 1
        assert indices == sorted(np.argsort(-scores[row, :seen])[:4].tolist()) + [-1] * (4 - min(4, seen))


@pytest.mark.parametrize("topk", [4, np.int64(4), np.uint8(4)])
def test_numpy_integers_count(topk: Any) -> None:
    np.testing.assert_array_equal(lightning_index(**random_call(topk=topk)), lightning_index(**random_call()))


def test_a_backend_receives_plain_scalars() -> None:
    """So that no backend's arithmetic happens in uint8 because a caller's topk was one."""
    arrays = {name: INDEX[name] for name in ("q", "k", "weights")}
    index = IndexRequest.checked(**arrays, topk=np.uint8(4), return_scores=np.True_, sorted=np.False_)
    assert (index.topk, index.return_scores, index.sorted) == (4, True, False)
    assert (type(index.topk), type(index.return_scores), type(index.sorted)) == (int, bool, bool)
    arrays = {name: ATTEND[name] for name in ("q", "kv", "indices")}
    attend = AttendRequest.checked(**arrays, softmax_scale=np.float32(0.5), value_dim=np.int16(6), return_lse=np.False_)
    assert (type(attend.softmax_scale), type(attend.value_dim), type(attend.return_lse)) == (float, int, bool)


@pytest.mark.parametrize("scale", [np.float64(0.125), np.float32(0.125), np.float16(0.125)])
def test_numpy_floats_are_scales(scale: Any) -> None:
    attend = {**ATTEND, "q": random_call()["q"], "kv": random_call()["k"], "indices": zeros(TQ, 4, dtype=np.int32)}
    expected = sparse_attend(**{**attend, "softmax_scale": 0.125})
    np.testing.assert_array_equal(sparse_attend(**{**attend, "softmax_scale": scale}), expected)


def test_out_is_written_and_returned() -> None:
    call = random_call(return_scores=True)
    indices, scores = np.full((TQ, 4), 7, np.int32), np.full((TQ, 4), 7, np.float32)
    found = lightning_index(**call, out=(indices, scores))
    assert found[0] is indices
    assert found[1] is scores
    for written, new in zip((indices, scores), lightning_index(**call), strict=True):
        np.testing.assert_array_equal(written, new)


def test_an_out_between_the_numbers_of_an_input_is_its_own() -> None:
    wide = np.zeros((TQ, H, DQK + 6), np.float32)
    attend = {**ATTEND, "q": wide[:, :, :DQK]}
    assert sparse_attend(**attend, out=wide[:, :, DQK:]) is not None


@pytest.mark.parametrize("causal", [0, 2.5, "no", None, []])
def test_a_flag_that_is_none(causal: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"Batch: causal is .*, but a bool is accepted; pass True or False\."):
        Batch.of([4], [64], causal=causal)


def test_a_backend_that_is_no_name() -> None:
    with pytest.raises(InvalidArgument, match=r"backend is \['cpu'\], but a name or None is accepted; pass one\."):
        lightning_index(**INDEX, backend=["cpu"])


@pytest.mark.parametrize("parts", [None, (part for part in [])])
def test_parts_that_are_no_list(parts: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"merge: outs is .*, but a list or tuple of arrays is accepted; pass one"):
        merge(parts, parts)


def test_an_out_without_numbers_may_lie_anyhow() -> None:
    """A call of no rows writes nothing, whatever the strides of its out: those of a transposed array of none are 0."""
    q, k, out = zeros(0, H, D), zeros(TK, D), as_strided(zeros(1, 4, dtype=np.int32), (0, 4), (0, 0))
    assert lightning_index(q, k, zeros(0, H), topk=4, out=out, batch=Batch.of([0], [TK]), backend="cpu") is out


@pytest.mark.parametrize("as_tuple", [False, True])
def test_one_out(as_tuple: bool) -> None:
    attend = {**ATTEND, "q": random_call()["q"], "kv": random_call()["k"]}
    wide = np.full((TQ, H, 12), np.nan, np.float32)
    out = wide[:, :, ::2]  # any strides
    assert sparse_attend(**attend, out=(out,) if as_tuple else out) is out
    np.testing.assert_array_equal(out, sparse_attend(**attend))
    assert np.isnan(wide[:, :, 1::2]).all()


def test_inputs_are_not_written_to() -> None:
    call = random_call()
    attend = {**ATTEND, "attn_sink": zeros(H), "topk_length": np.full(TQ, 3, np.int32), "return_lse": True}
    for array in [*call.values(), *attend.values()]:
        if isinstance(array, np.ndarray):
            array.flags.writeable = False
    lightning_index(**call, return_scores=True)
    sparse_attend(**attend)


def test_padding_rows() -> None:
    batch = Batch.of([1], [TK])
    indices, scores = lightning_index(**random_call(batch=batch, return_scores=True))
    assert (indices[0] >= 0).all()
    assert (indices[1:] == -1).all()
    assert np.isneginf(scores[1:]).all()
    attend = {**ATTEND, "kv": np.ones((TK, DQK), np.float32)}
    out, lse = sparse_attend(**attend, batch=batch, return_lse=True)
    assert (out[0] == 1).all()
    assert not out[1:].any()
    assert np.isfinite(lse[0]).all()
    assert np.isneginf(lse[1:]).all()


def test_topk_length_beyond_its_row() -> None:
    """Below 0 it is 0, above topk it is topk."""
    attend = {**ATTEND, "q": random_call()["q"], "kv": random_call()["k"], "indices": np.array([[0, 1, 2, 3]] * TQ, np.int32)}
    found = sparse_attend(**attend, topk_length=np.array([-5, 2, 99], np.int32))
    assert not found[0].any()
    cut = np.array([[-1] * 4, [0, 1, -1, -1], [0, 1, 2, 3]], np.int32)
    np.testing.assert_array_equal(found, sparse_attend(**{**attend, "indices": cut}))


def test_attention_adds_no_mask_of_its_own() -> None:
    """Row 0 sees 4 of 6 keys, and none under an empty range; selected keys are attended all the same."""
    attend = {**ATTEND, "q": random_call()["q"], "kv": random_call()["k"], "indices": np.array([[5, 0, 4, 3]] * TQ, np.int32)}
    nothing = np.zeros(TQ, np.int32)
    for batch in (Batch.of([TQ], [TK], causal=False), Batch.of([TQ], [TK], key_start=nothing, key_end=nothing)):
        np.testing.assert_array_equal(sparse_attend(**attend, batch=batch), sparse_attend(**attend))
    shorter = {**attend, "indices": np.array([[0, 3, 4, -1]] * TQ, np.int32)}
    assert not np.allclose(sparse_attend(**shorter), sparse_attend(**attend))


def test_nothing_to_do() -> None:
    """No rows, no keys, no requests: results of the right shape, and every row is empty."""
    for rows, keys, batch in ((0, TK, None), (TQ, 0, None), (0, 0, None), (TQ, TK, Batch.of([], []))):
        call = random_call(batch=batch)
        call |= {"q": call["q"][:rows], "weights": call["weights"][:rows], "k": call["k"][:keys]}
        indices = lightning_index(**call)
        assert indices.shape == (rows, 4)
        assert (indices == -1).all()
        attend = {**ATTEND, "q": call["q"], "kv": call["k"], "indices": zeros(rows, 4, dtype=np.int32), "batch": batch}
        out, lse = sparse_attend(**attend, return_lse=True)
        assert (out.shape, lse.shape) == ((rows, H, 6), (rows, H))
        assert not out.any()
        assert np.isneginf(lse).all()


# --- a batch is checked once in a call ---------------------------------------------------------------------------------


def count_checks(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a Batch is constructed, its values are checked, its pages gathered, and it meets the operands, from now on."""
    counts = dict.fromkeys(("__post_init__", "_check_values", "_followed", "check_bounds"), 0)

    def counted(name: str) -> Callable[..., Any]:
        check = getattr(Batch, name)

        def count(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return check(*arguments, **options)

        return count

    for name in counts:
        monkeypatch.setattr(Batch, name, counted(name))
    return counts


@pytest.mark.parametrize("name", CALLS)
def test_a_call_checks_its_batch_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, call = CALLS[name]
    batch = call.get("batch", Batch.dense(TQ, TK))
    counts = count_checks(monkeypatch)
    operator(**{**call, "batch": batch})
    paged = int(batch.block_table is not None)
    assert counts == {"__post_init__": 0, "_check_values": 1, "_followed": paged, "check_bounds": 1}
    assert Batch.unflatten(*batch.flatten()).num_requests == 1
    assert counts == {"__post_init__": 1, "_check_values": 2, "_followed": 2 * paged, "check_bounds": 1}, (
        "outsiders are checked"
    )


def test_a_call_of_the_wanted_kind_is_itself() -> None:
    out = (zeros(TQ, 4, dtype=np.int32),)
    arrays = {"q": zeros(TQ, H, D), "k": zeros(TK, D), "weights": zeros(TQ, H)}
    request = IndexRequest.checked(**arrays, topk=4, batch=Batch.of([TQ], [TK]), out=out)
    assert request.as_kind("numpy") is request


REWRITTEN: dict[str, tuple[str, list[int], str]] = {
    "a page below 0": (
        "block_table",
        [0, -1],
        "block_table has page -1 within a request's length, but 0 .. 536870911 are accepted, as slots are int32; pass the "
        "pages that hold the keys.",
    ),
    "a page that is not there": (
        "block_table",
        [0, 2],
        "block_table names page 2, but the cache has 2 pages; make them agree.",
    ),
    "too many keys": ("seqlens_k", [7], "max_seqlen_k is 6, but a request has 7; pass an upper bound."),
    "fewer than no keys": ("seqlens_k", [-1], "seqlens_k is list [-1], but lengths >= 0 are accepted; pass counts."),
    "sums that begin late": (
        "cu_seqlens_q",
        [1, 3],
        "cu_seqlens_q is list [1, 3], but prefix sums that begin with 0 and never decrease are accepted; accumulate "
        "the lengths.",
    ),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_a_batch_that_was_rewritten_in_place_is_refused(name: str) -> None:
    """The constructor has accepted it, so the call's own look at the values is all that stands before the backend."""
    field, values, sentence = REWRITTEN[name]
    batch = Batch.of([TQ], [TK], block_table=table([0, 1]), page_size=4)
    getattr(batch, field)[...] = values
    with pytest.raises(InvalidArgument) as refused:
        lightning_index(**{**CACHE, "batch": batch})
    assert str(refused.value) == f"Batch: {sentence}"


def test_the_caches_of_the_refusals_are_served() -> None:
    assert lightning_index(**CACHE).shape == (TQ, 4)
    out = sparse_attend(**KV_CACHE)
    assert (out.shape, out.dtype) == ((TQ, H, 512), BF16)
