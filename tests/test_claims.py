"""What earns a level and what costs it: hand-made rows of one claim each, then the core list's own features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import pytest

from dsa_portable.backends.cpu import BACKEND as CPU
from dsa_portable.conformance import lists
from dsa_portable.conformance.cases import products
from dsa_portable.conformance.cases.axes import AXES, FORMATS, met
from dsa_portable.conformance.cases.call import drive
from dsa_portable.conformance.cases.catalogue import CASES, LISTS
from dsa_portable.conformance.report import claims
from dsa_portable.conformance.report.schema import (
    NOT_GRANTED_WITH,
    Attempt,
    CaseResult,
    Claim,
    Coverage,
    Evidence,
    ProfileEntry,
    Status,
)
from dsa_portable.contract import ANY, YES, Capabilities, PerPhase
from dsa_portable.operators import FEATURES
from dsa_portable.profile import Profile

INDEX = ("lightning_index", "e4m3/f32/f32", "decode")
ATTEND = ("sparse_attend", "bf16", "prefill")
CORE = lists.FrozenList("core-2026.11", {}, "c" * 64)
DETERMINISTIC = Profile(ties="lowest", deterministic=True)
Key = tuple[str, str, str]
Used = Mapping[str, Any]

# A small list: every required feature in some case, one of each set of alternatives, and one case per optional feature tried.
FLAT_INDEX = {"format": INDEX[1], "heads": 64, "head_dim": 128, "topk": 2048, "flat": True, "ragged": True, "unpacked": True}
PAGED_INDEX = {name: value for name, value in FLAT_INDEX.items() if name != "flat"} | {"page_size": 64}
INDEX_LIST: dict[str, Used] = {
    "flat": FLAT_INDEX,
    "flat, 32 heads": FLAT_INDEX | {"heads": 32},
    "paged 64": PAGED_INDEX,
    "paged 128": PAGED_INDEX | {"page_size": 128, "heads": 32},
    "unsorted": FLAT_INDEX | {"unsorted": True},
    "scores": FLAT_INDEX | {"return_scores": True},
    "topk 512": FLAT_INDEX | {"topk": 512},
    "pages of 16": PAGED_INDEX | {"page_size": 16},
    "packed": {name: value for name, value in PAGED_INDEX.items() if name != "unpacked"} | {"k_layout": "idx_fp8_132_planar"},
    "packed flat": {name: value for name, value in FLAT_INDEX.items() if name != "unpacked"} | {"k_layout": "interleaved"},
}
FLAT_ATTEND = {"format": ATTEND[1], "heads": 128, "dims": "576/512", "topk": 2048, "flat": True, "ragged": True}
PAGED_ATTEND = {name: value for name, value in FLAT_ATTEND.items() if name != "flat"} | {"page_size": 64}
ATTEND_LIST: dict[str, Used] = {
    "flat": FLAT_ATTEND,
    "flat, 64 heads": FLAT_ATTEND | {"heads": 64},
    "flat, 16 heads": FLAT_ATTEND | {"heads": 16},
    "paged 64": PAGED_ATTEND,
    "paged 128": PAGED_ATTEND | {"page_size": 128, "heads": 64},
    "paged 128, 16 heads": PAGED_ATTEND | {"page_size": 128, "heads": 16},
    "lse": FLAT_ATTEND | {"return_lse": True},
    "sink": FLAT_ATTEND | {"attn_sink": True},
}
LIST = {INDEX: INDEX_LIST, ATTEND: ATTEND_LIST}
EVERYTHING: Capabilities = {operator: {feature.name: ANY for feature in FEATURES[operator]} for operator in FEATURES}
REQUIRED = [(key, f.name) for key in LIST for f in FEATURES[key[0]] if f.required and not f.instead]
INSTEAD = [(key, f.name, f.instead) for key in LIST for f in FEATURES[key[0]] if f.instead]
CLAIMS_OF_CORE = [(operator, format, phase) for operator in FORMATS for format in FORMATS[operator] for phase in products.ROWS]
OPTIONAL = [(key, f.name) for key in LIST for f in FEATURES[key[0]] if not f.required and f.name != "format"]


class OfOneOperator:
    """All that `claims.required` asks of a case that is no pipeline."""

    def __init__(self, operator: str, phase: str) -> None:
        self.operator, self.phase = operator, phase


def without(key: Key, *features: str) -> Capabilities:
    """Nothing is declared of them; what is implied is declared away."""
    kept = {name: values for name, values in EVERYTHING[key[0]].items() if name not in features}
    return {key[0]: kept | {f.name: () for f in FEATURES[key[0]] if f.name in features and f.implied}}


def with_values(key: Key, **features: tuple[Any, ...]) -> Capabilities:
    return {key[0]: {**EVERYTHING[key[0]], **features}}


def plain(declared: Capabilities) -> Capabilities:
    """The same without what no claim needs: of a declared option some case must pass, and in these small lists few have one."""
    ((operator, features),) = declared.items()
    kept = {f.name: f.required for f in FEATURES[operator] if f.required}
    needed = {"format", *(["k_layout"] if features.get("unpacked") == () else [])}
    return {
        operator: {
            name: kept[name] if values is ANY and name in kept else values
            for name, values in features.items()
            if name in needed | set(kept) or not values
        }
    }


def row(key: Key, name: str, used: Used, capabilities: Capabilities, **changes: Any) -> CaseResult:
    """PASS where everything in use is declared, else UNSUPPORTED."""
    features = {f.name: f for f in FEATURES[key[0]]}
    offered = all(value in features[name].offered(capabilities, key[0], key[2]) for name, value in used.items())
    status = changes.get("status", Status.PASS if offered else Status.UNSUPPORTED)
    fields: dict[str, Any] = {
        "id": f"{key[0]} {name}",
        "operator": key[0],
        "format": key[1],
        "phase": key[2],
        "claim_required": claims.required(OfOneOperator(key[0], key[2]), used, capabilities),  # type: ignore[arg-type]
        "hazards": [],
        "features": used,
        "why": "A hazard.",
        "status": status,
        "rule": "certificate" if status is Status.FAIL else None,
        "reason": "" if status is Status.PASS else f"because {status}",
        "metrics": {},
        "selective_rows": 4 if key is INDEX else None,
        "vacuous_rows": 1 if key is INDEX else None,
        "seconds": 0.1,
        "inputs_sha256": "a" * 64,
        "outputs_sha256": None,
        "artefact": None,
        "reproducer": "dsa-portable conformance",
        "attempts": [Attempt(status=Status.FAIL, rule="tail", reason="before")] if status is Status.FLAKY else [],
    }
    return CaseResult(**(fields | changes))


def claim(
    key: Key,
    capabilities: Capabilities = EVERYTHING,
    *,
    evidence: Evidence = Evidence.HARDWARE,
    frozen: lists.FrozenList = CORE,
    envelope: str | None = "exact",
    profile: Profile = DETERMINISTIC,
    without_cases: tuple[str, ...] = (),
    **changes: dict[str, Any],
) -> Claim:
    """The one claim of a run; `changes` are fields of rows by case, spaces and commas as underscores."""
    rows = []
    for id, features in LIST[key].items():
        if id not in without_cases:
            rows.append(row(key, id, features, capabilities, **changes.get(id.replace(",", "").replace(" ", "_"), {})))
    entry = ProfileEntry(operator=key[0], format=key[1], phase=key[2], envelope=envelope, profile=asdict(profile))
    (found,) = claims.claims(rows, capabilities, [entry], evidence, frozen, 2)
    return found


# --- granted, and not ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", LIST)
@pytest.mark.parametrize("envelope", ["exact", "exact-p16", "reduced", "bf16-logits"])
def test_everything_holds(key: Key, envelope: str) -> None:
    found = claim(key, envelope=envelope)
    assert (found.level, found.reason, found.envelope) == (f"core-2026.11 {envelope}", "", envelope)
    assert found.counts[Status.PASS] == len(LIST[key])


@pytest.mark.parametrize(("key", "feature"), REQUIRED, ids=str)
def test_a_required_feature_that_is_missing_is_named(key: Key, feature: str) -> None:
    found = claim(key, without(key, feature))
    assert (found.level, found.reason) == (None, f"required feature '{feature}' is not declared")


@pytest.mark.parametrize(("key", "feature", "instead"), INSTEAD, ids=str)
def test_one_feature_may_stand_in_for_another_and_one_of_them_is_needed(key: Key, feature: str, instead: str) -> None:
    found = claim(key, plain(without(key, feature)))
    assert (found.level, found.reason) == ("core-2026.11 exact", "")
    assert found.counts[Status.UNSUPPORTED] > 0
    neither = claim(key, without(key, feature, instead))
    assert neither.level is None
    first = next(f.name for f in FEATURES[key[0]] if f.name in (feature, instead) and f.required)
    other = {feature, instead} - {first}
    assert neither.reason == f"required feature '{first}' (or '{other.pop()}' in its place) is not declared"


def test_one_case_alone_carries_no_claim() -> None:
    narrow = plain(with_values(INDEX, heads=(32,), page_size=(128,), flat=(), k_layout=()))
    found = claim(INDEX, narrow)
    assert found.counts[Status.PASS] == 1
    words = f"only 1 of {len(INDEX_LIST)} cases passed, and a claim takes 2: so little is declared"
    assert (found.level, found.reason) == (None, words)
    newer = replace(CORE, name="core-2026.12")
    assert claim(INDEX, narrow, frozen=newer).reason == words.replace("takes 2", "takes 5")


def test_storage_is_declared_for_the_phase_that_has_it() -> None:
    """As in serving: flat prefill, paged decode."""
    decode, prefill = INDEX, (*INDEX[:2], "prefill")
    declared = plain(with_values(INDEX, flat=PerPhase(prefill=(True,)), page_size=PerPhase(decode=(64, 128))))
    rows = [row(key, id, used, declared) for key in (decode, prefill) for id, used in INDEX_LIST.items()]
    rows = [each.model_copy(update={"selective_rows": 4}) for each in rows]
    profile = asdict(DETERMINISTIC)
    entries = [
        ProfileEntry(operator=key[0], format=key[1], phase=key[2], envelope="exact", profile=profile)
        for key in (decode, prefill)
    ]
    found = claims.claims(rows, declared, entries, Evidence.HARDWARE, CORE, 2)
    assert [each.reason for each in found] == ["", ""]
    passed = {each.phase: [c.features for c in rows if c.phase == each.phase and c.status is Status.PASS] for each in found}
    assert all("page_size" in used for used in passed["decode"])
    assert all("flat" in used for used in passed["prefill"])


@pytest.mark.parametrize(("key", "feature"), OPTIONAL, ids=str)
def test_an_optional_feature_may_be_missing(key: Key, feature: str) -> None:
    found = claim(key, without(key, feature))
    assert (found.level, found.reason) == ("core-2026.11 exact", "")


def test_optional_features_that_are_missing_leave_cases_unsupported() -> None:
    assert claim(INDEX, without(INDEX, "return_scores")).counts[Status.UNSUPPORTED] == 1
    assert claim(ATTEND, without(ATTEND, "attn_sink")).counts[Status.UNSUPPORTED] == 1


@pytest.mark.parametrize(
    ("key", "features"),
    [
        (INDEX, {"heads": (64,)}),
        (INDEX, {"heads": (32,)}),
        (INDEX, {"heads": (32, 8)}),
        (INDEX, {"heads": (32,), "page_size": (128,)}),
        (INDEX, {"topk": (2048,), "page_size": (64,)}),
        (ATTEND, {"heads": (16,)}),
        (ATTEND, {"heads": (16,), "page_size": (128,)}),
        (ATTEND, {"heads": (64,), "page_size": (128,)}),
        (ATTEND, {"heads": (128,), "page_size": (64,)}),
    ],
)
def test_one_of_each_set_is_enough(key: Key, features: dict[str, tuple[Any, ...]]) -> None:
    found = claim(key, plain(with_values(key, **features)))
    assert (found.level, found.reason) == ("core-2026.11 exact", "")
    assert found.counts[Status.UNSUPPORTED] > 0


@pytest.mark.parametrize(
    ("key", "features", "reason"),
    [
        (INDEX, {"heads": (16,)}, "required feature 'heads' is not declared"),
        (INDEX, {"head_dim": (64,)}, "required feature 'head_dim' is not declared"),
        (INDEX, {"topk": (512, 1024)}, "required feature 'topk' is not declared"),
        (INDEX, {"page_size": (16, 256), "flat": ()}, "required feature 'flat' (or 'page_size' in its place) is not declared"),
        (ATTEND, {"heads": (8,)}, "required feature 'heads' is not declared"),
        (ATTEND, {"dims": ("512/512",)}, "no case of required feature 'heads' passed"),
        (ATTEND, {"dims": ("192/128",)}, "required feature 'dims' is not declared"),
        (INDEX, {"heads": (64,), "page_size": (128,)}, "no case of required feature 'page_size' passed"),
    ],
)
def test_other_values_than_the_set_has_are_not(key: Key, features: dict[str, tuple[Any, ...]], reason: str) -> None:
    found = claim(key, with_values(key, **features))
    assert (found.level, found.reason) == (None, reason)


@pytest.mark.parametrize("status", NOT_GRANTED_WITH)
@pytest.mark.parametrize("case", ["flat", "scores"])
def test_one_case_is_enough_to_lose_a_level(status: Status, case: str) -> None:
    """A declared optional case counts as much as a required one."""
    found = claim(INDEX, **{case: {"status": status}})
    assert (found.level, found.reason) == (None, f"1 {status} of {len(INDEX_LIST)} cases")


def test_what_was_lost_is_counted() -> None:
    found = claim(INDEX, flat={"status": Status.FAIL}, scores={"status": Status.FAIL}, unsorted={"status": Status.NOT_RUN})
    assert found.reason == f"2 FAIL, 1 NOT_RUN of {len(INDEX_LIST)} cases"


def test_a_required_case_that_is_not_supported() -> None:
    """As when a profile's finite range ends below what a case needs: no feature is missing, and still nothing is shown."""
    found = claim(INDEX, flat={"status": Status.UNSUPPORTED})
    assert (found.level, found.reason) == (None, "required case lightning_index flat is not supported")
    found = claim(INDEX, scores={"status": Status.UNSUPPORTED})
    assert found.reason == "no case of declared feature 'return_scores' = True passed, as all use what is not declared"


