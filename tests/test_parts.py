"""Kernels that score alone or select alone: judged by the rules of the whole, with claims of their own and no level."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dsa_portable
from dsa_portable import Batch, InvalidArgument, Unsupported
from dsa_portable.conformance import lists
from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.cases.catalogue import CASES, LISTS
from dsa_portable.conformance.cases.index_scores import ScoresCase
from dsa_portable.conformance.cases.index_select import SelectCase
from dsa_portable.conformance.judging import oracle
from dsa_portable.conformance.judging.judge import Reference, judge_call, reference_of
from dsa_portable.conformance.judging.rules import Verdict
from dsa_portable.conformance.report import claims
from dsa_portable.conformance.report.schema import Claim, Status, tally
from dsa_portable.conformance.selftest import parts
from dsa_portable.conformance.selftest.plant import Fault, Kernel, executed
from dsa_portable.operators import REQUESTS
from dsa_portable.profile import Accumulator, Profile
from tests import plugins
from tests.test_cases import SHOWS, features_of_table

PARTS = [case for id in LISTS["parts"] if isinstance(case := CASES[id], (ScoresCase, SelectCase))]
EXACT = Profile(ties="lowest")
REDUCED = Profile(accumulator=Accumulator(14, "RZ", 32), ties="lowest")
BF16 = Profile(logit="bfloat16", ties="lowest")
HEADLINE = "index-scores-e4m3-f32-f32"


@cache
def built(id: str) -> Call:
    case = CASES[id]
    assert isinstance(case, (ScoresCase, SelectCase))
    return case.build()


@cache
def reference(id: str, profile: Profile) -> Reference:
    with np.errstate(invalid="ignore"):
        return reference_of(CASES[id], built(id), profile)


def verdict(id: str, fault: Fault | None = None, profile: Profile = EXACT) -> Verdict:
    """On the honest kernel of this case's part, or it with a fault."""
    kernel = Kernel(executed(Path(parts.__file__), fault, {}), profile)
    call = built(id)
    with np.errstate(invalid="ignore"):
        return judge_call(CASES[id], call, kernel.run(call), reference(id, profile))


# --- honest kernels ---


@pytest.mark.parametrize("case", PARTS, ids=lambda case: case.id)
def test_an_honest_kernel_passes(case: ScoresCase | SelectCase) -> None:
    found = verdict(case.id)
    assert (found.status, found.reason) == ("PASS", "")
    assert (found.selective_rows is None) == isinstance(case, ScoresCase)


@pytest.mark.parametrize("profile", [REDUCED, BF16], ids=["reduced", "bf16-logits"])
@pytest.mark.parametrize(
    "id", [f"{HEADLINE}-decode-flat", f"{HEADLINE}-prefill-cancel", "index-select-prefill-ragged", "index-select-prefill-zeros"]
)
def test_a_wider_profile_is_judged_by_itself(id: str, profile: Profile) -> None:
    assert verdict(id, profile=profile).status == "PASS"


def test_scores_of_a_wider_profile_are_no_exact_ones() -> None:
    narrow = Kernel(executed(Path(parts.__file__), None, {}), BF16)
    for id in (f"{HEADLINE}-decode-flat", "index-select-prefill-ragged"):
        call = built(id)
        assert judge_call(CASES[id], call, narrow.run(call), EXACT).rule in ("score", "certificate")


# --- faults: title, old text, new text, the case that kills it and the rule that it breaks there ---

