"""How kernels are launched, by architecture and operand: host tables and no tuning at run time, so that one call rounds alike.

What decides the order of a summation (blocks of keys and heads, parts of a split row) never depends on the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

INTERPRETER = "interpreter"


@dataclass(frozen=True)
class Launch:
    """Block sizes by their names in the kernel, warps and pipeline stages."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int = 2


def power_of_two(number: int) -> int:
    """The least power of two that is not below."""
    return 1 << max(0, number - 1).bit_length()


FIND = Launch({"ROWS": 32, "REQUESTS": 64}, 1, 1)

# --- lightning_index: scores ---

# Architectures whose dot product takes float8_e4m3fn as it is; on others the bytes are decoded to float16 in registers.
NATIVE_FP8 = ("sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx950", "gfx1200", "gfx1201", INTERPRETER)
# dtype of q -> of score_rows. Keys stay, queries run past them: hopper.md measured 256 keys, 4 warps, 4 stages as the best.
_SCORE = MappingProxyType(
    {
        "float8_e4m3fn": Launch({"BLOCK_K": 256}, 4, 4),
        "int8": Launch({"BLOCK_K": 256}, 8, 3),
        "bfloat16": Launch({"BLOCK_K": 128}, 8, 3),
        "float16": Launch({"BLOCK_K": 128}, 8, 3),
    }
)
_SCORE_DECODED = Launch({"BLOCK_K": 128}, 8, 2)
# Rows that run past one block of keys; a row's scores are the same whatever runs beside it.
_MOST_ROWS = 128
# Keys that one row alone runs past: more programs of fewer keys hide more of the latency.
_DECODE_KEYS = 128


def native_fp8(architecture: str) -> bool:
    """True where a dot product takes float8_e4m3fn as it is."""
    return architecture in NATIVE_FP8


def score(architecture: str, dtype: str, heads: int, max_seqlen_q: int) -> Launch:
    """Of score_rows, for a dtype of q."""
    base = _SCORE[dtype] if dtype != "float8_e4m3fn" or native_fp8(architecture) else _SCORE_DECODED
    rows = min(_MOST_ROWS, power_of_two(max_seqlen_q))
    keys = min(_DECODE_KEYS, base.blocks["BLOCK_K"]) if rows == 1 and architecture != INTERPRETER else base.blocks["BLOCK_K"]
    blocks = {"BLOCK_K": keys, "BLOCK_H": min(64, max(16, power_of_two(heads))), "ROWS": rows}
    return Launch(blocks, base.num_warps, base.num_stages)


# --- lightning_index: selection, exact whatever these are ---

SAMPLE = MappingProxyType({"SAMPLE": 4096, "RUN": 8})
_CAPACITIES = ((2048, 8192), (8192, 16384))  # (largest topk, candidates); above the last every row is searched whole
_SCAN, _SCAN_INTERPRETED = Launch({"BLOCK": 512}, 1, 1), Launch({"BLOCK": 4096}, 1, 1)
BOUND = Launch(SAMPLE, 4, 1)


def capacity(topk: int) -> int:
    """Candidates that a row may have."""
    return next((size for most, size in _CAPACITIES if topk <= most), _CAPACITIES[-1][1])


def scan(architecture: str) -> Launch:
    """Of count_parts and scan_parts."""
    return _SCAN_INTERPRETED if architecture == INTERPRETER else _SCAN


def pick(candidates: int) -> Launch:
    """Of pick_rows."""
    return Launch({"BLOCK": 1024}, 8 if candidates <= 8192 else 16, 1)


def scan_parts(rows: int) -> int:
    """Programs that share a row: few rows alone would leave the chip idle."""
    return max(1, min(16, 2048 // power_of_two(rows)))


# --- sparse_attend ---

# (architecture, 64 heads or more) -> of attend_rows with 16-bit operands; others run as _ATTEND_FEW.
_ATTEND = MappingProxyType(
    {
        ("sm_90", True): Launch({"BLOCK_H": 64, "BLOCK_K": 64}, 8, 2),
        ("sm_80", True): Launch({"BLOCK_H": 64, "BLOCK_K": 32}, 8, 2),
        ("sm_100", True): Launch({"BLOCK_H": 64, "BLOCK_K": 32}, 8, 2),
        ("sm_103", True): Launch({"BLOCK_H": 64, "BLOCK_K": 32}, 8, 2),
        (INTERPRETER, True): Launch({"BLOCK_H": 64, "BLOCK_K": 256}, 8, 2),
        (INTERPRETER, False): Launch({"BLOCK_H": 16, "BLOCK_K": 256}, 8, 2),
    }
)
_ATTEND_FEW = Launch({"BLOCK_H": 16, "BLOCK_K": 32}, 4, 2)
# Where dequantising beside a tile of 64 heads would spill kilobytes: mma.sync keeps its operands in registers.
_FEW_REGISTERS = ("sm_80", "sm_86", "sm_89", "sm_120")
_ATTEND_FLOAT32 = Launch({"BLOCK_H": 16, "BLOCK_K": 16}, 8, 1)
MERGE = Launch({"BLOCK_H": 4}, 4, 1)
# Few heads make too few programs of a decode step: their rows are split, if that leaves parts of so many entries. A split that
# followed the batch, or a request's rows, would give a row other bits in other company or in another chunk.
_PARTS, _LEAST_PART = 2, 256


def attend(architecture: str, dtype: str, heads: int, *, packed: bool) -> Launch:
    """Of attend_rows, for a dtype of q, over a packed cache or one of q's dtype."""
    if dtype == "float32" and architecture != INTERPRETER:
        return _ATTEND_FLOAT32
    if packed and architecture in _FEW_REGISTERS:
        return _ATTEND_FEW
    return _ATTEND.get((architecture, heads >= 64), _ATTEND_FEW)


def parts(heads: int, topk: int) -> int:
    """Into how many parts the entries of every row are split."""
    return 1 if heads >= 64 else max(1, min(_PARTS, topk // _LEAST_PART))
