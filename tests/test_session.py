"""Real runs of the command: what a run leaves behind, plug-ins that misbehave in every way, interruption, planted faults."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dsa_portable.conformance import lists
from dsa_portable.conformance.cases.catalogue import CASES as CASES_BY_ID
from dsa_portable.conformance.cases.lightning_index import IndexCase
from dsa_portable.conformance.execute import arrays_file, recording
from dsa_portable.conformance.judging.again import ASKED_AGAIN
from dsa_portable.conformance.judging.judge import examine, judge
from dsa_portable.conformance.report import schema
from dsa_portable.conformance.report.schema import Evidence, Report, Status
from dsa_portable.conformance.selftest.plant import FileEdit, PlantError
from tests import plugins
from tests.plugins import conformance

HEAD = "index-e4m3-f32-f32"
SMALL = f"{HEAD}-decode-out"  # milliseconds, in and out
CASES = len(lists.load("smoke").cases)
FILES = ("report.json", "junit.xml", "ctrf.json", "summary.md")
Folder = Callable[[str], Path]
Run = tuple[subprocess.CompletedProcess[str], Report]


def rows(report: Report) -> dict[str, schema.CaseResult]:
    return {row.id: row for row in report.cases}


def seen(report: Report) -> dict[str, schema.CaseResult]:
    return {row.id: row for row in report.cases if row.status is not Status.NOT_RUN}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


# --- a whole run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def smoke(folder: Path) -> Run:
    return conformance(folder, "smoke", twice=True, DSA_BACKEND="cpu")


def test_a_whole_run(smoke: Run, folder: Path) -> None:
    done, report = smoke
    assert (done.returncode, done.stderr) == (0, "")
    assert {row.status for row in report.cases} == {Status.PASS}
    assert [row.id for row in report.cases] == list(lists.load("smoke").cases)
    assert (report.evidence, report.level) == (Evidence.HARDWARE, None)
    assert {claim.reason for claim in report.claims} == {f"the list {report.list.name} grants no level"}
    assert (report.backend.requested, report.backend.resolved) == ("cpu", "cpu")
    assert report.run.workers_replaced == 0
    assert not report.run.interrupted
    assert not report.run.resumed
    assert min(report.run.peak_memory_bytes.values()) > 10 << 20
    assert {path.name for path in (folder / "smoke").iterdir()} == {*FILES, "recordings"}


def test_the_first_and_the_last_line_carry_the_evidence(smoke: Run) -> None:
    lines = smoke[0].stdout.splitlines()
    assert lines[0].startswith(f"conformance of backend cpu (asked for: cpu), list {smoke[1].list.name}, evidence ")
    assert lines[-1] == smoke[1].verdict
    assert "(HARDWARE), but no level is granted" in lines[-1]


def test_a_whole_run_has_a_line_and_a_recording_per_case(smoke: Run, folder: Path) -> None:
    shown = re.findall(rf"^\[ *(\d+)/{CASES}  .*\] PASS +(\S+)", smoke[0].stdout, re.MULTILINE)
    assert shown == [(str(i), row.id) for i, row in enumerate(smoke[1].cases, start=1)]
    subject = recording.load_subject(folder / "smoke" / "recordings")
    assert subject is not None
    assert (subject.backend, subject.list_sha256) == ("cpu", smoke[1].list.sha256)
    ids = [row.id for row in smoke[1].cases]
    files = {f"{id}.{kind}" for id in ids for kind in ("json", "npz")} | {"subject.json", "outcomes.jsonl"}
    assert {path.name for path in (folder / "smoke" / "recordings").iterdir()} == files


def test_a_recording_and_its_subject_are_all_that_a_judge_needs(smoke: Run, folder: Path) -> None:
    recordings = folder / "smoke" / "recordings"
    subject, found = recording.load_subject(recordings), recording.load(recordings, SMALL)
    assert subject is not None
    assert found is not None
    assert judge(CASES_BY_ID[SMALL], found, subject) == rows(smoke[1])[SMALL]
    indices = found.outputs[0]["indices"].copy()
    indices[0, 0] = indices[0, 1]
    outputs = [{"indices": indices}]
    other = replace(found, outputs_sha256=recording.outputs_sha256(outputs))
    assert judge(CASES_BY_ID[SMALL], with_outputs(other, outputs), subject).rule == "unique"
    spoilt = judge(CASES_BY_ID[SMALL], with_outputs(found, outputs), subject)
    assert (spoilt.status, spoilt.reason) == (Status.ERROR, f"the recorded outputs of {SMALL} are not those that were hashed")


def with_outputs(found: recording.Recording, outputs: list[dict[str, np.ndarray]]) -> recording.Recording:
    """The same recording beside another file of outputs."""
    assert found.folder is not None
    elsewhere = found.folder.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    recording.save(elsewhere, found, outputs)
    return replace(found, folder=elsewhere)


def test_the_other_engine(folder: Path) -> None:
    cases = [f"{HEAD}-prefill-lattice", f"{HEAD}-prefill-cancel", "attend-bf16-decode-lse", "attend-bf16-prefill-onehot"]
    _, report = conformance(folder, "numpy", cases=cases, DSA_CPU_ENGINE="numpy")
    assert report.device is not None
    assert report.device.versions["engine"] == "numpy"
    assert {id: row.status for id, row in seen(report).items()} == dict.fromkeys(cases, Status.PASS)
    assert (report.exit_code, report.evidence) == (0, Evidence.HARDWARE)
    assert report.environment.variables["DSA_CPU_ENGINE"] == "numpy"


# --- plug-ins that misbehave -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deed:
    """What the backend does in one call, a function body over `request` and `answer`, and the row that must come of it."""

    case: str
    body: str
    status: str = "ERROR"
    reason: str = ""
    rule: str | None = None


# In the order of the list, each in one run with all others; an ERROR costs the process, and the next deed has a fresh one.
DEEDS = {
    "honest": Deed("decode-lengths", "return answer(request)", "PASS"),
    "crash": Deed("decode-paged64", "os.kill(os.getpid(), signal.SIGSEGV)", reason="process was killed by SIGSEGV$"),
    "padding rows unwritten": Deed(
        "prefill-ragged",
        "empty = np.empty(request.results['indices'][1], np.int32)\n    empty[:-3] = answer(request)[:-3]\n    return empty",
        "FAIL",
        r"\(padding row\): entry 0 is 2147483647, expected -1",
        "tail",
    ),
    "exit": Deed("prefill-paged64", "os._exit(3)", reason="process ended with exit code 3$"),
    "memory": Deed("prefill-lattice", "raise MemoryError('40 GiB')", reason="out of memory: 40 GiB"),
    "exception": Deed("decode-scores", r"raise RuntimeError('first\nsecond \x1b[31m')", reason="^RuntimeError: first\nsecond"),
    "one of two results": Deed("prefill-scores", "return answer(request)[0]", "FAIL", "1 arrays for indices, scores", "result"),
    "prints": Deed(
        "prefill-cancel",
        r"""print('{"status": "done"}', flush=True); os.write(1, b'{"status": "done"}\n'); return answer(request)""",
        "PASS",
    ),
    "hang": Deed(
        "prefill-plateau", "time.sleep(3600)", reason="no answer within 6 s: it hangs, or --timeout-scale is too small"
    ),
    "asks the oracle": Deed(
        "prefill-range",
        "from dsa_portable.conformance.judging import oracle",
        reason="ImportError: dsa_portable.conformance.judging cannot be imported in the process that runs a backend",
    ),
    "writes inputs": Deed(
        "decode-range",
        "found = answer(request); request.weights[0] = 0; request.batch.block_table[0, 0] = 1; return found",
        "FAIL",
        "wrote to its inputs: weights, block_table$",
        "inputs",
    ),
    "refuses": Deed(
        "prefill-not-causal",
        "raise Unsupported('not today.', 'non_causal')",
        "FAIL",
        "^refused without having declared it: not today.$",
        "capability",
    ),
    "leaves": Deed(
        "prefill-visible-nan",
        "sys.exit(0)",
        reason=r"BackendExited: backend 'rogue' called sys.exit\(0\), which it must not",
    ),
    "dtype": Deed(
        "prefill-unsorted", "return answer(request).astype(np.int64)", "FAIL", "indices is int64 .*expected int32", "result"
    ),
    "caller's rows unwritten": Deed(
        "decode-out",
        "before = request.out[0][-1].copy(); answer(request); request.out[0][-1] = before",
        "FAIL",
        r"\(padding row\): entry 0 is 2147483647, expected -1",
        "tail",
    ),
    "shape": Deed(
        "prefill-planar", "return answer(request)[:, 1:]", "FAIL", r"indices is int32 \[24, 2047\], expected", "result"
    ),
    "other bytes": Deed(
        "prefill-interleaved",
        "global corrupt; found = answer(request); corrupt = True; return found",
        reason="RuntimeError: the device returned other bytes than were put on it",
    ),
    "foreign dtype": Deed(
        "prefill-topk1",
        "return answer(request).astype(ml_dtypes.float8_e5m2)",
        "FAIL",
        "^the call returned float8_e5m2 for indices$",
        "result",
    ),
    "no array": Deed("prefill-topk512", "return None", "FAIL", "^the call returned object for indices$", "result"),
    "nothing written": Deed(
        "decode-flat", "return np.empty(request.results['out'][1], request.q.dtype)", "FAIL", "out is nan", "nan"
    ),
    "honest to the end": Deed("prefill-onehot", "return answer(request)", "PASS"),
}
DEEDS_SOURCE = (
    """
