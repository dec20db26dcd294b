"""The OpenVINO engines: precision in force, refusals, agreement with NumPy, the same bits whatever a tile or thread is."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

# Not pytest.importorskip: OpenVINO reports its import, and the engine prevents that.
if any(find_spec(name) is None for name in ("openvino", "onnx")):
    pytest.skip("the OpenVINO engines need openvino and onnx", allow_module_level=True)

from dsa_portable import Batch, DeviceUnavailable, index_scores, lightning_index, registry, sparse_attend
from dsa_portable.backends.cpu import BACKEND, openvino_engine, settings
from dsa_portable.profile import Profile, envelope

NDArray = npt.NDArray[Any]
BF16 = "BF16" in openvino_engine._core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not BF16, reason="this processor has no bfloat16")
WIDTHS = (np.float32, np.float16, ml_dtypes.bfloat16)


@pytest.fixture(autouse=True)
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The float32 engine is in force unless the test says otherwise."""
    monkeypatch.setenv("DSA_CPU_ENGINE", "openvino")
    monkeypatch.delenv("DSA_OPENVINO_DEVICE", raising=False)


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph has been compiled, and no device has been tried."""
    monkeypatch.setattr(openvino_engine, "_FREE", {})
    for cache in (openvino_engine._tried, openvino_engine._in_place, registry.device):
        cache.cache_clear()


def index_arguments(rows: int = 19, keys: int = 1100, heads: int = 64, dim: int = 128) -> dict[str, Any]:
    """Of a causal call whose last row sees all keys."""
    rng = np.random.default_rng(rows + keys)
    q, k, weights = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((rows, heads, dim), (keys, dim), (rows, heads))
    )
    return {"q": q.astype(ml_dtypes.bfloat16), "k": k.astype(ml_dtypes.bfloat16), "weights": weights}


def attend_arguments(
    dtype: Any, rows: int = 3, keys: int = 300, heads: int = 33, dims: tuple[int, int] = (72, 64)
) -> dict[str, Any]:
    """Of a call whose rows attend different keys."""
    rng = np.random.default_rng(heads)
    indices = np.stack([rng.permutation(keys)[:200] for _ in range(rows)]).astype(np.int32)
    q, kv = (rng.standard_normal(shape).astype(np.float32).astype(dtype) for shape in ((rows, heads, dims[0]), (keys, dims[0])))
    return {"q": q, "kv": kv, "indices": indices, "softmax_scale": 0.2, "value_dim": dims[1]}


def attend(arguments: dict[str, Any]) -> tuple[NDArray, NDArray]:
    """(out, lse) of the engine in force, in float32."""
    out, lse = sparse_attend(**arguments, return_lse=True, backend="cpu")
    return out.astype(np.float32), lse


def refusal(function: Callable[[], Any]) -> str:
    """What DeviceUnavailable says: one sentence."""
    with pytest.raises(DeviceUnavailable) as error:
        function()
    said = str(error.value)
    assert "\n" not in said
    return said


def call() -> Any:
    """Any call."""
    x = np.ones((2, 2, 8), np.float32)
    return lightning_index(x, x[:, 0], x[:, :, 0], topk=2, backend="cpu")


# --- precision ---


@pytest.mark.parametrize("graph", ["index_scores", "attend", *(f"attend_rows.{np.dtype(d).name}" for d in WIDTHS)])
def test_float32_is_in_force(graph: str) -> None:
    compiled = openvino_engine._compiled(graph, "f32", "CPU")
    assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    results = [op for op in compiled.get_runtime_model().get_ops() if "MatMul" in op.rt_info["layerType"].astype(str)]
    assert results
    assert {op.output(0).element_type.to_string() for op in results} == {"f32"}


@needs_bf16
def test_a_hint_forgotten_is_read_back(monkeypatch: pytest.MonkeyPatch, untried: None) -> None:
    call()
    monkeypatch.setattr(openvino_engine, "_FREE", {})
    monkeypatch.setattr(openvino_engine, "config", lambda precision, device: openvino_engine.CPU_CONFIG)
    said = refusal(call)
    assert said == "OpenVINO was asked to compute in f32, but on CPU it computes in bf16; use DSA_CPU_ENGINE=onnx."


def test_bfloat16_that_a_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch, untried: None) -> None:
    """A processor without it ignores the hint."""
    monkeypatch.setenv("DSA_CPU_ENGINE", "openvino-bf16")
    without = {"INFERENCE_PRECISION_HINT": "f32", **openvino_engine.CPU_CONFIG}
    monkeypatch.setattr(openvino_engine, "config", lambda precision, device: without)
    said = refusal(BACKEND.probe)
    assert said == "OpenVINO was asked to compute in bf16, but on CPU it computes in f32; use DSA_CPU_ENGINE=openvino."
    assert refusal(call) == said


@needs_bf16
def test_bfloat16_is_near_and_is_not_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, exact = attend_arguments(np.float32), attend(attend_arguments(np.float32))
    scores = index_scores(**index_arguments(), backend="cpu")
    monkeypatch.setenv("DSA_CPU_ENGINE", "openvino-bf16")
    for ours, theirs in zip(attend(arguments), exact, strict=True):
        assert 1e-4 < np.abs(ours - theirs).max() < 0.1
    seen = np.isfinite(scores)
    error = np.abs(index_scores(**index_arguments(), backend="cpu")[seen] - scores[seen]).max()
    assert 0.05 < error < 0.05 * np.abs(scores[seen]).max()


def profiles(monkeypatch: pytest.MonkeyPatch, engine: str) -> list[tuple[str, Profile]]:
    """What the backend declares for the engine, as its probe finds it."""
    monkeypatch.setenv("DSA_CPU_ENGINE", engine)
    device = BACKEND.probe()
    assert device.versions["engine"] == engine
    assert device.versions["openvino_device"].startswith("CPU (")
    operators = ("lightning_index", "index_scores", "sparse_attend")
    return [(name, BACKEND.profile(device, name, format, "decode")) for name in operators for format in ("bf16/f32/-", "bf16")]


def test_the_profile_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    for operator, profile in profiles(monkeypatch, "openvino"):
        assert profile == Profile(ties="lowest", deterministic=True)
        assert envelope(operator, profile) == "exact"


@needs_bf16
def test_the_profile_of_bfloat16_is_outside_every_envelope(monkeypatch: pytest.MonkeyPatch) -> None:
    for operator, profile in profiles(monkeypatch, "openvino-bf16"):
        assert envelope(operator, profile) is None


# --- refusals and choice ---


@pytest.mark.parametrize("name", ["TPU", "AUTO", "cpu"])
def test_a_device_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("DSA_OPENVINO_DEVICE", name)
    here = ", ".join(openvino_engine._core().available_devices)
    said = f"DSA_OPENVINO_DEVICE is {name!r}, but OpenVINO finds {here} here; set one of them or unset it."
    assert refusal(BACKEND.probe) == said
    assert refusal(call) == said


def test_a_graph_that_cannot_be_compiled_is_one_sentence(monkeypatch: pytest.MonkeyPatch, untried: None) -> None:
    monkeypatch.setattr(openvino_engine, "config", lambda precision, device: {"INFERENCE_PRECISION_HINT": "i4"})
    assert refusal(BACKEND.probe).startswith("OpenVINO cannot compile index_scores for CPU in f32 (Wrong value i4 for property")


def test_never_chosen_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSA_CPU_ENGINE")
    for reason in ("", "no reason"):
        monkeypatch.setattr(settings, "why_not_jit", lambda reason=reason: reason)
        assert not settings.engine_name().startswith("openvino")


MISSING = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "openvino":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import numpy as np
import dsa_portable

x = np.ones((3, 2, 8), np.float32)
try:
    dsa_portable.lightning_index(x, x[:, 0], x[:, :, 0], topk=2, backend="cpu")
except dsa_portable.DeviceUnavailable as error:
    print(error)
"""


