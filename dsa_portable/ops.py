"""The two operators, from the caller's side: the docstrings are the contract in brief, docs/contract.md is the whole of it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np

from dsa_portable import registry
from dsa_portable.arrays import Array, as_kind, cast, describe, device_name, device_of, dtype_name, kind, namespace
from dsa_portable.batch import Batch
from dsa_portable.capability import require
from dsa_portable.errors import InvalidArgument, no_exit
from dsa_portable.request import Request, attend_request, index_request
from dsa_portable.signature import MERGE, check_arrays


def lightning_index(
    q: Array,
    k: Array,
    weights: Array,
    *,
    topk: int,
    k_scale: Array | None = None,
    batch: Batch | None = None,
    k_layout: str | None = None,
    return_scores: bool = False,
    sorted: bool = True,
    index_space: str = "request",
    out: Array | tuple[Array, ...] | None = None,
    backend: str | None = None,
) -> Any:
    """score[t,s] = k_scale[s] * sum_h weights[t,h] * relu(q[t,h,:] . k[s,:]); indices[t] = the topk best visible s.

    q: float8_e4m3fn, int8, bfloat16, float16 or float32 [Tq, H, D], after RoPE and rotation; its scale lies in `weights`.
    k: the same dtype, [Tk, D], or [num_pages, page_size, D] where the batch has a block_table; one key head; uint8 where
        `k_layout` names a packed cache (dsa_portable.formats.LAYOUTS).
    weights: float32, bfloat16 or float16 [Tq, H], either sign, already times query scale, H^-0.5 and D^-0.5.
    topk: int >= 1.  k_scale: float32 or float16 [Tk] or [num_pages, page_size], finite, >= 0; with float8 and int8 keys only.
    batch: which rows see which keys; None is one dense causal sequence, bottom-right aligned.
    out: where to write, instead of new arrays.  backend: overrides use_backend() and DSA_BACKEND.

    Returns int32 [Tq, topk], positions in the row's own request, unique, packed to the left, tail -1, ascending unless
    `sorted=False`; a row that sees n < topk keys returns exactly those n. With `return_scores`, also float32 [Tq, topk], -inf
    in the tail. Of equal scores at the boundary the profile's tie rule keeps some; -0.0 equals +0.0.
    What a row does not see never influences it, even NaN; a visible NaN leaves that row's choice open, not its structure.
    Raises InvalidArgument for a call outside the contract, Unsupported for what the backend does not declare, BackendError
    where there is no backend; all before any kernel runs. Inputs are never written to.
    Source: DeepSeek-V3.2-Exp, inference/model.py (Indexer); docs/contract.md, section 2.
    """
    request = index_request(q, k, weights, k_scale, topk, batch, k_layout, return_scores, sorted, index_space, out)
    return _dispatch(request, backend)


def sparse_attend(
    q: Array,
    kv: Array,
    indices: Array,
    *,
    softmax_scale: float,
    value_dim: int = 512,
    attn_sink: Array | None = None,
    topk_length: Array | None = None,
    batch: Batch | None = None,
    kv_layout: str | None = None,
    return_lse: bool = False,
    index_space: str = "request",
    out: Array | tuple[Array, ...] | None = None,
    backend: str | None = None,
) -> Any:
    """P = softmax_j(softmax_scale * q[t,h,:] . kv[idx_j,:]); out[t,h] = sum_j P_j * kv[idx_j,:value_dim].

    q: bfloat16, float16 or float32 [Tq, Hq, Dqk], absorbed (V3.2: 512 latent dims, then 64 rotated).
    kv: the same dtype, [Tk, Dqk], or [num_pages, page_size, Dqk] where the batch has a block_table; uint8 where `kv_layout`
        names a packed cache (then q is bfloat16).
    indices: int32 [Tq, topk], positions in the row's own request; one outside [0, seqlens_k) is skipped wherever it stands; a
        repeated one counts as often as it appears; no causal mask is added.
    softmax_scale: finite, > 0; V3.2 uses 192^-0.5 * mscale^2.  value_dim: leading columns of kv that are the value.
    attn_sink: float32 [Hq]; adds exp(attn_sink) to the denominator; -inf is no sink, +inf gives out 0.
    topk_length: int32 [Tq]; entries of the row from there on are not read.
    batch, out, backend: as in `lightning_index`.

    Returns q's dtype [Tq, Hq, value_dim]; with `return_lse`, also float32 [Tq, Hq], natural logarithm over the keys, without
    the sink. A row without a valid index, and every padding row: out 0, lse -inf.
    Raises InvalidArgument, Unsupported or BackendError before any kernel runs. Inputs are never written to.
    Source: FlashMLA (flash_mla_sparse_fwd), DeepSeek-V3.2-Exp; docs/contract.md, section 3.
    """
    request = attend_request(
        q, kv, indices, softmax_scale, value_dim, attn_sink, topk_length, batch, kv_layout, return_lse, index_space, out
    )
    return _dispatch(request, backend)


def merge(outs: Sequence[Array], lses: Sequence[Array], attn_sink: Array | None = None) -> tuple[Array, Array]:
    """out = sum_i exp(lse_i) * out_i / (sum_i exp(lse_i) + exp(attn_sink)); lse = log sum_i exp(lse_i).

    outs: float32, bfloat16 or float16 [Tq, Hq, value_dim] each, attention over disjoint key shards, computed without a sink.
    lses: float32 [Tq, Hq] each, natural logarithm; a part is not read where its lse is -inf.
    attn_sink: float32 [Hq], applied once, here; -inf is no sink, +inf gives out 0.
    Returns (out in the parts' dtype, lse float32, without the sink), computed in float32 where the parts live; a row that no
    part saw: out 0, lse -inf. Raises InvalidArgument for no part, or parts that disagree in shape, dtype or device.
    """
    _check_parts(outs, lses, attn_sink)
    xp, wanted = namespace(outs[0]), kind(outs[0])
    parts = [cast(as_kind(out, wanted), "float32") for out in outs]
    logs = [as_kind(lse, wanted) for lse in lses]
    top = reduce(xp.maximum, logs)
    top = xp.where(xp.isinf(top), xp.zeros_like(top), top)
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        weights = [xp.exp(lse - top) for lse in logs]
        total = sum(weights[1:], start=weights[0])
        lse = top + xp.log(total)
        if attn_sink is not None:
            total = total + xp.exp(as_kind(attn_sink, wanted) - top)
        shares = [(weight / xp.where(total == 0, xp.ones_like(total), total))[..., None] for weight in weights]
        # 0 * NaN is NaN: what weighs nothing is left out, not multiplied by zero.
        terms = [xp.where(share == 0, xp.zeros_like(part), share * part) for share, part in zip(shares, parts, strict=True)]
        return cast(sum(terms[1:], start=terms[0]), dtype_name(outs[0])), lse


def _check_parts(outs: Sequence[Array], lses: Sequence[Array], attn_sink: Array | None) -> None:
    if len(outs) == 0 or len(outs) != len(lses):
        raise InvalidArgument(
            f"merge: there are {len(outs)} outs and {len(lses)} lses, but one lse per out is accepted; pass pairs."
        )
    first = None
    for out, lse in zip(outs, lses, strict=True):
        dims = check_arrays(MERGE, {"outs": out, "lses": lse, "attn_sink": attn_sink}, paged=False, packed={})
        first = first or (out, dims)
        if dims != first[1] or dtype_name(out) != dtype_name(first[0]) or device_of(out) != device_of(first[0]):
            raise InvalidArgument(
                f"merge: outs has {describe(out)} beside {describe(first[0])}, but one shape, dtype and device is accepted; "
                "pass parts of one call."
            )


def _dispatch(request: Request, argument: str | None) -> Any:
    chosen = registry.select(argument, device_name(request.q))
    found = registry.device(chosen.name)
    with no_exit(chosen.name):
        require(request, chosen.capabilities(found), chosen.name)
        results = registry.operator(chosen.name, request.operator)(request.as_kind(chosen.arrays))
    if request.out is not None:
        return request.out if len(request.out) > 1 else request.out[0]
    wanted = kind(request.q)
    return tuple(as_kind(r, wanted) for r in results) if isinstance(results, tuple) else as_kind(results, wanted)
