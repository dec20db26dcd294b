"""Torch tensors where NumPy arrays go: the same memory, the same bits, the same refusals; meta tensors are never read."""

from __future__ import annotations

import subprocess
import sys
from inspect import signature
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dsa_portable import Batch, InvalidArgument, Unsupported, arrays, lightning_index, merge, sparse_attend
from dsa_portable.batch import ARRAYS, batch_as_kind
from dsa_portable.formats import pack, quantise_e4m3fn
from dsa_portable.operators import REQUESTS

torch = pytest.importorskip("torch")
dispatch = pytest.importorskip("torch.utils._python_dispatch")

NDArray = npt.NDArray[Any]


def bits(array: Any) -> NDArray:
    """The bytes, so that NaN and -0.0 compare as what they are."""
    return np.ascontiguousarray(arrays.to_numpy(array)).view(np.uint8)


def to_torch(value: Any) -> Any:
    return arrays.as_kind(value, "torch")


def every_bit_pattern(name: str) -> NDArray:
    dtype = arrays.NUMPY_DTYPES[name]
    return np.arange(256, dtype=np.uint8).repeat(8).view(dtype).reshape(-1, 4)[::2]


# --- arrays ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", arrays.NUMPY_DTYPES)
def test_the_same_memory_both_ways(name: str) -> None:
    array = every_bit_pattern(name)
    tensor = arrays.from_numpy(array)
    assert tensor.dtype == getattr(torch, name)
    assert tensor.data_ptr() == array.__array_interface__["data"][0]
    assert tuple(tensor.stride()) == tuple(n // array.itemsize for n in array.strides)
    again = arrays.to_numpy(tensor)
    assert again.dtype == array.dtype
    assert again.__array_interface__["data"][0] == tensor.data_ptr()
    np.testing.assert_array_equal(bits(again), bits(array))
    tensor.view(torch.uint8)[0, 0] += 1
    np.testing.assert_array_equal(bits(again), bits(array))


@pytest.mark.parametrize("name", arrays.NUMPY_DTYPES)
def test_one_name_for_both(name: str) -> None:
    tensor = torch.zeros((2, 3), dtype=getattr(torch, name))
    assert arrays.dtype_name(tensor) == name
    assert arrays.describe(tensor) == f"{name} [2, 3] on cpu" == arrays.describe(arrays.to_numpy(tensor))
    assert arrays.cast(torch.ones(2), name).dtype == tensor.dtype
    assert (arrays.kind(tensor), arrays.on_host(tensor), arrays.namespace(tensor)) == ("torch", True, torch)


def test_a_tensor_that_needs_a_gradient() -> None:
    tensor = torch.ones(3, requires_grad=True)
    assert arrays.to_numpy(tensor).__array_interface__["data"][0] == tensor.data_ptr()


def test_a_negative_stride_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"^an array, int64 \[3\] on cpu, has a negative stride, .*; pass a copy\.$"):
        arrays.from_numpy(np.arange(3)[::-1])


