"""Planted index faults of selection: which of the visible keys a row keeps. faults/index.py lists them with all others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.faults.implementation import Array, LightningIndex
from dsa_portable.profile import Profile

ROW_TILE, KEY_TILE = 16, 128
NAN_SENTINEL = 0x3F3F3F3F


class KTruncated(LightningIndex):
    """The last tile of 64 results is not kept."""

    code, title = "I17", "64 results too few"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "visible"

    def select(self, scores: Array, topk: int) -> Array:
        """64 fewer."""
        return super().select(scores, topk)[: max(0, topk - 64)]


class TopkHardCoded(LightningIndex):
    """2,048 are kept whatever is asked for, and the row cut at topk positions."""

    code, title = "I64", "topk assumed to be 2048"
    killed_by, rule = "index-e4m3-f32-f32-prefill-topk512", "certificate"

    def select(self, scores: Array, topk: int) -> Array:
        """The first topk positions of them."""
        return np.sort(super().select(scores, 2048))[:topk]


class DenseFallback(LightningIndex):
    """A size that the selection does not take falls back to the first positions."""

    code, title, stands_for = "I65", "silent fallback: the first positions, whatever their scores", "vllm-ascend#16005"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "certificate"

    def select(self, scores: Array, topk: int) -> Array:
        """From 0 on."""
        return np.arange(min(len(scores), topk))


class SmallestKept(LightningIndex):
    """The order of comparison is reversed."""

    code, title = "I30", "the smallest scores are kept"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "certificate"

    def select(self, scores: Array, topk: int) -> Array:
        """Of the negated scores."""
        return super().select(-scores, topk)


class CandidateBuffer(LightningIndex):
    """Radix selection by the leading 8 bits of a float16, and a buffer for 4,096 candidates of the bucket at the threshold."""

    code, title, stands_for = "I66", "candidate buffer overflows", "sglang#36807"
    killed_by, rule = "index-e4m3-f32-f32-decode-long", "certificate"

    def candidates(self, found: Array) -> Array:
        """Those of the threshold's bucket that the buffer holds."""
        return found[:4096]

    def select(self, scores: Array, topk: int) -> Array:
        """All above the bucket and the best of those in the buffer."""
        if len(scores) <= topk:
            return super().select(scores, topk)
        with np.errstate(over="ignore"):
            bits = np.nan_to_num(scores, nan=-np.inf).astype(np.float16).view(np.uint16)
        bucket = np.where(bits >> 15, ~bits, bits | 0x8000) >> 8
        threshold = np.sort(bucket)[-topk]
        above, near = np.flatnonzero(bucket > threshold), self.candidates(np.flatnonzero(bucket == threshold))
        return np.concatenate([above, near[super().select(scores[near], topk - len(above))]])


class CandidateLost(CandidateBuffer):
    """One candidate of the threshold's bucket is lost."""

    code, title = "I18", "one candidate lost"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "certificate"
    lost = 1

    def candidates(self, found: Array) -> Array:
        """Without the last ones."""
        return found[: max(0, len(found) - self.lost)]


class Candidates3Lost(CandidateLost):
    """Three candidates of the threshold's bucket are lost."""

    code, title, lost = "I19", "3 candidates lost", 3
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "certificate"


class Candidates40Lost(CandidateLost):
    """Forty candidates of the threshold's bucket are lost."""

    code, title, lost = "I20", "40 candidates lost", 40
    killed_by, rule = "index-e4m3-f32-f32-decode-long", "certificate"


class Candidates150Lost(CandidateLost):
    """150 candidates of the threshold's bucket are lost."""

    code, title, lost = "I21", "150 candidates lost", 150
    killed_by, rule = "index-e4m3-f32-f32-decode-long", "certificate"


class TiesBeforeBetter(LightningIndex):
    """Everything from the k-th score on is collected in order of position until the row is full."""

    code, title, stands_for = "I67", "ties at the boundary displace better keys", "sglang#31115"
    killed_by, rule = "index-e4m3-f32-f32-prefill-lattice", "certificate"

    def select(self, scores: Array, topk: int) -> Array:
        """The first topk of them."""
        if len(scores) <= topk:
            return super().select(scores, topk)
        return np.flatnonzero(scores >= np.sort(scores)[-topk])[:topk]


class TiesDropped(LightningIndex):
    """Only scores strictly above that of the k-th are kept, and the k-th itself."""

    code, title = "I68", "ties at the boundary dropped"
    killed_by, rule = "index-e4m3-f32-f32-prefill-plateau", "visible"

    def select(self, scores: Array, topk: int) -> Array:
        """Without the others that equal the k-th."""
        best = super().select(scores, topk)
        return best[np.append(scores[best[:-1]] > scores[best[-1]], True)] if len(best) else best


class PadsBeforeNegative(LightningIndex):
    """Pads and buffers hold 0 where they should hold -inf, so that no negative score is ever kept."""

    code, title, stands_for = "I40", "pads selected before negative scores", "pypto-lib#368"
    killed_by, rule = "index-e4m3-f32-f32-prefill-codes", "visible"

    def select(self, scores: Array, topk: int) -> Array:
        """Without them."""
        best = super().select(scores, topk)
        return best[~(scores[best] < 0)]


class NegativeOrderReversed(LightningIndex):
    """Scores are compared as the unsigned integers of their bits: a more negative score is a larger one."""

    code, title = "I69", "negative scores ordered by magnitude"
    killed_by, rule = "index-e4m3-f32-f32-prefill-codes", "certificate"

    def select(self, scores: Array, topk: int) -> Array:
        """Negative ones below all others, and the most negative of them first."""
        return super().select(np.where(scores < 0, scores.min(initial=0) - scores - 1, scores), topk)


