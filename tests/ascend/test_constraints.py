"""What the documents allow: every row of the table has, for every product, a call that is accepted and one that is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dsa_portable import Unsupported
from dsa_portable.backend import Device
from dsa_portable.backends.ascend import capabilities, constraints, schemas
from dsa_portable.backends.ascend.constraints import A2, A3, A950, PRODUCTS, TABLE, Constraint

# A value of each fact that every product accepts, and one that none does.
ACCEPTED: dict[str, dict[str, Any]] = {
    schemas.LIGHTNING_INDEXER: {"dtypes": ("bfloat16", "bfloat16", "bfloat16"), "head_dim": 128},
    schemas.QUANT_LIGHTNING_INDEXER: {
        "dtypes": ("int8", "int8", "float16", "float16", "float16"),
        "head_dim": 128,
        "quant_modes": (0, 0),
    },
    schemas.SPARSE_FLASH_ATTENTION: {"dtypes": ("bfloat16", "bfloat16"), "head_dim": (512, 64)},
    schemas.KV_QUANT_SPARSE_FLASH_ATTENTION: {"dtypes": ("bfloat16", "int8"), "head_dim": (576, 656), "quant_modes": (2, 2)},
}
COMMON: dict[str, Any] = {
    "heads": 64,
    "key_heads": 1,
    "layouts": ("TND", "PA_BSND"),
    "block_size": 128,
    "sparse_count": 2048,
    "sparse_mode": 3,
    "window": (2**63 - 1, 2**63 - 1),
    "lengths": "int32",
    "values": False,
    "contiguous": True,
    "attention_mode": 2,
    "value": "key",
    "sparse_block_size": 1,
    "lse": False,
    "sinks": False,
}
REFUSED: dict[str, Any] = {
    "dtypes": ("float32", "float32", "float32"),
    "heads": 129,
    "key_heads": 2,
    "head_dim": 96,
    "layouts": ("TND", "BSND"),
    "block_size": 24,
    "sparse_count": 2049,
    "sparse_mode": 1,
    "window": (2**63 - 1, 4096),
    "lengths": "int64",
    "values": "paged",
    "contiguous": False,
    "attention_mode": 0,
    "value": "another tensor",
    "sparse_block_size": 3,
    "lse": "paged",
    "quant_modes": (1, 1),
}
# Where the products differ: the value, who accepts it.
DIFFERENT = (
    (schemas.LIGHTNING_INDEXER, "dtypes", ("bfloat16", "bfloat16", "float32"), {A2, A3}),
    (schemas.LIGHTNING_INDEXER, "heads", 33, {A2, A3}),
    (schemas.QUANT_LIGHTNING_INDEXER, "dtypes", ("float8_e4m3fn", "float8_e4m3fn", "bfloat16", "float32", "float32"), {A950}),
    (schemas.SPARSE_FLASH_ATTENTION, "heads", 48, {A950}),
    (schemas.SPARSE_FLASH_ATTENTION, "sparse_block_size", 64, {A2, A3}),
    (schemas.SPARSE_FLASH_ATTENTION, "sinks", True, {A950}),
    (schemas.KV_QUANT_SPARSE_FLASH_ATTENTION, "dtypes", ("bfloat16", "float8_e4m3fn"), {A950}),
    (schemas.KV_QUANT_SPARSE_FLASH_ATTENTION, "heads", 48, {A950}),
    (schemas.KV_QUANT_SPARSE_FLASH_ATTENTION, "sparse_block_size", 16, {A2, A3}),
)


def facts(operator: str, **changed: Any) -> dict[str, Any]:
    """Facts of a call that every product accepts, but for what is changed."""
    return {**COMMON, **ACCEPTED[operator], **changed}


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.operator}-{row.fact}")
def test_every_row_accepts_and_refuses(row: Constraint, product: str) -> None:
    constraints.check(row.operator, product, facts(row.operator))
    refused = True if row.fact == "sinks" and product != A950 else REFUSED.get(row.fact, "more than true")
    with pytest.raises(Unsupported) as error:
        constraints.check(row.operator, product, facts(row.operator, **{row.fact: refused}))
    assert error.value.capability == row.capability
    assert f"{row.operator} on {product}: {row.fact} is {refused!r}, but " in str(error.value)
    assert row.source in str(error.value)


@pytest.mark.parametrize(("operator", "fact", "value", "who"), DIFFERENT, ids=lambda value: str(value)[:30])
def test_products_differ_as_documented(operator: str, fact: str, value: Any, who: set[str]) -> None:
    found = set()
    for product in PRODUCTS:
        try:
            constraints.check(operator, product, facts(operator, **{fact: value}))
            found.add(product)
        except Unsupported:
            pass
    assert found == who


def test_every_row_cites_a_document_and_no_fact_stands_twice() -> None:
    assert all(".md" in row.source for row in TABLE)
    assert len({(row.operator, row.fact) for row in TABLE}) == len(TABLE)
    assert {row.operator for row in TABLE} == set(schemas.OPERATORS)


@pytest.mark.parametrize(
    ("name", "product"),
    [
        ("Ascend910B3", A2),
        ("Ascend910B2C", A2),
        ("Ascend910_9382", A3),
        ("Ascend950PR_9589", A950),
        ("Ascend310P3", None),
        ("Ascend910A", None),
    ],
)
def test_a_chip_s_name_tells_its_product(name: str, product: str | None) -> None:
    assert constraints.product_of(name) == product


@pytest.mark.parametrize("product", PRODUCTS)
def test_capabilities_are_what_the_table_accepts(product: str) -> None:
    declared = capabilities(Device("npu", "chip", "driver", 1, product))
    index, attend = declared["lightning_index"], declared["sparse_attend"]
    assert ("e4m3/bf16/f32" in index["format"]) == (product == A950)
    assert ("bf16/f32/-" in index["format"]) == (product != A950)
    assert "int8/f16/f16" in index["format"]
    assert (33 in index["heads"]) == (product != A950)
    assert 65 not in index["heads"]
    assert ("ascend_656_nrs_fp8" in attend["format"]) == (product == A950)
    assert "v32_fp8_656_nsr" not in attend["format"]
    assert "f32" not in attend["format"]
    assert math.prod((48 in attend["heads"], 1000 in attend["heads"])) == 1
