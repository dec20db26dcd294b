"""Every planted fault of sparse_attend, and what no observation can separate from a right answer.

Codes A1-A32 are those of the fault list in the issue of this suite (A6 is the caller's); the others stand for further bugs.
`rule` is the rule of docs/judging.md that a profile of float32 throughout sees broken first: `bound` (4.1), `rms` (4.2), `bias`
(4.3), `lse` (4.4), `empty row` (2) or `exact` (5). A fault without `killed_by` needs an input that no listed case has yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from dsa_portable.conformance.cases.attend import V32_SCALE
from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.emulator import rounded
from dsa_portable.conformance.faults import numerics
from dsa_portable.conformance.faults.implementation import Array, SparseAttend
from dsa_portable.formats import Unpacked, unpack

TILE, SPLITS, PAGE, HEADS = 64, 8, 64, 64
LATENT = 512  # dimensions of a key that are not rotated
# The layout of the same shape whose scales and rotated part stand in the other order.
OTHER_ORDER = {
    "v32_fp8_656_nsr": "ascend_656_nrs_fp8",
    "v32_fp8_656_nsr_f32": "ascend_656_nrs_fp8",
    "ascend_656_nrs_fp8": "v32_fp8_656_nsr_f32",
    "ascend_656_nrs_int8": "v32_fp8_656_nsr_f32",
}


class Unchecked(SparseAttend):
    """Not a fault by itself: what lies outside the table or the memory is read somewhere inside, as on a lucky day."""

    def page(self, call: Call, request: int, page: Array) -> Array:
        """Within the table."""
        return super().page(call, request, np.minimum(page, call.batch["block_table"].shape[1] - 1))

    def places(self, call: Call, request: int, positions: Array) -> Array:
        """Within the memory."""
        return np.asarray(super().places(call, request, positions) % memory_rows(call))


def memory_rows(call: Call) -> int:
    """Keys that the memory has room for, pages flattened."""
    kv = call.arrays["kv"]
    return int(kv.size // kv.shape[-1])


def with_length(call: Call, request: int, length: int) -> Call:
    """The call with another number of keys in one request."""
    lengths = call.batch["seqlens_k"].copy()
    lengths[request] = length
    return replace(call, batch={**call.batch, "seqlens_k": lengths})


def with_arrays(call: Call, **arrays: Array) -> Call:
    """The call with other arrays."""
    return replace(call, arrays={**call.arrays, **arrays})


# --- logits ---


class ScaleDropped(SparseAttend):
    """The logits are not scaled."""

    code, title = "A1", "softmax_scale dropped"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def logits(self, q: Array, kv: Array, softmax_scale: float) -> Array:
        """Scale 1."""
        return super().logits(q, kv, 1.0)


class ScaleOfValues(SparseAttend):
    """The scale is computed from the width of the values."""

    code, title = "A2", "softmax_scale = 512^-0.5 whatever is passed"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def logits(self, q: Array, kv: Array, softmax_scale: float) -> Array:
        """512^-0.5."""
        return super().logits(q, kv, LATENT**-0.5)


class ScaleDefault(SparseAttend):
    """The scale is computed from the width of the keys."""

    code, title, stands_for = "A33", "softmax_scale = 576^-0.5 whatever is passed", "FlashMLA's and Ascend's default"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def logits(self, q: Array, kv: Array, softmax_scale: float) -> Array:
        """Dqk^-0.5."""
        return super().logits(q, kv, q.shape[1] ** -0.5)


class ScaleOff(SparseAttend):
    """The scale is half a percent too large."""

    code, title = "A28", "softmax_scale off by 0.5%"
    killed_by, rule = "attend-bf16-prefill-heads16", "bound"

    def logits(self, q: Array, kv: Array, softmax_scale: float) -> Array:
        """1.005 times."""
        return super().logits(q, kv, softmax_scale * 1.005)


class ScaleHardCoded(SparseAttend):
    """The scale is that of DeepSeek-V3.2, whatever the model."""

    code, title = "A77", "softmax_scale of DeepSeek-V3.2 whatever is passed"

    def logits(self, q: Array, kv: Array, softmax_scale: float) -> Array:
        """192^-0.5 * (0.1 ln 40 + 1)^2."""
        return super().logits(q, kv, V32_SCALE)


class RopePartDropped(SparseAttend):
    """The rotated dimensions do not enter the logits."""

    code, title = "A5", "rotated part of the keys dropped"
    killed_by, rule = "attend-bf16-prefill-onehot", "exact"

    def logits(self, q: Array, kv: Array, softmax_scale: float) -> Array:
        """Over the latent dimensions."""
        return super().logits(q[:, :LATENT], kv[:, :LATENT], softmax_scale)


class LogitsFloat16(SparseAttend):
    """The logits are kept in float16 where float32 is declared."""

    code, title, stands_for = "A34", "logits in float16", "FlagGems sparse_mla"
    killed_by, rule = "attend-bf16-decode-paged128", "rms"

    def logits(self, q: Array, kv: Array, softmax_scale: float) -> Array:
        """Rounded."""
        return rounded(super().logits(q, kv, softmax_scale), "float16")


class BaseTwo(SparseAttend):
    """exp is computed as exp2, and log2(e) is forgotten."""

    code, title = "A10", "exp2 without log2(e)"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def shares(self, logits: Array, top: Array) -> Array:
        """2^(logit - maximum)."""
        return np.asarray(np.exp2(logits - top[:, None]))


class NoMaximum(SparseAttend):
    """Nothing is subtracted before exp."""

    code, title = "A11", "no maximum subtracted: exp overflows"
    killed_by, rule = "attend-bf16-prefill-onehot", "exact"

    def maximum(self, logits: Array) -> Array:
        """0."""
        return np.zeros(len(logits), np.float32)


# --- the sum over keys ---


class NoRescale(SparseAttend):
    """The accumulator keeps what it held when a later tile of keys raises the maximum."""

    code, title = "A12", "accumulator not rescaled when the maximum rises"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def probabilities(self, shares: Array) -> Array:
        """Relative to the maximum so far."""
        so_far = np.maximum.accumulate(np.maximum.reduceat(shares, np.arange(0, shares.shape[1], TILE), axis=1), axis=1)
        so_far = np.repeat(so_far, TILE, axis=1)[:, : shares.shape[1]]
        return super().probabilities(np.divide(shares, so_far, out=np.zeros_like(shares), where=so_far > 0))


class AccumulatorBfloat16(SparseAttend):
    """The output is accumulated in bfloat16 from tile to tile."""

    code, title = "A13", "output accumulated in bfloat16"
    killed_by, rule = "attend-bf16-prefill-heads16", "bound"
    dtype = "bfloat16"

    def weigh(self, p: Array, values: Array) -> Array:
        """Rounded after every tile."""
        total = np.zeros((len(p), values.shape[1]), np.float32)
        for first in range(0, len(values), TILE):
            tile = slice(first, first + TILE)
            total = rounded(total + super().weigh(p[:, tile], values[tile]), self.dtype)
        return total


class AccumulatorFloat16(AccumulatorBfloat16):
    """The output is accumulated in float16 from tile to tile."""

    code, title, stands_for = "A76", "output accumulated in float16", "FlagGems sparse_mla"
    killed_by, rule = "attend-f16-prefill-heads16", "rms"
    dtype = "float16"


class ProbabilitiesFloat8(SparseAttend):
    """Probabilities are rounded to float8 where 16 bits are declared."""

    code, title = "A14", "probabilities in float8"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def probabilities(self, shares: Array) -> Array:
        """As e4m3."""
        return shares.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


class TruncatingStore(SparseAttend):
    """The output is cut, not rounded."""

    code, title = "A29", "output truncated instead of rounded"
    killed_by, rule = "attend-bf16-prefill-heads16", "bound"

    def store(self, out: Array, dtype: np.dtype[Any]) -> Array:
        """One unit nearer to zero wherever rounding went away from it."""
        stored = super().store(out, dtype)
        bits = stored.view(f"u{dtype.itemsize}")
        return np.asarray(bits - (abs(stored.astype(np.float32)) > abs(out)).astype(bits.dtype)).view(dtype)


class LastBlockDropped(SparseAttend):
    """The loop over blocks of entries ends one early."""

    code, title = "A8", "last block of entries dropped"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def entries(self, call: Call, row: int) -> Array:
        """64 fewer."""
        return super().entries(call, row)[:-TILE]


class TailEntriesDropped(SparseAttend):
    """topk is rounded down to whole blocks of 64 entries."""

    code, title, stands_for = "A73", "entries behind the last whole block dropped", "FlashMLA takes multiples of 64 alone"

    def row(self, call: Call, request: int, row: int) -> tuple[Array, Array]:
        """Whole blocks."""
        indices = call.arrays["indices"]
        return super().row(with_arrays(call, indices=indices[:, : indices.shape[1] // TILE * TILE]), request, row)


class LastTokenDropped(SparseAttend):
    """The last key of a row is not attended."""

    code, title = "A9", "last token dropped"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def valid(self, entries: Array, length: int) -> Array:
        """One fewer."""
        return super().valid(entries, length)[:-1]


class SplitMissing(SparseAttend):
    """The splits are merged before the last one has been written, as in a race."""

    code, title = "A32", "last split missing from the merge"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def valid(self, entries: Array, length: int) -> Array:
        """Without the last of eight parts."""
        found = super().valid(entries, length)
        return found[: len(found) - len(found) // SPLITS]


class MergeBaseTwo(SparseAttend):
    """Two partial outputs with natural lse are merged as if their lse were to base 2."""

    code, title, stands_for = "A35", "partial outputs merged in the other base", "vllm#28840"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def attend(self, q: Array, kv: Array, softmax_scale: float, value_dim: int, sink: Array | None) -> tuple[Array, Array]:
        """Weights 2^lse."""
        whole, half = super().attend(q, kv, softmax_scale, value_dim, sink), len(kv) // 2
        if sink is not None or not half:
            return whole
        first, lse = super().attend(q, kv[:half], softmax_scale, value_dim, None)
        second, other = super().attend(q, kv[half:], softmax_scale, value_dim, None)
        weight = (1 / (1 + np.exp2(other - lse)))[:, None]
        return first * weight + second * (1 - weight), whole[1]


class LeadingTileNaN(SparseAttend):
    """A first tile without a valid entry leaves -inf - -inf in the running maximum."""

    code, title, stands_for = "A36", "NaN where the first tile of a row is all holes", "vllm#48366"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def row(self, call: Call, request: int, row: int) -> tuple[Array, Array]:
        """NaN in such a row."""
        out, lse = super().row(call, request, row)
        if len(self.valid(self.entries(call, row)[:TILE], self.length(call, request))):
            return out, lse
        return np.full_like(out, np.nan), np.full_like(lse, np.nan)


# --- which entries count ---


class HoleIsLast(SparseAttend):
    """-1 names the last key, as in Python."""

    code, title, stands_for = "A3", "-1 read as the last key", "cudnn-frontend#298"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def valid(self, entries: Array, length: int) -> Array:
        """-1 is length - 1."""
        return super().valid(np.where(entries == -1, length - 1, entries), length)


class HoleIsFirst(SparseAttend):
    """-1 names key 0."""

    code, title, stands_for = "A4", "-1 read as key 0", "cudnn-frontend#298"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def valid(self, entries: Array, length: int) -> Array:
        """-1 is 0."""
        return super().valid(np.where(entries == -1, 0, entries), length)


class OthersWrap(SparseAttend):
    """Only -1 is skipped; every other index wraps around."""

    code, title, stands_for = "A37", "only -1 skipped, other invalid indices wrap", "flashinfer-bench's and Ascend's references"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def valid(self, entries: Array, length: int) -> Array:
        """Modulo the length."""
        return entries[entries != -1] % length if length else entries[:0]


class OthersClamped(SparseAttend):
    """Only -1 is skipped; every other index is clamped into the request."""

    code, title, stands_for = "A38", "only -1 skipped, other invalid indices clamped", "FlashMLA decode skips -1 alone"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def valid(self, entries: Array, length: int) -> Array:
        """To the nearest end."""
        return np.clip(entries[entries != -1], 0, length - 1) if length else entries[:0]


class UpperBoundUnchecked(Unchecked):
    """An index is valid if it is not negative."""

    code, title, stands_for = "A39", "indices past the request's end followed", "TileLang's DeepSeek-V4 kernel"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def valid(self, entries: Array, length: int) -> Array:
        """Not negative."""
        return entries[entries >= 0]


class FirstHoleEnds(SparseAttend):
    """A row ends at its first -1."""

    code, title, stands_for = "A40", "first -1 ends the row", "npu_sparse_flash_attention"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def valid(self, entries: Array, length: int) -> Array:
        """Up to it."""
        return super().valid(entries[: int(np.argmax(np.append(entries, -1) == -1))], length)


class RepeatedOnce(SparseAttend):
    """A repeated index counts once, as in a scattered mask."""

    code, title, stands_for = "A41", "repeated index counted once", "scatter masks of DeepSeek, TileLang, transformers"
    killed_by, rule = "attend-bf16-prefill-repeated", "bound"

    def valid(self, entries: Array, length: int) -> Array:
        """Without repetitions."""
        return np.unique(super().valid(entries, length))


class IndicesIgnored(SparseAttend):
    """Every key is attended, as by a dense fallback."""

    code, title, stands_for = "A42", "indices ignored: attention is dense", "vllm-ascend#16005"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def valid(self, entries: Array, length: int) -> Array:
        """All."""
        return np.arange(length)


class CausalAgain(SparseAttend):
    """A causal mask removes selected keys behind the row's own position."""

    code, title, stands_for = "A43", "causal mask added again", "npu_sparse_flash_attention, sparse_mode 3"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def row(self, call: Call, request: int, row: int) -> tuple[Array, Array]:
        """As if the request ended at the row."""
        after = self.rows_of(call, request).stop - row - 1
        return super().row(with_length(call, request, self.length(call, request) - after), request, row)


