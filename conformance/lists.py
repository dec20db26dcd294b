"""A list is frozen: case ids with the sha256 of their inputs, dated, hashed, kept in frozen/ by its full name. A run names one.

Every list ever released stays there and can be run for ever: it is checked with what stands in it, never with the catalogue of
the day, and a released case is never edited. `python -m dsa_portable.conformance.lists core-2026.12` freezes a new one.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from dsa_portable.backend import CONTRACT_VERSION
from dsa_portable.conformance.cases.call import drive, sha256_of
from dsa_portable.conformance.cases.catalogue import CASES, LISTS
from dsa_portable.errors import DSAError

# Of docs/judging.md and what carries it out: it changes when a result can pass that failed before, or fail that passed.
JUDGING_VERSION = "2"
# Which families may grant a level; smoke never does.
GRANTING = ("core", "deterministic", "full", "parts")


class ListError(DSAError, ValueError):
    """A list that was never released, a case that is not on it, or a file in frozen/ that is not what was released."""


@dataclass(frozen=True)
class FrozenList:
    """`cases` maps each id, in order, to the sha256 of its inputs; `sha256` is that of the list itself."""

    name: str
    cases: Mapping[str, str]
    sha256: str
    contract: str = CONTRACT_VERSION
    judging: str = JUDGING_VERSION  # that it was frozen under

    @property
    def family(self) -> str:
        """The name without its date."""
        return self.name.rpartition("-")[0]

    def matching(self, patterns: Sequence[str]) -> set[str]:
        """The ids that some shell pattern matches, all of them if there is none. Raises ListError for one that matches none."""
        found = {pattern: fnmatch.filter(self.cases, pattern) for pattern in patterns}
        if idle := [pattern for pattern, ids in found.items() if not ids]:
            what = f"pattern {idle[0]!r} matches no case of" if set(idle[0]) & set("*?[") else f"case {idle[0]!r} is not on"
            raise ListError(f"{what} the list {self.name}; see its ids with --list-cases.")
        return set(self.cases) if not patterns else {id for ids in found.values() for id in ids}


def _hash(stored: Mapping[str, Any]) -> str:
    cases = [(case["id"], case["inputs_sha256"]) for case in stored["cases"]]
    # The lists of 2026.11 have no judging version, and keep their hashes.
    versions = [stored[name] for name in ("contract", "judging") if name in stored]
    return hashlib.sha256(json.dumps([stored["name"], *versions, cases]).encode()).hexdigest()


def released() -> list[str]:
    """Every list ever released, by full name: the families in the catalogue's order, each with the newest last."""
    names = sorted(path.name.removesuffix(".json") for path in (files("dsa_portable.conformance") / "frozen").iterdir())
    return [name for family in LISTS for name in names if name.rpartition("-")[0] == family]


def load(name: str) -> FrozenList:
    """The list of this name; a family alone (`core`) is its newest. Raises ListError."""
    known = released()
    full = next((one for one in reversed(known) if name in (one, one.rpartition("-")[0])), None)
    if full is None:
        every = f"{', '.join(known)} were; name one of them, or {', '.join(LISTS)} for the newest"
        raise ListError(f"list {name!r} was never released, but {every}.")
    return _read(full, (files("dsa_portable.conformance") / "frozen" / f"{full}.json").read_text(encoding="utf-8"))


@cache
def _read(name: str, text: str) -> FrozenList:
    try:
        stored = json.loads(text)
        right = (stored["name"], stored["sha256"]) == (name, _hash(stored))
        cases = {case["id"]: case["inputs_sha256"] for case in stored["cases"]}
        found = FrozenList(name, cases, stored["sha256"], stored["contract"], stored.get("judging", "1"))
    except (ValueError, KeyError, TypeError):
        right = False
    if not right or not CASES.keys() >= found.cases.keys():
        raise ListError(f"frozen/{name}.json is not the list that was released; reinstall the package.")
    return found


def inputs_sha256(case_id: str) -> str:
    """Of one case's inputs, built now."""
    return sha256_of([call.sha256() for call in drive(CASES[case_id].steps(), lambda call: None)])


def freeze(name: str) -> dict[str, object]:
    """The content of a new list, from the catalogue of today. Raises ListError for a name that was released or of no family.

    A released case is never edited, so its hash is taken over.
    """
    family = name.rpartition("-")[0]
    if family not in LISTS or name in released():
        raise ListError(f"{name!r} was passed, but a name of {', '.join(LISTS)} with a new date is accepted; a release stays.")
    hashes = {id: sha256 for one in released() for id, sha256 in load(one).cases.items()}
    new = [id for id in LISTS[family] if id not in hashes]
    with ProcessPoolExecutor() as pool:
        hashes |= zip(new, pool.map(inputs_sha256, new, chunksize=4), strict=True)
    cases = [{"id": id, "inputs_sha256": hashes[id]} for id in LISTS[family]]
    head = {"name": name, "contract": CONTRACT_VERSION, "judging": JUDGING_VERSION}
    return {**head, "sha256": _hash({**head, "cases": cases}), "cases": cases}


if __name__ == "__main__":
    for new in sys.argv[1:]:
        text = json.dumps(freeze(new), indent=1) + "\n"
        Path(__file__).with_name("frozen").joinpath(f"{new}.json").write_text(text, encoding="utf-8")
        print(new)
