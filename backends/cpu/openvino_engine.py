"""The shipped graphs in OpenVINO, another vendor's compiler: float32 by explicit hint, or bfloat16 where that is asked for.

Left alone, OpenVINO computes float32 graphs in bfloat16 on processors that have it. What it took is read back from every
compiled graph, and another precision than the engine's name says is an error.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner

from dsa_portable.backends.cpu.settings import Array, Float32
from dsa_portable.errors import DeviceUnavailable


@contextmanager
def _unreported() -> Iterator[None]:
    """OpenVINO reports its own import where openvino_telemetry can be imported, which it requires; else it takes a stub."""
    if "openvino_telemetry" in sys.modules:
        yield  # somebody else has imported it
        return
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["openvino_telemetry"]


with _unreported():
    import openvino

# By the name of a precision: the engine to take where OpenVINO computes in another one.
INSTEAD = {"f32": "onnx", "bf16": "openvino"}
# One thread a graph, since calls come from several Python threads; pinned, they would all have the same core.
CPU_CONFIG = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}


def device() -> str:
    """`DSA_OPENVINO_DEVICE`, CPU by default; one that is here, since AUTO and its like would choose for themselves."""
    return _found(os.environ.get("DSA_OPENVINO_DEVICE") or "CPU")


@cache
def _found(name: str) -> str:
    here = _core().available_devices
    if name not in here and name not in {each.partition(".")[0] for each in here}:
        raise DeviceUnavailable(
            f"DSA_OPENVINO_DEVICE is {name!r}, but OpenVINO finds {', '.join(here)} here; set one of them or unset it."
        )
    return name


def facts(precision: str) -> dict[str, str]:
    """The device that OpenVINO computes on, once a graph has been compiled for it in this precision."""
    return {"openvino_device": _tried(precision, device())}


@cache
def _tried(precision: str, device: str) -> str:
    with _borrowed("index_scores", precision, device):
        return f"{device} ({_core().get_property(device, 'FULL_DEVICE_NAME').strip()})"


def config(precision: str, device: str) -> dict[str, Any]:
    """The properties that a graph is compiled with."""
    return {"INFERENCE_PRECISION_HINT": precision, **(CPU_CONFIG if device == "CPU" else {})}


@cache
def _core() -> openvino.Core:
    return openvino.Core()


@cache
def _model(graph: str) -> bytes:
    """A shipped graph with its functions written out where they are called: OpenVINO reads no functions of a model."""
    model = onnx.load_model_from_string((files("dsa_portable.backends.cpu") / "graphs" / f"{graph}.onnx").read_bytes())
    written: bytes = onnx.inliner.inline_local_functions(model).SerializeToString()
    return written


def _compiled(graph: str, precision: str, device: str) -> openvino.CompiledModel:
    """Raises DeviceUnavailable where OpenVINO cannot, or would compute in another precision."""
    try:
        compiled = _core().compile_model(_core().read_model(_model(graph), b""), device, config(precision, device))
        found = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    except RuntimeError as exc:
        reason = next((line for line in reversed(str(exc).splitlines()) if line.strip()), repr(exc)).strip().rstrip(".")
        raise DeviceUnavailable(
            f"OpenVINO cannot compile {graph} for {device} in {precision} ({reason}); use DSA_CPU_ENGINE=onnx."
        ) from exc
    if found != precision:
        raise DeviceUnavailable(
            f"OpenVINO was asked to compute in {precision}, but on {device} it computes in {found}; "
            f"use DSA_CPU_ENGINE={INSTEAD[precision]}."
        )
    return compiled


class Graph:
    """A compiled graph and its one request: requests of one stream take turns, and none is for two threads at once."""

    def __init__(self, graph: str, precision: str, device: str) -> None:
        self._compiled = _compiled(graph, precision, device)
        self._request = self._compiled.create_infer_request()
        # What inputs are replaced by after a call: a request holds its inputs, and would keep a cache that is not its own.
        self._small = {
            port.any_name: openvino.Tensor(port.element_type, [1] * port.partial_shape.rank.get_length())
            for port in self._compiled.inputs
        }

    def __call__(self, feeds: Mapping[str, Any]) -> tuple[Array, ...]:
        """The results in the graph's order, copied: the next call writes where they were."""
        # To be held here until the end: a request knows where a tensor's memory is, and does not keep it alive.
        tensors = {name: each if isinstance(each, openvino.Tensor) else _shared(each) for name, each in feeds.items()}
        try:
            for name, tensor in tensors.items():
                self._request.set_tensor(name, tensor)
            found = self._request.infer(share_outputs=False)
            return tuple(found[port] for port in self._compiled.outputs)
        finally:
            for name, tensor in self._small.items():
                self._request.set_tensor(name, tensor)

    @property
    def gathers_first(self) -> bool:
        """Whether rows of `kv` are gathered where they lie; some types are widened before, all rows for the few."""
        model = self._compiled.get_runtime_model()  # which must live as long as it is asked
        kv = next(parameter for parameter in model.get_parameters() if parameter.friendly_name == "kv")
        readers = [reader.get_node().rt_info["layerType"].astype(str) for reader in kv.output(0).get_target_inputs()]
        return readers == ["Gather"]