class CausalTopLeft(SparseAttend):
    """Keys behind the row's number in its chunk are masked, whatever came before the chunk."""

    code, title, stands_for = "A44", "masked by row number, without the offset of the chunk", "TileLang and FlagGems sparse_mla"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def row(self, call: Call, request: int, row: int) -> tuple[Array, Array]:
        """As if the context began with the chunk."""
        seen = row - self.rows_of(call, request).start + 1
        return super().row(with_length(call, request, min(seen, self.length(call, request))), request, row)


class ThresholdEntries(SparseAttend):
    """Only as many leading entries are read as the row sees keys."""

    code, title, stands_for = "A45", "entries past the count of visible keys not read", "npu_sparse_flash_attention"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def row(self, call: Call, request: int, row: int) -> tuple[Array, Array]:
        """The first Lk - Lq + i + 1."""
        seen = self.length(call, request) - (self.rows_of(call, request).stop - row) + 1
        return super().row(with_arrays(call, indices=call.arrays["indices"][:, : max(0, seen)]), request, row)


class RangesApplied(SparseAttend):
    """The batch's key ranges, which are for the index, mask what was selected."""

    code, title = "A75", "key_start and key_end applied to the selected keys"

    def row(self, call: Call, request: int, row: int) -> tuple[Array, Array]:
        """Without entries outside them."""
        if "key_start" in call.batch:
            indices = call.arrays["indices"]
            inside = (indices >= call.batch["key_start"][row]) & (indices < call.batch["key_end"][row])
            call = with_arrays(call, indices=np.where(inside, indices, -1))
        return super().row(call, request, row)


