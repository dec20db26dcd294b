"""The CPU backend: float32 engines against a float64 loop over logical keys, in every storage; threads, memory, settings."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from dsa_portable import Batch, DeviceUnavailable, index_scores, index_select, lightning_index, registry, sparse_attend
from dsa_portable.backends.cpu import BACKEND, settings
from dsa_portable.formats import LAYOUTS, pack

NDArray = npt.NDArray[Any]
Parts = list[NDArray]

pytestmark = pytest.mark.filterwarnings("error")

index_module = import_module("dsa_portable.backends.cpu.lightning_index")
scores_module = import_module("dsa_portable.backends.cpu.index_scores")
attend_module = import_module("dsa_portable.backends.cpu.sparse_attend")
numpy_module = import_module("dsa_portable.backends.cpu.numpy_engine")

# By name alone, and held to no bound here: bfloat16, tests/test_openvino.py.
BFLOAT16 = "openvino-bf16"
NEEDS = {
    name: [p for p in kind.packages if find_spec(p) is None] for name, kind in settings.ENGINES.items() if name != BFLOAT16
}
ENGINES = [name for name, missing in NEEDS.items() if not missing]
PARAMETERS = {name: pytest.param(name, marks=pytest.mark.skipif(bool(NEEDS[name]), reason="not installed")) for name in NEEDS}
# Those that give tiles, and leave the rest of an operator to what all of them share.
TILING = [name for name in NEEDS if not settings.ENGINES[name].operators]
DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "int8": np.int8,
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "f32": np.float32,
}


def declared(operator: str, feature: str) -> tuple[str, ...]:
    """What the backend says it offers."""
    return tuple(cast("Iterable[str]", BACKEND.capabilities(None)[operator][feature]))


INDEX_FORMATS, INDEX_LAYOUTS = declared("lightning_index", "format"), declared("lightning_index", "k_layout")
ATTEND_FORMATS = declared("sparse_attend", "format")
# Relative rounding error of the result's dtype, doubled.
ROUNDING = {"bf16": 2.0**-8, "f16": 2.0**-10, "f32": 2.0**-21}

# (rows, keys) per request: a chunk, no rows, more rows than keys, no keys, a second page; then rows that belong to nobody.
SEQLENS = ((3, 70), (0, 5), (2, 1), (1, 0), (3, 9))
PADDING = 2
INVALID = (-1, -7, -(2**31), 2**31 - 1)
MEBI = 1 << 20


@pytest.fixture(params=PARAMETERS.values())
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each engine in turn is the one in force."""
    monkeypatch.setenv("DSA_CPU_ENGINE", request.param)
    return str(request.param)


