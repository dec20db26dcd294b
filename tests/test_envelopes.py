"""Reduced precision must not hide a fault: each is planted under every envelope and caught, and its honest twin passes."""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
import pytest

from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.cases.catalogue import CASES, LISTS
from dsa_portable.conformance.judging.judge import judge_call
from dsa_portable.conformance.judging.rules import Verdict
from dsa_portable.conformance.selftest.matrix import FAULTS, MODULES
from dsa_portable.conformance.selftest.plant import kernel
from dsa_portable.profile import ENVELOPES, Accumulator, Profile, envelope

# One profile of each envelope and each way into it.
PROFILES = {
    "exact": Profile(ties="lowest"),
    "reduced: 13 bits, aligned truncation": Profile(accumulator=Accumulator(13, "RZ", 32), ties="lowest"),
    "reduced: float16 intermediate": Profile(
        intermediate="float16", intermediate_exponent=-10, finite_max=65504.0, ties="lowest"
    ),
    "bf16-logits": Profile(logit="bfloat16", ties="lowest"),
}
# Core cases that together catch every one of these faults under every profile; small ones, as truncation is slow.
INDEX_CASES = ("index-e4m3-f32-f32-decode-scores", "index-e4m3-f32-f32-prefill-cancel")
INDEX_CODES = ("I89", "I90", "I35", "I10", "I6")
ATTEND_CASES = ("attend-f32-prefill-flat", "attend-f32-decode-paged64", "attend-f32-prefill-paged64")
# Keys and values, probabilities, or both in bfloat16 where float32 is declared.
ATTEND_CODES = ("A80", "A81", "A82")


@lru_cache(maxsize=8)
def build(case_id: str) -> Call:
    assert case_id in LISTS["core"]
    return CASES[case_id].build()


@cache
def verdict(code: str, profile_name: str, case_id: str) -> Verdict:
    """Of a fault, or of the honest kernel where there is no code."""
    profile, call = PROFILES[profile_name], build(case_id)
    running = kernel(profile, FAULTS[code], vars(MODULES[call.operator])) if code else kernel(profile)
    with np.errstate(all="ignore"):
        return judge_call(CASES[case_id], call, running.run(call), profile)


def test_the_profiles_cover_every_envelope() -> None:
    of_the_index = {name for name, inside in ENVELOPES if "lightning_index" in inside.operators}
    assert {envelope("lightning_index", profile) for profile in PROFILES.values()} == of_the_index


@pytest.mark.parametrize("profile_name", PROFILES)
@pytest.mark.parametrize("code", INDEX_CODES)
def test_an_index_fault_is_caught_under_every_envelope(code: str, profile_name: str) -> None:
    assert any(verdict(code, profile_name, case_id).status == "FAIL" for case_id in INDEX_CASES)


@pytest.mark.parametrize("profile_name", PROFILES)
@pytest.mark.parametrize("case_id", INDEX_CASES)
def test_an_honest_index_passes_under_its_own_profile(profile_name: str, case_id: str) -> None:
    found = verdict("", profile_name, case_id)
    assert found.status == "PASS", found.reason


def test_the_certificate_alone_would_miss_what_the_population_check_catches() -> None:
    found = verdict("I89", "reduced: 13 bits, aligned truncation", INDEX_CASES[0])
    assert isinstance(found.metrics["v"], float)
    assert found.metrics["v"] < 1
    assert "keys exchanged" in found.reason


@pytest.mark.parametrize("code", ATTEND_CODES)
@pytest.mark.parametrize("case_id", ATTEND_CASES)
def test_float32_that_computes_in_bfloat16_is_caught(code: str, case_id: str) -> None:
    assert verdict(code, "exact", case_id).status == "FAIL"


@pytest.mark.parametrize("case_id", ATTEND_CASES)
def test_an_honest_attention_passes(case_id: str) -> None:
    found = verdict("", "exact", case_id)
    assert found.status == "PASS", found.reason
