"""Batch against plain Python loops over requests and rows; every refusal by its class and words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_portable import Batch, InvalidArgument
from dsa_portable.batch import ARRAYS

Int32: TypeAlias = npt.NDArray[np.int32]
HUGE = 2**31 - 1


def i32(*numbers: Any) -> Int32:
    return np.array(numbers, np.int32)


def table(*rows: list[int]) -> Int32:
    return np.array(rows, np.int32).reshape(len(rows), -1)


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """InvalidArgument in one sentence that has these words."""
    with pytest.raises(InvalidArgument) as caught:
        yield
    message = str(caught.value)
    assert message.startswith("Batch: ")
    assert message.endswith(".")
    assert not re.search(r"\w\. ", message)
    for word in words:
        assert word in message


# --- the truth, in loops ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plain:
    """A batch as Python lists; `pages[r]` are the pages of request r, None where keys are flat."""

    seqlens_q: list[int]
    seqlens_k: list[int]
    padding: int
    causal: bool = True
    ranges: list[tuple[int, int]] | None = None
    pages: list[list[int]] | None = None
    page_size: int = 1
    gaps: list[int] | None = None  # unused flat rows after each request

    @property
    def rows(self) -> int:
        return sum(self.seqlens_q) + self.padding

    def owners(self) -> list[int]:
        return [r for r, n in enumerate(self.seqlens_q) for _ in range(n)] + [-1] * self.padding

    def visible(self) -> list[list[int]]:
        """The positions that each row sees."""
        result = []
        for r, (n, keys) in enumerate(zip(self.seqlens_q, self.seqlens_k, strict=True)):
            for i in range(n):
                seen = [j for j in range(keys) if not self.causal or j <= keys - n + i]
                if self.ranges is not None:
                    start, end = self.ranges[sum(self.seqlens_q[:r]) + i]
                    seen = [j for j in range(keys) if start <= j < end]
                result.append(seen)
        return result + [[] for _ in range(self.padding)]

    def flat(self, r: int, position: int) -> int:
        gaps = self.gaps or [0] * len(self.seqlens_k)
        return sum(self.seqlens_k[:r]) + sum(gaps[:r]) + position

    def slot(self, r: int, position: int) -> int:
        assert self.pages is not None
        return self.pages[r][position // self.page_size] * self.page_size + position % self.page_size

    def batch(self) -> Batch:
        fields: dict[str, Any] = {"causal": self.causal}
        if self.ranges is not None:
            fields["key_start"] = i32(*[a for a, _ in self.ranges])
            fields["key_end"] = i32(*[b for _, b in self.ranges])
        if self.pages is not None:
            width = max([len(p) for p in self.pages], default=0) + 1
            # What lies past a request's length is never followed, so it is what a follower would choke on.
            rows = [p + [HUGE if len(p) % 2 else -7] * (width - len(p)) for p in self.pages]
            fields |= {"block_table": np.array(rows, np.int32).reshape(len(rows), width), "page_size": self.page_size}
        if self.gaps is not None:
            room = [n + g for n, g in zip(self.seqlens_k, self.gaps, strict=True)]
            fields["cu_seqlens_k"] = np.cumsum([0, *room]).astype(np.int32)
        return Batch.of(self.seqlens_q, self.seqlens_k, **fields)


@st.composite
def plain_batches(draw: st.DrawFn, paged: bool | None = None) -> Plain:
    requests = draw(st.integers(0, 4))
    many: dict[str, Any] = {"min_size": requests, "max_size": requests}
    seqlens_q = draw(st.lists(st.integers(0, 4), **many))
    seqlens_k = draw(st.lists(st.integers(0, 9), **many))
    padding = draw(st.integers(0, 2))
    ranges, pages, gaps, page_size = None, None, None, 1
    if draw(st.booleans()):
        edge = st.one_of(st.integers(-3, 11), st.sampled_from([-(2**31), HUGE]))
        rows = sum(seqlens_q) + padding
        ranges = draw(st.lists(st.tuples(edge, edge), min_size=rows, max_size=rows))
    if draw(st.booleans()) if paged is None else paged:
        page_size = draw(st.sampled_from([1, 2, 3, 8]))
        # 6 pages for everybody, so that requests share pages and hold one twice.
        pages = [draw(st.lists(st.integers(0, 5), min_size=-(-n // page_size), max_size=-(-n // page_size))) for n in seqlens_k]
    elif draw(st.booleans()):
        gaps = draw(st.lists(st.integers(0, 3), **many))
    return Plain(seqlens_q, seqlens_k, padding, draw(st.booleans()), ranges, pages, page_size, gaps)


def index_rows(plain: Plain) -> Int32:
    """Every position from -3 to 12 in every row, and the integers that implementations use as padding."""
    row = [*range(-3, 13), -(2**31), HUGE, HUGE - 1]
    return np.array([row] * plain.rows, np.int32).reshape(plain.rows, len(row))


@given(plain_batches())
@settings(deadline=None)
def test_rows_and_visibility(plain: Plain) -> None:
    batch = plain.batch()
    owners, (start, end) = batch.request_of_row(plain.rows), batch.key_range(plain.rows)
    assert owners.tolist() == plain.owners()
    assert [list(range(a, b)) for a, b in zip(start.tolist(), end.tolist(), strict=True)] == plain.visible()
    assert owners.dtype == start.dtype == end.dtype == np.int32
    lengths = [0 if r < 0 else plain.seqlens_k[r] for r in plain.owners()]
    assert all(0 <= a <= b <= n for a, b, n in zip(start.tolist(), end.tolist(), lengths, strict=True))
    padding = slice(sum(plain.seqlens_q), None)
    assert not start[padding].any()
    assert not end[padding].any()


@given(plain_batches())
@settings(deadline=None)
def test_integers(plain: Plain) -> None:
    batch = plain.batch()
    assert batch.num_requests == len(plain.seqlens_q)
    assert batch.max_seqlen_q == max(plain.seqlens_q, default=0)
    assert batch.max_seqlen_k == max(plain.seqlens_k, default=0)


def converted(plain: Plain, place: Callable[[int, int], int]) -> list[list[int]]:
    """Each index by `place(request, position)`, or -1 where it is no position of its row's request."""
    return [
        [place(r, j) if r >= 0 and 0 <= j < plain.seqlens_k[r] else -1 for j in row]
        for r, row in zip(plain.owners(), index_rows(plain).tolist(), strict=True)
    ]