@pytest.fixture(params=[PARAMETERS[name] for name in TILING])
def tiling(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each engine that gives tiles."""
    monkeypatch.setenv("DSA_CPU_ENGINE", request.param)
    return str(request.param)


# --- where keys lie ---


@dataclass(frozen=True)
class Storage:
    """`places[r]` are where request r's positions lie in an array of leading shape `shape`; everywhere else is poison."""

    places: Parts
    shape: tuple[int, ...]
    batch: Mapping[str, Any]

    def fill(self, parts: Sequence[NDArray]) -> NDArray:
        """One array of the requests' parts, NaN (int8: -128) where no part lies."""
        each, dtype = parts[0].shape[1:], parts[0].dtype
        full = np.full((math.prod(self.shape), *each), -128 if dtype == np.int8 else np.nan, dtype)
        for place, part in zip(self.places, parts, strict=True):
            full[place] = part
        return full.reshape(*self.shape, *each)

    def batch_of(self, seqlens: Sequence[tuple[int, int]], **fields: Any) -> Batch:
        """The batch over this storage."""
        return Batch.of([q for q, _ in seqlens], [k for _, k in seqlens], **self.batch, **fields)


def flat(rng: np.random.Generator, lengths: Sequence[int]) -> Storage:
    """Requests one behind the other, with two unused places behind each and three at the end."""
    begins = np.concatenate([[0], np.cumsum([n + 2 for n in lengths])])
    places = [begin + np.arange(n) for begin, n in zip(begins, lengths, strict=False)]
    return Storage(places, (int(begins[-1]) + 3,), {"cu_seqlens_k": begins.astype(np.int32)})


def paged(rng: np.random.Generator, lengths: Sequence[int], page_size: int = 4) -> Storage:
    """Pages in random order, three unused ones, and a block table whose unused entries name no page."""
    counts = [-(-n // page_size) for n in lengths]
    pages = list(rng.permutation(sum(counts) + 3))
    table = np.full((len(lengths), max(counts) + 2), -(10**9), np.int32)
    places = []
    for r, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        table[r, :count] = [pages.pop() for _ in range(count)]
        places.append(table[r, np.arange(n) // page_size] * page_size + np.arange(n) % page_size)
    return Storage(places, (sum(counts) + 3, page_size), {"block_table": table, "page_size": page_size})


STORAGES = (flat, paged)
Storing = Callable[[np.random.Generator, Sequence[int]], Storage]


# --- lightning_index ---


class Seen(NamedTuple):
    """The positions [start, end) of `request` that a row sees; request -1 is nobody's row."""

    request: int
    start: int
    end: int


def causal(seqlens: Sequence[tuple[int, int]], padding: int = PADDING) -> list[Seen]:
    """What every row sees by the contract's rule: the last row of a request sees all its keys."""
    rows = [Seen(r, 0, max(0, lk - lq + i + 1)) for r, (lq, lk) in enumerate(seqlens) for i in range(lq)]
    return [*rows, *[Seen(-1, 0, 0)] * padding]


@dataclass(frozen=True)
class IndexCall:
    """A call and what it means: float64 keys and scales of each request, and what every row sees."""

    arguments: dict[str, Any]
    keys: Parts
    scales: Parts
    seen: list[Seen]

    def scores(self, row: int) -> NDArray:
        """k_scale[s] * sum_h weights[h] * relu(q[h] . k[s]) for the positions that the row sees, by the formula, in float64."""
        request, start, end = self.seen[row]
        q, weights = (self.arguments[name][row].astype(np.float64) for name in ("q", "weights"))
        found = []
        for s in range(start, end):
            dots = [sum(a * b for a, b in zip(head, self.keys[request][s], strict=True)) for head in q]
            summed = sum(weight * max(0.0, dot) for weight, dot in zip(weights, dots, strict=True))
            found.append(self.scales[request][s] * summed)
        return np.array(found, np.float64)

    def run(self, **changes: Any) -> tuple[NDArray, NDArray]:
        """(indices, scores) of the backend."""
        indices, scores = lightning_index(**{**self.arguments, **changes}, return_scores=True, backend="cpu")
        return indices, scores


def integers(rng: np.random.Generator, *shape: int) -> NDArray:
    """Small integers: everything computed from them is exact in float32, and full of ties."""
    return rng.integers(-2, 3, shape).astype(np.float64)


def reals(rng: np.random.Generator, *shape: int) -> NDArray:
    """Standard normal numbers."""
    return rng.standard_normal(shape)


def index_call(
    format: str,
    storing: Storing,
    *,
    seqlens: Sequence[tuple[int, int]] = SEQLENS,
    heads: int = 3,
    dim: int = 8,
    topk: int = 4,
    k_layout: str | None = None,
    draw: Callable[..., NDArray] = integers,
    sees: Callable[[], tuple[list[Seen], dict[str, Any]]] | None = None,
) -> IndexCall:
    """A ragged call with poison in every place that is nobody's."""
    rng = np.random.default_rng(len(format) + dim)
    operand, weight, scale = format.split("/")
    lengths = [k for _, k in seqlens]
    seen, fields = sees() if sees else (causal(seqlens), {})
    keys = [draw(rng, n, dim).astype(DTYPES[operand]) for n in lengths]
    scales = [rng.choice([0.5, 0.75, 1.0, 3.0], n).astype(DTYPES.get(scale, np.float32)) for n in lengths]
    storage = storing(rng, lengths)
    arguments: dict[str, Any] = {
        "q": draw(rng, len(seen), heads, dim).astype(DTYPES[operand]),
        "weights": (draw(rng, len(seen), heads) / 4).astype(DTYPES[weight]),
        "k": storage.fill(keys),
        "topk": topk,
        "batch": storage.batch_of(seqlens, **fields),
    }
    if k_layout is not None:
        arguments |= {"k": pack(k_layout, storage.fill(keys), storage.fill(scales)), "k_layout": k_layout}
    elif scale != "-":
        arguments["k_scale"] = storage.fill(scales)
    else:
        scales = [np.ones(n) for n in lengths]
    return IndexCall(arguments, [k.astype(np.float64) for k in keys], [s.astype(np.float64) for s in scales], seen)


def best(scores: NDArray, topk: int) -> list[int]:
    """The topk largest, of equal ones the lowest, in ascending order."""
    return sorted(sorted(range(len(scores)), key=lambda s: (-scores[s], s))[:topk])


def check_exact(call: IndexCall, **changes: Any) -> None:
    """The indices and scores of an exact call are those of the formula."""
    indices, scores = call.run(**changes)
    for row, (_, start, _) in enumerate(call.seen):
        truth = call.scores(row)
        chosen = best(truth, call.arguments["topk"])
        tail = call.arguments["topk"] - len(chosen)
        np.testing.assert_array_equal(indices[row], [*(s + start for s in chosen), *[-1] * tail], f"indices of row {row}")
        np.testing.assert_array_equal(scores[row], [*truth[chosen], *[-math.inf] * tail], f"scores of row {row}")


def check_structure(indices: NDArray, seen: Sequence[Seen], topk: int) -> None:
    """Ascending, unique, visible, packed to the left, and exactly as many as there can be."""
    for row, (_, start, end) in enumerate(seen):
        count = min(topk, max(0, end - start))
        assert (indices[row, count:] == -1).all(), row
        assert (np.diff(indices[row, :count]) > 0).all(), row
        assert count == 0 or start <= indices[row, 0] <= indices[row, count - 1] < end, row


@pytest.mark.parametrize("storing", STORAGES)
@pytest.mark.parametrize("format", INDEX_FORMATS)
def test_index_formats(engine: str, format: str, storing: Storing) -> None:
    check_exact(index_call(format, storing))


@pytest.mark.parametrize("k_layout", INDEX_LAYOUTS)
def test_index_caches(engine: str, k_layout: str) -> None:
    check_exact(index_call("e4m3/f32/f32", paged, dim=128, k_layout=k_layout))


@pytest.mark.parametrize("topk", [1, 8, 69, 70, 71, 200])
def test_index_topk(engine: str, topk: int) -> None:
    check_exact(index_call("f32/f32/-", flat, topk=topk))


def everything() -> tuple[list[Seen], dict[str, Any]]:
    """causal=False."""
    rows = [Seen(r, 0, lk) for r, (lq, lk) in enumerate(SEQLENS) for _ in range(lq)]
    return [*rows, *[Seen(-1, 0, 0)] * PADDING], {"causal": False}


def ranges() -> tuple[list[Seen], dict[str, Any]]:
    """key_start and key_end: beyond both ends, empty, reversed, past the causal boundary, and in nobody's rows."""
    pairs = ((0, 70), (69, 70), (-5, 1000), (0, 1), (5, -5), (0, 3), (4, 4), (3, 9), (8, 2), (0, 9), (-1, 1))
    owners = [row.request for row in everything()[0]]
    seen = []
    for request, (start, end) in zip(owners, pairs, strict=True):
        start, end = max(0, start), min(end, SEQLENS[request][1])
        seen.append(Seen(request, start, end) if request >= 0 and start < end else Seen(request, 0, 0))
    start, end = np.array(pairs, np.int32).T.copy()
    return seen, {"key_start": start, "key_end": end}


@pytest.mark.parametrize("storing", STORAGES)
@pytest.mark.parametrize("sees", [everything, ranges])
def test_index_visibility(engine: str, sees: Callable[[], tuple[list[Seen], dict[str, Any]]], storing: Storing) -> None:
    check_exact(index_call("bf16/f32/-", storing, sees=sees))


def test_index_unsorted_is_the_same_set(engine: str) -> None:
    call = index_call("e4m3/f32/f32", flat)
    np.testing.assert_array_equal(np.sort(call.run(sorted=False)[0]), np.sort(call.run()[0]))


def test_index_of_real_numbers(engine: str) -> None:
    """Real numbers round: scores are near the truth, and no key that was left out is better than one that was not."""
    call = index_call("bf16/f32/-", paged, heads=64, dim=128, topk=16, draw=reals)
    indices, scores = call.run()
    check_structure(indices, call.seen, 16)
    for row in range(len(call.seen)):
        truth, chosen = call.scores(row), indices[row][indices[row] >= 0]
        eps = 1e-5 * max(1.0, np.abs(truth).max(initial=0.0))
        np.testing.assert_allclose(scores[row, : len(chosen)], truth[chosen], rtol=0, atol=eps)
        left_out = np.delete(truth, chosen)
        assert not len(left_out) or truth[chosen].min() >= left_out.max() - 2 * eps


def test_index_engines_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    call, results = index_call("f32/f32/-", flat, heads=64, dim=128, topk=200, draw=reals), []
    for name in ENGINES:
        monkeypatch.setenv("DSA_CPU_ENGINE", name)
        results.append(call.run())
    (indices, scores), *others = results
    for again, also in others:
        np.testing.assert_array_equal(indices, again)
        np.testing.assert_allclose(scores, also, rtol=1e-5, atol=1e-4)


def test_index_ties_across_signed_zeros(engine: str) -> None:
    """A scale of 0 makes -0.0 of a negative score: it ties with +0.0, and the lowest positions of both are kept."""
    k = np.array([[1], [-1], [1], [-1], [1], [1]], np.float32).astype(ml_dtypes.float8_e4m3fn)
    q, weights, k_scale = (
        np.ones((3, 1, 1), k.dtype),
        np.array([[1], [-1], [0]], np.float32),
        np.array([0, 0, 1, 0, 0, 1], np.float32),
    )
    batch = Batch.dense(3, 6, causal=False)
    indices, scores = lightning_index(q, k, weights, k_scale=k_scale, topk=3, batch=batch, return_scores=True, backend="cpu")
    np.testing.assert_array_equal(indices, [[0, 2, 5], [0, 1, 3], [0, 1, 2]])
    np.testing.assert_array_equal(scores, [[0, 1, 1], [0, 0, 0], [0, 0, 0]])
    assert np.signbit(scores[1]).tolist() != [False, False, False], "there was no -0.0 in it"


def spoil(call: IndexCall, operand: str, value: float) -> tuple[dict[str, Any], set[int]]:
    """The arguments with one bad number, and the rows that read it: row 1, or the rows that see the last key of request 0."""
    last = SEQLENS[0][1] - 1
    readers = {row for row, (request, _, end) in enumerate(call.seen) if (request, end) == (0, last + 1)}
    at, rows = (1, {1}) if operand in ("q", "weights") else (last, readers)
    changed = call.arguments[operand].copy()
    changed[at] = value
    return {operand: changed}, rows


def check_spoilt(operand: str, value: float) -> None:
    """Rows that read a NaN or an infinity keep their structure, the other rows keep their bits."""
    call = index_call("bf16/f32/-" if operand in ("q", "k") else "e4m3/f32/f32", flat, draw=reals)
    clean, (changes, rows) = call.run()[0], spoil(call, operand, value)
    assert rows
    assert len(rows) < len(call.seen)
    indices, _ = call.run(**changes)
    check_structure(indices, call.seen, 4)
    others = [row for row in range(len(call.seen)) if row not in rows]
    np.testing.assert_array_equal(indices[others], clean[others])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("operand", ["q", "k", "weights", "k_scale"])
def test_index_of_visible_nan_and_infinity(engine: str, operand: str, value: float) -> None:
    check_spoilt(operand, value)


# --- sparse_attend ---


@dataclass(frozen=True)
class AttendCall:
    """A call and what it means: float64 keys of each request, and the request of every row (-1: nobody's)."""

    arguments: dict[str, Any]
    keys: Parts
    owners: list[int]

    def entries(self, row: int) -> list[int]:
        """The entries of the row's indices that count."""
        length, owner = self.arguments.get("topk_length"), self.owners[row]
        cut = self.arguments["indices"][row] if length is None else self.arguments["indices"][row, : max(0, length[row])]
        return [int(i) for i in cut if owner >= 0 and 0 <= i < len(self.keys[owner])]

    def truth(self, row: int) -> tuple[NDArray, NDArray]:
        """(out, lse) of a row, by the formulas, in float64."""
        q, entries = self.arguments["q"][row].astype(np.float64), self.entries(row)
        value_dim, sink = self.arguments["value_dim"], self.arguments.get("attn_sink", np.full(len(q), -np.inf))
        if not entries:
            return np.zeros((len(q), value_dim)), np.full(len(q), -np.inf)
        keys = self.keys[self.owners[row]][entries]
        out, lse = np.empty((len(q), value_dim)), np.empty(len(q))
        for h, head in enumerate(q):
            logits = [float(self.arguments["softmax_scale"] * (head @ key)) for key in keys]
            top = max(logits)
            weights = [math.exp(x - top) for x in logits]
            lse[h] = top + math.log(sum(weights))
            share = 1 / (1 + math.exp(sink[h] - lse[h])) if sink[h] < math.inf else 0.0
            out[h] = share * sum(w * key[:value_dim] for w, key in zip(weights, keys, strict=True)) / sum(weights)
        return out, lse

    def run(self, **changes: Any) -> tuple[NDArray, NDArray]:
        """(out, lse) of the backend."""
        out, lse = sparse_attend(**{**self.arguments, **changes}, return_lse=True, backend="cpu")
        return out, lse


def attend_indices(rng: np.random.Generator, owners: Sequence[int], lengths: Sequence[int], topk: int) -> NDArray:
    """Positions with holes, repeats and ends of requests among them; the first row has none that counts."""
    indices = np.empty((len(owners), topk), np.int32)
    for row, owner in enumerate(owners):
        n = max(1, lengths[owner])
        # Half of the keys are never named, so that they can hold poison.
        indices[row] = 2 * rng.integers(0, (n + 1) // 2, topk)
        holes = rng.random(topk) < 0.3
        indices[row, holes] = rng.choice([*INVALID, lengths[owner]], int(holes.sum()))
    indices[0] = rng.choice(INVALID, topk)
    return indices


def attend_call(
    format: str,
    storing: Storing,
    *,
    seqlens: Sequence[tuple[int, int]] = SEQLENS,
    heads: int = 4,
    dims: tuple[int, int] = (12, 8),
    topk: int = 10,
    scale: float = 0.3,
    **options: Any,
) -> AttendCall:
    """A ragged call with poison in every place that is nobody's and in every key that no row names."""
    rng = np.random.default_rng(len(format))
    owners = [r for r, (lq, _) in enumerate(seqlens) for _ in range(lq)] + [-1] * PADDING
    lengths = [k for _, k in seqlens]
    storage = storing(rng, lengths)
    indices = attend_indices(rng, owners, lengths, topk)
    named = [np.isin(np.arange(n), indices[np.array(owners) == r]) for r, n in enumerate(lengths)]
    if "topk_length" in options:
        # What is cut off names keys that hold poison.
        indices[:, 6:] = 1
    keys, packed = _attention_keys(rng, format, storage, lengths, named, dims[0])
    q_dtype = "bf16" if packed else format
    width, value_dim = (576, 512) if packed else dims
    return AttendCall(
        {
            "q": reals(rng, len(owners), heads, width).astype(DTYPES[q_dtype]),
            "indices": indices,
            "softmax_scale": scale if not packed else scale / 8,
            "value_dim": value_dim,
            "batch": storage.batch_of(seqlens),
            **({"kv": packed[0], "kv_layout": format} if packed else {"kv": storage.fill(keys)}),
            **options,
        },
        [k.astype(np.float64) for k in (packed[1] if packed else keys)],
        owners,
    )


def _attention_keys(
    rng: np.random.Generator, format: str, storage: Storage, lengths: Sequence[int], named: Parts, width: int
) -> tuple[Parts, tuple[NDArray, Parts] | None]:
    """(keys of each request, None), or for a packed format (_, (cache, keys)); a key that is not named holds NaN."""

    def draw(numbers: Callable[[int], NDArray], dtype: Any) -> Parts:
        parts = [numbers(n) for n in lengths]
        return [np.where(use[:, None], part, np.nan).astype(dtype) for part, use in zip(parts, named, strict=True)]

    if format in DTYPES:
        return draw(lambda n: reals(rng, n, width), DTYPES[format]), None
    spec = LAYOUTS[format]
    values = [rng.integers(-16, 17, (n, 512)).astype(spec.value_dtype) for n in lengths]
    scales = draw(lambda n: rng.choice([0.125, 0.25] if spec.power_of_two else [0.1, 0.3], (n, 4)), np.float32)
    rope = draw(lambda n: reals(rng, n, 64), ml_dtypes.bfloat16)
    cache = pack(format, storage.fill(values), storage.fill(scales), storage.fill(rope))
    keys = [
        np.concatenate([v.astype(np.float64) * s.astype(np.float64).repeat(spec.tile, 1), r.astype(np.float64)], axis=1)
        for v, s, r in zip(values, scales, rope, strict=True)
    ]
    return [], (cache, keys)


def check_attend(call: AttendCall, **changes: Any) -> None:
    """out and lse are the formula's, to the rounding of float32 arithmetic and of q's dtype."""
    out, lse = call.run(**changes)
    format = next(name for name, dtype in DTYPES.items() if dtype == out.dtype)
    rounding, p = ROUNDING[format], BACKEND.profile(BACKEND.probe(), "sparse_attend", format, "prefill").p
    for row in range(len(call.owners)):
        truth, truth_lse = call.truth(row)
        if not call.entries(row):
            assert not out[row].astype(np.float32).any(), row
        # Each share of the output is off by half a unit of P's last place.
        largest = max((np.abs(call.keys[call.owners[row]][entry]).max() for entry in call.entries(row)), default=0.0)
        slack = 1e-5 + (2.0**-9 * largest if p == "bfloat16" else 0.0)
        np.testing.assert_allclose(out[row].astype(np.float64), truth, rtol=rounding, atol=slack, err_msg=f"out of row {row}")
        np.testing.assert_allclose(lse[row], truth_lse, rtol=1e-6, atol=1e-5, err_msg=f"lse of row {row}")


SINK = np.array([-np.inf, 0.3, np.inf, 5.0], np.float32)
LENGTH = np.array([10, 3, 0, 6, -2, 1, 99, 2, 5, 10, 10], np.int32)
ATTEND_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sink": {"attn_sink": SINK},
    "topk_length": {"topk_length": np.minimum(LENGTH, 6)},
}


@pytest.mark.parametrize("options", ATTEND_OPTIONS)
@pytest.mark.parametrize("storing", STORAGES)
@pytest.mark.parametrize("format", ATTEND_FORMATS)
def test_attend_formats(engine: str, format: str, storing: Storing, options: str) -> None:
    check_attend(attend_call(format, storing, **ATTEND_OPTIONS[options]))


def test_attend_topk_length_beyond_the_row(engine: str) -> None:
    call = attend_call("f32", flat)
    check_attend(AttendCall({**call.arguments, "topk_length": LENGTH}, call.keys, call.owners))


@pytest.mark.parametrize("scale", [1e-6, 5.0, 40.0])
def test_attend_of_flat_and_hot_logits(engine: str, scale: float) -> None:
    """Logits up to several hundred: nothing overflows, and one key may outweigh all others."""
    check_attend(attend_call("bf16", flat, scale=scale, attn_sink=SINK))


def test_attend_counts_a_repeated_index_as_often_as_it_stands(engine: str) -> None:
    kv, q = np.array([[1, 2], [3, 4]], np.float32), np.zeros((1, 1, 2), np.float32)
    out, lse = sparse_attend(
        q, kv, np.array([[0, 1, 1, -1, 1]], np.int32), softmax_scale=1.0, value_dim=2, return_lse=True, backend="cpu"
    )
    np.testing.assert_allclose(out, [[[2.5, 3.5]]], rtol=1e-6)
    np.testing.assert_allclose(lse, [[math.log(4)]], rtol=1e-6)


def test_attend_engines_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    call, results = attend_call("f32", paged, dims=(576, 512)), []
    for name in ENGINES:
        monkeypatch.setenv("DSA_CPU_ENGINE", name)
        results.append(call.run())
    for result in results[1:]:
        for ours, theirs in zip(results[0], result, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("operand", ["q", "kv"])
def test_attend_of_visible_nan_and_infinity(engine: str, operand: str, value: float) -> None:
    """Rows that do not read it keep their bits, whether or not the bad number makes NaN of its own row."""
    call = attend_call("bf16", flat)
    changed = call.arguments[operand].copy()
    bad = call.entries(1)[0]
    changed[1 if operand == "q" else bad] = value
    out, lse = call.run()
    spoilt, spoilt_lse = call.run(**{operand: changed})
    rows = {1} if operand == "q" else {t for t, owner in enumerate(call.owners) if owner == 0 and bad in call.entries(t)}
    others = [t for t in range(len(call.owners)) if t not in rows]
    assert not np.isfinite(spoilt[1].astype(np.float32)).all(), "nothing was spoilt"
    np.testing.assert_array_equal(spoilt[others], out[others])
    np.testing.assert_array_equal(spoilt_lse[others], lse[others])


@pytest.mark.parametrize("sink", [90.0, 95.0, 400.0, np.inf, -np.inf])
def test_attend_keeps_what_a_large_sink_leaves(engine: str, sink: float) -> None:
    """exp(sink) overflows float32, while the keys' share times 1e30 is an ordinary number."""
    q, kv = np.zeros((1, 1, 2), np.float32), np.array([[1, 1e30]], np.float32)
    out, lse = sparse_attend(
        q,
        kv,
        np.array([[0, 0, -1]], np.int32),
        softmax_scale=1.0,
        value_dim=2,
        attn_sink=np.array([sink], np.float32),
        return_lse=True,
        backend="cpu",
    )
    share = 2 / (2 + math.exp(sink)) if sink < math.inf else 0.0
    # The share is a subnormal number beyond 87, of few bits, and a platform may flush it where it is the result.
    np.testing.assert_allclose(out[0, 0], [share, 1e30 * share], rtol=1e-3, atol=2.0**-126)
    assert sink != np.inf or not out.any()
    np.testing.assert_allclose(lse, [[math.log(2)]], rtol=1e-6)


def check_sink_of_nan() -> None:
    """Only out of its own head changes, and only in rows that attend to a key."""
    call = attend_call("bf16", flat, attn_sink=SINK)
    sink = SINK.copy()
    sink[1] = np.nan
    (out, lse), (spoilt, spoilt_lse) = call.run(), call.run(attn_sink=sink)
    empty = [row for row in range(len(call.owners)) if not call.entries(row)]
    assert {call.owners[row] < 0 for row in empty} == {True, False}, "rows without a key, and padding rows"
    np.testing.assert_array_equal(spoilt_lse, lse)
    np.testing.assert_array_equal(spoilt[:, [0, 2, 3]], out[:, [0, 2, 3]])
    np.testing.assert_array_equal(spoilt[empty], np.zeros_like(out[empty]))


def test_attend_with_a_sink_of_nan(engine: str) -> None:
    check_sink_of_nan()


def test_attend_result_beyond_its_dtype_is_infinite(engine: str) -> None:
    q, kv = np.zeros((1, 1, 2), np.float16), np.full((2, 2), 65504, np.float16)
    out = sparse_attend(q, kv, np.array([[0, 1]], np.int32), softmax_scale=1.0, value_dim=2, backend="cpu")
    np.testing.assert_array_equal(out, [[[65504, 65504]]])


# --- padding rows ---

GARBAGE = (-(2**31), 2**31 - 1, -1, 0, 7)
RANGES = {"key_start": GARBAGE[:2], "key_end": GARBAGE[1::-1]}


def with_garbage(array: NDArray, value: float, integers: Sequence[int] = GARBAGE) -> NDArray:
    """The same array with something else in the rows that belong to nobody: this number, or integers out of every range."""
    changed = array.copy()
    if array.dtype == np.int32:
        changed[-PADDING:] = np.resize(integers, changed[-PADDING:].shape)
    elif array.dtype == np.int8:
        changed[-PADDING:] = -128
    else:
        changed[-PADDING:] = value
    return changed


def check_padding_rows(
    function: Callable[..., Any], arguments: Mapping[str, Any], names: Sequence[str], value: float, **options: Any
) -> None:
    """Garbage in the padding rows of these arguments, and of the batch's ranges, changes no bit of any result."""
    batch = arguments["batch"]
    ranges = {}
    if batch.key_start is not None:
        # One row's range is everything, and the other's runs backwards.
        ranges = {name: with_garbage(getattr(batch, name), value, ends) for name, ends in RANGES.items()}
    changed = {name: with_garbage(arguments[name], value) for name in names}
    clean = function(**arguments, **options, backend="cpu")
    for spoilt in (*({name: array} for name, array in changed.items()), {**changed, "batch": replace(batch, **ranges)}):
        found = function(**{**arguments, **spoilt}, **options, backend="cpu")
        pairs = zip(found, clean, strict=True) if isinstance(found, tuple) else [(found, clean)]
        for ours, theirs in pairs:
            np.testing.assert_array_equal(ours, theirs)
            assert not np.isnan(ours.astype(np.float32)).any()


def ranged() -> tuple[list[Seen], dict[str, Any]]:
    """`causal` as ranges of every row."""
    seen = causal(SEQLENS)
    starts, ends = (np.array([getattr(s, name) for s in seen], np.int32) for name in ("start", "end"))
    return seen, {"key_start": starts, "key_end": ends}


def check_padding_of_index(value: float) -> None:
    for format in ("bf16/f32/-", "int8/f32/f32", "e4m3/f32/f32"):
        for sees in (None, ranged):
            call = index_call(format, flat, sees=sees)
            check_padding_rows(lightning_index, call.arguments, ("q", "weights"), value, return_scores=True)
            scored = {name: array for name, array in call.arguments.items() if name != "topk"}
            check_padding_rows(index_scores, scored, ("q", "weights"), value)


def check_padding_of_select(value: float) -> None:
    for fields in ({}, ranged()[1]):
        batch = Batch.of([q for q, _ in SEQLENS], [k for _, k in SEQLENS], **fields)
        scores = np.random.default_rng(0).standard_normal((len(causal(SEQLENS)), batch.max_seqlen_k)).astype(np.float32)
        check_padding_rows(index_select, {"scores": scores, "topk": 4, "batch": batch}, ("scores",), value)


def check_padding_of_attend(value: float) -> None:
    for format in ("f32", "bf16"):
        options = {"attn_sink": SINK, "topk_length": np.minimum(LENGTH, 6)}
        for storing in STORAGES:
            call = attend_call(format, storing, **options)
            batch = replace(call.arguments["batch"], **ranged()[1])
            names = ("q", "indices", "topk_length")
            check_padding_rows(sparse_attend, {**call.arguments, "batch": batch}, names, value, return_lse=True)


PADDED = (check_padding_of_index, check_padding_of_select, check_padding_of_attend)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.0])
@pytest.mark.parametrize("check", PADDED)
def test_padding_rows_may_hold_anything(engine: str, check: Callable[[float], None], value: float) -> None:
    check(value)


# --- memory, chunks, threads ---


def strided(array: NDArray) -> NDArray:
    """The same numbers where no two neighbours are adjacent, the first axis backwards."""
    spread = np.empty(tuple(2 * n for n in array.shape), array.dtype)
    view = spread[tuple(slice(None, None, -2 if axis == 0 else 2) for axis in range(array.ndim))]
    view[...] = array
    assert view.base is spread
    return view


def arrays_of(arguments: Mapping[str, Any]) -> Iterator[tuple[str, NDArray]]:
    return ((name, value) for name, value in arguments.items() if isinstance(value, np.ndarray))


@pytest.mark.parametrize("k_layout", [None, *INDEX_LAYOUTS])
def test_index_reads_and_writes_any_strides(engine: str, k_layout: str | None) -> None:
    call = index_call("e4m3/f32/f32", paged, dim=128, k_layout=k_layout)
    out = strided(np.full((len(call.seen), 4), 7, np.int32)), strided(np.full((len(call.seen), 4), np.nan, np.float32))
    check_exact(call, **{name: strided(value) for name, value in arrays_of(call.arguments)}, out=out)


@pytest.mark.parametrize("format", ATTEND_FORMATS)
def test_attend_reads_and_writes_any_strides(engine: str, format: str) -> None:
    call = attend_call(format, paged, **ATTEND_OPTIONS["sink"])
    out = tuple(strided(np.full_like(result, np.nan)) for result in call.run())
    check_attend(call, **{name: strided(value) for name, value in arrays_of(call.arguments)}, out=out)


def test_index_chunks_of_rows_change_nothing(tiling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    q, k = (rng.integers(-2, 3, shape).astype(np.float32) for shape in ((50, 1, 4), (60_000, 4)))
    weights = rng.integers(1, 3, (50, 1)).astype(np.float32)
    chunks = count(monkeypatch, index_module, "score")
    whole = lightning_index(q, k, weights, topk=64, return_scores=True, backend="cpu")
    assert chunks.pop() == 1
    monkeypatch.setenv("DSA_CPU_MEMORY", str(16 * MEBI))
    parts = lightning_index(q, k, weights, topk=64, return_scores=True, backend="cpu")
    assert chunks.pop() == 2
    np.testing.assert_array_equal(parts[0], whole[0])
    np.testing.assert_array_equal(parts[1], whole[1])


def test_index_tiles_of_keys_change_nothing(tiling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """512 heads leave room for 128 keys a tile."""
    rng = np.random.default_rng(0)
    q, k = (rng.integers(-2, 3, shape).astype(np.float32) for shape in ((11, 512, 4), (1500, 4)))
    weights = rng.integers(-2, 3, (11, 512)).astype(np.float32)
    tiles = count(monkeypatch, scores_module, "index_keys")
    results = []
    for memory in (1 << 30, 16 * MEBI):
        monkeypatch.setenv("DSA_CPU_MEMORY", str(memory))
        results.append(lightning_index(q, k, weights, topk=64, return_scores=True, backend="cpu"))
    assert tiles.pop() > 6
    np.testing.assert_array_equal(results[0], results[1])


def check_attend_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More keys in a row than fit at once: the parts merge to what all of them give, and no less accurately at large logits."""
    monkeypatch.setenv("DSA_CPU_THREADS", "2")
    call = attend_call("f32", flat, seqlens=((2, 9000), (1, 7000)), dims=(576, 512), topk=4200, scale=5.0, attn_sink=SINK)
    (truth, truth_lse), (other, other_lse) = (call.truth(row) for row in (1, 2))
    parts, errors = count(monkeypatch, attend_module, "_part"), []
    for memory, least in ((1 << 30, 2), (16 * MEBI, 4)):
        monkeypatch.setenv("DSA_CPU_MEMORY", str(memory))
        out, lse = call.run()
        assert parts.pop() >= least
        np.testing.assert_allclose(lse[1:3], [truth_lse, other_lse], rtol=1e-6)
        errors.append([np.linalg.norm(out[1] - truth), np.linalg.norm(out[2] - other)])
    assert np.all(np.array(errors[0]) < 1e-3)
    assert np.all(np.array(errors[1]) < 1.5 * np.array(errors[0]))


def test_attend_chunks_change_nothing(tiling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_attend_chunks(monkeypatch)


class Counter(list[int]):
    """How often a function was called, and then 0 again."""

    def pop(self, index: Any = 0) -> int:
        number = self[0]
        self[0] = 0
        return number


def count(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> Counter:
    """Count the calls of a function of the backend."""
    counter, function = Counter([0]), getattr(module, name)

    def counted(*arguments: Any) -> Any:
        counter[0] += 1
        return function(*arguments)

    monkeypatch.setattr(module, name, counted)
    return counter


def test_threads_do_not_change_a_bit(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    q, k, weights = (reals(rng, *shape).astype(np.float32) for shape in ((20, 64, 128), (3000, 128), (20, 64)))
    attend = attend_call("bf16", paged, dims=(576, 512), seqlens=((6, 900), (3, 40)), topk=300)
    results = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv("DSA_CPU_THREADS", threads)
        results.append((*lightning_index(q, k, weights, topk=500, return_scores=True, backend="cpu"), *attend.run()))
    for others in results[1:]:
        for ours, theirs in zip(results[0], others, strict=True):
            assert ours.tobytes() == theirs.tobytes()


MEASURED = """
import sys
import numpy as np
from dsa_portable import lightning_index, sparse_attend
from dsa_portable.backends.cpu import index_scores as scores_module, settings

def peak():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

operator, rows, keys, heads, dim = sys.argv[1], *(int(n) for n in sys.argv[2:6])
block = np.random.default_rng(0).standard_normal((64 * dim,), np.float32)
q, k = np.resize(block, (rows, heads, dim)), np.resize(block, (keys, dim))
weights, out = np.ones((rows, heads), np.float32), np.zeros((rows, 2048), np.int32)
indices = np.resize(np.arange(keys, dtype=np.int32), (rows, keys))

def call(rows, keys):
    if operator == "index":
        lightning_index(q[:rows], k[:keys], weights[:rows], topk=2048, out=out[:rows], backend="cpu")
    else:
        sparse_attend(q[:rows], k[:keys], indices[:rows, :keys], softmax_scale=1.0, value_dim=dim, backend="cpu")

call(2, 4096)
if "unbounded" in sys.argv:
    scores_module.KEYS = keys
    settings.memory = lambda: 1 << 40
before = peak()
call(rows, keys)
assert operator == "attend" or (out[:, -1] > 0).all()
print(peak() - before)
"""
# Of the allocator: what it keeps of freed blocks, in each thread.
ALLOWANCE = 8 * MEBI


def scratch(engine: str, memory: int, *arguments: Any) -> int:
    """Bytes by which a process grows during one call, beyond its inputs, its result and what the engine holds at rest."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, arguments)],
        env={**os.environ, "DSA_CPU_ENGINE": engine, "DSA_CPU_MEMORY": str(memory), "DSA_CPU_THREADS": "2"},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
# (budget, call): 131,072 keys with 64 index heads; 96 MiB of scores in 32; 144 MiB of keys of one row in 64.
BUDGETS = [
    (256 * MEBI, ("index", 64, 131_072, 64, 128)),
    (32 * MEBI, ("index", 192, 131_072, 4, 32)),
    (64 * MEBI, ("attend", 2, 65_536, 16, 576)),
]


@needs_proc
@pytest.mark.parametrize(("budget", "call"), BUDGETS)
def test_memory_stays_within_the_budget(engine: str, budget: int, call: tuple[Any, ...]) -> None:
    operator, rows, *sizes = call
    if engine == "numpy":
        rows = max(2, rows // 4)  # it is that much slower
    assert scratch(engine, budget, operator, rows, *sizes) < budget + ALLOWANCE


@needs_proc
def test_a_long_context_stays_within_the_default_budget() -> None:
    """512 rows over 131,072 keys: all their scores would take 268 MB, and those of single heads 17 GB."""
    default = "onnx" if settings.why_not_jit() else "jit"
    assert scratch(default, settings.DEFAULT_MEMORY, "index", 512, 131_072, 64, 128) < settings.DEFAULT_MEMORY + ALLOWANCE


@needs_proc
@pytest.mark.parametrize("call", [("index", 16, 131_072, 32, 32), BUDGETS[2][1]])
def test_memory_beyond_the_budget_is_seen(call: tuple[Any, ...]) -> None:
    assert scratch("onnx", 64 * MEBI, *call, "unbounded") > 64 * MEBI + ALLOWANCE


FORKED = """
import os, signal, sys
import numpy as np
from dsa_portable import lightning_index

x = np.ones((40, 2, 8), np.float32)
expected = lightning_index(x, x[:, 0], x[:, :, 0], topk=4)
child = os.fork()
if not child:
    signal.alarm(30)
    again = lightning_index(x, x[:, 0], x[:, :, 0], topk=4)
    os._exit(0 if (again == expected).all() else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_threads_of_its_own(engine: str) -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], env={**os.environ, "DSA_CPU_THREADS": "2"}, timeout=120)
    assert done.returncode == 0


# --- settings ---

WRONG = [
    ("DSA_CPU_ENGINE", "tvm", ("'tvm'", ", ".join(settings.ENGINES))),
    ("DSA_CPU_MEMORY", "1GiB", ("'1GiB'", "whole number")),
    ("DSA_CPU_MEMORY", "-1", ("'-1'", "whole number")),
    ("DSA_CPU_MEMORY", "0", ("'0'", ">= 1")),
    ("DSA_CPU_MEMORY", str(16 * MEBI - 1), ("16777215 bytes", "16777216")),
    ("DSA_CPU_THREADS", "two", ("'two'", "whole number")),
    ("DSA_CPU_THREADS", "0", ("'0'", ">= 1")),
]


@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize(("variable", "value", "words"), WRONG)
def test_a_wrong_setting_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: tuple[str, ...], probed: bool
) -> None:
    """In the probe where it is set before, in the call where it is set after; nothing is written in either case."""
    x, out = np.ones((2, 2, 8), np.float32), np.full((2, 4), 7, np.int32)
    registry.device.cache_clear()
    if probed:
        registry.device("cpu")
    monkeypatch.setenv(variable, value)
    with pytest.raises(DeviceUnavailable) as index_error:
        lightning_index(x, x[:, 0], x[:, :, 0], topk=4, out=out, backend="cpu")
    with pytest.raises(DeviceUnavailable) as attend_error:
        sparse_attend(x, x[:, 0], out % 2, softmax_scale=1.0, value_dim=8, backend="cpu")
    assert (out == 7).all()
    assert str(index_error.value) == str(attend_error.value)
    for word in (variable, *words):
        assert word in str(index_error.value)


@pytest.mark.parametrize("variable", ["DSA_CPU_ENGINE", "DSA_CPU_MEMORY", "DSA_CPU_THREADS"])
def test_an_empty_setting_is_the_default(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "")
    assert (settings.engine_name(), settings.memory()) == ("onnx" if settings.why_not_jit() else "jit", 1 << 30)
    assert settings.threads() >= 1


BARE = """
import os, sys
import numpy as np

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("onnxruntime", "llvmlite"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import dsa_portable

x = np.ones((3, 2, 8), np.float32)
try:
    dsa_portable.lightning_index(x, x[:, 0], x[:, :, 0], topk=2)
except dsa_portable.BackendNotImportable as error:
    print(type(error.__cause__).__name__, error)
os.environ["DSA_CPU_ENGINE"] = "numpy"
print(dsa_portable.lightning_index(x, x[:, 0], x[:, :, 0], topk=2).tolist())
print(dsa_portable.sparse_attend(x, x[:, 0], np.array([[0]] * 3, np.int32), softmax_scale=1.0, value_dim=1).ravel().tolist())
print([name for name in sys.modules if name.startswith("onnx")])
"""


def test_without_onnxruntime() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("DSA_")}
    done = subprocess.run([sys.executable, "-c", BARE], env=env, capture_output=True, text=True, check=True)
    refusal, indices, out, loaded = done.stdout.splitlines()
    assert refusal.startswith("ModuleNotFoundError backend 'cpu' cannot be imported")
    assert refusal.endswith("run: pip install 'dsa-portable[cpu]'")
    assert indices == "[[0, -1], [0, 1], [0, 1]]"
    assert out == "[1.0, 1.0, 1.0, 1.0, 1.0, 1.0]"
    assert loaded == "[]"


# --- the checks above can fail ---


def _highest_ties(scores: NDArray, topk: int) -> NDArray:
    return np.sort(np.lexsort((-np.arange(len(scores)), -scores))[:topk])


def _nan_ignored(scores: NDArray, topk: int) -> NDArray:
    if len(scores) <= topk:
        return np.arange(len(scores))
    threshold = np.partition(scores, len(scores) - topk)[len(scores) - topk]
    return np.flatnonzero(scores >= threshold)[:topk]


def _first_page(batch: Batch, request: int, positions: NDArray) -> Any:
    assert batch.page_size is not None
    return positions // batch.page_size, positions % batch.page_size


def _negative_wraps(request: Any, row: int, owner: int) -> NDArray:
    positions = request.indices[row].astype(np.int64) if owner >= 0 else np.empty(0, np.int64)
    length = int(request.batch.seqlens_k[owner])
    return np.asarray(positions[(positions >= -length) & (positions < length)] % max(1, length))


def _sum_of_all_but_one(engine: Any, q: NDArray, kv: NDArray, scale: float, value_dim: int) -> tuple[NDArray, NDArray, NDArray]:
    out, top, total = _attend(engine, q, kv, scale, value_dim)
    return out, top, total - 1


_attend = numpy_module.Engine.attend


def _of_the_first_request(request: Any, engine: Any, row: int, some: slice, owner: int, memory: int) -> tuple[NDArray, NDArray]:
    out, lse = _row(request, engine, row, some, max(0, owner), memory)
    return out, lse


def _owner_not_asked(self: Batch, rows: int) -> tuple[NDArray, NDArray]:
    if self.key_start is None or self.key_end is None:
        return _key_range(self, rows)
    end = np.clip(self.key_end, 0, self.max_seqlen_k)
    return np.clip(self.key_start, 0, end), end


def _sink_over_all(
    request: Any, engine: Any, q: NDArray, owner: int, positions: NDArray, step: int
) -> tuple[NDArray, NDArray, NDArray]:
    out, top, total = _attend_all(request, engine, q, owner, positions, step)
    return out, top + 0 * request.attn_sink[1], total


_row, _key_range, _attend_all = attend_module._row, Batch.key_range, attend_module._attend


def _merged_by_lse(
    request: Any, engine: Any, q: NDArray, owner: int, positions: NDArray, step: int
) -> tuple[NDArray, NDArray, NDArray]:
    out, lse = np.float32(0), np.float32(-np.inf)
    for first in range(0, len(positions), step):
        where = attend_module.places(request.batch, owner, positions[first : first + step])
        part, top, total = attend_module._part(request, engine, q, where)
        merged = np.logaddexp(lse, top + np.log(total))
        out = out * np.exp(lse - merged)[..., None] + part * np.exp(top + np.log(total) - merged)[:, None]
        lse = merged
    return np.asarray(out), lse, np.ones_like(lse)


FAULTS: list[tuple[str, Any, str, Any, Callable[[pytest.MonkeyPatch], None]]] = [
    ("ties at the highest", index_module, "top", _highest_ties, lambda m: check_exact(index_call("int8/f32/f32", flat))),
    ("NaN compared", index_module, "top", _nan_ignored, lambda m: check_spoilt("k", np.nan)),
    ("table not followed", scores_module, "places", _first_page, lambda m: check_exact(index_call("f32/f32/-", paged))),
    ("table not followed", attend_module, "places", _first_page, lambda m: check_attend(attend_call("f32", paged))),
    ("-1 is the last key", attend_module, "valid", _negative_wraps, lambda m: check_attend(attend_call("f32", flat))),
    ("lse of a sum", numpy_module.Engine, "attend", _sum_of_all_but_one, lambda m: check_attend(attend_call("f32", flat))),
    ("padding attends", attend_module, "_row", _of_the_first_request, lambda m: check_padding_of_attend(3.0)),
    ("padding sees", Batch, "key_range", _owner_not_asked, lambda m: check_padding_of_select(3.0)),
    ("a head's sink reaches others", attend_module, "_attend", _sink_over_all, lambda m: check_sink_of_nan()),
    ("parts merged by lse", attend_module, "_attend", _merged_by_lse, check_attend_chunks),
]


@pytest.mark.parametrize(
    ("name", "module", "function", "faulty", "check"), FAULTS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_planted_fault_is_seen(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    module: Any,
    function: str,
    faulty: Any,
    check: Callable[[pytest.MonkeyPatch], None],
) -> None:
    monkeypatch.setenv("DSA_CPU_ENGINE", "numpy")
    check(monkeypatch)
    monkeypatch.setattr(module, function, faulty)
    with pytest.raises(AssertionError):
        check(monkeypatch)
