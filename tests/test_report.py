"""The report: that it cannot be made to lie, that its faces say what it says, and that its files are whole or absent."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema  # type: ignore[import-untyped]
import numpy as np
import pytest
from pydantic import ValidationError

from dsa_portable.conformance.execute import trace
from dsa_portable.conformance.report.ctrf import ctrf
from dsa_portable.conformance.report.junit import junit
from dsa_portable.conformance.report.markdown import summary
from dsa_portable.conformance.report.schema import (
    CaseResult,
    Claim,
    DeviceRef,
    Evidence,
    Report,
    Status,
    UnreadableReport,
    executed,
    exit_code_of,
    json_schema,
    load,
    tally,
    to_json,
    verdict_of,
)
from dsa_portable.conformance.report.terminal import header, progress, table
from dsa_portable.conformance.report.write import ReportDirectoryError, clear, owned, write
from dsa_portable.errors import DSAError

SCHEMA = Path(__file__).parents[1] / "docs" / "report.schema.json"
LEVEL = "core-2026.11 (exact)"
CHIP = "Example CPU 9000"
INDEX = ("lightning_index", "e4m3/f32/f32", "decode")
ATTEND = ("sparse_attend", "bfloat16", "prefill")
P, F, E, U, N, W, X = (Status[s] for s in ("PASS", "FAIL", "ERROR", "UNSUPPORTED", "NOT_RUN", "WAIVED", "XPASS"))
OTHERS = [evidence for evidence in Evidence if evidence is not Evidence.HARDWARE]


def case(number: int, status: Status = P, key: tuple[str, str, str] = INDEX, **changes: Any) -> CaseResult:
    operator, format, phase = key
    fields: dict[str, Any] = {
        "id": f"{operator}.{phase}.{number:03}",
        "operator": operator,
        "format": format,
        "phase": phase,
        "claim_required": True,
        "hazards": ["boundary", "paging"],
        "why": "The row sees one key more than topk.",
        "status": status,
        "rule": "certificate" if status is F else None,
        "reason": "" if status is P else f"the reason of {status}",
        "metrics": {"margin": 1.5, "missed": 0},
        "selective_rows": 3 if operator == "lightning_index" else None,
        "vacuous_rows": 2 if operator == "lightning_index" else None,
        "seconds": 0.25,
        "inputs_sha256": "a" * 64,
        "outputs_sha256": "b" * 64,
        "artefact": "failed/x.npz" if status is F else None,
        "reproducer": f"DSA_BACKEND=cpu dsa-portable conformance --level core --case {operator}.{phase}.{number:03}",
    }
    return CaseResult(**(fields | changes))


def report(
    cases: Sequence[CaseResult] | None = None,
    evidence: Evidence = Evidence.HARDWARE,
    granted: bool | None = None,
    **changes: Any,
) -> Report:
    """A truthful report of these cases; by default four that pass, and levels wherever they are earned."""
    cases = [case(1), case(2), case(1, key=ATTEND), case(2, key=ATTEND)] if cases is None else [*cases]
    if granted is None:
        granted = evidence is Evidence.HARDWARE and all(c.status is P for c in cases)
    keys = dict.fromkeys((c.operator, c.format, c.phase) for c in cases)
    claims = [
        Claim(
            operator=key[0],
            format=key[1],
            phase=key[2],
            envelope="exact",
            level=LEVEL if granted else None,
            reason="" if granted else "not earned",
            counts=tally(c for c in cases if (c.operator, c.format, c.phase) == key),
        )
        for key in keys
    ]
    level = LEVEL if granted else None
    fields: dict[str, Any] = {
        "backend": {
            "name": "cpu",
            "version": "0.1.0",
            "requested": "cpu",
            "resolved": "cpu-onnxruntime",
            "arrays": "numpy",
            "contract": "1.0",
        },
        "evidence": evidence,
        "evidence_reason": "The probe names chip and driver, and the call reached it.",
        "emulates": None,
        "level": level,
        "list": {"name": "core-2026.11", "sha256": "c" * 64, "cases": len(cases), "executed": executed(cases)},
        "claims": claims,
        "cases": cases,
        "counts": tally(cases),
        "profiles": [
            {
                "operator": "lightning_index",
                "format": "e4m3/f32/f32",
                "phase": "decode",
                "envelope": "exact",
                "profile": {"accumulator": {"bits": 24, "rounding": "RN"}, "finite_range": [-math.inf, math.inf]},
                "words": "P in bfloat16",
            }
        ],
        "device": {
            "kind": "cpu",
            "chip": CHIP,
            "driver": "onnxruntime 1.23.2",
            "count": 1,
            "architecture": "x86_64",
            "versions": {"numpy": "2.3.0"},
        },
        "environment": {
            "suite_version": "0.1.0",
            "suite_commit": "0" * 40,
            "suite_dirty": None,
            "python": "3.11.7",
            "platform": "Linux",
            "cpu": CHIP,
            "cores": 2,
            "memory_bytes": 2**33,
            "container": "unknown",
            "packages": {"numpy": "2.3.0"},
            "variables": {"DSA_BACKEND": "cpu"},
        },
        "run": {
            "command": "dsa-portable conformance --level core --out out",
            "started": "2026-11-02T08:00:00Z",
            "finished": "2026-11-02T08:03:20.5+00:00",
            "seconds": 200.5,
            "peak_memory_bytes": {"runner": 2**28, "worker": 2**30},
            "interrupted": False,
            "resumed": False,
            "timeout_scale": 1.0,
            "workers_replaced": 0,
        },
        "exit_code": exit_code_of(cases),
        "verdict": verdict_of(cases, list_name="core-2026.11", evidence=evidence, chip=CHIP, level=level),
    }
    return Report(**(fields | changes))


def selection(statuses: Sequence[Status], selected: int, evidence: Evidence = Evidence.HARDWARE) -> Report:
    """Of a run in which so many of these cases were asked for."""
    cases = [case(i, status) for i, status in enumerate(statuses)]
    whole = report(cases, granted=False)
    verdict = verdict_of(cases, list_name="core-2026.11", evidence=evidence, chip=CHIP, level=None, selected=selected)
    run = whole.run.model_copy(update={"selected": selected})
    return report(cases, evidence, False, run=run, exit_code=exit_code_of(cases, selected), verdict=verdict)


def mixed() -> Report:
    statuses = [P, F, E, U, N, W, X]
    return report([case(i, s, INDEX) for i, s in enumerate(statuses)] + [case(9, P, ATTEND)])


def data(source: Report) -> Any:
    return json.loads(to_json(source))


def validator() -> Any:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text("utf-8")))


# --- the schema ---


def same_whatever_pydantic(schema: Any) -> Any:
    """Without the spellings in which pydantic's releases since 2.7 differ and JSON Schema does not."""
    if isinstance(schema, list):
        return [same_whatever_pydantic(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {key: same_whatever_pydantic(item) for key, item in schema.items()}
    if plain.get("additionalProperties") is True:
        del plain["additionalProperties"]
    if "const" in plain:
        plain.pop("enum", None)
    if len(plain.get("allOf", [])) == 1 and "$ref" in plain["allOf"][0]:
        plain |= plain.pop("allOf")[0]
    return plain


def test_the_published_schema_is_the_models() -> None:
    published = json.loads(SCHEMA.read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(published)
    assert same_whatever_pydantic(published) == same_whatever_pydantic(json.loads(json_schema()))
    assert published["$defs"]["CaseResult"]["additionalProperties"] is False  # what the comparison drops is `true` alone
    assert set(published["required"]) == set(Report.model_fields)


@pytest.mark.parametrize(
    "source",
    [
        report(),
        mixed(),
        report([case(1, N)]),
        selection([P, U, N], 2),
        selection([P, N, N], 2),
        *(report([], e) for e in OTHERS),
        report([case(1)], Evidence.EMULATED, emulates="Chip"),
    ],
)
def test_what_the_model_accepts_the_published_schema_accepts_and_a_file_gives_back(source: Report, tmp_path: Path) -> None:
    validator().validate(data(source))
    path = tmp_path / "report.json"
    path.write_text(to_json(source), "utf-8")
    assert load(path) == source


def change(*path: str | int, to: Any) -> Callable[[Any], None]:
    def apply(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = to

    return apply


# Lies that both the model and the JSON Schema refuse: where they start from, what is changed, what the model says.
PLAIN_LIES: list[tuple[str, Callable[[], Report], Callable[[Any], None], str]] = [
    ("level without HARDWARE", lambda: report([case(1)], Evidence.SIMULATED), change("level", to=LEVEL), "HARDWARE only"),
    ("HARDWARE level relabelled", report, change("evidence", to="EMULATED"), "HARDWARE only"),
    ("level beside an ungranted claim", lambda: report(granted=False), change("level", to=LEVEL), "not every claim"),
    ("level without a claim", lambda: report([case(1, N)]), change("level", to=LEVEL), "not every claim"),
    ("level of a claim outside the envelopes", report, change("claims", 0, "envelope", to=None), "no envelope"),
    ("level of a failed claim", mixed, change("claims", 0, "level", to=LEVEL), "its cases all pass"),
    ("ungranted claim without reason", mixed, change("claims", 0, "reason", to=""), "neither level nor reason"),
    ("HARDWARE without device", report, change("device", to=None), "chip and driver"),
    ("HARDWARE of an unknown chip", report, change("device", "chip", to="unknown"), "chip and driver"),
    ("HARDWARE with an unknown driver", report, change("device", "driver", to="unknown"), "chip and driver"),
    ("HARDWARE that emulates", report, change("emulates", to="Chip"), "is not HARDWARE"),
    (
        "COMPILE-ONLY that ran",
        lambda: report([case(1)], Evidence.SIMULATED),
        change("evidence", to="COMPILE-ONLY"),
        "executes nothing",
    ),
    ("failure with exit 0", mixed, change("exit_code", to=0), "the cases give 1"),
    ("failure with exit 3", mixed, change("exit_code", to=3), "the cases give 1"),
    ("not run with exit 0", lambda: report([case(1), case(2, N)]), change("exit_code", to=0), "the cases give 3"),
    ("nothing executed with exit 0", lambda: report([case(1, U)]), change("exit_code", to=0), "the cases give 3"),
    (
        "nothing executed of a selection with exit 0",
        lambda: selection([U, N], 1),
        change("exit_code", to=0),
        "the cases give 3",
    ),
    ("a selection taken for the list", lambda: selection([P, N], 1), change("run", "selected", to=None), "the cases give 3"),
    ("success with exit 3", report, change("exit_code", to=3), "the cases give 0"),
    ("success with exit 1", report, change("exit_code", to=1), "the cases give 0"),
    ("FAIL without reason", mixed, change("cases", 1, "reason", to=""), "every status but PASS"),
    ("ERROR without reason", mixed, change("cases", 2, "reason", to=""), "every status but PASS"),
    ("UNSUPPORTED without reason", mixed, change("cases", 3, "reason", to=""), "every status but PASS"),
    ("NOT_RUN without reason", mixed, change("cases", 4, "reason", to=""), "every status but PASS"),
    ("PASS with a reason", mixed, change("cases", 0, "reason", to="nearly"), "every status but PASS"),
    ("a status left uncounted", report, lambda d: d["counts"].pop("NOT_RUN"), "NOT_RUN"),
    ("an unknown field", report, change("backend", "fallbacks", to=3), "Extra inputs"),
    ("a field left out", report, lambda d: d["environment"].pop("container"), "Field required"),
    ("an unknown status", report, change("cases", 0, "status", to="SKIPPED"), "'PASS', 'FAIL'"),
    ("a number as text", report, change("run", "seconds", to="200"), "valid number"),
    ("local time", report, change("run", "started", to="2026-11-02T08:00:00"), "pattern"),
    ("a short hash", report, change("list", "sha256", to="abc"), "pattern"),
    ("a verdict on two lines", report, change("verdict", to="core-2026.11 PASSED\nFAILED"), "pattern"),
]
# Lies about sums and identities, which JSON Schema has no words for.
LIES: list[tuple[str, Callable[[], Report], Callable[[Any], None], str]] = [
    ("counts", mixed, change("counts", "FAIL", to=0), "counts differ from the cases"),
    ("counts of a claim", mixed, change("claims", 0, "counts", "FAIL", to=0), "counts of claim lightning_index"),
    ("claim's cases renamed away", report, change("cases", 0, "phase", to="prefill"), "counts of claim lightning_index"),
    ("duplicate ids", report, lambda d: d["cases"][1].update(id=d["cases"][0]["id"]), "unique; repeated: lightning_index"),
    ("duplicate claims", report, lambda d: d["claims"].append(copy.deepcopy(d["claims"][0])), "claims are unique"),
    ("rows left out", report, change("list", "cases", to=120), "NOT_RUN rows"),
    ("executed", mixed, change("list", "executed", to=7), "6 cases were executed"),
    ("verdict", mixed, change("verdict", to="core-2026.11 PASSED on Example CPU 9000 (HARDWARE)"), "bears out 'FAILED: 3 of 8"),
    ("interrupted selection with exit 0", lambda: selection([P, N, N], 2), change("exit_code", to=0), "the cases give 3"),
    ("more run than selected", lambda: selection([P, P, N], 2), change("run", "selected", to=1), "2 of 3 cases were run"),
    ("all of the list selected", report, change("run", "selected", to=4), "null is all of them"),
    ("absolute artefact", mixed, change("cases", 1, "artefact", to="/tmp/x.npz"), "below the report directory"),
    ("artefact elsewhere", mixed, change("cases", 1, "artefact", to="../x.npz"), "below the report directory"),
]


@pytest.mark.parametrize(
    ("start", "lie", "says"), [row[1:] for row in PLAIN_LIES + LIES], ids=[r[0] for r in PLAIN_LIES + LIES]
)
def test_no_report_can_say_it(start: Callable[[], Report], lie: Callable[[Any], None], says: str, tmp_path: Path) -> None:
    document = data(start())
    lie(document)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(document), "utf-8")
    with pytest.raises(ValidationError, match=says):
        Report.model_validate_json(path.read_text("utf-8"), strict=True)
    with pytest.raises(UnreadableReport, match="no valid report") as refusal:
        load(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("start", "lie"), [row[1:3] for row in PLAIN_LIES], ids=[row[0] for row in PLAIN_LIES])
def test_the_published_schema_refuses_it_too(start: Callable[[], Report], lie: Callable[[Any], None]) -> None:
    document = data(start())
    assert validator().is_valid(document)
    lie(document)
    assert not validator().is_valid(document)


def test_a_required_case_unsupported_bars_the_claims_level_and_an_optional_one_does_not() -> None:
    optional = [case(1), case(2, U, claim_required=False)]
    assert report(optional, granted=True).level == LEVEL
    with pytest.raises(ValidationError, match=r"required case lightning_index\.decode\.002 is UNSUPPORTED"):
        report([case(1), case(2, U)], granted=True)


@pytest.mark.parametrize("status", [F, E, N, W, X])
def test_no_level_beside_a_case_that_did_not_pass(status: Status) -> None:
    with pytest.raises(ValidationError, match=f"level beside {{'{status}': 1}}"):
        report([case(1), case(2, status, claim_required=False)], granted=True)
    with pytest.raises(ValidationError, match="no case of it passed"):
        report([case(1, U, claim_required=False)], granted=True)


def test_a_failure_outside_every_claim_bars_the_level() -> None:
    good, bad = report([case(1)]), case(1, F, ATTEND)
    cases = [*good.cases, bad]
    fields = dict(good) | {"cases": cases, "counts": tally(cases), "exit_code": 1, "verdict": "FAILED: 1 of 2 cases (HARDWARE)"}
    fields["list"] = good.list.model_copy(update={"cases": 2, "executed": 2})
    with pytest.raises(ValidationError, match="a level and exit code 1"):
        Report(**fields)
    claims = [claim.model_copy(update={"level": None, "reason": "none"}) for claim in good.claims]
    assert Report(**(fields | {"level": None, "claims": claims})).exit_code == 1


def test_a_report_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        report().level = None


@pytest.mark.parametrize(
    ("value", "written"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), (np.float32(0.5), 0.5), (np.int64(3), 3)]
)
def test_metrics_and_profiles_go_through_json(value: Any, written: Any, tmp_path: Path) -> None:
    source = report([case(1, metrics={"margin": value, "none": None})])
    write(source, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text("utf-8"))["cases"][0]["metrics"] == {"margin": written, "none": None}
    again = load(tmp_path / "report.json")
    assert again == source
    assert again.cases[0].metrics["margin"] == written
    assert type(again.cases[0].metrics["margin"]) is type(written)
    assert again.profiles[0].profile["finite_range"] == ["-inf", "inf"]


def test_what_json_cannot_hold_is_refused_or_escaped(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="a complex has no place"):
        case(1, metrics={"margin": 1j})
    with pytest.raises(ValidationError, match="finite"):
        case(1, seconds=math.nan)
    write(report([case(1, F, reason="cannot open \udcff")]), tmp_path)
    assert load(tmp_path / "report.json").cases[0].reason == "cannot open \\udcff"


# --- loading ---


def schema_version(version: Any) -> str:
    return json.dumps(data(report()) | {"schema_version": version})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "cannot be read as a report"),
        ("{", "cannot be read as a report"),
        ("[1]", "schema_version None"),
        ("{}", "schema_version None"),
        (schema_version("2.0"), r"schema_version '2\.0', this dsa-portable reads '1\.0'; use the release that wrote it"),
        (schema_version("0.9"), r"schema_version '0\.9', this dsa-portable reads '1\.0'"),
        (to_json(report()).replace("0.25", "NaN"), "NaN is no JSON number"),
    ],
)
def test_another_version_or_no_report_is_refused_in_one_sentence(text: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text, "utf-8")
    with pytest.raises(UnreadableReport, match=says) as refusal:
        load(path)
    assert isinstance(refusal.value, DSAError)
    assert "\n" not in str(refusal.value)