@given(plain_batches(paged=False))
@settings(deadline=None)
def test_to_flat_and_back(plain: Plain) -> None:
    flat = plain.batch().to_flat(index_rows(plain))
    assert flat.tolist() == converted(plain, plain.flat)
    assert flat.dtype == np.int32
    assert plain.batch().from_flat(flat).tolist() == converted(plain, lambda r, j: j)


@given(plain_batches(paged=False))
@settings(deadline=None)
def test_from_flat_keeps_to_its_own_request(plain: Plain) -> None:
    found = plain.batch().from_flat(index_rows(plain))
    truth = [
        [next((j for j in range(plain.seqlens_k[r]) if plain.flat(r, j) == row), -1) if r >= 0 else -1 for row in rows]
        for r, rows in zip(plain.owners(), index_rows(plain).tolist(), strict=True)
    ]
    assert found.tolist() == truth
    assert found.dtype == np.int32


@given(plain_batches(paged=True))
@settings(deadline=None)
def test_to_slots_and_back(plain: Plain) -> None:
    slots = plain.batch().to_slots(index_rows(plain))
    assert slots.tolist() == converted(plain, plain.slot)
    assert slots.dtype == np.int32
    # A page that a request holds twice: the lower position.
    truth = converted(plain, lambda r, j: next(i for i in range(j + 1) if plain.slot(r, i) == plain.slot(r, j)))
    assert plain.batch().from_slots(slots).tolist() == truth


@given(plain_batches(paged=True), st.integers(0, 40))
@settings(deadline=None)
def test_from_slots_of_any_integer(plain: Plain, slot: int) -> None:
    slots = np.full((plain.rows, 2), slot, np.int32)
    slots[:, 1] = -(2**31)
    found = plain.batch().from_slots(slots)
    truth = [
        next((j for j in range(plain.seqlens_k[r]) if plain.slot(r, j) == slot), -1) if r >= 0 else -1 for r in plain.owners()
    ]
    assert found.tolist() == [[j, -1] for j in truth]
    assert found.dtype == np.int32


def test_the_loops_can_fail() -> None:
    """A Batch that is one position off is seen by the same comparison."""
    plain = Plain([2], [5], 0, pages=[[1, 0, 2]], page_size=2)
    wrong = Plain([2], [5], 0, pages=[[1, 0, 3]], page_size=2)
    assert plain.batch().key_range(2)[1].tolist() == [4, 5] != Plain([2], [6], 0).batch().key_range(2)[1].tolist()
    assert plain.batch().to_slots(index_rows(plain)).tolist() != converted(wrong, wrong.slot)
    assert plain.visible() == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]


# --- named edges -----------------------------------------------------------------------------------------------------------


