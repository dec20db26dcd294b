"""The operators, from the caller's side: the docstrings are the contract in brief, docs/contract.md is the whole of it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dsa_portable.contract import Feature, Request
from dsa_portable.operators.lightning_index import IndexRequest, lightning_index
from dsa_portable.operators.merge import merge
from dsa_portable.operators.sparse_attend import AttendRequest, sparse_attend

# By name: what a backend may offer, and the request that it gets.
REQUESTS: Mapping[str, type[Request]] = MappingProxyType({r.operator: r for r in (IndexRequest, AttendRequest)})
FEATURES: Mapping[str, tuple[Feature, ...]] = MappingProxyType({name: r.signature().features for name, r in REQUESTS.items()})

__all__ = ["FEATURES", "REQUESTS", "AttendRequest", "IndexRequest", "lightning_index", "merge", "sparse_attend"]
