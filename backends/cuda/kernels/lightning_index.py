"""Device code of lightning_index, first half: the scores of a slab of rows. The selection is in top_k.py."""

from __future__ import annotations

import triton
import triton.language as tl

from dsa_portable.backends.cuda.kernels.rows import decoded_e4m3, keys_of, place_of


@triton.jit(do_not_specialize=["first_row", "last_row"])
def score_rows(
    q,
    weights,
    k,
    k_scale,
    owner,
    start,
    end,
    cu_seqlens_q,
    cu_seqlens_k,
    block_table,
    logits,
    first_row,
    last_row,
    num_requests,
    table_stride,
    page_size,
    k_page_stride,
    scale_first,
    scale_page_stride,
    logits_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    K_SLOT: tl.constexpr,
    SCALE_SLOT: tl.constexpr,
    DECODE_E4M3: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """logits[row - first_row, s] = k_scale[s] * sum_h weights[row, h] * relu(q[row, h] . k[s]) for the keys s the row sees.

    A program holds BLOCK_K keys and runs the queries of ROWS rows past them. Grid: (key blocks, row groups).
    """
    block_start = tl.program_id(0) * BLOCK_K
    begin = first_row + tl.program_id(1) * ROWS
    row_offsets = begin + tl.arange(0, ROWS)
    real = row_offsets < last_row
    lowest = tl.min(tl.load(start + row_offsets, mask=real, other=2147483647))
    highest = tl.max(tl.load(end + row_offsets, mask=real, other=0))
    if (block_start >= highest) | (block_start + BLOCK_K <= lowest):
        return
    stop = tl.minimum(begin + ROWS, last_row)
    position = block_start + tl.arange(0, BLOCK_K)
    dims = tl.arange(0, HEAD_DIM)
    heads = tl.arange(0, BLOCK_H)
    first_request = tl.load(owner + begin)
    last_request = tl.minimum(tl.load(owner + stop - 1), num_requests - 1)
    for request in range(first_request, last_request + 1):
        row_from = tl.maximum(begin, tl.load(cu_seqlens_q + request))
        row_to = tl.minimum(stop, tl.load(cu_seqlens_q + request + 1))
        mine = real & (row_offsets >= row_from) & (row_offsets < row_to)
        # Only keys that some row of this request sees are read: what lies behind them may be anything.
        low = tl.min(tl.load(start + row_offsets, mask=mine, other=2147483647))
        high = tl.max(tl.load(end + row_offsets, mask=mine, other=0))
        seen = (position >= low) & (position < high)
        keys_begin = keys_of(request, cu_seqlens_k, block_table, table_stride)
        page, slot = place_of(position, keys_begin, seen, block_table, page_size)
        key_offset = page * k_page_stride + slot * K_SLOT
        keys = tl.load(k + key_offset[:, None] + dims[None, :], mask=seen[:, None], other=0.0)
        if DECODE_E4M3:
            keys = decoded_e4m3(keys)
        scale = tl.full([BLOCK_K], 1.0, tl.float32)
        if k_scale is not None:
            scale_offset = scale_first + page * scale_page_stride + slot * SCALE_SLOT
            scale = tl.load(k_scale + scale_offset, mask=seen, other=0.0).to(tl.float32)
        for row in range(row_from, row_to):
            wide_row = tl.cast(row, tl.int64)
            total = tl.zeros([BLOCK_K], tl.float32)
            for first_head in tl.static_range(0, HEADS, BLOCK_H):
                head = first_head + heads
                query_offset = (wide_row * HEADS + head) * HEAD_DIM
                if HEADS % BLOCK_H == 0:
                    query = tl.load(q + query_offset[None, :] + dims[:, None])
                    weight = tl.load(weights + wide_row * HEADS + head).to(tl.float32)
                else:
                    query = tl.load(q + query_offset[None, :] + dims[:, None], mask=(head < HEADS)[None, :], other=0.0)
                    weight = tl.load(weights + wide_row * HEADS + head, mask=head < HEADS, other=0.0).to(tl.float32)
                if DECODE_E4M3:
                    query = decoded_e4m3(query)
                if keys.dtype == tl.int8:
                    dots = tl.dot(keys, query, out_dtype=tl.int32).to(tl.float32)
                else:
                    dots = tl.dot(keys, query)
                total += tl.sum(tl.maximum(dots, 0.0) * weight[None, :], axis=1)
            row_start = tl.load(start + row)
            row_end = tl.load(end + row)
            target = logits + (wide_row - first_row) * logits_stride + position
            tl.store(target, total * scale, mask=(position >= row_start) & (position < row_end))