# --- what the cases add up to ---


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ([P], 0),
        ([P, U], 0),
        ([P, W, U], 0),
        ([W], 0),
        ([], 3),
        ([U], 3),
        ([U, U], 3),
        ([N], 3),
        ([P, N], 3),
        ([P, F], 1),
        ([P, E], 1),
        ([P, X], 1),
        ([F, N], 1),
        ([E, U], 1),
    ],
)
def test_exit_code(statuses: list[Status], code: int) -> None:
    assert exit_code_of([case(i, status) for i, status in enumerate(statuses)]) == code


@pytest.mark.parametrize(
    ("statuses", "evidence", "verdict"),
    [
        ([P], "HARDWARE", "core-2026.11 PASSED on Example CPU 9000 (HARDWARE)"),
        ([P, W], "HARDWARE", "no failure beyond 1 waived on Example CPU 9000 (HARDWARE), but no level is granted"),
        ([P], "SIMULATED", "no failure (SIMULATED: not run on the named chip; no level can be granted)"),
        ([P], "SELFTEST", "no failure (SELFTEST: the suite examined itself; no level can be granted)"),
        ([P, F, E, X], "HARDWARE", "FAILED: 3 of 4 cases (HARDWARE)"),
        (
            [P, F, N],
            "EMULATED",
            "FAILED: 1 of 3 cases, 1 not run (EMULATED: not run on the named chip; no level can be granted)",
        ),
        ([P, N], "HARDWARE", "INCOMPLETE: 1 of 2 cases were not run (HARDWARE)"),
        ([U], "HARDWARE", "INCOMPLETE: none of 1 cases was executed (HARDWARE)"),
        (
            [N],
            "COMPILE-ONLY",
            "INCOMPLETE: none of 1 cases was executed (COMPILE-ONLY: built or lowered, nothing run; no level can be granted)",
        ),
    ],
)
def test_verdict(statuses: list[Status], evidence: str, verdict: str) -> None:
    assert report([case(i, status) for i, status in enumerate(statuses)], Evidence(evidence)).verdict == verdict


