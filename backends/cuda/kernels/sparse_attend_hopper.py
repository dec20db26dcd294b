"""Device code of sparse_attend for sm_90, in Gluon: two warpgroups compute, a third gathers keys for both.

A program holds 64 heads of one row at a time, until the tiles run out. Keys come in pairs of blocks of 64. Consumer W computes
the logits of block W; consumer 0 accumulates the first half of the values of both blocks, consumer 1 the second half, and the
probabilities of the other's block come through shared memory. Consumer 0 runs half a step ahead, so that exponentials of one
hide under products of the other. A key is read once: its first VALUE_DIM numbers serve as values too. Tiles and who frees them:

    left[0]                consumer 0       right[0], tail[0]      consumer 1
    left[1], tail[1]       consumer 0       right[1]               consumer 1

tail holds a block's rotated numbers and, once its logits are there, its probabilities. With q in tail[2] and the halves of q,
the four blocks fill the shared memory of an SM.

The maximum is subtracted before logits are scaled to base 2, as in sparse_attend.py. Rounded up to a power of two it would make
every correction exact, but the largest probability would be no 1, and its rounding to 16 bits in each result.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# Renamed in Triton 3.7.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

LOG2_E: gl.constexpr = gl.constexpr(1.4426950408889634)
LN_2: gl.constexpr = gl.constexpr(0.6931471805599453)
LOWEST: gl.constexpr = gl.constexpr(-3.4028234663852886e38)
NEVER: gl.constexpr = gl.constexpr(float("-inf"))

BLOCK_H: gl.constexpr = gl.constexpr(64)
BLOCK_K: gl.constexpr = gl.constexpr(64)
PAIR: gl.constexpr = gl.constexpr(128)
HALF: gl.constexpr = gl.constexpr(256)
VALUES: gl.constexpr = gl.constexpr(512)
TAIL: gl.constexpr = gl.constexpr(64)
# Negative, and a multiple of 8: a copy of 16 bytes needs offsets whose divisibility can be proved.
HOLE: gl.constexpr = gl.constexpr(-16)

# A thread copies from four rows: four addresses and constant displacements. A thread that owned a whole row would need sixteen.
COPIES: gl.constexpr = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
# Of 8-bit numbers a thread holds 16 of a row.
BYTES: gl.constexpr = gl.constexpr(gl.BlockedLayout([1, 16], [8, 4], [4, 1], [1, 0]))
LOGITS: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
SUMS: gl.constexpr = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))


@gluon.jit
def tile_of(tile, topk, first_row, HEAD_BLOCKS: gl.constexpr, PARTS: gl.constexpr):
    """(row, head block, part, its first entry, the entry behind its last)."""
    place = tile // HEAD_BLOCKS
    part = place % PARTS
    size = gl.cdiv(topk, PARTS * PAIR) * PAIR
    return first_row + place // PARTS, tile % HEAD_BLOCKS, part, part * size, gl.minimum(topk, (part + 1) * size)


@gluon.jit
def limits_of(tile, tiles, topk, topk_length, end, first_row, HEAD_BLOCKS: gl.constexpr, PARTS: gl.constexpr):
    """(row, keys of its request, entries that count) of a tile, of the last where there is none: asked for one tile ahead."""
    row, _, _, _, _ = tile_of(gl.minimum(tile, tiles - 1), topk, first_row, HEAD_BLOCKS, PARTS)
    limit = topk
    if topk_length is not None:
        limit = gl.minimum(topk, gl.load(topk_length + row))
    return row, gl.load(end + row), limit


@gluon.jit
def pairs_of(begin, stop):
    """Pairs of blocks of a tile: one even where it names nothing, so that all that wait for it go on."""
    return gl.maximum(gl.cdiv(stop - begin, PAIR), 1)


@gluon.jit
def positions_of(indices, entry, index_stride, limit, length, LIMITED: gl.constexpr):
    """(positions, which of them name a key) of entries of a row."""
    position = gl.load(indices + entry, mask=entry < index_stride, other=-1)
    # As an unsigned number a negative position is a large one.
    named = position.to(gl.uint32, bitcast=True) < length.to(gl.uint32, bitcast=True)
    if LIMITED:
        named = named & (entry < limit)
    return position, named


@gluon.jit
def copy_rows(target, source, offset, first, COLUMNS: gl.constexpr):
    """target [64, COLUMNS] = COLUMNS numbers from `first` on of 64 rows; zeros for a row whose offset is negative."""
    column = first + gl.arange(0, COLUMNS, gl.SliceLayout(0, COPIES))
    wanted = gl.expand_dims(offset >= 0, 1) & (column[None, :] >= 0)
    async_copy.async_copy_global_to_shared(target, source + offset[:, None] + column[None, :], wanted)


@gluon.jit
def keys_of(row, owner, cu_seqlens_k, table_stride, PAGE_SIZE: gl.constexpr, WIDE: gl.constexpr):
    """Where the keys of a row's request begin: in the flat cache, or in the block table."""
    begin = gl.load(owner + row)
    if PAGE_SIZE > 0:
        begin = begin.to(gl.int64) * table_stride
    else:
        begin = gl.load(cu_seqlens_k + begin)
        if WIDE:
            begin = begin.to(gl.int64)
    return begin


