"""index_scores on the CPU: tiles of 8 rows x 512 keys are scored in float32; lightning_index scores with it too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.backends.cpu import settings
from dsa_portable.backends.cpu.rows import index_keys, places, widen
from dsa_portable.operators.common import Scored
from dsa_portable.operators.index_scores import ScoresRequest

Array: TypeAlias = np.ndarray[Any, Any]

# Scores of all heads of one tile stay in the second-level cache, and little of a tile lies behind what causal rows see.
ROWS, KEYS = 8, 512


def index_scores(request: ScoresRequest) -> Array:
    """Scores; see dsa_portable.index_scores."""
    settings.check()  # before anything is written
    if own := settings.own("index_scores"):
        found: Array = own(request)
        return found
    (scores,) = request.out or (np.empty(shape, dtype) for dtype, shape in request.results.values())
    scores[:] = -np.inf
    starts, ends = (np.asarray(a) for a in request.batch.key_range(request.dims["Tq"]))
    for owner, rows in chunks(request, ends):
        _fill(request, owner, rows, starts, ends, scores)
    return scores


def _fill(request: ScoresRequest, owner: int, rows: slice, starts: Array, ends: Array, scores: Array) -> None:
    low, high = int(starts[rows].min()), int(ends[rows].max())
    if low >= high:
        return
    found = score(request, owner, rows, starts, ends, low, high)
    for i, row in enumerate(range(rows.start, rows.stop)):
        scores[row, starts[row] : ends[row]] = found[i, starts[row] - low : max(starts[row], ends[row]) - low]


def chunks(request: Scored, ends: Array) -> Iterator[tuple[int, slice]]:
    """(request, rows) whose float32 scores and q fit half the memory each; one row always goes, its scores cannot be split."""
    per_row = 4 * request.dims["H"] * request.dims["D"]
    cu_seqlens_q = np.asarray(request.batch.cu_seqlens_q)
    for owner in range(request.batch.num_requests):
        row, stop = int(cu_seqlens_q[owner]), int(cu_seqlens_q[owner + 1])
        while row < stop:
            widest = max(1, int(ends[row:stop].max()))
            step = min(stop - row, max(1, settings.memory() // (2 * max(4 * widest, per_row))))
            yield owner, slice(row, row + step)
            row += step


def score(request: Scored, owner: int, rows: slice, starts: Array, ends: Array, low: int, high: int) -> settings.Float32:
    """float32 [rows, high - low]: scores of the positions from `low` on; places no row of a tile sees stay unset."""
    engine = settings.engine()
    found = np.empty((rows.stop - rows.start, high - low), np.float32)
    # With small heads or few of them a tile takes more rows or keys; with many it must not outgrow the memory.
    keys_per_tile = max(64, min(KEYS, settings.memory() // (16 * ROWS * request.dims["H"] * settings.threads())))

    q, weights = np.empty((len(found), *request.q.shape[1:]), np.float32), widen(request.weights[rows])

    def widen_block(first: int) -> None:
        q[first : first + ROWS] = widen(request.q[rows.start + first : min(rows.start + first + ROWS, rows.stop)])

    def tile(first: int) -> None:
        last = min(first + keys_per_tile, high)
        where = places(request.batch, owner, np.arange(first, last))
        keys, scales = index_keys(request.k, request.k_scale, request.k_layout, where)
        for begin in range(rows.start, rows.stop, ROWS):
            block = slice(begin, min(begin + ROWS, rows.stop))
            if int(starts[block].min()) >= last or int(ends[block].max()) <= first:
                continue
            mine = slice(block.start - rows.start, block.stop - rows.start)
            found[mine, first - low : last - low] = engine.index_scores(q[mine], keys, weights[mine], scales)

    settings.run_all(widen_block, range(0, len(found), ROWS), settings.threads())
    settings.run_all(tile, range(low, high, keys_per_tile), 1 if engine.threads_itself else settings.threads())
    return found
