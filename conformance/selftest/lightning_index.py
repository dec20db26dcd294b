"""Planted faults of lightning_index: edits of its honest kernel, and what no result can tell apart, with the proof.

Codes I1 to I41 are those of the suite's published fault list; higher ones are further bugs of public ports.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.arrays import NUMPY_DTYPES
from dsa_portable.batch import DECODE_ROWS
from dsa_portable.conformance.judging.accumulator import rounded
from dsa_portable.conformance.selftest.memory import as_contiguous, remembered, written_as_contiguous
from dsa_portable.conformance.selftest.plant import Edit, Fault
from dsa_portable.profile import Accumulator

Array: TypeAlias = np.ndarray[Any, Any]

# Used inside edits.
__all__ = ["as_contiguous", "remembered", "written_as_contiguous"]

# What many edits take hold of, in the kernel's order.
SIGNATURE = "lightning_index(call: Call, profile: Profile"
BATCH = "batch, options, topk = call.batch"
RESULTS = "indices = np.full("
UNPACK = 'unpack(options["k_layout"], k)'
BASE = 'base = int(batch["cu_seqlens_k"][request])'
ROWS = "for row in range(first, last):"
CAUSAL = "length - (last - first) + (row - first) + 1"
KEY_START, KEY_END = 'int(batch["key_start"][row])', 'int(batch["key_end"][row])'
SEEN = "seen = np.arange(start, end)"
PAGE = 'batch["block_table"][request, seen // page_size]'
SLOT = "page * page_size + seen % page_size"
Q_ROW, W_ROW = "queries[row].astype(np.float32)", "weights[row].astype(np.float32)"
KEYS, SCALES = "k[slots].astype(np.float32)", "k_scale[slots].astype(np.float32)"
DOT = "dot(q[heads][:, ::-1], keys[:, ::-1], profile.accumulator)"
RELU = "np.maximum(dots, 0)"
WEIGHTS = "w[heads]"
SCALE = "rounded(scale, profile.scale_compute)"
FOUND = f"rounded(total * {SCALE}, profile.logit)"
RANKED, NAN_FIRST = "np.nan_to_num(found, nan=-np.inf)", "np.nan_to_num(found, nan=np.inf)"
SELECT, SELECT_HIGHEST = 'np.argsort(-ranked, kind="stable")[:topk]', 'np.argsort(ranked, kind="stable")[::-1][:topk]'
SORT = "np.sort(best)"
WRITE = "indices[row, : len(chosen)], scores[row, : len(chosen)] = chosen + start, found[chosen]"
RETURN = 'return {"indices": indices, "scores": scores}'

# Memory is read without a check: here what lies outside of it, or of the table, is its nearest end, as on a lucky day.
UNCHECKED_MEMORY = ("keys, scale =", "slots = slots.clip(0, len(k) - 1); keys, scale =")
UNCHECKED_TABLE = (PAGE, 'batch["block_table"][request].take(seen // page_size, mode="clip")')
UNCHECKED = (UNCHECKED_TABLE, UNCHECKED_MEMORY)

# A kernel that remembers: what it has `left` lives as long as it does.
REMEMBERS: Edit = (SIGNATURE, f"{SIGNATURE}, left: Any = {{}}")

# Used inside edits.
E4M3, FNUZ = NUMPY_DTYPES["float8_e4m3fn"], NUMPY_DTYPES["float8_e4m3fnuz"]
HOPPER = Accumulator(14, "RZ", 32)


def bf16_sum(terms: Iterable[Array]) -> Array:
    """The sum of the terms, rounded to bfloat16 after each of them."""
    total = np.zeros((), np.float32)
    for term in terms:
        total = rounded(total + term, "bfloat16")
    return total


def sortable(scores: Array) -> Array:
    """The bits of float16 or float32 as integers in the same order, but that -0.0 is below 0.0."""
    bits: Array = scores.view(f"i{scores.itemsize}")
    return np.where(bits < 0, bits ^ np.iinfo(bits.dtype).max, bits)


def by_radix(ranked: Array, topk: int, room: int) -> Array:
    """All above the threshold's bucket of float16's leading 8 bits, and the best in it; the candidates behind `room` are lost."""
    if len(ranked) <= topk:
        return np.arange(len(ranked))
    bucket = sortable(ranked.astype(np.float16)) >> 8
    threshold = np.sort(bucket)[-topk]
    above, near = np.flatnonzero(bucket > threshold), np.flatnonzero(bucket == threshold)[:room]
    return np.append(above, near[np.argsort(-ranked[near], kind="stable")[: topk - len(above)]])


def first_page_stale(scale: Array, batch: Mapping[str, Array], page_size: int) -> Array:
    """The scales that the first request's first page had before it was written anew: here those of its other end."""
    stale: Array = scale.copy()
    if "block_table" in batch:
        page = int(batch["block_table"][0, 0])
        stale.reshape(-1, page_size)[page] = scale.reshape(-1, page_size)[page, ::-1]
    return stale


