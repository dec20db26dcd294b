"""Mechanical edits of a backend's sources: each node of a kind becomes something else, and a seed draws from them all.

An edit replaces a span of one line. Declarative files are left alone, and so are annotations, assertions, errors and imports.
"""

from __future__ import annotations

import ast
import importlib.util
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from dsa_portable import registry

SEED = "2026.12"
# What is edited of each backend. Its models are no text that a wheel holds, so the cpu backend is tried with its other engine.
SOURCES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cpu": (
            "index_scores.py",
            "index_select.py",
            "lightning_index.py",
            "numpy_engine.py",
            "rows.py",
            "sparse_attend.py",
        ),
        "cuda": (
            "kernels/lightning_index.py",
            "kernels/rows.py",
            "kernels/sparse_attend.py",
            "kernels/sparse_attend_hopper.py",
            "kernels/top_k.py",
            "launch.py",
            "lightning_index.py",
            "plan.py",
            "rows.py",
            "sparse_attend.py",
        ),
    }
)
VARIABLES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {"cpu": {"DSA_CPU_ENGINE": "numpy", "DSA_CPU_THREADS": "1"}, "cuda": {}}
)

# (first byte, byte behind the last, text instead), of a file
Span: TypeAlias = tuple[int, int, str]


@dataclass(frozen=True)
class Edit:
    """A span of one line of a file and what stands there instead; `before` and `after` are the whole line."""

    file: str
    line: int
    kind: str
    span: Span
    before: str
    after: str


@dataclass(frozen=True)
class Source:
    """A file's bytes and where its lines begin: ast counts bytes, not characters."""

    data: bytes

    def start(self, node: ast.AST) -> int:
        """The node's first byte."""
        return self._place(node.lineno, node.col_offset)  # type: ignore[attr-defined]

    def stop(self, node: ast.AST) -> int:
        """The byte behind the node."""
        return self._place(node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]

    def _place(self, line: int, column: int) -> int:
        return sum(map(len, self.data.splitlines(keepends=True)[: line - 1])) + column

    def text(self, start: int, stop: int) -> str:
        """What stands there."""
        return self.data[start:stop].decode()

    def of(self, node: ast.AST) -> str:
        """The node as it is written, without parentheses around it."""
        return self.text(self.start(node), self.stop(node))

    def between(self, one: ast.AST, other: ast.AST, old: str, new: str) -> Span:
        """The first `old` between two nodes becomes `new`."""
        start, stop = self.stop(one), self.start(other)
        return start, stop, self.text(start, stop).replace(old, new, 1)

    def instead(self, node: ast.AST, new: str) -> Span:
        """`new` in the node's place."""
        return self.start(node), self.stop(node), new


