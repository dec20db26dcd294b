"""What the environment sets: `DSA_CPU_ENGINE`, `DSA_CPU_ISA`, `DSA_CPU_MEMORY` (bytes of scratch), `DSA_CPU_THREADS`.

`DSA_OPENVINO_DEVICE` is read where it counts, in openvino_engine.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np

from dsa_portable.backend import Device
from dsa_portable.errors import DeviceUnavailable

# ONNX Runtime reports home unless told otherwise; a library that is asked to compute must not.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

Array: TypeAlias = np.ndarray[Any, Any]
Float32: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """An engine: what it needs, and which operators it computes as a whole; the others are made of its tiles."""

    packages: tuple[str, ...] = ()  # beside NumPy
    operators: Mapping[str, str] = field(default_factory=dict)
    module: str = ""  # whose Engine gives the tiles
    arguments: tuple[str, ...] = ()  # of Engine and of facts
    facts: str = ""  # what tells more of the device, and raises DeviceUnavailable where the engine cannot run
    extra: str = ""  # what installs the packages, where the backend's own does not


_HERE = "dsa_portable.backends.cpu"
_JIT, _OPENVINO = f"{_HERE}.jit", f"{_HERE}.openvino_engine"
_OF_OPENVINO = partial(Kind, ("openvino", "onnx"), module=_OPENVINO, facts=f"{_OPENVINO}:facts", extra="openvino")
ENGINES = {
    "onnx": Kind(("onnxruntime",), module=f"{_HERE}.onnx_engine"),
    "numpy": Kind(module=f"{_HERE}.numpy_engine"),
    "jit": Kind(
        ("llvmlite",),
        {name: f"{_JIT}.lightning_index:{name}" for name in ("lightning_index", "index_scores", "index_select")}
        | {"sparse_attend": f"{_JIT}.sparse_attend:sparse_attend"},
        facts=f"{_JIT}.compile:facts",
    ),
    # Never chosen unasked. By its own default OpenVINO computes in bfloat16 where the processor does.
    "openvino": _OF_OPENVINO(arguments=("f32",)),
    "openvino-bf16": _OF_OPENVINO(arguments=("bf16",)),
}
DEFAULT_MEMORY = 1 << 30
# One tile of keys with all its head scores must fit; below this no chunking helps.
LEAST_MEMORY = 16 << 20


class Engine(Protocol):
    """The two float32 tiles that the operators are made of."""

    threads_itself: bool  # True: its own library spreads a tile over the cores, so tiles run one after the other

    def index_scores(self, q: Float32, k: Float32, weights: Float32, k_scale: Float32) -> Float32:
        """scores[t,s] = k_scale[s] * sum_h weights[t,h] * relu(q[t,h,:] . k[s,:]) for q [rows, H, D] and k [keys, D]."""

    def attend(self, q: Float32, kv: Float32, softmax_scale: float, value_dim: int) -> tuple[Float32, Float32, Float32]:
        """(out [Hq, value_dim], top [Hq], total [Hq]) of q [Hq, Dqk] over all of kv [keys, Dqk], keys >= 1.

        top is the largest logit and total = sum exp(logit - top), so that lse = top + log(total).
        """

    def attend_rows(
        self, q: Float32, kv: Array, positions: Array, softmax_scale: float, value_dim: int
    ) -> tuple[Float32, Float32, Float32]:
        """The same over the rows `positions` of kv, which is contiguous, [places, Dqk], bfloat16, float16 or float32."""


def engine_name() -> str:
    """What `DSA_CPU_ENGINE` says; else `jit` where it can be used or an instruction set is named, and `onnx` elsewhere."""
    name = os.environ.get("DSA_CPU_ENGINE") or ("jit" if os.environ.get("DSA_CPU_ISA") or not why_not_jit() else "onnx")
    if name not in ENGINES:
        raise DeviceUnavailable(
            f"DSA_CPU_ENGINE is {name!r}, but {', '.join(ENGINES)} are engines; set one of them or unset it."
        )
    return name


@cache
def why_not_jit() -> str:
    """Why the jit engine is not chosen here unasked; empty where it is: its kernels have been compiled and tried."""
    try:
        import_module(f"{_JIT}.compile").chosen()
    except ModuleNotFoundError as exc:
        return f"{exc.name} is not installed"
    except DeviceUnavailable as exc:
        return str(exc)
    found: str = import_module(f"{_JIT}.selftest").disagreement()
    return found


@cache
def _load(name: str) -> Engine:
    kind = ENGINES[name]
    engine: Engine = import_module(kind.module).Engine(*kind.arguments)
    return engine


@cache
def _named(path: str) -> Callable[..., Any] | None:
    module, _, function = path.partition(":")
    return getattr(import_module(module), function) if module else None


def own(operator: str) -> Callable[..., Any] | None:
    """The operator as the engine in force computes it as a whole; None where it gives tiles for it."""
    return _named(ENGINES[engine_name()].operators.get(operator, ""))


def engine() -> Engine:
    """The engine in force; never another one than was asked for."""
    return _load(engine_name())


def threads() -> int:
    """`DSA_CPU_THREADS`, or the cores this process may use."""
    return _positive(
        "DSA_CPU_THREADS", len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )


def memory() -> int:
    """`DSA_CPU_MEMORY` in bytes: scratch beyond inputs and results, 1 GiB by default."""
    size = _positive("DSA_CPU_MEMORY", DEFAULT_MEMORY)
    if size < LEAST_MEMORY:
        raise DeviceUnavailable(f"DSA_CPU_MEMORY is {size} bytes, but one tile needs at least {LEAST_MEMORY}; raise it.")
    return size


def _positive(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise DeviceUnavailable(f"{variable} is {text!r}, but a whole number >= 1 is accepted; set one or unset it.")
    return int(text)


def check() -> None:
    """Raise DeviceUnavailable where a variable is set to what cannot be."""
    for setting in (engine_name, threads, memory, _facts):
        setting()


def _facts() -> dict[str, str]:
    """What the engine in force tells of itself."""
    name = engine_name()
    kind = ENGINES[name]
    try:
        tell = _named(kind.facts)
    except ModuleNotFoundError as exc:
        if not kind.extra:
            raise
        cure = f"pip install 'dsa-portable[{kind.extra}]'"
        raise DeviceUnavailable(f"the {name} engine needs {exc.name}, which is not installed; run: {cure}") from exc
    return tell(*kind.arguments) if tell else {}


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="dsa-cpu")


if hasattr(os, "register_at_fork"):
    # A forked process inherits the pool without its threads, and would wait for them for ever.
    os.register_at_fork(after_in_child=_pool.cache_clear)


def run_all(function: Callable[[T], None], tasks: Iterable[T], workers: int) -> None:
    """Call function(task) for all tasks, `workers` at a time; the first exception is raised once all have ended."""
    if workers == 1:
        for task in tasks:
            function(task)
        return
    futures = [_pool(workers).submit(function, task) for task in tasks]
    errors = [error for error in (future.exception() for future in futures) if error is not None]
    if errors:
        raise errors[0]


def probe() -> Device:
    """This machine's processor and the engine that would run."""
    check()  # a wrong setting shows here, and not as a failure of the first call
    name = engine_name()
    packages = ("numpy", "ml_dtypes", *ENGINES[name].packages)
    for package in packages:
        import_module(package)
    versions = {"engine": name, **_facts()}
    if name != "jit" and not os.environ.get("DSA_CPU_ENGINE"):
        versions["jit"] = f"not used: {why_not_jit()}"
    versions |= {"python": platform.python_version(), **{p: version(p) for p in packages}}
    driver = f"{platform.system()} {platform.release()}"
    return Device("cpu", _chip(), driver, 1, platform.machine(), versions)


def _chip() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Hardware"))]
    except OSError:
        names = []
    return (names or [platform.processor() or platform.machine()])[0]
