"""Device code that both operators share: which request owns a row, what it sees, where a key lies, and float8 in bits."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def find_rows(
    cu_seqlens_q,
    seqlens_k,
    key_start,
    key_end,
    owner,
    start,
    end,
    num_rows,
    num_requests,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    REQUESTS: tl.constexpr,
):
    """owner [Tq] (num_requests for padding rows, so that it never decreases); start and end [Tq] as in Batch.key_range."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    found = tl.zeros([ROWS], tl.int32)
    for first in range(0, num_requests, REQUESTS):
        request = first + tl.arange(0, REQUESTS)
        stop = tl.load(cu_seqlens_q + request + 1, mask=request < num_requests, other=2147483647)
        found += tl.sum((stop[None, :] <= row[:, None]).to(tl.int32), axis=1)
    tl.store(owner + row, found, mask=inside)
    owned = inside & (found < num_requests)
    length = tl.load(seqlens_k + found, mask=owned, other=0)
    first_key = tl.zeros([ROWS], tl.int32)
    last_key = length
    if key_start is not None:
        first_key = tl.maximum(tl.load(key_start + row, mask=owned, other=0), 0)
        last_key = tl.minimum(tl.load(key_end + row, mask=owned, other=0), length)
    elif CAUSAL:
        last_key = length - (tl.load(cu_seqlens_q + found + 1, mask=owned, other=0) - 1 - row)
    last_key = tl.where(owned, tl.maximum(last_key, 0), 0)
    if start is not None:
        tl.store(start + row, tl.minimum(first_key, last_key), mask=inside)
    tl.store(end + row, last_key, mask=inside)


@triton.jit
def keys_of(request, cu_seqlens_k, block_table, table_stride):
    """What `place_of` needs of a request, so that no loop looks it up again: its first flat row, or its row of the table."""
    if block_table is None:
        return tl.load(cu_seqlens_k + request).to(tl.int64)
    else:
        return tl.cast(request, tl.int64) * table_stride


@triton.jit
def place_of(position, keys_begin, wanted, block_table, page_size):
    """(page, slot) int64 of positions of one request; flat keys are one page. Nothing is read where not `wanted`."""
    if block_table is None:
        page = tl.zeros_like(position).to(tl.int64)
        slot = keys_begin + position
    else:
        page = tl.load(block_table + keys_begin + position // page_size, mask=wanted, other=0).to(tl.int64)
        slot = (position % page_size).to(tl.int64)
    return page, slot


@triton.jit
def decoded_e4m3(bits):
    """float16 of float8_e4m3fn bytes, exact: the exponent is 8 less than float16's, which a factor of 2^8 makes up for."""
    wide = bits.to(tl.int16)
    number = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), number).to(tl.float16)
