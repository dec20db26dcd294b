"""Device code of sparse_attend: online softmax over the entries of a row; the parts of a split row, merged in fixed order.

The maximum is subtracted before logits are scaled to base 2, the base of the chip's exponential: scaled first, a logit of
hundreds would be rounded by 2^-17. It begins at the least finite float32 and is never infinite: a tile of holes alone leaves it
where it was, and no -inf is ever subtracted from -inf.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsa_portable.backends.cuda.kernels.rows import decoded_e4m3, keys_of, place_of

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)


@triton.jit(do_not_specialize=["heads", "first_row"])
def attend_rows(
    q,
    kv,
    kv_scale,
    kv_rope,
    indices,
    topk_length,
    attn_sink,
    owner,
    end,
    cu_seqlens_k,
    block_table,
    out,
    lse,
    part_out,
    part_top,
    part_total,
    softmax_scale,
    heads,
    topk,
    first_row,
    table_stride,
    page_size,
    kv_page_stride,
    scale_page_stride,
    rope_page_stride,
    VALUE_DIM: tl.constexpr,
    ROPE_DIM: tl.constexpr,
    SCALE_TILE: tl.constexpr,
    KV_SLOT: tl.constexpr,
    SCALE_FIRST: tl.constexpr,
    SCALE_SLOT: tl.constexpr,
    ROPE_FIRST: tl.constexpr,
    ROPE_SLOT: tl.constexpr,
    DECODE_E4M3: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A block of heads of a row over all of its entries or, where PARTS > 1, over one part of them, into scratch.

    Grid: (head blocks, rows from first_row on, PARTS).
    """
    row = (first_row + tl.program_id(1)).to(tl.int64)
    part = tl.program_id(2)
    request = tl.load(owner + row)
    length = tl.load(end + row)
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    real_head = head < heads
    dims = tl.arange(0, VALUE_DIM)
    query_offset = (row * heads + head) * (VALUE_DIM + ROPE_DIM)
    query = tl.load(q + query_offset[:, None] + dims[None, :], mask=real_head[:, None], other=0.0)
    if ROPE_DIM > 0:
        rope_dims = tl.arange(0, ROPE_DIM)
        query_rope = tl.load(q + query_offset[:, None] + VALUE_DIM + rope_dims[None, :], mask=real_head[:, None], other=0.0)
    limit = topk
    if topk_length is not None:
        limit = tl.minimum(topk, tl.load(topk_length + row))
    # Every part but the last holds whole blocks.
    part_size = tl.cdiv(topk, PARTS * BLOCK_K) * BLOCK_K
    begin = part * part_size
    limit = tl.minimum(limit, begin + part_size)
    keys_begin = tl.cast(0, tl.int64)
    if length == 0:
        limit = begin
    else:
        keys_begin = keys_of(request, cu_seqlens_k, block_table, table_stride)
    top = tl.full([BLOCK_H], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, VALUE_DIM], tl.float32)
    to_base_2 = softmax_scale * LOG2_E
    for first in range(begin, limit, BLOCK_K):
        entry = first + tl.arange(0, BLOCK_K)
        position = tl.load(indices + row * topk + entry, mask=entry < limit, other=-1)
        named = (position >= 0) & (position < length)
        position = tl.where(named, position, 0)
        page, slot = place_of(position, keys_begin, named, block_table, page_size)
        # Where nothing is named nothing is read: what stands there may be NaN, and 0 times NaN is NaN.
        key_offset = page * kv_page_stride + slot * KV_SLOT
        keys = tl.load(kv + key_offset[:, None] + dims[None, :], mask=named[:, None], other=0.0)
        if SCALE_TILE > 0:
            TILES: tl.constexpr = VALUE_DIM // SCALE_TILE
            scale_offset = SCALE_FIRST + page * scale_page_stride + slot * SCALE_SLOT
            scale_place = scale_offset[:, None] + tl.arange(0, TILES)[None, :]
            scale = tl.load(kv_scale + scale_place, mask=named[:, None], other=0.0)
            if DECODE_E4M3:
                keys = decoded_e4m3(keys)
            wide = tl.reshape(keys.to(tl.float32), [BLOCK_K, TILES, SCALE_TILE]) * scale[:, :, None]
            keys = tl.reshape(wide, [BLOCK_K, VALUE_DIM]).to(query.dtype)
        logits = tl.dot(query, tl.trans(keys), input_precision="ieee")
        if ROPE_DIM > 0:
            rope_offset = ROPE_FIRST + page * rope_page_stride + slot * ROPE_SLOT
            rope = tl.load(kv_rope + rope_offset[:, None] + rope_dims[None, :], mask=named[:, None], other=0.0)
            logits = tl.dot(query_rope, tl.trans(rope), logits, input_precision="ieee")
        logits = tl.where(named[None, :], logits, float("-inf"))
        raised = tl.maximum(top, tl.max(logits, axis=1))
        kept = tl.exp2((top - raised) * to_base_2)
        p = tl.exp2((logits - raised[:, None]) * to_base_2)
        total = total * kept + tl.sum(p, axis=1)
        acc = tl.dot(p.to(keys.dtype), keys, acc * kept[:, None], input_precision="ieee")
        top = raised
    if PARTS == 1:
        write_row(out, lse, attn_sink, row, head, heads, dims, acc, top, total, softmax_scale, VALUE_DIM)
    else:
        place = (tl.program_id(1).to(tl.int64) * PARTS + part) * heads + head
        tl.store(part_top + place, top, mask=real_head)
        tl.store(part_total + place, total, mask=real_head)
        tl.store(part_out + place[:, None] * VALUE_DIM + dims[None, :], acc, mask=real_head[:, None])


