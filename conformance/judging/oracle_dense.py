"""The truth a second time, built differently: every row against every stored key, then masked; it exists to check oracle.py.

Dense memory: for small cases only.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance.cases.call import Call
from dsa_portable.formats import LAYOUTS, unpack

Array: TypeAlias = np.ndarray[Any, Any]


def _owner_of_slots(call: Call, count: int) -> Array:
    """position[r, place]: which position of request r lies there, or -1; every place of the memory is looked at."""
    lengths = call.batch["seqlens_k"]
    position = np.full((len(lengths), count), -1)
    for place in range(count):
        for r, length in enumerate(lengths):
            if "cu_seqlens_k" in call.batch:
                candidates = [place - int(call.batch["cu_seqlens_k"][r])]
            else:
                size = int(call.batch_options["page_size"])
                candidates = [
                    int(p) * size + place % size for p in np.flatnonzero(call.batch["block_table"][r] == place // size)
                ]
            for candidate in candidates:
                if 0 <= candidate < length:
                    position[r, place] = candidate
    return position


def _request_of_row(call: Call, count: int) -> Array:
    request = np.full(count, -1)
    for r in range(len(call.batch["seqlens_k"])):
        for row in range(count):
            if call.batch["cu_seqlens_q"][r] <= row < call.batch["cu_seqlens_q"][r + 1]:
                request[row] = r
    return request


def _sees(call: Call, row: int, r: int, position: Array) -> Array:
    """Which positions this row sees, elementwise: no slice, no clamp."""
    real: Array = position >= 0
    if "key_start" in call.batch:
        real &= (position >= call.batch["key_start"][row]) & (position < call.batch["key_end"][row])
    elif call.batch_options.get("causal", True):
        distance_to_end = call.batch["cu_seqlens_q"][r + 1] - 1 - row
        real &= position <= call.batch["seqlens_k"][r] - 1 - distance_to_end
    return real


def index_scores(call: Call) -> Array:
    """float64 [Tq, longest request]: the score of every position, -inf where the row does not see it."""
    k, scale = call.arrays["k"], call.arrays.get("k_scale")
    if call.options["k_layout"]:
        k, scale, _ = unpack(call.options["k_layout"], k)
    keys = np.asarray(k, np.float64).reshape(-1, k.shape[-1])
    scales = np.ones(len(keys)) if scale is None else np.asarray(scale, np.float64).reshape(-1)
    q, weights = np.asarray(call.arrays["q"], np.float64), np.asarray(call.arrays["weights"], np.float64)
    scores = np.zeros((len(q), len(keys)))
    with np.errstate(invalid="ignore"):
        for head in range(q.shape[1]):
            dots = np.einsum("td,sd->ts", q[:, head], keys)
            scores += weights[:, head, None] * np.where(dots > 0, dots, 0 * dots)
        scores *= scales
    result = np.full((len(q), max(1, int(call.batch["seqlens_k"].max()))), -np.inf)
    position, request = _owner_of_slots(call, len(keys)), _request_of_row(call, len(q))
    for row, r in enumerate(request):
        if r >= 0:
            seen = _sees(call, row, r, position[r])
            result[row, position[r][seen]] = scores[row, seen]
    return result


def attention(call: Call) -> tuple[Array, Array]:
    """(out [Tq, Hq, value_dim], lse [Tq, Hq]) in float64, by counting how often each stored key is named."""
    kv, name = call.arrays["kv"], call.options["kv_layout"]
    if name:
        values, scale, rope = unpack(name, kv)
        tiles = np.asarray(values, np.float64).reshape(*scale.shape, LAYOUTS[name].tile)
        latent = (tiles * np.asarray(scale, np.float64)[..., None]).reshape(values.shape)
        kv = np.concatenate([latent, np.asarray(rope, np.float64)], axis=-1)
    keys = np.asarray(kv, np.float64).reshape(-1, kv.shape[-1])
    q, indices = np.asarray(call.arrays["q"], np.float64), call.arrays["indices"]
    value_dim = call.options["value_dim"]
    position, request = _owner_of_slots(call, len(keys)), _request_of_row(call, len(q))
    out, lse = np.zeros((len(q), q.shape[1], value_dim)), np.full(q.shape[:2], -np.inf)
    sink = call.arrays.get("attn_sink", np.full(q.shape[1], -np.inf)).astype(np.float64)
    for row, r in enumerate(request):
        limit = call.arrays["topk_length"][row] if "topk_length" in call.arrays else indices.shape[1]
        times = np.zeros(len(keys))
        for column, index in enumerate(indices[row]):
            if r >= 0 and column < limit and index >= 0:
                times += (position[r] == index) / max(1, int((position[r] == index).sum()))
        named = times > 0
        if not named.any():
            continue
        logits = np.where(named, np.einsum("hd,sd->hs", q[row], np.where(named[:, None], keys, 0.0)), -np.inf)
        logits *= call.options["softmax_scale"]
        top = logits.max(axis=1, keepdims=True)
        shares = times * np.exp(logits - top)
        lse[row] = top[:, 0] + np.log(shares.sum(axis=1))
        with np.errstate(over="ignore"):
            total = shares.sum(axis=1) + np.exp(sink - top[:, 0])
        out[row] = np.einsum("hs,sc->hc", shares / total[:, None], np.where(named[:, None], keys[:, :value_dim], 0.0))
    return out, lse