COMPARISONS: Mapping[type[ast.cmpop], tuple[str, str]] = MappingProxyType(
    {
        ast.Lt: ("<", "<="),
        ast.LtE: ("<=", "<"),
        ast.Gt: (">", ">="),
        ast.GtE: (">=", ">"),
        ast.Eq: ("==", "!="),
        ast.NotEq: ("!=", "=="),
    }
)
OPPOSITE = MappingProxyType({"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"})
STRIDES = MappingProxyType(
    {
        "page_stride": ("slot_stride",),
        "slot_stride": ("page_stride",),
        "k_page_stride": ("scale_page_stride", "table_stride"),
        "scale_page_stride": ("k_page_stride",),
        "table_stride": ("page_size",),
        "KV_SLOT": ("SCALE_SLOT", "ROPE_SLOT"),
        "SCALE_SLOT": ("KV_SLOT", "K_SLOT"),
        "K_SLOT": ("SCALE_SLOT",),
        "ROPE_SLOT": ("KV_SLOT",),
    }
)
DTYPES = MappingProxyType({"float32": ("float16", "bfloat16"), "int64": ("int32",), "uint32": ("uint16",)})
ARITHMETIC: Mapping[type[ast.operator], tuple[str, str]] = MappingProxyType({ast.Add: ("+", "-"), ast.Sub: ("-", "+")})
UNORDERED: Mapping[type[ast.operator], str] = MappingProxyType({ast.Sub: "-", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%"})


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _renamed(source: Source, node: ast.AST, name: str) -> Span:
    return source.stop(node) - len(_name(node)), source.stop(node), name


def _is_one(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int and node.value == 1


def _comparison(node: ast.AST, source: Source) -> Iterator[Span]:
    if isinstance(node, ast.Compare):
        for one, op, other in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            if type(op) in COMPARISONS:
                yield source.between(one, other, *COMPARISONS[type(op)])


def _bound(node: ast.AST, source: Source) -> Iterator[Span]:
    if isinstance(node, ast.Call) and _name(node.func) in OPPOSITE:
        yield _renamed(source, node.func, OPPOSITE[_name(node.func)])
        if len(node.args) == 2:
            yield from (source.instead(node, f"({source.of(argument)})") for argument in node.args)
    # Rounded up is written -(-a // b).
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.BinOp):
        division = node.operand
        if isinstance(division.op, ast.FloorDiv) and isinstance(division.left, ast.UnaryOp):
            yield source.instead(node, f"({source.of(division.left.operand)} // {source.of(division.right)})")


def _offset(node: ast.AST, source: Source) -> Iterator[Span]:
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and _is_one(node.right):
        yield source.stop(node.left), source.stop(node), ""
    if isinstance(node, ast.Subscript):
        for place in node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]:
            bounds = [place.lower, place.upper] if isinstance(place, ast.Slice) else [place]
            for bound in bounds:
                if bound is not None and not (isinstance(bound, ast.Constant) and type(bound.value) is not int):
                    yield from (source.instead(bound, f"{source.of(bound)} {sign} 1") for sign in "+-")
    if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
        yield from (_renamed(source, node, n) for n in STRIDES.get(_name(node), ()) if n.encode() in source.data)


def _mask(node: ast.AST, source: Source) -> Iterator[Span]:
    if isinstance(node, ast.Call):
        names = [keyword.arg for keyword in node.keywords]
        for i, keyword in enumerate(node.keywords):
            before = source.stop([*node.args, *node.keywords[:i]][-1]) if node.args or i else source.start(keyword)
            if keyword.arg == "mask":
                # What stands in for the masked goes with the mask.
                last = node.keywords[i + 1] if names[i + 1 : i + 2] == ["other"] else keyword
                yield before, source.stop(last), ""
            if keyword.arg == "other":
                yield before, source.stop(keyword), ""
        if _name(node.func) == "where" and len(node.args) == 3:
            one, other = node.args[1:]
            gap = source.text(source.stop(one), source.start(other))
            yield source.start(one), source.stop(other), source.of(other) + gap + source.of(one)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        yield from (source.instead(node, f"({source.of(side)})") for side in (node.left, node.right))


def _dtype(node: ast.AST, source: Source) -> Iterator[Span]:
    if isinstance(node, ast.Attribute):
        owner = _name(node.value)
        yield from (_renamed(source, node, n) for n in DTYPES.get(node.attr, ()) if (owner, n) != ("np", "bfloat16"))


def _constant(node: ast.AST, source: Source) -> Iterator[Span]:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        form = "#x" if source.of(node)[:2] == "0x" else ""
        yield source.instead(node, format(node.value + 1, form))
        if node.value:
            yield source.instead(node, format(node.value * 2, form))


def _operand(node: ast.AST, source: Source) -> Iterator[Span]:
    if isinstance(node, ast.BinOp):
        if type(node.op) in ARITHMETIC:
            yield source.between(node.left, node.right, *ARITHMETIC[type(node.op)])
        if type(node.op) in UNORDERED:
            yield source.instead(node, f"(({source.of(node.right)}) {UNORDERED[type(node.op)]} ({source.of(node.left)}))")
    if isinstance(node, ast.Call):
        for values in (node.args, [keyword.value for keyword in node.keywords]):
            for one, other in pairwise(values):
                if not isinstance(other, ast.Starred) and not isinstance(one, ast.Starred):
                    yield source.instead(one, source.of(other))


KINDS: Mapping[str, Callable[[ast.AST, Source], Iterator[Span]]] = MappingProxyType(
    {
        "comparison": _comparison,
        "bound": _bound,
        "offset": _offset,
        "mask": _mask,
        "dtype": _dtype,
        "constant": _constant,
        "operand": _operand,
    }
)
# Statements and expressions that decide no result; of the others, these fields.
SKIPPED = (ast.Assert, ast.Raise, ast.Import, ast.ImportFrom, ast.JoinedStr)
SKIPPED_FIELDS = ("annotation", "returns", "decorator_list")


def _edited(node: ast.AST, top: bool = True) -> Iterator[ast.AST]:
    """Every node that may be edited; of a module's own statements not the aliases of types."""
    yield node
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            alias = top and isinstance(child, (ast.Assign, ast.AnnAssign)) and isinstance(child.value, ast.Subscript)
            if isinstance(child, ast.AST) and not isinstance(child, SKIPPED) and name not in SKIPPED_FIELDS and not alias:
                yield from _edited(child, top=False)


def package_of(backend: str) -> str:
    """The backend's package by its full name."""
    return next(iter(registry.load(backend).operators.values())).partition(":")[0].rpartition(".")[0]


def folder_of(backend: str) -> Path:
    """Where the backend's package lies."""
    spec = importlib.util.find_spec(package_of(backend))
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def applied(data: bytes, span: Span) -> bytes:
    """The file's bytes with the edit made."""
    return data[: span[0]] + span[2].encode() + data[span[1] :]


def edits(backend: str) -> list[Edit]:
    """Every edit of the backend's sources that changes its tree and leaves it Python, in the order of files and places."""
    found = {}
    for file in SOURCES[backend]:
        source = Source((folder_of(backend) / file).read_bytes())
        tree = ast.parse(source.data)
        for node in _edited(tree):
            for kind, spans in KINDS.items():
                for span in spans(node, source):
                    old = source.text(span[0], span[1])
                    if "\n" not in old + span[2] and old != span[2]:
                        found[file, span] = _edit(file, kind, source.data, span)
    return sorted(found.values(), key=lambda edit: (edit.file, edit.span))


def _edit(file: str, kind: str, data: bytes, span: Span) -> Edit:
    line = data.count(b"\n", 0, span[0])
    before, after = (text.splitlines()[line].decode().strip() for text in (data, applied(data, span)))
    return Edit(file, line + 1, kind, span, before, after)


def draw(backend: str, count: int, seed: str = SEED) -> list[Edit]:
    """So many edits, the kinds in turn; the same for the same seed and sources."""
    chance, every = random.Random(seed), edits(backend)
    left = {kind: [edit for edit in every if edit.kind == kind] for kind in KINDS}
    drawn: list[Edit] = []
    for mine in left.values():
        chance.shuffle(mine)
    while len(drawn) < count and any(left.values()):
        for mine in left.values():
            while mine and len(drawn) < count:
                drawn.append(mine.pop())
                if compiles(backend, drawn[-1]):
                    break
                drawn.pop()
    return drawn


def compiles(backend: str, edit: Edit) -> bool:
    """True where the edited file is Python still, and another program than before."""
    data = (folder_of(backend) / edit.file).read_bytes()
    try:
        return ast.dump(ast.parse(applied(data, edit.span))) != ast.dump(ast.parse(data))
    except SyntaxError:
        return False


def transplant(backend: str, edit: Edit | None, folder: Path) -> Path:
    """A copy of the backend's package in `folder`, under its own name, with the edit made; returns `folder`."""
    target = folder / folder_of(backend).name
    shutil.copytree(folder_of(backend), target, ignore=shutil.ignore_patterns("__pycache__"))
    if edit is not None:
        path = target / edit.file
        path.write_bytes(applied(path.read_bytes(), edit.span))
    return folder
