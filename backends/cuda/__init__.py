"""The CUDA backend: Triton kernels over torch tensors, for NVIDIA from sm_80 on; Triton's interpreter on request."""

from __future__ import annotations

from collections.abc import Container
from itertools import product
from typing import Any

from dsa_portable.backend import Backend, Device
from dsa_portable.backends.cuda import configurations, device
from dsa_portable.contract import ANY, YES, Capabilities
from dsa_portable.formats import LAYOUTS

_WEIGHTS = ("f32", "bf16", "f16")
_SHARED: dict[str, Container[Any]] = {"topk": ANY, "flat": YES, "page_size": ANY, "ragged": YES, "out": YES, "heads": ANY}
_ATTEND_FORMATS = ("f32", "bf16", "f16", *(name for name, layout in LAYOUTS.items() if layout.operator == "sparse_attend"))
_CAPABILITIES: Capabilities = {
    "lightning_index": {
        **_SHARED,
        "format": tuple(
            "/".join(parts)
            for parts in (*product(("e4m3", "int8"), _WEIGHTS, ("f32", "f16")), *product(("bf16", "f16"), _WEIGHTS, ("-",)))
        ),
        "head_dim": (64, 128),
        "k_layout": tuple(name for name, layout in LAYOUTS.items() if layout.operator == "lightning_index"),
        "unsorted": YES,
        "return_scores": YES,
        "key_range": YES,
        "non_causal": YES,
    },
    "sparse_attend": {
        **_SHARED,
        "format": _ATTEND_FORMATS,
        "dims": ("576/512", "512/512"),
        "return_lse": YES,
        "attn_sink": YES,
        "topk_length": YES,
        "repeated_indices": YES,
    },
}


def _capabilities(found: Device | None) -> Capabilities:
    """All of it, but for float32 attention where the Hopper kernels are asked for, which have none."""
    if configurations.asked_for() != "hopper":
        return _CAPABILITIES
    return {**_CAPABILITIES, "sparse_attend": {**_CAPABILITIES["sparse_attend"], "format": _ATTEND_FORMATS[1:]}}


BACKEND = Backend(
    name="cuda",
    version="0.1.0",
    # In the interpreter the tensors lie on the host, where the cpu backend is the one that auto should find.
    devices=("cpu",) if device.interpreting() else ("cuda",),
    auto=not device.interpreting(),
    arrays="torch",
    operators={
        "lightning_index": "dsa_portable.backends.cuda.lightning_index:lightning_index",
        "sparse_attend": "dsa_portable.backends.cuda.sparse_attend:sparse_attend",
    },
    install="pip install 'dsa-portable[cuda]'",
    probe=device.probe,
    capabilities=_capabilities,
    profile=device.profile,
    put=device.put,
    get=device.get,
    synchronize=device.synchronize,
    witness=device.witness,
)
