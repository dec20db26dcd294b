"""What a framework itself saw of a chip: the events that its profiler has of the device, whatever a backend says of its work.

Only torch has such a profiler. It is believed where it sees a kernel of torch's own on the device first; a driver that does not
let it look is no reason to doubt a backend, and the report then says that its word is all there is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from dsa_portable.backend import Backend

# Copies between host and chip, as CUDA and ROCm name them: what comes back from a computation on the host is no work of a chip.
COPY = re.compile(r"HtoD|DtoH|HostToDevice|DeviceToHost", re.IGNORECASE)
# Where a device's kind is no activity of its own it may have been registered as this one.
OTHER = "PrivateUse1"


@dataclass
class Counted:
    """Kernels of one call; None where nobody looked, or could."""

    kernels: int | None = None


class Profiler:
    """Counts the kernels that torch's profiler sees on devices of one kind."""

    def __init__(self, torch: Any, kind: str) -> None:
        self.torch, self.kind = torch, kind
        self.activity = self._activity()

    def _activity(self) -> Any:
        """The profiler's name of this kind of device; None where it has none, or sees no kernel of torch's own there."""
        profiler = import_module("torch.profiler")
        names = profiler.ProfilerActivity.__members__
        self.activity = names.get(self.kind.upper(), names.get(OTHER))
        if self.kind == "cpu" or self.activity not in profiler.supported_activities():
            return None
        try:
            with self.counting() as counted:
                self.torch.ones(1024, device=self.kind).add_(1).cpu()
        except Exception:  # a vendor's profiler without its libraries, as torch_npu's raises where CANN is not whole
            return None
        return self.activity if counted.kernels else None

    @contextmanager
    def counting(self) -> Iterator[Counted]:
        """What ran on the device in the block, once it has ended; the block waits for its device."""
        counted = Counted()
        if self.activity is None:
            yield counted
            return
        with import_module("torch.profiler").profile(activities=[self.activity]) as profiled:
            yield counted
        on_host = self.torch.autograd.DeviceType.CPU
        counted.kernels = sum(event.device_type != on_host and not COPY.search(event.name) for event in profiled.events())


class Unseen:
    """Of a backend whose arrays are of no framework with a profiler."""

    @contextmanager
    def counting(self) -> Iterator[Counted]:
        """Nobody looks."""
        yield Counted()


def watcher(backend: Backend, kind: str) -> Profiler | Unseen:
    """Who looks at calls of this backend on a device of this kind."""
    if backend.arrays != "torch":
        return Unseen()
    return Profiler(import_module("torch"), kind)
