"""The topk largest scores of a row, ascending by position, of equal ones the lowest: between two guesses, then bit by bit.

A score's rank is an unsigned integer of the same order: -0.0 ranks as 0.0, and NaN as -inf. A sample guesses two ranks between
which the last of the selected should lie; one pass counts what is above and keeps what is between, and where the guess was
wrong everything is kept. The threshold is then found exactly, from its highest bit down.
"""

from __future__ import annotations

from llvmlite import ir

from dsa_portable.backends.cpu.jit.emit import F32, I32, I64, LANES, PTR, VI, Code, V, Value, constant

# Vectors of a sample, and how many keys a row must have to be worth one.
SAMPLE, WORTH = 32, 1024
BITS = ir.IntType(LANES)

ARGUMENTS = {
    "scores": PTR,  # float32 [rows, columns], readable for fifteen more
    "columns": I64,
    "rows": I64,
    "first": I64,  # the position of column 0
    "starts": PTR,  # int32 [rows]: each row's positions
    "ends": PTR,
    "topk": I64,
    "indices": PTR,  # int32 [rows, topk]; what is behind a row's count stays
    "indices_row": I64,  # bytes from row to row
    "scratch": PTR,
}


def scratch_bytes(columns: int, topk: int) -> int:
    """Of a sample, a row of positions, and the ranks of a row."""
    return 4 * (SAMPLE * LANES + topk + columns + 8 * LANES)


def emit(module: ir.Module) -> None:
    """Add `select`."""
    code = Code(module, "select", ARGUMENTS)
    b = code.b
    sample = code["scratch"]
    positions = code.at(sample, SAMPLE * LANES, I32)
    ranks = code.at(positions, code.sum(code["topk"], 2 * LANES), I32)
    with code.loop(0, code["rows"]) as row:
        start, end = (code.load(code[name], row, I32) for name in ("starts", "ends"))
        seen = code.most(b.sext(b.sub(end, start), I64), 0)
        column = b.sub(b.sext(start, I64), code["first"])
        scores = code.at(code["scores"], b.add(b.mul(row, code["columns"]), column), F32)
        indices = code.at(code["indices"], b.mul(row, code["indices_row"]))
        fits = b.icmp_signed("<=", seen, code["topk"])
        with code.when(fits), code.loop(0, seen) as i:
            code.store(b.add(b.trunc(i, I32), start), indices, i)
        with code.when(b.not_(fits)):
            _select(code, scores, seen, start, sample, ranks, positions)
            with code.loop(0, code["topk"]) as i:
                code.store(code.load(positions, i, I32), indices, i)
    code.end()


def _select(code: Code, scores: Value, seen: Value, start: Value, sample: Value, ranks: Value, positions: Value) -> None:
    """Write the topk positions of a row that sees more."""
    b = code.b
    needed, kept = code.variable(I64, code["topk"]), code.variable(I64, I64(0))
    with code.when(b.icmp_signed(">=", seen, I64(WORTH))):
        low, high = _guess(code, scores, seen, sample)
        above = code.variable(I64, I64(0))
        with code.loop(0, seen, LANES) as i:
            rank, there = _ranks(code, scores, i, seen)
            higher = b.icmp_unsigned(">", rank, code.splat(high))
            between = b.xor(b.icmp_unsigned(">=", rank, code.splat(low)), higher)
            b.store(b.add(code.value(above, I64), _population(code, b.and_(there, higher))), above)
            _pack(code, rank, b.and_(there, between), ranks, kept)
        rest = b.sub(code["topk"], code.value(above, I64))
        right = b.and_(b.icmp_signed(">", rest, I64(0)), b.icmp_signed(">=", code.value(kept, I64), rest))
        b.store(b.select(right, rest, code["topk"]), needed)
        b.store(b.select(right, code.value(kept, I64), I64(0)), kept)
    with code.when(b.icmp_signed("==", code.value(kept, I64), I64(0))):
        with code.loop(0, seen, LANES) as i:
            code.store(_ranks(code, scores, i, seen)[0], ranks, i, I32)
        b.store(seen, kept)
    threshold = _nth(code, ranks, code.value(kept, I64), code.value(needed, I64))
    over = _count(code, ranks, code.value(kept, I64), b.add(threshold, I32(1)))
    # Nothing is over the highest rank, of which adding one makes the lowest.
    over = b.select(b.icmp_unsigned("==", threshold, I32(-1)), I64(0), over)
    b.store(b.sub(code.value(needed, I64), over), needed)
    _take(code, scores, seen, start, positions, threshold, needed)


def _guess(code: Code, scores: Value, seen: Value, sample: Value) -> tuple[Value, Value]:
    """Two ranks; of a sample that is like the row, the topk-th largest of the row lies between them."""
    b, count = code.b, SAMPLE * LANES
    step = b.sdiv(b.sub(seen, I64(LANES)), I64(SAMPLE))
    with code.loop(0, SAMPLE) as i:
        code.store(_ranks(code, scores, b.mul(i, step), seen)[0], sample, b.mul(i, I64(LANES)), I32)
    expected = b.sdiv(b.mul(code["topk"], I64(count)), seen)
    margin = b.add(b.ashr(expected, I64(3)), I64(8))
    low = _nth(code, sample, I64(count), code.least(b.add(expected, margin), count))
    high = _nth(code, sample, I64(count), code.most(b.sub(expected, margin), 1))
    return low, b.select(b.icmp_signed("<", expected, margin), I32(-1), high)