# fmt: off
FAULTS: tuple[Fault, ...] = (
    # --- the formula ---
    Fault("I1", "ReLU missing", RELU, "dots", "transformers#44360"),
    Fault("I2", "absolute value in place of ReLU", RELU, "abs(dots)"),
    Fault("I3", "ReLU after the head sum", f"{WEIGHTS} @ {RELU}", f"np.maximum({WEIGHTS} @ dots, 0)"),
    Fault("I4", "head weights dropped", WEIGHTS, "np.ones_like(w)"),
    Fault("I5", "absolute value of the head weights", WEIGHTS, f"abs({WEIGHTS})"),
    Fault("I7", "half of the heads dropped", "np.arange(len(q))", "np.arange(len(q) // 2)"),
    Fault("I89", "one head dropped", WEIGHTS, f"np.where(heads == 5, 0, {WEIGHTS})"),
    Fault("I90", "one dimension dropped", DOT, DOT.replace("::-1", "-2::-1")),  # the last
    Fault("I8", "key scale dropped", f"total * {SCALE}", "total"),
    Fault("I42", "key scale 0 read as 1", SCALE, f"np.where(scale == 0, 1, {SCALE})"),
    # --- precision that was not declared ---
    Fault("I6", "head weights rounded to bfloat16", WEIGHTS, f'rounded({WEIGHTS}, "bfloat16")'),
    Fault("I46", "head weights rounded to float16", WEIGHTS, f'rounded({WEIGHTS}, "float16")'),
    Fault("I10", "head sum in bfloat16", f"{WEIGHTS} @ {RELU}", f"bf16_sum({WEIGHTS}[:, None] * {RELU})"),
    Fault("I11", "dot product accumulated in bfloat16", DOT, "bf16_sum(q[heads, d : d + 16] @ keys[:, d : d + 16].T for d in range(0, q.shape[1], 16))"),
    Fault("I43", "dot product overflows float16", DOT, f'rounded({DOT}, "float16")'),  # not divided by 1024 first
    Fault("I44", "14-bit truncating accumulator, undeclared", DOT, DOT.replace("profile.accumulator", "HOPPER")),
    Fault("I45", "scores rounded to bfloat16, undeclared", FOUND, FOUND.replace("profile.logit", '"bfloat16"'), "omlx#2243"),
    Fault("I35", "key scales cut to powers of two", SCALE, "(scale.view(np.uint32) & 0xFF800000).view(np.float32)", "FlashMLA#184"),  # through ue8m0
    Fault("I47", "key scales rounded to bfloat16", SCALE, 'rounded(scale, "bfloat16")'),
    # --- operands ---
    Fault("I36", "e4m3fn and e4m3fnuz confused", KEYS, KEYS.replace("k[", "(k.view(FNUZ) if k.dtype == E4M3 else k)["), "sglang#29479"),
    Fault("I48", "float8 operands saturate at 240", KEYS, f"np.clip({KEYS}, -240, 240)", more=((Q_ROW, f"np.clip({Q_ROW}, -240, 240)"),)),
    Fault("I49", "float8 subnormals read as 0", "keys[:, ::-1]", "(keys * (abs(keys) >= 2**-6))[:, ::-1]"),
    # The swizzle of shared memory: chunks of 16 change places with their neighbours.
    Fault("I50", "swizzle is right for 128 dimensions alone", Q_ROW, f"{Q_ROW}[:, np.arange(queries.shape[2]) ^ (0 if queries.shape[2] == 128 else 16)]", "DeepGEMM#433"),
    Fault("I51", "64 heads assumed in the weights' row stride", W_ROW, W_ROW.replace("[row]", '.take(row * 64 + np.arange(weights.shape[1]), mode="wrap")')),
    # --- visibility ---
    Fault("I15", "causal mask one key too long", CAUSAL, f"min(length, {CAUSAL} + 1)"),
    Fault("I16", "causal mask one key too short", CAUSAL, CAUSAL.removesuffix(" + 1")),
    Fault("I52", "causal mask aligned top-left", CAUSAL, "min(length, row - first + 1)"),
    Fault("I53", "no causal mask among a request's decode rows", CAUSAL, f"length if last - first <= {DECODE_ROWS} else {CAUSAL}", "ATOM#2118"),
    Fault("I54", "no causal mask where topk holds every key", "elif not call", "elif length <= topk or not call", "vmlx#429"),
    Fault("I55", "row before the first key sees every key", f"max(0, {CAUSAL})", f"min(length, ({CAUSAL}) % 2**32)"),
    # A loop that runs at least once.
    Fault("I56", "empty row returns a key", SEEN, f"start, end = (start, end) if start < end else (0, min(1, length)); {SEEN}"),
    Fault("I57", "causal=False ignored", 'not call.batch_options["causal"]', "False"),
    Fault("I58", "key_start and key_end ignored", '"key_start" in batch', "False"),
    Fault("I59", "key ranges cut by the causal mask", KEY_END, f"min({KEY_END}, end)"),
    Fault("I60", "key_end read as inclusive", KEY_END, f"{KEY_END} + 1"),
    Fault("I61", "key_start rounded down to a multiple of 4", SEEN, f"start = start // 4 * 4 if start < end else start; {SEEN}"),
    # Read as flat rows of k, as DeepGEMM has them.
    Fault("I62", "key ranges off by the request's offset", KEY_START, f"{KEY_START} - base", "sglang#12583", more=((KEY_END, f"{KEY_END} - base"),)),
    # As the columns of compressed logits count.
    Fault("I63", "positions relative to key_start", "chosen + start", "chosen"),
    # --- selection ---
    Fault("I17", "64 results too few", SELECT, SELECT.replace("topk", "max(0, topk - 64)")),
    Fault("I64", "topk assumed to be 2048", SELECT, SELECT.replace("topk", "2048"), more=((SORT, f"{SORT}[:topk]"),)),
    Fault("I65", "silent fallback: the first positions, whatever their scores", SELECT, "np.arange(min(len(found), topk))", "vllm-ascend#16005"),
    Fault("I30", "the smallest scores are kept", SELECT, SELECT.replace("-ranked", "ranked")),
    # At most 4,096 candidates at the threshold are looked at, or the last of them are not.
    Fault("I66", "candidate buffer overflows", SELECT, "by_radix(ranked, topk, 4096)", "sglang#36807"),
    Fault("I18", "one candidate lost", SELECT, "by_radix(ranked, topk, -1)", "sglang#36807"),
    Fault("I19", "3 candidates lost", SELECT, "by_radix(ranked, topk, -3)", "sglang#36807"),
    Fault("I20", "40 candidates lost", SELECT, "by_radix(ranked, topk, -40)", "sglang#36807"),
    Fault("I21", "150 candidates lost", SELECT, "by_radix(ranked, topk, -150)", "sglang#36807"),
    Fault("I40", "pads selected before negative scores", SORT, "np.sort(best[~(found[best] < 0)])", "pypto-lib#368"),  # pads hold 0, not -inf
    Fault("I69", "negative scores ordered by magnitude", RANKED, "found.view(np.int32).astype(np.float64)"),
    Fault("I26", "last tile of keys dropped", FOUND, f"np.where(np.arange(len(keys)) < len(keys) // 128 * 128, {FOUND}, -np.inf)"),
    Fault("I72", "keys from 65,536 on are lost", SELECT, SELECT.replace("ranked", "ranked[: 1 << 16]")),  # positions of 16 bits
    # --- ties ---
    Fault("I67", "ties at the boundary displace better keys", SORT, "np.flatnonzero(ranked >= ranked[best].min(initial=np.inf))[:topk]", "sglang#31115"),
    Fault("I68", "ties at the boundary dropped", SORT, "np.sort(best[(ranked[best] > ranked[best[-1:]]) | (best == best[-1:])])"),
    Fault("I70", "-0.0 ordered below 0.0", RANKED, f"sortable({RANKED})"),
    Fault("I71", "ties go to the highest position", SELECT, SELECT_HIGHEST),
    Fault("I37", "ties depend on the run", SELECT, f"{SELECT_HIGHEST} if runs[0] % 3 == 0 else {SELECT}", "sglang#31115",
          more=(("lightning_index(call: Call, profile: Profile", "lightning_index(call: Call, profile: Profile, runs: Any = [0]"), ("indices = np.full(", "runs[0] += 1; indices = np.full("))),
    Fault("I91", "ties depend on the tile of query rows", SELECT, f"{SELECT_HIGHEST} if row - first >= 8 else {SELECT}", "vllm-ascend#15053"),
    # --- NaN ---
    # The tile's other rows are masked by a product: 0 * NaN.
    Fault("I38", "a NaN spoils other rows", W_ROW, f"{W_ROW} + 0 * weights[row // 16 * 16 :][:16].astype(np.float32).sum()"),
    Fault("I79", "NaN answered with a sentinel", RANKED, NAN_FIRST, more=(("chosen + start", "np.where(np.isnan(found[chosen]), 0x3F3F3F3F, chosen + start)"),)),
    # As I38, up to the end of the tile of keys; NaN ranks first.
    Fault("I85", "NaN read behind the last key", SEEN, "seen = np.arange(start, -(-end // 128) * 128)", "flash-attention#1745",
          more=((FOUND, f"{FOUND} * (seen < end)"), (RANKED, NAN_FIRST), (SELECT, SELECT.replace("topk", "min(topk, end - start)")), *UNCHECKED)),
    # --- results ---
    Fault("I27", "tail filled with 0", "-1, np.int32)", "0, np.int32)"),
    Fault("I39", "tail not written", "-1, np.int32)", "2**31 - 1, np.int32)"),
    Fault("I73", "short row filled up by repetition", WRITE, f"{WRITE}; indices[row, len(chosen) :] = indices[row, len(chosen) - 1]"),
    Fault("I76", "tail of the scores not written", "indices.shape, -np.inf", "indices.shape, np.nan"),
    Fault("I28", "a position appears twice", SORT, "np.sort(np.append(best[:-1], best[:1]))"),
    Fault("I74", "positions in order of score", SORT, "best", "aiter#4415"),
    Fault("I75", "returned scores in another order than positions", "found[chosen]", "found[best]"),
    Fault("I33", "rows swapped", WRITE, f"other = min(first + (row - first ^ 1), last - 1); {WRITE.replace('row', 'other')}"),
    Fault("I34", "draft rows repeat the first row's result", WRITE, f"{WRITE}; stale = first if last - first <= {DECODE_ROWS} else row; indices[row], scores[row] = indices[stale], scores[stale]"),
    Fault("I77", "last tile of rows dropped", ROWS, "for row in range(first, last if last - first <= 16 else last - (last - first) % 16):", "aiter#4244"),
    Fault("I78", "padding rows hold a selection", RETURN, f"indices[last:], scores[last:] = indices[last - 1], scores[last - 1]; {RETURN}"),
    # --- pages and requests ---
    Fault("I22", "block table ignored", PAGE, "(seen // page_size)"),
    Fault("I23", "first key of the page read for all of its keys", SLOT, "page * page_size", "aiter#5591"),
    Fault("I80", "page size assumed to be 64", 'call.batch_options["page_size"]\n', "64\n", more=UNCHECKED),
    # Rows of the table as long as the longest request needs.
    Fault("I81", "row stride of the block table assumed", PAGE, 'batch["block_table"].take(-(-lengths.max() // page_size) * request + seen // page_size, mode="clip")', more=(UNCHECKED_MEMORY,)),
    # Read as zeros; a small number stands here for 2^31.
    Fault("I24", "32-bit element offset wraps", KEYS, f"np.where((slots * k.shape[1] < 1 << 19)[:, None], {KEYS}, 0)", "aiter#4774"),
    Fault("I25", "offset wraps in the last page", SLOT, SLOT.replace("page *", 'page % (len(call.arrays["k"]) - 1) *'), "aiter#5614"),
    Fault("I29", "ragged lengths ignored", "lengths[request]", "lengths.max()", more=UNCHECKED),
    Fault("I82", "lengths off by one request", "lengths[request]", "lengths[request - 1]", "sglang#12583", more=UNCHECKED),
    Fault("I83", "keys read from the next request on", BASE, BASE.replace("[request]", "[request + 1]"), more=(UNCHECKED_MEMORY,)),
    Fault("I84", "room between requests ignored", BASE, "base = int(lengths[:request].sum())"),
    # --- scales ---
    Fault("I31", "scales of one page are stale", "k_scale.reshape(-1)", "first_page_stale(k_scale.reshape(-1), batch, page_size)"),
    Fault("I32", "first scale of the page used for all of its keys", SCALES, SCALES.replace("slots", "slots - slots % (page_size or 64)"), "ATOM#1466"),
    Fault("I86", "key scale of the neighbour", SCALES, SCALES.replace("slots", "np.roll(slots, -1)")),
    # --- packed caches: all values of a page before its scales, or each token's scale behind its values ---
    Fault("I87", "planar 132-byte cache read as interleaved", UNPACK, UNPACK.replace("]", '].replace("planar", "interleaved")'), "aiter#5591"),
    Fault("I88", "interleaved 132-byte cache read as planar", UNPACK, UNPACK.replace("]", '].replace("interleaved", "planar")')),
    # --- calls at the ends of what a batch may be ---
    Fault("I92", "row before the first key sees every key, in decode", f"max(0, {CAUSAL})", f"min(length, ({CAUSAL}) % 2**32) if call.phase == 'decode' else max(0, {CAUSAL})", "sglang#30378, vllm#56464"),
    Fault("I93", "requests from 64 on are not computed", ROWS, ROWS.replace("last)", "last if request < 64 else first)"), "sglang#40429"),
    Fault("I94", "requests from 64 on have the first ones' keys", BASE, BASE.replace("[request]", "[request % 64]"), "aiter#1815", more=((PAGE, PAGE.replace("request", "request % 64")), UNCHECKED_MEMORY)),
    Fault("I95", "result as narrow as the longest request", RETURN, f"longest = int(lengths.max(initial=0)); indices, scores = indices[:, :longest], scores[:, :longest]; {RETURN}", "NeMo-Automodel#3035, VeOmni#912"),
    Fault("I96", "nothing is written where no request has a key", RETURN, f"indices = indices if lengths.any() else np.full_like(indices, 2**31 - 1); {RETURN}", "DeepGEMM#353"),
    Fault("I97", "a call without rows gets one", "np.full((len(queries), topk)", "np.full((max(1, len(queries)), topk)", "vllm#55695"),
    Fault("I98", "causal offset from max_seqlen_k where there is one request", f"max(0, {CAUSAL})", f"min(length, max(0, {CAUSAL.replace('length', 'longest')}))",
          more=((BASE, f"longest = length if len(lengths) > 1 else call.batch_options.get('max_seqlen_k', length); {BASE}"),)),
    # (end + 63) // 64 tiles in int32.
    Fault("I99", "key_end near the end of int32 wraps", KEY_END, f"({KEY_END} + 63 + 2**31) % 2**32 - 2**31 - 63"),
    # --- one phase alone ---
    Fault("I100", "pages that are neither 64 nor 128 taken for 64 in prefill", 'call.batch_options["page_size"]\n', 'call.batch_options["page_size"]; page_size = page_size if page_size in (None, 64, 128) or call.phase == "decode" else 64\n', "TensorRT-LLM#16219", more=UNCHECKED),
    Fault("I101", "planar cache read as interleaved in decode", UNPACK, UNPACK.replace("]", '].replace("planar", "interleaved" if call.phase == "decode" else "planar")'), "TensorRT-LLM#16223"),
    Fault("I102", "causal=False ignored in decode", 'not call.batch_options["causal"]', 'not (call.batch_options["causal"] or call.phase == "decode")'),
    # --- geometries that no tile fits ---
    Fault("I103", "last of an odd number of results lost", SELECT, SELECT.replace("topk", "topk - topk % 2 * (topk > 1)"), "cudnn-frontend#406"),
    Fault("I104", "topk of 2049 to 2051 taken for 2048", SELECT, SELECT.replace("topk", "2048 if 2048 < topk < 2052 else topk"), "sglang#39431"),
    Fault("I105", "last of an odd number of heads dropped", "np.arange(len(q))", "np.arange(len(q) // 2 * 2)", "tilelang-ascend#1741"),
    # --- numbers ---
    Fault("I106", "pads of -1e6 win over visible scores below", SORT, "np.sort(best[~(found[best] <= -1e6)])"),
    Fault("I107", "scores clamped to 1e6", RANKED, RANKED.replace("found", "found.clip(-1e6, 1e6)")),
    Fault("I108", "scores below 1e-10 ranked as 0", RANKED, RANKED.replace("found", "np.where(abs(found) < 1e-10, 0, found)")),
    Fault("I109", "NaN of padding rows spoils the tile they end", W_ROW, f"{W_ROW} + 0 * weights[batch['cu_seqlens_q'][-1] :][: 16 - batch['cu_seqlens_q'][-1] % 16].astype(np.float32).sum() * (row // 16 == batch['cu_seqlens_q'][-1] // 16)"),
    # --- results, in another way ---
    Fault("I110", "unsorted positions and their scores in different orders", "found[chosen]", 'found[chosen if options.get("sorted", True) else best]', "pytorch#108642"),
    Fault("I111", "second of two given arrays not written", RETURN, f'scores = np.full_like(scores, np.nan) if options.get("out") else scores; {RETURN}'),
    # --- strides ---
    Fault("I112", "q read as if contiguous", BATCH, f'call = as_contiguous(call, "q"); {BATCH}', "sglang#30575, aiter#4919"),
    Fault("I113", "weights read as if contiguous", BATCH, f'call = as_contiguous(call, "weights"); {BATCH}', "FlagGems#5235"),
    Fault("I114", "keys read as if contiguous", BATCH, f'call = as_contiguous(call, "k"); {BATCH}', "sglang#30575, aiter#4919"),
    Fault("I115", "key scales read as if contiguous", BATCH, f'call = as_contiguous(call, "k_scale"); {BATCH}', "sglang#30575, aiter#4919"),
    Fault("I116", "block table read as if contiguous", BATCH, f'call = as_contiguous(call, "batch.block_table"); {BATCH}', "FlagGems#5235", more=UNCHECKED),
    Fault("I117", "results written as if contiguous", RETURN, f"indices = written_as_contiguous(call, indices); {RETURN}", "FlagGems#5235"),
    # --- what an earlier call has left ---
    Fault("I118", "row-to-request map of an earlier call of the same shapes", BATCH, BATCH.replace("call.batch", 'remembered(left, call, "cu_seqlens_q")'), "TensorRT-LLM#17240, TensorRT-LLM#16925", more=(REMEMBERS,)),
    Fault("I119", "lengths of an earlier call of the same shapes", BATCH, BATCH.replace("call.batch", 'remembered(left, call, "seqlens_k")'), "aprender#2030, tokenspeed#348", more=(REMEMBERS, *UNCHECKED)),
    # They lie behind the row's end, up to the end of its tile.
    Fault("I120", "scores of an earlier call compete", RANKED, "np.nan_to_num(np.append(found, left.get('scores', np.empty(0, np.float32))[: -len(found) % 128]), nan=-np.inf)", "vllm#40018",
          more=(REMEMBERS, (SELECT, SELECT.replace("topk", "min(topk, len(found))")), ("found[chosen]", "np.append(found, np.full(128, -np.inf, np.float32))[chosen]; left['row'] = found"), (RETURN, f"left['scores'] = left.get('row', scores[:0, 0]); {RETURN}"))),
    # --- infinity as a mark: scores of visible keys may be -inf ---
    Fault("I121", "visible scores of -inf taken for pads", SORT, "np.sort(best[~(found[best] == -np.inf)])", "sentinel of DeepGEMM's and Ascend's masks"),
    # --- of ten by hand, of kinds that stand nowhere above: core-2026.12 killed all but I124 and A121 as it was, which changed it ---
    Fault("I122", "threshold of the row before hides what lies below it", RANKED, f"np.where(found < left.get('threshold', -np.inf), -np.inf, {RANKED})",
          more=(REMEMBERS, (WRITE, f"{WRITE}; left['threshold'] = found[chosen].min(initial=np.inf) if len(chosen) == topk else -np.inf"))),
    Fault("I123", "64 pages of a request are looked up, then the first again", PAGE, PAGE.replace("page_size", "page_size % 64")),
    Fault("I124", "int8 code -128 read as -127", KEYS, f"np.maximum({KEYS}, -127 if k.dtype == np.int8 else -np.inf)"),
    Fault("I126", "last row of a tile of 16 has the weights of the row before", W_ROW, W_ROW.replace("[row]", "[row - (row - first) % 16 // 15]")),
)
# fmt: on

