"""The jit engine: each instruction set of this machine, the bits that they share, and planted faults of its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("llvmlite", reason="the jit engine needs llvmlite")

from dsa_portable import Batch, DeviceUnavailable, lightning_index, sparse_attend
from dsa_portable.backends.cpu import BACKEND
from dsa_portable.backends.cpu.index_select import top
from dsa_portable.backends.cpu.jit import compile, emit, isa, selftest
from dsa_portable.backends.cpu.jit.kernels import attend, score, select, tiles, widen
from tests import tiles_emulated

NDArray = npt.NDArray[Any]
HERE = [each.name for each in isa.TABLE if not (isa.lacking(each, compile._features()) or compile._refused(each))]
DTYPES = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "int8": np.int8,
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "f32": np.float32,
}
pytestmark = pytest.mark.skipif(not HERE, reason="this processor has none of the instruction sets")


@pytest.fixture(params=HERE)
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set of this processor in turn."""
    monkeypatch.setenv("DSA_CPU_ENGINE", "jit")
    monkeypatch.setenv("DSA_CPU_ISA", request.param)
    return str(request.param)


@pytest.fixture
def recompiled() -> Iterator[None]:
    """Kernels are compiled anew in the test, and what it compiled is gone after it."""
    for cache in (compile._scoring, compile._selecting, compile._attending, compile._finishing):
        cache.cache_clear()
    yield
    for cache in (compile._scoring, compile._selecting, compile._attending, compile._finishing):
        cache.cache_clear()


def index_operands(format: str, rows: int, keys: int, heads: int = 64, dim: int = 128) -> dict[str, Any]:
    """Of a call in which every row sees every key."""
    rng, dtype = np.random.default_rng(keys), DTYPES[format]

    def draw(*shape: int) -> NDArray:
        if format == "int8":
            return rng.integers(-128, 128, shape).astype(np.int8)
        return np.asarray(rng.standard_normal(shape, np.float32).astype(dtype))

    scales = {"k_scale": rng.random(keys, np.float32)} if format in ("e4m3", "int8") else {}
    weights = rng.standard_normal((rows, heads)).astype(np.float32)
    return {"q": draw(rows, heads, dim), "k": draw(keys, dim), "weights": weights, "batch": Batch.dense(rows, keys), **scales}


def chain(operands: dict[str, Any]) -> NDArray:
    """The scores as the kernels promise them: FMAs over ascending d, head h in lane h % 16, lanes added neighbours first.

    A float64 product of float32 numbers is exact and its sum with a float32 nearly so: rounding it is an FMA but for ties that
    float64 has rounded already, which these numbers do not have.
    """
    q, k, weights = (operands[name].astype(np.float32).astype(np.float64) for name in ("q", "k", "weights"))
    dots = np.zeros((*q.shape[:2], len(k)), np.float32)
    for d in range(q.shape[2]):
        dots = (q[:, :, d, None] * k[None, None, :, d] + dots).astype(np.float32)
    lanes = np.zeros((len(q), 16, len(k)), np.float32)
    for h in range(q.shape[1]):
        lanes[:, h % 16] = (weights[:, h, None] * np.maximum(dots[:, h], 0) + lanes[:, h % 16]).astype(np.float32)
    while lanes.shape[1] > 1:
        lanes = lanes[:, ::2] + lanes[:, 1::2]
    return np.asarray(lanes[:, 0] * operands.get("k_scale", np.float32(1)))


@pytest.mark.parametrize("format", DTYPES)
@pytest.mark.parametrize(("rows", "keys", "heads", "dim"), [(3, 300, 64, 128), (2, 131, 5, 7), (1, 40, 80, 33)])
def test_scores_are_one_chain_on_every_instruction_set(
    instructions: str, format: str, rows: int, keys: int, heads: int, dim: int
) -> None:
    """So AVX2, AVX512 and pairs of bfloat16 have the same bits, whatever the sizes; AMX sums in another order."""
    operands = index_operands(format, rows, keys, heads, dim)
    tiles = isa.NAMED[instructions].tiles and isa.NAMED[instructions].paired(format)
    indices, scores = lightning_index(**operands, topk=keys, return_scores=True, backend="cpu")
    truth = chain(operands)
    for row in range(rows):
        seen = keys - rows + row + 1
        assert indices[row, :seen].tolist() == list(range(seen))
        if tiles:  # sums of even and of odd elements apart
            np.testing.assert_allclose(scores[row, :seen], truth[row, :seen], atol=1e-6 * np.abs(truth).max())
        else:
            assert scores[row, :seen].tobytes() == truth[row, :seen].tobytes()


