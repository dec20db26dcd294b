"""The shipped ONNX models compute the two operators: each is run by a plain InferenceSession and compared with a float64 loop.

Lattice cases (small integers) are exact in float32, so ties and scores must be equal; random cases get a rounding bound.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

ort = pytest.importorskip("onnxruntime")

GRAPHS = Path(__file__).resolve().parents[1] / "backends" / "cpu" / "graphs"
Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]

# NumPy dtype, and the number that ONNX gives it.
DTYPES = {
    "float8_e4m3fn": (np.dtype(ml_dtypes.float8_e4m3fn), 17),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), 16),
    "float16": (np.dtype(np.float16), 10),
    "float32": (np.dtype(np.float32), 1),
    "int8": (np.dtype(np.int8), 3),
    "int32": (np.dtype(np.int32), 6),
    "int64": (np.dtype(np.int64), 7),
}
ELEMENT_TYPE = dict(DTYPES.values())
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
INDEX_FORMATS = ("float8_e4m3fn", "int8", "bfloat16", "float16", "float32")
ATTEND_FORMATS = ("bfloat16", "float16", "float32")
UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}


# The models, and how they are run


def committed(name: str) -> bytes:
    return (GRAPHS / f"{name}.onnx").read_bytes()


def run(model: bytes, feeds: Tensors) -> Tensors:
    """Run `model` in a plain session, feeding and reading dtypes that NumPy itself lacks by their bits."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    values = {
        name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, ELEMENT_TYPE[array.dtype]) for name, array in feeds.items()
    }
    results = session.run_with_ort_values(None, values)
    return {output.name: read(value) for output, value in zip(session.get_outputs(), results, strict=True)}