class LengthIgnored(SparseAttend):
    """topk_length is not read."""

    code, title, stands_for = "A30", "topk_length ignored", "flashinfer#5095"
    killed_by, rule = "attend-bf16-prefill-topk-length", "empty row"

    def entries(self, call: Call, row: int) -> Array:
        """All of them."""
        return np.asarray(call.arrays["indices"][row].astype(np.int64))


class LengthPerRequest(SparseAttend):
    """topk_length has one entry a request, not one a row."""

    code, title, stands_for = "A46", "topk_length read per request", "FlashMLA decode"
    killed_by, rule = "attend-bf16-prefill-topk-length", "bound"

    def row(self, call: Call, request: int, row: int) -> tuple[Array, Array]:
        """The request's."""
        if "topk_length" in call.arrays:
            length = call.arrays["topk_length"]
            call = with_arrays(call, topk_length=np.full_like(length, length[request]))
        return super().row(call, request, row)


class MaskedMultiplied(SparseAttend):
    """Entries past topk_length are gathered and multiplied by a probability of 0, which keeps their NaN."""

    code, title, stands_for = "A47", "NaN of masked keys multiplied by 0", "FlashMLA prefill, flash-attention#1745"
    killed_by, rule = "attend-bf16-prefill-topk-length", "empty row"

    def row(self, call: Call, request: int, row: int) -> tuple[Array, Array]:
        """With 0 times the others."""
        out, lse = super().row(call, request, row)
        entries = call.arrays["indices"][row].astype(np.int64)[len(self.entries(call, row)) :]
        masked = self.places(call, request, self.valid(entries, self.length(call, request)))
        values = self.values(self.stored_rows(call, masked), out.shape[1])
        return (out + 0 * values.sum(axis=0)).astype(out.dtype), lse


