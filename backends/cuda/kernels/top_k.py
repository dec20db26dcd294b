"""Device code of lightning_index, second half: the exact topk largest scores of a row, ties to the lowest position, ascending.

bound_rows: a sample of a long row gives a value that its topk-th score reaches almost surely.
count_parts, scan_parts: what reaches it is compacted, in order of position, into at most CAPACITY candidates.
Both read whole blocks, so that a thread loads 16 bytes at a time, and one block ahead: what lies outside a row belongs to the
scratch.
pick_rows: the exact choice among them. A row that the sample did not serve, with too few candidates, more than CAPACITY or
more than CAPACITY entries asked for, is searched whole: slower, as exact, and with no buffer of any size.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_KEY: tl.constexpr = tl.constexpr(-2147483648)


@triton.jit
def key_of(scores):
    """int32 in the order of float32: -0.0 equals +0.0, and NaN lies below all."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    return tl.where(scores != scores, NO_KEY, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def score_of(keys):
    """The float32 whose key this is."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def threshold_of(keys, real, wanted, low, high, above_low):
    """(low, high, keys >= low, keys >= high): high is low + 1, or the keys from low on are exactly as many as wanted.

    low and high bracket the wanted-th largest key. Three rounds of four interpolate the logarithm of the count over the scores,
    the fourth halves the keys, which bounds the rounds whatever the scores are.
    """
    above_high = 0 * wanted
    rounds = 0
    while (above_low != wanted) & (low + 1 < high):
        half = (low & high) + ((low ^ high) >> 1)
        from_score = score_of(low)
        to_score = score_of(high)
        most = tl.log2(above_low.to(tl.float32))
        least = tl.log2(tl.maximum(above_high, 1).to(tl.float32) * 0.99)
        share = tl.where(rounds == 0, 0.5, (most - tl.log2(wanted.to(tl.float32))) / (most - least))
        guess = from_score + (to_score - from_score) * share
        middle = key_of(guess)
        useless = (guess != guess) | (middle <= low) | (middle >= high)
        middle = tl.where(useless | ((rounds & 3) == 3), half, middle)
        above = tl.sum((real & (keys >= middle)).to(tl.int32), 0)
        enough = above >= wanted
        low = tl.where(enough, middle, low)
        above_low = tl.where(enough, above, above_low)
        high = tl.where(enough, high, middle)
        above_high = tl.where(enough, above_high, above)
        rounds += 1
    return low, high, above_low, above_high


@triton.jit(do_not_specialize=["first_row", "topk"])
def bound_rows(
    logits, start, end, bound, first_row, logits_stride, topk, SAMPLE: tl.constexpr, RUN: tl.constexpr, CAPACITY: tl.constexpr
):
    """bound [rows]: -inf where all scores of the row may be candidates, NaN where none may and the whole row is searched."""
    local = tl.program_id(0)
    low = tl.load(start + first_row + local)
    count = tl.load(end + first_row + local) - low
    found = float("-inf")
    if (count > topk) & (count > CAPACITY):
        # Of the sample's scores, `expected` belong to the topk best; six standard deviations more than that hold them all.
        expected = topk * (SAMPLE / count.to(tl.float32))
        rank = (expected + 6.0 * tl.sqrt(expected) + 8.0).to(tl.int32)
        found = float("nan")
        if (rank < SAMPLE) & (topk <= CAPACITY):
            place = tl.arange(0, SAMPLE)
            place = low + (place // RUN) * (count // (SAMPLE // RUN)) + place % RUN
            keys = key_of(tl.load(logits + local.to(tl.int64) * logits_stride + place))
            everything = keys == keys
            least = tl.min(keys, 0)
            most = tl.max(keys, 0) + 1
            threshold, _, _, _ = threshold_of(keys, everything, rank, least, most, SAMPLE + 0 * rank)
            found = score_of(threshold)
    tl.store(bound + local, found)


@triton.jit
def part_of(low, high, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """(begin, stop) of this program's part of a row, both multiples of BLOCK but for the end of the row; alike for no part."""
    aligned = low // BLOCK * BLOCK
    size = tl.cdiv(tl.cdiv(high - aligned, PARTS), BLOCK) * BLOCK
    begin = aligned + tl.program_id(1) * size
    stop = tl.minimum(begin + size, high)
    # No program reads behind the row's scratch, not even ahead.
    return tl.where(begin < high, begin, aligned), tl.where(begin < high, stop, aligned)


