"""Both operators, honest and straight, each read from top to bottom. A planted fault is an edit of this text (plant.py).

They compute with a declared profile, but sum in another order than the emulator: an honest run is no copy of the yardstick.
Everything inside the operators' boundary is done here anew: visibility, pages, caches, selection; each can be done wrong.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.judging.accumulator import dot, rounded
from dsa_portable.conformance.judging.emulator import stored
from dsa_portable.formats import layout, unpack
from dsa_portable.profile import Profile

Array: TypeAlias = np.ndarray[Any, Any]


def lightning_index(call: Call, profile: Profile) -> dict[str, Array]:
    """The outputs of a whole call, by name."""
    batch, options, topk = call.batch, call.options, int(call.options["topk"])
    lengths, page_size = batch["seqlens_k"], call.batch_options["page_size"]
    queries, weights = call.arrays["q"], call.arrays["weights"]
    indices = np.full((len(queries), topk), -1, np.int32)
    scores = np.full(indices.shape, -np.inf, np.float32)
    k, k_scale = call.arrays["k"], call.arrays.get("k_scale")
    if options["k_layout"] is not None:
        k, k_scale, _ = unpack(options["k_layout"], k)
    k = k.reshape(-1, k.shape[-1])
    k_scale = np.ones(len(k), np.float32) if k_scale is None else k_scale.reshape(-1)
    for request in range(len(lengths)):
        length = int(lengths[request])
        first, last = int(batch["cu_seqlens_q"][request]), int(batch["cu_seqlens_q"][request + 1])
        base = int(batch["cu_seqlens_k"][request]) if "cu_seqlens_k" in batch else 0
        for row in range(first, last):
            # What the row sees.
            start, end = 0, max(0, length - (last - first) + (row - first) + 1)
            if "key_start" in batch:
                start = min(max(int(batch["key_start"][row]), 0), length)
                end = max(start, min(max(int(batch["key_end"][row]), 0), length))
            elif not call.batch_options["causal"]:
                start, end = 0, length
            # Where that lies in memory.
            seen = np.arange(start, end)
            if "block_table" in batch:
                page = batch["block_table"][request, seen // page_size].astype(np.int64)
                slots = page * page_size + seen % page_size
            else:
                slots = base + seen
            # Scores: dimensions last to first and heads shuffled, another legal order of summation.
            q, w = queries[row].astype(np.float32), weights[row].astype(np.float32)
            keys, scale = k[slots].astype(np.float32), k_scale[slots].astype(np.float32)
            heads = np.argsort(np.arange(len(q)) * 7919 % 104729)
            dots = stored(dot(q[heads][:, ::-1], keys[:, ::-1], profile.accumulator), profile)
            total = w[heads] @ np.maximum(dots, 0)
            found = rounded(total * rounded(scale, profile.scale_compute), profile.logit)
            # Selection: NaN last, ties to the lowest position, then in ascending order.
            ranked = np.nan_to_num(found, nan=-np.inf)
            best = np.argsort(-ranked, kind="stable")[:topk]
            chosen = np.sort(best)
            indices[row, : len(chosen)], scores[row, : len(chosen)] = chosen + start, found[chosen]
    return {"indices": indices, "scores": scores} if options.get("return_scores") else {"indices": indices}


def sparse_attend(call: Call, profile: Profile) -> dict[str, Array]:
    """The outputs of a whole call, by name."""
    batch, options, softmax_scale = call.batch, call.options, np.float32(call.options["softmax_scale"])
    dtype, heads, value_dim = call.arrays["q"].dtype, call.arrays["q"].shape[1], int(options["value_dim"])
    sink = call.arrays.get("attn_sink")
    # Rows of no request keep these.
    outputs = np.zeros((len(call.arrays["q"]), heads, value_dim), dtype)
    lses = np.full(outputs.shape[:2], -np.inf, np.float32)
    for request in range(len(batch["seqlens_k"])):
        context = int(batch["seqlens_k"][request])
        begin, stop = int(batch["cu_seqlens_q"][request]), int(batch["cu_seqlens_q"][request + 1])
        for row in range(begin, stop):
            # Which entries count: -1 and what lies beyond the request is skipped wherever it stands.
            entries = call.arrays["indices"][row].astype(np.int64)
            count = int(call.arrays["topk_length"][row]) if "topk_length" in call.arrays else len(entries)
            inside, counted = (entries >= 0) & (entries < context), np.arange(len(entries)) < count
            positions = entries[inside & counted]
            if not len(positions):
                outputs[row], lses[row] = 0, -np.inf
                continue
            # Where they lie in memory.
            if "block_table" in batch:
                page_size, table = int(call.batch_options["page_size"]), batch["block_table"].astype(np.int64)
                page, offset = np.divmod(positions, page_size)
                slots = table[request, page] * page_size + offset
            else:
                slots = int(batch["cu_seqlens_k"][request]) + positions
            # What they hold; a packed row is code * scale of its tile, beside the rotated part.
            if options["kv_layout"] is None:
                memory = call.arrays["kv"].reshape(-1, call.arrays["kv"].shape[-1])
                kv = memory[slots].astype(np.float32)
            else:
                parts = map(np.asarray, unpack(options["kv_layout"], call.arrays["kv"]))
                codes, scales, rope = (part.reshape(-1, part.shape[-1])[slots].astype(np.float32) for part in parts)
                kv = np.concatenate([codes * np.repeat(scales, layout(options["kv_layout"]).tile, axis=1), rope], axis=1)
            kv = rounded(kv, profile.kv_compute)
            values = kv[:, :value_dim]
            # Softmax: dimensions and keys last to first, another legal order of summation.
            q = call.arrays["q"][row].astype(np.float32)
            logits = rounded(dot(q[:, ::-1], kv[:, ::-1], profile.accumulator) * softmax_scale, profile.logit)
            top = logits.max(axis=1)
            shares = np.exp(logits - top[:, None])
            p = rounded(shares, profile.p)
            total = (p if profile.normaliser == "rounded" else shares)[:, ::-1].sum(axis=1)
            lses[row] = top + np.log(total)
            weighed = dot(np.ascontiguousarray(p[:, ::-1]), np.ascontiguousarray(values[::-1].T), profile.accumulator)
            if sink is not None:
                # From here on in units of the larger of the two: in those of the keys alone a large sink would overflow.
                larger = np.maximum(top, np.minimum(sink, np.finfo(np.float32).max))
                kept = np.exp(top - larger)
                weighed, total, top = weighed * kept[:, None], total * kept, larger
                total = total + np.exp(sink - top)
            outputs[row] = (weighed / total[:, None]).astype(dtype)
    return {"out": outputs, "lse": lses} if options.get("return_lse") else {"out": outputs}