def _shared(array: Array) -> openvino.Tensor:
    """A tensor in the array's memory; in that of a copy where the array is write-protected, which OpenVINO refuses."""
    return openvino.Tensor(np.require(array, requirements=["C_CONTIGUOUS", "WRITEABLE"]), shared_memory=True)


# Graphs that no call is using. None is ever dropped, so that threads may come and go: OpenVINO gives what a dropped graph
# ran on to the next one, and after a fork that waits for ever for a thread that only the parent has.
_FREE: dict[tuple[str, str, str], list[Graph]] = {}


@contextmanager
def _borrowed(graph: str, precision: str, device: str) -> Iterator[Graph]:
    """A compiled graph for one call at a time; there come to be as many as calls at once."""
    free = _FREE.setdefault((graph, precision, device), [])
    try:
        found = free.pop()
    except IndexError:
        found = Graph(graph, precision, device)
    try:
        yield found
    finally:
        free.append(found)


@cache
def _in_place(graph: str, precision: str, device: str) -> bool:
    """Whether to give the graph a whole cache; another device than the CPU would have to be sent all of it."""
    with _borrowed(graph, precision, device) as found:
        return device == "CPU" and found.gathers_first


class Engine:
    """See settings.Engine."""

    threads_itself = False

    def __init__(self, precision: str) -> None:
        self._precision = precision

    def index_scores(self, q: Float32, k: Float32, weights: Float32, k_scale: Float32) -> Float32:
        """See settings.Engine."""
        # A product of one row or column has other bits than it has among others. Where a dot product is NaN, OpenVINO's Relu
        # makes 0 of it: what the contract leaves open.
        rows, keys = len(q), len(k)
        if keys == 1:
            k, k_scale = _twice(k), _twice(k_scale)
        if rows == 1:
            q, weights = _twice(q), _twice(weights)
        scores: Float32
        (scores,) = self._run("index_scores", {"q": q, "k": k, "weights": weights, "k_scale": k_scale})
        return scores[:rows, :keys]

    def attend(self, q: Float32, kv: Float32, softmax_scale: float, value_dim: int) -> tuple[Float32, Float32, Float32]:
        """See settings.Engine."""
        return self._attend("attend", q, {"kv": kv}, softmax_scale, value_dim)

    def attend_rows(
        self, q: Float32, kv: Array, positions: Array, softmax_scale: float, value_dim: int
    ) -> tuple[Float32, Float32, Float32]:
        """See settings.Engine."""
        graph = f"attend_rows.{kv.dtype.name}"
        # A cache that is write-protected would be copied.
        if not kv.flags.writeable or not _in_place(graph, self._precision, device()):
            kv, positions = kv[positions], np.arange(len(positions))
        # Of a cache of bfloat16, which NumPy does not have, OpenVINO is told that these sixteen bits are some.
        bits = kv.dtype == ml_dtypes.bfloat16
        stored = openvino.Tensor(kv.view(np.uint16), kv.shape, openvino.Type.bf16) if bits else _shared(kv)
        return self._attend(graph, q, {"kv": stored, "positions": positions.astype(np.int64)}, softmax_scale, value_dim)

    def _attend(
        self, graph: str, q: Float32, feeds: Mapping[str, Any], softmax_scale: float, value_dim: int
    ) -> tuple[Float32, Float32, Float32]:
        heads = len(q)
        options = {"softmax_scale": np.array(softmax_scale, np.float32), "value_dim": np.array([value_dim], np.int64)}
        # As in index_scores: how many heads a thread has must not show.
        out, *_, top, largest_p = self._run(graph, {"q": _twice(q) if heads == 1 else q, **feeds, **options})
        # Its ReduceMax leaves NaN out, and the largest of P is 0 where all of P is NaN; at least 1 / keys it is elsewhere.
        total: Float32 = np.float32(1) / np.where(largest_p > 0, largest_p, np.float32(np.nan))
        return out[:heads], top[:heads], total[:heads]

    def _run(self, graph: str, feeds: Mapping[str, Any]) -> tuple[Array, ...]:
        with _borrowed(graph, self._precision, device()) as found:
            return found(feeds)


def _twice(array: Array) -> Array:
    return np.concatenate([array, array])
