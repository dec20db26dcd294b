"""One run: ask the backend's process case by case, let judges look at what it left meanwhile, say how far it is, report."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from dsa_portable import registry
from dsa_portable.conformance import lists
from dsa_portable.conformance.execute import recording
from dsa_portable.conformance.execute.chip import Chip
from dsa_portable.conformance.execute.declaration import subject_of
from dsa_portable.conformance.execute.emulation import emulating
from dsa_portable.conformance.execute.process import peak_memory
from dsa_portable.conformance.execute.recording import Recording, Subject
from dsa_portable.conformance.judging.again import ask_again, outcomes_so_far
from dsa_portable.conformance.judging.process import Judges
from dsa_portable.conformance.judging.second import second_pass
from dsa_portable.conformance.report import environment, terminal, write
from dsa_portable.conformance.report.build import report_of
from dsa_portable.conformance.report.evidence import evidence_of
from dsa_portable.conformance.report.outcomes import FILE, Outcomes
from dsa_portable.conformance.report.schema import FAILING, CaseResult, Evidence, Report, Run
from dsa_portable.conformance.report.waivers import Waivers, applied
from dsa_portable.deprecated import renamed
from dsa_portable.errors import BackendError, DSAError


class UsageError(DSAError, ValueError):
    """What was asked for cannot be run as it was asked: the command line says why."""


def run(
    *,
    backend: str | None = None,
    list: str = "core",
    out: str | Path = "dsa-report",
    cases: Sequence[str] = (),
    resume: bool = False,
    jobs: int | None = None,
    timeout_scale: float = 1.0,
    emulate: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    command: str = "dsa_portable.conformance.run()",
    level: str | None = None,
    tty: bool = False,
    fail_fast: bool = False,
    once: bool = False,
    waivers: Path | None = None,
    certify: bool = False,
) -> Report:
    """Run a frozen list on a backend and write report.json, ctrf.json, junit.xml and summary.md into `out`; returns the report.

    backend: a name; else use_backend(), DSA_BACKEND, or cpu.  list: by full name (`core-2026.11`), or a family for its newest.
    cases: only these of the list, ids or patterns as in a shell (`index-*-decode-*`); the others are NOT_RUN.
    resume: go on with what an interrupted run of the same list and backend recorded in `out`; `cases` are then asked again.
    jobs: processes that judge, else one for each core.  timeout_scale: multiplies every limit.
    emulate: the chip that the backend stands in for, else DSA_EMULATE; evidence is then EMULATED.  level: was list's name.
    tty: `say` writes to a terminal, which shows colours and may be narrow.  fail_fast: stop after the first failure.
    once: do not ask what passed a second time, which earns no claim.
    waivers: a vendor's file of failures that he knows of (report/waivers.py).  certify: refuse a suite that was changed.
    Raises, before any case runs, UsageError, WaiverError, ListError, EmulationError, ResumeError, ReportDirectoryError,
    DeclarationError or BackendError.
    """
    if not isinstance(out, (str, Path)):
        raise UsageError(f"out is {out!r}, but the path of a report directory is accepted; pass one.")
    if not isinstance(timeout_scale, (int, float)) or not (timeout_scale > 0 and math.isfinite(timeout_scale)):
        raise UsageError(f"--timeout-scale is {timeout_scale!r}, but a positive number is accepted; pass one.")
    if certify and (changed := environment.fingerprint().suite_dirty) is not False:
        why = "has changes that are not committed" if changed else "is not known to be that of a commit"
        raise UsageError(f"the suite {why}, but a certificate is of one that is; run it from a release or a clean checkout.")
    excused = Waivers(waivers) if waivers is not None else None
    list = renamed("run(level=)", "run(list=)", level, list)
    frozen, requested, folder = lists.load(list), registry.requested(backend), Path(out) / write.RECORDINGS
    # Found by its name alone: a backend's own code runs in its own process, and nowhere else.
    wanted, name = frozen.matching(cases), registry.registered(requested or "cpu").name
    with emulating(emulate) as emulated, tempfile.TemporaryDirectory(prefix="dsa-portable-") as logs:
        judges = Judges(jobs, folder, keep=Path(out) / write.FAILED, logs=Path(logs), say=say)
        chip = Chip(name, folder, frozen.name, scale=timeout_scale, log=Path(logs) / "worker.log")
        with closing(judges), closing(chip):
            subject = subject_of(
                name,
                chip.hello,
                list_name=frozen.name,
                list_sha256=frozen.sha256,
                requested=requested or "",
                emulate=emulated,
                variables=environment.variables(),
            )
            again = wanted if cases else ()
            kept = recording.resume(folder, subject, frozen.cases, again) if resume else {}
            with write.owned(Path(out)):
                outcomes = outcomes_so_far(subject, folder, again, judges) if resume else Outcomes(folder)
                write.clear(Path(out), {*kept, *([Path(FILE).stem] if resume else [])})
                recording.save_subject(folder, subject)
                session = _Session(subject, wanted, kept, chip, judges, outcomes, say, tty, fail_fast, once, excused)
                say(terminal.header(session.report(command, timeout_scale), tty=tty))
                session.run()
                report = session.report(command, timeout_scale)
                # Said before it is written: a disk that is full loses no verdict.
                say(terminal.table(report, tty=tty))
                write.write(report, Path(out))
    return report


@dataclass
class _Session:
    subject: Subject
    wanted: Collection[str]
    kept: Mapping[str, Recording]
    chip: Chip
    judges: Judges
    outcomes: Outcomes
    say: Callable[[str], None]
    tty: bool = False
    fail_fast: bool = False
    once: bool = False
    waivers: Waivers | None = None
    recordings: dict[str, Recording] = field(default_factory=dict)
    rows: dict[str, CaseResult] = field(default_factory=dict)
    interrupted: bool = False
    stopped: str = ""
    passes: int = 1

    def __post_init__(self) -> None:
        self.cases, self.started = lists.load(self.subject.list_name).cases, datetime.now(timezone.utc)

    def run(self) -> None:
        """Judge what was kept and what the backend answers now, in the order of the list."""
        ids = [id for id in self.cases if id in self.kept or id in self.wanted]
        with ThreadPoolExecutor(1) as asker:
            recorded = {id: asker.submit(self._record, id) for id in ids}
            judged = {id: self.judges.submit(self.subject, recorded[id]) for id in ids}
            try:
                for id, row in judged.items():
                    self.rows[id], self.recordings[id] = self.outcomes.settled(row.result()), recorded[id].result()
                    if id not in self.kept:
                        since = datetime.now(timezone.utc) - self.started
                        done = terminal.progress(self.rows[id], len(self.rows), len(ids), since.total_seconds(), tty=self.tty)
                        self.say(done)
                    if self.fail_fast and self.rows[id].status in FAILING:
                        self.stopped = "stopped after the first failure (--fail-fast)"
                        self.chip.close()
                        asker.shutdown(cancel_futures=True)
                        break
                ask_again(self.subject, self.rows, self.chip, self.say)
                if (
                    not (self.stopped or self.once)
                    and evidence_of(self.subject, self.recordings, self.rows)[0] is Evidence.HARDWARE
                ):
                    second_pass(self.subject, self.rows, self.recordings, self.chip, self.judges.keep, self.say)
                    self.passes = 2
            except BackendError as exc:
                self.stopped = f"the backend could not be started again: {exc}"
            except KeyboardInterrupt:
                self.interrupted, self.stopped = True, "interrupted before it"
                self.say(f"interrupted; what was recorded is in {self.chip.folder}, and --resume goes on from there")
            finally:
                self.chip.close()
                asker.shutdown(wait=False, cancel_futures=True)

    def _record(self, id: str) -> Recording:
        return self.kept[id] if id in self.kept else self.chip.record(id)

    def report(self, command: str, timeout_scale: float) -> Report:
        """The report of the rows so far."""
        finished = datetime.now(timezone.utc)
        run = Run(
            command=command,
            started=self.started.isoformat(),
            finished=finished.isoformat(),
            seconds=(finished - self.started).total_seconds(),
            peak_memory_bytes={"runner": peak_memory(), "worker": self.chip.peak_memory, "judge": self.judges.peak_memory},
            interrupted=self.interrupted,
            resumed=bool(self.kept),
            passes=self.passes,
            timeout_scale=timeout_scale,
            workers_replaced=self.chip.replaced,
            waivers=self.waivers.name if self.waivers else "",
            selected=asked if (asked := len({*self.wanted, *self.kept})) < len(self.cases) else None,
        )
        why = {id: (self.stopped or "not yet run") if id in self.wanted else "not asked for" for id in self.cases}
        rows = applied(self.waivers, self.rows, finished.date())
        return report_of(self.subject, self.recordings, rows, why, run)
