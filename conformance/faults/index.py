"""Every planted fault of lightning_index, and what no result can tell apart, with the proof.

Codes I1 to I41 are those of the suite's published fault list; higher ones are further bugs of public ports.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from dsa_portable.conformance.faults import (
    index_arithmetic,
    index_memory,
    index_output,
    index_selection,
    index_visibility,
    numerics,
)
from dsa_portable.conformance.faults.implementation import LightningIndex

INDEX_FAULTS: tuple[type[LightningIndex], ...] = (
    *numerics.INDEX_FAULTS,
    *index_arithmetic.FAULTS,
    *index_visibility.FAULTS,
    *index_selection.FAULTS,
    *index_output.FAULTS,
    *index_memory.FAULTS,
)

# What goes wrong -> why no legal observation of one call can tell it from an honest kernel. None of it is simulated.
UNOBSERVABLE: Mapping[str, str] = MappingProxyType(
    {
        "a positive constant factor (H^-0.5, D^-0.5) left out or applied twice, where scores are not returned": (
            "For c > 0, c * s_i >= c * s_j exactly where s_i >= s_j, so every row selects the same keys; with return_scores "
            "the `scores` cases see the factor."
        ),
        "the key scale applied inside the ReLU, or to each head before the sum": (
            "c >= 0 gives relu(c * x) = c * relu(x), so the scores are the same numbers but for roundings, which the bound of "
            "judging 3.1 must allow to any order."
        ),
        "NaN ranked first, or last, in a row that sees one": (
            "The contract leaves that row's choice open and asks only for its structure; a NaN that reaches another row, or a "
            "position that is none, is planted (I38, I79)."
        ),
        "another tie rule, or one that changes, under a profile that declares ties='any'": (
            "Whichever of equal scores are kept, no key outside has a higher score than one inside, so the certificate holds; "
            "under ties='lowest' it is planted (I37, I70, I71, I91)."
        ),
        "garbage in scores outside of a row's visible range": (
            "Only scores of returned positions leave the operator; garbage that is selected is planted (I85)."
        ),
        "a workspace or result kept from an earlier call": (
            "The first call has no earlier one; the reruns of the deterministic list, with another call between, see it."
        ),
    }
)
