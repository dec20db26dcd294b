"""Cases of lightning_index: what a row of the table becomes when it is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.arrays import NUMPY_DTYPES
from dsa_portable.batch import DECODE_ROWS
from dsa_portable.conformance.cases import values
from dsa_portable.conformance.cases.call import Call, SingleCall
from dsa_portable.conformance.cases.contents import CONTENTS, Content, Drawn
from dsa_portable.conformance.cases.storage import Storage, flat, paged, share
from dsa_portable.conformance.cases.surroundings import USUAL, Surroundings
from dsa_portable.contract import SHORT
from dsa_portable.formats import pack

Array: TypeAlias = np.ndarray[Any, Any]
Requests: TypeAlias = tuple[tuple[int, int], ...]  # (query rows, keys) of each

LONG = {short: name for name, short in SHORT.items()}
# How much larger a key around the causal boundary is: it nearly always ranks among the best, so that one too many or few shows.
BOUNDARY_BOOST = 8
# Powers of two by which the weights are multiplied, so that scores are of 1e-12 or of 1e17; float16 holds no such numbers.
MAGNITUDES = {"usual": (0, 0), "tiny": (-57, -8), "huge": (40, 8)}
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
# Ranges that end where int32 does, or begin below 0, in turns with those that are drawn.
END_RANGES = ((INT_MIN, INT_MAX), (0, INT_MAX), (INT_MIN, 5), (INT_MAX, INT_MAX), (INT_MAX, INT_MIN), (-7, 2100))


def phase_of(requests: Requests) -> str:
    """`decode` or `prefill`, as Batch.phase has it."""
    return "decode" if max((rows for rows, _ in requests), default=0) <= DECODE_ROWS else "prefill"


def batch_of(storage: Storage, name: str, requests: Requests, rows: int, ranges: bool, ends: bool = False) -> dict[str, Array]:
    """The batch's arrays; with `ranges`, windows that overrun both ends and cross causality, in some rows empty or reversed.

    `ends`: every other window has the ends of END_RANGES.
    """
    batch = dict(storage.batch)
    batch["cu_seqlens_q"] = np.concatenate([[0], np.cumsum([lq for lq, _ in requests])]).astype(np.int32)
    if ranges:
        longest = max((lk for _, lk in requests), default=0)
        start = values.integers(f"{name}/start", (rows,), -100, longest // 2)
        end = start + values.integers(f"{name}/width", (rows,), -10, longest)
        end[::7] = start[::7]
        if ends:
            special = np.array(END_RANGES)[np.arange(len(start[::2])) % len(END_RANGES)]
            start[::2], end[::2] = special[:, 0], special[:, 1]
        batch |= {"key_start": start.astype(np.int32), "key_end": end.astype(np.int32)}
    return batch


@dataclass(frozen=True)
class IndexCase(SingleCall):
    """One call of lightning_index; exact contents are exact in every legal arithmetic: zero tolerance."""

    id: str
    why: str
    hazards: tuple[str, ...]
    format: str
    requests: Requests
    heads: int = 64
    head_dim: int = 128
    topk: int = 2048
    content: str = "natural"  # a row of contents.CONTENTS
    power_of_two_scales: bool = False
    padding_rows: int = 0
    page_size: int | None = None
    shared_pages: int = 0
    gap: int = 0
    k_layout: str | None = None
    ranges: bool = False
    causal: bool = True
    visible_nan: bool = False
    options: tuple[tuple[str, Any], ...] = ()  # return_scores, sorted, out
    smoke: bool = False  # a case of the smoke list too
    magnitude: str = "usual"  # a row of MAGNITUDES
    visible_inf: bool = False  # most scores of the last request are -inf, and some of them must be chosen
    negative: bool = False  # every weight has the other sign: most scores are below 0
    range_ends: bool = False
    spare_pages: int = 2  # that nothing names, anywhere among the others
    twice: bool = False  # a request holds a page twice
    around: Surroundings = USUAL
    point: tuple[tuple[str, str], ...] = ()  # of axes.py, where the case is a row of the covering table

    operator, prefix = "lightning_index", "index"

    @property
    def phase(self) -> str:
        """`decode` or `prefill`, as Batch.phase has it."""
        return phase_of(self.requests)

    @property
    def exact(self) -> bool:
        """True where every product and partial sum is a small multiple of one power of two."""
        return CONTENTS[self.content].exact

    def build(self, seed: str = "") -> Call:
        """The call; `seed` draws other values of the same shapes."""
        name = f"{seed}{self.id}"
        rows = sum(lq for lq, _ in self.requests) + self.padding_rows
        lengths = tuple(lk for _, lk in self.requests)
        storage = flat(lengths, self.gap)
        if self.page_size:
            storage = paged(name, lengths, self.page_size, self.shared_pages, self.twice, self.spare_pages)
        operand, weight, scale = self.format.split("/")
        content, drawn = CONTENTS[self.content], partial(self._drawn, name, operand, weight, scale != "-")
        q = content.q(drawn(f"{name}/q", (rows, self.heads, self.head_dim)))
        weights = content.weights(drawn(f"{name}/weights", (rows, self.heads)))
        weights = weights * 2.0 ** MAGNITUDES[self.magnitude][weight == "f16"]
        if self.negative:
            weights = -weights
        keys, scales = self._keys(name, content, drawn, storage)
        if operand == "int8" and self.point and not content.exact:
            for numbers in (q, *keys):
                numbers[::4, ..., 0] = values.LOWEST_INT8
        if self.visible_nan:
            # Row 0 carries a NaN itself; position 1 of the last request is a NaN key that only its own rows see.
            weights[0, 0] = np.nan
            scales[-1][1] = np.nan
        if self.visible_inf:
            mine = slice(sum(lq for lq, _ in self.requests[:-1]), None)
            weights[mine] = -abs(weights[mine])
            scales[-1][np.arange(len(scales[-1])) % 4 > 0] = np.inf
        batch = batch_of(storage, name, self.requests, rows, self.ranges, self.range_ends)
        if self.around.neighbours:
            self._spoil(weights, keys, scales, operand)
        if self.ranges:
            self._poison_unseen(storage, batch, keys, scales, operand)
        if self.around.garbage:
            self._soil_padding(q, weights, batch, operand)
        arrays = {"q": values.cast(q, LONG[operand]), "weights": values.cast(weights, LONG[weight])}
        arrays |= self._stored(storage, keys, scales, operand, scale)
        return Call(self.operator, arrays, batch, self._options(), self._batch_options(), strides=self.around.strides)

    def reversed(self) -> IndexCase:
        """The case with its requests in reverse order."""
        return replace(self, requests=self.requests[::-1])

    def _spoil(self, weights: Array, keys: list[Array], scales: list[Array], operand: str) -> None:
        """NaN in the weights of one row, and in the last key of each request of several rows, which its last row alone sees."""
        several = [r for r, (lq, lk) in enumerate(self.requests) if lq > 1 and lk]
        for r in several:
            keys[r][-1], scales[r][-1] = 127 if operand == "int8" else np.nan, np.nan
        if several:
            weights[sum(lq for lq, _ in self.requests[: several[0]])] = np.nan

    def _soil_padding(self, q: Array, weights: Array, batch: dict[str, Array], operand: str) -> None:
        """NaN, and ranges of everything, in rows that belong to nobody."""
        first = int(batch["cu_seqlens_q"][-1])
        q[first:], weights[first:] = 127 if operand == "int8" else np.nan, np.nan
        if self.ranges:
            batch["key_start"][first:], batch["key_end"][first:] = INT_MIN, INT_MAX

    def _poison_unseen(
        self, storage: Storage, batch: dict[str, Array], keys: list[Array], scales: list[Array], operand: str
    ) -> None:
        """NaN in the keys that no row's range covers, of any request that holds them."""
        seen = np.zeros(storage.size, bool)
        for r, first in enumerate(batch["cu_seqlens_q"][:-1]):
            for row in range(first, batch["cu_seqlens_q"][r + 1]):
                seen[storage.rows[r][max(0, batch["key_start"][row]) : max(0, batch["key_end"][row])]] = True
        for key, scale, slots in zip(keys, scales, storage.rows, strict=True):
            key[~seen[slots]] = 127 if operand == "int8" else np.nan
            scale[~seen[slots]] = np.nan

    def _drawn(self, name: str, operand: str, weight: str, scaled: bool, label: str, shape: tuple[int, ...]) -> Drawn:
        return Drawn(label, shape, operand, weight, scaled, self.power_of_two_scales, f"{name}/common")

    def _keys(
        self, name: str, content: Content, drawn: Callable[[str, tuple[int, ...]], Drawn], storage: Storage
    ) -> tuple[list[Array], list[Array]]:
        keys, scales = [], []
        for r, (lq, lk) in enumerate(self.requests):
            key = content.key(drawn(f"{name}/k{r}", (lk, self.head_dim)))
            scale = drawn(f"{name}/k{r}/scale", (lk,))
            factor = content.scale(scale)
            if self.content == "natural" and self.causal:
                boundary = slice(max(0, lk - lq - 1), lk)
                (factor if scale.scaled else key)[boundary] *= BOUNDARY_BOOST
            if not scale.scaled:
                key, factor = key * factor[:, None], np.ones(lk)
            keys.append(key)
            scales.append(factor)
        return share(storage, keys), share(storage, scales)

    def _stored(self, storage: Storage, keys: list[Array], scales: list[Array], operand: str, scale: str) -> dict[str, Array]:
        """k and k_scale, with NaN (or for int8 the largest value under a NaN scale) in every place that must not be read."""
        stored_keys = [values.cast(key, LONG[operand]) for key in keys]
        k = storage.place(stored_keys, self.around.filler(NUMPY_DTYPES[LONG[operand]]), (self.head_dim,))
        if scale == "-":
            return {"k": k}
        stored_scales = [values.cast(factor, LONG[scale]) for factor in scales]
        k_scale = storage.place(stored_scales, self.around.filler(NUMPY_DTYPES[LONG[scale]]))
        return {"k": pack(self.k_layout, k, k_scale)} if self.k_layout else {"k": k, "k_scale": k_scale}

    def _batch_options(self) -> dict[str, Any]:
        return {"page_size": self.page_size, "causal": self.causal, **self.around.maxima(self.requests)}

    def _options(self) -> dict[str, Any]:
        return {"topk": self.topk, "k_layout": self.k_layout, **dict(self.options)}
