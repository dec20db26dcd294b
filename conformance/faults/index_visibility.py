"""Planted index faults of visibility: which keys a row sees. faults/index.py lists them with all others."""

from __future__ import annotations

from dataclasses import replace

from dsa_portable.batch import DECODE_ROWS
from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.faults.implementation import Array, LightningIndex


class CausalOneTooMany(LightningIndex):
    """A row sees the key behind its last one."""

    code, title = "I15", "causal mask one key too long"
    killed_by, rule = "index-e4m3-f32-f32-prefill-pow2", "visible"

    def causal_end(self, keys: int, rows: int, i: int) -> int:
        """One later."""
        return min(keys, super().causal_end(keys, rows, i) + 1)


class CausalOneTooFew(LightningIndex):
    """A row does not see its own key."""

    code, title = "I16", "causal mask one key too short"
    killed_by, rule = "index-e4m3-f32-f32-prefill-pow2", "certificate"

    def causal_end(self, keys: int, rows: int, i: int) -> int:
        """One earlier."""
        return super().causal_end(keys, rows, i) - 1


class CausalTopLeft(LightningIndex):
    """Row i sees i + 1 keys, whatever came before the chunk."""

    code, title = "I52", "causal mask aligned top-left"
    killed_by, rule = "index-e4m3-f32-f32-prefill-topk1", "certificate"

    def causal_end(self, keys: int, rows: int, i: int) -> int:
        """As if the context began with the chunk."""
        return min(keys, i + 1)


class DraftRowsSeeAll(LightningIndex):
    """In decode every row of a request sees every key, so that a draft token sees its successors."""

    code, title, stands_for = "I53", "no causal mask among a request's decode rows", "ATOM#2118"
    killed_by, rule = "index-e4m3-f32-f32-decode-paged64", "visible"

    def causal_end(self, keys: int, rows: int, i: int) -> int:
        """All keys where rows are few."""
        return keys if rows <= DECODE_ROWS else super().causal_end(keys, rows, i)


class ShortContextNotCausal(LightningIndex):
    """Where a request has no more keys than topk, everything is selected and the mask forgotten."""

    code, title, stands_for = "I54", "no causal mask where topk holds every key", "vmlx#429"
    killed_by, rule = "index-e4m3-f32-f32-decode-out", "tail"

    def span(self, call: Call, request: int, row: int) -> tuple[int, int]:
        """The whole of a short request."""
        length = self.length(call, request)
        return (0, length) if length <= call.options["topk"] else super().span(call, request, row)


class NegativeEndWraps(LightningIndex):
    """The end of a row before its request's first key is computed without a sign, and clamped to the last key."""

    code, title = "I55", "row before the first key sees every key"
    killed_by, rule = "index-e4m3-f32-f32-prefill-ragged", "tail"

    def causal_end(self, keys: int, rows: int, i: int) -> int:
        """Every key for a negative end."""
        end = super().causal_end(keys, rows, i)
        return keys if end < 0 else end


class EmptyRowSeesFirstKey(LightningIndex):
    """A row that sees nothing returns the first key, as a loop does that runs at least once."""

    code, title = "I56", "empty row returns a key"
    killed_by, rule = "index-e4m3-f32-f32-decode-range", "tail"

    def span(self, call: Call, request: int, row: int) -> tuple[int, int]:
        """At least one key of a request that has any."""
        start, end = super().span(call, request, row)
        return (0, min(1, self.length(call, request))) if start >= end else (start, end)


class NotCausalIgnored(LightningIndex):
    """causal=False changes nothing."""

    code, title = "I57", "causal=False ignored"
    killed_by, rule = "index-e4m3-f32-f32-prefill-not-causal", "visible"

    def span(self, call: Call, request: int, row: int) -> tuple[int, int]:
        """Causal."""
        return super().span(replace(call, batch_options={**call.batch_options, "causal": True}), request, row)


class RangeIgnored(LightningIndex):
    """key_start and key_end change nothing."""

    code, title = "I58", "key_start and key_end ignored"
    killed_by, rule = "index-e4m3-f32-f32-decode-range", "tail"

    def span(self, call: Call, request: int, row: int) -> tuple[int, int]:
        """Causal."""
        batch = {name: array for name, array in call.batch.items() if name not in ("key_start", "key_end")}
        return super().span(replace(call, batch=batch), request, row)


class RangeAndCausal(RangeIgnored):
    """Ranges are cut by the causal mask that they replace."""

    code, title = "I59", "key ranges cut by the causal mask"
    killed_by, rule = "index-e4m3-f32-f32-prefill-range", "visible"

    def span(self, call: Call, request: int, row: int) -> tuple[int, int]:
        """The overlap of both."""
        start, end = LightningIndex.span(self, call, request, row)
        return start, max(start, min(end, super().span(call, request, row)[1]))


class RangeEndInclusive(LightningIndex):
    """key_end is read as the last key's position."""

    code, title = "I60", "key_end read as inclusive"
    killed_by, rule = "index-e4m3-f32-f32-decode-range", "tail"

    def span(self, call: Call, request: int, row: int) -> tuple[int, int]:
        """One more at the end of a range."""
        start, end = super().span(call, request, row)
        return (start, min(self.length(call, request), end + 1)) if "key_end" in call.batch else (start, end)


class RangeStartAligned(LightningIndex):
    """key_start is rounded down to a multiple of four for loading, and the keys before it are not masked."""

    code, title = "I61", "key_start rounded down to a multiple of 4"
    killed_by, rule = "index-e4m3-f32-f32-decode-range", "visible"

    def span(self, call: Call, request: int, row: int) -> tuple[int, int]:
        """From the multiple on."""
        start, end = super().span(call, request, row)
        return (start // 4 * 4 if start < end else start), end


class RangeInFlatRows(LightningIndex):
    """Ranges are read as flat rows of k, as DeepGEMM has them, where positions in the request are passed."""

    code, title, stands_for = "I62", "key ranges off by the request's offset", "sglang#12583"
    killed_by, rule = "index-e4m3-f32-f32-prefill-range", "visible"

    def span(self, call: Call, request: int, row: int) -> tuple[int, int]:
        """Less the flat row at which the request begins."""
        start, end = super().span(call, request, row)
        offset = int(call.batch["cu_seqlens_k"][request]) if "key_start" in call.batch and "cu_seqlens_k" in call.batch else 0
        return max(0, start - offset), max(0, end - offset)


class PositionsFromRangeStart(LightningIndex):
    """Positions count from key_start, as the columns of compressed logits do."""

    code, title = "I63", "positions relative to key_start"
    killed_by, rule = "index-e4m3-f32-f32-decode-range", "visible"

    def pad(self, chosen: Array, topk: int) -> Array:
        """From the first visible position on."""
        return super().pad(chosen - self.start, topk)

    def span(self, call: Call, request: int, row: int) -> tuple[int, int]:
        """Remembered for the positions."""
        self.start, end = super().span(call, request, row)
        return self.start, end


FAULTS: tuple[type[LightningIndex], ...] = (
    CausalOneTooMany,
    CausalOneTooFew,
    CausalTopLeft,
    DraftRowsSeeAll,
    ShortContextNotCausal,
    NegativeEndWraps,
    EmptyRowSeesFirstKey,
    NotCausalIgnored,
    RangeIgnored,
    RangeAndCausal,
    RangeEndInclusive,
    RangeStartAligned,
    RangeInFlatRows,
    PositionsFromRangeStart,
)
