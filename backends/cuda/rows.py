"""What both operators' launches share: which rows and keys belong together, how a cache is addressed, results and scratch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from dsa_portable.arrays import beside, on_host
from dsa_portable.backends.cuda.configurations import FIND
from dsa_portable.backends.cuda.kernels.rows import find_rows
from dsa_portable.backends.cuda.launch import capturing, launch, scratch
from dsa_portable.batch import Batch
from dsa_portable.contract import Request
from dsa_portable.errors import InvalidArgument
from dsa_portable.formats import layout

# Scratch of one call in bytes. hopper.md 3: below 512 MiB the selection of few rows at a time leaves the chip idle.
VARIABLE, SCRATCH = "DSA_CUDA_SCRATCH", 512 << 20


class Rows(NamedTuple):
    """A batch beside q, as kernels take it: int32 arrays; `owner` of each row (num_requests for padding), keys start to end."""

    owner: torch.Tensor
    start: torch.Tensor | None
    end: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor | None
    block_table: torch.Tensor | None
    table_stride: int
    page_size: int  # 0 for flat keys


class Part(NamedTuple):
    """One part of a cache: number i of a token is at first + page * page_stride + slot * slot_stride + i."""

    numbers: torch.Tensor | None
    first: int
    page_stride: int
    slot_stride: int


NO_PART = Part(None, 0, 0, 0)


def find(batch: Batch, q: torch.Tensor, *, visible: bool) -> Rows:
    """Who owns each row and which keys it has: those it sees, or all of its request; the batch is put beside q if need be."""
    if capturing() and any(array is not None and on_host(array) for array in batch.flatten()[0]):
        raise InvalidArgument(
            "the batch holds host arrays, but this stream is being captured into a graph, which would replay them as they are; "
            "put the batch on the device."
        )
    rows = q.shape[0]
    owner, end, *seen = scratch(q, torch.int32, 3 if visible else 2, rows)
    start = seen[0] if visible else None
    # Kernels index these as memory: a view of every other element is copied.
    cu_seqlens_q, seqlens_k = (beside(array, q).contiguous() for array in (batch.cu_seqlens_q, batch.seqlens_k))
    bounds: list[torch.Tensor | None] = [None, None]
    if visible and batch.key_start is not None:
        bounds = [beside(array, q).contiguous() for array in (batch.key_start, batch.key_end)]
    launch(
        find_rows,
        (-(-rows // FIND.blocks["ROWS"]),),
        FIND,
        cu_seqlens_q,
        seqlens_k,
        *bounds,
        owner,
        start,
        end,
        rows,
        batch.num_requests,
        CAUSAL=visible and batch.causal,
    )
    shared = (owner, start, end, cu_seqlens_q)
    if batch.block_table is None:
        return Rows(*shared, beside(batch.cu_seqlens_k, q).contiguous(), None, 0, 0)
    table = beside(batch.block_table, q).contiguous()
    return Rows(*shared, None, table, table.stride(0), int(batch.page_size or 0))


def parts_of(cache: torch.Tensor, layout_name: str | None, axes: int = 1) -> dict[str, Part]:
    """The parts of a cache; of one dtype, with `axes` axes per token, it is all `values`.

    Read in place where it is contiguous and begins where a 16-byte load can; any other view is copied, in every call.
    """
    if not cache.is_contiguous() or cache.data_ptr() % 16:
        cache = cache.clone(memory_format=torch.contiguous_format)
    if layout_name is None:
        token = cache.shape[-1] if axes else 1
        page = cache.shape[1] * token if cache.ndim - axes == 2 else 0
        return {"values": Part(cache, 0, page, token)}
    page_size = cache.shape[1] if cache.ndim == 3 else 1
    return {
        part: Part(cache.view(-1).view(getattr(torch, dtype)), *address)
        for part, (dtype, *address) in layout(layout_name).addresses(page_size).items()
    }


def results_of(request: Request, q: torch.Tensor) -> list[torch.Tensor]:
    """Where kernels write: the caller's arrays where they are contiguous, else new ones that `deliver` copies there."""
    given = request.out or (None,) * len(request.results)
    empty = partial(torch.empty, device=q.device)
    return [
        array if array is not None and array.is_contiguous() else empty(shape, dtype=getattr(torch, dtype))
        for array, (dtype, shape) in zip(given, request.results.values(), strict=True)
    ]


def deliver(request: Request, results: list[torch.Tensor]) -> Any:
    """The operator's return value; what could not be written in place goes there now."""
    for given, written in zip(request.out or (), results, strict=False):
        if given is not written:
            given.copy_(written)
    return tuple(results) if len(results) > 1 else results[0]


def scratch_bytes() -> int:
    """`DSA_CUDA_SCRATCH` in bytes, 512 MiB by default. Raises InvalidArgument for what is no count of bytes."""
    text = os.environ.get(VARIABLE) or str(SCRATCH)
    if not text.isdecimal() or int(text) < 1:
        raise InvalidArgument(f"{VARIABLE} is {text!r}, but a whole number of bytes is accepted; set one or unset it.")
    return int(text)


@contextmanager
def asking_for(operator: str, size: int) -> Iterator[None]:
    """Turn a failed allocation of scratch into a message that says how much, and what lowers it."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as exc:
        raise torch.cuda.OutOfMemoryError(
            f"{operator}: {size} bytes of scratch could not be allocated; set {VARIABLE} (bytes, now {scratch_bytes()}) lower."
        ) from exc