# --- rows without a valid entry ---


class EmptyRowNaN(SparseAttend):
    """A row without a valid entry is 0 / 0."""

    code, title, stands_for = "A22", "empty row is NaN", "TileLang sparse_mla"
    killed_by, rule = "attend-bf16-decode-paged64", "empty row"

    def empty(self, heads: int, value_dim: int) -> tuple[Array, Array]:
        """NaN."""
        return np.full((heads, value_dim), np.nan, np.float32), np.full(heads, np.nan, np.float32)


class EmptyRowMean(SparseAttend):
    """A finite mask leaves a row without a valid entry at equal probabilities over what it gathered: key 0."""

    code, title, stands_for = "A23", "empty row is a mean of values", "npu_sparse_flash_attention's mask of -1e12"
    killed_by, rule = "attend-bf16-prefill-topk-length", "empty row"

    def valid(self, entries: Array, length: int) -> Array:
        """Key 0 where there is none."""
        found = super().valid(entries, length)
        return found if len(found) or not length else np.zeros(max(1, len(entries)), np.int64)


class EmptyRowPlusInfinity(SparseAttend):
    """The lse of a row without a valid entry is +inf, which outweighs every other part in a merge."""

    code, title, stands_for = "A48", "lse of an empty row is +inf", "FlashMLA"
    killed_by, rule = "attend-bf16-decode-lse", "empty row"

    def empty(self, heads: int, value_dim: int) -> tuple[Array, Array]:
        """+inf."""
        return np.zeros((heads, value_dim), np.float32), np.full(heads, np.inf, np.float32)


# --- sink ---


class SinkIgnored(SparseAttend):
    """The sink is not read."""

    code, title = "A15", "sink ignored"
    killed_by, rule = "attend-bf16-prefill-sink", "bound"

    def sink_share(self, sink: Array, top: Array) -> Array:
        """0."""
        return np.zeros_like(top)


class SinkBaseTwo(SparseAttend):
    """The sink enters as a power of 2."""

    code, title = "A16", "sink to base 2"
    killed_by, rule = "attend-bf16-prefill-sink", "bound"

    def sink_share(self, sink: Array, top: Array) -> Array:
        """2^(sink - maximum)."""
        return np.asarray(np.exp2(sink - top))


