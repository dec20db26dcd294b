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
    return bool(_cuda().is_initialized() and _cuda().is_current_stream_capturing())


@cache
def _cuda() -> Any:
    return import_module("torch").cuda


@cache
def _runtime() -> tuple[Any, Any]:
    return import_module("triton").knobs.runtime, import_module("triton.runtime.driver").driver


def _current_device() -> int:
    return int(_cuda().current_device()) if _cuda().is_initialized() else -1


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


# Programs by all that Triton specialises one for. Triton's own look-up costs more than the launch.
_programs: dict[Any, Any] = {}


def _kind(value: Any) -> Any:
    """What Triton makes of an argument: a dtype and whether 16 divides the address, or what it may assume of a number."""
    if value is None or isinstance(value, float):
        return type(value)
    if isinstance(value, int):
        return value == 1, value % 16 == 0, -(1 << 31) <= value < 1 << 31
    return value.dtype, value.data_ptr() % 16 == 0


def _submit(program: Any, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
    """As Triton's own launch of a program that it found, with its hooks where there are any."""
    runtime, driver = _runtime()
    stream = driver.active.get_current_stream(_current_device())
    # A chain of no hooks would be called all the same.
    hooks = [hook if getattr(hook, "calls", hook) else None for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook)]
    metadata = program.launch_metadata(grid, stream, *arguments) if any(hooks) else None
    x, y, z = (*grid, 1, 1)[:3]
    program.run(x, y, z, stream, program.function, program.packed_metadata, metadata, *hooks, *arguments)


def launch(kernel: Any, grid: tuple[int, ...], configuration: Launch, *arguments: Any, **constants: Any) -> None:
    """Run a kernel over the grid on the current device; `constants` join the configuration's block sizes."""
    constants |= configuration.blocks
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launches.append(Launched(kernel, arguments, constants, configuration))
        return
    shape = configuration.num_warps, configuration.num_stages
    key = (id(kernel), _current_device(), *shape, *constants.values(), *map(_kind, arguments))
    program = _programs.get(key)
    if program is not None:
        _submit(program, grid, (*arguments, *(constants[name] for name in kernel.arg_names[len(arguments) :])))
        return
    if capturing():
        _forbid_compiling_in_capture()
    try:
        # None from the interpreter.
        program = kernel[grid](*arguments, **constants, num_warps=shape[0], num_stages=shape[1])
    except OSError as exc:
        # The only files of a launch are the compiler's.
        raise DeviceUnavailable(
            f"Triton could not compile or keep a kernel ({exc}); set TRITON_CACHE_DIR to a folder that can be written."
        ) from exc
    _programs[key] = program


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