STANDS = "EMULATED: not run on the named chip; no level can be granted"


@pytest.mark.parametrize(
    ("statuses", "selected", "evidence", "code", "verdict"),
    [
        ([P, N, N], 1, "HARDWARE", 0, "no failure in the 1 case asked for, of 3 (HARDWARE); no level is granted"),
        ([P, U, N], 2, "HARDWARE", 0, "no failure in the 2 cases asked for, of 3 (HARDWARE); no level is granted"),
        ([P, W, N], 2, "EMULATED", 0, f"no failure beyond 1 waived in the 2 cases asked for, of 3 ({STANDS})"),
        ([P, N, N], 2, "HARDWARE", 3, "INCOMPLETE: 1 of the 2 cases asked for, of 3, were not run (HARDWARE)"),
        ([U, N, N], 1, "HARDWARE", 3, "INCOMPLETE: none of 3 cases was executed (HARDWARE)"),
        ([F, N, N], 1, "HARDWARE", 1, "FAILED: 1 of 3 cases, 2 not run (HARDWARE)"),
    ],
)
def test_a_selection_is_judged_by_what_was_asked_for_and_never_reads_as_the_list(
    statuses: list[Status], selected: int, evidence: str, code: int, verdict: str
) -> None:
    found = selection(statuses, selected, Evidence(evidence))
    assert (found.exit_code, found.verdict, found.level) == (code, verdict, None)
    assert all("PASSED" not in face(found) for face in (table, summary, junit, ctrf))


