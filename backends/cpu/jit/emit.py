"""A function of machine code under construction: loops, addresses and vectors of sixteen float32, over llvmlite's builder.

Vectors have sixteen lanes on every instruction set; where registers are narrower LLVM splits them, so that the same sums are
made in the same order everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from llvmlite import ir

Value: TypeAlias = Any  # llvmlite is not typed

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32, PTR, VOID = ir.HalfType(), ir.FloatType(), ir.PointerType(), ir.VoidType()
LANES = 16
V, VI = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite has no class for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


PAIRS = ir.VectorType(_BFloat(), 2 * LANES)


class Code:
    """The body of `void name(arguments)`; values are llvmlite's, integers are i64 unless their name says otherwise."""

    def __init__(self, module: ir.Module, name: str, arguments: Mapping[str, ir.Type]) -> None:
        function = ir.Function(module, ir.FunctionType(VOID, list(arguments.values())), name)
        self.module, self.function = module, function
        self.arguments = dict(zip(arguments, function.args, strict=True))
        self.entry = function.append_basic_block("entry")
        self.b = ir.IRBuilder(function.append_basic_block("body"))

    def __getitem__(self, name: str) -> Value:
        return self.arguments[name]

    def end(self) -> None:
        """Return; nothing may follow."""
        self.b.ret_void()
        ir.IRBuilder(self.entry).branch(self.function.blocks[1])

    # --- control ---

    @contextmanager
    def loop(self, first: Value, last: Value, step: int = 1) -> Iterator[Value]:
        """for (i = first; i < last; i += step)."""
        before = self.b.block
        head, body, after = (self.function.append_basic_block(name) for name in ("head", "loop", "after"))
        self.b.branch(head)
        self.b.position_at_end(head)
        i = self.b.phi(I64)
        i.add_incoming(number(first), before)
        self.b.cbranch(self.b.icmp_signed("<", i, number(last)), body, after)
        self.b.position_at_end(body)
        yield i
        i.add_incoming(self.b.add(i, number(step)), self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """if (condition)."""
        then, after = (self.function.append_basic_block(name) for name in ("then", "after"))
        self.b.cbranch(condition, then, after)
        self.b.position_at_end(then)
        yield
        self.b.branch(after)
        self.b.position_at_end(after)

    def variable(self, type: ir.Type, value: Value | None = None) -> Value:
        """A place on the stack, which LLVM makes a register; `value` is written now."""
        place = ir.IRBuilder(self.entry).alloca(type)
        if value is not None:
            self.b.store(value, place)
        return place

    def value(self, variable: Value, type: ir.Type) -> Value:
        """What a variable holds."""
        return self.b.load(variable, typ=type)

    # --- memory ---

    def at(self, pointer: Value, index: Value, type: ir.Type = I8) -> Value:
        """&((type *) pointer)[index]."""
        return self.b.gep(pointer, [number(index)], source_etype=type)

    def load(self, pointer: Value, index: Value, type: ir.Type, of: ir.Type | None = None) -> Value:
        """((of *) pointer)[index] as a `type`, however it is aligned; `of` is `type` where none is given."""
        return self.b.load(self.at(pointer, index, of or type), typ=type, align=1)

    def store(self, value: Value, pointer: Value, index: Value, of: ir.Type | None = None) -> None:
        """((of *) pointer)[index] = value, however it is aligned."""
        self.b.store(value, self.at(pointer, index, of or value.type), align=1)

    def pointer(self, address: Value) -> Value:
        """An i64 as a pointer."""
        return self.b.inttoptr(address, PTR)

    # --- arithmetic ---

    def sum(self, *terms: Value) -> Value:
        """Of i64."""
        total = number(terms[0])
        for term in terms[1:]:
            total = self.b.add(total, number(term))
        return total

    def least(self, left: Value, right: Value) -> Value:
        """The smaller i64."""
        return self.b.select(self.b.icmp_signed("<", left, number(right)), left, number(right))

    def most(self, left: Value, right: Value) -> Value:
        """The larger i64."""
        return self.b.select(self.b.icmp_signed(">", left, number(right)), left, number(right))

    def call(self, name: str, result: ir.Type, *arguments: Value) -> Value:
        """An intrinsic of LLVM's."""
        declared = self.module.globals.get(name)
        if declared is None:
            declared = ir.Function(self.module, ir.FunctionType(result, [a.type for a in arguments]), name)
        return self.b.call(declared, arguments)

    def fma(self, left: Value, right: Value, start: Value) -> Value:
        """left * right + start, rounded once."""
        kind = f"v{start.type.count}f32" if isinstance(start.type, ir.VectorType) else "f32"
        return self.call(f"llvm.fma.{kind}", start.type, left, right, start)

    def relu(self, value: Value) -> Value:
        """max(value, 0); NaN stays."""
        zero = ir.Constant(value.type, None)
        return self.b.select(self.b.fcmp_ordered("<", value, zero), zero, value)

    def splat(self, value: Value, lanes: int = LANES) -> Value:
        """A vector with `value` in every lane."""
        vector = ir.VectorType(value.type, lanes)
        one = self.b.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
        return self.b.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(I32, lanes), None))

    def shuffle(self, left: Value, right: Value, lanes: Sequence[int]) -> Value:
        """These lanes of left and right, one behind the other."""
        return self.b.shuffle_vector(left, right, ir.Constant(ir.VectorType(I32, len(lanes)), [I32(n) for n in lanes]))

    def summed(self, vectors: Sequence[Value]) -> Value:
        """Lane i is the sum of vectors[i]'s lanes, for sixteen of them: ((0 + 1) + (2 + 3)) + ..., neighbours first."""
        while len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [self.b.fadd(*(self.shuffle(a, b, range(odd, 2 * LANES, 2)) for odd in (0, 1))) for a, b in pairs]
        return vectors[0]


def number(value: Value) -> Value:
    """An i64, also of a Python int."""
    return I64(value) if isinstance(value, int) else value


def constant(type: ir.Type, value: float) -> Value:
    """In every lane, where `type` has lanes."""
    if isinstance(type, ir.VectorType):
        return ir.Constant(type, [ir.Constant(type.element, value)] * type.count)
    return ir.Constant(type, value)
