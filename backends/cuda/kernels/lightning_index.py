"""Device code of lightning_index, first half: the scores of a slab of rows. The selection is in top_k.py.

Both kernels write more than a row sees, as far as its slab reaches: the selection reads no score outside a row's keys.
"""

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
    QUERIES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """logits[row - first_row, s] = k_scale[s] * sum_h weights[row, h] * relu(q[row, h] . k[s]) for the keys s its request sees.

    A program holds BLOCK_K keys and runs ROWS rows past them, QUERIES in one product. Grid: (key blocks, row groups).
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
    column = tl.arange(0, QUERIES * BLOCK_H)
    query_of_column = column // BLOCK_H
    queries = tl.arange(0, QUERIES)
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
        keys, scale = load_keys(
            k, k_scale, page, slot, seen, dims, k_page_stride, scale_first, scale_page_stride, K_SLOT, SCALE_SLOT, DECODE_E4M3
        )
        for row in range(row_from, row_to, QUERIES):
            wide_row = tl.cast(row, tl.int64)
            total = tl.zeros([BLOCK_K, QUERIES], tl.float32)
            for first_head in tl.static_range(0, HEADS, BLOCK_H):
                head = first_head + column % BLOCK_H
                place = (wide_row + query_of_column) * HEADS + head
                wanted = (head < HEADS) & (row + query_of_column < row_to)
                query = tl.load(q + place[None, :] * HEAD_DIM + dims[:, None], mask=wanted[None, :], other=0.0)
                weight = tl.load(weights + place, mask=wanted, other=0.0).to(tl.float32)
                if DECODE_E4M3:
                    query = decoded_e4m3(query)
                total += head_sum(keys, query, weight, QUERIES)
            target = logits + (wide_row - first_row + queries[None, :]) * logits_stride + position[:, None]
            tl.store(target, total * scale[:, None], mask=seen[:, None] & (row + queries < row_to)[None, :])


@triton.jit
def load_keys(
    k,
    k_scale,
    page,
    slot,
    seen,
    dims,
    k_page_stride,
    scale_first,
    scale_page_stride,
    K_SLOT: tl.constexpr,
    SCALE_SLOT: tl.constexpr,
    DECODE_E4M3: tl.constexpr,
):
    """Keys [BLOCK_K, HEAD_DIM] and their scales [BLOCK_K], 1 where there are none."""
    key_offset = page * k_page_stride + slot * K_SLOT
    keys = tl.load(k + key_offset[:, None] + dims[None, :], mask=seen[:, None], other=0.0)
    if DECODE_E4M3:
        keys = decoded_e4m3(keys)
    scale = tl.full([slot.shape[0]], 1.0, tl.float32)
    if k_scale is not None:
        scale_offset = scale_first + page * scale_page_stride + slot * SCALE_SLOT
        scale = tl.load(k_scale + scale_offset, mask=seen, other=0.0).to(tl.float32)
    return keys, scale


@triton.jit
def head_sum(keys, query, weight, QUERIES: tl.constexpr):
    """[BLOCK_K, QUERIES] float32: sum_h weight[h] * relu(query[:, h] . keys[s]) over the heads of each query."""
    if keys.dtype == tl.int8:
        dots = tl.dot(keys, query, out_dtype=tl.int32).to(tl.float32)
    else:
        dots = tl.dot(keys, query)
    BLOCK_H: tl.constexpr = weight.shape[0] // QUERIES
    weighted = tl.maximum(dots, 0.0) * weight[None, :]
    return tl.sum(tl.reshape(weighted, [keys.shape[0], QUERIES, BLOCK_H]), axis=2)


@triton.jit(do_not_specialize=["first_row"])
def score_row(
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
    TILES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As score_rows where no request has a second row: its heads stay, and TILES blocks of keys run past them.

    Takes what score_rows takes. Grid: (runs of TILES blocks, rows from first_row on). HEADS <= BLOCK_H.
    """
    row = first_row + tl.program_id(1)
    wide_row = tl.cast(row, tl.int64)
    low = tl.load(start + row)
    high = tl.load(end + row)
    run_start = tl.program_id(0) * (TILES * BLOCK_K)
    dims = tl.arange(0, HEAD_DIM)
    head = tl.arange(0, BLOCK_H)
    real_head = head < HEADS
    query_offset = (wide_row * HEADS + head) * HEAD_DIM
    query = tl.load(q + query_offset[None, :] + dims[:, None], mask=real_head[None, :], other=0.0)
    weight = tl.load(weights + wide_row * HEADS + head, mask=real_head, other=0.0).to(tl.float32)
    if DECODE_E4M3:
        query = decoded_e4m3(query)
    if low < high:
        keys_begin = keys_of(tl.load(owner + row), cu_seqlens_k, block_table, table_stride)
        first_tile = tl.maximum(run_start, low // BLOCK_K * BLOCK_K)
        for block_start in range(first_tile, tl.minimum(run_start + TILES * BLOCK_K, high), BLOCK_K):
            position = block_start + tl.arange(0, BLOCK_K)
            seen = (position >= low) & (position < high)
            page, slot = place_of(position, keys_begin, seen, block_table, page_size)
            keys, scale = load_keys(
                k,
                k_scale,
                page,
                slot,
                seen,
                dims,
                k_page_stride,
                scale_first,
                scale_page_stride,
                K_SLOT,
                SCALE_SLOT,
                DECODE_E4M3,
            )
            target = logits + (wide_row - first_row) * logits_stride + position
            tl.store(target, tl.reshape(head_sum(keys, query, weight, 1), [BLOCK_K]) * scale, mask=seen)
