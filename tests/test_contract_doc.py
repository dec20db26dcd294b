"""docs/contract.md says what the code declares: its tables are generated, its names and its cited sections exist."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import dsa_portable
from dsa_portable import DSAError, errors, index_scores, index_select, lightning_index, profile, sparse_attend
from dsa_portable.backend import CONTRACT_VERSION
from dsa_portable.batch import ARRAYS, DECODE_ROWS
from dsa_portable.formats import LAYOUTS
from dsa_portable.operators import FEATURES
from dsa_portable.profile import Accumulator, Profile, envelope

DOCS = Path(__file__).resolve().parents[1] / "docs"
TEXT = (DOCS / "contract.md").read_text(encoding="utf-8")
SECTIONS = {int(n): title for n, title in re.findall(r"^## (\d+)\. (.*)$", TEXT, re.MULTILINE)}


def section(number: int) -> str:
    return TEXT.split(f"\n## {number}. ")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of every table row, without back quotes."""
    return [[c.strip(" `") for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


@pytest.fixture(scope="module")
def build_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_tables", DOCS / "build_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_current(build_tables: ModuleType) -> None:
    assert build_tables.render(build_tables.CONTRACT, TEXT) == TEXT, "run: python docs/build_tables.py"


def test_every_table_is_in_the_document(build_tables: ModuleType) -> None:
    assert sorted(build_tables.BLOCK.findall(TEXT)) == sorted(build_tables.TABLES[build_tables.CONTRACT])
    assert TEXT.count("<!-- generated: ") == TEXT.count("<!-- end -->") == len(build_tables.TABLES[build_tables.CONTRACT])


@pytest.mark.parametrize(
    "old", ["| `topk` | int >= 1 |", "| `idx_fp8_132_planar` |", "| 656 |", "| optional |", "`e4m3`", "exp(lse_i)"]
)
def test_drift_is_seen(build_tables: ModuleType, old: str) -> None:
    assert old in TEXT
    drifted = TEXT.replace(old, "| something else |", 1)
    assert build_tables.render(build_tables.CONTRACT, drifted) != drifted
    assert build_tables.render(build_tables.CONTRACT, drifted) == TEXT


def test_an_unknown_table_is_an_error(build_tables: ModuleType) -> None:
    with pytest.raises(KeyError):
        build_tables.render(build_tables.CONTRACT, "<!-- generated: nonsense -->\n<!-- end -->")


def test_sections_are_numbered_and_the_operators_are_where_docstrings_say() -> None:
    assert list(SECTIONS) == list(range(1, len(SECTIONS) + 1))
    for operator in (lightning_index, sparse_attend, index_scores, index_select):
        cited = re.search(r"docs/contract\.md, section (\d+)", operator.__doc__ or "")
        assert cited is not None
        assert SECTIONS[int(cited[1])] == f"`{operator.__name__}`"


def test_cross_references_exist() -> None:
    """`section 3.5` is item 5 of section 3, or a heading of that number."""
    cited = re.findall(r"sections? (\d+)(?:\.(\d+))?", TEXT)
    assert len(cited) > 5
    for number, item in cited:
        assert int(number) in SECTIONS
        assert not item or re.search(rf"^(?:{item}\. |### {number}\.{item} )", section(int(number)), re.MULTILINE), (
            number,
            item,
        )


def test_version() -> None:
    assert f"\nVersion {CONTRACT_VERSION}. " in TEXT


def test_every_error_is_explained() -> None:
    raised = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, DSAError)]
    assert len(raised) == 8
    for error in raised:
        assert f"`{error.__name__}`" in section(9) + section(10)
        assert error.__name__ in dsa_portable.__all__
    bases = {name: base for name, _, base in (row for row in rows(section(9)) if len(row) == 3) if base.endswith("Error")}
    assert bases == {"InvalidArgument": "ValueError", "Unsupported": "NotImplementedError"}
    for name, base in bases.items():
        assert base in [c.__name__ for c in getattr(errors, name).__mro__]


def test_every_layout_and_feature_is_in_its_table() -> None:
    assert [row[0] for row in rows(section(6)) if row[0] in LAYOUTS] == list(LAYOUTS)
    listed = [tuple(row[:2]) for row in rows(section(11)) if row[0] in FEATURES]
    assert listed == [(operator, f.name) for operator, features in FEATURES.items() for f in features]


