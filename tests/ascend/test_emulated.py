"""The suite over the real torch_npu in host memory: EMULATED and never more; forbidden calls are refused; calls are written down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from dsa_portable.conformance.hosts.ascend import aclnn, documents
from dsa_portable.conformance.hosts.ascend.aclnn import Seen
from dsa_portable.conformance.report import schema
from dsa_portable.conformance.report.schema import Evidence, Status

COMMAND = str(Path(sysconfig.get_path("scripts")) / "dsa-portable")
SAMPLES = {
    "A2": ("index-bf16-f32-prefill-ragged", "index-int8-f16-f16-decode-scores", "attend-ascend_656_nrs_int8-decode-paged64"),
    "A3": ("index-bf16-bf16-decode-paged64", "attend-f16-decode-lse"),
    "950": ("index-e4m3-bf16-f32-decode-h32-page64", "attend-ascend_656_nrs_fp8-decode-lse"),
}


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DSA_")}
    return subprocess.run(
        command, cwd=folder, env={**environment, "DSA_BACKEND": "ascend"}, capture_output=True, text=True, timeout=200
    )


@pytest.mark.parametrize("chip", SAMPLES)
def test_a_sample_of_core_is_emulated_and_earns_no_level(tmp_path: Path, chip: str) -> None:
    chosen = [word for case in SAMPLES[chip] for word in ("--case", case)]
    done = run(tmp_path, COMMAND, "conformance", "--emulate", chip, "--out", "out", *chosen)
    report = schema.load(tmp_path / "out" / "report.json")
    ran = {row.id: row.status for row in report.cases if row.status is not Status.NOT_RUN}
    assert ran == dict.fromkeys(SAMPLES[chip], Status.PASS), done.stdout
    assert (report.evidence, report.emulates, report.level) == (Evidence.EMULATED, chip, None)
    assert all(claim.level is None for claim in report.claims)
    assert "EMULATED" in done.stdout.splitlines()[-1]
    assert any(entry.sources.get("exp_ulp") == "assumed" for entry in report.profiles)


def test_smoke_passes_or_is_refused_as_declared(tmp_path: Path) -> None:
    done = run(tmp_path, COMMAND, "conformance", "--list", "smoke", "--emulate", "A2", "--out", "out")
    report = schema.load(tmp_path / "out" / "report.json")
    assert done.returncode == 0, done.stdout
    assert {row.status for row in report.cases} == {Status.PASS, Status.UNSUPPORTED}
    assert sum(row.status is Status.PASS for row in report.cases) == 18
    assert (report.evidence, report.level) == (Evidence.EMULATED, None)


def test_a_chip_that_nobody_stands_in_for_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, COMMAND, "conformance", "--emulate", "A1", "--out", "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "dsa-portable: backend 'ascend' emulates A2, A3, 950, but --emulate A1 was passed; name one of them.\n"
    )


def test_the_calls_of_a_case_are_written_down(tmp_path: Path) -> None:
    case = "attend-ascend_656_nrs_int8-decode-paged64"
    module = "dsa_portable.conformance.hosts.ascend.calls"
    done = run(tmp_path, sys.executable, "-m", module, "A2", case, "--out", "calls")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "calls" / f"{case}.json").read_text())
    assert (found["chip"], found["evidence"]) == ("A2", "EMULATED")
    [call] = [call["arguments"] for call in found["calls"] if call["operator"] == "aclnnKvQuantSparseFlashAttention"]
    assert (
        call["key"]
        == call["value"]
        == {"shape": [1178, 64, 1, 656], "strides": [41984, 656, 656, 1], "dtype": "int8", "offset": 0}
    )
    assert (call["layout_query"], call["layout_kv"], call["sparse_mode"], call["attention_mode"]) == ("TND", "PA_BSND", 0, 2)
    assert call["actual_seq_lengths_query"]["dtype"] == "int32"
    assert run(tmp_path, sys.executable, "-m", module, "A2", "no-such-case").returncode == 2


def tensor(dtype: str, *shape: int, strides: tuple[int, ...] = ()) -> Seen:
    """As it would reach aclnn, contiguous unless strides are given."""
    expected, size = [], 1
    for length in reversed(shape):
        expected.insert(0, size)
        size *= length
    return Seen(shape, strides or tuple(expected), dtype, 0)


LENGTHS = tensor("int32", 2)
INDEX = {
    "query": tensor("bfloat16", 16, 64, 128),
    "key": tensor("bfloat16", 32, 128, 1, 128),
    "weights": tensor("bfloat16", 16, 64),
    "actual_seq_lengths_query": LENGTHS,
    "actual_seq_lengths_key": LENGTHS,
    "block_table": tensor("int32", 2, 16),
    "layout_query": "TND",
    "layout_key": "PA_BSND",
    "sparse_count": 2048,
    "sparse_mode": 3,
    "return_value": False,
}
QUANTISED = {
    **INDEX,
    "query": tensor("int8", 16, 64, 128),
    "key": tensor("int8", 32, 128, 1, 128),
    "weights": tensor("float16", 16, 64),
    "query_dequant_scale": tensor("float16", 16, 64),
    "key_dequant_scale": tensor("float16", 32, 128, 1),
    "query_quant_mode": 0,
    "key_quant_mode": 0,
}
KEY = tensor("bfloat16", 4, 2048, 1, 512)
ATTEND = {
    "query": tensor("bfloat16", 4, 1, 128, 512),
    "key": KEY,
    "value": KEY,
    "sparse_indices": tensor("int32", 4, 1, 1, 2048),
    "block_table": None,
    "actual_seq_lengths_query": None,
    "actual_seq_lengths_kv": None,
    "query_rope": tensor("bfloat16", 4, 1, 128, 64),
    "key_rope": tensor("bfloat16", 4, 2048, 1, 64),
    "sinks": None,
    "layout_query": "BSND",
    "layout_kv": "BSND",
    "sparse_mode": 0,
    "attention_mode": 2,
    "return_softmax_lse": True,
}
KEY_PAGES = tensor("bfloat16", 32, 64, 1, 512)
CACHE = tensor("int8", 32, 64, 1, 656)
PACKED = {
    **{name: value for name, value in ATTEND.items() if name not in ("query_rope", "key_rope", "sinks", "return_softmax_lse")},
    "query": tensor("bfloat16", 16, 128, 576),
    "key": CACHE,
    "value": CACHE,
    "sparse_indices": tensor("int32", 16, 1, 2048),
    "block_table": tensor("int32", 2, 16),
    "actual_seq_lengths_query": LENGTHS,
    "actual_seq_lengths_kv": LENGTHS,
    "layout_query": "TND",
    "layout_kv": "PA_BSND",
    "key_quant_mode": 2,
    "value_quant_mode": 2,
    "quant_scale_repo_mode": 1,
    "tile_size": 128,
}
HONEST = {
    "aclnnLightningIndexer": INDEX,
    "aclnnQuantLightningIndexer": QUANTISED,
    "aclnnSparseFlashAttention": ATTEND,
    "aclnnKvQuantSparseFlashAttention": PACKED,
}
STRIDED = tensor("bfloat16", 32, 128, 1, 128, strides=(84992, 664, 664, 1))
# Operator, sentence that is broken, how, and the chips on which it is.
BROKEN = (
    (
        "aclnnLightningIndexer",
        "lengths and block tables are int32",
        {"actual_seq_lengths_key": tensor("int64", 2)},
        ("A2", "950"),
    ),
    ("aclnnLightningIndexer", "tensors are contiguous", {"key": STRIDED}, ("A2",)),
    ("aclnnLightningIndexer", "there is one key head", {"key": tensor("bfloat16", 32, 128, 2, 128)}, ("A2", "950")),
    ("aclnnLightningIndexer", "pre_tokens and next_tokens are the largest int64", {"next_tokens": 4096}, ("A2", "950")),
    ("aclnnLightningIndexer", "sparse_mode is 0 or 3", {"sparse_mode": 2}, ("A2", "950")),
    ("aclnnLightningIndexer", "TND queries come with their lengths", {"actual_seq_lengths_query": None}, ("A2", "950")),
    ("aclnnLightningIndexer", "a block table comes with PA_BSND alone", {"block_table": None}, ("A2", "950")),
    (
        "aclnnLightningIndexer",
        "pages hold a multiple of 16 tokens, at most 1024",
        {"key": tensor("bfloat16", 32, 24, 1, 128)},
        ("A2", "950"),
    ),
    (
        "aclnnLightningIndexer",
        "unless paged, both layouts are the same",
        {"layout_key": "BSND", "block_table": None},
        ("A2", "950"),
    ),
    ("aclnnLightningIndexer", "the head dimension is 128", {"query": tensor("bfloat16", 16, 64, 96)}, ("A2", "950")),
    ("aclnnLightningIndexer", "there are at most 64 heads", {"query": tensor("bfloat16", 16, 65, 128)}, ("A2", "950")),
    ("aclnnLightningIndexer", "query and key have one dtype", {"query": tensor("float16", 16, 64, 128)}, ("A2", "950")),
    (
        "aclnnLightningIndexer",
        "query is bfloat16 or float16",
        {"query": tensor("float32", 16, 64, 128), "key": tensor("float32", 32, 128, 1, 128)},
        ("A2", "950"),
    ),
    (
        "aclnnLightningIndexer",
        "weights are of the query's dtype or, but for 950, float32",
        {"weights": tensor("float32", 16, 64)},
        ("950",),
    ),
    ("aclnnLightningIndexer", "950 has 8, 16, 24, 32 or 64 heads", {"query": tensor("bfloat16", 16, 40, 128)}, ("950",)),
    ("aclnnLightningIndexer", "sparse_count is 1 ... 2048 or 3072, 4096 ... 8192", {"sparse_count": 2049}, ("A2", "950")),
    ("aclnnLightningIndexer", "values are not returned for pages", {"return_value": True}, ("A2", "950")),
    (
        "aclnnQuantLightningIndexer",
        "query is int8, or float8 on 950",
        {"query": tensor("float8_e4m3fn", 16, 64, 128), "key": tensor("float8_e4m3fn", 32, 128, 1, 128)},
        ("A2",),
    ),
    (
        "aclnnQuantLightningIndexer",
        "int8 comes with float16 weights and scales",
        {"weights": tensor("float32", 16, 64)},
        ("A2", "950"),
    ),
    ("aclnnQuantLightningIndexer", "both quant modes are 0", {"key_quant_mode": 1}, ("A2", "950")),
    ("aclnnQuantLightningIndexer", "sparse_count is 1 ... 2048", {"sparse_count": 4096}, ("A2", "950")),
    ("aclnnSparseFlashAttention", "attention_mode is 2", {"attention_mode": 0}, ("A2", "950")),
    (
        "aclnnSparseFlashAttention",
        "sparse_indices are int32",
        {"sparse_indices": tensor("int64", 4, 1, 1, 2048)},
        ("A2", "950"),
    ),
    ("aclnnSparseFlashAttention", "query is bfloat16 or float16", {"query": tensor("float32", 4, 1, 128, 512)}, ("A2", "950")),
    (
        "aclnnSparseFlashAttention",
        "heads are a power of two, at most 128",
        {"query": tensor("bfloat16", 4, 1, 48, 512)},
        ("A2",),
    ),
    ("aclnnSparseFlashAttention", "there are at most 128 heads", {"query": tensor("bfloat16", 4, 1, 256, 512)}, ("950",)),
    (
        "aclnnSparseFlashAttention",
        "512 latent and 64 rotated dimensions",
        {"query": tensor("bfloat16", 4, 1, 128, 576)},
        ("A2", "950"),
    ),
    ("aclnnSparseFlashAttention", "value is key", {"value": tensor("bfloat16", 4, 2048, 1, 256)}, ("A2", "950")),
    ("aclnnSparseFlashAttention", "sinks are 950's", {"sinks": tensor("float32", 128)}, ("A2",)),
    (
        "aclnnKvQuantSparseFlashAttention",
        "576 dimensions of the query and 656 bytes of the key",
        {"query": tensor("bfloat16", 16, 128, 512)},
        ("A2", "950"),
    ),
    (
        "aclnnKvQuantSparseFlashAttention",
        "key is int8, or float8 on 950",
        {"key": tensor("float8_e4m3fn", 32, 64, 1, 656)},
        ("A2",),
    ),
    (
        "aclnnKvQuantSparseFlashAttention",
        "both quant modes are 2, the scales lie beside the values, in tiles of 128",
        {"tile_size": 64},
        ("A2", "950"),
    ),
)


@pytest.mark.parametrize("operator", HONEST)
def test_an_honest_call_breaks_no_sentence(operator: str) -> None:
    assert [documents.forbidden(operator, HONEST[operator], chip) for chip in ("A2", "A3", "950")] == ["", "", ""]


@pytest.mark.parametrize(("operator", "sentence", "changed", "chips"), BROKEN, ids=[sentence for _, sentence, _, _ in BROKEN])
def test_a_forbidden_call_is_refused_with_the_sentence(
    operator: str, sentence: str, changed: dict[str, object], chips: tuple[str, ...]
) -> None:
    call = {**HONEST[operator], **changed}
    refused = tuple(chip for chip in ("A2", "950") if documents.forbidden(operator, call, chip) == sentence)
    assert refused == chips


def test_every_sentence_is_tried_and_names_are_aclnn_s() -> None:
    sentences = {sentence for rules in documents.RULES.values() for sentence, _ in rules}
    assert sentences - {sentence for _, sentence, _, _ in BROKEN} == {"lse is not returned for pages"}
    paged = {**PACKED, **{name: ATTEND[name] for name in ("query_rope", "return_softmax_lse", "sinks")}}
    paged |= {"key": KEY_PAGES, "value": KEY_PAGES, "query": tensor("bfloat16", 16, 128, 512)}
    assert documents.forbidden("aclnnSparseFlashAttention", paged, "A2") == "lse is not returned for pages"
    assert set(documents.RULES) <= set(aclnn.OPERATORS)
