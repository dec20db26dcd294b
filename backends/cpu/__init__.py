"""The CPU backend: NumPy arrays in and out, float32 sums; compiled where llvmlite is installed, by ONNX Runtime elsewhere."""

from __future__ import annotations

import time
from collections.abc import Container
from itertools import product
from typing import Any

import numpy as np

from dsa_portable import profile
from dsa_portable.backend import Backend, Device
from dsa_portable.backends.cpu.ceilings import ceilings
from dsa_portable.backends.cpu.jit import isa
from dsa_portable.backends.cpu.settings import probe
from dsa_portable.contract import ANY, YES, Capabilities
from dsa_portable.formats import LAYOUTS

_FLOATS = ("f32", "bf16", "f16")
_SEEN: dict[str, Container[Any]] = {"ragged": YES, "key_range": YES, "non_causal": YES, "out": YES}
_STORED: dict[str, Container[Any]] = {"flat": YES, "page_size": ANY, "heads": ANY}
_SCORED: dict[str, Container[Any]] = {
    **_SEEN,
    **_STORED,
    "format": tuple(
        "/".join(parts) for parts in (*product(("e4m3", "int8"), _FLOATS, ("f32", "f16")), *product(_FLOATS, _FLOATS, ("-",)))
    ),
    "head_dim": ANY,
    "k_layout": tuple(name for name, layout in LAYOUTS.items() if layout.operator == "lightning_index"),
}
_CAPABILITIES: Capabilities = {
    "lightning_index": {**_SCORED, "topk": ANY, "unsorted": YES, "return_scores": YES},
    "sparse_attend": {
        **_STORED,
        "format": (*_FLOATS, *(name for name, layout in LAYOUTS.items() if layout.operator == "sparse_attend")),
        "dims": ANY,
        "topk": ANY,
        "ragged": YES,
        "out": YES,
        "return_lse": YES,
        "attn_sink": YES,
        "topk_length": YES,
        "repeated_indices": YES,
    },
    "index_scores": _SCORED,
    "index_select": {**_SEEN, "format": ("f32",), "topk": ANY, "unsorted": YES},
}

# As its compiled graphs say: both factors and the result of every matrix product are bfloat16, and weights and logits with
# them; exp, the normaliser and the scales of keys are float32. Outside every envelope for both operators. So is q times
# softmax_scale, for which a profile has no word: the suite finds attention worse than this declares.
_OPENVINO_BF16 = profile.Profile(
    qk_compute="bfloat16",
    intermediate="bfloat16",
    head_sum="bfloat16",
    kv_compute="bfloat16",
    logit="bfloat16",
    p="bfloat16",
    partials="bfloat16",
    subnormals="flushed",
    ties="lowest",
)


def _profile(device: Device | None, operator: str, format: str, phase: str) -> profile.Profile:
    """Every operand is widened to float32 exactly, and everything after is float32; only the result is rounded to q's dtype.

    Where the jit engine multiplies in pairs of bfloat16, subnormal operands count as 0, and attention rounds P to bfloat16.
    """
    versions = {} if device is None else device.versions
    if versions.get("engine") == "openvino-bf16":
        return _OPENVINO_BF16
    if "openvino_device" in versions:
        # The bits of a second call were compared on the CPU alone.
        return profile.Profile(ties="lowest", deterministic=versions["openvino_device"].startswith("CPU "))
    instructions = isa.NAMED.get(versions.get("isa", ""))
    operand = format.partition("/")[0]
    if instructions is None or not instructions.paired(operand):
        return profile.Profile(ties="lowest", deterministic=True)
    subnormals = "flushed" if operand == "bf16" else "kept"
    p = "bfloat16" if operator == "sparse_attend" else "float32"
    return profile.Profile(ties="lowest", deterministic=True, subnormals=subnormals, p=p)


BACKEND = Backend(
    name="cpu",
    version="0.1.0",
    devices=("cpu",),
    arrays="numpy",
    operators={name: f"dsa_portable.backends.cpu.{name}:{name}" for name in _CAPABILITIES},
    install="pip install 'dsa-portable[cpu]'",
    probe=probe,
    capabilities=lambda device: _CAPABILITIES,
    profile=_profile,
    put=np.array,
    get=np.array,
    witness=time.process_time_ns,
    ceilings=ceilings,
)