@pytest.mark.parametrize("threads", ["1", "2", "4"])
def test_bits_do_not_depend_on_threads_or_slices(instructions: str, monkeypatch: pytest.MonkeyPatch, threads: str) -> None:
    """One row of many requests, sliced out or split over threads, is the row that a long prefill has."""
    operands, rng = index_operands("e4m3", 40, 700), np.random.default_rng(0)
    monkeypatch.setenv("DSA_CPU_THREADS", "1")
    indices, scores = lightning_index(**operands, topk=64, return_scores=True, backend="cpu")
    kv = rng.standard_normal((700, 64), np.float32).astype(ml_dtypes.bfloat16)
    q = rng.standard_normal((40, 96, 64), np.float32).astype(ml_dtypes.bfloat16)
    out = sparse_attend(q, kv, indices, softmax_scale=0.2, value_dim=48, backend="cpu")
    monkeypatch.setenv("DSA_CPU_THREADS", threads)
    for row in (0, 17, 39):
        one = {name: value[row : row + 1] for name, value in operands.items() if name in ("q", "weights")}
        batch = Batch.of([1], [700 - 40 + row + 1], cu_seqlens_k=np.array([0, 700 - 40 + row + 1], np.int32))
        alone = lightning_index(**{**operands, **one, "batch": batch}, topk=64, return_scores=True, backend="cpu")
        assert [a.tobytes() for a in alone] == [indices[row].tobytes(), scores[row].tobytes()]
        attended = sparse_attend(
            q[row : row + 1], kv, indices[row : row + 1], softmax_scale=0.2, value_dim=48, batch=batch, backend="cpu"
        )
        assert attended.tobytes() == out[row].tobytes()
    again = lightning_index(**operands, topk=64, return_scores=True, backend="cpu")
    assert [a.tobytes() for a in again] == [indices.tobytes(), scores.tobytes()]


def test_keys_that_are_appended_in_place_are_seen(instructions: str) -> None:
    """Nothing of a cache is kept from one step to the next, so nothing of it can be stale."""
    operands = index_operands("e4m3", 1, 400)
    for seen in range(300, 303):
        batch = Batch.of([1], [seen], cu_seqlens_k=np.array([0, seen], np.int32))
        _, scores = lightning_index(**{**operands, "batch": batch}, topk=seen, return_scores=True, backend="cpu")
        fresh = {**operands, "k": operands["k"].copy(), "batch": batch}
        _, again = lightning_index(**fresh, topk=seen, return_scores=True, backend="cpu")
        assert scores.tobytes() == again.tobytes()
        operands["k"][seen - 1 : seen + 1] = operands["q"][0, :2]
    _, scores = lightning_index(**{**operands, "batch": batch}, topk=seen, return_scores=True, backend="cpu")
    assert (
        scores[0, seen - 1]
        == chain({**operands, "k": operands["q"][0, :1]} | {"k_scale": operands["k_scale"][[seen - 1]]})[0, 0]
    )


