"""torch.library's face: opcheck, one graph without recompilation, fake tensors that nobody reads, and the core's bits."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsa_portable
from dsa_portable import Batch, InvalidArgument, UnknownBackend, Unsupported, arrays, dispatch
from dsa_portable.formats import layout, pack

torch = pytest.importorskip("torch")

from torch._dynamo.testing import CompileCounterWithBackend  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from dsa_portable.faces import torch_library as dsa  # noqa: E402

README = Path(__file__).resolve().parents[2] / "README.md"
Call = dict[str, Any]


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet() -> None:
    torch._dynamo.reset()


# --- calls -----------------------------------------------------------------------------------------------------------------

ROWS, KEYS, PAGE = 5, 22, 4
RAGGED = Batch.of([3, 2], [9, 13])
PAGED = Batch.of([3, 2], [9, 13], block_table=np.array([[2, 0, 5, -9], [1, 3, 4, 6]], np.int32), page_size=PAGE)
RANGES = Batch.of([5], [22], key_start=np.arange(5, dtype=np.int32), key_end=np.full(5, 20, np.int32))
PADDED = Batch.of([1, 0, 2], [9, 0, 13], causal=False)


def tensors(batch: Batch, device: str = "cpu") -> Batch:
    """The batch with tensors for arrays."""
    moved, integers = batch.flatten()
    return Batch.unflatten([a if a is None else arrays.as_kind(a, "torch").to(device) for a in moved], integers)


def values(seed: int, *shape: int, dtype: str = "float32") -> Any:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (tensor * 20).round().to(torch.int8) if dtype == "int8" else tensor.to(getattr(torch, dtype))


def keys_of(batch: Batch | None) -> tuple[int, ...]:
    return (7, PAGE) if batch is not None and batch.block_table is not None else (KEYS,)


def index_call(dtype: str = "float32", batch: Batch | None = RAGGED, k_layout: str | None = None, **options: Any) -> Call:
    shape, width = keys_of(batch), 128 if k_layout else 16
    k = cache(k_layout, *shape) if k_layout else values(2, *shape, width, dtype=dtype)
    scaled = dtype in ("float8_e4m3fn", "int8") and not k_layout
    return {
        "q": values(1, ROWS, 8, width, dtype=dtype),
        "k": k,
        "weights": values(3, ROWS, 8),
        "k_scale": values(4, *shape).abs() if scaled else None,
        "batch": batch,
        "k_layout": k_layout,
        **{"topk": 6, **options},
    }


def attend_call(dtype: str = "float32", batch: Batch | None = RAGGED, kv_layout: str | None = None, **options: Any) -> Call:
    shape, width, value_dim = keys_of(batch), 576 if kv_layout else 24, 512 if kv_layout else 16
    return {
        "q": values(5, ROWS, 4, width, dtype=dtype),
        "kv": cache(kv_layout, *shape) if kv_layout else values(6, *shape, width, dtype=dtype),
        "indices": torch.randint(-1, 9, (ROWS, 6), generator=torch.Generator().manual_seed(7), dtype=torch.int32),
        "softmax_scale": 0.2,
        "value_dim": value_dim,
        "batch": batch,
        "kv_layout": kv_layout,
        **options,
    }


def cache(name: str, *shape: int) -> Any:
    spec = layout(name)
    held = values(8, *shape, spec.value_dim, dtype=spec.value_dtype.name)
    scale = np.full((*shape, spec.value_dim // spec.tile) if spec.rope_dim else shape, 0.5, np.float32)
    rope = arrays.to_numpy(values(9, *shape, spec.rope_dim, dtype="bfloat16")) if spec.rope_dim else None
    return arrays.from_numpy(pack(name, arrays.to_numpy(held), scale, rope))


SINK, LENGTHS = torch.tensor([0.5, -1.0, -torch.inf, 2.0]), torch.tensor([6, 0, 3, -1, 9], dtype=torch.int32)
CALLS: dict[str, tuple[str, Call]] = {
    "index": ("lightning_index", index_call()),
    "index without batch": ("lightning_index", index_call("bfloat16", None)),
    "index float16": ("lightning_index", index_call("float16", PADDED)),
    "index float8, scores": ("lightning_index", index_call("float8_e4m3fn", return_scores=True)),
    "index int8, paged": ("lightning_index", index_call("int8", PAGED, sorted=False)),
    "index planar cache": ("lightning_index", index_call("float8_e4m3fn", PAGED, "idx_fp8_132_planar")),
    "index flat cache": ("lightning_index", index_call("float8_e4m3fn", RAGGED, "idx_fp8_132_interleaved", return_scores=True)),
    "index ranges": ("lightning_index", index_call(batch=tensors(RANGES), topk=30)),
    "attend": ("sparse_attend", attend_call()),
    "attend without batch": ("sparse_attend", attend_call("float16", None, return_lse=True)),
    "attend paged": ("sparse_attend", attend_call("bfloat16", PAGED)),
    "attend sink, lengths, lse": (
        "sparse_attend",
        attend_call(batch=tensors(PAGED), attn_sink=SINK, topk_length=LENGTHS, return_lse=True),
    ),
    "attend cache": ("sparse_attend", attend_call("bfloat16", PAGED, "v32_fp8_656_nsr")),
    "attend flat cache": ("sparse_attend", attend_call("bfloat16", RAGGED, "ascend_656_nrs_int8", attn_sink=SINK)),
}
every_call = pytest.mark.parametrize(("operator", "call"), CALLS.values(), ids=CALLS)


def several(results: Any) -> tuple[Any, ...]:
    return results if isinstance(results, tuple) else (results,)


def assert_same_bits(got: Any, expected: Any) -> None:
    assert len(several(got)) == len(several(expected))
    for one, other in zip(several(got), several(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert arrays.to_numpy(one).tobytes() == arrays.to_numpy(other).tobytes()


# --- the operators ---------------------------------------------------------------------------------------------------------


@every_call
def test_the_bits_of_the_core(operator: str, call: Call) -> None:
    operands = tuple(v for v in call.values() if isinstance(v, torch.Tensor))
    before = tuple(a.clone() for a in operands)
    results = getattr(dsa, operator)(**call)
    assert_same_bits(operands, before)
    assert_same_bits(results, getattr(dsa_portable, operator)(**call))
    assert not {r.data_ptr() for r in several(results)} & {a.data_ptr() for a in operands}


class Recorder(TorchDispatchMode):
    """What reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dsa_portable":
            self.calls.append((func, args, kwargs))
        return func(*args, **(kwargs or {}))


