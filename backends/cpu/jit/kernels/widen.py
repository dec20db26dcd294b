"""Stored numbers as the products take them: float32, or bfloat16 in pairs; both exactly.

A pair is one 32-bit word with the *later* element in its lower half: VDPBF16PS adds the product of the upper halves first, so
that the sum runs over ascending d as a chain of float32 FMAs does, bit by bit.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from dsa_portable.backends.cpu.jit.emit import F16, F32, I8, I16, I32, Code, Value, constant

# Operand formats, as the contract names them -> what memory holds of one number.
STORED = {"e4m3": I8, "int8": I8, "bf16": I16, "f16": F16, "f32": F32}
BYTES = {"e4m3": 1, "int8": 1, "bf16": 2, "f16": 2, "f32": 4}


def to_float32(code: Code, format: str, stored: Value) -> Value:
    """The same numbers as a vector of float32."""
    b, lanes = code.b, stored.type.count
    floats, words = ir.VectorType(F32, lanes), ir.VectorType(I32, lanes)
    if format == "int8":
        return b.sitofp(stored, floats)
    if format == "bf16":
        return b.bitcast(b.shl(b.zext(stored, words), constant(words, 16)), floats)
    if format == "f16":
        return b.fpext(stored, floats)
    if format == "f32":
        return stored
    # e4m3: magnitude m = eeeemmm is 2^(e-7) * 1.mmm, and below m = 8 it is m * 2^-9, the distance of 2^-6 * 1.mmm from 2^-6.
    byte = b.zext(stored, words)
    m = b.and_(byte, constant(words, 0x7F))
    shifted = b.shl(m, constant(words, 20))
    normal = b.add(shifted, constant(words, 120 << 23))
    above = b.bitcast(b.add(shifted, constant(words, 121 << 23)), floats)
    small = b.bitcast(b.fsub(above, constant(floats, 2.0**-6)), words)
    finite = b.select(b.icmp_unsigned("<", m, constant(words, 8)), small, normal)
    magnitude = b.select(b.icmp_unsigned("==", m, constant(words, 0x7F)), constant(words, 0x7FC00000), finite)
    sign = b.shl(b.and_(byte, constant(words, 0x80)), constant(words, 24))
    return b.bitcast(b.or_(magnitude, sign), floats)


def to_bfloat16(code: Code, format: str, stored: Value) -> Value:
    """The same numbers as a vector of bfloat16, in integers of 16 bits."""
    b = code.b
    if format == "bf16":
        return stored
    if format == "e4m3" and stored.type.count == 32:
        return _e4m3_to_bfloat16(code, stored)
    words = b.bitcast(to_float32(code, format, stored), ir.VectorType(I32, stored.type.count))
    return b.trunc(b.lshr(words, constant(words.type, 16)), ir.VectorType(I16, stored.type.count))


# bfloat16 of m * 2^-9 for m below 8: the lower bytes, then the upper ones.
_SMALL = [int(np.float32(m * 2.0**-9).view(np.uint32) >> 16) for m in range(8)]
_SMALL_BYTES = [*(n & 0xFF for n in _SMALL), *(n >> 8 for n in _SMALL)]


def _e4m3_to_bfloat16(code: Code, stored: Value) -> Value:
    """As to_float32 has it, 32 numbers at a time in sixteen bits; what is below m = 8 is looked up."""
    b, halves, octets = code.b, ir.VectorType(I16, 32), ir.VectorType(I8, 64)
    half = b.zext(stored, halves)
    m = b.and_(half, constant(halves, 0x7F))
    normal = b.add(b.shl(m, constant(halves, 4)), constant(halves, 120 << 7))
    place = b.bitcast(b.add(b.add(b.shl(m, constant(halves, 8)), m), constant(halves, 8 << 8)), octets)
    table = ir.Constant(octets, [I8(n) for n in _SMALL_BYTES * 4])
    small = b.bitcast(code.call("llvm.x86.avx512.pshuf.b.512", octets, table, place), halves)
    finite = b.select(b.icmp_unsigned("<", m, constant(halves, 8)), small, normal)
    magnitude = b.select(b.icmp_unsigned("==", m, constant(halves, 0x7F)), constant(halves, 0x7FC0), finite)
    return b.or_(magnitude, b.shl(b.and_(half, constant(halves, 0x80)), constant(halves, 8)))


def narrowed(code: Code, format: str, value: Value) -> Value:
    """float32 rounded to the nearest number of a format, to even where two are as near; NaN stays one. As memory holds it."""
    b, lanes = code.b, value.type.count
    if format == "f32":
        return value
    if format == "f16":
        return b.fptrunc(value, ir.VectorType(F16, lanes))
    words = ir.VectorType(I32, lanes)
    bits = b.bitcast(value, words)
    odd = b.and_(b.lshr(bits, constant(words, 16)), constant(words, 1))
    nearest = b.add(bits, b.add(odd, constant(words, 0x7FFF)))
    found = b.select(b.fcmp_unordered("uno", value, value), constant(words, 0x7FC00000), nearest)
    return b.trunc(b.lshr(found, constant(words, 16)), ir.VectorType(I16, lanes))


def row(code: Code, format: str, paired: bool, source: Value, dim: Value, target: Value) -> None:
    """Write a row of `dim` numbers as float32, or as pairs, of which there is half a one where dim is odd."""
    type, step = STORED[format], 32 if paired else 16
    whole = code.b.and_(dim, code.b.neg(dim.type(step)))
    with code.loop(0, whole, step) as d:
        _write(code, format, paired, source, d, target, step)
    if paired:
        with code.loop(whole, code.b.and_(dim, dim.type(-2)), 2) as d:
            _write(code, format, paired, source, d, target, 2)
        with code.when(code.b.trunc(dim, ir.IntType(1))):
            last = code.b.sub(dim, dim.type(1))
            one = code.b.insert_element(ir.Constant(ir.VectorType(type, 1), None), code.load(source, last, type), I32(0))
            half = code.b.extract_element(to_bfloat16(code, format, one), I32(0))
            code.store(I16(0), target, last)
            code.store(half, target, dim, I16)
    else:
        with code.loop(whole, dim) as d:
            _write(code, format, paired, source, d, target, 1)


def _write(code: Code, format: str, paired: bool, source: Value, d: Value, target: Value, count: int) -> None:
    type = STORED[format]
    stored = code.load(source, d, ir.VectorType(type, count), type)
    if not paired:
        code.store(to_float32(code, format, stored), target, d, F32)
        return
    halves = to_bfloat16(code, format, stored)
    swapped = code.shuffle(halves, halves, [i ^ 1 for i in range(count)])
    code.store(swapped, target, d, I16)
