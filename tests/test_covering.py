"""The covering table: every two values that can stand together meet in a case, and every value is really in the arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations, pairwise
from typing import TypeAlias

import numpy as np
import pytest

from dsa_portable.conformance import lists
from dsa_portable.conformance.cases import products
from dsa_portable.conformance.cases.axes import AXES, FORMATS, MOST_OPTIONAL, at_base, met, optional, possible
from dsa_portable.conformance.cases.call import Call, sha256_of
from dsa_portable.conformance.cases.covering import PAIRED, completed, fitting
from dsa_portable.conformance.cases.products import CORE, FULL, Product
from dsa_portable.conformance.judging import oracle
from dsa_portable.conformance.report import claims
from dsa_portable.operators import FEATURES

Key: TypeAlias = tuple[str, str, str]
Row: TypeAlias = dict[str, str]

KEYS = [(operator, format, phase) for operator, formats in FORMATS.items() for format in formats for phase in products.ROWS]
PAIRS = [key for key in KEYS if key[1] in PAIRED]


def points(cases: tuple[Product, ...], key: Key) -> list[Row]:
    return [dict(case.point) for case in cases if (case.operator, case.format, case.phase) == key]


def lacking(key: Key, rows: list[Row], strength: int, fits: Callable[[Row], bool]) -> list[Row]:
    """Values, or every two, that no row tries although one could."""
    operator, _, phase = key
    have = {one for row in rows for one in met(operator, row, strength)}
    every = [(axis.name, value) for axis in AXES[operator] for value in axis.values]
    goals = [dict(chosen) for chosen in combinations(every, strength) if frozenset(chosen) not in have]
    alone = [goal for goal in goals if len(goal) == strength]
    return [
        g
        for g in alone
        if (row := completed(operator, phase, g, fits)) and frozenset(g.items()) in met(operator, row, strength)
    ]


def possibly(key: Key, core: bool, base: bool = False) -> Callable[[Row], bool]:
    operator, _, phase = key
    fits = fitting(*key, core)
    return lambda row: fits(row) and (not base or at_base(operator, phase, row))


@pytest.mark.parametrize("key", PAIRS)
def test_every_two_values_that_can_stand_together_meet(key: Key) -> None:
    core = points(CORE, key)
    assert not lacking(key, core, 2, possibly(key, True))
    assert not lacking(key, core + points(FULL, key), 2, possibly(key, False))


@pytest.mark.parametrize("key", PAIRS)
def test_those_of_one_geometry_meet_there(key: Key) -> None:
    """A backend that offers one alternative of each required feature, the usual one, loses no pair of the others."""
    rows = [row for row in points(CORE, key) if at_base(key[0], key[2], row)]
    assert not lacking(key, rows, 2, possibly(key, True, base=True))


@pytest.mark.parametrize("key", KEYS)
def test_every_value_is_met_in_every_claim(key: Key) -> None:
    assert not lacking(key, points(CORE, key), 1, possibly(key, True))
    assert not lacking(key, points(CORE + FULL, key), 1, possibly(key, False))


def test_a_row_that_is_missing_is_noticed() -> None:
    key = PAIRS[0]
    rows = points(CORE, key)
    assert any(lacking(key, [row for row in rows if row is not left_out], 2, possibly(key, True)) for left_out in rows[:3])


@pytest.mark.parametrize("operator", AXES)
def test_a_value_that_is_not_declared_takes_no_others_with_it(operator: str) -> None:
    point = {axis.name: axis.usual("decode") for axis in AXES[operator]}
    several = point | {"out": "given", "topk": "1"}
    assert {name for pair in met(operator, several, 2) for name, _ in pair} == {"out", "topk"}
    assert all(("out", "given") in pair for pair in met(operator, point | {"out": "given"}, 2))
    assert not met(operator, several, 1)
    assert len(met(operator, point, 2)) == len(point) * (len(point) - 1) // 2


@pytest.mark.parametrize("key", KEYS)
def test_a_row_can_stand_and_declines_little(key: Key) -> None:
    for rows, core in ((points(CORE, key), True), (points(FULL, key), False)):
        for row in rows:
            assert possible(key[0], key[2], {**row, "format": key[1]}), row
            assert len(optional(key[0], row)) <= MOST_OPTIONAL, row
            assert products.fits_core(key[0], key[2], row) == core, row


@pytest.mark.parametrize("operator", AXES)
def test_offered_axes_are_features_and_the_others_are_not(operator: str) -> None:
    known = {feature.name: feature for feature in FEATURES[operator]}
    named = {name for axis in AXES[operator] for name in axis.features}
    assert named == set(known) - {"format", "ragged"}  # the one is a claim of its own, the other follows from requests


# --- what a value says is in the arrays ---


def lengths(call: Call) -> tuple[list[int], list[int]]:
    """Rows and keys of each request."""
    return [end - start for start, end in pairwise(call.batch["cu_seqlens_q"].tolist())], call.batch["seqlens_k"].tolist()


def padding(call: Call) -> dict[str, np.ndarray]:
    """The padding rows of every argument of a row."""
    first = int(call.batch["cu_seqlens_q"][-1])
    rows = {name: call.arrays[name] for name in ("q", "weights", "indices", "topk_length") if name in call.arrays}
    return {
        name: array[first:] for name, array in (rows | {n: call.batch[n] for n in ("key_start",) if n in call.batch}).items()
    }


def no_number(array: np.ndarray) -> bool:
    """NaN, the largest int8, or an index or length outside everything."""
    return bool((array == 127).all() if array.dtype == np.int8 else np.isnan(array.astype(np.float32)).all())


def garbage(call: Call) -> bool:
    found = padding(call)
    floats = [array for name, array in found.items() if name in ("q", "weights")]
    whole = [array for name, array in found.items() if name not in ("q", "weights")]
    return all(map(no_number, floats)) and all((array.reshape(3, -1)[:, 0] != -1).all() for array in whole)


def held(call: Call, request: int) -> list[int]:
    size, lk = call.batch_options["page_size"], int(call.batch["seqlens_k"][request])
    return call.batch["block_table"][request, : -(-lk // size)].tolist()


def shares(call: Call) -> bool:
    tables = [set(held(call, r)) for r in range(len(call.batch["seqlens_k"]))]
    return any(one & other for one, other in combinations(tables, 2)) or not any(tables)


def laid(call: Call, how: Callable[[np.ndarray], bool]) -> bool:
    """Every array of some size, and of the batch, lies so and holds the same numbers."""
    on_host = call.on(lambda array: array).arrays
    same = all(np.ascontiguousarray(a).tobytes() == call.arrays[name].tobytes() for name, a in on_host.items())
    arrays = [*on_host.values(), *(a for a in call.make_batch().flatten()[0] if a is not None)]
    return same and all(how(array) for array in arrays if min(array.shape, default=0) > 1)


def spoilt_and_whole(call: Call) -> bool:
    """A NaN counts in some row, and some row of the case counts none, unless each request has one row."""
    with np.errstate(invalid="ignore"):
        if call.operator == "sparse_attend":
            rows = [bool(np.isnan(call.arrays["q"][row].astype(np.float32)).any()) for row, _, _, _ in oracle.rows(call)]
        else:
            rows = [bool(np.isnan(s).any()) for _, _, block in oracle.index_scores(call) for s in block]
    return any(rows) or max(lengths(call)[0]) < 2


SHOWS: Mapping[tuple[str, str], Callable[[Product, Call], bool]] = {
    ("requests", "none"): lambda case, call: len(call.batch["seqlens_k"]) == 0,
    ("requests", "one"): lambda case, call: len(call.batch["seqlens_k"]) == 1,
    ("requests", "many"): lambda case, call: len(call.batch["seqlens_k"]) > 64,
    ("rows", "none"): lambda case, call: not any(lengths(call)[0]),
    ("rows", "single"): lambda case, call: set(lengths(call)[0]) == {1},
    ("rows", "odd"): lambda case, call: lengths(call)[0][0] == 3,
    ("rows", "tiles"): lambda case, call: max(lengths(call)[0]) > 64,
    ("rows", "hundreds"): lambda case, call: max(lengths(call)[0]) > 256,
    ("rows", "over"): lambda case, call: any(lq > lk + 1 for lq, lk in zip(*lengths(call), strict=True)),
    ("keys", "short"): lambda case, call: max(lengths(call)[1]) < 2047,
    ("keys", "edge"): lambda case, call: {*lengths(call)[1][1:]} <= {2047, 2048, 2049},
    ("keys", "long"): lambda case, call: min(lengths(call)[1][1:], default=4097) > 2048,
    ("keys", "longest"): lambda case, call: 65537 in lengths(call)[1],
    ("keys", "empty"): lambda case, call: not any(lengths(call)[1]),
    ("sharing", "prefix"): lambda case, call: shares(call),
    ("maxima", "loose"): lambda case, call: call.make_batch().max_seqlen_k > max(lengths(call)[1], default=0),
    ("strides", "sliced"): lambda case, call: laid(call, lambda a: a.ndim == 1 or not a.flags.c_contiguous),
    ("strides", "transposed"): lambda case, call: laid(call, lambda a: a.strides[-1] != a.itemsize),
    ("padding", "clean"): lambda case, call: len(padding(call)["q"]) == 3 and not garbage(call),
    ("padding", "garbage"): lambda case, call: len(padding(call)["q"]) == 3 and garbage(call),
    ("poison", "neighbours"): lambda case, call: spoilt_and_whole(call),
    ("before", "nan"): lambda case, call: len([*case.steps()]) == 2,
    ("before", "other"): lambda case, call: same_shapes_and_other_contents(*case.steps()),
    ("visibility", "ranges"): lambda case, call: 2**31 - 1 in call.batch["key_end"] or len(call.batch["key_end"]) < 3,
    ("magnitude", "negative"): lambda case, call: (
        (call.arrays["weights"].astype(np.float32) < 0).any() or not any(lengths(call)[0])
    ),
    ("topk_length", "yes"): lambda case, call: call.arrays["topk_length"].min(initial=-1) < 0,
    ("lists", "packed"): lambda case, call: (
        not any(
            (np.diff(row.astype(np.int64) >= 0) & (row[1:] >= 0)).any()
            for row in call.arrays["indices"][: int(call.batch["cu_seqlens_q"][-1])]
        )
    ),
}


def same_shapes_and_other_contents(first: Call, second: Call) -> bool:
    assert first.prelude
    assert not second.prelude
    alike = {n: a.shape for n, a in first.arrays.items()} == {n: a.shape for n, a in second.arrays.items()}
    rows = lengths(second)
    turned = (rows[0][::-1], rows[1][::-1]) == lengths(first)
    return alike and turned and (first.sha256() != second.sha256() or not sum(map(sum, rows)))


# In CI a few rows of every claim; the rest by hand.
SAMPLE = {case.id for case in CORE[::31]}


@pytest.mark.parametrize("case", [pytest.param(c, id=c.id, marks=[] if c.id in SAMPLE else pytest.mark.slow) for c in CORE])
def test_values_are_in_the_arrays(case: Product) -> None:
    *before, call = case.steps()
    assert (call.operator, call.format, call.phase) == (case.operator, case.format, case.phase)
    assert len(before) == (dict(case.point)["before"] != "any")
    for value in case.point:
        assert value not in SHOWS or SHOWS[value](case, call), value
    used = claims.features_of(case, call)
    offered = {
        name for axis in AXES[case.operator] for name in axis.features if dict(case.point)[axis.name] != axis.usual(case.phase)
    }
    assert {name for name in offered if name in used} or not offered
    assert lists.load("core").cases[case.id] == sha256_of([c.sha256() for c in (*before, call)])
