"""`python host_calls.py FOLDER`: what torch_npu does over the host runtime, as JSON; chip and CANN's version by the variables.

A process of its own: torch_npu loads its libraries once. Numbers are compared here, bit for bit, and reported as booleans.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsa_portable.conformance.hosts.ascend import aclnn, runtime

host = runtime.start(Path(sys.argv[1]))

import torch  # noqa: E402
import torch_npu  # noqa: E402

from dsa_portable.conformance.hosts.ascend import reference  # noqa: E402

SEED = torch.Generator().manual_seed(7)
DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "int8", "uint8", "int32", "int64")


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=SEED).to(dtype)


def whole(*shape: int, low: int = -9, high: int = 10, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=SEED).to(dtype)


F, G, H = floats(3, 4), floats(3, 4), floats(3, 4, dtype=torch.float16)
K, J, P = whole(3, 4), whole(3, 4), whole(3, 4, low=1)
B, C = K < 0, J < 0
ENDS, PLACES = torch.tensor([0, 3, 3, 5], dtype=torch.int32), torch.tensor([2, 0, 1, 1], dtype=torch.int32)
# The name in backends/ascend/vendor.py -> each form in which the adapter and the batch ask for it.
OPERATORS: dict[str, list[tuple[Callable[..., Any], tuple[torch.Tensor, ...]]]] = {
    "add": [(lambda a, b: a + b, (F, G)), (lambda a: a + 3, (K,)), (lambda a, b: a + b[:, :1], (K, J))],
    "arange": [(lambda a: torch.arange(5, dtype=torch.int32, device=a.device), (K,))],
    "bitwise_and": [(lambda a, b: a & b, (B, C))],
    "bitwise_not": [(lambda a: ~a, (B,))],
    "bmm": [
        (lambda a, b: torch.matmul(a, b), (floats(2, 3, 4), floats(2, 4, 5))),
        (torch.bmm, (floats(2, 3, 4), floats(2, 4, 5))),
    ],
    "cast": [
        (lambda a: a.to(torch.float32), (H,)),
        (lambda a: a.to(torch.bfloat16), (F,)),
        (lambda a: a.to(torch.int64), (K,)),
    ],
    "cat": [(lambda a, b: torch.cat([a, b]), (K, J)), (lambda a, b: torch.cat([a[:, :1], b], dim=1), (F, G))],
    "clamp": [(lambda a: torch.clamp(a, min=0), (K,)), (lambda a: torch.clip(a, 0, None), (K,))],
    "copy": [(lambda a: a.T.contiguous(), (F,)), (lambda a: a.clone(), (K,)), (lambda a, b: a.clone().copy_(b[0]), (F, G))],
    "fill": [
        (lambda a: torch.full((3, 2), -1, dtype=torch.int32, device=a.device), (K,)),
        (lambda a: a.new_full((2,), 7), (K,)),
        (lambda a: torch.zeros((2, 3), device=a.device), (F,)),
        (lambda a: a.new_zeros((2, 2)), (H,)),
        (lambda a: torch.ones((2, 2), dtype=a.dtype, device=a.device), (H,)),
    ],
    "floor_divide": [(lambda a: a // 3, (K,)), (lambda a, b: a // b, (K, P))],
    "ge": [(lambda a: a >= 0, (K,)), (lambda a, b: a >= b, (K, J))],
    "index": [
        (lambda a, at: a[at], (F, PLACES)),
        (lambda a, at: a[at.long()], (K, PLACES)),
        (lambda a, at: a[at[:, None], at[None, :]], (K, PLACES)),
    ],
    "index_select": [(lambda a, at: torch.index_select(a, 0, at), (H, PLACES))],
    "log": [(torch.log, (floats(5).exp(),))],
    "lt": [(lambda a: a < 0, (K,)), (lambda a, b: a < b, (K, J))],
    "minimum": [(torch.minimum, (K, J))],
    "mul": [(lambda a: a * 3, (K,)), (lambda a, b: a * b[:, :1], (F, G))],
    "relu": [(torch.relu, (F,))],
    "remainder": [(lambda a: a % 5, (K,)), (lambda a, b: a % b, (K, P))],
    "searchsorted": [(lambda a, b: torch.searchsorted(a, b, side="right"), (ENDS, PLACES))],
    "sigmoid": [(torch.sigmoid, (F,))],
    "sort": [(lambda a: torch.sort(a, dim=1).values, (K,))],
    "sub": [(lambda a, b: a - b, (F, G)), (lambda a: a - 1, (K,))],
    "where": [
        (lambda c, a: torch.where(c, a, -1), (B, K)),
        (lambda c, a: torch.where(c, float("-inf"), a), (B, F)),
        (lambda c, a, b: torch.where(c[:, :1], a, b), (B, K, J)),
    ],
}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Dtype, shape and bits."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(left.contiguous().reshape(-1).view(torch.uint8), right.contiguous().reshape(-1).view(torch.uint8))


def on_npu(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.npu() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}


def operators() -> Iterator[tuple[str, Any]]:
    for name, forms in OPERATORS.items():
        found = []
        for function, arguments in forms:
            result = function(*(argument.npu() for argument in arguments))
            found.append(result.device.type == "npu" and same(result.cpu(), function(*arguments)))
        yield name, found


def there_and_back() -> Iterator[tuple[str, Any]]:
    for name in DTYPES:
        bits = whole(7, 16, low=0, high=256, dtype=torch.uint8).view(getattr(torch, name))
        part = bits[::2, 1:]
        yield name, same(bits.npu().cpu(), bits) and same(bits.npu()[::2, 1:].cpu(), part.contiguous())


def streams() -> Any:
    """Work on a stream of its own, an event that another waits for, and memory that is pinned for it."""
    stream, event = torch.npu.Stream(), torch.npu.Event()
    pinned = F.pin_memory()
    with torch.npu.stream(stream):
        doubled = pinned.to("npu", non_blocking=True) * 2
        event.record()
    torch.npu.current_stream().wait_event(event)
    stream.synchronize()
    return [event.query(), stream.query(), pinned.is_pinned(), same(doubled.cpu(), F * 2)]


def error(function: Callable[[], Any]) -> str:
    try:
        function()
    except (RuntimeError, ValueError) as exc:
        return str(exc)
    return "no error"


def beyond(last: int) -> str:
    """A tensor of 3 in a storage of 4, from an offset on which its last element is this one."""
    memory = (ctypes.c_float * 8)()
    place = aclnn._Tensor(rank=1, sizes=(3,), strides=(1,), offset=last - 2, places=4, data=ctypes.addressof(memory))
    return error(lambda: aclnn._tensor(ctypes.addressof(place)))


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
TABLE = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
LENGTHS, PAGED = {"actual_seq_lengths_query": integers(1, 4)}, {"block_table": TABLE, "layout_query": "TND"}
INDEX = {**LENGTHS, **PAGED, "actual_seq_lengths_key": integers(20, 27), "layout_key": "PA_BSND", "sparse_count": 8}
ATTEND = {**LENGTHS, **PAGED, "actual_seq_lengths_kv": integers(20, 27), "layout_kv": "PA_BSND", "attention_mode": 2}
LATENT = floats(4, 16, 1, 512, dtype=BFLOAT16)
ATTENDED = {
    "query": floats(4, 2, 512, dtype=BFLOAT16),
    "key": LATENT,
    "value": LATENT,
    "sparse_indices": whole(4, 1, 12, low=0, high=20),
    "scale_value": 0.125,
    "query_rope": floats(4, 2, 64, dtype=BFLOAT16),
    "key_rope": floats(4, 16, 1, 64, dtype=BFLOAT16),
    **ATTEND,
}
INDEXED = {
    "query": floats(4, 8, 128, dtype=BFLOAT16),
    "key": floats(4, 16, 1, 128, dtype=BFLOAT16),
    "weights": floats(4, 8, dtype=BFLOAT16),
    **INDEX,
}
CACHE = torch.cat(
    [
        whole(4, 16, 1, 512, low=-128, high=128, dtype=torch.int8),
        floats(4, 16, 1, 64, dtype=BFLOAT16).view(torch.int8),
        floats(4, 16, 1, 4).abs().view(torch.int8),
    ],
    dim=-1,
)
QUANTISED = {
    "query": whole(4, 8, 128, dtype=torch.int8),
    "key": whole(4, 16, 1, 128, dtype=torch.int8),
    "weights": floats(4, 8, dtype=FLOAT16),
    "query_dequant_scale": floats(4, 8, dtype=FLOAT16).abs(),
    "key_dequant_scale": floats(4, 16, 1, dtype=FLOAT16).abs(),
    "query_quant_mode": 0,
    "key_quant_mode": 0,
    **INDEX,
}
PACKED = {
    "query": floats(4, 2, 576, dtype=BFLOAT16),
    "key": CACHE,
    "value": CACHE,
    "sparse_indices": whole(4, 1, 12, low=0, high=20),
    "scale_value": 0.125,
    "key_quant_mode": 2,
    "value_quant_mode": 2,
    **ATTEND,
}
VENDOR: dict[str, tuple[str, dict[str, Any]]] = {
    "LI": ("npu_lightning_indexer", INDEXED),
    "LI with scores": (
        "npu_lightning_indexer",
        {
            "query": floats(2, 3, 8, 128, dtype=BFLOAT16),
            "key": floats(2, 24, 1, 128, dtype=BFLOAT16),
            "weights": floats(2, 3, 8, dtype=BFLOAT16),
            "sparse_count": 8,
            "return_value": True,
        },
    ),
    "QLI": ("npu_quant_lightning_indexer", QUANTISED),
    "SFA": ("npu_sparse_flash_attention", ATTENDED),
    "SFA with sinks": ("npu_sparse_flash_attention", {**ATTENDED, "sinks": floats(2)}),
    "SFA with lse": (
        "npu_sparse_flash_attention",
        {
            **{name: ATTENDED[name] for name in ("scale_value", "attention_mode")},
            **{name: ATTENDED[name][:2].unsqueeze(1) for name in ("query", "query_rope")},
            **{name: ATTENDED[name][:2] for name in ("key", "value", "key_rope")},
            "sparse_indices": whole(2, 1, 1, 12, low=0, high=16),
            "sparse_mode": 0,
            "return_softmax_lse": True,
        },
    ),
    "KVQ": ("npu_kv_quant_sparse_flash_attention", PACKED),
}


def vendor() -> Iterator[tuple[str, Any]]:
    for title, (operator, arguments) in VENDOR.items():
        if "sinks" in arguments and host.chip != "950":
            continue
        found, wanted = getattr(torch.ops.npu, operator)(**on_npu(arguments)), getattr(reference, operator)(**arguments)
        found, wanted = (results if isinstance(results, tuple) else (results,) for results in (found, wanted))
        yield title, [same(each.cpu(), of) for each, of in zip(found, wanted, strict=True)]


def recorded(operator: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The one call that reaches aclnn, and what becomes of it."""
    ready = on_npu(arguments)
    host.clear()
    became = error(lambda: getattr(torch.ops.npu, operator)(**ready))
    (call,) = host.calls
    named = {name: asdict(value) if hasattr(value, "shape") else value for name, value in call.named().items()}
    return {"operator": call.operator, "arguments": named, "error": became}


