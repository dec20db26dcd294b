"""Every case there is, and the lists they make: smoke (seconds), core (minutes), deterministic and full (a night)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TypeAlias

from dsa_portable.conformance.cases import core, deterministic, full
from dsa_portable.conformance.cases.attend import AttendCase
from dsa_portable.conformance.cases.hazards import HAZARDS
from dsa_portable.conformance.cases.index import IndexCase
from dsa_portable.conformance.cases.relation import PipelineCase, RelationCase

Case: TypeAlias = IndexCase | AttendCase | RelationCase | PipelineCase

CASES: Mapping[str, Case] = MappingProxyType({case.id: case for case in (*core.CASES, *deterministic.CASES, *full.CASES)})

# The smoke list: the headline formats on every template that is neither long nor a repetition; never a badge.
_SMOKE_FORMATS = (core.HEADLINE, "bf16", "v32_fp8_656_nsr")
_SMOKE_OMITS = (
    *("-long", "-paged128", "-heads16", "-page1", "-page16", "-page256", "-topk4096", "-dim64", "-heads8", "-dim512", "-pow2"),
)
_GRID = (*(f"-{case.id}" for case in core.INDEX_GRID), *(f"-{case.id}" for case in core.ATTEND_GRID))
LISTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "smoke": tuple(c.id for c in core.CASES if c.format in _SMOKE_FORMATS and not c.id.endswith((*_SMOKE_OMITS, *_GRID))),
        "core": tuple(c.id for c in core.CASES),
        "deterministic": tuple(c.id for c in deterministic.CASES),
        "full": tuple(c.id for c in (*core.CASES, *full.CASES)),
    }
)

__all__ = ["CASES", "HAZARDS", "LISTS", "Case"]
