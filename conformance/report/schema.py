"""The report of one run. A `Report` that contradicts itself cannot be built: a level without HARDWARE, counts unlike the cases.

`python -m dsa_portable.conformance.report.schema` prints the JSON Schema that docs/report.schema.json holds.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from dsa_portable.errors import DSAError

SCHEMA_VERSION: Final = "1.0"


class UnreadableReport(DSAError, ValueError):
    """A file is no report of this schema version: missing, not JSON, of another version, or contradicting itself."""


class _Word(str, Enum):
    def __str__(self) -> str:
        return str(self.value)


class Status(_Word):
    """What became of one case."""

    PASS = "PASS"
    FAIL = "FAIL"
    ERROR = "ERROR"
    UNSUPPORTED = "UNSUPPORTED"
    NOT_RUN = "NOT_RUN"
    WAIVED = "WAIVED"
    XPASS = "XPASS"
    FLAKY = "FLAKY"


class Evidence(_Word):
    """What the run is evidence of; only HARDWARE can carry a level."""

    HARDWARE = "HARDWARE"
    EMULATED = "EMULATED"
    SIMULATED = "SIMULATED"
    COMPILE_ONLY = "COMPILE-ONLY"
    SELFTEST = "SELFTEST"


EXECUTED = (Status.PASS, Status.FAIL, Status.ERROR, Status.WAIVED, Status.XPASS, Status.FLAKY)
# An unexpected pass fails too: a waiver that nobody needs would hide the next failure. So does what failed before it passed.
FAILING = (Status.FAIL, Status.ERROR, Status.XPASS, Status.FLAKY)
# A waiver is the vendor's own word: it keeps a run green, it does not grant a claim.
NOT_GRANTED_WITH = (*FAILING, Status.NOT_RUN, Status.WAIVED)

_ELSEWHERE = "not run on the named chip; no level can be granted"
NOTES = {
    Evidence.HARDWARE: "",
    Evidence.EMULATED: _ELSEWHERE,
    Evidence.SIMULATED: _ELSEWHERE,
    Evidence.COMPILE_ONLY: "built or lowered, nothing run; no level can be granted",
    Evidence.SELFTEST: "the suite examined itself; no level can be granted",
}


# Statuses that the first reports did not have.
LATER = (Status.FLAKY,)

# --- values that JSON can carry ---


def _utf8(value: Any) -> Any:
    """Paths and variables may hold what UTF-8 cannot (lone surrogates): escaped here, or the report could not be written."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    """The value as JSON has it: NumPy scalars unwrapped, tuples as lists, NaN and infinities as "nan", "inf", "-inf"."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return _utf8(value)
    raise ValueError(f"a {type(value).__name__} has no place in a report; pass numbers, strings, lists and dictionaries")


def _relative(path: str) -> str:
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise ValueError(f"the artefact {path!r} is not a path below the report directory")
    return path


def _complete(counts: dict[Status, int]) -> dict[Status, int]:
    if missing := [status.value for status in Status if status not in {*counts, *LATER}]:
        raise ValueError(f"counts lack {', '.join(missing)}; every status is counted, zero included, as tally() does")
    return {status: counts.get(status, 0) for status in Status}


Text = Annotated[str, BeforeValidator(_utf8)]
Named = Annotated[str, BeforeValidator(_utf8), Field(min_length=1)]
Line = Annotated[str, BeforeValidator(_utf8), Field(pattern=r"^[^\r\n]+$")]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Instant = Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?(Z|\+00:00)$")]
Relative = Annotated[str, Field(min_length=1), AfterValidator(_relative)]
Texts = dict[str, Text]
Metrics = Annotated[dict[str, int | float | str | None], BeforeValidator(_plain)]
Declared = Annotated[dict[str, Any], BeforeValidator(_plain)]
Counts = Annotated[
    dict[Status, NonNegativeInt],
    AfterValidator(_complete),
    WithJsonSchema(
        {
            "type": "object",
            "properties": {status.value: {"type": "integer", "minimum": 0} for status in Status},
            "required": [status.value for status in Status if status not in LATER],
            "additionalProperties": False,
        }
    ),
]


# --- the models ---


class _Model(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, json_schema_serialization_defaults_required=True
    )


def _when(condition: dict[str, Any], then: dict[str, Any], otherwise: dict[str, Any] | None = None) -> dict[str, Any]:
    """One if/then/else of JSON Schema over the properties of an object."""
    rule = {"if": {"properties": condition, "required": [*condition]}, "then": {"properties": then}}
    return rule if otherwise is None else rule | {"else": {"properties": otherwise}}