SCORES_FAULTS = [
    ("one key more", "length - (last - first) + (row - first) + 1)", "min(length, length - (last - first) + (row - first) + 2))", "decode-flat", "tail"),
    ("one key fewer", "(row - first) + 1)", "(row - first))", "decode-flat", "score"),
    ("top-left causality", "length - (last - first) + (row - first) + 1", "min(length, row - first + 1)", "decode-paged64", "score"),
    ("ranges ignored", 'if "key_start" in batch:', "if False:", "prefill-range", "tail"),
    ("garbage where it does not see", "-np.inf, np.float32)", "0, np.float32)", "prefill-ragged", "tail"),
    ("the lowest finite number for -inf", "-np.inf, np.float32)", "np.finfo(np.float32).min, np.float32)", "prefill-ragged", "tail"),
    ("padding rows left", 'return {"scores": scores}', 'scores[batch["cu_seqlens_q"][-1] :] = np.nan\n    return {"scores": scores}',
     "decode-lengths", "tail"),
    ("packed to the left", "scores[row, start:end] = found", "scores[row, : end - start] = found", "prefill-range", "tail"),
    ("scale dropped", "total * rounded(scale, profile.scale_compute)", "total", "decode-flat", "score"),
    ("the neighbour's scale", "k_scale[slots]", "k_scale[np.roll(slots, 1)]", "prefill-lattice", "score"),
    ("scale cut to a power of two", "rounded(scale, profile.scale_compute)", "np.ldexp(np.float32(0.5), np.frexp(scale)[1])",
     "prefill-ragged", "score"),
    ("relu missing", "np.maximum(dots, 0)", "dots", "decode-flat", "score"),
    ("relu of the sum", "w[heads] @ np.maximum(dots, 0)", "np.maximum(w[heads] @ dots, 0)", "decode-flat", "score"),
    ("a head lost", "w[heads] @", "(w[heads] * (heads > 0)) @", "decode-flat", "score"),
    ("weights in bfloat16", "total = w[heads]", 'total = rounded(w[heads], "bfloat16")', "prefill-cancel", "score"),
    ("scores in bfloat16", "profile.logit)\n        scores[row", '"bfloat16")\n        scores[row', "prefill-ragged", "score"),
    ("block table not followed", 'batch["block_table"][request, positions // page_size]', "(positions // page_size)",
     "decode-paged128", "score"),
    ("requests lie end to end", 'int(batch["cu_seqlens_k"][request])', 'int(batch["seqlens_k"][:request].sum())', "prefill-ragged", "score"),
]  # fmt: skip
SELECT_FAULTS = [
    ("the smallest", "np.argsort(-ranked", "np.argsort(ranked", "prefill-ragged", "certificate"),
    ("one key more", "length - (last - first) + (row - first) + 1)", "min(length, length - (last - first) + (row - first) + 2))", "prefill-ragged", "visible"),
    ("one key fewer", "(row - first) + 1)", "(row - first))", "prefill-ragged", "visible"),
    ("one key fewer, where enough are left", "(row - first) + 1)", "(row - first))", "prefill-visible-nan", "certificate"),
    ("ranges ignored", 'if "key_start" in batch:', "if False:", "prefill-key-ranges", "tail"),
    ("positions from the range's start", "chosen + start", "chosen", "prefill-key-ranges", "visible"),
    ("reads what the row does not see", "rounded(scores[row, start:end]", "rounded(scores[row]", "prefill-ragged", "visible"),
    ("NaN of what is not seen counts", "found = rounded(scores[row, start:end], profile.logit)",
     "found = rounded(scores[row, start:end] + 0 * scores[row, -1], profile.logit)", "decode-paged", "certificate"),
    ("ties lost", "best = np.argsort(-ranked, kind=\"stable\")[:topk]",
     "best = np.argsort(-ranked, kind=\"stable\")[:topk]\n        best = best[ranked[best] > ranked[best].min(initial=np.inf)] if end > topk else best",
     "prefill-ties", "visible"),
    ("ties to the highest", "best = np.argsort(-ranked, kind=\"stable\")", "best = len(ranked) - 1 - np.argsort(-ranked[::-1], kind=\"stable\")",
     "prefill-ties", "ties"),
    ("-0.0 below +0.0", "np.argsort(-ranked, kind=\"stable\")", "np.lexsort((np.signbit(ranked), -ranked))", "prefill-zeros", "ties"),
    ("candidates truncated", "best = np.argsort(-ranked", "best = np.argsort(-ranked[:16384]", "decode-long", "certificate"),
    ("a bucket's buffer overflows", "best = np.argsort(-ranked", "ranked[np.flatnonzero(ranked > 1.002)[:-4096]] = 0\n        best = np.argsort(-ranked",
     "decode-long", "certificate"),
    ("compared in bfloat16", "ranked = np.nan_to_num(found", 'ranked = np.nan_to_num(rounded(found, "bfloat16")', "prefill-ragged", "certificate"),
    ("compared in float16", "ranked = np.nan_to_num(found", 'ranked = np.nan_to_num(rounded(found, "float16")', "prefill-bits", "certificate"),
    ("compared by bits, negative numbers too", "np.argsort(-ranked", "np.argsort(-ranked.view(np.int32).astype(np.int64)", "prefill-bits", "certificate"),
    ("0 behind the entries", "topk), -1", "topk), 0", "decode-lengths", "tail"),
    ("a row written whole, of stale entries", "indices[row, : len(chosen)] = chosen + start", "indices[row] = np.resize(chosen + start, topk)" , "decode-lengths", "tail"),
    ("by rank, not by position", "np.sort(best)", "best", "prefill-ragged", "order"),
    ("an entry twice", "chosen = np.sort(best)", "chosen = np.sort(best)\n        chosen[1:2] = chosen[:1]", "prefill-unsorted", "unique"),
]  # fmt: skip


