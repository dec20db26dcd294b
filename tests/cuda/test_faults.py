"""Faults planted in the kernels' own text, each caught by a named case; the same copy without the fault passes it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from dsa_portable.conformance.selftest.plant import FileEdit

from . import planted

ATTEND, INDEX, TOP_K, ROWS = (f"kernels/{name}.py" for name in ("sparse_attend", "lightning_index", "top_k", "rows"))
# Room for no more candidates than are chosen: every long row has too many.
SMALL = ("configurations.py", "((2048, 8192), (8192, 16384))", "((2048, 2048),)")
# Every row is split.
SPLIT = ("configurations.py", 'os.environ.get(PARTS) or "1"', 'os.environ.get(PARTS) or "2"')


@dataclass(frozen=True)
class Fault:
    """A text of the backend and what stands there instead; `setting` is edited in the honest twin too."""

    title: str
    edit: FileEdit
    case: str
    rule: str
    setting: tuple[FileEdit, ...] = ()
    slow: bool = False  # beyond the sample that CI runs


FAULTS = (
    Fault(
        "holes are not masked",
        (ATTEND, 'tl.where(named[None, :], logits, float("-inf"))', "logits + 0.0"),
        "attend-bf16-decode-flat",
        "bound",
    ),
    Fault("-1 names a key", (ATTEND, "named = (position >= 0)", "named = (position >= -1)"), "attend-bf16-decode-out", "bound"),
    Fault(
        "parts are merged as if rows came second",
        (ATTEND, "place = (local * PARTS + part)", "place = (part * tl.num_programs(1) + local)"),
        "attend-bf16-decode-flat",
        "bound",
        (SPLIT,),
    ),
    Fault(
        "the sink counts in every part",
        (
            ATTEND,
            "    else:\n        place =",
            "    else:\n"
            "        if attn_sink is not None:\n"
            "            share = tl.load(attn_sink + head, mask=real_head, other=0.0) - top * softmax_scale\n"
            "            total += tl.exp2(tl.minimum(share, 80.0) * LOG2_E)\n"
            "        place =",
        ),
        "attend-bf16-decode-sink",
        "bound",
        (SPLIT,),
    ),
    Fault(
        "exp2 without log2(e)",
        (ATTEND, "(logits - raised[:, None]) * to_base_2", "(logits - raised[:, None]) * softmax_scale"),
        "attend-bf16-decode-flat",
        "rms",
    ),
    Fault(
        "the last tile is dropped",
        (ATTEND, "range(begin, limit, BLOCK_K)", "range(begin, limit - BLOCK_K, BLOCK_K)"),
        "attend-bf16-decode-flat",
        "bound",
    ),
    Fault(
        "one tile's scale for all",
        (ATTEND, "* scale[:, :, None]", "* tl.max(scale, axis=1)[:, None, None]"),
        "attend-v32_fp8_656_nsr-decode-flat",
        "bound",
    ),
    Fault(
        "a page twice as large, the index cache's",
        ("sparse_attend.py", "            rows.page_size,\n", "            2 * rows.page_size,\n"),
        "attend-bf16-decode-lse",
        "nan",
    ),
    Fault(
        "candidates beyond the buffer are dropped",
        (TOP_K, "(found < topk) | (found > CAPACITY)", "found < topk"),
        "index-e4m3-f32-f32-decode-scores",
        "certificate",
        (SMALL,),
        slow=True,
    ),
    Fault(
        "one key's scale for a tile",
        (INDEX, "tl.load(k_scale + scale_offset,", "tl.load(k_scale + scale_offset // 4 * 4,"),
        "index-e4m3-f32-f32-prefill-topk1",
        "certificate",
        slow=True,
    ),
    Fault(
        "weights in bfloat16",
        (
            INDEX,
            "weight = tl.load(weights + place, mask=wanted, other=0.0).to(tl.float32)",
            "weight = tl.load(weights + place, mask=wanted, other=0.0).to(tl.bfloat16).to(tl.float32)",
        ),
        "index-e4m3-f32-f32-prefill-cancel",
        "certificate",
    ),
    Fault(
        "the causal end of the row before",
        (ROWS, "other=0) - 1 - row)", "other=0) - row)"),
        "index-e4m3-f32-f32-prefill-topk1",
        "visible",
        slow=True,
    ),
)


def sampled(value: object, slow: bool, title: str) -> object:
    return pytest.param(value, id=title, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("fault", [sampled(fault, fault.slow, fault.title) for fault in FAULTS])
def test_a_planted_fault_is_caught_by_its_case(tmp_path: Path, fault: Fault) -> None:
    package = planted.copy(tmp_path, f"planted_{FAULTS.index(fault)}", *fault.setting, fault.edit)
    found = planted.verdict(package, fault.case)
    assert (found.status, found.rule) == ("FAIL", fault.rule), found.reason


TWINS = sorted({(fault.case, fault.setting) for fault in FAULTS})
QUICK = {(fault.case, fault.setting) for fault in FAULTS if not fault.slow}


@pytest.mark.parametrize("twin", [sampled(twin, twin not in QUICK, twin[0]) for twin in TWINS])
def test_the_honest_twin_passes(tmp_path: Path, twin: tuple[str, tuple[FileEdit, ...]]) -> None:
    case, setting = twin
    package = planted.copy(tmp_path, f"honest_{TWINS.index(twin)}", *setting)
    found = planted.verdict(package, case)
    assert found.status == "PASS", found.reason