corrupt = False
LOG = Path(__file__).with_name("calls.txt")

def get(array):
    found = np.array(array)
    return np.roll(found, 1) if corrupt else found

def index(request):
    return deed(request, lightning_index)

def attend(request):
    return deed(request, sparse_attend)

def deed(request, answer):
    with open(LOG, "a+") as log:
        log.seek(0)
        number = len(log.readlines())
        log.write(f"{os.getpid()}\\n")
    return DEEDS[number](request, answer)
"""
    + "".join(f"\ndef deed{i}(request, answer):\n    {deed.body}\n" for i, deed in enumerate(DEEDS.values()))
    + f"\nDEEDS = [{', '.join(f'deed{i}' for i in range(len(DEEDS)))}]\n"
)


def id_of(deed: Deed) -> str:
    attend = deed.case in ("decode-flat", "prefill-onehot")
    return f"attend-bf16-{deed.case}" if attend else f"{HEAD}-{deed.case}"


@pytest.fixture(scope="session")
def misdeeds(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[int]]:
    """One run of all deeds, and the process that each call was made in."""
    folder = tmp_path_factory.mktemp("misdeeds")
    plugins.module(folder, "rogue", "operators=OURS, get=get", DEEDS_SOURCE)
    cases = [id_of(deed) for deed in DEEDS.values()]
    assert cases == [id for id in lists.load("smoke").cases if id in cases]
    run = conformance(folder, "out", "--backend", "rogue", "--timeout-scale", "0.05", cases=cases)
    return run, [int(line) for line in (folder / "calls.txt").read_text().split()]


@pytest.mark.parametrize("name", DEEDS)
def test_a_misdeed_is_one_row(misdeeds: tuple[Run, list[int]], name: str) -> None:
    (done, report), _ = misdeeds
    row = rows(report)[id_of(DEEDS[name])]
    assert (row.status, row.rule) == (DEEDS[name].status, DEEDS[name].rule), row.reason
    assert re.search(DEEDS[name].reason, row.reason), row.reason
    shown = [line for line in done.stdout.splitlines() if re.match(rf"\[.*\] {row.status} +{row.id} ", line)]
    assert len(shown) == 1
    assert shown[0].isprintable()
    assert (row.artefact is not None) == (row.status in (Status.FAIL, Status.ERROR))


def test_misdeeds_cost_no_other_case(misdeeds: tuple[Run, list[int]]) -> None:
    (done, report), processes = misdeeds
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1].startswith("FAILED: ")
    assert len(seen(report)) == len(DEEDS)
    tried, again = processes[: len(DEEDS)], processes[len(DEEDS) :]
    assert len(again) == len(set(again) - set(tried)) == ASKED_AGAIN, "alone, and what it answers then changes no verdict"
    replaced = [before != after for before, after in pairwise(tried)]
    assert replaced == [deed.status == "ERROR" for deed in [*DEEDS.values()][:-1]]
    assert report.run.workers_replaced == sum(replaced)
    assert report.evidence is Evidence.HARDWARE, "a call that was refused says nothing about where the others ran"


def test_a_profile_is_asked_once_and_before_the_first_case(tmp_path: Path) -> None:
    source = """
LOG = Path(__file__).with_name("asked.txt")

def profile(device, *key):
    with open(LOG, "a") as log:
        log.write(f"{key}\\n")
    return CPU.profile(device, *key)

def index(request):
    with open(LOG, "a") as log:
        log.write("case\\n")
    return lightning_index(request)

attend = sparse_attend
"""
    plugins.module(tmp_path, "asked", "operators=OURS, profile=profile", source)
    cases = [f"{HEAD}-decode-out", f"{HEAD}-prefill-lattice"]
    done, _ = conformance(tmp_path, "out", "--backend", "asked", cases=cases)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "asked.txt").read_text().splitlines()
    asked = [line for line in said if line != "case"]
    assert len(asked) == len(set(asked)) == 6, "the claims of smoke"
    assert said.index("case") == len(asked), "what is wrong with a declaration shows before a case is run"


def test_inputs_that_share_memory_with_the_host_are_watched_too(tmp_path: Path) -> None:
    source = """
def index(request):
    found = lightning_index(request)
    request.weights[0] = 0
    return found

attend = sparse_attend
"""
    plugins.module(tmp_path, "shares", "operators=OURS, put=lambda array: array", source)
    case = f"{HEAD}-decode-lengths"
    done, report = conformance(tmp_path, "out", "--backend", "shares", cases=[case])
    assert done.returncode == 1
    assert (rows(report)[case].status, rows(report)[case].rule) == (Status.FAIL, "inputs")
    assert rows(report)[case].reason == "the call wrote to its inputs: weights"


def test_the_report_of_a_former_run_does_not_outlive_the_start_of_the_next(tmp_path: Path) -> None:
    source = """
def index(request):
    if Path(__file__).with_name("kill").exists():
        os.kill(os.getppid(), signal.SIGKILL)
    return np.zeros(*request.results["indices"][::-1])

attend = sparse_attend
"""
    plugins.module(tmp_path, "killer", "operators=OURS", source)
    arguments = ("conformance", "--backend", "killer", "--list", "smoke", "--case", f"{HEAD}-decode-lengths", "--out", "out")
    assert plugins.dsa_portable(tmp_path, *arguments).returncode == 1
    out, left = tmp_path / "out", {*FILES, "recordings", "failed"}
    assert {path.name for path in out.iterdir()} == left
    assert {path.suffix for path in (out / "failed").iterdir()} == {".npz", ".txt"}
    (tmp_path / "kill").touch()
    assert plugins.dsa_portable(tmp_path, *arguments).returncode == -signal.SIGKILL
    assert {path.name for path in out.iterdir()} == {"recordings", "failed", ".lock"}
    assert not list((out / "failed").iterdir())


@pytest.mark.parametrize("asked", ["capabilities", "profile"])
def test_a_declaration_that_exits_is_no_success(tmp_path: Path, asked: str) -> None:
    plugins.module(tmp_path, "gone", f"{asked}=lambda *_: sys.exit(0)")
    done = plugins.dsa_portable(tmp_path, "conformance", "--backend", "gone", "--out", str(tmp_path / "out"))
    assert done.returncode == 4
    assert done.stderr == "dsa-portable: backend 'gone' called sys.exit(0), which it must not; tell its authors.\n"
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_process_that_cannot_be_replaced_ends_the_run(tmp_path: Path) -> None:
    source = """
