"""The loop over workloads: check, time in turn with the peers, say a line, keep bench.json whole after each."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from dsa_portable.conformance.bench import bars, ceilings, curve, machine, markdown, peers, reference
from dsa_portable.conformance.bench.ceilings import Ceiling
from dsa_portable.conformance.bench.machine import Machine
from dsa_portable.conformance.bench.peers import Peer
from dsa_portable.conformance.bench.timing import Call, Timing, data_sets, in_turn
from dsa_portable.conformance.bench.workloads import TABLE, Workload, operands
from dsa_portable.conformance.report import environment
from dsa_portable.conformance.report.schema import Evidence
from dsa_portable.conformance.report.write import owned, write_texts
from dsa_portable.errors import InvalidArgument, Unsupported
from dsa_portable.operators import REQUESTS

OK, FAIL, ERROR, UNSUPPORTED = "OK", "FAIL", "ERROR", "UNSUPPORTED"
FAILED, INCOMPLETE = 1, 3
SCHEMA = "dsa-portable-bench-1"
# What there are workloads of.
WHOLE = tuple(name for name, request in REQUESTS.items() if not request.part_of)


def run(
    *,
    backend: str | None = None,
    operator: str | None = None,
    out: str | Path = "dsa-bench",
    check: bool = False,
    only: str = "",
    peers: Sequence[str] = (),
    curve: bool = False,
    say: Callable[[str], None] = lambda line: None,
    command: str = "dsa_portable.conformance.bench.run.run()",
    table: Sequence[Workload] = TABLE,
) -> int:
    """Time the workloads of `table`. Exit code: 0; 1 a FAIL or ERROR row, or a missed bar; 3 nothing was timed, or not all.

    operator, only: of this operator alone, with this in their name.  peers: names of peers; all that are installed when empty.
    check: each call at a small size against float64 first; a wrong one is FAIL and not timed; and bars.py at the end.
    curve: the cost curves too.
    Writes bench.json and bench.md into `out`, with the curves' SVGs. Raises InvalidArgument or ReportDirectoryError for what
    cannot be run as it was asked, and BackendError where there is no backend.
    """
    found = machine.find(backend)
    return _Run(found, _workloads(found, table, operator, only), Path(out), check, peers, curve, say, command).run()


def _workloads(found: Machine, table: Sequence[Workload], operator: str | None, only: str) -> list[Workload]:
    """The rows that were asked for. Raises InvalidArgument for an operator that is not there, or where no row is left."""
    if operator is not None and operator not in WHOLE:
        raise InvalidArgument(f"--op is {operator!r}, but {' or '.join(WHOLE)} is accepted; name one of them.")
    declared = [name for name in WHOLE if found.backend.capabilities(found.device).get(name)]
    if operator is not None and operator not in declared:
        raise InvalidArgument(
            f"--op is {operator}, but backend {found.backend.name!r} declares {' and '.join(declared) or 'no operator'}; "
            "name an operator that it declares, or another backend."
        )
    offered = [w.on(found) for w in table if w.operator in ([operator] if operator else declared)]
    chosen = [w for w in offered if only in w.name]
    if not chosen:
        names = "; ".join(w.name for w in offered) or "none of what the backend declares"
        raise InvalidArgument(f"--only is {only!r}, but no workload has it in its name; take a part of one of: {names}.")
    return chosen


class _Run:
    """One run: what is known of it so far is in `report`, and on the disk."""

    def __init__(
        self,
        found: Machine,
        workloads: list[Workload],
        out: Path,
        check: bool,
        peer_names: Sequence[str],
        curve: bool,
        say: Callable[[str], None],
        command: str,
    ) -> None:
        self.machine, self.workloads, self.out, self.check, self.curve, self.say = found, workloads, out, check, curve, say
        self.peers, absent = peers.chosen(peers.PEERS, found, peer_names)
        self.ceilings: dict[str, Ceiling] = {}
        self.report: dict[str, Any] = {
            "schema": SCHEMA,
            "evidence": Evidence.EMULATED.value,
            "evidence_reason": "nothing has been timed yet",
            "backend": {"name": found.backend.name, "version": found.backend.version},
            "device": {**asdict(found.device), "versions": dict(found.device.versions)},
            "environment": environment.fingerprint().model_dump(),
            "command": command,
            "started": _now(),
            "finished": "",
            "interrupted": False,
            "checked": check,
            "clocks": {"before": found.clocks(), "after": {}},
            "ceilings": {},
            "ceilings_missing": {},
            "peers_missing": absent,
            "rows": [],
            "curve": [],
            "curve_check": {},
            "bars": [],
        }

    def run(self) -> int:
        """Everything that was asked for; what an interrupt leaves is written and is INCOMPLETE."""
        with owned(self.out):
            return self._run()

    def _run(self) -> int:
        try:
            self._head()
            for w in self.workloads:
                row = self._row(w)
                self.report["rows"].append(row)
                self.say(markdown.line(row))
                self._write()
            if self.curve:
                self._curves()
        except KeyboardInterrupt:
            self.report["interrupted"] = True
        if self.check:
            self.report["bars"] = bars.judged(self.report)
            for bar in self.report["bars"]:
                self.say(markdown.bar_line(bar))
        self.report |= {"finished": _now(), "clocks": {**self.report["clocks"], "after": self.machine.clocks()}}
        self._write()
        code = self._exit_code()
        self.say(f"{self.report['evidence']}: {self.report['evidence_reason']}; {self.out / 'bench.json'}, exit code {code}")
        return code

    def _head(self) -> None:
        device = self.machine.device
        self.say(f"{self.machine.backend.name} on {device.chip} ({device.driver})")
        for name, reason in self.report["peers_missing"].items():
            self.say(f"peer {name}: not there, {reason}")
        self.ceilings, missing = ceilings.measure(self.machine)
        self.report["ceilings"] = {c.name: {"rate": c.rate, "unit": c.unit} for c in self.ceilings.values()}
        self.report["ceilings_missing"] = missing
        self.say("ceilings: " + ", ".join(f"{c.name} {markdown.rate(c.rate, c.unit)}" for c in self.ceilings.values()))
        for name, reason in missing.items():
            self.say(f"ceiling {name}: not measured, {markdown.short(reason)}")

    # --- one workload ---

    def _row(self, w: Workload) -> dict[str, Any]:
        row: dict[str, Any] = {
            "name": w.name,
            "operator": w.operator,
            "phase": w.phase,
            "heads": w.heads,
            **asdict(w.size),
            "dtype": w.dtype,
            "causal": w.causal,
            "layout": w.layout,
            "flops": w.flops,
            "bytes_moved": w.bytes_moved,
            "status": OK,
            "reason": "",
            "seconds": None,
            "rounds": [],
            "rate": None,
            "unit": None,
            "ceiling": None,
            "share": None,
            "peers": {},
            "peak_memory": None,
            "reached": False,
        }
        try:
            row |= self._measured(w)
        except Unsupported as exc:
            row |= {"status": UNSUPPORTED, "reason": str(exc)}
        except Exception as exc:  # out of memory, a kernel that does not build: one row, and the run goes on
            row |= {"status": ERROR, "reason": f"{type(exc).__name__}: {exc}"}
        gc.collect()  # a traceback would keep the operands of a failed row
        self.machine.release()
        return row

    def _measured(self, w: Workload) -> dict[str, Any]:
        fitting = [peer for peer in self.peers if w.operator in peer.operators]
        told: dict[str, dict[str, Any]] = {p.name: {"reason": reason} for p in fitting if (reason := p.refuses(w))}
        fitting = [peer for peer in fitting if peer.name not in told]
        if self.check:
            wrong = self._check(w, fitting)
            if own := wrong.pop("", ""):
                return {"status": FAIL, "reason": own}
            told |= {name: {"reason": f"wrong at a small size: {reason}"} for name, reason in wrong.items()}
            fitting = [peer for peer in fitting if peer.name not in wrong]
        calls: dict[str, list[Call]] = {"": []}
        for _ in range(data_sets(self.machine, w.bytes_moved)):
            data = operands(self.machine, w)
            calls[""].append(partial(self.machine.call, w.operator, data))
            for peer in [peer for peer in fitting if peer.name not in told]:
                try:
                    calls.setdefault(peer.name, []).append(peer.build(self.machine, w, data))
                except Exception as exc:  # a peer's own failure costs its ratio, not the row
                    told[peer.name] = {"reason": f"{type(exc).__name__}: {exc}"}
                    calls.pop(peer.name, None)
        reached = self.machine.reached_by(calls[""][0])
        peak_memory = self.machine.memory_of(calls[""][0])
        timings = in_turn(self.machine, calls, graph=w.phase == "decode")
        own_time = timings.pop("")
        if isinstance(own_time, Exception):
            raise own_time
        for name, timing in timings.items():
            told[name] = (
                {"seconds": timing.seconds, "rounds": list(timing.rounds), "ratio": timing.seconds / own_time.seconds}
                if isinstance(timing, Timing)
                else {"reason": f"{type(timing).__name__}: {timing}"}
            )
        return {
            "reached": reached,
            "peak_memory": peak_memory,
            "seconds": own_time.seconds,
            "rounds": list(own_time.rounds),
            "peers": told,
            **self._share(w, own_time.seconds),
        }

    def _share(self, w: Workload, seconds: float) -> dict[str, Any]:
        bound = ceilings.bound(w, self.ceilings)
        if bound is None:
            return {"rate": w.flops / seconds, "unit": "FLOP/s"}
        ceiling = bound.ceiling
        return {
            "rate": bound.work / seconds,
            "unit": ceiling.unit,
            "ceiling": ceiling.name,
            "share": bound.seconds / seconds,
        }

    def _check(self, w: Workload, fitting: list[Peer]) -> dict[str, str]:
        """What is wrong at the small size: by peer, and under "" the backend itself."""
        tiny = w.tiny()
        data = operands(self.machine, tiny)
        host = self.machine.fetch(data)
        own: Call = partial(self.machine.call, w.operator, data)
        wrong = {}
        for name, call in [("", own), *_built(fitting, self.machine, tiny, data)]:
            try:
                got = self.machine.backend.get(call())
            except Exception as exc:
                if not name:
                    raise
                reason = f"{type(exc).__name__}: {exc}"
            else:
                slack = reference.PEER_ATTEND_SLACK if name else reference.ATTEND_SLACK
                reason = (
                    reference.why_not_selection(got, host)
                    if w.operator == "lightning_index"
                    else reference.why_not_attention(got, reference.sparse_attend, host, slack)
                )
            if reason:
                wrong[name] = reason
        return wrong

    # --- the curves ---

    def _curves(self) -> None:
        declared = self.machine.backend.capabilities(self.machine.device)
        if missing := [name for name in WHOLE if not declared.get(name)]:
            self.report["curve_check"] = {curve.DSA: f"the backend does not declare {' and '.join(missing)}"}
            self.say(f"curve: left out, {self.report['curve_check'][curve.DSA]}")
            return
        if self.check:
            self.report["curve_check"] = wrong = curve.check(self.machine)
            for name, reason in wrong.items():
                self.say(f"curve: {name} is wrong at a small size, {markdown.short(reason)}")
            if curve.DSA in wrong:
                return
        for point in curve.points(self.machine, self.report["curve_check"]):
            self.report["curve"].append({**asdict(point), "dense": point.dense, "gain": point.gain})
            self.say(markdown.point_line(self.report["curve"][-1]))
            self._write()

    # --- what is told of it ---

    def _write(self) -> None:
        evidence, reason = self._evidence()
        self.report |= {"evidence": evidence.value, "evidence_reason": reason}
        texts = {"bench.md": markdown.text(self.report), **markdown.plots(self.report)}
        write_texts(self.out, {**texts, "bench.json": json.dumps(self.report, indent=1, ensure_ascii=False) + "\n"})

    def _evidence(self) -> tuple[Evidence, str]:
        """By the rules of the conformance runner."""
        device, timed = self.machine.device, [row for row in self.report["rows"] if row["status"] == OK]
        if {device.chip, device.driver} & {"", "unknown"}:
            return Evidence.EMULATED, "the backend's probe does not name chip and driver"
        if not timed:
            return Evidence.EMULATED, "no call was timed"
        if unseen := [row["name"] for row in timed if not row["reached"]]:
            return Evidence.EMULATED, f"no work was seen on the chip in {len(unseen)} of {len(timed)} rows, {unseen[0]} first"
        return Evidence.HARDWARE, "the probe named chip and driver, and every row was seen to reach the chip"

    def _exit_code(self) -> int:
        rows, wrong = self.report["rows"], self.report["curve_check"]
        if any(row["status"] in (FAIL, ERROR) for row in rows) or (self.curve and curve.DSA in wrong):
            return FAILED
        if any(curve.DSA in point["problems"] for point in self.report["curve"]):
            return FAILED
        if any(not bar["met"] and bar["measured"] is not None for bar in self.report["bars"]):
            return FAILED
        return INCOMPLETE if self.report["interrupted"] or not any(row["status"] == OK for row in rows) else 0


def _built(fitting: list[Peer], found: Machine, w: Workload, data: Any) -> Iterator[tuple[str, Call]]:
    """The peers' calls; one that cannot be built raises when it is called, as one that cannot run does."""

    def build_and_call(peer: Peer) -> Any:
        return peer.build(found, w, data)()

    for peer in fitting:
        yield peer.name, partial(build_and_call, peer)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
