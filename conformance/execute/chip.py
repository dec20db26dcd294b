"""A backend behind its process: asked case by case, it leaves a recording of each, whatever becomes of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsa_portable import registry
from dsa_portable.conformance.execute import recording, trace
from dsa_portable.conformance.execute.declaration import DeclarationError
from dsa_portable.conformance.execute.emulation import EmulationError
from dsa_portable.conformance.execute.process import Process, ProcessLost
from dsa_portable.conformance.execute.recording import Recording
from dsa_portable.errors import BackendError, DeviceUnavailable

START_SECONDS, CASE_SECONDS = 180.0, 120.0
WORKER = "dsa_portable.conformance.execute.worker"
# glibc then hands freed buffers out again instead of fresh zeroed pages, which would hide what was never written.
REUSE = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 28)}


class Chip:
    """Started at once; `hello` says what was found. Raises BackendError where the backend cannot be started.

    `predecessors`: for each case that was asked, the one before it in the same process; empty for the first of a process.
    `cases`: the list for whose cases the backend declares. `module`: what is run as its process, with its first arguments.
    `stale`: what its stale memory holds, an entry of worker.STALE.
    """

    def __init__(
        self,
        backend: str,
        folder: Path,
        cases: str,
        *,
        scale: float,
        log: Path,
        module: Sequence[str] = (WORKER,),
        stale: int = 0,
    ) -> None:
        self.backend, self.folder, self.cases, self.stale = backend, folder, cases, stale
        self.scale, self.log, self.module = scale, log, module
        self.replaced, self.peak_memory = 0, 0
        self.process: Process | None = None
        self.predecessors: dict[str, str] = {}
        self.last = ""  # the case that the process was asked last
        self.closed = False
        self.hello = self._start()

    def _start(self) -> Mapping[str, Any]:
        self.process = Process(
            "the backend's process",
            *self.module,
            self.backend,
            str(self.folder),
            self.cases,
            str(self.stale),
            log=self.log,
            environment={**REUSE, **os.environ, registry.VARIABLE: self.backend},
        )
        try:
            hello = self.process.answer(START_SECONDS * self.scale)
        except ProcessLost as exc:
            self.kill()
            raise DeviceUnavailable(f"backend {self.backend!r} could not be started: {exc}.") from exc
        except BaseException:  # Ctrl-C too: the process is in a session of its own, where no terminal reaches it
            self.kill()
            raise
        if "unavailable" in hello:
            self.kill()
            kinds = {kind.__name__: kind for kind in (*BackendError.__subclasses__(), DeclarationError, EmulationError)}
            raise kinds.get(str(hello.get("kind")), BackendError)(str(hello["unavailable"]))
        if not {"device", "resolved", "interpreted", "declared"} <= hello.keys():
            self.kill()
            raise DeviceUnavailable(f"backend {self.backend!r} could not be started: its process did not say what it is.")
        return hello

    def afresh(self, folder: Path, stale: int = 0) -> Chip:
        """The same backend in another process, which leaves its recordings in another folder. Raises BackendError."""
        log = self.log
        return Chip(self.backend, folder, self.cases, scale=self.scale, log=log, module=self.module, stale=stale)

    def record(self, case: str) -> Recording:
        """The case's recording, which lies in the folder too.

        Raises BackendError where a lost process cannot be replaced, ProcessLost where `close` ended it.
        """
        if self.closed:
            raise ProcessLost("it was closed")
        if self.process is None:
            self._start()
            self.replaced += 1
        assert self.process is not None
        self.predecessors[case], self.last = self.last, case
        self.process.ask({"case": case})
        try:
            self.process.answer(CASE_SECONDS * self.scale)
            found = recording.load(self.folder, case)
            if found is None:
                raise ProcessLost("it left no recording that can be read")
        except ProcessLost as exc:
            if self.closed:
                raise
            found = Recording(case, "error", str(exc), traceback=trace.last_words(self.log), folder=self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)  # a backend may have removed it
            recording.save(self.folder, found)
        self.peak_memory = max(self.peak_memory, found.peak_memory)
        if found.status == "error":
            self.kill()
        return found

    def kill(self) -> None:
        """End the process; the next case gets a fresh one."""
        if self.process is not None:
            self.process.kill()
            self.process, self.last = None, ""

    def close(self) -> None:
        """End the process for good; a case that it is at leaves no recording."""
        self.closed = True
        self.kill()