class SinkPerSplit(SparseAttend):
    """Each of two splits adds the sink to its own normaliser."""

    code, title = "A17", "sink counted once per split"
    killed_by, rule = "attend-bf16-prefill-sink", "bound"

    def sink_share(self, sink: Array, top: Array) -> Array:
        """Twice."""
        return np.asarray(2 * super().sink_share(sink, top))


class SinkNotShifted(SparseAttend):
    """The maximum is subtracted from the logits and not from the sink."""

    code, title = "A18", "maximum not subtracted from the sink"
    killed_by, rule = "attend-bf16-prefill-sink", "bound"

    def sink_share(self, sink: Array, top: Array) -> Array:
        """exp(sink)."""
        return np.asarray(np.exp(sink))


class SinkInMaximum(SparseAttend):
    """The sink takes part in the maximum, and inf - inf is NaN."""

    code, title, stands_for = "A49", "NaN where the sink is +inf", "rocm-libraries#12229"
    killed_by, rule = "attend-bf16-prefill-sink", "bound"

    def sink_share(self, sink: Array, top: Array) -> Array:
        """Through the larger of both."""
        larger = np.maximum(top, sink)
        return np.asarray(np.exp(sink - larger) * np.exp(larger - top))


class SinkOverflows(SparseAttend):
    """The output is multiplied by exp(lse) / (exp(lse) + exp(sink)), which overflows for lse > 88."""

    code, title, stands_for = "A50", "sink applied without subtracting a maximum", "FlagGems flash_mla_sparse_fwd"

    def attend(self, q: Array, kv: Array, softmax_scale: float, value_dim: int, sink: Array | None) -> tuple[Array, Array]:
        """In float32."""
        out, lse = super().attend(q, kv, softmax_scale, value_dim, None)
        return (out if sink is None else out * (np.exp(lse) / (np.exp(lse) + np.exp(sink)))[:, None]), lse


class SinkBfloat16(SparseAttend):
    """The sink is rounded to bfloat16 on the way in."""

    code, title, stands_for = "A51", "sink in bfloat16", "TileLang's DeepSeek-V4 kernel"

    def sink_share(self, sink: Array, top: Array) -> Array:
        """Rounded."""
        return super().sink_share(rounded(sink, "bfloat16"), top)


# --- lse ---


class LseBaseTwo(SparseAttend):
    """lse is a logarithm to base 2."""

    code, title, stands_for = "A19", "lse to base 2", "vllm#28840, sglang#35045"
    killed_by, rule = "attend-bf16-decode-lse", "lse"

    def lse(self, top: Array, total: Array, sink: Array | None) -> Array:
        """Divided by ln 2."""
        return np.asarray(super().lse(top, total, sink) / np.float32(np.log(2)))


class LseWithSink(SparseAttend):
    """The sink enters lse."""

    code, title = "A20", "sink in lse"
    killed_by, rule = "attend-bf16-prefill-sink", "lse"

    def lse(self, top: Array, total: Array, sink: Array | None) -> Array:
        """Of the whole normaliser."""
        return super().lse(top, total if sink is None else total + self.sink_share(sink, top), sink)


class LseWithoutMaximum(SparseAttend):
    """The maximum is not added back."""

    code, title = "A21", "maximum missing from lse"
    killed_by, rule = "attend-bf16-decode-lse", "lse"

    def lse(self, top: Array, total: Array, sink: Array | None) -> Array:
        """The sum's logarithm alone."""
        return np.asarray(np.log(total))


class LseBfloat16(SparseAttend):
    """lse is stored in the dtype of q."""

    code, title, stands_for = "A52", "lse in bfloat16", "FlagGems sparse_mla"
    killed_by, rule = "attend-bf16-decode-lse", "lse"

    def lse(self, top: Array, total: Array, sink: Array | None) -> Array:
        """Rounded."""
        return rounded(super().lse(top, total, sink), "bfloat16")


class LseIsMaximum(SparseAttend):
    """The first of the pair (maximum, sum) is taken for lse."""

    code, title, stands_for = "A53", "maximum returned as lse", "npu_sparse_flash_attention's softmax_max"
    killed_by, rule = "attend-bf16-decode-lse", "lse"

    def lse(self, top: Array, total: Array, sink: Array | None) -> Array:
        """The maximum."""
        return top


class LseSplitMissing(SparseAttend):
    """lse lacks the last of eight splits, which the output has."""

    code, title = "A83", "last split missing from lse alone"
    killed_by, rule = "attend-bf16-decode-lse", "lse"

    def lse(self, top: Array, total: Array, sink: Array | None) -> Array:
        """Of seven eighths of the sum."""
        return super().lse(top, total * np.float32(1 - 1 / SPLITS), sink)


