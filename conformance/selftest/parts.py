"""Both parts of lightning_index, honest and straight, as kernel.py has whole operators; a planted fault is an edit of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.judging.accumulator import dot, rounded
from dsa_portable.conformance.judging.emulator import stored
from dsa_portable.formats import unpack
from dsa_portable.profile import Profile

Array: TypeAlias = np.ndarray[Any, Any]


def seen(call: Call) -> Iterator[tuple[int, int, int, int]]:
    """(row, request, start, end) of every row of a request."""
    batch = call.batch
    for request in range(len(batch["seqlens_k"])):
        length = int(batch["seqlens_k"][request])
        first, last = int(batch["cu_seqlens_q"][request]), int(batch["cu_seqlens_q"][request + 1])
        for row in range(first, last):
            start, end = 0, max(0, length - (last - first) + (row - first) + 1)
            if "key_start" in batch:
                start = min(max(int(batch["key_start"][row]), 0), length)
                end = max(start, min(max(int(batch["key_end"][row]), 0), length))
            elif not call.batch_options["causal"]:
                start, end = 0, length
            yield row, request, start, end


def index_scores(call: Call, profile: Profile) -> dict[str, Array]:
    """The outputs of a whole call, by name."""
    batch, page_size = call.batch, call.batch_options["page_size"]
    scores = np.full((len(call.arrays["q"]), batch["seqlens_k"].max()), -np.inf, np.float32)
    k, k_scale = call.arrays["k"], call.arrays.get("k_scale")
    if call.options["k_layout"] is not None:
        k, k_scale, _ = unpack(call.options["k_layout"], k)
    k = k.reshape(-1, k.shape[-1])
    k_scale = np.ones(len(k), np.float32) if k_scale is None else k_scale.reshape(-1)
    for row, request, start, end in seen(call):
        # Where what it sees lies in memory.
        positions = np.arange(start, end)
        if "block_table" in batch:
            page = batch["block_table"][request, positions // page_size].astype(np.int64)
            slots = page * page_size + positions % page_size
        else:
            slots = int(batch["cu_seqlens_k"][request]) + positions
        # Dimensions last to first and heads shuffled, another legal order of summation.
        q, w = call.arrays["q"][row].astype(np.float32), call.arrays["weights"][row].astype(np.float32)
        keys, scale = k[slots].astype(np.float32), k_scale[slots].astype(np.float32)
        heads = np.argsort(np.arange(len(q)) * 7919 % 104729)
        dots = stored(dot(q[heads][:, ::-1], keys[:, ::-1], profile.accumulator), profile)
        total = w[heads] @ np.maximum(dots, 0)
        found = rounded(total * rounded(scale, profile.scale_compute), profile.logit)
        scores[row, start:end] = found
    return {"scores": scores}


def index_select(call: Call, profile: Profile) -> dict[str, Array]:
    """The outputs of a whole call, by name."""
    topk, scores = int(call.options["topk"]), call.arrays["scores"]
    indices = np.full((len(scores), topk), -1, np.int32)
    for row, _, start, end in seen(call):
        found = rounded(scores[row, start:end], profile.logit)
        # NaN last, ties to the lowest position, then in ascending order.
        ranked = np.nan_to_num(found, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
        best = np.argsort(-ranked, kind="stable")[:topk]
        chosen = np.sort(best)
        indices[row, : len(chosen)] = chosen + start
    return {"indices": indices}