class Attempt(_Model):
    """What became of a case when it was asked before."""

    status: Status
    rule: Named | None
    reason: Text


class CaseResult(_Model):
    """One row of the list, whether or not it was run."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                _when({"status": {"const": "PASS"}}, {"reason": {"const": ""}}, {"reason": {"minLength": 1}}),
                _when({"status": {"const": "FAIL"}}, {"rule": {"type": "string"}}),
                _when({"rule": {"type": "string"}}, {"status": {"enum": ["FAIL", "WAIVED"]}}),
            ]
        }
    )

    id: Line
    operator: Named
    format: Named = Field(description="Operand format with its combination, as the claim names it")
    phase: Named
    claim_required: bool = Field(description="True where the claim falls without this case")
    hazards: list[str]
    features: Declared = Field(default={}, description="Feature -> value of what the case uses; empty where it was not judged")
    point: Texts = Field(default={}, description="Axis -> value, of a case of the covering table; empty for one made by hand")
    why: Named = Field(description="One sentence: the hazard that the case is for")
    status: Status
    rule: Named | None = Field(description="The first rule of docs/judging.md that a FAIL broke; null for every other status")
    reason: Text = Field(description="Empty for PASS; otherwise one sentence")
    traceback: Text = Field(default="", description="Of an ERROR: what was raised where, or a dead process's last words")
    metrics: Metrics = Field(description='NaN and infinities are the strings "nan", "inf" and "-inf"')
    selective_rows: NonNegativeInt | None = Field(description="Index: rows that see more keys than topk")
    vacuous_rows: NonNegativeInt | None = Field(description="Index: rows that see no more; they prove nothing about selection")
    seconds: NonNegativeFloat | None
    inputs_sha256: Sha256
    outputs_sha256: Sha256 | None
    artefact: Relative | None = Field(
        description="An .npz below the report directory: of a FAIL inputs, outputs and bound, of an ERROR inputs"
    )
    reproducer: Line = Field(description="One command line")
    attempts: list[Attempt] = Field(default=[], description="Earlier outcomes, where the run was resumed and asked again")

    @model_validator(mode="after")
    def _reasoned(self) -> CaseResult:
        if (self.status is Status.PASS) != (self.reason == ""):
            raise ValueError(f"case {self.id} is {self.status} with reason {self.reason!r}; every status but PASS has a reason")
        if (self.rule is None) if self.status is Status.FAIL else (self.rule is not None and self.status is not Status.WAIVED):
            raise ValueError(f"case {self.id} is {self.status} with rule {self.rule!r}; a FAIL names the rule it broke")
        failed = any(attempt.status in FAILING for attempt in self.attempts)
        if (failed and self.status is Status.PASS) or (self.status is Status.FLAKY and not failed):
            raise ValueError(f"case {self.id} is {self.status}, but what failed in an earlier attempt and passed is FLAKY")
        return self


class Coverage(_Model):
    """What a claim's cases tried of what is declared; a value or a pair is tried by a passed case that needs nothing else."""

    values: NonNegativeInt = Field(description="Values of the axes, among those that the list tries and that are declared")
    values_tried: NonNegativeInt
    pairs: NonNegativeInt = Field(description="The same of every two")
    pairs_tried: NonNegativeInt
    missing: list[Text] = Field(description="Values and pairs that were not tried, in words")
    sampled: Declared = Field(description="Feature -> values that passed, where the declaration is open: ANY, or a range")
    untested: Declared = Field(description="Feature -> declared values that no case of the list tries in this claim")


class Claim(_Model):
    """Operator x operand format x phase: what a level is granted for."""

    model_config = ConfigDict(
        json_schema_extra=_when(
            {"level": {"type": "string"}},
            {
                "envelope": {"type": "string"},
                "counts": {
                    "properties": {status.value: {"const": 0} for status in NOT_GRANTED_WITH} | {"PASS": {"minimum": 1}}
                },
            },
            {"reason": {"minLength": 1}},
        )
    )

    operator: Named
    format: Named
    phase: Named
    envelope: Named | None = Field(description="The contract's envelope around the declared profile; null outside all of them")
    level: Named | None
    reason: Text = Field(description="Why no level is granted; may be empty where one is")
    counts: Counts = Field(description="Over the cases of this operator, format and phase")
    coverage: Coverage | None = Field(default=None, description="Null in reports of suites that did not tell")

    @property
    def key(self) -> tuple[str, str, str]:
        """(operator, format, phase), which the claim's cases and profile share."""
        return self.operator, self.format, self.phase

    @model_validator(mode="after")
    def _granted_or_reasoned(self) -> Claim:
        name = " ".join(self.key)
        if self.level is None:
            if not self.reason:
                raise ValueError(f"claim {name} has neither level nor reason; say why no level is granted")
            return self
        if self.envelope is None:
            raise ValueError(f"claim {name} has a level but no envelope; a profile outside the envelopes is granted none")
        if spoilt := {status.value: self.counts[status] for status in NOT_GRANTED_WITH if self.counts[status]}:
            raise ValueError(f"claim {name} has a level beside {spoilt}; its cases all pass or are unsupported as declared")
        if not self.counts[Status.PASS]:
            raise ValueError(f"claim {name} has a level, but no case of it passed")
        return self


