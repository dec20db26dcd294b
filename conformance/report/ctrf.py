"""The report as ctrf.json, the Common Test Report Format (ctrf.io), one test for each case.

Dashboards show the name of the tool, of the suite, or of the environment: the evidence class stands in each of them. All of the
report but the cases is in `results.extra`, as report.json has it.
"""

from __future__ import annotations

import calendar
import json
import time
from collections import Counter
from pathlib import PurePosixPath
from typing import Any, Final

from dsa_portable.conformance.report.schema import CaseResult, Report, Status
from dsa_portable.conformance.report.text import cut, details, one_line, suite_name

SPEC_VERSION: Final = "0.0.0"
# CTRF's `pending` and `other` have no case: nothing is left waiting, and WAIVED is neither a pass nor news.
STATUSES: Final = {
    Status.PASS: "passed",
    Status.FAIL: "failed",
    Status.ERROR: "failed",
    Status.XPASS: "failed",
    Status.FLAKY: "failed",
    Status.UNSUPPORTED: "skipped",
    Status.NOT_RUN: "skipped",
    Status.WAIVED: "skipped",
}
_EXTRA = {"claim_required", "why", "rule", "features", "point", "metrics", "inputs_sha256", "outputs_sha256", "reproducer"}


def ctrf(report: Report) -> str:
    """The text of ctrf.json."""
    counts = Counter(STATUSES[case.status] for case in report.cases)
    start, stop = _milliseconds(report.run.started), _milliseconds(report.run.finished)
    chip = report.device.chip if report.device else "no device"
    summary = {
        "tests": len(report.cases),
        **{status: counts[status] for status in ("passed", "failed", "skipped", "pending", "other")},
        "suites": len({(case.operator, case.format, case.phase) for case in report.cases}),
        "start": start,
        "stop": stop,
        "duration": round(report.run.seconds * 1000),
    }
    environment = {
        "reportName": f"{report.evidence}: {report.list.name} on {report.backend.name}",
        "appName": report.backend.name,
        "appVersion": report.backend.version,
        "osPlatform": report.environment.platform,
        "testEnvironment": f"{report.evidence}: {chip}",
    }
    document = {
        "reportFormat": "CTRF",
        "specVersion": SPEC_VERSION,
        "timestamp": report.run.finished,
        "generatedBy": f"dsa-portable {report.environment.suite_version}",
        "results": {
            "tool": {"name": f"dsa-portable, {report.evidence}", "version": report.environment.suite_version},
            "summary": summary,
            "tests": [_test(report, case) for case in report.cases],
            "environment": environment,
            "extra": report.model_dump(mode="json", exclude={"cases"}),
        },
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _test(report: Report, case: CaseResult) -> dict[str, Any]:
    test: dict[str, Any] = {
        "name": case.id,
        "status": STATUSES[case.status],
        "rawStatus": case.status.value,
        "duration": round((case.seconds or 0) * 1000),
        "suite": [suite_name(report, (case.operator, case.format, case.phase))],
        "tags": case.hazards,
        "extra": case.model_dump(mode="json", include=_EXTRA),
    }
    if case.status is not Status.PASS:
        test |= {"message": one_line(f"{case.status}: {cut(case.reason)}"), "trace": details(case)}
    if case.artefact is not None:
        # An .npz is a zip file.
        kept = {"name": PurePosixPath(case.artefact).name, "contentType": "application/zip", "path": case.artefact}
        test["attachments"] = [kept]
    return test


def _milliseconds(instant: str) -> int:
    """Since 1970, of a schema.Instant; datetime.fromisoformat reads neither `Z` nor every fraction before Python 3.11."""
    whole, rest = instant[:19], instant[19:]
    fraction = rest.removesuffix("Z").removesuffix("+00:00")
    return calendar.timegm(time.strptime(whole, "%Y-%m-%dT%H:%M:%S")) * 1000 + round(float(f"0{fraction}") * 1000)
