"""What only a GPU can show: streams, devices, graphs, synchronisation, threads, its exponential. Skipped without one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from dsa_portable import Batch, InvalidArgument, lightning_index, merge, sparse_attend
from dsa_portable.backends.cuda import device, plan
from dsa_portable.conformance.hosts.triton import requested

pytestmark = pytest.mark.skipif(requested() or not torch.cuda.is_available(), reason="needs a GPU, and none was found")

KEYS, TOPK = 3000, 512


@triton.jit
def exponential(x, y, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """y = 2^x."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + place, tl.exp2(tl.load(x + place)))


def on(where: str, batch: Batch) -> Batch:
    """The batch with its arrays on a device, where a server keeps them."""
    arrays, integers = batch.flatten()
    return Batch.unflatten([None if a is None else torch.from_numpy(np.array(a)).to(where) for a in arrays], integers)


def call(where: str = "cuda", rows: int = 3, requests: int = 2, heads: int = 64) -> dict[str, Any]:
    """Arguments of sparse_attend."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(rows * requests, heads, 576, generator=generator).bfloat16().to(where)
    kv = torch.randn(KEYS * requests, 576, generator=generator).bfloat16().to(where)
    indices = torch.stack([torch.randperm(KEYS, generator=generator)[:TOPK] for _ in range(len(q))]).int().to(where)
    batch = on(where, Batch.of([rows] * requests, [KEYS] * requests))
    return {"q": q, "kv": kv, "indices": indices, "softmax_scale": 0.13, "batch": batch, "return_lse": True}


def index_call(where: str = "cuda", rows: int = 3) -> dict[str, Any]:
    """Arguments of lightning_index."""
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(rows, 64, 128, generator=generator).to(torch.float8_e4m3fn).to(where)
    k = torch.randn(KEYS, 128, generator=generator).to(torch.float8_e4m3fn).to(where)
    weights = torch.randn(rows, 64, generator=generator).to(where)
    scale = (torch.rand(KEYS, generator=generator) + 0.5).to(where)
    return {"q": q, "k": k, "weights": weights, "k_scale": scale, "topk": TOPK, "batch": on(where, Batch.of([rows], [KEYS]))}


def test_work_is_on_the_callers_stream() -> None:
    arguments, stream = call(), torch.cuda.Stream()
    expected = sparse_attend(**arguments)[0]
    q = torch.zeros_like(arguments["q"])
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        q.copy_(arguments["q"])
        found = sparse_attend(**{**arguments, "q": q})[0]
    stream.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_work_is_on_the_tensors_device() -> None:
    expected, selected = sparse_attend(**call("cuda:0"))[0], lightning_index(**index_call("cuda:0"))
    with torch.cuda.device(0):
        found, indices = sparse_attend(**call("cuda:1"))[0], lightning_index(**index_call("cuda:1"))
    assert (found.device.index, indices.device.index) == (1, 1)
    assert torch.equal(found.cpu(), expected.cpu())
    assert torch.equal(indices.cpu(), selected.cpu())


def test_a_graph_replays_with_new_lengths() -> None:
    arguments, selection = call(), index_call()
    for _ in range(2):
        sparse_attend(**arguments)
        lightning_index(**selection)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sparse_attend(**arguments)[0]
        indices = lightning_index(**selection)
    for length in (KEYS, 700):
        arguments["batch"].seqlens_k.fill_(length)
        selection["batch"].seqlens_k.fill_(length)
        graph.replay()
        assert torch.equal(out, sparse_attend(**arguments)[0])
        assert torch.equal(indices, lightning_index(**selection))


def test_a_call_is_replayed_with_its_own_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_plans", OrderedDict())
    for operator, arguments in ((sparse_attend, call()), (lightning_index, index_call())):
        other = {n: a.flip(0).contiguous() if isinstance(a, torch.Tensor) else a for n, a in arguments.items()}
        first = operator(**arguments)
        known = len(plan._plans)
        replayed, again = operator(**other), operator(**arguments)
        assert len(plan._plans) == known, "the call was not replayed"
        plan._plans.clear()
        for a, b in zip((replayed, again), (operator(**other), first), strict=True):
            for x, y in zip(a if isinstance(a, tuple) else (a,), b if isinstance(b, tuple) else (b,), strict=True):
                assert torch.equal(x, y)


def test_a_capture_that_would_compile_is_refused() -> None:
    # No other test reads float16 keys of 512 numbers.
    arguments = call()
    arguments |= {"q": arguments["q"][..., :512].half().contiguous(), "kv": arguments["kv"][..., :512].half().contiguous()}
    with pytest.raises(InvalidArgument, match="not compiled yet"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        sparse_attend(**arguments)
    sparse_attend(**arguments)


def test_host_lengths_are_refused_in_a_capture() -> None:
    arguments = {**call(), "batch": Batch.of([3, 3], [KEYS, KEYS])}
    sparse_attend(**arguments)
    with pytest.raises(InvalidArgument, match="put the batch on the device"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        sparse_attend(**arguments)


def test_nothing_waits_for_the_device() -> None:
    arguments, selection = call(), index_call()
    out, lse = sparse_attend(**arguments)
    lightning_index(**selection)
    flat = arguments["batch"]
    table = torch.arange(2 * 47, dtype=torch.int32, device="cuda").reshape(2, 47)
    paged = flat.with_pages(table, 64)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sparse_attend(**arguments)
        lightning_index(**selection)
        merge([out, out], [lse, lse])
        flat.from_flat(flat.to_flat(arguments["indices"]))
        paged.to_slots(arguments["indices"])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_threads_get_the_same_bits() -> None:
    arguments, selection = call(), index_call()
    expected = (sparse_attend(**arguments)[0], lightning_index(**selection))
    found: list[bool] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                results = (sparse_attend(**arguments)[0], lightning_index(**selection))
                torch.cuda.current_stream().synchronize()
                found.append(all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)))

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80


def test_the_witness_counts_kernels() -> None:
    before = device.witness()
    sparse_attend(**call())
    torch.cuda.synchronize()
    assert device.witness() == before + 2  # which rows belong to whom, and the attention


def test_the_exponential_errs_by_no_more_than_is_declared() -> None:
    worst = 0.0
    # Every float32 mantissa of every exponent from -2^-30 to -64, below which nothing is left of a probability.
    for exponent in range(97, 133):
        bits = torch.arange(1 << 23, dtype=torch.int32, device="cuda") + (exponent << 23)
        x = -bits.view(torch.float32)
        y = torch.empty_like(x)
        exponential[(len(x) // 1024,)](x, y, BLOCK=1024)
        exact = torch.exp2(x.double())
        worst = max(worst, float(((y.double() - exact) / exact).abs().max()) * 2**24)
    print(f"exp2: {worst:.2f} units of 2^-24")
    assert worst <= device.profile(device.probe(), "sparse_attend", "bf16", "prefill").exp_ulp


def test_a_cache_folder_that_cannot_be_written_is_said() -> None:
    code = "from test_device import *\nsparse_attend(**call())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=os.path.dirname(__file__),
        env={**os.environ, "TRITON_CACHE_DIR": "/proc/no-such-folder"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("dsa_portable.errors.DeviceUnavailable: Triton could not compile or keep a kernel"), done.stderr[
        -500:
    ]
    assert last.endswith("set TRITON_CACHE_DIR to a folder that can be written.")
