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
) -> CaseResult:
    """The row of a case of the subject's list."""
    frozen = lists.load(subject.list_name)
    emulate = f" --emulate {shlex.quote(subject.emulate)}" if subject.emulate else ""
    command = f"dsa-portable conformance --list {frozen.name} --case {case.id}{emulate}"
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
        metrics=dict(metrics or {}),
        selective_rows=selective_rows,
        vacuous_rows=vacuous_rows,
        seconds=seconds,
        inputs_sha256=frozen.cases[case.id],
        outputs_sha256=outputs_sha256,
        artefact=None,
        reproducer=f"DSA_BACKEND={shlex.quote(subject.backend)} {command}",
    )
