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
INVARIANCES = (
    ("rerun", "The same call eight times with another call between: equal bits, whatever the buffers held before."),
    ("batch-mates", "Every request alone, and the batch in reverse order: equal bits in any company."),
    ("query-slices", "Each request's rows in two halves, as chunked prefill passes them: equal bits."),
    ("page-size", "The same keys in pages of 64 and 128 and flat: equal bits."),
)
TIES = (
    IndexCase("prefill-ties", "Small integers: equal scores at the boundary, and the lowest positions are kept.", ("ties", "exactness"), "", ((12, 4099), (5, 2300)), content="ties"),
    IndexCase("prefill-zeros", "Every score is +0.0 or -0.0: the lowest positions are kept.", ("ties", "exactness"), "", ((6, 3000),), content="plateau"),
    IndexCase("decode-ties", "Equal scores in decode, over pages.", ("ties", "exactness", "paging"), "", ((1, 4099), (2, 2300)), content="ties", page_size=64),
)
# fmt: on


def _cases() -> Iterable[IndexCase | AttendCase | RelationCase]:
    for base in BASES:
        for format in INDEX_FORMATS if isinstance(base, IndexCase) else ATTEND_FORMATS:
            for relation, why in INVARIANCES:
                # Packed caches keep their page size: repacking them is another format's bytes.
                if not (relation == "page-size" and format in LAYOUTS):
                    one = named(base, format)
                    yield RelationCase(f"{one.id}-{relation}", why, (relation,), one, relation)
    for case in TIES:
        for format in INDEX_FORMATS:
            yield named(case, format)


# Ties that fall otherwise from call to call are right by themselves: only a relation on tied scores shows them.
TIED = tuple(
    RelationCase(f"{one.id}-{relation}", why, (relation, "ties"), one, relation)
    for one in (replace(named(TIES[0], HEADLINE), page_size=64),)
    for relation, why in INVARIANCES
)

# lse takes part where it is offered; where it is not, the case without it stands.
WITH_LSE = tuple(
    RelationCase(f"{one.id}-{relation}-lse", why, (relation, "lse"), replace(one, options=LSE), relation)
    for base in BASES
    if isinstance(base, AttendCase)
    for one in (named(base, "bf16"),)
    for relation, why in INVARIANCES
)

CASES = (*_cases(), *TIED, *WITH_LSE)
