"""The real torch_npu over the libraries of conformance/hosts/ascend/stubs.py: it imports, finds no NPU, and binds our calls.

On the meta device and on fake tensors nothing is computed: what binds here has the right names, types and results' shapes.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dsa_portable.backends.ascend.schemas import (
    GENERATIONS,
    KV_QUANT_SPARSE_FLASH_ATTENTION,
    LIGHTNING_INDEXER,
    QUANT_LIGHTNING_INDEXER,
    SPARSE_FLASH_ATTENTION,
)
from dsa_portable.conformance.hosts.ascend import stubs as host

BINDINGS = Path(__file__).with_name("bindings.py")
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
LOAD = f"import sys; from pathlib import Path; from {host.__name__} import load; load(Path(sys.argv[1]))"


def t(dtype: str, *shape: int) -> dict[str, Any]:
    """A tensor, as bindings.py reads it."""
    return {"dtype": dtype, "shape": shape}


LENGTHS = t("int32", 2)
BLOCKS = t("int32", 2, 16)
PAGED = {"block_table": BLOCKS, "actual_seq_lengths_query": LENGTHS, "layout_query": "TND"}
INDEX_PAGED = {**PAGED, "actual_seq_lengths_key": LENGTHS, "layout_key": "PA_BSND"}
ATTEND_PAGED = {**PAGED, "actual_seq_lengths_kv": LENGTHS, "layout_kv": "PA_BSND", "attention_mode": 2}
BSND = {"query": t("bfloat16", 2, 8, 64, 128), "key": t("bfloat16", 2, 4096, 1, 128), "weights": t("bfloat16", 2, 8, 64)}
TND = {"query": t("bfloat16", 16, 64, 128), "key": t("bfloat16", 32, 128, 1, 128), "weights": t("bfloat16", 16, 64)}
QUANTISED = {
    "query": t("int8", 16, 64, 128),
    "key": t("int8", 32, 128, 1, 128),
    "weights": t("float16", 16, 64),
    "query_dequant_scale": t("float16", 16, 64),
    "key_dequant_scale": t("float16", 32, 128, 1),
    "query_quant_mode": 0,
    "key_quant_mode": 0,
}
ATTEND = {
    "query": t("bfloat16", 16, 128, 512),
    "key": t("bfloat16", 32, 128, 1, 512),
    "value": t("bfloat16", 32, 128, 1, 512),
    "sparse_indices": t("int32", 16, 1, 2048),
    "scale_value": 0.1,
    "query_rope": t("bfloat16", 16, 128, 64),
    "key_rope": t("bfloat16", 32, 128, 1, 64),
}
PACKED = {
    "query": t("bfloat16", 16, 128, 576),
    "key": t("int8", 32, 128, 1, 656),
    "value": t("int8", 32, 128, 1, 656),
    "sparse_indices": t("int32", 16, 1, 2048),
    "scale_value": 0.1,
    "key_quant_mode": 2,
    "value_quant_mode": 2,
}


@dataclass(frozen=True)
class Call:
    """A call by keywords, and its results as (dtype, shape) or words of its error."""

    title: str
    operator: str
    arguments: dict[str, Any]
    results: tuple[tuple[str, tuple[int, ...]], ...] = ()
    error: str = ""


NO_VALUES, NO_LSE = ("bfloat16", (0,)), ("float32", (0,))
BOUND = (
    Call("LI BSND", LIGHTNING_INDEXER, BSND, (("int32", (2, 8, 1, 2048)), NO_VALUES)),
    Call("LI TND, paged", LIGHTNING_INDEXER, {**TND, **INDEX_PAGED}, (("int32", (16, 1, 2048)), NO_VALUES)),
    Call(
        "LI that returns scores",
        LIGHTNING_INDEXER,
        {**BSND, "return_value": True, "sparse_count": 512},
        (("int32", (2, 8, 1, 512)), ("bfloat16", (2, 8, 1, 512))),
    ),
    Call("QLI TND, paged", QUANT_LIGHTNING_INDEXER, {**QUANTISED, **INDEX_PAGED}, (("int32", (16, 1, 2048)),)),
    Call("SFA TND, paged", SPARSE_FLASH_ATTENTION, {**ATTEND, **ATTEND_PAGED}, (("bfloat16", (16, 128, 512)), NO_LSE, NO_LSE)),
    Call(
        "SFA with sinks",
        SPARSE_FLASH_ATTENTION,
        {**ATTEND, **ATTEND_PAGED, "sinks": t("float32", 128)},
        (("bfloat16", (16, 128, 512)), NO_LSE, NO_LSE),
    ),
    # The documentation says that the output is shaped as the query; it is without the query's 64 of rope.
    Call("KVQ TND, paged", KV_QUANT_SPARSE_FLASH_ATTENTION, {**PACKED, **ATTEND_PAGED}, (("bfloat16", (16, 128, 512)),)),
    # Nobody looks at these before a kernel does: that a call binds says nothing of what the operator accepts.
    Call(
        "LI of 96 dimensions, which no kernel takes",
        LIGHTNING_INDEXER,
        {**BSND, "query": t("bfloat16", 2, 8, 64, 96), "key": t("bfloat16", 2, 4096, 1, 96)},
        (("int32", (2, 8, 1, 2048)), NO_VALUES),
    ),
    Call(
        "LI of int64 lengths, which no kernel takes",
        LIGHTNING_INDEXER,
        {**TND, **INDEX_PAGED, "actual_seq_lengths_key": t("int64", 2)},
        (("int32", (16, 1, 2048)), NO_VALUES),
    ),
)
REFUSED = (
    Call("unknown keyword", LIGHTNING_INDEXER, {**BSND, "topk": 4}, error="Unknown keyword argument 'topk' for operator"),
    Call(
        "lengths in a list",
        LIGHTNING_INDEXER,
        {**BSND, "actual_seq_lengths_query": [8, 16]},
        error="Expected a value of type 'Optional[Tensor]'",
    ),
    Call(
        "no weights",
        LIGHTNING_INDEXER,
        {"query": BSND["query"], "key": BSND["key"]},
        error="missing value for argument 'weights'",
    ),
    Call("nothing to choose", LIGHTNING_INDEXER, {**BSND, "sparse_count": 0}, error="sparse_count should be greater than 0"),
    Call("no queries", LIGHTNING_INDEXER, {**BSND, "query": t("bfloat16", 0, 8, 64, 128)}, error="query should not be empty"),
    Call("no keys", LIGHTNING_INDEXER, {**BSND, "key": t("bfloat16", 0, 4096, 1, 128)}, error="key should not be empty"),
    Call(
        "no value",
        SPARSE_FLASH_ATTENTION,
        {**ATTEND, **ATTEND_PAGED, "value": None},
        error="value=None is only supported with CANN >= 9.2.0",
    ),
    Call(
        "three dimensions",
        SPARSE_FLASH_ATTENTION,
        {**ATTEND, **ATTEND_PAGED, "layout_query": "BSND"},
        error="must be 4, but got 3",
    ),
    Call(
        "an unknown layout",
        SPARSE_FLASH_ATTENTION,
        {**ATTEND, **ATTEND_PAGED, "layout_query": "XYZ"},
        error="layout of query: XYZ",
    ),
    Call(
        "KVQ, three",
        KV_QUANT_SPARSE_FLASH_ATTENTION,
        {**PACKED, **ATTEND_PAGED, "layout_query": "BSND"},
        error="must be 4, but got 3",
    ),
)
DEVICES = ("meta", "npu")


def run(*words: str | Path, text: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """A fresh Python that finds no CANN and loads torch_npu with torch, as it does when nobody forbids it."""
    ours = {name: value for name, value in os.environ.items() if name not in (AUTOLOAD, "ASCEND_HOME_PATH", "LD_LIBRARY_PATH")}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, env={**ours, **variables}, input=text, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="session")
def report(stubs: Path) -> dict[str, Any]:
    """Of the one process that makes all calls."""
    calls = {
        f"{call.title} on {device}": (call.operator, call.arguments, device)
        for call in (*BOUND, *REFUSED)
        for device in DEVICES
    }
    assert len(calls) == len(DEVICES) * len(BOUND + REFUSED), "two calls have one title"
    done = run(BINDINGS, stubs, text=json.dumps(calls), **{AUTOLOAD: "0"})
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_real_torch_npu_imports_and_finds_no_npu(report: dict[str, Any]) -> None:
    assert report["version"].startswith("2.")
    assert (report["available"], report["devices"]) == (False, 0)


def test_a_real_tensor_on_an_npu_is_an_error(report: dict[str, Any]) -> None:
    """The first question is for the chip's name."""
    assert report["real"].startswith("Unsupported soc version")