def test_the_first_tensor_imports_torch() -> None:
    """A backend's `put` may be the first in its process that needs torch; before it, nothing of ours has imported it."""
    code = """
import sys
import numpy as np
from dsa_portable import arrays
array = np.arange(3)
assert (arrays.kind(array), arrays.as_kind(array, "numpy") is array) == ("numpy", True)
assert (arrays.namespace(array), arrays.cast(array, "int32").dtype) == (np, np.int32)
assert "torch" not in sys.modules
tensor = arrays.from_numpy(array)
assert tensor.data_ptr() == array.__array_interface__["data"][0]
assert (arrays.kind(tensor), arrays.namespace(tensor)) == ("torch", sys.modules["torch"])
assert arrays.dtype_name(arrays.cast(tensor, "bfloat16")) == "bfloat16"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_beside() -> None:
    array, tensor, meta = np.arange(3), torch.arange(3), torch.arange(3, device="meta")
    assert arrays.beside(array, tensor).data_ptr() == array.__array_interface__["data"][0]
    assert np.shares_memory(arrays.beside(tensor, array), arrays.to_numpy(tensor))
    assert arrays.beside(array, meta).device.type == "meta"
    for host in (array, tensor):
        with pytest.raises(InvalidArgument, match=r"int64 \[3\] on meta meets int64 \[3\] on cpu, but one device is accepted"):
            arrays.beside(meta, host)


def test_what_is_on_a_device_stays_there() -> None:
    """A request of the other kind moves nothing between devices: a backend that takes NumPy arrays is given the tensor."""
    there = torch.zeros(2, dtype=torch.int32, device="meta")
    assert arrays.host_as_kind(there, "numpy") is there
    batch = Batch(there, there[:1], there, max_seqlen_q=1, max_seqlen_k=1)
    assert batch_as_kind(batch, "numpy") is batch


def test_a_tensor_is_no_integer() -> None:
    assert arrays.as_int(torch.tensor(3)) is None


# --- calls -----------------------------------------------------------------------------------------------------------------

RNG = np.random.default_rng(0)
PAGES = np.array([[2, 0, 9], [1, 3, -5]], np.int32)


def normal(*shape: int, dtype: str = "float32") -> NDArray:
    array: NDArray = arrays.cast(RNG.normal(size=shape).astype(np.float32), dtype)
    return array


def index_call(dtype: str = "float32", **changes: Any) -> dict[str, Any]:
    arguments = {"q": normal(5, 4, 8, dtype=dtype), "k": normal(9, 8, dtype=dtype), "weights": normal(5, 4), "topk": 3}
    return {**arguments, "return_scores": True, **changes}


def quantised_call() -> dict[str, Any]:
    keys, scale = quantise_e4m3fn(normal(9, 8))
    return index_call(q=quantise_e4m3fn(normal(5, 4, 8))[0], k=keys, k_scale=scale)


def cache_call() -> dict[str, Any]:
    keys, scale = quantise_e4m3fn(normal(4, 4, 128))
    cache = pack("idx_fp8_132_planar", keys, scale)
    batch = Batch.of([2, 2], [7, 8], block_table=PAGES, page_size=4)
    return index_call(q=quantise_e4m3fn(normal(5, 4, 128))[0], k=cache, k_layout="idx_fp8_132_planar", batch=batch)


def attend_call(dtype: str = "float32", **changes: Any) -> dict[str, Any]:
    indices = RNG.integers(-1, 10, (5, 6)).astype(np.int32)
    arguments = {"q": normal(5, 2, 8, dtype=dtype), "kv": normal(9, 8, dtype=dtype), "indices": indices, "softmax_scale": 0.4}
    return {**arguments, "value_dim": 6, "return_lse": True, **changes}


def kv_cache_call() -> dict[str, Any]:
    latent, scale = quantise_e4m3fn(normal(4, 4, 512), group=128)
    cache = pack("v32_fp8_656_nsr", latent, scale, normal(4, 4, 64, dtype="bfloat16"))
    batch = Batch.of([2, 2], [7, 8], block_table=PAGES, page_size=4)
    arguments = attend_call("bfloat16", q=normal(5, 2, 576, dtype="bfloat16"), kv=cache, kv_layout="v32_fp8_656_nsr")
    return {**arguments, "value_dim": 512, "batch": batch, "attn_sink": normal(2), "topk_length": np.arange(5, dtype=np.int32)}


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{f"index {d}": (lightning_index, index_call(d)) for d in ("float32", "bfloat16", "float16")},
    "index quantised": (lightning_index, quantised_call()),
    "index cache": (lightning_index, cache_call()),
    **{f"attend {d}": (sparse_attend, attend_call(d)) for d in ("float32", "bfloat16", "float16")},
    "attend cache": (sparse_attend, kv_cache_call()),
    "attend ranges": (lightning_index, index_call(batch=Batch.of([2, 2], [4, 5], causal=False))),
}


def in_torch(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call with every array a tensor, the batch's too."""
    tensors = {name: to_torch(value) for name, value in arguments.items()}
    if isinstance(tensors.get("batch"), Batch):
        fields, integers = tensors["batch"].flatten()
        tensors["batch"] = Batch.unflatten([to_torch(a) for a in fields], integers)
    return tensors


