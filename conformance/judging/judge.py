"""From a recording to a row of the report. Whoever holds recordings and their subject can judge; no backend is needed.

A case fails with the first rule it breaks, and the reason says where: row and head, what was expected, got and allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance import lists
from dsa_portable.conformance.cases.call import Call, Outputs, drive, sha256_of
from dsa_portable.conformance.cases.catalogue import Case
from dsa_portable.conformance.execute.recording import Recording, RecordingError, Subject
from dsa_portable.conformance.judging.lightning_index import IndexJudge, IndexReference, ScoresJudge, Truth
from dsa_portable.conformance.judging.rules import Verdict
from dsa_portable.conformance.judging.sparse_attend import AttendFacts, AttendJudge, AttendReference
from dsa_portable.conformance.judging.triage import explain
from dsa_portable.conformance.report import claims
from dsa_portable.conformance.report.rows import row_of
from dsa_portable.conformance.report.schema import CaseResult
from dsa_portable.profile import Profile

Reference: TypeAlias = IndexReference | AttendReference
# An ERROR says less of its inputs than a FAIL, so that large ones, which the case makes again, are not kept.
ERROR_BYTES = 256 << 20


def reference_of(
    case: Case,
    call: Call,
    profile: Profile,
    shared: dict[Any, AttendFacts] | None = None,
    truth: dict[bool, list[Truth]] | None = None,
) -> Reference:
    """What this call's outputs are judged against; worth keeping where many outputs of one call are judged.

    `shared`: of attention, over the calls of a case. `truth`: of an index call, over profiles.
    """
    if call.operator == "sparse_attend":
        return AttendReference(case, call, profile, shared)
    return IndexReference(case, call, profile, truth)


def judge_calls(
    case: Case,
    calls: Sequence[Call],
    outputs: Sequence[Outputs],
    profile_of: Callable[[Call], Profile],
    explain: Callable[[Reference, Outputs, Verdict], str] | None = None,
) -> Verdict:
    """Judge every call of a case by itself and by its own profile, then whether the calls agree.

    `explain` adds words to the reason of the call that fails, and nothing else.
    """
    verdict = Verdict()
    shared: dict[Any, AttendFacts] | None = {} if len(calls) > 1 else None
    for i, (call, found) in enumerate(zip(calls, outputs, strict=True)):
        if call.prelude or any(call is earlier for earlier in calls[:i]):
            continue  # Made for what it leaves behind; or a rerun, which is judged once and compared below.
        reference = reference_of(case, call, profile_of(call), shared)
        single = judge_call(case, call, found, reference)
        verdict.metrics = single.metrics | verdict.metrics
        for rows in ("selective_rows", "vacuous_rows"):
            if getattr(single, rows) is not None:
                setattr(verdict, rows, (getattr(verdict, rows) or 0) + getattr(single, rows))
        if single.status != "PASS" and verdict.status == "PASS":
            where = f"call {i} of {len(calls)}: " if len(calls) > 1 else ""
            verdict.status, verdict.rule, verdict.arrays = single.status, single.rule, single.arrays
            if where and verdict.arrays:
                verdict.arrays["call"] = np.asarray(i)
            verdict.reason = where + single.reason + (explain(reference, found, single) if explain else "")
    if verdict.status == "PASS" and (reason := case.disagreement(calls, outputs)):
        verdict.fail("agreement", reason)
    return verdict


def judge_call(case: Case, call: Call, outputs: Outputs, against: Profile | Reference) -> Verdict:
    """Judge one call's outputs (`indices`, `scores`, `out`, `lse`: those the call returns) by a profile, or its reference."""
    verdict = Verdict()
    if not _shapes(call, outputs, verdict):
        return verdict
    reference = reference_of(case, call, against) if isinstance(against, Profile) else against
    if isinstance(reference, IndexReference):
        (IndexJudge if "indices" in call.request.results else ScoresJudge)(reference, outputs, verdict).run()
    else:
        AttendJudge(reference, outputs, verdict).run()
    return verdict


def _shapes(call: Call, outputs: Outputs, verdict: Verdict) -> bool:
    for name, (dtype, shape) in call.request.results.items():
        if name not in outputs or outputs[name].dtype.name != dtype or outputs[name].shape != shape:
            got = f"{outputs[name].dtype} {list(outputs[name].shape)}" if name in outputs else "nothing"
            verdict.fail("result", f"{name} is {got}, expected {dtype} {list(shape)}")
            return False
    return True