def test_the_registered_schemas_are_those_that_the_backend_keeps(report: dict[str, Any]) -> None:
    assert report["schemas"] == {operator: f"npu::{text}" for operator, text in GENERATIONS["C"].items()}
    assert (report["generation"], report["unknown"]) == ("C", None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("call", BOUND, ids=lambda call: call.title)
def test_a_call_binds_and_its_results_have_the_documented_shapes(report: dict[str, Any], call: Call, device: str) -> None:
    assert report["calls"][f"{call.title} on {device}"] == [[dtype, list(shape)] for dtype, shape in call.results]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("call", REFUSED, ids=lambda call: call.title)
def test_a_call_that_torch_npu_refuses_is_refused_without_a_chip(report: dict[str, Any], call: Call, device: str) -> None:
    found = report["calls"][f"{call.title} on {device}"]
    assert found[0] == "RuntimeError", found
    assert call.error
    assert call.error in found[1]


# --- what torch does on its own ---


def test_torch_alone_fails_where_torch_npu_is_installed_without_cann() -> None:
    """Why torch-npu is nobody's dependency, and why the suite forbids autoload."""
    done = run("-c", "import torch")
    assert done.returncode == 1
    assert f"You can disable extension auto-loading with {AUTOLOAD}=0" in done.stderr
    assert "libhccl.so: cannot open shared object file" in done.stderr


def test_with_the_libraries_torch_loads_torch_npu_itself(stubs: Path) -> None:
    code = (
        f"{LOAD}; import torch; print(torch.npu.device_count(), torch.accelerator.current_accelerator(check_available=False))"
    )
    done = run("-c", code, stubs)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["0 npu"]), done.stderr


