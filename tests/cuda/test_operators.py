"""The CUDA backend's operators over inputs of these tests' own: in Triton's interpreter, or unchanged on a GPU."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
import triton
import triton.language as tl

from dsa_portable import Batch, DeviceUnavailable, InvalidArgument, Unsupported, lightning_index, sparse_attend
from dsa_portable.arrays import from_numpy, is_torch, to_numpy
from dsa_portable.backends.cuda import BACKEND, configurations, device
from dsa_portable.backends.cuda.kernels.rows import decoded_e4m3
from dsa_portable.conformance.cases.lightning_index import IndexCase
from dsa_portable.conformance.cases.sparse_attend import AttendCase
from dsa_portable.conformance.hosts.triton import requested
from dsa_portable.formats import LAYOUTS, pack

from . import planted

NDArray = npt.NDArray[Any]
Arguments = dict[str, Any]

DEVICE = "cpu" if requested() else "cuda"
DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "int8": np.int8,
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "f32": np.float32,
}
SCRATCH = "DSA_CUDA_SCRATCH"


def declared(operator: str, feature: str) -> tuple[str, ...]:
    """What the backend says it offers."""
    return tuple(cast("Iterable[str]", BACKEND.capabilities(None)[operator][feature]))


INDEX_FORMATS, INDEX_LAYOUTS = declared("lightning_index", "format"), declared("lightning_index", "k_layout")
ATTEND_FORMATS = declared("sparse_attend", "format")
PACKED = tuple(name for name in ATTEND_FORMATS if name in LAYOUTS)

# (rows, keys) per request: a chunk, no rows, more rows than keys, no keys, more than a block of keys; then nobody's rows.
SEQLENS = ((3, 70), (0, 5), (2, 1), (1, 0), (5, 290))
PADDING = 2


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cpu backend's smaller engine, and fewer programs a row, each of which costs the interpreter a millisecond."""
    monkeypatch.setenv("DSA_CPU_ENGINE", "numpy")
    monkeypatch.setattr(configurations, "scan_parts", lambda rows: 2)


# --- arrays, and where keys lie ---


def put(value: Any) -> Any:
    """A copy of an array on the device; anything else as it is."""
    return from_numpy(np.array(value, order="C")).to(DEVICE) if isinstance(value, np.ndarray) else value


def placed(arguments: Arguments) -> Arguments:
    """The arguments of a call on the device."""
    return {name: put(value) for name, value in arguments.items()}


def spread(tensor: Any) -> Any:
    """The same numbers where no two neighbours are adjacent."""
    wide = torch.empty((*tensor.shape, 2), dtype=tensor.dtype, device=tensor.device)
    wide[..., 0].copy_(tensor)
    return wide[..., 0]


def bits(tensors: Iterable[Any]) -> list[bytes]:
    """The bits of some results."""
    return [to_numpy(tensor).tobytes() for tensor in tensors]


@dataclass(frozen=True)
class Storage:
    """`places[r]` are where request r's positions lie in an array of leading shape `shape`; everywhere else is poison."""

    places: list[NDArray]
    shape: tuple[int, ...]
    fields: Arguments

    def fill(self, parts: Sequence[NDArray]) -> NDArray:
        """One array of the requests' parts, NaN (int8: -128) where no part lies."""
        each, dtype = parts[0].shape[1:], parts[0].dtype
        full = np.full((math.prod(self.shape), *each), -128 if dtype == np.int8 else np.nan, dtype)
        for place, part in zip(self.places, parts, strict=True):
            full[place] = part
        return full.reshape(*self.shape, *each)

    def batch(self, seqlens: Sequence[tuple[int, int]], **fields: Any) -> Batch:
        """The batch over this storage."""
        return Batch.of([q for q, _ in seqlens], [k for _, k in seqlens], **self.fields, **fields)


