"""Draws covering.json: rows of axis values in which every two that can stand together meet.

`python -m dsa_portable.conformance.cases.covering` prints how many cases there will be, and writes the table: rows that stand
in it stay, for they may be released, and what they lack is added. The tools for covering arrays that we know meet every pair of
a whole space; here the pairs are given (core's, at one geometry), and what gains nothing must stay as usual, for it costs time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from random import Random
from typing import TypeAlias

from dsa_portable.conformance.cases.axes import FORMATS, Point, at_base, axes, met, possible
from dsa_portable.conformance.cases.products import ROWS, TABLE, fits_core

Goal: TypeAlias = frozenset[tuple[str, str]]
Row: TypeAlias = dict[str, str]
Fits: TypeAlias = Callable[[Point], bool]

# Formats in which every two values meet in core, one for each kind of kernel; in the others every value is met.
PAIRED = ("e4m3/f32/f32", "bf16")
SIZES = ("requests", "rows", "keys")
SEED, TRIES = "2026.12", 8


def fitting(operator: str, format: str, phase: str, core: bool) -> Fits:
    """Whether values can stand together, and in core: asked of parts of a row too."""

    def fits(point: Point) -> bool:
        if not possible(operator, phase, {**point, "format": format}):
            return False
        return not core or not all(name in point for name in SIZES) or fits_core(operator, phase, point)

    return fits


def completed(operator: str, phase: str, point: Point, fits: Fits) -> Row | None:
    """A whole row with these values, the others as usual as can be; None if there is none."""
    if not fits(point):
        return None
    axis = next((axis for axis in axes(operator).values() if axis.name not in point), None)
    if axis is None:
        return {name: point[name] for name in axes(operator)}
    values = sorted(axis.values, key=lambda value: value != axis.usual(phase))
    found = (completed(operator, phase, {**point, axis.name: value}, fits) for value in values)
    return next((row for row in found if row), None)


def goals(operator: str, phase: str, strength: int, fits: Fits) -> set[Goal]:
    """Every value, or every two of different axes, that some whole row tries."""
    every = [(axis.name, value) for axis in axes(operator).values() for value in axis.values]
    together = (dict(chosen) for chosen in combinations(every, strength))
    rows = {frozenset(p.items()): completed(operator, phase, p, fits) for p in together if len(p) == strength}
    return {goal for goal, row in rows.items() if row and goal in met(operator, row, strength)}


def cover(operator: str, phase: str, left: set[Goal], strength: int, fits: Fits) -> Iterator[Row]:
    """Rows that meet all goals: each is the best of a few that grow around one of those left."""
    random = Random(SEED)
    left = set(left)
    while left:
        tried = [_grown(operator, phase, random, left, strength, fits) for _ in range(TRIES)]
        best = max(tried, key=lambda row: len(met(operator, row, strength) & left))
        gained = met(operator, best, strength) & left
        assert gained, "a goal that no row meets"
        left -= gained
        yield best


def _grown(operator: str, phase: str, random: Random, left: set[Goal], strength: int, fits: Fits) -> Row:
    point = dict(random.choice(sorted(left, key=sorted)))
    for axis in random.sample([*axes(operator).values()], len(axes(operator))):
        if axis.name in point:
            continue
        gains = {v: len(met(operator, {**point, axis.name: v}, strength) & left) for v in axis.values}
        now = len(met(operator, point, strength) & left)
        for value in sorted(gains, key=lambda v: -gains[v]):
            if gains[value] > now and completed(operator, phase, {**point, axis.name: value}, fits):
                point[axis.name] = value
                break
    row = completed(operator, phase, point, fits)
    assert row is not None
    return row


def _based(operator: str, phase: str, fits: Fits) -> Fits:
    return lambda point: at_base(operator, phase, point) and fits(point)


def table() -> dict[str, dict[str, list[list[str]]]]:
    """covering.json, drawn."""
    drawn: dict[str, dict[str, list[list[str]]]] = {"core": {}, "full": {}}
    standing = json.loads(TABLE.read_text(encoding="utf-8"))["core"]
    for operator, formats in FORMATS.items():
        for format in formats:
            for phase in ROWS:
                core, every = (fitting(operator, format, phase, small) for small in (True, False))
                strength, key = 1 + (format in PAIRED), f"{operator} {format} {phase}"
                wanted = goals(operator, phase, strength, core)
                based = _based(operator, phase, core)
                rows = [dict(zip(axes(operator), values, strict=True)) for values in standing.get(key, [])]
                for those, fits in ((goals(operator, phase, strength, based), based), (wanted, core)):
                    left = those.difference(*(met(operator, row, strength) for row in rows if fits(row)))
                    rows += cover(operator, phase, left, strength, fits)
                beyond = [*cover(operator, phase, goals(operator, phase, strength, every) - wanted, strength, every)]
                drawn["core"][key], drawn["full"][key] = ([[*row.values()] for row in some] for some in (rows, beyond))
                print(
                    f"{key}: {len(wanted)} of strength {strength} in {len(rows)} core cases, {len(beyond)} more in full",
                    flush=True,
                )
    return drawn


def text(drawn: Mapping[str, Mapping[str, list[list[str]]]]) -> str:
    """What covering.json holds: a case a line."""
    lists = []
    for name, tables in drawn.items():
        keyed = (
            f"  {json.dumps(key)}: [\n   " + ",\n   ".join(map(json.dumps, rows)) + "]" for key, rows in tables.items() if rows
        )
        lists.append(f' "{name}": {{\n' + ",\n".join(keyed) + "}")
    return "{\n" + ",\n".join(lists) + "}\n"


if __name__ == "__main__":
    new = table()
    print({name: sum(map(len, rows.values())) for name, rows in new.items()})
    TABLE.write_text(text(new), encoding="utf-8")
