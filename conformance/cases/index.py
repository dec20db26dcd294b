"""Cases of lightning_index: what a row of the table becomes when it is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.arrays import NUMPY_DTYPES
from dsa_portable.batch import DECODE_ROWS
from dsa_portable.conformance.cases import values
from dsa_portable.conformance.cases.call import Call, SingleCall
from dsa_portable.conformance.cases.storage import Storage, flat, paged, share
from dsa_portable.formats import pack
from dsa_portable.signature import SHORT

Array: TypeAlias = np.ndarray[Any, Any]

LONG = {short: name for name, short in SHORT.items()}
# Per operand: the power of two that brings `bell` (and the heads' weighted sum) into the format's usual range.
OPERAND_SCALE = {"e4m3": 1.0, "int8": 0.25, "bf16": 2.0**-7, "f16": 2.0**-7, "f32": 2.0**-7}
WEIGHT_SCALE = {"e4m3": 2.0**-24, "int8": 2.0**-20, "bf16": 2.0**-20, "f16": 2.0**-20, "f32": 2.0**-20}
# Significand bits of the `cancel` weights: more than bfloat16 has, in float32 more than float16 and TF32 have.
CANCEL_BITS = {"f32": 11, "f16": 10, "bf16": 7}
# How much larger a key around the causal boundary is: it nearly always ranks among the best, so that one too many or few shows.
BOUNDARY_BOOST = 8


@dataclass(frozen=True)
class IndexCase(SingleCall):
    """One call of lightning_index. `lattice`, `cancel` and `plateau` are exact in every legal arithmetic: zero tolerance."""

    id: str
    why: str
    hazards: tuple[str, ...]
    format: str
    requests: tuple[tuple[int, int], ...]  # (query rows, keys) of each
    heads: int = 64
    head_dim: int = 128
    topk: int = 2048
    content: str = "natural"  # natural, clustered, codes, lattice, ties, cancel, plateau
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

    operator = "lightning_index"

    @property
    def phase(self) -> str:
        """`decode` or `prefill`, as Batch.phase has it."""
        return "decode" if max(rows for rows, _ in self.requests) <= DECODE_ROWS else "prefill"

    @property
    def exact(self) -> bool:
        """True where every product and partial sum is a small multiple of one power of two."""
        return self.content in ("lattice", "ties", "cancel", "plateau")

    def build(self, seed: str = "") -> Call:
        """The call; `seed` draws other values of the same shapes."""
        name = f"{seed}{self.id}"
        rows = sum(lq for lq, _ in self.requests) + self.padding_rows
        lengths = tuple(lk for _, lk in self.requests)
        storage = paged(name, lengths, self.page_size, self.shared_pages) if self.page_size else flat(lengths, self.gap)
        operand, weight, scale = self.format.split("/")
        q, weights = self._queries(name, rows, operand, weight)
        keys, scales = self._keys(name, storage, operand, scale)
        if self.visible_nan:
            # Row 0 carries a NaN itself; position 1 of the last request is a NaN key that only its own rows see.
            weights[0, 0] = np.nan
            scales[-1][1] = np.nan
        batch = self._batch(storage, name, rows)
        if self.ranges:
            self._poison_unseen(batch, keys, scales, operand)
        arrays = {"q": values.cast(q, LONG[operand]), "weights": values.cast(weights, LONG[weight])}
        arrays |= self._stored(storage, keys, scales, operand, scale)
        return Call("lightning_index", arrays, batch, self._options(), self._batch_options())

    def _poison_unseen(self, batch: dict[str, Array], keys: list[Array], scales: list[Array], operand: str) -> None:
        """NaN in the keys of a request that no row's range covers."""
        for r, (length, first) in enumerate(zip(batch["seqlens_k"], batch["cu_seqlens_q"], strict=False)):
            seen = np.zeros(length, bool)
            for row in range(first, batch["cu_seqlens_q"][r + 1]):
                seen[max(0, batch["key_start"][row]) : max(0, batch["key_end"][row])] = True
            keys[r][~seen] = 127 if operand == "int8" else np.nan
            scales[r][~seen] = np.nan

    def _queries(self, name: str, rows: int, operand: str, weight: str) -> tuple[Array, Array]:
        shape = (rows, self.heads, self.head_dim)
        if self.content == "lattice":
            q = values.integers(f"{name}/q", shape, -2, 2).astype(np.float64)
            sign = values.integers(f"{name}/sign", shape[:2], 0, 3)
            weights = np.where(sign == 0, -1.0, 1.0) * 2.0 ** values.integers(f"{name}/weights", shape[:2], -2, 1)
        elif self.content == "ties":
            # So few values that many keys share the score at the boundary.
            q = values.integers(f"{name}/q", shape, -1, 1).astype(np.float64)
            weights = 1.0 - 2 * values.integers(f"{name}/weights", shape[:2], 0, 1)
        elif self.content == "cancel":
            # Heads come in pairs with equal queries and weights a and d - a: the score is sum d * dot, d in the low bits of a.
            half = values.integers(f"{name}/q", (rows, self.heads // 2, self.head_dim), -1, 1)
            q = np.repeat(half, 2, axis=1).astype(np.float64)
            bits = CANCEL_BITS[weight]
            a = (1 << bits) + values.integers(f"{name}/weights", (rows, self.heads // 2), 0, (1 << bits) - 1)
            d = values.integers(f"{name}/difference", a.shape, 1, 3)
            weights = np.stack([a, d - a], axis=2).reshape(rows, self.heads) * 2.0**-bits
        elif self.content == "plateau":
            q = values.integers(f"{name}/q", shape, 0, 2).astype(np.float64)
            weights = values.bell(f"{name}/weights", shape[:2]) * 2.0**-10
        elif self.content == "codes":
            q = values.float8_codes(f"{name}/q", shape)
            weights = values.fine_bell(f"{name}/weights", shape[:2]) * WEIGHT_SCALE[operand]
        else:
            q = values.bell(f"{name}/q", shape) * OPERAND_SCALE[operand]
            # Three quarters of the weights are positive, so that a large key has a large score, yet signs matter.
            weights = (values.fine_bell(f"{name}/weights", shape[:2]) + 25000) * WEIGHT_SCALE[operand]
        return q, weights

    def _keys(self, name: str, storage: Storage, operand: str, scale: str) -> tuple[list[Array], list[Array]]:
        keys, scales = [], []
        for r, (lq, lk) in enumerate(self.requests):
            shape, label = (lk, self.head_dim), f"{name}/k{r}"
            if self.content == "lattice":
                key = values.integers(label, shape, -2, 2).astype(np.float64)
            elif self.content in ("cancel", "ties"):
                key = values.integers(label, shape, -1, 1).astype(np.float64)
            elif self.content == "plateau":
                # Every other key gets a score of either sign, which a scale of 0 then makes +0.0 or -0.0.
                key = -values.integers(label, shape, 0, 2).astype(np.float64)
                if scale != "-":
                    key[::2] = values.integers(f"{label}/mixed", key[::2].shape, -2, 2)
            elif self.content == "codes":
                key = values.float8_codes(label, shape)
            elif self.content == "clustered":
                # One common key, and only the last eight dimensions differ: all scores share their leading bits.
                common = values.bell(f"{name}/common", (1, self.head_dim)) * OPERAND_SCALE[operand]
                key = np.repeat(common, lk, axis=0)
                key[:, -8:] = values.bell(label, (lk, 8)) * OPERAND_SCALE[operand]
            else:
                key = values.bell(label, shape) * OPERAND_SCALE[operand]
            if scale == "-" or self.exact:
                # Powers of two that vary from key to key, so that a scale read from the neighbour shows in exact cases too.
                factor = 2.0 ** values.integers(f"{label}/scale", (lk,), -1, 1) if self.content == "lattice" else np.ones(lk)
                # A scale of 0 is legal: +0.0 or -0.0, whatever the key.
                if self.content in ("plateau", "lattice") and scale != "-":
                    factor[:: 2 if self.content == "plateau" else 5] = 0
            else:
                factor = values.scales(f"{label}/scale", (lk,), self.power_of_two_scales).astype(np.float64)
                if self.content == "clustered":
                    factor = np.full(lk, 0.7421875)
            if self.content == "natural" and self.causal:
                boundary = slice(max(0, lk - lq - 1), lk)
                (key if scale == "-" else factor)[boundary] *= BOUNDARY_BOOST
            if scale == "-":
                key, factor = key * factor[:, None], np.ones(lk)
            keys.append(key)
            scales.append(factor)
        return share(storage, keys), share(storage, scales)

    def _stored(self, storage: Storage, keys: list[Array], scales: list[Array], operand: str, scale: str) -> dict[str, Array]:
        """k and k_scale, with NaN (or for int8 the largest value under a NaN scale) in every place that must not be read."""
        poison = np.array(127 if operand == "int8" else np.nan)
        stored_keys = [values.cast(key, LONG[operand]) for key in keys]
        filler = poison.astype(np.float32).astype(NUMPY_DTYPES[LONG[operand]])
        k = storage.place(stored_keys, filler)
        if scale == "-":
            return {"k": k}
        stored_scales = [values.cast(factor, LONG[scale]) for factor in scales]
        k_scale = storage.place(stored_scales, np.array(np.nan, NUMPY_DTYPES[LONG[scale]]))
        return {"k": pack(self.k_layout, k, k_scale)} if self.k_layout else {"k": k, "k_scale": k_scale}

    def _batch(self, storage: Storage, name: str, rows: int) -> dict[str, Array]:
        batch = dict(storage.batch)
        batch["cu_seqlens_q"] = np.concatenate([[0], np.cumsum([lq for lq, _ in self.requests])]).astype(np.int32)
        if self.ranges:
            # Windows that overrun both ends of the request, cross causality, and are empty or reversed in some rows.
            longest = max(lk for _, lk in self.requests)
            start = values.integers(f"{name}/start", (rows,), -100, longest // 2)
            end = start + values.integers(f"{name}/width", (rows,), -10, longest)
            end[::7] = start[::7]
            batch |= {"key_start": start.astype(np.int32), "key_end": end.astype(np.int32)}
        return batch

    def _batch_options(self) -> dict[str, Any]:
        return {"page_size": self.page_size, "causal": self.causal}

    def _options(self) -> dict[str, Any]:
        return {"topk": self.topk, "k_layout": self.k_layout, **dict(self.options)}
