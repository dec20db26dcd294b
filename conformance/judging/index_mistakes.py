"""Named mistakes of lightning_index: a row of the selection told again with one stage changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from dsa_portable.batch import DECODE_ROWS
from dsa_portable.conformance.judging import bounds
from dsa_portable.conformance.judging.accumulator import rounded
from dsa_portable.conformance.judging.mistake import HONEST, Mistake, Row
from dsa_portable.formats import unpack
from dsa_portable.profile import Profile

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Scored:
    """What a row sees and how it ranks: positions start .. start+n-1, their scores, and by what they are ranked."""

    start: int
    scores: Array
    ranked: Array
    bounded: Callable[[], Array]

    @cached_property
    def bound(self) -> Array:
        """Of the scores; dear, and asked for by those alone that come near."""
        return self.bounded()


@dataclass(frozen=True)
class Chosen:
    """The row as it is returned: entries and scores [topk], and the places among the scored ones that they name."""

    indices: Array
    scores: Array
    places: Array
    of: Array  # [topk], whose score stands there; -1: none
    scored: Scored


@dataclass(frozen=True)
class _Operands:
    start: int
    q: Array
    weights: Array
    scale: Array
    keys: Array
    dots: Array  # [H, n]
    positive: Array

    @cached_property
    def magnitudes(self) -> Array:
        """|q|.|k|"""
        return np.asarray(abs(self.q) @ abs(self.keys).T)


# Stages that the operands do not depend on.
LATER = ("", "weights", "scales", "formula", "scores", "ranked", "topk", "chosen", "written", "returned")


def choose(row: Row, mistake: Mistake, profile: Profile, exact: bool) -> Chosen:
    """The row under a mistake of a stage before `returned`."""
    if mistake.stage == "row":
        row = mistake.change(row, row)
    operands = _honest_operands(row) if mistake.stage in LATER else _operands(row, mistake)
    weights, scale = mistake.at(row, "weights", operands.weights), mistake.at(row, "scales", operands.scale)
    total = mistake.change(row, (weights, operands.dots)) if mistake.stage == "formula" else weights @ operands.positive
    scores = mistake.at(row, "scores", total * scale)

    def bounded() -> Array:
        return bounds.score_bound(
            profile,
            scores,
            abs(weights) @ abs(operands.dots) * abs(scale),
            abs(weights) @ operands.magnitudes * abs(scale),
            heads=len(weights),
            dim=operands.q.shape[1],
            dots_exact=row.call.arrays["q"].dtype == np.int8 and profile.accumulator.bits >= 24,
            exact=exact,
        )

    ranked = mistake.at(row, "ranked", np.where(np.isnan(scores), -np.inf, scores))
    topk = int(mistake.at(row, "topk", row.call.options["topk"]))
    scored = Scored(operands.start, scores, ranked, bounded)
    best = mistake.change(row, (ranked, topk)) if mistake.stage == "chosen" else np.argsort(-ranked, kind="stable")[:topk]
    return mistake.at(row, "written", written(row, scored, np.sort(best)))  # type: ignore[no-any-return]


def nothing(row: Row, mistake: Mistake) -> Chosen:
    """A row that belongs to no request, and so sees nothing."""
    none = np.empty(0)
    return mistake.at(row, "written", written(row, Scored(0, none, none, lambda: none), none.astype(np.int64)))  # type: ignore[no-any-return]


def written(row: Row, scored: Scored, places: Array) -> Chosen:
    """Entries in the order of these places, and a tail of -1."""
    topk = int(row.call.options["topk"])
    places = places[:topk]
    indices, of, scores = np.full(topk, -1, np.int64), np.full(topk, -1, np.int64), np.full(topk, -np.inf)
    indices[: len(places)], of[: len(places)], scores[: len(places)] = places + scored.start, places, scored.scores[places]
    return Chosen(indices, scores, places, of, scored)


def _honest_operands(row: Row) -> _Operands:
    if "operands" not in row.memo:
        row.memo["operands"] = _operands(row, HONEST)
    found: _Operands = row.memo["operands"]
    return found


def _operands(row: Row, mistake: Mistake) -> _Operands:
    call = row.call
    length = int(mistake.at(row, "context", row.context))
    start, end = 0, max(0, length - (row.last - row.row) + 1)
    if "key_start" in call.batch:
        start, end = (min(max(int(call.batch[name][row.row]), 0), length) for name in ("key_start", "key_end"))
    elif not call.batch_options.get("causal", True):
        end = length
    start, end = mistake.at(row, "span", (start, max(start, end)))
    seen = np.arange(start, max(start, end))
    slots = mistake.change(row, seen) if mistake.stage == "slots" else row.slots(seen)
    name, k, k_scale = call.options["k_layout"], call.arrays["k"], call.arrays.get("k_scale")
    if name is not None:
        k, k_scale, _ = unpack(mistake.at(row, "layout", name), k)
    k = k.reshape(-1, k.shape[-1])
    keys = mistake.at(row, "keys", k[slots.clip(0, len(k) - 1)])
    scale = np.ones(len(k), np.float32) if k_scale is None else k_scale.reshape(-1)
    where = mistake.change(row, seen) if mistake.stage == "scale slots" else slots
    q = mistake.at(row, "q", call.arrays["q"][row.row].astype(np.float64))
    keys = mistake.at(row, "key values", keys.astype(np.float64))
    dots = q @ keys.T
    return _Operands(
        int(start),
        q,
        call.arrays["weights"][row.row].astype(np.float64),
        scale[where.clip(0, len(scale) - 1)].astype(np.float64),
        keys,
        dots,
        np.maximum(dots, 0),
    )


# --- what a stage becomes ---------------------------------------------------------------------------------------------------


def _bf16(values: Array) -> Array:
    return rounded(values, "bfloat16").astype(np.float64)


def _f16(values: Array) -> Array:
    return rounded(values, "float16").astype(np.float64)


def _powers_of_two(scale: Array) -> Array:
    return (scale.astype(np.float32).view(np.uint32) & 0xFF800000).view(np.float32).astype(np.float64)


def _without_head(head: int) -> Any:
    return lambda row, w: np.where(np.arange(len(w)) == head, 0, w)


def _end(change: Any) -> Any:
    """The end of a causal row's span; rows of key ranges stay as they are."""

    def span(row: Row, found: tuple[int, int]) -> tuple[int, int]:
        if "key_start" in row.call.batch or not row.call.batch_options.get("causal", True):
            return found
        return found[0], max(0, min(row.context, change(row, row.context - (row.last - row.row) + 1)))

    return span