def test_more_queries_than_keys() -> None:
    start, end = Batch.dense(5, 2).key_range(5)
    assert start.tolist() == [0, 0, 0, 0, 0]
    assert end.tolist() == [0, 0, 0, 1, 2]


def test_key_ranges_replace_causality_and_are_clamped() -> None:
    batch = Batch.of([4], [3], key_start=i32(-5, 2, 3, 9), key_end=i32(HUGE, 1, 3, 12))
    start, end = batch.key_range(4)
    assert [(a, b) for a, b in zip(start.tolist(), end.tolist(), strict=True)] == [(0, 3), (1, 1), (3, 3), (3, 3)]


def test_no_request_at_all() -> None:
    for batch in (Batch.of([], []), Batch.of([], [], block_table=np.zeros((0, 3), np.int32), page_size=4)):
        assert batch.request_of_row(2).tolist() == [-1, -1]
        assert [a.tolist() for a in batch.key_range(2)] == [[0, 0], [0, 0]]
        convert = batch.to_flat if batch.block_table is None else batch.to_slots
        assert convert(np.zeros((2, 1), np.int32)).tolist() == [[-1], [-1]]


def test_an_empty_block_table() -> None:
    batch = Batch.of([1, 1], [0, 0], block_table=np.zeros((2, 0), np.int32), page_size=4)
    assert batch.to_slots(np.zeros((2, 1), np.int32)).tolist() == [[-1], [-1]]
    assert batch.from_slots(np.zeros((2, 1), np.int32)).tolist() == [[-1], [-1]]


def test_from_slots_costs_no_memory_for_a_high_page() -> None:
    high = 2**31 // 4 - 1
    batch = Batch.of([1], [5], block_table=table([high, 0]), page_size=4)
    slots = batch.to_slots(i32([0, 3, 4, 5]))
    assert slots.tolist() == [[high * 4, HUGE, 0, -1]]
    assert batch.from_slots(slots).tolist() == [[0, 3, 4, -1]]


def test_with_pages_gives_the_other_cache_its_own_table() -> None:
    index = Batch.of([1], [5], block_table=table([3, 1]), page_size=4, causal=False)
    kv = index.with_pages(table([9, 8, 7]), 2)
    assert (kv.page_size, kv.causal, kv.max_seqlen_k) == (2, False, 5)
    assert kv.to_slots(i32([0, 4])).tolist() == [[18, 14]]
    assert index.to_slots(i32([0, 4])).tolist() == [[12, 4]]
    assert index.with_pages(table([0, 1])).page_size == 4
    assert Batch.of([1], [5]).with_pages(table([9, 8, 7]), 2).cu_seqlens_k is None
    with refused("page_size is 0", "int >= 1"):
        index.with_pages(table([0, 1]), 0)
    with refused("page_size is None", "pass both"):
        Batch.of([1], [5]).with_pages(table([0, 1]))


@pytest.mark.parametrize(("rows", "phase"), [(0, "decode"), (1, "decode"), (4, "decode"), (5, "prefill")])
def test_phase(rows: int, phase: str) -> None:
    assert Batch.of([1, rows], [9, 9]).phase == phase
    # The bound decides, not the rows.
    assert Batch.of([1], [9], max_seqlen_q=4).phase == "decode"
    assert Batch.of([1], [9], max_seqlen_q=5).phase == "prefill"


@given(plain_batches())
@settings(deadline=None)
def test_flatten_and_unflatten(plain: Plain) -> None:
    batch = plain.batch()
    arrays, integers = batch.flatten()
    again = Batch.unflatten(arrays, integers)
    assert all(getattr(again, name) is getattr(batch, name) for name in ARRAYS)
    for name in ("page_size", "max_seqlen_q", "max_seqlen_k", "causal"):
        assert getattr(again, name) == getattr(batch, name)
    assert all(type(n) is int for n in integers)


def test_numpy_integers_become_plain_ones() -> None:
    seqlens: Any = (np.array([1]), np.array([5], np.uint8))
    batch = Batch.of(*seqlens, block_table=table([0]), page_size=np.int64(8), max_seqlen_k=np.int32(6))
    assert type(batch.page_size) is type(batch.max_seqlen_k) is int
    assert (batch.page_size, batch.max_seqlen_k) == (8, 6)


def test_lengths_may_be_rewritten_in_place_within_the_maxima() -> None:
    batch = Batch.of([1, 1], [3, 5], cu_seqlens_k=i32(0, 8, 16), max_seqlen_k=8)
    batch.seqlens_k[:] = (8, 2)
    assert batch.key_range(2)[1].tolist() == [8, 2]
    batch.validate()
    batch.seqlens_k[0] = 9
    with refused("max_seqlen_k is 8", "a request has 9"):
        batch.validate()


