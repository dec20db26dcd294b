"""The chip behind torch_npu: which product it is, why it cannot be used, how it computes, how arrays get there and back."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from dsa_portable.arrays import from_numpy, to_numpy
from dsa_portable.backend import Device
from dsa_portable.backends.ascend import schemas
from dsa_portable.backends.ascend.constraints import PRODUCTS, SOC_NAMES, product_of
from dsa_portable.contract import Request
from dsa_portable.errors import DeviceUnavailable, InvalidArgument
from dsa_portable.profile import Profile

# Scratch of one call in bytes: the keys that its rows name are copied into it, slab by slab.
VARIABLE, SCRATCH = "DSA_ASCEND_SCRATCH", 512 << 20
# What torch_npu looks up in CANN's libopapi at the first call of each operator.
SYMBOLS: Mapping[str, str] = {
    schemas.LIGHTNING_INDEXER: "aclnnLightningIndexer",
    schemas.QUANT_LIGHTNING_INDEXER: "aclnnQuantLightningIndexer",
    schemas.SPARSE_FLASH_ATTENTION: "aclnnSparseFlashAttention",
    schemas.KV_QUANT_SPARSE_FLASH_ATTENTION: "aclnnKvQuantSparseFlashAttention",
}
NO_CANN = (
    "torch-npu is installed, but CANN is not on this process's library path ({}); install CANN and source its set_env.sh. "
    "Until then TORCH_DEVICE_BACKEND_AUTOLOAD=0 lets torch itself be imported."
)


def probe() -> Device:
    """The current NPU. Raises ImportError without torch_npu, DeviceUnavailable with what is missing and what to do."""
    torch, torch_npu = _sdk()
    if not torch.npu.is_available() or not torch.npu.device_count():
        raise DeviceUnavailable("torch_npu finds no NPU; check the driver with npu-smi info, and ASCEND_RT_VISIBLE_DEVICES.")
    name = str(torch.npu.get_device_name(0))
    found = product_of(name)
    if found is None:
        known = ", ".join(f"{product} ({begin}...)" for begin, product in SOC_NAMES)
        raise DeviceUnavailable(f"{name} has none of the operators, but {known} have; use one of them.")
    generation = schemas.generation_of(_schema)
    check_symbols(_opapi())
    versions = {"torch": torch.__version__, "torch_npu": torch_npu.__version__, "schemas": generation}
    return Device("npu", name, f"CANN {_cann(torch)}", torch.npu.device_count(), found, versions)


def _sdk() -> tuple[Any, Any]:
    """(torch, torch_npu), imported; explains why importing torch itself fails where torch_npu is there and CANN is not."""
    try:
        torch = import_module("torch")
        return torch, import_module("torch_npu")
    except ModuleNotFoundError:
        raise
    except (ImportError, RuntimeError, OSError) as exc:
        if find_spec("torch_npu") is None:
            raise
        raise DeviceUnavailable(NO_CANN.format(str(exc).splitlines()[0] if str(exc) else type(exc).__name__)) from exc


def _schema(operator: str) -> str | None:
    packet = getattr(import_module("torch").ops.npu, operator, None)
    return None if packet is None else str(packet.default._schema)


def _opapi() -> Any:
    try:
        return ctypes.CDLL("libopapi.so")
    except OSError as exc:
        raise DeviceUnavailable(NO_CANN.format(exc)) from exc


def check_symbols(library: Any) -> None:
    """Raise DeviceUnavailable for the first operator that this libopapi has no symbol of: CANN is older than the operator."""
    for operator, symbol in SYMBOLS.items():
        if not hasattr(library, symbol):
            raise DeviceUnavailable(f"CANN's libopapi.so has no {symbol}, which {operator} calls; install CANN 8.5 or later.")


def _cann(torch: Any) -> str:
    try:
        return str(torch.npu.utils.get_cann_version())
    except (AttributeError, RuntimeError):
        return "of unknown version"


@cache
def product() -> str:
    """`A2`, `A3` or `950`: the current chip."""
    name = str(import_module("torch").npu.get_device_name(0))
    found = product_of(name)
    if found is None:
        raise DeviceUnavailable(f"{name} is none of {', '.join(PRODUCTS)}; use one of them.")
    return found


# Profile field -> the document that says so, or that nobody has; `assumed` is judged as if it were promised.
ASSUMED = "assumed"
SOURCES: Mapping[str, Mapping[str, str]] = {
    "lightning_index": {
        "accumulator": ASSUMED,
        "intermediate": "cann-recipes-infer docs, DeepSeek-V3.2 lightning indexer, for int8; assumed elsewhere",
        "intermediate_exponent": "cann-recipes-infer docs: divided by 1024 before float16, for int8",
        "finite_max": "cann-recipes-infer docs: W * ScaleQ within float16, for int8",
        "head_sum": ASSUMED,
        "logit": ASSUMED,
        "qk_compute": ASSUMED,
        "scale_compute": ASSUMED,
        "subnormals": ASSUMED,
        "ties": "none promised; vllm-ascend#15053 saw them depend on the tiling",
        "deterministic": "not promised",
    },
    "sparse_attend": {
        "accumulator": ASSUMED,
        "logit": ASSUMED,
        "p": "op-plugin docs, sparse flash attention: P in the queries' dtype before the second product",
        "normaliser": ASSUMED,
        "kv_compute": "aclnnKvQuantSparseFlashAttention.md: dequantised to the queries' dtype; else stored so",
        "exp_ulp": ASSUMED,
        **dict.fromkeys(("maximum", "rescale_threshold", "normaliser_sum", "partials", "lse"), ASSUMED),
        "subnormals": ASSUMED,
        "deterministic": "not promised",
    },
}


def profile(found: Device | None, operator: str, format: str, phase: str) -> Profile:
    """float32 sums; int8 products by 1024 in float16 on their way to the head sum; 16-bit probabilities."""
    if operator == "lightning_index":
        if format.startswith("int8"):
            return Profile(intermediate="float16", intermediate_exponent=-10, finite_max=65504.0)
        return Profile()
    sixteen, packed = "float16" if format == "f16" else "bfloat16", format not in ("bf16", "f16")
    return Profile(p=sixteen, kv_compute=sixteen if packed else "float32")


def put(array: np.ndarray[Any, Any]) -> Any:
    """A copy as a tensor on the current NPU."""
    return from_numpy(np.array(array, order="C")).to("npu")


def get(array: Any) -> np.ndarray[Any, Any]:
    """A copy on the host."""
    return np.array(to_numpy(array))


def synchronize() -> None:
    """Wait for the NPU."""
    import_module("torch").npu.synchronize()


def scratch_bytes() -> int:
    """`DSA_ASCEND_SCRATCH` in bytes, 512 MiB by default. Raises InvalidArgument for what is no count of bytes."""
    text = os.environ.get(VARIABLE) or str(SCRATCH)
    if not text.isdecimal() or int(text) < 1:
        raise InvalidArgument(f"{VARIABLE} is {text!r}, but a whole number of bytes is accepted; set one or unset it.")
    return int(text)


def slabs(rows: int, per_row: int) -> Iterator[tuple[int, int]]:
    """(first, last) of groups of rows that fit into the scratch together, at least one each."""
    step = max(1, scratch_bytes() // per_row)
    for first in range(0, rows, step):
        yield first, min(first + step, rows)


# int32 [1] on the NPU, from the first time that somebody asks: until then calls pay for no witness.
_COUNTERS: list[Any] = []


def witness() -> int:
    """Calls that the NPU has worked off so far: each adds 1 to a counter on the device, behind its own work on the stream."""
    if not _COUNTERS:
        torch = import_module("torch")
        _COUNTERS.append(torch.zeros(1, dtype=torch.int32, device="npu"))
    return int(_COUNTERS[0].item())


def deliver(request: Request, results: tuple[Any, ...]) -> Any:
    """The operator's return value, also in the caller's arrays where there are any."""
    for given, result in zip(request.out or (), results, strict=False):
        given.copy_(result)
    _COUNTERS[:] = [counter + 1 for counter in _COUNTERS]
    return results if len(results) > 1 else results[0]
