"""The one place where kernels are launched, and where a run can be recorded instead, to be compiled without a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from dsa_portable.backends.cuda.configurations import Launch
from dsa_portable.errors import DeviceUnavailable, InvalidArgument


@dataclass(frozen=True)
class Launched:
    """One launch: the kernel, its arguments in order and its constants by name."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: Mapping[str, Any]
    configuration: Launch


@dataclass(frozen=True)
class _Recorder:
    architecture: str
    launches: list[Launched]


_recorder: ContextVar[_Recorder | None] = ContextVar("dsa_portable_cuda_recorder", default=None)


def capturing() -> bool:
    """True while the current stream is being captured into a CUDA graph."""
    cuda = import_module("torch").cuda
    return bool(cuda.is_available() and cuda.is_current_stream_capturing())


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
    """Run a kernel over the grid; `constants` join the configuration's block sizes."""
    constants |= configuration.blocks
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launches.append(Launched(kernel, arguments, constants, configuration))
        return
    if capturing():
        _forbid_compiling_in_capture()
    try:
        kernel[grid](*arguments, **constants, num_warps=configuration.num_warps, num_stages=configuration.num_stages)
    except OSError as exc:
        # The only files of a launch are the compiler's.
        raise DeviceUnavailable(
            f"Triton could not compile or keep a kernel ({exc}); set TRITON_CACHE_DIR to a folder that can be written."
        ) from exc


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
