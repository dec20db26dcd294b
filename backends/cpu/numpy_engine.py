"""The plain engine: NumPy's matrix product in float32, nothing else needed."""

from __future__ import annotations

import numpy as np

from dsa_portable.backends.cpu.rows import widen
from dsa_portable.backends.cpu.settings import Array, Float32


class Engine:
    """See settings.Engine."""

    threads_itself = True  # NumPy's BLAS spreads one product over the cores

    def index_scores(self, q: Float32, k: Float32, weights: Float32, k_scale: Float32) -> Float32:
        """See settings.Engine."""
        rows, heads, dim = q.shape
        with np.errstate(invalid="ignore", over="ignore"):
            dots = q.reshape(rows * heads, dim) @ k.T
            np.maximum(dots, 0, out=dots)
            scores: Float32 = np.matmul(weights[:, None, :], dots.reshape(rows, heads, len(k)))[:, 0]
            scores *= k_scale
        return scores

    def attend(self, q: Float32, kv: Float32, softmax_scale: float, value_dim: int) -> tuple[Float32, Float32, Float32]:
        """See settings.Engine."""
        with np.errstate(invalid="ignore", over="ignore"):
            logits = (q * np.float32(softmax_scale)) @ kv.T
            top = logits.max(axis=1, keepdims=True)
            p = np.exp(logits - top)
            total = p.sum(axis=1, keepdims=True)
            out: Float32 = (p @ kv[:, :value_dim]) / total
            return out, top[:, 0], total[:, 0]

    def attend_rows(
        self, q: Float32, kv: Array, positions: Array, softmax_scale: float, value_dim: int
    ) -> tuple[Float32, Float32, Float32]:
        """See settings.Engine."""
        return self.attend(q, widen(kv[positions]), softmax_scale, value_dim)
