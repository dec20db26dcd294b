"""Judging sparse_attend: bound (B), error per row and head against the emulator's (R), bias (D), lse (L); or bit equality."""

from __future__ import annotations

import json
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


@dataclass(frozen=True)
class AttendFacts:
    """One row's truth [Hq, value_dim] and lse [Hq], their bounds, what the emulator returns, and the floors of R and L.

    Of a head whose sink is NaN, out is that without a sink: something must stand there, and nothing is compared with it.
    """

    out: Float64
    lse: Float64
    bound: bounds.RowBound
    emulated_out: Float64
    emulated_lse: Float64
    error_floor: Float64
    lse_floor: Float64
    drift: float  # what truncation, which the emulator does not model, adds to its slope: judging 4.3
    room: float  # how far beyond that the slope may lean, on top of the constant


class AttendReference:
    """Everything about a call that does not depend on what a backend returned; rows are made when they are first asked for."""

    def __init__(self, case: Case, call: Call, profile: Profile, shared: dict[Any, AttendFacts] | None = None) -> None:
        self.call, self.profile, self.exact = call, profile, bounds.leaves_exact(profile) and case.exact
        self.shared = shared  # facts by the bytes they follow from, of all calls of a case; None: not worth it
        self.dtype = call.arrays["q"].dtype.name
        sink = call.arrays.get("attn_sink")
        # Contract 8.3: a sink of NaN leaves out of its head unspecified where the row attends to a key, and nothing else.
        self.unspecified = np.zeros(call.arrays["q"].shape[1], bool) if sink is None else np.isnan(sink)
        self.sink = sink if sink is None else np.where(self.unspecified, np.float32(-np.inf), sink)
        self.owners = {row: request for row, request, _, _ in oracle.rows(call)}
        self._rows: dict[int, AttendFacts | None] = {}
        self.spoilt = set[int]()  # rows that count a NaN or infinity, of which nothing is asked

    def row(self, row: int) -> AttendFacts | None:
        """None where no valid index stands, and where the row is spoilt."""
        if row not in self._rows:
            self._rows[row] = self._facts(row, self.owners[row]) if row in self.owners else None
        return self._rows[row]

    def judged(self, out: Array, facts: AttendFacts) -> Float64:
        """A row's out as it is judged: what is unspecified is as it should be, whatever came."""
        return np.where(self.unspecified[:, None], facts.out, out.astype(np.float64))

    def _facts(self, row: int, request: int) -> AttendFacts | None:
        kv, positions = oracle.attention_row(self.call, row, request)
        if not len(kv):
            return None
        if not (np.isfinite(kv).all() and np.isfinite(self.call.arrays["q"][row].astype(np.float64)).all()):
            self.spoilt.add(row)
            return None
        if self.shared is None:
            return self._row(row, kv)
        # Other pages, another place in the batch, another chunk: the same bytes all the same, and so the same facts.
        memory, sink = self.call.arrays["kv"], self.call.arrays.get("attn_sink")
        held = memory.reshape(-1, memory.shape[-1])[oracle.slots(self.call, request, positions)]
        sinks = b"" if sink is None else sink.tobytes()
        key = (self.call.arrays["q"][row].tobytes(), held.tobytes(), sinks, self.profile, json.dumps(dict(self.call.options)))
        if key not in self.shared:
            self.shared[key] = self._row(row, kv)
        return self.shared[key]

    def _row(self, row: int, kv: Float64) -> AttendFacts:
        options, sink, profile = self.call.options, self.sink, self.profile
        stored = self.call.arrays["q"][row]
        q, scale, width = stored.astype(np.float64), options["softmax_scale"], options["value_dim"]
        out, lse, p = oracle.attention(q, kv, scale, width, sink)
        kept = kv if profile.scale_compute in WIDE else emulator.attention_row(self.call, row, self.owners[row], profile)
        kv_unit = bounds.unit_of(kv, kept, profile.scale_compute)
        kv_unit += bounds.unit_of(kept, rounded(kept, profile.kv_compute), profile.kv_compute)
        q_unit = bounds.unit_of(q, rounded(q, profile.kv_compute), profile.kv_compute)
        facts = bounds.Operands(q, kv, scale, width, p, out, lse, kv_unit, q_unit)
        own, own_lse = emulator.attention(stored, kept, scale, width, sink, profile)
        return AttendFacts(
            out,
            lse,
            bounds.attention_bound(profile, facts, self.dtype),
            own.astype(np.float64),
            own_lse.astype(np.float64),
            bounds.error_floor(profile, facts, self.dtype),
            bounds.lse_floor(profile, facts),
            bounds.drift(profile.accumulator, len(kv)),
            bounds.slope_room(profile, facts),
        )