def _key_range(change: Any) -> Any:
    """The key range of a row is (start, end) of `change(row, start, end)`."""

    def span(row: Row, found: tuple[int, int]) -> tuple[int, int]:
        if "key_start" not in row.call.batch:
            return found
        start, end = change(row, *(int(row.call.batch[name][row.row]) for name in ("key_start", "key_end")))
        start = min(max(start, 0), row.context)
        return start, max(start, min(max(end, 0), row.context))

    return span


def _not_causal_ignored(row: Row, span: tuple[int, int]) -> tuple[int, int]:
    plain = "key_start" not in row.call.batch and not row.call.batch_options.get("causal", True)
    return (0, row.visible) if plain else span


def _fewer(n: int) -> Any:
    return lambda row, found: np.argsort(-found[0], kind="stable")[: max(0, found[1] - n)]


def _first_positions(row: Row, found: tuple[Array, int]) -> Array:
    return np.arange(min(len(found[0]), found[1]))


def _highest(row: Row, found: tuple[Array, int]) -> Array:
    return np.asarray(np.argsort(found[0], kind="stable")[::-1][: found[1]])


def _best(found: tuple[Array, int]) -> Array:
    return np.argsort(-found[0], kind="stable")[: found[1]]


def _at_threshold_first(row: Row, found: tuple[Array, int]) -> Array:
    ranked, topk = found
    return np.flatnonzero(ranked >= ranked[_best(found)].min(initial=np.inf))[:topk]


def _threshold_dropped(row: Row, found: tuple[Array, int]) -> Array:
    ranked, best = found[0], _best(found)
    return np.asarray(best[(ranked[best] > ranked[best[-1:]]) | (best == best[-1:])])


def _pads_first(row: Row, found: tuple[Array, int]) -> Array:
    best = _best(found)
    return best[~(found[0][best] < 0)]


def _candidates(room: int) -> Any:
    """A buffer of candidates for the threshold's bucket of float16's leading 8 bits holds so many, or lacks so many."""

    def change(row: Row, found: tuple[Array, int]) -> Array:
        ranked, topk = found
        if len(ranked) <= topk:
            return np.arange(len(ranked))
        bits = ranked.astype(np.float16).view(np.int16)
        bucket = np.where(bits < 0, bits ^ 0x7FFF, bits) >> 8
        threshold = np.sort(bucket)[-topk]
        above, near = np.flatnonzero(bucket > threshold), np.flatnonzero(bucket == threshold)[:room]
        return np.append(above, near[np.argsort(-ranked[near], kind="stable")[: topk - len(above)]])

    return change


