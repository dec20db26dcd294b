"""Planted faults of the caller: what happens before and between the operators, where no operator's own test can see it.

A small two-layer pipeline (prepare, an honest lightning_index, an honest sparse_attend) is compared with float64 that quantises
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from dsa_portable.caller import ROTATIONS, IndexOperands, Rotation, fold_weights, hadamard, rope
from dsa_portable.conformance.cases import values
from dsa_portable.conformance.cases.attend import V32_SCALE
from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.faults.implementation import LightningIndex, SparseAttend
from dsa_portable.conformance.judging import bounds, oracle
from dsa_portable.formats import quantise_e4m3fn
from dsa_portable.profile import Profile

Array: TypeAlias = np.ndarray[Any, Any]

ROWS, KEYS, TOPK = 16, 1536, 256
INDEX_HEADS, INDEX_DIM = 16, 128
HEADS, KEY_DIM, VALUE_DIM = 16, 576, 512
OUTLIERS = [3, 70, 100]  # dimensions in which the index keys are 8 times larger, as real ones have them: Hadamard's reason
INDEXER, ATTENTION = ROTATIONS["deepseek-v3.2 indexer"], ROTATIONS["multi-head latent attention"]


@dataclass(frozen=True)
class Layer:
    """What the projections of one layer give, float32 and not rotated: for the index and for the attention."""

    index_q: Array  # [ROWS, INDEX_HEADS, INDEX_DIM]
    index_k: Array  # [KEYS, INDEX_DIM]
    head_weights: Array  # [ROWS, INDEX_HEADS]
    q: Array  # [ROWS, HEADS, KEY_DIM]
    kv: Array  # [KEYS, KEY_DIM]


def positions() -> tuple[Array, Array]:
    """(of the rows, of the keys): the rows are the last of the keys."""
    keys = np.arange(KEYS)
    return keys[-ROWS:], keys


def layers(seed: str) -> tuple[Layer, Layer]:
    """Two layers that share most of what they see, as neighbours do; index heads differ in size by up to 16."""

    def draw(name: str, *shape: int) -> Array:
        common, own = values.bell(f"{seed}common/{name}", shape), values.bell(f"{seed}own/{name}", (2, *shape))
        return np.asarray((0.8 * common + 0.6 * own) * 2.0**-7).astype(np.float32)

    sizes = np.exp2(np.arange(INDEX_HEADS) % 5 - 2).astype(np.float32)
    index_q = draw("index_q", ROWS, INDEX_HEADS, INDEX_DIM) * sizes[:, None]
    index_k = draw("index_k", KEYS, INDEX_DIM)
    index_k[..., OUTLIERS] *= 8
    parts = (
        index_q,
        index_k,
        draw("weights", ROWS, INDEX_HEADS) + np.float32(1),
        draw("q", ROWS, HEADS, KEY_DIM) * np.float32(0.75),
        draw("kv", KEYS, KEY_DIM),
    )
    first, second = (Layer(*(part[i] for part in parts)) for i in range(2))
    return first, second


class Caller:
    """An honest caller, a method a step; `dsa_portable.caller.prepare_index` does the same in one."""

    code = ""
    title = ""
    stands_for = ""
    rule = ""  # what of the pipeline is wrong: `selection` or `output`

    def index_rotation(self) -> Rotation:
        """RoPE of the index."""
        return INDEXER

    def attention_rotation(self) -> Rotation:
        """RoPE of the attention."""
        return ATTENTION

    def spread_q(self, q: Array) -> Array:
        """Hadamard rotation of the queries."""
        return hadamard(q)

    def spread_k(self, k: Array) -> Array:
        """Hadamard rotation of the keys."""
        return hadamard(k)

    def quantise(self, x: Array) -> tuple[Array, Array]:
        """(values, scale)."""
        return quantise_e4m3fn(x)

    def fold(self, head_weights: Array, q_scale: Array) -> Array:
        """The weights that the operator takes."""
        return fold_weights(head_weights, q_scale, INDEX_DIM)

    def index(self, layer: Layer) -> IndexOperands:
        """Operands of lightning_index."""
        (style, dims), (rows, keys) = self.index_rotation(), positions()
        q, q_scale = self.quantise(self.spread_q(rope(layer.index_q, rows, style=style, dims=dims)))
        k, k_scale = self.quantise(self.spread_k(rope(layer.index_k, keys, style=style, dims=dims)))
        return IndexOperands(q, k, self.fold(layer.head_weights, q_scale), k_scale)

    def attention(self, layer: Layer) -> tuple[Array, Array]:
        """(q, kv) of sparse_attend, in bfloat16."""
        (style, dims), (rows, keys) = self.attention_rotation(), positions()
        q, kv = (rope(x, at, style=style, dims=dims) for x, at in ((layer.q, rows), (layer.kv, keys)))
        return q.astype(ml_dtypes.bfloat16), kv.astype(ml_dtypes.bfloat16)

    def shared(self, indices: Sequence[Array]) -> Sequence[Array]:
        """The indices that each layer attends, from those that each layer selected."""
        return indices

    def run(self, model: Sequence[Layer]) -> list[tuple[Array, Array]]:
        """(indices, out) of each layer."""
        batch = {
            "cu_seqlens_q": np.array([0, ROWS], np.int32),
            "cu_seqlens_k": np.array([0, KEYS], np.int32),
            "seqlens_k": np.array([KEYS], np.int32),
        }
        selected = []
        for layer in model:
            options: dict[str, Any] = {"topk": TOPK, "k_layout": None}
            call = Call("lightning_index", self.index(layer)._asdict(), batch, options, {"page_size": None, "causal": True})
            selected.append(LightningIndex(Profile()).run(call)["indices"])
        found = []
        for layer, indices in zip(model, self.shared(selected), strict=True):
            q, kv = self.attention(layer)
            options = {"softmax_scale": V32_SCALE, "value_dim": VALUE_DIM, "kv_layout": None}
            call = Call("sparse_attend", {"q": q, "kv": kv, "indices": indices}, batch, options)
            found.append((indices, SparseAttend(Profile()).run(call)["out"]))
        return found


# --- planted faults ---


class QueryScaleDropped(Caller):
    """The scale of the quantised queries is not folded into the weights, so that every head counts alike."""

    code, title, stands_for = "I9", "scale of q not folded into the weights", "DeepGEMM's fp8 index has no argument for it"
    rule = "selection"

    def fold(self, head_weights: Array, q_scale: Array) -> Array:
        """Scale 1."""
        return super().fold(head_weights, np.ones_like(q_scale))


class HadamardOnQueriesOnly(Caller):
    """The keys are cached without the rotation that the queries have."""

    code, title, stands_for = "I12", "Hadamard rotation of q and not of k", "ATOM#1507"
    rule = "selection"

    def spread_k(self, k: Array) -> Array:
        """As they are."""
        return k


class IndexRopeInterleaved(Caller):
    """RoPE of the index pairs neighbouring dimensions where the model pairs halves."""

    code, title, stands_for = "I14", "RoPE of the index interleaved instead of half", "vllm#28968, vllm-ascend#4641"
    rule = "selection"

    def index_rotation(self) -> Rotation:
        """The other style."""
        return INDEXER._replace(style="interleaved")


class IndexRopeLast(Caller):
    """RoPE of the index turns the last 64 dimensions, as the attention's does."""

    code, title, stands_for = "C1", "RoPE of the index on the last 64 dimensions instead of the first", "hazard of DeepSeek-V4"
    rule = "selection"

    def index_rotation(self) -> Rotation:
        """The attention's dimensions."""
        return INDEXER._replace(dims=ATTENTION.dims)


