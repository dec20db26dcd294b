"""Planted faults of attention's logits and of the sum over keys."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from dsa_portable.conformance.cases.attend import V32_SCALE
from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.faults.call_edits import (
    LATENT,
    SPLITS,
    TILE,
    with_arrays,
)
from dsa_portable.conformance.faults.implementation import Array, SparseAttend
from dsa_portable.conformance.judging.emulator import rounded

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


FAULTS: tuple[type[SparseAttend], ...] = (
    ScaleDropped,
    ScaleOfValues,
    ScaleDefault,
    ScaleOff,
    ScaleHardCoded,
    RopePartDropped,
    LogitsFloat16,
    BaseTwo,
    NoMaximum,
    NoRescale,
    AccumulatorBfloat16,
    AccumulatorFloat16,
    ProbabilitiesFloat8,
    TruncatingStore,
    LastBlockDropped,
    TailEntriesDropped,
    LastTokenDropped,
    SplitMissing,
    MergeBaseTwo,
    LeadingTileNaN,
)