class AttendJudge:
    """One call's outputs against its reference."""

    def __init__(self, reference: AttendReference, outputs: Outputs, verdict: Verdict) -> None:
        self.reference, self.verdict = reference, verdict
        self.out, self.lse = outputs["out"], outputs.get("lse")
        self.slopes: list[tuple[float, float, float]] = []

    def run(self) -> None:
        """Judge all rows, then the bias over the case."""
        for row in range(len(self.out)):
            facts, self.verdict.row = self.reference.row(row), row
            if row in self.reference.spoilt:
                self.verdict.metrics["spoilt_rows"] = len(self.reference.spoilt)
            elif facts is None:
                self._empty(row, "padding row" if row not in self.reference.owners else "row without a valid index")
            else:
                self._row(row, facts)
        self.verdict.row = None
        if self.slopes:
            # Rows weigh alike: by energy, a few rows of few keys would outweigh all the long ones.
            slopes, emulated, rooms = zip(*self.slopes, strict=True)
            bias, own, allowed = float(np.mean(slopes)), float(np.mean(emulated)), bounds.SLOPE + float(np.mean(rooms))
            self.verdict.metrics |= {"slope": bias, "slope_emulated": own, "slope_limit": allowed}
            if not bounds.slope_excess(bias, own) < allowed:
                self.verdict.fail(
                    "bias",
                    f"bias slope is {bias:.3g}, allowed {allowed:.3g} beyond the span from 0 to the emulator's {own:.3g}",
                )

    def _empty(self, row: int, kind: str) -> None:
        if not (self.out[row] == 0).all():
            found = "nan" if np.isnan(self.out[row]).any() else "not 0 everywhere"
            self.verdict.fail("empty row", f"row {row} ({kind}): out is {found}")
        if self.lse is not None and not (self.lse[row] == -np.inf).all():
            self.verdict.fail("empty row", f"row {row} ({kind}): lse is {self.lse[row][0]}, expected -inf")

    def _row(self, row: int, facts: AttendFacts) -> None:
        got = self.reference.judged(self.out[row], facts)
        self._relative_error(got, facts)
        self._numbers(row, got, facts)
        if self.reference.exact:
            self._exact(row, facts)
        else:
            self._bound(row, got, facts)
            self._ratio(row, got, facts)
        if self.lse is not None:
            self._lse(row, self.lse[row].astype(np.float64), facts)

    def _relative_error(self, got: Array, facts: AttendFacts) -> None:
        """The largest error of a head against its size: no yardstick but the truth, so it can be compared between profiles."""
        error, size = (np.linalg.norm(x, axis=1) for x in (got - facts.out, facts.out))
        ratio = np.divide(error, size, out=np.where(error > 0, np.inf, 0.0), where=size > 0)
        self.verdict.worst("relative_error", np.nan_to_num(ratio, nan=np.inf).max())

    def _numbers(self, row: int, got: Array, facts: AttendFacts) -> None:
        lse = None if self.lse is None else self.lse[row]
        for name, found, truth in (("out", got, facts.out), ("lse", lse, facts.lse)):
            if found is not None and (bad := np.isnan(found) & np.isfinite(truth)).any():
                where, heads = np.argwhere(bad)[0], int(bad.reshape(len(bad), -1).any(axis=1).sum())
                column = f", column {where[1]}" if len(where) > 1 else ""
                self.verdict.fail(
                    "nan",
                    f"row {row}, head {where[0]}{column}: {name} is nan, expected {truth[tuple(where)]:.9g}: no operand that "
                    f"counts is NaN or infinite ({int(bad.sum())} of {bad.size} in this row, {heads} of {len(bad)} heads)",
                    row=row,
                    true_out=facts.out,
                    true_lse=facts.lse,
                )

    def _exact(self, row: int, facts: AttendFacts) -> None:
        expected = facts.out.astype(self.out.dtype)
        wrong = ~(self.out[row] == expected) & ~self.reference.unspecified[:, None]
        if wrong.any():
            head, column = np.argwhere(wrong)[0]
            self.verdict.fail(
                "exact",
                f"row {row}, head {head}, column {column}: out is {self.out[row][head, column]}, expected exactly "
                f"{expected[head, column]}",
                row=row,
                true_out=facts.out,
            )

    def _bound(self, row: int, got: Array, facts: AttendFacts) -> None:
        truth, allowed = facts.out, facts.bound.out
        error = abs(got - truth)
        ratio = np.nan_to_num(error / allowed, nan=np.inf)
        self.verdict.worst("error_over_bound", ratio.max())
        if not (error <= allowed).all():
            head, column = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
            self.verdict.fail(
                "bound",
                f"row {row}, head {head}, column {column}: out is {got[head, column]:.9g}, expected {truth[head, column]:.9g} "
                f"within {allowed[head, column]:.3g}, a proven bound",
                row=row,
                true_out=truth,
                bound=allowed,
            )

    def _ratio(self, row: int, got: Array, facts: AttendFacts) -> None:
        truth, own = facts.out, facts.emulated_out
        size, error, yardstick = (np.linalg.norm(x, axis=1) for x in (truth, got - truth, own - truth))
        allowed = np.maximum(yardstick, facts.error_floor)
        ratio = np.divide(error, allowed, out=np.where(error > 0, np.inf, 0.0), where=allowed > 0)
        ratio = np.nan_to_num(ratio, nan=np.inf)
        self.verdict.worst("rms_ratio", ratio.max())
        if not (ratio <= bounds.KAPPA).all():
            head = int(np.argmax(ratio))
            self.verdict.fail(
                "rms",
                f"row {row}, head {head}: RMS error is {ratio[head]:.3g} times the emulator's, allowed {bounds.KAPPA:g} "
                f"(relative error {error[head] / size[head] if size[head] else np.inf:.3g})",
                row=row,
                true_out=truth,
                emulated_out=own,
                allowed_norm=bounds.KAPPA * allowed,
            )
        heads = ~self.reference.unspecified
        truth, got, own = truth[heads], got[heads], own[heads]
        if energy := float((truth * truth).sum()):
            slope, emulated = (float(((x - truth) * truth).sum()) / energy for x in (got, own))
            self.slopes.append((slope, emulated - facts.drift, facts.room))

    def _lse(self, row: int, got: Array, facts: AttendFacts) -> None:
        truth, allowed = facts.lse, facts.bound.lse
        error = np.nan_to_num(abs(got - truth), nan=np.inf)
        self.verdict.worst("lse_error", error.max())
        self.verdict.worst("lse_error_over_bound", (error / allowed).max())
        if not (error <= allowed).all():
            head = int(np.argmax(~(error <= allowed)))
            self.verdict.fail(
                "lse",
                f"row {row}, head {head}: lse is {got[head]:.9g}, expected {truth[head]:.9g} within {allowed[head]:.3g}",
                row=row,
                true_lse=truth,
                bound=allowed,
            )
        # Over the heads of a row: an error of one head alone is a single random number.
        own, floor = np.linalg.norm(facts.emulated_lse - truth), np.linalg.norm(facts.lse_floor)
        ratio = float(np.linalg.norm(error) / max(own, floor))
        self.verdict.worst("lse_rms_ratio", ratio)
        if not ratio <= bounds.KAPPA:
            self.verdict.fail(
                "lse rms",
                f"row {row}: the RMS error of lse over its heads is {ratio:.3g} times an honest kernel's, allowed "
                f"{bounds.KAPPA:g}",
                row=row,
                true_lse=truth,
                emulated_lse=facts.emulated_lse,
            )
