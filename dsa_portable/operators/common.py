"""Fields that every request has, and the features they bring."""

from __future__ import annotations

from typing import Any

from dsa_portable.contract import YES, Feature, option, when

_BATCH = (
    Feature("flat", lambda r: when(r.batch.block_table is None), "keys in one flat array", YES),
    Feature("page_size", lambda r: r.batch.page_size, "paged keys, positions per page", (64, 128)),
    Feature("ragged", lambda r: when(r.batch.num_requests > 1), "several requests of unequal lengths", YES),
)
_OUT = Feature("out", lambda r: when(r.out is not None), "results written into arrays of the caller's")


def batch(*more: Feature) -> Any:
    """Which rows see which keys; `more` are the operator's own ways to say so."""
    doc = "which rows and keys belong together; None is one dense causal sequence"
    return option("Batch or None", doc, default=None, features=(*_BATCH, *more))


def out() -> Any:
    """Where to write."""
    doc = "where to write the results, in the results' dtypes and shapes"
    return option("array or tuple of arrays", doc, default=None, features=(_OUT,))