@pytest.mark.parametrize(("title", "old", "new", "case", "rule"), SCORES_FAULTS, ids=[fault[0] for fault in SCORES_FAULTS])
def test_a_fault_of_scores_is_killed(title: str, old: str, new: str, case: str, rule: str) -> None:
    found = verdict(f"{HEADLINE}-{case}", Fault("", title, old, new))
    assert (found.status, found.rule) == ("FAIL", rule), found.reason


@pytest.mark.parametrize(("title", "old", "new", "case", "rule"), SELECT_FAULTS, ids=[fault[0] for fault in SELECT_FAULTS])
def test_a_fault_of_a_selection_is_killed(title: str, old: str, new: str, case: str, rule: str) -> None:
    found = verdict(f"index-select-{case}", Fault("", title, old, new))
    assert (found.status, found.rule) == ("FAIL", rule), found.reason


# --- the inputs are what they are said to be ---


def best_is_last(call: Call) -> bool:
    """The last key that a row sees is its best, so that one too few shows; the one after it is NaN or infinite."""
    seen = [call.arrays["scores"][row, start:end] for row, _, start, end in oracle.rows(call) if start < end]
    return all(scores[-1] == scores.max() for scores in seen)


# What shows in scores that are drawn, or in all that a row sees, and otherwise than in a selection.
SELECT_SHOWS: dict[str, Any] = {
    "causal-offset": lambda case, call: best_is_last(call),
    "poison": lambda case, call: bool(np.isnan(call.arrays["scores"]).any()),
    "range": lambda case, call: len(np.unique(call.arrays["scores"].view(np.uint32) >> 23)) > 500,
}
SCORES_SHOWS: dict[str, Any] = {"causal-offset": lambda case, call: len({end for _, _, _, end in oracle.rows(call)}) > 2}


@pytest.mark.parametrize("case", PARTS, ids=lambda case: case.id)
def test_hazards_and_features_are_in_the_arrays(case: ScoresCase | SelectCase) -> None:
    call = built(case.id)
    assert call.sha256() == lists.load("parts").cases[case.id]
    assert (call.operator, call.format, call.phase) == (case.operator, case.format, case.phase)
    assert claims.features_of(case, call) == features_of_table(case)
    shows = {**SHOWS, **(SELECT_SHOWS if isinstance(case, SelectCase) else SCORES_SHOWS)}
    for hazard in case.hazards:
        assert shows[hazard](case, call), f"{case.id} names {hazard}, but does not have it"


@pytest.mark.parametrize("case", [c for c in PARTS if isinstance(c, SelectCase)], ids=lambda case: case.id)
def test_what_a_row_does_not_see_is_nan_and_infinite(case: SelectCase) -> None:
    call = built(case.id)
    scores, unseen = call.arrays["scores"], np.ones(call.arrays["scores"].shape, bool)
    for row, _, start, end in oracle.rows(call):
        unseen[row, start:end] = False
        finite = np.isfinite(scores[row, start:end])
        assert finite.all() or (case.visible_nan and row < 2 and (~finite).sum() == 1)
    assert not np.isfinite(scores[unseen]).any()
    if unseen.sum() > 1:
        assert np.isnan(scores[unseen]).any()
        assert (scores[unseen] == np.inf).any()
    assert any(end - start > case.topk for _, _, start, end in oracle.rows(call))


# --- claims ---

# One head count and one page size, without any optional feature: enough for every claim.
VENDORS = {
    "index_scores": {"heads": (32,), "head_dim": (128,), "flat": (True,), "page_size": (64,), "ragged": (True,)},
    "index_select": {"topk": (2048,), "ragged": (True,)},
}


@pytest.mark.parametrize(("operator", "granted"), [("index_scores", 6), ("index_select", 2)])
def test_a_backend_of_one_part_has_its_claims_and_no_level(tmp_path: Path, operator: str, granted: int) -> None:
    source = f"OFFERED = {VENDORS[operator]} | {{'format': CPU.capabilities(None)['{operator}']['format']}}"
    changes = f"operators={{{operator!r}: CPU.operators[{operator!r}]}}, capabilities=lambda device: {{{operator!r}: OFFERED}}"
    plugins.module(tmp_path, "vendor", changes, source)
    _, report = plugins.conformance(tmp_path, "out", list="parts", twice=True, DSA_BACKEND="vendor")
    name = lists.load("parts").name
    assert [(c.operator, c.level, c.reason) for c in report.claims] == [(operator, f"{name} exact", "")] * granted
    assert (report.level, report.exit_code) == (None, 0)
    assert {row.status for row in report.cases if row.operator != operator} == {Status.UNSUPPORTED}


