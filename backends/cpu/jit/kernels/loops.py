"""Nothing but products: what a core can do at most, which `dsa-portable bench` sets the operators against."""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from dsa_portable.backends.cpu.jit.emit import I8, I64, LANES, PAIRS, PTR, VOID, Code, V, Value
from dsa_portable.backends.cpu.jit.kernels import tiles

# Sums that are made side by side: more than an addition takes cycles.
SIDE = 16
ARGUMENTS = {"count": I64, "place": PTR}  # SIDE + 1 vectors of zeros at `place`, of which the compiler must know nothing
BYTES = 64 * (SIDE + 1)


def _float32(code: Code, x: Value, total: Value) -> Value:
    return code.fma(x, x, total)


def _pairs(code: Code, x: Value, total: Value) -> Value:
    pair = code.b.bitcast(x, PAIRS)
    return code.call("llvm.x86.avx512bf16.dpbf16ps.512", V, total, pair, pair)


def _vectors(code: Code, product: Callable[[Code, Value, Value], Value]) -> None:
    x = code.load(code["place"], SIDE, V)
    sums = [code.variable(V, code.load(code["place"], i, V)) for i in range(SIDE)]
    with code.loop(0, code["count"]):
        for place in sums:
            code.b.store(product(code, x, code.value(place, V)), place)
    for i, place in enumerate(sums):
        code.store(code.value(place, V), code["place"], i)


def _tiles(code: Code) -> None:
    tiles.configure(code, code["place"])
    for tile in (*tiles.SUMS, *tiles.LEFT, *tiles.RIGHT):
        code.call("llvm.x86.tilezero", VOID, I8(tile))
    with code.loop(0, code["count"]):
        for tile in tiles.SUMS:
            code.call("llvm.x86.tdpbf16ps", VOID, I8(tile), I8(tiles.LEFT[tile >> 1]), I8(tiles.RIGHT[tile & 1]))
    tiles.release(code)


# Name -> (what writes the loop, operations in one turn of it).
LOOPS: dict[str, tuple[Callable[[Code], None], int]] = {
    "raw float32 FMA": (lambda code: _vectors(code, _float32), 2 * LANES * SIDE),
    "raw bfloat16 pairs": (lambda code: _vectors(code, _pairs), 4 * LANES * SIDE),
    "raw AMX tiles": (_tiles, 4 * tiles.SIDE**3 * len(tiles.SUMS)),
}


def emit(module: ir.Module, name: str) -> None:
    """Add the loop as `loop`."""
    code = Code(module, "loop", ARGUMENTS)
    LOOPS[name][0](code)
    code.end()
