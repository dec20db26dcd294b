"""The selftest's own machinery: edits that stand, kills that are recorded, survivors and accused twins that are seen.

The whole matrix is `dsa-portable selftest`; CI runs a sample of it.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsa_portable.conformance.judging.judge import Reference, judge_call, reference_of
from dsa_portable.conformance.judging.rules import RULES, Verdict
from dsa_portable.conformance.selftest import inputs, lightning_index, matrix, sparse_attend
from dsa_portable.conformance.selftest.inputs import INPUTS
from dsa_portable.conformance.selftest.pipeline import FAULTS as CALLERS
from dsa_portable.conformance.selftest.plant import Fault, PlantError, edited, kernel, plant
from dsa_portable.profile import Profile
from tests import plugins

KILLS = matrix.recorded()
NARROW, WIDE = Profile(ties="lowest"), Profile(p="bfloat16", kv_compute="bfloat16")
HEADLINE = "index-e4m3-f32-f32-"
# What a wide profile declares, or is coarser than.
NARROW_ONLY = {"A76", "A80", "A81", "A82"}


@cache
def against(name: str, profile: Profile) -> tuple[Any, Any, Reference]:
    case, steps = INPUTS[name].made()
    call = next(steps)
    with np.errstate(all="ignore"):
        return case, call, reference_of(case, call, profile)


def verdict(fault: Fault | None, name: str, profile: Profile = NARROW) -> Verdict:
    case, call, reference = against(name, profile)
    outputs = kernel(profile, fault, vars(matrix.MODULES[call.operator])).run(call)
    with np.errstate(all="ignore"):
        return judge_call(case, call, outputs, reference)


# --- the rows ---------------------------------------------------------------------------------------------------------------


def test_every_number_of_the_fault_list_is_accounted_for() -> None:
    codes = [fault.code for module in matrix.MODULES.values() for fault in module.FAULTS]
    callers = {fault.code for faults in CALLERS.values() for fault in faults}
    assert len(codes) == len(set(codes)) == 242
    assert {f"I{i}" for i in range(1, 42)} - set(codes) == {"I9", "I12", "I13", "I14", "I41"}
    assert {f"A{i}" for i in range(1, 33)} - set(codes) == {"A6"}
    assert {"I9", "I12", "I14", "I41", "A6"} <= callers


@pytest.mark.parametrize("module", [lightning_index, sparse_attend])
def test_every_fault_says_what_it_looks_like_and_what_it_stands_for(module: Any) -> None:
    titles = [fault.title for fault in module.FAULTS]
    assert len(set(titles)) == len(titles)
    assert all(titles)
    assert all(module.UNOBSERVABLE.values())
    assert [fault.code for fault in module.FAULTS if fault.stands_for and not re.search(r"\w", fault.stands_for)] == []


@pytest.mark.parametrize("code", matrix.FAULTS)
def test_an_edit_stands_in_the_kernel_once(code: str) -> None:
    fault = matrix.FAULTS[code]
    kernel(NARROW, fault, vars(matrix.MODULES[matrix.OPERATOR[code]]))
    assert all(old != new for old, new in fault.edits)


def test_every_fault_is_killed_by_a_rule_somewhere() -> None:
    assert list(KILLS) == list(matrix.FAULTS)
    assert [code for code, killed in KILLS.items() if not killed] == []
    assert {rule for killed in KILLS.values() for rule in killed.values()} <= set(RULES)
    assert {name for killed in KILLS.values() for name in killed} == set(INPUTS), "an input that kills nothing is decoration"


# --- a sample under another profile, and what cannot be seen -----------------------------------------------------------------

WIDENED = [code for code in matrix.FAULTS if code[0] == "A" and code not in NARROW_ONLY]
SAMPLE = WIDENED[::10]


@pytest.mark.parametrize("code", [*SAMPLE, *(pytest.param(c, marks=pytest.mark.slow) for c in WIDENED if c not in SAMPLE)])
def test_a_wide_profile_does_not_buy_a_pass(code: str) -> None:
    assert any(verdict(matrix.FAULTS[code], name, WIDE).status == "FAIL" for name in KILLS[code])


@pytest.mark.parametrize("code", sorted(NARROW_ONLY))
def test_what_a_wide_profile_declares_passes(code: str) -> None:
    assert verdict(matrix.FAULTS[code], next(iter(KILLS[code])), WIDE).status == "PASS"


@pytest.mark.parametrize("name", ["attend-bf16-decode-flat", "attend-bf16-prefill-sink", "attend-f32-decode-flat"])
def test_an_honest_kernel_passes_under_a_wide_profile(name: str) -> None:
    assert verdict(None, name, WIDE).status == "PASS"


FOUND = "rounded(total * rounded(scale, profile.scale_compute), profile.logit)"
KEYS = "keys, scale = k[slots].astype(np.float32), k_scale[slots].astype(np.float32)"
HALF_SCORES = Fault("", "a constant factor left out", FOUND, f"{FOUND} / 2")
INSIDE_RELU = Fault(
    "", "the key scale inside the ReLU", KEYS, f"{KEYS}; keys, scale = keys * scale[:, None], np.ones_like(scale)"
)
NAN_FIRST = Fault("", "NaN ranks first", lightning_index.RANKED, lightning_index.NAN_FIRST)
LOGITS = "kv = rounded(kv, profile.kv_compute)"
FINITE_MASK = Fault(
    "",
    "seven surplus keys masked with -1e12",
    LOGITS,
    f"{LOGITS}; kv = np.concatenate([kv, kv[:7]])",
    more=(("top = logits.max(axis=1)", "logits[:, len(positions) :] = -1e12; top = logits.max(axis=1)"),),
)
OTHER_MAXIMUM = Fault(
    "", "more than the maximum subtracted", "top = logits.max(axis=1)", "top = logits.max(axis=1) + np.float32(3.7)"
)


def test_a_constant_factor_shows_in_returned_scores_alone() -> None:
    assert "factor" in next(iter(lightning_index.UNOBSERVABLE))
    for name in ("decode-out", "decode-range", "prefill-lattice"):
        assert verdict(HALF_SCORES, HEADLINE + name).status == "PASS"
    assert verdict(HALF_SCORES, f"{HEADLINE}decode-scores").status == "FAIL"


@pytest.mark.parametrize("name", ["decode-out", "prefill-lattice", "decode-scores"])
def test_where_the_key_scale_is_applied_shows_nowhere(name: str) -> None:
    found = verdict(INSIDE_RELU, HEADLINE + name)
    assert found.status == "PASS", found.reason


def test_the_rank_of_nan_is_the_kernels_own_business() -> None:
    found = verdict(NAN_FIRST, f"{HEADLINE}prefill-visible-nan")
    assert found.status == "PASS", found.reason


def test_a_tie_rule_shows_only_where_one_is_declared() -> None:
    highest = matrix.FAULTS["I71"]
    assert verdict(highest, f"{HEADLINE}prefill-lattice", Profile(ties="any")).status == "PASS"
    assert verdict(highest, f"{HEADLINE}prefill-lattice").status == "FAIL"


@pytest.mark.parametrize("honest", [FINITE_MASK, OTHER_MAXIMUM], ids=lambda honest: honest.title)
@pytest.mark.parametrize("name", ["attend-bf16-decode-lse", "attend-f32-decode-flat", "attend-bf16-prefill-repeated"])
def test_what_cannot_be_observed_is_not_accused(honest: Fault, name: str) -> None:
    found = verdict(honest, name)
    assert found.status == "PASS", found.reason


# --- the command ------------------------------------------------------------------------------------------------------------


def matrix_of(faults: dict[str, Fault], monkeypatch: pytest.MonkeyPatch, names: list[str]) -> list[str]:
    """What the command would say of other faults."""
    monkeypatch.setattr(matrix, "FAULTS", faults)
    monkeypatch.setattr(matrix, "OPERATOR", dict.fromkeys(faults, "lightning_index"))
    return matrix.problems(matrix.run(names=names, jobs=1))


def test_a_survivor_and_an_idle_edit_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = {
        "I1": matrix.FAULTS["I1"],
        "S1": replace(NAN_FIRST, code="S1"),
        "S2": Fault("S2", "nothing", "What the row sees.", "What the row sees"),
    }
    name = f"{HEADLINE}prefill-visible-nan"
    monkeypatch.setattr(matrix, "recorded", lambda: {"I1": {name: "certificate"}})
    assert matrix_of(faults, monkeypatch, [name]) == [
        "SURVIVOR  S1 (NaN ranks first) passes 1 inputs",
        "IDLE      S2 (nothing) changes no output on any input",
    ]


def test_an_accused_honest_kernel_and_a_changed_kill_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{HEADLINE}decode-out"
    monkeypatch.setattr(inputs.Input, "profile", Profile(ties="lowest", finite_max=0.5))
    known = {"I1": {name: "certificate"}}
    monkeypatch.setattr(matrix, "recorded", lambda: known)
    found = matrix_of({"I1": matrix.FAULTS["I1"]}, monkeypatch, [name])
    assert found[0] == "SURVIVOR  I1 (ReLU missing) passes 1 inputs"
    assert found[1] == f"CHANGED   I1 (ReLU missing) on {name}: passes, and kills.json has certificate"
    assert found[2].startswith(f"ACCUSED   the honest kernel on {name}: a dot product kept as ")


def test_the_command_says_what_it_is_and_compares(tmp_path: Path) -> None:
    done = plugins.dsa_portable(tmp_path, "selftest", "--sample", "300")
    assert (done.returncode, done.stderr) == (0, "")
    first, *_, last = done.stdout.splitlines()
    assert first == "evidence SELFTEST: the suite examines itself, no backend is run"
    assert last == "1 of 1 faults killed, the honest kernels pass (SELFTEST)"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--fault", "I999"), "fault 'I999' is not planted, but I1, .* are; name one of them."),
        (("--sample", "0"), "--sample is 0, but a number from 1 on is accepted: every so many faults are tried."),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    done = plugins.dsa_portable(tmp_path, "selftest", *arguments)
    assert done.returncode == 2
    assert re.fullmatch(f"dsa-portable: {sentence}\n", done.stderr)


# --- edits ------------------------------------------------------------------------------------------------------------------


def test_an_edit_whose_text_moved_says_which_file_and_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(PlantError, match=r"^kernel.py, for I1 holds 'no such text' 0 times, but an edit needs it once; mend"):
        kernel(NARROW, replace(matrix.FAULTS["I1"], old="no such text"))
    with pytest.raises(PlantError, match=r"^here holds 'a' 2 times"):
        edited("a a", [("a", "b")], "here")
    assert edited("a b", [("a", "b b"), ("b b b", "c")], "here") == "c"
    with pytest.raises(PlantError, match=r"^rows.py of dsa_portable.backends.cpu holds 'no such text' 0 times"):
        plant("dsa_portable.backends.cpu", tmp_path, "copy", ("rows.py", "no such text", ""))


def test_kills_are_written_a_fault_a_line() -> None:
    text = matrix.text({"I1": {"a": "visible"}, "I2": {}})
    assert text == '{\n "I1": {"a": "visible"},\n "I2": {}\n}\n'
    assert json.loads(text) == {"I1": {"a": "visible"}, "I2": {}}
    assert matrix.KILLS.read_text(encoding="utf-8") == matrix.text(KILLS)
