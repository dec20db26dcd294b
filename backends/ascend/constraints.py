"""What the vendor's documents allow, as one table: it declares the capabilities and refuses a vendor call before it is made.

A row is one fact about a call of one operator, and the values that each product accepts. Products: A2 (Ascend 910B), A3
(Ascend 910_93), 950 (950PR, 950DT).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

from dsa_portable.backends.ascend.schemas import (
    KV_QUANT_SPARSE_FLASH_ATTENTION,
    LIGHTNING_INDEXER,
    QUANT_LIGHTNING_INDEXER,
    SPARSE_FLASH_ATTENTION,
)
from dsa_portable.errors import Unsupported

A2, A3, A950 = PRODUCTS = ("A2", "A3", "950")
# Where a product's name as the driver gives it begins -> the product; the first that fits.
SOC_NAMES = (("Ascend910_93", A3), ("Ascend910B", A2), ("Ascend950", A950))

LI = "op-plugin docs/zh/custom_APIs torch_npu-npu_lightning_indexer.md, 2026-08; aclnnLightningIndexer.md, CANN 8.5"
QLI = "op-plugin docs/zh/custom_APIs torch_npu-npu_quant_lightning_indexer.md, 2026-08"
SFA = "op-plugin docs/zh/custom_APIs torch_npu-npu_sparse_flash_attention.md, 2026-08; aclnnSparseFlashAttention.md, CANN 8.5"
KVQ = "op-plugin docs/zh/custom_APIs torch_npu-npu_kv_quant_sparse_flash_attention.md, 2026-08"

_POWERS = (1, 2, 4, 8, 16, 32, 64, 128)
_BLOCKS = range(16, 1025, 16)
_LARGE_COUNTS = range(3072, 8193, 1024)


class _Counts:
    """1 ... 2,048, and 3,072 ... 8,192 in steps of 1,024."""

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and (1 <= value <= 2048 or value in _LARGE_COUNTS)

    def __repr__(self) -> str:
        return "1 ... 2048, 3072, 4096 ... 8192"


COUNTS = _Counts()


@dataclass(frozen=True)
class Constraint:
    """`fact` of a call of `operator` is in `accepted[product]`; `capability` is what a refusal names; `source` says so."""

    operator: str
    fact: str
    capability: str
    accepted: Mapping[str, Container[Any]]
    source: str


INT64_MAX = 2**63 - 1


def _all(values: Container[Any]) -> Mapping[str, Container[Any]]:
    return dict.fromkeys(PRODUCTS, values)


def _but_950(values: Container[Any], on_950: Container[Any]) -> Mapping[str, Container[Any]]:
    return {A2: values, A3: values, A950: on_950}


_LI_DTYPES = (
    ("bfloat16", "bfloat16", "bfloat16"),
    ("bfloat16", "bfloat16", "float32"),
    ("float16", "float16", "float16"),
    ("float16", "float16", "float32"),
)
_INT8 = ("int8", "int8", "float16", "float16", "float16")
_E4M3 = (
    ("float8_e4m3fn", "float8_e4m3fn", "bfloat16", "float32", "float32"),
    ("float8_e4m3fn", "float8_e4m3fn", "float16", "float16", "float16"),
)

TABLE: tuple[Constraint, ...] = (
    Constraint(LIGHTNING_INDEXER, "dtypes", "format", _but_950(_LI_DTYPES, (_LI_DTYPES[0], _LI_DTYPES[2])), LI),
    Constraint(LIGHTNING_INDEXER, "heads", "heads", _but_950(range(1, 65), (8, 16, 24, 32, 64)), LI),
    Constraint(LIGHTNING_INDEXER, "key_heads", "heads", _all((1,)), LI),
    Constraint(LIGHTNING_INDEXER, "head_dim", "head_dim", _all((128,)), LI),
    Constraint(
        LIGHTNING_INDEXER,
        "layouts",
        "flat",
        _all((("TND", "TND"), ("TND", "PA_BSND"), ("BSND", "BSND"), ("BSND", "PA_BSND"))),
        LI,
    ),
    Constraint(LIGHTNING_INDEXER, "block_size", "page_size", _all((None, *_BLOCKS)), LI),
    Constraint(LIGHTNING_INDEXER, "sparse_count", "topk", _all(COUNTS), LI),
    Constraint(LIGHTNING_INDEXER, "sparse_mode", "non_causal", _all((0, 3)), LI),
    Constraint(LIGHTNING_INDEXER, "lengths", "ragged", _all(("int32",)), LI),
    Constraint(LIGHTNING_INDEXER, "values", "return_scores", _all((False, "not paged")), LI),
    Constraint(LIGHTNING_INDEXER, "contiguous", "contiguous", _all((True,)), LI),
    Constraint(QUANT_LIGHTNING_INDEXER, "dtypes", "format", _but_950((_INT8,), (_INT8, *_E4M3)), QLI),
    Constraint(QUANT_LIGHTNING_INDEXER, "heads", "heads", _all(range(1, 65)), QLI),
    Constraint(QUANT_LIGHTNING_INDEXER, "key_heads", "heads", _all((1,)), QLI),
    Constraint(QUANT_LIGHTNING_INDEXER, "head_dim", "head_dim", _all((128,)), QLI),
    Constraint(
        QUANT_LIGHTNING_INDEXER,
        "layouts",
        "flat",
        _all((("TND", "TND"), ("TND", "PA_BSND"), ("BSND", "BSND"), ("BSND", "PA_BSND"))),
        QLI,
    ),
    Constraint(QUANT_LIGHTNING_INDEXER, "block_size", "page_size", _all((None, *_BLOCKS)), QLI),
    Constraint(QUANT_LIGHTNING_INDEXER, "sparse_count", "topk", _all(range(1, 2049)), QLI),
    Constraint(QUANT_LIGHTNING_INDEXER, "sparse_mode", "non_causal", _all((0, 3)), QLI),
    Constraint(QUANT_LIGHTNING_INDEXER, "quant_modes", "format", _all(((0, 0),)), QLI),
    Constraint(QUANT_LIGHTNING_INDEXER, "lengths", "ragged", _all(("int32",)), QLI),
    Constraint(QUANT_LIGHTNING_INDEXER, "contiguous", "contiguous", _all((True,)), QLI),
    Constraint(SPARSE_FLASH_ATTENTION, "dtypes", "format", _all((("bfloat16", "bfloat16"), ("float16", "float16"))), SFA),
    Constraint(SPARSE_FLASH_ATTENTION, "heads", "heads", _but_950(_POWERS, range(1, 129)), SFA),
    Constraint(SPARSE_FLASH_ATTENTION, "key_heads", "heads", _all((1,)), SFA),
    Constraint(SPARSE_FLASH_ATTENTION, "head_dim", "dims", _all(((512, 64),)), SFA),
    Constraint(SPARSE_FLASH_ATTENTION, "attention_mode", "dims", _all((2,)), SFA),
    Constraint(SPARSE_FLASH_ATTENTION, "value", "dims", _all(("key",)), SFA),
    Constraint(
        SPARSE_FLASH_ATTENTION,
        "layouts",
        "flat",
        _all((("BSND", "BSND"), ("TND", "TND"), ("TND", "PA_BSND"), ("BSND", "PA_BSND"))),
        SFA,
    ),
    Constraint(SPARSE_FLASH_ATTENTION, "block_size", "page_size", _all((None, *_BLOCKS)), SFA),
    Constraint(SPARSE_FLASH_ATTENTION, "sparse_block_size", "format", _but_950(_POWERS, (1,)), SFA),
    Constraint(SPARSE_FLASH_ATTENTION, "sparse_mode", "non_causal", _all((0, 3)), SFA),
    Constraint(SPARSE_FLASH_ATTENTION, "lse", "return_lse", _all((False, "not paged")), SFA),
    Constraint(SPARSE_FLASH_ATTENTION, "sinks", "attn_sink", _but_950((False,), (False, True)), SFA),
    Constraint(SPARSE_FLASH_ATTENTION, "contiguous", "contiguous", _all((True,)), SFA),
    Constraint(
        KV_QUANT_SPARSE_FLASH_ATTENTION,
        "dtypes",
        "format",
        _but_950(
            (("bfloat16", "int8"), ("float16", "int8")),
            (("bfloat16", "int8"), ("float16", "int8"), ("bfloat16", "float8_e4m3fn"), ("float16", "float8_e4m3fn")),
        ),
        KVQ,
    ),
    Constraint(KV_QUANT_SPARSE_FLASH_ATTENTION, "heads", "heads", _but_950(_POWERS, (*_POWERS, 48)), KVQ),
    Constraint(KV_QUANT_SPARSE_FLASH_ATTENTION, "key_heads", "heads", _all((1,)), KVQ),
    Constraint(KV_QUANT_SPARSE_FLASH_ATTENTION, "head_dim", "dims", _all(((576, 656),)), KVQ),
    Constraint(KV_QUANT_SPARSE_FLASH_ATTENTION, "attention_mode", "dims", _all((2,)), KVQ),
    Constraint(KV_QUANT_SPARSE_FLASH_ATTENTION, "quant_modes", "format", _all(((2, 2),)), KVQ),
    Constraint(KV_QUANT_SPARSE_FLASH_ATTENTION, "value", "dims", _all(("key",)), KVQ),
    Constraint(
        KV_QUANT_SPARSE_FLASH_ATTENTION,
        "layouts",
        "flat",
        _all((("BSND", "BSND"), ("TND", "TND"), ("TND", "PA_BSND"), ("BSND", "PA_BSND"))),
        KVQ,
    ),
    Constraint(KV_QUANT_SPARSE_FLASH_ATTENTION, "block_size", "page_size", _all((None, *_BLOCKS)), KVQ),
    Constraint(KV_QUANT_SPARSE_FLASH_ATTENTION, "sparse_block_size", "format", _but_950((1, 2, 4, 8, 16), (1,)), KVQ),
    Constraint(KV_QUANT_SPARSE_FLASH_ATTENTION, "sparse_mode", "non_causal", _all((0, 3)), KVQ),
    Constraint(KV_QUANT_SPARSE_FLASH_ATTENTION, "contiguous", "contiguous", _all((True,)), KVQ),
    Constraint(LIGHTNING_INDEXER, "window", "non_causal", _all(((INT64_MAX, INT64_MAX),)), LI),
    Constraint(QUANT_LIGHTNING_INDEXER, "window", "non_causal", _all(((INT64_MAX, INT64_MAX),)), QLI),
    Constraint(SPARSE_FLASH_ATTENTION, "window", "non_causal", _all(((INT64_MAX, INT64_MAX),)), SFA),
    Constraint(KV_QUANT_SPARSE_FLASH_ATTENTION, "window", "non_causal", _all(((INT64_MAX, INT64_MAX),)), KVQ),
)


def accepted(operator: str, fact: str, product: str) -> Container[Any]:
    """What a product accepts of one fact."""
    return next(row.accepted[product] for row in TABLE if (row.operator, row.fact) == (operator, fact))


def product_of(soc_name: str) -> str | None:
    """The product that the driver's name of a chip stands for; None for one without these operators."""
    return next((product for begin, product in SOC_NAMES if soc_name.startswith(begin)), None)


