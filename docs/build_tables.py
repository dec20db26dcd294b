"""Writes the tables of docs/contract.md and judging.md from what the code declares: `python docs/build_tables.py`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dsa_portable import contract, operators
from dsa_portable.conformance.judging.rules import RULES
from dsa_portable.formats import LAYOUTS
from dsa_portable.formats.caches import CacheLayout
from dsa_portable.operators.merge import MERGE
from dsa_portable.profile import ENVELOPES, WIDE, WORDS, Accumulator, Profile

CONTRACT, JUDGING = (Path(__file__).with_name(name) for name in ("contract.md", "judging.md"))
BLOCK = re.compile(r"<!-- generated: (?P<name>[\w ]+) -->\n.*?<!-- end -->", re.DOTALL)


def layouts() -> str:
    """The packed caches: one row per layout."""
    lines = [
        "| layout | operator | bytes per token | order of the bytes | scale | read by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*lines, *(_layout_row(layout) for layout in LAYOUTS.values())])


def _layout_row(layout: CacheLayout) -> str:
    parts = ", ".join(f"{part.name} {part.count} x {part.dtype.name}" for part in layout.parts)
    order = f"per page: {parts}, each for all tokens" if layout.planar else f"per token: {parts}"
    scale = f"{'a power of two' if layout.power_of_two else 'any'}, one per {layout.tile} values"
    cells = (f"`{layout.name}`", layout.operator, str(layout.bytes_per_token), order, scale, ", ".join(layout.users))
    return f"| {' | '.join(cells)} |"


def formats() -> str:
    """The operand dtypes with the short names that claims use."""
    lines = [
        "| dtype | in claims | `lightning_index` q, k | `k_scale` | `sparse_attend` q, kv |",
        "| --- | --- | --- | --- | --- |",
    ]
    for dtype, short in contract.SHORT.items():
        scale = "required" if dtype in contract.SCALED else "forbidden"
        lines.append(f"| {dtype} | `{short}` | yes | {scale} | {'yes' if dtype in contract.FLOATS else 'in packed caches'} |")
    lines += [f"| {dtype} | | reserved | | no |" for dtype in contract.RESERVED]
    return "\n".join(lines)


def fields_of(declared: type) -> str:
    """A declaration of numerics: name, default and comment of each field, as the class has them."""
    lines = ["| field | default | meaning |", "| --- | --- | --- |"]
    for name, default, comment in re.findall(
        r"^    (\w+): [\w.]+ = (.*?)(?:  # (.*))?$", inspect.getsource(declared), re.MULTILINE
    ):
        if name == "accumulator":
            a = Profile().accumulator
            default, comment = f"{a.bits} bits, {a.rounding}, group {a.group}", "how a dot product is summed, see below"
        lines.append(f"| `{name}` | {default.strip(chr(34))} | {comment} |")
    return "\n".join(lines)


def envelopes() -> str:
    """The envelopes, the narrowest first: which accumulator, and what may be in which formats."""
    lines = ["| envelope | of | accumulator | may be less than float32 |", "| --- | --- | --- | --- |"]
    for name, e in ENVELOPES:
        formats: dict[str, list[str]] = {}
        for field, allowed in e.formats.items():
            if field == "product" or set(WORDS[field][0]) & set(e.operators):
                formats.setdefault(", ".join(sorted(allowed - WIDE)), []).append(f"`{field}`")
        less = "; ".join(f"{' '.join(fields)}: {allowed}" for allowed, fields in formats.items())
        of = ", ".join(f"`{operator}`" for operator in e.operators)
        lines.append(f"| `{name}` | {of} | at least {e.bits} bits | {less or 'nothing'} |")
    return "\n".join(lines)


def rules() -> str:
    """The rules by the words that reports use, with the section that derives each."""
    lines = ["| rule | section | what it demands |", "| --- | --- | --- |"]
    return "\n".join([*lines, *(f"| `{name}` | {section} | {demand} |" for name, (section, demand) in RULES.items())])


# Document -> the blocks that it holds.
TABLES: dict[Path, dict[str, Callable[[], str]]] = {
    CONTRACT: {
        **{s.name: partial(contract.table, s) for s in (*(r.signature() for r in operators.REQUESTS.values()), MERGE)},
        "layouts": layouts,
        "formats": formats,
        "features": partial(contract.feature_table, operators.FEATURES),
        "profile": partial(fields_of, Profile),
        "accumulator": partial(fields_of, Accumulator),
        "envelopes": envelopes,
    },
    JUDGING: {"rules": rules},
}


def render(document: Path, text: str) -> str:
    """The document with every generated block as the code would have it. Raises KeyError for a block of an unknown name."""
    made = TABLES[document]
    return BLOCK.sub(lambda m: f"<!-- generated: {m['name']} -->\n{made[m['name']]()}\n<!-- end -->", text)


if __name__ == "__main__":
    for document in TABLES:
        document.write_text(render(document, document.read_text(encoding="utf-8")), encoding="utf-8")
