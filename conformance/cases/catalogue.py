"""Every case there is, and the lists they make: smoke (seconds), core (minutes), deterministic, parts, full (a night)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeAlias

from dsa_portable.conformance.cases import core, deterministic, full, parts, products
from dsa_portable.conformance.cases.hazards import HAZARDS
from dsa_portable.conformance.cases.index_select import SelectCase
from dsa_portable.conformance.cases.lightning_index import IndexCase
from dsa_portable.conformance.cases.relation import PipelineCase, RelationCase
from dsa_portable.conformance.cases.sparse_attend import AttendCase

Case: TypeAlias = IndexCase | SelectCase | AttendCase | RelationCase | PipelineCase

CASES: Mapping[str, Case] = MappingProxyType(
    {case.id: case for case in (*core.CASES, *products.CORE, *deterministic.CASES, *full.CASES, *products.FULL, *parts.CASES)}
)

# What the next frozen list of each family will hold; those that were released stand in frozen/.
LISTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "smoke": tuple(c.id for c in (*(c for c in core.CASES if c.smoke), *products.SMOKE)),
        "core": tuple(c.id for c in (*core.CASES, *products.CORE)),
        "deterministic": tuple(c.id for c in deterministic.LISTED),
        "full": tuple(c.id for c in (*core.CASES, *products.CORE, *full.CASES, *products.FULL)),
        "parts": tuple(c.id for c in parts.CASES),
    }
)

__all__ = ["CASES", "HAZARDS", "LISTS", "Case"]
