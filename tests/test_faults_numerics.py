"""Reduced precision must not hide a fault: each is planted under every envelope and caught, and its honest twin passes."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest

from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.cases.catalogue import CASES, LISTS
from dsa_portable.conformance.faults import numerics
from dsa_portable.conformance.faults.implementation import LightningIndex, SparseAttend
from dsa_portable.conformance.judging.judge import judge_call
from dsa_portable.conformance.judging.rules import Verdict
from dsa_portable.profile import ENVELOPES, envelope

# Core cases that together catch every index fault under every profile; small ones, as the truncating accumulator is slow.
INDEX_CASES = ("index-e4m3-f32-f32-decode-scores", "index-e4m3-f32-f32-prefill-cancel")
ATTEND_CASES = ("attend-f32-prefill-flat", "attend-f32-decode-paged64", "attend-f32-prefill-paged64")


@lru_cache(maxsize=8)
def build(case_id: str) -> Call:
    assert case_id in LISTS["core"]
    return CASES[case_id].build()


def verdict(kernel: type[LightningIndex] | type[SparseAttend], profile_name: str, case_id: str) -> Verdict:
    profile, call = numerics.PROFILES[profile_name], build(case_id)
    with np.errstate(all="ignore"):
        return judge_call(CASES[case_id], call, kernel(profile).run(call), profile)


def test_the_profiles_cover_every_envelope() -> None:
    assert {envelope("lightning_index", profile) for profile in numerics.PROFILES.values()} == set(ENVELOPES)


@pytest.mark.parametrize("profile_name", numerics.PROFILES)
@pytest.mark.parametrize("fault", numerics.INDEX_FAULTS)
def test_an_index_fault_is_caught_under_every_envelope(fault: type[LightningIndex], profile_name: str) -> None:
    for case_id in INDEX_CASES:
        found = verdict(fault, profile_name, case_id)
        if found.status == "FAIL":
            print(f"{fault.__name__} under {profile_name}: {case_id}: {found.reason}")
            return
    pytest.fail(f"{fault.__name__} survives under {profile_name}")


@pytest.mark.parametrize("profile_name", numerics.PROFILES)
@pytest.mark.parametrize("case_id", INDEX_CASES)
def test_an_honest_index_passes_under_its_own_profile(profile_name: str, case_id: str) -> None:
    found = verdict(LightningIndex, profile_name, case_id)
    assert found.status == "PASS", found.reason


def test_the_certificate_alone_would_miss_what_the_population_check_catches() -> None:
    found = verdict(numerics.HeadDropped, "reduced: 13 bits, aligned truncation", INDEX_CASES[0])
    assert isinstance(found.metrics["v"], float)
    assert found.metrics["v"] < 1
    assert "keys exchanged" in found.reason


@pytest.mark.parametrize("fault", numerics.ATTEND_FAULTS)
@pytest.mark.parametrize("case_id", ATTEND_CASES)
def test_float32_that_computes_in_bfloat16_is_caught(fault: type[SparseAttend], case_id: str) -> None:
    assert verdict(fault, "exact", case_id).status == "FAIL"


@pytest.mark.parametrize("case_id", ATTEND_CASES)
def test_an_honest_attention_passes(case_id: str) -> None:
    found = verdict(SparseAttend, "exact", case_id)
    assert found.status == "PASS", found.reason
