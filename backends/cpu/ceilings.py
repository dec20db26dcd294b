"""What the engine in force could do at most, on as many threads: for `dsa-portable bench`, measured in the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.backends.cpu import settings

# A call, and the operations that it makes.
Ceiling: TypeAlias = tuple[Callable[[], object], int]
# Turns of a loop: long enough for a system to have found a core for each thread.
TURNS = 4_000_000
# The product that the index is made of: so many rows of q, keys and dimensions.
GEMM = (512, 1024, 128)


def ceilings() -> Mapping[str, Ceiling]:
    """By name; none for an engine of which nothing better is known than what it does."""
    found: Mapping[str, Ceiling] = {"jit": _loops, "onnx": _gemm}.get(settings.engine_name(), dict)()
    return found


def _on_all_threads(task: Callable[[int], object]) -> Callable[[], None]:
    workers = settings.threads()
    return lambda: settings.run_all(lambda one: (task(one), None)[1], range(workers), workers)


def _loops() -> dict[str, Ceiling]:
    compile = import_module("dsa_portable.backends.cpu.jit.compile")
    kernel = import_module("dsa_portable.backends.cpu.jit.kernels.loops")
    places = [np.zeros(kernel.BYTES, np.uint8) for _ in range(settings.threads())]

    def call(function: Callable[..., None]) -> Callable[[], None]:
        return _on_all_threads(lambda one: function(TURNS, places[one].ctypes.data))

    return {name: (call(loop), TURNS * kernel.LOOPS[name][1] * len(places)) for name, loop in compile.looping().items()}


def _gemm() -> dict[str, Ceiling]:
    onnx: Any = import_module("onnx.parser")
    runtime: Any = import_module("onnxruntime")
    head, body = 'ir_version: 9, opset_import: ["": 19]', "y = Gemm <transB = 1> (a, b)"
    text = f"<{head}> gemm (float[M,D] a, float[N,D] b) => (float[M,N] y) {{ {body} }}"
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = runtime.InferenceSession(onnx.parse_model(text).SerializeToString(), options)
    rows, keys, dim = GEMM
    feeds = {"a": np.ones((rows, dim), np.float32), "b": np.ones((keys, dim), np.float32)}
    bindings = []
    for _ in range(settings.threads()):
        binding = session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        binding.bind_ortvalue_output("y", runtime.OrtValue.ortvalue_from_numpy(np.empty((rows, keys), np.float32)))
        bindings.append(binding)
    call = _on_all_threads(lambda one: session.run_with_iobinding(bindings[one]))
    return {"ONNX Runtime Gemm": (call, 2 * rows * keys * dim * len(bindings))}
