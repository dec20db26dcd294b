"""Former names still work, whatever was imported first, and name their successors; the successors are silent."""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import dsa_portable
import dsa_portable.conformance
import dsa_portable.reference
from dsa_portable import caller, registry
from dsa_portable.conformance import run

ROOT = Path(__file__).resolve().parents[1]
NO_LIST = "list 'none' was never released"
# Each prints something that only the real function says.
BACKENDS = "print([s.name for s in {}()])"
CONFORMANCE = f"""try:
    {{}}({{}}='none')
except dsa_portable.DSAError as exc:
    assert {NO_LIST!r} in str(exc), exc
    print('ran')"""


def ran(code: str) -> tuple[str, list[str]]:
    """What a fresh process prints, and the deprecations that it is told of, each with its place."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "always::DeprecationWarning", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), [line for line in done.stderr.splitlines() if "DeprecationWarning: " in line]


@pytest.mark.parametrize("name", ["backends", "conformance"])
@pytest.mark.parametrize("first", ["", "dsa_portable.{}, ", "dsa_portable.backends.cpu, dsa_portable.conformance.lists, "])
def test_a_former_call_works_and_warns_whatever_was_imported_first(first: str, name: str) -> None:
    use, successor, expected = {
        "backends": (BACKENDS, "dsa_portable.list_backends()", str(registry.names())),
        "conformance": (CONFORMANCE, "`from dsa_portable.conformance import run`", "ran"),
    }[name]
    found, told = ran(f"import {first.format(name)}dsa_portable\n{use.format(f'dsa_portable.{name}', 'list')}")
    assert found == expected
    at = 2 if name == "backends" else 3
    warning = f"dsa_portable.{name}() goes in dsa-portable 0.2.0; use {successor}."
    assert told == [f"<string>:{at}: DeprecationWarning: {warning}"], "one, and it names the line of the caller"


def test_a_former_argument_works_and_warns() -> None:
    call = CONFORMANCE.format("run", "level")
    found, told = ran(f"import dsa_portable\nfrom dsa_portable.conformance import run\n{call}")
    assert found == "ran"
    assert told == ["<string>:4: DeprecationWarning: run(level=) goes in dsa-portable 0.2.0; use run(list=)."]


@pytest.mark.parametrize("first", ["", "dsa_portable.backends, ", "dsa_portable.conformance, "])
def test_the_new_names_are_silent(first: str) -> None:
    imports = f"import {first}dsa_portable\nfrom dsa_portable.conformance import run\nimport dsa_portable.caller\n"
    calls = (
        f"{BACKENDS.format('dsa_portable.list_backends')}\n{CONFORMANCE.format('run', 'list')}\nprint(dsa_portable.caller.rope)"
    )
    found, told = ran(imports + calls)
    assert found.splitlines()[:2] == [str(registry.names()), "ran"]
    assert told == []


def test_the_suites_run_has_its_own_parameters() -> None:
    assert {"backend", "list", "out", "cases", "emulate"} <= set(inspect.signature(run).parameters)
    with pytest.raises(AttributeError, match=r"'dsa_portable\.conformance' has no attribute 'rum'"):
        _ = dsa_portable.conformance.rum


def test_the_core_brings_the_suite_with_it_only_when_called() -> None:
    code = "import sys, dsa_portable, dsa_portable.conformance\nprint(*sorted(sys.modules))\ndsa_portable.conformance.run\n"
    before, after = (ran(code + more)[0].split() for more in ("", "print(*sys.modules)"))
    assert not {"pydantic", "dsa_portable.conformance.lists"} & set(before)
    assert {"pydantic", "dsa_portable.conformance.lists"} <= set(after)


def test_a_module_under_its_former_name() -> None:
    with pytest.warns(DeprecationWarning, match=r"^dsa_portable\.reference goes .* use dsa_portable\.caller\.$") as told:
        from dsa_portable.reference import rope
    assert [warning.filename for warning in told] == [__file__]
    assert rope is caller.rope
    with pytest.warns(DeprecationWarning, match=r"dsa_portable\.caller"):
        assert dsa_portable.reference.ROTATIONS is caller.ROTATIONS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(AttributeError, match="'rop'"):
            _ = dsa_portable.reference.rop


def test_only_names_that_stay_are_listed() -> None:
    assert {"backends", "conformance"}.isdisjoint(dsa_portable.__all__)
    assert "list_backends" in dsa_portable.__all__


@pytest.mark.parametrize(
    ("former", "name", "successor"),
    [
        ("dsa_portable.request", "IndexRequest", "dsa_portable.operators"),
        ("dsa_portable.request", "Request", "dsa_portable.contract"),
        ("dsa_portable.capability", "ANY", "dsa_portable.contract"),
        ("dsa_portable.capability", "FEATURES", "dsa_portable.operators"),
    ],
)
def test_a_former_module_gives_what_it_gave(former: str, name: str, successor: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"^{former} goes in dsa-portable 0.2.0; use {successor}\.$"):
        found = getattr(importlib.import_module(former), name)
    assert found is getattr(importlib.import_module(successor), name)
