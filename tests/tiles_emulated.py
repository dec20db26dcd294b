"""AMX in plain LLVM IR: the tile instructions as functions over memory, so that the logic of their kernels runs anywhere.

EMULATED: it says nothing of a chip, and of rounding only that sums are float32. One thread at a time, as all share the tiles.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from dsa_portable.backends.cpu.jit import compile, isa

INSTRUCTIONS = r"""
@emulated.tiles = internal global [8 x [256 x float]] zeroinitializer, align 64
define internal void @emulated.ldtilecfg(ptr %c) noinline { ret void }
define internal void @emulated.tilerelease() noinline { ret void }
define internal void @emulated.tilezero(i8 %t) noinline {
  %i = zext i8 %t to i64
  %p = getelementptr [256 x float], ptr @emulated.tiles, i64 %i
  call void @llvm.memset.p0.i64(ptr %p, i8 0, i64 1024, i1 false)
  ret void
}
declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
define internal void @emulated.tileloadd64(i8 %t, ptr %a, i64 %s) noinline {
entry:
  %i = zext i8 %t to i64
  %p = getelementptr [256 x float], ptr @emulated.tiles, i64 %i
  br label %l
l:
  %r = phi i64 [0, %entry], [%rn, %l]
  %so = mul i64 %r, %s
  %sp = getelementptr i8, ptr %a, i64 %so
  %do = mul i64 %r, 64
  %dp = getelementptr i8, ptr %p, i64 %do
  call void @llvm.memcpy.p0.p0.i64(ptr %dp, ptr %sp, i64 64, i1 false)
  %rn = add i64 %r, 1
  %c = icmp ult i64 %rn, 16
  br i1 %c, label %l, label %e
e:
  ret void
}
define internal void @emulated.tilestored64(i8 %t, ptr %a, i64 %s) noinline {
entry:
  %i = zext i8 %t to i64
  %p = getelementptr [256 x float], ptr @emulated.tiles, i64 %i
  br label %l
l:
  %r = phi i64 [0, %entry], [%rn, %l]
  %so = mul i64 %r, %s
  %sp = getelementptr i8, ptr %a, i64 %so
  %do = mul i64 %r, 64
  %dp = getelementptr i8, ptr %p, i64 %do
  call void @llvm.memcpy.p0.p0.i64(ptr %sp, ptr %dp, i64 64, i1 false)
  %rn = add i64 %r, 1
  %c = icmp ult i64 %rn, 16
  br i1 %c, label %l, label %e
e:
  ret void
}
define internal void @emulated.tdpbf16ps(i8 %ct, i8 %at, i8 %bt) noinline {
entry:
  %ci = zext i8 %ct to i64
  %cp = getelementptr [256 x float], ptr @emulated.tiles, i64 %ci
  %ai = zext i8 %at to i64
  %ap = getelementptr [256 x float], ptr @emulated.tiles, i64 %ai
  %bi = zext i8 %bt to i64
  %bp = getelementptr [256 x float], ptr @emulated.tiles, i64 %bi
  br label %l
l:
  %x = phi i64 [0, %entry], [%xn, %le]
  %m = lshr i64 %x, 4
  %k = and i64 %x, 15
  %aw = getelementptr i32, ptr %ap, i64 %x
  %av = load i32, ptr %aw
  %alo = shl i32 %av, 16
  %ahi = and i32 %av, -65536
  %af0 = bitcast i32 %alo to float
  %af1 = bitcast i32 %ahi to float
  br label %n
n:
  %j = phi i64 [0, %l], [%jn, %n]
  %k16 = mul i64 %k, 16
  %bo = add i64 %k16, %j
  %bw = getelementptr i32, ptr %bp, i64 %bo
  %bv = load i32, ptr %bw
  %blo = shl i32 %bv, 16
  %bhi = and i32 %bv, -65536
  %bf0 = bitcast i32 %blo to float
  %bf1 = bitcast i32 %bhi to float
  %m16 = mul i64 %m, 16
  %co = add i64 %m16, %j
  %cw = getelementptr float, ptr %cp, i64 %co
  %cv = load float, ptr %cw
  %p0 = fmul float %af0, %bf0
  %p1 = fmul float %af1, %bf1
  %s0 = fadd float %cv, %p0
  %s1 = fadd float %s0, %p1
  store float %s1, ptr %cw
  %jn = add i64 %j, 1
  %jc = icmp ult i64 %jn, 16
  br i1 %jc, label %n, label %le
le:
  %xn = add i64 %x, 1
  %xc = icmp ult i64 %xn, 256
  br i1 %xc, label %l, label %e
e:
  ret void
}
"""
DECLARED = re.compile(r'declare .*@"llvm\.x86\.(tile|ldtile|tdp)')
CALLED = re.compile(r'@"llvm\.x86\.(tile\w+|ldtilecfg|tdpbf16ps)"')


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on `amx` needs nothing but AVX512, and its tiles lie in memory."""
    parse = compile.llvm.parse_assembly

    def parsed(text: str) -> Any:
        if CALLED.search(text):
            kept = "\n".join(line for line in text.splitlines() if not DECLARED.match(line))
            text = CALLED.sub(r"@emulated.\1", kept) + INSTRUCTIONS
        return parse(text)

    ours = replace(isa.NAMED["amx"], processor="skylake-avx512", features=isa.NAMED["avx512"].features)
    monkeypatch.setattr(compile.llvm, "parse_assembly", parsed)
    monkeypatch.setattr(compile, "_refused", lambda found: "")
    monkeypatch.setattr(isa, "TABLE", (ours, *isa.TABLE[1:]))
    monkeypatch.setitem(isa.NAMED, "amx", ours)