def probe():
    seen = Path(__file__).with_name("seen")
    if seen.exists():
        raise DeviceUnavailable("the chip fell off the bus.")
    seen.touch()
    return CPU.probe()

def index(request):
    os.abort()
"""
    plugins.module(tmp_path, "dying", "operators=OURS, probe=probe", source)
    cases = [f"{HEAD}-decode-scores", f"{HEAD}-decode-range", SMALL]
    done, report = conformance(tmp_path, "out", "--backend", "dying", cases=cases)
    first, *others = (rows(report)[case] for case in cases)
    assert (done.returncode, first.status) == (1, Status.ERROR)
    assert "killed by SIGABRT" in first.reason
    assert {(row.status, row.reason) for row in others} == {
        (Status.NOT_RUN, "the backend could not be started again: the chip fell off the bus.")
    }


@pytest.mark.parametrize(
    ("probe", "message", "scale"),
    [
        ("raise DeviceUnavailable('no chip in this machine.')", "no chip in this machine.", 1),
        ("raise KeyError('bus')", r"backend 'shy' failed its probe \(KeyError\('bus'\)\); check driver and device.", 1),
        ("os._exit(9)", "backend 'shy' could not be started: the backend's process ended with exit code 9.", 1),
        ("time.sleep(3600)", "backend 'shy' could not be started: no answer within 3.6 s: it hangs, or --timeout-scale", 0.02),
        ("import no_such_sdk", "No module named 'no_such_sdk'.*; run: pip install 'dsa-portable", 1),
    ],
)
def test_a_backend_that_does_not_start(tmp_path: Path, probe: str, message: str, scale: float) -> None:
    plugins.module(tmp_path, "shy", "probe=probe", f"def probe():\n    {probe}\n")
    words = ("conformance", "--list", "smoke", "--backend", "shy", "--out", "out", "--timeout-scale", scale)
    done = plugins.dsa_portable(tmp_path, *words)
    assert done.returncode == 4
    assert re.fullmatch(f"dsa-portable: .*{message}.*\n", done.stderr)
    assert not (tmp_path / "out").exists()


# --- what a backend can do to the run itself -------------------------------------------------------------------------------

SLIPS = {
    "ends in its import": ("os._exit(0)", "", 4, "could not be started: the backend's process ended with exit code 0"),
    "exits in its import": ("sys.exit(0)", "", 4, r"cannot be imported \(SystemExit: 0\)"),
    "ends in its capabilities": ("", "capabilities=lambda *_: os._exit(0)", 4, "process ended with exit code 0"),
    "ends in a profile": ("", "profile=lambda *_: os._exit(0)", 4, "process ended with exit code 0"),
    "is killed in its probe": ("", "probe=lambda: os.kill(os.getpid(), 9)", 4, "process was killed by SIGKILL"),
    "declares nonsense": ("", "capabilities=lambda *_: {'lightning_index': 3}", 2, "has 'lightning_index' -> 3"),
    "has a version of no meaning": ("", "version=3", 2, "Backend.version is 3, but one line of text is accepted"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_before_the_first_case_is_one_sentence_and_no_success(tmp_path: Path, slip: str) -> None:
    source, changes, code, sentence = SLIPS[slip]
    plugins.module(tmp_path, "slip", changes, source)
    done = plugins.dsa_portable(tmp_path, "conformance", "--backend", "slip", "--list", "smoke", "--out", "out")
    assert done.returncode == code, done.stdout + done.stderr
    assert re.fullmatch(f"dsa-portable: .*{sentence}.*\n", done.stderr), done.stderr
    assert not (tmp_path / "out").exists()


def test_a_backend_s_code_runs_in_its_own_process_alone(tmp_path: Path) -> None:
    source = """
with open(Path(__file__).with_name("who"), "a") as who:
    who.write(" ".join(sys.orig_argv) + "\\n")
"""
    plugins.module(tmp_path, "seen", "", source)
    conformance(tmp_path, "out", "--backend", "seen", cases=[SMALL])
    processes = (tmp_path / "who").read_text().splitlines()
    assert processes
    assert all("dsa_portable.conformance.execute.worker" in line for line in processes)


# Each in one case of one run: a function's body, and what becomes of the case. An honest case comes after each.
TRICKS = {
    "a child that comes back too": ("os.fork(); return answer(request)", Status.PASS, ""),
    "a child that goes on alone": (
        "if os.fork():\n        os._exit(3)\n    time.sleep(60)",
        Status.ERROR,
        "ended with exit code 3",
    ),
    "an answer in the suite's name": (
        'answers(b\'{"case": "x"}\\n\'); return answer(request)',
        Status.ERROR,
        "answered what is no answer",
    ),
    "a line in between": ("answers(b'42\\n'); return answer(request)", Status.ERROR, "answered what is no answer: '42'"),
    "another json": ("import json; json.dumps = json.loads = None; return answer(request)", Status.ERROR, "TypeError"),
    "another clock": ("time.perf_counter = lambda: 'noon'; return answer(request)", Status.ERROR, "TypeError"),
    "a folder that is gone": (
        "import shutil; shutil.rmtree(Path.cwd() / 'out' / 'recordings'); return answer(request)",
        Status.ERROR,
        "No such file",
    ),
}
TRICKS_SOURCE = """
import fcntl, stat

def answers(line):
    for fd in range(3, 30):
        try:
            if stat.S_ISFIFO(os.fstat(fd).st_mode) and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
                os.write(fd, line)
        except OSError:
            pass