class ProfileEntry(_Model):
    """The numerics that the backend declared for one claim, and the contract's envelope around them."""

    operator: Named
    format: Named
    phase: Named
    envelope: Named | None
    profile: Declared
    words: Text = Field(default="", description="In words, where the profile differs from float32 throughout")
    sources: Texts = Field(default={}, description="Who says so of a field: a document, or `assumed`; empty: the backend")


class ListRef(_Model):
    """The frozen list that the run names; `cases` counts all of it, however little was asked for."""

    name: Line
    sha256: Sha256
    judging: Named = Field(default="1", description="The version of docs/judging.md that the list was frozen under")
    cases: NonNegativeInt
    executed: NonNegativeInt


class BackendRef(_Model):
    """The backend that was asked for, and the one that ran."""

    name: Named
    version: Named
    requested: Text
    resolved: Named
    arrays: Named
    contract: Named
    files_sha256: Text = Field(default="", description="Over the backend's own files; empty in reports that did not tell")


class DeviceRef(_Model):
    """What the backend's probe found."""

    kind: Named
    chip: Line
    driver: Named
    count: NonNegativeInt
    architecture: Text
    versions: Texts


class Environment(_Model):
    """Everything that a rerun would need; what is not known says "unknown"."""

    suite_version: Named
    suite_commit: Named
    suite_dirty: bool | None
    python: Named
    platform: Named
    cpu: Named
    cores: NonNegativeInt
    memory_bytes: NonNegativeInt
    container: Named
    packages: Texts
    variables: Texts = Field(description="Every DSA_* variable and TRITON_INTERPRET, as found")


class Run(_Model):
    """How the run went."""

    command: Named
    started: Instant
    finished: Instant
    seconds: NonNegativeFloat
    peak_memory_bytes: dict[str, NonNegativeInt] = Field(description="By process: runner, worker, judge (the largest)")
    interrupted: bool
    resumed: bool
    passes: NonNegativeInt = Field(default=1, description="How often each case that passed was run, in processes of their own")
    timeout_scale: PositiveFloat
    workers_replaced: NonNegativeInt
    waivers: Text = Field(default="", description="The file of waivers and the first digits of its sha256; empty: none")
    selected: NonNegativeInt | None = Field(
        default=None, description="Cases of the list that were asked for; null: all of them"
    )


# In the body of Report the name `list` is a field, so its lists are named out here.
_Claims = list[Claim]
_Cases = list[CaseResult]
_Profiles = list[ProfileEntry]

_KNOWN = {"not": {"enum": ["", "unknown"]}}
_FAILING = [status.value for status in FAILING]


