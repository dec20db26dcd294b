"""out[t,h] = sum_j softmax_j(softmax_scale * q[t,h,:] . kv[idx_j,:]) * kv[idx_j,:value_dim]: the operator and its request."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from dsa_portable import dispatch
from dsa_portable.arrays import Array, dtype_name
from dsa_portable.batch import Batch
from dsa_portable.contract import (
    COUNTS,
    FLOATS,
    SHORT,
    Feature,
    Request,
    Result,
    Values,
    array,
    check_same_dtype,
    count,
    flag,
    names,
    option,
    scale,
    when,
)
from dsa_portable.formats import LAYOUTS
from dsa_portable.operators import common

_CACHES = [name for name, cache in LAYOUTS.items() if cache.operator == "sparse_attend"]
_WIDTHS = Values(
    lambda value: isinstance(value, str) and re.fullmatch("[1-9][0-9]*/[1-9][0-9]*", value) is not None,
    "two widths, as '576/512'",
)


@dataclass(frozen=True, kw_only=True)
class AttendRequest(Request):
    """A checked call of `sparse_attend`; `dims` binds Tq, Hq, Dqk, topk and Tk, or num_pages and page_size."""

    operator = "sparse_attend"
    formula = "P = softmax_j(softmax_scale * q[t,h,:] . kv[idx_j,:]);  out[t,h] = sum_j P_j * kv[idx_j,:value_dim]"
    returns = (
        Result("out", "q's dtype", "Tq Hq value_dim", "0 in an empty row"),
        Result("lse", "float32", "Tq Hq", "with `return_lse`: natural logarithm, keys only, -inf in an empty row"),
    )

    q: Array = array(
        FLOATS,
        "absorbed queries: latent part first, rotated part last",
        dims="Tq Hq Dqk",
        features=(
            Feature(
                "format",
                lambda r: r.format,
                "dtype of q and kv, or the packed cache; each with a phase is a claim of its own",
                values=names([*(SHORT[dtype] for dtype in FLOATS), *_CACHES]),
            ),
            Feature("heads", lambda r: r.dims["Hq"], "query heads", (128, 64, 16), values=COUNTS),
            Feature(
                "dims", lambda r: f"{r.dims['Dqk']}/{r.value_dim}", "Dqk/value_dim", ("576/512", "512/512"), values=_WIDTHS
            ),
        ),
    )
    kv: Array = array(
        FLOATS,
        "keys and values in one, in q's dtype; uint8 with the layout's bytes per token when `kv_layout` names a cache",
        flat="Tk Dqk",
        paged="num_pages page_size Dqk",
        packed_by="kv_layout",
    )
    indices: Array = array(
        ("int32",),
        "positions in the row's own request; outside [0, seqlens_k) is skipped",
        dims="Tq topk",
        features=(
            Feature("topk", lambda r: r.dims["topk"], "entries per row", (2048,), values=COUNTS),
            Feature("repeated_indices", lambda r: None, "an index that appears twice counts twice", in_call=False),
        ),
    )
    softmax_scale: float = option(
        "finite float > 0, normal in float32",
        "V3.2 uses 192^-0.5 * mscale^2, not Dqk^-0.5: there is no default",
        check=scale,
    )
    value_dim: int = option(
        "int in 1 .. Dqk", "leading columns of kv that are the value", default=512, check=partial(count, largest="Dqk")
    )
    batch: Batch = common.batch(*common.STORED, *common.RAGGED)
    out: tuple[Array, ...] | None = common.out()
    kv_layout: str | None = option(
        "name of a KV cache layout or None", "how a packed kv is stored; never inferred", default=None
    )
    return_lse: bool = option(
        "bool",
        "also return the natural-logarithm lse over the keys",
        default=False,
        check=flag,
        features=(Feature("return_lse", lambda r: when(r.return_lse), "the natural-logarithm lse"),),
    )
    attn_sink: Array | None = array(
        ("float32",),
        "adds exp(attn_sink) to the denominator; never enters lse",
        dims="Hq",
        optional=True,
        features=(Feature("attn_sink", lambda r: when(r.attn_sink is not None), "a sink per head"),),
    )
    topk_length: Array | None = array(
        ("int32",),
        "how many leading entries of the row of `indices` count",
        dims="Tq",
        optional=True,
        features=(Feature("topk_length", lambda r: when(r.topk_length is not None), "a length per row of `indices`"),),
    )
    dims: Mapping[str, int]

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """kv is of q's dtype; a packed cache goes with bfloat16."""
        dtype = "bfloat16" if values["kv_layout"] else dtype_name(values["kv"])
        check_same_dtype(cls.operator, "kv", dtype, values["q"])

    @property
    def format(self) -> str:
        """The packed cache's name, or the dtype of q and kv: `bf16`, `f16`, `f32`."""
        return self.kv_layout or SHORT[dtype_name(self.kv)]

    @property
    def results(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of what the call returns, in order."""
        shape = (self.dims["Tq"], self.dims["Hq"], self.value_dim)
        found: dict[str, tuple[str, tuple[int, ...]]] = {"out": (dtype_name(self.q), shape)}
        return found | {"lse": ("float32", shape[:2])} if self.return_lse else found


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
    attn_sink: float32 [Hq]; adds exp(attn_sink) to the denominator; -inf is no sink, +inf gives out 0, NaN leaves out of its
        head unspecified in rows with a valid index, and nothing else.
    topk_length: int32 [Tq]; entries of the row from there on are not read.
    batch, out, backend: as in `lightning_index`.

    Returns q's dtype [Tq, Hq, value_dim]; with `return_lse`, also float32 [Tq, Hq], natural logarithm over the keys, without
    the sink. A row without a valid index, and every padding row: out 0, lse -inf.
    Raises InvalidArgument, Unsupported or BackendError before any kernel runs. Inputs are never written to.
    Source: FlashMLA (flash_mla_sparse_fwd), DeepSeek-V3.2-Exp; docs/contract.md, section 3.
    """
    request = AttendRequest.checked(
        q=q,
        kv=kv,
        indices=indices,
        softmax_scale=softmax_scale,
        value_dim=value_dim,
        attn_sink=attn_sink,
        topk_length=topk_length,
        batch=batch,
        kv_layout=kv_layout,
        return_lse=return_lse,
        index_space=index_space,
        out=out,
    )
    return dispatch.call(request, backend)
