"""Which rows and keys belong to whom: requests, lengths, pages and visibility, one description for operators and backends.

Lengths may live on the device, where a server rewrites them between graph replays; launch shapes depend on `max_seqlen_q` and
`max_seqlen_k` alone, so nothing here reads a device array except `validate()`, which says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.arrays import (
    Array,
    as_int,
    as_kind,
    beside,
    cast,
    describe,
    dtype_name,
    host_as_kind,
    is_array,
    kind,
    namespace,
    on_host,
    readable,
    row_numbers,
    to_numpy,
)
from dsa_portable.errors import InvalidArgument

Int32: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]

# The fields that are arrays, in the order in which `flatten` gives them, with their rank.
ARRAYS = {"cu_seqlens_q": 1, "seqlens_k": 1, "cu_seqlens_k": 1, "block_table": 2, "key_start": 1, "key_end": 1}
# A decode step has one row per request, or a few where a draft model proposes several tokens: a call with a bound of at most
# so many rows is decode, and one with a larger bound is prefill.
DECODE_ROWS = 4
# Positions, flat rows and slots are int32, so no cache has more places.
MAX_PLACES = 2**31


def _lengths(name: str, values: Sequence[int] | Int32) -> np.ndarray[Any, np.dtype[np.int64]]:
    lengths = np.asarray(values)
    if lengths.ndim != 1 or (lengths.size and lengths.dtype.kind not in "iu"):
        raise InvalidArgument(f"Batch: {name} is {describe(values)}, but a sequence of integers is accepted, one per request.")
    if ((lengths < 0) | (lengths >= MAX_PLACES)).any():
        raise InvalidArgument(
            f"Batch: {name} is {describe(lengths.tolist())}, but lengths in 0 .. 2^31 - 1 are accepted; pass counts."
        )
    return lengths.astype(np.int64)


def _prefix_sums(name: str, lengths: Sequence[int] | Int32) -> Int32:
    sums = np.concatenate([[0], np.cumsum(_lengths(name, lengths))])
    if sums[-1] >= MAX_PLACES:
        raise InvalidArgument(f"Batch: {name} adds up to {sums[-1]}, but fewer than 2^31 are accepted; split the batch.")
    return sums.astype(np.int32)


@dataclass(frozen=True, eq=False)
class Batch:
    """visible(t) = [0, seqlens_k - Lq + i] for row i of a request of Lq rows, or [key_start[t], key_end[t]) where given.

    cu_seqlens_q: int32 [R + 1], prefix sums with a leading 0; request r owns rows `cu_seqlens_q[r]:cu_seqlens_q[r+1]`,
        rows from `cu_seqlens_q[R]` on are padding, where whatever has a row for them may hold anything.
    seqlens_k: int32 [R], keys per request.
    cu_seqlens_k: int32 [R + 1], where each request's keys begin in a flat k; None with host lengths: they lie end to end.
    block_table: int32 [R, max_pages], the pages of each request, with `page_size`; a request's entries past
        ceil(seqlens_k / page_size) are never followed.
    max_seqlen_q, max_seqlen_k: upper bounds that launch shapes, and `phase`, depend on; found from host arrays when not given.
    causal: False sees all keys.  key_start, key_end: int32 [Tq], end exclusive, positions in the request, clamped to
        [0, seqlens_k]; they replace causality entirely; start >= end is an empty row.
    Raises InvalidArgument for a wrong dtype, rank or size, and for host arrays that decrease, overrun their maxima or name
    too few pages. Device arrays are not read.
    """

    cu_seqlens_q: Array
    seqlens_k: Array
    cu_seqlens_k: Array | None = None
    block_table: Array | None = None
    page_size: int | None = None
    max_seqlen_q: int = -1
    max_seqlen_k: int = -1
    causal: bool = True
    key_start: Array | None = None
    key_end: Array | None = None

    def __post_init__(self) -> None:
        for name, rank in ARRAYS.items():
            value = getattr(self, name)
            if value is None and name not in ("cu_seqlens_q", "seqlens_k"):
                continue
            if not is_array(value) or dtype_name(value) != "int32" or value.ndim != rank:
                raise InvalidArgument(f"Batch: {name} is {describe(value)}, but int32 of rank {rank} is accepted; convert it.")
        self._check_sizes()
        self._check_integers()
        if readable(self.cu_seqlens_q) and readable(self.seqlens_k):
            self._fill_from_host()
        elif min(self.max_seqlen_q, self.max_seqlen_k) < 0 or (self.cu_seqlens_k is None and self.block_table is None):
            raise InvalidArgument(
                "Batch: lengths on a device need max_seqlen_q, max_seqlen_k and cu_seqlens_k or block_table; pass them, "
                "as they cannot be found without a synchronisation."
            )
        self._check_values(self._read(device_too=False))

    def _check_sizes(self) -> None:
        requests = self.num_requests
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            value = getattr(self, name)
            if value is not None and value.shape[0] != requests + 1:
                raise InvalidArgument(
                    f"Batch: {name} has {value.shape[0]} entries for {requests} requests, but {requests + 1} are accepted; "
                    "it holds prefix sums with a leading 0."
                )
        if self.block_table is not None and self.block_table.shape[0] != requests:
            raise InvalidArgument(
                f"Batch: block_table has {self.block_table.shape[0]} rows, but there are {requests} requests; make them agree."
            )
        if self.block_table is not None and self.cu_seqlens_k is not None:
            raise InvalidArgument("Batch: both cu_seqlens_k and block_table were passed, but keys are flat or paged; pass one.")
        if (self.key_start is None) != (self.key_end is None):
            raise InvalidArgument("Batch: one of key_start and key_end was passed, but they come together; pass both.")
        if self.key_start is not None and self.key_end is not None and self.key_start.shape != self.key_end.shape:
            raise InvalidArgument(
                f"Batch: key_start has {self.key_start.shape[0]} entries and key_end {self.key_end.shape[0]}, but one per row "
                "is accepted; make them agree."
            )

    def _check_integers(self) -> None:
        if not isinstance(self.causal, (bool, np.bool_)):
            raise InvalidArgument(f"Batch: causal is {self.causal!r}, but a bool is accepted; pass True or False.")
        page_size = as_int(self.page_size)
        if (self.block_table is None) != (self.page_size is None) or (
            self.page_size is not None and not 1 <= (page_size or 0) < MAX_PLACES
        ):
            raise InvalidArgument(
                f"Batch: page_size is {self.page_size!r} with{'out' if self.block_table is None else ''} a block_table, but an "
                "int >= 1 goes with a block_table and None without; pass both or neither."
            )
        object.__setattr__(self, "page_size", page_size)
        for name in ("max_seqlen_q", "max_seqlen_k"):
            limit = as_int(getattr(self, name))
            if limit is None or limit < -1:
                raise InvalidArgument(
                    f"Batch: {name} is {getattr(self, name)!r}, but an int >= 0 is accepted, or -1 to find it on the host."
                )
            object.__setattr__(self, name, limit)

    def _fill_from_host(self) -> None:
        cu_seqlens_q, seqlens_k = to_numpy(self.cu_seqlens_q), to_numpy(self.seqlens_k)
        if self.cu_seqlens_k is None and self.block_table is None:
            object.__setattr__(self, "cu_seqlens_k", as_kind(_prefix_sums("seqlens_k", seqlens_k), kind(self.seqlens_k)))
        if self.max_seqlen_q < 0:
            object.__setattr__(self, "max_seqlen_q", int(np.diff(cu_seqlens_q).max(initial=0)))
        if self.max_seqlen_k < 0:
            object.__setattr__(self, "max_seqlen_k", int(seqlens_k.max(initial=0)))

    @classmethod
    def dense(cls, seqlen_q: int, seqlen_k: int, **fields: Any) -> Batch:
        """One request that owns all `seqlen_q` rows and all `seqlen_k` keys."""
        return cls.of([seqlen_q], [seqlen_k], **fields)

    @classmethod
    def of(cls, seqlens_q: Sequence[int], seqlens_k: Sequence[int], **fields: Any) -> Batch:
        """A batch on the host from rows and keys per request, in plain integers."""
        return cls(_prefix_sums("seqlens_q", seqlens_q), _lengths("seqlens_k", seqlens_k).astype(np.int32), **fields)

    def with_pages(self, block_table: Array, page_size: int | None = None) -> Batch:
        """The same requests over another cache that pages differently; `page_size` stays when not given."""
        size = self.page_size if page_size is None else page_size
        return replace(self, block_table=block_table, page_size=size, cu_seqlens_k=None)

    @property
    def num_requests(self) -> int:
        """R."""
        requests: int = self.seqlens_k.shape[0]
        return requests

    @property
    def phase(self) -> str:
        """`decode` where `max_seqlen_q` is at most 4, else `prefill`; a bound looser than the rows decides all the same."""
        return "decode" if self.max_seqlen_q <= DECODE_ROWS else "prefill"

    def validate(self) -> None:
        """Check the values of every array; reads device arrays, so it synchronises with the device. Raises InvalidArgument."""
        self._check_values(self._read(device_too=True))

    def _read(self, device_too: bool) -> dict[str, Int32]:
        arrays = zip(ARRAYS, self.flatten()[0], strict=True)
        return {name: to_numpy(a) for name, a in arrays if a is not None and (device_too or readable(a))}

    def _check_values(self, values: dict[str, Int32], pages: Int32 | None = None) -> None:
        """Raise where what was read breaks the class's rules; `pages`, where known, are those of `_followed`."""
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            sums = values.get(name)
            if sums is not None and (sums[0] != 0 or (sums[1:] < sums[:-1]).any()):
                raise InvalidArgument(
                    f"Batch: {name} is {describe(sums.tolist())}, but prefix sums that begin with 0 and never decrease are "
                    "accepted; accumulate the lengths."
                )
        seqlens_k = values.get("seqlens_k")
        if "cu_seqlens_q" in values:
            self._check_maximum("max_seqlen_q", np.diff(values["cu_seqlens_q"]))
        if seqlens_k is None:
            return
        if (seqlens_k < 0).any():
            raise InvalidArgument(
                f"Batch: seqlens_k is {describe(seqlens_k.tolist())}, but lengths >= 0 are accepted; pass counts."
            )
        self._check_maximum("max_seqlen_k", seqlens_k)
        room = np.diff(values["cu_seqlens_k"]) if "cu_seqlens_k" in values else seqlens_k
        if (seqlens_k > room).any():
            r = int((seqlens_k > room).argmax())
            raise InvalidArgument(
                f"Batch: request {r} has seqlens_k = {seqlens_k[r]}, but cu_seqlens_k has room for {room[r]}; make them agree."
            )
        if "block_table" in values:
            self._check_width(values["block_table"], seqlens_k)
            self._check_pages(self._followed(values["block_table"], seqlens_k) if pages is None else pages)

    def _check_maximum(self, name: str, lengths: Int32) -> None:
        limit = getattr(self, name)
        if lengths.max(initial=0) > limit:
            raise InvalidArgument(f"Batch: {name} is {limit}, but a request has {lengths.max()}; pass an upper bound.")

    def _check_width(self, table: Int32, seqlens_k: Int32) -> None:
        needed = -(-seqlens_k // self._page_size)
        if (needed > table.shape[1]).any():
            r = int((needed > table.shape[1]).argmax())
            raise InvalidArgument(
                f"Batch: block_table has {table.shape[1]} pages per request, but request {r} needs {needed[r]} "
                f"({seqlens_k[r]} keys in pages of {self.page_size}); widen it."
            )

    def _check_pages(self, pages: Int32) -> None:
        most = MAX_PLACES // self._page_size
        # The extremes first: a mask of every page takes longer than both.
        if pages.min(initial=0) < 0 or pages.max(initial=0) >= most:
            wrong = pages[(pages < 0) | (pages >= most)][0]
            raise InvalidArgument(
                f"Batch: block_table has page {wrong} within a request's length, but 0 .. {most - 1} are accepted, as slots "
                "are int32; pass the pages that hold the keys."
            )

    def _followed(self, table: Int32, seqlens_k: Int32) -> Int32:
        """The entries of the block table within their request's length."""
        return table[np.arange(table.shape[1]) < -(-seqlens_k // self._page_size)[:, None]]

    def check_bounds(self, rows: int, keys: int) -> None:
        """Raise where host arrays overrun arrays of `rows` query rows and `keys` flat keys (or pages, when paged).

        Also where they were rewritten in place since the constructor checked them, and break its rules now.
        """
        self._check_rows(rows)
        values = self._read(device_too=False)
        for name, size, what in (("cu_seqlens_q", rows, "q has {} rows"), ("cu_seqlens_k", keys, "there are {} keys")):
            if name in values and values[name][-1] > size:
                raise InvalidArgument(f"Batch: {name} ends at {values[name][-1]}, but {what.format(size)}; make them agree.")
        pages = None
        if "block_table" in values and "seqlens_k" in values:
            pages = self._followed(values["block_table"], values["seqlens_k"])
            top = pages.max(initial=-1)
            if top >= keys:
                raise InvalidArgument(f"Batch: block_table names page {top}, but the cache has {keys} pages; make them agree.")
        self._check_values(values, pages)

    def _check_rows(self, rows: int) -> None:
        if self.key_start is not None and self.key_start.shape[0] != rows:
            raise InvalidArgument(
                f"Batch: key_start and key_end have {self.key_start.shape[0]} entries, but q has {rows} rows; pass one per row."
            )

    @property
    def _page_size(self) -> int:
        if self.page_size is None:
            raise InvalidArgument("Batch: it has no block_table, but slots are places in pages; use with_pages() first.")
        return self.page_size

    @property
    def _anchor(self) -> Array:
        """The array beside which `request_of_row` and `key_range` put their results: one on a device where there is any."""
        return next((a for a in self.flatten()[0] if a is not None and not on_host(a)), self.cu_seqlens_q)

    def request_of_row(self, rows: int) -> Array:
        """int32 [rows]: the request that owns each row, -1 for padding rows; no synchronisation."""
        cu_seqlens_q = beside(self.cu_seqlens_q, self._anchor)
        xp, row = namespace(cu_seqlens_q), row_numbers(rows, cu_seqlens_q)
        owner = xp.searchsorted(cu_seqlens_q, row, side="right") - 1
        return cast(xp.where(row < cu_seqlens_q[-1], owner, -1), "int32")

    def key_range(self, rows: int) -> tuple[Array, Array]:
        """int32 [rows] each, (start, end): the positions each row sees, end exclusive, 0 <= start <= end <= seqlens_k.

        Equal where the row sees none, and (0, 0) for padding rows; no synchronisation.
        """
        self._check_rows(rows)
        owner = self.request_of_row(rows)
        xp = namespace(owner)
        padding, owner = owner < 0, xp.clip(owner, 0, None)
        length = self._per_row(self.seqlens_k, owner)
        if self.key_start is not None:
            start = xp.clip(beside(self.key_start, owner), 0, None)
            end = xp.minimum(beside(self.key_end, owner), length)
        else:
            start, end = xp.zeros_like(length), length
            if self.causal and self.num_requests:
                end = length - (beside(self.cu_seqlens_q, owner)[owner + 1] - 1 - row_numbers(rows, owner))
        end = xp.where(padding, 0, xp.clip(end, 0, None))
        return xp.minimum(start, end), end

    @staticmethod
    def _per_row(values: Array, owner: Array) -> Array:
        """values[owner], or zeros in a batch without requests."""
        return beside(values, owner)[owner] if values.shape[0] else namespace(owner).zeros_like(owner)

    def _resolve(self, indices: Array, values: Array) -> tuple[Array, Array, Array]:
        """(valid [Tq, topk], owner [Tq, 1], position [Tq, topk]) of `values`, where the index row stands; 0 where not valid."""
        xp = namespace(indices)
        owner = beside(self.request_of_row(indices.shape[0]), indices)
        padding, owner = (owner < 0)[:, None], xp.clip(owner, 0, None)
        valid = (values >= 0) & (values < self._per_row(self.seqlens_k, owner)[:, None]) & ~padding
        return valid, owner[:, None], xp.where(valid, values, 0)

    @staticmethod
    def _check_indices(indices: Array) -> None:
        if not is_array(indices) or dtype_name(indices) != "int32" or indices.ndim != 2:
            raise InvalidArgument(f"Batch: indices is {describe(indices)}, but int32 [Tq, topk] is accepted; convert it.")

    def to_flat(self, indices: Array) -> Array:
        """Positions in the request, int32 [Tq, topk] -> rows of a flat k (as FlashMLA prefill has them), -1 where not valid."""
        self._check_indices(indices)
        if self.cu_seqlens_k is None:
            raise InvalidArgument("Batch: its keys are paged, but flat rows were asked for; use to_slots().")
        valid, owner, position = self._resolve(indices, indices)
        return namespace(indices).where(valid, position + beside(self.cu_seqlens_k, owner)[owner], -1)

    def to_slots(self, indices: Array) -> Array:
        """Positions in the request, int32 [Tq, topk] -> page * page_size + offset, -1 where not valid.

        These slots are what FlashMLA decode and SGLang take.
        """
        self._check_indices(indices)
        size, table, xp = self._page_size, self.block_table, namespace(indices)
        valid, owner, position = self._resolve(indices, indices)
        if table is None or 0 in table.shape:
            return xp.full_like(indices, -1)
        page = beside(table, owner)[owner, position // size]
        return xp.where(valid, page * size + position % size, -1)

    def from_flat(self, indices: Array) -> Array:
        """Rows of a flat k, int32 [Tq, topk] -> positions in the row's own request; rows of other requests become -1."""
        self._check_indices(indices)
        if self.cu_seqlens_k is None:
            raise InvalidArgument("Batch: its keys are paged, but flat rows were passed; use from_slots().")
        xp = namespace(indices)
        owner = xp.clip(beside(self.request_of_row(indices.shape[0]), indices), 0, None)
        begin = beside(self.cu_seqlens_k, owner)[owner][:, None]
        valid, _, position = self._resolve(indices, xp.where(indices < 0, -1, indices - begin))
        return xp.where(valid, position, -1)

    def from_slots(self, indices: Array) -> Array:
        """Slots, int32 [Tq, topk], all on the host -> positions in the row's own request, else -1.

        Where a request holds a page twice, a slot of it is the lower position.
        """
        self._check_indices(indices)
        size, values = self._page_size, self._read(device_too=False)
        if not on_host(indices) or not {"cu_seqlens_q", "seqlens_k", "block_table"} <= set(values):
            raise InvalidArgument(
                "Batch: from_slots searches the block table on the host; pass indices and a Batch that live there."
            )
        slots, owner = to_numpy(indices), to_numpy(self.request_of_row(indices.shape[0]))
        result = np.full(slots.shape, -1, np.int32)
        for r, seqlen in enumerate(values["seqlens_k"].tolist()):
            pages, first = np.unique(values["block_table"][r, : -(-seqlen // size)], return_index=True)
            if not len(pages):
                continue
            mine = slots[owner == r]
            at = np.minimum(np.searchsorted(pages, mine // size), len(pages) - 1)
            position = first[at] * size + mine % size
            result[owner == r] = np.where((pages[at] == mine // size) & (position < seqlen), position, -1)
        return as_kind(result, kind(indices))

    def flatten(self) -> tuple[tuple[Array | None, ...], tuple[int, ...]]:
        """(arrays, integers), for torch.library and for moving a batch to a device; `unflatten` is the way back."""
        arrays = tuple(getattr(self, name) for name in ARRAYS)
        return arrays, (self.page_size or 0, self.max_seqlen_q, self.max_seqlen_k, int(self.causal))

    @classmethod
    def unflatten(cls, arrays: Sequence[Array | None], integers: Sequence[int]) -> Batch:
        """The batch that `flatten` took apart."""
        page_size, max_seqlen_q, max_seqlen_k, causal = integers
        return cls(
            **dict(zip(ARRAYS, arrays, strict=True)),
            page_size=page_size or None,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            causal=bool(causal),
        )


def batch_as_kind(batch: Batch, wanted: str) -> Batch:
    """The same batch over the same memory, with every host array of the wanted kind; itself where nothing changes."""
    arrays = zip(ARRAYS, batch.flatten()[0], strict=True)
    changed = {name: new for name, array in arrays if (new := host_as_kind(array, wanted)) is not array}
    if not changed:
        return batch
    # Not through the constructor: a call has looked at these values just now, and every page again would double its time.
    same = copy(batch)
    for name, array in changed.items():
        object.__setattr__(same, name, array)
    return same
