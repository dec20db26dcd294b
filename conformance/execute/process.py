"""A process of ours that is asked and answers in lines of JSON; of one that crashes, hangs or ends we learn how.

Every question has a token, and only an answer that repeats it counts: what a backend forks, or prints, answers for nobody.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import queue
import resource
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# How often a process that is waited for is looked at: one that died while a child of its own holds its pipe is noticed so.
LOOK_SECONDS = 0.2
# What everything that a process starts inherits, and is known by when it has left the process's session.
MARK = "_DSA_PORTABLE_PROCESS"
_PR_SET_PDEATHSIG = 1


class ProcessLost(Exception):
    """The process crashed, hung, ended or ran out of memory; says which."""


def end_with_parent() -> None:
    """In a process of ours: be killed when the one that started it ends, however that ends; where the system can do it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == 1:  # it ended before that was asked for
            os._exit(1)


class Process:
    """`python -m module *arguments` in a session of its own, called `what` in messages; `log` takes what it prints."""

    def __init__(self, what: str, module: str, *arguments: str, log: Path, environment: Mapping[str, str]) -> None:
        self.what, self.log, self.mark = what, log, secrets.token_hex(8)
        self.token, self.spent = "", set[str]()
        # Written anew, so that a process that dies silently is not given the last words of the one before it.
        with open(log, "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**environment, MARK: self.mark},
                start_new_session=True,
                text=True,
                encoding="utf-8",
                errors="replace",
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
        self.spent.add(self.token)
        self.token = secrets.token_hex(8)
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps({**question, "token": self.token}) + "\n")
            self.process.stdin.flush()

    def answer(self, seconds: float) -> dict[str, Any]:
        """Wait for the answer to the last question, or before the first one for what the process says of itself.

        Raises ProcessLost.
        """
        until = time.monotonic() + seconds
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, min(LOOK_SECONDS, until - time.monotonic())))
            except queue.Empty:
                if self.process.poll() is not None and self.lines.empty():
                    raise self._ended() from None
                if time.monotonic() < until:
                    continue
                raise ProcessLost(f"no answer within {seconds:g} s: it hangs, or --timeout-scale is too small here") from None
            if not line:
                raise self._ended()
            reply = _object(line)
            if reply is not None and reply.get("token") == self.token:
                return reply
            if reply is None or reply.get("token") not in self.spent - {""}:
                raise ProcessLost(f"{self.what} answered what is no answer: {line.strip()[:200]!r}")

    def _ended(self) -> ProcessLost:
        code = self.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        tail = " | ".join(self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:])
        return ProcessLost(f"{self.what} {how}" + (f"; its last words: {tail}" if tail else ""))

    def kill(self) -> None:
        """End the process and whatever it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for child in _marked(self.mark):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(child, signal.SIGKILL)
        self.process.wait()


def _object(line: str) -> dict[str, Any] | None:
    """The JSON object of a line, None for anything else."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _marked(mark: str) -> list[int]:
    """The processes that inherited this mark, in whatever session they are; none where there is no /proc to tell."""
    wanted, found = f"{MARK}={mark}".encode(), list[int]()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    try:
        # Linux hands ru_maxrss on from the parent to what it starts; this figure begins with the process.
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
