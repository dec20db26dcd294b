"""Planted index faults of arithmetic: what a score is made of. faults/index.py lists them with all others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dsa_portable.arrays import NUMPY_DTYPES
from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.faults.implementation import Array, LightningIndex
from dsa_portable.conformance.judging.emulator import dot, rounded
from dsa_portable.profile import Accumulator

E4M3_SMALLEST_NORMAL = 2.0**-6


# --- the formula ---


class ReluMissing(LightningIndex):
    """Negative dot products count."""

    code, title, stands_for = "I1", "ReLU missing", "transformers#44360"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "certificate"

    def activate(self, dots: Array) -> Array:
        """Nothing."""
        return dots


class MagnitudeForRelu(LightningIndex):
    """Negative dot products count as positive ones."""

    code, title = "I2", "absolute value in place of ReLU"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "certificate"

    def activate(self, dots: Array) -> Array:
        """|dots|."""
        return abs(dots)


class ReluAfterHeadSum(ReluMissing):
    """ReLU is applied once, to the weighted sum over heads."""

    code, title, stands_for = "I3", "ReLU after the head sum", ""
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "certificate"

    def head_sum(self, weights: Array, dots: Array) -> Array:
        """relu of the sum."""
        return np.maximum(super().head_sum(weights, dots), 0)


class WeightsDropped(LightningIndex):
    """Every head counts alike."""

    code, title = "I4", "head weights dropped"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "certificate"

    def weights(self, weights: Array) -> Array:
        """1."""
        return np.ones_like(weights)


class WeightsUnsigned(LightningIndex):
    """Weights lose their sign, which a test that draws weights.abs() cannot see."""

    code, title = "I5", "absolute value of the head weights"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "certificate"

    def weights(self, weights: Array) -> Array:
        """|weights|."""
        return abs(weights)


class HalfTheHeads(LightningIndex):
    """The second half of the heads does not count."""

    code, title = "I7", "half of the heads dropped"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "certificate"

    def weights(self, weights: Array) -> Array:
        """0 in the second half."""
        return np.where(np.arange(len(weights)) < len(weights) // 2, weights, np.float32(0))


class ScaleDropped(LightningIndex):
    """Keys are scored as they are stored."""

    code, title = "I8", "key scale dropped"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "certificate"

    def scale(self, scale: Array) -> Array:
        """1."""
        return np.ones_like(scale)


class ZeroScaleIsOne(LightningIndex):
    """A key scale of 0 is taken for one that was never written."""

    code, title = "I42", "key scale 0 read as 1"
    killed_by, rule = "index-e4m3-f32-f32-prefill-plateau", "ties"

    def scale(self, scale: Array) -> Array:
        """1 for 0."""
        return np.where(scale == 0, np.float32(1), scale)


# --- precision that was not declared ---


class DotBfloat16(LightningIndex):
    """The dot product is accumulated in bfloat16, sixteen dimensions at a time."""

    code, title = "I11", "dot product accumulated in bfloat16"
    killed_by, rule = "index-e4m3-f32-f32-prefill-dim64", "certificate"

    def dots(self, q: Array, k: Array) -> Array:
        """Rounded after every sixteen dimensions."""
        total = np.zeros((len(q), len(k)), np.float32)
        for first in range(0, q.shape[1], 16):
            total = rounded(total + q[:, first : first + 16] @ k[:, first : first + 16].T, "bfloat16")
        return total


class DotFloat16(LightningIndex):
    """Dot products are kept in float16 as they are, without the division by 1024 that keeps them in its range."""

    code, title = "I43", "dot product overflows float16"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "certificate"

    def dots(self, q: Array, k: Array) -> Array:
        """Beyond 65,504 infinite."""
        return rounded(super().dots(q, k), "float16")


class DotTruncated(LightningIndex):
    """Products are aligned and cut to 14 bits, as Hopper's tensor cores do, under a profile that says float32."""

    code, title = "I44", "14-bit truncating accumulator, undeclared"
    killed_by, rule = "index-e4m3-f32-f32-decode-scores", "score"

    def dots(self, q: Array, k: Array) -> Array:
        """Cut every 32 dimensions."""
        return dot(q, k, Accumulator(14, "RZ", 32))


class LogitsBfloat16(LightningIndex):
    """Scores are compared in bfloat16, under a profile that says float32: whole bands of keys tie."""

    code, title, stands_for = "I45", "scores rounded to bfloat16, undeclared", "omlx#2243"
    killed_by, rule = "index-e4m3-f32-f32-prefill-lattice", "certificate"

    def scores(self, q: Array, k: Array, weights: Array, scale: Array) -> Array:
        """As bfloat16."""
        return rounded(super().scores(q, k, weights, scale), "bfloat16")