class IndicesOfAnotherLayer(Caller):
    """A layer attends what the layer before it selected."""

    code, title, stands_for = "I41", "indices of another layer", "GLM-5.2 shares them among some layers"
    rule = "selection"

    def shared(self, indices: Sequence[Array]) -> Sequence[Array]:
        """The first layer's for all."""
        return [indices[0]] * len(indices)


class AttentionRopeHalf(Caller):
    """RoPE of the attention pairs halves where the model pairs neighbours."""

    code, title, stands_for = "A6", "RoPE of the attention half instead of interleaved", "vllm#28968, maxtext"
    rule = "output"

    def attention_rotation(self) -> Rotation:
        """The other style."""
        return ATTENTION._replace(style="half")


CALLER_FAULTS: tuple[type[Caller], ...] = (
    QueryScaleDropped,
    HadamardOnQueriesOnly,
    IndexRopeInterleaved,
    IndexRopeLast,
    IndicesOfAnotherLayer,
    AttentionRopeHalf,
)

# --- the honest population ---


class NoHadamard(Caller):
    """I13: neither side is rotated. Every exact score is the same; only what quantisation loses differs (vllm#55459)."""

    def spread_q(self, q: Array) -> Array:
        """As they are."""
        return q

    def spread_k(self, k: Array) -> Array:
        """As they are."""
        return k


