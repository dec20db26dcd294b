"""How a case's keys lie in memory: requests end to end, or pages in random order, some shared; garbage where none may look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance.cases import values

Array: TypeAlias = np.ndarray[Any, Any]

GARBAGE_PAGES = (2**31 - 1, -1, -(2**31), 123456789)


@dataclass(frozen=True)
class Storage:
    """Where each request's keys are: `rows[r][p]` is the flat place (or page * page_size + offset) of its position p."""

    size: int  # slots in all, read or not
    rows: tuple[Array, ...]
    batch: dict[str, Array]
    page_size: int | None

    def place(self, logical: list[Array], filler: Array, row: tuple[int, ...] = ()) -> Array:
        """[size, ...]: `filler` everywhere (broadcast), then each request's [Lk, ...] where it belongs.

        `row`: the shape of a key, where there may be no request to read it from.
        """
        stored = np.empty((self.size, *(logical[0].shape[1:] if logical else row)), filler.dtype)
        stored[:] = filler
        for slots, array in zip(self.rows, logical, strict=True):
            stored[slots] = array
        return stored if self.page_size is None else stored.reshape(-1, self.page_size, *stored.shape[1:])


def flat(lengths: tuple[int, ...], gap: int) -> Storage:
    """Requests one behind another, `gap` unread slots after each: cu_seqlens_k leaves room that seqlens_k does not use."""
    starts = np.concatenate([[0], np.cumsum([length + gap for length in lengths])])
    rows = tuple(np.arange(start, start + length) for start, length in zip(starts, lengths, strict=False))
    batch = {"seqlens_k": np.array(lengths, np.int32), "cu_seqlens_k": starts.astype(np.int32)}
    return Storage(int(starts[-1]), rows, batch, None)


def paged(
    name: str, lengths: tuple[int, ...], page_size: int, shared_pages: int, twice: bool = False, spare: int = 2
) -> Storage:
    """Pages in random order among unused ones; the first `shared_pages` full pages of a request are those of the longest one.

    `twice`: a request's second page is its first one again. `spare`: how many pages nothing names, anywhere among the others.
    Table entries past the last page of a request name pages that do not exist: following one is a fault that shows.
    """
    counts = [-(-length // page_size) for length in lengths]
    longest = int(np.argmax(lengths)) if lengths else 0
    common = [min(shared_pages, length // page_size) if r != longest else 0 for r, length in enumerate(lengths)]
    own = [count - shared for count, shared in zip(counts, common, strict=True)]
    pages = values.permutation(f"{name}/pages", sum(own) + spare)
    width = max(counts, default=0) + 3
    garbage = np.array(GARBAGE_PAGES, np.int64)[np.arange(len(lengths) * width) % len(GARBAGE_PAGES)]
    table = garbage.reshape(len(lengths), width)
    first = np.concatenate([[0], np.cumsum(own)])
    for r in sorted(range(len(lengths)), key=lambda r: r != longest):
        table[r, : common[r]] = table[longest, : common[r]]
        table[r, common[r] : counts[r]] = pages[first[r] : first[r + 1]]
        if twice and lengths[r] >= 2 * page_size:
            table[r, 1] = table[r, 0]
    positions = [np.arange(length) for length in lengths]
    rows = tuple(table[r, p // page_size] * page_size + p % page_size for r, p in enumerate(positions))
    batch = {"seqlens_k": np.array(lengths, np.int32), "block_table": table.astype(np.int32)}
    return Storage(len(pages) * page_size, rows, batch, page_size)


def share(storage: Storage, logical: list[Array]) -> list[Array]:
    """Make requests that share a page agree on what lies in it: the longest request's values win."""
    held = np.concatenate([np.empty(0, np.int64), *storage.rows])
    if len(np.unique(held)) == len(held):
        return logical
    longest = max(range(len(logical)), key=lambda r: len(logical[r]))
    stored = np.zeros((storage.size, *logical[0].shape[1:]), logical[0].dtype)
    for r in sorted(range(len(logical)), key=lambda r: r == longest):
        stored[storage.rows[r]] = logical[r]
    return [stored[slots] for slots in storage.rows]
