"""sparse_attend on the CPU: a query row's selected keys are gathered and widened, then attended by all heads in float32."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from dsa_portable.backends.cpu import settings
from dsa_portable.backends.cpu.rows import attention_rows, places, widen
from dsa_portable.operators.sparse_attend import AttendRequest

Array: TypeAlias = np.ndarray[Any, Any]

# Matrix libraries give a product of one row other bits than the same row among others, and fewer heads gain little.
LEAST_HEADS = 16


def sparse_attend(request: AttendRequest) -> Array | tuple[Array, Array]:
    """Output, or (output, lse) with `return_lse`; see dsa_portable.sparse_attend."""
    settings.check()  # before anything is written
    if own := settings.own("sparse_attend"):
        found: Array | tuple[Array, Array] = own(request)
        return found
    arrays = request.out or tuple(np.empty(shape, _dtype(request, dtype)) for dtype, shape in request.results.values())
    owners = np.asarray(request.batch.request_of_row(request.dims["Tq"]))
    engine = settings.engine()
    workers = 1 if engine.threads_itself else settings.threads()

    def attend(part: tuple[int, slice]) -> None:
        row, heads = part
        out, lse = _row(request, engine, row, heads, int(owners[row]), settings.memory() // workers)
        arrays[0][row, heads] = out.astype(arrays[0].dtype)
        if request.return_lse:
            arrays[1][row, heads] = lse

    # A decode step with fewer rows than workers shares their heads.
    parts = -(-workers // max(1, request.dims["Tq"]))
    step = max(LEAST_HEADS, -(-request.dims["Hq"] // parts))
    heads = [slice(first, first + step) for first in range(0, request.dims["Hq"], step)]
    settings.run_all(attend, [(row, some) for row in range(request.dims["Tq"]) for some in heads], workers)
    return (arrays[0], arrays[1]) if request.return_lse else arrays[0]


def _dtype(request: AttendRequest, name: str) -> Any:
    return request.q.dtype if name != "float32" else np.float32


def _row(
    request: AttendRequest, engine: settings.Engine, row: int, some: slice, owner: int, memory: int
) -> tuple[Array, Array]:
    """(out, lse) of some heads of a row."""
    positions, q = valid(request, row, owner), widen(request.q[row, some])
    heads, width = q.shape
    if not len(positions):
        return np.zeros((heads, request.value_dim), np.float32), np.full(heads, -np.inf, np.float32)
    # Per key: its row as stored, widened and joined; its logits and probabilities. Powers of two keep exact sums exact.
    step = 1 << (max(64, memory // (4 * (3 * width + 3 * heads))).bit_length() - 1)
    with np.errstate(over="ignore", invalid="ignore"):
        out, top, total = _attend(request, engine, q, owner, positions, step)
        if request.attn_sink is not None:
            # The larger of the two is subtracted: exp(sink - top) overflows beyond 88, and out would be exactly 0 where keys
            # still have a share. inf - inf is NaN, so a sink of +inf becomes the largest number: it leaves as little.
            sink = np.minimum(request.attn_sink[some], np.finfo(np.float32).max)
            largest = np.maximum(top, sink)
            kept = total * np.exp(top - largest)
            out = out * (kept / (kept + np.exp(sink - largest)))[:, None]
        return out, top + np.log(total)


def _attend(
    request: AttendRequest, engine: settings.Engine, q: settings.Float32, owner: int, positions: Array, step: int
) -> tuple[Array, Array, Array]:
    """What `Engine.attend` returns, over all positions, `step` at a time."""
    parts = (
        _part(request, engine, q, places(request.batch, owner, positions[i : i + step])) for i in range(0, len(positions), step)
    )
    out, top, total = next(parts)
    if len(positions) <= step:
        return out, top, total
    out = out * total[:, None]
    for part, part_top, part_total in parts:
        # By largest logit and sum, not by lse: where logits are large, lse has lost the last bits of its logarithm.
        highest = np.maximum(top, part_top)
        old, new = np.exp(top - highest), np.exp(part_top - highest) * part_total
        out = out * old[:, None] + part * new[:, None]
        top, total = highest, total * old + new
    return out / total[:, None], top, total


def _part(
    request: AttendRequest, engine: settings.Engine, q: settings.Float32, where: Array | tuple[Array, Array]
) -> tuple[Array, Array, Array]:
    """What `Engine.attend` returns, over the keys at these places."""
    scale, value_dim = request.softmax_scale, request.value_dim
    if request.kv_layout is not None or not request.kv.flags.c_contiguous:
        return engine.attend(q, attention_rows(request.kv, request.kv_layout, where), scale, value_dim)
    # As rows of one array: of a page by its number.
    rows = where[0].astype(np.int64) * request.kv.shape[1] + where[1] if isinstance(where, tuple) else where
    return engine.attend_rows(q, request.kv.reshape(-1, request.kv.shape[-1]), rows, scale, value_dim)


def valid(request: AttendRequest, row: int, owner: int) -> Array:
    """The row's positions that count, in order; none for a padding row."""
    if owner < 0:
        return np.empty(0, np.int64)
    limit = request.dims["topk"] if request.topk_length is None else max(0, int(request.topk_length[row]))
    positions = request.indices[row, :limit].astype(np.int64)
    return np.asarray(positions[(positions >= 0) & (positions < int(request.batch.seqlens_k[owner]))])