def test_the_fields_of_a_batch() -> None:
    fields = [name for row in rows(section(4)) for name in re.findall(r"\w+", row[0])]
    for field in dataclasses.fields(dsa_portable.Batch):
        assert field.name in fields
    for name, rank in ARRAYS.items():
        shape = next(row[1] for row in rows(section(4)) if name in re.findall(r"\w+", row[0]))
        assert shape.startswith("int32")
        assert shape.count(",") + 1 == rank
    assert f"A call is `decode` where `max_seqlen_q <= {DECODE_ROWS}`, else `prefill`." in section(4)


def test_every_batch_helper_is_named() -> None:
    fields = {f.name for f in dataclasses.fields(dsa_portable.Batch)}
    helpers = {name for name in vars(dsa_portable.Batch) if not name.startswith("_")} - fields
    assert {n for n in helpers if not re.search(rf"[`.]{n}[`(]", TEXT)} == {"check_bounds", "num_requests", "phase"}


def test_the_fields_of_a_profile_and_their_defaults() -> None:
    """The table is read from the source of the class; here it is held against the class."""
    described = {row[0]: row[1:] for row in rows(section(12)) if row[0] in Profile.__dataclass_fields__}
    assert list(described) == [*Profile.__dataclass_fields__]
    assert all(len(row) == 2 and row[1] for row in described.values())
    assert described["accumulator"][0] == "24 bits, RN, group 1"
    assert Profile().accumulator == Accumulator(24, "RN", 1)
    for field in dataclasses.fields(Profile):
        if field.name != "accumulator":
            shown = described[field.name][0]
            assert float(shown) == field.default if isinstance(field.default, float) else shown == str(field.default)


@pytest.mark.parametrize("operator", ["lightning_index", "sparse_attend"])
def test_the_envelopes(operator: str) -> None:
    """The table, read row by row, against the code: what stands in a row is inside, and one step further is not."""
    table = [row for row in rows(section(12)) if row[0] in profile.ENVELOPE_NAMES and operator in row[1]]
    assert (
        tuple(dict.fromkeys(row[0] for row in rows(section(12)) if row[0] in profile.ENVELOPE_NAMES)) == profile.ENVELOPE_NAMES
    )
    assert [row[0] for row in table] == [name for name, e in profile.ENVELOPES if operator in e.operators]
    for name, _, accumulator, less in table:
        bits = int(re.findall(r"\d+", accumulator)[0])
        chosen: dict[str, Any] = {}
        for part in less.split("; ") if ":" in less else []:
            fields, formats = part.split(": ")
            chosen |= dict.fromkeys(fields.replace("`", "").split(), formats.split(", ")[0])
        product = chosen.pop("product", "float32")
        declared = Profile(accumulator=Accumulator(bits, product=product), **chosen)
        assert envelope(operator, declared) == name
        coarser = dataclasses.replace(declared, accumulator=Accumulator(bits - 1, product=product))
        assert envelope(operator, coarser) != name
        for field in set(profile.FORMATS) - set(chosen):
            further = envelope(operator, dataclasses.replace(declared, **{field: "bfloat16"}))
            used = operator in profile.WORDS[field][0]
            assert (further == name) == (not used), field


@pytest.mark.parametrize(
    ("operator", "fields", "inside"),
    [
        ("lightning_index", {"head_sum": "float16"}, False),
        ("lightning_index", {"scale_compute": "bfloat16"}, False),
        ("lightning_index", {"exp_ulp": 65.0}, False),
        ("lightning_index", {"exp_ulp": 64.0}, True),
        ("lightning_index", {"p": "float8_e4m3fn"}, True),
        ("sparse_attend", {"p": "float8_e4m3fn"}, False),
        ("sparse_attend", {"kv_compute": "float8_e4m3fn"}, False),
        ("sparse_attend", {"p": "bfloat16", "kv_compute": "float16"}, True),
    ],
)
def test_what_every_envelope_needs(operator: str, fields: dict[str, object], inside: bool) -> None:
    for name in ("head_sum", "scale_compute", "exp_ulp"):
        assert f"`{name}`" in section(12).split("Every envelope needs")[1]
    declared = dataclasses.replace(Profile(), **fields)  # type: ignore[arg-type]
    assert (envelope(operator, declared) is not None) == inside