def index(request):
    calls = Path(__file__).with_name("calls")
    number = len(calls.read_text()) if calls.exists() else 0
    calls.write_text("x" * (number + 1))
    tricky = number % 2 == 0 and number // 2 < len(TRICKS)
    return TRICKS[number // 2](request, lightning_index) if tricky else lightning_index(request)

attend = sparse_attend
""" + "".join(f"\ndef trick{i}(request, answer):\n    {body}\n" for i, (body, *_) in enumerate(TRICKS.values()))
TRICKS_SOURCE += f"\nTRICKS = [{', '.join(f'trick{i}' for i in range(len(TRICKS)))}]\n"


def test_a_trick_costs_one_row(tmp_path: Path) -> None:
    plugins.module(tmp_path, "tricky", "operators=OURS", TRICKS_SOURCE)
    single = [id for id in lists.load("smoke").cases if id.startswith("index-") and isinstance(CASES_BY_ID[id], IndexCase)]
    cases = single[: 2 * len(TRICKS)]
    started = time.monotonic()
    _, report = conformance(tmp_path, "out", "--backend", "tricky", cases=cases)
    assert time.monotonic() - started < 90, "what a dead process has left is not waited for"
    for (name, (_, status, reason)), tricked, other in zip(TRICKS.items(), cases[::2], cases[1::2], strict=True):
        assert rows(report)[tricked].status is status, (name, rows(report)[tricked].reason)
        assert reason in rows(report)[tricked].reason
        assert rows(report)[other].status is Status.PASS, (name, rows(report)[other].reason)


def gone(pid: int) -> bool:
    """Soon."""
    until = time.monotonic() + 10
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(pid)


def test_a_child_that_leaves_the_session_does_not_outlive_the_run(tmp_path: Path) -> None:
    source = """
def index(request):
    child = os.fork()
    if not child:
        os.setsid()
        if os.fork():
            os._exit(0)
        Path(__file__).with_name("child").write_text(str(os.getpid()))
        time.sleep(3600)
    return lightning_index(request)

attend = sparse_attend
"""
    plugins.module(tmp_path, "breeder", "operators=OURS", source)
    conformance(tmp_path, "out", "--backend", "breeder", cases=[SMALL])
    assert gone(int((tmp_path / "child").read_text()))


HANGS = """
def index(request):
    Path(__file__).with_name("pid").write_text(str(os.getpid()))
    print("hanging", flush=True)
    Path(__file__).with_name("hangs").touch()
    time.sleep(3600)

attend = sparse_attend
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGHUP])
def test_a_run_that_ends_takes_a_hanging_backend_with_it(tmp_path: Path, how: signal.Signals) -> None:
    plugins.module(tmp_path, "stuck", "operators=OURS", HANGS)
    process = subprocess.Popen(
        [plugins.COMMAND, "conformance", "--list", "smoke", "--backend", "stuck", "--out", "out"],
        cwd=tmp_path,
        env=plugins.environment(tmp_path),
        stdout=subprocess.DEVNULL,
        preexec_fn=plugins.listen,
    )
    until = time.monotonic() + 60
    while not (tmp_path / "hangs").exists() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(how)
    assert process.wait(30) == (3 if how is signal.SIGHUP else -signal.SIGKILL)
    assert gone(int((tmp_path / "pid").read_text()))
    assert (tmp_path / "out" / "report.json").exists() == (how is signal.SIGHUP)


def test_two_runs_in_one_directory(tmp_path: Path) -> None:
    plugins.module(tmp_path, "stuck", "operators=OURS", HANGS)
    words = [plugins.COMMAND, "conformance", "--list", "smoke", "--backend", "stuck", "--out", "out"]
    first = subprocess.Popen(words, cwd=tmp_path, env=plugins.environment(tmp_path), stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "hangs").exists() and time.monotonic() < until:
            time.sleep(0.05)
        second = plugins.dsa_portable(tmp_path, *words[1:4], "--backend", "cpu", "--out", "out")
    finally:
        first.kill()
        first.wait()
    assert (second.returncode, second.stdout) == (2, "")
    assert second.stderr == (
        "dsa-portable: another run is writing into out; wait until it has ended, or name another directory with --out.\n"
    )
    third = plugins.dsa_portable(tmp_path, *words[1:4], "--backend", "cpu", "--out", "out", "--case", SMALL)
    assert "another run" not in third.stderr, "what a killed run held is free"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no such device")
def test_a_full_disk_loses_no_verdict(tmp_path: Path) -> None:
    """The report cannot be written; what was said of it stays, and --resume makes it without asking a case again."""
    code = "import errno, os, sys\nfrom dsa_portable.conformance.report import write\n"
    code += "def full(*_):\n    raise OSError(errno.ENOSPC, 'No space left on device')\n"
    code += "write.os = type('os', (), {**vars(os), 'fsync': full})\nfrom dsa_portable.cli import main\nmain()"
    words = ("conformance", "--list", "smoke", "--backend", "cpu", "--out", "out", "--case", SMALL)
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=tmp_path,
        env=plugins.environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert f"no failure in the 1 case asked for, of {CASES} (HARDWARE); no level is granted" in done.stdout
    assert re.fullmatch(
        "dsa-portable: the report directory out cannot be written .No space left on device.; .*--resume.*\n", done.stderr
    )
    again = plugins.dsa_portable(tmp_path, *words, "--resume")
    assert (again.returncode, again.stderr) == (0, "")


# --- what is wrong now and then -------------------------------------------------------------------------------------------

FICKLE = """
def index(request):
    mark = Path(__file__).with_name("calls")
    with open(mark, "a+") as calls:
        calls.seek(0)
        number = len(calls.read())
        calls.write("x")
    found = lightning_index(request)
    return np.zeros_like(found) if number in WRONG else found

attend = sparse_attend
"""


def fickle(folder: Path, *wrong: int, changes: str = "") -> None:
    """A backend that is wrong in these calls, counted over all its processes."""
    plugins.module(folder, "fickle", f"operators=OURS{changes}", f"WRONG = {wrong}\n{FICKLE}")


def test_a_failure_that_passes_when_it_is_asked_again_is_flaky(tmp_path: Path) -> None:
    """However often it is asked again."""
    case = f"{HEAD}-decode-lengths"
    fickle(tmp_path, 0)
    _, first = conformance(tmp_path, "out", "--backend", "fickle", cases=[case, SMALL])
    assert [rows(first)[id].status for id in (case, SMALL)] == [Status.FAIL, Status.PASS]
    for _ in range(2):
        done, again = conformance(tmp_path, "out", "--backend", "fickle", "--resume", cases=[case])
        row = rows(again)[case]
        assert (row.status, done.returncode, again.level) == (Status.FLAKY, 1, None)
        assert row.attempts[0].status is Status.FAIL
        assert row.attempts[0].rule == rows(first)[case].rule
        assert re.match(r"passed at attempt \d, after FAIL: row 0 ", row.reason)
        assert rows(again)[SMALL].status is Status.PASS
        assert not rows(again)[SMALL].attempts
    assert "FLAKY" in done.stdout


def test_a_kernel_that_is_wrong_in_the_second_run_alone_fails(tmp_path: Path) -> None:
    cases = [f"{HEAD}-decode-lengths", SMALL]
    # The second pass asks the last case first.
    fickle(tmp_path, 3, changes=", profile=lambda *key: replace(CPU.profile(*key), deterministic=True)")
    done, report = conformance(tmp_path, "out", "--backend", "fickle", twice=True, cases=cases)
    row = rows(report)[cases[0]]
    assert (row.status, row.rule, done.returncode, report.run.passes) == (Status.FAIL, "agreement", 1, 2)
    assert row.reason.startswith("deterministic is declared, but a second run of the case")
    assert rows(report)[SMALL].status is Status.PASS


def test_other_bits_are_judged_where_no_determinism_is_declared(tmp_path: Path) -> None:
    fickle(tmp_path, 3, changes=", profile=lambda *about: replace(CPU.profile(*about), deterministic=False)")
    _, report = conformance(tmp_path, "out", "--backend", "fickle", twice=True, cases=[f"{HEAD}-decode-lengths", SMALL])
    row = rows(report)[f"{HEAD}-decode-lengths"]
    assert (row.status, row.rule) == (Status.FAIL, "tail")
    assert row.reason.startswith("it passed, and in a second run, in another process and order: row ")
    assert row.artefact


def test_a_second_pass_that_is_cut_off_earns_nothing(tmp_path: Path) -> None:
    """Its process cannot be started: every case passed, once."""
    source = "def probe():\n    seen = Path(__file__).with_name('seen')\n    if seen.exists():\n"
    source += "        raise DeviceUnavailable('the chip fell off the bus.')\n    seen.touch()\n    return CPU.probe()\n"
    plugins.module(tmp_path, "tired", "probe=probe", source)
    done, report = conformance(tmp_path, "out", "--backend", "tired", twice=True, cases=[SMALL, f"{HEAD}-decode-lengths"])
    assert {row.status for row in seen(report).values()} == {Status.PASS}
    assert (done.returncode, report.run.passes) == (0, 1)
    assert all(claim.level is None for claim in report.claims)


