"""Writes docs/hazards.md from the tables that cases and hazards are declared in: `python docs/build_hazards.py`."""

from __future__ import annotations

from pathlib import Path

from dsa_portable.conformance.cases.catalogue import CASES, LISTS
from dsa_portable.conformance.cases.hazards import HAZARDS, PORTABILITY
from dsa_portable.conformance.selftest.inputs import INPUTS
from dsa_portable.conformance.selftest.matrix import Kills, recorded

DOCUMENT = Path(__file__).with_name("hazards.md")
# The first list that has a case is named: smoke is a sample of core.
ORDER = ("core", "deterministic", "full")
SHOWN = 3


def cases_of(tags: tuple[str, ...]) -> dict[str, list[str]]:
    """List -> ids of its cases that carry one of the tags; a case is counted once, in the first list that has it."""
    seen: set[str] = set()
    found: dict[str, list[str]] = {}
    for level in ORDER:
        found[level] = [id for id in LISTS[level] if id not in seen and set(tags) & set(CASES[id].hazards)]
        seen.update(LISTS[level])
    return found


def _row(cells: list[str], tags: tuple[str, ...], beyond: str = "") -> str:
    found = cases_of(tags)
    counts = ", ".join(f"{len(ids)} {level}" for level, ids in found.items() if ids)
    examples = [f"`{id}`" for ids in found.values() for id in ids][:SHOWN]
    return f"| {' | '.join([*cells, counts, ', '.join(examples) + (f'; {beyond}' if beyond else '')])} |"


def kills_of(tag: str, kills: Kills) -> tuple[list[str], list[str]]:
    """(faults that some input with the tag kills, those that no other input kills), by code."""
    mine = {name for name, given in INPUTS.items() if tag in CASES[given.case].hazards}
    killed = [code for code, by in kills.items() if mine & by.keys()]
    return killed, [code for code in killed if kills[code].keys() <= mine]


def proof(kills: Kills) -> list[str]:
    """What the selftest shows of the tags: which faults their inputs kill, tags that none carries, inputs that none needs."""
    rows = {tag: kills_of(tag, kills) for tag in HAZARDS}
    promises = ", ".join(f"`{tag}`" for tag, (killed, _) in rows.items() if not killed)
    spare = ", ".join(f"`{name}`" for name in INPUTS if not any(by.keys() == {name} for by in kills.values()))
    return [
        "",
        "## What the cases kill",
        "",
        f"From conformance/selftest/kills.json, as `dsa-portable selftest` compares it: {len(kills)} planted faults of the "
        f"two operators, tried on {len(INPUTS)} inputs.",
        "",
        "| tag | faults killed | by no other tag's inputs |",
        "| --- | --- | --- |",
        *(f"| `{tag}` | {len(killed)} | {', '.join(only) or '-'} |" for tag, (killed, only) in rows.items() if killed),
        "",
        f"Promises, tags that no killing input carries: {promises or 'none'}.",
        "",
        f"Inputs that kill nothing which the others miss: {spare or 'none'}.",
    ]


def render(kills: Kills | None = None) -> str:
    """The whole document."""
    lines = [
        "# Hazards and the cases that show them",
        "",
        "Written by `docs/build_hazards.py`; a test fails when it is out of date or a hazard has no case.",
        "",
    ]
    lines += [
        "## The 30 hazards of portability",
        "",
        "| # | what differs between implementations | tags | cases | such as |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [_row([str(h.number), h.what, ", ".join(f"`{tag}`" for tag in h.tags)], h.tags, h.beyond) for h in PORTABILITY]
    lines += ["", "## Tags", "", "| tag | what it stands for | cases | such as |", "| --- | --- | --- | --- |"]
    lines += [_row([f"`{tag}`", what], (tag,)) for tag, what in HAZARDS.items()]
    lines += proof(recorded() if kills is None else kills)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(render(), encoding="utf-8")
