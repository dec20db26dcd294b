"""Drawn faults: the same from the same seed, every one a program of one line's difference."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsa_portable.conformance.selftest import edits
from dsa_portable.conformance.selftest.edits import KINDS, SOURCES, Source, draw, folder_of


@pytest.mark.parametrize("backend", SOURCES)
def test_a_seed_draws_the_same_edits_of_every_kind(backend: str) -> None:
    drawn = draw(backend, 15)
    assert drawn == draw(backend, 15)
    assert drawn[:8] == draw(backend, 8)
    assert drawn != draw(backend, 15, "another")
    assert {edit.kind for edit in drawn} == set(KINDS)
    assert len({(edit.file, edit.span) for edit in drawn}) == 15


@pytest.mark.parametrize("backend", SOURCES)
def test_a_drawn_edit_is_a_program_that_differs_in_one_line(backend: str, tmp_path: Path) -> None:
    for i, edit in enumerate(draw(backend, 15)):
        planted = edits.transplant(backend, edit, tmp_path / str(i)) / folder_of(backend).name / edit.file
        compile(planted.read_bytes(), edit.file, "exec")
        ours, theirs = (path.read_text().splitlines() for path in (folder_of(backend) / edit.file, planted))
        assert [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True), 1) if a != b] == [edit.line]
        assert (edit.before, edit.after) == (ours[edit.line - 1].strip(), theirs[edit.line - 1].strip())


def made(kind: str, text: str) -> Iterator[str]:
    source = Source(text.encode())
    for node in ast.walk(ast.parse(text)):
        yield from (edits.applied(source.data, span).decode() for span in KINDS[kind](node, source))


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("comparison", "(ä & b) < (c)", ["(ä & b) <= (c)"]),
        ("bound", "tl.minimum(a, b)", ["tl.maximum(a, b)", "(a)", "(b)"]),
        ("bound", "-(-a // b)", ["(a // b)"]),
        ("offset", "x[a:]", ["x[a + 1:]", "x[a - 1:]"]),
        ("offset", "a + 1", ["a"]),
        ("mask", "tl.load(p, mask=m, other=0)", ["tl.load(p)", "tl.load(p, mask=m)"]),
        ("mask", "where(m, a, b)", ["where(m, b, a)"]),
        ("mask", "a & b", ["(a)", "(b)"]),
        ("dtype", "np.float32", ["np.float16"]),
        ("constant", "a * 3", ["a * 4", "a * 6"]),
        ("operand", "a + b", ["a - b"]),
        ("operand", "a / (b + 1)", ["((b + 1) / (a))", "a / (b - 1)"]),
        ("operand", "f(a, b)", ["f(b, b)"]),
    ],
)
def test_a_kind_makes_these_edits(kind: str, text: str, expected: list[str]) -> None:
    assert list(made(kind, text)) == expected
