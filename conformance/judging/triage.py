"""What a failure looks like: the failing rows are told again under each named mistake, and the one that they all fit is said.

It only adds words to a reason. It sees no backend and changes no verdict, and where two mistakes fit it holds its tongue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance.cases.call import Outputs
from dsa_portable.conformance.judging import bounds
from dsa_portable.conformance.judging.attend_mistakes import ATTEND, Told, counted, tell
from dsa_portable.conformance.judging.index_mistakes import INDEX, Chosen, Scored, choose, nothing
from dsa_portable.conformance.judging.lightning_index import IndexReference
from dsa_portable.conformance.judging.mistake import HONEST, Mistake, Row
from dsa_portable.conformance.judging.rules import Verdict
from dsa_portable.conformance.judging.sparse_attend import AttendReference
from dsa_portable.profile import UNIT_ROUNDOFF

Array: TypeAlias = np.ndarray[Any, Any]
# Rows and heads that are told again: of a case's many they are enough to tell mistakes apart, and few enough to be cheap.
FAILING, PASSING, HEADS = 8, 4, 3
# Keys of an index row that is told again: all heads' products of one row are in memory at once.
LONGEST = 1 << 17


def explain(reference: IndexReference | AttendReference, outputs: Outputs, verdict: Verdict) -> str:
    """ "; looks like: ..." of a call that failed, or nothing."""
    # Of an operator's part there is no table: its inputs or its results are others.
    if verdict.status != "FAIL" or reference.call.operator not in ("lightning_index", "sparse_attend"):
        return ""
    if words := words_of(matching(reference, outputs, verdict)):
        return f"; looks like: {words}"
    if isinstance(reference, AttendReference) and verdict.rule in ("bound", "rms", "exact"):
        with np.errstate(all="ignore"):
            return AttendSuspects(reference, outputs).one_entry(int(verdict.arrays["row"]))
    return ""


def words_of(mistakes: Sequence[Mistake]) -> str:
    """The one mistake, or what all have in common, or nothing."""
    if not mistakes:
        return ""
    first, *others = ([mistake.words, *mistake.groups] for mistake in mistakes)
    return next((words for words in first if all(words in other for other in others)), "")


def matching(reference: IndexReference | AttendReference, outputs: Outputs, verdict: Verdict) -> list[Mistake]:
    """The mistakes that fit every failing row that is tried, and do not contradict a passing one."""
    with np.errstate(all="ignore"):
        suspects: IndexSuspects | AttendSuspects
        if isinstance(reference, IndexReference):
            if int(reference.call.batch["seqlens_k"].max(initial=0)) > LONGEST:
                return []
            suspects = IndexSuspects(reference, outputs, strict=verdict.rule == "ties")
        else:
            suspects = AttendSuspects(reference, outputs)
        failing = _spread(sorted(verdict.rows), FAILING)
        # Where keys tie, a row may be right by luck.
        passing = (
            [] if verdict.rule == "ties" else _spread([row for row in suspects.owners if row not in verdict.rows], PASSING)
        )
        found, evidence, numbers = list(suspects.table), list[int](), False
        for row in failing:
            # A row that an honest kernel could return, as far as is looked at here, is no evidence.
            if found and not suspects.fits(HONEST, row):
                evidence.append(row)
                numbers = numbers or suspects.has_numbers(row)
                found = [mistake for mistake in found if suspects.fits(mistake, row)]
        if not evidence:
            return []
        for row in passing:
            found = [mistake for mistake in found if suspects.fits(mistake, row)]
        if not found and isinstance(suspects, AttendSuspects) and (fitted := suspects.fitted_scale(evidence[0])):
            found = [fitted] if all(suspects.fits(fitted, row) for row in (*failing, *passing)) else []
        if not numbers:
            # Whatever reads a NaN returns the same: of wrong addresses, say that they are.
            found = [replace(mistake, words=mistake.groups[0]) if mistake.groups else mistake for mistake in found]
        return found


def _spread(rows: Sequence[int], most: int) -> list[int]:
    """So many of them, the first and the last among them."""
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
        self.heads = cache(self._heads)  # of the rest, only the row at hand is kept: it is large
        self.told_again = lru_cache(maxsize=1)(self._row)
        self.honest = lru_cache(maxsize=1)(lambda row: self._bounded(self._told(row, HONEST)))

    def fits(self, mistake: Mistake, row: int) -> bool:
        """Whether the row is what a kernel with this mistake may return under the declared profile."""
        if row not in self.owners and mistake.stage != "padding":
            return mistake is HONEST and not self.outputs["out"][row].any()
        heads = self.heads(row)
        got = self.outputs["out"][row][heads].astype(np.float64)
        honest = self.honest(row)
        if mistake.stage == "results":
            told = mistake.change(self.told_again(row), honest.told)
            # Numbers that the mistake makes larger, or others, are rounded on their own scale.
            rounding = UNIT_ROUNDOFF[self.reference.dtype]
            allowed = honest.out * max(1.0, _size(told.out) / max(_size(honest.told.out), 1e-300))
            allowed = allowed + rounding * np.nan_to_num(abs(told.out - honest.told.out))
            allowed_lse = honest.lse * max(1.0, _size(told.lse) / max(_size(honest.told.lse), 1e-300))
            allowed_lse = np.nan_to_num(allowed_lse) + 2.0**-20 * np.nan_to_num(abs(told.lse - honest.told.lse), posinf=1e4)
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

    def has_numbers(self, row: int) -> bool:
        """Whether the row says more than that something was NaN."""
        return not bool(np.isnan(self.outputs["out"][row][self.heads(row)].astype(np.float64)).all())

    def fitted_scale(self, row: int) -> Mistake | None:
        """The softmax_scale that would explain the row's out best, as a mistake, if there is one."""
        passed = float(self.reference.call.options["softmax_scale"])
        got, scale = self.outputs["out"][row][self.heads(row)].astype(np.float64), passed
        for _ in range(8):
            out, other = (self._told(row, _scale(s)).out for s in (scale, scale * 1.001))
            slope = (other - out) / 0.001
            step = float(((got - out) * slope).sum() / (slope * slope).sum())
            if not np.isfinite(step):
                return None
            scale *= float(np.exp(np.clip(step, -1, 1)))
        return _scale(scale, f"softmax_scale is {scale:.4g}, where {passed:.4g} is passed")

    def one_entry(self, row: int) -> str:
        """ "; as if ..." where one entry more or less makes the difference."""
        honest, heads = self.honest(row), self.heads(row)
        if honest.told.operands is None:
            return ""
        got = self.outputs["out"][row][heads].astype(np.float64)
        p, values, out = honest.told.operands.p, honest.told.operands.values, honest.told.out
        first = int(np.argmax(np.linalg.norm(got - out, axis=1)))
        for sign, what in ((-1, "left out"), (1, "counted twice")):
            # [n, value_dim] of one head, of every entry; then the other heads of those that fit.
            moved = (out[first] + sign * p[first][:, None] * values) / (1 + sign * p[first])[:, None]
            fits = np.flatnonzero((abs(got[first] - moved) <= honest.out[first]).all(axis=1))
            found = {}
            for j in fits[:8]:
                all_heads = (out + sign * p[:, j : j + 1] * values[j]) / (1 + sign * p[:, j : j + 1])
                error = np.linalg.norm(got - all_heads, axis=1)
                if _within(got, all_heads, honest.out) and (error <= bounds.KAPPA * self._floor(row, honest)).all():
                    entry = int(np.flatnonzero(counted(self.told_again(row)))[j])
                    found[int(self.reference.call.arrays["indices"][row][entry])] = entry
            if len(found) == 1:
                position, entry = found.popitem()
                return f"; as if entry {entry} (position {position}) of row {row} were {what}"
        return ""

    def _floor(self, row: int, bounded: Bounded) -> Array:
        return np.maximum(bounded.floor, self._yardstick(row, bounded.told))

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
        got = self.reference.judged(self.outputs["out"][row], facts)
        error = np.nan_to_num(abs(got - facts.out) / facts.bound.out, nan=1e30).max(axis=1)
        if "lse" in self.outputs:
            error = np.maximum(error, np.nan_to_num(abs(self.outputs["lse"][row] - facts.lse) / facts.bound.lse, nan=1e30))
        norm = np.linalg.norm(np.nan_to_num(got - facts.out), axis=1)
        worst = (int(np.argmax(error)), int(np.argmax(norm / np.maximum(facts.error_floor, 1e-300))))
        heads = np.unique([*worst, *some])
        # Of a head whose sink is NaN nothing can be told.
        return np.asarray(heads[~self.reference.unspecified[heads]])

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


