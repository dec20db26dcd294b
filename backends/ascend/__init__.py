"""The Ascend backend: torch_npu's sparse attention operators behind the contract. Adapter only; no NPU has run it yet."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from dsa_portable.backend import Backend, Device
from dsa_portable.backends.ascend import device
from dsa_portable.backends.ascend.constraints import A2, A950, PRODUCTS, accepted
from dsa_portable.backends.ascend.schemas import LIGHTNING_INDEXER, QUANT_LIGHTNING_INDEXER
from dsa_portable.contract import ANY, SHORT, YES, Capabilities

_SHARED: dict[str, Container[Any]] = {"flat": YES, "ragged": YES, "out": YES}
# Attention gathers the keys that rows name, so that neither pages nor heads nor lse are bound by the vendor's operator.
_ATTEND: dict[str, Container[Any]] = {
    **_SHARED,
    "page_size": ANY,
    "heads": ANY,
    "topk": ANY,
    "dims": ("576/512", "512/512"),
    "return_lse": YES,
    "attn_sink": YES,
    "topk_length": YES,
    "repeated_indices": YES,
}


def _formats(product: str) -> tuple[str, ...]:
    """The claims' formats, from the dtypes that the documents allow."""
    found = []
    for operator in (LIGHTNING_INDEXER, QUANT_LIGHTNING_INDEXER):
        for query, _, weights, *scales in accepted(operator, "dtypes", product):  # type: ignore[attr-defined]
            found.append("/".join((SHORT[query], SHORT[weights], SHORT[scales[1]] if scales else "-")))
    return tuple(found)


def capabilities(found: Device | None) -> Capabilities:
    """What the product's documents allow; A2's where no device is known."""
    product = found.architecture if found else A2
    kv = ("ascend_656_nrs_int8", *(("ascend_656_nrs_fp8",) if product == A950 else ()))
    return {
        "lightning_index": {
            **_SHARED,
            "format": _formats(product),
            "heads": accepted(LIGHTNING_INDEXER, "heads", product),
            "head_dim": (128,),
            # Of the quantised operator; the other takes more, and the call itself is checked against its own row.
            "topk": range(1, 2049),
            "page_size": range(16, 1025, 16),
            "unsorted": YES,
            "return_scores": YES,
            "non_causal": YES,
        },
        "sparse_attend": {**_ATTEND, "format": ("bf16", "f16", *kv)},
    }


BACKEND = Backend(
    name="ascend",
    version="0.1.0",
    devices=("npu",),
    arrays="torch",
    operators={
        "lightning_index": "dsa_portable.backends.ascend.lightning_index:lightning_index",
        "sparse_attend": "dsa_portable.backends.ascend.sparse_attend:sparse_attend",
    },
    install="pip install 'dsa-portable[ascend]'",
    probe=device.probe,
    capabilities=capabilities,
    profile=device.profile,
    profile_sources=lambda found, operator, format, phase: device.SOURCES[operator],
    put=device.put,
    get=device.get,
    synchronize=device.synchronize,
    witness=device.witness,
    # Over the real torch_npu in host memory, which the suite starts before this is loaded.
    emulates=PRODUCTS,
)
