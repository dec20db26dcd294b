"""Time, so that two numbers may be compared: cold caches, the device's own clock, and all contenders in turn."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, TypeAlias

from dsa_portable.conformance.bench.machine import Machine

Call: TypeAlias = Callable[[], Any]
ROUNDS = 5
# Of one contender in one round: enough for a median, short enough for clocks to be the same for all of a round.
SECONDS, REPEATS = 0.1, 20
SETTLE = 0.05
# About 2 ms of a GPU's clock.
LEAD_CYCLES = 4_000_000
# Data sets take turns until all of them together are twice the cache, within what memory and patience allow.
MOST_SETS = 48


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of each round, and their median."""

    rounds: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """The median of the rounds' medians."""
        return statistics.median(self.rounds)


@dataclass(frozen=True)
class _Prepared:
    """Something to run: a graph that holds every call, or the calls one after the other."""

    run: Call
    calls: int
    repeats: int


def data_sets(machine: Machine, bytes_moved: int) -> int:
    """How many data sets a call needs for none of them to be found in the cache when its turn comes again."""
    if machine.is_host:
        return 2
    return min(MOST_SETS, max(2, -(-2 * machine.cache_bytes() // bytes_moved)))


def in_turn(
    machine: Machine, contenders: Mapping[str, Sequence[Call]], *, graph: bool = False
) -> dict[str, Timing | Exception]:
    """Five rounds in which every contender has its turn, so that a drift of the clocks hits all alike.

    contenders: name -> calls that do the same with other data.  graph: all calls of one contender in one CUDA graph, as decode
    runs in servers; elsewhere, and without, calls take turns. A contender that raises has the exception in its place.
    """
    found: dict[str, Timing | Exception] = {}
    prepared: dict[str, _Prepared] = {}
    rounds: dict[str, list[float]] = {name: [] for name in contenders}
    seconds = _stopwatch(machine)
    pool = machine.torch.cuda.graph_pool_handle() if graph and machine.device.kind == "cuda" else None
    for name, calls in contenders.items():
        try:
            prepared[name] = _prepare(machine, calls, pool, seconds)
        except Exception as exc:  # one contender's own failure, whatever it is, must not cost the others their turn
            found[name] = exc.with_traceback(None)  # its frames would keep gigabytes until the others are done
    for _ in range(ROUNDS):
        for name, ready in prepared.items():
            if name in found:
                continue
            if machine.is_host:  # threads of the contender before may still spin, and would take the cores of this one
                time.sleep(SETTLE)
            try:
                times = [seconds(ready.run) for _ in range(ready.repeats)]
            except Exception as exc:
                found[name] = exc.with_traceback(None)
            else:
                rounds[name].append(statistics.median(times) / ready.calls)
    prepared.clear()
    gc.collect()  # graphs hold their memory until they are collected
    machine.release()
    return {name: found.get(name) or Timing(tuple(rounds[name])) for name in contenders}


def _prepare(machine: Machine, calls: Sequence[Call], pool: Any, seconds: Callable[[Call], float]) -> _Prepared:
    for call in calls:  # compiles, and fills what a capture may not allocate
        call()
    machine.backend.synchronize()
    if pool is not None:
        run, count = _captured(machine.torch, calls, pool), len(calls)
    else:
        turns = cycle(calls)
        run, count = lambda: next(turns)(), 1
    return _Prepared(run, count, min(REPEATS, max(1, int(SECONDS / max(seconds(run), 1e-9)))))


def _captured(torch: Any, calls: Sequence[Call], pool: Any) -> Call:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for call in calls:
            call()
    replay: Call = graph.replay
    return replay


def _stopwatch(machine: Machine) -> Callable[[Call], float]:
    return _device_seconds(machine.torch) if machine.device.kind == "cuda" else _host_seconds(machine)


def _device_seconds(torch: Any) -> Callable[[Call], float]:
    def seconds(call: Call) -> float:
        # The device waits until the host has submitted the call: else launches of small calls would be timed, not their work.
        torch.cuda._sleep(LEAD_CYCLES)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return seconds


def _host_seconds(machine: Machine) -> Callable[[Call], float]:
    def seconds(call: Call) -> float:
        machine.backend.synchronize()
        begin = time.perf_counter()
        call()
        machine.backend.synchronize()
        return time.perf_counter() - begin

    return seconds
