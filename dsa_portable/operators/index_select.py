"""indices[t] = the topk best s of scores[t,s] that row t sees: the second part of lightning_index, and its request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsa_portable import dispatch
from dsa_portable.arrays import Array, dtype_name
from dsa_portable.batch import Batch
from dsa_portable.contract import SHORT, Feature, Request, Result, array, names
from dsa_portable.operators import common


@dataclass(frozen=True, kw_only=True)
class SelectRequest(Request):
    """A checked call of `index_select`; `dims` binds Tq and S."""

    operator = "index_select"
    part_of = "lightning_index"
    formula = "indices[t] = the topk best s of scores[t,s] that row t sees"
    returns = (Result("indices", "int32", "Tq topk", "unique, packed to the left, tail -1"),)

    scores: Array = array(
        ("float32",),
        "of the positions 0 .. S-1 of the row's own request, S = max_seqlen_k; not read where the row does not see",
        dims="Tq S",
        features=(
            Feature(
                "format", lambda r: r.format, "dtype of scores; with a phase it is a claim of its own", values=names(["f32"])
            ),
        ),
    )
    topk: int = common.topk()
    batch: Batch = common.batch(*common.RAGGED, *common.SEEN)
    out: tuple[Array, ...] | None = common.out()
    sorted: bool = common.ascending()
    dims: Mapping[str, int]

    @property
    def format(self) -> str:
        """`f32`."""
        return SHORT[dtype_name(self.scores)]

    @property
    def results(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of what the call returns, in order."""
        return {"indices": ("int32", (self.dims["Tq"], self.topk))}


def index_select(
    scores: Array,
    *,
    topk: int,
    batch: Batch | None = None,
    sorted: bool = True,
    index_space: str = "request",
    out: Array | tuple[Array, ...] | None = None,
    backend: str | None = None,
) -> Any:
    """indices[t] = the topk best s of scores[t,s] that row t sees.

    scores: float32 [Tq, S], S = the batch's max_seqlen_k: column s is position s of the row's own request; a column that the
        row does not see is not read, whatever it holds. Of a wider buffer pass a view.
    topk, batch, sorted, out, backend: as in `lightning_index`; how the batch stores keys is not read.

    Returns int32 [Tq, topk], as `lightning_index` does: unique, packed to the left, tail -1, ascending unless `sorted=False`.
    Of equal scores at the boundary the profile's tie rule keeps some; -0.0 equals +0.0. A visible NaN or infinity leaves that
    row's choice open, not its structure.
    Optional for a backend, since contract 1.1.
    Raises InvalidArgument, Unsupported or BackendError before any kernel runs. Inputs are never written to.
    Source: SGLang (fast_topk_v2), vLLM (top_k_per_row); docs/contract.md, section 15.
    """
    request = SelectRequest.checked(scores=scores, topk=topk, batch=batch, sorted=sorted, index_space=index_space, out=out)
    return dispatch.call(request, backend)
