"""How kernels are launched, by architecture and operand: host tables and no tuning at run time, so that one call rounds alike.

What decides the order of a summation (blocks of keys and heads, parts of a split row) never depends on the batch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from dsa_portable.errors import InvalidArgument, Unsupported

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
        "float8_e4m3fn": Launch({"BLOCK_K": 128, "QUERIES": 1}, 4, 4),
        "int8": Launch({"BLOCK_K": 256, "QUERIES": 1}, 8, 3),
        "bfloat16": Launch({"BLOCK_K": 128, "QUERIES": 1}, 8, 3),
        "float16": Launch({"BLOCK_K": 128, "QUERIES": 1}, 8, 3),
    }
)
_SCORE_DECODED = Launch({"BLOCK_K": 128, "QUERIES": 1}, 8, 2)
# Rows that run past one block of keys; a row's scores are the same whatever runs beside it.
_MOST_ROWS = 128
# dtype of q -> of score_row, where a row is alone: TILES blocks of keys stream past its heads.
_SCORE_ONE = MappingProxyType(
    {
        "float8_e4m3fn": Launch({"BLOCK_K": 128, "TILES": 8}, 4, 3),
        "int8": Launch({"BLOCK_K": 128, "TILES": 8}, 4, 3),
        "bfloat16": Launch({"BLOCK_K": 64, "TILES": 4}, 4, 3),
        "float16": Launch({"BLOCK_K": 64, "TILES": 4}, 4, 3),
    }
)
_SCORE_ONE_DECODED = Launch({"BLOCK_K": 64, "TILES": 4}, 4, 2)
_SCORE_ONE_INTERPRETED = Launch({"BLOCK_K": 256, "TILES": 16}, 4, 1)
_MOST_HEADS = 64


def native_fp8(architecture: str) -> bool:
    """True where a dot product takes float8_e4m3fn as it is."""
    return architecture in NATIVE_FP8


def score(architecture: str, dtype: str, heads: int, max_seqlen_q: int) -> Launch:
    """Of score_rows for a dtype of q; with TILES among its blocks, of score_row."""
    native = dtype != "float8_e4m3fn" or native_fp8(architecture)
    block_h = {"BLOCK_H": min(_MOST_HEADS, max(16, power_of_two(heads)))}
    if max_seqlen_q <= 1 and heads <= _MOST_HEADS:
        one = _SCORE_ONE_INTERPRETED if architecture == INTERPRETER else _SCORE_ONE[dtype] if native else _SCORE_ONE_DECODED
        return Launch({**block_h, **one.blocks}, one.num_warps, one.num_stages)
    base = _SCORE[dtype] if native else _SCORE_DECODED
    blocks = {**block_h, **base.blocks, "ROWS": min(_MOST_ROWS, power_of_two(max_seqlen_q))}
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
    return Launch({"BLOCK": 1024}, 4 if candidates <= 8192 else 16, 1)


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
# A split that followed the batch, or a request's rows, would give a row other bits in other company or in another chunk.
PARTS, LEAST_PART = "DSA_CUDA_PARTS", 256

# --- sparse_attend, sm_90: kernels/sparse_attend_hopper.py ---

KERNELS = "DSA_CUDA_KERNELS"
# architecture -> dtypes of q that they take.
_HOPPER = MappingProxyType({"sm_90": ("bfloat16", "float16")})
# Of Triton, as its releases rename what Gluon offers.
GLUON = ("3.6", "3.7")
# Registers of a thread: two warpgroups of consumers and the producer share the 64 Ki of an SM.
_HOPPER_LAUNCH = Launch({"CONSUMER_REGISTERS": 216, "PRODUCER_REGISTERS": 72}, 4)
_HOPPER_PACKED = Launch({"CONSUMER_REGISTERS": 208, "PRODUCER_REGISTERS": 88}, 4)


def attend(architecture: str, dtype: str, heads: int, *, packed: bool) -> Launch:
    """Of attend_rows, for a dtype of q, over a packed cache or one of q's dtype."""
    if dtype == "float32" and architecture != INTERPRETER:
        return _ATTEND_FLOAT32
    if packed and architecture in _FEW_REGISTERS:
        return _ATTEND_FEW
    return _ATTEND.get((architecture, heads >= 64), _ATTEND_FEW)


def parts(topk: int) -> int:
    """Into how many parts the entries of every row are split: `DSA_CUDA_PARTS`, 1 by default, if none is too small to pay."""
    text = os.environ.get(PARTS) or "1"
    if not text.isdecimal() or int(text) < 1:
        raise InvalidArgument(f"{PARTS} is {text!r}, but a whole number from 1 on is accepted; set one or unset it.")
    return max(1, min(int(text), topk // LEAST_PART))


def asked_for() -> str | None:
    """`DSA_CUDA_KERNELS`, None where it is not set. Raises InvalidArgument for what names no kernels."""
    named = os.environ.get(KERNELS) or None
    if named not in (None, "portable", "hopper"):
        raise InvalidArgument(f"{KERNELS} is {named!r}, but 'portable' and 'hopper' are accepted; set one or unset it.")
    return named


def no_hopper(architecture: str, triton: str) -> str | None:
    """Why the Hopper kernels cannot run there, if they cannot."""
    if architecture not in _HOPPER:
        return f"the device is {architecture}, and they are for {', '.join(_HOPPER)}"
    if triton.rpartition(".")[0] not in GLUON:
        return f"triton is {triton}, and they were written for the Gluon of {', '.join(GLUON)}"
    return None


def hopper(architecture: str, dtype: str, triton: str, *, packed: bool) -> Launch | None:
    """Of attend_rows_hopper, None where attend_rows is to run. Raises Unsupported where what was asked for cannot run."""
    named = asked_for()
    why = no_hopper(architecture, triton) or (
        None if dtype in _HOPPER[architecture] else f"q is {dtype}, and they take {', '.join(_HOPPER[architecture])}"
    )
    if named == "hopper" and why:
        raise Unsupported(f"sparse_attend: {KERNELS} is 'hopper', but {why}; unset it or set 'portable'.", "format")
    if named == "portable" or why:
        return None
    return _HOPPER_PACKED if packed else _HOPPER_LAUNCH
