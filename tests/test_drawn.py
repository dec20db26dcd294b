"""Drawn faults: the same from the same seed, every one a program of one line's difference."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsa_portable.conformance import lists
from dsa_portable.conformance.judging.process import ONE_THREAD
from dsa_portable.conformance.selftest import drawn, edits
from dsa_portable.conformance.selftest.edits import KINDS, SOURCES, VARIABLES, Edit, Source, draw, folder_of


@pytest.mark.parametrize("backend", SOURCES)
def test_a_seed_draws_the_same_edits_of_every_kind(backend: str) -> None:
    found = draw(backend, 15)
    assert found == draw(backend, 15)
    assert found[:8] == draw(backend, 8)
    assert found != draw(backend, 15, "another")
    assert {edit.kind for edit in found} == set(KINDS)
    assert len({(edit.file, edit.span) for edit in found}) == 15


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


# --- the trial ----------------------------------------------------------------------------------------------------------------

CASES = ["attend-bf16-decode-flat", "attend-bf16-prefill-topk-length"]


def edit_of(file: str, old: str, new: str) -> Edit:
    data = (folder_of("cpu") / file).read_bytes()
    assert data.count(old.encode()) == 1
    start = data.index(old.encode())
    return Edit(file, 0, "constant", (start, start + len(old), new), old, new)


CHECK = "settings.check()  # before anything is written"
TRIED = {
    1: edit_of("sparse_attend.py", "topk_length[row]", "topk_length[row]) + int(1"),  # one entry too many
    2: edit_of("sparse_attend.py", CHECK, "__import__('os').abort()"),
    3: edit_of("sparse_attend.py", CHECK, "__import__('time').sleep(1000)"),
    4: edit_of("rows.py", "_E4M3 = ", "_E4M3 = no_such_name"),
    5: edit_of("index_select.py", "count <= topk", "count < topk"),  # of an operator that no case here calls
    6: edit_of("sparse_attend.py", "out / total[:, None], top", "out + total[:, None], top"),  # of keys that memory splits
    7: edit_of("numpy_engine.py", "q * np.float32(softmax_scale)) @ kv.T", "q @ kv.T) * np.float32(softmax_scale)"),
}


@pytest.mark.slow
def test_a_trial_ends_with_the_case_and_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**ONE_THREAD, **VARIABLES["cpu"]}.items():
        monkeypatch.setenv(name, value)
    said: list[str] = []
    proof = {(TRIED[6].file, TRIED[6].before, TRIED[6].after): "No call needs more than one step."}
    monkeypatch.setattr(drawn, "EQUIVALENT", proof)
    trials = drawn.run("cpu", TRIED, lists.load("smoke"), CASES, jobs=2, scale=0.05, say=said.append)
    found = {t.number: (t.result, t.killed_by.get("case"), t.killed_by.get("rule"), t.cases) for t in trials}
    assert found == {
        1: ("killed", CASES[1], "bound", 2),
        2: ("killed", CASES[0], "ERROR", 1),
        3: ("killed", CASES[0], "ERROR", 1),
        4: ("killed", CASES[0], "ERROR", 1),
        5: ("idle", None, None, 2),
        6: ("equivalent", None, None, 2),
        7: ("survived", None, None, 2),
    }
    assert ["SIGABRT" in trials[1].killed_by["reason"], "hangs" in trials[2].killed_by["reason"]] == [True, True]
    assert "no_such_name" in trials[3].killed_by["reason"]
    assert any(line.startswith(f"  1 killed by {CASES[1]} (bound) after 2 cases: sparse_attend.py") for line in said)
    assert json.loads(json.dumps(trials[5].row))["proof"] == "No call needs more than one step."


def test_show_prints_the_edits_and_tries_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = dict(os.environ)
    drawn.main(["--show", "--backend", "cuda", "--only", "2,15", "--out", str(tmp_path / "drawn.json")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["cuda", "2"], ["cuda", "15"]]
    assert not any(tmp_path.iterdir())
    assert dict(os.environ) == before