def check(operator: str, product: str, facts: Mapping[str, Any]) -> None:
    """Raise Unsupported, naming capability and document, for the first fact that the product does not accept."""
    for row in TABLE:
        if row.operator == operator and facts[row.fact] not in row.accepted[product]:
            raise Unsupported(
                f"{operator} on {product}: {row.fact} is {facts[row.fact]!r}, but {row.accepted[product]!r} is accepted "
                f"({row.source}); change the call.",
                row.capability,
            )


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _common(call: Mapping[str, Any], kv_layout: str, lengths: tuple[str, ...]) -> dict[str, Any]:
    paged = call[kv_layout] == "PA_BSND"
    present = [_dtype(call[name]) for name in (*lengths, "block_table") if call.get(name) is not None]
    tensors = [value for value in call.values() if hasattr(value, "is_contiguous")]
    return {
        "heads": call["query"].shape[-2],
        "key_heads": call["key"].shape[-2],
        "layouts": (call["layout_query"], call[kv_layout]),
        "block_size": call["key"].shape[1] if paged else None,
        "sparse_mode": call["sparse_mode"],
        "window": (call.get("pre_tokens", INT64_MAX), call.get("next_tokens", INT64_MAX)),
        "lengths": next((name for name in present if name != "int32"), "int32"),
        "contiguous": all(tensor.is_contiguous() for tensor in tensors),
    }


