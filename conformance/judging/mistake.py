"""A named mistake of kernels, and one row as it is told again under it: the truth with one stage of the way changed.

Every address is folded into the memory that exists, so that no mistake can read outside of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance.cases.call import Call

Array: TypeAlias = np.ndarray[Any, Any]
Change: TypeAlias = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Mistake:
    """`words` complete "looks like: ..."; `change(row, value)` is what the stage has for its value.

    One of its `groups` is said where several fit and all are of it: the case cannot tell them apart.
    """

    name: str
    words: str
    stage: str
    change: Change
    groups: tuple[str, ...] = ()

    def at(self, row: Row, stage: str, value: Any) -> Any:
        """The value of a stage, changed where it is this mistake's."""
        return self.change(row, value) if stage in self.stage.split(" and ") else value


HONEST = Mistake("", "", "", lambda row, value: value)


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a call: what its request is, and where its keys lie."""

    call: Call
    row: int
    request: int
    memo: dict[str, Any] = field(default_factory=dict)  # what is the same under most mistakes

    @property
    def first(self) -> int:
        """The request's first row."""
        return int(self.call.batch["cu_seqlens_q"][self.request])

    @property
    def last(self) -> int:
        """Behind the request's last row."""
        return int(self.call.batch["cu_seqlens_q"][self.request + 1])

    @property
    def context(self) -> int:
        """The request's keys."""
        return int(self.lengths[self.request])

    @property
    def lengths(self) -> Array:
        """Keys of every request."""
        return self.call.batch["seqlens_k"].astype(np.int64)

    @property
    def paged(self) -> bool:
        """The keys lie in pages."""
        return "block_table" in self.call.batch

    @cached_property
    def page_size(self) -> int:
        """Keys per page; 1 for flat keys."""
        return int(self.call.batch_options["page_size"]) if self.paged else 1

    @cached_property
    def table(self) -> Array:
        """The block table; of flat keys an empty one."""
        return self.call.batch["block_table"].astype(np.int64) if self.paged else np.zeros((len(self.lengths), 1), np.int64)

    @property
    def base(self) -> int:
        """The first of the request's flat keys."""
        return 0 if self.paged else int(self.call.batch["cu_seqlens_k"][self.request])

    @property
    def visible(self) -> int:
        """Keys that a causal row sees."""
        return max(0, self.context - (self.last - self.row) + 1)

    def slots(self, positions: Array) -> Array:
        """Rows of the memory that hold these positions, were they beyond the table too."""
        return self.looked_up(positions, self.page_size) if self.paged else self.base + positions

    def looked_up(self, positions: Array, page_size: int, request: int | None = None) -> Array:
        """The same, through the pages of some request and size; flat keys stay where they are."""
        if not self.paged:
            return self.base + positions
        pages, offsets = np.divmod(positions, page_size)
        mine = self.table[self.request if request is None else request % len(self.table)]
        return np.asarray(mine[np.clip(pages, 0, len(mine) - 1)] * page_size + offsets)

    def of(self, row: int, request: int) -> Row:
        """Another row of the call."""
        return Row(self.call, row, request)

    def owner(self, row: int) -> int | None:
        """The request of a row, None of padding."""
        ends = self.call.batch["cu_seqlens_q"]
        request = int(np.searchsorted(ends, row, side="right")) - 1
        return request if request < len(self.lengths) and row < int(ends[-1]) else None
