"""Cases of sparse_attend: what a row of the table becomes when it is built.

Only keys that some index names, and the shared pages, hold numbers; all others are NaN, or infinite.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance.cases import values
from dsa_portable.conformance.cases.call import Call, SingleCall
from dsa_portable.conformance.cases.lightning_index import LONG, phase_of
from dsa_portable.conformance.cases.storage import Storage, flat, paged, share
from dsa_portable.conformance.cases.surroundings import USUAL, Surroundings
from dsa_portable.formats import LAYOUTS, pack

Array: TypeAlias = np.ndarray[Any, Any]

# 192^-0.5 * mscale^2 with mscale = 0.1 * ln(40) + 1: what DeepSeek-V3.2 uses, and not the 576^-0.5 of common defaults.
V32_SCALE = 0.1352337788608801
# Query sizes that give logits of standard deviation 0.07, 3 and 35 over kv of standard deviation 1.2.
QUERY_SCALE = {"flat": 2.0**-13, "peaked": 0.75 * 2.0**-7, "hot": 2.0**-4, "above": 0.75 * 2.0**-7, "below": 0.75 * 2.0**-7}
# All logits of a row lie that far from 0, by a last dimension in which every key is 8; 0.1352 * 278 * 8 = 300.
OFFSET, KEY_OF_OFFSET = {"above": 278.0, "below": -278.0}, 8.0
INVALID = (-1, -(2**31), 2**31 - 1, -7, -123456)
# Most lie near the lse, where they matter, and need more than bfloat16 has.
SINKS = (-np.inf, 12.7, 11.3, np.inf, 13.9, 0.0, 100.0, 9.1)
# Where the largest logits lie, so that `sinks_near` has finite sinks about there.
SINKS_NEAR = {"hot": 120.0, "above": 300.0, "below": -300.0}
# `lengths_beyond`: topk_length below 0 and above topk too, in turns; None is topk, a fraction that of it.
LENGTHS_BEYOND = (-4, 1, 1 / 3, 2**31 - 1, 0, -(2**31), 2.0, 1.0)


@dataclass(frozen=True)
class AttendCase(SingleCall):
    """One call of sparse_attend. `mean` and `onehot` are exact in every legal arithmetic: outputs are compared bit for bit."""

    id: str
    why: str
    hazards: tuple[str, ...]
    format: str
    requests: tuple[tuple[int, int], ...]  # (query rows, keys) of each
    heads: int = 128
    dims: tuple[int, int] = (576, 512)
    topk: int = 2048
    logits: str = "peaked"  # flat, peaked, hot, mean, onehot
    padding_rows: int = 0
    page_size: int | None = None
    shared_pages: int = 0
    gap: int = 0
    holes: bool = True
    repeated: bool = False
    sink: bool = False
    topk_length: bool = False
    every_key: bool = False  # every key holds numbers, as the indices are not known when the case is built
    options: tuple[tuple[str, Any], ...] = ()  # return_lse, out
    smoke: bool = False  # a case of the smoke list too
    sinks_near: bool = False  # the largest logits, wherever they lie
    lengths_beyond: bool = False
    softmax_scale: float = V32_SCALE
    ranges: bool = False  # the batch has key ranges, which attention does not read
    spare_pages: int = 2  # that nothing names, anywhere among the others
    subset: bool = False  # every row names at most half of its request's keys
    slot_zero: bool = False  # position 0, flat row 0 and slot 0 are named by no row, and hold NaN
    twice: bool = False  # a request holds a page twice
    rows_alike: int = 0  # so many rows have queries of their own, the others theirs again: a call that is large alone; 0: all
    around: Surroundings = USUAL
    point: tuple[tuple[str, str], ...] = ()  # of axes.py, where the case is a row of the covering table

    operator, prefix = "sparse_attend", "attend"

    @property
    def phase(self) -> str:
        """`decode` or `prefill`, as Batch.phase has it."""
        return phase_of(self.requests)

    @property
    def exact(self) -> bool:
        """True where every partial sum is a small integer and every probability a power of two or 0."""
        return self.logits in ("mean", "onehot")

    def build(self, seed: str = "") -> Call:
        """The call; `seed` draws other values of the same shapes."""
        name = f"{seed}{self.id}"
        lengths = tuple(lk for _, lk in self.requests)
        storage = flat(lengths, self.gap)
        if self.page_size:
            storage = paged(name, lengths, self.page_size, self.shared_pages, self.twice, self.spare_pages)
        rows = sum(lq for lq, _ in self.requests) + self.padding_rows
        barred = [
            np.union1d([0], np.flatnonzero(slots == 0)) if self.slot_zero else np.empty(0, np.int64) for slots in storage.rows
        ]
        indices, length = self._indices(name, rows, barred)
        queries = self._queries(name, self.rows_alike or rows)
        if self.rows_alike:
            queries = queries[np.arange(rows) % self.rows_alike]
        spoilt = self._spoilt(queries, indices, length) if self.around.neighbours else {}
        arrays = {"q": queries, "kv": self._kv(name, storage, indices, length, barred, spoilt), "indices": indices}
        if self.sink:
            near = SINKS_NEAR.get(self.logits, 0.0) if self.sinks_near else 0.0
            head = np.arange(self.heads)
            # No two tiles of 8, 16 or 64 heads have the same sinks; the cases of the first lists stay as they are.
            turns = head + (head // 8 + head // 64 if self.point else 0)
            arrays["attn_sink"] = (np.array(SINKS, np.float32) + np.float32(near))[turns % len(SINKS)]
        if self.topk_length:
            arrays["topk_length"] = length.astype(np.int32)
        if self.around.garbage:
            self._soil_padding(arrays)
        options = {
            "softmax_scale": self.softmax_scale,
            "value_dim": self.dims[1],
            "kv_layout": self._layout,
            **dict(self.options),
        }
        batch = dict(storage.batch)
        batch["cu_seqlens_q"] = np.concatenate([[0], np.cumsum([lq for lq, _ in self.requests])]).astype(np.int32)
        if self.ranges:
            start = values.integers(f"{name}/start", (rows,), 0, 40).astype(np.int32)
            batch |= {"key_start": start, "key_end": start + np.int32(9)}
        batch_options = {"page_size": self.page_size, **self.around.maxima(self.requests)}
        return Call("sparse_attend", arrays, batch, options, batch_options, strides=self.around.strides)

    def reversed(self) -> AttendCase:
        """The case with its requests in reverse order."""
        return replace(self, requests=self.requests[::-1])

    def _spoilt(self, queries: Array, indices: Array, length: Array) -> dict[int, int]:
        """NaN in one row's q; request -> a position that one row alone names, whose key will be NaN."""
        found: dict[int, int] = {}
        row = 0
        for r, (lq, lk) in enumerate(self.requests):
            named = [np.unique(indices[i, : max(0, length[i])]) for i in range(row, row + lq)]
            positions, counts = np.unique(np.concatenate([np.empty(0, np.int64), *named]), return_counts=True)
            alone = positions[(counts == 1) & (positions >= 0) & (positions < lk)]
            if lq > 1 and len(alone):
                found[r] = int(alone[-1])
            if lq > 1 and not np.isnan(queries).any():
                queries[row] = np.nan
            row += lq
        return found

    def _soil_padding(self, arrays: dict[str, Array]) -> None:
        """NaN, and indices and lengths of everything, in rows that belong to nobody."""
        first = sum(lq for lq, _ in self.requests)
        arrays["q"][first:] = np.nan
        arrays["indices"][first:] = np.resize([0, *INVALID, 1, 2], self.topk)
        if self.topk_length:
            arrays["topk_length"][first:] = 2**31 - 1

    @property
    def _layout(self) -> str | None:
        return self.format if self.format in LAYOUTS else None

    @property
    def _dtype(self) -> str:
        return "bfloat16" if self._layout else LONG[self.format]

    def _queries(self, name: str, rows: int) -> Array:
        shape = (rows, self.heads, self.dims[0])
        if self.logits == "mean":
            q = np.zeros(shape)
        elif self.logits == "onehot":
            # Head h looks at rotated dimension h alone, which is large in one key: its probability is 1, every other exactly 0.
            q = np.zeros(shape)
            q[:, np.arange(self.heads), self.dims[1] + np.arange(self.heads) % (self.dims[0] - self.dims[1])] = 64.0
        else:
            q = self._bell(f"{name}/q", shape) * QUERY_SCALE[self.logits]
            if self.logits in OFFSET:
                q[..., -1] = OFFSET[self.logits]
        return values.cast(q, self._dtype)

    def _bell(self, name: str, shape: tuple[int, ...]) -> Array:
        """Numbers of standard deviation 148; float32 ones have 17 significant bits, so that products round as real ones do."""
        if self.format == "f32":
            return values.fine_bell(name, shape) * 2.0**-8
        return values.bell(name, shape).astype(np.float64)

    def _indices(self, name: str, rows: int, barred: list[Array]) -> tuple[Array, Array]:
        """int32 [rows, topk] and the leading entries that count; padding rows name real keys, which must change nothing."""
        indices = np.full((rows, self.topk), -1, np.int64)
        length = np.full(rows, self.topk)
        row = 0
        for r, (lq, lk) in enumerate(self.requests):
            for _ in range(lq):
                indices[row], length[row] = self._row(f"{name}/indices{row}", row, lk, barred[r])
                row += 1
        indices[row:] = 0
        return indices.astype(np.int32), length

    def _row(self, name: str, row: int, keys: int, barred: Array) -> tuple[Array, int]:
        count = min(keys, self.topk)
        if self.subset:
            count = min(count, max(1, keys // 2), keys)
        if self.logits == "mean":
            count = 1 << (count.bit_length() - 1) if count else 0
        chosen = values.subset(name, keys, count)
        if self.slot_zero:
            chosen = np.setdiff1d(chosen, barred)
            count = len(chosen)
        elif count > 1:
            # The first and the last key are always among them: both ends of the request, and of a page, are read.
            chosen = np.concatenate([[0, keys - 1], chosen[(chosen != 0) & (chosen != keys - 1)]])[:count]
        if self.repeated:
            # One entry in four repeats its neighbour.
            chosen[: len(chosen) // 2 * 2 : 4] = chosen[1 : len(chosen) // 2 * 2 : 4]
        entries = np.full(self.topk, -1, np.int64)
        length = self.topk
        if not self.holes:
            entries[:count] = chosen
        elif row % 3 == 0:
            # A whole tile of holes first, as a sliding or masked chunk leaves it.
            kept = chosen[: max(1, min(count, self.topk - 300))] if count and self.logits != "mean" else chosen
            entries[self.topk - len(kept) :] = kept
        elif row % 3 == 1:
            entries[:] = np.array([*INVALID, keys, keys + 5])[np.arange(self.topk) % 7]
            seated = count if self.logits == "mean" else min(count, self.topk * 3 // 4)
            seats = np.sort(values.subset(f"{name}/seats", self.topk, seated))
            entries[seats] = chosen[: len(seats)]
        else:
            entries[:count] = chosen
        if self.topk_length:
            length = (0, 1, self.topk // 3, self.topk)[row % 4]
        if self.lengths_beyond:
            beyond = LENGTHS_BEYOND[row % len(LENGTHS_BEYOND)]
            length = int(beyond * self.topk) if isinstance(beyond, float) else beyond
        return entries, length

    def _kv(
        self, name: str, storage: Storage, indices: Array, length: Array, barred: list[Array], spoilt: dict[int, int]
    ) -> Array:
        logical_parts: list[list[Array]] = []
        row = 0
        for r, (lq, lk) in enumerate(self.requests):
            mine = [indices[i, : max(0, length[i])] for i in range(row, row + lq)]
            used = np.unique(np.concatenate([np.empty(0, np.int64), *mine]))
            used = used[(used >= 0) & (used < lk)]
            if self.every_key:
                used = np.arange(lk)
            elif self.page_size:
                used = np.union1d(used, np.arange(min(lk, self.shared_pages * self.page_size)))
            if self.twice:
                used = np.flatnonzero(np.isin(storage.rows[r], storage.rows[r][used]))
            used = np.setdiff1d(used, [*barred[r], spoilt.get(r, -1)])
            logical_parts.append(self._logical(f"{name}/kv{r}", used, lk))
            row += lq
        empty = self._logical(f"{name}/kv", np.empty(0, np.int64), 0)
        parts = [share(storage, [part[i] for part in logical_parts]) for i in range(len(empty))]
        placed = [
            storage.place(part, self.around.filler(form.dtype), form.shape[1:]) for part, form in zip(parts, empty, strict=True)
        ]
        return pack(self._layout, *placed) if self._layout else placed[0]

    def _logical(self, name: str, used: Array, keys: int) -> list[Array]:
        """The request's kv [Lk, Dqk], or its values, tile scales and rotated part; NaN wherever `used` does not reach."""
        width, value = self.dims
        body = self._bell(name, (len(used), width))
        if self.exact:
            body = np.clip(np.rint(body * 2.0**-7), -2, 2)
            body[:, value:] = 0
        if self.logits == "onehot" and len(used):
            # Dimension d is large in one key that every row of the request names: the first and last key, in turns.
            for d in range(width - value):
                body[0 if d % 2 else -1, value + d] = 64.0
        if self.logits in OFFSET:
            body[:, -1] = KEY_OF_OFFSET * 2.0**7
        if self._layout is None:
            return [self._scatter(values.cast(body if self.exact else body * 2.0**-7, self._dtype), used, keys)]
        layout = LAYOUTS[self._layout]
        tiles = (len(used), value // layout.tile)
        small = layout.value_dtype.name == "int8"
        latent, scale, rope = body[:, :value], np.ones(tiles), body[:, value:]
        if not self.exact:
            latent, rope = latent * (0.25 if small else 1.0), rope * 2.0**-7
            scale = values.scales(f"{name}/scale", tiles, layout.power_of_two) * (2.0**-3 if small else 2.0**-5)
            if small and self.point:
                latent[::4, 0] = values.LOWEST_INT8
        parts = (values.cast(latent, layout.value_dtype.name), scale.astype(np.float32), values.cast(rope, "bfloat16"))
        return [self._scatter(part, used, keys) for part in parts]

    def _scatter(self, part: Array, used: Array, keys: int) -> Array:
        whole = np.empty((keys, *part.shape[1:]), part.dtype)
        whole[:] = self.around.filler(part.dtype)
        whole[used] = part
        return whole
