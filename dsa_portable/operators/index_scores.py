"""score[t,s] = k_scale[s] * sum_h weights[t,h] * relu(q[t,h,:] . k[s,:]): the first part of lightning_index, its request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsa_portable import dispatch
from dsa_portable.arrays import Array
from dsa_portable.batch import Batch
from dsa_portable.contract import Result
from dsa_portable.operators import common


@dataclass(frozen=True, kw_only=True)
class ScoresRequest(common.Scored):
    """A checked call of `index_scores`; `dims` binds Tq, H, D and Tk, or num_pages and page_size."""

    operator = "index_scores"
    part_of = "lightning_index"
    formula = "score[t,s] = k_scale[s] * sum_h weights[t,h] * relu(q[t,h,:] . k[s,:]) where row t sees s, else -inf"
    returns = (Result("scores", "float32", "Tq S", "of the positions 0 .. S-1 of the row's own request, S = max_seqlen_k"),)

    batch: Batch = common.batch(*common.STORED, *common.RAGGED, *common.SEEN)
    out: tuple[Array, ...] | None = common.out()
    k_layout: str | None = common.k_layout()
    dims: Mapping[str, int]

    @property
    def results(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of what the call returns, in order."""
        return {"scores": ("float32", (self.dims["Tq"], self.batch.max_seqlen_k))}


def index_scores(
    q: Array,
    k: Array,
    weights: Array,
    *,
    k_scale: Array | None = None,
    batch: Batch | None = None,
    k_layout: str | None = None,
    index_space: str = "request",
    out: Array | tuple[Array, ...] | None = None,
    backend: str | None = None,
) -> Any:
    """score[t,s] = k_scale[s] * sum_h weights[t,h] * relu(q[t,h,:] . k[s,:]) where row t sees s, else -inf.

    q, k, weights, k_scale, k_layout, batch, out, backend: as in `lightning_index`.

    Returns float32 [Tq, S], S = the batch's max_seqlen_k: column s is position s of the row's own request. -inf where the row
    does not see the position, and everywhere in a padding row. A visible NaN leaves the scores of its row open, not the -inf.
    Optional for a backend, since contract 1.1; its results are what `index_select` takes.
    Raises InvalidArgument, Unsupported or BackendError before any kernel runs. Inputs are never written to.
    Source: DeepGEMM (fp8_mqa_logits, fp8_paged_mqa_logits); docs/contract.md, section 14.
    """
    request = ScoresRequest.checked(
        q=q, k=k, weights=weights, k_scale=k_scale, batch=batch, k_layout=k_layout, index_space=index_space, out=out
    )
    return dispatch.call(request, backend)
