"""Cases are data: the same bytes on every machine, each hazard really in them, every required feature tried in every claim."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsa_portable.arrays import NUMPY_DTYPES
from dsa_portable.conformance import lists
from dsa_portable.conformance import run as run_list
from dsa_portable.conformance.cases import storage, values
from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.cases.catalogue import CASES, HAZARDS, LISTS, Case
from dsa_portable.conformance.cases.contents import CANCEL_BITS, WEIGHT_SCALE
from dsa_portable.conformance.cases.hazards import PORTABILITY
from dsa_portable.conformance.cases.index_scores import ScoresCase
from dsa_portable.conformance.cases.index_select import SelectCase
from dsa_portable.conformance.cases.lightning_index import IndexCase
from dsa_portable.conformance.cases.sparse_attend import INVALID, AttendCase
from dsa_portable.conformance.judging import oracle
from dsa_portable.conformance.report import claims
from dsa_portable.formats import unpack
from dsa_portable.operators import FEATURES

Array: TypeAlias = np.ndarray[Any, Any]
Single: TypeAlias = IndexCase | AttendCase
Listed: TypeAlias = Single | SelectCase

# The core cases of one call each that were made by hand; what cases of several calls are made of is tested here too, their
# relations elsewhere. Those of the covering table are tested in test_covering.py.
SINGLE: dict[str, Single] = {
    name: case for name in LISTS["core"] if isinstance(case := CASES[name], (IndexCase, AttendCase)) and not case.point
}
# And those of parts, whose arrays are tested in test_parts.py.
PARTS = {name: case for name in LISTS["parts"] if isinstance(case := CASES[name], (ScoresCase, SelectCase))}
LISTED: dict[str, Listed] = {**SINGLE, **PARTS}

# --- values: what another machine or another NumPy must reproduce ---


def test_words_are_known() -> None:
    expected = [0xDCCDD3266928BEF7, 0x6193D46048C2C9AC, 0x0A23553133788EFF, 0x7C5B7132639C80F1]
    assert values.words("dsa-portable", 4).tolist() == expected
    assert values.words("dsa-portable", 2).dtype == np.dtype("<u8")
    assert values.words("dsa-portablf", 4).tolist() != expected


def test_values_are_known() -> None:
    name = "dsa-portable"
    assert values.bell(name, (6,)).tolist() == [72, 164, 129, 42, 58, -331]
    assert values.fine_bell(name, (4,)).tolist() == [55316, 18531, -56883, -11748]
    assert values.integers(name, (6,), -3, 12).tolist() == [10, 3, -3, 4, 12, 10]
    assert values.permutation(name, 8).tolist() == [2, 7, 1, 3, 6, 0, 5, 4]
    assert values.subset(name, 100, 4).tolist() == [12, 34, 22, 26]
    assert [x.hex() for x in values.scales(name, (2,), False).tolist()] == ["0x1.d200300000000p-1", "0x1.98a11a0000000p-4"]
    assert values.scales(name, (4,), True).tolist() == [0.5, 0.0625, 0.25, 0.25]


def test_bells_follow_from_the_words() -> None:
    words = [int(word) for word in values.words("any", 50)]
    octets = [word.to_bytes(8, "little") for word in words]
    bells = [sum(half) - 510 for octet in octets for half in (octet[:4], octet[4:])]
    fine = [sum(int.from_bytes(octet[i : i + 2], "little") for i in (0, 2, 4, 6)) - 131070 for octet in octets]
    assert values.bell("any", (99,)).tolist() == bells[:99]
    assert values.fine_bell("any", (50,)).tolist() == fine


def test_bells_have_the_range_and_deviation_they_state() -> None:
    for generate, edge, deviation in ((values.bell, 510, 147.8), (values.fine_bell, 131070, 37837.0)):
        drawn = generate("many", (1000, 200))
        assert drawn.dtype == np.int32
        assert drawn.shape == (1000, 200)
        assert abs(drawn).max() <= edge
        assert abs(drawn.std() - deviation) < 0.01 * deviation
        assert abs(drawn.mean()) < 0.01 * deviation


@given(st.text(max_size=8), st.integers(0, 40), st.integers(-(2**31), 2**31 - 1), st.integers(0, 2**31))
def test_integers_stay_in_bounds(name: str, count: int, low: int, width: int) -> None:
    drawn = values.integers(name, (count,), low, low + width)
    assert drawn.dtype == np.int64
    assert ((drawn >= low) & (drawn <= low + width)).all()


def test_integers_reach_both_bounds_about_equally_often() -> None:
    drawn, counts = np.unique(values.integers("die", (60000,), 1, 6), return_counts=True)
    assert drawn.tolist() == [1, 2, 3, 4, 5, 6]
    assert (abs(counts - 10000) < 400).all()


@given(st.text(max_size=8), st.integers(1, 300), st.data())
def test_permutation_and_subset(name: str, count: int, data: st.DataObject) -> None:
    assert np.array_equal(np.sort(values.permutation(name, count)), np.arange(count))
    taken = data.draw(st.integers(0, count))
    chosen = values.subset(name, count, taken)
    assert len(np.unique(chosen)) == len(chosen) == taken


def test_scales_are_positive_numbers_with_full_significands_or_powers_of_two() -> None:
    full, powers = values.scales("s", (5000,), False), values.scales("s", (5000,), True)
    for drawn in (full, powers):
        assert drawn.dtype == np.float32
        assert ((drawn >= 2.0**-4) & (drawn <= 1)).all()
    assert (np.frexp(powers)[0] == 0.5).all()
    assert (full.view(np.uint32) & 1).mean() > 0.45  # the last bit of the significand is in use
    assert not (np.frexp(full)[0] == 0.5).any()
    assert np.isfinite(values.scales("s", (5000,), False, "float16")).all()


@given(st.sampled_from(sorted(WEIGHT_SCALE)), st.text(max_size=8))
def test_natural_weights_fit_float32(operand: str, name: str) -> None:
    weights = (values.fine_bell(name, (64,)) + 25000) * WEIGHT_SCALE[operand]
    assert np.array_equal(values.cast(weights, "float32").astype(np.float64), weights)


def test_cast_clamps_rounds_to_even_and_truncates() -> None:
    assert values.cast(np.array([1e9, -1e9, 17.0, 19.0]), "float8_e4m3fn").astype(float).tolist() == [448, -448, 16, 20]
    assert values.cast(np.array([257.0, 259.0]), "bfloat16").astype(float).tolist() == [256, 260]
    assert values.cast(np.array([127.5, -127.5, 2.0]), "int8").tolist() == [127, -127, 2]
    with np.errstate(invalid="ignore"):
        assert np.isnan(values.cast(np.array([np.nan]), "float8_e4m3fn").astype(float)).all()


# --- storage ---

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=5).map(tuple)


@given(LENGTHS, st.integers(0, 4))
def test_flat_storage_leaves_gaps(lengths: tuple[int, ...], gap: int) -> None:
    stored = storage.flat(lengths, gap)
    begins = stored.batch["cu_seqlens_k"]
    assert (np.diff(begins) == np.array(lengths) + gap).all()
    for begin, length, row in zip(begins, lengths, stored.rows, strict=False):
        assert np.array_equal(row, begin + np.arange(length))
    assert stored.size == begins[-1]
    assert stored.batch["seqlens_k"].tolist() == list(lengths)


@given(st.text(max_size=6), LENGTHS, st.sampled_from([1, 2, 4, 16]), st.integers(0, 3))
def test_pages_belong_to_one_request_or_to_the_shared_prefix(
    name: str, lengths: tuple[int, ...], page_size: int, shared_pages: int
) -> None:
    stored = storage.paged(name, lengths, page_size, shared_pages)
    table, num_pages = stored.batch["block_table"], stored.size // page_size
    assert table.dtype == np.int32
    longest = lengths.index(max(lengths))
    owner: dict[int, tuple[int, int]] = {}
    for r in sorted(range(len(lengths)), key=lambda r: r != longest):
        used = -(-lengths[r] // page_size)
        assert len(set(table[r, :used].tolist())) == used
        assert ((table[r, :used] >= 0) & (table[r, :used] < num_pages)).all()
        # Unused entries name no page, so that following one shows.
        assert len(table[r, used:]) >= 3
        assert ((table[r, used:] < 0) | (table[r, used:] >= num_pages)).all()
        for number, page in enumerate(table[r, :used].tolist()):
            holder = owner.setdefault(page, (r, number))
            shared = r != longest and number < min(shared_pages, lengths[r] // page_size)
            assert holder == ((longest, number) if shared else (r, number))
        positions = np.arange(lengths[r])
        assert np.array_equal(stored.rows[r], table[r, positions // page_size] * page_size + positions % page_size)
    assert num_pages == len(owner) + 2  # two pages that nothing names


@given(LENGTHS, st.sampled_from([None, 1, 4]), st.integers(0, 3))
def test_place_fills_what_no_request_owns(lengths: tuple[int, ...], page_size: int | None, shared: int) -> None:
    stored = storage.paged("p", lengths, page_size, shared) if page_size else storage.flat(lengths, 2)
    drawn = [values.integers(f"v{r}", (length, 3), 0, 9) for r, length in enumerate(lengths)]
    logical = storage.share(stored, drawn)
    placed = stored.place(logical, np.array(-1)).reshape(-1, 3)
    owned = np.zeros(stored.size, bool)
    for slots, array in zip(stored.rows, logical, strict=True):
        assert np.array_equal(placed[slots], array)
        owned[slots] = True
    assert (placed[~owned] == -1).all()
    assert (~owned).any()
    longest = lengths.index(max(lengths))
    assert np.array_equal(logical[longest], drawn[longest])


# --- the table: checks that build nothing ---


def test_every_entry() -> None:
    for case in CASES.values():
        check_entry(case)


def check_entry(case: Case) -> None:
    assert re.fullmatch(r"[a-z0-9_-]+", case.id)
    assert case.id.startswith(("index-", "attend-", "end-to-end-"))
    assert re.fullmatch(r"[A-Za-z0-9].*[^.\s]\.", case.why)
    assert not re.search(r"[.!?]\s", case.why), "one sentence"
    assert case.hazards
    assert set(case.hazards) <= set(HAZARDS)


@pytest.mark.parametrize("case", SINGLE.values(), ids=SINGLE)
def test_core_cases_are_small(case: Single) -> None:
    rows = sum(lq for lq, _ in case.requests)
    if isinstance(case, IndexCase):
        assert sum(lq * lk for lq, lk in case.requests) <= 1 << 19
    else:
        assert (rows + case.padding_rows) * case.heads * case.topk <= 8 * 128 * 2048


def test_ids_are_unique_and_lists_name_cases() -> None:
    assert all(name == case.id for name, case in CASES.items())
    assert set(LISTS["smoke"]) < set(LISTS["core"]) < set(LISTS["full"]) < set(CASES)
    released = {id for name in lists.released() for id in lists.load(name).cases}
    assert {name for names in LISTS.values() for name in names} | released == set(CASES)
    for names in LISTS.values():
        assert len(set(names)) == len(names)


def test_every_hazard_has_a_case() -> None:
    assert {hazard for case in CASES.values() for hazard in case.hazards} == set(HAZARDS)


def test_the_hazards_of_portability_name_tags_that_have_cases() -> None:
    assert [hazard.number for hazard in PORTABILITY] == list(range(1, 31))
    assert {tag for hazard in PORTABILITY for tag in hazard.tags} <= set(HAZARDS)
    assert all(hazard.tags for hazard in PORTABILITY)


def test_seeds_change_values_and_keep_shapes() -> None:
    case = SINGLE["index-e4m3-f32-f32-decode-lengths"]
    one, other = case.build(), case.build("7/")
    assert one.sha256() == case.build().sha256() != other.sha256()
    assert {n: a.shape for n, a in one.arrays.items()} == {n: a.shape for n, a in other.arrays.items()}


@pytest.mark.parametrize("operator", FEATURES)
def test_boundary_lengths_are_tried_by_every_format(operator: str) -> None:
    wanted = {0, 1, 2047, 2048, 2049, 16385, 65537}
    listed = [case for name in LISTS["core"] if isinstance(case := CASES[name], (IndexCase, AttendCase))]
    for format in {case.format for case in listed if case.operator == operator}:
        mine = [case for case in listed if (case.operator, case.format) == (operator, format)]
        assert wanted <= {lk for case in mine if case.phase == "decode" for _, lk in case.requests}


def features_of_table(case: Listed) -> dict[str, Any]:
    """What capability.FEATURES finds in the call, read off the table instead; `test_features` compares the two."""
    options = dict(case.options)
    found: dict[str, Any] = {
        "format": case.format,
        "topk": None if isinstance(case, ScoresCase) else case.topk,
        "ragged": len(case.requests) > 1 or None,
        "out": options.get("out"),
    }
    if not isinstance(case, SelectCase):
        found |= {"heads": case.heads, "flat": case.page_size is None or None, "page_size": case.page_size}
    if not isinstance(case, AttendCase):
        found |= {
            "unsorted": options.get("sorted") is False or None,
            "key_range": case.ranges or None,
            "non_causal": not case.causal or None,
        }
    if isinstance(case, (IndexCase, ScoresCase)):
        found |= {"unpacked": case.k_layout is None or None, "k_layout": case.k_layout}
    if isinstance(case, IndexCase):
        found |= {"head_dim": case.head_dim, "return_scores": options.get("return_scores")}
    if isinstance(case, AttendCase):
        found |= {
            "dims": "/".join(map(str, case.dims)),
            "return_lse": options.get("return_lse"),
            "attn_sink": case.sink or None,
            "topk_length": case.topk_length or None,
            "repeated_indices": case.repeated or None,
        }
    return {name: value for name, value in found.items() if value is not None}


CLAIMS = sorted({(case.operator, case.format, case.phase) for case in LISTED.values()})


def untried(operator: str, format: str, phase: str, offered: Mapping[str, tuple[Any, ...]]) -> list[str]:
    """The required features that no case of the claim tries on a backend that offers these values of them alone."""
    mine = [
        features
        for case in LISTED.values()
        if (case.operator, case.format, case.phase) == (operator, format, phase)
        and all((features := features_of_table(case)).get(name) in (None, *values) for name, values in offered.items())
    ]
    return [name for name, values in offered.items() if values and not any(name in features for features in mine)]


def tried_at_all(operator: str, format: str, phase: str, name: str) -> tuple[Any, ...]:
    """The values of a feature that a claim can do with, or of one that stands in, as far as the format has them at all."""
    feature = next(feature for feature in FEATURES[operator] if feature.name == name)
    mine = [features_of_table(c) for c in LISTED.values() if (c.operator, c.format, c.phase) == (operator, format, phase)]
    values = feature.required or {features[name] for features in mine if name in features}
    # A packed cache has one width, and only some formats have caches at all.
    return tuple(value for value in values if any(features.get(name) == value for features in mine))


def alternatives(operator: str, format: str, phase: str) -> Iterator[dict[str, tuple[Any, ...]]]:
    """Every way to offer one value of each required feature, or of the one in its place."""
    sets: list[list[tuple[str, Any]]] = []
    for feature in FEATURES[operator]:
        if feature.required and feature.instead not in {name for options in sets for name, _ in options}:
            names = [feature.name, *([feature.instead] if feature.instead else [])]
            sets.append([(name, value) for name in names for value in tried_at_all(operator, format, phase, name)])
    paired = {feature.name for feature in FEATURES[operator] if feature.instead} | {f.instead for f in FEATURES[operator]}
    for choice in product(*sets):
        if ("k_layout", "idx_fp8_132_planar") in choice and ("flat", True) in choice:
            continue  # It is planar within each page.
        yield dict.fromkeys(paired - {""}, ()) | {name: (value,) for name, value in choice}


@pytest.mark.parametrize(
    ("operator", "format", "phase"),
    CLAIMS,
)
def test_every_required_value_is_tried_in_every_claim(operator: str, format: str, phase: str) -> None:
    for name in [feature.name for feature in FEATURES[operator] if feature.required]:
        accepted = tried_at_all(operator, format, phase, name)
        assert accepted, name
        for value in accepted:
            assert not untried(operator, format, phase, {name: (value,)}), f"{name} = {value}"


@pytest.mark.parametrize(("operator", "format", "phase"), CLAIMS)
def test_one_value_of_each_required_feature_is_enough_for_every_claim(operator: str, format: str, phase: str) -> None:
    lacking = {
        str(offered): found
        for offered in alternatives(operator, format, phase)
        if (found := untried(operator, format, phase, offered))
    }
    assert not lacking


@pytest.mark.parametrize("operator", FEATURES)
def test_every_feature_is_tried_by_some_case(operator: str) -> None:
    tried = {name for case in LISTED.values() if case.operator == operator for name in features_of_table(case)}
    assert tried == {feature.name for feature in FEATURES[operator]}


# --- built cases: each is built once, and all checks that need its arrays run on it ---

# In CI the smoke list and one case of every other format; the rest by hand.
SAMPLE = set(LISTS["smoke"]) | {next(c.id for c in SINGLE.values() if c.format == f) for _, f, _ in CLAIMS}


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[] if n in SAMPLE else pytest.mark.slow) for n in SINGLE])
def built(request: pytest.FixtureRequest) -> tuple[Single, Call]:
    case = SINGLE[request.param]
    return case, case.build()


def test_hash_is_the_frozen_one(built: tuple[Single, Call]) -> None:
    case, call = built
    for level, names in LISTS.items():
        assert case.id not in names or lists.load(level).cases[case.id] == call.sha256()


def test_features(built: tuple[Single, Call]) -> None:
    case, call = built
    request = call.request
    assert (request.operator, request.format, request.batch.phase) == (case.operator, case.format, case.phase)
    assert claims.features_of(case, call) == features_of_table(case)


def test_index_cases_have_selective_rows(built: tuple[Single, Call]) -> None:
    case, call = built
    if isinstance(case, IndexCase):
        assert any(end - start > case.topk for _, _, start, end in oracle.rows(call))


def stored_parts(call: Call) -> list[Array]:
    """The parts of the keys' memory as numbers, `[slots, ...]` each: keys alone, keys and scale, or a cache unpacked."""
    main, layout = ("k", "k_layout") if "k" in call.arrays else ("kv", "kv_layout")
    parts = unpack(call.options[layout], call.arrays[main]) if call.options[layout] else (call.arrays[main],)
    extra = (call.arrays["k_scale"],) if "k_scale" in call.arrays else ()
    trailing = 2 if call.batch_options["page_size"] else 1
    arrays = [np.asarray(part) for part in (*parts, *extra) if part is not None]
    return [a.reshape(int(np.prod(a.shape[:trailing])), -1).astype(np.float32) for a in arrays]