class Report(_Model):
    """One run of one list on one backend."""

    model_config = ConfigDict(
        json_schema_extra={
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "allOf": [
                _when(
                    {"evidence": {"const": "HARDWARE"}},
                    {
                        "device": {"type": "object", "properties": {"chip": _KNOWN, "driver": _KNOWN}},
                        "emulates": {"type": "null"},
                    },
                    {
                        "level": {"type": "null"},
                        "claims": {"items": {"properties": {"level": {"type": "null"}}}},
                        "verdict": {"not": {"pattern": "PASSED"}},
                    },
                ),
                _when(
                    {"level": {"type": "string"}},
                    {
                        "claims": {"minItems": 1, "items": {"properties": {"level": {"type": "string"}}}},
                        "exit_code": {"const": 0},
                        "run": {"properties": {"selected": {"type": "null"}}},
                    },
                ),
                _when({"evidence": {"const": "COMPILE-ONLY"}}, {"list": {"properties": {"executed": {"const": 0}}}}),
                _when(
                    {"cases": {"contains": {"properties": {"status": {"enum": _FAILING}}}}},
                    {"exit_code": {"const": 1}},
                    {"exit_code": {"not": {"const": 1}}},
                ),
                _when(
                    {
                        "cases": {"not": {"contains": {"properties": {"status": {"enum": [*_FAILING, "NOT_RUN"]}}}}},
                        "list": {"properties": {"executed": {"minimum": 1}}},
                    },
                    {"exit_code": {"const": 0}},
                ),
                _when({"list": {"properties": {"executed": {"const": 0}}}}, {"exit_code": {"not": {"const": 0}}}),
                _when(
                    {
                        "run": {"properties": {"selected": {"type": "null"}}},
                        "cases": {"contains": {"properties": {"status": {"const": "NOT_RUN"}}}},
                    },
                    {"exit_code": {"not": {"const": 0}}},
                ),
            ],
        }
    )

    schema_version: Literal["1.0"] = SCHEMA_VERSION
    backend: BackendRef
    evidence: Evidence = Field(description="Set by the runner, never by the backend")
    evidence_reason: Named
    emulates: Named | None = Field(description="The chip whose numerics were emulated; null otherwise")
    judging: Named = Field(default="1", description="The version of docs/judging.md that judged")
    level: Named | None = Field(description="Null unless every claim is granted, on HARDWARE")
    list: ListRef
    claims: _Claims
    cases: _Cases = Field(description="Every case of the list, run or not")
    counts: Counts
    profiles: _Profiles
    device: DeviceRef | None
    environment: Environment
    run: Run
    exit_code: Literal[0, 1, 3] = Field(
        description="0 no failure; 1 a failure; 3 nothing, or not all that was asked for, was executed"
    )
    verdict: Line

    @model_validator(mode="after")
    def _counted(self) -> Report:
        if repeated := [id for id, n in Counter(case.id for case in self.cases).items() if n > 1]:
            raise ValueError(f"case ids are unique; repeated: {', '.join(repeated)}")
        if repeated_claims := [" ".join(key) for key, n in Counter(claim.key for claim in self.claims).items() if n > 1]:
            raise ValueError(f"claims are unique; repeated: {', '.join(repeated_claims)}")
        if self.counts != tally(self.cases):
            raise ValueError("counts differ from the cases; take them from tally()")
        for claim in self.claims:
            if claim.counts != tally(self.cases_of(claim.key)):
                raise ValueError(f"counts of claim {' '.join(claim.key)} differ from its cases; take them from tally()")
        if self.list.cases != len(self.cases):
            raise ValueError(
                f"list.cases is {self.list.cases}, but there are {len(self.cases)} rows; cases not run are NOT_RUN rows"
            )
        if self.list.executed != executed(self.cases):
            raise ValueError(f"list.executed is {self.list.executed}, but {executed(self.cases)} cases were executed")
        ran, selected = len(self.cases) - self.counts[Status.NOT_RUN], self.run.selected
        if selected is not None and not ran <= selected < len(self.cases):
            raise ValueError(f"run.selected is {selected}, but {ran} of {len(self.cases)} cases were run; null is all of them")
        return self

    @model_validator(mode="after")
    def _earned(self) -> Report:
        if self.evidence is not Evidence.HARDWARE:
            if self.level is not None or any(claim.level is not None for claim in self.claims):
                raise ValueError(f"a level is granted for HARDWARE only, and this run is {self.evidence}")
            if self.evidence is Evidence.COMPILE_ONLY and self.list.executed:
                raise ValueError("a COMPILE-ONLY run executes nothing")
        else:
            if self.device is None or {self.device.chip, self.device.driver} & {"", "unknown"}:
                raise ValueError("HARDWARE needs a device whose chip and driver the probe named")
            if self.emulates is not None:
                raise ValueError(f"a run that emulates {self.emulates} is not HARDWARE")
        if self.level is not None and (not self.claims or any(claim.level is None for claim in self.claims)):
            raise ValueError("the report has a level, but not every claim has one")
        for claim in self.claims:
            lacking = [c.id for c in self.cases_of(claim.key) if c.claim_required and c.status is Status.UNSUPPORTED]
            if claim.level is not None and lacking:
                raise ValueError(f"claim {' '.join(claim.key)} has a level, but its required case {lacking[0]} is UNSUPPORTED")
        return self

    @model_validator(mode="after")
    def _concluded(self) -> Report:
        if self.exit_code != (code := exit_code_of(self.cases, self.run.selected)):
            raise ValueError(f"exit_code is {self.exit_code}, but the cases give {code}")
        if self.level is not None and (self.exit_code or self.run.selected is not None):
            asked = "" if self.run.selected is None else f", of {self.run.selected} selected cases"
            raise ValueError(f"the report has a level and exit code {self.exit_code}{asked}")
        if self.verdict != (verdict := self._verdict()):
            raise ValueError(f"the verdict is {self.verdict!r}, but the report bears out {verdict!r}")
        return self

    def _verdict(self) -> str:
        chip = self.device.chip if self.device else "no device"
        return verdict_of(
            self.cases,
            list_name=self.list.name,
            evidence=self.evidence,
            chip=chip,
            level=self.level,
            selected=self.run.selected,
        )

    def cases_of(self, key: tuple[str, str, str]) -> _Cases:
        """The cases of one (operator, format, phase), in list order."""
        return [case for case in self.cases if (case.operator, case.format, case.phase) == key]