def _tail(value: int) -> Any:
    """What stands behind the entries."""

    def change(row: Row, chosen: Chosen) -> Chosen:
        behind = np.arange(len(chosen.indices)) >= len(chosen.places)
        return replace(chosen, indices=np.where(behind, value, chosen.indices))

    return change


def _repeated_tail(row: Row, chosen: Chosen) -> Chosen:
    count = len(chosen.places)
    return _tail(int(chosen.indices[count - 1]) if count else -1)(row, chosen)  # type: ignore[no-any-return]


def _score_tail(row: Row, chosen: Chosen) -> Chosen:
    behind = np.arange(len(chosen.indices)) >= len(chosen.places)
    return replace(chosen, scores=np.where(behind, np.nan, chosen.scores))


def _relative(row: Row, chosen: Chosen) -> Chosen:
    return replace(chosen, indices=np.where(chosen.indices >= 0, chosen.indices - chosen.scored.start, -1))


def _by_score(row: Row, chosen: Chosen) -> Chosen:
    ranked = chosen.scored.ranked
    return written(row, chosen.scored, chosen.places[np.argsort(-ranked[chosen.places], kind="stable")])


def _scores_by_score(row: Row, chosen: Chosen) -> Chosen:
    other = _by_score(row, chosen)
    return replace(chosen, scores=other.scores, of=other.of)


def _first_twice(row: Row, chosen: Chosen) -> Chosen:
    ranked = chosen.scored.ranked[chosen.places]
    if not len(ranked):
        return chosen
    best = chosen.places[np.argsort(-ranked, kind="stable")]
    return written(row, chosen.scored, np.sort(np.append(best[:-1], best[:1])))


def _nothing(row: Row, chosen: Chosen) -> Chosen:
    return written(row, chosen.scored, chosen.places[:0])


def _last_rows_dropped(row: Row, chosen: Chosen) -> Chosen:
    count = row.last - row.first
    return _nothing(row, chosen) if count > 16 and row.row >= row.last - count % 16 else chosen


def _neighbour(row: Row, _: Any) -> Row:
    return row.of(min(row.first + (row.row - row.first ^ 1), row.last - 1), row.request)


def _first_row(row: Row, _: Any) -> Row:
    return row.of(row.first, row.request) if row.last - row.first <= DECODE_ROWS else row


def _one_for_page(row: Row, seen: Array) -> Array:
    slots = row.slots(seen)
    return np.asarray(slots - slots % (row.page_size if row.paged else 64))


def _last_page_wraps(row: Row, seen: Array) -> Array:
    if not row.paged:
        return row.slots(seen)
    page, offset = np.divmod(row.slots(seen), row.page_size)
    return page % max(1, len(row.call.arrays["k"]) - 1) * row.page_size + offset