def _index(call: Mapping[str, Any], *dtypes: str) -> dict[str, Any]:
    wanted = bool(call.get("return_value", False))
    return {
        **_common(call, "layout_key", ("actual_seq_lengths_query", "actual_seq_lengths_key")),
        "dtypes": tuple(_dtype(call[name]) for name in ("query", "key", "weights", *dtypes)),
        "head_dim": call["query"].shape[-1],
        "sparse_count": call["sparse_count"],
        "values": wanted and ("paged" if call["layout_key"] == "PA_BSND" else "not paged"),
        "quant_modes": (call.get("query_quant_mode"), call.get("key_quant_mode")),
    }


def _attend(call: Mapping[str, Any], head_dim: tuple[int, int]) -> dict[str, Any]:
    wanted = bool(call.get("return_softmax_lse", False))
    return {
        **_common(call, "layout_kv", ("actual_seq_lengths_query", "actual_seq_lengths_kv", "sparse_indices")),
        "dtypes": (_dtype(call["query"]), _dtype(call["key"])),
        "head_dim": head_dim,
        "attention_mode": call["attention_mode"],
        "value": "key" if call["value"] is call["key"] else "another tensor",
        "sparse_block_size": call["sparse_block_size"],
        "lse": wanted and ("paged" if call["layout_kv"] == "PA_BSND" else "not paged"),
        "sinks": call.get("sinks") is not None,
        "quant_modes": (call.get("key_quant_mode"), call.get("value_quant_mode")),
    }


# Operator -> what the table asks of a call, from its arguments by name.
FACTS: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    LIGHTNING_INDEXER: lambda call: _index(call),
    QUANT_LIGHTNING_INDEXER: lambda call: _index(call, "query_dequant_scale", "key_dequant_scale"),
    SPARSE_FLASH_ATTENTION: lambda call: _attend(call, (call["query"].shape[-1], call["query_rope"].shape[-1])),
    KV_QUANT_SPARSE_FLASH_ATTENTION: lambda call: _attend(call, (call["query"].shape[-1], call["key"].shape[-1])),
}
