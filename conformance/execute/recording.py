"""What a chip answered to one case, and whose answer it is: the hinge between those who run backends and those who judge.

A run leaves a folder of recordings: `subject.json`, and for each case that was tried `ID.json` with `ID.npz` beside it. Whoever
holds the folder can judge it, now or later, here or elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
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
    interpreted: bool = False  # Triton's interpreter was on
    changed_inputs: tuple[str, ...] = ()
    calls: int = 0
    inputs_sha256: str = ""
    outputs_sha256: str | None = None
    peak_memory: int = 0  # of the process, in bytes
    folder: Path | None = field(default=None, compare=False)

    @cached_property
    def outputs(self) -> list[Outputs]:
        """Call by call, from the file beside the recording. Raises ValueError where they are not those that were hashed."""
        found: list[dict[str, np.ndarray[Any, Any]]] = [{} for _ in range(self.calls)]
        if self.calls:
            assert self.folder is not None
            for name, array in arrays_file.load(self.folder / f"{self.case}.npz").items():
                call, _, result = name.partition(".")
                found[int(call)][result] = array
        if self.calls and self.outputs_sha256 != outputs_sha256(found):
            raise ValueError(f"the recorded outputs of {self.case} are not those that were hashed")
        return [*found]


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
        return Recording(**stored | {"changed_inputs": tuple(stored["changed_inputs"]), "folder": folder})
    except (OSError, ValueError, TypeError, KeyError):
        return None


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
        offered = {
            operator: {name: _listed(values) for name, values in features.items()}
            for operator, features in self.capabilities.items()
        }
        return {f.name: getattr(self, f.name) for f in fields(self)} | {
            "device": asdict(self.device),
            "capabilities": offered,
            "profiles": [[*key, asdict(profile)] for key, profile in self.profiles.items()],
            "sources": [[*key, dict(found)] for key, found in self.sources.items()],
            "variables": dict(self.variables),
        }


def _listed(values: Any) -> Any:
    if isinstance(values, PerPhase):
        return {"decode": _listed(values.decode), "prefill": _listed(values.prefill)}
    if values is ANY:
        return "any"
    return [*values] if isinstance(values, (tuple, list, range)) else sorted(values, key=repr)


def _offered(listed: Any) -> Any:
    if isinstance(listed, dict):
        return PerPhase(_offered(listed["decode"]), _offered(listed["prefill"]))
    return ANY if listed == "any" else tuple(listed)


def save_subject(folder: Path, subject: Subject) -> None:
    """Write subject.json, whole or not at all."""
    _write(folder / SUBJECT, subject.to_json())


def load_subject(folder: Path) -> Subject | None:
    """The subject of a folder; None where there is none, or one that was not written by `save_subject`."""
    try:
        stored = json.loads((folder / SUBJECT).read_text(encoding="utf-8"))
        profiles = {
            (operator, format, phase): Profile(**values | {"accumulator": Accumulator(**values["accumulator"])})
            for operator, format, phase, values in stored["profiles"]
        }
        offered = {
            operator: {name: _offered(values) for name, values in features.items()}
            for operator, features in stored["capabilities"].items()
        }
        sources = {(operator, format, phase): found for operator, format, phase, found in stored["sources"]}
        return Subject(
            **stored | {"device": Device(**stored["device"]), "capabilities": offered, "profiles": profiles, "sources": sources}
        )
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(path: Path, content: Mapping[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.write_text(json.dumps(content), encoding="utf-8")
    os.replace(aside, path)