@pytest.mark.parametrize("size", [40, 1023, 1024, 5000])
@pytest.mark.parametrize("kind", ["plain", "ties", "zeros", "odd", "small", "sorted"])
def test_selection(instructions: str, size: int, kind: str) -> None:
    """Of what a sample misleads, and of what is not a number, exactly what NumPy's partition selects."""
    rng = np.random.default_rng(size)
    scores = rng.standard_normal((5, size)).astype(np.float32)
    if kind == "ties":
        scores = np.round(scores)
    elif kind == "zeros":
        scores[:], scores[:, ::2] = 0, -0.0
    elif kind == "odd":
        for value in (np.nan, np.inf, -np.inf):
            scores[rng.random(scores.shape) < 0.2] = value
    elif kind == "small":
        scores *= np.float32(1e-40)
    elif kind == "sorted":
        scores.sort(axis=1)
    starts, ends = (np.ascontiguousarray(a, np.int32) for a in ([0, 3, 0, 5, 9], [size, size, 17, size - 5, 9]))
    padded = np.concatenate([scores, np.full((5, 16), np.inf, np.float32)], axis=1)
    for topk in (1, 16, size // 3, size - 1, size + 4):
        indices, scratch = np.full((5, topk), -1, np.int32), np.empty(select.scratch_bytes(size + 16, topk), np.uint8)
        pointers = (array.ctypes.data for array in (starts, ends, indices, scratch))
        a, b, c, d = pointers
        compile.selecting()(padded.ctypes.data, size + 16, 5, 0, a, b, topk, c, indices.strides[0], d)
        for row in range(5):
            chosen = top(scores[row, starts[row] : ends[row]], topk) + starts[row]
            assert indices[row].tolist() == [*chosen, *[-1] * (topk - len(chosen))]


def test_exp_is_within_its_declaration(instructions: str) -> None:
    """Two keys of one number: the share of the second is exp(x) / (1 + exp(x)), down to subnormal results."""
    x = np.concatenate([-np.logspace(-6, 2, 400), [-87.2, -87.4, -100.0, -103.0, -150.0]]).astype(np.float32)
    q = np.stack([np.ones_like(x), x], axis=1)[:, None].astype(np.float32)
    kv = np.array([[0, 0], [0, 1]], np.float32)
    indices = np.tile(np.array([0, 1], np.int32), (len(x), 1))
    out = sparse_attend(q, kv, indices, softmax_scale=1.0, value_dim=2, backend="cpu")[:, 0, 1]
    wide = x.astype(np.float64)
    truth = np.exp(wide) / (1 + np.exp(wide))
    smallest = 2.0**-149
    assert np.all(np.abs(out - truth) <= np.maximum(4 * 2.0**-24 * truth, smallest))


@pytest.mark.parametrize("heads", [1, 16, 17, 48, 65, 128])
def test_attention_of_any_number_of_heads(instructions: str, heads: int) -> None:
    rng = np.random.default_rng(heads)
    q, kv = rng.standard_normal((3, heads, 40), np.float32), rng.standard_normal((200, 40), np.float32)
    indices = rng.integers(-3, 200, (3, 150)).astype(np.int32)
    for dtype, error in ((np.float32, 1e-5), (ml_dtypes.bfloat16, 2e-2)):
        q, kv = q.astype(dtype), kv.astype(dtype)
        out = sparse_attend(q, kv, indices, softmax_scale=0.3, value_dim=24, batch=Batch.dense(3, 200), backend="cpu")
        for row in range(3):
            keys = kv[indices[row][indices[row] >= 0]].astype(np.float64)
            p = np.exp(0.3 * q[row].astype(np.float64) @ keys.T)
            np.testing.assert_allclose(out[row].astype(np.float64), p @ keys[:, :24] / p.sum(1, keepdims=True), atol=error)


def test_the_profile_is_of_the_instruction_set_that_runs(instructions: str) -> None:
    device, pairs = BACKEND.probe(), isa.NAMED[instructions].pairs
    assert device.versions["isa"] == instructions
    index, attention = (
        BACKEND.profile(device, *what, "prefill") for what in (("lightning_index", "bf16/f32/-"), ("sparse_attend", "bf16"))
    )
    assert index.subnormals == attention.subnormals == ("flushed" if pairs else "kept")
    assert attention.p == ("bfloat16" if pairs else "float32")
    assert BACKEND.profile(device, "lightning_index", "e4m3/f32/f32", "decode").subnormals == "kept"


# --- AMX without a chip that has it ---


@pytest.mark.skipif("avx512" not in HERE, reason="the emulated tiles are filled with AVX512")
@pytest.mark.parametrize("format", ["e4m3", "int8", "bf16"])
@pytest.mark.parametrize(("rows", "keys", "heads", "dim"), [(3, 600, 64, 128), (2, 61, 5, 33), (2, 513, 96, 128)])
def test_emulated_tiles_score(
    monkeypatch: pytest.MonkeyPatch, recompiled: None, format: str, rows: int, keys: int, heads: int, dim: int
) -> None:
    tiles_emulated.install(monkeypatch)
    for name, value in (("ENGINE", "jit"), ("ISA", "amx"), ("THREADS", "1")):
        monkeypatch.setenv(f"DSA_CPU_{name}", value)
    operands = index_operands(format, rows, keys, heads, dim)
    _, scores = lightning_index(**operands, topk=keys, return_scores=True, backend="cpu")
    truth = chain(operands)
    for row in range(rows):
        seen = keys - rows + row + 1
        np.testing.assert_allclose(scores[row, :seen], truth[row, :seen], atol=1e-6 * np.abs(truth).max())


@pytest.mark.skipif("avx512" not in HERE, reason="the emulated tiles are filled with AVX512")
@pytest.mark.parametrize(("heads", "dim", "value_dim", "keys"), [(20, 36, 20, 300), (128, 64, 64, 31), (48, 70, 33, 700)])
def test_emulated_tiles_attend(
    monkeypatch: pytest.MonkeyPatch, recompiled: None, heads: int, dim: int, value_dim: int, keys: int
) -> None:
    tiles_emulated.install(monkeypatch)
    for name, value in (("ENGINE", "jit"), ("ISA", "amx"), ("THREADS", "1")):
        monkeypatch.setenv(f"DSA_CPU_{name}", value)
    rng = np.random.default_rng(heads)
    q, kv = (rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16) for shape in ((2, heads, dim), (900, dim)))
    indices = rng.integers(-3, 900, (2, keys)).astype(np.int32)
    options: dict[str, Any] = {"softmax_scale": 0.3, "value_dim": value_dim, "batch": Batch.dense(2, 900), "return_lse": True}
    out, lse = sparse_attend(q, kv, indices, **options, backend="cpu")
    for row in range(2):
        chosen = kv[indices[row][indices[row] >= 0]].astype(np.float64)
        logits = 0.3 * q[row].astype(np.float64) @ chosen.T
        p = np.exp(logits - logits.max(1, keepdims=True))
        truth = p @ chosen[:, :value_dim] / p.sum(1, keepdims=True)
        assert np.linalg.norm(out[row].astype(np.float64) - truth) < 4e-3 * np.linalg.norm(truth)
        np.testing.assert_allclose(lse[row], logits.max(1) + np.log(p.sum(1)), atol=1e-5)


