"""One run: a list, a backend in a worker process, and here the judge, who sees each case's outputs only after they were hashed.

Every case's row goes to a journal at once, so that a killed run can be resumed; the report is written at the end, whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np

from dsa_portable import registry
from dsa_portable.backend import Device
from dsa_portable.conformance import arrays_file, claims, environment, lists
from dsa_portable.conformance.cases.call import Call, Outputs, drive, request_of, sha256_of
from dsa_portable.conformance.cases.catalogue import CASES, Case
from dsa_portable.conformance.hosts import triton
from dsa_portable.conformance.judge import judge_case
from dsa_portable.conformance.report import schema, terminal, write
from dsa_portable.conformance.report.schema import (
    BackendRef,
    CaseResult,
    DeviceRef,
    Evidence,
    ListRef,
    ProfileEntry,
    Report,
    Run,
    Status,
)
from dsa_portable.conformance.verdict import Verdict
from dsa_portable.errors import BackendError, DeviceUnavailable, DSAError, no_exit
from dsa_portable.profile import Profile, envelope

START_SECONDS, CASE_SECONDS = 180.0, 120.0
JOURNAL = "journal.jsonl"
# Names the chip to a backend that stands in for one; setting it is the same as --emulate.
EMULATE = "DSA_EMULATE"


class UsageError(DSAError, ValueError):
    """What was asked for cannot be run as it was asked: the command line or the report directory says why."""


class WorkerLost(Exception):
    """The worker crashed, hung or ran out of memory."""


class Worker:
    """A warm process around one backend; `ask` and `answer` are separate so that judging goes on while it computes."""

    def __init__(self, backend: str, scratch: Path, scale: float, log: Path) -> None:
        self.scale, self.log = scale, log
        # glibc then hands freed buffers out again instead of fresh zeroed pages, which would hide what was never written.
        reuse = {"MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TRIM_THRESHOLD_": str(1 << 28)}
        # Written anew, so that a process that dies silently is not given the last words of the one before it.
        with open(log, "wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dsa_portable.conformance.worker", backend, str(scratch)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**reuse, **os.environ, registry.VARIABLE: backend},
                start_new_session=True,
                text=True,
                encoding="utf-8",
            )
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self.hello = self.answer(START_SECONDS)
        except BaseException:  # Ctrl-C too: the process is in a session of its own, where no terminal reaches it
            self.kill()
            raise

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def ask(self, case_id: str) -> None:
        """Start a case."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"case": case_id}) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # It is gone already; `answer` says how.

    def answer(self, seconds: float) -> dict[str, Any]:
        """Wait for one answer. Raises WorkerLost, with how."""
        try:
            line = self.lines.get(timeout=seconds * self.scale)
        except queue.Empty:
            raise WorkerLost(
                f"no answer within {seconds * self.scale:g} s: it hangs, or --timeout-scale is too small here"
            ) from None
        if line:
            reply: dict[str, Any] = json.loads(line)
            return reply
        code = self.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        tail = " | ".join(self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:])
        raise WorkerLost(f"the backend's process {how}" + (f"; its last words: {tail}" if tail else ""))

    def kill(self) -> None:
        """End the process and whatever it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def run(
    *,
    backend: str | None = None,
    level: str = "core",
    out: str | Path = "dsa-report",
    cases: Sequence[str] = (),
    resume: bool = False,
    timeout_scale: float = 1.0,
    emulate: str | None = None,
    say: Callable[[str], None] = lambda line: None,
    command: str = "dsa_portable.conformance()",
) -> Report:
    """Run a frozen list on a backend and write report.json, junit.xml and summary.md into `out`; returns the report.

    backend: a name; else use_backend(), DSA_BACKEND, or cpu.  cases: only these of the list, ids or patterns as in a shell
        (`index-*-decode-*`); the others are NOT_RUN.
    resume: keep the rows that an earlier, interrupted run of the same list and backend left in `out`.
    timeout_scale: multiplies every limit.  emulate: the chip that the backend stands in for, else DSA_EMULATE; evidence is
        then EMULATED.
    Raises UsageError, ListError, ReportDirectoryError or BackendError before any case runs.
    """
    emulate = emulate or os.environ.get(EMULATE) or None
    with _variable(EMULATE, emulate):
        return _Session(backend, level, Path(out), tuple(cases), resume, timeout_scale, emulate, say, command).run()


@contextlib.contextmanager
def _variable(name: str, value: str | None) -> Iterator[None]:
    """Set for one run: the backend reads it here and in the worker, and the next run of this process must not find it."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


