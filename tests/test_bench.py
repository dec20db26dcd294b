"""The bench command: its arithmetic by hand, its report whole, its refusals one sentence. No time is asserted."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from dsa_portable import registry
from dsa_portable.conformance.bench import bars, ceilings, curve, machine, markdown, peers, reference, run, timing
from dsa_portable.conformance.bench.bars import Bar
from dsa_portable.conformance.bench.plot import svg
from dsa_portable.conformance.bench.workloads import TABLE, Size, Workload, operands
from dsa_portable.errors import InvalidArgument, Unsupported
from tests import plugins

ATTEND = Workload("sparse_attend", 4, Size(6, 64, 8, 3), Size(2, 64, 8, 1), "bfloat16")
INDEX = Workload("lightning_index", 4, Size(6, 64, 8, 3), Size(4, 64, 8, 1), "float8_e4m3fn", causal=True)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested is what is told of a time, so one short round of each is enough."""
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "SETTLE", 0.0)
    monkeypatch.setattr(ceilings, "_of_numpy", lambda found: {"copy": (lambda: None, 8), "float32": (lambda: None, 8)})


def cpu() -> machine.Machine:
    return machine.Machine(registry.load("cpu"), registry.device("cpu"))


def done(out: Path, table: Sequence[Workload] = (ATTEND, INDEX), **options: Any) -> tuple[int, dict[str, Any], list[str]]:
    """(exit code, bench.json, lines) of a run on the cpu backend."""
    said: list[str] = []
    code = run.run(backend="cpu", out=out, table=table, say=said.append, **options)
    return code, json.loads((out / "bench.json").read_text()), said


# --- bars ---

A_CEILING = Bar("lightning_index", bars.CEILING, "copy", 0.0)
HARD = Bar("sparse_attend", bars.PEER, "NumPy eager", 1e9)
CHECKED: dict[str, Any] = {"check": True, "peers": ("NumPy eager",)}


def test_a_missed_bar_is_told_and_is_the_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars.judged, "__defaults__", ((A_CEILING,),))
    code, report, said = done(tmp_path / "met", **CHECKED)
    assert (code, [(b["against"], b["met"]) for b in report["bars"]]) == (0, [("copy", True)])
    monkeypatch.setattr(bars.judged, "__defaults__", ((A_CEILING, HARD),))
    code, report, said = done(tmp_path / "missed", **CHECKED)
    assert (code, [b["met"] for b in report["bars"]]) == (run.FAILED, [True, False])
    assert any(line.startswith("bar: sparse_attend") and line.endswith("1e+09 are asked: MISSED") for line in said)
    assert "| missed |" in (tmp_path / "missed" / "bench.md").read_text()
    code, report, _ = done(tmp_path / "unasked", peers=("NumPy eager",))
    assert (code, report["bars"]) == (0, [])


def test_what_was_not_measured_is_no_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars.judged, "__defaults__", ((Bar("lightning_index", bars.CEILING, "raw unicorns", 0.4),),))
    code, report, _ = done(tmp_path, **CHECKED)
    assert (code, [(b["measured"], b["met"]) for b in report["bars"]]) == (0, [(None, False)])


def test_bars_are_of_an_engine_and_of_a_point_of_a_curve() -> None:
    point = {"curve": "decode step of 1 request", "keys": 4096, "seconds": {"DSA": 2.0, "own kernel dense": 26.0}}
    found = {"backend": {"name": "cpu"}, "device": {"versions": {"engine": "jit"}}}
    report = {**found, "rows": [], "ceilings": {}, "curve": [point]}
    bar = Bar("decode", bars.DENSE, "own kernel dense", 12.0, keys=4096, versions={"engine": "jit"})
    assert [(b["measured"], b["met"]) for b in bars.judged(report, (bar,))] == [(13.0, True)]
    assert bars.judged(report, (replace(bar, keys=8192),)) == []
    assert bars.judged(report, (replace(bar, versions={"engine": "onnx"}),)) == []
    assert bars.judged(report, (replace(bar, backend="cuda"),)) == []


