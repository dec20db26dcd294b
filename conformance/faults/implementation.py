"""One correct implementation of both operators in NumPy, a method a step: a planted fault overrides a step and nothing else.

It computes with a declared profile, but sums in another order than the emulator: an honest run is no copy of the yardstick.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance import oracle
from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.emulator import dot, rounded, stored
from dsa_portable.profile import Profile

Array: TypeAlias = np.ndarray[Any, Any]


class LightningIndex:
    """An honest lightning_index; the public steps below are what a fault may override."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    def operands(self, q: Array, k: Array) -> tuple[Array, Array]:
        """q [H, D] of one row and k [n, D]."""
        return q, k

    def weights(self, weights: Array) -> Array:
        """[H] of one row."""
        return weights

    def scale(self, scale: Array) -> Array:
        """[n], the keys' scales."""
        return rounded(scale, self.profile.scale_compute)

    def head_sum(self, weights: Array, dots: Array) -> Array:
        """sum_h weights[h] * dots[h, n]."""
        return np.asarray(weights @ dots)

    def select(self, scores: Array, topk: int) -> Array:
        """Ascending positions of the topk largest, ties to the lowest."""
        return np.sort(np.argsort(-scores, kind="stable")[:topk])

    def scores(self, call: Call, row: int, request: int, start: int, end: int) -> Array:
        """float32 scores of positions start .. end-1 of one row."""
        keys, scale = oracle.index_keys(call, request, np.arange(start, end))
        heads = np.argsort(np.arange(call.arrays["q"].shape[1]) * 7919 % 104729)
        q, k = self.operands(call.arrays["q"][row].astype(np.float32), keys.astype(np.float32))
        # Dimensions last to first and heads shuffled: another legal order of summation.
        dots = stored(dot(q[heads][:, ::-1], k[:, ::-1], self.profile.accumulator), self.profile)
        total = self.head_sum(self.weights(call.arrays["weights"][row].astype(np.float32))[heads], np.maximum(dots, 0))
        return rounded(total * self.scale(scale), self.profile.logit)

    def run(self, call: Call) -> dict[str, Array]:
        """The operator's outputs for a whole call."""
        shape = (len(call.arrays["q"]), call.options["topk"])
        indices, scores = np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float32)
        for row, request, start, end in oracle.rows(call):
            if start < end:
                found = self.scores(call, row, request, start, end)
                chosen = self.select(found, shape[1])
                indices[row, : len(chosen)] = chosen + start
                scores[row, : len(chosen)] = found[chosen]
        return {"indices": indices, "scores": scores} if call.options.get("return_scores") else {"indices": indices}


class SparseAttend:
    """An honest sparse_attend; the public steps below are what a fault may override."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    def kv(self, kv: Array) -> Array:
        """[n, Dqk] of one row."""
        return rounded(kv, self.profile.kv_compute)

    def probabilities(self, shares: Array) -> Array:
        """exp(logit - maximum) [Hq, n] as they enter the product with the values."""
        return rounded(shares, self.profile.p)

    def row(self, q: Array, kv: Array, softmax_scale: float, value_dim: int, sink: Array | None) -> tuple[Array, Array]:
        """(out, lse) of one row over n >= 1 keys, keys in two halves that are merged by their maxima."""
        kv = self.kv(kv)
        logits = rounded(dot(q[:, ::-1], kv[:, ::-1], self.profile.accumulator) * np.float32(softmax_scale), self.profile.logit)
        top = logits.max(axis=1)
        shares = np.exp(logits - top[:, None])
        p = self.probabilities(shares)
        total = (p if self.profile.normaliser == "rounded" else shares)[:, ::-1].sum(axis=1)
        lse = top + np.log(total)
        if sink is not None:
            with np.errstate(over="ignore"):
                total = total + np.exp(sink - top)
        values = np.ascontiguousarray(kv[::-1, :value_dim].T)
        return dot(np.ascontiguousarray(p[:, ::-1]), values, self.profile.accumulator) / total[:, None], lse

    def run(self, call: Call) -> dict[str, Array]:
        """The operator's outputs for a whole call."""
        q, options = call.arrays["q"], call.options
        out = np.zeros((*q.shape[:2], options["value_dim"]), q.dtype)
        lse = np.full(q.shape[:2], -np.inf, np.float32)
        for row, request, _, _ in oracle.rows(call):
            kv, _ = oracle.attention_row(call, row, request)
            if len(kv):
                found = self.row(q[row], kv, options["softmax_scale"], options["value_dim"], call.arrays.get("attn_sink"))
                out[row], lse[row] = found[0].astype(q.dtype), found[1]
        return {"out": out, "lse": lse} if options.get("return_lse") else {"out": out}