@pytest.mark.parametrize("engine", ["openvino", "openvino-bf16"])
def test_without_openvino(engine: str) -> None:
    env = {**os.environ, "DSA_CPU_ENGINE": engine}
    done = subprocess.run([sys.executable, "-c", MISSING], env=env, capture_output=True, text=True, check=True)
    cure = "run: pip install 'dsa-portable[openvino]'"
    assert done.stdout == f"the {engine} engine needs openvino, which is not installed; {cure}\n"


REPORTS = """
from pathlib import Path

class Telemetry:
    def __init__(self, *arguments, **options): pass
    def send_event(self, *event): Path(__file__).with_name("sent").write_text(str(event))
"""


@pytest.mark.parametrize("imported", ["dsa_portable.backends.cpu.openvino_engine", "openvino"])
def test_nothing_is_reported(tmp_path: Path, imported: str) -> None:
    """OpenVINO alone does report, to the stand-in here: so it would be seen."""
    backend = tmp_path / "openvino_telemetry" / "backend"
    backend.mkdir(parents=True)
    (tmp_path / "openvino_telemetry" / "__init__.py").write_text(REPORTS)
    (backend / "__init__.py").touch()
    (backend / "backend_ga4.py").touch()
    subprocess.run([sys.executable, "-c", f"import {imported}"], env={**os.environ, "PYTHONPATH": str(tmp_path)}, check=True)
    assert (tmp_path / "openvino_telemetry" / "sent").exists() == (imported == "openvino")


# --- results ---


