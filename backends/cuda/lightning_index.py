"""lightning_index in Triton: a slab of rows is scored into bounded scratch, then selected exactly, slab by slab."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dsa_portable.arrays import dtype_name
from dsa_portable.backends.cuda import configurations, device
from dsa_portable.backends.cuda.kernels.lightning_index import score_row, score_rows
from dsa_portable.backends.cuda.kernels.top_k import bound_rows, count_parts, pick_rows, scan_parts
from dsa_portable.backends.cuda.launch import launch, scratch
from dsa_portable.backends.cuda.plan import execute
from dsa_portable.backends.cuda.rows import NO_PART, Part, Rows, asking_for, find, parts_of, scratch_bytes
from dsa_portable.operators.lightning_index import IndexRequest


def lightning_index(request: IndexRequest) -> Any:
    """Indices, or (indices, scores) with `return_scores`; see dsa_portable.lightning_index."""
    q = request.q.contiguous()
    device.require(q, "lightning_index")
    with device.of(q):
        return execute(request, q, _index)


def _index(request: IndexRequest, q: torch.Tensor, results: list[torch.Tensor]) -> None:
    if not len(q):
        return
    # What is refused is refused before the first kernel runs.
    cache, allowed = _cache(request), scratch_bytes()
    rows, longest = find(request.batch, q, visible=True), max(1, request.batch.max_seqlen_k)
    # Triton proves the alignment of strides that 16 divides; the selection reads to the end of a block, and one block ahead.
    stride = -(-longest // 16) * 16
    slab = max(1, min(len(q), allowed // (4 * stride)))
    size = slab * stride + 2 * configurations.scan(device.architecture(q.device)).blocks["BLOCK"]
    with asking_for("lightning_index", 4 * size):
        logits = scratch(q, torch.float32, size)[: slab * stride].view(slab, stride)
    capacity, parts = configurations.capacity(request.topk), configurations.scan_parts(slab)
    with asking_for("lightning_index", slab * (8 * capacity + 4 * parts + 4)):
        kept = _Kept(
            scratch(q, torch.int64, slab, capacity), scratch(q, torch.int32, slab, parts), scratch(q, torch.float32, slab)
        )
    for first in range(0, len(q), slab):
        last = min(first + slab, len(q))
        _score(request, q, cache, rows, logits, first, last)
        _select(request, rows, logits, kept, results, first, last)


class _Kept(NamedTuple):
    """Of each row: its candidates, how many each part of it has, and what they reach."""

    candidates: torch.Tensor
    counts: torch.Tensor
    bound: torch.Tensor


def _cache(request: IndexRequest) -> dict[str, Part]:
    cache = parts_of(request.k, request.k_layout)
    if request.k_scale is not None:
        cache["scale"] = parts_of(request.k_scale, None, axes=0)["values"]
    return cache


def _score(
    request: IndexRequest, q: torch.Tensor, cache: dict[str, Part], rows: Rows, logits: torch.Tensor, first: int, last: int
) -> None:
    architecture, name = device.architecture(q.device), dtype_name(q)
    decode = name == "float8_e4m3fn" and not configurations.native_fp8(architecture)
    configuration = configurations.score(architecture, name, request.dims["H"], request.batch.max_seqlen_q)
    k, scale, blocks = cache["values"], cache.get("scale", NO_PART), configuration.blocks
    assert k.numbers is not None
    keys = blocks["BLOCK_K"] * blocks.get("TILES", 1)
    launch(
        score_row if "TILES" in blocks else score_rows,
        (-(-logits.stride(0) // keys), -(-(last - first) // blocks.get("ROWS", 1))),
        configuration,
        q.view(torch.uint8) if decode else q,
        request.weights.contiguous(),
        k.numbers.view(torch.uint8) if decode else k.numbers,
        scale.numbers,
        rows.owner,
        rows.start,
        rows.end,
        rows.cu_seqlens_q,
        rows.cu_seqlens_k,
        rows.block_table,
        logits,
        first,
        last,
        request.batch.num_requests,
        rows.table_stride,
        rows.page_size,
        k.page_stride,
        scale.first,
        scale.page_stride,
        logits.stride(0),
        HEADS=request.dims["H"],
        HEAD_DIM=request.dims["D"],
        K_SLOT=k.slot_stride,
        SCALE_SLOT=scale.slot_stride,
        DECODE_E4M3=decode,
    )


def _select(
    request: IndexRequest, rows: Rows, logits: torch.Tensor, kept: _Kept, results: list[torch.Tensor], first: int, last: int
) -> None:
    count, architecture = last - first, device.architecture(logits.device)
    candidates, counts, bound = kept
    capacity, parts = candidates.shape[1], counts.shape[1]
    seen = (logits, rows.start, rows.end)
    where = (first, logits.stride(0), request.topk)
    scan, pick = configurations.scan(architecture), configurations.pick(capacity)
    launch(bound_rows, (count,), configurations.BOUND, *seen, bound, *where, CAPACITY=capacity)
    if parts > 1:
        launch(count_parts, (count, parts), scan, *seen, bound, counts, *where, PARTS=parts)
    launch(scan_parts, (count, parts), scan, *seen, bound, counts, candidates, *where, PARTS=parts, CAPACITY=capacity)
    scores = results[1] if request.return_scores else None
    launch(pick_rows, (count,), pick, *seen, counts, candidates, results[0], scores, *where, PARTS=parts, CAPACITY=capacity)
