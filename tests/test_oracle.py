"""Two oracles, written differently, say the same: bit for bit on exact inputs, to 1e-12 on others, and by hand on tiny ones."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsa_portable.conformance.cases.axes import INDEX_FORMATS
from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.cases.lightning_index import IndexCase
from dsa_portable.conformance.cases.sparse_attend import AttendCase
from dsa_portable.conformance.judging import oracle, oracle_dense
from dsa_portable.conformance.selftest.plant import Fault, executed
from dsa_portable.formats import LAYOUTS

Array: TypeAlias = np.ndarray[Any, Any]

# --- both oracles' answers in one shape ---


def index_scores(call: Call) -> Array:
    """oracle.index_scores as oracle_dense returns it: float64 [Tq, longest request], -inf where a row does not see."""
    result = np.full((len(call.arrays["q"]), max(1, int(call.batch["seqlens_k"].max()))), -np.inf)
    spans = {row: (start, end) for row, _, start, end in oracle.rows(call)}
    with np.errstate(invalid="ignore"):
        for block, low, scores in oracle.index_scores(call):
            for i, row in enumerate(range(block.start, block.stop)):
                start, end = spans[row]
                result[row, start:end] = scores[i, start - low : end - low]
    return result


def attention(call: Call) -> tuple[Array, Array]:
    """oracle.attention over all rows: (out [Tq, Hq, value_dim], lse [Tq, Hq])."""
    q, scale, width = call.arrays["q"].astype(np.float64), call.options["softmax_scale"], call.options["value_dim"]
    out, lse = np.zeros((*q.shape[:2], width)), np.full(q.shape[:2], -np.inf)
    for row, request, _, _ in oracle.rows(call):
        kv, positions = oracle.attention_row(call, row, request)
        if len(positions):
            out[row], lse[row], _ = oracle.attention(q[row], kv, scale, width, call.arrays.get("attn_sink"))
    return out, lse


def assert_close(ours: Array, theirs: Array) -> None:
    """Equal to 1e-12 of the largest number; what is not finite stands in the same slots."""
    finite = np.isfinite(theirs)
    np.testing.assert_array_equal(ours[~finite], theirs[~finite])
    np.testing.assert_allclose(ours[finite], theirs[finite], rtol=0, atol=1e-12 * abs(theirs[finite]).max(initial=0))


def check_index(call: Call, *, exact: bool) -> None:
    """Both oracles agree on a call of lightning_index."""
    (np.testing.assert_array_equal if exact else assert_close)(index_scores(call), oracle_dense.index_scores(call))


def check_attention(call: Call, *, exact: bool) -> None:
    """Both oracles agree on a call of sparse_attend; exact ones in float32, where exp(-500) is the 0 that it is meant to be."""
    for ours, theirs in zip(attention(call), oracle_dense.attention(call), strict=True):
        if exact:
            np.testing.assert_array_equal(ours.astype(np.float32), theirs.astype(np.float32))
        else:
            assert_close(ours, theirs)


# --- small calls of every kind ---

REQUESTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), min_size=1, max_size=4).map(tuple)
STORED: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.fixed_dictionaries({"gap": st.integers(0, 3)}),
    st.fixed_dictionaries({"page_size": st.sampled_from([1, 4, 16]), "shared_pages": st.integers(0, 3)}),
)
INDEX = IndexCase("small", "A call small enough to look at every pair of row and key.", (), "f32/f32/-", ((1, 1),))
ATTEND = AttendCase("small", "A call small enough to look at every pair of row and key.", (), "f32", ((1, 1),))


@st.composite
def index_cases(draw: st.DrawFn, contents: tuple[str, ...]) -> IndexCase:
    """Flat or paged, causal or not or by ranges, any format, packed or not, rows without keys, keys without rows, padding."""
    content = draw(st.sampled_from(contents))
    case = replace(
        INDEX,
        content=content,
        format=draw(st.sampled_from(INDEX_FORMATS)),
        requests=draw(REQUESTS),
        heads=2 * draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([8, 20])),
        padding_rows=draw(st.integers(0, 2)),
        causal=draw(st.booleans()),
        ranges=draw(st.booleans()),
        power_of_two_scales=draw(st.booleans()),
        **draw(STORED),
    )
    if case.page_size and case.format == "e4m3/f32/f32" and draw(st.booleans()):
        names = [name for name, layout in LAYOUTS.items() if layout.operator == "lightning_index"]
        case = replace(case, k_layout=draw(st.sampled_from(names)), head_dim=128)
    return case


@st.composite
def attend_cases(draw: st.DrawFn, logits: tuple[str, ...]) -> AttendCase:
    """Flat or paged, holes, repeated entries, cut rows, sinks, packed caches, rows without keys, padding."""
    format = draw(st.sampled_from(["bf16", "f16", "f32", *(n for n, x in LAYOUTS.items() if x.operator == "sparse_attend")]))
    kind = draw(st.sampled_from(logits))
    stored = draw(STORED)
    if kind == "onehot" and "shared_pages" in stored:
        stored = {**stored, "shared_pages": 0}  # The key that outweighs the others is each request's own.
    return replace(
        ATTEND,
        logits=kind,
        format=format,
        requests=draw(REQUESTS),
        heads=draw(st.integers(1, 3)),
        dims=(576, 512) if format in LAYOUTS else draw(st.sampled_from([(12, 8), (5, 4)])),
        topk=draw(st.integers(1, 24)),
        padding_rows=draw(st.integers(0, 2)),
        holes=draw(st.booleans()),
        repeated=kind != "onehot" and draw(st.booleans()),
        sink=kind in ("flat", "peaked") and draw(st.booleans()),
        topk_length=kind in ("flat", "peaked") and draw(st.booleans()),
        **stored,
    )


@contextmanager
def small_tiles() -> Iterator[None]:
    """Blocks of 2 rows and 8 keys, so that small calls have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "ROWS", 2)
        patch.setattr(oracle, "TILE", 8)
        yield


QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@QUICK
@given(index_cases(("lattice", "cancel", "plateau")), st.booleans())
def test_index_oracles_agree_bit_for_bit_on_exact_calls(case: IndexCase, tiled: bool) -> None:
    call = case.build()
    if tiled:
        with small_tiles():
            check_index(call, exact=True)
    else:
        check_index(call, exact=True)


@QUICK
@given(index_cases(("natural", "clustered")), st.booleans())
def test_index_oracles_agree_on_natural_calls(case: IndexCase, tiled: bool) -> None:
    call = case.build()
    if tiled:
        with small_tiles():
            check_index(call, exact=False)
    else:
        check_index(call, exact=False)


@QUICK
@given(attend_cases(("mean", "onehot")))
def test_attention_oracles_agree_bit_for_bit_on_exact_calls(case: AttendCase) -> None:
    check_attention(case.build(), exact=True)


@QUICK
@given(attend_cases(("flat", "peaked", "hot")))
def test_attention_oracles_agree_on_natural_calls(case: AttendCase) -> None:
    check_attention(case.build(), exact=False)


def test_a_visible_nan_spoils_the_same_scores() -> None:
    case = replace(INDEX, format="e4m3/f32/f32", requests=((3, 9), (4, 7)), heads=2, head_dim=4, visible_nan=True)
    call = case.build()
    ours, theirs = index_scores(call), oracle_dense.index_scores(call)
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(theirs))
    # Row 0's own NaN, and position 1 of the second request in all its rows.
    spoilt = [(0, position) for position in range(7)] + [(row, 1) for row in range(3, 7)]
    assert np.argwhere(np.isnan(ours)).tolist() == [list(place) for place in spoilt]


# --- by hand ---

HAND_INDEX = {
    "q": np.array([[[1, 2], [-1, 3]], [[0, 1], [1, 0]]], np.float32),
    "weights": np.array([[0.5, -2], [1, 1]], np.float32),
    "k": np.array([[1, 1], [2, -1], [-3, 0]], np.float32),
    "k_scale": np.array([1, 2, 0.25], np.float32),
}
# Row 0, key 0: 0.5 * relu(1*1 + 2*1) - 2 * relu(-1*1 + 3*1) = 1.5 - 4. Key 1: both dot products, 0 and -5, give nothing.
# Row 1, key 0: relu(1) + relu(1). Key 1: 2 * (relu(-1) + relu(2)). Key 2: relu(0) + relu(-3).
HAND_SCORES = [[-2.5, 0.0, -1.5], [2.0, 4.0, 0.0]]
NONE = -np.inf