def _nth(code: Code, ranks: Value, count: Value, n: Value) -> Value:
    """The n-th largest: the largest rank that at least n reach."""
    b = code.b
    found, bit = code.variable(I32, I32(0)), code.variable(I32, I32(-(2**31)))
    with code.loop(0, 32) as _:
        trial = b.or_(code.value(found, I32), code.value(bit, I32))
        enough = b.icmp_signed(">=", _count(code, ranks, count, trial), n)
        b.store(b.select(enough, trial, code.value(found, I32)), found)
        b.store(b.lshr(code.value(bit, I32), I32(1)), bit)
    return code.value(found, I32)


def _count(code: Code, ranks: Value, count: Value, least: Value) -> Value:
    """How many ranks are at least `least`."""
    b = code.b
    total, limit = code.variable(VI, constant(VI, 0)), code.splat(least)
    whole = b.and_(count, I64(-LANES))
    with code.loop(0, whole, LANES) as i:
        reached = b.icmp_unsigned(">=", code.load(ranks, i, VI, I32), limit)
        b.store(b.sub(code.value(total, VI), b.sext(reached, VI)), total)
    there = b.icmp_signed("<", _lanes(code, whole), code.splat(b.trunc(count, I32)))
    reached = b.and_(there, b.icmp_unsigned(">=", code.load(ranks, whole, VI, I32), limit))
    last = b.sub(code.value(total, VI), b.sext(reached, VI))
    return b.zext(code.call("llvm.vector.reduce.add.v16i32", I32, last), I64)


def _take(code: Code, scores: Value, seen: Value, start: Value, positions: Value, threshold: Value, needed: Value) -> None:
    """All positions above the threshold, and the first `needed` at it."""
    b = code.b
    limit, taken = code.splat(threshold), code.variable(I64, I64(0))
    chosen, ties = code.variable(BITS), code.variable(BITS)
    with code.loop(0, seen, LANES) as i:
        rank, there = _ranks(code, scores, i, seen)
        b.store(b.bitcast(b.and_(there, b.icmp_unsigned(">", rank, limit)), BITS), chosen)
        equal = b.bitcast(b.and_(there, b.icmp_unsigned("==", rank, limit)), BITS)
        b.store(equal, ties)
        wanted = b.and_(b.icmp_signed(">", code.value(needed, I64), I64(0)), b.icmp_unsigned("!=", equal, BITS(0)))
        with code.when(wanted), code.loop(0, LANES) as _:
            rest, have = code.value(ties, BITS), code.value(needed, I64)
            lowest = b.select(b.icmp_signed(">", have, I64(0)), _first(code, rest), BITS(0))
            b.store(b.or_(code.value(chosen, BITS), lowest), chosen)
            b.store(b.xor(rest, lowest), ties)
            b.store(b.sub(have, b.zext(b.icmp_unsigned("!=", lowest, BITS(0)), I64)), needed)
        mask = b.bitcast(code.value(chosen, BITS), ir.VectorType(ir.IntType(1), LANES))
        _pack(code, b.add(_lanes(code, i), code.splat(start)), mask, positions, taken)


def _first(code: Code, lanes: Value) -> Value:
    """The lowest of the lanes."""
    return code.b.and_(lanes, code.b.neg(lanes))


def _ranks(code: Code, scores: Value, i: Value, seen: Value) -> tuple[Value, Value]:
    """(ranks of the scores from i on, which of them there are)."""
    b = code.b
    score = code.load(scores, i, V, F32)
    there = b.icmp_signed("<", _lanes(code, i), code.splat(b.trunc(seen, I32)))
    ordered = b.select(b.fcmp_unordered("uno", score, score), constant(V, float("-inf")), score)
    bits = b.bitcast(b.fadd(ordered, constant(V, 0.0)), VI)
    return b.xor(bits, b.or_(b.ashr(bits, constant(VI, 31)), constant(VI, -(2**31)))), there


def _lanes(code: Code, i: Value) -> Value:
    return code.b.add(code.splat(code.b.trunc(i, I32)), ir.Constant(VI, [I32(n) for n in range(LANES)]))


def _pack(code: Code, values: Value, mask: Value, target: Value, count: Value) -> None:
    """Append the masked lanes to target[count:], and count them; lanes behind them are overwritten with anything."""
    b = code.b
    packed = code.call("llvm.experimental.vector.compress.v16i32", VI, values, mask, ir.Constant(VI, ir.Undefined))
    have = code.value(count, I64)
    code.store(packed, target, have, I32)
    b.store(b.add(have, _population(code, mask)), count)


def _population(code: Code, mask: Value) -> Value:
    return code.b.zext(code.call("llvm.ctpop.i16", BITS, code.b.bitcast(mask, BITS)), I64)
