"""lightning_index on the CPU: tiles of 8 rows x 1,024 keys are scored in float32, then each row is selected exactly."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.backends.cpu import settings
from dsa_portable.backends.cpu.rows import index_keys, places, widen
from dsa_portable.operators.lightning_index import IndexRequest

Array: TypeAlias = np.ndarray[Any, Any]

ROWS, KEYS = 8, 1024  # scores of all heads of one tile stay in the second-level cache


def lightning_index(request: IndexRequest) -> Array | tuple[Array, Array]:
    """Indices, or (indices, scores) with `return_scores`; see dsa_portable.lightning_index."""
    settings.check()  # before anything is written
    indices, scores = _results(request)
    indices[:] = -1
    if scores is not None:
        scores[:] = -np.inf
    starts, ends = (np.asarray(a) for a in request.batch.key_range(request.dims["Tq"]))
    for owner, rows in _chunks(request, ends):
        _select(request, owner, rows, starts, ends, indices, scores)
    return indices if scores is None else (indices, scores)


def _select(
    request: IndexRequest, owner: int, rows: slice, starts: Array, ends: Array, indices: Array, scores: Array | None
) -> None:
    """Fill the rows of one chunk; a function of its own, so that its scores are gone before the next chunk's are made."""
    low, high = int(starts[rows].min()), int(ends[rows].max())
    if low >= high:
        return
    found = _score(request, owner, rows, starts, ends, low, high)

    def select(i: int) -> None:
        row = rows.start + i
        visible = found[i, starts[row] - low : max(starts[row], ends[row]) - low]
        chosen = top(visible, request.topk)
        indices[row, : len(chosen)] = chosen + starts[row]
        if scores is not None:
            scores[row, : len(chosen)] = visible[chosen]

    settings.run_all(select, range(rows.stop - rows.start), settings.threads())


def _results(request: IndexRequest) -> tuple[Array, Array | None]:
    arrays = request.out or tuple(np.empty(shape, dtype) for dtype, shape in request.results.values())
    return arrays[0], arrays[1] if request.return_scores else None


def _chunks(request: IndexRequest, ends: Array) -> Iterator[tuple[int, slice]]:
    """(request, rows) whose float32 scores fit half the memory; one row always goes, as its scores cannot be split."""
    cu_seqlens_q = np.asarray(request.batch.cu_seqlens_q)
    for owner in range(request.batch.num_requests):
        row, stop = int(cu_seqlens_q[owner]), int(cu_seqlens_q[owner + 1])
        while row < stop:
            widest = max(1, int(ends[row:stop].max()))
            step = min(stop - row, max(1, settings.memory() // (8 * widest)))
            yield owner, slice(row, row + step)
            row += step


def _score(request: IndexRequest, owner: int, rows: slice, starts: Array, ends: Array, low: int, high: int) -> settings.Float32:
    """float32 [rows, high - low]: scores of the positions from `low` on; places no row of a tile sees stay unset."""
    engine = settings.engine()
    found = np.empty((rows.stop - rows.start, high - low), np.float32)
    # With small heads or few of them a tile takes more rows or keys; with many it must not outgrow the memory.
    keys_per_tile = max(64, min(KEYS, settings.memory() // (16 * ROWS * request.dims["H"] * settings.threads())))

    def tile(first: int) -> None:
        last = min(first + keys_per_tile, high)
        where = places(request.batch, owner, np.arange(first, last))
        keys, scales = index_keys(request.k, request.k_scale, request.k_layout, where)
        for begin in range(rows.start, rows.stop, ROWS):
            block = slice(begin, min(begin + ROWS, rows.stop))
            if int(starts[block].min()) >= last or int(ends[block].max()) <= first:
                continue
            found[block.start - rows.start : block.stop - rows.start, first - low : last - low] = engine.index_scores(
                widen(request.q[block]), keys, widen(request.weights[block]), scales
            )

    settings.run_all(tile, range(low, high, keys_per_tile), 1 if engine.threads_itself else settings.threads())
    return found


def top(scores: settings.Float32, topk: int) -> Array:
    """Ascending positions of the topk largest, of equal ones at the boundary the lowest; -0.0 equals +0.0, and NaN is last."""
    count = len(scores)
    if count <= topk:
        return np.arange(count)
    keys = np.where(np.isnan(scores), np.float32(-np.inf), scores)
    threshold = np.partition(keys, count - topk)[count - topk]
    above = keys > threshold
    ties = np.flatnonzero(keys == threshold)[: topk - int(above.sum())]
    above[ties] = True
    return np.flatnonzero(above)
