"""Planted faults of the caller, and honest variants of it: edits of caller.py, where no operator's own test can see them.

A pipeline of two layers is compared with float64 that quantises nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.caller import rope
from dsa_portable.conformance.cases.sparse_attend import V32_SCALE
from dsa_portable.conformance.judging import bounds, oracle
from dsa_portable.conformance.selftest.caller import ATTENTION, INDEXER
from dsa_portable.conformance.selftest.model import ROWS, TOPK, VALUE_DIM, Layer, layers, positions
from dsa_portable.conformance.selftest.plant import Fault, executed

Array: TypeAlias = np.ndarray[Any, Any]
TEXT = Path(__file__).with_name("caller.py")
SPREAD, QUANTISED = "hadamard(q), hadamard(k)", "quantise_e4m3fn(q), quantise_e4m3fn(k)"

# fmt: off
# What of the pipeline goes wrong -> the faults that do it.
FAULTS: Mapping[str, tuple[Fault, ...]] = MappingProxyType({
    "selection": (
        Fault("I9", "scale of q not folded into the weights", "head_weights, q_scale,", "head_weights, np.ones_like(q_scale),", "DeepGEMM's fp8 index has no argument for it"),
        Fault("I12", "Hadamard rotation of q and not of k", SPREAD, "hadamard(q), k", "ATOM#1507"),
        Fault("I14", "RoPE of the index interleaved instead of half", "style, dims = INDEXER", 'style, dims = "interleaved", INDEXER.dims', "vllm#28968, vllm-ascend#4641"),
        Fault("C1", "RoPE of the index on the last 64 dimensions instead of the first", "style, dims = INDEXER", "style, dims = INDEXER.style, ATTENTION.dims", "hazard of DeepSeek-V4"),
        Fault("I41", "indices of another layer", "zip(model, selected,", "zip(model, [selected[0]] * len(selected),", "GLM-5.2 shares them among some layers"),
    ),
    "output": (
        Fault("A6", "RoPE of the attention half instead of interleaved", "style, dims = ATTENTION", 'style, dims = "half", ATTENTION.dims', "vllm#28968, maxtext"),
    ),
})
# I13: neither side is spread. Every exact score is the same; only what quantisation loses differs (vllm#55459).
NO_HADAMARD = Fault("I13", "no Hadamard rotation on either side", SPREAD, "q, k")
HONEST: tuple[Fault, ...] = (
    NO_HADAMARD,
    Fault("", "scales that keep their significand", QUANTISED, "quantise_e4m3fn(q, power_of_two=False), quantise_e4m3fn(k, power_of_two=False)"),
    Fault("", "rotations in bfloat16, as in the model", SPREAD, "(hadamard(x.astype(ml_dtypes.bfloat16)).astype(np.float32) for x in (q, k))"),
)
# fmt: on


def planted(fault: Fault | None) -> Mapping[str, Any]:
    """The names of caller.py, with a fault or without. Raises PlantError."""
    return executed(TEXT, fault, {})


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


def _distance(fault: Fault | None, model: Sequence[Layer]) -> tuple[int, float]:
    """(keys exchanged, relative error) of a caller with this fault, or of the honest one."""
    run = planted(fault)["run"]
    exchanged, square_error, square = 0, 0.0, 0.0
    for layer, (indices, out) in zip(model, run(model), strict=True):
        exchanged += sum(len(np.setdiff1d(best, mine)) for best, mine in zip(_selection(layer), indices, strict=True))
        truth = _outputs(layer, indices)
        square_error += float(((out.astype(np.float64) - truth) ** 2).sum())
        square += float((truth**2).sum())
    return exchanged, (square_error / square) ** 0.5


@lru_cache(maxsize=4)
def _yardstick(seed: str) -> tuple[tuple[Layer, Layer], int, float]:
    """The model of a seed, and what an honest caller exchanges and errs there: the price of e4m3 and of bfloat16."""
    model = layers(seed)
    return model, *_distance(None, model)


def examine(fault: Fault | None, seed: str = "") -> Finding:
    """How a caller with a fault, or an honest variant, compares with the honest one on the same model.

    The limits are those of docs/judging.md 3.3, with an honest caller's quantisation in place of the emulator's rounding: if it
    exchanges m keys, another honest quantiser, four times less lucky and with the scatter of a count, exchanges at most
    4 m + 3 sqrt(m) + 2, and its outputs err at most four times as much. A fault moves scores by their own size, so it exchanges
    a share of all keys that does not shrink with the format's precision.
    """
    model, m, error = _yardstick(seed)
    exchanged, found = _distance(fault, model)
    return Finding(exchanged, bounds.exchanged_limit(m), found, 4 * error)