# --- building and loading ---


def test_every_function_answers_with_an_error_but_two(stubs: Path) -> None:
    package = find_spec("torch_npu")
    assert package is not None
    assert package.origin is not None
    libraries, functions = host.needed(Path(package.origin).parent)
    assert {path.name for path in stubs.glob("*.so")} == set(libraries)
    assert len(functions) > 80
    library = ctypes.CDLL(str(stubs / host.FIRST))
    count = ctypes.c_uint(7)
    library.aclrtGetSocName.restype = ctypes.c_char_p
    assert (library.aclrtGetDeviceCount(ctypes.byref(count)), count.value, library.aclrtGetSocName()) == (0, 0, b"")
    assert {getattr(library, name)() for name in set(functions) - set(host.ANSWERS)} == {host.ERROR}


def test_a_folder_is_built_once_for_a_torch_npu(stubs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(stubs, tmp_path / "copy")
    (folder / "libold.so").touch()
    names = {path.name for path in folder.glob("*.so")}
    before = (folder / host.FIRST).read_bytes()
    (folder / host.FIRST).write_bytes(b"")
    assert {path.name for path in host.build(folder)} == names
    assert (folder / host.FIRST).read_bytes() == b""
    monkeypatch.setattr(host, "version", lambda name: "0.0")
    assert {path.name for path in host.build(folder)} == names - {"libold.so"}
    assert (folder / host.FIRST).read_bytes() == before


def test_two_processes_may_build_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second builds, and loads, while the first is at it; the first neither breaks it nor is broken by it."""
    real, seen = host._run, []

    def run(*command: str, text: str = "") -> str:
        done = real(*command, text=text)
        if command[0] == "gcc" and not seen:
            seen.append("another")
            seen.extend(path.name for path in host.build(tmp_path / "both"))
            seen.append(ctypes.CDLL(str(tmp_path / "both" / host.FIRST)).aclInit())
        return done

    monkeypatch.setattr(host, "_run", run)
    built = [path.name for path in host.build(tmp_path / "both")]
    assert seen == ["another", *built, host.ERROR]
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == sorted([*built, host.MARK])


def test_the_command_builds_and_counts(tmp_path: Path) -> None:
    done = run("-m", host.__name__, tmp_path / "new")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{len(list((tmp_path / 'new').glob('*.so')))} libraries in {tmp_path / 'new'}\n"
    assert run("-m", host.__name__).returncode == 2


@pytest.mark.parametrize("there", [(), ("gcc", "nm")])
def test_missing_tools_are_one_sentence(tmp_path: Path, there: tuple[str, ...]) -> None:
    for tool in there:
        (tmp_path / tool).symlink_to("/bin/true")
    done = run("-m", host.__name__, tmp_path / "stubs", PATH=str(tmp_path))
    missing = " and ".join(tool for tool in host.TOOLS if tool not in there)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"{missing} not found on PATH; install gcc and binutils to build the libraries.\n"
    assert not (tmp_path / "stubs").exists()


def test_a_missing_torch_npu_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "find_spec", lambda name: None)
    with pytest.raises(host.HostUnavailable, match=r"^torch_npu is not installed.*pip install torch torch-npu$"):
        host.build(tmp_path)


def test_a_compiler_that_fails_is_quoted_and_leaves_no_finished_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(host.ANSWERS, "aclrtGetDeviceCount", "no C")
    with pytest.raises(host.HostUnavailable, match=r"gcc failed with exit code 1: .*error"):
        host.build(tmp_path)
    with pytest.raises(host.HostUnavailable, match="holds no libraries"):
        host.load(tmp_path)


def test_libraries_are_refused_once_torch_is_imported(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    with pytest.raises(host.HostUnavailable, match="torch is imported already"):
        host.load(stubs)


@pytest.mark.parametrize("how", ["ASCEND_HOME_PATH", "LD_LIBRARY_PATH", "loader"])
def test_libraries_are_refused_where_cann_is_installed(
    stubs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    (tmp_path / host.FIRST).touch()
    if how == "loader":
        monkeypatch.setattr(host, "find_library", lambda name: f"lib{name}.so")
    else:
        monkeypatch.setenv(how, str(tmp_path))
    with pytest.raises(host.HostUnavailable, match="CANN itself is installed"):
        host.load(stubs)


def test_the_libraries_folder_is_not_taken_for_cann(stubs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(stubs))
    assert host.cann(stubs) is None
    assert host.cann(stubs / "other") is not None
