"""Every planted index fault fails on the case that it names, by the rule that it names; an honest kernel passes those cases."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from dsa_portable.conformance.cases.call import Call, Outputs, drive
from dsa_portable.conformance.cases.catalogue import CASES, LISTS
from dsa_portable.conformance.cases.index import IndexCase
from dsa_portable.conformance.cases.relation import RelationCase
from dsa_portable.conformance.faults.implementation import Array, LightningIndex
from dsa_portable.conformance.faults.index import INDEX_FAULTS, UNOBSERVABLE
from dsa_portable.conformance.faults.index_selection import NaNLargest, TieRuleFlips, TiesToHighest
from dsa_portable.conformance.judging.judge import judge_call, judge_calls
from dsa_portable.conformance.judging.rules import Verdict
from dsa_portable.profile import Profile

EXACT = Profile(ties="lowest")
HEADLINE = "index-e4m3-f32-f32-"
# The caller's side of the boundary: the query scale, Hadamard, rotation and the layer are no arguments of the operator.
CALLERS = {"I9", "I12", "I13", "I14", "I41"}


def index_case(case_id: str) -> IndexCase:
    case = CASES[case_id]
    assert isinstance(case, IndexCase)
    return case


CORE = [fault for fault in INDEX_FAULTS if fault is not TieRuleFlips]


@cache
def build(case: IndexCase) -> Call:
    return case.build()


def verdict(kernel: type[LightningIndex], case: IndexCase, profile: Profile = EXACT) -> Verdict:
    with np.errstate(all="ignore"):
        return judge_call(case, build(case), kernel(profile).run(build(case)), profile)


def related(kernel: type[LightningIndex], case: RelationCase) -> Verdict:
    running, outputs = kernel(EXACT), list[Outputs]()

    def run(call: Call) -> Outputs:
        outputs.append(running.run(call))
        return outputs[-1]

    return judge_calls(case, drive(case.steps(), run), outputs, lambda call: EXACT)


@pytest.mark.parametrize("fault", CORE, ids=lambda fault: fault.__name__)
def test_a_fault_is_caught_by_its_case_and_rule(fault: type[LightningIndex]) -> None:
    assert fault.killed_by in LISTS["core"]
    found = verdict(fault, index_case(fault.killed_by))
    assert found.status == "FAIL", f"{fault.__name__} ({fault.title}) survives {fault.killed_by}"
    assert found.rule == fault.rule, found.reason


@pytest.mark.parametrize("case_id", sorted({fault.killed_by for fault in CORE}))
def test_an_honest_kernel_passes_the_same_cases(case_id: str) -> None:
    found = verdict(LightningIndex, index_case(case_id))
    assert found.status == "PASS", found.reason


def test_a_fault_of_several_runs_passes_one_and_fails_a_rerun() -> None:
    """Each of its sets is right, so no single call can tell: it takes the deterministic list."""
    case = CASES[TieRuleFlips.killed_by]
    assert isinstance(case, RelationCase)
    assert TieRuleFlips.killed_by in LISTS["deterministic"]
    single = replace(index_case(f"{HEADLINE}prefill-plateau"), requests=((4, 2500),))
    assert verdict(TieRuleFlips, single, replace(EXACT, ties="any")).status == "PASS"
    small = replace(case, base=replace(case.base, requests=((4, 2500),), padding_rows=0))
    assert related(LightningIndex, small).status == "PASS"
    assert related(TieRuleFlips, small).status == "FAIL"


def test_every_number_of_the_fault_list_is_accounted_for() -> None:
    codes = [fault.code for fault in INDEX_FAULTS]
    assert len(set(codes)) == len(codes)
    assert {f"I{i}" for i in range(1, 42)} == {code for code in codes if int(code[1:]) <= 41} | CALLERS


def test_every_fault_says_what_it_looks_like_and_what_it_stands_for() -> None:
    titles = [fault.title for fault in INDEX_FAULTS]
    assert len(set(titles)) == len(titles)
    assert all(titles)
    for fault in INDEX_FAULTS:
        assert fault.__doc__
        assert re.fullmatch(r"([\w-]+#\d+)?", fault.stands_for), fault.stands_for


# --- what UNOBSERVABLE claims, where it can be run ---


class HalfScores(LightningIndex):
    """A constant factor is left out."""

    def scores(self, q: Array, k: Array, weights: Array, scale: Array) -> Array:
        return super().scores(q, k, weights, scale) / 2


class ScaleInsideRelu(LightningIndex):
    """The key scale is applied to every dot product."""

    def operands(self, q: Array, k: Array) -> tuple[Array, Array]:
        return q, k * self.found[:, None]

    def scale(self, scale: Array) -> Array:
        return np.ones_like(scale)

    def scores(self, q: Array, k: Array, weights: Array, scale: Array) -> Array:
        self.found = scale
        return super().scores(q, k, weights, scale)


def test_a_constant_factor_shows_in_returned_scores_alone() -> None:
    assert "factor" in next(iter(UNOBSERVABLE))
    for case_id in (f"{HEADLINE}decode-out", f"{HEADLINE}decode-range", f"{HEADLINE}prefill-lattice"):
        assert verdict(HalfScores, index_case(case_id)).status == "PASS"
    assert verdict(HalfScores, index_case(f"{HEADLINE}decode-scores")).status == "FAIL"


def test_where_the_key_scale_is_applied_shows_nowhere() -> None:
    for case_id in (f"{HEADLINE}decode-out", f"{HEADLINE}prefill-lattice", f"{HEADLINE}decode-scores"):
        found = verdict(ScaleInsideRelu, index_case(case_id))
        assert found.status == "PASS", found.reason


def test_the_rank_of_nan_is_the_kernels_own_business() -> None:
    found = verdict(NaNLargest, index_case(f"{HEADLINE}prefill-visible-nan"))
    assert found.status == "PASS", found.reason


def test_a_tie_rule_shows_only_where_one_is_declared() -> None:
    case = index_case(f"{HEADLINE}prefill-lattice")
    assert verdict(TiesToHighest, case, Profile(ties="any")).status == "PASS"
    assert verdict(TiesToHighest, case).status == "FAIL"
