"""Planted index faults of output: how a row's selection is written. faults/index.py lists them with all others."""

from __future__ import annotations

import numpy as np

from dsa_portable.batch import DECODE_ROWS
from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.faults.implementation import Array, LightningIndex

ROW_TILE = 16


class PadsAreZero(LightningIndex):
    """The tail of a short row is 0, which reads as the first key."""

    code, title = "I27", "tail filled with 0"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "tail"
    filler = 0

    def pad(self, chosen: Array, topk: int) -> Array:
        """The filler behind the positions."""
        return np.concatenate([chosen, np.full(topk - len(chosen), self.filler, np.int64)])


class TailNotWritten(PadsAreZero):
    """The tail of a short row is left as it was; a filler of INT_MAX looks the same."""

    code, title, filler = "I39", "tail not written", np.iinfo(np.int32).max
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "tail"


class LastRepeated(LightningIndex):
    """A short row is filled up with its last position."""

    code, title = "I73", "short row filled up by repetition"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "tail"

    def pad(self, chosen: Array, topk: int) -> Array:
        """The last one again."""
        return np.pad(chosen, (0, topk - len(chosen)), mode="edge") if len(chosen) else super().pad(chosen, topk)


class OneTwice(LightningIndex):
    """Two threads write the same key, and another is lost."""

    code, title = "I28", "a position appears twice"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "unique"

    def select(self, scores: Array, topk: int) -> Array:
        """The best in the place of the last."""
        best = super().select(scores, topk)
        return np.append(best[:-1], best[:1])


class OrderOfScores(LightningIndex):
    """Positions come in order of score, where ascending ones are asked for."""

    code, title, stands_for = "I74", "positions in order of score", "aiter#4415"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "order"

    def order(self, chosen: Array) -> Array:
        """As selected."""
        return chosen


class ScoresNotReordered(LightningIndex):
    """Positions are sorted and their scores are left in the order of selection."""

    code, title = "I75", "returned scores in another order than positions"
    killed_by, rule = "index-e4m3-f32-f32-decode-scores", "score"

    def row(self, call: Call, request: int, row: int) -> tuple[Array, Array]:
        """Scores descending."""
        indices, scores = super().row(call, request, row)
        return indices, -np.sort(-scores)


class ScoresTailNotWritten(LightningIndex):
    """The scores behind a short row's are left as they were."""

    code, title = "I76", "tail of the scores not written"
    killed_by, rule = "index-e4m3-f32-f32-decode-scores", "tail"

    def row(self, call: Call, request: int, row: int) -> tuple[Array, Array]:
        """NaN, which is what the buffer held."""
        indices, scores = super().row(call, request, row)
        return indices, np.where(indices < 0, np.float32(np.nan), scores)


class RowsSwapped(LightningIndex):
    """Neighbouring rows of a request change places."""

    code, title = "I33", "rows swapped"
    killed_by, rule = "index-e4m3-f32-f32-prefill-not-causal", "certificate"

    def row(self, call: Call, request: int, row: int) -> tuple[Array, Array]:
        """The other one of each pair."""
        mine = self.rows_of(call, request)
        other = mine.start + ((row - mine.start) ^ 1)
        return super().row(call, request, other if other in mine else row)


class DraftRowStale(LightningIndex):
    """In decode every row of a request gets the first one's selection."""

    code, title = "I34", "draft rows repeat the first row's result"
    killed_by, rule = "index-e4m3-f32-f32-decode-paged64", "certificate"

    def row(self, call: Call, request: int, row: int) -> tuple[Array, Array]:
        """The first row's where rows are few."""
        mine = self.rows_of(call, request)
        return super().row(call, request, mine.start if len(mine) <= DECODE_ROWS else row)


class LastRowsDropped(LightningIndex):
    """Rows behind the last full tile of 16 are not computed."""

    code, title, stands_for = "I77", "last tile of rows dropped", "aiter#4244"
    killed_by, rule = "index-e4m3-f32-f32-prefill-range", "visible"

    def row(self, call: Call, request: int, row: int) -> tuple[Array, Array]:
        """Empty there, where there is more than one tile."""
        mine, topk = self.rows_of(call, request), int(call.options["topk"])
        if len(mine) > ROW_TILE and row - mine.start >= len(mine) // ROW_TILE * ROW_TILE:
            return np.full(topk, -1), np.full(topk, -np.inf)
        return super().row(call, request, row)


class PaddingRowsComputed(LightningIndex):
    """Rows behind the last request get the last request's last result."""

    code, title = "I78", "padding rows hold a selection"
    killed_by, rule = "index-e4m3-f32-f32-decode-lengths", "tail"

    def run(self, call: Call) -> dict[str, Array]:
        """The last row's in each of them."""
        found, end = super().run(call), int(call.batch["cu_seqlens_q"][-1])
        for array in found.values():
            array[end:] = array[end - 1]
        return found


FAULTS: tuple[type[LightningIndex], ...] = (
    PadsAreZero,
    TailNotWritten,
    LastRepeated,
    OneTwice,
    OrderOfScores,
    ScoresNotReordered,
    ScoresTailNotWritten,
    RowsSwapped,
    DraftRowStale,
    LastRowsDropped,
    PaddingRowsComputed,
)
