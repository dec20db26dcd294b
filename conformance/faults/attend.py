"""Every planted fault of sparse_attend, and what no observation can separate from a right answer.

Codes A1-A32 are those of the fault list in the issue of this suite (A6 is the caller's); the others stand for further bugs.
`rule` is the rule of docs/judging.md that a profile of float32 throughout sees broken first: `bound` (4.1), `rms` (4.2), `bias`
(4.3), `lse` (4.4), `empty row` (2) or `exact` (5). A fault without `killed_by` needs an input that no listed case has yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dsa_portable.conformance.faults import attend_entries, attend_memory, attend_results, attend_softmax, numerics
from dsa_portable.conformance.faults.implementation import SparseAttend

ATTEND_FAULTS: tuple[type[SparseAttend], ...] = (
    *attend_softmax.FAULTS,
    *attend_entries.FAULTS,
    *attend_results.FAULTS,
    *attend_memory.FAULTS,
    *numerics.ATTEND_FAULTS,
)

# What gives a right answer, bit for bit or within the rounding that every order of summation has; so it is no fault.
UNOBSERVABLE: Mapping[str, str] = MappingProxyType(
    {
        "invalid entries masked with a large finite negative logit instead of being skipped": (
            "exp(-1e12 - maximum) is exactly 0 in float32, so every sum is the same; only a row of nothing but invalid "
            "entries differs, and that is A23"
        ),
        "something other than the row's maximum subtracted before exp": (
            "numerator and normaliser are multiplied by the same exp(maximum - c), which cancels; 16-bit probabilities are "
            "rounded elsewhere by it, as their profile allows, and where it overflows or underflows it is A11"
        ),
        "an entry of probability 0 gathered from memory that holds a finite number": (
            "0 times a finite number adds exactly 0; where the memory holds NaN it is A47"
        ),
    }
)
