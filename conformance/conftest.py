"""A list under pytest, a test for each case: `pytest --pyargs dsa_portable.conformance --dsa-backend=NAME`.

The selected cases (`-k`, node ids) run once, before the first test, as `dsa-portable conformance` runs them, with its report.
UNSUPPORTED is a skip; the summary ends with the verdict, which names the evidence class.
"""

from __future__ import annotations

import sys

import pytest

from dsa_portable.conformance import lists, run
from dsa_portable.errors import DSAError

VERDICT = pytest.StashKey[str]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each case of the list."""
    if "case" in metafunc.fixturenames:
        try:
            frozen = lists.load(metafunc.config.getoption("--dsa-list") or "smoke")
        except DSAError as exc:
            pytest.exit(f"dsa-portable: {exc}", returncode=pytest.ExitCode.USAGE_ERROR)
        metafunc.parametrize("case", list(frozen.cases))


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> object:
    """One run of the cases that were selected."""
    config = request.config
    backend, name, out, jobs, emulate = (config.getoption(f"--dsa-{o}") for o in ("backend", "list", "out", "jobs", "emulate"))
    calls = [getattr(item, "callspec", None) for item in request.session.items]
    chosen = [call.params["case"] for call in calls if call is not None and "case" in call.params]
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        try:
            found = run(
                backend=backend,
                list=name or "smoke",
                out=out or "dsa-report-pytest",
                cases=chosen,
                jobs=int(jobs) if jobs else None,
                emulate=emulate,
                say=lambda line: print(f"\n{line}", end="", flush=True),
                command=" ".join(sys.argv),
            )
        except (DSAError, ValueError) as exc:
            pytest.exit(f"dsa-portable: {exc}", returncode=pytest.ExitCode.USAGE_ERROR)
    config.stash[VERDICT] = found.verdict
    return found


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The verdict."""
    if verdict := terminalreporter.config.stash.get(VERDICT, ""):
        terminalreporter.section("dsa-portable")
        terminalreporter.line(verdict)
