"""lightning_index and its two parts: blocks of rows are scored, and selected while their scores are in the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.arrays import dtype_name
from dsa_portable.backends.cpu import settings
from dsa_portable.backends.cpu.jit import compile
from dsa_portable.backends.cpu.jit.kernels import score, select
from dsa_portable.backends.cpu.rows import widen
from dsa_portable.contract import SHORT
from dsa_portable.formats import unpack
from dsa_portable.operators.common import Scored
from dsa_portable.operators.index_scores import ScoresRequest
from dsa_portable.operators.index_select import SelectRequest
from dsa_portable.operators.lightning_index import IndexRequest

Array: TypeAlias = np.ndarray[Any, Any]

# Rows that meet a tile of keys while it is widened.
ROWS = 16
# Parts of the keys of a decode step for each worker, since workers are not equally fast.
PARTS = 4
# A row of scores may be read and written so far behind its end.
SLACK = score.BATCH


def lightning_index(request: IndexRequest) -> Array | tuple[Array, Array]:
    """Indices, or (indices, scores) with `return_scores`; see dsa_portable.lightning_index."""
    arrays = request.out or tuple(np.empty(shape, dtype) for dtype, shape in request.results.values())
    arrays[0][:] = -1
    if request.return_scores:
        arrays[1][:] = -np.inf
    topk = request.topk

    def finish(block: Block, scores: Array, first: int, rows: slice) -> None:
        indices = _selected(scores, block.low, block.starts[rows], block.ends[rows], topk, first)
        arrays[0][rows] = indices
        if request.return_scores:
            for row, chosen, found in zip(arrays[1][rows], indices, scores[first:], strict=False):
                chosen = chosen[chosen >= 0]
                row[: len(chosen)] = found[chosen - block.low]

    _run(request, finish)
    return (arrays[0], arrays[1]) if request.return_scores else arrays[0]


def index_scores(request: ScoresRequest) -> Array:
    """Scores; see dsa_portable.index_scores."""
    (result,) = request.out or (np.empty(shape, dtype) for dtype, shape in request.results.values())
    result[:] = -np.inf

    def finish(block: Block, scores: Array, first: int, rows: slice) -> None:
        for row, found in zip(range(rows.start, rows.stop), scores[first:], strict=False):
            start, end = block.starts[row], max(block.starts[row], block.ends[row])
            result[row, start:end] = found[start - block.low : end - block.low]

    _run(request, finish)
    return result


def index_select(request: SelectRequest) -> Array:
    """Indices; see dsa_portable.index_select."""
    (indices,) = request.out or (np.empty(shape, dtype) for dtype, shape in request.results.values())
    starts, ends = (np.ascontiguousarray(a, np.int32) for a in request.batch.key_range(request.dims["Tq"]))

    def block(first: int) -> None:
        rows = slice(first, min(first + ROWS, len(starts)))
        low, high = int(starts[rows].min()), int(ends[rows].max())
        scores = np.empty((rows.stop - first, max(0, high - low) + SLACK), np.float32)
        scores[:, : max(0, high - low)] = request.scores[rows, low : max(low, high)]
        indices[rows] = _selected(scores, low, starts[rows], ends[rows], request.topk)

    compile.selecting()
    settings.run_all(block, range(0, len(starts), ROWS), settings.threads())
    return indices


def _selected(scores: Array, low: int, starts: Array, ends: Array, topk: int, first: int = 0) -> Array:
    """int32 [rows, topk] of the rows of `scores` from `first` on, whose column 0 is position `low`."""
    indices = np.full((len(starts), topk), -1, np.int32)
    scratch = compile.scratch(select.scratch_bytes(scores.shape[1], topk))
    rows = scores[first : first + len(starts)]
    compile.selecting()(
        rows.ctypes.data,
        rows.shape[1],
        len(starts),
        low,
        starts.ctypes.data,
        ends.ctypes.data,
        topk,
        indices.ctypes.data,
        indices.strides[0],
        scratch.ctypes.data,
    )
    return indices


class Keys:
    """A request's keys where they lie, which is how kernels read them; copied only where a key's numbers lie apart."""

    def __init__(self, request: Scored, owner: int, low: int, high: int) -> None:
        values, scales = request.k, request.k_scale
        if request.k_layout is not None:
            parts = unpack(request.k_layout, request.k)
            values, scales = parts.values, parts.scale
        batch, self.low, self.count = request.batch, low, high - low
        count = self.count
        self.scales = np.ones(count + SLACK, np.float32)
        apart = values.strides[-1] != values.itemsize
        if batch.block_table is None:
            assert batch.cu_seqlens_k is not None
            begin = int(batch.cu_seqlens_k[owner])
            if scales is not None:
                self.scales[:count] = widen(scales[begin + low : begin + high])
            if apart:
                values, begin = np.ascontiguousarray(values[begin + low : begin + high]), -low
            # One page, far larger than any request.
            self.page_size, self.pages = 1 << 40, np.array([values.ctypes.data + begin * values.strides[0]], np.int64)
        else:
            assert batch.page_size is not None
            self.page_size = batch.page_size
            table = batch.block_table[owner, : -(-high // self.page_size)]
            if scales is not None:
                self.scales[:count] = widen(scales[table].reshape(-1)[low:high])
            if apart:
                values, table = np.ascontiguousarray(values[table]), np.arange(len(table))
            self.pages = values.ctypes.data + table.astype(np.int64) * values.strides[0]
        self.values, self.stride = values, values.strides[-2]


@dataclass(frozen=True)
class Block:
    """Rows of one request that are scored together."""

    request: Scored
    keys: Keys
    rows: slice
    most: int  # rows of the request's blocks
    starts: Array  # int32, of all rows
    ends: Array

    @cached_property
    def low(self) -> int:
        """The first position that a row sees."""
        return int(self.starts[self.rows].min())

    @cached_property
    def high(self) -> int:
        """Behind the last one."""
        return max(self.low, int(self.ends[self.rows].max()))

    def empty_scores(self) -> Array:
        """Of all its rows, for the positions from `low` on."""
        rows, columns = self.rows.stop - self.rows.start, self.high - self.low + 2 * SLACK
        # As much for every block of a request, so that each finds the memory that the one before it has left.
        return np.empty(self.most * (self.keys.count + 2 * SLACK), np.float32)[: rows * columns].reshape(rows, columns)

    def score(self, scores: Array, first: int, last: int) -> None:
        """Fill the columns of positions [first, last); what a row does not see there may be anything."""
        function, heads = compile.scoring(SHORT[dtype_name(self.request.q)], self.request.dims["H"])
        q = self.request.q[self.rows]
        q = q if q.strides[-1] == q.itemsize else np.ascontiguousarray(q)
        count, weights = len(q), np.zeros((len(q), heads), np.float32)
        weights[:, : q.shape[1]] = widen(self.request.weights[self.rows])
        starts, ends = self.starts[self.rows], self.ends[self.rows]
        scratch = compile.scratch(score.scratch_bytes(*q.shape))
        function(
            q.ctypes.data,
            q.strides[0],
            q.strides[1],
            weights.ctypes.data,
            self.keys.pages.ctypes.data,
            self.keys.page_size,
            self.keys.stride,
            self.keys.scales[first - self.keys.low :].ctypes.data,
            count,
            q.shape[1],
            q.shape[2],
            first,
            last,
            starts.ctypes.data,
            ends.ctypes.data,
            scores[:, first - self.low :].ctypes.data,
            scores.shape[1],
            scratch.ctypes.data,
        )


# finish(block, its scores, which of their rows comes first, the rows of the call) once, or in parts.
Finish: TypeAlias = Callable[["Block", Array, int, slice], None]


def _run(request: Scored, finish: Finish) -> None:
    """Score every block of rows, and finish it."""
    workers = settings.threads()
    compile.scoring(SHORT[dtype_name(request.q)], request.dims["H"])
    compile.selecting()
    blocks = list(_blocks(request, workers))
    if len(blocks) >= workers:

        def whole(block: Block) -> None:
            scores = block.empty_scores()
            block.score(scores, block.low, block.high)
            finish(block, scores, 0, block.rows)

        settings.run_all(whole, blocks, workers)
        return
    for block in blocks:  # a decode step: the workers share its keys, then its rows
        _shared(block, finish, workers)


def _shared(block: Block, finish: Finish, workers: int) -> None:
    scores = block.empty_scores()
    step = -(-(block.high - block.low) // (PARTS * workers * score.TILE)) * score.TILE

    def part(first: int) -> None:
        block.score(scores, first, min(first + step, block.high))

    def row(number: int) -> None:
        finish(block, scores, number - block.rows.start, slice(number, number + 1))

    settings.run_all(part, range(block.low, block.high, step), workers)
    settings.run_all(row, range(block.rows.start, block.rows.stop), workers)


def _blocks(request: Scored, workers: int) -> Iterator[Block]:
    """Blocks whose scores fit half the memory for each worker; one row always goes, as its scores cannot be split."""
    starts, ends = (np.ascontiguousarray(a, np.int32) for a in request.batch.key_range(request.dims["Tq"]))
    cu_seqlens_q = np.asarray(request.batch.cu_seqlens_q)
    for owner in range(request.batch.num_requests):
        row, stop = int(cu_seqlens_q[owner]), int(cu_seqlens_q[owner + 1])
        low = int(starts[row:stop].min(initial=2**31 - 1))
        high = int(ends[row:stop].max(initial=0))
        if low >= high:
            continue
        keys = Keys(request, owner, low, high)
        step = max(1, min(ROWS, settings.memory() // (8 * workers * (high - low))))
        for first in range(row, stop, step):
            block = Block(request, keys, slice(first, min(first + step, stop)), step, starts, ends)
            if block.low < block.high:
                yield block
