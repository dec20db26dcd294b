"""sparse_attend: each row's keys are read where they lie; a decode step with fewer rows than threads shares its heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.arrays import dtype_name
from dsa_portable.backends.cpu import settings
from dsa_portable.backends.cpu.jit import compile
from dsa_portable.backends.cpu.jit.compile import Attending
from dsa_portable.backends.cpu.jit.kernels import attend
from dsa_portable.backends.cpu.rows import attention_rows, places, widen
from dsa_portable.backends.cpu.sparse_attend import valid
from dsa_portable.contract import SHORT
from dsa_portable.operators.sparse_attend import AttendRequest

Array: TypeAlias = np.ndarray[Any, Any]

# Rows of a task: few enough for their float32 outputs to stay in the second-level cache.
ROWS = 4


def sparse_attend(request: AttendRequest) -> Array | tuple[Array, Array]:
    """Output, or (output, lse) with `return_lse`; see dsa_portable.sparse_attend."""
    arrays = request.out or tuple(
        np.empty(shape, request.q.dtype if dtype != "float32" else np.float32) for dtype, shape in request.results.values()
    )
    out = arrays[0] if arrays[0].strides[-1] == arrays[0].itemsize else np.empty(arrays[0].shape, arrays[0].dtype)
    format = "f32" if request.kv_layout is not None else SHORT[dtype_name(request.q)]
    kernel = compile.attending(format, request.dims["Dqk"], request.dims["Hq"], SHORT[dtype_name(out)])
    workers = settings.threads()
    lse = arrays[1] if request.return_lse else np.empty(out.shape[:2], np.float32)
    # Padding rows belong to nobody.
    total = int(request.batch.cu_seqlens_q[-1])
    out[total:], lse[total:] = 0, -np.inf
    tasks = [Task(request, kernel, owner, rows, heads) for owner, rows, heads in _tasks(request, kernel, workers)]
    memory = settings.memory() // workers
    settings.run_all(lambda task: task.run(out, lse, memory), tasks, workers)
    if out is not arrays[0]:
        arrays[0][:] = out
    return (arrays[0], lse) if request.return_lse else arrays[0]


def _tasks(request: AttendRequest, kernel: Attending, workers: int) -> Iterator[tuple[int, slice, slice]]:
    """(request, rows, heads) of each task."""
    cu_seqlens_q, heads = np.asarray(request.batch.cu_seqlens_q), request.dims["Hq"]
    total = int(cu_seqlens_q[-1])
    step = max(1, min(ROWS, total // workers))
    group = attend.padded(1, kernel.vectors)
    parts = 1 if total >= workers else min(-(-heads // group), -(-workers // max(1, total)))
    width = -(-heads // (group * parts)) * group
    for owner in range(request.batch.num_requests):
        first, stop = int(cu_seqlens_q[owner]), int(cu_seqlens_q[owner + 1])
        for row in range(first, stop, step):
            for head in range(0, heads, width):
                yield owner, slice(row, min(row + step, stop)), slice(head, min(head + width, heads))


@dataclass(frozen=True)
class Task:
    """Some rows of a request, and some of their heads."""

    request: AttendRequest
    kernel: Attending
    owner: int
    rows: slice
    heads: slice

    def run(self, out: Array, lse: Array, memory: int) -> None:
        """Fill the rows and heads of `out` and `lse`."""
        request, count = self.request, self.rows.stop - self.rows.start
        heads, dim, value_dim = self.heads.stop - self.heads.start, request.dims["Dqk"], request.value_dim
        wide, columns = (attend.padded(n, self.kernel.vectors) for n in (heads, value_dim))
        sums, needed = 4 * count * wide * columns, attend.scratch_bytes(request.indices.shape[1], heads, dim, value_dim)
        scratch = compile.scratch(sums + needed)
        acc, scratch = scratch[:sums].view(np.float32).reshape(count, wide, columns), scratch[sums:]
        tops, totals = (np.empty((count, wide), np.float32) for _ in range(2))
        q = request.q[self.rows, self.heads]
        q = q if request.kv_layout is None else widen(q)
        q = q if q.strides[-1] == q.itemsize else np.ascontiguousarray(q)

        def call(row: int, rows: int, indices: Array, counts: Array, keys: Keys, fresh: bool = True) -> None:
            self.kernel.attend(
                q[row:].ctypes.data,
                q.strides[0],
                q.strides[1],
                indices.ctypes.data,
                indices.strides[0],
                counts.ctypes.data,
                keys.count,
                keys.pages.ctypes.data,
                keys.page_size,
                keys.stride,
                rows,
                heads,
                dim,
                value_dim,
                request.softmax_scale,
                acc[row:].ctypes.data,
                tops[row:].ctypes.data,
                totals[row:].ctypes.data,
                fresh,
                scratch.ctypes.data,
            )

        if (keys := _in_place(request, self.owner)) is not None:
            indices = request.indices[self.rows]
            indices = indices if indices.strides[-1] == 4 else np.ascontiguousarray(indices)
            counts = np.full(count, indices.shape[1], np.int32)
            if request.topk_length is not None:
                counts = np.minimum(counts, np.maximum(request.topk_length[self.rows], 0).astype(np.int32))
            call(0, count, indices, counts, keys)
        else:
            for i in range(count):
                self._copied(i, call, memory)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            factors, lse[self.rows, self.heads] = self._factors(tops, totals, heads)
        target = out[self.rows, self.heads]
        self.kernel.finish(
            acc.ctypes.data,
            factors.ctypes.data,
            count,
            heads,
            value_dim,
            target.ctypes.data,
            target.strides[0],
            target.strides[1],
        )

    def _copied(self, i: int, call: Any, memory: int) -> None:
        """Attend a row whose keys are packed, or whose numbers lie apart: copied, as many at a time as fit the memory."""
        request = self.request
        positions = valid(request, self.rows.start + i, self.owner)
        step = max(64, memory // (16 * request.dims["Dqk"]))
        if not len(positions):
            call(i, 1, np.empty((1, 0), np.int32), np.zeros(1, np.int32), Keys(0, np.zeros(1, np.int64), 1, 0))
        for first in range(0, len(positions), step):
            where = places(request.batch, self.owner, positions[first : first + step])
            if request.kv_layout is not None:
                kv = attention_rows(request.kv, request.kv_layout, where)
            else:
                kv = np.ascontiguousarray(request.kv[where])
            indices, pages = np.arange(len(kv), dtype=np.int32), np.array([kv.ctypes.data], np.int64)
            keys = Keys(len(kv), pages, 1 << 40, kv.strides[0])
            call(i, 1, indices, np.array([len(kv)], np.int32), keys, first == 0)

    def _factors(self, tops: Array, totals: Array, heads: int) -> tuple[Array, Array]:
        """(what the sums over values are multiplied by, lse) of each row and head; 0 and -inf of a row without keys."""
        none = totals == 0
        lse = np.where(none, np.float32(-np.inf), tops + np.log(totals))
        factors = 1 / totals
        if self.request.attn_sink is not None:
            # The larger of the two is subtracted: exp(sink - top) overflows beyond 88, and out would be exactly 0 where keys
            # still have a share. inf - inf is NaN, so a sink of +inf becomes the largest number: it leaves as little.
            sink = np.full(tops.shape[1], -np.inf, np.float32)
            sink[:heads] = np.minimum(self.request.attn_sink[self.heads], np.finfo(np.float32).max)
            largest = np.maximum(tops, sink)
            kept = np.exp(tops - largest)
            factors = kept / (totals * kept + np.exp(sink - largest))
        return np.where(none, np.float32(0), factors).astype(np.float32), lse[:, :heads]


@dataclass(frozen=True)
class Keys:
    """Where a request's keys lie, as the kernel takes it."""

    count: int
    pages: Array
    page_size: int
    stride: int


def _in_place(request: AttendRequest, owner: int) -> Keys | None:
    """A request's keys where they lie; None where they have to be copied."""
    batch, kv = request.batch, request.kv
    if request.kv_layout is not None or kv.strides[-1] != kv.itemsize:
        return None
    count = int(batch.seqlens_k[owner])
    if batch.block_table is None:
        assert batch.cu_seqlens_k is not None
        begin = kv.ctypes.data + int(batch.cu_seqlens_k[owner]) * kv.strides[0]
        return Keys(count, np.array([begin], np.int64), 1 << 40, kv.strides[0])
    assert batch.page_size is not None
    table = batch.block_table[owner, : -(-count // batch.page_size)]
    return Keys(count, kv.ctypes.data + table.astype(np.int64) * kv.strides[0], batch.page_size, kv.strides[1])
