"""From recorded outputs to a verdict. Whoever holds the outputs and a profile can judge; no backend is needed or touched.

A case fails with the first rule it breaks, and the reason says where: row and head, what was expected, got and allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance import criteria, emulator, oracle
from dsa_portable.conformance.cases.call import Call, Outputs, request_of
from dsa_portable.conformance.cases.catalogue import Case
from dsa_portable.profile import Profile

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass
class Verdict:
    """PASS, FAIL or UNSUPPORTED, why, and the figures that were measured on the way."""

    status: str = "PASS"
    reason: str = ""
    metrics: dict[str, float | int | str | None] = field(default_factory=dict)
    selective_rows: int | None = None
    vacuous_rows: int | None = None
    arrays: dict[str, Array] = field(default_factory=dict)

    def fail(self, reason: str, **arrays: Any) -> None:
        """Record a broken rule; the first one gives the reason, and the arrays (row, truth, bound) kept for the engineer."""
        if self.status != "FAIL":
            self.status, self.reason, self.arrays = "FAIL", reason, {name: np.asarray(a) for name, a in arrays.items()}

    def worst(self, name: str, value: float) -> None:
        """Keep the largest value seen of a metric."""
        previous = self.metrics.get(name)
        self.metrics[name] = value if not isinstance(previous, (int, float)) else max(previous, value)


def judge_case(case: Case, calls: Sequence[Call], outputs: Sequence[Outputs], profiles: Mapping[str, Profile]) -> Verdict:
    """Judge every call of a case by itself, then whether the calls agree; `profiles` has one for each operator."""
    verdict = Verdict()
    for i, (call, found) in enumerate(zip(calls, outputs, strict=True)):
        if any(call is earlier for earlier in calls[:i]):
            continue  # A rerun: judged once, and compared below.
        single = judge(case, call, found, profiles[call.operator])
        verdict.metrics = single.metrics | verdict.metrics
        for rows in ("selective_rows", "vacuous_rows"):
            if getattr(single, rows) is not None:
                setattr(verdict, rows, (getattr(verdict, rows) or 0) + getattr(single, rows))
        if single.status != "PASS" and verdict.status == "PASS":
            where = f"call {i} of {len(calls)}: " if len(calls) > 1 else ""
            verdict.status, verdict.reason, verdict.arrays = single.status, where + single.reason, single.arrays
    if verdict.status == "PASS" and (reason := case.disagreement(calls, outputs)):
        verdict.fail(reason)
    return verdict


def judge(case: Case, call: Call, outputs: Outputs, profile: Profile) -> Verdict:
    """Judge one call's outputs (`indices`, `scores`, `out`, `lse`: those the call returns)."""
    verdict = Verdict()
    if not _shapes(call, outputs, verdict):
        return verdict
    if call.operator == "lightning_index":
        _Index(case, call, outputs, profile, verdict).run()
    else:
        _Attend(case, call, outputs, profile, verdict).run()
    return verdict


def _shapes(call: Call, outputs: Outputs, verdict: Verdict) -> bool:
    for name, (dtype, shape) in request_of(call).results.items():
        if name not in outputs or outputs[name].dtype.name != dtype or outputs[name].shape != shape:
            got = f"{outputs[name].dtype} {list(outputs[name].shape)}" if name in outputs else "nothing"
            verdict.fail(f"{name} is {got}, expected {dtype} {list(shape)}")
            return False
    return True