class LseTransposed(SparseAttend):
    """lse is written heads first."""

    code, title, stands_for = "A54", "lse in the order [heads, rows]", "FlashMLA decode"
    killed_by, rule = "attend-bf16-decode-lse", "lse"

    def run(self, call: Call) -> dict[str, Array]:
        """The transposed bytes."""
        found = super().run(call)
        return {**found, "lse": found["lse"].T.reshape(found["lse"].shape)} if "lse" in found else found


# --- what a key holds ---


class ValuesOffset(SparseAttend):
    """The values are the last 512 columns of a key, not the first."""

    code, title = "A7", "values taken from the last 512 columns"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def values(self, kv: Array, value_dim: int) -> Array:
        """From the end."""
        return kv[:, -value_dim:]


class FirstTileScale(SparseAttend):
    """The scale of a key's first tile serves all of its tiles."""

    code, title, stands_for = "A25", "one tile's scale for all tiles", "ATOM#1466"
    killed_by, rule = "attend-v32_fp8_656_nsr-decode-flat", "bound"

    def tile_scales(self, scale: Array) -> Array:
        """The first."""
        return np.repeat(scale[:, :1], scale.shape[1], axis=1)


class ScalePowerOfTwo(SparseAttend):
    """Tile scales pass through e8m0 and lose their significand."""

    code, title, stands_for = "A55", "tile scales cut down to powers of two", "FlashMLA#184"
    killed_by, rule = "attend-v32_fp8_656_nsr_f32-decode-flat", "bound"

    def tile_scales(self, scale: Array) -> Array:
        """Without significand."""
        return np.asarray((scale.view(np.uint32) & np.uint32(0xFF800000)).view(np.float32))


class ScaleBfloat16(SparseAttend):
    """Tile scales are rounded to bfloat16."""

    code, title, stands_for = "A56", "tile scales in bfloat16", "FlashMLA on SM90"
    killed_by, rule = "attend-v32_fp8_656_nsr_f32-decode-paged128", "bound"

    def tile_scales(self, scale: Array) -> Array:
        """Rounded."""
        return rounded(scale, "bfloat16")


class NsrAsNrs(SparseAttend):
    """A cache of values, scales, rotated part is read as values, rotated part, scales."""

    code, title, stands_for = "A57", "656-byte cache read in the other order (nsr as nrs)", "FlashMLA's cache on Ascend"
    killed_by, rule = "attend-v32_fp8_656_nsr-decode-flat", "bound"
    order = "nsr"

    def parts(self, name: str, kv: Array) -> Unpacked:
        """From where the other layout has them."""
        found = super().parts(name, kv)
        if self.order not in name:
            return found
        other = unpack(OTHER_ORDER[name], kv)
        return found._replace(scale=other.scale, rope=other.rope)


class NrsAsNsr(NsrAsNrs):
    """A cache of values, rotated part, scales is read as values, scales, rotated part."""

    code, title, stands_for = "A58", "656-byte cache read in the other order (nrs as nsr)", "Ascend's cache by FlashMLA"
    killed_by, rule = "attend-ascend_656_nrs_int8-decode-flat", "bound"
    order = "nrs"


class SubnormalsFlushed(SparseAttend):
    """Subnormal float8 values are decoded as 0."""

    code, title, stands_for = "A78", "e4m3 subnormals of the cache decoded as 0", "decoders in software"

    def parts(self, name: str, kv: Array) -> Unpacked:
        """0 below 2^-6."""
        found = super().parts(name, kv)
        if found.values.dtype != ml_dtypes.float8_e4m3fn:
            return found
        bits = found.values.view(np.uint8)
        return found._replace(values=np.where(bits & 0x78, bits, bits & 0x80).view(ml_dtypes.float8_e4m3fn))


class Fnuz(SparseAttend):
    """float8_e4m3fn bytes are decoded as e4m3fnuz: half the value, and NaN for -0."""

    code, title, stands_for = "A59", "e4m3fn cache decoded as e4m3fnuz", "sglang#29479"
    killed_by, rule = "attend-v32_fp8_656_nsr-decode-flat", "bound"

    def parts(self, name: str, kv: Array) -> Unpacked:
        """The same bytes."""
        found = super().parts(name, kv)
        if found.values.dtype != ml_dtypes.float8_e4m3fn:
            return found
        return found._replace(values=found.values.view(ml_dtypes.float8_e4m3fnuz))


# --- where a key lies ---


class StalePage(SparseAttend):
    """The newest page of a request is read where the one before it lies."""

    code, title = "A24", "stale page: the last page read from the one before"
    killed_by, rule = "attend-bf16-decode-paged64", "bound"

    def page(self, call: Call, request: int, page: Array) -> Array:
        """One earlier for the last."""
        last = (self.length(call, request) - 1) // int(call.batch_options["page_size"])
        return super().page(call, request, np.where(page == last, np.maximum(page - 1, 0), page))


class TableIgnored(SparseAttend):
    """Pages are read in the order of memory."""

    code, title = "A60", "block table ignored"
    killed_by, rule = "attend-bf16-decode-paged64", "bound"

    def page(self, call: Call, request: int, page: Array) -> Array:
        """The same number."""
        return page