def test_how_often_each_case_ran_stands_in_the_report(smoke: Run) -> None:
    done, report = smoke
    assert report.run.passes == 2
    assert f"second pass: {CASES} cases, last to first, in a new process" in done.stdout
    assert re.search(r"\d+ cases passed 2 times: wrong at random in one call of \d+,\s+it\s+would", done.stdout)


# --- what a run is evidence of ---------------------------------------------------------------------------------------------

NO_CHIP = "def probe():\n    return replace(CPU.probe(), {})\n"


@pytest.mark.parametrize(
    ("changes", "source", "arguments", "variables", "evidence", "reason"),
    [
        ("version='2'", "", (), {}, "HARDWARE", "its probe named chip and driver"),
        ("witness=None", "", (), {}, "EMULATED", "no work was seen on the chip in 1 of 1 cases"),
        ("witness=lambda: 7", "", (), {}, "EMULATED", "no work was seen on the chip in 1 of 1 cases"),
        (
            "devices=('cpu',), probe=probe",
            NO_CHIP.format("chip='unknown'"),
            (),
            {},
            "EMULATED",
            "does not name chip and driver",
        ),
        ("devices=('cpu',), probe=probe", NO_CHIP.format("driver=' N/A'"), (), {}, "EMULATED", "does not name chip and"),
        ("version='2'", "", (), {"TRITON_INTERPRET": "1"}, "SIMULATED", "TRITON_INTERPRET is set"),
        ("version='2'", "", (), {"TRITON_INTERPRET": "0"}, "HARDWARE", "its probe named chip and driver"),
        ("emulates=('chip9',)", "", ("--emulate", "chip9"), {}, "EMULATED", "--emulate chip9"),
        ("emulates=('chip9',)", "", (), {"DSA_EMULATE": "chip9"}, "EMULATED", "--emulate chip9"),
    ],
    ids=[
        "honest",
        "no witness",
        "still witness",
        "no chip",
        "no driver",
        "interpreted",
        "not interpreted",
        "emulating",
        "variable",
    ],
)
def test_evidence(
    tmp_path: Path,
    changes: str,
    source: str,
    arguments: tuple[str, ...],
    variables: dict[str, str],
    evidence: str,
    reason: str,
) -> None:
    plugins.module(tmp_path, "seen", changes, source)
    done, report = conformance(tmp_path, "out", *arguments, cases=[SMALL], DSA_BACKEND="seen", **variables)
    assert (report.evidence, report.level) == (evidence, None)
    assert reason in report.evidence_reason
    assert rows(report)[SMALL].status is Status.PASS
    assert report.emulates == ("chip9" if evidence == "EMULATED" and "chip9" in reason else None)
    lines = done.stdout.splitlines()
    assert ("evidence yet to be shown" in lines[0]) or f"evidence {evidence}" in lines[0]
    assert evidence in lines[-1]
    assert ("not run on the named chip" in lines[-1]) == (evidence != "HARDWARE")
    if report.emulates:
        assert "--emulate chip9" in rows(report)[SMALL].reproducer


def test_an_interpreter_that_the_backend_switches_on_is_seen(tmp_path: Path) -> None:
    source = "def index(request):\n    os.environ['TRITON_INTERPRET'] = '1'\n    return lightning_index(request)\n"
    plugins.module(tmp_path, "sly", "operators=OURS", source)
    _, report = conformance(tmp_path, "out", "--backend", "sly", cases=[SMALL])
    assert (rows(report)[SMALL].status, report.evidence) == (Status.PASS, Evidence.SIMULATED)
    assert report.evidence_reason == f"the backend switched Triton's interpreter on, seen in {SMALL} first"


def test_a_run_of_refusals_is_evidence_of_nothing(tmp_path: Path) -> None:
    source = "def index(request):\n    raise Unsupported('not today.', 'out')\n"
    plugins.module(tmp_path, "shy", "operators=OURS", source)
    _, report = conformance(tmp_path, "out", "--backend", "shy", cases=[SMALL])
    assert (rows(report)[SMALL].status, rows(report)[SMALL].seconds) == (Status.FAIL, None)
    assert (report.evidence, report.evidence_reason) == (Evidence.EMULATED, "no call has reached the chip")


def test_emulation_ends_with_its_run(tmp_path: Path) -> None:
    """A program may run the suite twice; what it emulated first must not stay on for a run that is to be HARDWARE."""
    plugins.module(tmp_path, "seen", "emulates=('chip9',)")
    run = f"run(backend='seen', list='smoke', cases=['{SMALL}'], out='out', emulate={{}})"
    code = f"import os\nfrom dsa_portable.conformance import run\nfirst = {run.format('chip9'.__repr__())}\n"
    code += "assert 'DSA_EMULATE' not in os.environ\n"
    code += f"second = {run.format(None)}\nprint(first.evidence, first.emulates, second.evidence, second.emulates)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=plugins.environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "EMULATED chip9 HARDWARE None\n", done.stderr


def test_emulating_what_is_not_declared(tmp_path: Path) -> None:
    plugins.module(tmp_path, "seen", "emulates=('chip8', 'chip9')")
    done = plugins.dsa_portable(tmp_path, "conformance", "--list", "smoke", "--backend", "seen", "--emulate", "chip7")
    assert done.returncode == 2
    assert done.stderr == (
        "dsa-portable: backend 'seen' emulates chip8, chip9, but --emulate chip7 was passed; name one of them.\n"
    )


LITTLE = """
HAS = CPU.capabilities(None)["lightning_index"]
FEW = {"lightning_index": {**HAS, "format": ("e4m3/f32/f32",), "topk": (1,)}}

def few(device):
    time.sleep(float(os.environ.get("PACE", 0)))  # asked in every call, so that cases are left when a signal arrives
    return FEW
"""


