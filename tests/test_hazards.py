"""Every hazard of portability has named cases, and the page that says so is current."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from dsa_portable.conformance import lists
from dsa_portable.conformance.cases.catalogue import CASES, LISTS
from dsa_portable.conformance.cases.hazards import HAZARDS, PORTABILITY, PortabilityHazard

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_hazards", DOCS / "build_hazards.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_thirty_numbered_hazards() -> None:
    assert [hazard.number for hazard in PORTABILITY] == list(range(1, 31))


@pytest.mark.parametrize("hazard", PORTABILITY, ids=lambda hazard: str(hazard.number))
def test_every_hazard_has_a_case(hazard: PortabilityHazard, build: ModuleType) -> None:
    assert set(hazard.tags) <= set(HAZARDS)
    for tag in hazard.tags:
        assert any(build.cases_of((tag,)).values()), tag


def test_a_tag_without_a_case_would_show(build: ModuleType) -> None:
    assert not any(build.cases_of(("no-such-tag",)).values())


def test_every_case_is_on_a_list_and_carries_known_tags() -> None:
    listed = {id for ids in LISTS.values() for id in ids} | {id for name in lists.released() for id in lists.load(name).cases}
    for id, case in CASES.items():
        assert id in listed
        assert case.hazards
        assert set(case.hazards) <= set(HAZARDS)


def test_promises_and_decoration_are_named(build: ModuleType) -> None:
    first, second = "index-e4m3-f32-f32-decode-out", "index-e4m3-f32-f32-decode-range"
    proof = "\n".join(build.proof({"I1": {first: "visible"}, "I2": {first: "visible", second: "unique"}}))
    assert "| `out` | 2 | I1 |" in proof
    assert "| `key-range` | 1 | - |" in proof
    promises, spare = proof.split("Promises, ")[1].split("Inputs that kill nothing")
    assert "`visible-nan`" in promises
    assert "`out`" not in promises
    assert f"`{second}`" in spare
    assert f"`{first}`" not in spare


def test_the_page_is_current(build: ModuleType) -> None:
    assert (DOCS / "hazards.md").read_text(encoding="utf-8") == build.render(), "run: python docs/build_hazards.py"
