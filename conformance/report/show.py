"""A failed case from what is kept of it: what `dsa-portable show failed/ID.npz` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance.cases.catalogue import CASES
from dsa_portable.conformance.execute import arrays_file
from dsa_portable.conformance.report import schema
from dsa_portable.conformance.report.schema import CaseResult, UnreadableReport
from dsa_portable.conformance.report.terminal import labelled
from dsa_portable.conformance.report.text import escaped
from dsa_portable.errors import DSAError

Array: TypeAlias = np.ndarray[Any, Any]
# So many places are named; the file has the others.
SHOWN = 8


class ArtefactError(DSAError, ValueError):
    """A file is not what a run keeps of a failed case."""


def show(path: Path) -> str:
    """What the file holds, in words. Raises ArtefactError."""
    arrays, row = _arrays(path), _row(path)
    case = CASES.get(path.stem)
    why = row.why if row else case.why if case else "not known: this release has no case of that name"
    told = [("case", path.stem), ("tests", why)]
    if row is None:
        told.append(("reason", "not known: there is no report.json of this case in the folder above"))
    else:
        told += [("status", f"{row.status}, rule {row.rule}" if row.rule else str(row.status)), ("reason", row.reason)]
    parts = ["\n".join(labelled(name, text, 8) for name, text in told)]
    if row and row.traceback:
        parts.append(f"traceback\n{_indented(escaped(row.traceback).splitlines())}")
    parts.append(f"arrays\n{_indented(_listed(arrays))}")
    parts.append(f"differences\n{_indented([*_differences(arrays)])}")
    load = ["from dsa_portable.conformance.execute import arrays_file", f"arrays = arrays_file.load({str(path)!r})"]
    note = "bfloat16 and float8 arrays lie in the file as unsigned integers, named NAME@DTYPE; load() gives them back"
    parts.append(f"in Python\n{_indented([*load, f'# {note}'])}")
    if row:
        parts.append(f"run     {row.reproducer}")
    return "\n\n".join(parts)


def _arrays(path: Path) -> Mapping[str, Array]:
    try:
        found = arrays_file.load(path)
    except Exception as exc:  # a file of any kind can have been named
        raise _none(path) from exc
    if not any("inputs." in name for name in found):
        raise _none(path)
    return found


def _none(path: Path) -> ArtefactError:
    return ArtefactError(f"{path} is not what a run kept of a failed case; pass failed/ID.npz of a report directory.")


def _row(path: Path) -> CaseResult | None:
    """The case's row of the report in whose folder the file lies; None where that cannot be read, or is of another run."""
    try:
        report = schema.load(path.resolve().parent.parent / "report.json")
    except UnreadableReport:
        return None
    return next((row for row in report.cases if row.id == path.stem and row.artefact), None)


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"  {line}" for line in lines)


def _listed(arrays: Mapping[str, Array]) -> list[str]:
    name, dtype = max(map(len, arrays)), max(len(array.dtype.name) for array in arrays.values())
    return [f"{n:{name}}  {a.dtype.name:{dtype}}  {list(a.shape)}" for n, a in arrays.items()]


def _differences(arrays: Mapping[str, Array]) -> Iterator[str]:
    """Where the row that failed differs from the truth, or that no row was compared with one."""
    if "judged.row" not in arrays:
        yield "none: no row was compared with a truth, and the reason says all"
        return
    row, call = int(arrays["judged.row"]), f"{int(arrays['judged.call'])}." if "judged.call" in arrays else ""
    got = {name: arrays[f"{call}outputs.{name}"][row] for name in _returned(arrays, call)}
    for name in ("out", "lse"):
        if name in got and (truth := arrays.get(f"judged.true_{name}")) is not None:
            yield from _values(f"outputs.{name}[{row}]", got[name], truth, arrays.get("judged.bound"))
    if (scores := arrays.get("judged.true_scores")) is not None:
        first, bound = int(arrays["judged.first_position"]), arrays.get("judged.bound")
        if "indices" not in got:
            yield from _values(f"outputs.scores[{row}, {first}:]", got["scores"][first : first + len(scores)], scores, bound)
            return
        chosen = got["indices"][got["indices"] >= 0].astype(np.int64) - first
        yield from _selection(row, chosen, scores, first)
        if "scores" in got:
            of = None if bound is None else bound[chosen]
            yield from _values(f"outputs.scores[{row}]", got["scores"][: len(chosen)], scores[chosen], of)


def _returned(arrays: Mapping[str, Array], call: str) -> list[str]:
    start = f"{call}outputs."
    return [name.removeprefix(start) for name in arrays if name.startswith(start)]


def _values(what: str, got: Array, truth: Array, bound: Array | None) -> Iterator[str]:
    """The first elements outside their bounds; where there are no bounds, those that are not the truth in their own dtype."""
    found = got.astype(np.float64)
    if bound is not None and bound.shape == truth.shape:
        wrong, by = ~(abs(found - truth) <= bound), "outside its bound"
    else:
        bound, by = None, "not the truth, rounded to its dtype"
        with np.errstate(over="ignore"):
            wrong = ~(found == truth.astype(got.dtype).astype(np.float64))
    places = np.argwhere(wrong)
    yield f"{what}: {len(places)} of {wrong.size} {by}"
    for place in map(tuple, places[:SHOWN]):
        within = "" if bound is None else f" within {bound[place]:.3g}"
        yield f"  {list(map(int, place))}  got {found[place]:.9g}, expected {truth[place]:.9g}{within}"


def _selection(row: int, chosen: Array, scores: Array, first: int) -> Iterator[str]:
    """Positions that were chosen and are in no top-k of the true scores with ties to the lowest, and those in their places."""
    best = np.argsort(-scores, kind="stable")[: len(chosen)]
    for words, positions in (("left out", np.setdiff1d(best, chosen)), ("chosen for them", np.setdiff1d(chosen, best))):
        yield f"outputs.indices[{row}]: {len(positions)} {words}"
        yield from (f"  position {at + first}  true score {scores[at]:.9g}" for at in positions[:SHOWN])