def test_ceilings_that_cannot_be_measured_cost_nothing_else() -> None:
    def broken() -> Any:
        raise ModuleNotFoundError("No module named 'onnx'")

    found, missing = ceilings.measure(replace(cpu(), backend=replace(registry.load("cpu"), ceilings=broken)))
    assert set(found) == {"copy", "float32"}
    assert missing == {"those of backend 'cpu'": "ModuleNotFoundError: No module named 'onnx'"}


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone begins to count anew")
def test_memory_is_what_a_call_takes_and_not_what_another_took() -> None:
    def takes(size: int) -> int:
        found = cpu().memory_of(lambda: np.ones(size, np.uint8).sum())
        assert found is not None
        return found

    takes(200 << 20)
    assert 45 << 20 < takes(50 << 20) < 100 << 20
    assert takes(1 << 10) < 10 << 20


def test_every_bar_is_about_calls_that_are_timed() -> None:
    names = [w.on(cpu()).name for w in TABLE]
    for bar in bars.BARS:
        if bar.kind == bars.DENSE:
            assert any(c.name.startswith(bar.call) and bar.keys in c.contexts for c in curve.SMALL)
        else:
            assert any(name.startswith(bar.call) and bar.within in name for name in names)
        if bar.kind == bars.PEER:
            assert bar.against in [peer.name for peer in peers.PEERS]


# --- the table's arithmetic ---


def test_attention_counts_what_is_selected() -> None:
    assert ATTEND.pairs == 6 * 8
    assert ATTEND.flops == 2 * 6 * 8 * 4 * (576 + 512)
    # kv: 3 requests of 2 rows with 8 keys each; q and out of 6 rows of 4 heads; indices.
    assert ATTEND.bytes_moved == 3 * 16 * 1152 + 6 * 4 * (576 + 512) * 2 + 6 * 8 * 4
    # No more keys are read than there are.
    many = replace(ATTEND, size=Size(100, 64, 8, 1))
    assert many.bytes_moved == 64 * 1152 + 100 * 4 * (576 + 512) * 2 + 100 * 8 * 4
    packed = replace(ATTEND, layout="v32_fp8_656_nsr")
    assert ATTEND.bytes_moved - packed.bytes_moved == 3 * 16 * (1152 - 656)


def test_the_index_counts_what_is_visible() -> None:
    # Of two rows at the end of 64 keys the first sees 63.
    assert INDEX.pairs == 3 * (63 + 64)
    assert replace(INDEX, causal=False).pairs == 3 * 2 * 64
    assert INDEX.flops == 2 * 3 * (63 + 64) * 4 * 128
    # keys with a scale, q and weights of 4 heads, indices.
    assert INDEX.bytes_moved == 3 * 64 * (128 + 4) + 6 * 4 * (128 + 4) + 6 * 8 * 4
    assert replace(INDEX, dtype="bfloat16").bytes_moved == 3 * 64 * 256 + 6 * 4 * (256 + 4) + 6 * 8 * 4


def test_the_bound_is_the_nearer_ceiling() -> None:
    known = {name: ceilings.Ceiling(name, rate) for name, rate in {"copy": 1e9, "bfloat16": 1e12}.items()}
    found = ceilings.bound(INDEX, known)
    assert found is not None
    # float8 was not measured, so the next wider product stands in for it; the copy is nearer.
    assert (found.ceiling.name, found.work) == ("copy", INDEX.bytes_moved)
    known["copy"] = ceilings.Ceiling("copy", 1e15)
    found = ceilings.bound(INDEX, known)
    assert found is not None
    assert (found.ceiling.name, found.seconds) == ("bfloat16", INDEX.flops / 1e12)
    assert ceilings.bound(INDEX, {}) is None


def test_every_row_of_the_table_has_a_name_of_its_own_at_both_sizes() -> None:
    for rows in (TABLE, [replace(w, size=w.small) for w in TABLE]):
        assert len({w.name for w in rows}) == len(rows)
        assert all(w.size.rows % w.size.requests == 0 and w.tiny().size.rows <= 256 for w in rows)
    assert {w.phase for w in TABLE} == {"prefill", "decode"}