# --- which engine runs ---


def test_an_instruction_set_that_is_not_here_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "_features", lambda: frozenset({"avx2", "fma", "f16c", "popcnt", "bmi", "bmi2"}))
    monkeypatch.setenv("DSA_CPU_ISA", "avx512")
    with pytest.raises(DeviceUnavailable, match=r"DSA_CPU_ISA is 'avx512', but this processor has no avx512f; unset it"):
        BACKEND.probe()
    monkeypatch.setenv("DSA_CPU_ISA", "avx10")
    with pytest.raises(DeviceUnavailable, match=r"DSA_CPU_ISA is 'avx10', but amx, .* are instruction sets"):
        BACKEND.probe()
    monkeypatch.delenv("DSA_CPU_ISA")
    assert compile.chosen().name == "avx2"
    monkeypatch.setattr(compile, "_features", frozenset)
    monkeypatch.setenv("DSA_CPU_ENGINE", "jit")
    with pytest.raises(DeviceUnavailable, match=r"the jit engine needs AVX2, but this processor has no avx2"):
        BACKEND.probe()


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("sys.modules['llvmlite'] = None", "llvmlite"),
        ("compile._features = frozenset", "the jit engine needs AVX2"),
        ("selftest.top = lambda scores, topk: top(-scores, topk)", "its kernels give wrong numbers on this processor"),
    ],
)
def test_anything_else_takes_the_onnx_engine_and_says_why(broken: str, reason: str) -> None:
    code = "import sys\n"
    if "llvmlite" not in broken:
        code += "from dsa_portable.backends.cpu.jit import compile, selftest\n"
        code += "from dsa_portable.backends.cpu.index_select import top\n"
    code += f"{broken}\nfrom dsa_portable.backends.cpu import BACKEND\nprint(dict(BACKEND.probe().versions))"
    env = {name: value for name, value in os.environ.items() if not name.startswith("DSA_")}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert "'engine': 'onnx'" in said
    assert f"'jit': 'not used: {reason}" in said


# --- faults ---


def _unswapped(code: emit.Code, format: str, paired: bool, source: Any, d: Any, target: Any, count: int) -> None:
    type = widen.STORED[format]
    stored = code.load(source, d, emit.ir.VectorType(type, count), type)
    if paired:
        code.store(widen.to_bfloat16(code, format, stored), target, d, emit.I16)
    else:
        code.store(widen.to_float32(code, format, stored), target, d, emit.F32)


def _index_is_the_chain() -> None:
    operands = index_operands("bf16", 3, 300)
    _, scores = lightning_index(**operands, topk=300, return_scores=True, backend="cpu")
    assert scores[2].tobytes() == chain(operands)[2].tobytes()


def _selftest_agrees() -> None:
    assert not selftest.disagreement()


