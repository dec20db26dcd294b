"""The honest population: kernels that differ, small templates of their own, nobody accused, a run that goes on."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsa_portable.conformance import lists
from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.cases.core import LSE, SCORES
from dsa_portable.conformance.cases.lightning_index import IndexCase
from dsa_portable.conformance.cases.sparse_attend import AttendCase
from dsa_portable.conformance.judging.judge import judge_call
from dsa_portable.conformance.selftest import population
from dsa_portable.conformance.selftest.honest import KERNELS
from dsa_portable.conformance.selftest.inputs import with_arrays
from dsa_portable.conformance.selftest.matrix import FAULTS, MODULES
from dsa_portable.conformance.selftest.plant import kernel
from dsa_portable.conformance.selftest.population import COUNTING, SETTING, TEMPLATES, PopulationError, Unit
from dsa_portable.profile import ENVELOPE_NAMES, envelope

OPERATORS = ("lightning_index", "sparse_attend")
# Small, and between them they let every way of computing show: scores, ties and the order of a free selection; P, merges, lse.
INDEX = IndexCase("small", "Small.", (), "e4m3/f32/f32", ((2, 600),), topk=256, options=(*SCORES, ("sorted", False)))
TIES = IndexCase(
    "ties", "Small.", (), "e4m3/f32/f32", ((2, 300),), heads=16, topk=64, content="ties", options=(("sorted", False),)
)
PACKED = AttendCase("packed", "Small.", (), "v32_fp8_656_nsr_f32", ((1, 700),), heads=8, topk=512, logits="hot", options=LSE)
SINGLE = AttendCase("single", "Small.", (), "f32", ((1, 700),), heads=8, topk=512, logits="hot", options=LSE)


# Thirds have all the bits that a float32 has, so that sums round in every order.
THIRDS = replace(INDEX, format="f32/f32/-")


def calls(operator: str) -> list[Call]:
    if operator == "sparse_attend":
        return [PACKED.build(), SINGLE.build()]
    thirds = THIRDS.build()
    return [INDEX.build(), TIES.build(), with_arrays(thirds, q=thirds.arrays["q"] / 3, k=thirds.arrays["k"] / 3)]


def answers(name: str) -> list[bytes]:
    honest = KERNELS[name]
    with np.errstate(all="ignore"):
        return [array.tobytes() for call in calls(honest.operator) for array in honest.kernel().run(call).values()]


@pytest.mark.parametrize("operator", OPERATORS)
def test_forty_kernels_and_no_two_of_them_alike(operator: str) -> None:
    """But for those that compute alike and declare otherwise."""
    mine = {name: honest for name, honest in KERNELS.items() if honest.operator == operator}
    assert len(mine) >= 40
    found = {name: answers(name) for name in mine}
    for one, other in combinations(mine, 2):
        a, b = mine[one], mine[other]
        if (a.computes, a.edits, a.way) != (b.computes, b.edits, b.way):
            assert found[one] != found[other], (one, other)
        else:
            assert a.profile != b.profile, (one, other)


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_envelope_and_none_is_populated(operator: str) -> None:
    inside = {envelope(operator, honest.profile) for honest in KERNELS.values() if honest.operator == operator}
    expected = {name for name in ENVELOPE_NAMES if name != ("exact-p16" if operator == "lightning_index" else "bf16-logits")}
    assert inside == {*expected, None}


@pytest.mark.parametrize("operator", OPERATORS)
def test_templates_are_few_and_small_and_no_list_s(operator: str) -> None:
    mine = [case for case in TEMPLATES.values() if case.operator == operator]
    assert len(mine) <= 16
    for case in mine:
        rows, keys = zip(*case.requests, strict=True)
        most = 2 if isinstance(case, AttendCase) else 2**14
        assert (sum(rows) if isinstance(case, AttendCase) else sum(r * k for r, k in zip(rows, keys, strict=True))) <= most
    assert not {case.id for case in mine} & {id for name in lists.released() for id in lists.load(name).cases}
    assert len({*SETTING, *COUNTING}) == len(SETTING) + len(COUNTING) == 20


def test_a_seed_draws_other_values_and_none_is_the_frozen_one() -> None:
    drawn = {TEMPLATES["honest-index-e4m3"].build(seed).sha256() for seed in ("", SETTING[0], COUNTING[0])}
    assert len(drawn) == 3


def test_a_run_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, said = tmp_path / "honest.jsonl", list[str]()
    units, names = [Unit("honest-attend-f32-hot", seed) for seed in (SETTING[0], COUNTING[0])], [*KERNELS][-2:]
    first = population.run(units[:1], names, 1, out)
    out.write_text(out.read_text(encoding="utf-8") + '{"version": "cut o', encoding="utf-8")
    both = population.run(units, names, 1, out, said.append)
    assert both[units[0].key] == first[units[0].key]
    assert [line.partition(":")[0] for line in said] == [units[1].key]
    monkeypatch.setattr(population, "version", lambda: "another")
    population.run(units, names, 1, out, said.append)
    assert len(said) == 3


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (
            lambda: population.run([], ["index: lucky"]),
            "honest kernel 'index: lucky' does not exist, but index: float32, dimen",
        ),
        (lambda: population.sample(0), "--sample is 0, but a number from 1 on is accepted"),
    ],
)
def test_a_mistake_is_one_sentence(run: Any, words: str) -> None:
    with pytest.raises(PopulationError, match=words):
        run()


def test_the_table_says_who_was_accused_and_what_each_used() -> None:
    accused = "attend: float32, tiles of 64"
    results: dict[str, population.Found] = {
        Unit("a", SETTING[0]).key: {accused: ("", {"rms": 0.4, "lse": 0.2, "bias": 0.1})},
        Unit("a", COUNTING[0]).key: {accused: ("rms", {"rms": 1.25})},
    }
    (row,) = population.table(results)[1:]
    assert row.split() == [*accused.split(), "exact", "0", "0", "1", "rms", "1.25,", "lse", "0.20"]
    assert population.verdict(results) == "1 honest kernels, 2 verdicts, 1 alarms (SELFTEST)"


@pytest.mark.parametrize(("code", "template"), [("I90", "honest-index-e4m3"), ("A5", "honest-attend-bf16-flat")])
def test_a_template_still_sees_a_fault_under_the_widest_honest_accumulator(code: str, template: str) -> None:
    """A population that nothing could be accused in would prove nothing."""
    case, profile = TEMPLATES[template], KERNELS["index: 13 bits, truncated"].profile
    call = case.build(COUNTING[0])
    with np.errstate(all="ignore"):
        verdict = judge_call(case, call, kernel(profile, FAULTS[code], vars(MODULES[case.operator])).run(call), profile)
    assert verdict.status == "FAIL"


def test_an_exp_that_errs_elsewhere_than_the_emulator_s_is_not_accused() -> None:
    """Flat logits lie where the emulator's exp errs alike for all keys, which cancels; another errs at the largest alone."""
    name = "attend: float32, exp off by 60 units"
    assert population.judged(Unit("attend-f32-prefill-flat"), [name])[name][0] == ""