def test_gaps_between_flat_requests() -> None:
    batch = Batch.of([1, 1], [2, 3], cu_seqlens_k=i32(0, 10, 20))
    assert batch.to_flat(table([0, 1], [0, 2])).tolist() == [[0, 1], [10, 12]]
    assert batch.from_flat(table([1, 2], [10, 1])).tolist() == [[1, -1], [0, -1]]


# --- refusals --------------------------------------------------------------------------------------------------------------

PAGED = {"block_table": table([0, 1]), "page_size": 4}
WRONG_FIELDS: list[tuple[Mapping[str, Any], tuple[str, ...]]] = [
    ({"cu_seqlens_q": [0, 2]}, ("cu_seqlens_q is list [0, 2]", "int32 of rank 1")),
    ({"cu_seqlens_q": None}, ("cu_seqlens_q is NoneType None", "int32 of rank 1")),
    ({"seqlens_k": np.array([5])}, ("seqlens_k is int64 [1] on cpu", "int32 of rank 1")),
    ({"seqlens_k": i32([5])}, ("seqlens_k is int32 [1, 1]", "rank 1")),
    ({"cu_seqlens_q": i32(0, 1, 2)}, ("cu_seqlens_q has 3 entries for 1 requests", "leading 0")),
    ({"cu_seqlens_q": i32()}, ("cu_seqlens_q has 0 entries",)),
    ({"cu_seqlens_q": i32(1, 2)}, ("cu_seqlens_q is list [1, 2]", "begin with 0")),
    ({"cu_seqlens_q": i32(0, -1)}, ("cu_seqlens_q is list [0, -1]", "never decrease")),
    ({"cu_seqlens_q": i32(0, HUGE, -(2**31)), "seqlens_k": i32(1, 1)}, ("cu_seqlens_q", "never decrease")),
    ({"seqlens_k": i32(-1)}, ("seqlens_k is list [-1]", "0 .. 2^31 - 1")),
    ({"seqlens_k": i32(-1), **PAGED}, ("seqlens_k is list [-1]", "lengths >= 0")),
    ({"cu_seqlens_k": i32(0, 4, 5)}, ("cu_seqlens_k has 3 entries",)),
    ({"cu_seqlens_k": i32(0, 4)}, ("request 0 has seqlens_k = 5", "room for 4")),
    ({"cu_seqlens_k": i32(5, 10)}, ("cu_seqlens_k is list [5, 10]", "begin with 0")),
    ({"cu_seqlens_k": i32(0, 5), **PAGED}, ("both cu_seqlens_k and block_table", "pass one")),
    ({"block_table": table([0, 1])}, ("page_size is None with a block_table", "pass both or neither")),
    ({"page_size": 4}, ("page_size is 4 without a block_table", "pass both or neither")),
    ({**PAGED, "page_size": 0}, ("page_size is 0", "int >= 1")),
    ({**PAGED, "page_size": 4.0}, ("page_size is 4.0", "int >= 1")),
    ({**PAGED, "page_size": True}, ("page_size is True", "int >= 1")),
    ({"block_table": table([0, 1], [2, 3]), "page_size": 4}, ("block_table has 2 rows", "1 requests")),
    ({"block_table": i32(0, 1), "page_size": 4}, ("block_table is int32 [2]", "rank 2")),
    (
        {"block_table": table([0]), "page_size": 4},
        ("block_table has 1 pages", "request 0 needs 2", "5 keys in pages of 4", "widen"),
    ),
    ({"block_table": table([0, -1]), "page_size": 4}, ("page -1", "within a request's length", "0 .. 536870911")),
    ({"block_table": table([0, 2**29]), "page_size": 4}, ("page 536870912", "slots are int32")),
    ({"max_seqlen_q": 1}, ("max_seqlen_q is 1", "a request has 2", "upper bound")),
    ({"max_seqlen_k": 4}, ("max_seqlen_k is 4", "a request has 5", "upper bound")),
    ({"max_seqlen_k": -2}, ("max_seqlen_k is -2", "int >= 0")),
    ({"max_seqlen_q": 2.0}, ("max_seqlen_q is 2.0", "int >= 0")),
    ({"key_start": i32(0, 0)}, ("one of key_start and key_end", "pass both")),
    ({"key_start": i32(0, 0), "key_end": i32(5)}, ("key_start has 2 entries and key_end 1", "make them agree")),
    ({"key_start": [0, 0], "key_end": i32(5, 5)}, ("key_start is list [0, 0]", "rank 1")),
]


