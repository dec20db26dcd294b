"""A failure is named by the mistake that makes it, and by none where two could; the verdict is the same without the words."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from dsa_portable.conformance.cases.call import Outputs
from dsa_portable.conformance.cases.catalogue import CASES
from dsa_portable.conformance.judging import triage
from dsa_portable.conformance.judging.attend_mistakes import ATTEND, counted, tell
from dsa_portable.conformance.judging.index_mistakes import INDEX
from dsa_portable.conformance.judging.judge import judge_call, judge_calls, reference_of
from dsa_portable.conformance.judging.mistake import HONEST, Row
from dsa_portable.conformance.judging.rules import Verdict
from dsa_portable.conformance.selftest import matrix
from dsa_portable.conformance.selftest import triage as measured
from dsa_portable.conformance.selftest.inputs import INPUTS
from dsa_portable.profile import Profile


@cache
def against(name: str) -> tuple[Any, Any, Any]:
    case, steps = INPUTS[name].made()
    call = next(steps)
    with np.errstate(all="ignore"):
        return case, call, reference_of(case, call, INPUTS[name].profile)


def outputs_of(code: str, name: str) -> Outputs:
    _, call, _ = against(name)
    return matrix.planted(code, call.operator, INPUTS[name].profile).run(call)


def explained(outputs: Outputs, name: str) -> tuple[Verdict, str]:
    case, call, reference = against(name)
    with np.errstate(all="ignore"):
        verdict = judge_call(case, call, outputs, reference)
    before = replace(verdict)
    words = triage.explain(reference, outputs, verdict)
    assert verdict == before, "triage changes nothing"
    return verdict, words


# Faults of both operators, on small inputs that few others share; the whole list is behind the marker `slow`.
SOME = ("A4", "A40", "A5", "A36", "I4", "I86", "I27", "I16", "I84")


def check_named(codes: Iterable[str]) -> list[measured.Named]:
    """Named rightly, or not at all, and never otherwise than by the table of the selftest."""
    found = [*measured.named(codes)]
    assert [(one.code, one.words) for one in found if one.right is False] == []
    return found


def test_planted_faults_are_named() -> None:
    assert [one.code for one in check_named(SOME) if not one.right] == []


@pytest.mark.slow
def test_most_planted_faults_are_named_and_none_wrongly() -> None:
    found = check_named(())
    assert sum(one.right is True for one in found) >= 0.8 * len(found)


def test_each_mistake_has_a_name_and_the_selftest_knows_it() -> None:
    for table, first in ((ATTEND, "A"), (INDEX, "I")):
        names = [mistake.name for mistake in table]
        assert len(names) == len(set(names))
        known = {name for code, name in measured.FAULTS.items() if code.startswith(first)}
        assert known <= {*names, "scale fitted"}
    assert set(measured.FAULTS) <= set(matrix.FAULTS)


@pytest.mark.parametrize(
    ("code", "name", "words"),
    [
        ("A4", "attend-bf16-decode-paged64", "; looks like: -1 is read as key 0"),
        ("A36", "attend-bf16-decode-paged64", "; looks like: a row is NaN where a leading block of its entries is all holes"),
        ("I86", "index-e4m3-f32-f32-decode-lengths", "; looks like: the key scale is that of the next key"),
    ],
)
def test_what_is_said(code: str, name: str, words: str) -> None:
    verdict, found = explained(outputs_of(code, name), name)
    assert verdict.status == "FAIL"
    assert found == words


def test_a_nan_has_a_rule_of_its_own() -> None:
    name = "attend-bf16-decode-paged64"
    verdict, _ = explained(outputs_of("A36", name), name)
    assert verdict.rule == "nan"
    assert "is nan, expected" in verdict.reason
    assert "no operand that counts is NaN or infinite" in verdict.reason


def test_softmax_scale_is_found_where_it_is_no_number_of_the_table() -> None:
    name = "attend-bf16-decode-paged64"
    found = explained(outputs_of("A28", name), name)[1]
    assert found == "; looks like: softmax_scale is 0.1359, where 0.1352 is passed"


def test_an_entry_that_makes_the_difference_is_named() -> None:
    """The entry of the largest probability, left out of one row, and counted twice in it."""
    name = "attend-bf16-decode-paged64"
    _, call, reference = against(name)
    row = next(row for row in reference.owners if row > 0 and reference.row(row) is not None)
    told = tell(Row(call, row, reference.owners[row]), HONEST, reference.profile, np.arange(call.arrays["q"].shape[1]))
    assert told.operands is not None
    p, values = told.operands.p, told.operands.values
    entries = np.flatnonzero(counted(Row(call, row, reference.owners[row])))
    j = int(np.argmax(p.min(axis=0)))
    position = call.arrays["indices"][row][entries[j]]
    for sign, what in ((-1, "left out"), (1, "counted twice")):
        out = np.array(outputs_of(matrix.HONEST, name)["out"])
        changed = (told.out + sign * p[:, j : j + 1] * values[j]) / (1 + sign * p[:, j : j + 1])
        out[row] = changed.astype(out.dtype)
        assert explained({"out": out}, name)[1] == f"; as if entry {entries[j]} (position {position}) of row {row} were {what}"


def test_an_honest_kernel_gets_no_words() -> None:
    verdict, found = explained(outputs_of(matrix.HONEST, "attend-bf16-decode-paged64"), "attend-bf16-decode-paged64")
    assert (verdict.status, found) == ("PASS", "")


def test_two_mistakes_at_once_are_no_mistake_of_the_table() -> None:
    name = "attend-bf16-decode-paged64"
    one, other = outputs_of("A4", name), outputs_of("A5", name)
    mixed = {"out": np.where(np.arange(len(one["out"]))[:, None, None] % 2, one["out"], other["out"])}
    assert explained(mixed, name)[1] == ""


@pytest.mark.parametrize(
    ("name", "results"),
    [("index-scores-e4m3-f32-f32-decode-flat", ("scores",)), ("index-select-decode-lengths", ("indices",))],
)
def test_an_operator_s_part_that_fails_gets_no_words(name: str, results: tuple[str, ...]) -> None:
    case = CASES[name]
    (call,) = case.steps()
    found = {name: np.zeros(shape, dtype) for name, (dtype, shape) in call.request.results.items()}
    assert tuple(found) == results
    verdict = judge_calls(case, [call], [found], lambda call: Profile(), triage.explain)
    assert verdict.status == "FAIL"
    assert "looks like" not in verdict.reason


def test_the_words_stand_in_the_reason_and_nowhere_else() -> None:
    name = "attend-bf16-decode-paged64"
    case, call, _ = against(name)
    with np.errstate(all="ignore"):
        plain, told = (
            judge_calls(case, [call], [outputs_of("A4", name)], lambda call: INPUTS[name].profile, explain)
            for explain in (None, triage.explain)
        )
    assert told.reason == f"{plain.reason}; looks like: -1 is read as key 0"
    assert (told.status, told.rule, told.metrics) == (plain.status, plain.rule, plain.metrics)
