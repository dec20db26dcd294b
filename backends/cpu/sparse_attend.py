"""sparse_attend on the CPU: a query row's selected keys are gathered and widened, then attended by all heads in float32."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from dsa_portable.backends.cpu import settings
from dsa_portable.backends.cpu.rows import attention_rows, places, widen
from dsa_portable.request import AttendRequest

Array: TypeAlias = np.ndarray[Any, Any]


def sparse_attend(request: AttendRequest) -> Array | tuple[Array, Array]:
    """Output, or (output, lse) with `return_lse`; see dsa_portable.sparse_attend."""
    settings.check()  # before anything is written
    arrays = request.out or tuple(np.empty(shape, _dtype(request, dtype)) for dtype, shape in request.results.values())
    owners = np.asarray(request.batch.request_of_row(request.dims["Tq"]))
    engine = settings.engine()
    workers = 1 if engine.threads_itself else settings.threads()

    def attend(row: int) -> None:
        out, lse = _row(request, engine, row, int(owners[row]), settings.memory() // workers)
        arrays[0][row] = out.astype(arrays[0].dtype)
        if request.return_lse:
            arrays[1][row] = lse

    with np.errstate(over="ignore"):
        settings.run_all(attend, range(request.dims["Tq"]), workers)
    return (arrays[0], arrays[1]) if request.return_lse else arrays[0]


def _dtype(request: AttendRequest, name: str) -> Any:
    return request.q.dtype if name != "float32" else np.float32


def _row(request: AttendRequest, engine: settings.Engine, row: int, owner: int, memory: int) -> tuple[Array, Array]:
    positions = _valid(request, row, owner)
    heads, width = request.dims["Hq"], request.dims["Dqk"]
    out = np.zeros((heads, request.value_dim), np.float32)
    lse = np.full(heads, -np.inf, np.float32)
    if not len(positions):
        return out, lse
    q = widen(request.q[row])
    step = max(64, memory // (8 * (3 * width + 3 * heads)))
    for first in range(0, len(positions), step):
        where = places(request.batch, owner, positions[first : first + step])
        kv = attention_rows(request.kv, request.kv_layout, where)
        part, part_lse = engine.attend(q, kv, request.softmax_scale, request.value_dim)
        if first == 0:
            out, lse = part, part_lse
            continue
        total = np.logaddexp(lse, part_lse)
        out = out * np.exp(lse - total)[:, None] + part * np.exp(part_lse - total)[:, None]
        lse = total
    if request.attn_sink is not None:
        # exp overflows to inf where the sink outweighs every key, and 1 / inf is the 0 it should be.
        with np.errstate(over="ignore"):
            out = out * (1 / (1 + np.exp(request.attn_sink - lse)))[:, None]
    return out, lse


def _valid(request: AttendRequest, row: int, owner: int) -> Array:
    """The row's positions that count, in order; none for a padding row."""
    if owner < 0:
        return np.empty(0, np.int64)
    limit = request.dims["topk"] if request.topk_length is None else max(0, int(request.topk_length[row]))
    positions = request.indices[row, :limit].astype(np.int64)
    return np.asarray(positions[(positions >= 0) & (positions < int(request.batch.seqlens_k[owner]))])
