"""Each rule of the judge is derived in a section of docs/judging.md, and some planted fault breaks it before any other."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.cases.catalogue import CASES
from dsa_portable.conformance.judging.judge import Reference, judge_call, reference_of
from dsa_portable.conformance.judging.rules import RULES, Verdict
from dsa_portable.conformance.selftest import matrix
from dsa_portable.conformance.selftest.plant import Fault, kernel
from dsa_portable.profile import Profile
from tests.test_envelopes import PROFILES
from tests.test_session import DEEDS

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXT = (DOCS / "judging.md").read_text(encoding="utf-8")
DERIVED, TABLE = TEXT.split("<!-- generated: rules -->")
# Number -> heading and text, down to the next heading.
SECTIONS = dict(re.findall(r"^##+ ([\d.]+?)\.? (.*?)(?=^##+ |\Z)", DERIVED, re.MULTILINE | re.DOTALL))


OUT, LSE = "weighed / total[:, None]", "top + np.log(total)"
LARGER = Fault("", "everything 0.3% too large", OUT, f"{OUT} * np.float32(1.003)")
LSE_FLOAT16 = Fault("", "lse passes through float16", LSE, f"rounded({LSE}, 'float16')")


@cache
def judged_against(case_id: str, profile: Profile, requests: tuple[tuple[int, int], ...] | None) -> tuple[Any, Call, Reference]:
    case: Any = CASES[case_id]
    case = replace(case, requests=requests) if requests else case
    call = case.build()
    return case, call, reference_of(case, call, profile)


# An honest kernel of one case and profile is judged once, for all the rules that are shown there.
@cache
def verdict(fault: Fault | None, case_id: str, profile: Profile, requests: tuple[tuple[int, int], ...] | None) -> Verdict:
    with np.errstate(all="ignore"):
        case, call, reference = judged_against(case_id, profile, requests)
        return judge_call(case, call, kernel(profile, fault, vars(matrix.MODULES[call.operator])).run(call), reference)


@dataclass(frozen=True)
class Planted:
    """A fault, the case and the profile that show it by its rule, and other requests of the case where those are needed."""

    fault: Fault
    case: str
    profile: Profile
    requests: tuple[tuple[int, int], ...] | None = None

    def verdict(self, fault: Fault | None) -> Verdict:
        return verdict(fault, self.case, self.profile, self.requests)


TRUNCATED = PROFILES["reduced: 13 bits, aligned truncation"]
# Rules that the faults of the selftest break only behind another one, on the inputs that they are tried on.
REST = {
    "population": Planted(matrix.FAULTS["I89"], "index-e4m3-f32-f32-decode-scores", TRUNCATED),
    "score rms": Planted(matrix.FAULTS["I6"], "index-e4m3-f32-f32-decode-scores", TRUNCATED),
    # Probabilities in bfloat16 widen the bound so much on flat logits and many keys that only the bias tells of 0.3%.
    "bias": Planted(LARGER, "attend-bf16-prefill-flat", Profile(p="bfloat16"), ((3, 4000),)),
    "lse rms": Planted(LSE_FLOAT16, "attend-bf16-prefill-lse", Profile()),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_derived_in_the_section_that_it_cites(rule: str) -> None:
    number = RULES[rule][0]
    assert number in SECTIONS, f"judging.md has no section {number}"
    assert f"`{rule}`" in SECTIONS[number], f"section {number} does not name {rule}"


def test_every_rule_is_broken_first_by_some_planted_fault() -> None:
    """Each of these is shown: by the selftest, whose kills are recorded, by test_session, and below."""
    faults = {rule for killed in matrix.recorded().values() for rule in killed.values()}
    deeds = {deed.rule for deed in DEEDS.values() if deed.rule}
    assert faults | deeds | set(REST) >= set(RULES)


@pytest.mark.parametrize("rule", REST)
def test_a_fault_breaks_it_first_and_an_honest_kernel_does_not(rule: str) -> None:
    planted = REST[rule]
    assert planted.verdict(None).status == "PASS"
    found = planted.verdict(planted.fault)
    assert (found.status, found.rule) == ("FAIL", rule), found.reason


def test_the_table_of_rules_is_current() -> None:
    spec = importlib.util.spec_from_file_location("build_tables", DOCS / "build_tables.py")
    assert spec is not None
    assert spec.loader is not None
    build_tables: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_tables)
    assert build_tables.render(build_tables.JUDGING, TEXT) == TEXT, "run: python docs/build_tables.py"
    drifted = TEXT.replace("| `certificate` | 3.2 |", "| `certificate` | 3.1 |")
    assert drifted != TEXT
    assert build_tables.render(build_tables.JUDGING, drifted) == TEXT
