"""The suite on the CUDA backend where there is no GPU: a sample of core in the interpreter, a sample of compiled kernels."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

from dsa_portable.backends.cuda.compile import HEADER, _built
from dsa_portable.conformance.report import schema
from dsa_portable.conformance.report.schema import Evidence, Status

COMMAND = str(Path(sysconfig.get_path("scripts")) / "dsa-portable")
# Each format of attention and each operand of the index, decode and prefill, paged and flat, in few seconds each.
SAMPLE = (
    "index-e4m3-bf16-f32-decode-paged64",
    "index-int8-f16-f16-decode-h32-page64",
    "index-bf16-f32-decode-scores",
    "index-f16-f16-decode-h64-page128",
    "index-e4m3-f32-f32-prefill-planar",
    "attend-bf16-decode-paged64",
    "attend-f16-prefill-flat",
    "attend-f32-decode-lse",
    "attend-v32_fp8_656_nsr-decode-h16-page64",
    "attend-v32_fp8_656_nsr_f32-prefill-onehot",
    "attend-ascend_656_nrs_int8-decode-flat",
    "attend-ascend_656_nrs_fp8-decode-lse",
)


def run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DSA_", "TRITON_"))}
    return subprocess.run(
        [COMMAND, *arguments], cwd=folder, env={**environment, **variables}, capture_output=True, text=True, timeout=300
    )


def test_a_sample_of_core_is_simulated_and_earns_no_level(tmp_path: Path) -> None:
    chosen = [word for case in SAMPLE for word in ("--case", case)]
    done = run(tmp_path, "conformance", "--out", "out", *chosen, DSA_BACKEND="cuda", TRITON_INTERPRET="1")
    report = schema.load(tmp_path / "out" / "report.json")
    ran = {row.id: row.status for row in report.cases if row.status is not Status.NOT_RUN}
    assert ran == dict.fromkeys(SAMPLE, Status.PASS), done.stdout
    assert (report.evidence, report.level, done.returncode) == (Evidence.SIMULATED, None, 0)
    assert all(claim.level is None for claim in report.claims)
    assert "SIMULATED" in done.stdout.splitlines()[0]


def test_kernels_are_compiled_for_chips_that_are_not_there(tmp_path: Path) -> None:
    done = run(tmp_path, "compile", "--target", "sm_90,gfx942", "--only", "bfloat16")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines[0] == "evidence COMPILE-ONLY: built, 0 tests executed"
    rows = lines[lines.index(HEADER.splitlines()[-1]) + 1 :]
    assert rows
    assert all(line.startswith("| COMPILE-ONLY | ") for line in rows)
    hopper = [line for line in rows if "| sm_90 |" in line]
    assert any("m64n256k16" in line and "cp.async" in line for line in hopper), "attention is not on Hopper's tensor cores"
    assert any("| gfx942 |" in line and "v_mfma" in line for line in rows)
    assert not any("TOO MUCH" in line for line in hopper)


def test_a_chip_that_is_not_known_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "compile", "--target", "sm_99")
    assert done.returncode == 2
    assert done.stderr.startswith("dsa-portable: --target is 'sm_99', but sm_80, ")


def test_nothing_to_compile_is_no_success(tmp_path: Path) -> None:
    assert run(tmp_path, "compile", "--target", "sm_90", "--only", "no such kernel").returncode == 3


def test_a_kernel_that_does_not_compile_is_a_row_and_a_failure(tmp_path: Path) -> None:
    row = _built("sm_90", "no such configuration")
    assert row.problem.startswith("NOT COMPILED: KeyError")
