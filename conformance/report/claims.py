"""What a run has earned: a claim is operator x operand format x phase, and a level is granted per claim or not at all."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from dsa_portable.conformance import lists
from dsa_portable.conformance.cases.axes import AXES, met
from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.cases.catalogue import Case
from dsa_portable.conformance.cases.relation import PipelineCase, RelationCase
from dsa_portable.conformance.report.schema import (
    NOT_GRANTED_WITH,
    CaseResult,
    Claim,
    Coverage,
    Evidence,
    ProfileEntry,
    Status,
    exit_code_of,
    tally,
)
from dsa_portable.contract import ANY, Capabilities, Feature
from dsa_portable.operators import FEATURES, REQUESTS
from dsa_portable.profile import ENVELOPE_NAMES

# Operators that select: a row that sees no more keys than topk proves nothing about them.
SELECTING = ("lightning_index", "index_select")
# How often what passes is asked before it earns anything.
PASSES = 2
# A narrow declaration leaves few cases of a list, and few carry no claim: so many must pass, with so many selective rows.
# The first core and full had too few cases of one geometry to ask for more.
FEWEST, FEWEST_ELSEWHERE = {"core": (5, 8), "full": (5, 8)}, (2, 1)
FIRST = ("core-2026.11", "full-2026.11")


def features_of(case: Case, call: Call) -> dict[str, Any]:
    """Feature -> value, for what one call of the case uses."""
    request = call.request
    used = {f.name: f.value(request) for f in FEATURES[call.operator]}
    if call.operator == "sparse_attend" and getattr(case, "repeated", False):
        used["repeated_indices"] = True
    return {name: value for name, value in used.items() if value is not None}


def undeclared(case: Case, calls: Sequence[Call], capabilities: Capabilities) -> tuple[Feature, Any] | None:
    """The first feature that a call uses and the backend does not declare, with the value asked for."""
    for call in calls:
        used = features_of(case, call)
        for feature in FEATURES[call.operator]:
            if feature.name in used and used[feature.name] not in feature.offered(capabilities, call.operator, call.phase):
                return feature, used[feature.name]
    return None


def required(case: Case, used: Mapping[str, Any], capabilities: Capabilities) -> bool:
    """True where the claim falls without the case: it uses only required features, and of alternatives one that is declared."""
    if isinstance(case, PipelineCase) or (isinstance(case, RelationCase) and case.relation == "page-size"):
        return False  # It needs both operators, or several page sizes; a claim is about one operator, and one size is enough.
    for feature in FEATURES[case.operator]:
        if feature.name == "format" or feature.name not in used:
            continue
        if used[feature.name] not in feature.required:
            return False
        offered = used[feature.name] in feature.offered(capabilities, case.operator, case.phase)
        if not offered and (_offers(feature, case, capabilities) or _stands_in(feature, case, capabilities)):
            return False
    return True


def _offers(feature: Feature, of: Case | ProfileEntry, capabilities: Capabilities) -> bool:
    """Some value that a claim can do with."""
    offered = feature.offered(capabilities, of.operator, of.phase)
    if not feature.required:
        return bool(offered)
    return any(value in offered for value in feature.required)


def _stands_in(feature: Feature, of: Case | ProfileEntry, capabilities: Capabilities) -> bool:
    """Another feature that a claim may have in this one's place."""
    other = next((f for f in FEATURES[of.operator] if f.name == feature.instead), None)
    return other is not None and _offers(other, of, capabilities)


def claims(
    rows: Sequence[CaseResult],
    capabilities: Capabilities,
    profiles: Iterable[ProfileEntry],
    evidence: Evidence,
    frozen: lists.FrozenList,
    passes: int,
) -> list[Claim]:
    """One claim for each declared format and phase that the list has cases of; `passes`: how often what passed was asked."""
    result = []
    for profile in profiles:
        key = (profile.operator, profile.format, profile.phase)
        mine = [row for row in rows if (row.operator, row.format, row.phase) == key]
        tried = coverage(mine, capabilities, profile)
        reason = _obstacle(mine, capabilities, profile, evidence, frozen)
        if not reason and passes < PASSES:
            reason = "what passed was not asked a second time"
        level = None if reason else f"{frozen.name} {profile.envelope}"
        result.append(
            Claim(
                operator=key[0],
                format=key[1],
                phase=key[2],
                envelope=profile.envelope,
                level=level,
                reason=reason,
                counts=tally(mine),
                coverage=tried,
            )
        )
    return result


def level(earned: Sequence[Claim], rows: Sequence[CaseResult], frozen: lists.FrozenList) -> str | None:
    """The list's level: every claim is granted, one of a whole operator among them, and all of the list ran without failure.

    A selection of the list earns claims at most, and so do kernels that are a part of an operator.
    """
    whole = any(not REQUESTS[claim.operator].part_of for claim in earned)
    if not whole or not all(claim.level for claim in earned) or exit_code_of(rows):
        return None
    return f"{frozen.name} {'/'.join(sorted({claim.envelope or '' for claim in earned}))}"


