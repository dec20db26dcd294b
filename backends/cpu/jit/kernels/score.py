"""score[t,s] = k_scale[s] * sum_h weights[t,h] * relu(q[t,h,:] . k[s,:]): heads in the lanes, keys as they lie.

A tile of keys is widened once and meets every row of a block. Lane l of a key sums heads l, l + 16, l + 32, ... and the lanes
are added last, neighbours first, on every instruction set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llvmlite import ir

from dsa_portable.backends.cpu.jit.emit import F32, I32, I64, LANES, PAIRS, PTR, VI, VOID, Code, V, Value, constant, number
from dsa_portable.backends.cpu.jit.isa import Isa
from dsa_portable.backends.cpu.jit.kernels import tiles, widen

# Keys of a tile: as bfloat16, 128 numbers a key, they fill a sixteenth of a second-level cache of 1 MiB.
TILE = 256
# Keys whose sums over heads are made side by side, and whose dot products.
GROUP, KEYS = 16, 4
# Of AMX: keys whose dot products with all heads lie in memory, twice, so that one half is summed while tiles fill the other.
BATCH = tiles.BATCH

ARGUMENTS = {
    "q": PTR,  # of the block's first row
    "q_row": I64,  # bytes from row to row, and from head to head
    "q_head": I64,
    "weights": PTR,  # float32 [rows, padded heads], 0 behind the last head
    "pages": PTR,  # addresses of pages; position p is row p % page_size of page p / page_size
    "page_size": I64,
    "k_row": I64,  # bytes from key to key
    "scales": PTR,  # float32 of the positions from `first` on, BATCH more than there are
    "rows": I64,
    "heads": I64,
    "dim": I64,
    "first": I64,  # positions [first, last) are scored
    "last": I64,
    "starts": PTR,  # int32 [rows]: what each row sees of them
    "ends": PTR,
    "scores": PTR,  # float32 [rows, columns], of the positions from `first` on, and BATCH more
    "columns": I64,
    "scratch": PTR,
}


def padded(heads: int, vectors: int) -> int:
    """Heads in whole groups of vectors."""
    return -(-heads // (LANES * vectors)) * LANES * vectors


def scratch_bytes(rows: int, heads: int, dim: int) -> int:
    """Of panels of q, widened rows of one head each, a tile of keys and dot products: float32 needs the most."""
    wide = padded(heads, 4)
    return 4 * ((rows * wide + heads + TILE + BATCH) * (dim + 2 * tiles.SIDE) + 2 * BATCH * wide)


def emit(module: ir.Module, isa: Isa, format: str, vectors: int, ragged: bool) -> None:
    """Add `score`; `vectors` of sixteen heads are summed side by side, and `ragged` lanes have no head."""
    code = Code(module, "score", ARGUMENTS)
    b, paired = code.b, isa.paired(format)
    in_tiles = paired and isa.tiles
    used = b.lshr(b.add(code["dim"], I64(1)), I64(1)) if paired else code["dim"]
    n_words = b.and_(code.sum(used, tiles.SIDE - 1), I64(-tiles.SIDE)) if in_tiles else used
    wide = LANES * vectors
    n_heads = b.mul(b.sdiv(code.sum(code["heads"], wide - 1), number(wide)), number(wide))
    panel_words = b.mul(n_words, n_heads)
    panels = code["scratch"]
    widened = code.at(panels, b.mul(code["rows"], panel_words), I32)
    tile = code.at(widened, b.mul(code["heads"], n_words), I32)
    dots = code.at(tile, b.mul(number(TILE + BATCH), n_words), I32)
    group = BATCH if in_tiles else GROUP
    if in_tiles:
        tiles.configure(code, code["scratch"])

    def widen_row(source: Value, target: Value) -> None:
        widen.row(code, format, paired, source, code["dim"], target)
        if in_tiles:
            tiles.zero_words(code, target, used, n_words)

    with code.loop(0, code["rows"]) as t:
        q = code.at(code["q"], b.mul(t, code["q_row"]))
        with code.loop(0, code["heads"]) as h:
            widen_row(code.at(q, b.mul(h, code["q_head"])), code.at(widened, b.mul(h, n_words), I32))
        _panel(code, widened, n_words, n_heads, code.at(panels, b.mul(t, panel_words), I32))

    with code.loop(code["first"], code["last"], TILE) as p:
        keys = code.least(b.sub(code["last"], p), TILE)
        with code.loop(0, keys) as j:
            widen_row(_key(code, b.add(p, j)), code.at(tile, b.mul(j, n_words), I32))
        with code.loop(0, code["rows"]) as t:
            start, end = (b.sub(b.sext(code.load(code[name], t, I32), I64), p) for name in ("starts", "ends"))
            start, end = b.and_(code.most(start, 0), I64(-group)), code.least(end, keys)
            panel = code.at(panels, b.mul(t, panel_words), I32)
            weights = code.at(code["weights"], b.mul(t, n_heads), F32)
            column = b.sub(p, code["first"])
            scores = code.at(code["scores"], b.add(b.mul(t, code["columns"]), column), F32)
            row = Row(code, paired, vectors, ragged, tile, panel, weights, n_words, n_heads, dots)
            if in_tiles:
                with code.when(b.icmp_signed("<", start, end)):
                    row.fill(start)
            with code.loop(start, end, group) as j:
                with code.when(b.icmp_signed("==", t, I64(0))):
                    _fetch(code, format, code.sum(p, TILE, j), group)
                if in_tiles:
                    with code.when(b.icmp_signed("<", code.sum(j, group), end)):
                        row.fill(code.sum(j, group))
                for part in range(0, group, GROUP):
                    totals = row.filled(j, part) if in_tiles else row.sums(j)
                    scales = code.load(code["scales"], code.sum(column, j, part), V, F32)
                    code.store(b.fmul(code.summed(totals), scales), scores, code.sum(j, part), F32)
    if in_tiles:
        tiles.release(code)
    code.end()


def _key(code: Code, position: Value) -> Value:
    """The address of a key."""
    b = code.b
    page, slot = b.udiv(position, code["page_size"]), b.urem(position, code["page_size"])
    return code.at(code.pointer(code.load(code["pages"], page, I64)), b.mul(slot, code["k_row"]))


def _fetch(code: Code, format: str, first: Value, count: int) -> None:
    """Ask for keys of the next tile, for which the products of this one leave memory all the time it needs."""
    size = code.b.mul(code["dim"], I64(widen.BYTES[format]))
    with code.loop(first, code.least(code.sum(first, count), code["last"])) as position:
        key = _key(code, position)
        with code.loop(0, size, 64) as line:
            code.call("llvm.prefetch.p0", VOID, code.at(key, line), I32(0), I32(2), I32(1))


def _panel(code: Code, widened: Value, n_words: Value, n_heads: Value, panel: Value) -> None:
    """A row's q as [words, padded heads], 0 behind the last head."""
    b = code.b
    with code.loop(0, n_words) as w:
        target = code.at(panel, b.mul(w, n_heads), I32)
        with code.loop(0, code["heads"]) as h:
            code.store(code.load(widened, b.add(b.mul(h, n_words), w), I32), target, h)
        with code.loop(code["heads"], n_heads) as h:
            code.store(I32(0), target, h)