@pytest.fixture(scope="session")
def little(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """Where a backend that declares little is installed, and a whole run of it."""
    folder = tmp_path_factory.mktemp("little")
    plugins.module(folder, "little", "capabilities=few", LITTLE)
    return folder, conformance(folder, "whole", "--backend", "little")


def test_declaring_less_is_no_failure_and_no_level(little: tuple[Path, Run]) -> None:
    done, report = little[1]
    assert done.returncode == 0
    passed = [row.id for row in report.cases if row.status is Status.PASS]
    refused = {row.reason for row in report.cases if row.status is Status.UNSUPPORTED}
    assert passed == [f"{HEAD}-prefill-topk1"]
    assert refused == {
        "as declared: 'topk' = 2048 is not offered",
        "as declared: 'topk' = 512 is not offered",
        "as declared: 'format' = bf16 is not offered",
        "as declared: 'format' = v32_fp8_656_nsr is not offered",
    }
    assert {claim.key[:2] for claim in report.claims} == {("lightning_index", "e4m3/f32/f32")}
    assert (report.level, report.evidence) == (None, Evidence.HARDWARE)
    assert re.fullmatch(r"no failure on .* \(HARDWARE\), but no level is granted", done.stdout.splitlines()[-1])


def test_a_declaration_is_kept_to_the_letter(tmp_path: Path) -> None:
    """Repeated indices lie in the data: nobody can refuse them, and a case of them counts only where they are declared."""
    source = 'FEW = {o: {n: v for n, v in f.items() if n != "repeated_indices"} for o, f in CPU.capabilities(None).items()}'
    plugins.module(tmp_path, "little", "capabilities=lambda device: FEW", source)
    case = "attend-bf16-prefill-repeated"
    done, report = conformance(tmp_path, "out", "--backend", "little", cases=[case])
    assert (rows(report)[case].status, rows(report)[case].reason) == (
        Status.UNSUPPORTED,
        "as declared: 'repeated_indices' is not offered",
    )
    assert done.returncode == 3
    assert f"none of {CASES} cases was executed" in report.verdict


HALF = """
FEW = {"sparse_attend": {**CPU.capabilities(None)["sparse_attend"], "format": ("f16",)}}
"""


@pytest.mark.slow
def test_all_cases_of_the_one_declared_format_earn_its_claims_and_not_the_list(tmp_path: Path) -> None:
    """Whoever selects what can pass saves the time of many refusals, and must not lose the report for it."""
    plugins.module(tmp_path, "half", "capabilities=lambda device: FEW", HALF)
    cases = [id for id in lists.load("core").cases if id.startswith("attend-f16-")]
    done, report = conformance(tmp_path, "out", "--backend", "half", twice=True, cases=cases, list="core")
    assert {id: row.status for id, row in seen(report).items()} == dict.fromkeys(cases, Status.PASS)
    assert {claim.level for claim in report.claims} == {f"{report.list.name} exact"}
    assert (done.returncode, report.level) == (0, None)
    assert done.stdout.splitlines()[-1] == report.verdict
    assert report.verdict.startswith(f"no failure in the {len(cases)} cases asked for, of {report.list.cases} (HARDWARE)")


# --- interruption ----------------------------------------------------------------------------------------------------------


def facts(report: Report) -> list[tuple[object, ...]]:
    """What must not depend on how often a run was interrupted."""
    return [
        (r.id, r.status, r.reason, r.inputs_sha256, r.outputs_sha256, r.claim_required, r.selective_rows) for r in report.cases
    ]


def test_a_run_that_is_interrupted_three_times_ends_as_one_that_is_not(little: tuple[Path, Run]) -> None:
    """All of it in Triton's interpreter, which changes what the run is evidence of and nothing else."""
    folder, (whole, expected) = little
    words = ("conformance", "--backend", "little", "--list", "smoke", "--out", "parts")
    interpreted = {"TRITON_INTERPRET": "1"}
    paced = interpreted | {"PACE": "0.15"}
    kept: dict[str, schema.CaseResult] = {}
    for how, resume in ((signal.SIGINT, ()), (signal.SIGTERM, ("--resume",))):
        stopped = plugins.interrupt(folder, how, r"^\[ *\d+/", *words, *resume, **paced)
        report = schema.load(folder / "parts" / "report.json")
        assert (stopped.returncode, report.exit_code, stopped.stderr) == (3, 3, "")
        assert "interrupted; what was recorded is in parts/recordings, and --resume goes on from there" in stopped.stdout
        assert (report.run.interrupted, report.run.resumed) == (True, bool(resume))
        assert {row.reason for row in report.cases if row.status is Status.NOT_RUN} == {"interrupted before it"}
        assert stopped.stdout.splitlines()[-1].startswith("INCOMPLETE: ")
        assert len(kept) < len(seen(report)) < len(report.cases) == CASES
        assert kept.items() <= seen(report).items(), "rows are kept as they were"
        kept = seen(report)
    killed = plugins.interrupt(folder, signal.SIGKILL, r"^\[ *\d+/", *words, "--resume", **paced)
    assert killed.returncode == -signal.SIGKILL
    recorded = sorted((folder / "parts" / "recordings").glob("*-*.json"), key=lambda path: path.stat().st_mtime)
    assert len(kept) < len(recorded) < CASES
    recorded[-1].write_text(recorded[-1].read_text()[:40])
    done, report = conformance(folder, "parts", "--resume", "--backend", "little", **interpreted)
    assert (done.returncode, report.evidence, report.level) == (whole.returncode, Evidence.SIMULATED, None)
    assert (
        done.stdout.splitlines()[-1]
        == f"no failure, 1 of {CASES} cases executed (SIMULATED: not run on the named chip; no level can be granted)"
    )
    assert (report.run.interrupted, report.run.resumed) == (False, True)
    assert kept.items() <= rows(report).items()
    assert facts(report) == facts(expected)
    first = next(line for line in done.stdout.splitlines() if line.startswith("["))
    assert f" {recorded[-1].stem} " in first, "what was half written, and nothing before it, is made again"


def test_resuming_what_is_another_run(smoke: Run, folder: Path, tmp_path: Path) -> None:
    plugins.copy_of_cpu(tmp_path, "twin")
    before = (folder / "smoke" / "recordings" / "subject.json").read_bytes()
    words = ("conformance", "--resume", "--out")
    refused = [
        (("--list", "smoke", "--backend", "twin", *words[3:]), {}, "backend, files of the backend"),
        (("--list", "core", "--backend", "cpu"), {}, "list, profiles"),
        (("--list", "smoke", "--backend", "cpu"), {"DSA_CPU_ENGINE": "numpy"}, "device, variables"),
    ]
    for arguments, variables, what in refused:
        done = plugins.dsa_portable(tmp_path, *words, folder / "smoke", *arguments, DSA_BACKEND="cpu", **variables)
        assert done.returncode == 2
        assert re.fullmatch(rf"dsa-portable: the run in .* had another {what}; resume it as it was, .*\n", done.stderr)
    done = plugins.dsa_portable(tmp_path, *words, "new", "--list", "smoke", "--backend", "cpu")
    assert done.returncode == 2
    assert done.stderr == "dsa-portable: new holds no interrupted run, but --resume was passed; leave it out.\n"
    assert (folder / "smoke" / "recordings" / "subject.json").read_bytes() == before


def test_a_plug_in_that_was_changed_is_another_run(tmp_path: Path) -> None:
    plugins.module(tmp_path, "edited", "operators=OURS", "index, attend = lightning_index, sparse_attend")
    words = ("conformance", "--backend", "edited", "--list", "smoke", "--out", "out", "--case", SMALL)
    assert plugins.dsa_portable(tmp_path, *words).returncode == 0
    with open(tmp_path / "edited_backend.py", "a") as file:
        file.write("# mended\n")
    done = plugins.dsa_portable(tmp_path, *words, "--resume")
    assert done.returncode == 2
    assert "had another files of the backend; resume it as it was" in done.stderr


def test_an_interrupt_leaves_no_process_behind(tmp_path: Path) -> None:
    """The backend hangs in its probe, which is when people press Ctrl-C; no terminal reaches its process, the run must."""
    source = "def probe():\n    Path(__file__).with_name('pid').write_text(str(os.getpid()))\n    time.sleep(3600)\n"
    plugins.module(tmp_path, "stuck", "probe=probe", source)
    arguments = [plugins.COMMAND, "conformance", "--list", "smoke", "--backend", "stuck"]
    process = subprocess.Popen(
        arguments, cwd=tmp_path, env=plugins.environment(tmp_path), stderr=subprocess.PIPE, text=True, preexec_fn=plugins.listen
    )
    pid = tmp_path / "pid"
    try:
        wait_until(lambda: pid.exists() and pid.read_text() != "")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, errors) == (3, "dsa-portable: interrupted before the first case\n")
    wait_until(lambda: not alive(int(pid.read_text())))


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# --- planted faults --------------------------------------------------------------------------------------------------------

