"""Planted faults of sparse_attend: edits of its honest kernel, and what no observation can separate from a right answer.

Codes A1 to A32 are those of the suite's published fault list (A6 is the caller's); the others stand for further bugs.
"""

from __future__ import annotations

from dsa_portable.conformance.selftest.plant import Fault

# fmt: off
FAULTS: tuple[Fault, ...] = (
    Fault("A7", "values taken from the last 512 columns", "kv[::-1, :value_dim]", "kv[::-1, -value_dim:]"),
)
# fmt: on
