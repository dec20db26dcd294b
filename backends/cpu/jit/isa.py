"""The instruction sets that kernels are written for, best first, and what each needs of a processor."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

# Operand formats that bfloat16 holds exactly.
PAIRED = ("e4m3", "int8", "bf16")


@dataclass(frozen=True)
class Isa:
    """How products are made; everything else is the same code."""

    name: str
    processor: str  # that LLVM schedules for
    features: tuple[str, ...]  # as LLVM calls them, all needed
    pairs: bool  # two bfloat16 products at a time
    vectors: int  # of sixteen heads that are summed side by side, at most: as many as there are registers for
    tiles: bool = False  # pairs are multiplied in AMX tiles, which sum products of even and of odd elements apart

    def paired(self, format: str) -> bool:
        """Whether products of this operand format are made in pairs."""
        return self.pairs and format in PAIRED

    def side_by_side(self, heads: int) -> int:
        """Vectors of sixteen heads that are summed side by side: a power of two, and a tile's pair of them at least."""
        return max(1 + self.tiles, min(self.vectors, 1 << (-(-heads // 16) - 1).bit_length()))


_AVX2 = ("avx2", "fma", "f16c", "popcnt", "bmi", "bmi2")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
_BF16 = (*_AVX512, "avx512bf16")
TABLE = (
    Isa("amx", "sapphirerapids", (*_BF16, "amx-tile", "amx-bf16"), pairs=True, vectors=4, tiles=True),
    Isa("avx512-bf16", "znver4", _BF16, pairs=True, vectors=4),
    Isa("avx512", "skylake-avx512", _AVX512, pairs=False, vectors=4),
    Isa("avx2", "haswell", _AVX2, pairs=False, vectors=1),
)
NAMED = {isa.name: isa for isa in TABLE}


def lacking(isa: Isa, features: Container[str]) -> str:
    """What a processor with these features lacks for an instruction set, in words; empty where it has all."""
    missing = [feature for feature in isa.features if feature not in features]
    return f"this processor has no {missing[0]}" if missing else ""
