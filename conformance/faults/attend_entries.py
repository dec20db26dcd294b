"""Planted faults of which entries of a row count, and of rows in which none does."""

from __future__ import annotations

import numpy as np

from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.faults.call_edits import (
    Unchecked,
    with_arrays,
    with_length,
)
from dsa_portable.conformance.faults.implementation import Array, SparseAttend

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
        masked = self.slots(call, request, self.valid(entries, self.length(call, request)))
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


FAULTS: tuple[type[SparseAttend], ...] = (
    HoleIsLast,
    HoleIsFirst,
    OthersWrap,
    OthersClamped,
    UpperBoundUnchecked,
    FirstHoleEnds,
    RepeatedOnce,
    IndicesIgnored,
    CausalAgain,
    CausalTopLeft,
    ThresholdEntries,
    RangesApplied,
    LengthIgnored,
    LengthPerRequest,
    MaskedMultiplied,
    EmptyRowNaN,
    EmptyRowMean,
    EmptyRowPlusInfinity,
)
