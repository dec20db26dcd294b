"""The fingerprint of where a run took place; every field is there, and what cannot be known says "unknown"."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import dsa_portable
from dsa_portable.conformance.report.schema import Environment

PACKAGES = ("numpy", "ml_dtypes", "onnxruntime", "torch", "torch_npu", "triton", "pydantic")
VARIABLES = ("TRITON_INTERPRET", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def variables() -> dict[str, str]:
    """Every DSA_* variable, so that a typing error shows, and those that change what runs."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("DSA_") or name in VARIABLES}


def fingerprint() -> Environment:
    """Of this process's machine and installation."""
    commit, dirty = _commit()
    return Environment(
        suite_version=dsa_portable.__version__,
        suite_commit=commit,
        suite_dirty=dirty,
        python=platform.python_version(),
        platform=platform.platform(),
        cpu=_cpu(),
        cores=os.cpu_count() or 0,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0,
        container=_container(),
        packages={name: found for name in PACKAGES if (found := _version(name))},
        variables=variables(),
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine() or "unknown"
    )


def _container() -> str:
    marks = {"/.dockerenv": "docker", "/run/.containerenv": "podman"}
    named = os.environ.get("container")  # noqa: SIM112 - systemd-nspawn, LXC and podman set it in lower case
    return next((name for path, name in marks.items() if Path(path).exists()), named or "unknown")


def _commit() -> tuple[str, bool | None]:
    """Of the checkout this file lies in, or the one that its wheel was built from (setup.py)."""
    folder = Path(__file__).resolve().parents[2]
    built_from = Path(__file__).parents[1] / "commit.json"
    if built_from.exists():
        carried = json.loads(built_from.read_text(encoding="utf-8"))
        return carried["commit"], carried["dirty"]
    if not (folder / ".git").exists():
        return "unknown", None
    try:
        commit = subprocess.run(
            ["git", "-C", folder, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        status = subprocess.run(
            ["git", "-C", folder, "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown", None
    return commit.stdout.strip() or "unknown", bool(status.stdout.strip())
