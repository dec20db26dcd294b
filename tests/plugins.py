"""Out-of-tree backends as anybody would ship them, packages with an entry point in a folder on PYTHONPATH; and the command."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from dsa_portable import registry
from dsa_portable.conformance.report import schema
from dsa_portable.conformance.selftest.plant import FileEdit, plant

SCRIPTS = sysconfig.get_path("scripts")
COMMAND = str(Path(SCRIPTS) / "dsa-portable")

# A small plug-in borrows everything from the CPU backend but what `changes` says.
MODULE = """
import os, signal, sys, time
from dataclasses import replace
from pathlib import Path
import ml_dtypes
import numpy as np
from dsa_portable.backend import Device
from dsa_portable.backends.cpu import BACKEND as CPU
from dsa_portable.backends.cpu.lightning_index import lightning_index
from dsa_portable.backends.cpu.sparse_attend import sparse_attend
from dsa_portable.errors import DeviceUnavailable, Unsupported

OURS = {{"lightning_index": "{package}:index", "sparse_attend": "{package}:attend"}}
{source}
BACKEND = replace(CPU, name="{name}", {changes})
"""


def register(folder: Path, name: str, package: str) -> None:
    """What an installer leaves behind for a package whose entry point `name` is its BACKEND."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{name} = {package}:BACKEND\n")


def module(folder: Path, name: str, changes: str = "", source: str = "") -> None:
    """Install a one-file backend: the CPU backend's declaration with `changes` (keywords of Backend) and `source` before it."""
    package = f"{name}_backend"
    register(folder, name, package)
    (folder / f"{package}.py").write_text(MODULE.format(package=package, name=name, changes=changes, source=source))


def copy_of_cpu(folder: Path, name: str, *changes: FileEdit) -> None:
    """Install a copy of the CPU backend with texts replaced; raises PlantError for a text that does not stand there once."""
    package = f"{name}_backend"
    plant("dsa_portable.backends.cpu", folder, package, ("__init__.py", 'name="cpu"', f'name="{name}"'), *changes)
    register(folder, name, package)


def environment(folder: Path, **variables: str) -> dict[str, str]:
    """This process's environment with the plug-ins of `folder` and its scratch there, without what would change a run."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("DSA_", "TRITON_"))}
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    # ONNX Runtime would leave a file in TMPDIR and call home; BLAS threads of two processes would wait for each other.
    ours |= {"ORT_DISABLE_TELEMETRY": "1", "OPENBLAS_NUM_THREADS": "1"}
    # The engine that a plain installation has, and whose files the planted faults are edits of.
    ours |= {"DSA_CPU_ENGINE": "onnx"}
    return {**ours, "PYTHONPATH": os.pathsep.join(path), "TMPDIR": str(folder), **variables}


def dsa_portable(folder: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the installed command in `folder`, with its plug-ins."""
    command = [COMMAND, *map(str, arguments)]
    env = environment(folder, **variables)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def conformance(
    folder: Path,
    out: str,
    *arguments: object,
    cases: Sequence[str] = (),
    list: str = "smoke",
    twice: bool = False,
    **variables: str,
) -> tuple[subprocess.CompletedProcess[str], schema.Report]:
    """One run, with its report; the exit code is the report's and no file is left half-written.

    twice: what passed is asked again, which takes another second or two.
    """
    chosen = [*(() if twice else ("--once",)), *(word for case in cases for word in ("--case", case))]
    done = dsa_portable(folder, "conformance", "--list", list, "--out", out, *chosen, *arguments, **variables)
    assert (folder / out / "report.json").exists(), done.stdout + done.stderr
    report = schema.load(folder / out / "report.json")
    assert done.returncode == report.exit_code, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not [*(folder / out).rglob("*.tmp")]
    return done, report


def listen() -> None:
    """In a new process: be interruptible. A shell's background jobs ignore SIGINT, and their children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupt(
    folder: Path, how: signal.Signals, line: str, *arguments: object, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the command, send it a signal at the first line that `line` is found in, and wait for its end."""
    process = subprocess.Popen(
        [COMMAND, *map(str, arguments)],
        cwd=folder,
        env=environment(folder, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen,
    )
    assert process.stdout is not None
    seen = []
    try:
        for text in process.stdout:
            seen.append(text)
            if re.search(line, text):
                process.send_signal(how)
                break
        rest, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, "".join(seen) + rest, errors)
