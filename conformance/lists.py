"""A list is frozen: case ids with the sha256 of their inputs, dated, hashed, kept in lists/*.json. A run names one.

`python -m dsa_portable.conformance.lists` writes the lock files anew from the catalogue; a released list is never rewritten:
a changed one gets a new date.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

from dsa_portable.backend import CONTRACT_VERSION
from dsa_portable.conformance.cases.call import drive, sha256_of
from dsa_portable.conformance.cases.catalogue import CASES, LISTS
from dsa_portable.errors import DSAError

DATE = "2026.11"
# Which lists may grant a level; smoke never does.
GRANTING = ("core", "deterministic", "full")


class ListError(DSAError, ValueError):
    """A list that does not exist, a case that is not on it, or a lock file that does not match the cases."""


@dataclass(frozen=True)
class FrozenList:
    """`cases` maps each id, in order, to the sha256 of its inputs; `sha256` is that of the list itself."""

    name: str
    level: str
    cases: Mapping[str, str]
    sha256: str

    def matching(self, patterns: Sequence[str]) -> set[str]:
        """The ids that some shell pattern matches, all of them if there is none. Raises ListError for one that matches none."""
        found = {pattern: fnmatch.filter(self.cases, pattern) for pattern in patterns}
        if idle := [pattern for pattern, ids in found.items() if not ids]:
            what = f"pattern {idle[0]!r} matches no case of" if set(idle[0]) & set("*?[") else f"case {idle[0]!r} is not on"
            raise ListError(f"{what} the list {self.name}; see its ids with --list-cases.")
        return set(self.cases) if not patterns else {id for ids in found.values() for id in ids}


def _hash(name: str, cases: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps([name, CONTRACT_VERSION, list(cases.items())]).encode()).hexdigest()


def load(level: str) -> FrozenList:
    """The frozen list of this level. Raises ListError where there is none, or where it names cases the catalogue lacks."""
    path = files("dsa_portable.conformance") / "lists" / f"{level}.json"
    if level not in LISTS or not path.is_file():
        raise ListError(f"level {level!r} has no list, but {', '.join(LISTS)} have; name one with --level.")
    return _read(level, path.name, path.read_text(encoding="utf-8"))


@cache
def _read(level: str, file: str, text: str) -> FrozenList:
    try:
        stored = json.loads(text)
        cases = {entry["id"]: entry["inputs_sha256"] for entry in stored["cases"]}
        found = FrozenList(stored["name"], level, cases, stored["sha256"])
    except (ValueError, KeyError, TypeError):
        found = None
    if found is None or found.sha256 != _hash(found.name, found.cases) or tuple(found.cases) != LISTS[level]:
        raise ListError(f"the lock file {file} does not match the cases of this version; reinstall the package.")
    return found


def inputs_sha256(case_id: str) -> str:
    """Of one case's inputs, built now."""
    return sha256_of([call.sha256() for call in drive(CASES[case_id].steps(), lambda call: None)])


def freeze(level: str) -> dict[str, object]:
    """The lock file's content, from the catalogue as it is."""
    name = f"{level}-{DATE}"
    with ProcessPoolExecutor() as pool:
        hashes = dict(zip(LISTS[level], pool.map(inputs_sha256, LISTS[level], chunksize=4), strict=True))
    cases = [{"id": id, "inputs_sha256": sha} for id, sha in hashes.items()]
    return {"name": name, "contract": CONTRACT_VERSION, "sha256": _hash(name, hashes), "cases": cases}


if __name__ == "__main__":
    for level in LISTS:
        target = Path(__file__).parent / "lists" / f"{level}.json"
        target.write_text(json.dumps(freeze(level), indent=1) + "\n", encoding="utf-8")
        print(f"{target.name}: {len(LISTS[level])} cases")