def check_same(found: Any, expected: Any) -> None:
    for tensor, array in zip(found, expected, strict=True):
        assert isinstance(tensor, torch.Tensor)
        assert isinstance(array, np.ndarray)
        assert arrays.dtype_name(tensor) == arrays.dtype_name(array)
        np.testing.assert_array_equal(bits(tensor), bits(array))


@pytest.mark.parametrize("name", CALLS)
def test_tensors_give_the_bits_of_numpy(name: str) -> None:
    operator, arguments = CALLS[name]
    check_same(operator(**in_torch(arguments)), operator(**arguments))


@pytest.mark.parametrize("name", ["index cache", "attend cache"])
def test_q_decides_the_kind_of_the_result(name: str) -> None:
    """A NumPy batch with tensors, and a tensor batch with NumPy arrays."""
    operator, arguments = CALLS[name]
    tensors, expected = in_torch(arguments), operator(**arguments)
    check_same(operator(**{**tensors, "batch": arguments["batch"]}), expected)
    for found, array in zip(operator(**{**arguments, "batch": tensors["batch"]}), expected, strict=True):
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(bits(found), bits(array))


@pytest.mark.parametrize("name", ["index cache", "attend cache", "attend ranges"])
def test_a_batch_that_changes_kind_is_not_checked_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors reach a backend of NumPy arrays as the same memory, in a Batch that no constructor has seen."""
    operator, arguments = CALLS[name]
    tensors, expected = in_torch(arguments), operator(**arguments)

    def fail(batch: Batch) -> None:
        raise AssertionError("a Batch is constructed")

    checked: list[Batch] = []
    check_values = Batch._check_values
    monkeypatch.setattr(Batch, "__post_init__", fail)
    monkeypatch.setattr(Batch, "_check_values", lambda self, *read: (checked.append(self), check_values(self, *read)))
    check_same(operator(**tensors), expected)
    assert len(checked) == 1
    assert checked[0] is tensors["batch"]
    with pytest.raises(AssertionError, match="constructed"):
        Batch.unflatten(*tensors["batch"].flatten())


@pytest.mark.parametrize("name", ["index cache", "attend cache", "attend ranges"])
def test_a_request_of_the_other_kind_shares_its_memory(name: str) -> None:
    operator, arguments = CALLS[name]
    defaults = {p.name: p.default for p in signature(operator).parameters.values() if p.name not in ("backend", *arguments)}
    request = REQUESTS[operator.__name__].checked(**in_torch(arguments), **defaults)
    other = request.as_kind("numpy")
    assert other is not request
    assert request.as_kind("torch") is request
    for array, same in zip(request.batch.flatten()[0], other.batch.flatten()[0], strict=True):
        assert (array is None) == (same is None)
        if array is not None:
            assert isinstance(same, np.ndarray)
            assert np.shares_memory(array.numpy(), same)
    assert other.batch.flatten()[1] == request.batch.flatten()[1]
    back = other.as_kind("torch")
    assert all(isinstance(array, torch.Tensor) for array in (back.q, *(a for a in back.batch.flatten()[0] if a is not None)))


@pytest.mark.parametrize("name", CALLS)
def test_out_tensors_are_written_and_returned(name: str) -> None:
    operator, arguments = CALLS[name]
    tensors, expected = in_torch(arguments), operator(**arguments)
    # Every second column of a wider tensor, so that the strides must be kept.
    out = tuple(torch.ones((*a.shape[:-1], 2 * a.shape[-1])).to(getattr(torch, a.dtype.name))[..., ::2] for a in expected)
    found = operator(**tensors, out=out)
    assert all(a is b for a, b in zip(found, out, strict=True))
    check_same(out, expected)


def test_one_out_tensor() -> None:
    arguments = in_torch(attend_call("bfloat16", return_lse=False))
    out = torch.empty((5, 2, 6), dtype=torch.bfloat16)
    assert sparse_attend(**arguments, out=out) is out
    assert torch.equal(out, sparse_attend(**arguments))


def test_inputs_are_not_written_to() -> None:
    for operator, arguments in CALLS.values():
        tensors = in_torch(arguments)
        before = {name: bits(t).copy() for name, t in tensors.items() if isinstance(t, torch.Tensor)}
        operator(**tensors)
        for name, value in before.items():
            np.testing.assert_array_equal(bits(tensors[name]), value)


def test_an_operand_on_another_device() -> None:
    arguments = in_torch(index_call())
    with pytest.raises(InvalidArgument, match=r"k is float32 \[9, 8\] on meta, but q is on cpu; move them to one device"):
        lightning_index(**{**arguments, "k": arguments["k"].to("meta")})
    with pytest.raises(
        InvalidArgument, match=r"out for indices is int32 \[5, 3\] on meta, but int32 \[5, 3\] on cpu is accepted"
    ):
        lightning_index(**{**arguments, "return_scores": False}, out=torch.empty((5, 3), dtype=torch.int32, device="meta"))
    starts, lengths = (torch.zeros(n, dtype=torch.int32, device="meta") for n in (2, 1))
    batch = Batch(starts, lengths, starts, max_seqlen_q=5, max_seqlen_k=9)
    with pytest.raises(
        InvalidArgument, match=r"batch holds int32 .* on meta, but q is on cpu; keep it on the host or beside q"
    ):
        lightning_index(**arguments, batch=batch)


def test_reserved_formats() -> None:
    for dtype in (torch.float8_e4m3fnuz, torch.float4_e2m1fn_x2):
        with pytest.raises(Unsupported, match="only reserves this format") as caught:
            lightning_index(**{**in_torch(index_call()), "q": torch.zeros((5, 4, 8), dtype=torch.uint8).view(dtype)})
        assert caught.value.capability == "format"


def test_a_tensor_is_no_topk_and_no_scale() -> None:
    """Reading one would synchronise with its device."""
    with pytest.raises(InvalidArgument, match=r"topk is tensor\(3\), but an int >= 1 is accepted"):
        lightning_index(**{**in_torch(index_call()), "topk": torch.tensor(3)})
    with pytest.raises(InvalidArgument, match=r"softmax_scale is tensor\(0\.\d+\), but a finite float > 0"):
        sparse_attend(**{**in_torch(attend_call()), "softmax_scale": torch.tensor(0.4)})


# --- Batch -----------------------------------------------------------------------------------------------------------------

FLAT = Batch.of([2, 0, 3], [4, 3, 1], cu_seqlens_k=np.array([0, 6, 9, 12], np.int32))
RANGES = np.array([0, 2, 1, -1, 0, 5], np.int32)
RANGED = Batch.of([2, 0, 3], [4, 3, 1], key_start=RANGES, key_end=RANGES + 2)
PAGED = Batch.of([2, 3], [7, 8], block_table=PAGES, page_size=4, causal=False)
EMPTY = Batch.of([], [])
BATCHES = {"flat": FLAT, "ranged": RANGED, "paged": PAGED, "empty": EMPTY}
INDICES = np.array([[-1, 0, 3, 7, 8, -(2**31), 2**31 - 1, 2]] * 6, np.int32)


def tensor_batch(batch: Batch, device: str = "cpu") -> Batch:
    fields, integers = batch.flatten()
    return Batch.unflatten([None if a is None else to_torch(a).to(device) for a in fields], integers)


@pytest.mark.parametrize("name", BATCHES)
def test_rows_and_visibility(name: str) -> None:
    batch, tensors = BATCHES[name], tensor_batch(BATCHES[name])
    for found, expected in zip(
        (tensors.request_of_row(6), *tensors.key_range(6)), (batch.request_of_row(6), *batch.key_range(6)), strict=True
    ):
        assert found.dtype == torch.int32
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("mixed", [False, True], ids=["tensors", "NumPy batch"])
def test_index_spaces(name: str, mixed: bool) -> None:
    batch = BATCHES[name]
    tensors = batch if mixed else tensor_batch(batch)
    for helper in ("to_slots", "from_slots") if batch.block_table is not None else ("to_flat", "from_flat"):
        found = getattr(tensors, helper)(to_torch(INDICES))
        assert found.dtype == torch.int32
        assert found.tolist() == getattr(batch, helper)(INDICES).tolist()


def test_lengths_from_tensors() -> None:
    lengths = Batch(torch.tensor([0, 2, 5], dtype=torch.int32), torch.tensor([4, 1], dtype=torch.int32))
    assert (lengths.max_seqlen_q, lengths.max_seqlen_k) == (3, 4)
    assert isinstance(lengths.cu_seqlens_k, torch.Tensor)
    assert lengths.cu_seqlens_k.tolist() == [0, 4, 5]
    with pytest.raises(InvalidArgument, match=r"cu_seqlens_q is list .*never decrease"):
        Batch(torch.tensor([0, 2, 1], dtype=torch.int32), torch.tensor([4, 1], dtype=torch.int32))


class Unread(dispatch.TorchDispatchMode):  # type: ignore[misc, name-defined]
    """Fails on every operation that would bring a value to the host."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert function.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["flat", "ranged", "paged"])