@dataclass(frozen=True)
class Judgement:
    """A case's row and, of a failure, the arrays that tell why: inputs, outputs, truth and bound of the row."""

    row: CaseResult
    arrays: Mapping[str, np.ndarray[Any, Any]] = field(default_factory=dict)


def judge(case: Case, recording: Recording, subject: Subject) -> CaseResult:
    """The case's row. Raises ListError where the case no longer makes the inputs that its list was frozen with."""
    return examine(case, recording, subject).row


def examine(case: Case, recording: Recording, subject: Subject) -> Judgement:
    """`judge`, and what is worth keeping of a failure."""
    try:
        outputs = recording.outputs
    except RecordingError as exc:  # the process of a backend can have spoilt the file since it was written
        return Judgement(row_of(case, subject, status="ERROR", reason=str(exc), seconds=recording.seconds))
    recorded = iter(outputs)
    # The same calls as the backend's process made: where one takes an earlier one's results, they are the recorded ones.
    calls = drive(case.steps(), lambda call: next(recorded, None))
    frozen = lists.load(subject.list_name)
    if sha256_of([call.sha256() for call in calls]) != frozen.cases[case.id]:
        raise lists.ListError(f"the inputs of {case.id} are not those of {frozen.name}; reinstall the package.")
    with np.errstate(invalid="ignore"):
        verdict = _verdict(case, calls, recording, outputs, subject, frozen.cases[case.id])
    used = claims.features_of(case, next(call for call in calls if call.operator == case.operator))
    row = row_of(
        case,
        subject,
        status=verdict.status,
        reason=verdict.reason,
        rule=verdict.rule,
        features=used,
        metrics=verdict.metrics,
        selective_rows=verdict.selective_rows,
        vacuous_rows=verdict.vacuous_rows,
        seconds=recording.seconds,
        outputs_sha256=recording.outputs_sha256,
        traceback=recording.traceback if verdict.status == "ERROR" else "",
    )
    return Judgement(row, _worth_keeping(calls, outputs, verdict))


def _verdict(
    case: Case, calls: Sequence[Call], recording: Recording, outputs: Sequence[Outputs], subject: Subject, inputs: str
) -> Verdict:
    missing = claims.undeclared(case, calls, subject.capabilities)
    if recording.status == "error":
        return Verdict("ERROR", recording.reason)
    if recording.status == "unsupported":
        if missing is None or recording.capability != missing[0].name:
            return Verdict.failed("capability", f"refused without having declared it: {recording.reason}")
        return Verdict("UNSUPPORTED", f"as declared: '{missing[0].name}' = {missing[1]} is not offered")
    if missing is not None and not missing[0].in_call:
        return Verdict("UNSUPPORTED", f"as declared: '{missing[0].name}' is not offered")
    if missing is not None:
        return Verdict.failed("capability", f"answered although '{missing[0].name}' is not declared")
    if recording.status == "malformed":
        return Verdict.failed("result", f"the call returned {recording.reason}")
    if recording.inputs_sha256 != inputs:
        return Verdict("ERROR", "the worker's process made other inputs than the list has")
    if recording.changed_inputs:
        return Verdict.failed("inputs", f"the call wrote to its inputs: {', '.join(recording.changed_inputs)}")
    return judge_calls(case, calls, outputs, lambda call: subject.profiles[call.operator, call.format, call.phase], explain)


def _worth_keeping(calls: Sequence[Call], outputs: Sequence[Outputs], verdict: Verdict) -> dict[str, np.ndarray[Any, Any]]:
    """Of a FAIL and an ERROR: inputs and batch, outputs where there are any, and what the rule that was broken adds."""
    size = sum(array.nbytes for call in calls for arrays in (call.arrays, call.batch) for array in arrays.values())
    if verdict.status not in ("FAIL", "ERROR") or (verdict.status == "ERROR" and size > ERROR_BYTES):
        return {}
    kept: dict[str, np.ndarray[Any, Any]] = {}
    for i, call in enumerate(calls):
        step = "" if len(calls) == 1 else f"{i}."
        kept |= {f"{step}inputs.{name}": array for name, array in call.arrays.items()}
        kept |= {f"{step}batch.{name}": array for name, array in call.batch.items()}
        kept |= {f"{step}outputs.{name}": array for name, array in (outputs[i] if i < len(outputs) else {}).items()}
    return kept | {f"judged.{name}": np.asarray(array) for name, array in verdict.arrays.items()}
