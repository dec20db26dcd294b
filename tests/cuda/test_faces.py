"""torch.library's face over the CUDA backend: opcheck, one compiled graph, a step that replays what the device holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import dsa_portable
from dsa_portable import Batch
from dsa_portable.conformance.hosts.triton import requested

pytestmark = pytest.mark.skipif(requested() or not torch.cuda.is_available(), reason="needs a GPU, and none was found")

REQUESTS, PAGE, PAGES, TOPK = 3, 64, 40, 256


def decode_step() -> dict[str, torch.Tensor | Batch]:
    """Tensors of a paged decode step of one layer: two caches, one block table."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).cuda()

    table = torch.randperm(REQUESTS * PAGES, generator=generator, dtype=torch.int32).reshape(REQUESTS, PAGES)
    lengths = [PAGE * PAGES, 700, 1]
    batch = Batch.of([1] * REQUESTS, lengths).with_pages(table.numpy(), PAGE)
    arrays, integers = batch.flatten()
    batch = Batch.unflatten([None if a is None else torch.from_numpy(np.array(a)).cuda() for a in arrays], integers)
    return {
        "index_q": normal(REQUESTS, 64, 128, dtype=torch.float8_e4m3fn),
        "index_k": normal(REQUESTS * PAGES, PAGE, 128, dtype=torch.float8_e4m3fn),
        "scale": normal(REQUESTS * PAGES, PAGE).abs() + 0.5,
        "weights": normal(REQUESTS, 64),
        "q": normal(REQUESTS, 128, 576, dtype=torch.bfloat16),
        "kv": normal(REQUESTS * PAGES, PAGE, 576, dtype=torch.bfloat16),
        "batch": batch,
    }


def step(operators: Any, given: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Select, then attend."""
    indices = operators.lightning_index(
        given["index_q"], given["index_k"], given["weights"], k_scale=given["scale"], topk=TOPK, batch=given["batch"]
    )
    out, lse = operators.sparse_attend(
        given["q"], given["kv"], indices, softmax_scale=0.1, batch=given["batch"], return_lse=True
    )
    return indices, out, lse


def test_opcheck() -> None:
    from dsa_portable.faces import torch_library as dsa

    given = decode_step()
    indices, _, _ = step(dsa, given)
    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "dsa_portable":
                calls.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Recorder():
        dsa.sparse_attend(given["q"], given["kv"], indices, softmax_scale=0.1, batch=given["batch"])
        dsa.lightning_index(
            given["index_q"].bfloat16(), given["index_k"].bfloat16(), given["weights"], topk=TOPK, batch=given["batch"]
        )
    assert len(calls) == 2
    for overload, args, kwargs in calls:
        found = torch.library.opcheck(overload, args, kwargs)
        assert found
        assert set(found.values()) == {"SUCCESS"}


def test_a_step_is_one_compiled_graph() -> None:
    from dsa_portable.faces import torch_library as dsa

    given = decode_step()
    expected = step(dsa_portable, given)
    found = torch.compile(lambda: step(dsa, given), fullgraph=True)()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_captured_step_replays_what_the_device_holds() -> None:
    from dsa_portable.faces import torch_library as dsa

    given = decode_step()
    batch: Any = given["batch"]
    for _ in range(2):
        step(dsa, given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(dsa, given)
    for lengths in ([5, PAGE * PAGES, 1200], [2048, 2049, 300]):
        batch.seqlens_k.copy_(torch.tensor(lengths, dtype=torch.int32))
        batch.block_table.copy_(batch.block_table.flip(0))
        for name in ("index_q", "q"):
            given[name].copy_(given[name].flip(0))  # type: ignore[union-attr]
        graph.replay()
        expected = step(dsa_portable, given)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
