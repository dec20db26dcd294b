"""The command line: every way of asking for what cannot be had is one sentence and one exit code; lists, table and export."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dsa_portable import Batch, __version__, cli, conformance, lightning_index, sparse_attend
from dsa_portable.backends.cpu.settings import ENGINES
from dsa_portable.conformance import lists
from dsa_portable.conformance.cases.catalogue import CASES
from tests import plugins

SMALL = "index-e4m3-f32-f32-decode-out"
RUN = ("conformance", "--list", "smoke", "--case", SMALL)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the contents of files; what importing a plug-in leaves behind does not count."""
    paths = [path for path in folder.rglob("*") if "__pycache__" not in path.parts]
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


# --- bad input -------------------------------------------------------------------------------------------------------------

SDK = "import no_such_sdk\n"
BAD: dict[str, tuple[Sequence[str], dict[str, str], int, str]] = {
    "unknown backend": (
        (*RUN, "--backend", "cqu"),
        {},
        4,
        r"backend 'cqu' is not registered, but .*cpu.* are; install or pick one\.",
    ),
    "unknown backend in the variable": (RUN, {"DSA_BACKEND": "cqu"}, 4, "backend 'cqu' is not registered, but .*cpu.* are; "),
    "the argument goes before the variable": ((*RUN, "--backend", "cqu"), {"DSA_BACKEND": "cpu"}, 4, "backend 'cqu' is not"),
    "not importable": (
        (*RUN, "--backend", "sdkless"),
        {},
        4,
        r"backend 'sdkless' cannot be imported \(ModuleNotFoundError: No module named 'no_such_sdk'\); "
        "run: pip install --force-reinstall sdkless_backend",
    ),
    "unknown list": (
        ("conformance", "--list", "cor"),
        {},
        2,
        "list 'cor' was never released, but smoke-2026.11, smoke-2026.12, core-2026.11.* were; name one of them, or smoke, .*",
    ),
    "unknown list of cases": (("conformance", "--list", "cor", "--list-cases"), {}, 2, "list 'cor' was never released"),
    "unknown case": (
        ("conformance", "--list", "smoke", "--case", "index-typo"),
        {},
        2,
        "case 'index-typo' is not on the list smoke-.*; see its ids with --list-cases.",
    ),
    "a pattern of nothing": (
        ("conformance", "--list", "smoke", "--case", "index-*-decode-out", "--case", "attend-f64-*"),
        {},
        2,
        r"pattern 'attend-f64-\*' matches no case of the list smoke-.*; see its ids with --list-cases.",
    ),
    "a case of another list": (
        ("conformance", "--list", "smoke", "--case", "index-e4m3-f32-f32-decode-long"),
        {},
        2,
        "is not on",
    ),
    "the report directory is a file": (
        (*RUN, "--out", "file"),
        {},
        2,
        r"the report directory file cannot be written \(File exists\); name one that can with --out",
    ),
    "the report directory lies below a file": (
        (*RUN, "--out", "file/below/it"),
        {},
        2,
        r"the report directory file/below/it cannot be written \(Not a directory\); name one that can with --out",
    ),
    "time limits of 0": ((*RUN, "--timeout-scale", "0"), {}, 2, "--timeout-scale is 0.0, but a positive number is accepted"),
    "time limits of nan": (
        (*RUN, "--timeout-scale", "nan"),
        {},
        2,
        "--timeout-scale is nan, but a positive number is accepted",
    ),
    "negative time limits": ((*RUN, "--timeout-scale=-1"), {}, 2, "--timeout-scale is -1.0, but a positive number is accepted"),
    "emulation that is not declared": (
        (*RUN, "--emulate", "chip9"),
        {},
        2,
        "backend 'cpu' emulates none, but --emulate chip9 was passed; name one of them.",
    ),
    "nothing to resume": ((*RUN, "--resume", "--out", "."), {}, 2, r"\. holds no interrupted run, but --resume was passed"),
    "show of nothing": (
        ("show", "failed/x.npz"),
        {},
        2,
        "failed/x.npz is not what a run kept of a failed case; pass",
    ),
    "show of a text": (("show", "file"), {}, 2, "file is not what a run kept of a failed case; pass failed/ID.npz of a report"),
    "export below a file": (
        ("export", "onnx", "file/models"),
        {},
        2,
        r"file/models cannot be written \(Not a directory\); name",
    ),
    "export onto a file": (("export", "onnx", "file"), {}, 2, r"file cannot be written \(File exists\); name a directory that"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    arguments, variables, code, message = BAD[name]
    plugins.module(tmp_path, "sdkless", source=SDK)
    (tmp_path / "file").write_text("not a directory")
    before = tree(tmp_path)
    done = plugins.dsa_portable(tmp_path, *arguments, **variables)
    assert done.returncode == code, done.stderr
    assert re.fullmatch(f"dsa-portable: .*{message}.*\n", done.stderr), done.stderr
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "DSA_CPU_ENGINE",
            "foo",
            f"DSA_CPU_ENGINE is 'foo', but {', '.join(ENGINES)} are engines; set one of them or unset it.",
        ),
        ("DSA_CPU_MEMORY", "12", "DSA_CPU_MEMORY is 12 bytes, but one tile needs at least 16777216; raise it."),
        ("DSA_CPU_MEMORY", "1G", "DSA_CPU_MEMORY is '1G', but a whole number >= 1 is accepted; set one or unset it."),
        ("DSA_CPU_THREADS", "0", "DSA_CPU_THREADS is '0', but a whole number >= 1 is accepted; set one or unset it."),
    ],
)
def test_a_wrong_setting_makes_the_backend_unavailable_and_no_case_fail(
    tmp_path: Path, variable: str, value: str, message: str
) -> None:
    done = plugins.dsa_portable(tmp_path, *RUN, "--out", "out", **{variable: value})
    assert (done.returncode, done.stderr) == (4, f"dsa-portable: {message}\n")
    assert not (tmp_path / "out").exists()
    listed = plugins.dsa_portable(tmp_path, "backends", **{variable: value})
    assert listed.returncode == 0
    assert f"cpu {__version__}: unavailable\n" in listed.stdout
    assert f"  reason      {message}\n" in listed.stdout