@pytest.mark.parametrize("w", [ATTEND, INDEX, *TABLE[7:8], *TABLE[-1:]], ids=lambda w: w.name)
def test_a_call_of_the_table_is_what_the_reference_computes(w: Workload) -> None:
    """The reference and the operator were written apart; here they agree, flat and packed."""
    found, tiny = cpu(), replace(w.tiny(), size=Size(4, 96, 16, 2))
    data = operands(found, tiny)
    host, got = found.fetch(data), found.call(w.operator, data)
    if w.operator == "lightning_index":
        assert reference.why_not_selection(got, host) == ""
        assert reference.why_not_selection(reference.lightning_index(host, np.float64), host) == ""
    else:
        assert reference.why_not_attention(got, reference.sparse_attend, host, reference.ATTEND_SLACK) == ""


# --- a run ---


def test_contenders_have_their_turns_in_every_round_and_a_failed_one_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def broken() -> None:
        said.append("c")
        if said.count("c") > 2:
            raise RuntimeError("late")

    contenders = {"a": [lambda: said.append("a0"), lambda: said.append("a1")], "b": [lambda: said.append("b")], "c": [broken]}
    timings = timing.in_turn(cpu(), contenders)
    # Each once for every data set and once for an estimate, then two rounds; c fails in the first.
    assert said == ["a0", "a1", "a0", "b", "b", "c", "c", "a1", "b", "c", "a0", "b"]
    assert [isinstance(t, timing.Timing) for t in timings.values()] == [True, True, False]
    assert str(timings["c"]) == "late"


def test_what_is_not_offered_is_no_failure_and_no_measurement(tmp_path: Path) -> None:
    odd = replace(INDEX, dtype="float16", layout=None)
    unsupported = "capability"

    def refuse(self: machine.Machine, operator: str, data: machine.Operands) -> Any:
        raise Unsupported("not offered.", unsupported)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine.Machine, "call", refuse)
        code, report, _ = done(tmp_path, [odd])
    assert (code, report["rows"][0]["status"], report["evidence"]) == (3, "UNSUPPORTED", "EMULATED")


def test_a_run_writes_everything_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    code, report, said = done(tmp_path, [INDEX], check=True, command="dsa-portable bench")
    assert code == 0
    assert {"evidence", "device", "environment", "command", "started", "finished", "clocks", "ceilings"} <= set(report)
    assert report["evidence"] == "HARDWARE"
    assert report["environment"]["packages"]["numpy"] == np.__version__
    own = registry.load("cpu").ceilings
    assert own is not None
    assert set(report["ceilings"]) == {"copy", "float32", *own()}
    (row,) = report["rows"]
    assert (row["status"], row["rows"], row["requests"], row["reached"]) == ("OK", 4, 1, True)
    assert len(row["rounds"]) == 2
    assert row["ceiling"] in ("copy", "float32")
    assert row["peers"]["NumPy eager"]["ratio"] == row["peers"]["NumPy eager"]["seconds"] / row["seconds"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.md"]
    page = (tmp_path / "bench.md").read_text()
    assert row["name"] in page
    assert page.startswith("# HARDWARE: rates of backend cpu on ")
    assert "exit code 0" in said[-1]


def test_a_failing_workload_is_one_row_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call = machine.Machine.call

    def out_of_memory(self: machine.Machine, operator: str, data: machine.Operands) -> Any:
        if operator == "sparse_attend":
            raise MemoryError("no room\nat all")
        return call(self, operator, data)

    monkeypatch.setattr(machine.Machine, "call", out_of_memory)
    code, report, said = done(tmp_path)
    assert code == 1
    assert [(row["status"], row["reason"]) for row in report["rows"]] == [("ERROR", "MemoryError: no room\nat all"), ("OK", "")]
    assert any(line.endswith("ERROR  MemoryError: no room at all") for line in said)


def test_a_failing_peer_costs_its_ratio_and_not_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Any:
        raise RuntimeError("not on this chip")

    table = [
        replace(peers.PEERS[-1], name="built", build=broken),
        replace(peers.PEERS[-1], name="run", build=lambda *_: broken),
    ]
    monkeypatch.setattr(peers, "PEERS", table)
    code, report, _ = done(tmp_path)
    assert code == 0
    for row in report["rows"]:
        assert row["status"] == "OK"
        assert row["peers"] == {name: {"reason": "RuntimeError: not on this chip"} for name in ("built", "run")}


@pytest.mark.parametrize("operator", ["sparse_attend", "lightning_index"])
def test_the_check_catches_a_planted_wrong_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operator: str) -> None:
    call = machine.Machine.call

    def one_off(self: machine.Machine, name: str, data: machine.Operands) -> Any:
        result = call(self, name, data)
        if name == operator and name == "sparse_attend":
            result[1, 2, 3] += 1
        elif name == operator:
            result[1] = np.arange(result.shape[1])  # unique, visible, and not the best
        return result

    monkeypatch.setattr(machine.Machine, "call", one_off)
    code, report, _ = done(tmp_path, check=True)
    assert code == 1
    assert {row["operator"]: row["status"] for row in report["rows"] if row["status"] != "OK"} == {operator: "FAIL"}
    wrong = next(row for row in report["rows"] if row["status"] == "FAIL")
    assert (wrong["seconds"], wrong["rounds"]) == (None, [])
    assert re.search(r"^out\[1, 2, 3\] is|^row 1 left out a key", wrong["reason"])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([0, 0], "different indices"),
        ([0, -1], "different indices"),
        ([0, 3], "does not see"),
        ([0, 99], "does not see"),
    ],
)
def test_a_selection_that_breaks_the_structure_is_caught(row: list[int], reason: str) -> None:
    data = operands(cpu(), replace(INDEX, size=Size(1, 4, 2, 1)))
    batch = cpu().place(run_batch())
    host = cpu().fetch({**data, "batch": batch})
    assert reason in reference.why_not_selection(np.array([row], np.int32), host)


