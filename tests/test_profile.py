"""A profile's fields: each is read by the emulator and by the bounds or by neither, has words, and an envelope."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from dsa_portable.conformance.cases.lightning_index import IndexCase
from dsa_portable.conformance.cases.sparse_attend import AttendCase
from dsa_portable.conformance.judging import emulator
from dsa_portable.conformance.judging.lightning_index import IndexReference
from dsa_portable.conformance.judging.sparse_attend import AttendReference
from dsa_portable.profile import FORMATS, WORDS, Accumulator, Profile, differences, envelope

INDEX = IndexCase("small", "Small.", (), "e4m3/f32/f32", ((2, 40),), heads=4, head_dim=32, topk=8)
ATTEND = AttendCase("small", "Small.", (), "v32_fp8_656_nsr_f32", ((2, 80),), heads=4, topk=64, holes=False)
# Of what may be chosen, promised or reached, and not of how numbers come about.
PROMISES = {"finite_max", "ties", "deterministic"}
# Every field other than it is by default, so that no way around one is taken.
EVERYTHING = {
    "accumulator": Accumulator(14, "RZ", 8, 1, 16, "bfloat16"),
    "intermediate_exponent": -1,
    "normaliser": "rounded",
    "exp_ulp": 8.0,
    "subnormals": "flushed",
    "rescale_threshold": 2.0,
    **dict.fromkeys(FORMATS, "bfloat16"),
    "intermediate": "float16",
}


class ReadProfile(Profile):
    """Notes which fields are read."""

    def __getattribute__(self, name: str) -> Any:
        if name in Profile.__dataclass_fields__:
            READ.add(name)
        return super().__getattribute__(name)


class ReadAccumulator(Accumulator):
    """The same, as `accumulator.bits`; its unit roundoff is of bits and rounding."""

    def __getattribute__(self, name: str) -> Any:
        if name in Accumulator.__dataclass_fields__:
            READ.add(f"accumulator.{name}")
        return super().__getattribute__(name)


READ: set[str] = set()


def read_by(run: Any) -> set[str]:
    a = EVERYTHING["accumulator"]
    assert isinstance(a, Accumulator)
    profile = ReadProfile(**{**EVERYTHING, "accumulator": ReadAccumulator(**vars(a))})  # type: ignore[arg-type]
    READ.clear()
    run(profile)
    return READ - PROMISES


def expected(operator: str) -> set[str]:
    mine = {name for name, (operators, _) in WORDS.items() if operator in operators} - PROMISES
    return mine | {f"accumulator.{f.name}" for f in fields(Accumulator)}


def test_the_emulator_and_the_bounds_of_the_index_read_the_same_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    call, own = INDEX.build(), emulator.index_scores
    assert read_by(lambda profile: own(call, profile)) == expected("lightning_index")
    monkeypatch.setattr(emulator, "index_scores", lambda call, *_: own(call, Profile()))
    assert read_by(lambda profile: IndexReference(INDEX, call, profile)) == expected("lightning_index")


def test_the_emulator_and_the_bounds_of_attention_read_the_same_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    call, own = ATTEND.build(), emulator.attention

    def emulated(profile: Profile) -> None:
        kv = emulator.attention_row(call, 0, 0, profile)
        own(call.arrays["q"][0], kv, call.options["softmax_scale"], 512, None, profile)

    assert read_by(emulated) == expected("sparse_attend")
    monkeypatch.setattr(emulator, "attention", lambda *given: own(*given[:-1], Profile()))
    assert read_by(lambda profile: AttendReference(ATTEND, call, profile).row(0)) == expected("sparse_attend")


def test_every_field_has_words() -> None:
    assert set(WORDS) == {f.name for f in fields(Profile)}
    assert {name for name in WORDS if isinstance(getattr(Profile(), name), str) and name not in FORMATS} == {
        "normaliser",
        "subnormals",
        "ties",
    }


@pytest.mark.parametrize(
    ("operator", "profile", "words"),
    [
        ("lightning_index", Profile(), "float32 throughout"),
        ("lightning_index", Profile(p="bfloat16"), "float32 throughout"),
        (
            "lightning_index",
            Profile(Accumulator(14, "RZ", 32, promotion=128), ties="lowest", deterministic=True),
            "dot products summed in 14 bits, truncated, 32 aligned at a time, promoted to float32 every 128; ties to the "
            "lowest; deterministic",
        ),
        (
            "sparse_attend",
            Profile(Accumulator(24, "RZ", 16, guard=2), p="bfloat16", partials="bfloat16", ties="lowest"),
            "dot products summed in 24 bits, truncated, 16 aligned at a time, 2 guard bits; P in bfloat16; partial outputs of "
            "splits in bfloat16",
        ),
    ],
)
def test_a_profile_in_words(operator: str, profile: Profile, words: str) -> None:
    assert differences(operator, profile) == words


@pytest.mark.parametrize(
    ("operator", "changes", "name"),
    [
        ("sparse_attend", {}, "exact"),
        ("sparse_attend", {"accumulator": Accumulator(24, "RZ", 16, 2)}, "exact"),
        ("sparse_attend", {"p": "bfloat16"}, "exact-p16"),
        ("sparse_attend", {"kv_compute": "tfloat32"}, "exact-p16"),
        ("sparse_attend", {"normaliser_sum": "float16"}, "exact-p16"),
        ("sparse_attend", {"lse": "bfloat16"}, "exact-p16"),
        ("sparse_attend", {"accumulator": Accumulator(14, "RZ", 32), "p": "bfloat16"}, "reduced"),
        ("sparse_attend", {"accumulator": Accumulator(product="float16")}, "reduced"),
        ("sparse_attend", {"logit": "bfloat16"}, None),
        ("sparse_attend", {"qk_compute": "bfloat16"}, "exact"),
        ("lightning_index", {"p": "bfloat16"}, "exact"),
        ("lightning_index", {"qk_compute": "tfloat32"}, "reduced"),
        ("lightning_index", {"accumulator": Accumulator(13, "RZ", 32)}, "reduced"),
        ("lightning_index", {"accumulator": Accumulator(12, "RZ", 32)}, None),
        ("lightning_index", {"logit": "bfloat16", "qk_compute": "bfloat16"}, "bf16-logits"),
        ("lightning_index", {"scale_compute": "bfloat16"}, None),
    ],
)
def test_the_envelope_of_a_profile(operator: str, changes: dict[str, Any], name: str | None) -> None:
    assert envelope(operator, replace(Profile(), **changes)) == name


def test_what_a_1_0_plugin_declares_has_float32_s_way_in_every_newer_field() -> None:
    """By position, as far as 1.0 went: newer fields stand behind."""
    index, attention = ("float32", 0, "float32", "float32"), ("bfloat16", "rounded", "float32", "float32", 8.0)
    declared = Profile(Accumulator(14, "RZ", 32), *index, *attention, 65504.0, "flushed", "lowest", True)
    assert declared.deterministic
    assert declared.accumulator == Accumulator(14, "RZ", 32, guard=0, promotion=0, product="float32")
    newer = [f.name for f in fields(Profile)][14:]
    assert newer == ["qk_compute", "maximum", "rescale_threshold", "normaliser_sum", "partials", "lse"]
    assert all(getattr(declared, name) == getattr(Profile(), name) for name in newer)