@dataclass(frozen=True)
class Row:
    """A row of q and a tile of keys: weights * relu(q . k), summed over heads, head h in lane h % 16."""

    code: Code
    paired: bool
    vectors: int
    ragged: bool
    tile: Value  # widened keys, [keys, words]
    panel: Value
    weights: Value
    n_words: Value
    n_heads: Value
    dots: Value  # of AMX: [2, groups of sixteen heads, BATCH, 16]

    def sums(self, j: Value) -> list[Value]:
        """Of the GROUP keys from j on."""
        code = self.code
        sums = [code.variable(V, constant(V, 0.0)) for _ in range(GROUP)]
        with code.loop(0, self.n_heads, LANES * self.vectors) as h:
            for first in range(0, GROUP, KEYS):
                keys = code.at(self.tile, code.b.mul(code.sum(j, first), self.n_words), I32)
                for dots, place in zip(self._keys(h, keys), sums[first : first + KEYS], strict=True):
                    code.b.store(self._weighed(h, dots, code.value(place, V)), place)
        return [code.value(place, V) for place in sums]

    def _keys(self, h: Value, keys: Value) -> list[list[Value]]:
        """q . k of KEYS keys and the heads from h on."""
        code, b = self.code, self.code.b
        dots = [[code.variable(V, constant(V, 0.0)) for _ in range(self.vectors)] for _ in range(KEYS)]
        with code.loop(0, self.n_words) as w:
            heads = code.at(self.panel, b.add(b.mul(w, self.n_heads), h), I32)
            q = [code.load(heads, v * LANES, VI, I32) for v in range(self.vectors)]
            for i, row in enumerate(dots):
                k = code.splat(code.load(keys, b.add(b.mul(number(i), self.n_words), w), I32))
                for v, dot in enumerate(row):
                    b.store(self._product(q[v], k, code.value(dot, V)), dot)
        return [[code.value(dot, V) for dot in row] for row in dots]

    def _product(self, q: Value, k: Value, start: Value) -> Value:
        b = self.code.b
        if self.paired:
            return self.code.call("llvm.x86.avx512bf16.dpbf16ps.512", V, start, b.bitcast(q, PAIRS), b.bitcast(k, PAIRS))
        return self.code.fma(b.bitcast(q, V), b.bitcast(k, V), start)

    def _weighed(self, h: Value, dots: Sequence[Value], total: Value) -> Value:
        """total + weights * relu(dots) of the heads from h on."""
        code, b = self.code, self.code.b
        for v, dot in enumerate(dots):
            positive = code.relu(dot)
            if self.ragged:  # a lane without a head has q of 0, and 0 times a key that is inf is NaN
                positive = b.select(self._there(h, v), positive, constant(V, 0.0))
            total = code.fma(positive, code.load(self.weights, code.sum(h, v * LANES), V, F32), total)
        return total

    def _there(self, h: Value, v: int) -> Value:
        b = self.code.b
        head = b.add(self.code.splat(b.trunc(h, I32)), ir.Constant(VI, [I32(v * LANES + lane) for lane in range(LANES)]))
        return b.icmp_signed("<", head, self.code.splat(b.trunc(self.code["heads"], I32)))

    # --- AMX ---

    def _half(self, j: Value) -> Value:
        b = self.code.b
        return self.code.at(self.dots, b.mul(b.and_(j, I64(BATCH)), self.n_heads), F32)

    def fill(self, j: Value) -> None:
        """The dot products of BATCH keys with all heads, 32 heads at a time."""
        code, b = self.code, self.code.b
        half, head_bytes, word_bytes = self._half(j), b.mul(self.n_heads, I64(4)), b.mul(self.n_words, I64(4))
        left = (code.at(self.tile, b.mul(j, self.n_words), I32), word_bytes, I64(4 * tiles.SIDE))
        steps = b.lshr(self.n_words, I64(4))
        with code.loop(0, self.n_heads, 2 * tiles.SIDE) as h:
            # End to end: rows that lie a power of two apart would take each other's places in the cache.
            place = code.at(half, b.mul(h, I64(BATCH)), F32)
            places = [code.at(place, tiles.SIDE * (BATCH * j + tiles.SIDE * i), F32) for i in range(2) for j in range(2)]
            right = (code.at(self.panel, h, I32), head_bytes, b.mul(head_bytes, I64(tiles.SIDE)))
            tiles.products(code, steps, left, right, places, I64(4 * tiles.SIDE), fresh=True)

    def filled(self, j: Value, part: int) -> list[Value]:
        """As `sums`, of keys whose dot products are there: the GROUP from j + part on."""
        code, b = self.code, self.code.b
        half = self._half(j)
        sums = [code.variable(V, constant(V, 0.0)) for _ in range(GROUP)]
        with code.loop(0, self.n_heads, LANES * self.vectors) as h:
            for i, place in enumerate(sums):
                key = code.at(half, b.add(b.mul(h, I64(BATCH)), number((part + i) * LANES)), F32)
                dots = [code.load(key, v * LANES * BATCH, V, F32) for v in range(self.vectors)]
                b.store(self._weighed(h, dots, code.value(place, V)), place)
        return [code.value(place, V) for place in sums]
