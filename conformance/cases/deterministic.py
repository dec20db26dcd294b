"""The deterministic list: equal bits from run to run, in any company, chunking and paging; and the tie rule where all must tie."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from dsa_portable.conformance.cases.axes import ATTEND_FORMATS, HEADLINE, INDEX_FORMATS
from dsa_portable.conformance.cases.core import LSE, named
from dsa_portable.conformance.cases.lightning_index import IndexCase
from dsa_portable.conformance.cases.relation import RelationCase
from dsa_portable.conformance.cases.sparse_attend import AttendCase
from dsa_portable.formats import LAYOUTS

# fmt: off
BASES = (
    IndexCase("prefill", "", (), "", ((13, 3100), (6, 2500), (3, 40)), page_size=64, padding_rows=1),
    IndexCase("decode", "", (), "", ((1, 4100), (4, 2600), (1, 33)), page_size=64),
    AttendCase("prefill", "", (), "", ((5, 3000), (6, 2100), (2, 9)), heads=64, page_size=64, logits="peaked"),
    AttendCase("decode", "", (), "", ((1, 4100), (2, 2600), (1, 0)), heads=64, page_size=64, logits="peaked"),
)
# Rows and keys that are no palindromes: in reverse order, decode has other cu_seqlens_q too.
LOPSIDED = {"lightning_index": ((2, 4100), (4, 2600), (1, 33)), "sparse_attend": ((3, 4100), (2, 2600), (1, 0))}
EQUAL_SHAPES = "rerun-equal-shapes"
INVARIANCES = (
    (EQUAL_SHAPES, "The same call eight times with another of equal shapes between: nothing that is kept by shape may outlive its call."),
    ("batch-mates", "Every request alone, and the batch in reverse order: equal bits in any company."),
    ("query-slices", "Each request's rows in two halves, as chunked prefill passes them: equal bits."),
    ("page-size", "The same keys in pages of 64 and 128 and flat: equal bits."),
)
TIES = (
    IndexCase("prefill-ties", "Small integers: equal scores at the boundary, and the lowest positions are kept.", ("ties", "exactness"), "", ((12, 4099), (5, 2300)), content="ties"),
    IndexCase("prefill-zeros", "Every score is +0.0 or -0.0: the lowest positions are kept.", ("ties", "exactness"), "", ((6, 3000),), content="plateau"),
    IndexCase("decode-ties", "Equal scores in decode, over pages.", ("ties", "exactness", "paging"), "", ((1, 4099), (2, 2300)), content="ties", page_size=64),
)
# Of lists of 2026.11 alone: between its reruns is the batch in reverse without padding rows, often of other shapes.
RELEASED = (("rerun", "The same call eight times with another call between: equal bits, whatever the buffers held before."),)
# fmt: on


def _related(one: IndexCase | AttendCase, relation: str, why: str, *also: str) -> RelationCase:
    """The relation on this base, whose id it carries on; `also`: hazards beside the relation's own."""
    id = f"{one.id}-{relation}"
    if relation == EQUAL_SHAPES:
        one = replace(one, requests=LOPSIDED[one.operator] if one.phase == "decode" else one.requests, padding_rows=1)
    return RelationCase(id, why, ("rerun" if relation == EQUAL_SHAPES else relation, *also), one, relation)


def _relations(invariances: tuple[tuple[str, str], ...]) -> Iterable[RelationCase]:
    for base in BASES:
        for format in INDEX_FORMATS if isinstance(base, IndexCase) else ATTEND_FORMATS:
            for relation, why in invariances:
                # Packed caches keep their page size: repacking them is another format's bytes.
                if not (relation == "page-size" and format in LAYOUTS):
                    yield _related(named(base, format), relation, why)


def _special(invariances: tuple[tuple[str, str], ...]) -> Iterable[RelationCase]:
    # Ties that fall otherwise from call to call are right by themselves: only a relation on tied scores shows them.
    tied = replace(named(TIES[0], HEADLINE), page_size=64)
    for relation, why in invariances:
        yield _related(tied, relation, why, "ties")
    # lse takes part where it is offered; where it is not, the case without it stands.
    for base in (base for base in BASES if isinstance(base, AttendCase)):
        for relation, why in invariances:
            case = _related(replace(named(base, "bf16"), options=LSE), relation, why, "lse")
            yield replace(case, id=f"{case.id}-lse")


LISTED: tuple[IndexCase | AttendCase | RelationCase, ...] = (
    *_relations(INVARIANCES),
    *(named(case, format) for case in TIES for format in INDEX_FORMATS),
    *_special(INVARIANCES),
)
CASES = (*LISTED, *_relations(RELEASED), *_special(RELEASED))
