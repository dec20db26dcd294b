"""lightning_index on the CPU: a chunk of rows is scored in float32, then each row is selected exactly, as its two parts do."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from dsa_portable.backends.cpu import settings
from dsa_portable.backends.cpu.index_scores import chunks, score
from dsa_portable.backends.cpu.index_select import top
from dsa_portable.operators.lightning_index import IndexRequest

Array: TypeAlias = np.ndarray[Any, Any]


def lightning_index(request: IndexRequest) -> Array | tuple[Array, Array]:
    """Indices, or (indices, scores) with `return_scores`; see dsa_portable.lightning_index."""
    settings.check()  # before anything is written
    if own := settings.own("lightning_index"):
        found: Array | tuple[Array, Array] = own(request)
        return found
    indices, scores = _results(request)
    indices[:] = -1
    if scores is not None:
        scores[:] = -np.inf
    starts, ends = (np.asarray(a) for a in request.batch.key_range(request.dims["Tq"]))
    for owner, rows in chunks(request, ends):
        _select(request, owner, rows, starts, ends, indices, scores)
    return indices if scores is None else (indices, scores)


def _select(
    request: IndexRequest, owner: int, rows: slice, starts: Array, ends: Array, indices: Array, scores: Array | None
) -> None:
    """Fill the rows of one chunk; a function of its own, so that its scores are gone before the next chunk's are made."""
    low, high = int(starts[rows].min()), int(ends[rows].max())
    if low >= high:
        return
    found = score(request, owner, rows, starts, ends, low, high)

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