@pytest.mark.parametrize(("fields", "words"), WRONG_FIELDS, ids=[f"{'+'.join(f)}: {w[0]}" for f, w in WRONG_FIELDS])
def test_refused_when_built(fields: Mapping[str, Any], words: tuple[str, ...]) -> None:
    right: dict[str, Any] = {"cu_seqlens_q": i32(0, 2), "seqlens_k": i32(5)}
    Batch(**right)
    with refused(*words):
        Batch(**{**right, **fields})


@pytest.mark.parametrize(
    ("seqlens_q", "seqlens_k", "words"),
    [
        ([1.5], [3], ("seqlens_q is list [1.5]", "sequence of integers")),
        ([1], [2.0], ("seqlens_k is list [2.0]", "sequence of integers")),
        ([[1, 2]], [3], ("seqlens_q is list [[1, 2]]", "one per request")),
        ([-1], [3], ("seqlens_q is list [-1]", "0 .. 2^31 - 1")),
        ([1], [2**31], ("seqlens_k is list [2147483648]", "0 .. 2^31 - 1")),
        ([1], [2**63], ("seqlens_k is list [9223372036854775808]", "0 .. 2^31 - 1")),
        ([1], [2**70], ("seqlens_k is list", "sequence of integers")),
        ([2**30, 2**30], [3, 3], ("seqlens_q adds up to 2147483648", "split the batch")),
        ([1, 1, 1], [HUGE] * 3, ("seqlens_k adds up to 6442450941", "split the batch")),
        ([1, 1], [3], ("cu_seqlens_q has 3 entries for 1 requests",)),
    ],
)
def test_refused_by_of(seqlens_q: list[Any], seqlens_k: list[Any], words: tuple[str, ...]) -> None:
    with refused(*words):
        Batch.of(seqlens_q, seqlens_k)


def test_paged_lengths_may_add_up_past_int32() -> None:
    """Shared pages: the keys of all requests together have no flat numbering, and need none."""
    size = 2**30
    batch = Batch.of([1] * 3, [size] * 3, block_table=table([0], [0], [0]), page_size=size)
    assert batch.key_range(3)[1].tolist() == [size] * 3


@pytest.mark.parametrize(
    ("batch", "rows", "keys", "words"),
    [
        (Batch.of([3], [5]), 2, 5, ("cu_seqlens_q ends at 3", "q has 2 rows")),
        (Batch.of([3], [5]), 3, 4, ("cu_seqlens_k ends at 5", "there are 4 keys")),
        (Batch.of([1], [5], **PAGED), 1, 1, ("names page 1", "the cache has 1 pages")),
        (Batch.of([1], [5], key_start=i32(0), key_end=i32(5)), 2, 5, ("key_start and key_end have 1 entries", "q has 2 rows")),
    ],
)
def test_refused_bounds(batch: Batch, rows: int, keys: int, words: tuple[str, ...]) -> None:
    batch.check_bounds(1 if batch.key_start is not None else 3, 5)
    with refused(*words):
        batch.check_bounds(rows, keys)


def test_pages_past_the_length_may_name_anything() -> None:
    batch = Batch.of([1], [4], block_table=table([1, HUGE, -1]), page_size=4)
    batch.check_bounds(1, 2)
    assert batch.to_slots(i32([3, 4])).tolist() == [[7, -1]]


@pytest.mark.parametrize("helper", ["to_flat", "from_flat", "to_slots", "from_slots"])
@pytest.mark.parametrize("indices", [i32(0), np.zeros((1, 1), np.int64), [[0]]], ids=["rank 1", "int64", "list"])
def test_refused_indices(helper: str, indices: Any) -> None:
    batch = Batch.of([1], [5]) if "flat" in helper else Batch.of([1], [5], **PAGED)
    getattr(batch, helper)(i32([0]))
    with refused("indices is", "int32 [Tq, topk] is accepted"):
        getattr(batch, helper)(indices)


def test_refused_index_spaces() -> None:
    flat, paged, indices = Batch.of([1], [5]), Batch.of([1], [5], **PAGED), i32([0])
    with refused("keys are paged", "use to_slots()"):
        paged.to_flat(indices)
    with refused("keys are paged", "use from_slots()"):
        paged.from_flat(indices)
    for helper in (flat.to_slots, flat.from_slots):
        with refused("has no block_table", "use with_pages()"):
            helper(indices)
    with refused("key_start and key_end have 1 entries", "q has 2 rows"):
        Batch.of([1], [5], key_start=i32(0), key_end=i32(1)).key_range(2)