class NeighbourTable(Unchecked):
    """Pages are looked up in the next request's row of the table."""

    code, title = "A61", "block table of the neighbour request"
    killed_by, rule = "attend-bf16-decode-paged64", "bound"

    def page(self, call: Call, request: int, page: Array) -> Array:
        """One row later."""
        return super().page(call, (request + 1) % len(call.batch["block_table"]), page)


class PageSizeAssumed(Unchecked):
    """Pages are taken to hold 64 keys."""

    code, title = "A62", "page size assumed to be 64"
    killed_by, rule = "attend-bf16-decode-paged128", "bound"

    def places(self, call: Call, request: int, positions: Array) -> Array:
        """As if they did."""
        size = call.batch_options["page_size"] and PAGE
        return super().places(replace(call, batch_options={**call.batch_options, "page_size": size}), request, positions)


class PageSizeShifted(Unchecked):
    """Page and slot are found by shift and mask, as if the page size were a power of two."""

    code, title = "A74", "page size rounded down to a power of two"

    def places(self, call: Call, request: int, positions: Array) -> Array:
        """By the bits of a position."""
        size = int(call.batch_options["page_size"] or 1)
        shift = size.bit_length() - 1
        return super().places(call, request, (positions >> shift) * size + (positions & ((1 << shift) - 1)))


