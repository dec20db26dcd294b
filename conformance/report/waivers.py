"""Failures that a vendor knows of and lets pass in his own CI: a file of his, which earns nothing and ends on its day.

[[waiver]]
id = "attend-bf16-decode-sink"       # a case; it runs all the same
owner = "kernel team"
reason = "the sink is read per request"
issue = "https://example.com/issues/7"
expires = 2027-03-31                 # the last day on which it holds
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, MutableMapping
from datetime import date
from hashlib import sha256
from importlib import import_module
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsa_portable.conformance.cases.catalogue import CASES
from dsa_portable.conformance.report.schema import CaseResult, Status
from dsa_portable.errors import DSAError

toml = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")

# What a waiver may excuse. What passes in spite of one is news, and no pass.
_EXCUSED = (Status.FAIL, Status.ERROR, Status.FLAKY)


class WaiverError(DSAError, ValueError):
    """A file of waivers cannot be read, or names what is no case."""


class Waiver(BaseModel):
    """One case that may fail, until when, and who answers for it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: str = Field(min_length=1)
    owner: str = Field(min_length=1)
    reason: str = Field(min_length=1)
    issue: str = Field(min_length=1)
    expires: date


class Waivers:
    """Those of a file, by case; `name` is the file's and the first digits of its sha256. Raises WaiverError."""

    def __init__(self, path: Path) -> None:
        try:
            text = path.read_bytes()
            stored = toml.loads(text.decode("utf-8"))
        except (OSError, ValueError) as exc:
            raise WaiverError(f"the waivers {path} cannot be read ({exc}); pass a TOML file of [[waiver]] tables.") from exc
        if set(stored) != {"waiver"} or not isinstance(stored["waiver"], list):
            raise WaiverError(f"the waivers {path} hold {', '.join(stored) or 'nothing'}, but [[waiver]] tables are accepted.")
        self.name, self.known = f"{path.name} {sha256(text).hexdigest()[:12]}", dict[str, Waiver]()
        for number, entry in enumerate(stored["waiver"], start=1):
            try:
                waiver = Waiver.model_validate(entry)
            except ValidationError as exc:
                first = exc.errors()[0]
                where = ".".join(map(str, first["loc"]))
                fields = ", ".join(Waiver.model_fields)
                raise WaiverError(
                    f"waiver {number} of {path}: {where}: {first['msg']}; each has {fields}, expires a date as 2027-03-31."
                ) from exc
            if waiver.id not in CASES:
                raise WaiverError(
                    f"waiver {number} of {path} is for {waiver.id!r}, which is no case of any list; correct its id."
                )
            if waiver.id in self.known:
                raise WaiverError(f"waiver {number} of {path} is the second for {waiver.id}; delete one.")
            self.known[waiver.id] = waiver

    def apply(self, rows: MutableMapping[str, CaseResult], today: date) -> None:
        """Say of each row that has a waiver what comes of it."""
        for id, waiver in self.known.items():
            if id in rows:
                rows[id] = _settled(rows[id], waiver, today)


def _settled(row: CaseResult, waiver: Waiver, today: date) -> CaseResult:
    whose = f"{waiver.owner}, {waiver.issue}: {waiver.reason}"
    if row.status is Status.PASS:
        words = f"passed in spite of a waiver ({whose}); delete it"
        return row.model_copy(update={"status": Status.XPASS, "reason": words})
    if row.status not in _EXCUSED:
        return row
    if today > waiver.expires:
        return row.model_copy(update={"reason": f"{row.reason}; its waiver ({whose}) expired on {waiver.expires}"})
    words = f"waived until {waiver.expires} ({whose}); {row.status}: {row.reason}"
    return row.model_copy(update={"status": Status.WAIVED, "reason": words})


def applied(waivers: Waivers | None, rows: Mapping[str, CaseResult], today: date) -> dict[str, CaseResult]:
    """The rows as they are reported; those that were judged stay as they are."""
    found = dict(rows)
    if waivers is not None:
        waivers.apply(found, today)
    return found