@every_call
def test_opcheck(operator: str, call: Call) -> None:
    with Recorder() as recorder:
        getattr(dsa, operator)(**call)
    ((overload, args, kwargs),) = recorder.calls
    assert overload is getattr(torch.ops.dsa_portable, operator).default
    # opcheck compares inputs before and after by torch.allclose, which has no float8; the test above compares their bytes.
    compares = call["q"].dtype != torch.float8_e4m3fn
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic", *["test_schema"] * compares)
    assert torch.library.opcheck(overload, args, kwargs, test_utils=checks) == dict.fromkeys(checks, "SUCCESS")


@pytest.mark.parametrize("operator", ["lightning_index", "sparse_attend"])
def test_one_signature(operator: str) -> None:
    face, core = (inspect.signature(getattr(module, operator)).parameters for module in (dsa, dsa_portable))
    assert [(p.name, p.kind, p.default) for p in face.values()] == [(p.name, p.kind, p.default) for p in core.values()]


def test_strides_are_the_fake_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend may return any; a graph was compiled for these."""
    monkeypatch.setattr(dispatch, "call", lambda request, backend: torch.zeros((6, ROWS), dtype=torch.int32).T)
    assert dsa.lightning_index(**index_call()).stride() == (6, 1)


@pytest.mark.parametrize("compiled", [False, True])
def test_no_gradient_flows(compiled: bool) -> None:
    call = attend_call(return_lse=True)
    call["q"].requires_grad_()
    attend = torch.compile(dsa.sparse_attend, backend="aot_eager", fullgraph=True) if compiled else dsa.sparse_attend
    assert [r.requires_grad for r in attend(**call)] == [False, False]


@pytest.mark.parametrize(("operator", "call"), [CALLS["index"], CALLS["attend"]])
def test_out_is_refused(operator: str, call: Call) -> None:
    with pytest.raises(Unsupported, match=rf"^{operator}: out was passed, but .*call dsa_portable\.{operator}\.$") as refused:
        getattr(dsa, operator)(**call, out=torch.zeros(1))
    assert refused.value.capability == "out"


@pytest.mark.parametrize(("operator", "call"), [CALLS["index"], CALLS["attend"]])
def test_the_backend_is_named(operator: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSA_BACKEND", "nobody")
    compiled = torch.compile(getattr(dsa, operator), backend="aot_eager", fullgraph=True)
    with pytest.raises(UnknownBackend, match="nobody"):
        compiled(**call)
    assert_same_bits(getattr(dsa, operator)(**call, backend="cpu"), getattr(dsa_portable, operator)(**call, backend="cpu"))
    monkeypatch.delenv("DSA_BACKEND")
    compiled(**call)


def test_the_core_imports_no_face() -> None:
    code = "import sys, dsa_portable\nassert not {'torch', 'dsa_portable.faces'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "from dsa_portable.faces import torch_library\n" + code
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 1, "the check above can fail"


# --- torch.compile ---------------------------------------------------------------------------------------------------------


def step(q: Any, k: Any, weights: Any, queries: Any, kv: Any, batch: Batch | None, cache_batch: Batch | None) -> Any:
    """One layer: select, then attend, with something of torch's before, between and behind."""
    indices, scores = dsa.lightning_index(q, k, weights * 0.5, topk=6, batch=batch, return_scores=True)
    counted = (indices >= 0).sum(-1, dtype=torch.int32)
    out, lse = dsa.sparse_attend(
        queries, kv, indices, softmax_scale=0.2, value_dim=16, topk_length=counted, batch=cache_batch, return_lse=True
    )
    return indices, scores, out + 1, lse


