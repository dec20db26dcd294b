"""What the vendor's documents forbid, read a second time: a call that breaks a sentence gets the tiling's error, 161002.

It knows nothing of the adapter's own table. Sources: op-plugin docs/zh/custom_APIs, 2026-08; aclnn documents of CANN 8.5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

# ACLNN_ERR_PARAM_INVALID, from the operator's first function.
ERROR = 161002
ON_950 = "950"
LARGEST = 2**63 - 1
Named: TypeAlias = Mapping[str, Any]
# A sentence of the documents, and whether the call of a chip breaks it.
Rule: TypeAlias = tuple[str, Callable[[Named, str], bool]]


def _paged(call: Named) -> bool:
    return bool(call.get("layout_key", call.get("layout_kv")) == "PA_BSND")


def _seen(call: Named) -> list[Any]:
    outputs = ("out", "softmax_max", "softmax_sum", "sparse_values")
    return [value for name, value in call.items() if hasattr(value, "strides") and name not in outputs]


def _contiguous(tensor: Any) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _lengths(call: Named) -> list[Any]:
    names = ("actual_seq_lengths_query", "actual_seq_lengths_key", "actual_seq_lengths_kv", "block_table")
    return [call[name] for name in names if call.get(name) is not None]


def _heads(call: Named) -> int:
    return int(call["query"].shape[-2])


SHARED: tuple[Rule, ...] = (
    ("lengths and block tables are int32", lambda call, chip: any(x.dtype != "int32" for x in _lengths(call))),
    ("tensors are contiguous", lambda call, chip: chip != ON_950 and any(not _contiguous(x) for x in _seen(call))),
    ("there is one key head", lambda call, chip: call["key"].shape[-2] != 1),
    (
        "pre_tokens and next_tokens are the largest int64",
        lambda call, chip: {call.get("pre_tokens", LARGEST), call.get("next_tokens", LARGEST)} != {LARGEST},
    ),
    ("sparse_mode is 0 or 3", lambda call, chip: call["sparse_mode"] not in (0, 3)),
    (
        "TND queries come with their lengths",
        lambda call, chip: call["layout_query"] == "TND" and call["actual_seq_lengths_query"] is None,
    ),
    ("a block table comes with PA_BSND alone", lambda call, chip: _paged(call) != (call["block_table"] is not None)),
    (
        "pages hold a multiple of 16 tokens, at most 1024",
        lambda call, chip: _paged(call) and (call["key"].shape[1] % 16 != 0 or call["key"].shape[1] > 1024),
    ),
    (
        "unless paged, both layouts are the same",
        lambda call, chip: not _paged(call) and call["layout_query"] != call.get("layout_key", call.get("layout_kv")),
    ),
)
INDEX: tuple[Rule, ...] = (
    *SHARED,
    ("the head dimension is 128", lambda call, chip: call["query"].shape[-1] != 128 or call["key"].shape[-1] != 128),
    ("there are at most 64 heads", lambda call, chip: _heads(call) > 64),
    ("query and key have one dtype", lambda call, chip: call["query"].dtype != call["key"].dtype),
)
ATTEND: tuple[Rule, ...] = (
    *SHARED,
    ("attention_mode is 2", lambda call, chip: call["attention_mode"] != 2),
    ("sparse_indices are int32", lambda call, chip: call["sparse_indices"].dtype != "int32"),
    ("query is bfloat16 or float16", lambda call, chip: call["query"].dtype not in ("bfloat16", "float16")),
    (
        "heads are a power of two, at most 128",
        lambda call, chip: chip != ON_950 and (_heads(call) > 128 or bool(_heads(call) & (_heads(call) - 1))),
    ),
    ("there are at most 128 heads", lambda call, chip: _heads(call) > 128),
)
# aclnn's operator -> what its documents say of a call.
RULES: Mapping[str, tuple[Rule, ...]] = {
    "aclnnLightningIndexer": (
        *INDEX,
        ("query is bfloat16 or float16", lambda call, chip: call["query"].dtype not in ("bfloat16", "float16")),
        ("weights are of the query's dtype or, but for 950, float32", lambda call, chip: call["weights"].dtype not in (call["query"].dtype, *(() if chip == ON_950 else ("float32",)))),
        ("950 has 8, 16, 24, 32 or 64 heads", lambda call, chip: chip == ON_950 and _heads(call) not in (8, 16, 24, 32, 64)),
        ("sparse_count is 1 ... 2048 or 3072, 4096 ... 8192", lambda call, chip: not (1 <= call["sparse_count"] <= 2048 or call["sparse_count"] in range(3072, 8193, 1024))),
        ("values are not returned for pages", lambda call, chip: bool(call["return_value"]) and _paged(call)),
    ),
    "aclnnQuantLightningIndexer": (
        *INDEX,
        ("query is int8, or float8 on 950", lambda call, chip: call["query"].dtype not in ("int8", *(("float8_e4m3fn",) if chip == ON_950 else ()))),
        ("int8 comes with float16 weights and scales", lambda call, chip: call["query"].dtype == "int8" and {call[n].dtype for n in ("weights", "query_dequant_scale", "key_dequant_scale")} != {"float16"}),
        ("both quant modes are 0", lambda call, chip: (call["query_quant_mode"], call["key_quant_mode"]) != (0, 0)),
        ("sparse_count is 1 ... 2048", lambda call, chip: not 1 <= call["sparse_count"] <= 2048),
    ),
    "aclnnSparseFlashAttention": (
        *ATTEND,
        ("512 latent and 64 rotated dimensions", lambda call, chip: (call["query"].shape[-1], call["query_rope"].shape[-1]) != (512, 64)),
        ("value is key", lambda call, chip: call["value"] is not None and call["value"] != call["key"]),
        ("lse is not returned for pages", lambda call, chip: bool(call["return_softmax_lse"]) and _paged(call)),
        ("sinks are 950's", lambda call, chip: chip != ON_950 and call.get("sinks") is not None),
    ),
    "aclnnKvQuantSparseFlashAttention": (
        *ATTEND,
        ("576 dimensions of the query and 656 bytes of the key", lambda call, chip: (call["query"].shape[-1], call["key"].shape[-1]) != (576, 656)),
        ("key is int8, or float8 on 950", lambda call, chip: call["key"].dtype not in ("int8", *(("float8_e4m3fn",) if chip == ON_950 else ()))),
        ("both quant modes are 2, the scales lie beside the values, in tiles of 128", lambda call, chip: (call["key_quant_mode"], call["value_quant_mode"], call["quant_scale_repo_mode"], call["tile_size"]) != (2, 2, 1, 128)),
    ),
}  # fmt: skip


def forbidden(operator: str, call: Named, chip: str) -> str:
    """The first sentence that the call breaks, or the empty string."""
    rules = RULES.get("aclnnSparseFlashAttention" if operator == "aclnnSparseFlashAttentionV2" else operator, ())
    return next((sentence for sentence, broken in rules if broken(call, chip)), "")
