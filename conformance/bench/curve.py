"""What a longer context costs: one decode step and one chunk of prefill, sparse with its index against dense attention."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

from dsa_portable.conformance.bench import reference
from dsa_portable.conformance.bench.machine import Machine, Operands
from dsa_portable.conformance.bench.peers import DENSE, chosen
from dsa_portable.conformance.bench.timing import Call, Timing, data_sets, in_turn
from dsa_portable.conformance.bench.workloads import Size, Workload, attend_operands, operands

DSA, INDEX = "DSA", "lightning_index alone"


@dataclass(frozen=True)
class Curve:
    """One plot: rows at the end of each request's context. `small` is what a host's processor gets."""

    name: str
    requests: int
    rows_each: int
    topk: int
    contexts: tuple[int, ...]
    heads: int = 128

    def workloads(self, keys: int) -> tuple[Workload, Workload]:
        """(lightning_index, sparse_attend) at this context length."""
        size = Size(self.requests * self.rows_each, keys, min(self.topk, keys), self.requests)
        index = Workload("lightning_index", 64, size, size, "float8_e4m3fn", causal=True)
        return index, Workload("sparse_attend", self.heads, size, size, "bfloat16")


CURVES = (
    Curve("decode step of 32 requests", 32, 1, 2048, tuple(1024 << i for i in range(1, 8))),
    Curve("prefill chunk of 1024 rows", 1, 1024, 2048, tuple(1024 << i for i in range(1, 8))),
)
SMALL = (
    Curve("decode step of 1 request", 1, 1, 2048, tuple(1024 << i for i in range(1, 8))),
    Curve("prefill chunk of 8 rows", 1, 8, 2048, tuple(1024 << i for i in range(1, 8))),
)


@dataclass(frozen=True)
class Point:
    """One context length: seconds by contender, and the reasons of those that have none."""

    curve: str
    keys: int
    seconds: dict[str, float]
    problems: dict[str, str]

    @property
    def dense(self) -> str | None:
        """The fastest dense contender."""
        names = [name for name in self.seconds if name not in (DSA, INDEX)]
        return min(names, key=self.seconds.__getitem__, default=None)

    @property
    def gain(self) -> float | None:
        """How many times longer the fastest dense attention takes than DSA."""
        return self.seconds[self.dense] / self.seconds[DSA] if self.dense and DSA in self.seconds else None


def points(machine: Machine, without: Container[str] = ()) -> Iterator[Point]:
    """Every point of both curves, as it is measured, of all contenders but those named in `without`."""
    for curve in SMALL if machine.is_host else CURVES:
        for keys in curve.contexts:
            yield _measured(machine, curve, keys, without)


def check(machine: Machine) -> dict[str, str]:
    """What is wrong with a contender, by name: where as many are selected as are visible, all compute dense attention."""
    wrong: dict[str, str] = {}
    for curve in (Curve("", 2, 1, 256, (256,)), Curve("", 1, 32, 256, (256,))):
        index, attend = curve.workloads(256)
        queries, data = operands(machine, index), attend_operands(machine, attend)
        host = machine.fetch(data)
        for name, call in _contenders(machine, attend, queries, data, wrong, ()).items():
            if name == INDEX:
                continue
            try:
                slack = reference.ATTEND_SLACK if name == DSA else reference.PEER_ATTEND_SLACK
                reason = reference.why_not_attention(machine.backend.get(call()), reference.dense_attend, host, slack)
            except Exception as exc:  # whatever a contender raises is what is wrong with it
                reason = f"{type(exc).__name__}: {exc}"
            if reason:
                wrong.setdefault(name, reason)
    return wrong


def _measured(machine: Machine, curve: Curve, keys: int, without: Container[str]) -> Point:
    index, attend = curve.workloads(keys)
    problems: dict[str, str] = {}
    calls: dict[str, list[Call]] = {}
    try:
        for _ in range(data_sets(machine, index.bytes_moved)):
            queries, data = operands(machine, index), attend_operands(machine, attend)
            for name, call in _contenders(machine, attend, queries, data, problems, without).items():
                calls.setdefault(name, []).append(call)
        timings = in_turn(machine, calls, graph=attend.phase == "decode")
    except Exception as exc:  # out of memory while operands are made: the other points are still worth having
        return Point(curve.name, keys, {}, {DSA: f"{type(exc).__name__}: {exc}"})
    problems |= {name: f"{type(t).__name__}: {t}" for name, t in timings.items() if isinstance(t, Exception)}
    seconds = {name: t.seconds for name, t in timings.items() if isinstance(t, Timing) and name not in problems}
    return Point(curve.name, keys, seconds, problems)


def _contenders(
    machine: Machine, attend: Workload, index: Operands, data: Operands, problems: dict[str, str], without: Container[str]
) -> dict[str, Call]:
    """DSA and every dense peer over the same q and kv; a peer that cannot be built goes to `problems`."""

    def dsa() -> object:
        return machine.call("sparse_attend", {**data, "indices": machine.call("lightning_index", index)})

    found: dict[str, Call] = {DSA: dsa, INDEX: lambda: machine.call("lightning_index", index)}
    for peer in chosen(DENSE, machine)[0]:
        if peer.name in without:
            continue
        try:
            found[peer.name] = peer.build(machine, attend, data)
        except Exception as exc:
            problems.setdefault(peer.name, f"{type(exc).__name__}: {exc}")
    return found