def read(value: Any) -> Array:
    dtype = next(dtype for dtype, number in DTYPES.values() if number == value.element_type())
    shape: list[int] = value.shape()
    return np.frombuffer(ctypes.string_at(value.data_ptr(), math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


@pytest.fixture(scope="session")
def build() -> ModuleType:
    pytest.importorskip("onnx")
    spec = importlib.util.spec_from_file_location("dsa_portable_graphs_build", GRAPHS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The truth, in float64


def score_of(q: Array, k: Array, weights: Array, k_scale: float) -> float:
    """k_scale * sum_h weights[h] * relu(q[h,:] . k) of one row and one key."""
    total = 0.0
    for h in range(len(weights)):
        total += float(weights[h]) * max(0.0, float(np.dot(q[h].astype(np.float64), k.astype(np.float64))))
    return float(k_scale) * total


def true_index(feeds: Tensors) -> tuple[Array, Array]:
    """Indices and their scores; a key outside the row's range is never read."""
    q, k, weights, k_scale, topk = (feeds[name] for name in ("q", "k", "weights", "k_scale", "topk"))
    indices = np.full((len(q), int(topk[0])), -1)
    scores = np.full(indices.shape, -np.inf)
    for t, (start, end) in enumerate(zip(feeds["key_start"].tolist(), feeds["key_end"].tolist(), strict=True)):
        visible = range(max(0, start), min(len(k), end))
        score = {s: score_of(q[t], k[s], weights[t], k_scale[s]) for s in visible}
        chosen = sorted(sorted(visible, key=lambda s: (-score[s], s))[: int(topk[0])])
        indices[t, : len(chosen)] = chosen
        scores[t, : len(chosen)] = [score[s] for s in chosen]
    return indices, scores


def true_attend(q: Array, kv: Array, softmax_scale: float, value_dim: int) -> tuple[Array, Array]:
    """out [heads, value_dim] and lse [heads] of one row over the keys `kv` [keys, head_dim]."""
    out, lse = np.zeros((len(q), value_dim)), np.full(len(q), -np.inf)
    for h in range(len(q) if len(kv) else 0):
        logits = [softmax_scale * float(np.dot(q[h].astype(np.float64), row.astype(np.float64))) for row in kv]
        largest = max(logits)
        total = sum(np.exp(logit - largest) for logit in logits)
        lse[h] = largest + np.log(total)
        for logit, row in zip(logits, kv, strict=True):
            out[h] += np.exp(logit - largest) / total * row[:value_dim].astype(np.float64)
    return out, lse


def true_sparse_attend(feeds: Tensors) -> tuple[Array, Array]:
    q, kv, scale, value_dim = feeds["q"], feeds["kv"], float(feeds["softmax_scale"]), int(feeds["value_dim"][0])
    rows = [
        true_attend(q[t], kv[[s for s in row if 0 <= s < len(kv)]], scale, value_dim)
        for t, row in enumerate(feeds["indices"].tolist())
    ]
    return np.stack([out for out, _ in rows]), np.stack([lse for _, lse in rows])


# The comparisons; every planted fault below must fail one of them


def check_index_scores(model: bytes, feeds: Tensors, exact: bool) -> None:
    q, k, weights, k_scale = (feeds[name] for name in ("q", "k", "weights", "k_scale"))
    got = run(model, feeds)["scores"]
    want = np.array([[score_of(q[t], k[s], weights[t], k_scale[s]) for s in range(len(k))] for t in range(len(q))])
    assert got.dtype == np.float32
    if exact:
        np.testing.assert_array_equal(got, want)
    else:
        operations = q.shape[2] + q.shape[1] + 4
        terms = np.einsum("th,thd,sd->ts", abs(weights), abs(q), abs(k), dtype=np.float64) * abs(k_scale)
        assert np.all(abs(got - want) <= operations * UNIT_ROUNDOFF["float32"] * terms)


def check_lightning_index(model: bytes, feeds: Tensors, exact: bool) -> None:
    got = run(model, feeds)
    indices, scores = true_index(feeds)
    assert (got["indices"].dtype, got["scores"].dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(got["indices"], indices)
    np.testing.assert_allclose(got["scores"], scores, rtol=0, atol=0 if exact else 1e-4)


def check_attend(model: bytes, feeds: Tensors) -> None:
    got = run(model, feeds)
    out, lse = true_attend(feeds["q"], feeds["kv"], float(feeds["softmax_scale"]), int(feeds["value_dim"][0]))
    assert (got["out"].dtype, got["lse"].dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(got["out"], out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got["lse"], lse, rtol=1e-6, atol=1e-5)


def check_sparse_attend(model: bytes, feeds: Tensors) -> None:
    got = run(model, feeds)
    out, lse = true_sparse_attend(feeds)
    dtype = feeds["q"].dtype
    assert (got["out"].dtype, got["lse"].dtype) == (dtype, np.float32)
    np.testing.assert_allclose(got["out"].astype(np.float64), out, rtol=UNIT_ROUNDOFF[dtype.name] + 1e-5, atol=1e-5)
    np.testing.assert_allclose(got["lse"], lse, rtol=1e-6, atol=1e-5)


# The cases


def lattice(rng: np.random.Generator, dtype: np.dtype[Any], *shape: int) -> Array:
    return rng.integers(-3, 4, shape).astype(dtype)


def normal(rng: np.random.Generator, dtype: np.dtype[Any], *shape: int) -> Array:
    return (rng.normal(size=shape) * (20 if dtype == np.int8 else 1)).astype(dtype)


Draw = Callable[..., Array]


def index_feeds(draw: Draw, fmt: str, rows: int, keys: int, heads: int, head_dim: int, topk: int) -> Tensors:
    """Feeds whose rows see, in turn: all, nothing, a short middle range, all by ranges that must be clamped."""
    rng = np.random.default_rng([rows, keys, heads, topk])
    ranges = [(0, keys), (3, 2), (keys // 3, keys // 3 + 2), (INT_MIN, INT_MAX), (keys, keys + 5)]
    bounds = np.array([ranges[t % len(ranges)] for t in range(rows)], np.int32)
    dtype = DTYPES[fmt][0]
    scale = rng.choice([0.5, 1, 2], keys) if draw is lattice else rng.uniform(0.5, 2, keys)
    return {
        "q": draw(rng, dtype, rows, heads, head_dim),
        "k": draw(rng, dtype, keys, head_dim),
        "weights": draw(rng, np.dtype(np.float32), rows, heads) / np.float32(4),
        "k_scale": scale.astype(np.float32),
        "key_start": np.ascontiguousarray(bounds[:, 0]),
        "key_end": np.ascontiguousarray(bounds[:, 1]),
        "topk": np.array([topk]),
    }


def attend_feeds(heads: int, keys: int, head_dim: int, value_dim: int, scale: float) -> Tensors:
    rng = np.random.default_rng([heads, keys])
    return {
        "q": normal(rng, np.dtype(np.float32), heads, head_dim),
        "kv": normal(rng, np.dtype(np.float32), keys, head_dim),
        "softmax_scale": np.array(scale, np.float32),
        "value_dim": np.array([value_dim]),
    }


def sparse_feeds(fmt: str) -> Tensors:
    """Seven rows over nine keys, of which no row names the last, a row of NaN."""
    dtype = DTYPES[fmt][0]
    rng = np.random.default_rng(5)
    kv = normal(rng, dtype, 9, 12)
    indices = [
        [0, 1, 2, 3, 4, 5],
        [7, 7, 7, 2, 2, 5],
        [-1, 3, 9, INT_MIN, 6, INT_MAX],
        [-1, -1, -1, -1, -1, -1],
        [4, -1, -1, -1, -1, -1],
        [9, 10, INT_MAX, INT_MIN, -9, -2],
        [6, 1, 4, 0, -5, 3],
    ]
    kv[8] = np.nan
    return {
        "q": normal(rng, dtype, 7, 4, 12),
        "kv": kv,
        "indices": np.array(indices, np.int32),
        "softmax_scale": np.array(0.3, np.float32),
        "value_dim": np.array([8]),
    }


def only_scores(feeds: Tensors) -> Tensors:
    return {name: feeds[name] for name in ("q", "k", "weights", "k_scale")}


INDEX_SHAPES = [  # rows, keys, heads, head_dim, topk
    (1, 1, 1, 1, 1),
    (5, 8, 1, 4, 3),
    (7, 5, 3, 4, 9),
    (4, 30, 2, 2, 7),
    (3, 40, 64, 128, 16),
]


# The models do what the formulas say


@pytest.mark.parametrize("shape", INDEX_SHAPES, ids=str)
@pytest.mark.parametrize("draw", [lattice, normal])
def test_index_scores(draw: Draw, shape: tuple[int, int, int, int, int]) -> None:
    feeds = only_scores(index_feeds(draw, "float32", *shape))
    check_index_scores(committed("index_scores"), feeds, exact=draw is lattice)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_index_scores_keep_a_bad_key_to_its_own_column(poison: float) -> None:
    feeds = only_scores(index_feeds(normal, "float32", 3, 20, 4, 16, 1))
    clean = run(committed("index_scores"), feeds)["scores"]
    bad = {**feeds, "k": feeds["k"].copy()}
    bad["k"][6] = poison
    got = run(committed("index_scores"), bad)["scores"]
    np.testing.assert_array_equal(np.delete(got, 6, 1), np.delete(clean, 6, 1))
    assert not np.isfinite(got[:, 6]).all()


@pytest.mark.parametrize("shape", INDEX_SHAPES, ids=str)
@pytest.mark.parametrize("draw", [lattice, normal])
@pytest.mark.parametrize("fmt", INDEX_FORMATS)
def test_lightning_index(fmt: str, draw: Draw, shape: tuple[int, int, int, int, int]) -> None:
    exact = draw is lattice or fmt == "int8"
    feeds = index_feeds(draw, fmt, *shape)
    if exact:
        feeds["weights"] = np.round(feeds["weights"] * 4) / np.float32(4)
        feeds["k_scale"] = np.exp2(np.round(np.log2(feeds["k_scale"])))
    check_lightning_index(committed(f"lightning_index.{fmt}"), feeds, exact)


def test_lightning_index_keeps_the_lowest_of_equal_scores() -> None:
    feeds = index_feeds(lattice, "int8", 1, 50, 2, 4, 20)
    feeds["k"][:] = 1
    feeds["k_scale"][:] = 1
    indices = run(committed("lightning_index.int8"), feeds)["indices"]
    np.testing.assert_array_equal(indices, [np.arange(20)])


@pytest.mark.parametrize("fmt", INDEX_FORMATS)
def test_lightning_index_never_reads_a_hidden_key(fmt: str) -> None:
    feeds = index_feeds(normal, fmt, 4, 12, 3, 8, 5)
    feeds["key_start"][:], feeds["key_end"][:] = 2, [12, 9, 5, 2]
    clean = run(committed(f"lightning_index.{fmt}"), feeds)
    poisons = {"k": [np.nan]} if fmt == "float8_e4m3fn" else {"k": [np.nan, np.inf, -np.inf]} if fmt != "int8" else {}
    for name, values in {**poisons, "k_scale": [np.nan, np.inf]}.items():
        for value in values:
            bad = {**feeds, name: feeds[name].copy()}
            bad[name][0], bad[name][10] = value, value
            got = run(committed(f"lightning_index.{fmt}"), bad)
            for output in ("indices", "scores"):  # Row 0 sees key 10.
                np.testing.assert_array_equal(got[output][1:], clean[output][1:])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_lightning_index_stays_well_formed_when_visible_scores_do_not_compare(value: float) -> None:
    feeds = index_feeds(lattice, "float32", 1, 12, 3, 8, 6)
    feeds["key_start"][0], feeds["key_end"][0] = 4, 9
    feeds["k_scale"][5:8] = value
    feeds["weights"][:] = -1
    indices = run(committed("lightning_index.float32"), feeds)["indices"]
    np.testing.assert_array_equal(indices, [[4, 5, 6, 7, 8, -1]])


def test_lightning_index_over_no_keys() -> None:
    feeds = index_feeds(lattice, "float32", 3, 4, 2, 4, 3)
    feeds["k"], feeds["k_scale"] = feeds["k"][:0].copy(), feeds["k_scale"][:0].copy()
    check_lightning_index(committed("lightning_index.float32"), feeds, exact=True)


ATTEND_SHAPES = [  # heads, keys, head_dim, value_dim, softmax_scale
    (1, 1, 1, 1, 1.0),
    (3, 1, 6, 4, 0.4),
    (4, 17, 12, 12, 0.3),
    (5, 9, 12, 8, 30.0),
    (16, 24, 576, 512, 0.07),
]


@pytest.mark.parametrize("shape", ATTEND_SHAPES, ids=str)
def test_attend(shape: tuple[int, int, int, int, float]) -> None:
    check_attend(committed("attend"), attend_feeds(*shape))


def test_attend_of_logits_far_outside_the_range_of_exp() -> None:
    feeds = attend_feeds(3, 5, 4, 2, 1000.0)
    feeds["kv"][:] = feeds["kv"][0]
    logits = feeds["q"].astype(np.float64) @ feeds["kv"][0] * 1000.0
    assert abs(logits).max() > 1000
    got = run(committed("attend"), feeds)
    np.testing.assert_allclose(got["lse"], logits + np.log(5), rtol=1e-6)
    np.testing.assert_allclose(got["out"], np.tile(feeds["kv"][0, :2], (3, 1)), rtol=1e-6)


def test_attend_rows() -> None:
    """Rows that lie among others, one of them twice, are what attend makes of them end to end; others are not read."""
    feeds = attend_feeds(5, 9, 12, 8, 0.3)
    positions = np.array([7, 0, 3, 3, 8])
    alone = run(committed("attend"), {**feeds, "kv": feeds["kv"][positions]})
    feeds["kv"][[1, 2, 4, 5, 6]] = np.nan
    got = run(committed("attend_rows.float32"), {**feeds, "positions": positions})
    assert all(np.array_equal(values, alone[name]) for name, values in got.items())


@pytest.mark.parametrize("fmt", ATTEND_FORMATS)
def test_sparse_attend(fmt: str) -> None:
    check_sparse_attend(committed(f"sparse_attend.{fmt}"), sparse_feeds(fmt))


def test_sparse_attend_of_rows_without_keys() -> None:
    feeds = sparse_feeds("float16")
    got = run(committed("sparse_attend.float16"), feeds)
    for t in (3, 5):
        np.testing.assert_array_equal(got["out"][t].astype(np.float32), 0)
        np.testing.assert_array_equal(got["lse"][t], -np.inf)
    feeds["kv"] = feeds["kv"][:0].copy()
    check_sparse_attend(committed("sparse_attend.float16"), feeds)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_sparse_attend_never_reads_an_unnamed_key(poison: float) -> None:
    """Keys 0 and 8 are where a clamped index would land."""
    feeds = sparse_feeds("float32")
    feeds["indices"] = np.where(feeds["indices"] == 0, -1, feeds["indices"])
    clean = run(committed("sparse_attend.float32"), feeds)
    feeds["kv"][[0, 8]] = poison
    got = run(committed("sparse_attend.float32"), feeds)
    for output in ("out", "lse"):
        assert got[output].tobytes() == clean[output].tobytes()


def test_operator_rows_have_the_bits_of_the_engine_graphs() -> None:
    feeds = index_feeds(normal, "float32", 5, 40, 64, 128, 40)
    feeds["key_start"][:], feeds["key_end"][:] = 0, 40
    whole = run(committed("lightning_index.float32"), feeds)["scores"]
    for t in range(5):
        row = {**only_scores(feeds), "q": feeds["q"][t : t + 1], "weights": feeds["weights"][t : t + 1]}
        assert whole[t].tobytes() == run(committed("index_scores"), row)["scores"].tobytes()

    feeds = sparse_feeds("float32")
    row = {**feeds, "q": feeds["q"][6], "kv": feeds["kv"][[6, 1, 4, 0, 3]]}
    del row["indices"]
    alone, inside = run(committed("attend"), row), run(committed("sparse_attend.float32"), feeds)
    for output in ("out", "lse"):
        assert inside[output][6].tobytes() == alone[output].tobytes()


# The comparisons can fail


def poisoned_hidden_key() -> Tensors:
    feeds = index_feeds(lattice, "float32", 3, 12, 3, 8, 5)
    feeds["key_start"][:], feeds["key_end"][:] = 1, [6, 9, 1]
    feeds["k"][[0, 10]] = np.nan
    return feeds


def tied() -> Tensors:
    feeds = index_feeds(lattice, "float32", 5, 40, 1, 2, 7)
    feeds["key_start"][:], feeds["key_end"][:] = 0, 40
    return feeds


Check = Callable[[bytes], None]
CHECKS: dict[str, Check] = {
    "index_scores": lambda m: check_index_scores(m, only_scores(index_feeds(lattice, "float32", 4, 9, 3, 4, 1)), True),
    "index_scores, random": lambda m: check_index_scores(
        m, only_scores(index_feeds(normal, "float32", 4, 9, 3, 16, 1)), exact=False
    ),
    "lightning_index.float32, ranges": lambda m: check_lightning_index(
        m, index_feeds(lattice, "float32", 5, 30, 3, 4, 6), exact=True
    ),
    "lightning_index.float32, poison": lambda m: check_lightning_index(m, poisoned_hidden_key(), exact=True),
    "lightning_index.float32, ties": lambda m: check_lightning_index(m, tied(), exact=True),
    "attend": lambda m: check_attend(m, attend_feeds(3, 8, 6, 4, 0.3)),
    "sparse_attend.float32": lambda m: check_sparse_attend(m, sparse_feeds("float32")),
    "sparse_attend.bfloat16": lambda m: check_sparse_attend(m, sparse_feeds("bfloat16")),
}
FAULTS = [  # what is planted, check that must fail, source, text, its replacement
    ("no relu", "index_scores", "index_scores", "Relu (dots)", "Identity (dots)"),
    ("no relu, random", "index_scores, random", "index_scores", "Relu (dots)", "Identity (dots)"),
    ("no k_scale", "index_scores, random", "index_scores", "Mul (summed, k_scale)", "Identity (summed)"),
    (
        "scores rounded to bfloat16",
        "index_scores, random",
        "index_scores",
        "summed = Squeeze (summed_row, head_axis)",
        "rounded = Cast <to = 16> (summed_row)\n wide = Cast <to = 1> (rounded)\n summed = Squeeze (wide, head_axis)",
    ),
    (
        "hidden keys ranked",
        "lightning_index.float32, ranges",
        "lightning_index",
        "Where (visible, ordered, hidden)",
        "Identity (ordered)",
    ),
    (
        "hidden keys weighted by zero",
        "lightning_index.float32, poison",
        "lightning_index",
        "rank = Where (visible, ordered, hidden)",
        "weight = CastLike (visible, scores)\n rank = Mul (scores, weight)",
    ),
    (
        "end inclusive",
        "lightning_index.float32, ranges",
        "lightning_index",
        "Less (position, end)",
        "LessOrEqual (position, end)",
    ),
    (
        "order of scores",
        "lightning_index.float32, ranges",
        "lightning_index",
        "ascending, unused_order = TopK <largest = 0, sorted = 1> (selected, count)",
        "ascending = Identity (selected)",
    ),
    (
        "ties to the highest position",
        "lightning_index.float32, ties",
        "lightning_index",
        "best, best_position = TopK <sorted = 1> (rank, count)",
        """backwards = Constant <value_ints = [-1]> ()
        far_end = Constant <value_ints = [-2147483648]> ()
        axis = Constant <value_ints = [0]> ()
        mirrored = Slice (rank, backwards, far_end, axis, backwards)
        best, mirrored_position = TopK <sorted = 1> (mirrored, count)
        last = Add (keys, backwards)
        best_position = Sub (last, mirrored_position)""",
    ),
    ("no softmax_scale", "attend", "attend", "Mul (q, softmax_scale)", "Identity (q)"),
    ("lse without the sum", "attend", "attend", "Sub (largest_logit, log_p)", "Identity (largest_logit)"),
    (
        "masked indices clamped, values not masked",
        "sparse_attend.float32",
        "sparse_attend",
        "Compress <axis = 0> (indices_row, inside)",
        "Where (inside, indices_row, zero)",
    ),
    (
        "indices past Tk wrapped",
        "sparse_attend.bfloat16",
        "sparse_attend",
        "selected = Compress <axis = 0> (indices_row, inside)",
        "wrapped = Mod (indices_row, tk_int32)\n selected = Compress <axis = 0> (wrapped, not_below)",
    ),
    (
        "repeats counted once",
        "sparse_attend.float32",
        "sparse_attend",
        "selected = Compress <axis = 0> (indices_row, inside)",
        """repeated = Compress <axis = 0> (indices_row, inside)
        repeated_int64 = Cast <to = 7> (repeated)
        selected = Unique <axis = 0> (repeated_int64)""",
    ),
]


@pytest.mark.parametrize(("fault", "check", "source", "text", "replacement"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_planted_fault_is_seen(build: ModuleType, fault: str, check: str, source: str, text: str, replacement: str) -> None:
    model = check.split(",")[0]
    CHECKS[check](committed(model))
    sources = build.read_sources()
    assert sources[source].count(text) == 1
    sources[source] = sources[source].replace(text, replacement)
    faulty = build.serialize(build.compile_models(sources)[f"{model}.onnx"])
    with pytest.raises(AssertionError):
        CHECKS[check](faulty)


# The function that selects, alone: values that scores only take by accident


SELECTED = [  # scores, visible, topk, indices
    ([0.0, -0.0, 0.0, -0.0], "1111", 2, [0, 1]),
    ([-0.0, 0.0, -0.0, 0.0], "1111", 3, [0, 1, 2]),
    ([-1.0, -0.0, 0.0, 5.0], "1111", 2, [1, 3]),
    ([np.nan, 1.0, np.inf, 2.0], "0101", 3, [1, 3, -1]),
    ([np.nan, 1.0, np.inf, 2.0], "1111", 2, [2, 3]),
    ([-np.inf, 1.0, -np.inf, np.nan], "1011", 4, [0, 2, 3, -1]),
    ([-3.4028235e38, -np.inf, 1.0], "101", 3, [0, 2, -1]),
    ([4.0, 4.0], "00", 3, [-1, -1, -1]),
]


@pytest.mark.parametrize(("scores", "visible", "topk", "indices"), SELECTED, ids=str)
def test_select_top_k(build: ModuleType, scores: list[float], visible: str, topk: int, indices: list[int]) -> None:
    import onnx.parser

    model = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["": 19, "dsa.portable": 1]>
        select (float[keys] scores, int32[keys] seen, int64[1] topk) => (int32[topk] indices, float[topk] values)
        {
          visible = Cast <to = 9> (seen)
          indices, values = dsa.portable.SelectTopK (scores, visible, topk)
        }"""
    )
    model.functions.extend(build.compile_models(build.read_sources())["lightning_index.float32.onnx"].functions)
    feeds = {
        "scores": np.array(scores, np.float32),
        "seen": np.array([int(bit) for bit in visible], np.int32),
        "topk": np.array([topk]),
    }
    got = run(build.serialize(model), feeds)
    np.testing.assert_array_equal(got["indices"], indices)
    values = [feeds["scores"][s] if s >= 0 else -np.inf for s in indices]
    np.testing.assert_array_equal(got["values"], np.array(values, np.float32))


# The files are what the sources say


INTERFACE = {
    "index_scores": (
        ["q float32 rows,heads,head_dim", "k float32 keys,head_dim", "weights float32 rows,heads", "k_scale float32 keys"],
        ["scores float32 rows,keys"],
    ),
    "attend": (
        ["q float32 heads,head_dim", "kv float32 keys,head_dim", "softmax_scale float32 ", "value_dim int64 1"],
        ["out float32 heads,value_dim", "lse float32 heads", "largest_logit float32 heads", "largest_p float32 heads"],
    ),
    "attend_rows": (
        [
            "q float32 heads,head_dim",
            "kv {format} places,head_dim",
            "positions int64 keys",
            "softmax_scale float32 ",
            "value_dim int64 1",
        ],
        ["out float32 heads,value_dim", "largest_logit float32 heads", "largest_p float32 heads"],
    ),
    "lightning_index": (
        [
            "q {format} Tq,H,D",
            "k {format} Tk,D",
            "weights float32 Tq,H",
            "k_scale float32 Tk",
            "key_start int32 Tq",
            "key_end int32 Tq",
            "topk int64 1",
        ],
        ["indices int32 Tq,topk", "scores float32 Tq,topk"],
    ),
    "sparse_attend": (
        ["q {format} Tq,Hq,Dqk", "kv {format} Tk,Dqk", "indices int32 Tq,topk", "softmax_scale float32 ", "value_dim int64 1"],
        ["out {format} Tq,Hq,value_dim", "lse float32 Tq,Hq"],
    ),
}
MODELS = [
    "index_scores",
    "attend",
    *(f"attend_rows.{fmt}" for fmt in ATTEND_FORMATS),
    *(f"lightning_index.{fmt}" for fmt in INDEX_FORMATS),
    *(f"sparse_attend.{fmt}" for fmt in ATTEND_FORMATS),
]


def test_the_committed_models_are_the_compiled_sources(build: ModuleType) -> None:
    compiled = {name: build.serialize(model) for name, model in build.compile_models(build.read_sources()).items()}
    assert compiled == {path.name: path.read_bytes() for path in GRAPHS.glob("*.onnx")}
    assert set(compiled) == {f"{name}.onnx" for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
def test_interface(build: ModuleType, name: str) -> None:
    import onnx.checker

    model = onnx.load_from_string(committed(name))
    onnx.checker.check_model(model, full_check=True)
    names = {number: dtype for dtype, (_, number) in DTYPES.items()}

    def describe(value: Any) -> str:
        tensor = value.type.tensor_type
        return f"{value.name} {names[tensor.elem_type]} {','.join(d.dim_param or str(d.dim_value) for d in tensor.shape.dim)}"

    source, _, fmt = name.partition(".")
    inputs, outputs = INTERFACE[source]
    assert [describe(value) for value in model.graph.input] == [line.format(format=fmt) for line in inputs]
    assert [describe(value) for value in model.graph.output] == [line.format(format=fmt) for line in outputs]
    assert model.producer_name == "dsa-portable"
    assert model.doc_string == model.graph.doc_string != ""
    assert model.functions
    assert all(function.doc_string for function in model.functions)
    assert {opset.domain for opset in model.opset_import} == {"", "dsa.portable"}


@pytest.mark.parametrize("name", ["index_scores", "attend", "lightning_index.float32", "sparse_attend.float32"])
def test_a_second_runtime_agrees(build: ModuleType, name: str) -> None:
    """onnx's own evaluator needs nothing but the standard: no operator and no tie rule of ONNX Runtime is relied on."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    if "." in name and tuple(map(int, onnx.__version__.split(".")[:2])) < (1, 22):
        pytest.skip("onnx's evaluator cannot read an outer value inside a Scan before 1.22")
    index = index_feeds(lattice, "float32", 5, 30, 3, 4, 40)
    feeds = {
        "index_scores": only_scores(index),
        "attend": attend_feeds(3, 8, 6, 4, 0.3),
        "lightning_index.float32": index,
        "sparse_attend.float32": sparse_feeds("float32"),
    }[name]
    here = run(committed(name), feeds)
    there = ReferenceEvaluator(onnx.load_from_string(committed(name))).run(list(here), feeds)
    for ours, theirs in zip(here.values(), there, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_check_tells_a_stale_model_from_a_fresh_one(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in GRAPHS.glob("*.onnx*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "HERE", tmp_path)
    assert build.main(["--check"]) == 0

    source = tmp_path / "attend.onnxtxt"
    source.write_text(source.read_text().replace("Log (largest_p)", "Identity (largest_p)"))
    (tmp_path / "index_scores.onnx").unlink()
    (tmp_path / "stray.onnx").write_bytes(b"")
    assert build.main(["--check"]) == 1
    stale = {line.split()[0] for line in capsys.readouterr().err.splitlines()}
    assert stale == {
        *("attend.onnx", "index_scores.onnx", "stray.onnx"),
        *(f"{name}.{fmt}.onnx" for name in ("attend_rows", "sparse_attend") for fmt in ATTEND_FORMATS),
    }

    assert build.main([]) == 0
    assert build.main(["--check"]) == 0