@pytest.mark.parametrize("scores_of", [index_scores, oracle_dense.index_scores])
def test_index_by_hand(scores_of: Callable[[Call], Array]) -> None:
    lengths = {"cu_seqlens_q": np.array([0, 2], np.int32), "seqlens_k": np.array([3], np.int32)}
    flat = {**lengths, "cu_seqlens_k": np.array([0, 3], np.int32)}
    options = {"topk": 1, "k_layout": None}
    call = Call("lightning_index", HAND_INDEX, flat, options)
    assert scores_of(call).tolist() == [[-2.5, 0.0, NONE], HAND_SCORES[1]]
    assert scores_of(replace(call, batch_options={"causal": False})).tolist() == HAND_SCORES
    ranges = {"key_start": np.array([-4, 2], np.int32), "key_end": np.array([1, 99], np.int32)}
    assert scores_of(replace(call, batch={**flat, **ranges})).tolist() == [[-2.5, NONE, NONE], [NONE, NONE, 0.0]]
    # One key per page, in pages 4, 0, 2; a third row is padding.
    pages = {**lengths, "block_table": np.array([[4, 0, 2, -7]], np.int32)}
    k, k_scale = np.full((5, 1, 2), np.nan, np.float32), np.full((5, 1), np.nan, np.float32)
    k[[4, 0, 2], 0], k_scale[[4, 0, 2], 0] = HAND_INDEX["k"], HAND_INDEX["k_scale"]
    arrays = {name: np.concatenate([HAND_INDEX[name], HAND_INDEX[name][:1]]) for name in ("q", "weights")}
    paged = Call("lightning_index", {**arrays, "k": k, "k_scale": k_scale}, pages, options, {"page_size": 1})
    assert scores_of(paged).tolist() == [[-2.5, 0.0, NONE], HAND_SCORES[1], [NONE] * 3]


@pytest.mark.parametrize("scores_of", [index_scores, oracle_dense.index_scores])
def test_more_rows_than_keys_by_hand(scores_of: Callable[[Call], Array]) -> None:
    batch = {"cu_seqlens_q": np.array([0, 2], np.int32), "seqlens_k": np.array([1], np.int32)}
    call = Call("lightning_index", HAND_INDEX, {**batch, "cu_seqlens_k": np.array([0, 3], np.int32)}, {"k_layout": None})
    assert scores_of(call).tolist() == [[NONE], [2.0]]


@pytest.mark.parametrize("attention_of", [attention, oracle_dense.attention])
def test_attention_by_hand(attention_of: Callable[[Call], tuple[Array, Array]]) -> None:
    # The first number of a key is its value, the second times ln 3 its logit: weights 1, 3 and 1/3.
    arrays = {
        "q": np.array([[[0, 1]]] * 4, np.float32),
        "kv": np.array([[8, 0], [4, 1], [6, -1], [np.nan, np.nan]], np.float32),
        "indices": np.array([[1, -1, 0], [2**31 - 1, 3, -(2**31)], [1, 1, 0], [2, 0, 1]], np.int32),
    }
    batch = {"cu_seqlens_q": [0, 4], "seqlens_k": [3], "cu_seqlens_k": [0, 4]}
    options = {"softmax_scale": float(np.log(3)), "value_dim": 1, "kv_layout": None}
    call = Call("sparse_attend", arrays, {n: np.array(a, np.int32) for n, a in batch.items()}, options)
    totals = np.array([4, 0, 7, 13 / 3])
    values = np.array([8 + 12, 0, 8 + 24, 8 + 12 + 2])
    out, lse = attention_of(call)
    np.testing.assert_allclose(out[:, 0, 0], [5, 0, 32 / 7, 22 * 3 / 13], rtol=1e-15)
    np.testing.assert_allclose(np.exp(lse[:, 0]), totals, rtol=1e-15)
    # A sink of 0 adds exp(0) = 1 to what divides, and nothing to the lse.
    out, lse = attention_of(replace(call, arrays={**arrays, "attn_sink": np.zeros(1, np.float32)}))
    np.testing.assert_allclose(out[:, 0, 0], [4, 0, 4, 22 * 3 / 16], rtol=1e-15)
    np.testing.assert_allclose(out[:, 0, 0], values / (totals + 1), rtol=1e-15)
    np.testing.assert_allclose(np.exp(lse[:, 0]), totals, rtol=1e-15)
    out, _ = attention_of(replace(call, arrays={**arrays, "attn_sink": np.array([np.inf], np.float32)}))
    assert not out.any()
    # Only the first entry counts.
    out, lse = attention_of(replace(call, arrays={**arrays, "topk_length": np.array([1, 3, 1, 1], np.int32)}))
    np.testing.assert_allclose(out[:, 0, 0], [4, 0, 4, 6], rtol=1e-15)
    np.testing.assert_allclose(np.exp(lse[:, 0]), [3, 0, 3, 1 / 3], rtol=1e-15)


