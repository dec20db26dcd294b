"""Judging lightning_index and its parts: structure of every row, certificate of selective rows, population, scores.

The parts are judged by the same rules: index_select by scores that are given, so that nothing rounds, index_scores by every
score that a row sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance.cases.call import Call, Outputs
from dsa_portable.conformance.cases.catalogue import Case
from dsa_portable.conformance.judging import bounds, emulator, oracle
from dsa_portable.conformance.judging.accumulator import rounded
from dsa_portable.conformance.judging.rules import Verdict
from dsa_portable.profile import WIDE, Profile

Array: TypeAlias = np.ndarray[Any, Any]
Float64: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
# Rows, first position, and for each of `_sums` [rows, n].
Truth: TypeAlias = tuple[slice, int, list[Float64]]


@dataclass(frozen=True)
class IndexFacts:
    """One row's visible positions, start on: true scores, their bounds (judging 3.1), and what the emulator makes of them."""

    start: int
    scores: Float64
    bound: Float64
    emulated: tuple[Float64, ...]  # in one order of summation, or in several
    best: Array  # the topk of the true scores, where the row sees more; else empty
    exchanged_emulated: int


class IndexReference:
    """Everything about a call that does not depend on what a backend returned; made once, it judges any number of results."""

    def __init__(self, case: Case, call: Call, profile: Profile, truth: dict[bool, list[Truth]] | None = None) -> None:
        self.call, self.profile, self.exact = call, profile, case.exact
        self.truth = truth  # of one call that is judged by several profiles, by what they ask of it; None: not worth the memory
        self.selects = "topk" in call.options
        self.topk: int = call.options.get("topk", 0)
        spans = list(oracle.rows(call))
        self.spans = {row: (start, end) for row, _, start, end in spans}
        self.requests = {row: request for row, request, _, _ in spans}
        self.outside_range = self._outside_range()
        self.spoilt = 0  # rows that see a NaN or infinity: well-formed or not, and no more is asked of them
        self.rows = {} if self.outside_range else dict(self._rows())

    def selective(self) -> int | None:
        """Rows that see more than topk keys; None where nothing is selected."""
        return sum(end - start > self.topk for start, end in self.spans.values()) if self.selects else None

    def _rows(self) -> Iterator[tuple[int, IndexFacts]]:
        if "scores" in self.call.arrays:
            yield from self._given()
            return
        # Where every product is cut, another order errs by another amount: an honest kernel may have any.
        orders = emulator.orders(self.call.arrays["q"].shape[2])[: 3 if self.profile.accumulator.bits < 24 else 1]
        emulated = [emulator.index_scores(self.call, self.profile, order) for order in orders]
        for block, low, (scores, weighted, products) in self._truth():
            for i, row in enumerate(range(block.start, block.stop)):
                start, end = self.spans[row]
                seen = slice(start - low, end - low)
                if start == end:
                    continue
                if np.isfinite(scores[i, seen]).all():
                    bound = self._bound(row, scores[i, seen], weighted[i, seen], products[i, seen])
                    yield row, self._facts(row, scores[i, seen], bound, *(scores[row] for scores in emulated))
                else:
                    self.spoilt += 1

    def _truth(self) -> Iterable[Truth]:
        if self.truth is None:
            return oracle.index_sums(self.call, self._sums)
        aligned = self.profile.accumulator.group > 1  # all that `_sums` asks of the profile
        if aligned not in self.truth:
            self.truth[aligned] = list(oracle.index_sums(self.call, self._sums))
        return self.truth[aligned]

    def _given(self) -> Iterator[tuple[int, IndexFacts]]:
        """Scores that are inputs: all that can be lost of one is what the profile does not compare."""
        for row, (start, end) in self.spans.items():
            scores = self.call.arrays["scores"][row, start:end].astype(np.float64)
            if not np.isfinite(scores).all():
                self.spoilt += 1
            elif start < end:
                bound = bounds.score_bound(self.profile, scores, scores, scores, heads=0, dim=0, dots_exact=True, exact=True)
                yield row, self._facts(row, scores, bound, rounded(scores, self.profile.logit))

    def _sums(self, q: Float64, k: Float64, weights: Float64) -> list[Float64]:
        """The scores, the same of |weights|, and those of all magnitudes: the bounds need them all (judging 3.1)."""
        accumulator, dtype = self.profile.accumulator, self.call.arrays["q"].dtype.name
        q_size, k_size = (bounds.magnitude(operand, accumulator, dtype) for operand in (q, k))
        # The ReLU leaves sums of magnitudes as they are, so the heads can be summed before the product with the keys.
        products = np.matmul(abs(weights)[:, None, :], q_size)[:, 0, :] @ k_size.T
        return [*oracle.head_sums(q, k, weights, abs(weights)), products]

    def _bound(self, row: int, scores: Float64, weighted: Float64, products: Float64) -> Float64:
        _, heads, dim = self.call.arrays["q"].shape
        return bounds.score_bound(
            self.profile,
            scores,
            weighted,
            products,
            heads=heads,
            dim=dim,
            dots_exact=self.call.arrays["q"].dtype == np.int8 and self.profile.accumulator.bits >= 24,
            exact=self.exact,
            **self._roundings(row, self.spans[row][0], len(scores)),
        )

    def _facts(self, row: int, scores: Float64, bound: Float64, *emulated: Array) -> IndexFacts:
        orders = tuple(own.astype(np.float64) for own in emulated)
        best, exchanged = np.empty(0, np.int64), 0
        if self.selects and len(scores) > self.topk:
            best = np.argsort(-scores, kind="stable")[: self.topk]
            sets = [np.argsort(-own, kind="stable")[: self.topk] for own in orders]
            if self.profile.logit not in WIDE and self.profile.ties == "any":  # many are equal: the highest may be kept as well
                sets += [np.argsort(own, kind="stable")[::-1][: self.topk] for own in orders]
            exchanged = max(exchanged_keys(scores, best, chosen) for chosen in sets)
        return IndexFacts(self.spans[row][0], scores.copy(), bound, orders, best, exchanged)

    def _roundings(self, row: int, start: int, count: int) -> dict[str, Any]:
        """What rounding does to this row's operands and scales; where the profile has none, keys are not read anew."""
        call, profile = self.call, self.profile
        formats = {profile.qk_compute, profile.scale_compute, profile.intermediate, profile.accumulator.product}
        if formats <= WIDE and profile.subnormals == "kept":
            return {}
        q, weights = (call.arrays[name][row].astype(np.float64) for name in ("q", "weights"))
        codes, scale = oracle.index_keys(call, self.requests[row], np.arange(start, start + count))
        kept = emulator.held(scale, profile.scale_compute, profile)
        operands = [q] if profile.qk_compute in WIDE else [q, codes * kept[:, None]]
        units = [bounds.unit_of(x, rounded(x, profile.qk_compute), profile.qk_compute) for x in operands]
        return {
            "operand_unit": float(np.prod([1 + unit for unit in units])) - 1,
            "scale_unit": bounds.scale_unit(scale, kept, profile.scale_compute),
            "lost": bounds.index_lost(profile, len(q), q.shape[1], scale * np.maximum(1, abs(weights)).sum()),
        }

    def _outside_range(self) -> str:
        if self.profile.finite_max > 1e30 or "q" not in self.call.arrays:
            return ""
        largest = 0.0
        for row, request, start, end in oracle.rows(self.call):
            keys, _ = oracle.index_keys(self.call, request, np.arange(start, end))
            dots = self.call.arrays["q"][row].astype(np.float64) @ keys.T
            largest = max(largest, float(abs(dots[np.isfinite(dots)]).max(initial=0)))
        largest *= 2.0**self.profile.intermediate_exponent
        return (
            f"a dot product kept as {largest:.4g} leaves the declared finite range" if largest > self.profile.finite_max else ""
        )