def _values(feature: Feature, rows: Iterable[CaseResult]) -> list[Any]:
    """The values of a feature that the rows use."""
    return list(dict.fromkeys(row.features[feature.name] for row in rows if feature.name in row.features))


def coverage(rows: Sequence[CaseResult], capabilities: Capabilities, profile: ProfileEntry) -> Coverage:
    """What the cases of a claim tried of what is declared."""
    features = {feature.name: feature for feature in FEATURES[profile.operator]}
    offered = {name: f.offered(capabilities, profile.operator, profile.phase) for name, f in features.items()}
    known = AXES.get(profile.operator, ())
    # What a value of an axis asks of the backend: read off a case that has it.
    asked = {
        (axis.name, row.point[axis.name]): {name: row.features[name] for name in axis.features if name in row.features}
        for row in rows
        if row.point
        for axis in known
    }
    wanted, tried = (dict[int, set[frozenset[tuple[str, str]]]]() for _ in range(2))
    for strength in (1, 2):
        wanted[strength], tried[strength] = set(), set()
        for row in filter(lambda row: row.point, rows):
            goals = met(profile.operator, row.point, strength)
            mine = {goal for goal in goals if all(v in offered[f] for one in goal for f, v in asked[one].items())}
            wanted[strength] |= mine
            tried[strength] |= mine if row.status is Status.PASS else set()
    missing = [goal for strength in (1, 2) for goal in sorted(wanted[strength] - tried[strength], key=sorted)]
    passed = [row for row in rows if row.status is Status.PASS]
    listed = {name: _values(feature, rows) for name, feature in features.items()}
    return Coverage(
        values=len(wanted[1]),
        values_tried=len(tried[1]),
        pairs=len(wanted[2]),
        pairs_tried=len(tried[2]),
        missing=[" with ".join(f"{name} {value}" for name, value in sorted(goal)) for goal in missing],
        sampled={name: found for name, f in features.items() if _open(offered[name]) and (found := _values(f, passed))},
        untested={
            name: left
            for name, values in offered.items()
            if name != "format" and not _open(values) and (left := [v for v in values if v not in listed[name]])  # type: ignore[attr-defined]
        },
    )


def _open(values: Container[Any]) -> bool:
    """Whether a declaration names no values one by one."""
    return values is ANY or isinstance(values, range)


def _obstacle(
    rows: Sequence[CaseResult],
    capabilities: Capabilities,
    profile: ProfileEntry,
    evidence: Evidence,
    frozen: lists.FrozenList,
) -> str:
    """Why the claim has no level, or the empty string."""
    counts = tally(rows)
    if spoilt := [f"{counts[status]} {status}" for status in NOT_GRANTED_WITH if counts[status]]:
        return f"{', '.join(spoilt)} of {len(rows)} cases"
    if frozen.family not in lists.GRANTING:
        return f"the list {frozen.name} grants no level"
    if profile.envelope is None:
        return f"the declared profile lies in no envelope ({', '.join(ENVELOPE_NAMES)})"
    if evidence is not Evidence.HARDWARE:
        return f"evidence is {evidence}"
    if frozen.family == "deterministic" and not (profile.profile["deterministic"] and profile.profile["ties"] == "lowest"):
        return "the declared profile is not deterministic with ties to the lowest"
    passed = [row.features for row in rows if row.status is Status.PASS]
    needed = [feature for feature in FEATURES[profile.operator] if feature.required]
    # What is missing comes first: it is why the cases of other features did not pass either.
    for feature in needed:
        if not _offers(feature, profile, capabilities) and not _stands_in(feature, profile, capabilities):
            other = f" (or '{feature.instead}' in its place)" if feature.instead else ""
            return f"required feature '{feature.name}'{other} is not declared"
    for feature in needed:
        if not _offers(feature, profile, capabilities):
            continue
        covered = [features for features in passed if features.get(feature.name) in feature.required]
        if not covered and any(feature.name in row.features for row in rows):
            return f"no case of required feature '{feature.name}' passed"
    if lacking := [row.id for row in rows if row.claim_required and row.status is Status.UNSUPPORTED]:
        return f"required case {lacking[0]} is not supported"
    for feature in FEATURES[profile.operator]:
        for value in _values(feature, rows):
            optional = value in feature.offered(capabilities, profile.operator, profile.phase) and value not in feature.required
            if optional and not any(features.get(feature.name) == value for features in passed):
                return f"no case of declared feature '{feature.name}' = {value} passed, as all use what is not declared"
    fewest, fewest_rows = FEWEST_ELSEWHERE if frozen.name in FIRST else FEWEST.get(frozen.family, FEWEST_ELSEWHERE)
    if len(passed) < fewest:
        return f"only {len(passed)} of {len(rows)} cases passed, and a claim takes {fewest}: so little is declared"
    selective = sum(row.selective_rows or 0 for row in rows if row.status is Status.PASS)
    if profile.operator in SELECTING and selective < fewest_rows:
        return f"the passed cases have {selective} selective rows, and a claim takes {fewest_rows}, or nothing is proven"
    return ""
