"""What the vendor's documents say the four operators compute, on CPU tensors: a stand-in for the chip, and nobody's oracle.

Rough edges are the documents' own and kept: indices come by descending score, rows that see fewer keys than asked for name
masked keys too, the first -1 of sparse_indices ends a row, mode 3 hides later positions and reads no more entries than are
visible, lengths of TND are prefix sums without a leading 0, those of PA_BSND plain counts. Sources: op-plugin
docs/zh/custom_APIs, 2026-08.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import torch

Tensor: TypeAlias = torch.Tensor


class _Request(NamedTuple):
    """Query rows `first:last` of the flattened queries, and where the request's keys lie in the flattened keys."""

    first: int
    last: int
    keys: Tensor


def _requests(
    query: Tensor,
    key: Tensor,
    layout_query: str,
    layout_key: str,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    table: Tensor | None,
) -> Iterator[_Request]:
    if layout_query == "TND":
        assert query_lengths is not None, "TND needs actual_seq_lengths_query"
        bounds = [0, *query_lengths.tolist()]
        rows = list(pairwise(bounds))
    else:
        size = query.shape[1]
        lengths = [size] * query.shape[0] if query_lengths is None else query_lengths.tolist()
        rows = [(b * size, b * size + n) for b, n in enumerate(lengths)]
    for b, (first, last) in enumerate(rows):
        yield _Request(first, last, _keys(b, key, layout_key, key_lengths, table))


def _keys(b: int, key: Tensor, layout: str, lengths: Tensor | None, table: Tensor | None) -> Tensor:
    if layout == "PA_BSND":
        assert lengths is not None, "PA_BSND needs lengths of the keys"
        assert table is not None, "PA_BSND needs a block table"
        position = torch.arange(int(lengths[b]))
        return table[b].long()[position // key.shape[1]] * key.shape[1] + position % key.shape[1]
    if layout == "TND":
        assert lengths is not None, "TND needs lengths of the keys"
        return torch.arange(int(lengths[b - 1]) if b else 0, int(lengths[b]))
    size = key.shape[1]
    return b * size + torch.arange(size if lengths is None else int(lengths[b]))


def _visible(request: _Request, row: int, mode: int) -> int:
    count = len(request.keys)
    return count if mode == 0 else max(0, min(count, count - (request.last - request.first) + 1 + row - request.first))


def _select(scores: Tensor, visible: int, count: int) -> tuple[Tensor, Tensor]:
    """(indices, values) by descending score; a masked key's score is -inf, and it is named where nothing better is left."""
    masked = torch.where(torch.arange(len(scores)) < visible, scores, float("-inf"))
    order = torch.sort(masked, descending=True, stable=True)
    size = min(count, len(scores))
    indices, values = torch.full((count,), -1, dtype=torch.int32), torch.full((count,), float("-inf"))
    indices[:size], values[:size] = order.indices[:size].int(), order.values[:size]
    return indices, values


def npu_lightning_indexer(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    *,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_key: Tensor | None = None,
    block_table: Tensor | None = None,
    layout_query: str = "BSND",
    layout_key: str = "BSND",
    sparse_count: int = 2048,
    sparse_mode: int = 3,
    pre_tokens: int = 2**63 - 1,
    next_tokens: int = 2**63 - 1,
    return_value: bool = False,
) -> tuple[Tensor, Tensor]:
    """score = sum_h w_h relu(q_h . k) in float32."""
    flat = key.reshape(-1, key.shape[-1]).float()

    def scores(row: int, keys: Tensor) -> Tensor:
        heads = query.reshape(-1, *query.shape[-2:])[row].float()
        return weights.reshape(-1, heads.shape[0])[row].float() @ torch.relu(heads @ flat[keys].T)

    arguments = (layout_query, layout_key, actual_seq_lengths_query, actual_seq_lengths_key, block_table)
    indices, values = _indexed(query, key, scores, sparse_count, sparse_mode, *arguments)
    return indices, values.to(query.dtype) if return_value else torch.empty(0, dtype=query.dtype)


def npu_quant_lightning_indexer(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    query_dequant_scale: Tensor,
    key_dequant_scale: Tensor,
    query_quant_mode: int,
    key_quant_mode: int,
    *,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_key: Tensor | None = None,
    block_table: Tensor | None = None,
    layout_query: str = "BSND",
    layout_key: str = "BSND",
    sparse_count: int = 2048,
    sparse_mode: int = 3,
    pre_tokens: int = 2**63 - 1,
    next_tokens: int = 2**63 - 1,
    query_dtype: int | None = None,
    key_dtype: int | None = None,
) -> Tensor:
    """int8: relu of the dots by 1024 in float16, times W * ScaleQ in float16, a float32 sum, times ScaleK; else float32."""
    flat, scale = key.reshape(-1, key.shape[-1]).float(), key_dequant_scale.reshape(-1).float()
    reduced = query.dtype == torch.int8

    def scores(row: int, keys: Tensor) -> Tensor:
        heads = query.reshape(-1, *query.shape[-2:])[row].float()
        weight = weights.reshape(-1, len(heads))[row] * query_dequant_scale.reshape(-1, len(heads))[row].to(weights.dtype)
        dots = torch.relu(heads @ flat[keys].T)
        dots = (dots / 1024).half().float() * 1024 if reduced else dots
        return (weight.float() @ dots) * scale[keys]

    arguments = (layout_query, layout_key, actual_seq_lengths_query, actual_seq_lengths_key, block_table)
    return _indexed(query, key, scores, sparse_count, sparse_mode, *arguments)[0]


def _indexed(
    query: Tensor,
    key: Tensor,
    scores: Any,
    count: int,
    mode: int,
    layout_query: str,
    layout_key: str,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    table: Tensor | None,
) -> tuple[Tensor, Tensor]:
    total = query.shape[0] if layout_query == "TND" else query.shape[0] * query.shape[1]
    indices = torch.full((total, 1, count), -1, dtype=torch.int32)
    values = torch.full((total, 1, count), float("-inf"))
    for request in _requests(query, key, layout_query, layout_key, query_lengths, key_lengths, table):
        for row in range(request.first, request.last):
            if len(request.keys):
                found = _select(scores(row, request.keys), _visible(request, row, mode), count)
                indices[row, 0], values[row, 0] = found
    shape = (total, 1, count) if layout_query == "TND" else (*query.shape[:2], 1, count)
    return indices.reshape(shape), values.reshape(shape)


def npu_sparse_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    sparse_indices: Tensor,
    scale_value: float,
    *,
    block_table: Tensor | None = None,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_kv: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    sparse_block_size: int = 1,
    layout_query: str = "BSND",
    layout_kv: str = "BSND",
    sparse_mode: int = 3,
    pre_tokens: int = 2**63 - 1,
    next_tokens: int = 2**63 - 1,
    attention_mode: int = 0,
    return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, maximum, sum) of the softmax over [q, q_rope] . [k, k_rope], P in q's dtype before the second product."""
    assert query_rope is not None, "mode 2 needs query_rope"
    assert key_rope is not None, "mode 2 needs key_rope"
    keys = torch.cat([key, key_rope], dim=-1).reshape(-1, key.shape[-1] + key_rope.shape[-1])
    queries = torch.cat([query, query_rope], dim=-1)
    layouts = (layout_query, layout_kv, actual_seq_lengths_query, actual_seq_lengths_kv, block_table)
    out, top, total = _attended(queries, key, keys, query.shape[-1], sparse_indices, scale_value, sparse_mode, sinks, *layouts)
    shape = query.shape[:-1]
    if not return_softmax_lse:
        return out.reshape(*shape, -1), torch.empty(0), torch.empty(0)
    heads = shape[-1]
    pair = (1, -1, heads) if layout_query == "TND" else (shape[0], 1, shape[1], heads)
    return out.reshape(*shape, -1), top.reshape(pair), total.reshape(pair)


