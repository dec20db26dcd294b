"""Rates of the CUDA backend on this card, beside what the card gives in the same run: python benchmarks/cuda.py

Random data; medians of CUDA-event times over alternating data sets larger than the second-level cache; decode in CUDA graphs.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dsa_portable import Batch, lightning_index, sparse_attend
from dsa_portable.backends.cuda import device

SCALE = 0.1352337788608801
TOPK = 2048
rows: list[dict[str, Any]] = []


def seconds(calls: Sequence[Callable[[], object]], repeat: int = 20) -> float:
    """Median time of a call; the calls take turns, so that no data set is found in the cache."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    times = []
    for i in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        calls[i % len(calls)]()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def in_graph(call: Callable[[], object]) -> Callable[[], object]:
    """The call as one graph launch."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def say(what: str, time: float, rate: float, unit: str, ceiling: float) -> None:
    """One line of the table, with the ratio to what the card gave in this run."""
    rows.append({"what": what, "seconds": time, "rate": rate, "unit": unit, "ratio": rate / ceiling})
    print(f"{what:60} {1e6 * time:10.1f} us  {rate:8.1f} {unit:8} {rate / ceiling:6.1%} of the card", flush=True)


def ceilings() -> tuple[float, float, float]:
    """(copy in TB/s, bf16 and fp8 matrix products in TFLOP/s), measured now."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds([lambda: target.copy_(source)]) / 1e12
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bf16 = 2 * 8192**3 / seconds([lambda: a @ b]) / 1e12
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device="cuda")
    fp8 = 2 * 8192**3 / seconds([lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)]) / 1e12
    print(f"copy {copy:.2f} TB/s, bf16 {bf16:.0f} TFLOP/s, fp8 {fp8:.0f} TFLOP/s", flush=True)
    return copy, bf16, fp8


def attend(queries: int, heads: int, requests: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    """A call: each request has 65,536 keys and queries / requests rows of sorted random indices."""
    keys = 65536
    kv = torch.randn(keys * requests, 576, device="cuda", dtype=dtype)
    q = torch.randn(queries, heads, 576, device="cuda", dtype=dtype)
    indices = torch.stack([torch.randperm(keys, device="cuda")[:TOPK].sort().values for _ in range(min(queries, 512))]).int()
    indices = indices.repeat(-(-queries // len(indices)), 1)[:queries].contiguous()
    batch = on_device(Batch.of([queries // requests] * requests, [keys] * requests))
    return lambda: sparse_attend(q, kv, indices, softmax_scale=SCALE, batch=batch, return_lse=True)


def index(queries: int, requests: int, causal: bool = False) -> Callable[[], object]:
    """A call over e4m3 keys, 65,536 a request."""
    keys = 65536
    q = torch.randn(queries, 64, 128, device="cuda").to(torch.float8_e4m3fn)
    k = torch.randn(keys * requests, 128, device="cuda").to(torch.float8_e4m3fn)
    scale = torch.rand(keys * requests, device="cuda") + 0.5
    weights = torch.randn(queries, 64, device="cuda")
    batch = on_device(Batch.of([queries // requests] * requests, [keys] * requests, causal=causal))
    return lambda: lightning_index(q, k, weights, k_scale=scale, topk=TOPK, batch=batch)


def on_device(batch: Batch) -> Batch:
    """The batch with its lengths where a server keeps them."""
    arrays, integers = batch.flatten()
    return Batch.unflatten([None if a is None else device.put(a) for a in arrays], integers)


def main() -> None:
    """Print the table; the rows as JSON into the file that is named, if one is."""
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    copy, bf16, fp8 = ceilings()
    for heads in (128, 64, 32, 16):
        flop = 2 * 4096 * heads * TOPK * (576 + 512)
        time = seconds([attend(4096, heads, 1)], 10)
        say(f"attend prefill 4096 x {heads} heads x {TOPK} of 65,536", time, flop / time / 1e12, "TFLOP/s", bf16)
    for requests in (64, 8, 1):
        moved = requests * (TOPK * 576 + 128 * (576 + 512)) * 2
        time = seconds([in_graph(attend(requests, 128, requests)) for _ in range(2)])
        say(f"attend decode {requests} requests x 128 heads", time, moved / time / 1e12, "TB/s", copy)
    for causal in (False, True):
        time = seconds([index(4096, 1, causal)], 10)
        flop = 2 * 4096 * 65536 * 64 * 128
        say(f"index prefill 4096 x 65,536, top-k{', causal' * causal}", time, flop / time / 1e12, "TFLOP/s", fp8)
    for requests in (64, 8, 1):
        moved = requests * 65536 * 132
        time = seconds([in_graph(index(requests, requests)) for _ in range(2)])
        say(f"index decode {requests} requests x 65,536, top-k", time, moved / time / 1e12, "TB/s", copy)
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
