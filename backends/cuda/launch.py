"""The one place where kernels are launched, and where a run can be recorded instead, to be compiled without a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from dsa_portable.backends.cuda.configurations import Launch
from dsa_portable.errors import DeviceUnavailable, InvalidArgument


@dataclass(frozen=True)
class Launched:
    """One launch: the kernel, its arguments in order and its constants by name."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]
    configuration: Launch


class Submitted(NamedTuple):
    """A launch that ran: Triton's program, the grid, all arguments in the order of the kernel's."""

    program: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Tape:
    """What a call launched, in order, and the scratch that it allocated."""

    submitted: list[Submitted] = field(default_factory=list)
    scratch: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class _Recorder:
    architecture: str
    launches: list[Launched]


_tape: ContextVar[Tape | None] = ContextVar("dsa_portable_cuda_tape", default=None)
_recorder: ContextVar[_Recorder | None] = ContextVar("dsa_portable_cuda_recorder", default=None)


def capturing() -> bool:
    """True while the current stream is being captured into a CUDA graph."""
    return bool(_cuda().is_initialized() and _cuda().is_current_stream_capturing())


@cache
def _cuda() -> Any:
    return import_module("torch").cuda


@cache
def _forbid_compiling_in_capture() -> None:
    """From here on a capture that would have to compile a kernel of ours is refused, as no program can be loaded there."""
    runtime = import_module("triton").knobs.runtime
    before = runtime.jit_cache_hook

    def hook(*, fn: Any, **rest: Any) -> Any:
        if str(fn.module).startswith("dsa_portable.") and capturing():
            raise InvalidArgument(
                f"kernel {fn.name} is not compiled yet, but this stream is being captured into a graph; make the same call "
                "once before the capture."
            )
        return before(fn=fn, **rest) if before else None

    runtime.jit_cache_hook = hook


def launch(kernel: Any, grid: tuple[int, ...], configuration: Launch, *arguments: Any, **constants: Any) -> None:
    """Run a kernel over the grid on the current device; `constants` join the configuration's block sizes."""
    constants |= configuration.blocks
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launches.append(Launched(kernel, arguments, constants, configuration))
        return
    if capturing():
        _forbid_compiling_in_capture()
    try:
        # Triton gives its program back; its interpreter gives None.
        program = kernel[grid](*arguments, **constants, num_warps=configuration.num_warps, num_stages=configuration.num_stages)
    except OSError as exc:
        # The only files of a launch are the compiler's.
        raise DeviceUnavailable(
            f"Triton could not compile or keep a kernel ({exc}); set TRITON_CACHE_DIR to a folder that can be written."
        ) from exc
    tape = _tape.get()
    if tape is not None:
        tape.submitted.append(
            Submitted(program, (*grid, 1, 1)[:3], (*arguments, *map(constants.get, kernel.arg_names[len(arguments) :])))
        )


def scratch(like: Any, dtype: Any, *shape: int) -> Any:
    """An array for this call alone, beside `like`."""
    array = import_module("torch").empty(shape, dtype=dtype, device=like.device)
    tape = _tape.get()
    if tape is not None:
        tape.scratch.append(array)
    return array


@contextmanager
def taped() -> Iterator[Tape]:
    """Run what is launched, and keep it."""
    tape = Tape()
    token = _tape.set(tape)
    try:
        yield tape
    finally:
        _tape.reset(token)


@contextmanager
def recorded(architecture: str) -> Iterator[list[Launched]]:
    """Record what would be launched on an architecture by calls over tensors of torch's meta device, and run nothing."""
    launches: list[Launched] = []
    token = _recorder.set(_Recorder(architecture, launches))
    try:
        yield launches
    finally:
        _recorder.reset(token)


def recording_for() -> str | None:
    """The architecture that launches are recorded for, None where they run."""
    recorder = _recorder.get()
    return recorder.architecture if recorder else None
