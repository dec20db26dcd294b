"""sparse_attend on npu_sparse_flash_attention and npu_kv_quant_sparse_flash_attention.

The vendor takes latent and rotated halves of the keys as two contiguous tensors, and no cache of the contract's is stored so.
The keys that a row names are gathered, never the whole cache, and each row becomes a request of its own over its own keys;
holes, repetitions, any page size and lse follow from that. Quantised pages are read in place where no lse is wanted.
"""

from __future__ import annotations

from typing import Any

import torch

from dsa_portable.backends.ascend import constraints, device, vendor
from dsa_portable.backends.ascend.rows import requests_of, slots_of
from dsa_portable.backends.ascend.schemas import KV_QUANT_SPARSE_FLASH_ATTENTION, SPARSE_FLASH_ATTENTION
from dsa_portable.formats import layout
from dsa_portable.operators.sparse_attend import AttendRequest

LATENT, ROTATED, MOST_HEADS = 512, 64, 128


def sparse_attend(request: AttendRequest) -> Any:
    """Output, or (output, lse) with `return_lse`; see dsa_portable.sparse_attend."""
    q = request.q.contiguous()
    kv = request.kv.contiguous()
    named = _named(request)
    want_lse = request.return_lse or request.attn_sink is not None
    if len(q) and kv.numel():
        blocks = torch.split(q, MOST_HEADS, dim=1)
        groups = [_group(request, block, kv, named, want_lse) for block in blocks]
        out = torch.cat([group[0] for group in groups], dim=1) if len(groups) > 1 else groups[0][0]
        lse = torch.cat([lse for _, lse in groups if lse is not None], dim=1) if want_lse else None
    else:
        out = torch.zeros((*q.shape[:2], request.value_dim), dtype=q.dtype, device=q.device)
        lse = torch.zeros(q.shape[:2], dtype=torch.float32, device=q.device)
    empty = named[:, :1] < 0
    if lse is not None:
        lse = torch.where(empty, float("-inf"), lse)
        if request.attn_sink is not None:
            # exp(lse) / (exp(lse) + exp(sink)): the sink is in the denominator, and never in lse.
            share = torch.sigmoid(lse - request.attn_sink[None, :])
            out = (out.to(torch.float32) * share[:, :, None]).to(q.dtype)
    out = torch.where(empty[:, :, None], 0, out)
    return device.deliver(request, (out, lse) if request.return_lse else (out,))


def _named(request: AttendRequest) -> torch.Tensor:
    """int32 [Tq, topk], the positions that count, ascending and packed to the front: the vendor stops at the first -1."""
    indices = request.indices
    slots = slots_of(request.batch, indices)
    counted = slots >= 0
    if request.topk_length is not None:
        entry = torch.arange(indices.shape[1], dtype=torch.int32, device=indices.device)
        counted = counted & (entry[None, :] < request.topk_length[:, None])
    ascending = torch.sort(torch.where(counted, indices, vendor.INT_MAX), dim=1).values
    return torch.where(ascending < vendor.INT_MAX, ascending, -1)


def _group(
    request: AttendRequest, q: torch.Tensor, kv: torch.Tensor, named: torch.Tensor, want_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse) of at most 128 heads, of which the product takes certain numbers: the rest are heads of zeros."""
    operator = SPARSE_FLASH_ATTENTION if request.kv_layout is None or want_lse else KV_QUANT_SPARSE_FLASH_ATTENTION
    heads = q.shape[1]
    taken = constraints.accepted(operator, "heads", device.product())
    padded = next(number for number in range(heads, MOST_HEADS + 1) if number in taken)
    if padded > heads:
        q = torch.cat([q, torch.zeros((len(q), padded - heads, q.shape[2]), dtype=q.dtype, device=q.device)], dim=1)
    q = q.contiguous()
    pages = constraints.accepted(operator, "block_size", device.product())
    if operator == KV_QUANT_SPARSE_FLASH_ATTENTION and request.batch.page_size in pages and request.batch.page_size:
        out, lse = _in_place(request, q, kv, named), None
    else:
        out, lse = _gathered(request, q, kv, named, want_lse)
    return out[:, :heads], None if lse is None else lse[:, :heads]


def _in_place(request: AttendRequest, q: torch.Tensor, kv: torch.Tensor, named: torch.Tensor) -> torch.Tensor:
    """Over the pages of a quantised cache."""
    requests = requests_of(request.batch, q, kv.shape[0])
    cache = kv.unsqueeze(-2).view(_value_dtype(request))
    out: torch.Tensor = _quantised(
        request,
        query=q,
        key=cache,
        value=cache,
        sparse_indices=named.unsqueeze(1),
        block_table=requests.block_table,
        actual_seq_lengths_query=requests.query_ends,
        actual_seq_lengths_kv=requests.keys,
        layout_query="TND",
        layout_kv=requests.layout,
    )
    return out


def _gathered(
    request: AttendRequest, q: torch.Tensor, kv: torch.Tensor, named: torch.Tensor, want_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Each row over a copy of the keys that it names, in slabs of scratch."""
    flat, topk = kv.reshape(-1, kv.shape[-1]), named.shape[1]
    slots = slots_of(request.batch, named)
    # A hole's place is filled with a key that the row does name: what nobody names may be NaN, and 0 times NaN is NaN.
    slots = torch.where(slots < 0, torch.clamp(slots[:, :1], min=0), slots)
    outs, lses = [], []
    for first, last in device.slabs(len(q), topk * (2 * flat.shape[1] * flat.element_size() + 4 * LATENT)):
        rows = torch.index_select(flat, 0, slots[first:last].reshape(-1))
        entry = torch.arange(topk, dtype=torch.int32, device=q.device)[None, :]
        own = torch.where(named[first:last] >= 0, entry, -1).reshape(last - first, 1, 1, topk)
        out, lse = _over(request, q[first:last].unsqueeze(1), rows.reshape(last - first, topk, 1, -1), own, want_lse)
        outs.append(out.reshape(last - first, *q.shape[1:2], LATENT))
        lses += [] if lse is None else [lse]
    return torch.cat(outs), torch.cat(lses) if want_lse else None


