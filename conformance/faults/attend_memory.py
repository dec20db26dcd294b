"""Planted faults of what a key holds and of where it lies."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np

from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.faults.call_edits import (
    OTHER_ORDER,
    PAGE,
    Unchecked,
    memory_rows,
)
from dsa_portable.conformance.faults.implementation import Array, SparseAttend
from dsa_portable.conformance.judging.emulator import rounded
from dsa_portable.formats import Unpacked, unpack

# --- what a key holds ---


class ValuesOffset(SparseAttend):
    """The values are the last 512 columns of a key, not the first."""

    code, title = "A7", "values taken from the last 512 columns"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def values(self, kv: Array, value_dim: int) -> Array:
        """From the end."""
        return kv[:, -value_dim:]


class FirstTileScale(SparseAttend):
    """The scale of a key's first tile serves all of its tiles."""

    code, title, stands_for = "A25", "one tile's scale for all tiles", "ATOM#1466"
    killed_by, rule = "attend-v32_fp8_656_nsr-decode-flat", "bound"

    def tile_scales(self, scale: Array) -> Array:
        """The first."""
        return np.repeat(scale[:, :1], scale.shape[1], axis=1)


class ScalePowerOfTwo(SparseAttend):
    """Tile scales pass through e8m0 and lose their significand."""

    code, title, stands_for = "A55", "tile scales cut down to powers of two", "FlashMLA#184"
    killed_by, rule = "attend-v32_fp8_656_nsr_f32-decode-flat", "bound"

    def tile_scales(self, scale: Array) -> Array:
        """Without significand."""
        return np.asarray((scale.view(np.uint32) & np.uint32(0xFF800000)).view(np.float32))


class ScaleBfloat16(SparseAttend):
    """Tile scales are rounded to bfloat16."""

    code, title, stands_for = "A56", "tile scales in bfloat16", "FlashMLA on SM90"
    killed_by, rule = "attend-v32_fp8_656_nsr_f32-decode-paged128", "bound"

    def tile_scales(self, scale: Array) -> Array:
        """Rounded."""
        return rounded(scale, "bfloat16")


class NsrAsNrs(SparseAttend):
    """A cache of values, scales, rotated part is read as values, rotated part, scales."""

    code, title, stands_for = "A57", "656-byte cache read in the other order (nsr as nrs)", "FlashMLA's cache on Ascend"
    killed_by, rule = "attend-v32_fp8_656_nsr-decode-flat", "bound"
    order = "nsr"

    def parts(self, name: str, kv: Array) -> Unpacked:
        """From where the other layout has them."""
        found = super().parts(name, kv)
        if self.order not in name:
            return found
        other = unpack(OTHER_ORDER[name], kv)
        return found._replace(scale=other.scale, rope=other.rope)


class NrsAsNsr(NsrAsNrs):
    """A cache of values, rotated part, scales is read as values, scales, rotated part."""

    code, title, stands_for = "A58", "656-byte cache read in the other order (nrs as nsr)", "Ascend's cache by FlashMLA"
    killed_by, rule = "attend-ascend_656_nrs_int8-decode-flat", "bound"
    order = "nrs"


class SubnormalsFlushed(SparseAttend):
    """Subnormal float8 values are decoded as 0."""

    code, title, stands_for = "A78", "e4m3 subnormals of the cache decoded as 0", "decoders in software"

    def parts(self, name: str, kv: Array) -> Unpacked:
        """0 below 2^-6."""
        found = super().parts(name, kv)
        if found.values.dtype != ml_dtypes.float8_e4m3fn:
            return found
        bits = found.values.view(np.uint8)
        return found._replace(values=np.where(bits & 0x78, bits, bits & 0x80).view(ml_dtypes.float8_e4m3fn))


class Fnuz(SparseAttend):
    """float8_e4m3fn bytes are decoded as e4m3fnuz: half the value, and NaN for -0."""

    code, title, stands_for = "A59", "e4m3fn cache decoded as e4m3fnuz", "sglang#29479"
    killed_by, rule = "attend-v32_fp8_656_nsr-decode-flat", "bound"

    def parts(self, name: str, kv: Array) -> Unpacked:
        """The same bytes."""
        found = super().parts(name, kv)
        if found.values.dtype != ml_dtypes.float8_e4m3fn:
            return found
        return found._replace(values=found.values.view(ml_dtypes.float8_e4m3fnuz))


# --- where a key lies ---


class StalePage(SparseAttend):
    """The newest page of a request is read where the one before it lies."""

    code, title = "A24", "stale page: the last page read from the one before"
    killed_by, rule = "attend-bf16-decode-paged64", "bound"

    def page(self, call: Call, request: int, page: Array) -> Array:
        """One earlier for the last."""
        last = (self.length(call, request) - 1) // int(call.batch_options["page_size"])
        return super().page(call, request, np.where(page == last, np.maximum(page - 1, 0), page))


class TableIgnored(SparseAttend):
    """Pages are read in the order of memory."""

    code, title = "A60", "block table ignored"
    killed_by, rule = "attend-bf16-decode-paged64", "bound"

    def page(self, call: Call, request: int, page: Array) -> Array:
        """The same number."""
        return page


class NeighbourTable(Unchecked):
    """Pages are looked up in the next request's row of the table."""

    code, title = "A61", "block table of the neighbour request"
    killed_by, rule = "attend-bf16-decode-paged64", "bound"

    def page(self, call: Call, request: int, page: Array) -> Array:
        """One row later."""
        return super().page(call, (request + 1) % len(call.batch["block_table"]), page)


