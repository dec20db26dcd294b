"""Every planted fault of lightning_index, and what cannot be one, with the reason.

Codes I1-I41 are those of the fault list in the issue of this suite; the others stand for further public bugs.
"""

from __future__ import annotations

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
