"""Planted faults of lightning_index: edits of its honest kernel, and what no result can tell apart, with the proof.

Codes I1 to I41 are those of the suite's published fault list; higher ones are further bugs of public ports.
"""

from __future__ import annotations

from dsa_portable.conformance.selftest.plant import Fault

RELU = "np.maximum(dots, 0)"

# fmt: off
FAULTS: tuple[Fault, ...] = (
    Fault("I1", "ReLU missing", RELU, "dots", "transformers#44360"),
)
# fmt: on