# What ports get wrong, each in a copy of the CPU backend that is right otherwise, with the core cases that are there for it.
LOOP, TOP = "for owner, rows in chunks(request, ends):", "return np.flatnonzero(above)"
SEES_ONE_MORE = "np.minimum(ends + 1, request.batch.seqlens_k[request.batch.request_of_row(len(ends))]) * (ends > 0)"
ROPE = "np.float32(np.arange(request.dims['Dqk']) < request.value_dim)"
ROW_WEIGHTS, POSITIONS = "widen(request.weights[block])", "positions = request.indices[row, :limit].astype(np.int64)"
FAULTS: dict[str, tuple[FileEdit, tuple[str, ...]]] = {
    "causal: one key too few": (
        ("lightning_index.py", LOOP, f"ends = np.maximum(ends - 1, starts)\n    {LOOP}"),
        (f"{HEAD}-decode-paged64",),
    ),
    "causal: one key too many": (
        ("lightning_index.py", LOOP, f"ends = {SEES_ONE_MORE}\n    {LOOP}"),
        (f"{HEAD}-decode-lengths", f"{HEAD}-prefill-paged64"),
    ),
    "top-k: the best key exchanged for the first that was left out": (
        ("index_select.py", TOP, f"above[[np.argmax(keys), np.flatnonzero(~above)[0]]] = False, True\n    {TOP}"),
        (f"{HEAD}-prefill-topk512",),
    ),
    "top-k: ties at the boundary displace better keys": (
        ("index_select.py", TOP, "return np.flatnonzero(keys >= threshold)[:topk]"),
        (f"{HEAD}-prefill-topk512", f"{HEAD}-prefill-lattice"),
    ),
    "k_scale rounded to a power of two": (
        ("rows.py", "else widen(k_scale[where])", "else np.exp2(np.rint(np.log2(widen(k_scale[where]))))"),
        (f"{HEAD}-prefill-pow2", f"{HEAD}-decode-scores"),
    ),
    "weights rounded to bfloat16": (
        ("index_scores.py", ROW_WEIGHTS, "widen(request.weights[block].astype('bfloat16'))"),
        (f"{HEAD}-prefill-cancel",),
    ),
    "index: padding rows left unwritten": (
        ("lightning_index.py", "indices[:] = -1", "indices[: request.batch.cu_seqlens_q[-1]] = -1"),
        (f"{HEAD}-prefill-lattice", f"{HEAD}-decode-lengths"),
    ),
    "block table ignored": (
        ("rows.py", "batch.block_table[request, positions // batch.page_size]", "positions // batch.page_size"),
        ("attend-bf16-decode-lse",),
    ),
    "attention: padding rows left unwritten": (
        ("sparse_attend.py", "out, lse = _row(", "if owners[row] < 0:\n            return\n        out, lse = _row("),
        ("attend-bf16-decode-out",),
    ),
    "lse in base 2": (
        ("sparse_attend.py", "arrays[1][row] = lse", "arrays[1][row] = lse / np.log(2)"),
        ("attend-bf16-decode-flat", "attend-bf16-decode-lse"),
    ),
    "softmax scale 576^-0.5": (
        ("sparse_attend.py", "request.softmax_scale", "request.dims['Dqk'] ** -0.5"),
        ("attend-bf16-decode-flat",),
    ),
    "-1 read as the last key": (
        (
            "sparse_attend.py",
            POSITIONS,
            f"{POSITIONS}\n    positions[positions == -1] = request.batch.seqlens_k[owner] - 1",
        ),
        ("attend-bf16-decode-flat",),
    ),
    "rope part dropped": (
        ("sparse_attend.py", "widen(request.q[row])", f"widen(request.q[row]) * {ROPE}"),
        ("attend-bf16-prefill-onehot",),
    ),
}


@pytest.fixture(scope="module")
def caught() -> Iterator[dict[str, str]]:
    """Fault -> the case that caught it, printed as a table in the end (pytest -s)."""
    table: dict[str, str] = {}
    yield table
    print("\n\n" + "\n".join(f"{fault:64}{case}" for fault, case in table.items()))


# Each is a run of the command; the first is in CI.
SAMPLE = [*FAULTS][:1]


@pytest.mark.parametrize("name", [*SAMPLE, *(pytest.param(n, marks=pytest.mark.slow) for n in FAULTS if n not in SAMPLE)])
def test_a_planted_fault_is_caught(tmp_path: Path, caught: dict[str, str], name: str) -> None:
    change, cases = FAULTS[name]
    plugins.copy_of_cpu(tmp_path, "faulty", change)
    done, report = conformance(tmp_path, "out", cases=cases, list="core", DSA_BACKEND="faulty")
    failed = [row for row in report.cases if row.status is not Status.NOT_RUN and row.status is not Status.PASS]
    assert [(row.id, row.status) for row in failed] == [(cases[-1], Status.FAIL)], "the last case catches it, and it alone"
    assert done.returncode == 1
    assert f"FAIL {failed[0].id}\n" in done.stdout
    caught[name] = f"{failed[0].id}: {failed[0].reason}"


def test_the_copy_without_a_fault_passes(tmp_path: Path) -> None:
    plugins.copy_of_cpu(tmp_path, "faultless")
    cases = sorted({case for name in SAMPLE for case in FAULTS[name][1]})
    _, report = conformance(tmp_path, "out", cases=cases, list="core", DSA_BACKEND="faultless")
    assert {id: row.reason for id, row in seen(report).items()} == dict.fromkeys(cases, "")


def test_a_change_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        PlantError, match=r"^rows.py of dsa_portable.backends.cpu holds 'no such text' 0 times, but an edit needs"
    ):
        plugins.copy_of_cpu(tmp_path, "faulty", ("rows.py", "no such text", ""))


# --- what is kept of a failure ---------------------------------------------------------------------------------------------