@triton.jit(do_not_specialize=["first_row", "topk"])
def count_parts(logits, start, end, bound, counts, first_row, logits_stride, topk, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """counts [rows, PARTS]: how many scores of a part reach the bound; only where a row is shared by several programs."""
    local = tl.program_id(0)
    low = tl.load(start + first_row + local)
    high = tl.load(end + first_row + local)
    limit = tl.load(bound + local)
    found = tl.zeros([BLOCK], tl.int32)
    if high - low > topk:
        begin, stop = part_of(low, high, PARTS, BLOCK)
        logits += local.to(tl.int64) * logits_stride
        coming = tl.load(logits + begin + tl.arange(0, BLOCK))
        for first in range(begin, stop, BLOCK):
            position = first + tl.arange(0, BLOCK)
            scores = coming
            coming = tl.load(logits + BLOCK + position)
            found += ((scores >= limit) & (position >= low) & (position < stop)).to(tl.int32)
    tl.store(counts + local * PARTS + tl.program_id(1), tl.sum(found, 0))


@triton.jit(do_not_specialize=["first_row", "topk"])
def scan_parts(
    logits,
    start,
    end,
    bound,
    counts,
    candidates,
    first_row,
    logits_stride,
    topk,
    PARTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """candidates [rows, CAPACITY] int64, score bits above position, in order of position; with one part also counts."""
    local = tl.program_id(0)
    low = tl.load(start + first_row + local)
    high = tl.load(end + first_row + local)
    limit = tl.load(bound + local)
    seat = 0
    if PARTS > 1:
        part = tl.arange(0, PARTS)
        seat = tl.sum(tl.load(counts + local * PARTS + part, mask=part < tl.program_id(1), other=0), 0)
    if high - low > topk:
        begin, stop = part_of(low, high, PARTS, BLOCK)
        logits += local.to(tl.int64) * logits_stride
        coming = tl.load(logits + begin + tl.arange(0, BLOCK))
        for first in range(begin, stop, BLOCK):
            position = first + tl.arange(0, BLOCK)
            scores = coming
            coming = tl.load(logits + BLOCK + position)
            reaches = (scores >= limit) & (position >= low) & (position < stop)
            order = tl.cumsum(reaches.to(tl.int32), 0)
            place = seat + order - 1
            packed = (scores.to(tl.int32, bitcast=True).to(tl.int64) << 32) | position.to(tl.int64)
            tl.store(candidates + local.to(tl.int64) * CAPACITY + place, packed, mask=reaches & (place < CAPACITY))
            seat += tl.max(order, 0)
    if PARTS == 1:
        tl.store(counts + local, seat)


@triton.jit(do_not_specialize=["first_row", "topk"])
def pick_rows(
    logits,
    start,
    end,
    counts,
    candidates,
    indices,
    scores,
    first_row,
    logits_stride,
    topk,
    PARTS: tl.constexpr,
    CAPACITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """indices and scores [Tq, topk] of a row, whichever way its candidates came out; -1 and -inf behind short rows."""
    local = tl.program_id(0)
    row = (first_row + local).to(tl.int64)
    low = tl.load(start + row)
    count = tl.load(end + row) - low
    found = tl.sum(tl.load(counts + local * PARTS + tl.arange(0, PARTS)), 0)
    logits += local.to(tl.int64) * logits_stride + low
    candidates += local.to(tl.int64) * CAPACITY
    indices += row * topk
    if scores is not None:
        scores += row * topk
    if count <= topk:
        for first in range(0, topk, BLOCK):
            offset = first + tl.arange(0, BLOCK)
            tl.store(indices + offset, tl.where(offset < count, low + offset, -1), mask=offset < topk)
            if scores is not None:
                value = tl.load(logits + offset, mask=offset < count, other=float("-inf"))
                tl.store(scores + offset, value, mask=offset < topk)
    elif (found < topk) | (found > CAPACITY):
        pick_from_row(logits, low, count, topk, indices, scores, BLOCK)
    elif found <= CAPACITY // 2:
        pick_candidates(candidates, found, topk, indices, scores, CAPACITY // 2)
    else:
        pick_candidates(candidates, found, topk, indices, scores, CAPACITY)


@triton.jit
def pick_candidates(candidates, found, topk, indices, scores, CAPACITY: tl.constexpr):
    """The choice among candidates that lie in registers."""
    place = tl.arange(0, CAPACITY)
    real = place < found
    packed = tl.load(candidates + place)
    value = (packed >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    keys = key_of(value)
    low = tl.min(tl.where(real, keys, 2147483647), 0)
    high = tl.max(tl.where(real, keys, NO_KEY), 0) + 1
    low, high, above_low, above_high = threshold_of(keys, real, topk, low, high, found)
    emit(keys, real, packed.to(tl.int32), value, low, high, above_low, above_high, topk, 0, 0, indices, scores)


@triton.jit
def pick_from_row(logits, start, count, topk, indices, scores, BLOCK: tl.constexpr):
    """The choice among all scores of a row, read again in every round: the keys' range is halved at most 32 times."""
    low = NO_KEY + 0 * count
    high = 2147483647 + 0 * count
    above_low = count
    above_high = 0 * count
    while (above_low != topk) & (low + 1 < high):
        middle = (low & high) + ((low ^ high) >> 1)
        above = tl.zeros([BLOCK], tl.int32)
        for first in range(0, count, BLOCK):
            offset = first + tl.arange(0, BLOCK)
            keys = key_of(tl.load(logits + offset, mask=offset < count, other=0.0))
            above += ((keys >= middle) & (offset < count)).to(tl.int32)
        together = tl.sum(above, 0)
        enough = together >= topk
        low = tl.where(enough, middle, low)
        above_low = tl.where(enough, together, above_low)
        high = tl.where(enough, high, middle)
        above_high = tl.where(enough, above_high, together)
    seat = 0
    tied = 0
    for first in range(0, count, BLOCK):
        offset = first + tl.arange(0, BLOCK)
        real = offset < count
        value = tl.load(logits + offset, mask=real, other=0.0)
        seat, tied = emit(
            key_of(value), real, start + offset, value, low, high, above_low, above_high, topk, seat, tied, indices, scores
        )


@triton.jit
def emit(keys, real, positions, value, low, high, above_low, above_high, topk, seat, tied, indices, scores):
    """Write what is chosen of these, which stand in order of position; returns how many larger and tied ones came so far."""
    whole = above_low == topk
    larger = real & (keys >= tl.where(whole, low, high))
    equal = real & (keys == low) & (whole == 0)
    larger_so_far = seat + tl.cumsum(larger.to(tl.int32), 0)
    equal_so_far = tied + tl.cumsum(equal.to(tl.int32), 0)
    needed = topk - above_high
    chosen = larger | (equal & (equal_so_far <= needed))
    place = larger_so_far + tl.minimum(equal_so_far, needed) - 1
    tl.store(indices + place, positions, mask=chosen)
    if scores is not None:
        tl.store(scores + place, value, mask=chosen)
    return tl.max(larger_so_far, 0), tl.max(equal_so_far, 0)
