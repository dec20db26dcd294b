"""One correct implementation of both operators in NumPy, a method a step: a planted fault overrides a step and nothing else.

It computes with a declared profile, but sums in another order than the emulator: an honest run is no copy of the yardstick.
Everything inside the operators' boundary is done here anew: visibility, pages, caches, selection; each can be done wrong.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.judging.emulator import dot, rounded, stored
from dsa_portable.formats import Unpacked, layout, unpack
from dsa_portable.profile import Profile

Array: TypeAlias = np.ndarray[Any, Any]


class Kernel:
    """What both operators share: requests, rows and where a position lies in memory."""

    # What a planted fault says of itself: its number, a diagnosis in a few words, the public bug (repository#number) it stands
    # for, the case that kills it, and the rule of docs/judging.md that it breaks there.
    code = ""
    title = ""
    stands_for = ""
    killed_by = ""
    rule = ""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    def length(self, call: Call, request: int) -> int:
        """Keys of a request."""
        return int(call.batch["seqlens_k"][request])

    def page(self, call: Call, request: int, page: Array) -> Array:
        """Physical page of each logical page of a request."""
        return np.asarray(call.batch["block_table"][request][page].astype(np.int64))

    def slots(self, call: Call, request: int, positions: Array) -> Array:
        """Rows of the keys' memory, pages flattened."""
        if "block_table" not in call.batch:
            return np.asarray(int(call.batch["cu_seqlens_k"][request]) + positions)
        size = int(call.batch_options["page_size"])
        return np.asarray(self.page(call, request, positions // size) * size + positions % size)

    def rows_of(self, call: Call, request: int) -> range:
        """Query rows of a request."""
        return range(int(call.batch["cu_seqlens_q"][request]), int(call.batch["cu_seqlens_q"][request + 1]))

    def fetch(self, memory: Array, slots: Array) -> Array:
        """float32 rows of one stored array; pages flattened."""
        return memory.reshape(-1, memory.shape[-1])[slots].astype(np.float32)


class LightningIndex(Kernel):
    """An honest lightning_index."""

    def span(self, call: Call, request: int, row: int) -> tuple[int, int]:
        """(start, end) of the positions a row sees."""
        length, mine = self.length(call, request), self.rows_of(call, request)
        if "key_start" in call.batch:
            start, end = (min(max(int(call.batch[name][row]), 0), length) for name in ("key_start", "key_end"))
            return start, max(start, end)
        if not call.batch_options["causal"]:
            return 0, length
        return 0, max(0, self.causal_end(length, len(mine), row - mine.start))

    def causal_end(self, keys: int, rows: int, i: int) -> int:
        """First position that row i of a request does not see."""
        return keys - rows + i + 1

    def keys(self, call: Call, slots: Array) -> tuple[Array, Array]:
        """(k [n, D], scale [n]) in float32."""
        k, scale, name = call.arrays["k"], call.arrays.get("k_scale"), call.options["k_layout"]
        if name is not None:
            k, scale, _ = unpack(name, k)
        found = np.ones(len(slots), np.float32) if scale is None else scale.reshape(-1)[slots].astype(np.float32)
        return self.fetch(k, slots), found

    def operands(self, q: Array, k: Array) -> tuple[Array, Array]:
        """q [H, D] of one row and k [n, D]."""
        return q, k

    def weights(self, weights: Array) -> Array:
        """[H] of one row."""
        return weights

    def scale(self, scale: Array) -> Array:
        """[n], the keys' scales."""
        return rounded(scale, self.profile.scale_compute)

    def dots(self, q: Array, k: Array) -> Array:
        """[H, n], as the accumulator sums them."""
        return dot(q, k, self.profile.accumulator)

    def activate(self, dots: Array) -> Array:
        """relu."""
        return np.maximum(dots, 0)

    def head_sum(self, weights: Array, dots: Array) -> Array:
        """sum_h weights[h] * dots[h, n]."""
        return np.asarray(weights @ dots)

    def scores(self, q: Array, k: Array, weights: Array, scale: Array) -> Array:
        """float32 [n] of one row."""
        q, k = self.operands(q, k)
        heads = np.argsort(np.arange(len(q)) * 7919 % 104729)
        # Dimensions last to first and heads shuffled: another legal order of summation.
        dots = stored(self.dots(q[heads][:, ::-1], k[:, ::-1]), self.profile)
        total = self.head_sum(self.weights(weights)[heads], self.activate(dots))
        return rounded(total * self.scale(scale), self.profile.logit)

    def select(self, scores: Array, topk: int) -> Array:
        """Positions of the topk largest, ties to the lowest."""
        return np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")[:topk]

    def order(self, chosen: Array) -> Array:
        """Ascending."""
        return np.sort(chosen)

    def pad(self, chosen: Array, topk: int) -> Array:
        """[topk]: packed to the left, tail -1."""
        return np.concatenate([chosen, np.full(topk - len(chosen), -1, np.int64)])

    def row(self, call: Call, request: int, row: int) -> tuple[Array, Array]:
        """(indices [topk], scores [topk]) of one row."""
        start, end = self.span(call, request, row)
        topk = int(call.options["topk"])
        keys, scale = self.keys(call, self.slots(call, request, np.arange(start, end)))
        q, weights = (call.arrays[name][row].astype(np.float32) for name in ("q", "weights"))
        found = self.scores(q, keys, weights, scale)
        chosen = self.order(self.select(found, topk))
        tail = np.full(max(0, topk - len(chosen)), -np.inf, np.float32)
        return self.pad(chosen + start, topk), np.concatenate([found[chosen], tail])

    def run(self, call: Call) -> dict[str, Array]:
        """The operator's outputs for a whole call."""
        shape = (len(call.arrays["q"]), int(call.options["topk"]))
        indices, scores = np.full(shape, -1, np.int32), np.full(shape, -np.inf, np.float32)
        for request in range(len(call.batch["seqlens_k"])):
            for row in self.rows_of(call, request):
                indices[row], scores[row] = self.row(call, request, row)
        return {"indices": indices, "scores": scores} if call.options.get("return_scores") else {"indices": indices}


class SparseAttend(Kernel):
    """An honest sparse_attend."""

    def entries(self, call: Call, row: int) -> Array:
        """The leading entries of the row that count."""
        entries: Array = call.arrays["indices"][row].astype(np.int64)
        return entries[: max(0, int(call.arrays["topk_length"][row]))] if "topk_length" in call.arrays else entries

    def valid(self, entries: Array, length: int) -> Array:
        """Those that name a key; the others are skipped wherever they stand."""
        return entries[(entries >= 0) & (entries < length)]

    def stored_rows(self, call: Call, slots: Array) -> Array:
        """kv [n, Dqk] in float32; a packed row is value * scale of its tile, beside the rotated part."""
        name, kv = call.options["kv_layout"], call.arrays["kv"]
        if name is None:
            return self.fetch(kv, slots)
        values, scale, rope = self.parts(name, kv)
        assert rope is not None
        tiles = np.repeat(self.tile_scales(self.fetch(scale, slots)), layout(name).tile, axis=1)
        return np.concatenate([self.fetch(values, slots) * tiles, self.fetch(rope, slots)], axis=1)

    def parts(self, name: str, kv: Array) -> Unpacked:
        """Values, scales and rotated part of a packed cache."""
        return unpack(name, kv)

    def tile_scales(self, scale: Array) -> Array:
        """[n, tiles] of one row."""
        return scale

    def kv(self, kv: Array) -> Array:
        """[n, Dqk] of one row as it is multiplied."""
        return rounded(kv, self.profile.kv_compute)

    def logits(self, q: Array, kv: Array, softmax_scale: float) -> Array:
        """[Hq, n]."""
        return rounded(dot(q[:, ::-1], kv[:, ::-1], self.profile.accumulator) * np.float32(softmax_scale), self.profile.logit)

    def maximum(self, logits: Array) -> Array:
        """[Hq], what is subtracted before exp."""
        return np.asarray(logits.max(axis=1))

    def shares(self, logits: Array, top: Array) -> Array:
        """exp(logit - maximum) [Hq, n]."""
        return np.asarray(np.exp(logits - top[:, None]))

    def probabilities(self, shares: Array) -> Array:
        """As they enter the product with the values."""
        return rounded(shares, self.profile.p)

    def values(self, kv: Array, value_dim: int) -> Array:
        """[n, value_dim]."""
        return kv[:, :value_dim]

    def weigh(self, p: Array, values: Array) -> Array:
        """[Hq, value_dim], sum_j p[:, j] * values[j]; last to first, another legal order of summation."""
        return dot(np.ascontiguousarray(p[:, ::-1]), np.ascontiguousarray(values[::-1].T), self.profile.accumulator)

    def sink_share(self, sink: Array, top: Array) -> Array:
        """What a sink adds to the normaliser, relative to exp(maximum)."""
        return np.asarray(np.exp(sink - top))

    def lse(self, top: Array, total: Array, sink: Array | None) -> Array:
        """Natural logarithm, keys only."""
        return np.asarray(top + np.log(total))

    def store(self, out: Array, dtype: np.dtype[Any]) -> Array:
        """float32 to the output's dtype, to nearest."""
        return np.asarray(out.astype(dtype))

    def attend(self, q: Array, kv: Array, softmax_scale: float, value_dim: int, sink: Array | None) -> tuple[Array, Array]:
        """(out float32, lse) of one row over n >= 1 keys."""
        kv = self.kv(kv)
        logits = self.logits(q.astype(np.float32), kv, softmax_scale)
        top = self.maximum(logits)
        shares = self.shares(logits, top)
        p = self.probabilities(shares)
        total = (p if self.profile.normaliser == "rounded" else shares)[:, ::-1].sum(axis=1)
        lse = self.lse(top, total, sink)
        if sink is not None:
            with np.errstate(over="ignore"):
                total = total + self.sink_share(sink, top)
        return self.weigh(p, self.values(kv, value_dim)) / total[:, None], lse

    def empty(self, heads: int, value_dim: int) -> tuple[Array, Array]:
        """(out, lse) of a row without a valid index."""
        return np.zeros((heads, value_dim), np.float32), np.full(heads, -np.inf, np.float32)

    def row(self, call: Call, request: int, row: int) -> tuple[Array, Array]:
        """(out in q's dtype, lse) of one row."""
        q, options = call.arrays["q"][row], call.options
        positions = self.valid(self.entries(call, row), self.length(call, request))
        if not len(positions):
            out, lse = self.empty(len(q), options["value_dim"])
        else:
            kv = self.stored_rows(call, self.slots(call, request, positions))
            out, lse = self.attend(q, kv, options["softmax_scale"], options["value_dim"], call.arrays.get("attn_sink"))
        return self.store(out, q.dtype), lse

    def run(self, call: Call) -> dict[str, Array]:
        """The operator's outputs for a whole call."""
        q = call.arrays["q"]
        out = np.zeros((*q.shape[:2], call.options["value_dim"]), q.dtype)
        lse = np.full(q.shape[:2], -np.inf, np.float32)
        for request in range(len(call.batch["seqlens_k"])):
            for row in self.rows_of(call, request):
                out[row], lse[row] = self.row(call, request, row)
        return {"out": out, "lse": lse} if call.options.get("return_lse") else {"out": out}
