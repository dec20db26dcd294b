"""Both operators and dense attention in plain NumPy: in float64 what results are compared with, in float32 a peer.

Written apart from the suite's oracles and simpler: it tells whether the right thing is timed, not whether a port is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance.bench.machine import Operands
from dsa_portable.formats import dequantise, layout, unpack

Array: TypeAlias = np.ndarray[Any, Any]
VALUE_DIM = 512
# Of the sum of absolute terms: what the narrowest accumulator and 16-bit weights or probabilities can do to a result.
INDEX_SLACK = 2.0**-9
ATTEND_SLACK = 2.0**-6
# A peer may round its logits to bfloat16 as well.
PEER_ATTEND_SLACK = 2.0**-4


def _requests(host: Operands, name: str, dtype: type) -> Iterator[tuple[slice, Array]]:
    """Of each request: its rows, and its keys as numbers."""
    batch, cache, named = host["batch"], host[name], host.get(f"{name}_layout")
    for r, length in enumerate(batch.seqlens_k.tolist()):
        rows = slice(*batch.cu_seqlens_q[r : r + 2].tolist())
        if named is None:
            first = int(batch.cu_seqlens_k[r])
            keys = cache[first : first + length].astype(dtype)
            if host.get("k_scale") is not None:
                keys *= host["k_scale"][first : first + length, None].astype(dtype)
        else:
            pages = batch.block_table[r, : -(-length // batch.page_size)]
            values, scale, rope = unpack(named, cache[pages])
            keys = dequantise(values, scale, group=layout(named).tile if scale.ndim == 3 else None, dtype=dtype)
            keys = keys if rope is None else np.concatenate([keys, rope.astype(dtype)], axis=-1)
            keys = keys.reshape(-1, keys.shape[-1])[:length]
        yield rows, keys


def _scores(host: Operands, dtype: type, part: Callable[[Array], Array] = np.asarray) -> Array:
    """[Tq, longest] sum_h w relu(q . k), -inf where not visible; with `part` = abs the same of absolute terms."""
    start, end = host["batch"].key_range(len(host["q"]))
    scores = np.full((len(host["q"]), host["batch"].max_seqlen_k), -np.inf, dtype)
    for rows, keys in _requests(host, "k", dtype):
        q, weights = part(host["q"][rows].astype(dtype)), part(host["weights"][rows].astype(dtype))
        products = np.maximum((q.reshape(-1, q.shape[-1]) @ part(keys).T).reshape(*q.shape[:2], -1), 0)
        scores[rows, : len(keys)] = np.einsum("thk,th->tk", products, weights)
    positions = np.arange(scores.shape[1])
    scores[(positions < start[:, None]) | (positions >= end[:, None])] = -np.inf
    return scores


def lightning_index(host: Operands, dtype: type) -> Array:
    """int32 [Tq, topk], as dsa_portable.lightning_index."""
    scores, topk = _scores(host, dtype), min(host["topk"], host["batch"].max_seqlen_k)
    chosen = np.argpartition(-scores, topk - 1, axis=1)[:, :topk]
    chosen = np.where(np.isneginf(np.take_along_axis(scores, chosen, axis=1)), scores.shape[1], chosen)
    chosen.sort(axis=1)
    result = np.full((len(scores), host["topk"]), -1, np.int32)
    result[:, :topk] = np.where(chosen == scores.shape[1], -1, chosen)
    return result


def _attend(host: Operands, dtype: type, choose: Callable[[int], Any], part: Callable[[Array], Array]) -> Array:
    """[Tq, Hq, 512] softmax(scale q . k) part(v) over the keys that choose(row) names."""
    out = np.zeros((*host["q"].shape[:2], VALUE_DIM), dtype)
    for rows, keys in _requests(host, "kv", dtype):
        for t in range(rows.start, rows.stop):
            seen = keys[choose(t)]
            p = host["q"][t].astype(dtype) @ seen.T * dtype(host["softmax_scale"])
            p = np.exp(p - p.max(axis=1, keepdims=True))
            out[t] = p @ part(seen[:, :VALUE_DIM]) / p.sum(axis=1, keepdims=True)
    return out


def sparse_attend(host: Operands, dtype: type, part: Callable[[Array], Array] = np.asarray) -> Array:
    """[Tq, Hq, 512], as dsa_portable.sparse_attend where every row has a valid index; with `part` = abs, of absolute terms."""
    return _attend(host, dtype, lambda t: host["indices"][t][host["indices"][t] >= 0], part)


def dense_attend(host: Operands, dtype: type, part: Callable[[Array], Array] = np.asarray) -> Array:
    """The same over every key that a row sees."""
    end = host["batch"].key_range(len(host["q"]))[1]
    return _attend(host, dtype, lambda t: slice(0, int(end[t])), part)


def why_not_attention(got: Array, attend: Callable[..., Array], host: Operands, slack: float) -> str:
    """What is wrong with an output, empty where nothing is: |got - attend| <= slack * sum_j P_j |v_j|."""
    out, spread = attend(host, np.float64), attend(host, np.float64, np.abs)
    if got.shape != out.shape:
        return f"the output has shape {list(got.shape)}, not {list(out.shape)}"
    error = np.abs(got.astype(np.float64) - out) / (slack * spread)
    if np.nanmax(error) <= 1 and not np.isnan(error).any():
        return ""
    t, h, d = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
    return f"out[{t}, {h}, {d}] is {float(got[t, h, d]):g}, but float64 gives {float(out[t, h, d]):g}"


def why_not_selection(got: Array, host: Operands) -> str:
    """What is wrong with indices, empty where nothing is: as many as are visible, unique, none clearly below one left out."""
    scores, size = _scores(host, np.float64), _scores(host, np.float64, np.abs)
    if got.shape != (len(scores), host["topk"]):
        return f"the indices have shape {list(got.shape)}, not {[len(scores), host['topk']]}"
    for t, row in enumerate(got):
        visible, chosen = np.isfinite(scores[t]), row[row >= 0]
        count = min(host["topk"], int(visible.sum()))
        if len(chosen) != count or len(set(chosen.tolist())) != count:
            return f"row {t} has {len(set(chosen.tolist()))} different indices, but sees {count} or more keys"
        if (chosen >= len(visible)).any() or not visible[chosen].all():
            return f"row {t} names a key that it does not see"
        left_out = visible.copy()
        left_out[chosen] = False
        missing = scores[t][left_out].max(initial=-np.inf) - scores[t][chosen].min(initial=np.inf)
        if missing > 2 * INDEX_SLACK * size[t][visible].max(initial=0.0):
            return f"row {t} left out a key that scores {missing:g} more than one it names"
    return ""
