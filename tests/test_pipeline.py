"""Faults before and between the operators are caught, and where they are; honest callers are not accused."""

from __future__ import annotations

import numpy as np
import pytest

from dsa_portable.caller import prepare_index
from dsa_portable.conformance.selftest import caller, model
from dsa_portable.conformance.selftest.pipeline import FAULTS, HONEST, NO_HADAMARD, Finding, examine
from dsa_portable.conformance.selftest.plant import Fault

SEEDS = pytest.mark.parametrize("seed", ["", "1/", "2/", "3/"])
PLANTED = [(fault, what) for what, faults in FAULTS.items() for fault in faults]


@SEEDS
@pytest.mark.parametrize(("fault", "what"), PLANTED, ids=lambda value: getattr(value, "code", ""))
def test_a_callers_fault_is_caught_where_it_is(fault: Fault, what: str, seed: str) -> None:
    found = examine(fault, seed)
    assert found.accused == (what,), found


@SEEDS
@pytest.mark.parametrize("honest", [None, *HONEST], ids=lambda honest: getattr(honest, "title", "as it stands"))
def test_an_honest_caller_is_not_accused(honest: Fault | None, seed: str) -> None:
    found = examine(honest, seed)
    assert found.accused == (), found
    # Room on both sides: honest quantisers use less than half of what is allowed, and e4m3 keeps most of the selection.
    assert found.exchanged < found.exchanged_limit / 2
    assert found.error < found.error_limit / 2
    assert found.recall > 0.95


def test_hadamard_on_neither_side_is_honest_and_on_one_side_is_not() -> None:
    one_sided = next(fault for fault in FAULTS["selection"] if fault.code == "I12")
    assert examine(NO_HADAMARD).recall > 0.95 > 0.5 > examine(one_sided).recall


def test_the_honest_caller_is_prepare_index() -> None:
    layer = model.layers("")[1]
    rows, keys = model.positions()
    one = caller.prepare(layer)
    operands = (layer.index_q, layer.index_k, layer.head_weights)
    other = prepare_index(*operands, positions_q=rows, positions_k=keys, rope_style="half")
    for name in one._fields:
        np.testing.assert_array_equal(getattr(one, name).astype(np.float32), getattr(other, name).astype(np.float32))


def test_faults_of_the_caller_are_counted_apart() -> None:
    assert {fault.code for fault, _ in PLANTED} == {"I9", "I12", "I14", "C1", "I41", "A6"}


def test_a_finding_accuses_what_is_beyond_its_limit_and_nan() -> None:
    assert Finding(10, 10.0, 1.0, 1.0).accused == ()
    assert Finding(11, 10.0, 1.0, 1.0).accused == ("selection",)
    assert Finding(10, 10.0, float("nan"), 1.0).accused == ("output",)
    assert Finding(11, 10.0, 1.1, 1.0).accused == ("selection", "output")