class ArbitraryScales(Caller):
    """Scales keep their significand."""

    def quantise(self, x: Array) -> tuple[Array, Array]:
        """Not rounded up to powers of two."""
        return quantise_e4m3fn(x, power_of_two=False)


class SixteenBit(Caller):
    """Rotations are rounded to bfloat16 before quantisation, as in the model."""

    def spread_q(self, q: Array) -> Array:
        """In bfloat16."""
        return super().spread_q(q.astype(ml_dtypes.bfloat16)).astype(np.float32)

    def spread_k(self, k: Array) -> Array:
        """In bfloat16."""
        return super().spread_k(k.astype(ml_dtypes.bfloat16)).astype(np.float32)


HONEST_CALLERS: tuple[type[Caller], ...] = (Caller, NoHadamard, ArbitraryScales, SixteenBit)

# --- the measure ---


@dataclass(frozen=True)
class Finding:
    """How far a pipeline is from float64 without quantisation, and how far it may be."""

    exchanged: int  # keys attended that the unquantised index would not have selected, over all rows and layers
    exchanged_limit: float
    error: float  # of the outputs, relative and root mean square, on the pipeline's own indices
    error_limit: float

    @property
    def recall(self) -> float:
        """Of the unquantised selection."""
        return 1 - self.exchanged / (2 * ROWS * TOPK)

    @property
    def accused(self) -> tuple[str, ...]:
        """`selection`, `output`, both or none."""
        broken = {"selection": self.exchanged > self.exchanged_limit, "output": not self.error <= self.error_limit}
        return tuple(name for name, wrong in broken.items() if wrong)


def _selection(layer: Layer) -> list[Array]:
    """Each row's positions of the largest scores, in float64 from operands that were never quantised."""
    rows, keys = positions()
    q = rope(layer.index_q.astype(np.float64), rows, style=INDEXER.style, dims=INDEXER.dims)
    k = rope(layer.index_k.astype(np.float64), keys, style=INDEXER.style, dims=INDEXER.dims)
    scores = oracle.head_sums(q, k, layer.head_weights.astype(np.float64))[0]
    return [np.argsort(-scores[i, : position + 1], kind="stable")[:TOPK] for i, position in enumerate(rows)]


def _outputs(layer: Layer, indices: Array) -> Array:
    """float64 attention over the given indices, from operands that were never rounded."""
    rows, keys = positions()
    q = rope(layer.q.astype(np.float64), rows, style=ATTENTION.style, dims=ATTENTION.dims)
    kv = rope(layer.kv.astype(np.float64), keys, style=ATTENTION.style, dims=ATTENTION.dims)
    return np.stack([oracle.attention(q[i], kv[indices[i]], V32_SCALE, VALUE_DIM, None)[0] for i in range(ROWS)])


def _distance(caller: type[Caller], model: Sequence[Layer]) -> tuple[int, float]:
    """(keys exchanged, relative error) of a caller."""
    exchanged, square_error, square = 0, 0.0, 0.0
    for layer, (indices, out) in zip(model, caller().run(model), strict=True):
        exchanged += sum(len(np.setdiff1d(best, mine)) for best, mine in zip(_selection(layer), indices, strict=True))
        truth = _outputs(layer, indices)
        square_error += float(((out.astype(np.float64) - truth) ** 2).sum())
        square += float((truth**2).sum())
    return exchanged, (square_error / square) ** 0.5


@lru_cache(maxsize=4)
def _yardstick(seed: str) -> tuple[tuple[Layer, Layer], int, float]:
    """The model of a seed, and what an honest caller exchanges and errs there: the price of e4m3 and of bfloat16."""
    model = layers(seed)
    return model, *_distance(Caller, model)


def examine(caller: type[Caller], seed: str = "") -> Finding:
    """How a caller compares with the honest one on the same model.

    The limits are those of docs/judging.md 3.3, with an honest caller's quantisation in place of the emulator's rounding: if it
    exchanges m keys, another honest quantiser, four times less lucky and with the scatter of a count, exchanges at most
    4 m + 3 sqrt(m) + 2, and its outputs err at most four times as much. A fault moves scores by their own size, so it exchanges
    a share of all keys that does not shrink with the format's precision.
    """
    model, m, error = _yardstick(seed)
    exchanged, found = _distance(caller, model)
    return Finding(exchanged, bounds.exchanged_limit(m), found, 4 * error)
