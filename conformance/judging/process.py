"""A judge in a process of its own, and several of them: `python -m ... SUBJECT FOLDER KEEP` judges the recordings of a folder.

It reads a JSON line per case from stdin and answers with the row, or with what is wrong with the suite itself; the arrays of a
failure go into the folder KEEP. It loads no backend: what it knows of one stands in subject.json of the folder SUBJECT, of
which no backend's process is told.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dsa_portable.conformance.cases.catalogue import CASES
from dsa_portable.conformance.execute import arrays_file, recording, trace
from dsa_portable.conformance.execute.process import Process, ProcessLost, end_with_parent, peak_memory
from dsa_portable.conformance.execute.recording import Recording, Subject
from dsa_portable.conformance.judging.judge import examine
from dsa_portable.conformance.report.rows import row_of
from dsa_portable.conformance.report.schema import CaseResult
from dsa_portable.errors import DSAError

# A judge needs seconds for a case of core and minutes for the longest of full; one that needs more hangs.
CASE_SECONDS = 3600.0
# Judges share the cores among themselves: one thread each, for whichever library NumPy was built with.
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"), "1")


class JudgeError(DSAError, RuntimeError):
    """There can be no judges as they were asked for, or one raised: the suite is at fault, not the backend."""


class Judges:
    """`jobs` processes (else one for each core) judge the recordings of `folder`; the arrays of failures go to `keep`.

    `say` hears of what could not be kept.
    """

    def __init__(self, jobs: int | None, folder: Path, keep: Path, logs: Path, say: Callable[[str], None]) -> None:
        if jobs is not None and jobs < 1:
            raise JudgeError(f"--jobs is {jobs}, but a number of processes from 1 on is accepted; pass one, or leave it out.")
        self.folder, self.keep, self.logs, self.say = folder, keep, logs, say
        self.own, self.told = threading.local(), False
        self.processes: list[Process] = []
        self.threads = ThreadPoolExecutor(jobs or cores())
        self.peak_memory = 0

    def submit(self, subject: Subject, recorded: Future[Recording]) -> Future[CaseResult]:
        """Judge a recording as soon as it is there. The row, or what its recording raised, or JudgeError."""
        if not self.told:
            recording.save_subject(self.logs, subject)
            self.told = True
        return self.threads.submit(lambda: self._judge(subject, recorded.result()))

    def _judge(self, subject: Subject, recorded: Recording) -> CaseResult:
        process: Process = getattr(self.own, "process", None) or self._start()
        process.ask({"case": recorded.case})
        try:
            reply = process.answer(CASE_SECONDS)
        except ProcessLost as exc:
            self.own.process = None
            case, words = CASES[recorded.case], trace.last_words(process.log)
            return row_of(case, subject, status="ERROR", reason=str(exc), seconds=recorded.seconds, traceback=words)
        self.peak_memory = max(self.peak_memory, reply.get("peak_memory", 0))
        if "error" in reply:
            raise JudgeError(reply["error"])
        if reply["note"]:
            self.say(reply["note"])
        return CaseResult(**reply["row"])

    def _start(self) -> Process:
        module, log = "dsa_portable.conformance.judging.process", self.logs / f"judge{len(self.processes)}.log"
        environment, folders = {**os.environ, **ONE_THREAD}, (self.logs, self.folder, self.keep)
        process = Process("the judge's process", module, *map(str, folders), log=log, environment=environment)
        self.processes.append(process)
        self.own.process = process
        return process

    def close(self) -> None:
        """End the processes, and what they are at."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        for process in self.processes:
            process.kill()


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    """Serve cases until stdin closes."""
    end_with_parent()
    where, folder, keep = map(Path, sys.argv[1:4])
    subject = recording.load_subject(where)
    assert subject is not None
    for line in sys.stdin:
        question = json.loads(line)
        try:
            reply = _reply(question["case"], folder, keep, subject)
        except DSAError as exc:
            reply = {"error": str(exc)}
        except Exception as exc:
            print(traceback.format_exc(), file=sys.stderr)
            reply = {"error": f"the judge raised {type(exc).__name__}: {exc}"}
        print(json.dumps({**reply, "token": question["token"]}), flush=True)


def _reply(case: str, folder: Path, keep: Path, subject: Subject) -> dict[str, Any]:
    # A backend's process can have removed it since.
    found = recording.load(folder, case) or Recording(case, "error", "its recording can no longer be read")
    judged = examine(CASES[case], found, subject)
    row, note = judged.row, ""
    if judged.arrays:
        try:
            keep.mkdir(exist_ok=True)
            arrays_file.save(keep / f"{case}.npz", judged.arrays, compress=True)
            row = row.model_copy(update={"artefact": f"{keep.name}/{case}.npz"})
        except OSError as exc:
            note = f"the arrays of {case} could not be kept: {exc}"
    return {"row": row.model_dump(mode="json"), "note": note, "peak_memory": peak_memory()}


if __name__ == "__main__":
    main()