class PageSizeAssumed(Unchecked):
    """Pages are taken to hold 64 keys."""

    code, title = "A62", "page size assumed to be 64"
    killed_by, rule = "attend-bf16-decode-paged128", "bound"

    def slots(self, call: Call, request: int, positions: Array) -> Array:
        """As if they did."""
        size = call.batch_options["page_size"] and PAGE
        return super().slots(replace(call, batch_options={**call.batch_options, "page_size": size}), request, positions)


class PageSizeShifted(Unchecked):
    """Page and slot are found by shift and mask, as if the page size were a power of two."""

    code, title = "A74", "page size rounded down to a power of two"

    def slots(self, call: Call, request: int, positions: Array) -> Array:
        """By the bits of a position."""
        size = int(call.batch_options["page_size"] or 1)
        shift = size.bit_length() - 1
        return super().slots(call, request, (positions >> shift) * size + (positions & ((1 << shift) - 1)))


class TableStrideAssumed(Unchecked):
    """The block table's rows are taken to be as long as the longest request needs, where they are longer."""

    code, title = "A79", "row stride of the block table assumed"
    killed_by, rule = "attend-bf16-decode-paged64", "bound"

    def page(self, call: Call, request: int, page: Array) -> Array:
        """From the flattened table."""
        width = -(-int(call.batch["seqlens_k"].max()) // int(call.batch_options["page_size"]))
        table = call.batch["block_table"].reshape(1, -1)
        return super().page(replace(call, batch={**call.batch, "block_table": table}), 0, request * width + page)


class FirstSlotOfPage(SparseAttend):
    """Every key of a page is read from the page's first slot."""

    code, title, stands_for = "A63", "first key of the page read for all of its keys", "aiter#5591"
    killed_by, rule = "attend-bf16-decode-paged64", "bound"

    def slots(self, call: Call, request: int, positions: Array) -> Array:
        """Rounded down to the page."""
        size = int(call.batch_options["page_size"] or 1)
        return super().slots(call, request, positions // size * size)


class IndexAsSlot(SparseAttend):
    """An index is taken as a physical slot, and the block table is not asked."""

    code, title, stands_for = "A64", "index taken as a physical slot", "FlashMLA decode, SGLang"
    killed_by, rule = "attend-bf16-decode-paged64", "bound"

    def slots(self, call: Call, request: int, positions: Array) -> Array:
        """The index itself."""
        return positions if "block_table" in call.batch else super().slots(call, request, positions)


class IndexAsFlatRow(SparseAttend):
    """An index is taken as a row of all requests' keys."""

    code, title, stands_for = "A65", "index taken as a row of the flat keys", "FlashMLA prefill"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def slots(self, call: Call, request: int, positions: Array) -> Array:
        """The index itself."""
        return super().slots(call, request, positions) if "block_table" in call.batch else positions


class OffsetWraps(Unchecked):
    """The offset of a key's first number is kept in 32 bits."""

    code, title, stands_for = "A31", "32-bit element offset wraps", "aiter#5614, vllm#50576"
    killed_by, rule = "attend-v32_fp8_656_nsr-decode-big-offset", "bound"

    def slots(self, call: Call, request: int, positions: Array) -> Array:
        """From 2^31 on before the memory's begin."""
        width = call.arrays["kv"].shape[-1]
        offset = (super().slots(call, request, positions) * width).astype(np.int32).astype(np.int64)
        return np.asarray(offset // width % memory_rows(call))


class PageRounded(SparseAttend):
    """A request is taken to fill its last page."""

    code, title = "A66", "seqlens_k rounded up to whole pages"
    killed_by, rule = "attend-bf16-decode-paged64", "bound"

    def length(self, call: Call, request: int) -> int:
        """Whole pages."""
        size = int(call.batch_options["page_size"] or 1)
        return -(-super().length(call, request) // size) * size


class LengthFromOffsets(SparseAttend):
    """A request is taken to reach to where the next one begins."""

    code, title = "A67", "seqlens_k ignored: length taken from cu_seqlens_k"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def length(self, call: Call, request: int) -> int:
        """The distance of the beginnings."""
        if "cu_seqlens_k" not in call.batch:
            return super().length(call, request)
        return int(call.batch["cu_seqlens_k"][request + 1] - call.batch["cu_seqlens_k"][request])


class LongestForAll(Unchecked):
    """Every request is taken to be as long as the longest."""

    code, title = "A68", "ragged lengths ignored: the longest for all"
    killed_by, rule = "attend-bf16-decode-flat", "bound"

    def length(self, call: Call, request: int) -> int:
        """The maximum."""
        return int(call.batch["seqlens_k"].max())


FAULTS: tuple[type[SparseAttend], ...] = (
    ValuesOffset,
    FirstTileScale,
    ScalePowerOfTwo,
    ScaleBfloat16,
    NsrAsNrs,
    NrsAsNsr,
    SubnormalsFlushed,
    Fnuz,
    StalePage,
    TableIgnored,
    NeighbourTable,
    PageSizeAssumed,
    PageSizeShifted,
    TableStrideAssumed,
    FirstSlotOfPage,
    IndexAsSlot,
    IndexAsFlatRow,
    OffsetWraps,
    PageRounded,
    LengthFromOffsets,
    LongestForAll,
)
