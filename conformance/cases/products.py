"""Cases of the covering table: a row names a value of every axis, and here becomes one call."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from dsa_portable.conformance.cases.axes import Point, axes, optional
from dsa_portable.conformance.cases.lightning_index import IndexCase, Requests
from dsa_portable.conformance.cases.sparse_attend import AttendCase
from dsa_portable.conformance.cases.surroundings import USUAL

Product: TypeAlias = IndexCase | AttendCase

TABLE = Path(__file__).with_name("covering.json")
MANY = 65
# Rows of the first requests; all that follow have the last number.
ROWS: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "decode": {"some": (2, 1, 4, 0, 3, 1), "single": (1,), "odd": (3, 1, 1, 3, 1), "over": (4, 2, 1, 0, 1), "none": (0,)},
    "prefill": {"some": (6, 1, 0, 2, 1), "tiles": (65, 2, 0, 3, 1), "hundreds": (260, 1, 0, 2, 1), "over": (12, 2, 0, 3, 1)},
}
# Keys of the requests, in turns: residues of every tile that kernels use, and lengths around topk.
RESIDUES = (129, 1, 63, 257, 17, 8, 9, 31, 33, 127, 15, 255, 7, 65)
KEYS: Mapping[str, tuple[int, ...]] = {
    "mixed": (300, 2500, 7, 2100, 65, *RESIDUES),
    "short": RESIDUES,
    "edge": (2049, 2047, 2048),
    "long": (2300, 4097, 3001, 2052, 2600),
    "longest": (300, 65537, 700, 2049, *RESIDUES),
    "empty": (0,),
}
REQUESTS = {"few": 5, "one": 1, "many": MANY, "none": 0}
# What a case of the core list may cost: query rows x keys of an index, rows x keys x heads of attention, keys in all.
CORE_INDEX, CORE_ATTEND, CORE_KEYS = 5 << 15, 9 << 18, 72000
# Values that cost seconds each: in core they meet no value that a claim can do without.
DEAR = (("keys", "longest"), ("rows", "hundreds"))


def shapes_of(phase: str, requests: str, rows: str, keys: str) -> Requests:
    """(rows, keys) of each request; with more rows than keys, the first request has fewer keys than rows."""
    count, of_rows, of_keys = REQUESTS[requests], ROWS[phase][rows], KEYS[keys]
    if requests == "one":
        of_keys = (max(of_keys),)
    shape = [(of_rows[min(r, len(of_rows) - 1)], of_keys[r % len(of_keys)]) for r in range(count)]
    if rows == "over" and shape:
        shape[0] = (shape[0][0], min(shape[0][1], shape[0][0] - 3))
    return tuple(shape)


def fits_core(operator: str, phase: str, point: Point) -> bool:
    """Whether a case of these shapes is small enough for core, as far as the point says."""
    shape = shapes_of(phase, point["requests"], point["rows"], point["keys"])
    dear = any(point[name] == value for name, value in DEAR)
    if sum(lk for _, lk in shape) > CORE_KEYS or (dear and optional(operator, point)):
        return False
    if operator == "lightning_index":
        return sum(lq * lk for lq, lk in shape) <= CORE_INDEX
    heads = int(point.get("heads", axes(operator)["heads"].usual(phase)))
    return sum(lq * min(lk, int(point.get("topk", 2048))) for lq, lk in shape) * heads <= CORE_ATTEND


def case_of(operator: str, format: str, phase: str, point: Point, number: int) -> Product:
    """The case of a row of the table."""
    known = axes(operator)
    values = [known[name].values[value] for name, value in point.items()]
    grouped: dict[str, dict[str, Any]] = {"": {}, "shape": {}, "around": {}, "options": {}}
    for value in values:
        for name, field in value.fields.items():
            group, _, name = name.rpartition(".")
            grouped[group][name] = field
    words = [value.words for value in values if value.words]
    why = f"{'; '.join(words) if words else 'the usual of everything'}."
    tags = tuple(dict.fromkeys(value.tag for value in values if value.words and value.tag)) or ("ragged",)
    kind = IndexCase if operator == "lightning_index" else AttendCase
    return kind(
        f"{kind.prefix}-{format.replace('/', '-').rstrip('-')}-{phase}-axes-{number:03}",
        why[0].upper() + why[1:],
        tags,
        format,
        shapes_of(phase, **grouped["shape"]),
        **grouped[""],
        options=tuple(grouped["options"].items()),
        around=replace(USUAL, **grouped["around"]),
        point=tuple(point.items()),
    )


def _cases(rows: Mapping[str, list[list[str]]], first: Mapping[str, int]) -> Iterator[Product]:
    for key, table in rows.items():
        operator, format, phase = key.split(" ")
        for number, values in enumerate(table, first.get(key, 0)):
            point = dict(zip(axes(operator), values, strict=True))
            yield case_of(operator, format, phase, point, number)


def _read() -> tuple[tuple[Product, ...], tuple[Product, ...]]:
    """covering.json: list -> "operator format phase" -> rows of values, in the order of the axes."""
    table: Mapping[str, Mapping[str, list[list[str]]]] = json.loads(TABLE.read_text(encoding="utf-8"))
    counts = {key: len(rows) for key, rows in table["core"].items()}
    return tuple(_cases(table["core"], {})), tuple(_cases(table["full"], counts))


# Those of the core list, and those that are too large for it.
CORE, FULL = _read()
# Of those in which every two values meet, the first few of each operator and phase.
SMOKE = tuple(case for case in CORE if case.format in ("e4m3/f32/f32", "bf16") and case.id.endswith(("-000", "-001")))
