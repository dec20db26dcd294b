"""Cases of index_select: scores drawn directly, so that what is to be selected is known exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.batch import Batch
from dsa_portable.conformance.cases import values
from dsa_portable.conformance.cases.call import Call, SingleCall
from dsa_portable.conformance.cases.lightning_index import Requests, batch_of, phase_of
from dsa_portable.conformance.cases.storage import flat, paged

Array: TypeAlias = np.ndarray[Any, Any]
# (label, rows, columns) -> float32 scores
Draw: TypeAlias = Callable[[str, int, int], Array]


def _natural(label: str, rows: int, columns: int) -> Array:
    # 24 bits: no two keys of a row share what a narrower format would keep of them.
    low = values.integers(f"{label}/low", (rows, columns), 0, 127)
    return ((values.fine_bell(label, (rows, columns)) * 128 + low) * 2.0**-14).astype(np.float32)


def _few(label: str, rows: int, columns: int) -> Array:
    return values.integers(label, (rows, columns), -3, 3).astype(np.float32)


def _zeros(label: str, rows: int, columns: int) -> Array:
    # A quarter above 0, a quarter below, and between them +0.0 and -0.0, which are equal: the boundary lies among them.
    table = np.array([1, 2, -1, -2, 0.0, -0.0, 0.0, -0.0], np.float32)
    return table[values.integers(label, (rows, columns), 0, 7)]


def _clustered(label: str, rows: int, columns: int) -> Array:
    # Sign, exponent and the first seven bits of the significand are common.
    return (1 + values.integers(label, (rows, columns), 0, (1 << 16) - 1) * 2.0**-23).astype(np.float32)


def _bits(label: str, rows: int, columns: int) -> Array:
    # Every sign, exponent and significand but those of subnormals, infinities and NaN.
    sign = values.integers(f"{label}/sign", (rows, columns), 0, 1)
    exponent = values.integers(f"{label}/exponent", (rows, columns), 1, 254)
    significand = values.integers(label, (rows, columns), 0, (1 << 23) - 1)
    return (sign << 31 | exponent << 23 | significand).astype(np.uint32).view(np.float32)


def _monotone(label: str, rows: int, columns: int) -> Array:
    # Rising in even rows and falling in odd ones: all of the best lie at one end.
    rising = np.arange(columns, dtype=np.float32)
    return np.stack([rising if row % 2 == 0 else -rising for row in range(rows)])


SCORES: Mapping[str, Draw] = MappingProxyType(
    {"natural": _natural, "ties": _few, "zeros": _zeros, "clustered": _clustered, "bits": _bits, "monotone": _monotone}
)


@dataclass(frozen=True)
class SelectCase(SingleCall):
    """One call of index_select; NaN and +inf stand in every column that a row does not see."""

    id: str
    why: str
    hazards: tuple[str, ...]
    requests: Requests
    topk: int = 2048
    content: str = "natural"  # a row of SCORES
    padding_rows: int = 0
    page_size: int | None = None  # the batch is that of a paged cache, though none is passed
    ranges: bool = False
    causal: bool = True
    visible_nan: bool = False
    options: tuple[tuple[str, Any], ...] = ()  # sorted, out

    operator, format = "index_select", "f32"
    exact = True  # nothing is computed, so nothing rounds

    @property
    def phase(self) -> str:
        """`decode` or `prefill`, as Batch.phase has it."""
        return phase_of(self.requests)

    def build(self, seed: str = "") -> Call:
        """The call; `seed` draws other values of the same shapes."""
        name = f"{seed}{self.id}"
        rows = sum(lq for lq, _ in self.requests) + self.padding_rows
        lengths = tuple(lk for _, lk in self.requests)
        storage = paged(name, lengths, self.page_size, 0) if self.page_size else flat(lengths, 0)
        batch = batch_of(storage, name, self.requests, rows, self.ranges)
        options: dict[str, Any] = {"page_size": self.page_size, "causal": self.causal}
        fields: dict[str, Any] = {**batch, **options}
        seen = zip(*Batch(**fields).key_range(rows), strict=True)
        scores = self._scores(name, [(int(start), int(end)) for start, end in seen], max(lengths))
        return Call("index_select", {"scores": scores}, batch, {"topk": self.topk, **dict(self.options)}, options)

    def _scores(self, name: str, seen: list[tuple[int, int]], columns: int) -> Array:
        drawn = SCORES[self.content](f"{name}/scores", len(seen), columns)
        scores = np.empty_like(drawn)
        # A largest number and the unordered one: either is chosen, or breaks an order, where it is read.
        scores[:, ::2], scores[:, 1::2] = np.nan, np.inf
        for row, (start, end) in enumerate(seen):
            scores[row, start:end] = drawn[row, start:end]
            if self.content == "natural" and start < end:
                # The first and the last that the row sees are its best, so that one too few shows.
                scores[row, [start, end - 1]] = 2048, 4096
        if self.visible_nan:
            scores[0, seen[0][0]], scores[1, seen[1][0]] = np.nan, -np.inf
        return scores
