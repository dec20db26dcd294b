"""Cases of sparse_attend: what a row of the table becomes when it is built.

Only keys that some index names, and the shared pages, hold numbers; all others are NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.batch import DECODE_ROWS
from dsa_portable.conformance.cases import values
from dsa_portable.conformance.cases.call import Call, SingleCall
from dsa_portable.conformance.cases.lightning_index import LONG
from dsa_portable.conformance.cases.storage import Storage, flat, paged, share
from dsa_portable.formats import LAYOUTS, pack

Array: TypeAlias = np.ndarray[Any, Any]

# 192^-0.5 * mscale^2 with mscale = 0.1 * ln(40) + 1: what DeepSeek-V3.2 uses, and not the 576^-0.5 of common defaults.
V32_SCALE = 0.1352337788608801
# Query sizes that give logits of standard deviation 0.07, 3 and 35 over kv of standard deviation 1.2.
QUERY_SCALE = {"flat": 2.0**-13, "peaked": 0.75 * 2.0**-7, "hot": 2.0**-4}
INVALID = (-1, -(2**31), 2**31 - 1, -7, -123456)
# Most lie near the lse, where they matter, and need more than bfloat16 has.
SINKS = (-np.inf, 12.7, 11.3, np.inf, 13.9, 0.0, 100.0, 9.1)


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

    operator, prefix = "sparse_attend", "attend"

    @property
    def phase(self) -> str:
        """`decode` or `prefill`, as Batch.phase has it."""
        return "decode" if max(rows for rows, _ in self.requests) <= DECODE_ROWS else "prefill"

    @property
    def exact(self) -> bool:
        """True where every partial sum is a small integer and every probability a power of two or 0."""
        return self.logits in ("mean", "onehot")

    def build(self, seed: str = "") -> Call:
        """The call; `seed` draws other values of the same shapes."""
        name = f"{seed}{self.id}"
        lengths = tuple(lk for _, lk in self.requests)
        storage = paged(name, lengths, self.page_size, self.shared_pages) if self.page_size else flat(lengths, self.gap)
        rows = sum(lq for lq, _ in self.requests) + self.padding_rows
        indices, length = self._indices(name, rows)
        arrays = {"q": self._queries(name, rows), "kv": self._kv(name, storage, indices, length), "indices": indices}
        if self.sink:
            arrays["attn_sink"] = np.array(SINKS, np.float32)[np.arange(self.heads) % len(SINKS)]
        if self.topk_length:
            arrays["topk_length"] = length.astype(np.int32)
        options = {"softmax_scale": V32_SCALE, "value_dim": self.dims[1], "kv_layout": self._layout, **dict(self.options)}
        batch = dict(storage.batch)
        batch["cu_seqlens_q"] = np.concatenate([[0], np.cumsum([lq for lq, _ in self.requests])]).astype(np.int32)
        return Call("sparse_attend", arrays, batch, options, {"page_size": self.page_size})

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
        return values.cast(q, self._dtype)

    def _bell(self, name: str, shape: tuple[int, ...]) -> Array:
        """Numbers of standard deviation 148; float32 ones have 17 significant bits, so that products round as real ones do."""
        if self.format == "f32":
            return values.fine_bell(name, shape) * 2.0**-8
        return values.bell(name, shape).astype(np.float64)

    def _indices(self, name: str, rows: int) -> tuple[Array, Array]:
        """int32 [rows, topk] and the leading entries that count; padding rows name real keys, which must change nothing."""
        indices = np.full((rows, self.topk), -1, np.int64)
        length = np.full(rows, self.topk)
        row = 0
        for lq, lk in self.requests:
            for _ in range(lq):
                indices[row], length[row] = self._row(f"{name}/indices{row}", row, lk)
                row += 1
        indices[row:] = 0
        return indices.astype(np.int32), length

    def _row(self, name: str, row: int, keys: int) -> tuple[Array, int]:
        count = min(keys, self.topk)
        if self.logits == "mean":
            count = 1 << (count.bit_length() - 1) if count else 0
        chosen = values.subset(name, keys, count)
        if count > 1:
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
        return entries, length

    def _kv(self, name: str, storage: Storage, indices: Array, length: Array) -> Array:
        logical_parts: list[list[Array]] = []
        row = 0
        for r, (lq, lk) in enumerate(self.requests):
            mine = [indices[i, : length[i]] for i in range(row, row + lq)]
            used = np.unique(np.concatenate([np.empty(0, np.int64), *mine]))
            used = used[(used >= 0) & (used < lk)]
            if self.every_key:
                used = np.arange(lk)
            elif self.page_size:
                used = np.union1d(used, np.arange(min(lk, self.shared_pages * self.page_size)))
            logical_parts.append(self._logical(f"{name}/kv{r}", used, lk))
            row += lq
        parts = [share(storage, [part[i] for part in logical_parts]) for i in range(len(logical_parts[0]))]
        placed = [storage.place(part, _poison(part[0].dtype)) for part in parts]
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
        if self._layout is None:
            return [_scatter(values.cast(body if self.exact else body * 2.0**-7, self._dtype), used, keys)]
        layout = LAYOUTS[self._layout]
        tiles = (len(used), value // layout.tile)
        small = layout.value_dtype.name == "int8"
        latent, scale, rope = body[:, :value], np.ones(tiles), body[:, value:]
        if not self.exact:
            latent, rope = latent * (0.25 if small else 1.0), rope * 2.0**-7
            scale = values.scales(f"{name}/scale", tiles, layout.power_of_two) * (2.0**-3 if small else 2.0**-5)
        parts = (values.cast(latent, layout.value_dtype.name), scale.astype(np.float32), values.cast(rope, "bfloat16"))
        return [_scatter(part, used, keys) for part in parts]


def _poison(dtype: Any) -> Array:
    return np.array(127 if dtype == np.int8 else np.nan).astype(np.float32).astype(dtype)


def _scatter(part: Array, used: Array, keys: int) -> Array:
    whole = np.empty((keys, *part.shape[1:]), part.dtype)
    whole[:] = _poison(part.dtype)
    whole[used] = part
    return whole