class WeightsFloat16(LightningIndex):
    """float32 weights pass through float16."""

    code, title = "I46", "head weights rounded to float16"
    killed_by, rule = "index-e4m3-f32-f32-decode-scores", "score"

    def weights(self, weights: Array) -> Array:
        """As float16."""
        return rounded(weights, "float16")


class ScaleBfloat16(LightningIndex):
    """float32 key scales pass through bfloat16."""

    code, title = "I47", "key scales rounded to bfloat16"
    killed_by, rule = "index-e4m3-f32-f32-decode-scores", "score"

    def scale(self, scale: Array) -> Array:
        """As bfloat16."""
        return rounded(scale, "bfloat16")


# --- operands ---


class KeysReadAsFnuz(LightningIndex):
    """float8_e4m3fn bytes are read as e4m3fnuz: half of every value, and -0.0 is NaN."""

    code, title, stands_for = "I36", "e4m3fn and e4m3fnuz confused", "sglang#29479"
    killed_by, rule = "index-e4m3-f32-f32-prefill-codes", "certificate"

    def fetch(self, memory: Array, slots: Array) -> Array:
        """The other float8's values of the same bytes."""
        if memory.dtype == NUMPY_DTYPES["float8_e4m3fn"]:
            memory = memory.view(NUMPY_DTYPES["float8_e4m3fnuz"])
        return super().fetch(memory, slots)


class OperandsSaturate(LightningIndex):
    """Float8 operands are clamped to 240, the largest e4m3fnuz."""

    code, title = "I48", "float8 operands saturate at 240"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "certificate"

    def operands(self, q: Array, k: Array) -> tuple[Array, Array]:
        """Within +-240."""
        return np.clip(q, -240, 240), np.clip(k, -240, 240)


class SubnormalsLost(LightningIndex):
    """A decoder of float8 in software takes the subnormals for 0."""

    code, title = "I49", "float8 subnormals read as 0"
    killed_by, rule = "index-e4m3-f32-f32-prefill-codes-scores", "score"

    def operands(self, q: Array, k: Array) -> tuple[Array, Array]:
        """0 below the smallest normal number of e4m3."""
        return q, np.where(abs(k) < E4M3_SMALLEST_NORMAL, np.float32(0), k)


class SwizzleOfOtherDimension(LightningIndex):
    """The shared-memory swizzle of 128 dimensions is applied to any number: q's chunks of sixteen change places."""

    code, title, stands_for = "I50", "swizzle is right for 128 dimensions alone", "DeepGEMM#433"
    killed_by, rule = "index-e4m3-f32-f32-prefill-dim64", "certificate"

    def operands(self, q: Array, k: Array) -> tuple[Array, Array]:
        """q with every second chunk in the place of its neighbour."""
        dim = q.shape[1]
        return (q if dim == 128 else q.reshape(len(q), -1, 2, 16)[:, :, ::-1].reshape(len(q), dim)), k


class WeightsOfSixtyFourHeads(LightningIndex):
    """A row's weights are looked for 64 numbers behind the row's before, whatever the number of heads."""

    code, title = "I51", "64 heads assumed in the weights' row stride"
    killed_by, rule = "index-e4m3-f32-f32-decode-paged128", "certificate"

    def run(self, call: Call) -> dict[str, Array]:
        """With each row's weights taken from there, from the beginning again behind the end."""
        weights = call.arrays["weights"]
        rows, heads = weights.shape
        slots = (np.arange(rows)[:, None] * 64 + np.arange(heads)) % weights.size
        return super().run(replace(call, arrays={**call.arrays, "weights": weights.reshape(-1)[slots]}))


FAULTS: tuple[type[LightningIndex], ...] = (
    ReluMissing,
    MagnitudeForRelu,
    ReluAfterHeadSum,
    WeightsDropped,
    WeightsUnsigned,
    HalfTheHeads,
    ScaleDropped,
    DotBfloat16,
    KeysReadAsFnuz,
    ZeroScaleIsOne,
    DotFloat16,
    DotTruncated,
    LogitsBfloat16,
    WeightsFloat16,
    ScaleBfloat16,
    OperandsSaturate,
    SubnormalsLost,
    SwizzleOfOtherDimension,
    WeightsOfSixtyFourHeads,
)
