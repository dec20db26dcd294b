"""The real torch_npu over conformance/hosts/ascend/runtime.py: an NPU in host memory, whose operators op-plugin calls."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dsa_portable.backends.ascend import device, vendor
from dsa_portable.conformance.hosts.ascend import aclnn, runtime, stubs

CALLS = Path(__file__).with_name("host_calls.py")
DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "int8", "uint8", "int32", "int64")
VENDOR = ("LI", "LI with scores", "QLI", "SFA", "SFA with lse", "KVQ")
HIDDEN = ("TORCH_DEVICE_BACKEND_AUTOLOAD", "ASCEND_HOME_PATH", "LD_LIBRARY_PATH", runtime.CHIP, runtime.CANN)


def run(folder: Path, *options: str, **variables: str) -> dict[str, Any]:
    """The report of a fresh process over the folder's libraries."""
    environment = {name: value for name, value in os.environ.items() if name not in HIDDEN}
    command = [sys.executable, str(CALLS), str(folder), *options]
    done = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("runtime")
    runtime.build(made)
    return made


@pytest.fixture(scope="session")
def report(folder: Path) -> dict[str, Any]:
    return run(folder, "--all")


@pytest.fixture(scope="session")
def newer(folder: Path) -> dict[str, Any]:
    return run(folder, DSA_ASCEND_CHIP="950", DSA_ASCEND_CANN="9.2.0")


# --- what torch_npu sees ---


def test_an_a2_with_cann_9_1_is_what_nobody_asks_for(report: dict[str, Any]) -> None:
    assert (report["host"], report["name"], report["count"], report["cann"]) == (["A2", "9.1.0"], "Ascend910B3", 1, "9.1.0")


def test_chip_and_cann_come_from_the_variables(newer: dict[str, Any]) -> None:
    assert (newer["host"], newer["name"], newer["cann"]) == (["950", "9.2.0"], "Ascend950PR_9589", "9.2.0")


def test_torch_npu_takes_attention_without_a_value_by_the_version_of_cann(
    report: dict[str, Any], newer: dict[str, Any]
) -> None:
    assert "value=None is only supported with CANN >= 9.2.0" in report["without value"]
    assert newer["without value"] == "no error"


def test_the_backend_knows_every_chip() -> None:
    assert {chip: device.product_of(name) for chip, name in runtime.CHIPS.items()} == {chip: chip for chip in device.PRODUCTS}


# --- what is computed ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_come_back_bit_for_bit(report: dict[str, Any], dtype: str) -> None:
    assert report["bits"][dtype] is True


@pytest.mark.parametrize("operator", vendor.DEVICE_OPERATORS)
def test_an_operator_of_the_device_gives_what_the_cpu_gives(report: dict[str, Any], operator: str) -> None:
    assert report["operators"][operator]
    assert all(report["operators"][operator]), report["operators"][operator]


@pytest.mark.parametrize("title", VENDOR)
def test_the_vendors_operators_give_what_the_reference_gives(report: dict[str, Any], newer: dict[str, Any], title: str) -> None:
    for found in (report["vendor"][title], newer["vendor"][title]):
        assert found
        assert all(found), found


def test_sinks_are_a_950_s_and_an_operator_of_its_own(newer: dict[str, Any]) -> None:
    assert newer["vendor"]["SFA with sinks"] == [True, True, True]
    assert "aclnnSparseFlashAttentionV2" in newer["called"]


def test_every_operator_of_the_table_was_called_and_compared(report: dict[str, Any], newer: dict[str, Any]) -> None:
    assert set(report["operators"]) == set(vendor.DEVICE_OPERATORS)
    assert set(report["vendor"]) == set(VENDOR)
    assert {*report["called"], *newer["called"]} == set(aclnn.OPERATORS)
    assert set(device.SYMBOLS.values()) <= set(aclnn.OPERATORS)


def test_streams_events_and_pinned_memory_work(report: dict[str, Any]) -> None:
    assert report["streams"] == [True, True, True, True]


# --- what is recorded ---


def seen(dtype: str, *shape: int) -> dict[str, Any]:
    """A contiguous tensor, as a call records it."""
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    return {"shape": list(shape), "strides": strides, "dtype": dtype, "offset": 0}


def test_a_call_is_recorded_as_it_reaches_aclnn(report: dict[str, Any]) -> None:
    assert report["recorded"] == {
        "operator": "aclnnLightningIndexer",
        "arguments": {
            "query": seen("bfloat16", 4, 8, 128),
            "key": seen("bfloat16", 4, 16, 1, 128),
            "weights": seen("bfloat16", 4, 8),
            "actual_seq_lengths_query": seen("int32", 2),
            "actual_seq_lengths_key": seen("int32", 2),
            "block_table": seen("int32", 2, 2),
            "layout_query": "TND",
            "layout_key": "PA_BSND",
            "sparse_count": 8,
            "sparse_mode": 3,
            "pre_tokens": 2**63 - 1,
            "next_tokens": 2**63 - 1,
            "return_value": False,
            "sparse_indices": seen("int32", 4, 1, 8),
            "sparse_values": seen("bfloat16", 0),
        },
        "error": "no error",
    }


