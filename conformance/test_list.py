"""One test for each case of a list; conftest.py says how it is run."""

from __future__ import annotations

from typing import Any

import pytest


def test_case(case: str, report: Any) -> None:
    """PASS, or the reason why not; a skip where the backend does not offer what the case asks for."""
    row = next(row for row in report.cases if row.id == case)
    if row.status in ("UNSUPPORTED", "NOT_RUN"):
        pytest.skip(f"{row.status}: {row.reason}")
    assert row.status == "PASS", f"{row.status} {row.reason}\nrerun: {row.reproducer}"