@triton.jit
def write_row(out, lse, attn_sink, row, head, heads, dims, acc, top, total, softmax_scale, VALUE_DIM: tl.constexpr):
    """out = acc / (total + the sink's share), lse = softmax_scale * top + ln(total), of the keys alone; else 0 and -inf."""
    real_head = head < heads
    empty = total == 0.0
    normaliser = tl.where(empty, 1.0, total)
    top = tl.where(empty, 0.0, top * softmax_scale)
    if lse is not None:
        value = top + tl.log2(normaliser) * LN_2
        tl.store(lse + row * heads + head, tl.where(empty, float("-inf"), value), mask=real_head)
    if attn_sink is not None:
        sink = tl.minimum(tl.load(attn_sink + head, mask=real_head, other=float("-inf")), -LOWEST)
        # Whichever is larger is subtracted, so that nothing overflows beside a sink or an lse of hundreds.
        raised = tl.maximum(top, sink)
        kept = tl.exp2((top - raised) * LOG2_E)
        acc = acc * kept[:, None]
        normaliser = tl.where(empty, 1.0, total * kept + tl.exp2((sink - raised) * LOG2_E))
    result = tl.where(empty[:, None], 0.0, acc / normaliser[:, None])
    place = (row * heads + head) * VALUE_DIM
    tl.store(out + place[:, None] + dims[None, :], result.to(out.dtype.element_ty), mask=real_head[:, None])


@triton.jit(do_not_specialize=["heads", "first_row"])
def merge_parts(
    part_out,
    part_top,
    part_total,
    attn_sink,
    out,
    lse,
    softmax_scale,
    heads,
    first_row,
    VALUE_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The parts of a row, first to last; a part of holes alone weighs nothing. Grid: (head blocks, rows from first_row on)."""
    local = tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    real_head = head < heads
    dims = tl.arange(0, VALUE_DIM)
    top = tl.full([BLOCK_H], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, VALUE_DIM], tl.float32)
    to_base_2 = softmax_scale * LOG2_E
    for part in range(0, PARTS):
        place = (local * PARTS + part) * heads + head
        other_top = tl.load(part_top + place, mask=real_head, other=LOWEST)
        other_total = tl.load(part_total + place, mask=real_head, other=0.0)
        other = tl.load(part_out + place[:, None] * VALUE_DIM + dims[None, :], mask=real_head[:, None], other=0.0)
        raised = tl.maximum(top, other_top)
        mine = tl.exp2((top - raised) * to_base_2)
        theirs = tl.exp2((other_top - raised) * to_base_2)
        total = total * mine + other_total * theirs
        acc = acc * mine[:, None] + other * theirs[:, None]
        top = raised
    write_row(out, lse, attn_sink, first_row + local, head, heads, dims, acc, top, total, softmax_scale, VALUE_DIM)
