"""The CPU backend: NumPy arrays in and out, float32 arithmetic, ONNX Runtime by default and plain NumPy on request."""

from __future__ import annotations

import time
from collections.abc import Container
from itertools import product
from typing import Any

import numpy as np

from dsa_portable import profile
from dsa_portable.backend import Backend, Device
from dsa_portable.backends.cpu.settings import probe
from dsa_portable.contract import ANY, YES, Capabilities
from dsa_portable.formats import LAYOUTS

_FLOATS = ("f32", "bf16", "f16")
_SHARED: dict[str, Container[Any]] = {"topk": ANY, "flat": YES, "page_size": ANY, "ragged": YES, "out": YES}
_CAPABILITIES: Capabilities = {
    "lightning_index": {
        **_SHARED,
        "format": tuple(
            "/".join(parts)
            for parts in (*product(("e4m3", "int8"), _FLOATS, ("f32", "f16")), *product(_FLOATS, _FLOATS, ("-",)))
        ),
        "heads": ANY,
        "head_dim": ANY,
        "k_layout": tuple(name for name, layout in LAYOUTS.items() if layout.operator == "lightning_index"),
        "unsorted": YES,
        "return_scores": YES,
        "key_range": YES,
        "non_causal": YES,
    },
    "sparse_attend": {
        **_SHARED,
        "format": (*_FLOATS, *(name for name, layout in LAYOUTS.items() if layout.operator == "sparse_attend")),
        "heads": ANY,
        "dims": ANY,
        "return_lse": YES,
        "attn_sink": YES,
        "topk_length": YES,
        "repeated_indices": YES,
    },
}


def _profile(device: Device | None, operator: str, format: str, phase: str) -> profile.Profile:
    """Every operand is widened to float32 exactly, and everything after is float32; only the result is rounded to q's dtype."""
    return profile.Profile(ties="lowest")


BACKEND = Backend(
    name="cpu",
    version="0.1.0",
    devices=("cpu",),
    arrays="numpy",
    operators={
        "lightning_index": "dsa_portable.backends.cpu.lightning_index:lightning_index",
        "sparse_attend": "dsa_portable.backends.cpu.sparse_attend:sparse_attend",
    },
    install="pip install 'dsa-portable[cpu]'",
    probe=probe,
    capabilities=lambda device: _CAPABILITIES,
    profile=_profile,
    put=np.array,
    get=np.array,
    witness=time.process_time_ns,
)