class _Session:
    def __init__(
        self,
        backend: str | None,
        level: str,
        out: Path,
        cases: tuple[str, ...],
        resume: bool,
        scale: float,
        emulate: str | None,
        say: Callable[[str], None],
        command: str,
    ) -> None:
        if not (scale > 0 and np.isfinite(scale)):
            raise UsageError(f"--timeout-scale is {scale}, but a positive number is accepted; pass one.")
        self.frozen = lists.load(level)
        wanted = self.frozen.matching(cases)
        self.requested = registry.requested(backend)
        self.name = self.requested or "cpu"
        declaration = registry.load(self.name)
        if emulate is not None and emulate not in declaration.emulates:
            known = ", ".join(declaration.emulates) or "none"
            raise UsageError(f"backend {self.name!r} emulates {known}, but --emulate {emulate} was passed; name one of them.")
        write.prepare(out)
        self.declaration, self.out, self.wanted, self.resume = declaration, out, wanted, resume
        self.scale, self.emulate, self.say, self.command = scale, emulate, say, command
        self.rows: dict[str, CaseResult] = {}
        self.used: dict[str, dict[str, Any]] = {}
        self.reached: dict[str, bool] = {}
        self.interpreted: dict[str, bool] = {}
        self.profiles: dict[tuple[str, ...], Profile] = {}
        self.replaced, self.worker_peak, self.interrupted, self.stopped = 0, 0, False, ""
        self.started = datetime.now(timezone.utc)

    def run(self) -> Report:
        with tempfile.TemporaryDirectory(prefix="dsa-portable-") as scratch:
            self.scratch = Path(scratch)
            self.worker: Worker | None = self._start()
            try:
                self._settle(self.worker.hello)
                self._open_journal()
                self.say(terminal.header(self._heading()))
                self._run_cases()
            finally:
                if self.worker is not None:
                    self.worker.kill()
                if hasattr(self, "journal"):
                    self.journal.close()
        report = self._report()
        write.write(report, self.out)
        self.say(terminal.table(report))
        return report

    def _start(self) -> Worker:
        try:
            worker = Worker(self.name, self.scratch, self.scale, self.scratch / "worker.log")
        except WorkerLost as exc:
            raise DeviceUnavailable(f"backend {self.name!r} could not be started: {exc}.") from exc
        if "unavailable" in worker.hello:
            worker.kill()
            kinds = {kind.__name__: kind for kind in BackendError.__subclasses__()}
            raise kinds.get(worker.hello["kind"], BackendError)(worker.hello["unavailable"])
        return worker

    def _settle(self, hello: Mapping[str, Any]) -> None:
        self.hello = hello
        self.device = Device(**hello["device"])
        with no_exit(self.name):
            self.capabilities = self.declaration.capabilities(self.device)
        self._profiles()  # What is wrong with a declaration shows before the first case, not behind hours of them.

    # --- the journal ---

    def _identity(self) -> dict[str, Any]:
        return {
            "list": self.frozen.sha256,
            "backend": self.name,
            "version": self.declaration.version,
            "device": asdict(self.device),
            "suite": environment.fingerprint().suite_version,
            "emulate": self.emulate,
            "variables": environment.variables(),
        }

    def _open_journal(self) -> None:
        path, identity = self.out / JOURNAL, self._identity()
        if self.resume:
            self._read_journal(path, identity)
        else:
            write.clear(self.out)
        self.resumed = bool(self.rows)
        aside = path.with_suffix(".tmp")
        with open(aside, "w", encoding="utf-8") as file:
            for entry in (identity, *(self._entry(id) for id in self.rows)):
                file.write(json.dumps(entry) + "\n")
        os.replace(aside, path)
        self.journal = open(path, "a", encoding="utf-8")  # noqa: SIM115 - it stays open for the whole run

    def _read_journal(self, path: Path, identity: dict[str, Any]) -> None:
        if not path.is_file():
            raise UsageError(f"{self.out} holds no interrupted run, but --resume was passed; leave it out.")
        lines = path.read_text(encoding="utf-8").splitlines()
        try:
            before = json.loads(lines[0]) if lines else {}
        except json.JSONDecodeError:
            before = {}
        if different := [key for key in identity if before.get(key) != json.loads(json.dumps(identity[key]))]:
            raise UsageError(
                f"the run in {self.out} had another {', '.join(different)}; resume it as it was, or start anew elsewhere."
            )
        for line in lines[1:]:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                break  # The line that was being written when the run was killed.
            row = CaseResult(**entry["row"])
            if len(self.wanted) == len(self.frozen.cases) or row.id not in self.wanted:
                self.rows[row.id], self.used[row.id], self.reached[row.id] = row, entry["used"], entry["reached"]
                self.interpreted[row.id] = entry["interpreted"]

    def _entry(self, id: str) -> dict[str, Any]:
        seen = {"reached": self.reached[id], "interpreted": self.interpreted[id]}
        return {"row": self.rows[id].model_dump(mode="json"), "used": self.used[id], **seen}

    # --- the cases ---

    def _run_cases(self) -> None:
        todo = [id for id in self.frozen.cases if id in self.wanted and id not in self.rows]
        waiting: Callable[[], None] | None = None
        try:
            for id in todo:
                try:
                    self._ensure_worker().ask(id)
                except BackendError as exc:
                    self.stopped = f"the backend could not be started again: {exc}"
                    break
                # The last case is judged while the backend computes this one.
                if waiting is not None:
                    waiting()
                waiting = self._collect(id)
            if waiting is not None:
                waiting()
        except KeyboardInterrupt:
            self.interrupted, self.stopped = True, "interrupted before it"
            self.say(f"interrupted; the rows so far are in {self.out / JOURNAL}, and --resume goes on from there")

    def _ensure_worker(self) -> Worker:
        if self.worker is None:
            self.worker, self.replaced = self._start(), self.replaced + 1
        return self.worker

    def _collect(self, id: str) -> Callable[[], None]:
        """Wait for the case's answer and return what is left to do: judging and recording it."""
        assert self.worker is not None
        try:
            reply = self.worker.answer(CASE_SECONDS)
        except WorkerLost as exc:
            reply = {"status": "error", "reason": str(exc)}
        self.worker_peak = max(self.worker_peak, reply.get("peak_memory", 0))
        if reply["status"] == "error":
            self.worker.kill()
            self.worker = None
        return lambda: self._record(id, reply)

    def _record(self, id: str, reply: Mapping[str, Any]) -> None:
        case, outputs = CASES[id], self._outputs(id, reply)
        # The same calls as the worker made: where one takes an earlier one's results, they are the recorded ones.
        recorded = iter(outputs)
        calls = drive(case.steps(), lambda call: next(recorded, None))
        if sha256_of([call.sha256() for call in calls]) != self.frozen.cases[id]:
            raise lists.ListError(f"the inputs of {id} are not those of {self.frozen.name}; reinstall the package.")
        self.used[id] = claims.features_of(case, next(call for call in calls if call.operator == case.operator))
        self.reached[id], self.interpreted[id] = bool(reply.get("reached")), bool(reply.get("interpreted"))
        verdict = self._verdict(case, calls, outputs, reply)
        artefact = self._keep(case, calls, outputs, verdict) if verdict.status == "FAIL" else None
        self.rows[id] = self._row(case, verdict, reply, artefact)
        self.journal.write(json.dumps(self._entry(id)) + "\n")
        self.journal.flush()
        self._show(self.rows[id])

    def _outputs(self, id: str, reply: Mapping[str, Any]) -> list[Outputs]:
        paths = [self.scratch / f"{id}.{i}.npz" for i in range(reply.get("calls", 0))]
        outputs: list[Outputs] = [arrays_file.load(path) for path in paths]
        for path in paths:
            path.unlink()
        return outputs

    def _verdict(self, case: Case, calls: Sequence[Call], outputs: Sequence[Outputs], reply: Mapping[str, Any]) -> Verdict:
        missing = claims.undeclared(case, calls, self.capabilities)
        if reply["status"] == "error":
            return Verdict("ERROR", reply["reason"])
        if reply["status"] == "unsupported":
            if missing is None or reply["capability"] != missing[0].name:
                return Verdict.failed("capability", f"refused without having declared it: {reply['reason']}")
            return Verdict("UNSUPPORTED", f"as declared: '{missing[0].name}' = {missing[1]} is not offered")
        if missing is not None and not missing[0].in_call:
            return Verdict("UNSUPPORTED", f"as declared: '{missing[0].name}' is not offered")
        if missing is not None:
            return Verdict.failed("capability", f"answered although '{missing[0].name}' is not declared")
        if reply["status"] == "malformed":
            return Verdict.failed("result", f"the call returned {reply['reason']}")
        if reply["inputs_sha256"] != self.frozen.cases[case.id]:
            return Verdict("ERROR", "the worker's process made other inputs than the list has")
        if reply["changed_inputs"]:
            return Verdict.failed("inputs", f"the call wrote to its inputs: {', '.join(reply['changed_inputs'])}")
        profiles = {call.operator: self._profile(call.operator, request_of(call).format, case.phase) for call in calls}
        with np.errstate(invalid="ignore"):
            return judge_case(case, calls, outputs, profiles)

    def _keep(self, case: Case, calls: Sequence[Call], outputs: Sequence[Outputs], verdict: Verdict) -> str | None:
        """The failed case's inputs, outputs, and the truth and bound of the row that broke a rule, as one .npz."""
        stored: dict[str, Any] = {}
        for i, call in enumerate(calls):
            step = "" if len(calls) == 1 else f"{i}."
            stored |= {f"{step}inputs.{name}": array for name, array in call.arrays.items()}
            stored |= {f"{step}batch.{name}": array for name, array in call.batch.items()}
            stored |= {f"{step}outputs.{name}": array for name, array in (outputs[i] if i < len(outputs) else {}).items()}
        stored |= {f"judged.{name}": np.asarray(array) for name, array in verdict.arrays.items()}
        folder = self.out / write.FAILED
        try:
            folder.mkdir(exist_ok=True)
            arrays_file.save(folder / f"{case.id}.npz", stored, compress=True)
        except OSError as exc:
            self.say(f"the arrays of {case.id} could not be kept: {exc}")
            return None
        return f"{write.FAILED}/{case.id}.npz"

    def _row(self, case: Case, verdict: Verdict, reply: Mapping[str, Any], artefact: str | None) -> CaseResult:
        return CaseResult(
            id=case.id,
            operator=case.operator,
            format=case.format,
            phase=case.phase,
            claim_required=claims.required(case, self.used.get(case.id, {}), self.capabilities),
            hazards=list(case.hazards),
            why=case.why,
            status=Status(verdict.status),
            rule=verdict.rule,
            reason=verdict.reason,
            metrics=verdict.metrics,
            selective_rows=verdict.selective_rows,
            vacuous_rows=verdict.vacuous_rows,
            seconds=reply.get("seconds"),
            inputs_sha256=self.frozen.cases[case.id],
            outputs_sha256=reply.get("outputs_sha256"),
            artefact=artefact,
            reproducer=self._reproducer(case.id),
        )

    def _reproducer(self, id: str) -> str:
        emulate = f" --emulate {shlex.quote(self.emulate)}" if self.emulate else ""
        return f"DSA_BACKEND={shlex.quote(self.name)} dsa-portable conformance --level {self.frozen.level} --case {id}{emulate}"

    def _show(self, row: CaseResult) -> None:
        done = f"[{len(self.rows):>{len(str(len(self.wanted)))}}/{len(self.wanted)}]"
        seconds = "" if row.seconds is None else f"{row.seconds:8.3f} s"
        self.say(f"{done} {row.status!s:11} {row.id:46}{seconds}{'  ' + terminal.one_line(row.reason) if row.reason else ''}")

    # --- the report ---

    def _evidence(self) -> tuple[Evidence, str]:
        """Set here, from the run, never by the backend."""
        if triton.requested():
            return Evidence.SIMULATED, "TRITON_INTERPRET is set: kernels ran in Triton's interpreter on the host"
        if inside := [id for id, interpreted in self.interpreted.items() if interpreted]:
            return Evidence.SIMULATED, f"the backend switched Triton's interpreter on, seen in {inside[0]} first"
        if self.emulate is not None:
            return Evidence.EMULATED, f"--emulate {self.emulate}"
        if {self.device.chip, self.device.driver} & {"", "unknown"}:
            return Evidence.EMULATED, "the backend's probe does not name chip and driver"
        # A call that was refused has no duration: it never went to the chip, and says nothing about those that did.
        executed = [id for id, row in self.rows.items() if row.status in (Status.PASS, Status.FAIL) and row.seconds is not None]
        unreached = [id for id in executed if not self.reached[id]]
        if not executed:
            return Evidence.EMULATED, "no call has reached the chip"
        if unreached:
            return (
                Evidence.EMULATED,
                f"no work was seen on the chip in {len(unreached)} of {len(executed)} cases, {unreached[0]} first",
            )
        return Evidence.HARDWARE, "the probe named chip and driver, and every call was seen to reach the chip"

    def _backend_ref(self) -> BackendRef:
        b = self.declaration
        return BackendRef(
            name=b.name,
            version=b.version,
            requested=self.requested or "",
            resolved=self.hello["resolved"],
            arrays=b.arrays,
            contract=b.contract,
        )

    def _device_ref(self) -> DeviceRef:
        return DeviceRef(**{**asdict(self.device), "versions": dict(self.device.versions)})

    def _heading(self) -> Any:
        evidence, reason = self._evidence()
        if not self.rows and evidence is Evidence.EMULATED and self.emulate is None:
            reason = "so far: the run has yet to show that its calls reach the chip"
        executed = schema.executed(self.rows.values())
        ref = ListRef(name=self.frozen.name, sha256=self.frozen.sha256, cases=len(self.frozen.cases), executed=executed)
        return SimpleNamespace(
            backend=self._backend_ref(),
            list=ref,
            device=self._device_ref(),
            evidence=evidence,
            evidence_reason=reason,
            emulates=self.emulate,
        )

    def _profile(self, *key: str) -> Profile:
        """Of an operator, format and phase: asked once, so that the one that judges is the one that is reported."""
        if key not in self.profiles:
            with no_exit(self.name):
                self.profiles[key] = self.declaration.profile(self.device, *key)
        return self.profiles[key]

    def _profiles(self) -> list[ProfileEntry]:
        """One for each claim: a declared format with a phase that the list has cases of."""
        found: dict[tuple[str, str, str], ProfileEntry] = {}
        for case in (CASES[id] for id in self.frozen.cases):
            key = (case.operator, case.format, case.phase)
            if key not in found and case.format in self.capabilities.get(case.operator, {}).get("format", ()):
                profile = self._profile(*key)
                sources = self.declaration.profile_sources
                found[key] = ProfileEntry(
                    operator=key[0],
                    format=key[1],
                    phase=key[2],
                    envelope=envelope(case.operator, profile),
                    profile=asdict(profile),
                    sources=dict(sources(self.device, *key)) if sources else {},
                )
        return list(found.values())

    def _report(self) -> Report:
        for id in self.frozen.cases:
            if id not in self.rows:
                reason = self.stopped if id in self.wanted else "not asked for"
                self.rows[id] = self._row(CASES[id], Verdict("NOT_RUN", reason), {}, None)
        rows = [self.rows[id] for id in self.frozen.cases]
        evidence, reason = self._evidence()
        profiles = self._profiles()
        earned = claims.claims(rows, self.used, self.capabilities, profiles, evidence, self.frozen)
        level = claims.level(earned, rows, self.frozen)
        finished = datetime.now(timezone.utc)
        return Report(
            backend=self._backend_ref(),
            evidence=evidence,
            evidence_reason=reason,
            emulates=self.emulate,
            level=level,
            list=ListRef(name=self.frozen.name, sha256=self.frozen.sha256, cases=len(rows), executed=schema.executed(rows)),
            claims=earned,
            cases=rows,
            counts=schema.tally(rows),
            profiles=profiles,
            device=self._device_ref(),
            environment=environment.fingerprint(),
            run=Run(
                command=self.command,
                started=self.started.isoformat(),
                finished=finished.isoformat(),
                seconds=(finished - self.started).total_seconds(),
                peak_memory_bytes={"runner": environment.peak_memory(), "worker": self.worker_peak},
                interrupted=self.interrupted,
                resumed=self.resumed,
                timeout_scale=self.scale,
                workers_replaced=self.replaced,
            ),
            exit_code=cast(Literal[0, 1, 3], schema.exit_code_of(rows)),
            verdict=schema.verdict_of(rows, list_name=self.frozen.name, evidence=evidence, chip=self.device.chip, level=level),
        )
