"""The options of a list under pytest, which reads its command line before it looks for conftest.py."""

from __future__ import annotations

import pytest

OPTIONS = {
    "--dsa-backend": "the backend by name; default: DSA_BACKEND, else cpu",
    "--dsa-list": "the list: core-2026.11 or another release, or a family for its newest; default smoke",
    "--dsa-out": "report directory; default dsa-report-pytest",
    "--dsa-jobs": "processes that judge; default: one for each core",
    "--dsa-emulate": "the chip that the backend stands in for; the evidence is then EMULATED",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of a run."""
    group = parser.getgroup("dsa-portable")
    for name, text in OPTIONS.items():
        group.addoption(name, help=text, metavar="X")