def test_a_batch_on_a_device_is_never_read(name: str) -> None:
    """A meta tensor has no values, so whatever reads one raises; shapes and dtypes still come out right."""
    batch = tensor_batch(BATCHES[name], "meta")
    assert batch.phase == BATCHES[name].phase
    batch.check_bounds(6, 12)
    for array in (batch.request_of_row(6), *batch.key_range(6)):
        assert (array.device.type, array.dtype, tuple(array.shape)) == ("meta", torch.int32, (6,))
    convert = (batch.to_slots,) if batch.block_table is not None else (batch.to_flat, batch.from_flat)
    for helper in convert:
        slots = helper(to_torch(INDICES).to("meta"))
        assert (slots.device.type, slots.dtype, tuple(slots.shape)) == ("meta", torch.int32, INDICES.shape)
    again = Batch.unflatten(*batch.flatten())
    assert all(getattr(again, field) is getattr(batch, field) for field in ARRAYS)
    with pytest.raises(NotImplementedError, match="meta"):
        batch.validate()


@pytest.mark.parametrize("name", ["flat", "ranged", "paged"])
def test_helpers_bring_no_value_to_the_host(name: str) -> None:
    """The same on tensors with values, as on a GPU: no operation of the helpers synchronises."""
    batch, indices = tensor_batch(BATCHES[name]), to_torch(INDICES)
    with Unread():
        batch.request_of_row(6)
        batch.key_range(6)
        for helper in (batch.to_slots,) if batch.block_table is not None else (batch.to_flat, batch.from_flat):
            helper(indices)
        with pytest.raises(AssertionError):
            batch.seqlens_k[0].item()


