"""index_select on the CPU: each row is selected exactly, by partition; lightning_index selects with the same function."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from dsa_portable.backends.cpu import settings
from dsa_portable.operators.index_select import SelectRequest

Array: TypeAlias = np.ndarray[Any, Any]


def index_select(request: SelectRequest) -> Array:
    """Indices; see dsa_portable.index_select."""
    settings.check()  # before anything is written
    if own := settings.own("index_select"):
        found: Array = own(request)
        return found
    (indices,) = request.out or (np.empty(shape, dtype) for dtype, shape in request.results.values())
    indices[:] = -1
    starts, ends = (np.asarray(a) for a in request.batch.key_range(request.dims["Tq"]))

    def select(row: int) -> None:
        chosen = top(request.scores[row, starts[row] : ends[row]], request.topk)
        indices[row, : len(chosen)] = chosen + starts[row]

    settings.run_all(select, range(request.dims["Tq"]), settings.threads())
    return indices


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