def operands(batch: Batch | None, cache_batch: Batch | None, rows: int = ROWS, keys: int = KEYS) -> list[Any]:
    shape, cache_shape = ((7, PAGE) if b is not None and b.page_size else (keys,) for b in (batch, cache_batch))
    shapes = ((rows, 8, 16), (*shape, 16), (rows, 8), (rows, 4, 24), (*cache_shape, 24))
    return [values(i, *s) for i, s in enumerate(shapes)]


BATCHES = [None, RAGGED, PAGED, tensors(RANGES), tensors(PAGED), PADDED]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_as_one_graph(batch: Batch | None, dynamic: bool) -> None:
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    arguments = [*operands(batch, batch), batch, batch]
    assert_same_bits(compiled(*arguments), step(*arguments))


def test_two_caches_with_pages_of_their_own() -> None:
    table = np.array([[0, 1, 2], [3, 4, 5]], np.int32)
    cache_batch = PAGED.with_pages(table, 5)
    arguments = operands(PAGED, cache_batch)
    arguments[4] = values(4, 6, 5, 24)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    assert_same_bits(compiled(*arguments, PAGED, cache_batch), step(*arguments, PAGED, cache_batch))


def test_rows_are_dynamic() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for rows in (5, 3, 17, 8):
        arguments = operands(None, None, rows)
        for operand in (0, 2, 3):
            torch._dynamo.mark_dynamic(arguments[operand], 0)
        assert_same_bits(compiled(*arguments, None, None), step(*arguments, None, None))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_a_batch_recompiles_once_for_other_lengths(kind: str) -> None:
    """The first change of a number makes it a variable; then lengths, maxima, rows, keys and requests are free."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    frames = []
    for rows, keys in (([3, 2], [9, 13]), ([4, 2, 2], [19, 12, 2]), ([7, 6, 1, 3], [8, 8, 9, 3]), ([2, 3, 8], [4, 90, 31])):
        batch = Batch.of(rows, keys) if kind == "numpy" else tensors(Batch.of(rows, keys))
        arguments = [*operands(batch, batch, sum(rows), sum(keys)), batch, batch]
        assert_same_bits(compiled(*arguments), step(*arguments))
        frames.append(counter.frame_count)
    assert frames == [1, 2, 2, 2]


def test_lengths_are_read_when_the_graph_runs() -> None:
    """The server's way: the same tensors with other lengths in them."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, backend=counter, fullgraph=True)
    batch = tensors(PAGED)
    arguments = [*operands(batch, batch), batch, batch]
    first = compiled(*arguments)
    batch.seqlens_k.copy_(torch.tensor([4, 11]))
    second = compiled(*arguments)
    assert_same_bits(second, step(*arguments))
    assert not torch.equal(first[0], second[0])
    assert counter.frame_count == 1