def granted(operator: str) -> Claim:
    counts = tally([]) | {Status.PASS: 1}
    return Claim(operator=operator, format="f32", phase="decode", envelope="exact", level="granted", reason="", counts=counts)


@pytest.mark.parametrize(
    ("operators", "level"),
    [
        (["index_scores"], None),
        (["index_scores", "index_select"], None),
        (["index_scores", "lightning_index"], "parts-2026.12 exact"),
        (["sparse_attend"], "parts-2026.12 exact"),
    ],
)
def test_parts_alone_never_earn_a_level(operators: list[str], level: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "exit_code_of", lambda rows: 0)
    assert claims.level([granted(operator) for operator in operators], [], lists.load("parts-2026.12")) == level


def test_which_operators_are_parts() -> None:
    assert {name: request.part_of for name, request in REQUESTS.items() if request.part_of} == {
        "index_scores": "lightning_index",
        "index_select": "lightning_index",
    }


# --- calls ---

RNG = np.random.default_rng(5)
Q, K, W = (RNG.standard_normal(shape).astype(np.float32) for shape in ((5, 3, 8), (9, 8), (5, 3)))


@pytest.mark.parametrize("topk", [1, 4, 9, 20])
@pytest.mark.parametrize("batch", [None, Batch.of([2, 2], [4, 5]), Batch.of([2, 3], [4, 5], causal=False)])
def test_the_parts_make_the_whole(topk: int, batch: Batch | None) -> None:
    call: dict[str, Any] = {"batch": batch, "backend": "cpu"}
    scores = dsa_portable.index_scores(Q, K, W, **call)
    assert scores.shape == (5, 9 if batch is None else 5)
    whole, returned = dsa_portable.lightning_index(Q, K, W, topk=topk, return_scores=True, **call)
    assert np.array_equal(dsa_portable.index_select(scores, topk=topk, **call), whole)
    taken = np.take_along_axis(np.pad(scores, ((0, 0), (0, 1)), constant_values=-np.inf), whole.astype(np.int64), axis=1)
    assert np.array_equal(taken, returned)


def test_results_are_written_where_they_are_asked_for() -> None:
    scores, indices = np.full((5, 9), np.nan, np.float32), np.full((5, 3), 7, np.int32)
    assert dsa_portable.index_scores(Q, K, W, out=scores, backend="cpu") is scores
    assert dsa_portable.index_select(scores, topk=3, out=indices, backend="cpu") is indices
    assert np.array_equal(indices, dsa_portable.lightning_index(Q, K, W, topk=3, backend="cpu"))


def test_a_view_of_a_wider_buffer_is_taken() -> None:
    wide = np.full((5, 32), np.nan, np.float32)
    dsa_portable.index_scores(Q, K, W, out=wide[:, :9], backend="cpu")
    assert np.array_equal(
        dsa_portable.index_select(wide[:, :9], topk=3, backend="cpu"),
        dsa_portable.lightning_index(Q, K, W, topk=3, backend="cpu"),
    )


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: dsa_portable.index_select(Q[:, 0], topk=2, batch=Batch.of([5], [9])),
            "batch.max_seqlen_k is 9, but scores has 8",
        ),
        (lambda: dsa_portable.index_select(Q[:, 0].astype(np.float16), topk=2), "scores is float16 .* but float32 is accepted"),
        (lambda: dsa_portable.index_select(Q, topk=2), r"but the shape \[Tq, S\] is accepted"),
        (lambda: dsa_portable.index_select(Q[:, 0], topk=0), "index_select: topk is 0"),
        (lambda: dsa_portable.index_scores(Q, K, W, k_scale=W[:, 0]), "index_scores: k_scale"),
        (lambda: dsa_portable.index_scores(Q, K, W, k_layout="v32_fp8_656_nsr"), "pass one of lightning_index's own"),
        (lambda: dsa_portable.index_scores(Q, K, W, out=np.empty((5, 8), np.float32)), r"out for scores .* \[5, 9\] on cpu"),
    ],
)
def test_what_is_refused(call: Any, sentence: str) -> None:
    with pytest.raises(InvalidArgument, match=sentence):
        call()


def test_a_backend_need_not_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unsupported, match="does not offer format = 'f32'"):
        dsa_portable.contract.require(
            REQUESTS["index_select"].checked(scores=Q[:, 0], topk=2), {"lightning_index": {}}, "another"
        )