# --- the faces ---


@pytest.mark.parametrize("face", [table, summary])
@pytest.mark.parametrize("evidence", Evidence)
def test_the_first_and_the_last_line_name_the_evidence(face: Callable[[Report], str], evidence: Evidence) -> None:
    cases = [case(1, N if evidence is Evidence.COMPILE_ONLY else P)]
    source = report(cases, evidence)
    lines = face(source).strip().splitlines()
    assert evidence.value in lines[0]
    assert evidence.value in lines[-1]
    assert source.verdict.split(" (")[0] in lines[-1]


@pytest.mark.parametrize("evidence", OTHERS)
def test_only_hardware_reads_as_passed(evidence: Evidence) -> None:
    others = report([case(1, N if evidence is Evidence.COMPILE_ONLY else P)], evidence)
    for face in (table, summary, junit, ctrf, to_json):
        assert "PASSED" in face(report())
        assert LEVEL in face(report()).replace("\\", "")
        assert "PASSED" not in face(others)
        assert LEVEL not in face(others).replace("\\", "")


def test_header_says_what_was_asked_for_and_what_runs() -> None:
    lines = header(report()).splitlines()
    assert lines[0] == "conformance of backend cpu-onnxruntime (asked for: cpu), list core-2026.11, evidence HARDWARE"
    text = "\n".join(lines)
    for fact in ("c" * 64, CHIP, "onnxruntime 1.23.2", "4 cases", "contract 1.0", "the call reached it"):
        assert fact in text
    unasked = report(
        backend=report().backend.model_copy(update={"requested": ""}), evidence=Evidence.EMULATED, emulates="Chip 7"
    )
    assert "(asked for: nothing, so cpu)" in header(unasked)
    assert "EMULATED, emulating Chip 7:" in header(unasked)


def test_progress_says_how_far_it_is_and_how_long_it_takes() -> None:
    row = case(1, F, reason="a\nb", seconds=1.5)
    assert progress(row, 5, 20, 40.0) == f"[ 5/20    0:40,   2:00 left] FAIL        {row.id:46}   1.500 s  a b"
    assert progress(row, 20, 20, 3700.0).startswith("[20/20   61:40,   0:00 left] ")


def outside_every_envelope(operators: int) -> Report:
    """A report whose profiles lie in no envelope, or of two operators the index's alone."""
    source = report([case(1), case(1, F, key=ATTEND)])
    (entry,) = source.profiles
    alone = entry.model_copy(update={"envelope": None})
    other = entry.model_copy(update={"operator": "sparse_attend", "format": "bf16", "phase": "prefill"})
    return source.model_copy(update={"profiles": [alone, other] if operators == 2 else [alone]})