class _Index:
    """lightning_index: structure of every row, certificate of selective rows, population over the case, returned scores."""

    def __init__(self, case: Case, call: Call, outputs: Mapping[str, Array], profile: Profile, verdict: Verdict) -> None:
        self.case, self.call, self.profile, self.verdict = case, call, profile, verdict
        self.indices, self.scores = outputs["indices"], outputs.get("scores")
        self.topk: int = call.options["topk"]
        self.spans = {row: (start, end) for row, _, start, end in oracle.rows(call)}
        self.requests = {row: request for row, request, _, _ in oracle.rows(call)}
        self.exchanged = self.exchanged_emulated = 0
        self.square_error = self.square_error_emulated = self.square_score = 0.0
        self.compared, self.recall = 0, 1.0

    def run(self) -> None:
        """Judge all rows, structure first: a row that is malformed is not compared."""
        verdict = self.verdict
        visible = [end - start for start, end in self.spans.values()]
        verdict.selective_rows = sum(n > self.topk for n in visible)
        verdict.vacuous_rows = len(visible) - verdict.selective_rows
        wellformed = [self._structure(row) for row in range(len(self.indices))]
        largest = self._largest_dot() * 2.0**self.profile.intermediate_exponent if self.profile.finite_max < 1e30 else 0.0
        if largest > self.profile.finite_max:
            verdict.status, verdict.reason = (
                "UNSUPPORTED",
                f"a dot product kept as {largest:.4g} leaves the declared finite range",
            )
            return
        emulated = emulator.index_scores(self.call, self.profile)
        kinds = (oracle.index_scores(self.call, f) for f in (_as_is, _weights_only, _all_magnitudes))
        for (block, low, scores), (_, _, weighted), (_, _, magnitude) in zip(*kinds, strict=True):
            for i, row in enumerate(range(block.start, block.stop)):
                start, end = self.spans[row]
                seen = slice(start - low, end - low)
                if wellformed[row] and end > start:
                    self._row(row, start, scores[i, seen], weighted[i, seen], magnitude[i, seen], emulated[row])
        self._population()

    def _structure(self, row: int) -> bool:
        start, end = self.spans.get(row, (0, 0))
        kept = min(self.topk, end - start)
        chosen, tail = self.indices[row, :kept], self.indices[row, kept:]
        kind = "padding row" if row not in self.spans else f"row sees positions [{start}, {end})"
        place = f"row {row} ({kind}): "
        wrong = np.flatnonzero((chosen < start) | (chosen >= end))
        if len(wrong):
            self.verdict.fail(f"{place}entry {wrong[0]} is {chosen[wrong[0]]}, expected {kept} visible positions")
        elif len(np.unique(chosen)) < kept:
            self.verdict.fail(f"{place}{kept - len(np.unique(chosen))} of {kept} entries repeat another")
        elif (tail != -1).any():
            at = int(np.argmax(tail != -1))
            self.verdict.fail(f"{place}entry {kept + at} is {tail[at]}, expected -1 behind {kept} entries")
        elif self.call.options.get("sorted", True) and (np.diff(chosen) < 0).any():
            self.verdict.fail(f"{place}positions do not ascend at entry {int(np.argmax(np.diff(chosen) < 0)) + 1}")
        elif self.scores is not None and not (self.scores[row, kept:] == -np.inf).all():
            self.verdict.fail(f"{place}scores behind {kept} entries are not -inf")
        else:
            return True
        return False

    def _row(self, row: int, start: int, scores: Array, weighted: Array, magnitude: Array, emulated: Array) -> None:
        if not np.isfinite(scores).all():
            self.verdict.metrics["spoilt_rows"] = int(self.verdict.metrics.get("spoilt_rows") or 0) + 1
            return
        _, heads, dim = self.call.arrays["q"].shape
        exact_dots = self.call.arrays["q"].dtype == np.int8 and self.profile.accumulator.bits >= 24
        bound = criteria.score_bound(
            self.profile,
            scores,
            weighted,
            magnitude,
            heads=heads,
            dim=dim,
            dots_exact=exact_dots,
            exact=self.case.exact,
            flushed=self._flushed(row, start, len(scores)),
        )
        chosen = self.indices[row, : min(self.topk, len(scores))].astype(np.int64) - start
        if len(scores) > self.topk:
            self._certificate(row, start, scores, bound, chosen, emulated)
        if self.scores is not None:
            self._returned(row, start, scores, bound, chosen, emulated)

    def _flushed(self, row: int, start: int, count: int) -> Array | float:
        if self.profile.subnormals == "kept":
            return 0.0
        _, scale = oracle.index_keys(self.call, self.requests[row], np.arange(start, start + count))
        return np.asarray(scale * np.maximum(1, abs(self.call.arrays["weights"][row].astype(np.float64))).sum())

    def _certificate(self, row: int, start: int, scores: Array, bound: Array, chosen: Array, emulated: Array) -> None:
        v = criteria.margin(scores, bound, chosen)
        assert v is not None
        self.verdict.worst("v", v)
        best = np.argsort(-scores, kind="stable")[: self.topk]
        missed = np.setdiff1d(best, chosen)
        # Keys of equal true score are interchangeable: only those strictly above the k-th score were exchanged.
        threshold = scores[best[-1]]
        exchanged = max(int((scores[missed] > threshold).sum()), int((scores[chosen] < threshold).sum()))
        self.exchanged += exchanged
        recall = 1 - exchanged / self.topk
        self.recall = min(self.recall, recall)
        self.verdict.metrics["recall"] = self.recall
        own = emulated.astype(np.float64)
        kept = np.argsort(-own, kind="stable")[: self.topk]
        out = np.setdiff1d(best, kept)
        self.exchanged_emulated += max(int((scores[out] > threshold).sum()), int((scores[kept] < threshold).sum()))
        if v > 1:
            lost = missed[np.argmax(scores[missed])] if len(missed) else best[0]
            rank = int((scores > scores[lost]).sum()) + 1
            self.verdict.fail(
                f"row {row}: the set is no top {self.topk}: position {lost + start} (rank {rank}, score {scores[lost]:.9g}) "
                f"was left out for one of score {scores[chosen].min():.9g}; margin v = {v:.3g}, allowed 1; {exchanged} keys "
                "exchanged",
                row=row,
                first_position=start,
                true_scores=scores,
                bound=bound,
            )
        self._tie_rule(row, start, scores, chosen, best)

    def _tie_rule(self, row: int, start: int, scores: Array, chosen: Array, best: Array) -> None:
        """Where every legal rounding ties the same keys, a declared `lowest` names the one right set."""
        unrounded = self.profile.logit in ("float32", "float64") or not scores.any()
        if (
            self.profile.ties == "lowest"
            and self.case.exact
            and unrounded
            and not np.array_equal(np.sort(chosen), np.sort(best))
        ):
            kept, lost = np.setdiff1d(chosen, best), np.setdiff1d(best, chosen)
            self.verdict.fail(
                f"row {row}: of equal scores position {kept[-1] + start} was kept and {lost[0] + start} was not, where the "
                "profile declares ties to the lowest",
                row=row,
                first_position=start,
                true_scores=scores,
            )

    def _returned(self, row: int, start: int, scores: Array, bound: Array, chosen: Array, emulated: Array) -> None:
        assert self.scores is not None
        got = self.scores[row, : len(chosen)].astype(np.float64)
        error = abs(got - scores[chosen])
        allowed = bound[chosen]
        # A NaN must count as an error: nothing compares greater than it.
        bad = ~(error <= allowed)
        ratio = np.divide(error, allowed, out=np.where(bad, np.inf, 0.0), where=allowed > 0)
        self.verdict.worst("score_error_over_bound", float(np.nan_to_num(ratio, nan=np.inf).max(initial=0)))
        if bad.any():
            at = int(np.argmax(bad))
            self.verdict.fail(
                f"row {row}, position {chosen[at] + start}: score is {got[at]:.9g}, expected {scores[chosen[at]]:.9g} "
                f"within {allowed[at]:.3g}",
                row=row,
                first_position=start,
                true_scores=scores,
                bound=bound,
            )
        self.square_error += float((error**2).sum())
        self.square_score += float((scores[chosen] ** 2).sum())
        self.square_error_emulated += float(((emulated[chosen].astype(np.float64) - scores[chosen]) ** 2).sum())
        self.compared += len(chosen)

    def _population(self) -> None:
        metrics, verdict = self.verdict.metrics, self.verdict
        if verdict.selective_rows:
            limit = criteria.exchanged_limit(self.exchanged_emulated)
            metrics |= {"exchanged": self.exchanged, "exchanged_emulated": self.exchanged_emulated}
            metrics["exchanged_limit"] = limit
            if self.exchanged > limit:
                verdict.fail(
                    f"{self.exchanged} keys exchanged over {verdict.selective_rows} selective rows, where an honest kernel of "
                    f"this profile exchanges {self.exchanged_emulated} and {limit:.1f} are allowed"
                )
        if self.compared:
            error, own, typical = (
                (total / self.compared) ** 0.5 for total in (self.square_error, self.square_error_emulated, self.square_score)
            )
            allowed = criteria.score_error_limit(own, self.profile, typical)
            metrics |= {"score_rms_error": error, "score_rms_emulated": own, "score_rms_limit": allowed}
            if not error <= allowed:
                verdict.fail(
                    f"RMS error of returned scores is {error:.4g}, where the emulator has {own:.4g} and {allowed:.4g} is "
                    "allowed"
                )

    def _largest_dot(self) -> float:
        largest = 0.0
        for row, request, start, end in oracle.rows(self.call):
            keys, _ = oracle.index_keys(self.call, request, np.arange(start, end))
            dots = self.call.arrays["q"][row].astype(np.float64) @ keys.T
            largest = max(largest, float(abs(dots[np.isfinite(dots)]).max(initial=0)))
        return largest