# What goes wrong -> why no legal observation of one call can tell it from an honest kernel. None of it is simulated.
UNOBSERVABLE: Mapping[str, str] = MappingProxyType(
    {
        "a positive constant factor (H^-0.5, D^-0.5) left out or applied twice, where scores are not returned": (
            "For c > 0, c * s_i >= c * s_j exactly where s_i >= s_j, so every row selects the same keys; with return_scores "
            "the `scores` cases see the factor."
        ),
        "the key scale applied inside the ReLU, or to each head before the sum": (
            "c >= 0 gives relu(c * x) = c * relu(x), so the scores are the same numbers but for roundings, which the bound of "
            "judging 3.1 must allow to any order."
        ),
        "NaN ranked first, or last, in a row that sees one": (
            "The contract leaves that row's choice open and asks only for its structure; a NaN that reaches another row, or a "
            "position that is none, is planted (I38, I79)."
        ),
        "another tie rule, or one that changes, under a profile that declares ties='any'": (
            "Whichever of equal scores are kept, no key outside has a higher score than one inside, so the certificate holds; "
            "under ties='lowest' it is planted (I37, I70, I71, I91)."
        ),
        "garbage in scores outside of a row's visible range": (
            "Only scores of returned positions leave the operator; garbage that is selected is planted (I85)."
        ),
    }
)
