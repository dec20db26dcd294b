"""lightning_index on npu_lightning_indexer and npu_quant_lightning_indexer: values first there, ascending positions here."""

from __future__ import annotations

from typing import Any

import torch

from dsa_portable.backends.ascend import constraints, device, vendor
from dsa_portable.backends.ascend.rows import requests_of, slots_of
from dsa_portable.backends.ascend.schemas import LIGHTNING_INDEXER, QUANT_LIGHTNING_INDEXER
from dsa_portable.operators.lightning_index import IndexRequest


def lightning_index(request: IndexRequest) -> Any:
    """Indices, or (indices, scores) with `return_scores`; see dsa_portable.lightning_index."""
    q = request.q.contiguous()
    k = request.k.contiguous()
    _, end = request.batch.key_range(len(q))
    if len(q) and k.numel():
        chosen = _chosen(request, q, k)
        # Behind the visible keys the vendor may name masked ones, and never says which: they are cut off by position.
        visible = (chosen >= 0) & (chosen < end[:, None])
        ascending = torch.sort(torch.where(visible, chosen, vendor.INT_MAX), dim=1).values
        indices = torch.where(ascending < vendor.INT_MAX, ascending, -1)
    else:
        indices = torch.full((len(q), request.topk), -1, dtype=torch.int32, device=q.device)
    results = (indices, _scores(request, q, k, indices)) if request.return_scores else (indices,)
    return device.deliver(request, results)


def _chosen(request: IndexRequest, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """int32 [Tq, topk], as the vendor returns them: by descending score."""
    requests = requests_of(request.batch, q, k.shape[0])
    operator = LIGHTNING_INDEXER if request.k_scale is None else QUANT_LIGHTNING_INDEXER
    count = _count(operator, request.topk)
    arguments = {
        "query": q,
        "key": k.unsqueeze(-2),
        "weights": request.weights.contiguous(),
        "actual_seq_lengths_query": requests.query_ends,
        "actual_seq_lengths_key": requests.keys,
        "block_table": requests.block_table,
        "layout_query": "TND",
        "layout_key": requests.layout,
        "sparse_count": count,
        "sparse_mode": 3 if request.batch.causal else 0,
    }
    if request.k_scale is None:
        found = vendor.call(operator, **arguments)[0]
    else:
        scale = request.k_scale.contiguous()
        # The queries' scale lies in the weights already.
        ones = torch.ones(q.shape[:2], dtype=scale.dtype, device=q.device)
        scales = {"query_dequant_scale": ones, "key_dequant_scale": scale.unsqueeze(-1)}
        found = vendor.call(operator, **arguments, **scales, query_quant_mode=0, key_quant_mode=0)
    best: torch.Tensor = found.reshape(len(q), count)[:, : request.topk]
    return best


def _count(operator: str, topk: int) -> int:
    """The least count that the vendor takes and that is not below topk; sorted by score, the first of more are the best."""
    counts = constraints.accepted(operator, "sparse_count", device.product())
    return next((count for count in (topk, *range(3072, 8193, 1024)) if count >= topk and count in counts), topk)


def _scores(request: IndexRequest, q: torch.Tensor, k: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """float32 [Tq, topk], computed again for the chosen keys alone: the vendor has none for pages, nor for quantised keys."""
    slots = slots_of(request.batch, indices)
    flat, width = k.reshape(-1, k.shape[-1]), indices.shape[1]
    scale = None if request.k_scale is None else request.k_scale.reshape(-1)
    per_row = width * (4 * flat.shape[1] + 8 * q.shape[1])
    parts = []
    for first, last in device.slabs(len(q), per_row):
        place = torch.clamp(slots[first:last], min=0).reshape(-1)
        keys = torch.index_select(flat, 0, place).reshape(last - first, width, -1).to(torch.float32)
        dots = torch.relu(torch.matmul(keys, q[first:last].to(torch.float32).transpose(1, 2)))
        weights = request.weights[first:last].to(torch.float32)
        score = torch.matmul(dots, weights.unsqueeze(2)).squeeze(2)
        if scale is not None:
            score = score * torch.index_select(scale, 0, place).reshape(last - first, width).to(torch.float32)
        parts.append(torch.where(slots[first:last] < 0, float("-inf"), score))
    return torch.cat(parts) if parts else torch.empty((0, width), dtype=torch.float32, device=q.device)