@pytest.mark.parametrize(
    "arguments", [(), ("conform",), ("export", "onnx"), ("export", "tosa", "x"), (*RUN, "--timeout-scale", "x")]
)
def test_a_command_that_is_none(tmp_path: Path, arguments: Sequence[str]) -> None:
    done = plugins.dsa_portable(tmp_path, *arguments)
    assert done.returncode == 2
    assert re.search(r"^dsa-portable.*: error: ", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "error"),
    [
        (("--backend", "cqu"), 4, "UnknownBackend"),
        (("--timeout-scale", "0"), 2, "UsageError"),
        (("--backend", "torn"), 2, "ZeroDivisionError"),
    ],
)
def test_a_traceback_for_those_who_ask(tmp_path: Path, arguments: Sequence[str], code: int, error: str) -> None:
    """The exit code is the same: Python's own for a traceback, 1, would say that a case failed."""
    plugins.module(tmp_path, "torn", "profile=lambda *_: 1 / 0")
    quiet = plugins.dsa_portable(tmp_path, *RUN, *arguments)
    asked = plugins.dsa_portable(tmp_path, "--traceback", *RUN, *arguments)
    assert (quiet.returncode, asked.returncode) == (code, code)
    assert "Traceback" not in quiet.stderr
    assert re.fullmatch("dsa-portable: .*\n", quiet.stderr)
    assert asked.stderr.startswith("Traceback")
    assert error in asked.stderr.splitlines()[-1]


def test_the_reader_of_a_pipe_may_leave(tmp_path: Path) -> None:
    command = [plugins.COMMAND, "conformance", "--list", "core", "--list-cases"]
    process = subprocess.Popen(
        command, env=plugins.environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) != 0


# --- what can be asked -----------------------------------------------------------------------------------------------------


def test_version(tmp_path: Path) -> None:
    done = plugins.dsa_portable(tmp_path, "--version")
    assert (done.returncode, done.stdout) == (0, f"dsa-portable {__version__}\n")
    module = [sys.executable, "-m", "dsa_portable.cli", "--version"]
    assert subprocess.run(module, capture_output=True, text=True, check=True).stdout == done.stdout


