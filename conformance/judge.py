"""From recorded outputs to a verdict. Whoever holds the outputs and a profile can judge; no backend is needed or touched.

A case fails with the first rule it breaks, and the reason says where: row and head, what was expected, got and allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from dsa_portable.conformance.cases.call import Call, Outputs, request_of
from dsa_portable.conformance.cases.catalogue import Case
from dsa_portable.conformance.judge_attend import AttendJudge, AttendReference
from dsa_portable.conformance.judge_index import IndexJudge, IndexReference
from dsa_portable.conformance.verdict import Verdict
from dsa_portable.profile import Profile

Reference: TypeAlias = IndexReference | AttendReference


def reference_of(case: Case, call: Call, profile: Profile) -> Reference:
    """What this call's outputs are judged against; worth keeping where many outputs of one call are judged."""
    return (IndexReference if call.operator == "lightning_index" else AttendReference)(case, call, profile)


def judge_case(
    case: Case,
    calls: Sequence[Call],
    outputs: Sequence[Outputs],
    profiles: Mapping[str, Profile],
    references: Sequence[Reference] = (),
) -> Verdict:
    """Judge every call of a case by itself, then whether the calls agree; `profiles` has one for each operator."""
    verdict = Verdict()
    for i, (call, found) in enumerate(zip(calls, outputs, strict=True)):
        if any(call is earlier for earlier in calls[:i]):
            continue  # A rerun: judged once, and compared below.
        single = judge(case, call, found, profiles[call.operator], references[i] if references else None)
        verdict.metrics = single.metrics | verdict.metrics
        for rows in ("selective_rows", "vacuous_rows"):
            if getattr(single, rows) is not None:
                setattr(verdict, rows, (getattr(verdict, rows) or 0) + getattr(single, rows))
        if single.status != "PASS" and verdict.status == "PASS":
            where = f"call {i} of {len(calls)}: " if len(calls) > 1 else ""
            verdict.status, verdict.rule, verdict.arrays = single.status, single.rule, single.arrays
            verdict.reason = where + single.reason
    if verdict.status == "PASS" and (reason := case.disagreement(calls, outputs)):
        verdict.fail("agreement", reason)
    return verdict


def judge(case: Case, call: Call, outputs: Outputs, profile: Profile, reference: Reference | None = None) -> Verdict:
    """Judge one call's outputs (`indices`, `scores`, `out`, `lse`: those the call returns)."""
    verdict = Verdict()
    if not _shapes(call, outputs, verdict):
        return verdict
    reference = reference or reference_of(case, call, profile)
    if isinstance(reference, IndexReference):
        IndexJudge(reference, outputs, verdict).run()
    else:
        AttendJudge(reference, outputs, verdict).run()
    return verdict


def _shapes(call: Call, outputs: Outputs, verdict: Verdict) -> bool:
    for name, (dtype, shape) in request_of(call).results.items():
        if name not in outputs or outputs[name].dtype.name != dtype or outputs[name].shape != shape:
            got = f"{outputs[name].dtype} {list(outputs[name].shape)}" if name in outputs else "nothing"
            verdict.fail("result", f"{name} is {got}, expected {dtype} {list(shape)}")
            return False
    return True