def npu_kv_quant_sparse_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sparse_indices: Tensor,
    scale_value: float,
    key_quant_mode: int,
    value_quant_mode: int,
    *,
    key_dequant_scale: Tensor | None = None,
    value_dequant_scale: Tensor | None = None,
    block_table: Tensor | None = None,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_kv: Tensor | None = None,
    sparse_block_size: int = 1,
    layout_query: str = "BSND",
    layout_kv: str = "BSND",
    sparse_mode: int = 3,
    pre_tokens: int = 2**63 - 1,
    next_tokens: int = 2**63 - 1,
    attention_mode: int = 0,
    quant_scale_repo_mode: int = 1,
    tile_size: int = 128,
    rope_head_dim: int = 64,
    key_dtype: int | None = None,
    value_dtype: int | None = None,
) -> Tensor:
    """The same over 656 bytes a token: 512 values, 64 rotated numbers in q's dtype, 4 float32 scales; values in q's dtype."""
    rows = key.reshape(-1, key.shape[-1])
    latent = query.shape[-1] - rope_head_dim
    scales = rows[:, latent + 2 * rope_head_dim :].contiguous().view(torch.float32)
    rotated = rows[:, latent : latent + 2 * rope_head_dim].contiguous().view(query.dtype)
    values = rows[:, :latent].float().reshape(len(rows), -1, tile_size) * scales[:, :, None]
    keys = torch.cat([values.reshape(len(rows), latent).to(query.dtype), rotated], dim=1)
    layouts = (layout_query, layout_kv, actual_seq_lengths_query, actual_seq_lengths_kv, block_table)
    out, _, _ = _attended(query, key, keys, latent, sparse_indices, scale_value, sparse_mode, None, *layouts)
    return out.reshape(*query.shape[:-1], latent)


def _attended(
    query: Tensor,
    key: Tensor,
    keys: Tensor,
    width: int,
    sparse_indices: Tensor,
    scale: float,
    mode: int,
    sinks: Tensor | None,
    layout_query: str,
    layout_kv: str,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
    table: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    queries = query.reshape(-1, *query.shape[-2:])
    entries = sparse_indices.reshape(len(queries), -1)
    out = torch.zeros((len(queries), queries.shape[1], width), dtype=query.dtype)
    top, total = (torch.zeros(queries.shape[:2]) for _ in range(2))
    for request in _requests(query, key, layout_query, layout_kv, query_lengths, key_lengths, table):
        for row in range(request.first, request.last):
            visible = _visible(request, row, mode)
            named = entries[row].long()
            ends = (named == -1).nonzero()
            named = named[: int(ends[0]) if len(ends) else len(named)]
            named = named if mode == 0 else named[:visible][named[:visible] < visible]
            if not len(named):
                continue
            own = keys[request.keys[named]].float()
            logits = queries[row].float() @ own.T * scale
            top[row] = logits.max(dim=1).values
            p = torch.exp(logits - top[row][:, None])
            total[row] = p.sum(dim=1)
            share = total[row] if sinks is None else total[row] + torch.exp(sinks - top[row])
            out[row] = ((p.to(query.dtype).float() @ own[:, :width]) / share[:, None]).to(query.dtype)
    return out, top, total