def _as_is(q: Array, k: Array, w: Array) -> tuple[Array, Array, Array]:
    return q, k, w


def _weights_only(q: Array, k: Array, w: Array) -> tuple[Array, Array, Array]:
    return q, k, abs(w)


def _all_magnitudes(q: Array, k: Array, w: Array) -> tuple[Array, Array, Array]:
    return abs(q), abs(k), abs(w)


class _Attend:
    """sparse_attend: bound (B), error per row and head against the emulator's (R), bias (D), lse (L); or bit equality."""

    def __init__(self, case: Case, call: Call, outputs: Mapping[str, Array], profile: Profile, verdict: Verdict) -> None:
        self.case, self.call, self.profile, self.verdict = case, call, profile, verdict
        self.out, self.lse = outputs["out"], outputs.get("lse")
        self.dtype = call.arrays["q"].dtype.name
        self.slopes: list[tuple[float, float]] = []

    def run(self) -> None:
        """Judge all rows, then the bias over the case."""
        owners = {row: request for row, request, _, _ in oracle.rows(self.call)}
        for row in range(len(self.out)):
            kv = oracle.attention_row(self.call, row, owners[row])[0] if row in owners else np.empty((0, 0))
            if len(kv):
                self._row(row, kv)
            else:
                self._empty(row, "padding row" if row not in owners else "row without a valid index")
        if self.slopes:
            # Rows weigh alike: by energy, a few rows of few keys would outweigh all the long ones.
            bias, own = (float(np.mean(side)) for side in zip(*self.slopes, strict=True))
            self.verdict.metrics |= {"slope": bias, "slope_emulated": own}
            if not abs(bias - own) < criteria.SLOPE:
                self.verdict.fail(
                    f"bias slope is {bias:.3g}, the emulator's {own:.3g}, and {criteria.SLOPE} between them is allowed"
                )

    def _empty(self, row: int, kind: str) -> None:
        if not (self.out[row] == 0).all():
            self.verdict.fail(f"row {row} ({kind}): out is not 0 everywhere")
        if self.lse is not None and not (self.lse[row] == -np.inf).all():
            self.verdict.fail(f"row {row} ({kind}): lse is {self.lse[row][0]}, expected -inf")

    def _row(self, row: int, kv: Array) -> None:
        options, sink = self.call.options, self.call.arrays.get("attn_sink")
        q = self.call.arrays["q"][row].astype(np.float64)
        scale, width = options["softmax_scale"], options["value_dim"]
        truth, lse, p = oracle.attention(q, kv, scale, width, sink)
        facts = criteria.Row(q, kv, scale, width, p, truth, lse)
        bound = criteria.attention_bound(self.profile, facts, self.dtype)
        got = self.out[row].astype(np.float64)
        if self.case.exact:
            expected = truth.astype(self.out.dtype)
            if not np.array_equal(self.out[row], expected):
                head, column = np.argwhere(~(self.out[row] == expected))[0]
                self.verdict.fail(
                    f"row {row}, head {head}, column {column}: out is {self.out[row][head, column]}, expected exactly "
                    f"{expected[head, column]}",
                    row=row,
                    true_out=truth,
                )
        else:
            self._bound(row, got, truth, bound.out)
            floor = criteria.error_floor(self.profile, facts, self.dtype)
            self._ratio(row, kv, got, truth, sink, floor)
        if self.lse is not None:
            self._lse(row, lse, bound.lse)

    def _bound(self, row: int, got: Array, truth: Array, allowed: Array) -> None:
        error = abs(got - truth)
        ratio = np.nan_to_num(error / allowed, nan=np.inf)
        self.verdict.worst("error_over_bound", float(ratio.max()))
        if not (error <= allowed).all():
            head, column = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
            self.verdict.fail(
                f"row {row}, head {head}, column {column}: out is {got[head, column]:.9g}, expected {truth[head, column]:.9g} "
                f"within {allowed[head, column]:.3g}, a proven bound",
                row=row,
                true_out=truth,
                bound=allowed,
            )

    def _ratio(self, row: int, kv: Array, got: Array, truth: Array, sink: Array | None, floor: Array) -> None:
        options = self.call.options
        own, _ = emulator.attention(
            self.call.arrays["q"][row], kv, options["softmax_scale"], options["value_dim"], sink, self.profile
        )
        own = own.astype(np.float64)
        size, error, yardstick = (np.linalg.norm(x, axis=1) for x in (truth, got - truth, own - truth))
        allowed = np.maximum(yardstick, floor)
        ratio = np.divide(error, allowed, out=np.where(error > 0, np.inf, 0.0), where=allowed > 0)
        ratio = np.nan_to_num(ratio, nan=np.inf)
        self.verdict.worst("rms_ratio", float(ratio.max()))
        if not (ratio <= criteria.KAPPA).all():
            head = int(np.argmax(ratio))
            self.verdict.fail(
                f"row {row}, head {head}: RMS error is {ratio[head]:.3g} times the emulator's, allowed {criteria.KAPPA:g} "
                f"(relative error {error[head] / size[head] if size[head] else np.inf:.3g})",
                row=row,
                true_out=truth,
                emulated_out=own,
                allowed_norm=criteria.KAPPA * allowed,
            )
        if energy := float((truth * truth).sum()):
            self.slopes.append((float(((got - truth) * truth).sum()) / energy, float(((own - truth) * truth).sum()) / energy))

    def _lse(self, row: int, truth: Array, allowed: Array) -> None:
        assert self.lse is not None
        error = abs(self.lse[row].astype(np.float64) - truth)
        self.verdict.worst("lse_error_over_bound", float(np.nan_to_num(error / allowed, nan=np.inf).max()))
        if not (error <= allowed).all():
            head = int(np.argmax(~(error <= allowed)))
            self.verdict.fail(
                f"row {row}, head {head}: lse is {self.lse[row][head]:.9g}, expected {truth[head]:.9g} within "
                f"{allowed[head]:.3g}",
                row=row,
                true_lse=truth,
                bound=allowed,
            )