def test_a_host_batch_meets_indices_on_a_device() -> None:
    indices = torch.empty((5, 3), dtype=torch.int32, device="meta")
    assert FLAT.to_flat(indices).device.type == "meta"
    assert tensor_batch(PAGED).to_slots(indices).device.type == "meta"


def test_a_batch_on_a_device_meets_indices_on_the_host() -> None:
    with pytest.raises(InvalidArgument, match=r"on meta meets int32 .* on cpu, but one device is accepted"):
        tensor_batch(FLAT, "meta").to_flat(INDICES)
    for batch, indices in ((tensor_batch(PAGED, "meta"), INDICES), (PAGED, to_torch(INDICES).to("meta"))):
        with pytest.raises(InvalidArgument, match="from_slots searches the block table on the host"):
            batch.from_slots(indices)


def test_what_is_on_the_host_is_checked_though_the_rest_is_not() -> None:
    table = torch.zeros((1, 2), dtype=torch.int32, device="meta")
    lengths: dict[str, Any] = {"cu_seqlens_q": np.array([0, 1], np.int32), "seqlens_k": np.array([5], np.int32)}
    batch = Batch(**lengths, block_table=table, page_size=4)
    assert batch.key_range(1)[1].device.type == "meta"
    with pytest.raises(InvalidArgument, match="max_seqlen_k is 4, but a request has 5"):
        Batch(**lengths, block_table=table, page_size=4, max_seqlen_k=4)


