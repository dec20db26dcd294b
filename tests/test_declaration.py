"""What a backend declares is checked by name before the first case: one sentence for each mistake."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any

import pytest

from dsa_portable.backend import Backend, Device
from dsa_portable.backends.cpu import BACKEND as CPU
from dsa_portable.conformance.cases.catalogue import CASES, LISTS
from dsa_portable.conformance.execute import declaration, recording
from dsa_portable.conformance.execute.declaration import DeclarationError, subject_of
from dsa_portable.conformance.execute.recording import Subject
from dsa_portable.contract import ANY, YES, PerPhase
from dsa_portable.errors import BackendExited
from dsa_portable.profile import Accumulator, Profile

FOUND = {"kind": "cpu", "chip": "Chip 1", "driver": "2.0", "count": 1, "architecture": "x86-64", "versions": {"sdk": "3"}}
INDEX = CPU.capabilities(None)["lightning_index"]


def subject(backend: Backend = CPU, **device: Any) -> Subject:
    """Of the smoke list, as a backend's process tells it."""
    found, cases = FOUND | device, [CASES[id] for id in LISTS["smoke"]]
    told = json.loads(json.dumps(recording.as_json(declaration.asked(backend, found, cases))))
    hello = {"device": found, "resolved": "cpu", "interpreted": False, "declared": told}
    run: dict[str, Any] = {"requested": "", "emulate": None, "variables": {}}
    return subject_of(backend.name, hello, list_name="smoke", list_sha256="a" * 64, **run)


def test_what_is_right_is_taken_as_it_is() -> None:
    found = subject()
    assert found.device == Device(**FOUND)
    assert found.capabilities == CPU.capabilities(None)
    assert {key[1:] for key in found.profiles if key[0] == "lightning_index"} == {
        ("e4m3/f32/f32", "decode"),
        ("e4m3/f32/f32", "prefill"),
    }


def test_every_field_has_a_check() -> None:
    assert list(declaration.DEVICE) == [f.name for f in fields(Device)]
    assert list(declaration.PROFILE) == [f.name for f in fields(Profile)]
    assert list(declaration.ACCUMULATOR) == [f.name for f in fields(Accumulator)]


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("chip", "two\nlines", "one line of text"),
        ("chip", 7, "one line of text"),
        ("kind", "", "one line of text"),
        ("count", -1, "a whole number from 0 on"),
        ("count", True, "a whole number from 0 on"),
        ("versions", {"sdk": 3}, "a mapping of text to text"),
    ],
)
def test_a_device_of_no_meaning(field: str, value: Any, accepted: str) -> None:
    with pytest.raises(DeclarationError, match=rf"^backend 'cpu': Device.{field} is .*, but {accepted} is accepted; mend"):
        subject(**{field: value})


@pytest.mark.parametrize(
    ("declared", "sentence"),
    [
        (None, "capabilities() returned None, but a mapping is accepted"),
        ({"lightning_indx": INDEX}, "'lightning_indx' -> "),
        ({"lightning_index": ("format",)}, "each with a mapping of features"),
        ({"lightning_index": {**INDEX, "fomat": ANY}}, "the feature 'fomat' of lightning_index, but format, heads, head_dim"),
        ({"lightning_index": {**INDEX, "heads": 64}}, "offers heads = 64 for lightning_index, but ANY or a tuple"),
        ({"lightning_index": {**INDEX, "format": "e4m3/f32/f32"}}, "write ('e4m3/f32/f32',) for one value."),
    ],
)
def test_capabilities_of_no_meaning(declared: Any, sentence: str) -> None:
    with pytest.raises(DeclarationError, match=re.escape(sentence)):
        subject(replace(CPU, capabilities=lambda device: declared))


@pytest.mark.parametrize(
    ("operator", "name", "values", "wrong", "accepted"),
    [
        ("lightning_index", "format", ("e4m3",), "'e4m3'", "e4m3/f32/f32, e4m3/f32/f16, "),
        ("lightning_index", "format", ("e4m3/f32/-",), "'e4m3/f32/-'", "e4m3/f32/f32, e4m3/f32/f16, "),
        ("lightning_index", "heads", (64, "32"), "'32'", "whole numbers from 1 on"),
        ("lightning_index", "topk", range(10**12), "0", "whole numbers from 1 on"),
        ("lightning_index", "page_size", (64, None), "None", "whole numbers from 1 on"),
        ("lightning_index", "k_layout", ("planar",), "'planar'", "idx_fp8_132_planar, idx_fp8_132_interleaved can"),
        ("lightning_index", "key_range", PerPhase(YES, (False,)), "False", "True alone"),
        ("sparse_attend", "dims", ("576",), "'576'", "two widths, as '576/512'"),
        ("sparse_attend", "format", ("idx_fp8_132_planar",), "'idx_fp8_132_planar'", "f32, "),
    ],
)
def test_a_value_that_no_call_can_have(operator: str, name: str, values: Any, wrong: str, accepted: str) -> None:
    declared = {**CPU.capabilities(None), operator: {**CPU.capabilities(None)[operator], name: values}}
    sentence = f"offers {name} = {wrong} for {operator}, which no call can have, but {accepted}"
    with pytest.raises(DeclarationError, match=re.escape(sentence)):
        subject(replace(CPU, capabilities=lambda device: declared))


