"""The two whole operators under torch.library, as `torch.ops.dsa_portable`: for torch.compile, torch.export and fake tensors.

>>> from dsa_portable.faces import torch_library as dsa
>>> indices = dsa.lightning_index(q, k, weights, k_scale=k_scale, topk=2048, batch=batch)

Importing this module registers them. A Batch is built outside what is compiled, and goes in like a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from dsa_portable import operators
from dsa_portable.batch import Batch
from dsa_portable.contract import Request
from dsa_portable.errors import Unsupported

# A Batch crosses as what Batch.flatten() gives; both lists are empty where there is none.
_BATCH = "Tensor?[] arrays, SymInt[] integers"
_SCHEMAS = {
    "lightning_index": f"(Tensor q, Tensor k, Tensor weights, *, SymInt topk, Tensor? k_scale, {_BATCH}, str? k_layout, "
    "bool return_scores, bool sorted, str index_space, str? backend) -> Tensor[]",
    "sparse_attend": f"(Tensor q, Tensor kv, Tensor indices, *, float softmax_scale, SymInt value_dim, Tensor? attn_sink, "
    f"Tensor? topk_length, {_BATCH}, str? kv_layout, bool return_lse, str index_space, str? backend) -> Tensor[]",
}


def _real(operator: Callable[..., Any]) -> Callable[..., list[torch.Tensor]]:
    def kernel(
        *operands: torch.Tensor, arrays: Sequence[torch.Tensor | None], integers: Sequence[int], **options: Any
    ) -> list[torch.Tensor]:
        batch = Batch.unflatten(arrays, integers) if integers else None
        results = operator(*operands, batch=batch, **options)
        # The contract leaves a result's strides to the backend, but compiled code relies on those of the fake.
        return [r.contiguous() for r in (results if isinstance(results, tuple) else (results,))]

    return kernel


def _fake(checked: type[Request]) -> Callable[..., list[torch.Tensor]]:
    names = [argument.name for argument in checked.signature().arguments if not argument.optional]

    def kernel(
        q: torch.Tensor,
        *operands: torch.Tensor,
        arrays: Sequence[torch.Tensor | None],
        integers: Sequence[int],
        backend: str | None,
        **options: Any,
    ) -> list[torch.Tensor]:
        batch = Batch.unflatten(arrays, integers) if integers else _unread(q)
        given: dict[str, Any] = dict(zip(names, (q, *operands), strict=True))
        results = checked.checked(**given, batch=batch, **options).results
        return [torch.empty(shape, dtype=getattr(torch, dtype), device=q.device) for dtype, shape in results.values()]

    return kernel


def _unread(q: torch.Tensor) -> Batch:
    """One request whose lengths nobody reads: Batch.dense would take the lengths' values, and fix symbolic ones."""
    starts, lengths = (torch.empty(n, dtype=torch.int32, device=q.device) for n in (2, 1))
    return Batch(starts, lengths, cu_seqlens_k=starts, max_seqlen_q=0, max_seqlen_k=0)


_library = torch.library.Library("dsa_portable", "FRAGMENT")
for _name, _schema in _SCHEMAS.items():
    _operator, _checked = getattr(operators, _name), operators.REQUESTS[_name]
    _library.define(_name + _schema)
    _library.impl(_name, _real(_operator), "CompositeExplicitAutograd")
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")  # no gradient flows
    torch.library.register_fake(f"dsa_portable::{_name}", _fake(_checked), lib=_library)


def _flat(batch: Batch | None) -> dict[str, Any]:
    if batch is None:
        return {"arrays": [], "integers": []}
    arrays, integers = batch.flatten()
    return {"arrays": [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in arrays], "integers": list(integers)}


def _refuse_out(operator: str, out: object) -> None:
    if out is not None:
        raise Unsupported(
            f"{operator}: out was passed, but operators of torch.library return new tensors; leave it out, or call "
            f"dsa_portable.{operator}.",
            "out",
        )


def lightning_index(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    *,
    topk: int,
    k_scale: torch.Tensor | None = None,
    batch: Batch | None = None,
    k_layout: str | None = None,
    return_scores: bool = False,
    sorted: bool = True,
    index_space: str = "request",
    out: None = None,
    backend: str | None = None,
) -> Any:
    """score[t,s] = k_scale[s] * sum_h weights[t,h] * relu(q[t,h,:] . k[s,:]); indices[t] = the topk best visible s.

    `dsa_portable.lightning_index` through torch.library, over tensors on one device:

    q: float8_e4m3fn, int8, bfloat16, float16 or float32 [Tq, H, D].
    k: the same dtype, [Tk, D] or [num_pages, page_size, D]; uint8 where `k_layout` names a packed cache.
    weights: float32, bfloat16 or float16 [Tq, H].  k_scale: float32 or float16 [Tk] or [num_pages, page_size].
    batch: its arrays on the host or beside q. The first call with other sizes or maxima recompiles, later ones do not.
    out: not supported.  backend: asked for when the call runs, as use_backend() and DSA_BACKEND are, not when it is compiled.

    Returns int32 [Tq, topk]; with `return_scores`, also float32 [Tq, topk]. No gradient flows.
    Raises as `dsa_portable.lightning_index` does, and torch's own error for a wrong type. Of fake tensors, shapes, dtypes and
    devices are checked and no value is read.
    """
    _refuse_out("lightning_index", out)
    results = torch.ops.dsa_portable.lightning_index.default(
        q,
        k,
        weights,
        topk=topk,
        k_scale=k_scale,
        **_flat(batch),
        k_layout=k_layout,
        return_scores=return_scores,
        sorted=sorted,
        index_space=index_space,
        backend=backend,
    )
    return tuple(results) if return_scores else results[0]


def sparse_attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    *,
    softmax_scale: float,
    value_dim: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    batch: Batch | None = None,
    kv_layout: str | None = None,
    return_lse: bool = False,
    index_space: str = "request",
    out: None = None,
    backend: str | None = None,
) -> Any:
    """P = softmax_j(softmax_scale * q[t,h,:] . kv[idx_j,:]); out[t,h] = sum_j P_j * kv[idx_j,:value_dim].

    `dsa_portable.sparse_attend` through torch.library, over tensors on one device:

    q: bfloat16, float16 or float32 [Tq, Hq, Dqk].
    kv: the same dtype, [Tk, Dqk] or [num_pages, page_size, Dqk]; uint8 where `kv_layout` names a packed cache.
    indices: int32 [Tq, topk].  attn_sink: float32 [Hq].  topk_length: int32 [Tq].
    batch, out, backend: as in `lightning_index`.

    Returns q's dtype [Tq, Hq, value_dim]; with `return_lse`, also float32 [Tq, Hq]. No gradient flows.
    Raises as `dsa_portable.sparse_attend` does, and torch's own error for a wrong type. Of fake tensors, shapes, dtypes and
    devices are checked and no value is read.
    """
    _refuse_out("sparse_attend", out)
    results = torch.ops.dsa_portable.sparse_attend.default(
        q,
        kv,
        indices,
        softmax_scale=softmax_scale,
        value_dim=value_dim,
        attn_sink=attn_sink,
        topk_length=topk_length,
        **_flat(batch),
        kv_layout=kv_layout,
        return_lse=return_lse,
        index_space=index_space,
        backend=backend,
    )
    return tuple(results) if return_lse else results[0]


__all__ = ["lightning_index", "sparse_attend"]