def _selects_signed_zeros() -> None:
    scores = np.zeros((1, 40 + 16), np.float32)
    scores[0, ::2] = -0.0
    indices, scratch = np.full((1, 8), -1, np.int32), np.empty(select.scratch_bytes(56, 8), np.uint8)
    ends = np.array([40], np.int32)
    starts = np.zeros(1, np.int32)
    a, b, c, d = (array.ctypes.data for array in (starts, ends, indices, scratch))
    compile.selecting()(scores.ctypes.data, 56, 1, 0, a, b, 8, c, 32, d)
    assert indices[0].tolist() == list(range(8))


def _attends() -> None:
    rng = np.random.default_rng(0)
    q, kv = rng.standard_normal((1, 16, 32), np.float32), rng.standard_normal((300, 32), np.float32)
    indices = np.arange(300, dtype=np.int32)[None]
    out = sparse_attend(q, kv, indices, softmax_scale=1.0, value_dim=16, batch=Batch.dense(1, 300), backend="cpu")
    p = np.exp(q[0].astype(np.float64) @ kv.T)
    np.testing.assert_allclose(out[0], p @ kv[:, :16] / p.sum(1, keepdims=True), rtol=1e-4, atol=1e-5)


def _signed(code: emit.Code, scores: Any, i: Any, seen: Any) -> tuple[Any, Any]:
    b, score = code.b, code.load(scores, i, emit.V, emit.F32)
    bits = b.bitcast(score, emit.VI)
    sign = b.or_(b.ashr(bits, emit.constant(emit.VI, 31)), emit.constant(emit.VI, -(2**31)))
    return b.xor(bits, sign), b.icmp_signed("<", select._lanes(code, i), code.splat(b.trunc(seen, emit.I32)))


_key = score._key


def _neighbour(code: emit.Code, position: Any) -> Any:
    b = code.b
    last = b.icmp_signed("==", b.and_(position, emit.I64(score.TILE - 1)), emit.I64(score.TILE - 1))
    return _key(code, b.sub(position, b.zext(last, emit.I64)))


def _last(code: emit.Code, lanes: Any) -> Any:
    """The highest of the lanes."""
    turned = code.call("llvm.bitreverse.i16", select.BITS, lanes)
    return code.call("llvm.bitreverse.i16", select.BITS, code.b.and_(turned, code.b.neg(turned)))


def _never(self: Any, h: Any, old: Any, new: Any) -> None:
    return None


def _of_the_neighbour(code: emit.Code, place: Any) -> None:
    """Tiles of fifteen rows: what is configured for somebody else's kernel."""
    for i in range(8):
        code.store(emit.I64(1 if i == 0 else 0), place, i)
    for tile in range(8):
        code.store(emit.I16(4 * tiles.SIDE), place, 8 + tile)
        code.store(emit.I8(tiles.SIDE - 1), place, 48 + tile)
    code.call("llvm.x86.ldtilecfg", emit.VOID, place)


PLANTED: tuple[tuple[str, Any, str, Any, Callable[[], None], str], ...] = (
    ("pairs in the other order", widen, "_write", _unswapped, _index_is_the_chain, "avx512-bf16"),
    ("a tile that reads its last key but one twice", score, "_key", _neighbour, _selftest_agrees, ""),
    ("ties to the higher index", select, "_first", _last, _selects_signed_zeros, ""),
    ("-0.0 below 0.0", select, "_ranks", _signed, _selects_signed_zeros, ""),
    ("tiles as a neighbour configures them", tiles, "configure", _of_the_neighbour, _selftest_agrees, "amx"),
    ("sums not scaled to the new maximum", attend.Attend, "_rescale", _never, _attends, ""),
)


@pytest.mark.parametrize(("name", "owner", "attribute", "fault", "check", "only"), PLANTED, ids=[p[0] for p in PLANTED])
def test_a_planted_fault_is_caught(
    monkeypatch: pytest.MonkeyPatch,
    recompiled: None,
    name: str,
    owner: Any,
    attribute: str,
    fault: Any,
    check: Callable[[], None],
    only: str,
) -> None:
    if only and only not in HERE:
        pytest.skip(f"this processor has no {only}")
    monkeypatch.setenv("DSA_CPU_ENGINE", "jit")
    monkeypatch.setenv("DSA_CPU_ISA", only or HERE[-1])
    check()
    compile._scoring.cache_clear(), compile._selecting.cache_clear(), compile._attending.cache_clear()
    monkeypatch.setattr(owner, attribute, fault)
    with pytest.raises(AssertionError):
        check()