def _table_stride(row: Row, seen: Array) -> Array:
    if not row.paged:
        return row.slots(seen)
    pages, offsets = np.divmod(seen, row.page_size)
    flat = row.table.reshape(-1)
    at = row.request * -(-int(row.lengths.max()) // row.page_size) + pages
    return np.asarray(flat[np.clip(at, 0, len(flat) - 1)] * row.page_size + offsets)


def _next_base(row: Row, seen: Array) -> Array:
    return row.slots(seen) if row.paged else int(row.call.batch["cu_seqlens_k"][row.request + 1]) + seen


def _packed_base(row: Row, seen: Array) -> Array:
    return row.slots(seen) if row.paged else int(row.lengths[: row.request].sum()) + seen


def _other_layout(row: Row, name: str) -> str:
    swapped = {"planar": "interleaved", "interleaved": "planar"}
    kind = name.rsplit("_", 1)[-1]
    return name.replace(kind, swapped.get(kind, kind))


def _as_fnuz(row: Row, keys: Array) -> Array:
    return keys.view(ml_dtypes.float8_e4m3fnuz) if keys.dtype == ml_dtypes.float8_e4m3fn else keys


def _weights_stride(row: Row, weights: Array) -> Array:
    flat = row.call.arrays["weights"].reshape(-1)
    return flat[(row.row * 64 + np.arange(len(weights))) % len(flat)].astype(np.float64)


def _swizzled(row: Row, q: Array) -> Array:
    return q if q.shape[1] == 128 else q[:, np.arange(q.shape[1]) ^ 16]


# --- what can be said of a row that was returned, whatever else was chosen: `change(chosen, returned)` is what it should be --


def _some_missing(row: Row, found: tuple[Chosen, Array]) -> Array:
    """Some of the best, and nothing in the place of the others."""
    chosen, got = found
    kept = got[got != -1]
    fewer = 0 < len(kept) < len(chosen.places) and np.isin(kept, chosen.indices).all() and len(np.unique(kept)) == len(kept)
    return got if fewer else chosen.indices


def _tail_not_written(row: Row, found: tuple[Chosen, Array]) -> Array:
    chosen, got = found
    behind = np.arange(len(got)) >= len(chosen.places)
    nonsense = behind.any() and ((got[behind] < -1) | (got[behind] >= row.context)).all()
    return np.where(behind, got, chosen.indices) if nonsense else chosen.indices


def _some_repeated(row: Row, found: tuple[Chosen, Array]) -> Array:
    """Only keys of the best, some of them more than once."""
    chosen, got = found
    kept = got[: len(chosen.places)]
    same = (kept != -1).all() and np.isin(kept, chosen.indices).all() and len(np.unique(kept)) < len(kept)
    return got if same else chosen.indices


# What is said where the case cannot tell the mistakes of a kind apart.
RELU = "ReLU is missing, or comes after the sum over heads"
SIXTEEN = "weights, dot products, scales or scores are rounded to 16 bits, undeclared"
FEWER = "fewer entries than the best topk, and nothing in the place of the others"
TAIL = "the tail behind the entries is not -1"
REPEATED = "entries are repeated where others belong"
VISIBLE = "keys beyond those that the row sees are looked at, or some that it sees are not"
ELSEWHERE = "keys are read from slots that are not theirs"
LAST_KEYS = "the last keys are lost"
TIES = "ties do not go to the lowest position"

# fmt: off
INDEX: tuple[Mistake, ...] = (
    # --- the formula ---
    Mistake("no ReLU", "ReLU is missing", "formula", lambda row, x: x[0] @ x[1], (RELU,)),
    Mistake("abs for ReLU", "an absolute value stands for ReLU", "formula", lambda row, x: x[0] @ abs(x[1])),
    Mistake("late ReLU", "ReLU comes after the sum over heads", "formula", lambda row, x: np.maximum(x[0] @ x[1], 0), (RELU,)),
    Mistake("weights dropped", "the head weights are dropped", "weights", lambda row, w: np.ones_like(w)),
    Mistake("weights abs", "the head weights enter as absolute values", "weights", lambda row, w: abs(w)),
    Mistake("upper heads", "the upper half of the heads is dropped", "weights", lambda row, w: np.where(np.arange(len(w)) < len(w) // 2, w, 0)),
    Mistake("lower heads", "the lower half of the heads is dropped", "weights", lambda row, w: np.where(np.arange(len(w)) < len(w) // 2, 0, w)),
    *(Mistake(f"head {h}", f"head {h} is dropped", "weights", _without_head(h)) for h in range(64)),
    Mistake("last dimension", "the last dimension is dropped", "q", lambda row, q: np.where(np.arange(q.shape[1]) == q.shape[1] - 1, 0, q)),
    Mistake("upper dimensions", "the upper half of the dimensions is dropped", "q", lambda row, q: np.where(np.arange(q.shape[1]) < q.shape[1] // 2, q, 0)),
    # --- precision that was not declared ---
    Mistake("weights bfloat16", "the head weights are rounded to bfloat16", "weights", lambda row, w: _bf16(w), (SIXTEEN,)),
    Mistake("weights float16", "the head weights are rounded to float16", "weights", lambda row, w: _f16(w), (SIXTEEN,)),
    Mistake("dots float16", "dot products pass through float16, unscaled", "formula", lambda row, x: x[0] @ np.maximum(_f16(x[1]), 0)),
    Mistake("dots bfloat16", "dot products are rounded to bfloat16", "formula", lambda row, x: x[0] @ np.maximum(_bf16(x[1]), 0), (SIXTEEN,)),
    Mistake("scores bfloat16", "scores are rounded to bfloat16", "scores", lambda row, s: _bf16(s), (SIXTEEN,)),
    Mistake("scores float16", "scores are rounded to float16", "scores", lambda row, s: _f16(s), (SIXTEEN,)),
    # --- scales ---
    Mistake("scale dropped", "the key scale is dropped", "scales", lambda row, s: np.ones_like(s)),
    Mistake("scale 0 is 1", "a key scale of 0 is read as 1", "scales", lambda row, s: np.where(s == 0, 1, s)),
    Mistake("scale 2^n", "key scales are cut to powers of two", "scales", lambda row, s: _powers_of_two(s)),
    Mistake("scale bfloat16", "key scales are rounded to bfloat16", "scales", lambda row, s: _bf16(s), (SIXTEEN,)),
    Mistake("scale of the next", "the key scale is that of the next key", "scales", lambda row, s: np.roll(s, -1)),
    Mistake("scale of the one before", "the key scale is that of the key before", "scales", lambda row, s: np.roll(s, 1)),
    Mistake("scale of the page", "the first scale of a page is used for all of its keys", "scale slots", _one_for_page),
    # --- operands ---
    Mistake("fnuz", "e4m3fn keys are decoded as e4m3fnuz", "keys", _as_fnuz),
    Mistake("clip 240", "float8 operands saturate at 240", "q and key values", lambda row, x: x.clip(-240, 240)),
    Mistake("subnormals", "float8 subnormals of the keys are read as 0", "key values", lambda row, k: np.where(abs(k) < 2.0**-6, 0, k)),
    Mistake("swizzle", "the swizzle is that of 128 dimensions", "q", _swizzled),
    Mistake("weights stride", "the weights' rows are taken to hold 64 heads", "weights", _weights_stride),
    # --- visibility ---
    Mistake("causal + 1", "the causal mask is one key too long", "span", _end(lambda row, end: end + 1), (VISIBLE,)),
    Mistake("causal - 1", "the causal mask is one key too short", "span", _end(lambda row, end: end - 1), (VISIBLE,)),
    Mistake("causal top-left", "the causal mask is aligned top-left", "span", _end(lambda row, end: row.row - row.first + 1), (VISIBLE,)),
    Mistake("no causal", "there is no causal mask", "span", _end(lambda row, end: row.context), (VISIBLE,)),
    Mistake("no causal in decode", "there is no causal mask among a request's decode rows", "span", _end(lambda row, end: row.context if row.last - row.first <= DECODE_ROWS else end), (VISIBLE,)),
    Mistake("no causal to topk", "there is no causal mask where topk holds every key", "span", _end(lambda row, end: row.context if row.context <= row.call.options["topk"] else end), (VISIBLE,)),
    Mistake("row before first key", "a row before the first key sees every key", "span", _end(lambda row, end: row.context if end < 0 else end), (VISIBLE,)),
    Mistake("empty row's key", "a row that sees nothing returns a key", "span", lambda row, s: s if s[0] < s[1] else (0, min(1, row.context)), (VISIBLE,)),
    Mistake("causal=False ignored", "causal=False is ignored", "span", _not_causal_ignored, (VISIBLE,)),
    Mistake("key range ignored", "key_start and key_end are ignored", "span", lambda row, s: (0, row.visible) if "key_start" in row.call.batch else s, (VISIBLE,)),
    Mistake("key range causal", "key ranges are cut by the causal mask", "span", _key_range(lambda row, start, end: (start, min(end, row.visible))), (VISIBLE,)),
    Mistake("key_end inclusive", "key_end is read as inclusive", "span", _key_range(lambda row, start, end: (start, end + 1)), (VISIBLE,)),
    Mistake("key_end - 1", "key_end is one too low", "span", _key_range(lambda row, start, end: (start, end - 1)), (VISIBLE,)),
    Mistake("key_start + 1", "key_start is one too high", "span", _key_range(lambda row, start, end: (start + 1, end)), (VISIBLE,)),
    Mistake("key_start by 4", "key_start is rounded down to a multiple of 4", "span", lambda row, s: (s[0] // 4 * 4, s[1]) if s[0] < s[1] else s, (VISIBLE,)),
    Mistake("key range by offset", "key ranges are off by the request's offset", "span", _key_range(lambda row, start, end: (start - row.base, end - row.base)), (VISIBLE,)),
    Mistake("relative", "positions count from key_start", "written", _relative, (VISIBLE,)),
    # --- selection ---
    *(Mistake(f"{n} too few", f"{n} results too few are returned", "chosen", _fewer(n), (FEWER,)) for n in (1, 16, 32, 64, 128)),
    Mistake("some missing", FEWER, "returned", _some_missing, (FEWER,)),
    Mistake("topk 2048", "topk is taken to be 2048", "topk", lambda row, n: 2048),
    Mistake("first positions", "the first positions are returned, as if all scores were equal", "chosen", _first_positions),
    Mistake("smallest", "the smallest scores are kept", "ranked", lambda row, s: -s),
    Mistake("by magnitude", "scores are ranked by magnitude", "ranked", lambda row, s: abs(s)),
    Mistake("negative by magnitude", "negative scores are ranked by magnitude", "chosen", lambda row, x: np.argsort(-x[0].astype(np.float32).view(np.int32).astype(np.float64), kind="stable")[: x[1]], (TIES,)),
    *(Mistake(f"buffer {n}", "a buffer of candidates at the threshold overflows, or candidates are lost from it", "chosen", _candidates(n), (FEWER, TIES)) for n in (4096, 2048, 1024, -1, -2, -3, -40, -150)),
    Mistake("pads first", "pads are selected before negative scores", "chosen", _pads_first, (FEWER,)),
    Mistake("last tile of keys", "keys behind the last whole tile of 128 are dropped", "ranked", lambda row, s: np.where(np.arange(len(s)) < len(s) // 128 * 128, s, -np.inf), (LAST_KEYS,)),
    Mistake("16 bits", "keys from 65,536 on are lost", "ranked", lambda row, s: np.where(np.arange(len(s)) < 1 << 16, s, -np.inf), (LAST_KEYS,)),
    # --- ties ---
    Mistake("ties first", "ties at the threshold displace better keys", "chosen", _at_threshold_first, (TIES,)),
    Mistake("ties dropped", "ties at the threshold are dropped", "chosen", _threshold_dropped, (TIES, FEWER)),
    Mistake("ties highest", "ties go to the highest position", "chosen", _highest, (TIES,)),
    # --- results ---
    Mistake("tail 0", "the tail is filled with 0", "written", _tail(0), (TAIL,)),
    Mistake("tail repeated", "a short row is filled up by repeating its last entry", "written", _repeated_tail, (TAIL,)),
    Mistake("tail not written", "the tail is not written", "returned", _tail_not_written, (TAIL,)),
    Mistake("score tail", "the tail of the scores is not written", "written", _score_tail, (TAIL,)),
    Mistake("first twice", "the best entry stands there twice", "written", _first_twice, (REPEATED,)),
    Mistake("some repeated", REPEATED, "returned", _some_repeated, (REPEATED,)),
    Mistake("by score", "entries stand in the order of their scores", "written", _by_score),
    Mistake("scores by score", "returned scores stand in another order than the entries", "written", _scores_by_score),
    Mistake("rows swapped", "neighbouring rows are swapped", "row", _neighbour),
    Mistake("first row for all", "a request's decode rows repeat its first row's result", "row", _first_row),
    Mistake("not written", "rows are not computed, but all tail", "written", _nothing),
    Mistake("last rows dropped", "rows behind the last whole tile of 16 are not computed", "written", _last_rows_dropped),
    Mistake("padding", "padding rows hold a selection", "padding", lambda row, value: value),
    # --- pages and requests ---
    Mistake("no table", "the block table, or the request's offset, is ignored: a position is taken as a slot", "slots", lambda row, p: p, (ELSEWHERE,)),
    Mistake("first of page", "the first key of a page is read for all of its keys", "slots", lambda row, p: row.slots(p // row.page_size * row.page_size), (ELSEWHERE,)),
    Mistake("neighbour's pages", "the neighbour request's pages are read", "slots", lambda row, p: row.looked_up(p, row.page_size, row.request + 1), (ELSEWHERE,)),
    Mistake("page size 64", "the page size is taken to be 64", "slots", lambda row, p: row.looked_up(p, 64), (ELSEWHERE,)),
    Mistake("table stride", "the block table's rows are taken to be as long as the longest request needs", "slots", _table_stride, (ELSEWHERE,)),
    Mistake("last page wraps", "the memory's last page is read at its beginning", "slots", _last_page_wraps, (ELSEWHERE,)),
    Mistake("longest for all", "the longest request's length is used for all", "context", lambda row, n: int(row.lengths.max()), (VISIBLE,)),
    Mistake("length before", "the length is that of the request before", "context", lambda row, n: int(row.lengths[row.request - 1]), (VISIBLE,)),
    Mistake("next request's keys", "keys are read from the next request on", "slots", _next_base, (ELSEWHERE,)),
    Mistake("packed requests", "the room between requests is ignored", "slots", _packed_base, (ELSEWHERE,)),
    Mistake("other layout", "the packed cache is read in the other order (planar for interleaved, or the reverse)", "layout", _other_layout, (ELSEWHERE,)),
)
# fmt: on
