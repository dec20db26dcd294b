"""Planted faults of sparse_attend: edits of its honest kernel, and what no observation can separate from a right answer.

Codes A1 to A32 are those of the suite's published fault list (A6 is the caller's); the others stand for further bugs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.cases.sparse_attend import V32_SCALE
from dsa_portable.conformance.judging.accumulator import dot, rounded
from dsa_portable.conformance.selftest.memory import as_contiguous, remembered, written_as_contiguous
from dsa_portable.conformance.selftest.plant import Edit, Fault
from dsa_portable.formats import Unpacked, unpack
from dsa_portable.profile import Profile

Array: TypeAlias = np.ndarray[Any, Any]

# Used inside edits.
__all__ = ["as_contiguous", "remembered", "written_as_contiguous"]

# What gives a right answer, bit for bit or within the rounding that every order of summation has; so it is no fault.
UNOBSERVABLE: Mapping[str, str] = MappingProxyType(
    {
        "invalid entries masked with a large finite negative logit instead of being skipped": (
            "exp(-1e12 - maximum) is exactly 0 in float32, so every sum is the same; only a row of nothing but invalid "
            "entries differs, and that is A23"
        ),
        "something other than the row's maximum subtracted before exp": (
            "numerator and normaliser are multiplied by the same exp(maximum - c), which cancels; 16-bit probabilities are "
            "rounded elsewhere by it, as their profile allows, and where it overflows or underflows it is A11"
        ),
        "an entry of probability 0 gathered from memory that holds a finite number": (
            "0 times a finite number adds exactly 0; where the memory holds NaN it is A47"
        ),
    }
)


def maximum_so_far(logits: Array) -> Array:
    """[H, n], the running maximum that each key meets in an online softmax over tiles of 64."""
    tiles = np.maximum.reduceat(logits, np.arange(0, logits.shape[1], 64), axis=1)
    return np.maximum.accumulate(tiles, axis=1).repeat(64, axis=1)[:, : logits.shape[1]]


def by_tiles(p: Array, values: Array, profile: Profile, dtype: str) -> Array:
    """[H, value_dim], rounded to the dtype after every tile of 64 keys."""
    total = np.zeros((len(p), values.shape[1]), np.float32)
    for first in range(0, len(values), 64):
        tile = slice(first, first + 64)
        backwards = np.ascontiguousarray(p[:, tile][:, ::-1]), np.ascontiguousarray(values[tile][::-1].T)
        total = rounded(total + dot(*backwards, profile.accumulator), dtype)
    return total


def merged_base_two(logits: Array, values: Array) -> Array:
    """[H, value_dim] of two splits, weighted with 2^lse though each lse is natural."""
    merged, weights = np.zeros((len(logits), values.shape[1]), np.float32), np.zeros((len(logits), 1), np.float32)
    for split in np.array_split(np.arange(len(values)), min(2, len(values))):
        top = logits[:, split].max(axis=1, keepdims=True)
        shares = np.exp(logits[:, split] - top)
        total = shares.sum(axis=1, keepdims=True)
        weight = np.exp2(top + np.log(total) - logits.max(axis=1, keepdims=True))
        merged, weights = merged + weight * (shares @ values[split]) / total, weights + weight
    return np.asarray(merged / weights)


def truncated(out: Array, dtype: np.dtype[Any]) -> Array:
    """float32 cut to the dtype: one unit nearer to zero wherever rounding went away from it."""
    stored = out.astype(dtype)
    bits = stored.view(f"u{dtype.itemsize}")
    return np.asarray(bits - (abs(stored.astype(np.float32)) > abs(out)).astype(bits.dtype)).view(dtype)


def in_range(batch: Mapping[str, Array], row: int, entries: Array) -> Array:
    """Which entries lie in the row's key range, if the batch has some; such ranges are for the index alone."""
    if "key_start" not in batch:
        return np.ones(len(entries), np.bool_)
    return np.asarray((entries >= batch["key_start"][row]) & (entries < batch["key_end"][row]))


