"""A vendor's waivers: they still run, earn nothing, end on their day, and a mistake in the file is one sentence."""

from __future__ import annotations

import subprocess
from datetime import date
from pathlib import Path

import pytest

from dsa_portable.conformance import session
from dsa_portable.conformance.report import environment, schema
from dsa_portable.conformance.report.schema import Status
from dsa_portable.conformance.report.waivers import WaiverError, Waivers, applied
from tests import plugins

CASE, OTHER = "index-e4m3-f32-f32-decode-out", "index-e4m3-f32-f32-decode-lengths"
TODAY = date(2026, 12, 1)


def file(folder: Path, **fields: str) -> Path:
    values = {"id": CASE, "owner": "kernel team", "reason": "padding", "issue": "#7", "expires": "2026-12-31", **fields}
    quoted = (f"{name} = {value if name == 'expires' else repr(value)}" for name, value in values.items() if value)
    path = folder / "waivers.toml"
    path.write_text("[[waiver]]\n" + "\n".join(quoted) + "\n", encoding="utf-8")
    return path


def row(status: str) -> schema.CaseResult:
    failed = status != "PASS"
    return schema.CaseResult(
        id=CASE, operator="lightning_index", format="e4m3/f32/f32", phase="decode", claim_required=True, hazards=[],
        why="Why.", status=Status(status), rule="tail" if status == "FAIL" else None, reason="entry 0" if failed else "",
        metrics={}, selective_rows=1, vacuous_rows=0, seconds=0.1, inputs_sha256="a" * 64, outputs_sha256="b" * 64,
        artefact=None, reproducer="run",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("status", "today", "expected", "words"),
    [
        ("FAIL", TODAY, "WAIVED", "waived until 2026-12-31 (kernel team, #7: padding); FAIL: entry 0"),
        ("ERROR", date(2026, 12, 31), "WAIVED", "waived until 2026-12-31 (kernel team, #7: padding); ERROR: entry 0"),
        ("FAIL", date(2027, 1, 1), "FAIL", "entry 0; its waiver (kernel team, #7: padding) expired on 2026-12-31"),
        ("PASS", TODAY, "XPASS", "passed in spite of a waiver (kernel team, #7: padding); delete it"),
        ("UNSUPPORTED", TODAY, "UNSUPPORTED", "entry 0"),
    ],
)
def test_what_comes_of_a_waiver(tmp_path: Path, status: str, today: date, expected: str, words: str) -> None:
    found = applied(Waivers(file(tmp_path)), {CASE: row(status)}, today)[CASE]
    assert (found.status, found.reason) == (expected, words)
    assert schema.CaseResult.model_validate(found.model_dump()) == found, "the schema takes it"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[[waiver", "cannot be read"),
        ("x = 3", "hold x, but \\[\\[waiver\\]\\] tables are accepted"),
        ("", "hold nothing, but"),
        ("[[waiver]]\nid = 'no-such-case'\nowner='a'\nreason='b'\nissue='c'\nexpires=2026-12-31", "is no case of any list"),
        (f"[[waiver]]\nid = '{CASE}'\nowner='a'\nreason='b'\nissue='c'", "expires: Field required; each has id, owner"),
        (f"[[waiver]]\nid = '{CASE}'\nowner='a'\nreason='b'\nissue='c'\nexpires='soon'", "expires: .*a date as 2027-03-31"),
        (f"[[waiver]]\nid = '{CASE}'\nowner=''\nreason='b'\nissue='c'\nexpires=2026-12-31", "owner: "),
        (2 * f"[[waiver]]\nid = '{CASE}'\nowner='a'\nreason='b'\nissue='c'\nexpires=2026-12-31\n", "is the second for"),
    ],
)
def test_a_file_of_no_meaning_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "waivers.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(WaiverError, match=sentence) as caught:
        Waivers(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(WaiverError, match="cannot be read"):
        Waivers(tmp_path / "none")


def ran(folder: Path, *words: object) -> tuple[subprocess.CompletedProcess[str], schema.Report]:
    done = plugins.dsa_portable(folder, *words)
    return done, schema.load(folder / "out" / "report.json")


WRONG = """
def index(request):
    return np.zeros(*request.results["indices"][::-1])

attend = sparse_attend
"""


def test_a_waived_failure_keeps_ci_green_and_earns_nothing(tmp_path: Path) -> None:
    plugins.module(tmp_path, "wrong", "operators=OURS", WRONG)
    path = file(tmp_path, expires="2999-12-31")
    words = ("ci", "--backend", "wrong", "--list", "smoke", "--waivers", path, "--out", "out", "--case", CASE)
    done, report = ran(tmp_path, *words, "--case", OTHER)
    rows = {case.id: case.status for case in report.cases}
    assert (rows[CASE], rows[OTHER], done.returncode) == (Status.WAIVED, Status.FAIL, 1), "a new failure blocks"
    done, report = ran(tmp_path, *words)
    assert done.returncode == 0
    assert (report.level, report.run.waivers.split()[0]) == (None, "waivers.toml")
    assert all(claim.level is None for claim in report.claims)
    assert "1 waived" in report.verdict


@pytest.mark.parametrize(
    "words", [("--waivers", "waivers.toml"), ("--resume",), ("--case", CASE), ("--emulate", "A2")], ids=lambda words: words[0]
)
def test_a_certificate_takes_no_excuses(tmp_path: Path, words: tuple[str, ...]) -> None:
    file(tmp_path)
    done = plugins.dsa_portable(tmp_path, "certify", "--backend", "cpu", "--list", "smoke", *words)
    assert done.returncode == 2
    assert "unrecognized arguments" in done.stderr


def test_a_certificate_is_of_a_clean_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for dirty, words in ((True, "has changes that are not committed"), (None, "is not known to be that of a commit")):
        monkeypatch.setattr(environment, "_commit", lambda dirty=dirty: ("c" * 40, dirty))
        with pytest.raises(session.UsageError, match=words):
            session.run(backend="cpu", list="smoke", out=tmp_path / "out", certify=True)
    assert not (tmp_path / "out").exists()
