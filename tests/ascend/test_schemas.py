"""The vendor operators' schemas: those that the backend keeps, those of the installed wheel, and how a generation is told."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import pytest

from dsa_portable.backends.ascend import schemas
from dsa_portable.backends.ascend.schemas import (
    GENERATIONS,
    KV_QUANT_SPARSE_FLASH_ATTENTION,
    LIGHTNING_INDEXER,
    OPERATORS,
    QUANT_LIGHTNING_INDEXER,
    SPARSE_FLASH_ATTENTION,
    UNLISTED,
)
from dsa_portable.errors import DeviceUnavailable, InvalidArgument

# Of the four texts of a wheel, one a line: 2.8.0.post2, 2.10.0 and 2.13.0.
SHA256 = {
    "A": "772f081a3692dcd8b293ae3b0370d32016921fff74ea5a7c7e4586f4144c3869",
    "B": "2097c55854a5bc6d74dc37860277f120911f70cbdcc9eeaaa81984e8b4fbf562",
    "C": "1b6ba1bc4cd2a3c38de85c038970724fb0d739e09e9bde23ebba2671d7365e3b",
}
C = GENERATIONS["C"]


def generation_of(texts: Mapping[str, str]) -> str:
    return schemas.generation_of(texts.get)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_kept_texts_are_those_of_a_wheel_of_their_generation(generation: str) -> None:
    texts = GENERATIONS[generation]
    assert tuple(texts) == OPERATORS
    assert all(text.startswith(f"{operator}(") for operator, text in texts.items())
    assert sha256("\n".join(texts.values()).encode()).hexdigest() == SHA256[generation]


def test_the_installed_wheel_is_of_generation_c_byte_for_byte() -> None:
    package = find_spec("torch_npu")
    assert package is not None
    assert package.origin is not None
    declared = Path(package.origin).parent / "csrc" / "aten" / "npu_native_functions_by_codegen.yaml"
    texts = dict(re.findall(r"^ *(?:- )?func: ((\w+)\(.*)$", declared.read_text(encoding="utf-8"), re.MULTILINE))
    by_name = {name: text for text, name in texts.items()}
    assert {operator: by_name[operator] for operator in OPERATORS} == C
    assert generation_of(by_name) == "C"


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("namespace", ["", "npu::"])
def test_a_generation_is_told_from_its_texts(generation: str, namespace: str) -> None:
    assert generation_of({operator: namespace + text for operator, text in GENERATIONS[generation].items()}) == generation


def test_arguments_come_in_order_and_without_the_star() -> None:
    texts = GENERATIONS["A"]
    assert schemas.arguments(texts[LIGHTNING_INDEXER]) == (
        *("query", "key", "weights", "actual_seq_lengths_query", "actual_seq_lengths_key", "block_table"),
        *("layout_query", "layout_key", "sparse_count", "sparse_mode", "pre_tokens", "next_tokens", "return_value"),
    )
    assert [len(schemas.arguments(text)) for text in texts.values()] == [13, 16, 18, 22]
    more = {
        (generation, operator): schemas.arguments(text)[len(schemas.arguments(texts[operator])) :]
        for generation in "BC"
        for operator, text in GENERATIONS[generation].items()
    }
    assert {key: names for key, names in more.items() if names} == {
        ("B", QUANT_LIGHTNING_INDEXER): ("query_dtype", "key_dtype"),
        ("B", KV_QUANT_SPARSE_FLASH_ATTENTION): ("key_dtype", "value_dtype"),
        ("C", QUANT_LIGHTNING_INDEXER): ("query_dtype", "key_dtype"),
        ("C", KV_QUANT_SPARSE_FLASH_ATTENTION): ("key_dtype", "value_dtype"),
        ("C", SPARSE_FLASH_ATTENTION): ("sinks",),
    }


@pytest.mark.parametrize(
    ("schema", "names"),
    [
        ("f() -> ()", ()),
        ("npu::f.out(Tensor(a!) x, *, int[] dims=[1, 2], str s='a') -> Tensor(a!)", ("x", "dims", "s")),
    ],
)
def test_other_schemas_are_read_too(schema: str, names: tuple[str, ...]) -> None:
    assert schemas.arguments(schema) == names


@pytest.mark.parametrize("text", ["", "npu_lightning_indexer", "f(Tensor x)"])
def test_what_is_no_schema_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="is no operator schema"):
        schemas.arguments(text)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ((SPARSE_FLASH_ATTENTION,), "has no npu_sparse_flash_attention; install"),
        (
            (LIGHTNING_INDEXER, QUANT_LIGHTNING_INDEXER),
            "has no npu_lightning_indexer and no npu_quant_lightning_indexer; install",
        ),
    ],
)
def test_missing_operators_are_named(missing: tuple[str, ...], words: str) -> None:
    with pytest.raises(DeviceUnavailable, match=words):
        generation_of({operator: text for operator, text in C.items() if operator not in missing})


# op-plugin after 2.14.0 requires a value again, and gives the other operator sinks.
LATER = {
    SPARSE_FLASH_ATTENTION: C[SPARSE_FLASH_ATTENTION].replace("Tensor? value", "Tensor value"),
    KV_QUANT_SPARSE_FLASH_ATTENTION: C[KV_QUANT_SPARSE_FLASH_ATTENTION].replace(") ->", ", Tensor? sinks=None) ->"),
}


@pytest.mark.parametrize(
    "changed",
    [
        LATER,
        {QUANT_LIGHTNING_INDEXER: GENERATIONS["A"][QUANT_LIGHTNING_INDEXER]},
        {LIGHTNING_INDEXER: C[LIGHTNING_INDEXER].replace("Tensor query, Tensor key", "Tensor key, Tensor query")},
    ],
    ids=["later optional arguments", "of two generations", "another order"],
)
def test_what_takes_every_call_of_ours_by_name_is_accepted_as_unlisted(changed: Mapping[str, str]) -> None:
    assert generation_of({**C, **changed}) == UNLISTED


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {LIGHTNING_INDEXER: C[LIGHTNING_INDEXER].replace("-> (Tensor, Tensor)", "-> Tensor")},
            ("npu_lightning_indexer has -> Tensor where C has -> (Tensor, Tensor)",),
        ),
        (
            {LIGHTNING_INDEXER: C[LIGHTNING_INDEXER].replace("Tensor weights, *", "Tensor weights, Tensor metadata, *")},
            ("npu_lightning_indexer has Tensor metadata where C has nothing",),
        ),
        (
            {SPARSE_FLASH_ATTENTION: C[SPARSE_FLASH_ATTENTION].replace("int attention_mode=0, ", "")},
            ("npu_sparse_flash_attention has nothing where C has int attention_mode=0",),
        ),
    ],
    ids=["other results", "a new required argument", "an argument that is gone"],
)
def test_what_does_not_is_refused_with_what_was_found(changed: Mapping[str, str], words: tuple[str, ...]) -> None:
    with pytest.raises(DeviceUnavailable) as caught:
        generation_of({**C, **changed})
    assert all(word in str(caught.value) for word in ("A, B, C", "such as 2.13.0", *words))
    assert "\n" not in str(caught.value)
