"""A list under pytest: the same run and report, a test for each case, and only what was selected."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from dsa_portable.conformance import lists
from dsa_portable.conformance.report import schema
from tests import plugins

SOURCE = """
FEW = {o: {n: v for n, v in f.items() if n != "topk_length"} for o, f in CPU.capabilities(None).items()}

def index(request):
    return np.zeros(*request.results["indices"][::-1])

attend = sparse_attend
"""


def pytest_run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-rA", "--pyargs", "dsa_portable.conformance", *arguments]
    return subprocess.run(command, cwd=folder, env=plugins.environment(folder), capture_output=True, text=True, timeout=120)


def test_each_case_is_a_test(tmp_path: Path) -> None:
    plugins.module(tmp_path, "mixed", "operators=OURS, capabilities=lambda device: FEW", SOURCE)
    chosen = "index-e4m3-f32-f32-decode-out or attend-bf16-decode-out or attend-bf16-prefill-topk-length"
    done = pytest_run(tmp_path, "--dsa-backend=mixed", "--dsa-out=out", "--dsa-jobs=1", "-k", chosen)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "PASSED " in done.stdout
    assert "SKIPPED " in done.stdout
    assert "UNSUPPORTED: as declared: 'topk_length' = True is not offered" in done.stdout
    assert "FAILED " in done.stdout
    assert "FAIL row 0 (row sees positions [0, 3000)): " in done.stdout
    assert f"1 failed, 1 passed, 1 skipped, {len(lists.load('smoke').cases) - 3} deselected" in done.stdout
    report = schema.load(tmp_path / "out" / "report.json")
    assert report.verdict in done.stdout.splitlines()
    assert report.list.executed == 2


def test_a_mistake_is_one_sentence(tmp_path: Path) -> None:
    done = pytest_run(tmp_path, "--dsa-backend=cqu", "-k", "decode-out")
    assert done.returncode == 4
    assert "dsa-portable: backend 'cqu' is not registered, but " in done.stdout
    done = pytest_run(tmp_path, "--dsa-list=cor")
    assert done.returncode == 2
    assert "list 'cor' was never released, but smoke-2026.11" in done.stdout
