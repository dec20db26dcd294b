"""Every planted fault of sparse_attend.

Codes A1-A32 are those of the fault list in the issue of this suite (A6 is the caller's); the others stand for further bugs.
`rule` is the rule of docs/judging.md that a profile of float32 throughout sees broken first: `bound` (4.1), `rms` (4.2), `bias`
(4.3), `lse` (4.4), `empty row` (2) or `exact` (5). A fault without `killed_by` needs an input that no listed case has yet.
"""

from __future__ import annotations

from dsa_portable.conformance.faults import attend_entries, attend_memory, attend_results, attend_softmax, numerics
from dsa_portable.conformance.faults.implementation import SparseAttend
from dsa_portable.conformance.selftest.sparse_attend import UNOBSERVABLE as UNOBSERVABLE

ATTEND_FAULTS: tuple[type[SparseAttend], ...] = (
    *attend_softmax.FAULTS,
    *attend_entries.FAULTS,
    *attend_results.FAULTS,
    *attend_memory.FAULTS,
    *numerics.ATTEND_FAULTS,
)