def _scale(scale: float, words: str = "") -> Mistake:
    return Mistake("scale fitted", words, "scale", lambda row, passed: scale)


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


class IndexSuspects:
    """The mistakes of the index against what one call returned; `strict`: equal scores are no excuse for another choice."""

    table = INDEX

    def __init__(self, reference: IndexReference, outputs: Outputs, strict: bool) -> None:
        self.reference, self.outputs, self.strict = reference, outputs, strict
        self.owners = reference.requests
        self.told_again = lru_cache(maxsize=1)(
            lambda row: Row(reference.call, row, self.owners.get(row, len(reference.call.batch["seqlens_k"]) - 1))
        )
        self.honest = lru_cache(maxsize=1)(lambda row: self._chosen(row, HONEST))

    @staticmethod
    def has_numbers(row: int) -> bool:
        """Positions always say something."""
        return True

    def _chosen(self, row: int, mistake: Mistake) -> Chosen:
        return choose(self.told_again(row), mistake, self.reference.profile, self.reference.exact)

    def fits(self, mistake: Mistake, row: int) -> bool:
        """Whether the row is what a kernel with this mistake may return under the declared profile."""
        got = self.outputs["indices"][row].astype(np.int64)
        if mistake.stage == "padding":
            # Whichever row it is computed as.
            return bool((got >= 0).any()) if row not in self.owners else self.fits(HONEST, row)
        if row not in self.owners:
            chosen = nothing(self.told_again(row), mistake)
        else:
            chosen = self.honest(row) if mistake.stage in ("", "returned") else self._chosen(row, mistake)
        expected = chosen.indices
        if mistake.stage == "returned":
            expected = mistake.change(self.told_again(row), (chosen, got))
        if not self._agree(got, expected, chosen.scored, self.strict or mistake.stage == "chosen"):
            return False
        if "scores" not in self.outputs:
            return True
        scored, of, scores = chosen.scored, chosen.of, chosen.scores
        if mistake.stage == "returned":  # the scores are those of what stands there
            places = got - scored.start
            of = np.where((places >= 0) & (places < len(scored.scores)), places, -1)
            scores = np.append(scored.scores, -np.inf)[of]
        allowed = np.append(scored.bound, 0.0)[of]
        same = (got == expected) & ((of >= 0) | (mistake.stage != "returned"))
        return _within(self.outputs["scores"][row].astype(np.float64)[same], scores[same], allowed[same])

    @staticmethod
    def _agree(got: Array, expected: Array, scored: Scored, strict: bool) -> bool:
        """The same row, or one that exchanges keys whose scores lie within their bounds of the threshold."""
        if np.array_equal(got, expected):
            return True
        ours, theirs = np.setdiff1d(expected, got), np.setdiff1d(got, expected)
        differ = np.concatenate([ours, theirs]) - scored.start
        few = len(theirs) <= max(4, len(got) // 20)
        if (
            strict
            or not few
            or len(ours) != len(theirs)
            or not len(differ)
            or differ.min() < 0
            or differ.max() >= len(scored.ranked)
        ):
            return False
        if not np.array_equal(got < 0, expected < 0) or len(np.unique(got)) != len(np.unique(expected)):
            return False
        if not np.array_equal(np.sort(got), got) and np.array_equal(np.sort(expected), expected):
            return False
        kept = expected[expected >= scored.start] - scored.start
        threshold = scored.ranked[kept].min(initial=np.inf)
        return bool((abs(scored.ranked[differ] - threshold) <= 2 * scored.bound[differ]).all())
