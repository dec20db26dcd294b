"""CANN's runtime in host memory, so that the real torch_npu has an NPU: tensors on npu:0, whose operators op-plugin calls.

What no chip shows here: kernels, their numbers, their tiling, order and time. What it does show is the very arguments that
reach aclnn. Everything is done when a call returns, so that streams and events have nothing to wait for.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from dsa_portable.conformance.hosts.ascend import aclnn, stubs
from dsa_portable.conformance.hosts.ascend.stubs import HostUnavailable

CHIP, CANN = "DSA_ASCEND_CHIP", "DSA_ASCEND_CANN"
# Product -> the driver's name of one of its chips.
CHIPS: Mapping[str, str] = {"A2": "Ascend910B3", "A3": "Ascend910_9382", "950": "Ascend950PR_9589"}
CANN_VERSION = "9.1.0"
# torch_npu resolves aclnn's operators in libopapi, and looks for the others besides.
OPENED = ("libopapi.so", "libnnopbase.so")
SHARED = Path(__file__).with_name("hostrt.c")
# torch_npu must not queue operators for a thread of its own: at exit, such a thread would wait for Python for ever.
VARIABLES = {"TASK_QUEUE_ENABLE": "0", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
# ACL's calls that have nothing to do: one device and context, streams that are never behind, options that change nothing.
NOTHING_TO_DO = (
    "MsprofRegisterCallback",
    "aclFinalize",
    "aclInit",
    "aclSetCompileopt",
    "aclrtCtxSetSysParamOpt",
    "aclrtDestroyStreamForce",
    "aclrtRecordEvent",
    "aclrtResetDevice",
    "aclrtSetDevice",
    "aclrtSetDeviceSatMode",
    "aclrtSetStreamFailureMode",
    "aclrtSetStreamOverflowSwitch",
    "aclrtSetSysParamOpt",
    "aclrtStreamWaitEvent",
    "aclrtSynchronizeDeviceWithTimeout",
    "aclrtSynchronizeEvent",
    "aclrtSynchronizeStream",
    "aclrtSynchronizeStreamWithTimeout",
)
# ACL's other calls that torch_npu needs; every call that is in neither table is an error.
ACL: Mapping[str, str] = {
    **{name: f"int {name}(void) {{ return 0; }}" for name in NOTHING_TO_DO},
    "MsprofSysCycleTime": "int64_t MsprofSysCycleTime(void) { return 0; }",
    "aclAppLog": "void aclAppLog(void) {}",
    "aclGetCannAttribute": "int aclGetCannAttribute(int attribute, int32_t *value) { *value = 0; return 0; }",
    "aclGetRecentErrMsg": "const char *aclGetRecentErrMsg(void) { return message; }",
    "aclmdlRICaptureGetInfo": (
        "int aclmdlRICaptureGetInfo(void *stream, int *status, void **model) { *status = 0; if (model) *model = 0; return 0; }"
    ),
    "aclrtCreateEventExWithFlag": (
        "int aclrtCreateEventExWithFlag(void **event, uint32_t flag) { *event = calloc(1, 64); return 0; }"
    ),
    "aclrtCreateEventWithFlag": (
        "int aclrtCreateEventWithFlag(void **event, uint32_t flag) { *event = calloc(1, 64); return 0; }"
    ),
    "aclrtCreateStreamWithConfig": (
        "int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag)"
        " { *stream = calloc(1, 64); return 0; }"
    ),
    "aclrtDestroyEvent": "int aclrtDestroyEvent(void *event) { free(event); return 0; }",
    "aclrtEventElapsedTime": "int aclrtEventElapsedTime(float *ms, void *from, void *to) { *ms = 0; return 0; }",
    "aclrtFree": "int aclrtFree(void *memory) { free(memory); return 0; }",
    "aclrtFreeHost": "int aclrtFreeHost(void *memory) { free(memory); return 0; }",
    "aclrtGetCurrentContext": (
        "int aclrtGetCurrentContext(void **context) { static char only[64]; *context = only; return 0; }"
    ),
    "aclrtGetDevice": "int aclrtGetDevice(int32_t *device) { *device = 0; return 0; }",
    "aclrtGetDeviceCount": "int aclrtGetDeviceCount(uint32_t *count) { *count = 1; return 0; }",
    "aclrtGetMemInfo": (
        "int aclrtGetMemInfo(int kind, size_t *free, size_t *total) { *free = *total = (size_t)8 << 30; return 0; }"
    ),
    "aclrtGetSocName": "const char *aclrtGetSocName(void) { return soc_name; }",
    "aclrtGetSysParamOpt": "int aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return 0; }",
    # What nobody wrote is NaN.
    "aclrtMalloc": (
        "int aclrtMalloc(void **memory, size_t size, int policy) {"
        " size = (size + 511) / 512 * 512; *memory = aligned_alloc(512, size);"
        " if (!*memory) return 207001; memset(*memory, 255, size); return 0; }"
    ),
    "aclrtMallocAlign32": (
        "int aclrtMalloc(void **, size_t, int);"
        " int aclrtMallocAlign32(void **memory, size_t size, int policy) { return aclrtMalloc(memory, size, policy); }"
    ),
    # With an error here, pinning memory ends the process.
    "aclrtMallocHost": (
        "int aclrtMallocHost(void **memory, size_t size) { *memory = malloc(size + !size); return *memory ? 0 : 207001; }"
    ),
    "aclrtMemcpy": (
        "int aclrtMemcpy(void *to, size_t room, const void *from, size_t size, int kind)"
        " { if (size > room) return 107000; memmove(to, from, size); return 0; }"
    ),
    "aclrtMemcpyAsync": (
        "int aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, int kind, void *stream)"
        " { if (size > room) return 107000; memmove(to, from, size); return 0; }"
    ),
    "aclrtQueryEventStatus": "int aclrtQueryEventStatus(void *event, int *status) { *status = 1; return 0; }",
    "aclrtSetOpExecuteTimeOutV2": (
        "int aclrtSetOpExecuteTimeOutV2(uint64_t wanted, uint64_t *given) { *given = wanted; return 0; }"
    ),
    "aclrtStreamQuery": "int aclrtStreamQuery(void *stream, int *status) { *status = 0; return 0; }",
    "aclsysGetCANNVersion": (
        "int aclsysGetCANNVersion(int package, char *version) { strcpy(version, cann_version); return 0; }"
    ),
    "aclsysGetVersionStr": (
        "int aclsysGetVersionStr(const char *package, char *version) { strcpy(version, cann_version); return 0; }"
    ),
}


class Runtime:
    """A running stand-in; `calls` are the aclnn operators that were called, in their order."""

    def __init__(self, chip: str, cann: str, recorder: aclnn.Recorder) -> None:
        self.chip, self.cann, self._recorder = chip, cann, recorder

    @property
    def calls(self) -> list[aclnn.Call]:
        return list(self._recorder.calls)

    def clear(self) -> None:
        """Forget the calls."""
        self._recorder.calls.clear()


# The one of this process: torch loads its libraries once, and never lets go of them.
_running: list[Runtime] = []


def build(folder: Path) -> list[Path]:
    """Write the libraries for the installed torch_npu into a folder, unless they are there; returns their paths.

    Raises HostUnavailable where torch_npu, gcc, nm or readelf is missing.
    """
    return stubs.make(folder, _source, [Path(__file__), Path(aclnn.__file__), Path(stubs.__file__), SHARED], OPENED)


def _source(package: Path, functions: list[str]) -> str:
    unmodelled = sorted(set(functions) - set(ACL))
    errors = [f'int {name}(void) {{ return unmodelled("{name}", {stubs.ERROR}); }}' for name in unmodelled]
    return "\n".join((SHARED.read_text(encoding="utf-8"), *ACL.values(), *errors, aclnn.source(package)))


def start(folder: Path, chip: str | None = None, cann: str | None = None) -> Runtime:
    """Build into the folder what is not there, load it, and import torch and torch_npu over it.

    chip: A2, A3 or 950, else DSA_ASCEND_CHIP, else A2.  cann: the version that torch_npu reads, else DSA_ASCEND_CANN, else
    9.1.0. Raises HostUnavailable for an unknown chip, after a first start, where torch is imported already, and where CANN is.
    """
    chip = chip or os.environ.get(CHIP) or next(iter(CHIPS))
    cann = cann or os.environ.get(CANN) or CANN_VERSION
    if chip not in CHIPS:
        raise HostUnavailable(f"{chip} is no chip that can be stood in for, but {', '.join(CHIPS)} are; name one of them.")
    if _running:
        raise HostUnavailable(f"a stand-in for {_running[0].chip} runs in this process; start another process.")
    build(folder)
    stubs.load(folder)
    library = ctypes.CDLL(str(folder / stubs.FIRST))
    recorder = aclnn.Recorder(library, chip)
    library.dsa_host_begin(CHIPS[chip].encode(), cann.encode(), recorder.function)
    os.environ.update(VARIABLES)
    import_module("torch")
    import_module("torch_npu")
    _running.append(Runtime(chip, cann, recorder))
    return _running[0]