def test_index_scores_as_numpy_s(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = index_scores(**index_arguments(), backend="cpu")
    monkeypatch.setenv("DSA_CPU_ENGINE", "numpy")
    np.testing.assert_allclose(ours, index_scores(**index_arguments(), backend="cpu"), rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("writeable", [True, False])
@pytest.mark.parametrize("dtype", WIDTHS)
def test_attends_as_numpy(monkeypatch: pytest.MonkeyPatch, dtype: Any, writeable: bool) -> None:
    arguments = attend_arguments(dtype)
    for array in (arguments["q"], arguments["kv"]):
        array.flags.writeable = writeable
    ours = attend(arguments)
    monkeypatch.setenv("DSA_CPU_ENGINE", "numpy")
    for mine, theirs in zip(ours, attend(arguments), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-2 if dtype != np.float32 else 1e-5, atol=1e-5)


def test_transposed_arrays() -> None:
    """Of which copies are made, that must live as long as the call."""
    rng, engine = np.random.default_rng(0), openvino_engine.Engine("f32")
    q, kv = (rng.standard_normal(shape).astype(np.float32) for shape in ((64, 576), (2048, 576)))
    straight = engine.attend(q, kv, 0.1, 512)
    for _ in range(8):
        for ours, theirs in zip(engine.attend(q.T.copy().T, kv.T.copy().T, 0.1, 512), straight, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("heads", [1, 3, 64])
@pytest.mark.parametrize("dim", [8, 128])
def test_index_bits_of_every_tile(heads: int, dim: int) -> None:
    """A tile of fewer rows or keys, one among them, has the bits of the whole."""
    rng = np.random.default_rng(heads + dim)
    q, k, weights, scale = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((8, heads, dim), (512, dim), (8, heads), (512,))
    )
    engine = openvino_engine.Engine("f32")
    whole = engine.index_scores(q, k, weights, scale)
    for rows in (slice(0, 8), slice(0, 1), slice(7, 8), slice(3, 5), slice(1, 8)):
        for n in (1, 2, 3, 7, 8, 16, 17, 31, 64, 65, 200, 511, 512):
            for keys in (slice(0, n), slice(512 - n, 512)):
                tile = engine.index_scores(q[rows], k[keys], weights[rows], scale[keys])
                np.testing.assert_array_equal(tile, whole[rows, keys], f"{rows} {keys}")


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("keys", [1, 7, 300])
def test_attention_bits_of_every_share_of_the_heads(keys: int, dtype: Any) -> None:
    rng = np.random.default_rng(keys)
    q, kv = rng.standard_normal((128, 72)).astype(np.float32), rng.standard_normal((400, 72)).astype(np.float32).astype(dtype)
    engine, positions = openvino_engine.Engine("f32"), rng.permutation(400)[:keys]
    whole = engine.attend_rows(q, kv, positions, 0.2, 64)
    for n in (1, 2, 8, 15, 16, 17, 64, 127):
        for heads in (slice(0, n), slice(128 - n, 128)):
            for part, full in zip(engine.attend_rows(q[heads], kv, positions, 0.2, 64), whole, strict=True):
                np.testing.assert_array_equal(part, full[heads], str(heads))


def test_bits_do_not_depend_on_threads_or_batch_mates(monkeypatch: pytest.MonkeyPatch) -> None:
    index, attention = index_arguments(), attend_arguments(np.float32, rows=1)
    found = []
    for threads in ("1", "2", "4", "2"):
        monkeypatch.setenv("DSA_CPU_THREADS", threads)
        found.append((index_scores(**index, backend="cpu"), *attend(attention)))
    for again in found[1:]:
        for ours, theirs in zip(found[0], again, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    seen = len(index["k"]) - len(index["q"]) + 1
    for row in range(len(index["q"])):
        mine = {name: index[name][row : row + 1] for name in ("q", "weights")} | {"k": index["k"][: seen + row]}
        alone = index_scores(**mine, batch=Batch.dense(1, seen + row), backend="cpu")
        np.testing.assert_array_equal(alone[0], found[0][0][row, : seen + row])


def test_results_survive_the_next_call() -> None:
    engine, rng = openvino_engine.Engine("f32"), np.random.default_rng(0)
    q, kv = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 8), (32, 8)))
    results = engine.attend(q, kv, 1.0, 8)
    kept = [result.copy() for result in results]
    engine.attend(-q, kv, 1.0, 8)
    for result, before in zip(results, kept, strict=True):
        np.testing.assert_array_equal(result, before)


@pytest.mark.parametrize("dtype", WIDTHS)
def test_inputs_are_not_kept(dtype: Any) -> None:
    """A cache that the caller drops is gone."""
    kv = np.ones((32, 8), dtype)
    openvino_engine.Engine("f32").attend_rows(np.ones((16, 8), np.float32), kv, np.arange(4), 1.0, 8)
    gone = weakref.ref(kv)
    del kv
    assert gone() is None


def test_a_cache_is_read_where_it_lies() -> None:
    """OpenVINO gathers rows of float32, and of bfloat16 where it widens after; of float16 it would widen the whole cache."""
    found = {np.dtype(d).name: openvino_engine._in_place(f"attend_rows.{np.dtype(d).name}", "f32", "CPU") for d in WIDTHS}
    assert found == {"float32": True, "float16": False, "bfloat16": True}
