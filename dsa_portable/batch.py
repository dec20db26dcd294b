"""Which rows and keys belong to whom: requests, lengths, pages and visibility, one description for both operators and every backend.

Lengths may live on the device, where a server rewrites them between graph replays; launch shapes depend on `max_seqlen_q` and
`max_seqlen_k` alone, so nothing here reads a device array except `validate()`, which says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.arrays import Array, as_kind, describe, dtype_name, is_array, kind, namespace, on_host, to_numpy
from dsa_portable.errors import InvalidArgument

Int32: TypeAlias = np.ndarray[Any, np.dtype[np.int32]]

# The fields that are arrays, in the order in which `flatten` gives them, with their rank.
ARRAYS = {"cu_seqlens_q": 1, "seqlens_k": 1, "cu_seqlens_k": 1, "block_table": 2, "key_start": 1, "key_end": 1}
# A decode step has one row per request, or a few where a draft model proposes several tokens; from here on it is prefill.
DECODE_ROWS = 4


def _prefix_sums(lengths: Sequence[int] | Int32) -> Int32:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Batch:
    """visible(t) = [0, seqlens_k - Lq + i] for row i of a request of Lq rows, or [key_start[t], key_end[t]) where given.

    cu_seqlens_q: int32 [R + 1], prefix sums with a leading 0; request r owns rows `cu_seqlens_q[r]:cu_seqlens_q[r+1]`,
        rows from `cu_seqlens_q[R]` on are padding.
    seqlens_k: int32 [R], keys per request.
    cu_seqlens_k: int32 [R + 1], where each request's keys begin in a flat k; None with host lengths: they lie end to end.
    block_table: int32 [R, max_pages], the pages of each request, with `page_size`; entries past ceil(seqlen / page_size) are never followed.
    max_seqlen_q, max_seqlen_k: upper bounds that launch shapes may depend on; found from host arrays when not given.
    causal: False sees all keys.  key_start, key_end: int32 [Tq], end exclusive, positions in the request, clamped to
        [0, seqlens_k]; they replace causality entirely; start >= end is an empty row.
    Raises InvalidArgument for host arrays that decrease, overrun, or a block table too short for its length.
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
        self._check_shapes()
        if on_host(self.cu_seqlens_q) and on_host(self.seqlens_k):
            self._fill_from_host()
        elif min(self.max_seqlen_q, self.max_seqlen_k) < 0 or (self.cu_seqlens_k is None and self.block_table is None):
            raise InvalidArgument(
                "Batch: lengths on a device need max_seqlen_q, max_seqlen_k and cu_seqlens_k or block_table; pass them, "
                "as they cannot be found without a synchronisation."
            )
        if all(value is None or on_host(value) for value in self.flatten()[0]):
            self.validate()

    def _check_shapes(self) -> None:
        requests = self.num_requests
        if self.cu_seqlens_q.shape[0] != requests + 1:
            raise InvalidArgument(
                f"Batch: cu_seqlens_q has {self.cu_seqlens_q.shape[0]} entries for {requests} requests, but {requests + 1} are "
                "accepted; it holds prefix sums with a leading 0."
            )
        if self.cu_seqlens_k is not None and self.cu_seqlens_k.shape[0] != requests + 1:
            raise InvalidArgument(
                f"Batch: cu_seqlens_k has {self.cu_seqlens_k.shape[0]} entries for {requests} requests, but {requests + 1} are "
                "accepted; it holds prefix sums with a leading 0."
            )
        if self.block_table is not None and self.block_table.shape[0] != requests:
            raise InvalidArgument(
                f"Batch: block_table has {self.block_table.shape[0]} rows, but seqlens_k has {requests} requests; pass one row each."
            )
        if (self.block_table is None) != (self.page_size is None) or (self.page_size is not None and self.page_size < 1):
            raise InvalidArgument(
                f"Batch: page_size is {self.page_size!r} with{'out' if self.block_table is None else ''} a block_table, but an "
                "int >= 1 goes with a block_table and None without; pass both or neither."
            )
        if self.block_table is not None and self.cu_seqlens_k is not None:
            raise InvalidArgument("Batch: both cu_seqlens_k and block_table were passed, but keys are flat or paged; pass one.")
        if (self.key_start is None) != (self.key_end is None):
            raise InvalidArgument("Batch: one of key_start and key_end was passed, but they come together; pass both.")

    def _fill_from_host(self) -> None:
        cu_seqlens_q, seqlens_k = to_numpy(self.cu_seqlens_q), to_numpy(self.seqlens_k)
        if self.cu_seqlens_k is None and self.block_table is None:
            ends = _prefix_sums(np.maximum(seqlens_k, 0))
            object.__setattr__(self, "cu_seqlens_k", as_kind(ends, kind(self.seqlens_k)))
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
        return cls(_prefix_sums(seqlens_q), np.asarray(seqlens_k, np.int32).reshape(-1), **fields)

    def with_pages(self, block_table: Array, page_size: int | None = None) -> Batch:
        """The same requests over another cache that pages differently; `page_size` stays when not given."""
        return replace(self, block_table=block_table, page_size=page_size or self.page_size, cu_seqlens_k=None)

    @property
    def num_requests(self) -> int:
        """R."""
        return int(self.seqlens_k.shape[0])

    @property
    def phase(self) -> str:
        """`decode` where no request has more than 4 rows, else `prefill`."""
        return "decode" if self.max_seqlen_q <= DECODE_ROWS else "prefill"

    def validate(self) -> None:
        """Check the lengths' values; reads device arrays, so it synchronises with the device. Raises InvalidArgument."""
        cu_seqlens_q, seqlens_k = to_numpy(self.cu_seqlens_q), to_numpy(self.seqlens_k)
        self._check_prefix_sums("cu_seqlens_q", cu_seqlens_q)
        if (seqlens_k < 0).any():
            raise InvalidArgument(f"Batch: seqlens_k[{(seqlens_k < 0).argmax()}] is negative, but lengths >= 0 are accepted.")
        for name, limit, lengths in (
            ("max_seqlen_q", self.max_seqlen_q, np.diff(cu_seqlens_q)),
            ("max_seqlen_k", self.max_seqlen_k, seqlens_k),
        ):
            if lengths.max(initial=0) > limit:
                raise InvalidArgument(f"Batch: {name} is {limit}, but a request has {lengths.max()}; pass an upper bound.")
        if self.cu_seqlens_k is not None:
            cu_seqlens_k = to_numpy(self.cu_seqlens_k)
            self._check_prefix_sums("cu_seqlens_k", cu_seqlens_k)
            room = np.diff(cu_seqlens_k)
            if (seqlens_k > room).any():
                r = int((seqlens_k > room).argmax())
                raise InvalidArgument(
                    f"Batch: request {r} has seqlens_k = {seqlens_k[r]}, but cu_seqlens_k gives it room for {room[r]} keys; make them agree."
                )
        if self.block_table is not None and self.page_size is not None:
            table, needed = to_numpy(self.block_table), -(-seqlens_k // self.page_size)
            if (needed > table.shape[1]).any():
                r = int((needed > table.shape[1]).argmax())
                raise InvalidArgument(
                    f"Batch: block_table has {table.shape[1]} pages per request, but request {r} needs {needed[r]} "
                    f"({seqlens_k[r]} keys in pages of {self.page_size}); widen it."
                )
            followed = np.arange(table.shape[1]) < needed[:, None]
            if (table[followed] < 0).any():
                raise InvalidArgument("Batch: block_table has a negative page within a request's length; pages are >= 0.")

    @staticmethod
    def _check_prefix_sums(name: str, sums: Int32) -> None:
        if sums[0] != 0 or (np.diff(sums) < 0).any():
            raise InvalidArgument(
                f"Batch: {name} is {sums.tolist()[:8]}, but prefix sums that begin with 0 and never decrease are accepted."
            )

    def check_bounds(self, rows: int, keys: int) -> None:
        """Raise where host lengths overrun arrays of `rows` query rows and `keys` flat keys (or pages, when paged)."""
        for name in ("key_start", "key_end"):
            value = getattr(self, name)
            if value is not None and value.shape[0] != rows:
                raise InvalidArgument(f"Batch: {name} has {value.shape[0]} entries, but q has {rows} rows; pass one per row.")
        if on_host(self.cu_seqlens_q) and self.cu_seqlens_q[-1] > rows:
            raise InvalidArgument(
                f"Batch: cu_seqlens_q ends at {self.cu_seqlens_q[-1]}, but q has {rows} rows; make them agree."
            )
        if self.cu_seqlens_k is not None and on_host(self.cu_seqlens_k) and self.cu_seqlens_k[-1] > keys:
            raise InvalidArgument(
                f"Batch: cu_seqlens_k ends at {self.cu_seqlens_k[-1]}, but there are {keys} keys; make them agree."
            )
        if self.block_table is not None and on_host(self.block_table) and on_host(self.seqlens_k):
            table, needed = to_numpy(self.block_table), -(-to_numpy(self.seqlens_k) // self._page_size)
            top = table[np.arange(table.shape[1]) < needed[:, None]].max(initial=-1)
            if top >= keys:
                raise InvalidArgument(f"Batch: block_table names page {top}, but the cache has {keys} pages; make them agree.")

    @property
    def _page_size(self) -> int:
        if self.page_size is None:
            raise InvalidArgument("Batch: it has no block_table, but slots are places in pages; use with_pages() first.")
        return self.page_size

    def request_of_row(self, rows: int) -> Array:
        """int32 [rows]: the request that owns each row, -1 for padding rows; no synchronisation."""
        xp = namespace(self.cu_seqlens_q)
        where = {} if xp is np else {"device": self.cu_seqlens_q.device}
        row = xp.arange(rows, dtype=xp.int32, **where)
        owner = xp.searchsorted(self.cu_seqlens_q, row, side="right") - 1
        return xp.where(row < self.cu_seqlens_q[-1], owner, -1)

    def key_range(self, rows: int) -> tuple[Array, Array]:
        """(start, end) of the positions each row sees, end exclusive, clamped to the request; (0, 0) for padding rows."""
        xp = namespace(self.cu_seqlens_q)
        where = {} if xp is np else {"device": self.cu_seqlens_q.device}
        owner = self.request_of_row(rows)
        padding, owner = owner < 0, xp.where(owner < 0, 0, owner)
        if not self.num_requests:
            return xp.zeros_like(owner), xp.zeros_like(owner)
        length = self.seqlens_k[owner]
        if self.key_start is not None:
            start, end = xp.clip(self.key_start, 0, None), xp.minimum(self.key_end, length)
        else:
            last = self.cu_seqlens_q[owner + 1] - xp.arange(rows, dtype=xp.int32, **where) - 1
            start, end = xp.zeros_like(length), length - last if self.causal else length
        end = xp.where(padding, 0, xp.clip(end, 0, None))
        return xp.minimum(start, end), end

    def _valid(self, indices: Array) -> tuple[Array, Array, Array]:
        xp = namespace(indices)
        owner = self.request_of_row(indices.shape[0])
        padding, owner = (owner < 0)[:, None], xp.where(owner < 0, 0, owner)
        valid = (indices >= 0) & (indices < self.seqlens_k[owner][:, None]) & ~padding
        return valid, owner, xp.where(valid, indices, 0)

    def to_flat(self, indices: Array) -> Array:
        """Positions in the request [Tq, topk] -> rows of a flat k (FlashMLA prefill's index space); what is invalid becomes -1."""
        if self.cu_seqlens_k is None:
            raise InvalidArgument("Batch: its keys are paged, but flat rows were asked for; use to_slots().")
        valid, owner, position = self._valid(indices)
        return namespace(indices).where(valid, position + self.cu_seqlens_k[owner][:, None], -1)

    def to_slots(self, indices: Array) -> Array:
        """Positions in the request [Tq, topk] -> page * page_size + offset (FlashMLA decode, SGLang); what is invalid becomes -1."""
        size = self._page_size
        valid, owner, position = self._valid(indices)
        if self.block_table is None or self.block_table.shape[1] == 0:
            return namespace(indices).full_like(indices, -1)
        page = self.block_table[owner[:, None], position // size]
        return namespace(indices).where(valid, page * size + position % size, -1)

    def from_flat(self, indices: Array) -> Array:
        """Rows of a flat k [Tq, topk] -> positions in the row's own request; rows of other requests become -1."""
        if self.cu_seqlens_k is None:
            raise InvalidArgument("Batch: its keys are paged, but flat rows were passed; use from_slots().")
        xp = namespace(indices)
        owner = self.request_of_row(indices.shape[0])
        local = xp.where(indices < 0, -1, indices - self.cu_seqlens_k[xp.where(owner < 0, 0, owner)][:, None])
        valid, _, position = self._valid(local)
        return xp.where(valid, position, -1)

    def from_slots(self, indices: Array) -> Array:
        """Slots [Tq, topk] on the host -> positions in the row's own request (the lowest, where it holds a page twice), else -1."""
        size, table = self._page_size, to_numpy(self.block_table)
        slots, seqlens_k = to_numpy(indices), to_numpy(self.seqlens_k)
        owner = to_numpy(self.request_of_row(slots.shape[0]))
        result = np.full(slots.shape, -1, np.int32)
        for r in range(self.num_requests):
            pages = table[r, : -(-int(seqlens_k[r]) // size)]
            logical = np.full(int(pages.max(initial=-1)) + 2, -1, np.int64)
            logical[pages[::-1]] = np.arange(len(pages))[::-1]
            mine = slots[owner == r]
            page = logical[np.where((mine < 0) | (mine // size >= len(logical)), -1, mine // size)]
            position = page * size + mine % size
            result[owner == r] = np.where((page >= 0) & (position < seqlens_k[r]), position, -1)
        return result

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