def read_places(case: Single, call: Call) -> tuple[set[int], set[int]]:
    """(slots that some row may read, slots of the shared prefix, which hold numbers whether read or not)."""
    slots: list[list[int]] = []
    size = case.page_size or 1
    for r, length in enumerate(call.batch["seqlens_k"].tolist()):
        if case.page_size:
            pages = call.batch["block_table"][r].tolist()
            slots.append([pages[p // size] * size + p % size for p in range(length)])
        else:
            slots.append([int(call.batch["cu_seqlens_k"][r]) + p for p in range(length)])
    prefix = {place for row in slots for place in row[: case.shared_pages * size]} if case.page_size else set()
    if isinstance(case, IndexCase) and case.ranges:
        return {slots[request][p] for _, request, start, end in oracle.rows(call) for p in range(start, end)}, prefix
    if isinstance(case, IndexCase):
        return {place for row in slots for place in row}, prefix
    read = set()
    lengths = call.arrays.get("topk_length", np.full(len(call.arrays["q"]), case.topk))
    ends = call.batch["cu_seqlens_q"].tolist()
    for r, (begin, end) in enumerate(pairwise(ends)):
        for row in range(begin, end):
            counted = call.arrays["indices"][row, : lengths[row]].tolist()
            read |= {slots[r][index] for index in counted if 0 <= index < len(slots[r])}
    return read, prefix


def test_unread_places_hold_nan_and_read_ones_numbers(built: tuple[Single, Call]) -> None:
    case, call = built
    parts, (read, prefix) = stored_parts(call), read_places(case, call)
    unread = np.ones(len(parts[0]), bool)
    unread[list(read | prefix)] = False
    assert unread.any() or not {"poison", "paging"} & set(case.hazards)
    nan_where_unread = [bool(np.isnan(part[unread]).all()) for part in parts]
    # int8 has no NaN: its largest number stands there, under a scale that is NaN.
    for part, poisoned in zip(parts, nan_where_unread, strict=True):
        assert poisoned or (part[unread] == 127).all()
    assert any(nan_where_unread)
    not_finite = sum(int((~np.isfinite(part[list(read)])).sum()) for part in parts)
    visible = (case.visible_nan, case.visible_inf) if isinstance(case, IndexCase) else (False, False)
    assert not_finite > 1 if visible[1] else not_finite == visible[0]


def test_a_number_in_an_unread_place_is_seen() -> None:
    case = SINGLE["index-e4m3-f32-f32-decode-paged64"]
    call = case.build()
    for name in ("k", "k_scale"):
        without = np.nan_to_num(call.arrays[name].astype(np.float32), nan=1.0).astype(call.arrays[name].dtype)
        with pytest.raises(AssertionError):
            test_unread_places_hold_nan_and_read_ones_numbers((case, replace(call, arrays={**call.arrays, name: without})))


def test_exact_index_cases_are_exact_in_every_order(built: tuple[Single, Call]) -> None:
    case, call = built
    if not isinstance(case, IndexCase) or not case.exact:
        return
    weights = call.arrays["weights"].astype(np.float64)
    q = abs(call.arrays["q"].astype(np.float64))
    for row, request, start, end in oracle.rows(call):
        keys, scale = oracle.index_keys(call, request, np.arange(start, end))
        halves = 2 if case.content == "lattice" else 1  # keys without a scale carry it themselves
        dots = halves * q[row] @ abs(keys).T
        assert np.array_equal(dots, np.rint(dots))
        assert dots.max(initial=0) <= 2048, "a dot product leaves the integers of float16"
        units = 2.0**13 * abs(weights[row])
        assert np.array_equal(units, np.rint(units))
        least = np.gcd.reduce(units.astype(np.int64))
        assert (units / least @ dots).max(initial=0) < 2**24, "a head sum leaves the integers of float32"
        assert set(np.frexp(scale)[0]) <= {0.0, 0.5}


def test_exact_weights_survive_their_dtype(built: tuple[Single, Call]) -> None:
    case, call = built
    if not isinstance(case, IndexCase):
        return
    weights = call.arrays["weights"].astype(np.float64)
    operand, dtype, _ = case.format.split("/")
    if case.content == "lattice":
        assert set(abs(weights).ravel()) <= {0.25, 0.5, 1.0, 2.0}
    elif case.content == "cancel":
        differences = (weights[:, 0::2] + weights[:, 1::2]) * 2.0 ** CANCEL_BITS[dtype]
        assert set(differences.ravel()) == {1, 2, 3}
        assert np.array_equal(call.arrays["q"][:, 0::2], call.arrays["q"][:, 1::2])
    elif case.content == "plateau":
        assert set(abs(weights * 2.0**10).ravel()) <= set(range(511))
    elif dtype == "f32" and not case.visible_nan:
        integers = weights / WEIGHT_SCALE[operand]
        assert np.array_equal(integers, np.rint(integers))
        assert (weights.astype(NUMPY_DTYPES["float16"]) != weights).any()


def test_onehot_and_mean_are_exact(built: tuple[Single, Call]) -> None:
    case, call = built
    if not isinstance(case, AttendCase) or not case.exact:
        return
    for row, request, _, _ in oracle.rows(call):
        kv, positions = oracle.attention_row(call, row, request)
        assert np.array_equal(kv[:, :512], np.rint(kv[:, :512]))
        assert abs(kv[:, :512]).max() <= 2
        logits = call.options["softmax_scale"] * call.arrays["q"][row].astype(np.float64) @ kv.T
        if case.logits == "mean":
            assert not logits.any()
            assert len(positions) & (len(positions) - 1) == 0
        elif len(positions) > 1:
            best = np.sort(logits, axis=1)[:, -2:]
            assert (best[:, 1] - best[:, 0] > 105).all(), "exp of the difference is no zero in float32"


# --- hazards: what each name promises is in the arrays ---

Shown: TypeAlias = Callable[[Any, Call], bool]


def visible(call: Call) -> list[int]:
    """Keys that each row of a request sees; in sparse_attend, names validly."""
    if call.operator != "sparse_attend":
        return [end - start for _, _, start, end in oracle.rows(call)]
    return [len(oracle.attention_row(call, row, request)[1]) for row, request, _, _ in oracle.rows(call)]


def scored(call: Call) -> Iterator[tuple[int, int, Array]]:
    """(row, start, scores of the positions it sees) of every row that sees more than topk keys, or any if none is selected."""
    spans = {row: (start, end) for row, _, start, end in oracle.rows(call)}
    if "scores" in call.arrays:
        yield from ((t, a, call.arrays["scores"][t, a:z]) for t, (a, z) in spans.items() if z - a > call.options["topk"])
        return
    for block, low, scores in oracle.index_scores(call):
        for i, row in enumerate(range(block.start, block.stop)):
            start, end = spans[row]
            if end - start > call.options.get("topk", 0):
                yield row, start, scores[i, start - low : end - low]


def logits(call: Call) -> Iterator[Array]:
    """[Hq, n] of every row with 64 keys or more."""
    for row, request, _, _ in oracle.rows(call):
        kv, positions = oracle.attention_row(call, row, request)
        if len(positions) >= 64:
            yield call.options["softmax_scale"] * call.arrays["q"][row].astype(np.float64) @ kv.T


def boundary_shows(call: Call) -> bool:
    """Mostly the last key that a row sees is kept, and the first one that it does not see would be."""
    not_causal = replace(call, batch_options={**call.batch_options, "causal": False})
    everything = {row: scores for row, _, scores in scored(not_causal)}
    kept, would_be = [], []
    for row, _, scores in scored(call):
        end, threshold = len(scores), np.sort(scores)[-call.options["topk"]]
        if end < len(everything[row]):
            kept.append(scores[end - 1] > threshold)
            would_be.append(everything[row][end] > threshold)
    return bool(sum(kept) > 0 and sum(kept) + sum(would_be) >= (1.6 if len(kept) > 1 else 1) * len(kept))


def interior_invalid(call: Call) -> set[int]:
    """The invalid entries that stand before a valid one, of rows of requests; seqlens_k and beyond as 0."""
    found: set[int] = set()
    for row, request, _, _ in oracle.rows(call):
        entries, length = call.arrays["indices"][row].astype(np.int64), int(call.batch["seqlens_k"][request])
        valid = np.flatnonzero((entries >= 0) & (entries < length))
        before = entries[: valid[-1]] if len(valid) else entries[:0]
        found |= set(before[before < 0].tolist())
        found |= {2**31 - 1} & set(before.tolist())
        found |= {0} if (before == length).any() else set()
    return found


def table_is_shuffled(case: Single, call: Call) -> bool:
    """The pages of the request with the most are not in the order of their numbers."""
    assert case.page_size is not None
    request = int(call.batch["seqlens_k"].argmax())
    used = -(-int(call.batch["seqlens_k"][request]) // case.page_size)
    return bool((np.diff(call.batch["block_table"][request, :used]) < 0).any())


def past_length(call: Call) -> bool:
    """Entries past topk_length name keys of the request that hold NaN."""
    for row, request, _, _ in oracle.rows(call):
        tail = call.arrays["indices"][row, call.arrays["topk_length"][row] :].astype(np.int64)
        real = tail[(tail >= 0) & (tail < int(call.batch["seqlens_k"][request]))]
        kv = call.arrays["kv"].astype(np.float32)[oracle.slots(call, request, real)]
        if np.isnan(kv).any():
            return True
    return False


def widest_bucket(call: Call) -> int:
    """Scores that share the threshold's leading 8 bits in float16, the first digit of many radix selections."""

    def digit(scores: Array) -> Array:
        return np.asarray(scores.astype(np.float16).view(np.uint16) >> 8)

    return max(int((digit(s) == digit(np.sort(s)[-call.options["topk"], None])).sum()) for _, _, s in scored(call))


def nan_rows(call: Call) -> tuple[int, int]:
    """(selective rows that a NaN spoils, selective rows that none touches)."""
    with np.errstate(invalid="ignore"):
        spoilt = [bool(np.isnan(scores).any()) for _, _, scores in scored(call)]
    return sum(spoilt), len(spoilt) - sum(spoilt)


SPREAD = {"flat": (0.05, 0.2), "peaked": (2, 9), "hot": (12, 40)}
SHOWS: Mapping[str, Shown] = {
    "selection": lambda case, call: max(visible(call)) > case.topk,
    "causal-offset": lambda case, call: boundary_shows(call),
    "short-row": lambda case, call: min(visible(call)) < case.topk,
    "ragged": lambda case, call: len({lk for _, lk in case.requests}) > 1,
    "padding-rows": lambda case, call: call.request.dims["Tq"] > call.batch["cu_seqlens_q"][-1],
    "paging": lambda case, call: table_is_shuffled(case, call),
    "poison": lambda case, call: any(np.isnan(part).any() for part in stored_parts(call)),
    "long-context": lambda case, call: max(lk for _, lk in case.requests) >= 16385,
    "clustered-scores": lambda case, call: widest_bucket(call) > 4096,
    "scale": lambda case, call: case.format.endswith("/-") or len(np.unique(call.arrays["k_scale"])) > 3,
    "weights-precision": lambda case, call: changed_by(call.arrays["weights"], "bfloat16"),
    "head-sum-precision": lambda case, call: case.content == "cancel",
    "ties": lambda case, call: any((s == np.sort(s)[-case.topk]).sum() > 1 for _, _, s in scored(call)),
    "returned-scores": lambda case, call: call.options.get("return_scores") is True,
    "key-range": lambda case, call: ranges_are_awkward(call),
    "not-causal": lambda case, call: visible(call) == [lk for lq, lk in case.requests for _ in range(lq)],
    "visible-nan": lambda case, call: min(nan_rows(call)) > 0,
    "layout": lambda case, call: (call.options.get("k_layout") or call.options.get("kv_layout")) is not None,
    "order": lambda case, call: call.options.get("sorted") is False,
    "out": lambda case, call: call.options.get("out") is True,
    "geometry": lambda case, call: has_other_geometry(case),
    "invalid-indices": lambda case, call: {-1, 2**31 - 1, 0, *INVALID} <= interior_invalid(call),
    "repeated-indices": lambda case, call: any(len(set(p)) < len(p) for p in named(call)),
    "lse": lambda case, call: call.options.get("return_lse") is True,
    "sink": lambda case, call: {-np.inf, 0.0, np.inf} <= set(call.arrays["attn_sink"].tolist()),
    "topk-length": lambda case, call: {0, 1, case.topk} <= set(call.arrays["topk_length"].tolist()) and past_length(call),
    "logits": lambda case, call: all(SPREAD[case.logits][0] < x.std() < SPREAD[case.logits][1] for x in logits(call)),
    "softmax-scale": lambda case, call: abs(call.options["softmax_scale"] * case.dims[0] ** 0.5 - 1) > 0.5,
    "rope-part": lambda case, call: bool(call.arrays["q"][:, :, case.dims[1] :].astype(np.float32).any(axis=2).all()),
    "exactness": lambda case, call: case.exact,
    "range": lambda case, call: all(len(np.unique(call.arrays[name].view(np.uint8))) >= 254 for name in ("q", "k")),
}


def changed_by(array: Array, dtype: str) -> bool:
    """Some values are not those of the dtype."""
    return bool((array.astype(np.float32) != array.astype(np.float32).astype(NUMPY_DTYPES[dtype]).astype(np.float32)).any())


def named(call: Call) -> list[list[int]]:
    """The positions that count in each row."""
    return [oracle.attention_row(call, row, request)[1].tolist() for row, request, _, _ in oracle.rows(call)]


def has_other_geometry(case: Listed) -> bool:
    """Some size is not DeepSeek-V3.2's, or pages are not of 64."""
    usual = {feature.name: feature.required[:1] for feature in FEATURES[case.operator]}
    sizes = ("heads", "head_dim", "dims", "topk", "page_size")
    return any(name in sizes and value not in usual[name] for name, value in features_of_table(case).items())


def ranges_are_awkward(call: Call) -> bool:
    """Some end past their request, some are empty; in prefill some cross causality, begin before 0 or are reversed."""
    start, end, batch = call.batch["key_start"], call.batch["key_end"], dict(call.batch)
    del batch["key_start"], batch["key_end"]
    causal = {row: last for row, _, _, last in oracle.rows(replace(call, batch=batch))}
    beyond = [end[row] > call.batch["seqlens_k"][request] for row, request, _, _ in oracle.rows(call)]
    crossed = [last > causal[row] for row, _, _, last in oracle.rows(call)]
    if call.request.batch.phase == "decode":
        return any(beyond) and bool((start == end).any())
    return any(beyond) and any(crossed) and bool((start < 0).any() and (start == end).any() and (start > end).any())


def test_every_hazard_of_a_single_call_has_a_check() -> None:
    assert set(SHOWS) == {hazard for case in SINGLE.values() for hazard in case.hazards}


def test_hazards_are_in_the_arrays(built: tuple[Single, Call]) -> None:
    case, call = built
    for hazard in case.hazards:
        assert SHOWS[hazard](case, call), f"{case.id} names {hazard}, but does not have it"


def test_a_hazard_that_is_not_there_is_seen() -> None:
    base = SINGLE["index-e4m3-f32-f32-decode-lengths"]
    assert isinstance(base, IndexCase)
    tame = replace(base, requests=((2, 40),), topk=64, padding_rows=0, gap=0)
    call = tame.build()
    for hazard in ("selection", "padding-rows", "ragged", "poison", "long-context", "ties", "geometry", "exactness"):
        assert SHOWS[hazard](tame, call) == (hazard == "geometry")  # topk 64


# --- frozen lists ---

ROOT = Path(__file__).resolve().parents[1]
RELEASED = {
    "smoke-2026.11": "573041e131f74fd8c59ec75f67466823a2fd129b6a78f70e1a31d406b940fb62",
    "smoke-2026.12": "f3b39bb763ebaca1112aeb25e118fd248ff1679a562031d261053fccadad7833",
    "core-2026.11": "0692566a5478cece3c48673984a41ca3e1946879f51c6a3796a4c032b8ddf1e8",
    "core-2026.12": "e4e6190bc7f4e66cf767fa77605986c6a8c3fa351725245ee1df2a0069b78870",
    "deterministic-2026.11": "0bf6330c49780641b79375bf7b63adf11c090bc95d02d97af5f5ada3b9c6cc9b",
    "deterministic-2026.12": "d5e91a23f99db89531a141e80bce592bb5b9e25ee178b80895be812ea910d915",
    "full-2026.11": "9929bf2107f0d9b42452225c20e75d9cde9e0d467ab0a40cf8fedae0204b8436",
    "full-2026.12": "09e9eb466a64ac6a7149a807e3419cad8ac3e4270fe5cae692e18458d2af2da6",
    "parts-2026.12": "b6c1d96148640b83e168fffec73d1a063023b2b2375df21ac0a060cfff6b4e01",
}


def test_every_released_list_is_there_as_it_was_released() -> None:
    assert {name: lists.load(name).sha256 for name in lists.released()} == RELEASED


@pytest.mark.parametrize(
    "name", ["smoke-2026.11", *(pytest.param(n, marks=pytest.mark.slow) for n in RELEASED if "smoke" not in n)]
)
def test_a_released_case_is_never_edited(name: str) -> None:
    frozen = lists.load(name)
    for id, sha256 in frozen.cases.items():
        assert lists.inputs_sha256(id) == sha256, f"{id} is on {name}: leave it as it was, and give what is new another id"


@pytest.mark.parametrize("family", LISTS)
def test_a_family_is_its_newest_list_and_that_is_the_catalogue(family: str) -> None:
    """A case is frozen once: wherever it is listed it has the same inputs."""
    every = {id: sha256 for name in lists.released() for id, sha256 in lists.load(name).cases.items()}
    frozen = lists.load(family)
    assert frozen.family == family
    assert frozen.name == [name for name in lists.released() if name.startswith(f"{family}-")][-1]
    assert tuple(frozen.cases) == LISTS[family], "freeze a new list"
    assert dict(frozen.cases) == {id: every[id] for id in LISTS[family]}


def test_a_new_list_leaves_the_old_one_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was released can be run for ever: under another judging version and beside a newer list."""
    frozen = tmp_path / "frozen"
    shutil.copytree(ROOT / "conformance" / "frozen", frozen)
    monkeypatch.setattr(lists, "files", lambda package: tmp_path)
    monkeypatch.setattr(lists, "LISTS", {**LISTS, "smoke": LISTS["smoke"][:2]})
    with pytest.raises(lists.ListError, match=r"^'smoke-2026.11' was passed, but a name of .* with a new date is accep"):
        lists.freeze("smoke-2026.11")
    stored = lists.freeze("smoke-2027.01")
    (frozen / "smoke-2027.01.json").write_text(json.dumps(stored), encoding="utf-8")
    monkeypatch.setattr(lists, "JUDGING_VERSION", "3")
    newer, older = lists.load("smoke"), lists.load("smoke-2026.11")
    assert (newer.name, tuple(newer.cases), newer.judging) == ("smoke-2027.01", LISTS["smoke"][:2], "2")
    assert (older.sha256, older.judging, len(older.cases)) == (RELEASED["smoke-2026.11"], "1", 44)
    assert lists.freeze("smoke-2027.02")["sha256"] != lists.freeze("smoke-2027.03")["sha256"]
    stored["judging"] = "3"
    (frozen / "smoke-2027.01.json").write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(lists.ListError, match=r"^frozen/smoke-2027.01.json is not the list that was released"):
        lists.load("smoke")


def test_the_judging_version_is_that_of_its_page() -> None:
    page = (ROOT / "docs" / "judging.md").read_text(encoding="utf-8")
    assert f"\nVersion {lists.JUDGING_VERSION}. " in page


def test_smoke_grants_no_level() -> None:
    assert set(LISTS) - set(lists.GRANTING) == {"smoke"}


def reordered(stored: dict[str, Any]) -> None:
    stored["cases"].reverse()


def shortened(stored: dict[str, Any]) -> None:
    stored["cases"].pop()


def rehashed(stored: dict[str, Any]) -> None:
    stored["cases"][0]["inputs_sha256"] = "0" * 64


def renamed(stored: dict[str, Any]) -> None:
    stored["name"] = "core-2026.11"


def stripped(stored: dict[str, Any]) -> None:
    del stored["sha256"]


@pytest.mark.parametrize("tamper", [reordered, shortened, rehashed, renamed, stripped])
def test_a_tampered_lock_file_is_refused(
    tamper: Callable[[dict[str, Any]], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = json.loads((ROOT / "conformance" / "frozen" / "smoke-2026.11.json").read_text(encoding="utf-8"))
    (tmp_path / "frozen").mkdir()
    copy = tmp_path / "frozen" / "smoke-2026.11.json"
    monkeypatch.setattr(lists, "files", lambda package: tmp_path)
    copy.write_text(json.dumps(stored), encoding="utf-8")
    assert lists.load("smoke").sha256 == stored["sha256"]
    tamper(stored)
    copy.write_text(json.dumps(stored), encoding="utf-8")
    with pytest.raises(lists.ListError, match=r"^frozen/smoke-2026.11.json is not the list that was released; reinstall"):
        lists.load("smoke")


def test_a_cut_off_lock_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "frozen").mkdir()
    (tmp_path / "frozen" / "smoke-2026.11.json").write_text('{"name": "smoke-2026.11", "cases": [', encoding="utf-8")
    monkeypatch.setattr(lists, "files", lambda package: tmp_path)
    with pytest.raises(lists.ListError, match="is not the list that was released"):
        lists.load("smoke")


@pytest.mark.parametrize("level", ["", "Core", "fuller", "../frozen/core-2026.11", "core-2026"])
def test_an_unknown_level_is_refused_with_the_known_ones(level: str) -> None:
    with pytest.raises(lists.ListError, match=f"^list {level!r} was never released, but {', '.join(RELEASED)} were; name"):
        lists.load(level)


def test_patterns_name_the_cases_that_they_match_and_none_names_all() -> None:
    smoke = lists.load("smoke")
    decode = {id for id in smoke.cases if id.startswith("index-") and "-decode-" in id}
    assert 1 < len(decode) < len(smoke.cases)
    assert smoke.matching(["index-*-decode-*"]) == decode
    one = "attend-bf16-decode-flat"
    assert smoke.matching(["index-*-decode-*", one, one]) == decode | {one}
    assert smoke.matching([]) == set(smoke.cases)
    with pytest.raises(
        lists.ListError, match=r"^pattern 'attend-\[xyz\]\*' matches no case of the list smoke-\S+; see its ids"
    ):
        smoke.matching(["index-*", "attend-[xyz]*"])


def test_an_unknown_case_is_refused_before_anything_runs(tmp_path: Path) -> None:
    out = tmp_path / "report"
    with pytest.raises(lists.ListError, match=r"^case 'nope' is not on the list smoke-\S+; see its ids with --list-cases.$"):
        run_list(list="smoke", cases=["nope"], out=out)
    assert not out.exists()
