"""Who else can do the same call: each peer says why it is not there, which workloads it refuses, and builds a call."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from dsa_portable.arrays import from_numpy, to_numpy
from dsa_portable.conformance.bench import reference
from dsa_portable.conformance.bench.machine import Machine, Operands
from dsa_portable.conformance.bench.timing import Call
from dsa_portable.conformance.bench.workloads import PAGE_SIZE, SOFTMAX_SCALE, VALUE_DIM, Workload
from dsa_portable.errors import InvalidArgument

# The variable with which the CUDA backend is kept from kernels of one architecture.
KERNELS, PORTABLE = "DSA_CUDA_KERNELS", "portable"
# Intermediates of one slab of the eager peers, in bytes.
SLAB = 1 << 30
# torch's kernels that never hold all scores; its math kernel is what `torch eager` is, without slabs.
FUSED = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION")


@dataclass(frozen=True)
class Peer:
    """One implementation. `missing(machine)` and `refuses(workload)` are reasons, empty where there is none."""

    name: str
    operators: tuple[str, ...]
    missing: Callable[[Machine], str]
    refuses: Callable[[Workload], str]
    build: Callable[[Machine, Workload, Operands], Call]


def chosen(table: Iterable[Peer], machine: Machine, names: Iterable[str] = ()) -> tuple[list[Peer], dict[str, str]]:
    """(the peers that are there, the reasons why others are not). Raises InvalidArgument for a named one that is not."""
    peers = {peer.name: peer for peer in table}
    names = list(names)
    for name in names:
        if name not in peers:
            raise InvalidArgument(f"peer {name!r} is not known, but {', '.join(map(repr, peers))} are; name one with --peer.")
        if reason := peers[name].missing(machine):
            raise InvalidArgument(f"peer {name!r} was asked for, but {reason}; leave it out, or make it available.")
    asked = [peers[name] for name in names or peers]
    reasons = {peer.name: peer.missing(machine) for peer in asked}
    return [peer for peer in asked if not reasons[peer.name]], {name: why for name, why in reasons.items() if why}


# --- what is missing, what is refused ---


def _needs(kind: str) -> Callable[[Machine], str]:
    return lambda machine: (
        "" if machine.backend.arrays == kind else f"it takes {kind} arrays, unlike backend {machine.backend.name!r}"
    )


def _needs_numpy_on_the_host(machine: Machine) -> str:
    return _needs("numpy")(machine) or ("" if machine.is_host else "it would take hours over an accelerator's workloads")


def _no_torch_on_the_host(machine: Machine) -> str:
    if machine.backend.arrays != "numpy" or not machine.is_host:
        return "it is for hosts whose backend takes NumPy arrays"
    if find_spec("torch") is None:
        return "torch is not installed"
    # Threads that spin between torch's calls would take the cores from whoever is timed next.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return ""


def _no_compiler(machine: Machine) -> str:
    return _no_torch_on_the_host(machine) or ("" if shutil.which("g++") else "torch.compile needs g++, which is not there")


def _not_a_host(machine: Machine) -> str:
    return "" if machine.is_host else "it would take hours over an accelerator's workloads"


def _no_portable_kernels(machine: Machine) -> str:
    if machine.backend.name != "cuda":
        return "it is the cuda backend's"
    return f"{KERNELS} is {PORTABLE} already" if os.environ.get(KERNELS) == PORTABLE else ""


def _no_flash_mla(machine: Machine) -> str:
    if machine.device.kind != "cuda":
        return "it needs a CUDA device"
    if find_spec("flash_mla") is None:
        return "flash_mla is not installed (pip install sgl-flash-mla)"
    try:
        import_module("flash_mla")
    except Exception as exc:  # a library of another torch or CUDA fails while it loads, in whatever way
        return f"flash_mla cannot be imported ({type(exc).__name__}: {exc})"
    return ""


def _only_flat(w: Workload) -> str:
    return "it reads flat keys" if w.layout else ""


def _only_flash_mla_prefill(w: Workload) -> str:
    if w.layout or w.dtype != "bfloat16" or w.heads not in (64, 128) or w.size.topk % 128:
        return "it takes flat bfloat16 keys, 64 or 128 heads, and a multiple of 128 indices"
    return "its sparse bfloat16 kernel is for prefill" if w.phase == "decode" else ""


# --- NumPy ---


def _numpy(machine: Machine, w: Workload, operands: Operands) -> Call:
    host = machine.fetch(operands)
    if w.operator == "lightning_index":
        return lambda: reference.lightning_index(host, np.float32)
    return lambda: reference.sparse_attend(host, np.float32)


def _numpy_dense(machine: Machine, w: Workload, operands: Operands) -> Call:
    host = machine.fetch(operands)
    return lambda: reference.dense_attend(host, np.float32)


# --- torch, one operation after the other ---


def _by_request(w: Workload, array: Any) -> Any:
    """[requests * n, ...] as [requests, n, ...]."""
    return array.view(w.size.requests, -1, *array.shape[1:])


def _slabs(w: Workload, keys_per_row: int) -> Iterable[tuple[int, int]]:
    """(first, last) rows of every request whose bfloat16 scores fit into a slab."""
    step = max(1, SLAB // (2 * w.size.requests * w.heads * keys_per_row))
    return [(first, min(first + step, w.rows_each)) for first in range(0, w.rows_each, step)]


def _eager(machine: Machine, w: Workload, operands: Operands) -> Call:
    return (_eager_index if w.operator == "lightning_index" else _eager_attend)(machine, w, operands)


def _eager_index(machine: Machine, w: Workload, operands: Operands) -> Call:
    torch, s = machine.torch, w.size
    q, k, weights, scale = (_by_request(w, operands[name]) for name in ("q", "k", "weights", "k_scale"))
    position = torch.arange(s.keys, device=q.device)

    def call() -> Any:
        # e4m3 is exact in bfloat16, and eager torch multiplies nothing narrower without scales of its own.
        keys, found = k.to(torch.bfloat16).transpose(1, 2), []
        for first, last in _slabs(w, s.keys):
            rows = q[:, first:last].to(torch.bfloat16).flatten(1, 2)
            products = torch.bmm(rows, keys).relu_().view(-1, w.heads, s.keys)
            heads = weights[:, first:last].to(torch.bfloat16).reshape(-1, 1, w.heads)
            scores = torch.bmm(heads, products).view(s.requests, last - first, s.keys) * scale[:, None]
            if w.causal:
                end = s.keys - w.rows_each + 1 + torch.arange(first, last, device=q.device)
                scores.masked_fill_(position >= end[:, None], -torch.inf)
            found.append(_top(torch, scores, s.topk))
        return torch.cat(found, 1).flatten(0, 1)

    return call


def _top(torch: Any, scores: Any, topk: int) -> Any:
    best = scores.topk(topk, sorted=False)
    return torch.where(best.values == -torch.inf, -1, best.indices).to(torch.int32)


def _eager_attend(machine: Machine, w: Workload, operands: Operands) -> Call:
    torch, s = machine.torch, w.size
    q, kv, scale = operands["q"], operands["kv"], operands["softmax_scale"]
    places = operands["batch"].to_flat(operands["indices"]).long()
    # The gathered keys are the largest intermediate: one row's are topk * 576 numbers.
    step = max(1, SLAB // (2 * s.topk * kv.shape[1]))

    def call() -> Any:
        found = []
        for first in range(0, s.rows, step):
            index, rows = places[first : first + step], q[first : first + step]
            keys = kv[index.clamp(min=0)]
            logits = _scaled(torch, rows, keys, scale).masked_fill_((index < 0)[:, None], -torch.inf)
            found.append(torch.bmm(logits.softmax(-1), keys[..., :VALUE_DIM]))
        return torch.cat(found)

    return call


def _scaled(torch: Any, q: Any, keys: Any, scale: float) -> Any:
    """scale * q keys^T, scaled before it is rounded."""
    nothing = torch.empty((), dtype=q.dtype, device=q.device)
    return torch.baddbmm(nothing, q, keys.transpose(1, 2), beta=0, alpha=scale)


def _eager_dense(machine: Machine, w: Workload, operands: Operands) -> Call:
    torch, s, n = machine.torch, w.size, w.rows_each
    q, kv = _by_request(w, operands["q"]), _by_request(w, operands["kv"])

    def call() -> Any:
        found = []
        for first, last in _slabs(w, s.keys):
            # No row of the slab sees a later key, and all see the keys before its own tokens.
            count, end = last - first, s.keys - n + last
            logits = _scaled(torch, q[:, first:last].flatten(1, 2), kv[:, :end], SOFTMAX_SCALE)
            if count > 1:
                later = torch.ones(count, count, dtype=torch.bool, device=q.device).triu(1)
                logits.view(s.requests, count, w.heads, end)[..., end - count :].masked_fill_(later[:, None], -torch.inf)
            out = torch.bmm(logits.softmax(-1), kv[:, :end, :VALUE_DIM])
            found.append(out.view(s.requests, count, w.heads, VALUE_DIM))
        return torch.cat(found, 1).flatten(0, 1)

    return call


def _sdpa_dense(machine: Machine, w: Workload, operands: Operands) -> Call:
    attention, bias = import_module("torch.nn.attention"), import_module("torch.nn.attention.bias")
    sdpa = machine.torch.nn.functional.scaled_dot_product_attention
    q, kv = _by_request(w, operands["q"]), _by_request(w, operands["kv"])[:, None]
    kernels = [getattr(attention.SDPBackend, name) for name in FUSED]
    mask = None
    if w.rows_each == 1:
        rows = q  # the heads take the place of rows, as all read the same keys and none is masked
    else:
        rows, kv = q.transpose(1, 2), kv.expand(-1, w.heads, -1, -1)
        mask = bias.causal_lower_right(w.rows_each, w.size.keys)

    def call() -> Any:
        with attention.sdpa_kernel(kernels):
            out = sdpa(rows, kv, kv[..., :VALUE_DIM], attn_mask=mask, scale=SOFTMAX_SCALE)
        return out.transpose(1, 2).flatten(0, 1) if mask is not None else out.flatten(0, 1)

    return call


# --- torch on a host, over the same memory ---


def _on_host(build: Callable[[Machine, Workload, Operands], Call]) -> Callable[[Machine, Workload, Operands], Call]:
    """`build` over torch tensors that share the operands' memory; results are NumPy's, of the same memory too."""

    def built(machine: Machine, w: Workload, operands: Operands) -> Call:
        theirs = {name: from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in operands.items()}
        call = build(machine, w, theirs)
        return lambda: to_numpy(call())

    return built


def _scores(torch: Any, q: Any, k: Any, weights: Any) -> Any:
    """[rows, keys] of [rows, heads, dim] and [dim, keys]."""
    products = torch.relu(q.flatten(0, 1) @ k).view(*q.shape[:2], -1)
    return torch.bmm(weights[:, None], products)[:, 0]


def _index_chunks(compiled: bool) -> Callable[[Machine, Workload, Operands], Call]:
    """float32, sixteen rows at a time."""

    def build(machine: Machine, w: Workload, operands: Operands) -> Call:
        torch, s = machine.torch, w.size
        q, k, weights, scale = (_by_request(w, operands[name]) for name in ("q", "k", "weights", "k_scale"))
        scores = partial(_scores, torch)
        scores = torch.compile(scores, dynamic=True) if compiled else scores
        position = torch.arange(s.keys)

        def call() -> Any:
            found = []
            for r in range(s.requests):
                keys = k[r].float().T
                for first in range(0, w.rows_each, 16):
                    rows = slice(first, min(first + 16, w.rows_each))
                    got = scores(q[r, rows].float(), keys, weights[r, rows]) * scale[r]
                    if w.causal:
                        end = s.keys - w.rows_each + 1 + torch.arange(rows.start, rows.stop)
                        got.masked_fill_(position >= end[:, None], -torch.inf)
                    found.append(_top(torch, got, s.topk))
            return torch.cat(found)

        return call

    return build


def _attend_rows(attention: Callable[[Any, Any, Any, float], Any]) -> Callable[[Machine, Workload, Operands], Call]:
    """Row by row, over gathered keys."""

    def build(machine: Machine, w: Workload, operands: Operands) -> Call:
        q, kv, scale = operands["q"], operands["kv"], operands["softmax_scale"]
        places = machine.torch.from_numpy(operands["batch"].to_flat(to_numpy(operands["indices"])).astype(np.int64))

        def call() -> Any:
            rows = []
            for row, place in zip(q, places, strict=True):
                rows.append(attention(machine.torch, row, kv[place[place >= 0]], scale))
            return machine.torch.stack(rows)

        return call

    return build


def _products(torch: Any, q: Any, keys: Any, scale: float) -> Any:
    p = torch.softmax((q @ keys.T).float() * scale, -1).to(q.dtype)
    return p @ keys[:, :VALUE_DIM]


def _sdpa(torch: Any, q: Any, keys: Any, scale: float) -> Any:
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return sdpa(q[None, None], keys[None, None], keys[None, None, :, :VALUE_DIM], scale=scale)[0, 0]


# --- our own kernel over every key ---


def _own_dense(machine: Machine, w: Workload, operands: Operands) -> Call:
    indices = np.tile(np.arange(w.size.keys, dtype=np.int32), (w.size.rows, 1))
    ends = machine.fetch(operands)["batch"].key_range(w.size.rows)[1]
    given = {**operands, "indices": machine.backend.put(np.where(indices < np.asarray(ends)[:, None], indices, -1))}
    return partial(machine.call, "sparse_attend", given)


# --- the cuda backend without kernels of one architecture ---


def _portable(machine: Machine, w: Workload, operands: Operands) -> Call:
    def call() -> Any:
        before = os.environ.get(KERNELS)
        os.environ[KERNELS] = PORTABLE
        try:
            return machine.call(w.operator, operands)
        finally:
            if before is None:
                del os.environ[KERNELS]
            else:
                os.environ[KERNELS] = before

    return call


# --- FlashMLA ---


def _flash_mla(machine: Machine, w: Workload, operands: Operands) -> Call:
    forward = import_module("flash_mla").flash_mla_sparse_fwd
    places = operands["batch"].to_flat(operands["indices"])[:, None]
    fixed = (operands["q"], operands["kv"][:, None], places, operands["softmax_scale"])
    # SGLang's package has the kernels of sm_90 behind a switch, those of sm_100 without it; DeepSeek's has no switch.
    problems = []
    for switch in ({"use_legacy": True}, {}):
        try:
            forward(*fixed, **switch)
        except Exception as exc:
            problems.append(f"{type(exc).__name__}: {exc}")
        else:
            return partial(_first, partial(forward, *fixed, **switch))
    raise RuntimeError("; ".join(problems))


def _first(call: Call) -> Any:
    return call()[0]


def _flash_mla_dense(machine: Machine, w: Workload, operands: Operands) -> Call:
    flash_mla, torch, s = import_module("flash_mla"), machine.torch, w.size
    pages = s.keys // PAGE_SIZE
    table = torch.arange(s.requests * pages, dtype=torch.int32, device=machine.device.kind).view(s.requests, pages)
    q, kv = _by_request(w, operands["q"]), operands["kv"].view(-1, PAGE_SIZE, 1, operands["kv"].shape[1])
    run = partial(
        flash_mla.flash_mla_with_kvcache,
        q,
        kv,
        table,
        operands["batch"].seqlens_k,
        VALUE_DIM,
        flash_mla.get_mla_metadata()[0],
        softmax_scale=SOFTMAX_SCALE,
        causal=w.rows_each > 1,
        use_legacy=True,
    )
    return lambda: run()[0].flatten(0, 1)


BOTH = ("lightning_index", "sparse_attend")
PEERS = (
    Peer("portable Triton", BOTH, _no_portable_kernels, lambda w: "", _portable),
    Peer("FlashMLA", ("sparse_attend",), _no_flash_mla, _only_flash_mla_prefill, _flash_mla),
    Peer("torch eager", BOTH, _needs("torch"), _only_flat, _eager),
    Peer("torch float32 chunks", BOTH[:1], _no_torch_on_the_host, _only_flat, _on_host(_index_chunks(compiled=False))),
    Peer("torch compile", BOTH[:1], _no_compiler, _only_flat, _on_host(_index_chunks(compiled=True))),
    Peer("torch rows", BOTH[1:], _no_torch_on_the_host, _only_flat, _on_host(_attend_rows(_products))),
    Peer("torch SDPA rows", BOTH[1:], _no_torch_on_the_host, _only_flat, _on_host(_attend_rows(_sdpa))),
    Peer("torch bfloat16 slabs", BOTH, _no_torch_on_the_host, _only_flat, _on_host(_eager)),
    Peer("NumPy eager", BOTH, _needs_numpy_on_the_host, lambda w: "", _numpy),
)
# Attention over all keys in latent space; the fastest of them is what sparse attention is compared with.
DENSE = (
    Peer("FlashMLA dense", (), _no_flash_mla, _only_flat, _flash_mla_dense),
    Peer("torch SDPA dense", (), _needs("torch"), _only_flat, _sdpa_dense),
    Peer("torch eager dense", (), _needs("torch"), _only_flat, _eager_dense),
    Peer("own kernel dense", (), _not_a_host, _only_flat, _own_dense),
    Peer("NumPy dense", (), _needs_numpy_on_the_host, _only_flat, _numpy_dense),
)
