"""The truth, in float64, from exactly the operands that the kernel gets, in one sitting's reading; no backend is called.

Nothing here is fast or clever; a tile of keys bounds the memory. oracle_dense.py says the same in another way, as a check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance.cases.call import Call
from dsa_portable.formats import layout, unpack

Float64: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Int64: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Sums: TypeAlias = Callable[[Float64, Float64, Float64], list[Float64]]

ROWS, TILE = 16, 2048


def rows(call: Call) -> Iterator[tuple[int, int, int, int]]:
    """(row, request, start, end) of every row that belongs to a request; it sees positions start .. end-1."""
    ends = call.batch["cu_seqlens_q"].tolist()
    for request, length in enumerate(call.batch["seqlens_k"].tolist()):
        first, last = ends[request], ends[request + 1]
        for row in range(first, last):
            start, end = 0, length
            if "key_start" in call.batch:
                start, end = (min(max(0, int(call.batch[name][row])), length) for name in ("key_start", "key_end"))
            elif call.batch_options.get("causal", True):
                end = max(0, length - (last - first) + (row - first) + 1)
            yield row, request, start, max(start, end)


def slots(call: Call, request: int, positions: Int64) -> Int64:
    """Rows of the keys' memory, pages flattened, that hold these positions of a request."""
    if "block_table" not in call.batch:
        return positions + int(call.batch["cu_seqlens_k"][request])
    size, table = int(call.batch_options["page_size"]), call.batch["block_table"][request].astype(np.int64)
    return np.asarray(table[positions // size] * size + positions % size)


def head_sums(q: Float64, k: Float64, *weights: Float64) -> list[Float64]:
    """[T, n] for each weights [T, H]: sum_h weights[t,h] * relu(q[t,h,:] . k[n,:])."""
    dots = (q.reshape(-1, q.shape[2]) @ k.T).reshape(q.shape[0], q.shape[1], len(k))
    np.maximum(dots, 0, out=dots)
    return [*np.matmul(np.stack(weights, axis=1), dots).swapaxes(0, 1)]


def index_keys(call: Call, request: int, positions: Int64) -> tuple[Float64, Float64]:
    """(keys [n, D], scales [n]) of these positions, exactly."""
    where, name = slots(call, request, positions), call.options["k_layout"]
    k, scale = call.arrays["k"], call.arrays.get("k_scale")
    if name is not None:
        k, scale, _ = unpack(name, k)
    keys = k.reshape(-1, k.shape[-1])[where].astype(np.float64)
    return keys, np.ones(len(keys)) if scale is None else scale.reshape(-1)[where].astype(np.float64)


def index_scores(call: Call) -> Iterator[tuple[slice, int, Float64]]:
    """(rows, first position, scores [rows, n]) of a few rows of one request at a time."""
    for block, low, (scores,) in index_sums(call, head_sums):
        yield block, low, scores


def index_sums(call: Call, sums: Sums) -> Iterator[tuple[slice, int, list[Float64]]]:
    """As `index_scores`, for every sum over heads that `sums(q, k, weights)` makes, each times the keys' scales."""
    by_request = [list(group) for _, group in groupby(rows(call), key=lambda span: span[1])]
    for mine in (group[i : i + ROWS] for group in by_request for i in range(0, len(group), ROWS)):
        low, high = min(span[2] for span in mine), max(span[3] for span in mine)
        block, tiles = slice(mine[0][0], mine[-1][0] + 1), list[list[Float64]]()
        q, weights = (call.arrays[name][block].astype(np.float64) for name in ("q", "weights"))
        for tile in range(low, high, TILE):
            k, scale = index_keys(call, mine[0][1], np.arange(tile, min(tile + TILE, high)))
            tiles.append([found * scale for found in sums(q, k, weights)])
        if not tiles:
            tiles.append(sums(q, np.empty((0, q.shape[2])), weights))
        yield block, low, [np.concatenate(parts, axis=1) for parts in zip(*tiles, strict=True)]


def attention_row(
    call: Call, row: int, request: int, kept: Callable[[Float64], Any] = lambda scale: scale
) -> tuple[Float64, Int64]:
    """(kv [n, Dqk], positions [n]) that count in this row, in order, repeated ones as often as they stand there.

    `kept`: what a packed cache's scales become before they are multiplied, for who is not after the truth.
    """
    entries = call.arrays["indices"][row].astype(np.int64)
    if "topk_length" in call.arrays:
        entries = entries[: max(0, int(call.arrays["topk_length"][row]))]
    positions = entries[(entries >= 0) & (entries < int(call.batch["seqlens_k"][request]))]
    where, name, kv = slots(call, request, positions), call.options["kv_layout"], call.arrays["kv"]
    if name is None:
        return kv.reshape(-1, kv.shape[-1])[where].astype(np.float64), positions
    parts = (np.asarray(part) for part in unpack(name, kv))
    values, scale, rope = (part.reshape(-1, part.shape[-1])[where].astype(np.float64) for part in parts)
    return np.concatenate([values * np.repeat(kept(scale), layout(name).tile, axis=1), rope], axis=1), positions


def attention(
    q: Float64, kv: Float64, softmax_scale: float, value_dim: int, sink: Float64 | None
) -> tuple[Float64, Float64, Float64]:
    """(out [Hq, value_dim], lse [Hq], p [Hq, n]) of one row over all of kv [n >= 1, Dqk]; the sink takes its share of p."""
    logits = softmax_scale * (q @ kv.T)
    top = logits.max(axis=1)
    weights = np.exp(logits - top[:, None])
    lse = top + np.log(weights.sum(axis=1))
    with np.errstate(over="ignore"):
        share = np.ones(len(q)) if sink is None else 1 / (1 + np.exp(sink.astype(np.float64) - lse))
    p = weights * (share / weights.sum(axis=1))[:, None]
    return p @ kv[:, :value_dim], lse, p