def main() -> dict[str, Any]:
    report: dict[str, Any] = {
        "host": [host.chip, host.cann],
        "name": torch.npu.get_device_name(0),
        "count": torch.npu.device_count(),
        "cann": torch.npu.utils.get_cann_version(),
        "version": torch_npu.__version__,
        "without value": error(lambda: torch.ops.npu.npu_sparse_flash_attention(**on_npu({**ATTENDED, "value": None}))),
        "second": error(lambda: runtime.start(Path(sys.argv[1]))),
    }
    host.clear()
    report["vendor"] = dict(vendor())
    report["called"] = sorted({call.operator for call in host.calls})
    if "--all" in sys.argv:
        report |= {"bits": dict(there_and_back()), "operators": dict(operators())}
        report["called"] = sorted({call.operator for call in host.calls})
        report["streams"] = streams()
        cache = floats(4, 16, 1, 160, dtype=BFLOAT16).npu()
        report |= {
            "recorded": recorded("npu_lightning_indexer", INDEXED),
            "strided": recorded("npu_lightning_indexer", {**INDEXED, "key": cache[..., 32:]}),
            "aclnn": error(lambda: torch.cumsum(F.npu(), 0)),
            "acl": error(lambda: torch.npu.get_device_properties(0)),
            "absent": error(lambda: torch.npu.get_device_limit(0)),
            "mixed": error(lambda: torch.ops.npu.npu_lightning_indexer(**{**on_npu(INDEXED), "key": INDEXED["key"]})),
            "beyond": [beyond(3), beyond(4)],
            "another shape": error(lambda: aclnn._compute(aclnn.OPERATORS["aclnnRelu"], [F, torch.empty(1, 4)])),
            "raises": error(lambda: F.npu()[integers(7).npu()]),
            "dtype": error(lambda: torch.zeros(3, dtype=torch.float8_e5m2, device="npu").clone()),
            # What no NPU has, torch_npu carries to and fro and refuses to compute with.
            "fnuz": error(lambda: torch.empty(3, dtype=torch.float8_e4m3fnuz).npu().clone()),
        }
    return report


print(json.dumps(main()))