def test_nothing_is_proven_about_selection_without_a_selective_row() -> None:
    none = {id.replace(",", "").replace(" ", "_"): {"selective_rows": 0} for id in INDEX_LIST}
    found = claim(INDEX, **none)
    assert found.reason == "the passed cases have 0 selective rows, and a claim takes 1, or nothing is proven"
    assert found.level is None
    assert claim(INDEX, **(none | {"scores": {"selective_rows": 1}})).level == "core-2026.11 exact"
    assert claim(ATTEND).level == "core-2026.11 exact", "attention selects nothing"


def test_a_selective_row_of_a_case_that_is_not_supported_proves_nothing() -> None:
    none = {id.replace(",", "").replace(" ", "_"): {"selective_rows": 0} for id in INDEX_LIST}
    found = claim(INDEX, without(INDEX, "return_scores"), **(none | {"scores": {"selective_rows": 9}}))
    assert found.level is None


def test_a_feature_that_the_list_has_no_case_of_is_not_asked_for() -> None:
    paged = tuple(id for id in INDEX_LIST if "page" in id)
    assert claim(INDEX, without_cases=paged).level == "core-2026.11 exact"
    found = claim(INDEX, without(INDEX, "page_size", "flat"), without_cases=paged)
    assert found.reason == "required feature 'flat' (or 'page_size' in its place) is not declared", "but one has to be declared"