def run_batch() -> Any:
    """One row that sees the first three of four keys."""
    from dsa_portable import Batch

    start, end = np.array([0], np.int32), np.array([3], np.int32)
    return replace(Batch.dense(1, 4), key_start=start, key_end=end)


def test_a_wrong_peer_has_no_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = replace(peers.PEERS[-1], build=lambda found, w, data: lambda: np.zeros((w.size.rows, w.heads, 512), np.float32))
    monkeypatch.setattr(peers, "PEERS", [zeros])
    code, report, _ = done(tmp_path, [ATTEND], check=True)
    assert code == 0
    assert report["rows"][0]["peers"]["NumPy eager"]["reason"].startswith("wrong at a small size: out[")


def test_an_interrupt_leaves_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Any, w: Workload) -> Any:
        if w.operator == "lightning_index":
            raise KeyboardInterrupt
        return measured(self, w)

    measured = run._Run._measured
    monkeypatch.setattr(run._Run, "_measured", interrupted)
    code, report, _ = done(tmp_path)
    assert (code, report["interrupted"], len(report["rows"])) == (3, True, 1)


# --- the curves ---


def test_the_curve_compares_with_the_fastest_dense_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = (curve.Curve("decode step", 2, 1, 8, (64, 128), 4), curve.Curve("prefill chunk", 1, 6, 8, (64,), 4))
    monkeypatch.setattr(curve, "SMALL", small)
    code, report, _ = done(tmp_path, [INDEX], curve=True, check=True)
    assert (code, report["curve_check"]) == (0, {})
    assert [(p["curve"], p["keys"]) for p in report["curve"]] == [
        ("decode step", 64),
        ("decode step", 128),
        ("prefill chunk", 64),
    ]
    for point in report["curve"]:
        assert set(point["seconds"]) == {curve.DSA, curve.INDEX, "NumPy dense", "own kernel dense"}
        dense = min(point["seconds"][name] for name in ("NumPy dense", "own kernel dense"))
        assert point["gain"] == dense / point["seconds"][curve.DSA]
    for name in ("curve-decode.svg", "curve-prefill.svg"):
        assert f"({name})" in (tmp_path / "bench.md").read_text()
        ElementTree.parse(tmp_path / name)


