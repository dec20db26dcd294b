"""What planted faults are tried on: cases of the lists, and inputs that no list has yet, named by the case and what is changed.

A listed case stands here because it kills a fault that the others miss, or for its hazard; kills.json shows which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from dsa_portable.conformance.cases.call import Call, Steps
from dsa_portable.conformance.cases.catalogue import CASES, Case
from dsa_portable.conformance.cases.sparse_attend import AttendCase
from dsa_portable.formats import pack, unpack
from dsa_portable.profile import Profile

Array: TypeAlias = np.ndarray[Any, Any]
HEADLINE = "index-e4m3-f32-f32"
LSE = (("return_lse", True),)


@dataclass(frozen=True)
class Input:
    """A case, or one of its single calls changed; `dear`: tried only on faults that nothing else kills.

    `ties`: the tie rule that the kernels declare there; the narrowest but where a fault is to be seen by agreement alone.
    """

    case: str
    change: Callable[[Call], Call] | None = None
    fields: tuple[tuple[str, Any], ...] = ()
    dear: bool = False
    ties: str = "lowest"

    @property
    def profile(self) -> Profile:
        """The narrowest profile that a chip can declare: whoever survives it survives all."""
        return Profile(ties=self.ties)

    def made(self) -> tuple[Case, Steps]:
        """The case that judges and the calls that are made."""
        case = CASES[self.case]
        if self.change is None and not self.fields:
            return case, case.steps()
        assert isinstance(case, AttendCase)
        case = replace(case, **dict(self.fields))
        call = case.build()
        return case, _one(self.change(call) if self.change else call)


def _one(call: Call) -> Steps:
    yield call


def with_arrays(call: Call, **arrays: Array) -> Call:
    """The call with other arrays."""
    return replace(call, arrays={**call.arrays, **arrays})


def all_holes(call: Call) -> Call:
    """One row names nothing, though its request has keys."""
    indices = call.arrays["indices"].copy()
    indices[1] = -1
    return with_arrays(call, indices=indices)


def ranges(call: Call) -> Call:
    """A batch whose key ranges the index used."""
    rows = len(call.arrays["q"])
    bounds = {"key_start": np.full(rows, 2, np.int32), "key_end": np.full(rows, 1000, np.int32)}
    return replace(call, batch={**call.batch, **bounds})


def other_scale(call: Call) -> Call:
    """softmax_scale of another model."""
    return replace(call, options={**call.options, "softmax_scale": 256**-0.5})


def small_codes(call: Call) -> Call:
    """The same cache with float8 codes 2^12 times smaller, half of them subnormal, under scales as much larger."""
    name, kv = call.options["kv_layout"], call.arrays["kv"]
    values, scale, rope = unpack(name, kv)
    smaller = (values.astype(np.float32) * np.float32(2.0**-12)).astype(ml_dtypes.float8_e4m3fn)
    return with_arrays(call, kv=pack(name, smaller, scale * np.float32(2.0**12), rope))


def far_pages(call: Call) -> Call:
    """The same pages on both sides of element 2^31; the memory between is never touched."""
    kv = call.arrays["kv"]
    first = 2**31 // kv[0].size - len(kv) // 2
    memory = np.zeros((first + len(kv), *kv.shape[1:]), kv.dtype)
    memory[first:] = kv
    table, used = call.batch["block_table"], -(-call.batch["seqlens_k"] // call.batch_options["page_size"])
    inside = np.arange(table.shape[1]) < used[:, None]
    table = np.where(inside, table + first, table).astype(np.int32)
    return replace(with_arrays(call, kv=memory), batch={**call.batch, "block_table": table})


# Small cases, on which every fault of their operator is tried.
_ALL = (
    *(f"{HEADLINE}-decode-{name}" for name in ("lengths", "paged64", "paged128", "scores", "out", "range")),
    f"{HEADLINE}-prefill-plateau",
    *(f"attend-bf16-decode-{name}" for name in ("paged64", "paged128", "flat", "lse")),
    *(f"attend-bf16-prefill-{name}" for name in ("onehot", "sink")),
    "attend-f32-decode-flat",
    "attend-v32_fp8_656_nsr-decode-flat",
)
# Cases of one hazard each, for what those leave alive.
_REST = (
    *(f"{HEADLINE}-prefill-{name}" for name in ("ragged", "lattice", "cancel", "range", "not-causal", "codes-scores")),
    *(f"{HEADLINE}-prefill-{name}" for name in ("visible-nan", "visible-inf", "planar", "interleaved")),
    *(f"{HEADLINE}-prefill-{name}" for name in ("topk1", "topk512", "dim64")),
    "index-bf16-f32-prefill-lattice",
    f"{HEADLINE}-decode-long",
    *(f"attend-bf16-prefill-{name}" for name in ("repeated", "topk-length")),
    *(f"attend-v32_fp8_656_nsr_f32-decode-{name}" for name in ("flat", "paged128")),
    "attend-ascend_656_nrs_int8-decode-flat",
)
# Points of the covering table, the cheapest that kill what was found in public ports and nothing above sees.
_POINTS = (
    *(f"{HEADLINE}-decode-axes-{n:03}" for n in (5, 7, 27, 35, 53, 55, 66, 160, 161, 164, 271, 286, 327)),
    *(f"{HEADLINE}-prefill-axes-{n:03}" for n in (58, 69, 156)),
    "index-int8-f16-f16-decode-axes-007",
    *(f"attend-bf16-decode-axes-{n:03}" for n in (1, 4, 17, 21, 23, 31, 40, 47, 164)),
    *(f"attend-bf16-prefill-axes-{n:03}" for n in (45, 57, 60)),
    *(f"attend-f16-decode-axes-{n:03}" for n in (7, 12)),
    *(f"attend-v32_fp8_656_nsr-decode-axes-{n:03}" for n in (7, 12, 18)),
)
INPUTS: Mapping[str, Input] = MappingProxyType(
    {
        **{id: Input(id) for id in _ALL},
        **{id: Input(id, dear=True) for id in (*_REST, *_POINTS)},
        f"{HEADLINE}-prefill-ties-rerun": Input(f"{HEADLINE}-prefill-ties-rerun", dear=True, ties="any"),
        "attend-bf16-decode-lse: a row of holes": Input("attend-bf16-decode-lse", all_holes, dear=True),
        "attend-v32_fp8_656_nsr-decode-lse: pages around 2^31": Input(
            "attend-v32_fp8_656_nsr-decode-lse", far_pages, dear=True
        ),
        "attend-bf16-prefill-onehot: sink and lse": Input(
            "attend-bf16-prefill-onehot", fields=(("sink", True), ("options", LSE)), dear=True
        ),
        "attend-bf16-prefill-topk512: topk 500": Input("attend-bf16-prefill-topk512", fields=(("topk", 500),), dear=True),
        "attend-bf16-decode-page256: pages of 61": Input("attend-bf16-decode-page256", fields=(("page_size", 61),), dear=True),
        "attend-bf16-decode-flat: key ranges": Input("attend-bf16-decode-flat", ranges, dear=True),
        "attend-bf16-decode-flat: another softmax_scale": Input("attend-bf16-decode-flat", other_scale, dear=True),
        "attend-v32_fp8_656_nsr-decode-flat: subnormal codes": Input(
            "attend-v32_fp8_656_nsr-decode-flat", small_codes, dear=True
        ),
    }
)