@pytest.mark.parametrize("evidence", [evidence for evidence in Evidence if evidence is not Evidence.HARDWARE])
def test_a_level_is_for_hardware_alone(evidence: Evidence) -> None:
    found = claim(INDEX, evidence=evidence)
    assert (found.level, found.reason) == (None, f"evidence is {evidence}")


def test_a_profile_outside_the_envelopes() -> None:
    found = claim(INDEX, envelope=None)
    assert (found.level, found.envelope) == (None, None)
    assert found.reason == "the declared profile lies in no envelope (exact, exact-p16, reduced, bf16-logits)"


@pytest.mark.parametrize("level", LISTS)
def test_which_lists_grant(level: str) -> None:
    found = claim(INDEX, frozen=lists.FrozenList(f"{level}-2026.11", {}, "c" * 64))
    if level == "smoke":
        assert (found.level, found.reason) == (None, "the list smoke-2026.11 grants no level")
    else:
        assert found.level == f"{level}-2026.11 exact"


@pytest.mark.parametrize("profile", [Profile(), Profile(ties="lowest"), Profile(deterministic=True)])
def test_the_deterministic_level_is_for_profiles_that_promise_it(profile: Profile) -> None:
    frozen = lists.FrozenList("deterministic-2026.11", {}, "c" * 64)
    found = claim(INDEX, frozen=frozen, profile=profile)
    assert (found.level, found.reason) == (None, "the declared profile is not deterministic with ties to the lowest")
    assert claim(INDEX, profile=profile).level == "core-2026.11 exact"