@pytest.mark.parametrize("level", ["smoke", "core-2026.11"])
def test_list_cases(tmp_path: Path, level: str) -> None:
    done = plugins.dsa_portable(tmp_path, "conformance", "--list", level, "--list-cases")
    assert (done.returncode, done.stderr) == (0, "")
    former = plugins.dsa_portable(tmp_path, "conformance", "--level", level, "--list-cases")
    assert (former.returncode, former.stdout) == (0, done.stdout)
    assert former.stderr == "dsa-portable: --level goes in dsa-portable 0.2.0; use --list.\n"
    shown = done.stdout.splitlines()
    assert shown[::2] == list(lists.load(level).cases)
    assert shown[1::2] == [f"    {CASES[id].why} [{', '.join(CASES[id].hazards)}]" for id in lists.load(level).cases]
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_name_is_of_the_cpu_backend_and_says_so(tmp_path: Path) -> None:
    done, report = plugins.conformance(tmp_path, "out", cases=[SMALL])
    assert "conformance of backend cpu (asked for: nothing, so cpu), list " in done.stdout.splitlines()[0]
    assert (report.backend.requested, report.backend.resolved) == ("", "cpu")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_is_told_whether_it_speaks_to_a_terminal(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def run(**arguments: Any) -> object:
        asked.update(arguments)
        return SimpleNamespace(exit_code=0)

    monkeypatch.setattr(conformance, "run", run)
    monkeypatch.setattr(cli, "_end_with_a_report", lambda: None)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    with pytest.raises(SystemExit) as end:
        cli.main(["conformance", "--backend", "cpu"])
    assert (end.value.code, asked["tty"], asked["fail_fast"]) == (0, terminal, False)


RUDE = {
    "ends": ("os._exit(0)", "ended with exit code 0 before it said what it is; tell its authors"),
    "crashes": ("os.kill(os.getpid(), 11)", "was killed by SIGSEGV before it said what it is; tell its authors"),
    "exits": ("sys.exit(0)", "cannot be imported (SystemExit: 0); run: pip install --force-reinstall exits_backend"),
}


def test_rude_plug_ins_cost_the_others_no_line(tmp_path: Path) -> None:
    for name, (misdeed, _) in RUDE.items():
        plugins.module(tmp_path, name, "", misdeed)
    done = plugins.dsa_portable(tmp_path, "backends")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    for name, (_, reason) in RUDE.items():
        assert lines[lines.index(f"{name}: unavailable") + 1] == f"  reason      backend {name!r} {reason}"
    assert any(re.fullmatch("cpu .*: available", line) for line in lines)


def test_backends(tmp_path: Path) -> None:
    plugins.module(tmp_path, "fine", "version='3', auto=False, arrays='torch', devices=('dsp', 'cpu')")
    plugins.module(tmp_path, "sdkless", source=SDK)
    plugins.module(tmp_path, "chipless", "probe=probe", "def probe():\n    raise DeviceUnavailable('no chip.')\n")
    plugins.module(tmp_path, "driverless", "probe=probe, install='pip install sdk'", "def probe():\n    import no_such_sdk\n")
    plugins.module(tmp_path, "mute", "capabilities=lambda device: 1 / 0")
    plugins.register(tmp_path, "absent", "absent_backend")
    done = plugins.dsa_portable(tmp_path, "backends")
    assert (done.returncode, done.stderr) == (0, "")
    blocks = {text.split()[0].rstrip(":"): text for text in re.split(r"\n(?=\S)", done.stdout)}
    assert list(blocks) == ["absent", "ascend", "chipless", "cpu", "cuda", "driverless", "fine", "mute", "sdkless"]
    cpu = blocks["cpu"]
    assert cpu.startswith(f"cpu {__version__}: available\n  arrays      numpy on cpu; contract 1.1\n  device      1 x ")
    assert re.search(r"^  device .*; engine onnx, python 3\.\d+\.\d+, numpy .*, onnxruntime \d", cpu, re.MULTILINE)
    assert re.search(r"^  lightning_index: format=e4m3/f32/f32,.*; heads=any; .*; return_scores=yes$", cpu, re.MULTILINE)
    assert "  sparse_attend: format=" in cpu
    assert "fine 3: available\n  arrays      torch on dsp, cpu; only by name; contract 1.1\n" in blocks["fine"]
    assert blocks["absent"].startswith(
        "absent: unavailable\n  reason      backend 'absent' cannot be imported (ModuleNotFoundError"
    )
    assert "run: pip install --force-reinstall absent_backend" in blocks["absent"]
    assert "sdkless: unavailable\n  reason      backend 'sdkless' cannot be imported" in blocks["sdkless"]
    assert "  reason      no chip.\n  cure        pip install 'dsa-portable[cpu]'\n" in blocks["chipless"]
    assert re.search(
        r"  reason      .*No module named 'no_such_sdk'.*; run: pip install sdk$", blocks["driverless"], re.MULTILINE
    )
    assert "mute 0.1.0: available\n" in blocks["mute"]
    assert "  declares    nothing that can be read (ZeroDivisionError: division by zero)" in blocks["mute"]


def test_what_a_backend_lacks_is_listed(tmp_path: Path) -> None:
    source = 'HAS = {k: v for k, v in CPU.capabilities(None)["sparse_attend"].items() if k not in ("attn_sink", "return_lse")}'
    plugins.module(tmp_path, "lean", "capabilities=lambda device: {'sparse_attend': HAS}", source)
    lean = plugins.dsa_portable(tmp_path, "backends").stdout.partition("\nlean ")[2]
    assert re.search(r"^  lightning_index: nothing; not offered: format, heads, ", lean, re.MULTILINE)
    assert re.search(r"^  sparse_attend: .*; not offered: return_lse, attn_sink$", lean, re.MULTILINE)


# --- export ----------------------------------------------------------------------------------------------------------------

RANDOM = np.random.default_rng(11)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    done = plugins.dsa_portable(folder, "export", "onnx", "new/models")
    assert (done.returncode, done.stderr) == (0, "")
    written = sorted((folder / "new" / "models").iterdir())
    assert done.stdout.splitlines() == [str(path.relative_to(folder)) for path in written]
    assert [path.name for path in written] == [
        *(f"lightning_index.{dtype}.onnx" for dtype in ("bfloat16", "float16", "float32", "float8_e4m3fn", "int8")),
        *(f"sparse_attend.{dtype}.onnx" for dtype in ("bfloat16", "float16", "float32")),
    ]
    return folder / "new" / "models"


def plain(path: Path, **feeds: Any) -> list[Any]:
    """Run a model as a stranger would: onnxruntime alone."""
    ort = pytest.importorskip("onnxruntime")
    found: list[Any] = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)
    return found


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_an_exported_index_is_the_operator(exported: Path, dtype: str) -> None:
    small = np.rint(RANDOM.normal(size=(600, 32)) * 3).astype(dtype)
    q, k = small[:280].reshape(7, 40, 32), small[280:]
    weights = RANDOM.integers(-8, 9, (7, 40)).astype(np.float32) / 8
    k_scale = np.exp2(RANDOM.integers(-3, 3, len(k))).astype(np.float32) if dtype == "int8" else None
    start, end = np.array([0, 0, 5, 100, 9, 0, 31], np.int32), np.array([320, 200, 305, 90, 10, 64, 319], np.int32)
    lengths = (np.array([0, 7], np.int32), np.array([320], np.int32))
    batch = Batch(
        cu_seqlens_q=lengths[0], seqlens_k=lengths[1], cu_seqlens_k=np.array([0, 320], np.int32), key_start=start, key_end=end
    )
    expected = lightning_index(q, k, weights, k_scale=k_scale, topk=64, batch=batch, return_scores=True, backend="cpu")
    got = plain(
        exported / f"lightning_index.{dtype}.onnx",
        q=q,
        k=k,
        weights=weights,
        k_scale=np.ones(320, np.float32) if k_scale is None else k_scale,
        key_start=start,
        key_end=end,
        topk=np.array([64]),
    )
    np.testing.assert_array_equal(got[0], expected[0])
    np.testing.assert_array_equal(got[1], expected[1])
    assert (expected[0] >= 0).sum(axis=1).tolist() == [64, 64, 64, 0, 1, 64, 64]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_exported_attention_is_the_operator(exported: Path, dtype: str) -> None:
    q, kv = RANDOM.normal(size=(5, 16, 48)).astype(dtype), RANDOM.normal(size=(200, 48)).astype(dtype)
    indices = RANDOM.integers(-20, 220, (5, 64)).astype(np.int32)
    indices[3] = -1
    scale = np.array(0.2, np.float32)
    expected = sparse_attend(q, kv, indices, softmax_scale=float(scale), value_dim=32, return_lse=True, backend="cpu")
    got = plain(
        exported / f"sparse_attend.{dtype}.onnx", q=q, kv=kv, indices=indices, softmax_scale=scale, value_dim=np.array([32])
    )
    np.testing.assert_allclose(got[0], expected[0], rtol=2e-3 if dtype == "float16" else 1e-5, atol=1e-6)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-6)
    assert (got[0][3] == 0).all()
    assert np.isneginf(got[1][3]).all()


@pytest.mark.parametrize("name", ["lightning_index.bfloat16", "lightning_index.float8_e4m3fn", "sparse_attend.bfloat16"])
def test_an_exported_model_of_a_dtype_that_numpy_lacks_loads(exported: Path, name: str) -> None:
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(exported / f"{name}.onnx"), providers=["CPUExecutionProvider"])
    assert name.split(".")[1].replace("_", "") in {re.sub(r"tensor\((.*)\)", r"\1", i.type) for i in session.get_inputs()}


def test_exporting_again_overwrites(exported: Path) -> None:
    path = exported / "lightning_index.int8.onnx"
    whole = path.read_bytes()
    path.write_bytes(b"old")
    done = plugins.dsa_portable(exported.parent, "export", "onnx", exported)
    assert done.returncode == 0
    assert path.read_bytes() == whole
