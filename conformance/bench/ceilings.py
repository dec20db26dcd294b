"""What the machine gives in the same run: a copy and dense matrix products, by its libraries and by the backend's own word."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsa_portable.conformance.bench.machine import Machine
from dsa_portable.conformance.bench.timing import Call, Timing, in_turn
from dsa_portable.conformance.bench.workloads import Workload

COPY = "copy"
# Where a product in the operand's own dtype could not be measured, the next wider one is the ceiling.
WIDER = {"float8_e4m3fn": "bfloat16", "bfloat16": "float32"}


@dataclass(frozen=True)
class Ceiling:
    """Bytes moved per second of the copy (read and written), or operations per second of a matrix product."""

    name: str
    rate: float

    @property
    def unit(self) -> str:
        """Of `rate`."""
        return "B/s" if self.name == COPY else "FLOP/s"


@dataclass(frozen=True)
class Bound:
    """What limits a workload here: the ceiling that it would take longest at, and the seconds it would take."""

    ceiling: Ceiling
    work: int
    seconds: float


def measure(machine: Machine) -> tuple[dict[str, Ceiling], dict[str, str]]:
    """(ceilings by name, what could not be measured and why)."""
    contenders = _of_torch(machine) if machine.has_torch else _of_numpy(machine)
    untold: dict[str, str] = {}
    try:
        contenders |= machine.backend.ceilings() if machine.backend.ceilings else {}
    except Exception as exc:  # a library that only its ceilings need is not there: nothing else is lost
        untold[f"those of backend {machine.backend.name!r}"] = f"{type(exc).__name__}: {exc}"
    found = in_turn(machine, {name: [call] for name, (call, _) in contenders.items()})
    ceilings = {
        name: Ceiling(name, contenders[name][1] / timing.seconds)
        for name, timing in found.items()
        if isinstance(timing, Timing)
    }
    return ceilings, untold | {name: f"{type(e).__name__}: {e}" for name, e in found.items() if isinstance(e, Exception)}


def bound(w: Workload, ceilings: dict[str, Ceiling]) -> Bound | None:
    """The roofline of a workload: max(bytes / copy, operations / product); None where nothing was measured."""
    product: str | None = w.dtype
    while product is not None and product not in ceilings:
        product = WIDER.get(product)
    asked = ((COPY, w.bytes_moved), (product, w.flops))
    bounds = [Bound(ceilings[name], work, work / ceilings[name].rate) for name, work in asked if name in ceilings]
    return max(bounds, key=lambda b: b.seconds, default=None)


def _of_numpy(machine: Machine) -> dict[str, tuple[Call, int]]:
    source, side = np.ones(1 << 26, np.float32), 1536
    target = np.empty_like(source)
    a, b = (machine.normal((side, side)) for _ in range(2))
    return {COPY: (lambda: np.copyto(target, source), 2 * source.nbytes), "float32": (lambda: a @ b, 2 * side**3)}


def _of_torch(machine: Machine) -> dict[str, tuple[Call, int]]:
    torch = machine.torch
    count, side = (1 << 28, 1024) if machine.is_host else (1 << 31, 8192)
    source = torch.zeros(count, dtype=torch.uint8, device=machine.device.kind)
    target = torch.empty_like(source)
    a, b = (machine.normal((side, side), "bfloat16") for _ in range(2))
    products = {COPY: (lambda: target.copy_(source), 2 * count), "bfloat16": (lambda: a @ b, 2 * side**3)}
    # On a host torch multiplies float8 one number at a time, which is nobody's ceiling.
    return products if machine.is_host else {**products, "float8_e4m3fn": (_scaled_product(torch, a, b), 2 * side**3)}


def _scaled_product(torch: Any, a: Any, b: Any) -> Callable[[], Any]:
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=a.device)
    return lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)