def test_a_failure_is_kept_and_can_be_run_again(tmp_path: Path) -> None:
    case = f"{HEAD}-decode-scores"
    plugins.copy_of_cpu(tmp_path, "faulty", FAULTS["k_scale rounded to a power of two"][0])
    done, report = conformance(tmp_path, "out", "--backend", "faulty", cases=[case, SMALL])
    row = rows(report)[case]
    assert row.artefact == f"failed/{case}.npz"
    kept = arrays_file.load(tmp_path / "out" / row.artefact)
    assert kept["inputs.q"].dtype == ml_dtypes.float8_e4m3fn
    assert kept["inputs.k_scale"].dtype == np.float32
    assert kept["batch.seqlens_k"].tolist() == [8192, 100, 3000]
    assert kept["outputs.indices"].shape == kept["outputs.scores"].shape == (7, 2048)
    assert kept["judged.true_scores"].shape == kept["judged.bound"].shape
    assert f"kept    {row.artefact}" in done.stdout
    shown = plugins.dsa_portable(tmp_path, "show", Path("out", row.artefact))
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"status  FAIL, rule {row.rule}\n" in shown.stdout
    at = int(kept["judged.row"])
    place = re.search(rf"outputs\.(scores|indices)\[{at}.*: [1-9]\d* .*\n +(position|\[)", shown.stdout)
    assert place, shown.stdout
    again = subprocess.run(
        row.reproducer,
        shell=True,
        cwd=tmp_path,
        env=plugins.environment(tmp_path, PATH=f"{plugins.SCRIPTS}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert shlex.split(row.reproducer)[-1] == case
    assert again.returncode == 1, again.stderr
    alone = schema.load(tmp_path / "dsa-report-case" / "report.json")
    assert rows(alone)[case].reason == row.reason
    assert {other.status for other in alone.cases if other.id != case} == {Status.NOT_RUN}


def test_a_run_can_stop_after_its_first_failure(tmp_path: Path) -> None:
    plugins.module(tmp_path, "broken", "operators=OURS", "index = attend = lambda request: 1 / 0")
    chosen = [id for id in lists.load("smoke").cases if "-decode-" in id]
    done, report = conformance(tmp_path, "out", "--backend", "broken", "--fail-fast", cases=chosen)
    assert (done.returncode, report.run.selected, report.run.interrupted) == (1, len(chosen), False)
    assert [row.id for row in seen(report).values()] == chosen[:1]
    reasons = {row.reason for row in report.cases if row.id in chosen[1:]}
    assert reasons == {"stopped after the first failure (--fail-fast)"}
    assert report.verdict.startswith(f"FAILED: 1 of {CASES} cases, {CASES - 1} not run ")


def test_an_error_says_where_it_was_raised_and_keeps_its_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The traceback begins in the plug-in; of a process that died there are its last words."""
    source = """
def launch(grid):
    raise RuntimeError(f"too many blocks: {grid}")

def index(request):
    launch(70000)

def attend(request):
    print("kernel assertion: page 7 is not mapped", flush=True)
    os._exit(3)
"""
    plugins.module(tmp_path, "broken", "operators=OURS", source)
    _, report = conformance(tmp_path, "out", "--backend", "broken", cases=[SMALL, "attend-bf16-prefill-onehot"])
    raised, died = seen(report).values()
    assert re.search(r"^Traceback .*\n  File .*broken_backend.py.*in index\n.*launch\(70000\)\n.*in launch\n", raised.traceback)
    assert raised.traceback.endswith("RuntimeError: too many blocks: 70000")
    assert died.traceback == "kernel assertion: page 7 is not mapped"
    for row in (raised, died):
        text = (tmp_path / "out" / "failed" / f"{row.id}.txt").read_text()
        assert text.startswith(f"id: {row.id}\nstatus: ERROR\ntests: {row.why}\nreason: {row.reason}\n")
        assert text.endswith(f"\nrun: {row.reproducer}\ntraceback:\n{row.traceback}\n")
        assert row.artefact == f"failed/{row.id}.npz"
        kept = arrays_file.load(tmp_path / "out" / row.artefact)
        assert {"inputs.q", "batch.seqlens_k"} <= kept.keys()
        assert not [name for name in kept if name.startswith(("outputs.", "judged."))]
    recordings = tmp_path / "out" / "recordings"
    subject, found = recording.load_subject(recordings), recording.load(recordings, SMALL)
    assert subject is not None
    assert found is not None
    assert examine(CASES_BY_ID[SMALL], found, subject).arrays.keys() > {"inputs.q"}
    monkeypatch.setattr("dsa_portable.conformance.judging.judge.ERROR_BYTES", 1000)
    assert examine(CASES_BY_ID[SMALL], found, subject).arrays == {}, "large inputs are not kept"
    written = json.loads((recordings / f"{SMALL}.json").read_text())
    (recordings / f"{SMALL}.json").write_text(json.dumps({**written, "traceback": 7}))
    assert recording.load(recordings, SMALL) is None, "a backend can have written anything"


# A case that returns scores spoils as many of the cases that follow it in the same process as SPOILT says.
LEAKY = """
spoilt = 0
LOG = Path(__file__).with_name("calls.txt")

def index(request):
    global spoilt
    with open(LOG, "a") as log:
        log.write(f"{os.getpid()}\\n")
    found, bad, spoilt = lightning_index(request), spoilt > 0, spoilt - 1
    if request.return_scores:
        spoilt = SPOILT
    elif bad or ALWAYS:
        found[0] = -1
    return found
"""
FIRST, NEXT, LAST = f"{HEAD}-prefill-scores", f"{HEAD}-prefill-plateau", SMALL


def leaky(folder: Path, spoilt: int = 1, always: bool = False) -> None:
    """Install it; the order of these three cases is the list's."""
    assert [id for id in lists.load("smoke").cases if id in (FIRST, NEXT, LAST)] == [FIRST, NEXT, LAST]
    source = LEAKY.replace("SPOILT", str(spoilt)).replace("ALWAYS", str(always))
    plugins.module(folder, "leaky", "operators=OURS", source)


def test_a_failure_that_takes_the_case_before_it_names_both(tmp_path: Path) -> None:
    leaky(tmp_path)
    done, report = conformance(tmp_path, "out", "--backend", "leaky", cases=[LAST, NEXT, FIRST])
    row = rows(report)[NEXT]
    assert [rows(report)[id].status for id in (FIRST, NEXT, LAST)] == [Status.PASS, Status.FAIL, Status.PASS]
    assert row.reason.endswith(f"; it passes alone, and fails after {FIRST}")
    assert row.reproducer.endswith(f" --case {FIRST} --case {NEXT}")
    assert f"  run     {row.reproducer}\n" in done.stdout
    assert "\n1 failing case is asked again alone\n" in done.stdout
    assert report.run.workers_replaced == 0
    first, *others = (tmp_path / "calls.txt").read_text().split()
    assert others[:2] == [first] * 2
    assert len(set(others[2:])) == 2, "alone, and after the other"
    assert others[3] == others[4]
    done, again = conformance(tmp_path, "again", *shlex.split(row.reproducer)[3:], DSA_BACKEND="leaky")
    assert done.returncode == 1
    assert {id: r.reason for id, r in seen(again).items()} == {FIRST: "", NEXT: row.reason}
    _, resumed = conformance(tmp_path, "again", "--resume", DSA_BACKEND="leaky", cases=[LAST])
    assert rows(resumed)[NEXT].reason == row.reason.partition("; it passes alone")[0], "nobody knows what ran before it"
    assert rows(resumed)[NEXT].reproducer.endswith(f" --case {NEXT}")
    assert FIRST not in rows(resumed)[NEXT].reproducer


@pytest.mark.parametrize(
    ("spoilt", "always", "case", "words"),
    [
        (0, True, NEXT, ""),
        (2, False, LAST, f"; it passes alone, and after {NEXT} alone: it fails after more of the run, or not every time"),
    ],
    ids=["fails alone", "takes more than the case before it"],
)
def test_a_failure_that_does_not_take_the_case_before_it_names_none(
    tmp_path: Path, spoilt: int, always: bool, case: str, words: str
) -> None:
    leaky(tmp_path, spoilt, always)
    _, report = conformance(tmp_path, "out", "--backend", "leaky", cases=[FIRST, NEXT, LAST])
    row = rows(report)[case]
    assert row.status is Status.FAIL
    assert row.reason.endswith(words)
    assert ("passes alone" in row.reason) == bool(words)
    assert row.reproducer.endswith(f" --list {report.list.name} --case {case}")


def test_only_the_first_failures_are_asked_again(tmp_path: Path) -> None:
    leaky(tmp_path, spoilt=2)
    code = (
        "from dsa_portable.conformance import run\nfrom dsa_portable.conformance.judging import again\nagain.ASKED_AGAIN = 1\n"
    )
    code += f"run(backend='leaky', list='smoke', cases={[FIRST, NEXT, LAST]}, out='out', say=print)"
    command, env = [sys.executable, "-c", code], plugins.environment(tmp_path)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert "\n1 failing case is asked again alone; 1 more are not\n" in done.stdout, done.stderr
    found = rows(schema.load(tmp_path / "out" / "report.json"))
    assert (found[NEXT].status, found[LAST].status) == (Status.FAIL, Status.FAIL)
    assert found[NEXT].reproducer.endswith(f" --case {FIRST} --case {NEXT}")
    assert found[LAST].reproducer.endswith(f" --list {lists.load('smoke').name} --case {LAST}")


def test_a_passing_case_alone_is_no_failure_and_not_the_list(tmp_path: Path) -> None:
    done, report = conformance(tmp_path, "out", "--backend", "cpu", cases=[SMALL])
    assert (done.returncode, report.level, report.run.selected) == (0, None, 1)
    assert report.verdict == f"no failure in the 1 case asked for, of {CASES} (HARDWARE); no level is granted"
    assert {row.reason for row in report.cases if row.status is Status.NOT_RUN} == {"not asked for"}
    assert not (tmp_path / "out" / "failed").exists()
