"""score[t,s] = k_scale[s] * sum_h weights[t,h] * relu(q[t,h,:] . k[s,:]): the operator, and the request its backends get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsa_portable import dispatch
from dsa_portable.arrays import Array
from dsa_portable.batch import Batch
from dsa_portable.contract import Feature, Result, flag, option, when
from dsa_portable.operators import common


@dataclass(frozen=True, kw_only=True)
class IndexRequest(common.Scored):
    """A checked call of `lightning_index`; `dims` binds Tq, H, D and Tk, or num_pages and page_size."""

    operator = "lightning_index"
    formula = "score[t,s] = k_scale[s] * sum_h weights[t,h] * relu(q[t,h,:] . k[s,:]);  indices[t] = the topk best s"
    returns = (
        Result("indices", "int32", "Tq topk", "unique, packed to the left, tail -1"),
        Result("scores", "float32", "Tq topk", "with `return_scores`: the scores of `indices`, -inf in the tail"),
    )

    topk: int = common.topk()
    batch: Batch = common.batch(*common.STORED, *common.RAGGED, *common.SEEN)
    out: tuple[Array, ...] | None = common.out()
    k_layout: str | None = common.k_layout()
    sorted: bool = common.ascending()
    return_scores: bool = option(
        "bool",
        "also return the scores of the returned indices",
        default=False,
        check=flag,
        features=(Feature("return_scores", lambda r: when(r.return_scores), "the scores of the returned indices"),),
    )
    dims: Mapping[str, int]

    @property
    def results(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of what the call returns, in order."""
        shape = (self.dims["Tq"], self.topk)
        found: dict[str, tuple[str, tuple[int, ...]]] = {"indices": ("int32", shape)}
        return found | {"scores": ("float32", shape)} if self.return_scores else found


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
    request = IndexRequest.checked(
        q=q,
        k=k,
        weights=weights,
        k_scale=k_scale,
        topk=topk,
        batch=batch,
        k_layout=k_layout,
        return_scores=return_scores,
        sorted=sorted,
        index_space=index_space,
        out=out,
    )
    return dispatch.call(request, backend)