# --- a difference is seen ---

PAGED: dict[str, Any] = {"requests": ((4, 30), (2, 21)), "page_size": 4, "shared_pages": 2, "padding_rows": 1}
SMALL_INDEX = replace(INDEX, format="e4m3/f32/f32", heads=4, head_dim=8, content="lattice", **PAGED)
SMALL_ATTEND = replace(ATTEND, heads=2, dims=(12, 8), topk=16, sink=True, **PAGED)


SEEN, PAGE = "distance_to_end = call.batch", "table[positions // size] * size"
# fmt: off
PLANTED = [
    (oracle, "index", Fault("", "the last head forgotten", 'for name in ("q", "weights"))', 'for name in ("q", "weights"))\n        q, weights = q[:, :-1], weights[:, :-1]')),
    (oracle, "index attend", Fault("", "the page before the right one", PAGE, "table[np.maximum(positions - size, 0) // size] * size")),
    (oracle, "index", Fault("", "top-left alignment", "length - (last - first) + (row - first) + 1)", "min(row - first + 1, length))")),
    (oracle, "attend", Fault("", "a scale 1e-9 too large", "logits = softmax_scale *", "logits = (1 + 1e-9) * softmax_scale *")),
    (oracle_dense, "index", Fault("", "one key too few", SEEN, "distance_to_end = 1 + call.batch")),
    (oracle_dense, "index attend", Fault("", "a shared page belongs to one request", "    return position\n", "    position[1:, position[0] >= 0] = -1\n    return position\n")),
]
# fmt: on


@pytest.mark.parametrize(("module", "operators", "fault"), PLANTED, ids=[fault.title for _, _, fault in PLANTED])
def test_a_planted_difference_is_seen(module: Any, operators: str, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"index": (check_index, SMALL_INDEX.build(), True), "attend": (check_attention, SMALL_ATTEND.build(), False)}
    for operator in operators.split():
        check, call, exact = calls[operator]
        check(call, exact=exact)
    for name, value in executed(Path(module.__file__), fault, {}).items():
        if callable(value) and getattr(value, "__module__", "") == "planted":
            monkeypatch.setattr(module, name, value)
    for operator in operators.split():
        check, call, exact = calls[operator]
        with pytest.raises(AssertionError):
            check(call, exact=exact)


# --- what an oracle may know ---

KNOWN = {"__future__", "collections.abc", "itertools", "typing", "numpy"}
KNOWN |= {"dsa_portable.conformance.cases.call", "dsa_portable.formats"}


def strange(source: str) -> set[str]:
    """What the source imports or names beyond arrays, the call and the bytes of packed caches."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} - KNOWN
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "."} - KNOWN
        named = str(getattr(node, "id", None) or getattr(node, "attr", None))
        found |= {named} & {"Batch", "make_batch", "key_range", "request_of_row", "import_module", "__import__"}
    return found


@pytest.mark.parametrize("module", [oracle, oracle_dense])
def test_an_oracle_knows_no_backend_and_no_batch(module: Any) -> None:
    assert strange(Path(module.__file__).read_text(encoding="utf-8")) == set()


def test_what_an_oracle_must_not_know_is_seen() -> None:
    assert strange("from dsa_portable.backends.cpu import rows") == {"dsa_portable.backends.cpu"}
    assert strange("def f(call):\n    import torch\n    return call.make_batch()") == {"torch", "make_batch"}
    assert strange("from . import judge") == {"."}


def test_the_oracles_share_no_code() -> None:
    names = [set(vars(module)) - set(vars(np)) for module in (oracle, oracle_dense)]
    both = {name for name in names[0] & names[1] if getattr(oracle, name) is getattr(oracle_dense, name)}
    assert {name for name in both if callable(getattr(oracle, name))} <= {"Any", "Call", "TypeAlias", "unpack"}