def others_of_tile(call: Call, rows: range, row: int, context: int) -> Array:
    """What the other rows of its tile of four name."""
    tile = [other for other in rows if (other - rows.start) // 4 == (row - rows.start) // 4 and other != row]
    length = call.arrays.get("topk_length")
    lists = [call.arrays["indices"][other, : None if length is None else max(0, length[other])] for other in tile]
    named = np.unique(np.concatenate([np.empty(0, np.int64), *lists])).astype(np.int64)
    return named[(named >= 0) & (named < context)]


# nsr: values, scales, rotated part; nrs: values, rotated part, scales.
NSR_AS_NRS = {"v32_fp8_656_nsr": "ascend_656_nrs_fp8", "v32_fp8_656_nsr_f32": "ascend_656_nrs_fp8"}
NRS_AS_NSR = {"ascend_656_nrs_fp8": "v32_fp8_656_nsr_f32", "ascend_656_nrs_int8": "v32_fp8_656_nsr_f32"}


def misread(others: Mapping[str, str], name: str, cache: Array) -> Unpacked:
    """The parts of a cache; scales and rotated part from where the other layout has them, if there is one."""
    found, other = unpack(name, cache), unpack(others.get(name, name), cache)
    return found._replace(scale=other.scale, rope=other.rope)


def as_fnuz(parts: Unpacked) -> Unpacked:
    """The same bytes, e4m3fn taken for e4m3fnuz: half the value, and NaN for -0."""
    codes = parts.values
    return parts._replace(values=codes.view(ml_dtypes.float8_e4m3fnuz)) if codes.dtype == ml_dtypes.float8_e4m3fn else parts


# Texts that edits start from, and what begins another line of a row's work.
LINE = "\n" + 12 * " "
SCALE = 'call.options["softmax_scale"]'
LOGITS = "rounded(dot(q[:, ::-1], kv[:, ::-1], profile.accumulator) * softmax_scale, profile.logit)"
TOP = "logits.max(axis=1)"
P = "rounded(shares, profile.p)"
WEIGHED = "dot(np.ascontiguousarray(p[:, ::-1]), np.ascontiguousarray(values[::-1].T), profile.accumulator)"
KV = "rounded(kv, profile.kv_compute)"
ENTRIES = 'call.arrays["indices"][row].astype(np.int64)'
TOPK_LENGTH = 'int(call.arrays["topk_length"][row]) if "topk_length" in call.arrays else len(entries)'
UPPER = "entries < context"
COUNTED = "np.arange(len(entries)) < count"
POSITIONS = "entries[inside & counted]"
EMPTY_ROW, NAN_ROW = "outputs[row], lses[row] = 0, -np.inf", "outputs[row], lses[row] = np.nan, np.nan"
SINK = "np.exp(sink - top)"
LARGER = "np.maximum(top, np.minimum(sink, np.finfo(np.float32).max))"
LSE = "top + np.log(total)"
Q = 'q = call.arrays["q"][row]'
CONTEXT = 'context = int(batch["seqlens_k"][request])'
DIVMOD = "np.divmod(positions, page_size)"
LOOKUP = "table[request, page]"
CACHE = 'if options["kv_layout"] is None:'
PARTS = 'unpack(options["kv_layout"], call.arrays["kv"])'
TILES = 'np.repeat(scales, layout(options["kv_layout"]).tile, axis=1)'

SIGNATURE = "sparse_attend(call: Call, profile: Profile"
BATCH = "batch, options, softmax_scale = call.batch"
RETURN = 'return {"out": outputs, "lse": lses}'
HAS_NONE = "if not len(positions)"
FIRST = "inside & counted | ~np.logical_or.accumulate(inside & counted)"  # and the holes before it

# A kernel that remembers: what it has `left` lives as long as it does.
REMEMBERS: Edit = (SIGNATURE, f"{SIGNATURE}, left: Any = {{}}")
# Some entries are gathered that do not count.
SURPLUS: Edit = (HAS_NONE, "if not (inside & counted).any()")
# What is read outside the memory or the table is found somewhere inside, as on a lucky day.
IN_MEMORY: Edit = (CACHE, f'slots = slots % call.arrays["kv"][..., 0].size{LINE}{CACHE}')
IN_TABLE: Edit = (LOOKUP, "table[request, np.minimum(page, table.shape[1] - 1)]")
# Every index but -1 names some key, if there is one.
NOT_A_HOLE: Edit = ("(entries >= 0) & (entries < context)", "(entries != -1) & (context > 0)")

# fmt: off
FAULTS: tuple[Fault, ...] = (
    # --- logits ---
    Fault("A1", "softmax_scale dropped", SCALE, "1"),
    Fault("A2", "softmax_scale = 512^-0.5 whatever is passed", SCALE, "512**-0.5"),
    Fault("A33", "softmax_scale = 576^-0.5 whatever is passed", SCALE, 'call.arrays["q"].shape[2] ** -0.5', "FlashMLA's and Ascend's default"),
    Fault("A28", "softmax_scale off by 0.5%", SCALE, f"{SCALE} * 1.005"),
    Fault("A77", "softmax_scale of DeepSeek-V3.2 whatever is passed", SCALE, str(V32_SCALE)),
    Fault("A5", "rotated part of the keys dropped", "q[:, ::-1], kv[:, ::-1]", "q[:, 511::-1], kv[:, 511::-1]"),
    Fault("A34", "logits in float16", LOGITS, LOGITS.replace("profile.logit", '"float16"'), "FlagGems sparse_mla"),
    Fault("A10", "exp2 without log2(e)", "np.exp(logits", "np.exp2(logits"),
    Fault("A11", "no maximum subtracted: exp overflows", TOP, "np.zeros(heads, np.float32)"),

    # --- the sum over keys ---
    Fault("A12", "accumulator not rescaled when the maximum rises", P, P.replace("shares", "np.exp(logits - maximum_so_far(logits))")),
    Fault("A13", "output accumulated in bfloat16", WEIGHED, 'by_tiles(p, values, profile, "bfloat16")'),
    Fault("A76", "output accumulated in float16", WEIGHED, 'by_tiles(p, values, profile, "float16")', "FlagGems sparse_mla"),
    Fault("A14", "probabilities in float8", P, 'rounded(shares, "float8_e4m3fn")'),
    Fault("A29", "output truncated instead of rounded", "(weighed / total[:, None]).astype(dtype)", "truncated(weighed / total[:, None], dtype)"),
    Fault("A8", "last block of entries dropped", COUNTED, f"{COUNTED} - 64"),
    Fault("A73", "entries behind the last whole block dropped", COUNTED, f"{COUNTED} // 64 * 64", "FlashMLA takes multiples of 64 alone"),
    Fault("A9", "last token dropped", POSITIONS, f"{POSITIONS}[:-1]"),
    # Eight splits are merged before the last one is written, as in a race.
    Fault("A32", "last split missing from the merge", POSITIONS, f"np.concatenate(np.array_split({POSITIONS}, 8)[:-1])"),
    Fault("A35", "partial outputs merged in the other base", WEIGHED, "merged_base_two(logits, values) * total[:, None]", "vllm#28840"),
    # The running maximum is still -inf; what rescales the accumulator is exp(-inf - -inf).
    Fault("A36", "NaN where the first tile of a row is all holes", TOP, f"{TOP} + (0 if (inside & counted)[:64].any() else -np.inf - -np.inf)",
          "vllm#48366", more=((EMPTY_ROW, NAN_ROW),)),

    # --- which entries count ---
    Fault("A3", "-1 read as the last key", ENTRIES, f"{ENTRIES}; entries[entries == -1] = context - 1", "cudnn-frontend#298"),
    Fault("A4", "-1 read as key 0", ENTRIES, f"{ENTRIES}; entries[entries == -1] = 0", "cudnn-frontend#298"),
    Fault("A37", "only -1 skipped, other invalid indices wrap", POSITIONS, f"{POSITIONS} % context", "flashinfer-bench's and Ascend's references", more=(NOT_A_HOLE,)),
    Fault("A38", "only -1 skipped, other invalid indices clamped", POSITIONS, f"np.clip({POSITIONS}, 0, context - 1)", "FlashMLA decode skips -1 alone", more=(NOT_A_HOLE,)),
    Fault("A39", "indices past the request's end followed", " & (entries < context)", "", "TileLang's DeepSeek-V4 kernel", more=(IN_TABLE, IN_MEMORY)),
    Fault("A40", "first -1 ends the row", COUNTED, f"({COUNTED}) & np.logical_and.accumulate(entries != -1)", "npu_sparse_flash_attention"),
    Fault("A41", "repeated index counted once", POSITIONS, f"np.unique({POSITIONS})", "scatter masks of DeepSeek, TileLang, transformers"),
    Fault("A42", "indices ignored: attention is dense", POSITIONS, "np.arange(context)", "vllm-ascend#16005"),
    Fault("A43", "causal mask added again", UPPER, "entries < context - stop + row + 1", "npu_sparse_flash_attention, sparse_mode 3"),
    Fault("A44", "masked by row number, without the offset of the chunk", UPPER, "entries < min(context, row - begin + 1)", "TileLang and FlagGems sparse_mla"),
    Fault("A45", "entries past the count of visible keys not read", COUNTED, COUNTED.replace("count", "min(count, context - stop + row + 1)"), "npu_sparse_flash_attention"),
    Fault("A75", "key_start and key_end applied to the selected keys", POSITIONS, "entries[inside & counted & in_range(batch, row, entries)]"),
    Fault("A30", "topk_length ignored", TOPK_LENGTH, "len(entries)", "flashinfer#5095"),
    Fault("A46", "topk_length read per request", TOPK_LENGTH, TOPK_LENGTH.replace("row", "request"), "FlashMLA decode"),
    # All entries are gathered; those past topk_length get the probability 0.
    Fault("A47", "NaN of masked keys multiplied by 0", POSITIONS, "entries[inside]", "FlashMLA prefill, flash-attention#1745", more=(
        (LOGITS, f"np.where(counted[inside], {LOGITS}, -np.inf)"), (TOP, f"np.maximum({TOP}, -1e30)"), ("weighed / total", "weighed / np.maximum(total, 1e-30)"))),

    # --- rows without a valid entry ---
    Fault("A22", "empty row is NaN", EMPTY_ROW, NAN_ROW, "TileLang sparse_mla"),
    # Invalid entries are gathered as key 0; where there are no others, a finite mask leaves them equal probabilities.
    Fault("A23", "empty row is a mean of values", POSITIONS, "np.where(inside & counted, entries, 0)", "npu_sparse_flash_attention's mask of -1e12", more=(
        (LOGITS, f"np.where(inside & counted, {LOGITS}, -1e12)"), ("if not len(positions)", "if not context"))),
    # It outweighs every other part in a merge.
    Fault("A48", "lse of an empty row is +inf", EMPTY_ROW, "outputs[row], lses[row] = 0, np.inf", "FlashMLA"),

    # --- sink ---
    Fault("A15", "sink ignored", 'call.arrays.get("attn_sink")', "None"),
    Fault("A16", "sink to base 2", SINK, SINK.replace("exp", "exp2")),
    Fault("A17", "sink counted once per split", SINK, f"2 * {SINK}"),
    Fault("A18", "maximum not subtracted from the sink", SINK, "np.exp(sink)"),
    # It takes part in the maximum, and inf - inf is NaN.
    Fault("A49", "NaN where the sink is +inf", TOP, f"{TOP} if sink is None else np.maximum({TOP}, sink)", "rocm-libraries#12229"),
    # exp(lse) overflows for lse > 88.
    Fault("A50", "sink applied without subtracting a maximum", f"total + {SINK}", "total * (np.exp(lses[row]) + np.exp(sink)) / np.exp(lses[row])", "FlagGems flash_mla_sparse_fwd", more=((LARGER, "top"),)),
    Fault("A51", "sink in bfloat16", SINK, SINK.replace("sink", 'rounded(sink, "bfloat16")'), "TileLang's DeepSeek-V4 kernel"),

    # --- lse ---
    Fault("A19", "lse to base 2", LSE, f"({LSE}) / np.float32(np.log(2))", "vllm#28840, sglang#35045"),
    Fault("A20", "sink in lse", LSE, LSE.replace("total", f"total if sink is None else total + {SINK}")),
    Fault("A21", "maximum missing from lse", LSE, "np.log(total)"),
    Fault("A52", "lse in bfloat16", LSE, f'rounded({LSE}, "bfloat16")', "FlagGems sparse_mla"),
    # The first of the pair (maximum, sum).
    Fault("A53", "maximum returned as lse", LSE, "top", "npu_sparse_flash_attention's softmax_max"),
    Fault("A83", "last split missing from lse alone", LSE, LSE.replace("total", "total * (7 / 8)")),
    Fault("A54", "lse in the order [heads, rows]", '"lse": lses', '"lse": lses.T.reshape(lses.shape)', "FlashMLA decode"),

    # --- rows and heads ---
    Fault("A26", "two heads swapped", Q, f"{Q}[[1, 0, *range(2, heads)]]"),
    # A kernel for 64 heads launched once.
    Fault("A69", "heads from 64 on repeat the first ones", Q, f"{Q}[np.arange(heads) % 64]"),
    Fault("A27", "last row of a request is zero", "range(begin, stop)", "range(begin, stop - 1 if stop - begin > 1 else stop)", "aiter#4244"),
    Fault("A70", "indices of a request's first row used for all its rows", ENTRIES, ENTRIES.replace("row", "begin")),
    Fault("A71", "cu_seqlens_q ignored: rows divided evenly",
          'begin, stop = int(batch["cu_seqlens_q"][request]), int(batch["cu_seqlens_q"][request + 1])',
          'begin, stop = np.arange(request, request + 2) * (batch["cu_seqlens_q"][-1] // len(batch["seqlens_k"]))'),
    # They fall to the last request.
    Fault("A72", "padding rows computed", "range(begin, stop)", 'range(begin, stop if request < len(batch["seqlens_k"]) - 1 else len(outputs))'),

    # --- what a key holds ---
    Fault("A7", "values taken from the last 512 columns", "kv[:, :value_dim]", "kv[:, -value_dim:]"),
    Fault("A25", "one tile's scale for all tiles", TILES, "scales[:, :1]", "ATOM#1466"),
    # They pass through e8m0.
    Fault("A55", "tile scales cut down to powers of two", TILES, TILES.replace("scales", "(scales.view(np.uint32) & 0xFF800000).view(np.float32)"), "FlashMLA#184"),
    Fault("A56", "tile scales in bfloat16", TILES, TILES.replace("scales", 'rounded(scales, "bfloat16")'), "FlashMLA on SM90"),
    Fault("A57", "656-byte cache read in the other order (nsr as nrs)", PARTS, PARTS.replace("unpack(", "misread(NSR_AS_NRS, "), "FlashMLA's cache on Ascend"),
    Fault("A58", "656-byte cache read in the other order (nrs as nsr)", PARTS, PARTS.replace("unpack(", "misread(NRS_AS_NSR, "), "Ascend's cache by FlashMLA"),
    Fault("A78", "e4m3 subnormals of the cache decoded as 0", "codes * ", "np.where(abs(codes) < 2**-6, 0, codes) * ", "decoders in software"),
    Fault("A59", "e4m3fn cache decoded as e4m3fnuz", PARTS, f"as_fnuz({PARTS})", "sglang#29479"),

    # --- where a key lies ---
    Fault("A24", "stale page: the last page read from the one before", LOOKUP, "table[request, np.where(page == (context - 1) // page_size, np.maximum(page - 1, 0), page)]"),
    Fault("A60", "block table ignored", LOOKUP, "page"),
    Fault("A61", "block table of the neighbour request", LOOKUP, "table[(request + 1) % len(table), page]", more=(IN_MEMORY,)),
    Fault("A62", "page size assumed to be 64", 'page_size, table = int(call.batch_options["page_size"])', "page_size, table = 64", more=(IN_TABLE, IN_MEMORY)),
    # Page and slot by shift and mask.
    Fault("A74", "page size rounded down to a power of two", DIVMOD, DIVMOD.replace("page_size", "1 << page_size.bit_length() - 1"), more=(IN_TABLE, IN_MEMORY)),
    # As long as the longest request needs.
    Fault("A79", "row stride of the block table assumed", LOOKUP, 'table.reshape(-1)[request * -(-int(batch["seqlens_k"].max()) // page_size) + page]', more=(IN_MEMORY,)),
    Fault("A63", "first key of the page read for all of its keys", "* page_size + offset", "* page_size", "aiter#5591"),
    Fault("A64", "index taken as a physical slot", f"{LOOKUP} * page_size + offset", "positions", "FlashMLA decode, SGLang"),
    Fault("A65", "index taken as a row of the flat keys", 'int(batch["cu_seqlens_k"][request]) + positions', "positions", "FlashMLA prefill"),
    Fault("A31", "32-bit element offset wraps", CACHE, f"slots = (slots * WIDTH).astype(np.int32) // WIDTH{LINE}{CACHE}".replace("WIDTH", 'call.arrays["kv"].shape[-1]'),
          "aiter#5614, vllm#50576", more=(IN_MEMORY,)),
    Fault("A66", "seqlens_k rounded up to whole pages", CONTEXT, f'{CONTEXT}; context += -context % int(call.batch_options["page_size"] or 1)'),
    Fault("A67", "seqlens_k ignored: length taken from cu_seqlens_k", CONTEXT, f'{CONTEXT} if "block_table" in batch else int(np.diff(batch["cu_seqlens_k"])[request])'),
    Fault("A68", "ragged lengths ignored: the longest for all", CONTEXT, CONTEXT.replace("[request]", ".max()"), more=(IN_TABLE, IN_MEMORY)),

    # --- arithmetic: what a profile that declares float32 could skip ---
    Fault("A80", "keys and values in bfloat16 where float32 is declared", KV, 'rounded(kv, "bfloat16")'),
    Fault("A81", "probabilities in bfloat16 where float32 is declared", P, 'rounded(shares, "bfloat16")'),
    Fault("A82", "keys, values and probabilities in bfloat16 where float32 is declared", KV, 'rounded(kv, "bfloat16")', more=((P, 'rounded(shares, "bfloat16")'),)),

    # --- calls at the ends of what a batch may be ---
    Fault("A84", "requests from 64 on are not computed", "range(begin, stop)", "range(begin, stop if request < 64 else begin)", "sglang#40429"),
    Fault("A85", "requests from 64 on have the first ones' keys", LOOKUP, LOOKUP.replace("request", "request % 64"), "aiter#1815",
          more=(('int(batch["cu_seqlens_k"][request]) + positions', 'int(batch["cu_seqlens_k"][request % 64]) + positions'), IN_MEMORY)),
    Fault("A86", "nothing is written where no request has a key", RETURN, f"outputs = outputs if batch['seqlens_k'].any() else np.full_like(outputs, np.nan); {RETURN}", "DeepGEMM#353"),
    Fault("A87", "a call without rows gets one", 'np.zeros((len(call.arrays["q"])', 'np.zeros((max(1, len(call.arrays["q"]))', "vllm#55695"),
    Fault("A88", "max_seqlen_k taken for the length where there is one request", CONTEXT, f"{CONTEXT}; context = context if len(batch['seqlens_k']) > 1 else call.batch_options.get('max_seqlen_k', context)", more=(IN_TABLE, IN_MEMORY)),

    # --- one phase, or one format, alone ---
    Fault("A89", "pages that are neither 64 nor 128 taken for 64 in prefill", 'page_size, table = int(call.batch_options["page_size"])',
          'page_size, table = int(call.batch_options["page_size"]) if call.phase == "decode" or call.batch_options["page_size"] in (64, 128) else 64', "TensorRT-LLM#16219", more=(IN_TABLE, IN_MEMORY)),
    Fault("A90", "repeated index counted once in decode", POSITIONS, f"np.unique({POSITIONS}) if call.phase == 'decode' else {POSITIONS}"),
    Fault("A91", "repeated index counted once in a packed cache", POSITIONS, f"np.unique({POSITIONS}) if options['kv_layout'] else {POSITIONS}"),
    Fault("A92", "sink ignored in float16", 'call.arrays.get("attn_sink")', 'None if call.format == "f16" else call.arrays.get("attn_sink")'),
    Fault("A93", "sink ignored in a packed cache", 'call.arrays.get("attn_sink")', 'None if options["kv_layout"] else call.arrays.get("attn_sink")'),
    Fault("A94", "topk_length ignored in float16", TOPK_LENGTH, TOPK_LENGTH.replace("if ", "if call.format != 'f16' and ")),
    Fault("A95", "topk_length ignored in a packed cache", TOPK_LENGTH, TOPK_LENGTH.replace("if ", "if options['kv_layout'] is None and ")),

    # --- which entries count, once more ---
    Fault("A96", "topk_length read per request in decode", TOPK_LENGTH, TOPK_LENGTH.replace("[row]", "[request if call.phase == 'decode' else row]"), "cudnn-frontend#405"),
    Fault("A97", "topk_length read by the row in the request", TOPK_LENGTH, TOPK_LENGTH.replace("[row]", "[row - begin]"), "cudnn-frontend#785"),
    Fault("A98", "topk_length below 0 read as unsigned", TOPK_LENGTH, TOPK_LENGTH.replace("[row])", "[row]) % 2**32"), "cudnn-frontend#405"),
    # At most one row further.
    Fault("A99", "topk_length above topk reads on in the next row", TOPK_LENGTH, f'{TOPK_LENGTH}; entries = call.arrays["indices"].reshape(-1)[row * len(entries) :][: max(len(entries), min(count, 2 * len(entries)))].astype(np.int64)', "cudnn-frontend#785"),
    Fault("A100", "first keys in place of the list in a request that topk holds", POSITIONS, f"np.arange(len({POSITIONS})) if context <= len(entries) else {POSITIONS}"),
    Fault("A101", "as many entries read as are valid", POSITIONS, "entries[inside & counted & (np.arange(len(entries)) < (inside & counted).sum())]", "cudnn-frontend#405, vllm#36616"),
    Fault("A102", "chunk of entries skipped that begins behind the row's position", POSITIONS, "entries[inside & counted & (np.arange(len(entries)) // 64 * 64 <= context - stop + row)]", "FlagGems#2184"),
    Fault("A103", "last of an odd number of entries lost", POSITIONS, "entries[inside & counted & (np.arange(len(entries)) < len(entries) // 2 * 2)]", "cudnn-frontend#406"),

    # --- what does not count is multiplied by 0 ---
    Fault("A104", "NaN of a key that another row of the tile counts", POSITIONS, f"np.append({POSITIONS}, others_of_tile(call, range(begin, stop), row, context))", more=(
        SURPLUS, (LOGITS, f"np.where(np.arange(len(positions)) < (inside & counted).sum(), {LOGITS}, -np.inf)"))),
    Fault("A105", "NaN of padding rows spoils the tile they end", LOGITS, f"{LOGITS} + 0 * call.arrays['q'][batch['cu_seqlens_q'][-1] :][: 16 - batch['cu_seqlens_q'][-1] % 16].astype(np.float32).sum() * (row // 16 == batch['cu_seqlens_q'][-1] // 16)"),
    Fault("A106", "leading holes gathered as position 0", POSITIONS, f"np.where(inside & counted, entries, 0)[{FIRST}]", more=(
        SURPLUS, (LOGITS, f"np.where((inside & counted)[{FIRST}], {LOGITS}, -np.inf)"))),
    Fault("A107", "leading holes gathered as slot 0", POSITIONS, f"np.where(inside & counted, entries, 0)[{FIRST}]", more=(
        SURPLUS, (CACHE, f"slots = np.where((inside & counted)[{FIRST}], slots, 0){LINE}{CACHE}"), (LOGITS, f"np.where((inside & counted)[{FIRST}], {LOGITS}, -np.inf)"))),
    # Where the last tile of entries is not full.
    Fault("A108", "NaN that an earlier call left on the chip", WEIGHED, f"{WEIGHED} + 0 * left.get('sum', 0) * (len(positions) % 64 > 0)", more=(
        REMEMBERS, (RETURN, f"left['sum'] = outputs.astype(np.float32).sum(); {RETURN}"))),

    # --- numbers ---
    Fault("A109", "running maximum starts at 0", TOP, f"np.maximum({TOP}, 0)"),
    Fault("A110", "last of an odd number of heads lost", RETURN, f"outputs[:, heads // 2 * 2 :] = 0; {RETURN}", "tilelang-ascend#1741"),
    Fault("A111", "second of two given arrays not written", RETURN, f'lses = np.full_like(lses, np.nan) if options.get("out") else lses; {RETURN}'),

    # --- strides ---
    Fault("A112", "q read as if contiguous", BATCH, f'call = as_contiguous(call, "q"); {BATCH}', "sglang#30575, aiter#4919"),
    Fault("A113", "keys read as if contiguous", BATCH, f'call = as_contiguous(call, "kv"); {BATCH}', "FlagGems#5235"),
    Fault("A114", "indices read as if contiguous", BATCH, f'call = as_contiguous(call, "indices"); {BATCH}', "sglang#30575, aiter#4919"),
    Fault("A115", "block table read as if contiguous", BATCH, f'call = as_contiguous(call, "batch.block_table"); {BATCH}', "FlagGems#5235", more=(IN_MEMORY,)),
    Fault("A116", "sink and topk_length read as if contiguous", BATCH, f'call = as_contiguous(call, "attn_sink", "topk_length"); {BATCH}', "FlagGems#5235"),
    Fault("A117", "result written as if contiguous", RETURN, f"outputs = written_as_contiguous(call, outputs); {RETURN}", "FlagGems#5235"),

    # --- what an earlier call has left ---
    Fault("A118", "row-to-request map of an earlier call of the same shapes", BATCH, BATCH.replace("call.batch", 'remembered(left, call, "cu_seqlens_q")'), "TensorRT-LLM#17240, TensorRT-LLM#16925", more=(REMEMBERS,)),
    Fault("A119", "lengths of an earlier call of the same shapes", BATCH, BATCH.replace("call.batch", 'remembered(left, call, "seqlens_k")'), "aprender#2030, tokenspeed#348", more=(REMEMBERS, IN_TABLE, IN_MEMORY)),

    # --- of ten by hand, as in lightning_index.py ---
    Fault("A120", "q times softmax_scale rounded to the dtype of q", SCALE, "1", more=((Q, 'q = (call.arrays["q"][row].astype(np.float32) * np.float32(options["softmax_scale"])).astype(dtype)'),)),
    Fault("A121", "sinks of the first 16 heads repeated", "np.minimum(sink", "np.minimum((sink := sink[np.arange(heads) % 16])"),
    Fault("A122", "lse of a request's only row not written", RETURN, f"lses[[int(i) for i, j in zip(batch['cu_seqlens_q'], batch['cu_seqlens_q'][1:]) if j - i == 1]] = np.nan; {RETURN}"),
    Fault("A124", "keys with less than a ten-thousandth of the largest share skipped", P, P.replace("shares", "np.where(shares < 1e-4, 0, shares)")),
)
# fmt: on