def test_nobody_makes_a_strided_cache_contiguous(report: dict[str, Any]) -> None:
    """It reaches aclnn as it is, and A2 and A3 take contiguous tensors alone: whoever calls has to see to it."""
    strided = {"shape": [4, 16, 1, 128], "strides": [2560, 160, 160, 1], "dtype": "bfloat16", "offset": 32}
    assert report["strided"]["arguments"]["key"] == strided
    assert "error code is 161002" in report["strided"]["error"]
    assert "aclnnLightningIndexer on A2: the documents say that tensors are contiguous" in report["strided"]["error"]


# --- what is an error ---


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("aclnn", "error code is 561000"),
        ("aclnn", "aclnnCumsum is not modelled"),
        ("acl", "error code is 507899"),
        ("acl", "aclGetDeviceCapability is not modelled"),
        ("absent", "Failed to find function aclrtGetDeviceResLimit"),
        ("mixed", "Expected all tensors to be on the same device"),
        ("another shape", "the result is [3, 4], but the output [1, 4]"),
        ("raises", "aclnnIndex: IndexError: index 7 is out of bounds"),
        ("dtype", "aclnnInplaceZero: ValueError: aclDataType 35 is not modelled"),
        ("fnuz", "Float8_e4m3fnuz has not been supported"),
        ("second", "a stand-in for A2 runs in this process; start another process."),
    ],
)
def test_what_the_host_cannot_do_is_an_error_that_names_it(report: dict[str, Any], what: str, words: str) -> None:
    assert words in report[what]


def test_a_tensor_that_reaches_past_its_storage_is_an_error(report: dict[str, Any]) -> None:
    assert report["beyond"] == ["no error", "a tensor reaches element 4 of a storage of 4"]


def test_every_function_that_torch_npu_needs_is_answered_or_an_error(folder: Path) -> None:
    package = find_spec("torch_npu")
    assert package is not None
    assert package.origin is not None
    _, functions = stubs.needed(Path(package.origin).parent)
    library = ctypes.CDLL(str(folder / stubs.FIRST))
    errors = set(functions) - set(runtime.ACL)
    assert len(errors) > 40
    assert {getattr(library, name)() for name in errors} == {stubs.ERROR}


def test_every_operator_of_op_plugin_has_its_two_functions(folder: Path) -> None:
    library = ctypes.CDLL(str(folder / stubs.FIRST))
    for name in ("aclnnCumsum", *aclnn.OPERATORS):
        assert hasattr(library, name), name
        assert hasattr(library, f"{name}{aclnn.WORKSPACE}"), name
    assert library.aclnnCumsumGetWorkspaceSize() == aclnn.ERROR


# --- a fault of the runtime's own ---


@pytest.mark.parametrize(
    ("case", "operator"),
    [
        ("attend-bf16-decode-lse", ""),
        ("attend-bf16-decode-lse", "aclnnSort"),
        ("attend-bf16-decode-lse", "aclnnSparseFlashAttention"),
    ],
    ids=["honest", "sort", "attention"],
)
def test_an_operator_that_answers_0_and_does_nothing_is_caught_by_a_case(folder: Path, case: str, operator: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in HIDDEN}
    command = [sys.executable, str(CALLS.with_name("silent.py")), str(folder), case, *filter(None, [operator])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    status, rule, reason = json.loads(done.stdout.splitlines()[-1])
    assert status == ("FAIL" if operator else "PASS"), f"{rule} {reason}"


# --- starting ---


def test_an_unknown_chip_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"^A9 is no chip that can be stood in for, but A2, A3, 950 are; name one of them\.$"
    with pytest.raises(stubs.HostUnavailable, match=message):
        runtime.start(tmp_path, "A9")
    monkeypatch.setenv(runtime.CHIP, "A9")
    with pytest.raises(stubs.HostUnavailable, match=message):
        runtime.start(tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_tools_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(stubs.HostUnavailable, match=r"^gcc and nm and readelf not found on PATH; install gcc and binutils"):
        runtime.start(tmp_path / "new", "A3")


def test_a_torch_npu_with_other_symbols_is_refused_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    package = Path(str(find_spec("torch_npu").submodule_search_locations[0]))  # type: ignore[union-attr, index]
    text = (package / "lib" / "libtorch_npu.so").read_bytes()
    other = text.replace(b"\0aclnnLightningIndexerGetWorkspaceSize\0", b"\0aclnnLightningIndexexGetWorkspaceSize\0")
    (tmp_path / "lib" / "libtorch_npu.so").write_bytes(other)
    with pytest.raises(stubs.HostUnavailable, match=r"^this torch_npu does not call aclnnLightningIndexer, which the host"):
        aclnn.source(tmp_path)


@pytest.mark.parametrize("what", ["torch", "CANN"])
def test_a_start_is_refused_beside_torch_and_beside_cann(folder: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    if what == "torch":
        monkeypatch.setitem(sys.modules, "torch", sys)
    else:
        monkeypatch.delitem(sys.modules, "torch", raising=False)
        monkeypatch.setenv("ASCEND_HOME_PATH", str(folder))
    with pytest.raises(stubs.HostUnavailable, match=r"torch is imported already" if what == "torch" else "CANN itself is"):
        runtime.start(folder, "A2")
