"""What a chip answered to one case, and whose answer it is: the hinge between those who run backends and those who judge.

A run leaves a folder of recordings: `subject.json`, and for each case that was tried `ID.json` with `ID.npz` beside it. Whoever
holds the folder can judge it, now or later, here or elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dsa_portable.backend import Device
from dsa_portable.conformance.cases.call import Outputs, sha256_of
from dsa_portable.conformance.execute import arrays_file
from dsa_portable.contract import ANY, Capabilities, PerPhase
from dsa_portable.errors import DSAError
from dsa_portable.profile import Accumulator, Profile

SUBJECT = "subject.json"
# (operator, format, phase): what a claim is about, and a profile.
Key = tuple[str, str, str]
# What recordings of one folder must have in common, and the word for it.
IDENTITY = {
    "list_sha256": "list",
    "backend": "backend",
    "version": "version",
    "files_sha256": "files of the backend",
    "device": "device",
    "capabilities": "capabilities",
    "profiles": "profiles",
    "suite": "suite",
    "emulate": "emulated chip",
    "variables": "variables",
}


@dataclass(frozen=True)
class Recording:
    """One case's answer. `done` has outputs; `unsupported` was refused, `malformed` returned no such results, `error` none."""

    case: str
    status: Literal["done", "unsupported", "malformed", "error"]
    reason: str = ""
    capability: str = ""  # that a refused call named
    seconds: float | None = None  # inside the backend; None where no call was answered
    reached: bool = False  # the chip was seen to work in every call
    profiled: bool = False  # the framework's profiler looked at every call, and `reached` is also what it saw
    interpreted: bool = False  # Triton's interpreter was on
    changed_inputs: tuple[str, ...] = ()
    calls: int = 0
    inputs_sha256: str = ""
    outputs_sha256: str | None = None
    traceback: str = ""  # of an error: what was raised where, or the last words of a process that died
    peak_memory: int = 0  # of the process, in bytes
    folder: Path | None = field(default=None, compare=False)

    @cached_property
    def outputs(self) -> list[Outputs]:
        """Call by call, from the file beside the recording. Raises RecordingError where they are not those that were hashed."""
        found: list[dict[str, np.ndarray[Any, Any]]] = [{} for _ in range(self.calls)]
        if self.calls:
            assert self.folder is not None
            try:
                for name, array in arrays_file.load(self.folder / f"{self.case}.npz").items():
                    call, _, result = name.partition(".")
                    found[int(call)][result] = array
            except Exception as exc:  # a file that a backend's process has spoilt can be anything
                raise RecordingError(f"the recorded outputs of {self.case} cannot be read ({exc})") from exc
        if self.calls and self.outputs_sha256 != outputs_sha256(found):
            raise RecordingError(f"the recorded outputs of {self.case} are not those that were hashed")
        return [*found]


class RecordingError(DSAError, ValueError):
    """A recording's arrays are not those that it speaks of."""