def test_a_claim_stands_or_falls_by_its_own_cases() -> None:
    rows = [row(key, id, used, EVERYTHING) for key in LIST for id, used in LIST[key].items()]
    rows[0] = row(INDEX, "flat", INDEX_LIST["flat"], EVERYTHING, status=Status.FAIL)
    profiles = [ProfileEntry(operator=k[0], format=k[1], phase=k[2], envelope="exact", profile={}) for k in (INDEX, ATTEND)]
    index, attend = claims.claims(rows, EVERYTHING, profiles, Evidence.HARDWARE, CORE, 2)
    assert (index.key, index.level) == (INDEX, None)
    assert (attend.key, attend.level) == (ATTEND, "core-2026.11 exact")
    assert sum(index.counts.values()) == len(INDEX_LIST)


@pytest.mark.parametrize("status", [Status.NOT_RUN, Status.FAIL, Status.ERROR])
def test_the_list_s_level_needs_the_whole_list(status: Status) -> None:
    """A case of no claim (its format is not declared) costs no claim, but was not run, or failed where it should be refused."""
    mine = [row(INDEX, id, used, EVERYTHING) for id, used in INDEX_LIST.items()]
    other = row(ATTEND, "flat", FLAT_ATTEND, EVERYTHING, status=status)
    earned = [claim(INDEX)]
    assert earned[0].level == "core-2026.11 exact"
    assert claims.level(earned, mine, CORE) == "core-2026.11 exact"
    assert claims.level(earned, [*mine, other], CORE) is None
    assert claims.level([], mine, CORE) is None


