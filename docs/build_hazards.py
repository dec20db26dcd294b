"""Writes docs/hazards.md from the tables that cases and hazards are declared in: `python docs/build_hazards.py`."""

from __future__ import annotations

from pathlib import Path

from dsa_portable.conformance.cases.catalogue import CASES, LISTS
from dsa_portable.conformance.cases.hazards import HAZARDS, PORTABILITY

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


def render() -> str:
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
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(render(), encoding="utf-8")