@gluon.jit
def slots_of(position, named, keys_begin, block_table, PAGE_SIZE: gl.constexpr, WIDE: gl.constexpr):
    """The cache's slots of positions, -1 for a hole."""
    if PAGE_SIZE > 0:
        page = gl.load(block_table + keys_begin + position // PAGE_SIZE, mask=named, other=0)
        slot = position % PAGE_SIZE
        if WIDE:
            slot = page.to(gl.int64) * PAGE_SIZE + slot
        else:
            slot = page * PAGE_SIZE + slot
    elif WIDE:
        slot = keys_begin + position.to(gl.int64)
    else:
        slot = keys_begin + position
    return gl.where(named, slot, -1)


@gluon.jit
def fill(values, rope, kv, slot, empty, full, phase,
         FIRST: gl.constexpr, ROPE_DIM: gl.constexpr, SCALE_TILE: gl.constexpr, E4M3: gl.constexpr, KV_SLOT: gl.constexpr,
         SCALE_FIRST: gl.constexpr, SCALE_SLOT: gl.constexpr, ROPE_FIRST: gl.constexpr, ROPE_SLOT: gl.constexpr):  # fmt: skip
    """One half of a block's values from number FIRST on and, where there is a tile for it, the rotated part."""
    if SCALE_TILE == 0:
        offset = gl.where(slot >= 0, slot * KV_SLOT, HOLE)
        mbarrier.wait(empty, phase)
        copy_rows(values, kv, offset, FIRST, HALF)
        if rope is not None and ROPE_DIM > 0:
            copy_rows(rope, kv, offset, ROPE_FIRST, TAIL)
        async_copy.mbarrier_arrive(full, increment_count=False)
    else:
        real = gl.expand_dims(slot >= 0, 1)
        offset = gl.where(slot >= 0, slot * KV_SLOT, HOLE)
        column = gl.arange(0, 64, gl.SliceLayout(0, BYTES))[None, :]
        wanted = real & (column >= 0)
        place = kv + offset[:, None] + column
        scale_place = kv.to(gl.pointer_type(gl.float32), bitcast=True) + (SCALE_FIRST + FIRST // SCALE_TILE)
        scale_place += gl.where(slot >= 0, slot * SCALE_SLOT, 0)
        # All are on their way before the tile is free.
        bits0 = gl.load(place + FIRST, mask=wanted, other=0)
        bits1 = gl.load(place + FIRST + 64, mask=wanted, other=0)
        bits2 = gl.load(place + FIRST + 128, mask=wanted, other=0)
        bits3 = gl.load(place + FIRST + 192, mask=wanted, other=0)
        scale0 = gl.load(scale_place, mask=slot >= 0, other=0.0)
        scale1 = gl.load(scale_place + 128 // SCALE_TILE, mask=slot >= 0, other=0.0)
        mbarrier.wait(empty, phase)
        values.slice(0, 64, 1).store(dequantised(bits0, scale0, values.dtype, E4M3))
        values.slice(64, 64, 1).store(dequantised(bits1, scale0, values.dtype, E4M3))
        values.slice(128, 64, 1).store(dequantised(bits2, scale1, values.dtype, E4M3))
        values.slice(192, 64, 1).store(dequantised(bits3, scale1, values.dtype, E4M3))
        if rope is not None:
            rope_place = kv.to(gl.pointer_type(rope.dtype), bitcast=True) + ROPE_FIRST
            rope_place += gl.where(slot >= 0, slot * ROPE_SLOT, 0)[:, None] + column
            rope.store(gl.load(rope_place, mask=wanted, other=0.0))
        fence_async_shared()
        _barrier()
        mbarrier.arrive(full, count=1)


@gluon.jit
def dequantised(bits, scale, DTYPE: gl.constexpr, E4M3: gl.constexpr):
    """bits * scale in float32, rounded once to the dtype of the products."""
    if E4M3:
        bits = bits.to(gl.float8e4nv, bitcast=True)
    return (bits.to(gl.float32) * scale[:, None]).to(DTYPE)


@gluon.jit
def produce(q, kv, indices, topk_length, owner, end, cu_seqlens_k, block_table, heads, topk, index_stride,
            first_row, tiles, table_stride, zero, q_left_right, left, right, tail, q_ready, full, empty,
            ROPE_DIM: gl.constexpr, SCALE_TILE: gl.constexpr, E4M3: gl.constexpr, KV_SLOT: gl.constexpr,
            SCALE_FIRST: gl.constexpr, SCALE_SLOT: gl.constexpr, ROPE_FIRST: gl.constexpr, ROPE_SLOT: gl.constexpr,
            PAGE_SIZE: gl.constexpr, WIDE: gl.constexpr, HEAD_BLOCKS: gl.constexpr, PARTS: gl.constexpr):  # fmt: skip
    """The third warpgroup: q of every tile, then its keys, each half tile as soon as it is free."""
    KEYS: gl.constexpr = gl.SliceLayout(1, COPIES if SCALE_TILE == 0 else BYTES)
    head = gl.arange(0, BLOCK_H, gl.SliceLayout(1, COPIES))
    DIM: gl.constexpr = VALUES + ROPE_DIM
    LIMITED: gl.constexpr = topk_length is not None
    next_row, next_length, next_limit = limits_of(
        gl.program_id(0), tiles, topk, topk_length, end, first_row, HEAD_BLOCKS, PARTS
    )
    next_keys = keys_of(next_row, owner, cu_seqlens_k, table_stride, PAGE_SIZE, WIDE)
    pair = 0
    done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, head_block, part, begin, stop = tile_of(tile, topk, first_row, HEAD_BLOCKS, PARTS)
        length, limit, keys_begin = next_length, next_limit, next_keys
        # q is free once both consumers have its last product.
        mbarrier.wait(q_ready.index(1), (done & 1) ^ 1)
        here = q + (row.to(gl.int64) * heads + head_block * BLOCK_H) * DIM
        offset = gl.where(head_block * BLOCK_H + head < heads, head * DIM, HOLE)
        copy_rows(q_left_right.index(0), here, offset, 0, HALF)
        copy_rows(q_left_right.index(1), here, offset, HALF, HALF)
        if ROPE_DIM > 0:
            copy_rows(tail.index(2), here, offset, VALUES, TAIL)
        async_copy.mbarrier_arrive(q_ready.index(0), increment_count=False)
        done += 1
        next_row, next_length, next_limit = limits_of(
            tile + gl.num_programs(0), tiles, topk, topk_length, end, first_row, HEAD_BLOCKS, PARTS
        )
        next_keys = keys_of(next_row, owner, cu_seqlens_k, table_stride, PAGE_SIZE, WIDE)
        mine = indices + row.to(gl.int64) * index_stride
        # As in `consume`: an address that is made before the first tile would be spilled.
        entry = tile * zero + gl.arange(0, BLOCK_K, KEYS)
        for i in range(pairs_of(begin, gl.minimum(limit, stop))):
            first = begin + i * PAIR + entry
            phase = (pair & 1) ^ 1
            position0, named0 = positions_of(mine, first, index_stride, limit, length, LIMITED)
            position1, named1 = positions_of(mine, first + BLOCK_K, index_stride, limit, length, LIMITED)
            slot0 = slots_of(position0, named0, keys_begin, block_table, PAGE_SIZE, WIDE)
            slot1 = slots_of(position1, named1, keys_begin, block_table, PAGE_SIZE, WIDE)
            fill(left.index(0), None, kv, slot0, empty.index(0), full.index(0), phase,
                 0, ROPE_DIM, SCALE_TILE, E4M3, KV_SLOT, SCALE_FIRST, SCALE_SLOT, ROPE_FIRST, ROPE_SLOT)  # fmt: skip
            fill(right.index(0), tail.index(0), kv, slot0, empty.index(1), full.index(1), phase,
                 HALF, ROPE_DIM, SCALE_TILE, E4M3, KV_SLOT, SCALE_FIRST, SCALE_SLOT, ROPE_FIRST, ROPE_SLOT)  # fmt: skip
            fill(left.index(1), tail.index(1), kv, slot1, empty.index(2), full.index(2), phase,
                 0, ROPE_DIM, SCALE_TILE, E4M3, KV_SLOT, SCALE_FIRST, SCALE_SLOT, ROPE_FIRST, ROPE_SLOT)  # fmt: skip
            fill(right.index(1), None, kv, slot1, empty.index(3), full.index(3), phase,
                 HALF, ROPE_DIM, SCALE_TILE, E4M3, KV_SLOT, SCALE_FIRST, SCALE_SLOT, ROPE_FIRST, ROPE_SLOT)  # fmt: skip
            pair += 1
    async_copy.wait_group(0)


@gluon.jit
def consume(indices, topk_length, attn_sink, end, out, lse, part_out, part_top, part_total, softmax_scale, heads, topk,
            index_stride, first_row, tiles, zero, q_left_right, left, right, tail, shared, q_ready, full, empty,
            said, exchanged,
            W: gl.constexpr, ROPE_DIM: gl.constexpr, HEAD_BLOCKS: gl.constexpr, PARTS: gl.constexpr):  # fmt: skip
    """Consumer W: the logits of block W of every pair, half W of the values of both."""
    ROWS: gl.constexpr = gl.SliceLayout(1, LOGITS)
    SUM_ROWS: gl.constexpr = gl.SliceLayout(1, SUMS)
    P: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    DTYPE: gl.constexpr = left.dtype
    to_base_2 = softmax_scale * LOG2_E
    entry = gl.arange(0, BLOCK_K, gl.SliceLayout(0, LOGITS))
    LIMITED: gl.constexpr = topk_length is not None
    next_row, next_length, next_limit = limits_of(
        gl.program_id(0), tiles, topk, topk_length, end, first_row, HEAD_BLOCKS, PARTS
    )
    pair = 0
    done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        row, head_block, part, begin, stop = tile_of(tile, topk, first_row, HEAD_BLOCKS, PARTS)
        length, limit = next_length, next_limit
        next_row, next_length, next_limit = limits_of(
            tile + gl.num_programs(0), tiles, topk, topk_length, end, first_row, HEAD_BLOCKS, PARTS
        )
        pairs = pairs_of(begin, gl.minimum(limit, stop))
        mine = indices + row.to(gl.int64) * index_stride
        acc = gl.zeros([BLOCK_H, HALF], gl.float32, SUMS)
        top = gl.full([BLOCK_H], LOWEST, gl.float32, ROWS)
        total = gl.zeros([BLOCK_H], gl.float32, ROWS)
        mbarrier.wait(q_ready.index(0), done & 1)
        for i in range(pairs):
            phase = pair & 1
            # Always 0, but not for the compiler: of constant addresses it would spill some 80 descriptors between the products.
            z = i * zero
            this = begin + i * PAIR + W * BLOCK_K + entry
            position, named = positions_of(mine, this, index_stride, limit, length, LIMITED)
            logits = gl.zeros([BLOCK_H, BLOCK_K], gl.float32, LOGITS)
            mbarrier.wait(full.index(2 * W), phase)
            fence_async_shared()
            block = left.index(z + W).permute((1, 0))
            logits = warpgroup_mma(q_left_right.index(z), block, logits, use_acc=False, is_async=True)
            mbarrier.wait(full.index(2 * W + 1), phase)
            fence_async_shared()
            block = right.index(z + W).permute((1, 0))
            logits = warpgroup_mma(q_left_right.index(z + 1), block, logits, is_async=True)
            if ROPE_DIM > 0:
                logits = warpgroup_mma(tail.index(z + 2), tail.index(z + W).permute((1, 0)), logits, is_async=True)
            logits = warpgroup_mma_wait(0, deps=[logits])
            if i == pairs - 1:
                mbarrier.arrive(q_ready.index(1), count=1)
            logits = gl.where(named[None, :], logits, NEVER)
            raised = gl.max(logits, 1)
            if W == 0:
                raised = gl.maximum(top, raised)
            else:
                mbarrier.wait(said.index(0), phase)
                raised = gl.maximum(shared.index(0).load(ROWS), raised)
            shared.index(W).store(raised)
            _barrier()
            mbarrier.arrive(said.index(W), count=1)
            kept = gl.exp2((top - raised) * to_base_2)
            p = gl.exp2((logits - raised[:, None]) * to_base_2)
            total = total * kept + gl.sum(p, 1)
            narrow = p.to(DTYPE)
            top = raised
            if W == 0:
                acc = acc * gl.convert_layout(kept, SUM_ROWS)[:, None]
                acc = warpgroup_mma(gl.convert_layout(narrow, P), left.index(z), acc, is_async=True)
                mbarrier.wait(said.index(1), phase)
                top = shared.index(1).load(ROWS)
                kept = gl.exp2((raised - top) * to_base_2)
                tail.index(0).store((p * kept[:, None]).to(DTYPE))
                fence_async_shared()
                _barrier()
                mbarrier.arrive(exchanged.index(0), count=1)
                total = total * kept
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(empty.index(0), count=1)
                acc = acc * gl.convert_layout(kept, SUM_ROWS)[:, None]
                mbarrier.wait(exchanged.index(1), phase)
                acc = warpgroup_mma(tail.index(z + 1), left.index(z + 1), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(empty.index(2), count=1)
            else:
                tail.index(1).store(narrow)
                fence_async_shared()
                _barrier()
                mbarrier.arrive(exchanged.index(1), count=1)
                acc = acc * gl.convert_layout(kept, SUM_ROWS)[:, None]
                mbarrier.wait(exchanged.index(0), phase)
                acc = warpgroup_mma(tail.index(z), right.index(z), acc, is_async=True)
                acc = warpgroup_mma(gl.convert_layout(narrow, P), right.index(z + 1), acc, is_async=True)
                acc = warpgroup_mma_wait(1, deps=[acc])
                mbarrier.arrive(empty.index(1), count=1)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(empty.index(3), count=1)
            pair += 1
        # `top` is the same in both consumers; the sum of their totals has a fixed order.
        shared.index(2 + W).store(total)
        _barrier()
        mbarrier.arrive(said.index(2 + W), count=1)
        mbarrier.wait(said.index(3 - W), done & 1)
        done += 1
        total = shared.index(2).load(ROWS) + shared.index(3).load(ROWS)
        column = W * HALF + gl.arange(0, HALF, gl.SliceLayout(0, SUMS))
        head = head_block * BLOCK_H + gl.arange(0, BLOCK_H, ROWS)
        real_head = head < heads
        if PARTS > 1:
            place = ((row - first_row).to(gl.int64) * PARTS + part) * heads
            if W == 0:
                gl.store(part_top + place + head, top, mask=real_head)
                gl.store(part_total + place + head, total, mask=real_head)
            factor = gl.full([BLOCK_H], 1.0, gl.float32, ROWS)
            target = part_out + place * VALUES
        else:
            place = row.to(gl.int64) * heads
            empty_row = total == 0.0
            normaliser = gl.where(empty_row, 1.0, total)
            natural_top = gl.where(empty_row, 0.0, top * softmax_scale)
            if lse is not None and W == 0:
                value = natural_top + gl.log2(normaliser) * LN_2
                gl.store(lse + place + head, gl.where(empty_row, NEVER, value), mask=real_head)
            factor = gl.full([BLOCK_H], 1.0, gl.float32, ROWS)
            if attn_sink is not None:
                sink = gl.minimum(gl.load(attn_sink + head, mask=real_head, other=NEVER), -LOWEST)
                # Whichever is larger is subtracted, so that nothing overflows beside a sink or an lse of hundreds.
                raised = gl.maximum(natural_top, sink)
                factor = gl.exp2((natural_top - raised) * LOG2_E)
                normaliser = normaliser * factor + gl.exp2((sink - raised) * LOG2_E)
            factor = gl.where(empty_row, 0.0, factor / normaliser)
            target = out + place * VALUES
        factor = gl.convert_layout(factor, SUM_ROWS)
        sum_head = head_block * BLOCK_H + gl.arange(0, BLOCK_H, SUM_ROWS)
        inside = gl.expand_dims(sum_head < heads, 1) & (column[None, :] >= 0)
        result = (acc * factor[:, None]).to(target.dtype.element_ty)
        gl.store(target + (sum_head * VALUES)[:, None] + column[None, :], result, mask=inside)


@gluon.jit(do_not_specialize=["heads", "topk", "first_row", "tiles"])
def attend_rows_hopper(
    q,
    kv,
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
    index_stride,
    first_row,
    tiles,
    table_stride,
    zero,
    ROPE_DIM: gl.constexpr,
    SCALE_TILE: gl.constexpr,
    E4M3: gl.constexpr,
    KV_SLOT: gl.constexpr,
    SCALE_FIRST: gl.constexpr,
    SCALE_SLOT: gl.constexpr,
    ROPE_FIRST: gl.constexpr,
    ROPE_SLOT: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    WIDE: gl.constexpr,
    HEAD_BLOCKS: gl.constexpr,
    PARTS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """As attend_rows. Grid: (programs that stay,); tiles = rows from first_row on * PARTS * HEAD_BLOCKS. `zero` is 0."""
    DTYPE: gl.constexpr = q.dtype.element_ty
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_left_right = gl.allocate_shared_memory(DTYPE, [2, BLOCK_H, HALF], SWIZZLED)
    left = gl.allocate_shared_memory(DTYPE, [2, BLOCK_K, HALF], SWIZZLED)
    right = gl.allocate_shared_memory(DTYPE, [2, BLOCK_K, HALF], SWIZZLED)
    tail = gl.allocate_shared_memory(DTYPE, [3, BLOCK_K, TAIL], SWIZZLED)
    # Maxima of the two consumers, then their totals.
    shared = gl.allocate_shared_memory(gl.float32, [4, BLOCK_H], PLAIN)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    full = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    said = gl.allocate_shared_memory(gl.int64, [4, 1], BARRIER)
    exchanged = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    # Every thread of the producer arrives for its own copies; of what it stores itself, one does for all.
    FILLS: gl.constexpr = 128 if SCALE_TILE == 0 else 1
    mbarrier.init(q_ready.index(0), count=128)
    mbarrier.init(q_ready.index(1), count=2)
    for i in gl.static_range(4):
        mbarrier.init(full.index(i), count=FILLS)
        mbarrier.init(empty.index(i), count=1)
        mbarrier.init(said.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(exchanged.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (indices, topk_length, attn_sink, end, out, lse, part_out, part_top, part_total, softmax_scale, heads,
                       topk, index_stride, first_row, tiles, zero, q_left_right, left, right, tail, shared, q_ready, full,
                       empty, said, exchanged, 0, ROPE_DIM, HEAD_BLOCKS, PARTS)),
            (consume, (indices, topk_length, attn_sink, end, out, lse, part_out, part_top, part_total, softmax_scale, heads,
                       topk, index_stride, first_row, tiles, zero, q_left_right, left, right, tail, shared, q_ready, full,
                       empty, said, exchanged, 1, ROPE_DIM, HEAD_BLOCKS, PARTS)),
            (produce, (q, kv, indices, topk_length, owner, end, cu_seqlens_k, block_table, heads, topk, index_stride,
                       first_row, tiles, table_stride, zero, q_left_right, left, right, tail, q_ready, full, empty,
                       ROPE_DIM, SCALE_TILE, E4M3, KV_SLOT, SCALE_FIRST, SCALE_SLOT, ROPE_FIRST, ROPE_SLOT,
                       PAGE_SIZE, WIDE, HEAD_BLOCKS, PARTS)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
