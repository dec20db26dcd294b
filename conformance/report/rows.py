"""A row of the report: what stands in it whatever became of the case, and what its judge adds."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from dsa_portable.conformance import lists
from dsa_portable.conformance.cases.catalogue import Case
from dsa_portable.conformance.execute.recording import Subject
from dsa_portable.conformance.report import claims
from dsa_portable.conformance.report.schema import CaseResult, Status


def row_of(
    case: Case,
    subject: Subject,
    *,
    status: str,
    reason: str,
    rule: str | None = None,
    features: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    selective_rows: int | None = None,
    vacuous_rows: int | None = None,
    seconds: float | None = None,
    outputs_sha256: str | None = None,
    traceback: str = "",
) -> CaseResult:
    """The row of a case of the subject's list."""
    frozen = lists.load(subject.list_name)
    return CaseResult(
        id=case.id,
        operator=case.operator,
        format=case.format,
        phase=case.phase,
        claim_required=claims.required(case, features or {}, subject.capabilities),
        hazards=list(case.hazards),
        features=dict(features or {}),
        point=dict(getattr(case, "point", ())),
        why=case.why,
        status=Status(status),
        rule=rule,
        reason=reason,
        traceback=traceback,
        metrics=dict(metrics or {}),
        selective_rows=selective_rows,
        vacuous_rows=vacuous_rows,
        seconds=seconds,
        inputs_sha256=frozen.cases[case.id],
        outputs_sha256=outputs_sha256,
        artefact=None,
        reproducer=_command(subject, case.id),
    )


def _command(subject: Subject, *ids: str) -> str:
    cases = "".join(f" --case {id}" for id in ids)
    emulate = f" --emulate {shlex.quote(subject.emulate)}" if subject.emulate else ""
    backend = f"DSA_BACKEND={shlex.quote(subject.backend)}"
    return f"{backend} dsa-portable conformance --list {lists.load(subject.list_name).name}{cases}{emulate}"


def passing_alone(row: CaseResult, subject: Subject, predecessor: str, after_it: bool) -> CaseResult:
    """The failing row of a case that passes in a process of its own; `after_it`: it fails there after its predecessor.

    A run asks in the order of the list, so that the command asks the predecessor first. The verdict stays.
    """
    if not after_it:
        words = f"it passes alone, and after {predecessor} alone: it fails after more of the run, or not every time"
        return row.model_copy(update={"reason": f"{row.reason}; {words}"})
    words = f"it passes alone, and fails after {predecessor}"
    command = _command(subject, predecessor, row.id)
    return row.model_copy(update={"reason": f"{row.reason}; {words}", "reproducer": command})