def exchanged_keys(scores: Float64, best: Array, chosen: Array) -> int:
    """Keys of `best` that `chosen` lacks, or has in excess; keys whose true score equals the k-th are interchangeable."""
    missed, kept = np.setdiff1d(best, chosen), chosen
    threshold = scores[best[-1]]
    return max(int((scores[missed] > threshold).sum()), int((scores[kept] < threshold).sum()))


class IndexJudge:
    """One call's outputs against its reference: of lightning_index, or of index_select."""

    def __init__(self, reference: IndexReference, outputs: Outputs, verdict: Verdict) -> None:
        self.reference, self.verdict = reference, verdict
        self.outputs, self.scores = outputs, outputs.get("scores")
        self.exchanged = self.exchanged_emulated = 0
        self.square_error = self.square_error_emulated = self.square_score = 0.0
        self.compared, self.recall = 0, 1.0

    def run(self) -> None:
        """Judge all rows, structure first: a row that is malformed is not compared."""
        reference, verdict = self.reference, self.verdict
        verdict.selective_rows = reference.selective()
        if verdict.selective_rows is not None:
            verdict.vacuous_rows = len(reference.spans) - verdict.selective_rows
        wellformed = [self._structure(row) for row in range(reference.call.request.dims["Tq"])]
        if reference.outside_range:
            verdict.status, verdict.rule, verdict.reason = "UNSUPPORTED", None, reference.outside_range
            return
        if reference.spoilt:
            verdict.metrics["spoilt_rows"] = reference.spoilt
        for row, facts in reference.rows.items():
            if wellformed[row]:
                self.verdict.row = row
                self._row(row, facts)
        self.verdict.row = None
        self._population()

    def _seen(self, row: int) -> tuple[int, int, str]:
        """(start, end, which row that is in words)."""
        start, end = self.reference.spans.get(row, (0, 0))
        kind = "padding row" if row not in self.reference.spans else f"row sees positions [{start}, {end})"
        return start, end, f"row {row} ({kind}): "

    def _structure(self, row: int) -> bool:
        self.verdict.row = row
        start, end, place = self._seen(row)
        kept, indices = min(self.reference.topk, end - start), self.outputs["indices"][row]
        chosen, tail = indices[:kept], indices[kept:]
        wrong = np.flatnonzero((chosen < start) | (chosen >= end))
        if len(wrong):
            self.verdict.fail("visible", f"{place}entry {wrong[0]} is {chosen[wrong[0]]}, expected {kept} visible positions")
        elif len(np.unique(chosen)) < kept:
            self.verdict.fail("unique", f"{place}{kept - len(np.unique(chosen))} of {kept} entries repeat another")
        elif (tail != -1).any():
            at = int(np.argmax(tail != -1))
            self.verdict.fail("tail", f"{place}entry {kept + at} is {tail[at]}, expected -1 behind {kept} entries")
        elif self.reference.call.options.get("sorted", True) and (np.diff(chosen) < 0).any():
            at = int(np.argmax(np.diff(chosen) < 0)) + 1
            self.verdict.fail("order", f"{place}positions do not ascend at entry {at}")
        elif self.scores is not None and not (self.scores[row, kept:] == -np.inf).all():
            self.verdict.fail("tail", f"{place}scores behind {kept} entries are not -inf")
        else:
            return True
        return False

    def _row(self, row: int, facts: IndexFacts) -> None:
        topk = self.reference.topk
        chosen = self.outputs["indices"][row, : min(topk, len(facts.scores))].astype(np.int64) - facts.start
        if len(facts.scores) > topk:
            self._certificate(row, facts, chosen)
        if self.scores is not None:
            self._returned(row, facts, chosen, self.scores[row, : len(chosen)])

    def _certificate(self, row: int, facts: IndexFacts, chosen: Array) -> None:
        scores, topk = facts.scores, self.reference.topk
        v = bounds.margin(scores, facts.bound, chosen)
        assert v is not None
        self.verdict.worst("v", v)
        exchanged = exchanged_keys(scores, facts.best, chosen)
        self.exchanged += exchanged
        self.exchanged_emulated += facts.exchanged_emulated
        self.recall = min(self.recall, 1 - exchanged / topk)
        self.verdict.metrics["recall"] = self.recall
        if v > 1:
            missed = np.setdiff1d(facts.best, chosen)
            lost = missed[np.argmax(scores[missed])] if len(missed) else facts.best[0]
            rank = int((scores > scores[lost]).sum()) + 1
            self.verdict.fail(
                "certificate",
                f"row {row}: the set is no top {topk}: position {lost + facts.start} (rank {rank}, score {scores[lost]:.9g}) "
                f"was left out for one of score {scores[chosen].min():.9g}; margin v = {v:.3g}, allowed 1; {exchanged} keys "
                "exchanged",
                row=row,
                first_position=facts.start,
                true_scores=scores,
                bound=facts.bound,
            )
        self._tie_rule(row, facts, chosen)

    def _tie_rule(self, row: int, facts: IndexFacts, chosen: Array) -> None:
        """Where every legal rounding ties the same keys, a declared `lowest` names the one right set."""
        profile = self.reference.profile
        unrounded = profile.logit in ("float32", "float64") or not facts.scores.any()
        if profile.ties != "lowest" or not self.reference.exact or not unrounded:
            return
        if not np.array_equal(np.sort(chosen), np.sort(facts.best)):
            kept, lost = np.setdiff1d(chosen, facts.best), np.setdiff1d(facts.best, chosen)
            self.verdict.fail(
                "ties",
                f"row {row}: of equal scores position {kept[-1] + facts.start} was kept and {lost[0] + facts.start} was not, "
                "where the profile declares ties to the lowest",
                row=row,
                first_position=facts.start,
                true_scores=facts.scores,
            )

    def _returned(self, row: int, facts: IndexFacts, chosen: Array, returned: Array) -> None:
        scores, got = facts.scores[chosen], returned.astype(np.float64)
        error, allowed = abs(got - scores), facts.bound[chosen]
        # A NaN must count as an error: nothing compares greater than it.
        bad = ~(error <= allowed)
        ratio = np.divide(error, allowed, out=np.where(bad, np.inf, 0.0), where=allowed > 0)
        self.verdict.worst("score_error_over_bound", np.nan_to_num(ratio, nan=np.inf).max(initial=0))
        if bad.any():
            at = int(np.argmax(bad))
            self.verdict.fail(
                "score",
                f"row {row}, position {chosen[at] + facts.start}: score is {got[at]:.9g}, expected {scores[at]:.9g} "
                f"within {allowed[at]:.3g}",
                row=row,
                first_position=facts.start,
                true_scores=facts.scores,
                bound=facts.bound,
            )
        self.square_error += float((error**2).sum())
        self.square_score += float((scores**2).sum())
        self.square_error_emulated += max(float(((own[chosen] - scores) ** 2).sum()) for own in facts.emulated)
        self.compared += len(chosen)

    def _population(self) -> None:
        metrics, verdict = self.verdict.metrics, self.verdict
        if verdict.selective_rows:
            limit = bounds.exchanged_limit(self.exchanged_emulated)
            metrics |= {"exchanged": self.exchanged, "exchanged_emulated": self.exchanged_emulated}
            metrics["exchanged_limit"] = limit
            if self.exchanged > limit:
                verdict.fail(
                    "population",
                    f"{self.exchanged} keys exchanged over {verdict.selective_rows} selective rows, where an honest kernel of "
                    f"this profile exchanges {self.exchanged_emulated} and {limit:.1f} are allowed",
                )
        if self.compared:
            error, own, typical = (
                (total / self.compared) ** 0.5 for total in (self.square_error, self.square_error_emulated, self.square_score)
            )
            allowed = bounds.score_error_limit(own, self.reference.profile, typical)
            metrics |= {"score_rms": typical, "score_rms_error": error, "score_rms_emulated": own, "score_rms_limit": allowed}
            if not error <= allowed:
                verdict.fail(
                    "score rms",
                    f"RMS error of returned scores is {error:.4g}, where the emulator has {own:.4g} and {allowed:.4g} is "
                    "allowed",
                )


class ScoresJudge(IndexJudge):
    """The same of index_scores: -inf where the row does not see, and every score where it does."""

    def _structure(self, row: int) -> bool:
        self.verdict.row = row
        start, end, place = self._seen(row)
        scores = self.outputs["scores"][row]
        wrong = scores != -np.inf
        wrong[start:end] = False
        if wrong.any():
            at = int(np.argmax(wrong))
            self.verdict.fail("tail", f"{place}the score of position {at} is {scores[at]:.9g}, expected -inf")
        return not wrong.any()

    def _row(self, row: int, facts: IndexFacts) -> None:
        every = np.arange(len(facts.scores))
        self._returned(row, facts, every, self.outputs["scores"][row, facts.start : facts.start + len(every)])
