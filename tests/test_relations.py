"""Cases of several calls: an honest kernel agrees with itself in every relation, and each relation is shown to fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import pytest

from dsa_portable.conformance.cases.call import Call, Outputs, drive
from dsa_portable.conformance.cases.catalogue import CASES, LISTS
from dsa_portable.conformance.cases.relation import RELATIONS, PipelineCase, RelationCase
from dsa_portable.conformance.judging.judge import judge_calls
from dsa_portable.conformance.judging.rules import Verdict
from dsa_portable.conformance.selftest.matrix import planted
from dsa_portable.conformance.selftest.plant import Fault, kernel
from dsa_portable.profile import Profile

PROFILE = Profile(ties="lowest", deterministic=True)
PROFILES = {"lightning_index": PROFILE, "sparse_attend": PROFILE}
INDEX = "index-e4m3-f32-f32"
NAMED = "positions = entries[inside & counted]"
SHIFTED = Fault("", "every entry names the key before", NAMED, f"{NAMED}; positions = np.maximum(positions - 1, 0)")
SMALL = {
    "rerun": (f"{INDEX}-prefill-rerun", "attend-bf16-decode-rerun-lse"),
    "rerun-equal-shapes": (f"{INDEX}-prefill-rerun-equal-shapes", "attend-bf16-decode-rerun-equal-shapes-lse"),
    "batch-mates": (f"{INDEX}-prefill-batch-mates", "attend-bf16-decode-batch-mates-lse"),
    "query-slices": (f"{INDEX}-prefill-query-slices", "attend-bf16-prefill-query-slices-lse"),
    "page-size": (f"{INDEX}-decode-page-size", "attend-bf16-decode-page-size-lse"),
    "heads-reversed": (f"{INDEX}-symmetry-heads-reversed", "attend-bf16-symmetry-heads-reversed"),
    "weights-times-8": (f"{INDEX}-symmetry-weights-times-8",),
    "keys-reversed": (f"{INDEX}-symmetry-keys-reversed",),
    "entries-reversed": ("attend-bf16-symmetry-entries-reversed",),
    "values-shifted": ("attend-f32-values-shifted",),
}


class Runs(Protocol):
    """A kernel, or what stands around one."""

    def run(self, call: Call) -> Outputs: ...


def run(case: RelationCase | PipelineCase, running: Runs) -> tuple[list[Call], list[Outputs]]:
    outputs: list[Outputs] = []

    def call(step: Call) -> Outputs:
        outputs.append(running.run(step))
        return outputs[-1]

    return drive(case.steps(), call), outputs


def small(case_id: str) -> RelationCase:
    """The case with fewer heads and keys, so that a NumPy kernel is quick."""
    case = CASES[case_id]
    assert isinstance(case, RelationCase)
    requests = tuple((rows, min(keys, 300)) for rows, keys in case.base.requests)
    return replace(case, base=replace(case.base, requests=requests, heads=8, topk=128))


def verdict(case: RelationCase | PipelineCase, running: Runs) -> Verdict:
    calls, outputs = run(case, running)
    with np.errstate(all="ignore"):
        return judge_calls(case, calls, outputs, lambda call: PROFILES[call.operator])


def test_every_relation_is_examined_here() -> None:
    assert set(SMALL) == set(RELATIONS)
    assert all(CASES[id].relation == name for name, ids in SMALL.items() for id in ids)  # type: ignore[union-attr]


@pytest.mark.parametrize("case_id", [id for ids in SMALL.values() for id in ids])
def test_an_honest_kernel_agrees_with_itself(case_id: str) -> None:
    found = verdict(small(case_id), kernel(PROFILE))
    assert found.status == "PASS", found.reason


def nudged(call: Call, outputs: dict[str, np.ndarray], by: int) -> dict[str, np.ndarray]:
    """The results with the last bit of one lse changed, well within its bound."""
    if not by:
        return outputs
    spoilt = {name: array.copy() for name, array in outputs.items()}
    real = np.flatnonzero(np.isfinite(spoilt["lse"]))[:1]
    spoilt["lse"].reshape(-1).view("u4")[real] ^= 1
    return spoilt


@pytest.mark.parametrize("relation", ["rerun", "rerun-equal-shapes", "batch-mates", "query-slices", "page-size"])
def test_one_changed_bit_is_seen(relation: str) -> None:
    class Moody:
        """What depends on the number of the call depends on history."""

        calls = 0

        def run(self, call: Call) -> Outputs:
            self.calls += 1
            return nudged(call, kernel(PROFILE).run(call), self.calls > 1)

    found = verdict(small(SMALL[relation][1]), Moody())
    assert found.status == "FAIL"
    assert "elements differ" in found.reason


@pytest.mark.parametrize(
    ("case_id", "words"),
    [
        (f"{INDEX}-prefill-rerun", "indices of call"),
        (f"{INDEX}-prefill-rerun-equal-shapes", "indices of call"),
        (f"{INDEX}-prefill-batch-mates", "request"),
        (f"{INDEX}-prefill-query-slices", "halves"),
        (f"{INDEX}-decode-page-size", "indices of call"),
    ],
)
def test_a_selection_that_flips_among_ties_is_seen(case_id: str, words: str) -> None:
    """I37: every set is right by itself, but equal scores fall otherwise from call to call."""
    case = small(case_id)
    tied = replace(case, base=replace(case.base, content="plateau"))
    loose = {**PROFILES, "lightning_index": replace(PROFILE, ties="any")}
    calls, outputs = run(tied, planted("I37", "lightning_index", PROFILE))
    with np.errstate(all="ignore"):
        found = judge_calls(tied, calls, outputs, lambda call: loose[call.operator])
    assert found.status == "FAIL"
    assert words in found.reason


# --- what is kept by shape ---

EQUAL_SHAPES = {
    id: case for id, case in CASES.items() if isinstance(case, RelationCase) and case.relation == "rerun-equal-shapes"
}
SAMPLE = [f"{prefix}-{phase}" for prefix in (INDEX, "attend-bf16") for phase in ("prefill", "decode")]


def test_every_rerun_of_a_released_list_has_one_of_equal_shapes() -> None:
    released = {id for id, case in CASES.items() if isinstance(case, RelationCase) and case.relation == "rerun"}
    assert {id.replace("rerun", "rerun-equal-shapes") for id in released} == set(EQUAL_SHAPES)
    assert not released & set(LISTS["deterministic"])
    assert set(EQUAL_SHAPES) < set(LISTS["deterministic"])


@pytest.mark.parametrize("case_id", EQUAL_SHAPES)
def test_the_call_between_has_other_rows_and_lengths(case_id: str) -> None:
    requests = EQUAL_SHAPES[case_id].base.requests
    for lengths in zip(*requests, strict=True):
        assert lengths != lengths[::-1], "reversed, it is the same"
    assert EQUAL_SHAPES[case_id].base.padding_rows


@pytest.mark.parametrize("name", SAMPLE)
def test_the_call_between_has_equal_shapes(name: str) -> None:
    calls = [*drive(EQUAL_SHAPES[f"{name}-rerun-equal-shapes"].steps(), lambda call: None)]
    first, other = calls[0], calls[2]
    assert [call is first for call in calls] == [True, True, *[False, True] * 6]
    assert all(call is other for call in calls if call is not first)
    assert (first.operator, first.options, first.batch_options) == (other.operator, other.options, other.batch_options)
    assert not other.prelude, "it is judged"
    for one, another in ((first.arrays, other.arrays), (first.batch, other.batch)):
        assert {n: (a.dtype, a.shape) for n, a in one.items()} == {n: (a.dtype, a.shape) for n, a in another.items()}
        assert not [n for n, a in one.items() if a.tobytes() == another[n].tobytes()], "all else differs"


class Stale:
    """A kernel that prepares an array of the batch once for each number of rows and requests, as captured graphs do."""

    def __init__(self, name: str) -> None:
        self.name, self.kept = name, dict[tuple[int, int], np.ndarray]()

    def run(self, call: Call) -> Outputs:
        key = (len(call.arrays["q"]), len(call.batch["seqlens_k"]))
        now = call.batch[self.name]
        kept = self.kept.setdefault(key, now)
        # Never beyond memory: a crash would show without any comparison.
        if self.name == "seqlens_k":
            kept = np.minimum(kept, now)
        if self.name == "block_table":
            pages = len(call.arrays["k" if "k" in call.arrays else "kv"])
            kept = np.where((kept >= 0) & (kept < pages), kept, now)
        return kernel(PROFILE).run(replace(call, batch={**call.batch, self.name: kept}))


@pytest.mark.parametrize("array", ["cu_seqlens_q", "seqlens_k", "block_table"])
@pytest.mark.parametrize("name", SAMPLE)
def test_what_is_kept_by_shape_is_caught(name: str, array: str) -> None:
    assert verdict(small(f"{name}-rerun-equal-shapes"), Stale(array)).status == "FAIL"


@pytest.mark.parametrize("case_id", [f"{INDEX}-prefill-rerun", f"{INDEX}-decode-rerun", "attend-bf16-decode-rerun"])
def test_the_released_rerun_does_not_catch_it(case_id: str) -> None:
    """Fewer rows between, or as many in each request: why there is a relation of equal shapes."""
    assert verdict(small(case_id), Stale("cu_seqlens_q")).status == "PASS"


def test_a_declared_tie_rule_is_judged() -> None:
    highest = planted("I71", "lightning_index", PROFILE)
    case = replace(CASES[f"{INDEX}-prefill-ties"], requests=((3, 400),), heads=8, topk=128)
    for profile, status in ((PROFILE, "FAIL"), (replace(PROFILE, ties="any"), "PASS")):
        calls: Sequence[Call] = [case.build()]  # type: ignore[union-attr]
        found = judge_calls(case, calls, [highest.run(calls[0])], lambda call, profile=profile: profile)
        assert found.status == status, found.reason
    assert verdict_of_honest(case).status == "PASS"


def verdict_of_honest(case: object) -> Verdict:
    call = case.build()  # type: ignore[attr-defined]
    return judge_calls(case, [call], [kernel(PROFILE).run(call)], lambda call: PROFILES[call.operator])  # type: ignore[arg-type]


@pytest.mark.parametrize("end", ["prefill", "decode"])
def test_a_pipeline_judges_both_ends(end: str) -> None:
    case = CASES[f"end-to-end-{end}"]
    assert isinstance(case, PipelineCase)
    requests = ((2, 400), (1, 90))
    case = replace(
        case,
        index=replace(case.index, requests=requests, heads=8, topk=128),
        attend=replace(case.attend, requests=requests, heads=8, topk=128),
    )
    assert verdict(case, kernel(PROFILE)).status == "PASS"

    wrong_indices = verdict(case, planted("I30", "lightning_index", PROFILE))
    assert wrong_indices.status == "FAIL"
    assert wrong_indices.reason.startswith("call 0 of 2")
    wrong_keys = verdict(case, kernel(PROFILE, SHIFTED))
    assert wrong_keys.status == "FAIL"
    assert wrong_keys.reason.startswith("call 1 of 2")