def stored(lengths: Sequence[int], page_size: int) -> Storage:
    """Pages in random order, page 0 and two more unused; for page_size 0 flat keys with two unused places behind each."""
    if not page_size:
        begins = np.concatenate([[0], np.cumsum([n + 2 for n in lengths])])
        places = [begin + np.arange(n) for begin, n in zip(begins, lengths, strict=False)]
        return Storage(places, (int(begins[-1]) + 3,), {"cu_seqlens_k": begins.astype(np.int32)})
    counts = [-(-n // page_size) for n in lengths]
    pages = list(1 + np.random.default_rng(page_size).permutation(sum(counts) + 2))
    table = np.full((len(lengths), max(counts) + 2), -(10**9), np.int32)
    places = []
    for r, (n, count) in enumerate(zip(lengths, counts, strict=True)):
        table[r, :count] = [pages.pop() for _ in range(count)]
        places.append(table[r, np.arange(n) // page_size] * page_size + np.arange(n) % page_size)
    return Storage(places, (sum(counts) + 3, page_size), {"block_table": table, "page_size": page_size})


PAGE_SIZES = pytest.mark.parametrize("page_size", [0, 1, 7, 64])


# --- lightning_index ---


def lattice(rng: np.random.Generator, *shape: int) -> NDArray:
    """Small integers: every sum of them is exact, and many are equal."""
    return rng.integers(-2, 3, shape)


def index_call(
    format: str = "bf16/f32/-",
    page_size: int = 0,
    *,
    heads: int = 16,
    dim: int = 128,
    topk: int = 5,
    k_layout: str | None = None,
    seqlens: Sequence[tuple[int, int]] = SEQLENS,
    **fields: Any,
) -> Arguments:
    """A ragged call over small integers, with NaN in nobody's rows and places."""
    rng = np.random.default_rng(len(format) + dim)
    operand, weight, scale = format.split("/")
    storage, rows = stored([k for _, k in seqlens], page_size), sum(q for q, _ in seqlens) + PADDING
    q, weights = lattice(rng, rows, heads, dim).astype(DTYPES[operand]), lattice(rng, rows, heads) / 4
    if operand != "int8":
        q[-PADDING:] = np.nan
    weights[-PADDING:] = np.nan
    keys = storage.fill([lattice(rng, k, dim).astype(DTYPES[operand]) for _, k in seqlens])
    scales = storage.fill([rng.choice([0.5, 0.75, 1.0, 3.0], k).astype(DTYPES.get(scale, np.float32)) for _, k in seqlens])
    cache: Arguments = {"k": keys, "k_scale": scales if scale != "-" else None}
    if k_layout:
        cache = {"k": pack(k_layout, keys, scales), "k_layout": k_layout}
    return {
        "q": q,
        "weights": weights.astype(DTYPES[weight]),
        "topk": topk,
        "batch": storage.batch(seqlens, **fields),
        **cache,
    }


def indexed(call: Arguments, **changes: Any) -> tuple[Any, Any]:
    """(indices, scores) of the backend, on the device."""
    indices, scores = lightning_index(**{**placed(call), **changes}, return_scores=True, backend="cuda")
    return indices, scores


def check_index(call: Arguments) -> NDArray:
    """Indices and scores are those of the cpu backend, which keeps the lowest of equal ones; returns the indices."""
    indices, scores = (to_numpy(result) for result in indexed(call))
    expected, expected_scores = lightning_index(**call, return_scores=True, backend="cpu")
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(scores, expected_scores)
    return indices


def check_structure(indices: NDArray, keys: int, topk: int) -> None:
    """Ascending, unique, visible, packed to the left."""
    count = min(topk, keys)
    assert (indices[:, count:] == -1).all()
    assert (np.diff(indices[:, :count], axis=1) > 0).all()
    assert (indices[:, :count] >= 0).all()
    assert (indices < keys).all()


SHORT = ((3, 70), (0, 5), (2, 1))


@pytest.mark.parametrize(("page_size", "dim", "seqlens"), [(0, 128, SEQLENS), (7, 64, SHORT)], ids=["flat", "paged"])
@pytest.mark.parametrize("format", INDEX_FORMATS)
def test_index_formats(format: str, page_size: int, dim: int, seqlens: Sequence[tuple[int, int]]) -> None:
    check_index(index_call(format, page_size, dim=dim, seqlens=seqlens))


@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("format", ["e4m3/f32/f32", "int8/f16/f16", "f16/bf16/-"])
def test_index_page_sizes(format: str, page_size: int) -> None:
    check_index(index_call(format, page_size))


@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (3, 128), (40, 64), (65, 128), (128, 64)])
@pytest.mark.parametrize("format", ["e4m3/f32/f32", "int8/f32/f32", "bf16/f32/-"])
def test_index_heads(format: str, heads: int, dim: int) -> None:
    check_index(index_call(format, 7, heads=heads, dim=dim))


@pytest.mark.parametrize("topk", [1, 69, 70, 71, 289, 290, 1000])
def test_index_topk(topk: int) -> None:
    check_index(index_call(topk=topk))


@pytest.mark.parametrize("page_size", [1, 7, 64])
@pytest.mark.parametrize("k_layout", INDEX_LAYOUTS)
def test_index_caches(k_layout: str, page_size: int) -> None:
    check_index(index_call("e4m3/f32/f32", page_size, k_layout=k_layout))


def test_index_of_a_flat_cache() -> None:
    check_index(index_call("e4m3/f32/f32", k_layout="idx_fp8_132_interleaved"))


RANGES = np.array(
    [(0, 70), (69, 70), (-5, 1000), (0, 1), (5, -5), (0, 3), (4, 4), (130, 290), (8, 2), (255, 257), (-1, 1), (9, 99), (0, 9)],
    np.int32,
)


@pytest.mark.parametrize("page_size", [0, 7])
@pytest.mark.parametrize(
    "fields", [{"causal": False}, {"key_start": RANGES[:, 0].copy(), "key_end": RANGES[:, 1].copy()}], ids=["all", "ranges"]
)
def test_index_visibility(fields: Arguments, page_size: int) -> None:
    check_index(index_call(page_size=page_size, **fields))


def test_index_of_more_requests_than_a_block() -> None:
    check_index(index_call(seqlens=[(r % 7 // 6, r % 5) for r in range(150)]))


@pytest.mark.parametrize("scratch", ["1", "5000"])
def test_index_slabs_change_no_bit(monkeypatch: pytest.MonkeyPatch, scratch: str) -> None:
    call = index_call("e4m3/f32/f32", 7)
    whole = bits(indexed(call))
    monkeypatch.setenv(SCRATCH, scratch)
    assert bits(indexed(call)) == whole


@pytest.mark.parametrize("format", ["e4m3/f16/f16", "int8/f32/f32", "bf16/bf16/-"])
def test_index_reads_and_writes_any_strides(format: str) -> None:
    call = index_call(format)
    results, given = indexed(call), placed(call)
    strided = {name: spread(given[name]) for name in ("q", "weights")}
    before = bits(strided.values())
    out = tuple(torch.full(result.shape[::-1], 7, dtype=result.dtype, device=DEVICE).T for result in results)
    found = indexed(call, **strided, out=out)
    assert all(one is other for one, other in zip(found, out, strict=True))
    assert bits(found) == bits(results)
    assert bits(strided.values()) == before


SMALL = (
    (lightning_index, IndexCase("views", "", (), "bf16/f32/-", ((2, 9), (0, 3), (1, 40)), heads=16, topk=8)),
    (sparse_attend, AttendCase("views", "", (), "bf16", ((2, 9), (0, 3), (1, 40)), heads=16, topk=32)),
)


@pytest.mark.parametrize(("operator", "case"), SMALL, ids=["index", "attend"])
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("ranges", [False, True])
def test_a_batch_of_views_is_read_as_it_is(operator: Any, case: Any, page_size: int | None, ranges: bool) -> None:
    """Every array of the batch is every other element of twice as many."""
    if ranges and operator is sparse_attend:
        pytest.skip("attention reads no ranges")
    call = replace(case, page_size=page_size, **({"ranges": True} if ranges else {})).build()
    views = replace(call, strides="transposed").make_batch(put)
    assert not any(array is not None and array.is_contiguous() for array in views.flatten()[0])
    arguments = {**call.on(put).arrays, **call.options}
    plain, viewed = (operator(**arguments, batch=batch, backend="cuda") for batch in (call.make_batch(put), views))
    assert bits([plain]) == bits([viewed])


def test_index_writes_no_input() -> None:
    given = placed(index_call("e4m3/f32/f32", 7))
    names = [name for name, value in given.items() if is_torch(value)]
    before = bits([given[name] for name in names])
    lightning_index(**given, backend="cuda")
    assert bits([given[name] for name in names]) == before


# --- the selection alone: scores are written where the kernel would have left them ---


def hard_rows(n: int) -> NDArray:
    """float32 [rows, n]: scores that a selection may stumble over."""
    rng, place = np.random.default_rng(n), np.arange(n)
    rows = (
        np.full(n, 7),
        rng.choice([0.0, -0.0], n),
        rng.integers(0, 2, n),
        place,
        -place,
        np.where(place == n // 2, 1e30, 1),
        np.where(rng.random(n) < 0.01, 1e30, -1e30),
        rng.integers(-25, 25, n),
        rng.standard_normal(n),
        np.where(place >= n - 3, 1e-40, -(place % 5)),
        (1 + rng.integers(0, 3, n) * 2.0**-23) * -(2.0**100),
    )
    return np.array(rows, np.float32)


def selected(monkeypatch: pytest.MonkeyPatch, scores: NDArray, topk: int) -> tuple[NDArray, NDArray]:
    """(indices, scores) of rows whose scores are these; the scratch behind them holds NaN."""
    logits = torch.from_numpy(scores).to(DEVICE)

    def score(request: Any, q: Any, cache: Any, rows: Any, target: Any, first: int, last: int) -> None:
        target.fill_(torch.nan)[: last - first, : scores.shape[1]] = logits[first:last]

    monkeypatch.setattr("dsa_portable.backends.cuda.lightning_index._score", score)
    rows, n = scores.shape
    call = {"q": np.zeros((rows, 1, 64), np.float16), "k": np.zeros((n, 64), np.float16)}
    batch = Batch.dense(rows, n, causal=False)
    found = indexed({**call, "weights": np.zeros((rows, 1), np.float32), "topk": topk, "batch": batch})
    return to_numpy(found[0]), to_numpy(found[1])


def check_selection(monkeypatch: pytest.MonkeyPatch, n: int, topk: int) -> None:
    """The largest, of equal ones the lowest, ascending, with their scores."""
    scores = hard_rows(n)
    indices, found = selected(monkeypatch, scores, topk)
    best = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :topk], axis=1)
    np.testing.assert_array_equal(indices[:, : best.shape[1]], best)
    np.testing.assert_array_equal(found[:, : best.shape[1]], np.take_along_axis(scores, best, axis=1))
    assert (indices[:, best.shape[1] :] == -1).all()
    assert (found[:, best.shape[1] :] == -np.inf).all()


# 8,192 candidates for a topk of up to 2,048, twice as many up to 8,192: beyond, and where too many are equal, whole rows.
SELECTIONS = (
    (1, 1), (1, 5), (2, 1), (63, 5), (64, 64), (65, 64), (4097, 1), (8192, 2048), (8400, 2049), (9001, 8200), (16500, 5001),
)  # fmt: skip


@pytest.mark.parametrize(("n", "topk"), SELECTIONS)
def test_selection_of_hard_rows(monkeypatch: pytest.MonkeyPatch, n: int, topk: int) -> None:
    check_selection(monkeypatch, n, topk)


@pytest.mark.parametrize("parts", [1, 16])
def test_selection_of_rows_in_parts(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    monkeypatch.setattr(configurations, "scan_parts", lambda rows: parts)
    check_selection(monkeypatch, 8400, 2048)


@pytest.mark.parametrize(("n", "topk"), [(63, 5), (9001, 2048), (9001, 8193)])
def test_selection_of_scores_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch, n: int, topk: int) -> None:
    """Which are chosen is open, how many is not."""
    rng = np.random.default_rng(n)
    rows = [np.full(n, value) for value in (np.nan, np.inf, -np.inf)]
    rows += [np.where(rng.random(n) < share, np.nan, rng.standard_normal(n)) for share in (0.01, 0.5, 0.99)]
    rows += [rng.choice([np.nan, np.inf, -np.inf, 0.0, 1.0], n)]
    check_structure(selected(monkeypatch, np.array(rows, np.float32), topk)[0], n, topk)


def test_index_of_nan_weights() -> None:
    call = index_call(seqlens=((3, 70),), causal=False)
    call["weights"][:] = np.nan
    check_structure(to_numpy(indexed(call)[0])[:-PADDING], 70, 5)


def test_index_ties_signed_zeros() -> None:
    """A negative score times a scale of 0 is -0.0: it is as good as +0.0, and the lowest positions of both are kept."""
    rng = np.random.default_rng(0)
    q, k = np.zeros((1, 1, 64), np.int8), np.zeros((40, 64), np.int8)
    q[..., 0], k[:, 0] = 1, rng.integers(0, 2, 40)
    scale = rng.choice([0.0, 1.0], 40, p=[0.9, 0.1]).astype(np.float32)
    call = {"q": q, "k": k, "k_scale": scale, "weights": -np.ones((1, 1), np.float32), "topk": 17}
    check_index(call)
    scores = to_numpy(indexed(call)[1])
    assert 0 < np.signbit(scores).sum() < 17, "zeros of one sign alone"


# --- sparse_attend ---

INVALID = (-1, -7, -(2**31), 2**31 - 1)


@dataclass(frozen=True)
class AttendCall:
    """A call and what it means: float64 keys of each request, and the request of every row (-1: nobody's)."""

    arguments: Arguments
    keys: list[NDArray]
    owners: list[int]

    def entries(self, row: int) -> NDArray:
        """The entries of the row's indices that count."""
        length, found = self.arguments.get("topk_length"), self.arguments["indices"][row]
        found = found if length is None else found[: max(0, length[row])]
        keys = len(self.keys[self.owners[row]]) if self.owners[row] >= 0 else 0
        return np.asarray(found[(found >= 0) & (found < keys)])

    def truth(self, row: int) -> tuple[NDArray, NDArray]:
        """(out, lse) of a row in float64."""
        q, entries = self.arguments["q"][row].astype(np.float64), self.entries(row)
        if not len(entries):
            return np.zeros((len(q), 512)), np.full(len(q), -np.inf)
        keys = self.keys[self.owners[row]][entries]
        logits = self.arguments["softmax_scale"] * (q @ keys.T)
        top = logits.max(axis=1, keepdims=True)
        p = np.exp(logits - top)
        lse = (top + np.log(p.sum(axis=1, keepdims=True)))[:, 0]
        with np.errstate(over="ignore"):
            share = 1 / (1 + np.exp(self.arguments.get("attn_sink", np.full(len(q), -np.inf)) - lse))
        return (share / p.sum(axis=1))[:, None] * (p @ keys[:, :512]), lse

    def run(self, **changes: Any) -> tuple[Any, Any]:
        """(out, lse) of the backend, on the device."""
        out, lse = sparse_attend(**{**placed(self.arguments), **changes}, return_lse=True, backend="cuda")
        return out, lse


def attend_call(
    format: str = "bf16",
    page_size: int = 0,
    *,
    heads: int = 16,
    width: int = 576,
    topk: int = 63,
    scale: float = 0.05,
    seqlens: Sequence[tuple[int, int]] = SEQLENS,
    **options: Any,
) -> AttendCall:
    """A ragged call with NaN in nobody's rows and in every key that no row names, position 0 among them."""
    rng = np.random.default_rng(len(format) + topk)
    owners = [r for r, (lq, _) in enumerate(seqlens) for _ in range(lq)] + [-1] * PADDING
    lengths = [k for _, k in seqlens]
    indices = np.stack([_indices(rng, lengths[owner], topk) for owner in owners])
    storage = stored(lengths, page_size)
    named = [np.arange(n) % 2 == 1 for n in lengths]
    cache, keys = _cache(rng, format, storage, named, width)
    q = rng.standard_normal((len(owners), heads, width)).astype(DTYPES.get(format, ml_dtypes.bfloat16))
    q[-PADDING:] = np.nan
    call = {"q": q, "indices": indices, "softmax_scale": scale, "batch": storage.batch(seqlens), **cache, **options}
    return AttendCall(call, keys, owners)


def _indices(rng: np.random.Generator, keys: int, topk: int) -> NDArray:
    """Odd positions in any order, repeated, holes among them; in a long row the first third is a hole."""
    found = np.asarray(1 + 2 * rng.integers(0, max(1, keys // 2), topk), np.int32)
    holes = rng.random(topk) < 0.3
    found[holes] = rng.choice([*INVALID, keys], int(holes.sum()))
    if topk > 300:
        found[: topk // 3] = rng.choice([*INVALID, keys], topk // 3)
    return found


def _cache(
    rng: np.random.Generator, format: str, storage: Storage, named: Sequence[NDArray], width: int
) -> tuple[Arguments, list[NDArray]]:
    def draw(numbers: Callable[[int], NDArray], dtype: Any) -> list[NDArray]:
        """Numbers of each request; NaN (int8: -128) in keys that are not named."""
        poison = -128 if dtype == np.int8 else np.nan
        return [np.where(use[:, None], numbers(len(use)), poison).astype(dtype) for use in named]

    if format in DTYPES:
        keys = draw(lambda n: rng.standard_normal((n, width)), DTYPES[format])
        return {"kv": storage.fill(keys)}, [part.astype(np.float64) for part in keys]
    spec = LAYOUTS[format]
    values = draw(lambda n: rng.integers(-16, 17, (n, 512)), spec.value_dtype)
    scales = draw(lambda n: rng.choice([0.125, 0.25] if spec.power_of_two else [0.1, 0.3], (n, 4)), np.float32)
    rope = draw(lambda n: rng.standard_normal((n, 64)), ml_dtypes.bfloat16)
    cache = pack(format, storage.fill(values), storage.fill(scales), storage.fill(rope))
    # The profile's kv_compute: numbers are rounded to bfloat16 before they are multiplied.
    wide = [(v.astype(np.float32) * s.repeat(128, 1)).astype(ml_dtypes.bfloat16) for v, s in zip(values, scales, strict=True)]
    keys = [np.concatenate([w, r], axis=1).astype(np.float64) for w, r in zip(wide, rope, strict=True)]
    return {"kv": cache, "kv_layout": format}, keys


def check_attend(call: AttendCall, **changes: Any) -> None:
    """out and lse of every row are near the formula's, and exact in rows without a key."""
    out, lse = (to_numpy(result).astype(np.float64) for result in call.run(**changes))
    narrow = call.arguments["q"].dtype != np.float32
    for row in range(len(call.owners)):
        truth, truth_lse = call.truth(row)
        error = np.linalg.norm(out[row] - truth)
        assert error <= (1e-2 if narrow else 1e-5) * np.linalg.norm(truth), f"out of row {row} is {error} away"
        np.testing.assert_allclose(lse[row], truth_lse, rtol=1e-5, atol=1e-3 if narrow else 1e-5, err_msg=f"lse of row {row}")


@PAGE_SIZES
@pytest.mark.parametrize("format", ATTEND_FORMATS)
def test_attend_formats(format: str, page_size: int) -> None:
    check_attend(attend_call(format, page_size))


@pytest.mark.parametrize("heads", [1, 3, 24, 65, 128])
@pytest.mark.parametrize("format", ["bf16", "f32", "v32_fp8_656_nsr"])
def test_attend_heads(format: str, heads: int) -> None:
    check_attend(attend_call(format, heads=heads))


@pytest.mark.parametrize("format", ["bf16", "f16", "f32"])
def test_attend_keys_that_are_their_values(format: str) -> None:
    check_attend(attend_call(format, 7, width=512))


DECODE = ((1, 70), (0, 5), (2, 1), (1, 0), (4, 290))
PHASES = pytest.mark.parametrize("seqlens", [SEQLENS, DECODE], ids=["prefill", "decode"])


@PHASES
@pytest.mark.parametrize(("topk", "heads"), [(1, 16), (65, 65), (500, 16), (1024, 65)])
def test_attend_topk(topk: int, heads: int, seqlens: Sequence[tuple[int, int]]) -> None:
    check_attend(attend_call(topk=topk, heads=heads, seqlens=seqlens))


@pytest.mark.parametrize("format", ["f16", "f32", *PACKED])
def test_attend_split_formats(format: str) -> None:
    check_attend(attend_call(format, 7, topk=1024, heads=3, seqlens=DECODE))


@PHASES
@pytest.mark.parametrize("topk", [65, 1024])
def test_attend_topk_length(topk: int, seqlens: Sequence[tuple[int, int]]) -> None:
    """What is cut off names keys that hold NaN."""
    call = attend_call(topk=topk, seqlens=seqlens)
    length = np.resize(np.array([topk, 3, 0, -2, topk // 2, 99999, -(2**31), topk - 1, 1], np.int32), len(call.owners))
    for row, n in enumerate(length):
        call.arguments["indices"][row, max(0, n) :] = 0
    check_attend(AttendCall({**call.arguments, "topk_length": length}, call.keys, call.owners))


@PHASES
@pytest.mark.parametrize("scale", [0.05, 4.0])
@pytest.mark.parametrize("topk", [63, 1024])
def test_attend_sinks(topk: int, scale: float, seqlens: Sequence[tuple[int, int]]) -> None:
    """No sink, an infinite one, and sinks as large as the row's lse, whose exponentials float32 does not hold at scale 4."""
    call = attend_call(topk=topk, scale=scale, seqlens=seqlens)
    lse = call.truth(len(call.owners) - PADDING - 1)[1]
    assert (lse > 89).any() == (scale == 4.0)
    sink = (lse + np.linspace(-2, 2, len(lse))).astype(np.float32)
    sink[:4] = -np.inf, np.inf, 1.5, 300
    check_attend(AttendCall({**call.arguments, "attn_sink": sink}, call.keys, call.owners))


def test_attend_without_a_request() -> None:
    batch = Batch.of([], [])
    q, kv = torch.full((2, 3, 576), torch.nan, device=DEVICE), torch.full((1, 576), torch.nan, device=DEVICE)
    indices = torch.zeros((2, 1024), dtype=torch.int32, device=DEVICE)
    out, lse = sparse_attend(q, kv, indices, softmax_scale=1.0, batch=batch, return_lse=True, backend="cuda")
    assert not out.any()
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("heads", [16, 128])
def test_attend_of_a_decode_row_is_the_same_beside_anything(heads: int) -> None:
    """The rows alone, in a batch of decode requests, and beside a request of 6 rows."""
    call = attend_call(page_size=7, topk=1024, heads=heads, seqlens=((2, 290),))
    given, table = placed(call.arguments), call.arguments["batch"].block_table
    found = []
    for beside in ([], [1, 3], [6]):
        rows = [2, *beside]
        batch = Batch.of(rows, [290] * len(rows), block_table=np.repeat(table, len(rows), axis=0), page_size=7)
        where = [0, 1] + [0] * sum(beside)
        changes = {"q": given["q"][where], "indices": given["indices"][where], "batch": batch}
        found.append(bits([result[:2] for result in call.run(**changes)]))
    assert found[0] == found[1] == found[2]


@PHASES
def test_attend_slabs_change_no_bit(monkeypatch: pytest.MonkeyPatch, seqlens: Sequence[tuple[int, int]]) -> None:
    seqlens = (*seqlens, (3, 40))
    call = attend_call(topk=1024, heads=3, seqlens=seqlens, attn_sink=np.array([0.5, -1, 3], np.float32))
    whole = bits(call.run())
    monkeypatch.setenv(SCRATCH, "100000")
    assert bits(call.run()) == whole
    check_attend(call)


@pytest.mark.parametrize("topk", [63, 1024])
def test_attend_reads_and_writes_any_strides(topk: int) -> None:
    call = attend_call(topk=topk, seqlens=DECODE)
    rows = len(call.owners)
    length, sink = np.arange(rows, dtype=np.int32) * topk // 5, np.linspace(-1, 1, 16, dtype=np.float32)
    call = AttendCall({**call.arguments, "topk_length": length, "attn_sink": sink}, call.keys, call.owners)
    given, results = placed(call.arguments), call.run()
    strided = {name: spread(given[name]) for name in ("q", "indices", "topk_length", "attn_sink")}
    before = bits([*strided.values(), given["kv"]])
    out = torch.full((512, 16, rows), torch.nan, dtype=torch.bfloat16, device=DEVICE).permute(2, 1, 0)
    lse = torch.full((rows, 40), torch.nan, device=DEVICE)[:, 20:36]
    found = call.run(**strided, kv=given["kv"], out=(out, lse))
    assert found[0] is out
    assert found[1] is lse
    assert bits([result.contiguous() for result in found]) == bits(results)
    assert bits([*strided.values(), given["kv"]]) == before


# --- offsets beyond 2^31 ---

# Row 3,728,271 of a cache of 576 numbers a row is the first whose offset an int32 does not hold.
FAR = """
import sys
from importlib import import_module
from dsa_portable.conformance.hosts import triton
triton.prepare()
import torch
from dsa_portable import Batch
from dsa_portable.operators import AttendRequest

sys.path.insert(0, sys.argv[1])
where = "cpu" if triton.requested() else "cuda"
try:
    kv = torch.empty((3_900_000, 576), dtype=torch.bfloat16, device=where)
except RuntimeError:
    sys.exit("no memory")
torch.manual_seed(0)
rows = torch.tensor([3_728_270, 3_728_271, 3_728_272, 3_800_001, 3_899_999, 5], device=where)
keys = torch.randn((6, 576), device=where).to(torch.bfloat16)
kv[rows] = keys
q = torch.randn((1, 16, 576), device=where).to(torch.bfloat16)
batch = Batch.dense(1, len(kv))
request = AttendRequest.checked(q=q, kv=kv, indices=rows[None].int(), softmax_scale=0.05, batch=batch)
out = import_module(sys.argv[2] + ".sparse_attend").sparse_attend(request)
p = torch.softmax(0.05 * q[0].double() @ keys.double().T, dim=1)
truth = p @ keys[:, :512].double()
error = (out[0].double() - truth).norm() / truth.norm()
print("right" if error < 1e-2 else "wrong")
"""


def far(folder: Path, package: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: an offset that is wrong may end it."""
    command = [sys.executable, "-c", FAR, str(folder), package]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if "no memory" in done.stderr:
        pytest.skip("no 4.5 GB of memory")
    return done


def test_attend_reads_keys_beyond_2_31(tmp_path: Path) -> None:
    done = far(tmp_path, "dsa_portable.backends.cuda")
    assert done.stdout == "right\n", done.stderr


def test_attend_with_offsets_in_int32_is_seen(tmp_path: Path) -> None:
    file, line = "kernels/sparse_attend.py", "key_offset = page * kv_page_stride + slot * KV_SLOT"
    package = planted.copy(tmp_path, "planted_far", (file, line, f"{line.replace('= ', '= (', 1)}).to(tl.int32)"))
    done = far(tmp_path, package)
    assert done.returncode != 0 or done.stdout == "wrong\n"
    assert "Error" not in done.stderr, "it did not even run"


# --- refusals ---


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is launched is an error."""

    def launch(kernel: Any, *rest: Any, **constants: Any) -> None:
        raise AssertionError(f"{kernel} was launched")

    for module in ("rows", "lightning_index", "sparse_attend"):
        monkeypatch.setattr(f"dsa_portable.backends.cuda.{module}.launch", launch)


def check_sentence(error: pytest.ExceptionInfo[Exception], *words: str) -> None:
    """One sentence that names what it must."""
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    for word in words:
        assert word in text


def misaligned(tensor: Any) -> Any:
    """A copy that begins one number after an address that 16 divides."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    room[1:].copy_(tensor.reshape(-1))
    return room[1:].view(tensor.shape)


@pytest.mark.parametrize(("name", "change"), [("k", spread), ("k_scale", misaligned), ("kv", spread)])
def test_a_cache_that_cannot_be_read_in_place_is_copied(name: str, change: Callable[[Any], Any]) -> None:
    """Strides are free (contract 1.3): the same bits, and the cache as it was."""
    if name == "kv":
        attend = attend_call()
        cache = change(put(attend.arguments["kv"]))
        expected, run = attend.run(), partial(attend.run, kv=cache)
    else:
        call = index_call("e4m3/f32/f32")
        cache = change(put(call[name]))
        expected, run = indexed(call), partial(indexed, call, **{name: cache})
    assert not cache.is_contiguous() or cache.data_ptr() % 16
    before = bits([cache])
    assert bits(run()) == bits(expected)
    assert bits([cache]) == before


@pytest.mark.usefixtures("no_kernel")
def test_what_is_not_declared_is_refused() -> None:
    with pytest.raises(Unsupported) as error:
        indexed(index_call("f32/f32/-"))
    assert error.value.capability == "format"
    with pytest.raises(Unsupported) as error:
        indexed(index_call(dim=32))
    assert error.value.capability == "head_dim"
    with pytest.raises(Unsupported) as error:
        attend_call(width=544).run()
    assert error.value.capability == "dims"
    with pytest.raises(Unsupported) as error:
        attend_call().run(value_dim=256)
    assert error.value.capability == "dims"


@pytest.mark.usefixtures("no_kernel")
@pytest.mark.parametrize("value", ["lots", "0", "-1", "1e9"])
def test_scratch_that_is_no_count_of_bytes_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(SCRATCH, value)
    for run in (partial(indexed, index_call()), attend_call().run, attend_call(topk=1024).run):
        with pytest.raises(InvalidArgument) as error:
            run()
        check_sentence(error, SCRATCH, repr(value))


@pytest.mark.usefixtures("no_kernel")
def test_an_old_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "architecture", lambda where: "sm_75")
    for run in (partial(indexed, index_call()), attend_call().run):
        with pytest.raises(Unsupported) as error:
            run()
        assert error.value.capability == "architecture"
        check_sentence(error, "sm_75", "sm_80")


def test_an_old_device_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "interpreting", lambda: False)
    monkeypatch.setattr(device, "architecture", lambda where: "sm_75")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda where: SimpleNamespace(name="An old one"))
    with pytest.raises(DeviceUnavailable) as error:
        device.probe()
    check_sentence(error, "An old one", "sm_75", "sm_80")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceUnavailable) as error:
        device.probe()
    check_sentence(error, "no CUDA or HIP device")


@pytest.mark.parametrize("operator", ["lightning_index", "sparse_attend"])
def test_too_little_memory_says_how_much_was_asked_for(monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    empty = torch.empty

    def full(size: Any, *rest: Any, **named: Any) -> Any:
        if len(size) == 4 or (operator == "lightning_index" and named["dtype"] == torch.float32):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return empty(size, *rest, **named)

    if operator == "lightning_index":
        run = partial(lightning_index, **placed(index_call()), backend="cuda")
    else:
        arguments = placed(attend_call(topk=1024, heads=3, seqlens=DECODE).arguments)
        run = partial(sparse_attend, **arguments, backend="cuda")
    monkeypatch.setenv("DSA_CUDA_PARTS", "2")
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(torch.cuda.OutOfMemoryError) as error:
        run()
    # 13 rows of 304 scores and two blocks; or of each row 2 parts, 3 heads, 512 numbers and two more.
    size = (13 * 304 + 2 * 4096) * 4 if operator == "lightning_index" else len(arguments["q"]) * 2 * 3 * 514 * 4
    check_sentence(error, operator, f" {size} bytes", SCRATCH, str(512 << 20))


PLAIN = """
import torch
from dsa_portable import Unsupported, lightning_index, sparse_attend

def said(run):
    try:
        return "ran" if run() is not None else ""
    except Unsupported as error:
        return f"{error.capability} {'repair()' in str(error)}"

def index(dtype):
    x = torch.ones((1, 16, 64)).to(dtype)
    scale = {"k_scale": torch.ones(1)} if x.element_size() == 1 else {}
    return said(lambda: lightning_index(x, x[:, 0].contiguous(), torch.ones((1, 16)), topk=1, backend="cuda", **scale))

def attend(dtype):
    x = torch.ones((1, 16, 576), dtype=dtype)
    indices = torch.zeros((1, 1), dtype=torch.int32)
    return said(lambda: sparse_attend(x, x[:, 0].contiguous(), indices, softmax_scale=1.0, backend="cuda"))

print(index(torch.bfloat16), index(torch.float8_e4m3fn), attend(torch.bfloat16), sep=", ")
print(index(torch.float16), index(torch.int8), attend(torch.float16), attend(torch.float32), sep=", ")
"""


def test_the_plain_interpreter_is_refused_what_it_takes_for_integers() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PLAIN], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["format True, format True, format True", "ran, ran, ran, ran"], done.stderr


# --- chips without float8 ---


@triton.jit
def decode(codes, found):  # type: ignore[no-untyped-def]
    """found = the numbers of these codes."""
    place = tl.arange(0, 256)
    tl.store(found + place, decoded_e4m3(tl.load(codes + place)))


def test_every_float8_code_is_decoded_in_bits() -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    found = torch.empty(256, dtype=torch.float16, device=DEVICE)
    decode[(1,)](codes, found)
    expected = codes.view(torch.float8_e4m3fn).half()
    assert torch.equal(found.nan_to_num(7.25), expected.nan_to_num(7.25))


def test_without_float8_units_the_results_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 holds every float8 number, and these sums are exact; in attention the dequantised keys are."""
    selection = partial(lightning_index, **placed(index_call("e4m3/f32/f32")), backend="cuda", return_scores=True)
    attention = partial(sparse_attend, **placed(attend_call("v32_fp8_656_nsr").arguments), backend="cuda")
    expected = (*bits(selection()), *bits([attention()]))
    monkeypatch.setattr(configurations, "native_fp8", lambda architecture: False)
    assert (*bits(selection()), *bits([attention()])) == expected


# --- the tensors' own device ---


@pytest.mark.parametrize("operator", ["lightning_index", "sparse_attend"])
def test_every_launch_is_on_the_tensors_device(monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    """Triton launches on the current device, whichever the tensors are on; with two GPUs tests/cuda/test_device.py sees it."""
    inside: list[Any] = []
    launched: list[Any] = []

    @contextmanager
    def of(tensor: Any) -> Iterator[None]:
        inside.append(tensor.device)
        yield
        inside.pop()

    modules = [import_module(f"dsa_portable.backends.cuda.{name}") for name in (operator, "rows")]
    for module in modules:
        honest = module.launch
        monkeypatch.setattr(module, "launch", lambda *a, _launch=honest, **n: (launched.append(list(inside)), _launch(*a, **n)))
    monkeypatch.setattr(device, "of", of)
    if operator == "lightning_index":
        lightning_index(**placed(index_call()), backend="cuda")
    else:
        sparse_attend(**placed(attend_call().arguments), backend="cuda")
    assert len(launched) > 1
    assert all([str(where) for where in each] == [str(torch.empty(0, device=DEVICE).device)] for each in launched)
