"""From a kernel's module to functions that ctypes calls without holding Python's lock, each compiled once per process."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir

from dsa_portable.backends.cpu.jit import emit, isa
from dsa_portable.backends.cpu.jit.kernels import attend, loops, score, select
from dsa_portable.errors import DeviceUnavailable

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()
# What must live as long as a function may be called; and LLVM compiles for one thread at a time.
_KEPT: list[Any] = []
_LOCK = threading.Lock()
# Scratch of each thread, as large as what it last asked for.
_OWN, _NOTHING = threading.local(), np.empty(0, np.uint8)
KEPT_BYTES = 4 << 20
_C = {ir.PointerType: ctypes.c_void_p, ir.IntType: ctypes.c_int64, ir.FloatType: ctypes.c_float}


def chosen() -> isa.Isa:
    """The best instruction set of this processor, or the one that `DSA_CPU_ISA` names; raises DeviceUnavailable without one."""
    name = os.environ.get("DSA_CPU_ISA")
    if name and name not in isa.NAMED:
        known = ", ".join(isa.NAMED)
        raise DeviceUnavailable(f"DSA_CPU_ISA is {name!r}, but {known} are instruction sets; set one of them or unset it.")
    lacks = {each.name: isa.lacking(each, _features()) or _refused(each) for each in isa.TABLE}
    if name and lacks[name]:
        raise DeviceUnavailable(f"DSA_CPU_ISA is {name!r}, but {lacks[name]}; unset it for what this processor has.")
    found = next((each for each in isa.TABLE if not lacks[each.name] and name in (None, "", each.name)), None)
    if found is None:
        raise DeviceUnavailable(f"the jit engine needs AVX2, but {lacks[isa.TABLE[-1].name]}; use DSA_CPU_ENGINE=onnx.")
    return found


def facts() -> dict[str, str]:
    """What settings.probe tells of the engine."""
    return {"isa": chosen().name}


@cache
def _features() -> frozenset[str]:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return frozenset()
    return frozenset(name for name, there in llvm.get_host_cpu_features().items() if there)


def _refused(found: isa.Isa) -> str:
    """Linux hands out the state of AMX tiles when a process asks for it: arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)."""
    if not found.tiles or (sys.platform == "linux" and ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0):
        return ""
    return "the operating system hands out no tile state"


def scratch(size: int) -> np.ndarray[Any, Any]:
    """Bytes of this thread's own, valid until it asks again; they begin a cache line, which rows of tiles then do not straddle.

    What is small stays with the thread: a decode step would spend a tenth of its time on pages that it gives back.
    """
    held: np.ndarray[Any, Any] = getattr(_OWN, "held", _NOTHING)
    if held.size < size + 64:
        held = np.empty(size + 64, np.uint8)
        if size <= KEPT_BYTES:
            _OWN.held = held
    start = -held.ctypes.data % 64
    return held[start : start + size]


def scoring(format: str, heads: int) -> tuple[Callable[..., None], int]:
    """(the function of kernels/score.py for an operand format, heads as it pads them)."""
    found = chosen()
    vectors = found.side_by_side(heads)
    return _scoring(found, format, vectors, bool(heads % (emit.LANES * vectors))), score.padded(heads, vectors)


def selecting() -> Callable[..., None]:
    """The function of kernels/select.py."""
    return _selecting(chosen())


def looping() -> dict[str, Callable[..., None]]:
    """The loops of kernels/loops.py that this processor has, by name."""
    found = chosen()
    there = {"raw float32 FMA": True, "raw bfloat16 pairs": found.pairs, "raw AMX tiles": found.tiles}
    return {name: _looping(found, name) for name in loops.LOOPS if there[name]}


@cache
def _looping(found: isa.Isa, name: str) -> Callable[..., None]:
    return _compiled(found, "loop", loops.ARGUMENTS, lambda module: loops.emit(module, name))


@dataclass(frozen=True)
class Attending:
    """The functions of kernels/attend.py for an operand and a result format, and how they pad."""

    attend: Callable[..., None]
    finish: Callable[..., None]
    vectors: int


def attending(format: str, dim: int, heads: int, out: str) -> Attending:
    """For operands of this format, and results of another."""
    found = chosen()
    vectors = found.side_by_side(heads)
    return Attending(
        _attending(found, format, found.pairs and format == "bf16" and dim % 2 == 0, vectors),
        _finishing(found, out, vectors),
        vectors,
    )


@cache
def _attending(found: isa.Isa, format: str, paired: bool, vectors: int) -> Callable[..., None]:
    return _compiled(found, "attend", attend.ARGUMENTS, lambda module: attend.emit(module, found, format, paired, vectors))


@cache
def _finishing(found: isa.Isa, format: str, vectors: int) -> Callable[..., None]:
    return _compiled(found, "finish", attend.FINISH, lambda module: attend.emit_finish(module, format, vectors))


@cache
def _scoring(found: isa.Isa, format: str, vectors: int, ragged: bool) -> Callable[..., None]:
    return _compiled(found, "score", score.ARGUMENTS, lambda module: score.emit(module, found, format, vectors, ragged))


@cache
def _selecting(found: isa.Isa) -> Callable[..., None]:
    return _compiled(found, "select", select.ARGUMENTS, select.emit)


def _compiled(
    found: isa.Isa, name: str, arguments: dict[str, ir.Type], write: Callable[[ir.Module], None]
) -> Callable[..., None]:
    module = ir.Module(name=name)
    write(module)
    with _LOCK:
        parsed = llvm.parse_assembly(str(module))
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=found.processor, features=",".join(f"+{feature}" for feature in found.features), opt=3
        )
        parsed.triple, parsed.data_layout = llvm.get_default_triple(), str(machine.target_data)
        options = llvm.create_pipeline_tuning_options(speed_level=1)  # higher ones take longer and gain nothing here
        options.loop_unrolling = False
        passes = llvm.create_pass_builder(machine, options)
        passes.getModulePassManager().run(parsed, passes)
        engine = llvm.create_mcjit_compiler(parsed, machine)
        engine.finalize_object()
        _KEPT.extend((parsed, engine, machine))
    types = [_C[type(each)] for each in arguments.values()]
    function: Callable[..., None] = ctypes.CFUNCTYPE(None, *types)(engine.get_function_address(name))
    return function