def test_the_curve_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    call = machine.Machine.call
    monkeypatch.setattr(
        machine.Machine, "call", lambda self, name, data: call(self, name, data) * (1 if name == "lightning_index" else 2)
    )
    assert list(curve.check(cpu())) == [curve.DSA, "own kernel dense"]


def test_a_plot_is_well_formed_and_holds_every_point() -> None:
    root = ElementTree.fromstring(svg("a < b & c", "x", "y", {"one": [(1024, 0.5), (2048, 7)], "<two>": [(2048, 300.0)]}))
    space = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{space}circle")) == 3
    texts = [text.text for text in root.iter(f"{space}text")]
    assert {"a < b & c", "<two>", "1k", "2k", "0.5", "500"} <= set(texts)
    ElementTree.fromstring(svg("one point", "x", "y", {"one": [(1024, 3)]}))


def test_numbers_for_readers() -> None:
    assert markdown.spread((1.0, 1.1, 0.9, 1.0, 1.0)) == "±10%"
    assert markdown.rate(2.26e14, "FLOP/s") == "226 TFLOP/s"
    assert markdown.rate(1.428e15, "FLOP/s") == "1,428 TFLOP/s"
    assert [markdown.duration(s) for s in (0.0104, 1.82e-4, 2.5)] == ["10.4 ms", "182 us", "2.5 s"]


# --- bad input ---

LEAN = "capabilities=lambda device: {'sparse_attend': CPU.capabilities(None)['sparse_attend']}"
BAD: dict[str, tuple[Sequence[str], dict[str, str], int, str]] = {
    "unknown operator": (
        ("--op", "attend"),
        {},
        2,
        "--op is 'attend', but lightning_index or sparse_attend is accepted; name one of them.",
    ),
    "an operator that is not declared": (
        ("--backend", "lean", "--op", "lightning_index"),
        {},
        2,
        "--op is lightning_index, but backend 'lean' declares sparse_attend; name an operator that it declares, or another",
    ),
    "no such workload": (
        ("--only", "nothing"),
        {},
        2,
        "--only is 'nothing', but no workload has it in its name; take a part of",
    ),
    "unknown peer": (
        ("--peer", "FlashAttention"),
        {},
        2,
        "peer 'FlashAttention' is not known, but 'portable Triton', 'FlashMLA'",
    ),
    "a peer that is not there": (
        ("--peer", "FlashMLA"),
        {},
        2,
        "peer 'FlashMLA' was asked for, but it needs a CUDA device; leave",
    ),
    "a directory that cannot be": (("--out", "file/below"), {}, 2, "the report directory file/below cannot be written"),
    "an unknown backend": (("--backend", "cqu"), {}, 4, "backend 'cqu' is not registered"),
    "an interpreter": (
        ("--backend", "mock"),
        {},
        2,
        "backend 'mock' is SIMULATED or EMULATED here .*, but a rate is of a chip;",
    ),
    "a stand-in": (
        (),
        {"DSA_EMULATE": "A2"},
        2,
        r"backend 'cpu' is SIMULATED or EMULATED here \(DSA_EMULATE is set\), but a rate",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    arguments, variables, code, message = BAD[name]
    plugins.module(tmp_path, "lean", LEAN)
    probe = "probe=lambda: Device('cpu', 'an interpreter', 'none', 1, 'interpreter')"
    plugins.module(tmp_path, "mock", probe)
    (tmp_path / "file").write_text("not a directory")
    before = {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}
    found = plugins.dsa_portable(tmp_path, "bench", *arguments, **variables)
    assert found.returncode == code, found.stdout + found.stderr
    assert re.fullmatch(f"dsa-portable: .*{message}.*\n", found.stderr), found.stderr
    assert {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts} == before


def test_an_operator_that_is_not_declared_is_left_out_of_a_run_of_all() -> None:
    found = machine.Machine(
        replace(cpu().backend, capabilities=lambda device: {"sparse_attend": {"heads": (4,)}}), cpu().device
    )
    assert [w.operator for w in run._workloads(found, [ATTEND, INDEX], None, "")] == ["sparse_attend"]
    with pytest.raises(InvalidArgument, match="declares sparse_attend"):
        run._workloads(found, [ATTEND, INDEX], "lightning_index", "")
