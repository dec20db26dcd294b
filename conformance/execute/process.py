"""A process of ours that is asked and answers in lines of JSON; of one that crashes, hangs or ends we learn how."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import queue
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class ProcessLost(Exception):
    """The process crashed, hung, ended or ran out of memory; says which."""


class Process:
    """`python -m module *arguments` in a session of its own, called `what` in messages; `log` takes what it prints."""

    def __init__(self, what: str, module: str, *arguments: str, log: Path, environment: Mapping[str, str]) -> None:
        self.what, self.log = what, log
        # Written anew, so that a process that dies silently is not given the last words of the one before it.
        with open(log, "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(environment),
                start_new_session=True,
                text=True,
                encoding="utf-8",
            )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def ask(self, question: Mapping[str, Any]) -> None:
        """Send a question; whether it arrives, `answer` says."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()

    def answer(self, seconds: float) -> dict[str, Any]:
        """Wait for one answer. Raises ProcessLost."""
        try:
            line = self.lines.get(timeout=seconds)
        except queue.Empty:
            raise ProcessLost(f"no answer within {seconds:g} s: it hangs, or --timeout-scale is too small here") from None
        if line:
            reply: dict[str, Any] = json.loads(line)
            return reply
        code = self.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        tail = " | ".join(self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:])
        raise ProcessLost(f"{self.what} {how}" + (f"; its last words: {tail}" if tail else ""))

    def kill(self) -> None:
        """End the process and whatever it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    try:
        # Linux hands ru_maxrss on from the parent to what it starts; this figure begins with the process.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
