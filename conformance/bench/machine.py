"""One backend on its device: arrays that live there, calls that reach it, and what is known of where a run took place."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

import dsa_portable
from dsa_portable import registry
from dsa_portable.arrays import NUMPY_DTYPES, Array
from dsa_portable.backend import Backend, Device
from dsa_portable.batch import Batch
from dsa_portable.errors import InvalidArgument

# An operator's keyword arguments.
Operands: TypeAlias = Mapping[str, Any]
# Where a device does not say how large its last cache is: larger than any.
CACHE_BYTES = 128 << 20
STAND_IN = "DSA_EMULATE"
CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.draw,power.limit,temperature.gpu"


@dataclass(frozen=True)
class Machine:
    """A backend and the device that its probe found."""

    backend: Backend
    device: Device
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    @property
    def is_host(self) -> bool:
        """True where the device is the host's own processor, which gets the small workloads."""
        return self.device.kind == "cpu"

    @property
    def has_torch(self) -> bool:
        """True where the backend's arrays are torch tensors; for others torch is not imported."""
        return self.backend.arrays == "torch"

    @property
    def torch(self) -> Any:
        """The module."""
        return import_module("torch")

    def normal(self, shape: tuple[int, ...], dtype: str = "float32") -> Array:
        """Standard normal numbers on the device; made there where torch can, as gigabytes would take minutes to cross."""
        if not self.has_torch:
            return self.backend.put(self.random.standard_normal(shape, np.float32).astype(NUMPY_DTYPES[dtype]))
        torch = self.torch
        drawn = torch.bfloat16 if dtype == "bfloat16" else torch.float32
        return torch.randn(shape, device=self.device.kind, dtype=drawn).to(getattr(torch, dtype))

    def copies(self, array: np.ndarray[Any, Any], count: int) -> Array:
        """`count` copies on the device, end to end along the first axis; they are multiplied there."""
        there = self.backend.put(array)
        return there.repeat(count, *[1] * (array.ndim - 1)) if self.has_torch else np.concatenate([there] * count)

    def place(self, batch: Batch) -> Batch:
        """The batch with its lengths on the device, where a server keeps them and a graph finds them."""
        return _mapped(batch, self.backend.put)

    def fetch(self, operands: Operands) -> dict[str, Any]:
        """The operands as NumPy arrays."""
        plain = (bool, int, float, str)
        return {
            name: _mapped(value, self.backend.get)
            if isinstance(value, Batch)
            else value
            if isinstance(value, plain)
            else self.backend.get(value)
            for name, value in operands.items()
        }

    def call(self, operator: str, operands: Operands) -> Any:
        """One call of the public operator."""
        return getattr(dsa_portable, operator)(**operands, backend=self.backend.name)

    def cache_bytes(self) -> int:
        """Size of the last cache before memory."""
        if self.device.kind != "cuda":
            return CACHE_BYTES
        return int(getattr(self.torch.cuda.get_device_properties("cuda"), "L2_cache_size", CACHE_BYTES))

    def release(self) -> None:
        """Give back what a workload has left in torch's pool, so that the next one starts with all of the memory."""
        if self.device.kind == "cuda":
            # After an illegal access every call of the driver fails, and the row that made it is still to be written.
            with suppress(RuntimeError):
                self.torch.cuda.empty_cache()

    def reached_by(self, call: Callable[[], object]) -> bool:
        """True where the backend's witness saw this call do work on the chip; False too where it has no witness."""
        witness = self.backend.witness or (lambda: 0)
        before = witness()
        call()
        self.backend.synchronize()
        return witness() > before

    def memory_of(self, call: Callable[[], object]) -> int | None:
        """Bytes by which the process, or the device's pool, grows during a call, results included; None where nobody counts."""
        if self.device.kind == "cuda":
            cuda = self.torch.cuda
            cuda.reset_peak_memory_stats()
            before = int(cuda.memory_allocated())
            call()
            return int(cuda.max_memory_allocated()) - before
        try:
            # What earlier calls have left is given back, and Linux begins to count anew where a 5 is written.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except (OSError, AttributeError):
            return None
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)

    def clocks(self) -> dict[str, str]:
        """Clocks, power and temperature as nvidia-smi tells them now; empty where there is none."""
        if self.device.kind != "cuda" or not shutil.which("nvidia-smi"):
            return {}
        uuid = getattr(self.torch.cuda.get_device_properties("cuda"), "uuid", None)
        which = [f"--id=GPU-{uuid}"] if uuid else []
        command = ["nvidia-smi", *which, f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return {}
        return dict(zip(CLOCKS.split(","), map(str.strip, said.partition("\n")[0].split(",")), strict=False))


def _status(field: str) -> int:
    """Bytes, as Linux says of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def find(name: str | None) -> Machine:
    """The machine of the backend that was named. Raises BackendError, or InvalidArgument for what has no rates to tell."""
    backend = registry.load(registry.requested(name) or "cpu")
    device = registry.device(backend.name)
    if "interpreter" in (device.architecture, device.kind) or os.environ.get(STAND_IN):
        how = f"{STAND_IN} is set" if os.environ.get(STAND_IN) else f"its device is the {device.chip}"
        raise InvalidArgument(
            f"backend {backend.name!r} is SIMULATED or EMULATED here ({how}), but a rate is of a chip; run it on one."
        )
    found = Machine(backend, device)
    if found.has_torch:
        found.torch.manual_seed(0)
    return found


def _mapped(batch: Batch, move: Any) -> Batch:
    arrays, integers = batch.flatten()
    return Batch.unflatten([None if array is None else move(array) for array in arrays], integers)
