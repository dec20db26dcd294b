"""The chip, or Triton's interpreter in its place: what it is, how it computes, and how arrays get there and back."""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import Any

import numpy as np

from dsa_portable.arrays import dtype_name, from_numpy, to_numpy
from dsa_portable.backend import Device
from dsa_portable.backends.cuda.configurations import INTERPRETER, KERNELS, asked_for, no_hopper
from dsa_portable.backends.cuda.launch import recording_for
from dsa_portable.errors import DeviceUnavailable, Unsupported
from dsa_portable.profile import Accumulator, Profile

LEAST_CAPABILITY = (8, 0)
# Hopper's accumulators as measured (tests/h100_accumulator.npz): products of a group are aligned and cut together.
_HOPPER = {"e4m3": Accumulator(bits=14, rounding="RZ", group=32), "16": Accumulator(bits=24, rounding="RZ", group=16, guard=2)}
# What NumPy has no arithmetic for, and the plain interpreter computes from its bits.
_NARROW = ("bfloat16", "float8_e4m3fn")


def interpreting() -> bool:
    """True where Triton was told to interpret its kernels on the host."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def probe() -> Device:
    """The current CUDA or HIP device, or the interpreter."""
    torch, triton = import_module("torch"), import_module("triton")
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    asked = asked_for()
    if interpreting():
        _refuse_hopper(asked, INTERPRETER, triton.__version__)
        versions["numpy"] = version("numpy")
        return Device("cpu", "Triton interpreter", f"{platform.system()} {platform.release()}", 1, INTERPRETER, versions)
    if not torch.cuda.is_available():
        raise DeviceUnavailable("torch finds no CUDA or HIP device; check the driver, or set TRITON_INTERPRET=1 to interpret.")
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    name = architecture(torch.device("cuda", torch.cuda.current_device()))
    if not _accepted(name):
        raise DeviceUnavailable(f"{found.name} is {name}, but sm_80 and later are accepted; use another GPU.")
    _refuse_hopper(asked, name, triton.__version__)
    driver = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}, driver {_driver()}"
    return Device("cuda", found.name, driver, torch.cuda.device_count(), name, versions)


def _refuse_hopper(asked: str | None, architecture: str, triton: str) -> None:
    if asked == "hopper" and (why := no_hopper(architecture, triton)):
        raise DeviceUnavailable(f"{KERNELS} is 'hopper', but {why}; unset it or set 'portable'.")


def _driver() -> str:
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as lines:
            return next(word for word in lines.readline().split() if word[0].isdigit())
    except (OSError, StopIteration):
        return "of unknown version"


def architecture(where: Any) -> str:
    """`sm_90`, `gfx942`, ... of a torch.device; `interpreter`; or the one that launches are recorded for."""
    return recording_for() or _architecture(where)


@cache
def _architecture(where: Any) -> str:
    if interpreting():
        return INTERPRETER
    torch = import_module("torch")
    found = torch.cuda.get_device_properties(where)
    return str(found.gcnArchName).partition(":")[0] if torch.version.hip else f"sm_{found.major}{found.minor}"


@cache
def multiprocessors(where: Any) -> int:
    """How many of a kernel's programs run at a time that fill one each; an H100's where launches are recorded."""
    return 132 if recording_for() else int(import_module("torch").cuda.get_device_properties(where).multi_processor_count)


def _accepted(name: str) -> bool:
    return not name.startswith("sm_") or int(name[3:]) >= 10 * LEAST_CAPABILITY[0] + LEAST_CAPABILITY[1]


def require(q: Any, operator: str) -> None:
    """Raise Unsupported where kernels would be wrong about a tensor: its device is too old, or it cannot be interpreted."""
    name = architecture(q.device)
    if not _accepted(name):
        raise Unsupported(f"{operator}: q is on {q.device}, {name}, but sm_80 and later are accepted; move it.", "architecture")
    if name == INTERPRETER and dtype_name(q) in _NARROW and not interpreter_is_repaired():
        raise Unsupported(
            f"{operator}: q is {dtype_name(q)}, whose bits Triton's interpreter takes for integers; call "
            "dsa_portable.conformance.hosts.triton.repair() first, as the conformance command does.",
            "format",
        )


def of(q: Any) -> Any:
    """A block in which the tensor's device is the current one: kernels run there, and on its current stream."""
    return import_module("torch").cuda.device_of(q)


@cache
def interpreter_is_repaired() -> bool:
    """True where a product of bfloat16 numbers is the product of the numbers."""
    return bool(import_module("dsa_portable.backends.cuda.kernels.interpreter").multiplies_numbers())


def profile(device: Device | None, operator: str, format: str, phase: str) -> Profile:
    """float32 sums but for Hopper's tensor cores, 16-bit probabilities, ties to the lowest, the same bits in every batch."""
    hopper = device is not None and device.architecture == "sm_90"
    if operator == "lightning_index":
        operand = format.partition("/")[0]
        accumulator = _HOPPER["e4m3" if operand == "e4m3" else "16"] if hopper and operand != "int8" else Accumulator()
        return Profile(accumulator=accumulator, ties="lowest", deterministic=True)
    if format == "f32":
        return Profile(ties="lowest", deterministic=True)
    sixteen, packed = "float16" if format == "f16" else "bfloat16", format not in ("bf16", "f16")
    return Profile(
        accumulator=_HOPPER["16"] if hopper else Accumulator(),
        p=sixteen,
        kv_compute=sixteen if packed else "float32",
        ties="lowest",
        deterministic=True,
    )


def put(array: np.ndarray[Any, Any]) -> Any:
    """A copy as a tensor on the current device."""
    tensor = from_numpy(np.array(array, order="C"))
    return tensor if interpreting() else tensor.cuda()


def get(array: Any) -> np.ndarray[Any, Any]:
    """A copy on the host."""
    return np.array(to_numpy(array))


def synchronize() -> None:
    """Wait for the device."""
    if not interpreting():
        import_module("torch").cuda.synchronize()


@cache
def _submitted() -> list[int]:
    """[kernels submitted since this was first called]; until then launches pay for no hook."""
    count = [0]

    def add(metadata: object) -> None:
        count[0] += 1

    import_module("triton").knobs.runtime.launch_exit_hook.add(add)
    return count


def witness() -> int:
    """Kernels submitted to the device so far; none in the interpreter, where nothing reaches a chip."""
    return 0 if interpreting() else _submitted()[0]