def test_lengths_on_a_device_need_their_maxima() -> None:
    meta = {name: torch.zeros(n, dtype=torch.int32, device="meta") for name, n in (("cu_seqlens_q", 2), ("seqlens_k", 1))}
    starts = torch.zeros(2, dtype=torch.int32, device="meta")
    Batch(**meta, cu_seqlens_k=starts, max_seqlen_q=1, max_seqlen_k=5)
    for missing in ({"cu_seqlens_k": starts, "max_seqlen_q": 1}, {"max_seqlen_q": 1, "max_seqlen_k": 5}):
        with pytest.raises(InvalidArgument, match="lengths on a device need max_seqlen_q, max_seqlen_k and cu_seqlens_k"):
            Batch(**meta, **missing)


# --- merge -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_merge(dtype: str) -> None:
    outs, lses = [normal(3, 2, 4, dtype=dtype) for _ in range(3)], [normal(3, 2) * 4 for _ in range(3)]
    for lse in lses:
        lse[1] = -np.inf
    outs[2][0], lses[2][0] = np.nan, -np.inf
    for sink in (None, np.array([0.5, np.inf], np.float32), np.array([-np.inf, 80], np.float32)):
        expected, expected_lse = merge(outs, lses, sink)
        out, lse = merge([to_torch(a) for a in outs], [to_torch(a) for a in lses], to_torch(sink))
        assert (out.dtype, lse.dtype) == (getattr(torch, dtype), torch.float32)
        tolerance = {"float32": 1e-6, "bfloat16": 2**-8, "float16": 2**-11}[dtype]
        np.testing.assert_allclose(out.float().numpy(), expected.astype(np.float32), rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(lse.numpy(), expected_lse, rtol=1e-6)
        assert not out[1].any()
        assert torch.isneginf(lse[1]).all()


def test_merge_of_mixed_kinds_follows_the_outs() -> None:
    out, lse = normal(3, 2, 4), normal(3, 2)
    found, found_lse = merge([to_torch(out)], [lse], np.zeros(2, np.float32))
    assert isinstance(found, torch.Tensor)
    assert isinstance(found_lse, torch.Tensor)
    with pytest.raises(InvalidArgument, match="one device"):
        merge([to_torch(out)], [to_torch(lse).to("meta")])


def test_merge_on_a_device_reads_nothing() -> None:
    outs = [torch.empty((3, 2, 4), dtype=torch.bfloat16, device="meta")] * 2
    out, lse = merge(outs, [torch.empty((3, 2), device="meta")] * 2, torch.empty(2, device="meta"))
    assert (out.device.type, out.dtype, tuple(out.shape)) == ("meta", torch.bfloat16, (3, 2, 4))
    assert (lse.device.type, lse.dtype, tuple(lse.shape)) == ("meta", torch.float32, (3, 2))