@pytest.mark.parametrize("batch", [None, RAGGED, tensors(PAGED)])
def test_exported(batch: Batch | None) -> None:
    class Layer(torch.nn.Module):
        def forward(self, *arguments: Any) -> Any:
            return step(*arguments, batch, batch)

    arguments = tuple(operands(batch, batch))
    rows = torch.export.Dim("rows", min=2)
    shapes = ({0: rows}, None, {0: rows}, {0: rows}, None) if batch is None else None
    exported = torch.export.export(Layer(), arguments, dynamic_shapes=shapes and (shapes,))
    assert_same_bits(exported.module()(*arguments), step(*arguments, batch, batch))
    called = [str(node.target) for node in exported.graph.nodes if "dsa_portable" in str(node.target)]
    assert called == ["dsa_portable.lightning_index.default", "dsa_portable.sparse_attend.default"]


@pytest.mark.parametrize("batch", [Batch.of([], []), Batch.of([0, 0], [9, 13]), Batch.of([5], [0])])
def test_nothing_to_do(batch: Batch) -> None:
    rows, keys = int(batch.cu_seqlens_q[-1]), int(batch.seqlens_k.sum())
    arguments = [*operands(batch, batch, rows, keys), batch, batch]
    assert_same_bits(torch.compile(step, backend="aot_eager", fullgraph=True)(*arguments), step(*arguments))


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="the default compiler of torch needs a C++ compiler")
def test_the_readme_s_example_with_the_default_compiler() -> None:
    text = README.read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(import torch\n.*?)^```$", text, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(example, names)
    attend = names["attend"]
    q, k, weights, _, _ = operands(RAGGED, None)
    arguments = (q, k, weights, values(5, ROWS, 4, 576), values(6, KEYS, 576), RAGGED)
    assert_same_bits(attend(*arguments), torch.compiler.disable(attend._torchdynamo_orig_callable)(*arguments))


# --- fake tensors ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def pretended(call: Call, device: str, **changes: Any) -> Iterator[Call]:
    """The call with fake tensors on the device in place of its own, and every array of its batch likewise."""
    with FakeTensorMode():

        def fake(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
            if isinstance(value, Batch):
                found, integers = value.flatten()
                return Batch.unflatten([a if a is None else fake(arrays.as_kind(a, "torch")) for a in found], integers)
            return value

        yield {name: fake(value) for name, value in {**call, **changes}.items()}


@every_call
@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
def test_no_value_of_a_fake_is_read(operator: str, call: Call, device: str) -> None:
    """A fake tensor has none, so whatever reads one raises."""
    expected = several(getattr(dsa_portable, operator)(**call))
    with pretended(call, device) as faked:
        results = several(getattr(dsa, operator)(**faked))
    assert [(r.device.type, r.dtype, r.shape, r.stride()) for r in results] == [
        (device, e.dtype, e.shape, e.contiguous().stride()) for e in expected
    ]


@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_a_batch_may_stay_on_the_host(device: str) -> None:
    with pretended(index_call(batch=None), device) as call:
        assert dsa.lightning_index(**{**call, "batch": PAGED, "k": call["k"].new_empty(7, PAGE, 16)}).device.type == device


def test_a_fake_that_is_read_raises() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError):
        arrays.to_numpy(torch.empty(2, dtype=torch.int32))


def test_meta_tensors_without_a_mode() -> None:
    call = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in index_call(return_scores=True).items()}
    assert [(r.device.type, r.shape) for r in dsa.lightning_index(**call)] == [("meta", (ROWS, 6))] * 2


INDEX, ATTEND = dsa_portable.lightning_index, dsa_portable.sparse_attend
WRONG: list[tuple[Callable[..., Any], Call, Call]] = [
    (INDEX, index_call(), {"weights": values(3, ROWS, 7)}),
    (INDEX, index_call(), {"weights": values(3, ROWS + 1, 8)}),
    (INDEX, index_call(), {"k": values(2, KEYS, 15)}),
    (INDEX, index_call(), {"k": values(2, 7, PAGE, 16)}),
    (INDEX, index_call(), {"k": values(2, KEYS, 16, dtype="float16")}),
    (INDEX, index_call(), {"k_scale": values(4, KEYS)}),
    (INDEX, index_call("int8"), {"k_scale": None}),
    (INDEX, index_call("int8"), {"k_scale": values(4, KEYS + 1)}),
    (INDEX, index_call(), {"topk": 0}),
    (INDEX, index_call(), {"k_layout": "nobody's"}),
    (INDEX, index_call("int8", PAGED), {"batch": PAGED.with_pages(PAGED.block_table, PAGE + 1)}),
    (INDEX, index_call(batch=RANGES), {"q": values(1, 6, 8, 16), "weights": values(3, 6, 8)}),
    (ATTEND, attend_call(), {"indices": torch.zeros((ROWS, 6))}),
    (ATTEND, attend_call(), {"attn_sink": values(1, 5)}),
    (ATTEND, attend_call(), {"topk_length": LENGTHS[:4]}),
    (ATTEND, attend_call(), {"value_dim": 25}),
    (ATTEND, attend_call(), {"softmax_scale": 0.0}),
    (ATTEND, attend_call("bfloat16", PAGED, "v32_fp8_656_nsr"), {"kv": torch.zeros((7, PAGE, 655), dtype=torch.uint8)}),
]


@pytest.mark.parametrize(("operator", "call", "wrong"), WRONG)
def test_a_fake_is_refused_with_the_same_sentence(operator: Callable[..., Any], call: Call, wrong: Call) -> None:
    with pytest.raises(InvalidArgument) as real:
        operator(**{**call, **wrong})
    with pretended(call, "cpu", **wrong) as faked, pytest.raises(InvalidArgument, match=f"^{re.escape(str(real.value))}$"):
        getattr(dsa, operator.__name__)(**faked)


def test_a_fake_on_another_device_is_refused() -> None:
    with pretended(index_call(), "cuda") as call:
        with pytest.raises(InvalidArgument, match=r"k is float32 \[22, 16\] on cpu, but q is on cuda:0; move them"):
            dsa.lightning_index(**{**call, "k": torch.empty(KEYS, 16)})
        elsewhere = Batch.unflatten([a if a is None else a.to("meta") for a in call["batch"].flatten()[0]], (0, 3, 13, 1))
        with pytest.raises(InvalidArgument, match=r"batch holds .* on meta, but q is on cuda:0"):
            dsa.lightning_index(**{**call, "batch": elsewhere})


def test_a_wrong_shape_is_refused_while_compiling() -> None:
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    arguments = operands(None, None)
    arguments[2] = values(3, ROWS, 7)
    with pytest.raises(Exception, match=r"lightning_index: weights is .*: its H is 7, but q has H = 8; pass arrays that agree"):
        compiled(*arguments, None, None)
