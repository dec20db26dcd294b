"""The operators, from the caller's side: the docstrings are the contract in brief, docs/contract.md is the whole of it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dsa_portable.contract import Feature, Request
from dsa_portable.operators.index_scores import ScoresRequest, index_scores
from dsa_portable.operators.index_select import SelectRequest, index_select
from dsa_portable.operators.lightning_index import IndexRequest, lightning_index
from dsa_portable.operators.merge import merge
from dsa_portable.operators.sparse_attend import AttendRequest, sparse_attend

# By name: what a backend may offer, and the request that it gets. The last two are parts of the first.
REQUESTS: Mapping[str, type[Request]] = MappingProxyType(
    {r.operator: r for r in (IndexRequest, AttendRequest, ScoresRequest, SelectRequest)}
)
FEATURES: Mapping[str, tuple[Feature, ...]] = MappingProxyType({name: r.signature().features for name, r in REQUESTS.items()})

__all__ = [
    "FEATURES",
    "REQUESTS",
    "AttendRequest",
    "IndexRequest",
    "ScoresRequest",
    "SelectRequest",
    "index_scores",
    "index_select",
    "lightning_index",
    "merge",
    "sparse_attend",
]