@pytest.mark.parametrize(
    ("profile", "sentence"),
    [
        (None, "returned None, but a Profile is accepted"),
        (Profile(p="float8"), ".p is 'float8', but one of float64, float32, tfloat32, float16, bfloat16 is accepted"),
        (Profile(p=["float32"]), ".p is ['float32'], but one of"),  # type: ignore[arg-type]
        (Profile(exp_ulp=float("nan")), ".exp_ulp is nan, but a number from 0 on is accepted"),
        (Profile(ties="highest"), ".ties is 'highest', but one of any, lowest is accepted"),
        (Profile(deterministic=1), ".deterministic is 1, but True or False is accepted"),  # type: ignore[arg-type]
        (Profile(accumulator=14), ".accumulator is 14, but an Accumulator is accepted"),  # type: ignore[arg-type]
        (Profile(accumulator=Accumulator(rounding="RU")), ".accumulator.rounding is 'RU', but one of RN, RZ is accepted"),
        (Profile(accumulator=Accumulator(bits=0)), ".accumulator.bits is 0, but a whole number from 1 on is accepted"),
        (
            Profile(qk_compute="float16"),
            ".qk_compute is 'float16', but one of float64, float32, tfloat32, bfloat16 is accepted",
        ),
        (Profile(rescale_threshold=-1.0), ".rescale_threshold is -1.0, but a number from 0 on is accepted"),
        (Profile(accumulator=Accumulator(14, guard=2)), ".accumulator.guard is 2, but a group of 1 aligns nothing; mend"),
        (Profile(accumulator=Accumulator(24, promotion=128)), ".accumulator.promotion is 128, but a sum of 24 bits is float32"),
        (Profile(accumulator=Accumulator(14, "RZ", 32, 0, 48)), ".accumulator.promotion is 48, but only whole groups can be"),
        (Profile(p="float16", rescale_threshold=11.5), ".rescale_threshold is 11.5, but e to it is more than the format of P"),
    ],
)
def test_a_profile_of_no_meaning(profile: Any, sentence: str) -> None:
    def of_attention(device: Any, operator: str, *rest: str) -> Any:
        return profile if operator == "sparse_attend" else Profile()

    with pytest.raises(DeclarationError, match=re.escape(sentence)) as caught:
        subject(replace(CPU, profile=of_attention))
    assert "profile('sparse_attend', 'bf16', 'decode')" in str(caught.value)


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (lambda: Profile(head_sums="float32"), "the field 'head_sums', which Profile of contract 1.1 does not have; correct"),  # type: ignore[call-arg]
        (lambda: Accumulator(sticky=True), "the field 'sticky', which Accumulator of contract 1.1 does not have"),  # type: ignore[call-arg]
    ],
)
def test_a_field_of_another_contract_is_named(made: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(DeclarationError, match=re.escape(sentence)):
        subject(replace(CPU, profile=lambda *_: made()))


@pytest.mark.parametrize("sources", [None, {"p": 3}, {"pp": "a document"}])
def test_sources_of_no_meaning(sources: Any) -> None:
    with pytest.raises(
        DeclarationError, match=r"profile_sources\(.*a mapping of text to text is accepted, by fields of Profile"
    ):
        subject(replace(CPU, profile_sources=lambda *_: sources))


@pytest.mark.parametrize("asked", ["capabilities", "profile", "profile_sources"])
@pytest.mark.parametrize(
    ("does", "error", "sentence"),
    [
        (lambda *_: {}["x"], DeclarationError, r"\(.*\) raised KeyError\('x'\); mend the declaration.$"),
        (lambda *_: sys.exit(0), BackendExited, r"called sys.exit\(0\)"),
    ],
)
def test_a_declaration_that_raises(asked: str, does: Callable[..., Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        subject(replace(CPU, **{asked: does}))


def test_a_subject_outlives_its_file(tmp_path: Any) -> None:
    backend = replace(
        CPU,
        capabilities=lambda device: {"lightning_index": {**INDEX, "topk": range(1, 4), "heads": frozenset({64, 32})}},
        profile=lambda *_: Profile(accumulator=Accumulator(14, "RZ", 32), finite_max=65504.0),
        profile_sources=lambda *_: {"accumulator": "a report"},
    )
    before = subject(backend)
    recording.save_subject(tmp_path, before)
    after = recording.load_subject(tmp_path)
    assert after is not None
    assert after.unlike(before) == []
    assert after.capabilities["lightning_index"]["page_size"] is ANY
    assert 3 in after.capabilities["lightning_index"]["topk"]
    assert 4 not in after.capabilities["lightning_index"]["topk"]
    assert after.profiles == before.profiles
    assert after.sources == before.sources
    assert asdict(after.device) == asdict(before.device)
    other = subject(replace(backend, version="9"), chip="Chip 2")
    assert other.unlike(after) == ["version", "device"]
    (tmp_path / recording.SUBJECT).write_text("{")
    assert recording.load_subject(tmp_path) is None


@pytest.mark.parametrize(
    ("spoilt", "sentence"),
    [
        ({"profiles": 3}, "its process told a declaration that cannot be read"),
        ({"version": 3}, "Backend.version is 3, but one line of text is accepted"),
        ({"arrays": "jax"}, "Backend.arrays is 'jax', but one of numpy, torch is accepted"),
        ({"capabilities": {"lightning_index": {"heads": [0]}}}, "offers heads = 0 for lightning_index, which no call can have"),
        ({"sources": [["sparse_attend", "bf16", "decode", {"pp": "a"}]]}, "by fields of Profile; mend the declaration"),
        ({"more": 1}, "its process told a declaration that cannot be read"),
    ],
)
def test_what_a_process_tells_is_checked_again(spoilt: dict[str, Any], sentence: str) -> None:
    told = recording.as_json(declaration.asked(CPU, FOUND, [CASES[id] for id in LISTS["smoke"]]))
    with pytest.raises(DeclarationError, match=re.escape(sentence)):
        declaration.told("cpu", told | spoilt)
