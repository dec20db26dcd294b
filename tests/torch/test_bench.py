"""The torch side of the bench command on CPU tensors: peers compute what is asked; what is captured, replayed and timed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dsa_portable import arrays, registry
from dsa_portable.conformance.bench import peers, reference, timing
from dsa_portable.conformance.bench.machine import Machine
from dsa_portable.conformance.bench.workloads import Size, Workload, operands

BACKEND = replace(
    registry.load("cpu"),
    arrays="torch",
    put=lambda array: arrays.from_numpy(np.array(array, order="C")),
    get=lambda array: np.array(arrays.to_numpy(array)),
)
HOST = Machine(BACKEND, registry.device("cpu"))
SIZES = (Size(3, 128, 128, 3), Size(24, 192, 128, 1), Size(10, 64, 128, 2))


@pytest.fixture(params=[1 << 30, 1], ids=["one slab", "a slab per row"])
def _slabs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SLAB", request.param)


def peer(table: tuple[peers.Peer, ...], name: str) -> peers.Peer:
    return next(p for p in table if p.name == name)


def attend(size: Size) -> Workload:
    return Workload("sparse_attend", 64, size, size, "bfloat16")


def why_not_attention(got: Any, dense: bool, data: Any) -> str:
    truth = reference.dense_attend if dense else reference.sparse_attend
    return reference.why_not_attention(HOST.backend.get(got), truth, HOST.fetch(data), reference.PEER_ATTEND_SLACK)


@pytest.mark.usefixtures("_slabs")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [replace(size, topk=min(size.topk, size.keys)) for size in SIZES], ids=str)
def test_the_eager_index_selects_the_best(size: Size, causal: bool) -> None:
    w = Workload("lightning_index", 8, size, size, "float8_e4m3fn", causal)
    data = operands(HOST, w)
    got = peer(peers.PEERS, "torch eager").build(HOST, w, data)()
    assert reference.why_not_selection(HOST.backend.get(got), HOST.fetch(data)) == ""


@pytest.mark.usefixtures("_slabs")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_eager_attention_is_attention(size: Size) -> None:
    w = attend(size)
    data = operands(HOST, w)
    assert why_not_attention(peer(peers.PEERS, "torch eager").build(HOST, w, data)(), False, data) == ""
    assert why_not_attention(peer(peers.DENSE, "torch eager dense").build(HOST, w, data)(), True, data) == ""


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_fused_dense_attention_is_attention(size: Size, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the math kernel, the one that takes these head dimensions on a CPU."""
    monkeypatch.setattr(peers, "FUSED", ("MATH",))
    w = attend(size)
    data = operands(HOST, w)
    assert why_not_attention(peer(peers.DENSE, "torch SDPA dense").build(HOST, w, data)(), True, data) == ""


def flash_mla(calls: list[Any], *, has_switch: bool) -> ModuleType:
    """FlashMLA's two functions as SGLang's package documents them, or DeepSeek's without the switch, in plain torch."""

    def sparse(q: Any, kv: Any, indices: Any, sm_scale: float, d_v: int = 512, **switch: Any) -> Any:
        calls.append(switch)
        if bool(switch) != has_switch:
            raise TypeError("unexpected keyword argument 'use_legacy'" if switch else "d_qk must be 512")
        assert indices.dtype == torch.int32
        assert indices.shape[:2] == (len(q), kv.shape[1]) == (len(q), 1)
        keys = kv[:, 0][indices[:, 0].long().clamp(min=0)].float()
        logits = (q.float() @ keys.mT * sm_scale).masked_fill(indices < 0, -torch.inf)
        return (logits.softmax(-1) @ keys[..., :d_v]).to(q.dtype), None, None

    def dense(q: Any, k_cache: Any, table: Any, lengths: Any, d_v: int, meta: Any, **options: Any) -> Any:
        assert (meta, k_cache.shape[1:], options.pop("use_legacy")) == ("meta", (64, 1, 576), True)
        keys = k_cache[table.long()].view(len(q), -1, 576).float()
        logits = torch.einsum("rnhd,rkd->rnhk", q.float(), keys) * options["softmax_scale"]
        if options["causal"]:
            later = torch.ones(q.shape[1], keys.shape[1], dtype=torch.bool).triu(keys.shape[1] - q.shape[1] + 1)
            logits.masked_fill_(later[:, None], -torch.inf)
        return torch.einsum("rnhk,rkd->rnhd", logits.softmax(-1), keys[..., :d_v]).to(q.dtype), None

    module: Any = ModuleType("flash_mla")
    module.flash_mla_sparse_fwd, module.flash_mla_with_kvcache = sparse, dense
    module.get_mla_metadata = lambda: ("meta", None)
    return module  # type: ignore[no-any-return]


@pytest.mark.parametrize("has_switch", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_flash_mla_is_called_as_it_documents(size: Size, has_switch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setitem(sys.modules, "flash_mla", flash_mla(calls, has_switch=has_switch))
    w = attend(size)
    data = operands(HOST, w)
    call = peer(peers.PEERS, "FlashMLA").build(HOST, w, data)
    assert why_not_attention(call(), False, data) == ""
    assert calls[-1] == ({"use_legacy": True} if has_switch else {})
    assert why_not_attention(peer(peers.DENSE, "FlashMLA dense").build(HOST, w, data)(), True, data) == ""


def test_portable_kernels_are_asked_for_during_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(Machine, "call", lambda self, operator, data: seen.append(os.environ.get(peers.KERNELS)))
    call = peer(peers.PEERS, "portable Triton").build(HOST, attend(SIZES[0]), {})
    for before in (None, "hopper"):
        if before:
            monkeypatch.setenv(peers.KERNELS, before)
        call()
        assert os.environ.get(peers.KERNELS) == before
    assert seen == ["portable", "portable"]


class Cuda:
    """What the clock uses of torch.cuda: a captured call is not timed, a replay runs everything that was captured."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def graph_pool_handle(self) -> str:
        return "pool"

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self.said.append("replay"))

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: str) -> Iterator[None]:
        self.said.append(f"capture in {pool}")
        yield
        self.said.append("captured")

    def Event(self, enable_timing: bool) -> Any:
        return SimpleNamespace(
            record=lambda: self.said.append("record"), synchronize=lambda: None, elapsed_time=lambda other: 6.0 * enable_timing
        )

    def _sleep(self, cycles: int) -> None:
        self.said.append("lead")

    def empty_cache(self) -> None:
        pass


def test_decode_is_one_graph_of_every_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    monkeypatch.setattr(Machine, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    found = replace(HOST, device=replace(HOST.device, kind="cuda"))
    timings = timing.in_turn(found, {"a": [lambda: cuda.said.append("0"), lambda: cuda.said.append("1")]}, graph=True)
    once = ["lead", "record", "replay", "record"]
    assert cuda.said == ["0", "1", "capture in pool", "0", "1", "captured", *once * (1 + timing.ROUNDS)]
    (time,) = timings.values()
    assert isinstance(time, timing.Timing)
    assert time.rounds == (0.003,) * timing.ROUNDS  # 6 ms for two calls