def test_the_list_s_level_names_every_envelope() -> None:
    earned = [claim(INDEX, envelope="reduced"), claim(ATTEND)]
    assert claims.level(earned, [row(INDEX, "flat", FLAT_INDEX, EVERYTHING)], CORE) == "core-2026.11 exact/reduced"


@pytest.mark.parametrize(
    ("key", "used", "features", "required"),
    [
        (INDEX, FLAT_INDEX, {}, True),
        (INDEX, FLAT_INDEX, {"heads": (32,)}, False),
        (INDEX, FLAT_INDEX, {"heads": (16,)}, True),
        (INDEX, FLAT_INDEX, {"flat": ()}, False),
        (INDEX, FLAT_INDEX, {"flat": (), "page_size": ()}, True),
        (INDEX, FLAT_INDEX, {"unpacked": ()}, False),
        (INDEX, FLAT_INDEX, {"flat": PerPhase(prefill=(True,))}, False),
        (INDEX, FLAT_INDEX | {"unsorted": True}, {}, False),
        (INDEX, FLAT_INDEX | {"return_scores": True}, {}, False),
        (INDEX, FLAT_INDEX | {"heads": 16}, {}, False),
        (INDEX, FLAT_INDEX | {"topk": 512}, {}, False),
        (INDEX, PAGED_INDEX | {"page_size": 128}, {"page_size": (64,)}, False),
        (INDEX, PAGED_INDEX | {"page_size": 256}, {}, False),
        (INDEX, FLAT_INDEX | {"format": "int8/f16/f16"}, {"format": ()}, True),
        (ATTEND, FLAT_ATTEND | {"dims": "512/512"}, {}, True),
        (ATTEND, FLAT_ATTEND | {"dims": "512/512"}, {"dims": ("576/512",)}, False),
        (ATTEND, FLAT_ATTEND | {"out": True}, {}, False),
    ],
)
def test_which_cases_are_required(key: Key, used: Used, features: dict[str, tuple[Any, ...]], required: bool) -> None:
    assert claims.required(OfOneOperator(key[0], key[2]), used, with_values(key, **features)) is required  # type: ignore[arg-type]


