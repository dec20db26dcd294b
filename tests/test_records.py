"""Recorded runs are reports of whole lists on hardware, from a clean commit, and the pages about them say what they hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dsa_portable.conformance.report import schema
from dsa_portable.conformance.report.schema import Evidence, Status

ROOT = Path(__file__).resolve().parents[1]
RECORDS = sorted((ROOT / "docs" / "records").glob("*/*/report.json"))


def test_there_are_records() -> None:
    assert RECORDS


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: "/".join(path.parts[-3:-1]))
def test_a_record_is_a_whole_run_on_hardware(path: Path) -> None:
    report = schema.load(path)
    assert report.evidence is Evidence.HARDWARE
    assert report.environment.suite_dirty is False
    assert {case.status for case in report.cases} == {Status.PASS}
    page = (path.parents[1] / "README.md").read_text(encoding="utf-8")
    assert report.environment.suite_commit[:7] in page
    assert report.device is not None
    assert report.device.chip in page
    row = next(line for line in page.splitlines() if line.startswith(f"| {path.parent.name} | {report.list.name} |"))
    assert f"| {len(report.cases)} | PASS {len(report.cases)}" in row
    assert (f"level `{report.level}`" in row) == (report.level is not None)
    assert {file.name for file in path.parent.iterdir()} == {"report.json", "summary.md", "junit.xml"}
    assert not re.search(r"/(home|root)/", path.read_text(encoding="utf-8"))
