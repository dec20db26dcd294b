"""What a failure looks like: the failing rows are told again under each named mistake, and the one that they all fit is said.

It only adds words to a reason. It sees no backend and changes no verdict, and where two mistakes fit it holds its tongue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance.cases.call import Outputs
from dsa_portable.conformance.judging import bounds
from dsa_portable.conformance.judging.attend_mistakes import ATTEND, Told, tell
from dsa_portable.conformance.judging.lightning_index import IndexReference
from dsa_portable.conformance.judging.mistake import HONEST, Mistake, Row
from dsa_portable.conformance.judging.rules import Verdict
from dsa_portable.conformance.judging.sparse_attend import AttendReference

Array: TypeAlias = np.ndarray[Any, Any]
# Rows and heads that are told again: of a case's many they are enough to tell mistakes apart, and few enough to be cheap.
FAILING, PASSING, HEADS = 8, 4, 3


def explain(reference: IndexReference | AttendReference, outputs: Outputs, verdict: Verdict) -> str:
    """ "; looks like: ..." of a call that failed, or nothing."""
    words = words_of(matching(reference, outputs, verdict)) if verdict.status == "FAIL" else ""
    return f"; looks like: {words}" if words else ""


def words_of(mistakes: Sequence[Mistake]) -> str:
    """The one mistake, or what all have in common, or nothing."""
    for words in ({mistake.words for mistake in mistakes}, {mistake.group for mistake in mistakes}):
        if len(words) == 1:
            return words.pop()
    return ""


def matching(reference: IndexReference | AttendReference, outputs: Outputs, verdict: Verdict) -> list[Mistake]:
    """The mistakes that fit every failing row that is tried, and do not contradict a passing one."""
    if isinstance(reference, IndexReference):
        return []
    with np.errstate(all="ignore"):
        suspects = AttendSuspects(reference, outputs)
        failing = _spread(sorted(verdict.rows), FAILING)
        passing = _spread([row for row in suspects.owners if row not in verdict.rows], PASSING)
        # A row that an honest kernel could return, as far as is looked at here, is no evidence.
        evidence = [row for row in failing if not suspects.fits(HONEST, row)]
        if not evidence:
            return []
        return [mistake for mistake in suspects.table if all(suspects.fits(mistake, row) for row in (*evidence, *passing))]


def _spread(rows: Sequence[int], most: int) -> list[int]:
    """So many of the rows, the first and the last among them."""
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int))] if rows else []


@dataclass(frozen=True)
class Bounded:
    """What is told, how far out and lse may lie from it, and the floor of the RMS error."""

    told: Told
    out: Array
    lse: Array
    floor: Array


class AttendSuspects:
    """The mistakes of attention against what one call returned."""

    table = ATTEND

    def __init__(self, reference: AttendReference, outputs: Outputs) -> None:
        self.reference, self.outputs, self.owners = reference, outputs, reference.owners
        self.heads = cache(self._heads)
        self.told_again = cache(self._row)
        self.honest = cache(lambda row: self._bounded(self._told(row, HONEST)))

    def fits(self, mistake: Mistake, row: int) -> bool:
        """Whether the row is what a kernel with this mistake may return under the declared profile."""
        if row not in self.owners and mistake.stage != "padding":
            return mistake is HONEST and not self.outputs["out"][row].any()
        heads = self.heads(row)
        got = self.outputs["out"][row][heads].astype(np.float64)
        honest = self.honest(row)
        if mistake.stage == "results":
            told = mistake.change(self.told_again(row), honest.told)
            # Numbers that the mistake makes larger are rounded on their own scale.
            allowed = honest.out * max(1.0, _size(told.out) / max(_size(honest.told.out), 1e-300))
            allowed_lse = honest.lse * max(1.0, _size(told.lse) / max(_size(honest.told.lse), 1e-300))
            floor = honest.floor
        else:
            told = honest.told if mistake is HONEST else self._told(row, mistake)
            if not _near(got, told.out):
                return False
            bounded = honest if mistake is HONEST else self._bounded(told)
            allowed, allowed_lse, floor = bounded.out, bounded.lse, bounded.floor
        if not _within(got, told.out, allowed):
            return False
        if "lse" in self.outputs:
            numbers = ~(np.isnan(told.out).any(axis=1) & np.isnan(got).any(axis=1))  # beside NaN, lse may be anything
            if not _within(
                self.outputs["lse"][row][heads].astype(np.float64)[numbers], told.lse[numbers], allowed_lse[numbers]
            ):
                return False
        if told.operands is None:
            return True
        error = np.linalg.norm(np.nan_to_num(got - told.out), axis=1)
        limit = bounds.KAPPA * np.maximum(floor, self._yardstick(row, told))
        return bool((error <= np.where(np.isnan(limit), np.inf, limit)).all())

    def _row(self, row: int) -> Row:
        return Row(self.reference.call, row, self.owners.get(row, len(self.reference.call.batch["seqlens_k"]) - 1))

    def _told(self, row: int, mistake: Mistake) -> Told:
        return tell(self.told_again(row), mistake, self.reference.profile, self.heads(row))

    def _bounded(self, told: Told) -> Bounded:
        profile, dtype = self.reference.profile, self.reference.dtype
        if told.operands is None:
            lses = np.where(np.isfinite(told.lse), abs(told.lse), 0)
            return Bounded(told, np.zeros_like(told.out), 1e-6 * lses, np.zeros(len(told.out)))
        bound = bounds.attention_bound(profile, told.operands, dtype)
        return Bounded(told, bound.out, bound.lse, bounds.error_floor(profile, told.operands, dtype))

    def _heads(self, row: int) -> Array:
        """Heads that are looked at: the worst ones, and some others."""
        some, facts = _spread(range(self.outputs["out"].shape[1]), HEADS), self.reference.row(row)
        if facts is None:
            return np.array(some)
        error = np.nan_to_num(abs(self.outputs["out"][row].astype(np.float64) - facts.out) / facts.bound.out, nan=1e30).max(
            axis=1
        )
        if "lse" in self.outputs:
            error = np.maximum(error, np.nan_to_num(abs(self.outputs["lse"][row] - facts.lse) / facts.bound.lse, nan=1e30))
        norm = np.linalg.norm(np.nan_to_num(self.outputs["out"][row].astype(np.float64) - facts.out), axis=1)
        worst = (int(np.argmax(error)), int(np.argmax(norm / np.maximum(facts.error_floor, 1e-300))))
        return np.unique([*worst, *some])

    def _yardstick(self, row: int, told: Told) -> Array:
        """The error that the emulator has in this row, in proportion to what is expected now."""
        facts = self.reference.row(row)
        if facts is None:
            return np.zeros(len(told.out))
        heads = told.heads
        error, size, now = (
            np.linalg.norm(x, axis=1)
            for x in ((facts.emulated_out - facts.out)[heads], facts.out[heads], np.nan_to_num(told.out))
        )
        return np.asarray(np.divide(error * now, size, out=np.zeros_like(error), where=size > 0))


def _size(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(abs(finite).max(initial=0))


def _near(got: Array, expected: Array) -> bool:
    """A glance that spares the bounds of what is far off."""
    if not np.array_equal(np.isnan(got), np.isnan(expected)):
        return False
    got, expected = np.nan_to_num(got), np.nan_to_num(expected)
    return bool(np.linalg.norm(got - expected) <= 0.25 * np.linalg.norm(expected))


def _within(got: Array, expected: Array, allowed: Array) -> bool:
    """NaN agrees with NaN, infinity with itself."""
    return bool(((abs(got - expected) <= allowed) | (got == expected) | (np.isnan(got) & np.isnan(expected))).all())
