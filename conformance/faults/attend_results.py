"""Planted faults of the sink, the lse, and of which row and head gets what."""

from __future__ import annotations

import numpy as np

from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.faults.call_edits import (
    HEADS,
    SPLITS,
    with_arrays,
)
from dsa_portable.conformance.faults.implementation import Array, SparseAttend
from dsa_portable.conformance.judging.emulator import rounded

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


FAULTS: tuple[type[SparseAttend], ...] = (
    SinkIgnored,
    SinkBaseTwo,
    SinkPerSplit,
    SinkNotShifted,
    SinkInMaximum,
    SinkOverflows,
    SinkBfloat16,
    LseBaseTwo,
    LseWithSink,
    LseWithoutMaximum,
    LseBfloat16,
    LseIsMaximum,
    LseSplitMissing,
    LseTransposed,
    HeadsSwapped,
    HeadsRepeated,
    LastRowZero,
    FirstRowsEntries,
    RowsUniform,
    PaddingAttended,
)
