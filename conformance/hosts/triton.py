"""Triton's interpreter in place of a chip; it takes bfloat16 and float8 for integers, and `repair` makes them numbers.

Up to 3.9 a bfloat16 product multiplies integers, a cast to bfloat16 truncates, one to float8 loses carries. Repaired: operands
are widened to float32, which is exact, and results rounded to nearest even; float8_e4m3fn saturates at 448, as chips convert.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

# Triton's name of a type -> the NumPy dtype that its bits are, and the largest number that a cast may leave.
NARROW: dict[str, tuple[np.dtype[Any], float]] = {
    "bf16": (np.dtype(ml_dtypes.bfloat16), np.inf),
    "fp8e4nv": (np.dtype(ml_dtypes.float8_e4m3fn), 448.0),
    "fp8e5": (np.dtype(ml_dtypes.float8_e5m2), 57344.0),
    "fp8e4b8": (np.dtype(ml_dtypes.float8_e4m3fnuz), 240.0),
}


def requested() -> bool:
    """True where the environment tells Triton to interpret kernels, spelled as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def prepare() -> None:
    """Repair the interpreter where it was asked for and there is one."""
    if requested() and find_spec("triton") is not None:
        repair()


def interpreting() -> bool:
    """True where kernels of this process may run in the interpreter, whoever switched it on: nothing else imports it."""
    return requested() or "triton.runtime.interpreter" in sys.modules


def widened(data: Array, name: str) -> Array:
    """float32 of what the interpreter holds of a narrow type; anything else as it is."""
    if name not in NARROW:
        return data
    result: Array = np.ascontiguousarray(data).view(NARROW[name][0]).astype(np.float32).reshape(data.shape)
    return result


def narrowed(values: Array, name: str, held: np.dtype[Any]) -> Array:
    """What the interpreter holds of a type, from numbers: rounded to nearest even, too large ones saturated."""
    if name not in NARROW:
        same: Array = values.astype(held)
        return same
    dtype, largest = NARROW[name]
    values = np.asarray(values, np.float32)
    result: Array = np.clip(values, -largest, largest).astype(dtype).view(held).reshape(values.shape)
    return result


def repair() -> None:
    """Replace the interpreter's casts, arithmetic, dot products and reductions; a second call changes nothing."""
    interpreter: Any = import_module("triton.runtime.interpreter")
    tl: Any = import_module("triton.language")
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if hasattr(builder, "repaired"):
        return
    builder.repaired = True
    held: Callable[[Any], np.dtype[Any]] = interpreter._get_np_dtype
    cast_impl, binary_op, unary_op = builder.cast_impl, builder.binary_op, builder.unary_op

    def wide(operand: Any) -> Array:
        return widened(operand.data, operand.dtype.scalar.name)

    def cast(self: Any, operand: Any, target: Any) -> Any:
        if {operand.dtype.scalar.name, target.scalar.name} & set(NARROW):
            return handle(narrowed(wide(operand), target.scalar.name, held(target.scalar)), target.scalar)
        return cast_impl(self, operand, target)

    def convert(self: Any, operand: Any, target: Any, rounding_mode: Any) -> Any:
        return handle(narrowed(wide(operand), target.scalar.name, held(target.scalar)), target.scalar)

    def binary(self: Any, left: Any, right: Any, operation: Callable[[Array, Array], Array]) -> Any:
        if left.dtype.scalar.name not in NARROW:
            return binary_op(self, left, right, operation)
        found = operation(wide(left), wide(right))
        if found.dtype == np.bool_:
            return handle(found, tl.int1)
        return handle(narrowed(found, left.dtype.scalar.name, left.data.dtype), left.dtype.scalar)

    def unary(self: Any, operand: Any, operation: Callable[[Array], Array]) -> Any:
        if operand.dtype.scalar.name not in NARROW:
            return unary_op(self, operand, operation)
        return handle(narrowed(operation(wide(operand)), operand.dtype.scalar.name, operand.data.dtype), operand.dtype.scalar)

    def dot(self: Any, left: Any, right: Any, start: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        # float64 holds every sum of int8 products exactly, and multiplies by a library, as NumPy's integers do not.
        width = np.float64 if left.data.dtype.kind == "i" and left.dtype.scalar.name not in NARROW else np.float32
        product = np.matmul(wide(left).astype(width), wide(right).astype(width))
        return handle((product + start.data).astype(start.data.dtype), start.dtype.scalar)

    def bf16(self: Any, value: float) -> Any:
        return handle(narrowed(np.array([value]), "bf16", held(tl.bfloat16)), tl.bfloat16)

    builder.cast_impl, builder.create_fp_to_fp = cast, convert
    builder.binary_op, builder.unary_op, builder.create_dot, builder.get_bf16 = binary, unary, dot, bf16
    _repair_reductions(interpreter.ReduceOps, tl)


def _repair_reductions(reductions: Any, tl: Any) -> None:
    def repaired(reduce: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, operand: Any, *operations: Any, **named: Any) -> Any:
            first = operand[0] if isinstance(operand, tuple) else operand
            name = first.dtype.scalar.name
            if name not in NARROW:
                return reduce(self, operand, *operations, **named)
            found = reduce(self, self.to_tensor(widened(first.handle.data, name), tl.float32), *operations, **named)
            value, *others = found if isinstance(found, tuple) else (found,)
            bits = narrowed(np.asarray(value.handle.data), name, first.handle.data.dtype)
            narrow = self.to_tensor(bits if value.type.is_block() else bits.reshape(-1)[0], first.dtype.scalar)
            return (narrow, *others) if others else narrow

        return run

    reductions.sum, reductions.min_max = repaired(reductions.sum), repaired(reductions.min_max)
