"""acc[h] = sum_j exp(x[h,j] - top[h]) * v[j] and total[h] = sum_j exp(x[h,j] - top[h]) with x = softmax_scale * q[h] . kv[j].

A block of keys at a time: their logits with heads in the lanes, the running maximum, exp, and the product with the values. In
pairs, rows are read where they lie, P is rounded to bfloat16, and only the values are copied, neighbouring keys interleaved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from dsa_portable.backends.cpu.jit.emit import F32, I16, I32, I64, LANES, PAIRS, PTR, VI, Code, V, Value, constant, number
from dsa_portable.backends.cpu.jit.isa import Isa
from dsa_portable.backends.cpu.jit.kernels import tiles, widen

# Keys of a block: a group of columns of their values stays in the first-level cache.
BLOCK = {"tiles": 256, "pairs": 128, "float32": 64}
# Words of q that meet a block of keys before the next ones do.
WORDS = 96
# Rows of either product that are made side by side.
SIDE = 4
LINE = 64

ARGUMENTS = {
    "q": PTR,
    "q_row": I64,  # bytes from row to row, and from head to head
    "q_head": I64,
    "indices": PTR,  # int32 [rows, ...]
    "indices_row": I64,  # bytes from row to row
    "counts": PTR,  # int32 [rows]: how many of a row's indices count
    "keys": I64,  # indices in [0, keys) do
    "pages": PTR,  # addresses of pages; position p is row p % page_size of page p / page_size
    "page_size": I64,
    "kv_row": I64,  # bytes from key to key
    "rows": I64,
    "heads": I64,
    "dim": I64,
    "value_dim": I64,
    "softmax_scale": F32,
    "acc": PTR,  # float32 [rows, padded heads, padded value_dim]
    "tops": PTR,  # float32 [rows, padded heads]
    "totals": PTR,
    "fresh": I64,  # 0: go on from what acc, tops and totals hold
    "scratch": PTR,
}
FINISH = {
    "acc": PTR,  # as above
    "factors": PTR,  # float32 [rows, padded heads]
    "rows": I64,
    "heads": I64,
    "value_dim": I64,
    "out": PTR,
    "out_row": I64,  # bytes from row to row, and from head to head
    "out_head": I64,
}


def padded(count: int, vectors: int) -> int:
    """Heads or columns in whole groups of vectors."""
    return -(-count // (LANES * vectors)) * LANES * vectors


def scratch_bytes(topk: int, heads: int, dim: int, value_dim: int) -> int:
    """Of q, addresses, and of a block its keys, logits, P and values, with room for whole vectors and tiles."""
    wide, block = padded(heads, 4), max(BLOCK.values())
    row = max(dim, padded(value_dim, 4)) + tiles.SIDE
    return 4 * (2 * wide * row + 3 * wide * block + (block + tiles.BATCH) * row + 2 * (topk + block))


def up(code: Code, count: Value, step: int) -> Value:
    """The next multiple of a step, a power of two."""
    return code.b.and_(code.sum(count, step - 1), I64(-step))


def emit(module: ir.Module, isa: Isa, format: str, paired: bool, vectors: int) -> None:
    """Add `attend`; `vectors` of sixteen heads, or columns, are summed side by side, a power of two."""
    code = Code(module, "attend", ARGUMENTS)
    if paired and isa.tiles:
        TileAttend(code, format, True, vectors, BLOCK["tiles"]).emit()
    else:
        Attend(code, format, paired, vectors, BLOCK["pairs" if paired else "float32"]).emit()


@dataclass
class Attend:
    """The function under construction; sizes are set by `emit`."""

    code: Code
    format: str
    paired: bool
    vectors: int
    block: int

    def emit(self) -> None:
        """Write it."""
        code, b = self.code, self.code.b
        self.group = wide = LANES * self.vectors  # heads, or columns
        self.used = b.lshr(code["dim"], I64(1)) if self.paired else code["dim"]
        self.words = self._words()
        self.n_heads = up(code, code["heads"], wide)
        self.columns = up(code, code["value_dim"], wide)
        # A widened row has room for whole vectors of values.
        self.row_words = code.most(self.words, self.columns)
        self.free = code["scratch"]
        block = number(self.block)
        self.panel = self._place(self.words, self.n_heads)  # [groups of heads][words][group]
        self.widened = self._place(self.words, self.n_heads)  # a row of q; [heads, words]
        self.logits = self._place(self.n_heads, block)  # [groups of heads][block][group]
        self.p = self._place(self.n_heads, block)  # [groups of heads][block or pairs of it][group]
        # [groups of columns][pairs][group]; not in pairs: [block][row_words], which are the keys too
        self.values = self._place(self.row_words, block)
        self._more()
        self.addresses = self.free  # of the keys that count
        with code.loop(0, code["rows"]) as t:
            self._row(t)
        self._end()
        code.end()

    def _place(self, rows: Value, words: Value) -> Value:
        """So many words of the scratch."""
        place, self.free = self.free, self.code.at(self.free, self.code.b.mul(rows, words), I32)
        return place

    def _words(self) -> Value:
        return self.used

    def _more(self) -> None:
        """What else needs room, or has to be set."""

    def _end(self) -> None:
        """What has to be given back."""

    def _row(self, t: Value) -> None:
        code, b = self.code, self.code.b
        count = self._gather(t)
        self._panel(code.at(code["q"], b.mul(t, code["q_row"])))
        heads = b.mul(t, self.n_heads)
        self.acc = code.at(code["acc"], b.mul(heads, self.columns), F32)
        self.tops, self.totals = (code.at(code[name], heads, F32) for name in ("tops", "totals"))
        with code.when(b.icmp_unsigned("!=", code["fresh"], I64(0))):
            with code.loop(0, b.mul(self.n_heads, self.columns), LANES) as i:
                code.store(constant(V, 0.0), self.acc, i, F32)
            with code.loop(0, self.n_heads, LANES) as h:
                code.store(constant(V, float("-inf")), self.tops, h, F32)
                code.store(constant(V, 0.0), self.totals, h, F32)
        with code.loop(0, count, self.block) as first:
            self._block(first, count)

    # --- operands ---

    def _gather(self, t: Value) -> Value:
        """Write the addresses of the row's keys that count, as many as a block too many, and return how many there are."""
        code, b = self.code, self.code.b
        indices = code.at(code["indices"], b.mul(t, code["indices_row"]))
        found = code.variable(I64, I64(0))
        with code.loop(0, b.sext(code.load(code["counts"], t, I32), I64)) as i:
            position = b.sext(code.load(indices, i, I32), I64)
            with code.when(b.icmp_unsigned("<", position, code["keys"])):
                page, slot = b.udiv(position, code["page_size"]), b.urem(position, code["page_size"])
                address = b.add(code.load(code["pages"], page, I64), b.mul(slot, code["kv_row"]))
                code.store(address, self.addresses, code.value(found, I64), I64)
                b.store(b.add(code.value(found, I64), I64(1)), found)
        count = code.value(found, I64)
        with code.when(b.icmp_signed(">", count, I64(0))), code.loop(count, code.sum(count, SIDE)) as i:
            code.store(code.load(self.addresses, b.sub(count, I64(1)), I64), self.addresses, i, I64)
        return count

    def _panel(self, q: Value) -> None:
        """q as [groups of heads][words][group], 0 behind the last head."""
        code, b = self.code, self.code.b
        head_bytes = code["q_head"]
        if not self.paired:
            with code.loop(0, code["heads"]) as h:
                source, target = code.at(q, b.mul(h, code["q_head"])), code.at(self.widened, b.mul(h, self.words), I32)
                widen.row(code, self.format, False, source, code["dim"], target)
            q, head_bytes = self.widened, b.mul(self.words, I64(4))
        with code.loop(0, self.n_heads, self.group) as g, code.loop(0, self.words) as w:
            target = code.at(self.panel, b.add(b.mul(g, self.words), b.mul(w, number(self.group))), I32)
            within = b.icmp_signed("<", w, self.used)
            with code.loop(0, self.group) as h:
                head = b.add(g, h)
                there = b.and_(within, b.icmp_signed("<", head, code["heads"]))
                row = code.at(q, b.mul(b.select(there, head, I64(0)), head_bytes))
                code.store(b.select(there, code.load(row, b.select(there, w, I64(0)), I32), I32(0)), target, h)

    # --- a block of keys ---

    def _block(self, first: Value, count: Value) -> None:
        code, b = self.code, self.code.b
        keys = code.least(b.sub(count, first), self.block)
        side = up(code, keys, SIDE)
        addresses = code.at(self.addresses, first, I64)
        if not self.paired:
            with code.loop(0, side) as j:
                source, target = code.pointer(code.load(addresses, j, I64)), self._widened_key(j)
                widen.row(code, self.format, False, source, code["dim"], target)
        self._logits(addresses, side, count, first)
        with code.loop(0, self.n_heads, LANES) as h:
            self._softmax(h, keys, side)
        if self.paired:
            self._interleave(addresses, keys)
        self._weigh(keys)

    def _widened_key(self, j: Value) -> Value:
        return self.code.at(self.values, self.code.b.mul(j, self.row_words), I32)

    def _key(self, addresses: Value, j: Value) -> Value:
        if self.paired:
            return self.code.pointer(self.code.load(addresses, j, I64))
        return self._widened_key(j)

    def _logits(self, addresses: Value, side: Value, count: Value, first: Value) -> None:
        """q . k of all heads and a block of keys, WORDS at a time; the next block's keys are fetched meanwhile."""
        code, b = self.code, self.code.b
        next_keys = code.at(addresses, self.block, I64)
        there = code.least(b.sub(b.sub(count, first), I64(self.block)), self.block)
        lines = code.variable(I64, I64(0))
        with code.loop(0, self.n_heads, self.group) as g, code.loop(0, self.words, WORDS) as low:
            high = code.least(code.sum(low, WORDS), self.words)
            panel = code.at(self.panel, b.mul(g, self.words), I32)
            start = code.value(lines, I64)
            with code.loop(0, side, SIDE) as j:
                place = code.at(self.logits, b.add(b.mul(g, number(self.block)), b.mul(j, number(self.group))), I32)
                keys = [self._key(addresses, code.sum(j, i)) for i in range(SIDE)]
                if self.paired:
                    with code.when(b.icmp_signed("<", code.sum(j, SIDE - 1), there)):
                        for i in range(SIDE):
                            row = code.pointer(code.load(next_keys, code.sum(j, i), I64))
                            for line in range(3):
                                self._fetch(code.at(row, b.mul(code.sum(start, line), number(LINE))))
                fresh = b.icmp_signed("==", low, I64(0))

                def begin(i: int, v: int, place: Value = place, fresh: Value = fresh) -> Value:
                    old = code.load(place, i * self.group + v * LANES, V, F32)
                    return b.select(fresh, constant(V, 0.0), old)

                def key(w: Value, i: int, keys: list[Value] = keys) -> Value:
                    return code.load(keys[i], w, I32)

                dots = self._products(low, high, key, self._panel_at(panel), begin)
                for i, row in enumerate(dots):
                    for v, dot in enumerate(row):
                        code.store(dot, place, i * self.group + v * LANES, F32)
            b.store(code.sum(start, 3), lines)

    def _panel_at(self, panel: Value) -> Callable[[Value, int], Value]:
        code, b = self.code, self.code.b

        def heads(w: Value, v: int) -> Value:
            return code.load(panel, b.add(b.mul(w, number(self.group)), number(v * LANES)), VI, I32)

        return heads

    def _fetch(self, pointer: Value) -> None:
        self.code.call("llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(2), I32(1))

    def _products(
        self,
        low: Value,
        high: Value,
        one: Callable[[Value, int], Value],
        wide: Callable[[Value, int], Value],
        begin: Callable[[int, int], Value],
    ) -> list[list[Value]]:
        """begin(i, v) + sum over w in [low, high) of one(w, i) * wide(w, v), for SIDE rows and all vectors."""
        code, b = self.code, self.code.b
        sums = [[code.variable(V, begin(i, v)) for v in range(self.vectors)] for i in range(SIDE)]
        with code.loop(low, high) as w:
            right = [wide(w, v) for v in range(self.vectors)]
            for i, row in enumerate(sums):
                left = code.splat(one(w, i))
                for v, place in enumerate(row):
                    b.store(self._product(left, right[v], code.value(place, V)), place)
        return [[code.value(place, V) for place in row] for row in sums]

    def _product(self, left: Value, right: Value, start: Value) -> Value:
        code, b = self.code, self.code.b
        if self.paired:
            return code.call("llvm.x86.avx512bf16.dpbf16ps.512", V, start, b.bitcast(left, PAIRS), b.bitcast(right, PAIRS))
        return code.fma(b.bitcast(left, V), b.bitcast(right, V), start)

    # --- softmax ---

    def _softmax(self, h: Value, keys: Value, side: Value) -> None:
        """P of sixteen heads, their running maximum and sum; what was summed before is scaled to the new maximum."""
        code, b = self.code, self.code.b
        place = b.add(b.mul(b.and_(h, I64(-self.group)), number(self.block)), b.and_(h, I64(self.group - 1)))
        logits, p = code.at(self.logits, place, I32), code.at(self.p, place, I32)
        scale = code.splat(code["softmax_scale"])
        old = code.load(self.tops, h, V, F32)
        top = code.variable(V, old)
        with code.loop(0, keys) as j:
            x = b.fmul(code.load(logits, b.mul(j, number(self.group)), V, F32), scale)
            code.store(x, logits, b.mul(j, number(self.group)), F32)
            highest = code.value(top, V)
            b.store(b.select(b.fcmp_ordered(">", x, highest), x, highest), top)
        new = code.value(top, V)
        code.store(new, self.tops, h, F32)
        self._rescale(h, old, new)
        total = code.variable(V, code.load(self.totals, h, V, F32))
        if not self.paired:
            with code.loop(0, keys) as j:
                code.store(self._p(logits, j, new, total), p, b.mul(j, number(self.group)), F32)
        else:
            with code.loop(0, keys, 2) as j:
                even = self._p(logits, j, new, total)
                odd = code.variable(V, constant(V, 0.0))
                with code.when(b.icmp_signed("<", code.sum(j, 1), keys)):
                    b.store(self._p(logits, code.sum(j, 1), new, total), odd)
                low, high = (b.zext(widen.narrowed(code, "bf16", p), VI) for p in (even, code.value(odd, V)))
                pair = b.or_(b.shl(high, constant(VI, 16)), low)
                code.store(pair, p, b.mul(b.lshr(j, I64(1)), number(self.group)), I32)
        code.store(code.value(total, V), self.totals, h, F32)

    def _p(self, logits: Value, j: Value, top: Value, total: Value) -> Value:
        code, b = self.code, self.code.b
        p = exp(code, b.fsub(code.load(logits, b.mul(j, number(self.group)), V, F32), top))
        b.store(b.fadd(code.value(total, V), p), total)
        return p

    def _rescale(self, h: Value, old: Value, new: Value) -> None:
        code, b = self.code, self.code.b
        higher = b.bitcast(b.fcmp_unordered("une", old, new), ir.IntType(LANES))
        with code.when(b.icmp_unsigned("!=", higher, higher.type(0))):
            factors = exp(code, b.fsub(old, new))
            code.store(b.fmul(code.load(self.totals, h, V, F32), factors), self.totals, h, F32)
            for lane in range(LANES):
                factor = b.extract_element(factors, I32(lane))
                row = code.at(self.acc, b.mul(code.sum(h, lane), self.columns), F32)
                with code.when(b.fcmp_unordered("une", factor, constant(F32, 1.0))), code.loop(0, self.columns, LANES) as c:
                    code.store(b.fmul(code.load(row, c, V, F32), code.splat(factor)), row, c, F32)

    # --- the product with the values ---

    def _interleave(self, addresses: Value, keys: Value) -> None:
        """Values of neighbouring keys as pairs, [groups of columns][pairs][group]; behind an odd last key there is 0."""
        code, b = self.code, self.code.b
        with code.loop(0, keys, 2) as j:
            even = code.pointer(code.load(addresses, j, I64))
            odd = code.pointer(code.load(addresses, code.sum(j, 1), I64))
            self._pairs(even, odd, j, b.icmp_signed("==", code.sum(j, 1), keys))

    def _pairs(self, even: Value, odd: Value, j: Value, alone: Value) -> None:
        """The values of keys j and j + 1; `alone`: there is no j + 1."""
        code, b = self.code, self.code.b
        dim = code["value_dim"]
        whole = b.and_(dim, I64(-LANES))
        for low, high, lanes in ((number(0), whole, LANES), (whole, dim, 1)):
            halves, words = (ir.VectorType(type, lanes) for type in (I16, I32))
            with code.loop(low, high, lanes) as c:
                first, second = (code.load(row, c, halves, I16) for row in (even, odd))
                second = b.select(alone, constant(halves, 0), second)
                pairs = b.or_(b.zext(first, words), b.shl(b.zext(second, words), constant(words, 16)))
                code.store(pairs, self._pair(j, c), 0, I32)

    def _pair(self, j: Value, column: Value) -> Value:
        code, b = self.code, self.code.b
        group = b.mul(b.and_(column, I64(-self.group)), number(self.block // 2))
        inside = b.add(b.mul(b.lshr(j, I64(1)), number(self.group)), b.and_(column, I64(self.group - 1)))
        return code.at(self.values, b.add(group, inside), I32)

    def _weigh(self, keys: Value) -> None:
        """acc += P v, SIDE heads and a group of columns at a time."""
        code, b = self.code, self.code.b
        count = b.lshr(code.sum(keys, 1), I64(1)) if self.paired else keys
        with code.loop(0, self.columns, self.group) as c:
            if self.paired:
                values, step = code.at(self.values, b.mul(c, number(self.block // 2)), I32), number(self.group)
            else:
                values, step = code.at(self.values, c, I32), self.row_words
            with code.loop(0, self.n_heads, SIDE) as h:
                place = b.add(b.mul(b.and_(h, I64(-self.group)), number(self.block)), b.and_(h, I64(self.group - 1)))
                p = code.at(self.p, place, I32)
                acc = code.at(self.acc, b.add(b.mul(h, self.columns), c), F32)

                def one(j: Value, i: int, p: Value = p) -> Value:
                    return code.load(p, b.add(b.mul(j, number(self.group)), number(i)), I32)

                def wide(j: Value, v: int, values: Value = values, step: Value = step) -> Value:
                    return code.load(values, b.add(b.mul(j, step), number(v * LANES)), VI, I32)

                def begin(i: int, v: int, acc: Value = acc) -> Value:
                    return code.load(acc, b.add(b.mul(number(i), self.columns), number(v * LANES)), V, F32)

                for i, row in enumerate(self._products(number(0), count, one, wide, begin)):
                    for v, total in enumerate(row):
                        code.store(total, acc, b.add(b.mul(number(i), self.columns), number(v * LANES)), F32)


@dataclass
class TileAttend(Attend):
    """On AMX: 32 keys at a time are copied end to end, and both products are of tiles; the softmax is the same."""

    def _words(self) -> Value:
        return up(self.code, self.used, tiles.SIDE)

    def _more(self) -> None:
        self.copied = self._place(self.words, number(tiles.BATCH))  # [keys of a batch][words]
        # P as tiles: [32 heads at a time][32 keys at a time][heads][pairs]
        self.weights = self._place(self.n_heads, number(self.block // 2))
        tiles.configure(self.code, self.code["scratch"])

    def _end(self) -> None:
        tiles.release(self.code)

    def _block(self, first: Value, count: Value) -> None:
        code, b = self.code, self.code.b
        keys = code.least(b.sub(count, first), self.block)
        addresses = code.at(self.addresses, first, I64)
        with code.loop(0, keys, tiles.BATCH) as j:
            self._copy(addresses, j, keys)
            with code.loop(0, tiles.BATCH, 2) as i:
                even, odd = (code.at(self.copied, b.mul(row, self.words), I32) for row in (i, code.sum(i, 1)))
                self._pairs(even, odd, b.add(j, i), ir.IntType(1)(0))
            self._dots(code.at(addresses, code.sum(j, tiles.BATCH), I64), j, b.sub(count, code.sum(first, j, tiles.BATCH)))
        with code.loop(0, self.n_heads, LANES) as h:
            self._softmax(h, keys, keys)
            self._tiles_of_p(h, keys)
        self._weigh(keys)

    def _copy(self, addresses: Value, j: Value, keys: Value) -> None:
        """The batch from j on, zeros where there is no key."""
        code, b = self.code, self.code.b
        with code.loop(0, tiles.BATCH) as i:
            target = code.at(self.copied, b.mul(i, self.words), I32)
            there = b.icmp_signed("<", b.add(j, i), keys)
            used = b.select(there, self.used, I64(0))
            with code.when(there):
                source = code.pointer(code.load(addresses, b.add(j, i), I64))
                whole = b.and_(used, I64(-LANES))
                with code.loop(0, whole, LANES) as w:
                    code.store(code.load(source, w, VI, I32), target, w, I32)
                with code.loop(whole, used) as w:
                    code.store(code.load(source, w, I32), target, w)
            tiles.zero_words(code, target, used, self.words)

    def _dots(self, following: Value, j: Value, left: Value) -> None:
        """q . k of a batch and all heads; of the `left` keys that follow it, each pass fetches its share."""
        code, b = self.code, self.code.b
        group, word_bytes = I64(4 * self.group), b.mul(self.words, I64(4))
        share = b.udiv(I64(tiles.BATCH * tiles.BATCH), self.n_heads)
        with code.loop(0, self.n_heads, tiles.BATCH) as h:
            first = b.mul(b.lshr(h, I64(5)), share)
            with code.loop(first, code.least(code.least(b.add(first, share), tiles.BATCH), left)) as i:
                row = code.pointer(code.load(following, i, I64))
                with code.loop(0, b.mul(self.used, I64(4)), LINE) as line:
                    self._fetch(code.at(row, line))
            inside = b.and_(h, I64(self.group - 1))
            panel = code.at(self.panel, b.add(b.mul(b.sub(h, inside), self.words), inside), I32)
            logits = code.at(self.logits, b.add(b.mul(b.sub(h, inside), number(self.block)), inside), I32)
            places = self._places(code.at(logits, b.mul(j, number(self.group)), I32), number(self.group))
            keys = (self.copied, word_bytes, I64(4 * tiles.SIDE))
            heads = (panel, group, b.mul(group, I64(tiles.SIDE)))
            tiles.products(code, b.lshr(self.words, I64(4)), keys, heads, places, group, fresh=True)

    def _places(self, place: Value, row: Value) -> list[Value]:
        """Of four sums; `row` words from one to the next."""
        code, b, side = self.code, self.code.b, tiles.SIDE
        return [code.at(place, b.add(b.mul(row, I64(side * i)), I64(side * j)), I32) for i in range(2) for j in range(2)]

    def _tiles_of_p(self, h: Value, keys: Value) -> None:
        """P of sixteen heads with heads below each other, 0 behind the last pair of keys."""
        code, b = self.code, self.code.b
        inside = b.and_(h, I64(self.group - 1))
        p = code.at(self.p, b.add(b.mul(b.sub(h, inside), number(self.block)), inside), I32)
        pairs = b.lshr(code.sum(keys, 1), I64(1))
        batch = b.mul(b.and_(h, I64(-tiles.BATCH)), number(self.block // 2))
        target = code.at(self.weights, b.add(batch, b.mul(b.and_(h, I64(tiles.SIDE)), I64(tiles.SIDE))), I32)
        with code.loop(pairs, up(code, pairs, tiles.SIDE)) as pair:
            code.store(constant(VI, 0), p, b.mul(pair, number(self.group)), I32)
        with code.loop(0, pairs, tiles.SIDE) as pair:
            rows = [code.load(p, b.mul(code.sum(pair, i), number(self.group)), VI, I32) for i in range(tiles.SIDE)]
            place = code.at(target, b.mul(pair, I64(tiles.BATCH)), I32)
            for i, row in enumerate(tiles.transposed(code, rows)):
                code.store(row, place, i * tiles.SIDE, I32)

    def _weigh(self, keys: Value) -> None:
        """acc += P v, 32 heads and 32 columns at a time."""
        code, b = self.code, self.code.b
        steps, group = b.lshr(code.sum(keys, tiles.BATCH - 1), I64(5)), I64(4 * self.group)
        with code.loop(0, self.columns, tiles.BATCH) as c, code.loop(0, self.n_heads, tiles.BATCH) as h:
            p = code.at(self.weights, b.mul(h, number(self.block // 2)), I32)
            places = self._places(code.at(self.acc, b.add(b.mul(h, self.columns), c), F32), self.columns)
            left = (p, I64(4 * tiles.SIDE), I64(4 * tiles.SIDE * tiles.BATCH))
            right = (self._pair(number(0), c), group, b.mul(group, I64(tiles.SIDE)))
            tiles.products(code, steps, left, right, places, b.mul(self.columns, I64(4)), fresh=False)


def emit_finish(module: ir.Module, format: str, vectors: int) -> None:
    """Add `finish`: out[t,h] = acc[t,h] * factors[t,h], rounded to the nearest number of the format."""
    code = Code(module, "finish", FINISH)
    b, wide = code.b, LANES * vectors
    n_heads, columns = (
        b.mul(b.sdiv(code.sum(code[name], wide - 1), number(wide)), number(wide)) for name in ("heads", "value_dim")
    )
    whole = b.and_(code["value_dim"], I64(-LANES))
    with code.loop(0, code["rows"]) as t, code.loop(0, code["heads"]) as h:
        row = b.add(b.mul(t, n_heads), h)
        acc = code.at(code["acc"], b.mul(row, columns), F32)
        factor = code.load(code["factors"], row, F32)
        out = code.at(code["out"], b.add(b.mul(t, code["out_row"]), b.mul(h, code["out_head"])))
        for low, high, lanes in ((number(0), whole, LANES), (whole, code["value_dim"], 1)):
            with code.loop(low, high, lanes) as c:
                scaled = b.fmul(code.load(acc, c, ir.VectorType(F32, lanes), F32), code.splat(factor, lanes))
                code.store(widen.narrowed(code, format, scaled), out, c, widen.STORED[format])
    code.end()


# Cephes' expf: e^r on [-ln 2 / 2, ln 2 / 2], and ln 2 in two parts of which the first times any exponent is exact.
_POLYNOMIAL = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_LN2 = (0.693359375, -2.12194440e-4)
# Adding it rounds to an integer, which its last bits then hold.
_ROUND = 12582912.0
# e to this is 0 in float32, and two factors of a power of two still are normal numbers.
_LOWEST = -170.0


def exp(code: Code, x: Value) -> Value:
    """e^x for x <= 0 within 2 units of 2^-24, subnormal results too; NaN stays."""
    b = code.b
    x = b.select(b.fcmp_ordered("<", x, constant(V, _LOWEST)), constant(V, _LOWEST), x)
    shifted = code.fma(x, constant(V, 1.44269504088896341), constant(V, _ROUND))
    n = b.fsub(shifted, constant(V, _ROUND))
    r = code.fma(n, constant(V, -_LN2[1]), code.fma(n, constant(V, -_LN2[0]), x))
    p = constant(V, _POLYNOMIAL[0])
    for c in _POLYNOMIAL[1:]:
        p = code.fma(p, r, constant(V, c))
    p = code.fma(p, b.fmul(r, r), b.fadd(r, constant(V, 1.0)))
    exponent = b.sub(b.bitcast(shifted, VI), b.bitcast(constant(V, _ROUND), VI))
    half = b.ashr(exponent, constant(VI, 1))
    for part in (half, b.sub(exponent, half)):
        p = b.fmul(p, b.bitcast(b.shl(b.add(part, constant(VI, 127)), constant(VI, 23)), V))
    return p