# --- the core list ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def core() -> dict[str, Used]:
    """The features of the core cases made by hand, of one index format and one of attention, end to end among them."""
    found = {}
    for id in LISTS["core"]:
        case = CASES[id]
        if case.format in (INDEX[1], ATTEND[1]) and not getattr(case, "point", ()):
            calls = drive(case.steps(), lambda call: None)
            found[id] = claims.features_of(case, next(call for call in calls if call.operator == case.operator))
    return found


@pytest.mark.parametrize(
    ("operators", "features"),
    [
        (("lightning_index", "sparse_attend"), {}),
        (("lightning_index",), {"heads": (32,), "page_size": (128,), "topk": (2048,)}),
        (("lightning_index",), {"heads": (64,), "page_size": (64,), "topk": (2048,)}),
        (("sparse_attend",), {}),
        (("sparse_attend",), {"heads": (16,), "topk": (2048,)}),
        (("sparse_attend",), {"heads": (64,), "page_size": (128,)}),
        (("sparse_attend",), {"heads": (128,), "page_size": (64,)}),
    ],
)
def test_the_core_list_can_grant(core: dict[str, Used], operators: tuple[str, ...], features: dict[str, Any]) -> None:
    """A backend of one operator, one head count, one page size, without any optional feature: it can have its claims."""
    needed = {o: {f.name: f.required for f in FEATURES[o] if f.required} | {"format": ANY} for o in operators}
    capabilities: Capabilities = {o: needed[o] | {n: v for n, v in features.items() if n in needed[o]} for o in operators}
    rows = []
    for id, used in core.items():
        case = CASES[id]
        key = (case.operator, case.format, case.phase)
        calls = drive(case.steps(), lambda call: None) if id.startswith("end-to-end") else []
        declared = all(value in capabilities.get(key[0], {}).get(name, ()) for name, value in used.items())
        status = Status.PASS if declared and claims.undeclared(case, calls, capabilities) is None else Status.UNSUPPORTED
        changes = {"id": id, "status": status, "claim_required": claims.required(case, used, capabilities)}
        changes["selective_rows"] = 1 if case.operator == "lightning_index" else None
        rows.append(row(key, id, used, capabilities, **changes))
    keys = dict.fromkeys((r.operator, r.format, r.phase) for r in rows if r.operator in operators)
    profiles = [ProfileEntry(operator=k[0], format=k[1], phase=k[2], envelope="exact", profile={}) for k in keys]
    for found in claims.claims(rows, capabilities, profiles, Evidence.HARDWARE, CORE, 2):
        assert (found.key, found.reason) == (found.key, "")


def test_the_first_feature_that_is_not_declared_is_named() -> None:
    case = CASES["index-e4m3-f32-f32-decode-out"]
    calls = drive(case.steps(), lambda call: None)
    full = CPU.capabilities(None)["lightning_index"]
    assert claims.undeclared(case, calls, CPU.capabilities(None)) is None
    feature, value = claims.undeclared(case, calls, {"lightning_index": {**full, "heads": (32,), "out": ()}}) or (None, None)
    assert (feature and feature.name, value) == ("heads", 64)
    feature, value = claims.undeclared(case, calls, {"lightning_index": {**full, "out": ()}}) or (None, None)
    assert (feature and feature.name, value) == ("out", True)
    feature, value = claims.undeclared(case, calls, {}) or (None, None)
    assert (feature and feature.name, value) == ("format", "e4m3/f32/f32")


def test_what_lies_in_the_data_is_a_feature_too() -> None:
    case = CASES["attend-bf16-prefill-repeated"]
    calls = drive(case.steps(), lambda call: None)
    assert claims.features_of(case, calls[0])["repeated_indices"] is YES[0]
    full = {name: values for name, values in CPU.capabilities(None)["sparse_attend"].items() if name != "repeated_indices"}
    feature, _ = claims.undeclared(case, calls, {"sparse_attend": full}) or (None, None)
    assert feature is not None
    assert (feature.name, feature.in_call) == ("repeated_indices", False)


