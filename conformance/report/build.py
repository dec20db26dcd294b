"""The report of a run, from whose it is, what was recorded and what was judged; before the first case, and in the end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Literal, cast

from dsa_portable.conformance import lists
from dsa_portable.conformance.cases.catalogue import CASES
from dsa_portable.conformance.execute.recording import Recording, Subject
from dsa_portable.conformance.report import claims, environment, schema
from dsa_portable.conformance.report.evidence import evidence_of
from dsa_portable.conformance.report.rows import row_of
from dsa_portable.conformance.report.schema import BackendRef, CaseResult, DeviceRef, ListRef, ProfileEntry, Report, Run
from dsa_portable.profile import differences, envelope


def report_of(
    subject: Subject,
    recordings: Mapping[str, Recording],
    judged: Mapping[str, CaseResult],
    not_run: Mapping[str, str],
    run: Run,
) -> Report:
    """`judged` has the rows that there are, `not_run` why each other case of the list has none."""
    frozen = lists.load(subject.list_name)
    rows = [
        judged[id] if id in judged else row_of(CASES[id], subject, status="NOT_RUN", reason=not_run[id]) for id in frozen.cases
    ]
    evidence, reason = evidence_of(subject, recordings, {row.id: row for row in rows if row.id in judged})
    profiles = _profiles(subject, frozen)
    earned = claims.claims(rows, subject.capabilities, profiles, evidence, frozen, run.passes)
    level = claims.level(earned, rows, frozen)
    return Report(
        backend=BackendRef(
            name=subject.backend,
            version=subject.version,
            requested=subject.requested,
            resolved=subject.resolved,
            arrays=subject.arrays,
            contract=subject.contract,
            files_sha256=subject.files_sha256,
        ),
        evidence=evidence,
        evidence_reason=reason,
        emulates=subject.emulate,
        judging=lists.JUDGING_VERSION,
        level=level,
        list=ListRef(
            name=frozen.name, sha256=frozen.sha256, judging=frozen.judging, cases=len(rows), executed=schema.executed(rows)
        ),
        claims=earned,
        cases=rows,
        counts=schema.tally(rows),
        profiles=profiles,
        device=DeviceRef(**{**asdict(subject.device), "versions": dict(subject.device.versions)}),
        environment=environment.fingerprint(),
        run=run,
        exit_code=cast(Literal[0, 1, 3], schema.exit_code_of(rows, run.selected)),
        verdict=schema.verdict_of(
            rows, list_name=frozen.name, evidence=evidence, chip=subject.device.chip, level=level, selected=run.selected
        ),
    )


def _profiles(subject: Subject, frozen: lists.FrozenList) -> list[ProfileEntry]:
    """One for each claim: a declared format with a phase that the list has cases of."""
    keys = dict.fromkeys((CASES[id].operator, CASES[id].format, CASES[id].phase) for id in frozen.cases)
    return [
        ProfileEntry(
            operator=key[0],
            format=key[1],
            phase=key[2],
            envelope=envelope(key[0], subject.profiles[key]),
            profile=asdict(subject.profiles[key]),
            words=differences(key[0], subject.profiles[key]),
            sources=dict(subject.sources.get(key, {})),
        )
        for key in keys
        if key in subject.profiles
    ]