@pytest.mark.parametrize(
    ("operators", "words"),
    [
        (1, "no envelope: rows inform, no level"),
        (2, "no envelope: rows of lightning_index e4m3/f32/f32 decode inform, no level"),
    ],
)
def test_a_backend_outside_the_envelopes_reads_so_first(operators: int, words: str) -> None:
    source = outside_every_envelope(operators)
    assert header(source).splitlines()[1] == words
    assert table(source).startswith(f"{words}\n\n")
    page = summary(source)
    assert page.replace("\\", "").split("\n\n")[1] == words
    assert "no envelope" not in header(report()) + table(report()) + summary(report())


def test_a_profile_is_shown_in_words() -> None:
    source = report()
    assert "    declared: P in bfloat16\n" in table(source)
    assert "P in bfloat16" in summary(source)
    assert '<property name="profile.words" value="P in bfloat16"' in junit(source)


def test_table_shows_claims_counts_and_every_failure_with_its_reproducer() -> None:
    source = mixed()
    text = table(source)
    assert "lightning_index  e4m3/f32/f32  decode   exact     -\n" in text
    assert "8 cases: PASS 2, FAIL 1, ERROR 1, UNSUPPORTED 1, NOT_RUN 1, WAIVED 1, XPASS 1" in text
    assert "no level: not earned" in text
    assert "15 test selection, 10 see no more keys than topk" in text
    assert "exit code 1" in text
    for failed in source.cases:
        expected = failed.status in (F, E, X)
        assert (f"{failed.status} {failed.id}\n" in text) is expected
        assert (failed.reproducer in text) is expected
    for status in (U, N, W):
        assert f"1 x the reason of {status}" in text
    assert LEVEL in table(report())


def test_table_fits_100_columns_but_for_what_must_be_copied() -> None:
    long = case(1, F, why="hazard " * 40, reason="expected one key, got another; " * 30)
    lines = (header(report()) + "\n" + table(report([long, case(2, U, reason="undeclared " * 40)]))).splitlines()
    assert max(len(line) for line in lines if "  run " not in line) <= 100
    assert long.reproducer in "\n".join(lines)


def same_failure(number: int) -> CaseResult:
    reason = f"row {number}, head 3: out is {number / 7:.6g} [int32], expected -1.5e-07 within 0x{number:x}"
    return case(number, F, rule="bound", reason=reason)


def test_failures_of_one_cause_are_told_once() -> None:
    cases = [same_failure(i) for i in range(44)]
    alone = len(table(report(cases[:1])).splitlines())
    text = table(report(cases))
    assert len(text.splitlines()) <= alone + 1
    assert f"FAIL {cases[0].id}, and 43 more for the same reason\n" in text
    assert f"  also    {cases[1].id}, {cases[2].id}, 41 more in report.json\n" in text
    assert [row.reproducer in text for row in cases] == [True] + [False] * 43


@pytest.mark.parametrize(
    "other",
    [
        same_failure(2).model_copy(update={"rule": "exact"}),
        same_failure(2).model_copy(update={"reason": same_failure(2).reason.replace("int32", "int64")}),
        case(2, E, reason=same_failure(2).reason),
    ],
)
def test_failures_of_two_causes_are_told_apart(other: CaseResult) -> None:
    text = table(report([same_failure(1), other]))
    assert "for the same reason" not in text
    assert other.reproducer in text


def test_a_reason_of_any_length_leaves_the_terminal_readable() -> None:
    row = case(1, E, reason="word " * 20_000)
    for text in (progress(row, 1, 1, 1.0), table(report([row]))):
        assert len(text) < 3000
        assert "word..." in text.replace("\n", "") or "word ..." in text
    assert row.reason in to_json(report([row]))


