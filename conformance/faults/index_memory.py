"""Planted index faults of memory: where a key and its scale are read from. faults/index.py lists them with all others."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.faults.implementation import Array, LightningIndex

PAGE, TILE = 64, 128


class Unchecked(LightningIndex):
    """Not a fault by itself: what lies outside the table or the memory is read at their nearest end, as on a lucky day."""

    def page(self, call: Call, request: int, page: Array) -> Array:
        """Within the table."""
        return super().page(call, request, np.minimum(page, call.batch["block_table"].shape[1] - 1))

    def slots(self, call: Call, request: int, positions: Array) -> Array:
        """Within the memory."""
        k = call.arrays["k"]
        return np.clip(super().slots(call, request, positions), 0, k.size // k.shape[-1] - 1)


# --- pages and requests ---


class TableIgnored(LightningIndex):
    """Pages are read in the order of memory."""

    code, title = "I22", "block table ignored"
    killed_by, rule = "index-e4m3-f32-f32-decode-paged64", "certificate"

    def page(self, call: Call, request: int, page: Array) -> Array:
        """The same number."""
        return page


class FirstSlotOfPage(LightningIndex):
    """Every key of a page is read from the page's first slot."""

    code, title, stands_for = "I23", "first key of the page read for all of its keys", "aiter#5591"
    killed_by, rule = "index-e4m3-f32-f32-decode-paged64", "certificate"

    def slots(self, call: Call, request: int, positions: Array) -> Array:
        """Rounded down to the page."""
        size = int(call.batch_options["page_size"] or 1)
        return super().slots(call, request, positions // size * size)


class PageSizeAssumed(Unchecked):
    """Pages are taken to hold 64 keys."""

    code, title = "I80", "page size assumed to be 64"
    killed_by, rule = "index-e4m3-f32-f32-decode-paged128", "certificate"

    def slots(self, call: Call, request: int, positions: Array) -> Array:
        """As if they did."""
        size = call.batch_options["page_size"] and PAGE
        return super().slots(replace(call, batch_options={**call.batch_options, "page_size": size}), request, positions)


class TableStrideAssumed(Unchecked):
    """The block table's rows are taken to be as long as the longest request needs, where they are longer."""

    code, title = "I81", "row stride of the block table assumed"
    killed_by, rule = "index-e4m3-f32-f32-decode-paged64", "certificate"

    def page(self, call: Call, request: int, page: Array) -> Array:
        """From the flattened table."""
        width = -(-int(call.batch["seqlens_k"].max()) // int(call.batch_options["page_size"]))
        table = call.batch["block_table"].reshape(1, -1)
        return super().page(replace(call, batch={**call.batch, "block_table": table}), 0, request * width + page)


class OffsetWraps(LightningIndex):
    """A key whose element offset needs 32 bits is read as zeros; a small number stands here for 2^31."""

    code, title, stands_for = "I24", "32-bit element offset wraps", "aiter#4774"
    killed_by, rule = "index-e4m3-f32-f32-decode-paged64", "certificate"
    limit = 1 << 19

    def fetch(self, memory: Array, slots: Array) -> Array:
        """0 from the limit on."""
        return np.where((slots * memory.shape[-1] < self.limit)[:, None], super().fetch(memory, slots), np.float32(0))


class LastPageWraps(LightningIndex):
    """The last page of the memory is read at its beginning."""

    code, title, stands_for = "I25", "offset wraps in the last page", "aiter#5614"
    killed_by, rule = "index-e4m3-f32-f32-decode-paged64", "certificate"

    def page(self, call: Call, request: int, page: Array) -> Array:
        """0 for the last."""
        found = super().page(call, request, page)
        return np.where(found == len(call.arrays["k"]) - 1, 0, found)


class LengthsIgnored(Unchecked):
    """Every request is as long as the longest."""

    code, title = "I29", "ragged lengths ignored"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "visible"

    def length(self, call: Call, request: int) -> int:
        """The maximum."""
        return int(call.batch["seqlens_k"].max())


class LengthOfNeighbour(Unchecked):
    """A request ends where the one before it does."""

    code, title, stands_for = "I82", "lengths off by one request", "sglang#12583"
    killed_by, rule = "index-e4m3-f32-f32-decode-lengths", "tail"

    def length(self, call: Call, request: int) -> int:
        """The previous request's, and the last one's for the first."""
        return int(call.batch["seqlens_k"][request - 1])


class PrefixSumWithoutZero(Unchecked):
    """cu_seqlens_k is read as if its leading 0 were absent."""

    code, title = "I83", "keys read from the next request on"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "certificate"

    def slots(self, call: Call, request: int, positions: Array) -> Array:
        """The next request's."""
        return super().slots(call, request if "block_table" in call.batch else request + 1, positions)


class GapsIgnored(Unchecked):
    """Requests are taken to lie end to end, whatever cu_seqlens_k says."""

    code, title = "I84", "room between requests ignored"
    killed_by, rule = "index-e4m3-f32-f32-decode-lengths", "certificate"

    def slots(self, call: Call, request: int, positions: Array) -> Array:
        """Behind the lengths of those before."""
        if "block_table" in call.batch:
            return super().slots(call, request, positions)
        starts = np.concatenate([[0], np.cumsum(call.batch["seqlens_k"])])
        return super().slots(replace(call, batch={**call.batch, "cu_seqlens_k": starts}), request, positions)


class MaskedByProduct(Unchecked):
    """Scores behind a row's last key are multiplied by 0, up to the end of the tile: 0 * NaN is NaN and ranks first."""

    code, title, stands_for = "I85", "NaN read behind the last key", "flash-attention#1745"
    killed_by, rule = "index-e4m3-f32-f32-decode-paged64", "visible"

    def row(self, call: Call, request: int, row: int) -> tuple[Array, Array]:
        """The honest one over whole tiles."""
        start, end = self.span(call, request, row)
        topk, reach = int(call.options["topk"]), -(-end // TILE) * TILE
        keys, scale = self.keys(call, self.slots(call, request, np.arange(start, reach)))
        q, weights = (call.arrays[name][row].astype(np.float32) for name in ("q", "weights"))
        found = self.scores(q, keys, weights, scale)
        found[end - start :] *= 0
        found = np.nan_to_num(found, nan=np.inf)
        chosen = self.order(self.select(found, min(topk, end - start)))
        return self.pad(chosen + start, topk), np.pad(found[chosen], (0, topk - len(chosen)), constant_values=-np.inf)


# --- scales ---


class PageScaleStale(LightningIndex):
    """One page holds the scales that its slots had before they were written anew: here those of its other end."""

    code, title = "I31", "scales of one page are stale"
    killed_by, rule = "index-e4m3-f32-f32-decode-paged64", "certificate"

    def keys(self, call: Call, slots: Array) -> tuple[Array, Array]:
        """For the first request's first page."""
        if "block_table" not in call.batch:
            return super().keys(call, slots)
        size = int(call.batch_options["page_size"])
        stale = slots // size == call.batch["block_table"][0, 0]
        mirrored = slots // size * size + (size - 1 - slots % size)
        return super().keys(call, slots)[0], super().keys(call, np.where(stale, mirrored, slots))[1]


class ScaleOfTile(LightningIndex):
    """The index of a scale is aliased to 0 within its page, or tile of 64 flat keys."""

    code, title, stands_for = "I32", "first scale of the page used for all of its keys", "ATOM#1466"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "certificate"

    def keys(self, call: Call, slots: Array) -> tuple[Array, Array]:
        """Scales of the first slot."""
        size = int(call.batch_options["page_size"] or PAGE)
        return super().keys(call, slots)[0], super().keys(call, slots // size * size)[1]


class ScaleOfNeighbour(LightningIndex):
    """Every key has the scale of the key behind it."""

    code, title = "I86", "key scale of the neighbour"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "certificate"

    def keys(self, call: Call, slots: Array) -> tuple[Array, Array]:
        """Scales of the slots shifted by one."""
        return super().keys(call, slots)[0], super().keys(call, np.append(slots[1:], slots[:1]))[1]


# --- packed caches ---


class PlanarReadInterleaved(LightningIndex):
    """The cache with all values of a page before all of its scales is read token by token."""

    code, title, stands_for = "I87", "planar 132-byte cache read as interleaved", "aiter#5591"
    killed_by, rule = "index-e4m3-f32-f32-prefill-planar", "certificate"
    written, read = "idx_fp8_132_planar", "idx_fp8_132_interleaved"

    def keys(self, call: Call, slots: Array) -> tuple[Array, Array]:
        """By the other layout."""
        other = self.read if call.options["k_layout"] == self.written else call.options["k_layout"]
        return super().keys(replace(call, options={**call.options, "k_layout": other}), slots)


class InterleavedReadPlanar(PlanarReadInterleaved):
    """The cache with each token's scale behind its values is read as one that holds all values of a page first."""

    code, title, stands_for = "I88", "interleaved 132-byte cache read as planar", ""
    killed_by, rule = "index-e4m3-f32-f32-prefill-interleaved", "certificate"
    written, read = "idx_fp8_132_interleaved", "idx_fp8_132_planar"


FAULTS: tuple[type[LightningIndex], ...] = (
    TableIgnored,
    FirstSlotOfPage,
    PageSizeAssumed,
    TableStrideAssumed,
    OffsetWraps,
    LastPageWraps,
    LengthsIgnored,
    LengthOfNeighbour,
    PrefixSumWithoutZero,
    GapsIgnored,
    MaskedByProduct,
    PageScaleStale,
    ScaleOfTile,
    ScaleOfNeighbour,
    PlanarReadInterleaved,
    InterleavedReadPlanar,
)