def outputs_sha256(outputs: Sequence[Outputs]) -> str:
    """Over every output's name, dtype, shape and bytes; of several calls, over their digests."""
    digests = []
    for found in outputs:
        digest = hashlib.sha256()
        for name, array in sorted(found.items()):
            digest.update(f"{name} {array.dtype.name} {list(array.shape)}".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        digests.append(digest.hexdigest())
    return sha256_of(digests)


def save(folder: Path, recording: Recording, outputs: Sequence[Outputs] = ()) -> None:
    """Leave a recording in the folder, whole or not at all."""
    if outputs:
        named = {f"{i}.{name}": array for i, found in enumerate(outputs) for name, array in found.items()}
        arrays_file.save(folder / f"{recording.case}.npz", named)
    stored = {f.name: getattr(recording, f.name) for f in fields(recording) if f.name != "folder"}
    _write(folder / f"{recording.case}.json", stored)


def load(folder: Path, case: str) -> Recording | None:
    """The recording of a case; None where there is none, or one that was not written by `save`."""
    try:
        stored = json.loads((folder / f"{case}.json").read_text(encoding="utf-8"))
        found = Recording(**stored | {"changed_inputs": tuple(stored["changed_inputs"]), "folder": folder})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return found if found.case == case and _sound(found) else None


def _sound(found: Recording) -> bool:
    """Whether each field is what it should be: it was written by a process in which a backend can have changed anything."""
    texts = (found.reason, found.capability, found.inputs_sha256, found.traceback, *found.changed_inputs)
    seconds = 0.0 if found.seconds is None else found.seconds
    return (
        found.status in ("done", "unsupported", "malformed", "error")
        and all(isinstance(text, str) for text in texts)
        and isinstance(seconds, float)
        and 0 <= seconds < math.inf
        and isinstance(found.reached, bool)
        and isinstance(found.profiled, bool)
        and isinstance(found.interpreted, bool)
        and all(type(count) is int and count >= 0 for count in (found.calls, found.peak_memory))
        and (found.outputs_sha256 is None or re.fullmatch("[0-9a-f]{64}", found.outputs_sha256) is not None)
    )


class ResumeError(DSAError, ValueError):
    """A folder holds no run that can be gone on with, or another one."""


def resume(folder: Path, subject: Subject, cases: Iterable[str], again: Container[str]) -> dict[str, Recording]:
    """What an interrupted run of the same subject recorded of these cases, but for those asked `again`. Raises ResumeError."""
    before = load_subject(folder)
    if before is None:
        raise ResumeError(f"{folder.parent} holds no interrupted run, but --resume was passed; leave it out.")
    if different := subject.unlike(before):
        raise ResumeError(
            f"the run in {folder.parent} had another {', '.join(different)}; resume it as it was, or start anew elsewhere."
        )
    found = {case: load(folder, case) for case in cases if case not in again}
    return {case: one for case, one in found.items() if one is not None}


@dataclass(frozen=True)
class Subject:
    """Who answered, and what was asked of whom: everything a judge knows of a run beside its recordings."""

    list_name: str
    list_sha256: str
    backend: str
    version: str
    requested: str  # the name as it was asked for; empty: none was
    resolved: str  # the backend that the arrays of this device would choose by name
    arrays: str
    contract: str
    device: Device
    capabilities: Capabilities
    profiles: Mapping[Key, Profile]
    sources: Mapping[Key, Mapping[str, str]]  # who says so of a profile's field
    files_sha256: str  # over the backend's own files
    suite: str  # version of this package
    emulate: str | None
    interpreted: bool  # TRITON_INTERPRET was set
    variables: Mapping[str, str]

    def unlike(self, other: Subject) -> list[str]:
        """What makes the two runs that cannot share a folder, in words; nothing where they can."""
        ours, theirs = self.to_json(), other.to_json()
        return [word for name, word in IDENTITY.items() if json.dumps(ours[name]) != json.dumps(theirs[name])]

    def to_json(self) -> dict[str, Any]:
        """As subject.json has it."""
        return as_json(self) | {"device": asdict(self.device), "variables": dict(self.variables)}


def as_json(declared: Any) -> dict[str, Any]:
    """The fields of a declaration, or of what has one among others, as JSON holds them."""
    offered = {
        operator: {name: _listed(values) for name, values in features.items()}
        for operator, features in declared.capabilities.items()
    }
    return {f.name: getattr(declared, f.name) for f in fields(declared)} | {
        "capabilities": offered,
        "profiles": [[*key, asdict(profile)] for key, profile in declared.profiles.items()],
        "sources": [[*key, dict(found)] for key, found in declared.sources.items()],
    }


def declared_from(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that `as_json` made into JSON; raises as the things raise that they are made into."""
    return {
        **stored,
        "capabilities": {
            operator: {name: _offered(values) for name, values in features.items()}
            for operator, features in stored["capabilities"].items()
        },
        "profiles": {
            (operator, format, phase): Profile(**values | {"accumulator": Accumulator(**values["accumulator"])})
            for operator, format, phase, values in stored["profiles"]
        },
        "sources": {(operator, format, phase): found for operator, format, phase, found in stored["sources"]},
    }


def _listed(values: Any) -> Any:
    if isinstance(values, PerPhase):
        return {"decode": _listed(values.decode), "prefill": _listed(values.prefill)}
    if values is ANY:
        return "any"
    if isinstance(values, range):  # there may be a billion
        return {"range": [values.start, values.stop, values.step]}
    return [*values] if isinstance(values, (tuple, list)) else sorted(values, key=repr)


def _offered(listed: Any) -> Any:
    if isinstance(listed, dict):
        if "range" in listed:
            return range(*listed["range"])
        return PerPhase(_offered(listed["decode"]), _offered(listed["prefill"]))
    return ANY if listed == "any" else tuple(listed)


def save_subject(folder: Path, subject: Subject) -> None:
    """Write subject.json, whole or not at all."""
    _write(folder / SUBJECT, subject.to_json())


def load_subject(folder: Path) -> Subject | None:
    """The subject of a folder; None where there is none, or one that was not written by `save_subject`."""
    try:
        stored = json.loads((folder / SUBJECT).read_text(encoding="utf-8"))
        return Subject(**declared_from(stored) | {"device": Device(**stored["device"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(path: Path, content: Mapping[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.write_text(json.dumps(content), encoding="utf-8")
    os.replace(aside, path)