class TableStrideAssumed(Unchecked):
    """The block table's rows are taken to be as long as the longest request needs, where they are longer."""

    code, title = "A79", "row stride of the block table assumed"
    killed_by, rule = "attend-bf16-decode-paged64", "bound"

    def page(self, call: Call, request: int, page: Array) -> Array:
        """From the flattened table."""
        width = -(-int(call.batch["seqlens_k"].max()) // int(call.batch_options["page_size"]))
        table = call.batch["block_table"].reshape(1, -1)
        return super().page(replace(call, batch={**call.batch, "block_table": table}), 0, request * width + page)


class FirstSlotOfPage(SparseAttend):
    """Every key of a page is read from the page's first slot."""

    code, title, stands_for = "A63", "first key of the page read for all of its keys", "aiter#5591"
    killed_by, rule = "attend-bf16-decode-paged64", "bound"

    def places(self, call: Call, request: int, positions: Array) -> Array:
        """Rounded down to the page."""
        size = int(call.batch_options["page_size"] or 1)
        return super().places(call, request, positions // size * size)


class IndexAsSlot(SparseAttend):
    """An index is taken as a physical slot, and the block table is not asked."""

    code, title, stands_for = "A64", "index taken as a physical slot", "FlashMLA decode, SGLang"
    killed_by, rule = "attend-bf16-decode-paged64", "bound"

    def places(self, call: Call, request: int, positions: Array) -> Array:
        """The index itself."""
        return positions if "block_table" in call.batch else super().places(call, request, positions)


class IndexAsFlatRow(SparseAttend):
    """An index is taken as a row of all requests' keys."""

    code, title, stands_for = "A65", "index taken as a row of the flat keys", "FlashMLA prefill"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def places(self, call: Call, request: int, positions: Array) -> Array:
        """The index itself."""
        return super().places(call, request, positions) if "block_table" in call.batch else positions


class OffsetWraps(Unchecked):
    """The offset of a key's first number is kept in 32 bits."""

    code, title, stands_for = "A31", "32-bit element offset wraps", "aiter#5614, vllm#50576"
    killed_by, rule = "attend-v32_fp8_656_nsr-decode-big-offset", "bound"

    def places(self, call: Call, request: int, positions: Array) -> Array:
        """From 2^31 on before the memory's begin."""
        width = call.arrays["kv"].shape[-1]
        offset = (super().places(call, request, positions) * width).astype(np.int32).astype(np.int64)
        return np.asarray(offset // width % memory_rows(call))


class PageRounded(SparseAttend):
    """A request is taken to fill its last page."""

    code, title = "A66", "seqlens_k rounded up to whole pages"
    killed_by, rule = "attend-bf16-decode-paged64", "bound"

    def length(self, call: Call, request: int) -> int:
        """Whole pages."""
        size = int(call.batch_options["page_size"] or 1)
        return -(-super().length(call, request) // size) * size


class LengthFromOffsets(SparseAttend):
    """A request is taken to reach to where the next one begins."""

    code, title = "A67", "seqlens_k ignored: length taken from cu_seqlens_k"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def length(self, call: Call, request: int) -> int:
        """The distance of the beginnings."""
        if "cu_seqlens_k" not in call.batch:
            return super().length(call, request)
        return int(call.batch["cu_seqlens_k"][request + 1] - call.batch["cu_seqlens_k"][request])


class LongestForAll(Unchecked):
    """Every request is taken to be as long as the longest."""

    code, title = "A68", "ragged lengths ignored: the longest for all"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def length(self, call: Call, request: int) -> int:
        """The maximum."""
        return int(call.batch["seqlens_k"].max())


# --- rows and heads ---


class HeadsSwapped(SparseAttend):
    """The outputs of heads 0 and 1 change places."""

    code, title = "A26", "two heads swapped"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def attend(self, q: Array, kv: Array, softmax_scale: float, value_dim: int, sink: Array | None) -> tuple[Array, Array]:
        """1, 0, 2, 3 ..."""
        out, lse = super().attend(q, kv, softmax_scale, value_dim, sink)
        order = np.r_[1, 0, 2 : len(out)]
        return out[order], lse[order]


class HeadsRepeated(SparseAttend):
    """Heads from 64 on repeat the first 64, as when a kernel for 64 is launched once."""

    code, title = "A69", "heads from 64 on repeat the first ones"
    killed_by, rule = "attend-bf16-prefill-flat", "bound"

    def attend(self, q: Array, kv: Array, softmax_scale: float, value_dim: int, sink: Array | None) -> tuple[Array, Array]:
        """Modulo 64."""
        out, lse = super().attend(q, kv, softmax_scale, value_dim, sink)
        heads = np.arange(len(out)) % HEADS
        return out[heads], lse[heads]


class LastRowZero(SparseAttend):
    """The last row of a request with several rows is not computed."""

    code, title, stands_for = "A27", "last row of a request is zero", "aiter#4244"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def row(self, call: Call, request: int, row: int) -> tuple[Array, Array]:
        """0."""
        out, lse = super().row(call, request, row)
        mine = self.rows_of(call, request)
        return (np.zeros_like(out), lse) if len(mine) > 1 and row == mine[-1] else (out, lse)


class FirstRowsEntries(SparseAttend):
    """All rows of a request attend what its first row selected."""

    code, title = "A70", "indices of a request's first row used for all its rows"
    killed_by, rule = "attend-bf16-decode-paged128", "bound"

    def row(self, call: Call, request: int, row: int) -> tuple[Array, Array]:
        """The first row's."""
        indices = call.arrays["indices"]
        first = indices[self.rows_of(call, request).start]
        return super().row(with_arrays(call, indices=np.broadcast_to(first, indices.shape)), request, row)


class RowsUniform(SparseAttend):
    """Every request is taken to have as many rows as the others."""

    code, title = "A71", "cu_seqlens_q ignored: rows divided evenly"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def rows_of(self, call: Call, request: int) -> range:
        """Equal parts."""
        share = int(call.batch["cu_seqlens_q"][-1]) // len(call.batch["seqlens_k"])
        return range(request * share, (request + 1) * share)


class PaddingAttended(SparseAttend):
    """Padding rows belong to the last request."""

    code, title = "A72", "padding rows computed"
    killed_by, rule = "attend-bf16-prefill-flat", "empty row"

    def rows_of(self, call: Call, request: int) -> range:
        """To the end."""
        mine = super().rows_of(call, request)
        return range(mine.start, len(call.arrays["q"])) if request == len(call.batch["seqlens_k"]) - 1 else mine


# fmt: off
ATTEND_FAULTS: tuple[type[SparseAttend], ...] = (
    ScaleDropped, ScaleOfValues, ScaleDefault, ScaleHardCoded, ScaleOff, RopePartDropped, LogitsFloat16, BaseTwo, NoMaximum,
    NoRescale, AccumulatorBfloat16, AccumulatorFloat16, ProbabilitiesFloat8, TruncatingStore,
    LastBlockDropped, TailEntriesDropped, LastTokenDropped, SplitMissing, MergeBaseTwo, LeadingTileNaN,
    HoleIsLast, HoleIsFirst, OthersWrap, OthersClamped, UpperBoundUnchecked, FirstHoleEnds, RepeatedOnce, IndicesIgnored,
    CausalAgain, CausalTopLeft, ThresholdEntries, RangesApplied, LengthIgnored, LengthPerRequest, MaskedMultiplied,
    EmptyRowNaN, EmptyRowMean, EmptyRowPlusInfinity,
    SinkIgnored, SinkBaseTwo, SinkPerSplit, SinkNotShifted, SinkInMaximum, SinkOverflows, SinkBfloat16,
    LseBaseTwo, LseWithSink, LseWithoutMaximum, LseBfloat16, LseIsMaximum, LseSplitMissing,
    LseTransposed,
    ValuesOffset, FirstTileScale, ScalePowerOfTwo, ScaleBfloat16, NsrAsNrs, NrsAsNsr, SubnormalsFlushed, Fnuz,
    StalePage, TableIgnored, NeighbourTable, PageSizeAssumed, PageSizeShifted, TableStrideAssumed, FirstSlotOfPage,
    IndexAsSlot, IndexAsFlatRow, OffsetWraps, PageRounded, LengthFromOffsets, LongestForAll,
    HeadsSwapped, HeadsRepeated, LastRowZero, FirstRowsEntries, RowsUniform, PaddingAttended,
    *numerics.ATTEND_FAULTS,
)
# fmt: on

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