@pytest.mark.parametrize("columns", [76, 80, 200])
def test_text_fits_the_terminal_and_breaks_no_hash(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    source = report([case(1, F, why="hazard " * 40, reason="expected one key, got another; " * 30)])
    shown = header(source, tty=True)
    assert "c" * 64 in shown
    lines = [*shown.splitlines()[1:], *table(source, tty=True).splitlines()]
    widest = max(len(line) for line in lines if not line.startswith(("  run ", "lightning_index", "\x1b")))
    assert min(columns, 100) - 10 < widest <= min(columns, 100)
    assert header(source).splitlines() == header(report(source.cases)).splitlines()


def test_who_wants_no_colours_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    faces = (lambda: table(mixed(), tty=True), lambda: progress(case(1, F), 1, 1, 1.0, tty=True))
    monkeypatch.setenv("NO_COLOR", "")
    assert all("\x1b" in face() for face in faces)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not any("\x1b" in face() for face in faces)


def test_progress_colours_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for status, colour in ((F, "\x1b[31m"), (E, "\x1b[31m"), (U, "\x1b[33m"), (P, "")):
        line = progress(case(1, status), 1, 1, 1.0, tty=True)
        assert line.replace("\x1b[0m", "").replace(colour or "\x1b", "") == progress(case(1, status), 1, 1, 1.0)
        assert colour in line
        assert ("\x1b" in line) == bool(colour)


def test_colours_are_for_a_terminal_and_green_for_a_level_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    green = "\x1b[32m"
    assert "\x1b" not in table(mixed())
    assert "\x1b[31m" in table(mixed(), tty=True)
    assert green in table(report(), tty=True)
    assert green not in table(report([case(1)], Evidence.SIMULATED), tty=True)
    assert green not in table(report(granted=False), tty=True)


NASTY = 'bad <b>&"\x1b[2J\x00 | `x`\n# HARDWARE PASSED\n</details> \ufffe ]]>'


def test_a_backends_message_cannot_forge_any_face() -> None:
    source = report([case(1, F, reason=NASTY), case(2, U, reason=NASTY)], Evidence.SIMULATED)
    text, page = table(source), summary(source)
    assert "\x1b" not in text
    assert "\x00" not in text + page
    assert not [line for line in (text + page).splitlines() if line.startswith("# HARDWARE")]
    assert page.count("</details>") == page.count("<details>") == 2
    assert "\\|" in page
    failure = next(ElementTree.fromstring(junit(source)).iter("failure"))
    assert "<b>&" in failure.attrib["message"]
    assert "\\x00" in str(failure.text)


def test_junit_parses_back_with_the_reports_counts() -> None:
    source = mixed()
    root = ElementTree.fromstring(junit(source).encode("utf-8"))
    assert [root.attrib[name] for name in ("tests", "failures", "errors")] == ["8", "2", "1"]
    suites = root.findall("testsuite")
    assert [suites[0].attrib[name] for name in ("tests", "failures", "errors", "skipped")] == ["7", "2", "1", "3"]
    assert [s.attrib["name"] for s in suites] == [
        "HARDWARE: cpu lightning_index e4m3/f32/f32 decode",
        "HARDWARE: cpu sparse_attend bfloat16 prefill",
    ]
    assert [s.attrib["tests"] for s in suites] == ["7", "1"]
    outcomes = {c.attrib["name"]: [child.tag for child in c] for s in suites for c in s.findall("testcase")}
    tags = {P: ["system-out"], F: ["failure"], X: ["failure"], E: ["error"], U: ["skipped"], N: ["skipped"], W: ["skipped"]}
    assert outcomes == {c.id: tags[c.status] for c in source.cases}
    assert [child.attrib["message"] for child in root.iter("skipped")] == [f"{s}: the reason of {s}" for s in (U, N, W)]
    failure = next(root.iter("failure"))
    assert source.cases[1].reproducer in str(failure.text)
    assert "failed/x.npz" in str(failure.text)


# --- the dialects of JUnit ---

# The schema of Jenkins's xUnit plug-in, junit-10.xsd, as facts: an element's required attributes, the others, and its children;
# None for the children of one that holds text.
JENKINS: dict[str, tuple[str, str, str | None]] = {
    "testsuites": ("", "name time tests failures errors", "testsuite"),
    "testsuite": (
        "name tests failures errors",
        "group time skipped timestamp hostname id package file log url",
        "testsuite properties testcase system-out system-err",
    ),
    "properties": ("", "", "property"),
    "property": ("name value", "", ""),
    "testcase": ("name", "time classname group", "skipped error failure system-out system-err"),
    **dict.fromkeys(("skipped", "error", "failure"), ("", "type message", None)),
    **dict.fromkeys(("system-out", "system-err"), ("", "", None)),
}
# What Apache Ant's schema (windyroad/JUnit-Schema) says of the same attributes, and in ANT those that it requires.
ATTRIBUTES = {
    "timestamp": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d",
    "time": r"\d+\.\d+",
    **dict.fromkeys(("tests", "failures", "errors", "skipped"), r"\d+"),
    "hostname": r"\S+",
}
ANT = {"testsuite": "timestamp hostname time", "testcase": "classname time", "failure": "type", "error": "type"}


def breaches(root: ElementTree.Element) -> list[str]:
    """What stands in the document that one of the two schemas does not allow, or lacks."""
    found = []
    for element in root.iter():
        required, others, children = JENKINS.get(element.tag, ("", "", ""))
        known, attributes = [*required.split(), *others.split()], element.attrib.items()
        found += [f"{element.tag} lacks {name}" for name in required.split() if name not in element.attrib]
        found += [f"{element.tag}/@{name}" for name, _ in attributes if name not in known]
        found += [f"{name}={text}" for name, text in attributes if not re.fullmatch(ATTRIBUTES.get(name, r"[\s\S]*"), text)]
        found += [f"{element.tag}/{child.tag}" for child in element if child.tag not in (children or "").split()]
        found += [f"{element.tag} lacks {name}" for name in ANT.get(element.tag, "").split() if name not in element.attrib]
        if children is not None and (element.text or "").strip():
            found.append(f"text in {element.tag}")
    return found + [
        "a suite begins without properties" for suite in root if [child.tag for child in suite][:1] != ["properties"]
    ]


def nasty() -> Report:
    """Every text that a backend can put into a report holds markup and control characters."""
    statuses = (P, F, E, U, N, W, X)
    return report([case(i, s, why=NASTY, reason="" if s is P else NASTY, hazards=[NASTY]) for i, s in enumerate(statuses)])


@pytest.mark.parametrize("source", [report(), mixed(), report([], granted=False), *(report([], e) for e in OTHERS)])
def test_junit_is_valid_for_jenkins_and_keeps_ants_rules(source: Report) -> None:
    assert breaches(ElementTree.fromstring(junit(source))) == []


def test_junit_is_valid_whatever_its_texts_hold() -> None:
    root = ElementTree.fromstring(junit(nasty()))
    assert breaches(root) == []
    texts = [str(outcome.text) for outcome in root.iter() if outcome.tag in ("failure", "error", "skipped", "system-out")]
    assert len(texts) == 7
    assert all("<b>&" in text and "\\x00" in text for text in texts)


@pytest.mark.parametrize(
    ("path", "attribute", "says"),
    [
        (".", "skipped", "testsuites/@skipped"),
        ("testsuite/testcase", "file", "testcase/@file"),
        ("testsuite", "timestamp", "timestamp=2026-11-02T08:00:00Z"),
        ("testsuite", "hostname", "hostname=2026-11-02T08:00:00Z nowhere"),
        ("testsuite/testcase", None, "testcase/properties"),
        ("testsuite", None, "testsuite/skipped"),
    ],
)
def test_what_a_dialect_forbids_is_seen(path: str, attribute: str | None, says: str) -> None:
    root = ElementTree.fromstring(junit(report()))
    element = root.find(path)
    assert element is not None
    if attribute is None:
        ElementTree.SubElement(element, says.split("/")[1])
    else:
        element.set(attribute, says.partition("=")[2] or "1")
    assert breaches(root) == [says]


def test_a_case_that_passed_says_what_it_tried_and_how_to_run_it_again() -> None:
    source = report()
    texts = [str(output.text).splitlines() for output in ElementTree.fromstring(junit(source)).iter("system-out")]
    assert len(texts) == len(source.cases)
    for row, lines in zip(source.cases, texts, strict=True):
        assert lines[0] == "status: PASS"
        assert {f"tests: {row.why}", "hazards: boundary, paging", f"run: {row.reproducer}"} <= {*lines}
        assert '"margin": 1.5' in "".join(lines)


@pytest.mark.parametrize("started", ["2026-11-02T08:00:00Z", "2026-11-02T08:00:00.123456+00:00"])
def test_the_readers_that_group_by_class_see_the_evidence(started: str) -> None:
    source = report([case(1)], Evidence.SIMULATED)
    source = source.model_copy(update={"run": source.run.model_copy(update={"started": started})})
    (suite,) = ElementTree.fromstring(junit(source)).findall("testsuite")
    assert suite.attrib["timestamp"] == "2026-11-02T08:00:00"
    assert all(row.attrib["classname"].startswith("SIMULATED.") for row in suite.findall("testcase"))


def test_junit_carries_provenance_in_every_suite() -> None:
    for source, level in ((report(), LEVEL), (report([case(1)], Evidence.SIMULATED), "none")):
        root = ElementTree.fromstring(junit(source))
        assert all(suite.attrib["name"].startswith(f"{source.evidence}: ") for suite in root.findall("testsuite"))
        for suite in root.findall("testsuite"):
            values = {p.attrib["name"]: p.attrib["value"] for p in suite.iter("property")}
            assert values["level"] == values["claim.level"] == level
            assert values["evidence"] == source.evidence.value
            assert values["backend.name"] == values["backend.requested"] == "cpu"
            assert values["backend.resolved"] == "cpu-onnxruntime"
            assert (values["list.name"], values["list.sha256"]) == ("core-2026.11", "c" * 64)
            assert values["device.chip"] == CHIP
            assert values["environment.packages.numpy"] == "2.3.0"
            assert values["environment.variables.DSA_BACKEND"] == "cpu"
            assert values["environment.suite_dirty"] == "unknown"
        first = {p.attrib["name"]: p.attrib["value"] for p in next(root.iter("testsuite")).iter("property")}
        assert json.loads(first["profile"])["accumulator"]["bits"] == 24


def test_junit_keeps_cases_that_no_claim_covers() -> None:
    source = report(claims=[], level=None, granted=False)
    assert source.claims == []
    assert [c.attrib["name"] for c in ElementTree.fromstring(junit(source)).iter("testcase")] == [c.id for c in source.cases]


# --- CTRF ---

TEXT, NAME, WHOLE, FREE = {"type": "string"}, {"type": "string", "minLength": 1}, {"type": "integer"}, {"type": "object"}
OUTCOMES = ("passed", "failed", "skipped", "pending", "other")


def closed(required: dict[str, Any], optional: dict[str, Any]) -> dict[str, Any]:
    """An object of these fields and no others."""
    return {"type": "object", "properties": required | optional, "required": [*required], "additionalProperties": False}


# What CTRF 0.0.0 (ctrf-io/ctrf, schema/ctrf.schema.json) says of what we write: no field has a name that it does not know.
CTRF = closed(
    {
        "reportFormat": {"const": "CTRF"},
        "specVersion": {"const": "0.0.0"},
        "results": closed(
            {
                "tool": closed({"name": NAME}, {"version": TEXT, "extra": FREE}),
                "summary": closed(
                    dict.fromkeys(("tests", *OUTCOMES, "start", "stop"), WHOLE), dict.fromkeys(("suites", "duration"), WHOLE)
                ),
                "tests": {
                    "type": "array",
                    "items": closed(
                        {"name": NAME, "status": {"enum": [*OUTCOMES]}, "duration": WHOLE},
                        {
                            **dict.fromkeys(("message", "trace", "rawStatus", "filePath"), TEXT),
                            "suite": {"type": "array", "minItems": 1, "items": TEXT},
                            "tags": {"type": "array", "items": TEXT},
                            "attachments": {
                                "type": "array",
                                "items": closed({"name": TEXT, "contentType": TEXT, "path": TEXT}, {"extra": FREE}),
                            },
                            "extra": FREE,
                        },
                    ),
                },
            },
            {
                "environment": closed(
                    {}, {**dict.fromkeys(("reportName", "appName", "appVersion", "osPlatform", "testEnvironment"), TEXT)}
                ),
                "extra": FREE,
            },
        ),
    },
    {"timestamp": {"type": "string", "pattern": r"^[0-9-]{10}T[0-9:]{8}(\.[0-9]+)?(Z|\+00:00)$"}, "generatedBy": TEXT},
)


def results(source: Report) -> Any:
    return json.loads(ctrf(source))["results"]


@pytest.mark.parametrize(
    "source", [report(), mixed(), nasty(), report([], granted=False), *(report([], e, device=None) for e in OTHERS)]
)
def test_ctrf_is_valid_and_its_summary_counts_its_tests(source: Report) -> None:
    jsonschema.Draft202012Validator(CTRF).validate(json.loads(ctrf(source)))
    found = results(source)
    statuses = [test["status"] for test in found["tests"]]
    assert found["summary"]["tests"] == len(source.cases)
    assert {name: found["summary"][name] for name in OUTCOMES} == {name: statuses.count(name) for name in OUTCOMES}


def test_ctrf_says_what_became_of_each_case_in_its_words_and_in_ours() -> None:
    source = mixed()
    words = {P: "passed", F: "failed", E: "failed", U: "skipped", N: "skipped", W: "skipped", X: "failed"}
    found = results(source)
    assert [(test["name"], test["status"], test["rawStatus"], test["duration"]) for test in found["tests"]] == [
        (row.id, words[row.status], row.status.value, 250) for row in source.cases
    ]
    for row, test in zip(source.cases, found["tests"], strict=True):
        assert test.get("message") == (None if row.status is P else f"{row.status}: {row.reason}")
        assert ("trace" in test) is (row.status is not P)
        assert test["extra"]["reproducer"] == row.reproducer
        assert [kept["path"] for kept in test.get("attachments", [])] == [row.artefact] * (row.status is F)
    assert source.cases[1].reproducer in found["tests"][1]["trace"]
    assert found["extra"] == {name: value for name, value in data(source).items() if name != "cases"}


@pytest.mark.parametrize("evidence", Evidence)
def test_ctrf_carries_the_evidence_wherever_a_dashboard_looks(evidence: Evidence) -> None:
    found = results(report([case(1, N if evidence is Evidence.COMPILE_ONLY else P)], evidence))
    (test,) = found["tests"]
    shown = (found["tool"]["name"], *test["suite"], found["environment"]["reportName"], found["environment"]["testEnvironment"])
    for text in shown:
        assert [other for other in Evidence if other.value in text] == [evidence]


@pytest.mark.parametrize(
    ("instant", "milliseconds"),
    [
        ("1970-01-01T00:00:01Z", 1000),
        ("2026-11-02T08:03:20.5+00:00", 1793606600500),
        ("2026-11-02T08:03:20.123456Z", 1793606600123),
        ("2026-11-02T08:03:20.9999999+00:00", 1793606601000),
    ],
)
def test_ctrf_counts_milliseconds_from_1970(instant: str, milliseconds: int) -> None:
    source = report()
    stopped = source.model_copy(update={"run": source.run.model_copy(update={"finished": instant})})
    assert results(stopped)["summary"]["stop"] == milliseconds


def test_summary_says_what_is_claimed_and_what_is_not() -> None:
    granted, failed, simulated = summary(report()), summary(mixed()), summary(report([case(1)], Evidence.SIMULATED))
    assert granted.startswith(f"# HARDWARE: backend cpu-onnxruntime on {CHIP}\n")
    assert f"Level granted: **{LEVEL}**." in granted
    assert "No level is granted to the backend; 0 of 2 claims are granted." in failed
    assert "Nothing is claimed: SIMULATED evidence is not run on the named chip" in simulated
    assert "| lightning\\_index | e4m3/f32/f32 | decode | exact | - | not earned |" in failed
    assert "| FAIL | 1 |" in failed
    assert "\n- WAIVED, 1 x the reason of WAIVED\n" in failed
    assert "## Failures: 3" in failed
    assert f"\n\n    {mixed().cases[1].reproducer}\n" in failed
    assert "## Failures" not in granted
    assert "15 test selection, 10 see no more" in failed
    assert "index rows" not in summary(report([case(1, N)]))
    assert "| exact | P in bfloat16 | nothing |" in granted
    for fact in (
        "core-2026.11",
        "c" * 64,
        "4 of 4 cases executed",
        "<details>",
        "onnxruntime 1.23.2",
        "| suite dirty | unknown |",
    ):
        assert fact in granted


def test_summary_of_a_thousand_failures_stays_small_and_says_so() -> None:
    text = summary(report([case(i, F, reason="long " * 1000) for i in range(1000)]))
    assert len(text.encode()) < 2**18
    assert "950 more are in report.json." in text


# --- the files ---


def test_write_puts_its_files_and_nothing_else(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "b"
    with owned(directory):
        assert [path.name for path in directory.iterdir()] == [".lock"]
    assert list(directory.iterdir()) == []
    files = {"report.json", "junit.xml", "ctrf.json", "summary.md"}
    failed = {f"{row.id}.txt" for row in mixed().cases if row.status in (F, E, X)}
    assert {path.name for path in write(mixed(), directory)} == files | failed
    assert {path.name for path in directory.iterdir()} == files | {"failed"}
    assert {path.name for path in (directory / "failed").iterdir()} == failed
    assert load(directory / "report.json") == mixed()
    assert (directory / "junit.xml").read_text("utf-8") == junit(mixed())
    assert (directory / "ctrf.json").read_text("utf-8") == ctrf(mixed())
    assert (directory / "summary.md").read_text("utf-8") == summary(mixed())


def test_the_text_of_a_failure_is_whole_and_escaped_and_goes_with_the_next_run(tmp_path: Path) -> None:
    row = case(1, F, reason="wrong " * 1000, traceback="File kernel.py\n  \x1b[31mraise\n")
    write(report([row]), tmp_path)
    text = (tmp_path / "failed" / f"{row.id}.txt").read_text("utf-8")
    assert text == (
        f"id: {row.id}\nstatus: FAIL\nrule: certificate\ntests: {row.why}\nreason: {row.reason}\nhazards: boundary, paging\n"
        f'metrics: {{"margin": 1.5, "missed": 0}}\nkept: failed/x.npz\nrun: {row.reproducer}\n'
        "traceback:\nFile kernel.py\n  \\x1b[31mraise\n\n"
    )
    clear(tmp_path)
    assert [*(tmp_path / "failed").iterdir()] == []


def test_no_dashboard_gets_a_reason_of_any_length() -> None:
    source = report([case(1, F, reason="long " * 20_000), case(2, E, reason="long " * 20_000)])
    assert all(len(face(source)) < 20_000 for face in (summary, junit, ctrf))


def test_a_report_from_before_tracebacks_can_be_read(tmp_path: Path) -> None:
    document = data(mixed())
    for row in document["cases"]:
        del row["traceback"]
    (tmp_path / "report.json").write_text(json.dumps(document), "utf-8")
    assert load(tmp_path / "report.json") == mixed()


def test_a_traceback_begins_in_the_backend_and_is_cut_in_its_middle() -> None:
    def backend() -> None:
        raise RuntimeError("x" * (2 * trace.CHARACTERS))

    try:
        backend()
    except RuntimeError as exc:
        text = trace.raised(exc)
    assert "in backend" in text
    assert len(text) < trace.CHARACTERS + 100
    assert "characters are left out" in text


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_report_and_nothing_else(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(report(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(ReportDirectoryError, match="No space left on device"):
        write(mixed(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before
    assert [*tmp_path.glob("failed/*")] == []
    monkeypatch.undo()
    write(mixed(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} != before


@pytest.mark.parametrize("below", ["file", "file/below"])
def test_a_directory_that_cannot_be_written_is_refused_in_one_sentence(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", "utf-8")
    for attempt in (lambda directory: owned(directory).__enter__(), lambda directory: write(report(), directory)):
        with pytest.raises(ReportDirectoryError, match=r"cannot be written \(.+\); name one") as refusal:
            attempt(tmp_path / below)
        assert isinstance(refusal.value, DSAError)
        assert "\n" not in str(refusal.value)
    assert (tmp_path / "file").read_text("utf-8") == "in the way"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_report_needs_every_field_of_a_device() -> None:
    with pytest.raises(ValidationError, match="driver"):
        DeviceRef.model_validate({"kind": "cpu", "chip": CHIP, "count": 1, "architecture": "", "versions": {}})
