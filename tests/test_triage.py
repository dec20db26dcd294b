"""A failure is named by the mistake that makes it, and by none where two could; the verdict is the same without the words."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from dsa_portable.conformance.cases.call import Outputs
from dsa_portable.conformance.judging import triage
from dsa_portable.conformance.judging.judge import judge_call, judge_calls, reference_of
from dsa_portable.conformance.judging.rules import Verdict
from dsa_portable.conformance.selftest import matrix
from dsa_portable.conformance.selftest.inputs import INPUTS


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


# On these inputs, each planted fault is told from every mistake of the table but its own.
ATTEND = {
    "A4": ("attend-bf16-decode-paged64", "-1 is read as key 0"),
    "A3": ("attend-bf16-decode-paged64", "-1 is read as the last key"),
    "A40": ("attend-bf16-decode-paged64", "entries behind the first -1 are dropped"),
    "A5": ("attend-bf16-decode-paged64", "the rotated part of the keys is dropped from the logits"),
    "A36": ("attend-bf16-decode-paged64", "a row is NaN where a leading block of its entries is all holes"),
    "A17": ("attend-bf16-prefill-sink", "the sink is counted twice"),
    "A19": ("attend-bf16-decode-lse", "lse is to base 2"),
}


@pytest.mark.parametrize("code", ATTEND)
def test_a_planted_fault_is_named(code: str) -> None:
    name, words = ATTEND[code]
    verdict, found = explained(outputs_of(code, name), name)
    assert verdict.status == "FAIL"
    assert found == f"; looks like: {words}"


def test_an_honest_kernel_gets_no_words() -> None:
    verdict, found = explained(outputs_of(matrix.HONEST, "attend-bf16-decode-paged64"), "attend-bf16-decode-paged64")
    assert (verdict.status, found) == ("PASS", "")


def test_two_mistakes_at_once_are_no_mistake_of_the_table() -> None:
    name = "attend-bf16-decode-paged64"
    one, other = outputs_of("A4", name), outputs_of("A5", name)
    mixed = {"out": np.where(np.arange(len(one["out"]))[:, None, None] % 2, one["out"], other["out"])}
    assert explained(mixed, name)[1] == ""


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
