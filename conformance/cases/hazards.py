"""What goes wrong in ports: the tags that cases carry, and the 30 hazards of portability that they must cover between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

# Tag -> what it stands for; every case carries at least one.
HAZARDS: Mapping[str, str] = MappingProxyType(
    {
        "selection": "the k best, not nearly the k best",
        "causal-offset": "bottom-right alignment, one key too many or too few",
        "short-row": "rows that see fewer keys than topk, one, or none",
        "ragged": "requests of unequal lengths in one call",
        "padding-rows": "rows past the last request",
        "paging": "block table followed, in any order, with shared pages",
        "poison": "NaN in everything that must not be read",
        "long-context": "more keys than any fixed buffer",
        "clustered-scores": "thousands of candidates in one threshold bucket",
        "scale": "key scales that are no powers of two, each its own key's",
        "weights-precision": "weights that need more than 8 bits",
        "head-sum-precision": "a head sum that cancels",
        "ties": "equal scores, and -0.0 beside +0.0",
        "returned-scores": "the scores that come with the indices",
        "key-range": "explicit ranges that replace causality",
        "not-causal": "every key visible",
        "visible-nan": "a NaN operand spoils its own row alone",
        "layout": "the bytes of a packed cache",
        "order": "unsorted output, still unique and packed",
        "out": "results written into the caller's arrays, every element of them",
        "geometry": "other head counts, dimensions, page sizes and topk",
        "invalid-indices": "-1, INT_MIN, INT_MAX and seqlens_k anywhere in a row",
        "repeated-indices": "an index that appears twice counts twice",
        "lse": "natural logarithm, keys only, -inf in an empty row",
        "sink": "a sink per head: -inf, finite, +inf",
        "topk-length": "entries past the row's length are not read",
        "logits": "flat, peaked and hot softmax",
        "softmax-scale": "the scale that is passed, not Dqk^-0.5",
        "rope-part": "the last 64 dimensions count in keys and not in values",
        "exactness": "inputs on which every legal arithmetic agrees bit for bit",
        "range": "the ends of the operand format: +-448, subnormals, -0.0",
        "rerun": "the same call again, after another one used the same buffers",
        "batch-mates": "the same request alone and in other company",
        "query-slices": "the same rows in other chunks",
        "page-size": "the same keys in other pages",
        "symmetry": "heads, keys or entries in another order, weights scaled, values shifted",
        "end-to-end": "attention over the indices that the same backend selected",
        "strides": "arrays that are no C-contiguous memory of their own",
        "big-offset": "element offsets beyond 2^31",
    }
)


@dataclass(frozen=True)
class PortabilityHazard:
    """One way in which implementations differ, and the tags whose cases show it; `beyond` says what lies outside a call."""

    number: int
    what: str
    tags: tuple[str, ...]
    beyond: str = ""


# fmt: off
PORTABILITY = (
    PortabilityHazard(1, "index space: request, flat row or page slot", ("ragged", "paging")),
    PortabilityHazard(2, "invalid marker: -1, any out of range, INT_MAX, first -1 ends the row", ("invalid-indices",)),
    PortabilityHazard(3, "-1 inside a row", ("invalid-indices",)),
    PortabilityHazard(4, "causality in the operator or only in the indices; top-left or bottom-right", ("causal-offset", "not-causal")),
    PortabilityHazard(5, "only the first min(k, threshold) entries are read", ("invalid-indices", "end-to-end")),
    PortabilityHazard(6, "repeated indices", ("repeated-indices",)),
    PortabilityHazard(7, "lse in base e or 2, or as (max, sum)", ("lse",)),
    PortabilityHazard(8, "empty row: lse +inf, -inf or NaN", ("lse", "short-row")),
    PortabilityHazard(9, "the sink in the lse", ("sink",)),
    PortabilityHazard(10, "656-byte caches of two byte orders", ("layout", "rope-part")),
    PortabilityHazard(11, "132-byte caches, planar or interleaved", ("layout",)),
    PortabilityHazard(12, "scales that are no powers of two", ("scale", "layout")),
    PortabilityHazard(13, "query scale folded into the weights or separate, constants dropped", ("returned-scores",)),
    PortabilityHazard(14, "RoPE order and interleaving", ("rope-part",), "rotation is the caller's: dsa_portable.caller and the faults of conformance/selftest/pipeline.py"),
    PortabilityHazard(15, "scores in reduced precision", ("weights-precision", "head-sum-precision", "returned-scores")),
    PortabilityHazard(16, "e4m3 FNUZ read as FN", ("range",)),
    PortabilityHazard(17, "head counts", ("geometry",)),
    PortabilityHazard(18, "page sizes", ("geometry", "page-size")),
    PortabilityHazard(19, "topk multiples", ("geometry",)),
    PortabilityHazard(20, "prefix sums or plain lengths", ("ragged",)),
    PortabilityHazard(21, "NaN in unread places", ("poison",)),
    PortabilityHazard(22, "a default softmax scale", ("softmax-scale",)),
    PortabilityHazard(23, "sink support", ("sink",)),
    PortabilityHazard(24, "topk_length per row, per batch or absent", ("topk-length",)),
    PortabilityHazard(25, "NaN scores", ("visible-nan",)),
    PortabilityHazard(26, "offsets beyond 2^31", ("big-offset",)),
    PortabilityHazard(27, "ties, and order between ranks", ("ties", "rerun", "batch-mates")),
    PortabilityHazard(28, "results of width min(k, n)", ("short-row",)),
    PortabilityHazard(29, "nope and rope joined or apart, in either order", ("rope-part", "layout")),
    PortabilityHazard(30, "stale metadata when a call is replayed", ("rerun",), "graph capture is the backend's own test"),
)
# fmt: on