def _over(
    request: AttendRequest, q: torch.Tensor, rows: torch.Tensor, own: torch.Tensor, want_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(out, lse) of BSND requests of one query each over their own gathered rows."""
    if request.kv_layout is not None and not want_lse:
        cache = rows.view(_value_dtype(request))
        layouts = {"layout_query": "BSND", "layout_kv": "BSND"}
        return _quantised(request, query=q, key=cache, value=cache, sparse_indices=own, **layouts), None
    keys = rows if request.kv_layout is None else _dequantised(request.kv_layout, rows)
    rotated = keys.shape[-1] - LATENT
    key = keys[..., :LATENT].contiguous()
    # 512/512 has no rotated half, but the vendor has: zeros add nothing to a product.
    key_rope = keys[..., LATENT:].contiguous() if rotated else keys.new_zeros((*keys.shape[:-1], ROTATED))
    query_rope = q[..., LATENT:].contiguous() if rotated else q.new_zeros((*q.shape[:-1], ROTATED))
    out, top, total = vendor.call(
        SPARSE_FLASH_ATTENTION,
        query=q[..., :LATENT].contiguous(),
        key=key,
        value=key,
        sparse_indices=own,
        scale_value=request.softmax_scale,
        query_rope=query_rope,
        key_rope=key_rope,
        sparse_block_size=1,
        layout_query="BSND",
        layout_kv="BSND",
        sparse_mode=0,
        attention_mode=2,
        return_softmax_lse=want_lse,
    )
    return out, (top + torch.log(total)).reshape(len(q), q.shape[2]) if want_lse else None


def _quantised(request: AttendRequest, **arguments: Any) -> Any:
    """npu_kv_quant_sparse_flash_attention with the modes of the 656-byte layout: scales by tile, kept beside the values."""
    modes = {"key_quant_mode": 2, "value_quant_mode": 2, "quant_scale_repo_mode": 1, "tile_size": 128, "rope_head_dim": ROTATED}
    return vendor.call(
        KV_QUANT_SPARSE_FLASH_ATTENTION,
        scale_value=request.softmax_scale,
        sparse_block_size=1,
        sparse_mode=0,
        attention_mode=2,
        **modes,
        **arguments,
    )


def _value_dtype(request: AttendRequest) -> torch.dtype:
    assert request.kv_layout is not None
    found: torch.dtype = getattr(torch, layout(request.kv_layout).value_dtype.name)
    return found


def _dequantised(name: str, rows: torch.Tensor) -> torch.Tensor:
    """bfloat16 [..., 576] of a packed cache's rows: values times their tile's scale, rounded once, then the rotated half."""
    spec = layout(name)
    parts: dict[str, torch.Tensor] = {}
    start = 0
    for part in spec.parts:
        numbers = rows[..., start : start + part.nbytes].contiguous().view(getattr(torch, part.dtype.name))
        parts[part.name], start = numbers, start + part.nbytes
    values = parts["values"].to(torch.float32).reshape(*rows.shape[:-1], -1, spec.tile) * parts["scale"].unsqueeze(-1)
    return torch.cat([values.reshape(*rows.shape[:-1], -1).to(torch.bfloat16), parts["rope"]], dim=-1)
