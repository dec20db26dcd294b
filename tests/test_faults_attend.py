"""Every planted fault of sparse_attend fails on the case that it names, under a narrow and a wide profile; honest ones pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dsa_portable.conformance.cases.attend import AttendCase
from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.cases.catalogue import CASES, LISTS
from dsa_portable.conformance.faults.attend import ATTEND_FAULTS, UNOBSERVABLE
from dsa_portable.conformance.faults.call_edits import with_arrays
from dsa_portable.conformance.faults.implementation import Array, SparseAttend
from dsa_portable.conformance.judging.judge import judge_call
from dsa_portable.conformance.judging.rules import RULES, Verdict
from dsa_portable.formats import pack, unpack
from dsa_portable.profile import Profile

# The narrowest profile, and one as FlashMLA's: a wide profile must not buy a pass.
NARROW, WIDE = Profile(), Profile(p="bfloat16", kv_compute="bfloat16")
PROFILES = pytest.mark.parametrize("profile", [NARROW, WIDE], ids=["float32", "16-bit kv and p"])
# What the wide profile declares or is coarser than.
NARROW_ONLY = {"A76", "A80", "A81", "A82"}
FAULTS = {fault.code: fault for fault in ATTEND_FAULTS}
# Killed by a case that is too large to build here; HOLES has a small stand-in with the same addresses.
LARGE = {"A31"}

Built = tuple[AttendCase, Call]


def attend_case(case_id: str) -> AttendCase:
    found = CASES[case_id]
    assert isinstance(found, AttendCase)
    return found


@cache
def build(case_id: str) -> Built:
    case = attend_case(case_id)
    return case, case.build()


def verdict(kernel: type[SparseAttend], built: Built, profile: Profile) -> Verdict:
    case, call = built
    with np.errstate(all="ignore"):
        return judge_call(case, call, kernel(profile).run(call), profile)


# --- inputs that kill what the named cases do not, or do by accident alone ---


def variant(case_id: str, **changes: Any) -> Built:
    case = replace(attend_case(case_id), **changes)
    return case, case.build()


def changed(case_id: str, change: Callable[[Call], Call]) -> Built:
    case, call = build(case_id)
    return case, change(call)


def sinks_near_lse(call: Call) -> Call:
    """Sinks that weigh as much as the keys do, in more than 8 bits, beside the infinite ones."""
    sinks = np.array([-np.inf, 12.7, 11.3, np.inf, 13.9, 0.0], np.float32)
    return with_arrays(call, attn_sink=sinks[np.arange(len(call.arrays["attn_sink"])) % len(sinks)])


def all_holes(call: Call) -> Call:
    """One row names nothing, though its request has keys."""
    indices = call.arrays["indices"].copy()
    indices[1] = -1
    return with_arrays(call, indices=indices)


def ranges(call: Call) -> Call:
    """A batch whose key ranges the index used."""
    rows = len(call.arrays["q"])
    bounds = {"key_start": np.full(rows, 2, np.int32), "key_end": np.full(rows, 1000, np.int32)}
    return replace(call, batch={**call.batch, **bounds})


def other_scale(call: Call) -> Call:
    """softmax_scale of another model."""
    return replace(call, options={**call.options, "softmax_scale": 256**-0.5})


def small_codes(call: Call) -> Call:
    """The same cache with float8 codes 2^12 times smaller, half of them subnormal, under scales as much larger."""
    name, kv = call.options["kv_layout"], call.arrays["kv"]
    values, scale, rope = unpack(name, kv)
    smaller = (values.astype(np.float32) * np.float32(2.0**-12)).astype(ml_dtypes.float8_e4m3fn)
    return with_arrays(call, kv=pack(name, smaller, scale * np.float32(2.0**12), rope))


def far_pages(call: Call) -> Call:
    """The same pages on both sides of element 2^31; the memory between is never touched."""
    kv = call.arrays["kv"]
    first = 2**31 // kv[0].size - len(kv) // 2
    memory = np.zeros((first + len(kv), *kv.shape[1:]), kv.dtype)
    memory[first:] = kv
    table, used = call.batch["block_table"], -(-call.batch["seqlens_k"] // call.batch_options["page_size"])
    inside = np.arange(table.shape[1]) < used[:, None]
    table = np.where(inside, table + first, table).astype(np.int32)
    return replace(with_arrays(call, kv=memory), batch={**call.batch, "block_table": table})


LSE = (("return_lse", True),)
HOLES: dict[str, Callable[[], Built]] = {
    "A16": lambda: changed("attend-bf16-prefill-sink", sinks_near_lse),
    "A17": lambda: changed("attend-bf16-prefill-sink", sinks_near_lse),
    "A23": lambda: changed("attend-bf16-decode-lse", all_holes),
    "A31": lambda: changed("attend-v32_fp8_656_nsr-decode-lse", far_pages),
    "A50": lambda: variant("attend-bf16-prefill-onehot", sink=True, options=LSE),
    "A51": lambda: changed("attend-bf16-prefill-sink", sinks_near_lse),
    "A52": lambda: variant("attend-bf16-prefill-mean", options=LSE),
    "A73": lambda: variant("attend-bf16-prefill-topk512", topk=500),
    "A74": lambda: variant("attend-bf16-decode-page256", page_size=61),
    "A75": lambda: changed("attend-bf16-decode-flat", ranges),
    "A77": lambda: changed("attend-bf16-decode-flat", other_scale),
    "A83": lambda: variant("attend-bf16-prefill-mean", options=LSE),
    "A78": lambda: changed("attend-v32_fp8_656_nsr-decode-flat", small_codes),
}
built_hole = cache(lambda code: HOLES[code]())

NAMED = sorted(code for code, fault in FAULTS.items() if fault.killed_by and code not in LARGE)


@pytest.mark.parametrize("code", NAMED)
def test_a_fault_breaks_its_rule_on_its_case(code: str) -> None:
    fault = FAULTS[code]
    found = verdict(fault, build(fault.killed_by), NARROW)
    assert (found.status, found.rule) == ("FAIL", fault.rule), found.reason


@pytest.mark.parametrize("code", [code for code in NAMED if code not in NARROW_ONLY])
def test_a_wide_profile_does_not_buy_a_pass(code: str) -> None:
    fault = FAULTS[code]
    assert verdict(fault, build(fault.killed_by), WIDE).status == "FAIL"


@pytest.mark.parametrize("code", sorted(NARROW_ONLY))
def test_what_a_wide_profile_declares_passes(code: str) -> None:
    fault = FAULTS[code]
    assert verdict(fault, build(fault.killed_by), WIDE).status == "PASS"


@PROFILES
@pytest.mark.parametrize("case_id", sorted({FAULTS[code].killed_by for code in NAMED}))
def test_an_honest_engine_passes_there(case_id: str, profile: Profile) -> None:
    found = verdict(SparseAttend, build(case_id), profile)
    assert found.status == "PASS", found.reason


@PROFILES
@pytest.mark.parametrize("code", HOLES)
def test_what_no_named_case_shows_can_be_shown(code: str, profile: Profile) -> None:
    honest, faulty = (verdict(kernel, built_hole(code), profile) for kernel in (SparseAttend, FAULTS[code]))
    assert honest.status == "PASS", honest.reason
    assert faulty.status == "FAIL"


class FiniteMask(SparseAttend):
    """Masks seven surplus keys with -1e12 and multiplies their values by the 0 that this leaves."""

    kept = 0

    def attend(self, q: Array, kv: Array, softmax_scale: float, value_dim: int, sink: Array | None) -> tuple[Array, Array]:
        self.kept = len(kv)
        return super().attend(q, np.concatenate([kv, kv[:7]]), softmax_scale, value_dim, sink)

    def logits(self, q: Array, kv: Array, softmax_scale: float) -> Array:
        found = super().logits(q, kv, softmax_scale)
        found[:, self.kept :] = -1e12
        return found


class OtherMaximum(SparseAttend):
    """Subtracts more than the maximum, which is all the same while probabilities are not rounded."""

    def maximum(self, logits: Array) -> Array:
        return super().maximum(logits) + np.float32(3.7)


@pytest.mark.parametrize("kernel", [FiniteMask, OtherMaximum])
@pytest.mark.parametrize("case_id", ["attend-bf16-decode-lse", "attend-f32-decode-flat", "attend-bf16-prefill-repeated"])
def test_what_cannot_be_observed_is_not_accused(kernel: type[SparseAttend], case_id: str) -> None:
    found = verdict(kernel, build(case_id), NARROW)
    assert found.status == "PASS", found.reason


def test_the_fault_list_is_complete_and_every_fault_describes_itself() -> None:
    assert len(FAULTS) == len(ATTEND_FAULTS)
    assert {f"A{number}" for number in range(1, 33)} - set(FAULTS) == {"A6"}  # the caller's
    for code, fault in FAULTS.items():
        assert fault.title, code
        assert fault.__doc__, code
        assert fault.rule in RULES or code in HOLES, code
        assert fault.killed_by in LISTS["full"] if fault.killed_by else code in HOLES, code
    assert all(UNOBSERVABLE.values())
