"""AMX: products of tiles of sixteen rows by sixteen pairs of bfloat16; C[m,n] += sum_p A[m,p] . B[p,n] over pairs p.

Rows of A are keys, or heads, as they lie; B is q, or values, with pairs one below the other. A thread configures its tiles once
in a call, and the kernel of the operating system must have been asked for them before (compile.permitted).
"""

from __future__ import annotations

from collections.abc import Sequence

from dsa_portable.backends.cpu.jit.emit import I8, I16, I32, I64, VOID, Code, Value

# Rows of a tile, and words of 32 bits in a row; two tiles of rows are multiplied at a time.
SIDE = 16
BATCH = 2 * SIDE
# Tiles 0 to 3 are the sums, 4 and 5 two tiles of A, 6 and 7 two of B.
SUMS, LEFT, RIGHT = (0, 1, 2, 3), (4, 5), (6, 7)


def configure(code: Code, place: Value) -> None:
    """All eight tiles are of sixteen rows of 64 bytes; writes 64 bytes to `place`, which are free again at once."""
    for i in range(8):
        code.store(I64(1 if i == 0 else 0), place, i)
    for tile in range(8):
        code.store(I16(4 * SIDE), place, 8 + tile)
        code.store(I8(SIDE), place, 48 + tile)
    code.call("llvm.x86.ldtilecfg", VOID, place)


def release(code: Code) -> None:
    """Give the tiles back, so that others who look at the processor's state find little to save."""
    code.call("llvm.x86.tilerelease", VOID)


def products(
    code: Code,
    steps: Value,
    left: tuple[Value, Value, Value],
    right: tuple[Value, Value, Value],
    sums: Sequence[Value],
    sums_row: Value,
    fresh: bool,
) -> None:
    """32 rows by 32 columns: sums[2 i + j], a place each, += left rows 16 i.. times right columns 16 j.., over `steps` tiles.

    left: (place, bytes from row to row, bytes from step to step), of 32 rows; right: the same, of rows of 32 columns.
    """
    b = code.b
    for tile in SUMS:
        if fresh:
            code.call("llvm.x86.tilezero", VOID, I8(tile))
        else:
            code.call("llvm.x86.tileloadd64", VOID, I8(tile), sums[tile], sums_row)
    with code.loop(0, steps) as step:
        for i, tile in enumerate(LEFT):
            place, row, distance = left
            offset = b.add(b.mul(step, distance), b.mul(row, I64(SIDE * i)))
            code.call("llvm.x86.tileloadd64", VOID, I8(tile), code.at(place, offset), row)
        for j, tile in enumerate(RIGHT):
            place, row, distance = right
            offset = b.add(b.mul(step, distance), I64(4 * SIDE * j))
            code.call("llvm.x86.tileloadd64", VOID, I8(tile), code.at(place, offset), row)
        for tile in SUMS:
            code.call("llvm.x86.tdpbf16ps", VOID, I8(tile), I8(LEFT[tile >> 1]), I8(RIGHT[tile & 1]))
    for tile in SUMS:
        code.call("llvm.x86.tilestored64", VOID, I8(tile), sums[tile], sums_row)


def transposed(code: Code, rows: Sequence[Value]) -> list[Value]:
    """Lane j of result i is lane i of rows[j], for sixteen vectors of sixteen words."""
    for distance in (8, 4, 2, 1):
        low = [lane + SIDE * (lane // distance % 2) - distance * (lane // distance % 2) for lane in range(SIDE)]
        high = [lane + distance for lane in low]
        swapped = list(rows)
        for i in range(SIDE):
            if not i & distance:
                swapped[i] = code.shuffle(rows[i], rows[i + distance], low)
                swapped[i + distance] = code.shuffle(rows[i], rows[i + distance], high)
        rows = swapped
    return list(rows)


def zero_words(code: Code, place: Value, first: Value, last: Value) -> None:
    """place[first:last] = 0, in words."""
    with code.loop(first, last) as w:
        code.store(I32(0), place, w)