class NegativeZeroLower(LightningIndex):
    """-0.0 is ordered below +0.0, as the integers of their bits are."""

    code, title = "I70", "-0.0 ordered below 0.0"
    killed_by, rule = "index-e4m3-f32-f32-prefill-plateau", "ties"

    def select(self, scores: Array, topk: int) -> Array:
        """-0.0 just below 0.0."""
        return super().select(np.where((scores == 0) & np.signbit(scores), -np.finfo(np.float32).tiny, scores), topk)


class TiesToHighest(LightningIndex):
    """Of equal scores the highest positions are kept, under a profile that declares the lowest."""

    code, title = "I71", "ties go to the highest position"
    killed_by, rule = "index-e4m3-f32-f32-prefill-plateau", "ties"

    def select(self, scores: Array, topk: int) -> Array:
        """From the other end."""
        return len(scores) - 1 - super().select(scores[::-1], topk)


class TieRuleFlips(TiesToHighest):
    """Which of equal scores are kept changes from run to run."""

    code, title, stands_for = "I37", "ties depend on the run", "sglang#31115"
    killed_by, rule = "index-e4m3-f32-f32-prefill-ties-rerun", "agreement"

    def __init__(self, profile: Profile) -> None:
        super().__init__(profile)
        self.runs = 0

    def select(self, scores: Array, topk: int) -> Array:
        """The highest in every third run."""
        return super().select(scores, topk) if self.runs % 3 == 0 else LightningIndex.select(self, scores, topk)

    def run(self, call: Call) -> dict[str, Array]:
        """Counted."""
        self.runs += 1
        return super().run(call)


class TiesByTile(TiesToHighest):
    """Rows behind the first eight of a request are computed in a tile that breaks ties the other way."""

    code, title, stands_for = "I91", "ties depend on the tile of query rows", "vllm-ascend#15053"
    killed_by, rule = "index-bf16-f32-prefill-lattice", "ties"

    def row(self, call: Call, request: int, row: int) -> tuple[Array, Array]:
        """Which tile it is, remembered for the selection."""
        self.late = row - self.rows_of(call, request).start >= 8
        return super().row(call, request, row)

    def select(self, scores: Array, topk: int) -> Array:
        """The highest in later tiles."""
        return super().select(scores, topk) if self.late else LightningIndex.select(self, scores, topk)


class LastTileDropped(LightningIndex):
    """The keys behind the last full tile of 128 are never scored."""

    code, title = "I26", "last tile of keys dropped"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "certificate"

    def scores(self, q: Array, k: Array, weights: Array, scale: Array) -> Array:
        """-inf there."""
        found = super().scores(q, k, weights, scale)
        return np.where(np.arange(len(found)) < len(found) // KEY_TILE * KEY_TILE, found, np.float32(-np.inf))


class SixteenBitPositions(LightningIndex):
    """Positions are kept in 16 bits, so that keys from 65,536 on are not found."""

    code, title = "I72", "keys from 65,536 on are lost"
    killed_by, rule = "index-e4m3-f32-f32-decode-long", "certificate"

    def select(self, scores: Array, topk: int) -> Array:
        """Before it."""
        return super().select(scores[: 1 << 16], topk)


# --- NaN ---


class NaNSpoilsTile(LightningIndex):
    """A NaN in one row's weights reaches the rows that are computed with it."""

    code, title = "I38", "a NaN spoils other rows"
    killed_by, rule = "index-e4m3-f32-f32-prefill-visible-nan", "certificate"

    def run(self, call: Call) -> dict[str, Array]:
        """NaN weights in every row of a tile that holds one."""
        weights = call.arrays["weights"].copy()
        for first in range(0, len(weights), ROW_TILE):
            tile = weights[first : first + ROW_TILE]
            tile[:] = np.where(np.isnan(tile).any(), np.array(np.nan, tile.dtype), tile)
        return super().run(replace(call, arrays={**call.arrays, "weights": weights}))


class NaNLargest(LightningIndex):
    """NaN is the largest score: legal in a row that sees one, as its choice is left open."""

    title = "NaN ranks first"

    def select(self, scores: Array, topk: int) -> Array:
        """As infinity."""
        return super().select(np.nan_to_num(scores, nan=np.inf, posinf=np.inf, neginf=-np.inf), topk)


class NaNSentinel(NaNLargest):
    """A NaN is answered with a sentinel in the place of a position."""

    code, title = "I79", "NaN answered with a sentinel"
    killed_by, rule = "index-e4m3-f32-f32-prefill-visible-nan", "visible"

    def row(self, call: Call, request: int, row: int) -> tuple[Array, Array]:
        """For every NaN that was kept."""
        indices, scores = super().row(call, request, row)
        return np.where(np.isnan(scores), NAN_SENTINEL, indices), scores


FAULTS: tuple[type[LightningIndex], ...] = (
    KTruncated,
    TopkHardCoded,
    DenseFallback,
    SmallestKept,
    CandidateBuffer,
    CandidateLost,
    Candidates3Lost,
    Candidates40Lost,
    Candidates150Lost,
    TiesBeforeBetter,
    TiesDropped,
    PadsBeforeNegative,
    NegativeOrderReversed,
    NegativeZeroLower,
    TiesToHighest,
    TieRuleFlips,
    TiesByTile,
    LastTileDropped,
    SixteenBitPositions,
    NaNSpoilsTile,
    NaNSentinel,
)
