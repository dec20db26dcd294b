"""score[t,s] = k_scale[s] * sum_h weights[t,h] * relu(q[t,h,:] . k[s,:]): the operator, and the request its backends get."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsa_portable import dispatch
from dsa_portable.arrays import Array, dtype_name
from dsa_portable.batch import Batch
from dsa_portable.contract import (
    FLOATS,
    RESERVED,
    SCALED,
    SHORT,
    Feature,
    Request,
    Result,
    array,
    check_same_dtype,
    count,
    flag,
    option,
    when,
)
from dsa_portable.errors import InvalidArgument
from dsa_portable.formats import layout
from dsa_portable.operators import common

YES = (True,)


@dataclass(frozen=True, kw_only=True)
class IndexRequest(Request):
    """A checked call of `lightning_index`; `dims` binds Tq, H, D and Tk, or num_pages and page_size."""

    operator = "lightning_index"
    formula = "score[t,s] = k_scale[s] * sum_h weights[t,h] * relu(q[t,h,:] . k[s,:]);  indices[t] = the topk best s"
    returns = (
        Result("indices", "int32", "Tq topk", "unique, packed to the left, tail -1"),
        Result("scores", "float32", "Tq topk", "with `return_scores`: the scores of `indices`, -inf in the tail"),
    )

    q: Array = array(
        (*SCALED, *FLOATS),
        "rotated, quantised queries; their scale is in `weights`",
        dims="Tq H D",
        reserved=RESERVED,
        features=(
            Feature("format", lambda r: r.format, "operand/weights/scale dtypes; each with a phase is a claim of its own"),
            Feature("heads", lambda r: r.dims["H"], "index heads", (64, 32)),
            Feature("head_dim", lambda r: r.dims["D"], "index head dimension", (128,)),
        ),
    )
    k: Array = array(
        (*SCALED, *FLOATS),
        "keys, one head, in q's dtype; uint8 with the layout's bytes per token when `k_layout` names a packed cache",
        flat="Tk D",
        paged="num_pages page_size D",
        reserved=RESERVED,
        packed_by="k_layout",
    )
    weights: Array = array(FLOATS, "head weights of either sign, times query scale, H^-0.5 and D^-0.5", dims="Tq H")
    k_scale: Array | None = array(
        ("float32", "float16"),
        "key scales, finite, >= 0; required for float8 and int8 keys, forbidden for others and for packed caches",
        flat="Tk",
        paged="num_pages page_size",
        optional=True,
    )
    topk: int = option(
        "int >= 1",
        "entries per row of the result",
        check=count,
        features=(Feature("topk", lambda r: r.topk, "entries per row", (2048,)),),
    )
    batch: Batch = common.batch(
        Feature("key_range", lambda r: when(r.batch.key_start is not None), "`key_start` and `key_end` per row"),
        Feature("non_causal", lambda r: when(not r.batch.causal and r.batch.key_start is None), "`causal=False`"),
    )
    out: tuple[Array, ...] | None = common.out()
    k_layout: str | None = option(
        "name of an index cache layout or None",
        "how a packed k is stored; never inferred",
        default=None,
        features=(Feature("k_layout", lambda r: r.k_layout, "packed index caches, by name"),),
    )
    sorted: bool = option(
        "bool",
        "True: ascending position; False: any order, still unique and packed",
        default=True,
        check=flag,
        features=(Feature("unsorted", lambda r: when(not r.sorted), "`sorted=False`"),),
    )
    return_scores: bool = option(
        "bool",
        "also return the scores of the returned indices",
        default=False,
        check=flag,
        features=(Feature("return_scores", lambda r: when(r.return_scores), "the scores of the returned indices"),),
    )
    dims: Mapping[str, int]

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Keys are of q's dtype, and have scales just where their dtype needs them."""
        k_layout, k_scale = values["k_layout"], values["k_scale"]
        key_dtype = dtype_name(values["k"]) if k_layout is None else layout(k_layout).value_dtype.name
        check_same_dtype(cls.operator, "k", key_dtype, values["q"])
        if k_layout is not None and k_scale is not None:
            raise InvalidArgument(
                f"lightning_index: k_scale was passed, but {k_layout} holds its own scales; pass k_scale=None."
            )
        if k_layout is None and (k_scale is None) == (key_dtype in SCALED):
            state = "missing" if k_scale is None else "passed"
            raise InvalidArgument(
                f"lightning_index: k_scale is {state} for {key_dtype} keys, but {' and '.join(SCALED)} keys need one and "
                f"others have none; {'pass it' if k_scale is None else 'fold it into the keys'}."
            )

    @property
    def format(self) -> str:
        """`operand/weights/scale`, e.g. `e4m3/f32/f32` or `bf16/bf16/-`."""
        packed = "-" if self.k_layout is None else "f32"
        scale = packed if self.k_scale is None else SHORT[dtype_name(self.k_scale)]
        return f"{SHORT[dtype_name(self.q)]}/{SHORT[dtype_name(self.weights)]}/{scale}"

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