# --- what was tried ----------------------------------------------------------------------------------------------------------

USUAL = {axis.name: axis.usual("decode") for axis in AXES[INDEX[0]]}
POINTS: dict[str, tuple[dict[str, str], Used]] = {
    "usual": (USUAL, PAGED_INDEX),
    "sliced": (USUAL | {"strides": "sliced"}, PAGED_INDEX),
    "out": (USUAL | {"out": "given"}, PAGED_INDEX | {"out": True}),
    "topk": (USUAL | {"topk": "512"}, PAGED_INDEX | {"topk": 512}),
    "both": (USUAL | {"out": "given", "topk": "512"}, PAGED_INDEX | {"out": True, "topk": 512}),
    "32 heads": (USUAL | {"heads": "32", "poison": "inf"}, PAGED_INDEX | {"heads": 32}),
}


def covered(capabilities: Capabilities = EVERYTHING, **status: Status) -> Coverage:
    """Of a list of these points; `status` of some of them."""
    rows = [
        row(INDEX, name, used, capabilities, point=point, **({"status": status[name]} if name in status else {}))
        for name, (point, used) in POINTS.items()
    ]
    entry = ProfileEntry(operator=INDEX[0], format=INDEX[1], phase=INDEX[2], envelope="exact", profile=asdict(DETERMINISTIC))
    return claims.coverage(rows, capabilities, entry)


def test_everything_declared_is_tried() -> None:
    found = covered()
    assert found.missing == []
    assert (found.values, found.pairs) == (found.values_tried, found.pairs_tried)
    axes = len(USUAL)
    # Alone: the usual value of each axis, sliced, infinity and 32 heads; out and topk. Pairs: see axes.met.
    assert found.values == axes + 3 + 2
    assert found.pairs == axes * (axes - 1) // 2 + (axes - 1) + (axes - 1) + (axes - 1) + 1 + (2 * (axes - 2) + 1)


def test_what_was_not_run_is_named() -> None:
    found = covered(both=Status.NOT_RUN)
    assert found.missing == ["out given with topk 512"]
    assert found.pairs_tried == found.pairs - 1
    assert "sliced" in " ".join(covered(sliced=Status.ERROR).missing)


def test_an_undeclared_value_takes_no_pair_of_others_with_it() -> None:
    found = covered(with_values(INDEX, topk=(2048,)))
    assert found.missing == []
    assert covered().pairs - found.pairs == len(USUAL)  # topk 512 with each other axis as usual, and with out


def test_another_geometry_is_named() -> None:
    found = covered(with_values(INDEX, heads=(32,)))
    assert "strides sliced" in found.missing
    assert found.values_tried < found.values


def test_open_declarations_are_sampled_and_what_no_case_has_is_named() -> None:
    found = covered(with_values(INDEX, topk=(2048, 512, 3000), heads=range(1, 129)))
    assert found.untested == {"topk": [3000]}
    assert found.sampled["heads"] == [64, 32]
    assert "topk" not in found.sampled
    assert covered().sampled["topk"] == [2048, 512]


def test_a_declared_value_whose_cases_all_need_something_else_earns_nothing() -> None:
    changes = {"pages_of_16": {"features": INDEX_LIST["pages of 16"] | {"unsorted": True}}}
    offered = with_values(INDEX, unsorted=())
    found = claim(
        INDEX,
        offered,
        pages_of_16=changes["pages_of_16"] | {"status": Status.UNSUPPORTED},
        unsorted={"status": Status.UNSUPPORTED},
    )
    assert found.level is None
    assert found.reason == "no case of declared feature 'page_size' = 16 passed, as all use what is not declared"


@pytest.mark.parametrize("key", CLAIMS_OF_CORE, ids=" ".join)
def test_in_core_every_feature_has_a_case_that_needs_nothing_else(key: Key) -> None:
    """A declared feature without an executed case in that phase is never silent: in core there is none without one."""
    operator = key[0]
    points = [dict(case.point) for case in products.CORE if (case.operator, case.format, case.phase) == key]
    tried = {axis for point in points for goal in met(operator, point, 1) for axis, _ in goal}
    assert tried == {axis.name for axis in AXES[operator]}