# --- what the cases add up to ---


def tally(cases: Iterable[CaseResult]) -> dict[Status, int]:
    """How many cases have each status, zeros included."""
    counts = Counter(case.status for case in cases)
    return {status: counts[status] for status in Status}


def executed(cases: Iterable[CaseResult]) -> int:
    """How many cases were executed: PASS, FAIL, ERROR, WAIVED, XPASS and FLAKY."""
    return sum(case.status in EXECUTED for case in cases)


def left_out(cases: Sequence[CaseResult], selected: int | None = None) -> int:
    """How many cases were asked for and not run; `selected`: how many of the list were asked for, None: all."""
    unasked = 0 if selected is None else len(cases) - selected
    return tally(cases)[Status.NOT_RUN] - unasked


def exit_code_of(cases: Sequence[CaseResult], selected: int | None = None) -> int:
    """1 for any FAIL, ERROR, XPASS or FLAKY; else 3 where a case asked for was not run, or none was executed; else 0."""
    if any(case.status in FAILING for case in cases):
        return 1
    return 3 if left_out(cases, selected) or not executed(cases) else 0


def verdict_of(
    cases: Sequence[CaseResult],
    *,
    list_name: str,
    evidence: Evidence,
    chip: str,
    level: str | None,
    selected: int | None = None,
) -> str:
    """The run in one line, which names the evidence class and says PASSED only where a level is granted."""
    counts, total = tally(cases), len(cases)
    stands = f"{evidence}: {NOTES[evidence]}" if NOTES[evidence] else f"{evidence}"
    not_run = counts[Status.NOT_RUN]
    if failed := sum(counts[status] for status in FAILING):
        rest = f", {not_run} not run" if not_run else ""
        return f"FAILED: {failed} of {total} cases{rest} ({stands})"
    if not executed(cases):
        return f"INCOMPLETE: none of {total} cases was executed ({stands})"
    if left := left_out(cases, selected):
        asked = f"{total} cases" if selected is None else f"the {selected} cases asked for, of {total},"
        return f"INCOMPLETE: {left} of {asked} were not run ({stands})"
    few = f", {executed(cases)} of {total} cases executed" if executed(cases) < total else ""
    if level is not None and evidence is Evidence.HARDWARE:
        return f"{list_name} PASSED on {chip}{few} ({stands})"
    beyond = f" beyond {counts[Status.WAIVED]} waived" if counts[Status.WAIVED] else ""
    if selected is not None:
        no_level = "" if NOTES[evidence] else "; no level is granted"
        return f"no failure{beyond} in the {selected} case{'s' * (selected > 1)} asked for, of {total} ({stands}){no_level}"
    if evidence is Evidence.HARDWARE:
        return f"no failure{beyond} on {chip}{few} ({stands}), but no level is granted"
    return f"no failure{beyond}{few} ({stands})"


# --- in and out ---


def to_json(report: Report) -> str:
    """The text of report.json."""
    return json.dumps(report.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def json_schema() -> str:
    """The text of docs/report.schema.json."""
    return json.dumps(Report.model_json_schema(mode="serialization"), indent=2, ensure_ascii=False) + "\n"


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def load(path: str | Path) -> Report:
    """The report in `path`. Raises UnreadableReport: no file, no JSON, another schema version, or a contradiction."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = json.loads(text, parse_constant=_no_constant)
    except (OSError, ValueError) as error:
        raise UnreadableReport(f"{path} cannot be read as a report ({error}); pass the report.json that a run wrote") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise UnreadableReport(
            f"{path} has schema_version {version!r}, this dsa-portable reads {SCHEMA_VERSION!r}; use the release that wrote it"
        )
    try:
        return Report.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "report"
        raise UnreadableReport(f"{path} is no valid report ({where}: {first['msg']}); pass an unedited report.json") from error


if __name__ == "__main__":
    print(json_schema(), end="")
