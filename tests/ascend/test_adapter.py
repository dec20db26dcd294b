"""The adapter on a pretend NPU, in processes of their own: cases of core judged, arguments seen, faults in its text caught."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dsa_portable.backends.ascend import vendor

HERE = Path(__file__).parent
# (file, text that stands there once, text instead)
Edit = tuple[str, str, str]
# Of core, every way through the adapter.
SAMPLE = (
    "index-bf16-f32-prefill-ragged",
    "index-bf16-bf16-decode-paged64",
    "index-bf16-bf16-decode-lengths",
    "index-int8-f16-f16-prefill-paged128",
    "index-int8-f16-f16-decode-scores",
    "attend-bf16-decode-paged64",
    "attend-bf16-prefill-lse",
    "attend-bf16-prefill-sink",
    "attend-bf16-prefill-repeated",
    "attend-bf16-prefill-topk-length",
    "attend-bf16-prefill-dim512",
    "attend-bf16-decode-page1",
    "attend-bf16-decode-out",
    "attend-f16-prefill-flat",
    "attend-ascend_656_nrs_int8-decode-paged64",
    "attend-ascend_656_nrs_int8-prefill-flat",
    "attend-ascend_656_nrs_int8-decode-lse",
)
ON_950 = ("index-e4m3-bf16-f32-prefill-paged64", "index-f16-f16-decode-h32-page64", "attend-ascend_656_nrs_fp8-prefill-lse")


FAULTS = (
    (
        "lengths are not prefix sums",
        ("rows.py", "    ends = cu_seqlens_q[1:]\n", "    ends = cu_seqlens_q[1:] - cu_seqlens_q[:-1]\n"),
        SAMPLE[1],
    ),
    ("a leading 0", ("rows.py", "    ends = cu_seqlens_q[1:]\n", "    ends = cu_seqlens_q[:-1]\n"), SAMPLE[1]),
    (
        "masked positions are kept",
        ("lightning_index.py", "(chosen >= 0) & (chosen < end[:, None])", "chosen >= 0"),
        "index-bf16-f32-prefill-ragged",
    ),
    (
        "indices by score",
        (
            "lightning_index.py",
            "torch.sort(torch.where(visible, chosen, vendor.INT_MAX), dim=1).values",
            "torch.where(visible, chosen, vendor.INT_MAX)",
        ),
        SAMPLE[0],
    ),
    ("always causal mode 0", ("lightning_index.py", "3 if request.batch.causal else 0", "0"), SAMPLE[0]),
    (
        "mode 3 over the selection",
        (
            "sparse_attend.py",
            "        sparse_mode=0,\n        attention_mode=2,\n        **modes",
            "        sparse_mode=3,\n        attention_mode=2,\n        **modes",
        ),
        "attend-ascend_656_nrs_int8-prefill-paged64",
    ),
    (
        "lse in base 2",
        ("sparse_attend.py", "top + torch.log(total)", "(top + torch.log(total)) * 1.4426950408889634"),
        "attend-bf16-prefill-lse",
    ),
    (
        "scale 576^-0.5",
        (
            "sparse_attend.py",
            "        scale_value=request.softmax_scale,\n        query_rope",
            "        scale_value=576**-0.5,\n        query_rope",
        ),
        "attend-f16-prefill-flat",
    ),
    (
        "rope and nope swapped",
        ("sparse_attend.py", "key_rope = keys[..., LATENT:]", "key_rope = keys[..., :ROTATED]"),
        "attend-f16-prefill-flat",
    ),
    (
        "holes are left where they stand",
        (
            "sparse_attend.py",
            "    return torch.where(ascending < vendor.INT_MAX, ascending, -1)\n",
            "    return torch.where(counted, indices, -1)\n",
        ),
        "attend-ascend_656_nrs_int8-prefill-flat",
    ),
    (
        "the neighbour's pages",
        (
            "rows.py",
            "        none = torch.zeros_like(rows)\n",
            "        none = torch.zeros_like(rows)\n        table = torch.cat([table[1:], table[:1]])\n",
        ),
        SAMPLE[1],
    ),
    (
        "the sink enters nothing",
        ("sparse_attend.py", "share = torch.sigmoid(lse - request.attn_sink[None, :])", "share = torch.ones_like(lse)"),
        "attend-bf16-prefill-sink",
    ),
    (
        "empty rows are left as they came",
        (
            "sparse_attend.py",
            "    out = torch.where(empty[:, :, None], 0, out)\n",
            "    out = torch.where(empty[:, :, None], 1, out)\n",
        ),
        "attend-bf16-prefill-lse",
    ),
    (
        "the scales of the tiles by position",
        ("sparse_attend.py", 'parts["scale"].unsqueeze(-1)', 'parts["scale"][..., :1].unsqueeze(-1)'),
        "attend-ascend_656_nrs_int8-decode-lse",
    ),
    (
        "attention_mode left at its default",
        (
            "sparse_attend.py",
            "        attention_mode=2,\n        return_softmax_lse",
            "        attention_mode=0,\n        return_softmax_lse",
        ),
        "attend-f16-prefill-flat",
    ),
    (
        "a key that is not contiguous",
        ("sparse_attend.py", "    key = keys[..., :LATENT].contiguous()\n", "    key = keys[..., :LATENT]\n"),
        "attend-f16-prefill-flat",
    ),
    (
        "a candidate mode in next_tokens",
        ("lightning_index.py", '        "sparse_mode": 3 if', '        "next_tokens": 4096,\n        "sparse_mode": 3 if'),
        SAMPLE[0],
    ),
)


def judged(product: str, tasks: Mapping[str, tuple[Edit | None, Sequence[str]]]) -> dict[str, Any]:
    """Verdicts by task and case, and what was seen in the first task; an edit changes a text of a copy of the adapter first."""
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OPENBLAS_NUM_THREADS": "2"}
    command = [sys.executable, str(HERE / "pretended.py"), json.dumps([product, tasks])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def statuses(verdicts: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    return {case: found[0] for case, found in verdicts.items()}


@pytest.fixture(scope="module")
def on_a2() -> dict[str, Any]:
    """The honest adapter over the sample, then a copy for each fault, in one process."""
    return judged("A2", {"honest": (None, SAMPLE), **{title: (edit, [case]) for title, edit, case in FAULTS}})


def test_a_sample_of_core_passes(on_a2: dict[str, Any]) -> None:
    assert statuses(on_a2["verdicts"]["honest"]) == dict.fromkeys(SAMPLE, "PASS"), on_a2["verdicts"]["honest"]


@pytest.mark.parametrize(("product", "cases"), [("A3", SAMPLE[:3]), ("950", ON_950)])
def test_other_products_pass_theirs(product: str, cases: tuple[str, ...]) -> None:
    found = judged(product, {"honest": (None, cases)})["verdicts"]["honest"]
    assert statuses(found) == dict.fromkeys(cases, "PASS"), found


def test_nothing_is_read_by_the_host(on_a2: dict[str, Any]) -> None:
    assert on_a2["host_reads"] == []


def test_the_witness_counts_calls(on_a2: dict[str, Any]) -> None:
    assert on_a2["witness"] == 1


def test_the_device_operators_are_few_and_each_is_used(on_a2: dict[str, Any]) -> None:
    assert len(vendor.DEVICE_OPERATORS) == len(set(vendor.DEVICE_OPERATORS)) <= 25
    assert set(on_a2["operators"]) == set(vendor.DEVICE_OPERATORS)


@pytest.mark.parametrize(("title", "case"), [(title, case) for title, _, case in FAULTS], ids=[title for title, _, _ in FAULTS])
def test_a_fault_in_the_adapter_is_caught(on_a2: dict[str, Any], title: str, case: str) -> None:
    status, rule, reason = on_a2["verdicts"][title][case]
    # What the documents forbid is refused before the vendor is called; a suite's run says so as a failure.
    assert status == "FAIL" or reason.startswith("Unsupported: npu_"), f"{status} {rule} {reason}"
