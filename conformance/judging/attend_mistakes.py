"""Named mistakes of sparse_attend: a row of attention told again with one stage changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from dsa_portable.conformance.cases.sparse_attend import V32_SCALE
from dsa_portable.conformance.judging import bounds, oracle
from dsa_portable.conformance.judging.accumulator import rounded
from dsa_portable.conformance.judging.mistake import HONEST, Mistake, Row
from dsa_portable.formats import layout, unpack
from dsa_portable.profile import Profile

Array: TypeAlias = np.ndarray[Any, Any]
LN2 = float(np.log(2))
LONGEST = 1 << 14  # keys of a dense row that are told again: more would cost too much memory


@dataclass(frozen=True)
class Told:
    """What a kernel with the mistake returns for some heads of a row, and the operands that bound it; None: nothing counts."""

    out: Array
    lse: Array
    heads: Array
    operands: bounds.Operands | None
    sink: Array | None = None
    positions: Array | None = None

    @property
    def logits(self) -> Array:
        """[heads, n]."""
        assert self.operands is not None
        return np.asarray(self.operands.softmax_scale * self.operands.dots)


def tell(row: Row, mistake: Mistake, profile: Profile, heads: Array) -> Told:
    """The row's truth under a mistake of a stage before `results`."""
    call = row.call
    if mistake.stage == "request":
        other = mistake.change(row, row)
        if other is None:
            return _nothing(row, heads)
        row = other
    context = int(mistake.at(row, "context", row.context))
    entries = mistake.at(row, "entries", call.arrays["indices"][row.row].astype(np.int64))
    count = mistake.at(row, "count", int(call.arrays["topk_length"][row.row]) if "topk_length" in call.arrays else len(entries))
    inside, read = (entries >= 0) & (entries < context), np.arange(len(entries)) < count
    positions = mistake.at(row, "positions", entries[inside & read])
    q = mistake.at(row, "q", call.arrays["q"][row.row].astype(np.float64))[heads]
    scale, width = float(mistake.at(row, "scale", call.options["softmax_scale"])), int(call.options["value_dim"])
    sink = call.arrays.get("attn_sink")
    sink = None if sink is None else mistake.at(row, "sink", sink.astype(np.float64))[heads]
    if not len(positions):
        return _nothing(row, heads)
    if mistake.stage in ("", "q", "scale", "sink", "kv"):
        kv = mistake.at(row, "kv", _honest_kv(row))
    else:
        slots = mistake.change(row, positions) if mistake.stage == "slots" else row.slots(positions)
        kv = _held(row, mistake, slots)
    out, lse, p = oracle.attention(q, kv, scale, width, sink)
    units = [bounds.unit_of(operand, rounded(operand, profile.kv_compute), profile.kv_compute) for operand in (kv, q)]
    return Told(out, lse, heads, bounds.Operands(q, kv, scale, width, p, out, lse, *units), sink, positions)


def _nothing(row: Row, heads: Array) -> Told:
    return Told(np.zeros((len(heads), int(row.call.options["value_dim"]))), np.full(len(heads), -np.inf), heads, None)


def _honest_kv(row: Row) -> Array:
    if "kv" not in row.memo:
        entries = row.call.arrays["indices"][row.row].astype(np.int64)
        row.memo["kv"] = _held(row, HONEST, row.slots(entries[counted(row)]))
    return np.asarray(row.memo["kv"])


def _held(row: Row, mistake: Mistake, slots: Array) -> Array:
    name, kv = row.call.options["kv_layout"], row.call.arrays["kv"]
    if name is None:
        memory = kv.reshape(-1, kv.shape[-1])
        return np.asarray(memory[slots % len(memory)].astype(np.float64))
    codes, scale, rope = (np.asarray(part) for part in mistake.at(row, "parts", unpack(name, kv)))
    codes, scale, rope = (part.reshape(-1, part.shape[-1]) for part in (codes, scale, rope))
    codes, scale, rope = (part[slots % len(part)].astype(np.float64) for part in (codes, scale, rope))
    scale = mistake.at(row, "tile scales", scale)
    codes = mistake.at(row, "codes", codes)
    return np.concatenate([codes * np.repeat(scale, layout(name).tile, axis=1), rope], axis=1)


# --- what a stage becomes ---------------------------------------------------------------------------------------------------


def _with(told: Told, out: Any = None, lse: Any = None) -> Told:
    return Told(
        told.out if out is None else np.broadcast_to(out, told.out.shape),
        told.lse if lse is None else np.broadcast_to(lse, told.lse.shape),
        told.heads,
        told.operands,
        told.sink,
        told.positions,
    )


def _nan_if(condition: Any) -> Any:
    """NaN in rows, or heads, of which the condition holds."""

    def change(row: Row, told: Told) -> Told:
        bad = np.broadcast_to(condition(row, told), told.lse.shape)
        return _with(told, np.where(bad[:, None], np.nan, told.out))

    return change


def counted(row: Row) -> Array:
    """Which entries of a row count."""
    entries = row.call.arrays["indices"][row.row].astype(np.int64)
    count = int(row.call.arrays["topk_length"][row.row]) if "topk_length" in row.call.arrays else len(entries)
    return np.asarray((entries >= 0) & (entries < row.context) & (np.arange(len(entries)) < count))


def _first_block_empty(size: int) -> Any:
    return _nan_if(lambda row, told: not counted(row)[:size].any())


def _some_block_empty(size: int) -> Any:
    return _nan_if(lambda row, told: not np.logical_or.reduceat(counted(row), np.arange(0, len(counted(row)), size)).all())


def _unread_is_nan(slot: Any) -> Any:
    """An entry that does not count is read all the same, from a slot that holds NaN, and multiplied by 0."""

    def condition(row: Row, told: Told) -> bool:
        if counted(row).all():
            return False
        return bool(np.isnan(_held(row, HONEST, np.array([slot(row)]))).any())

    return _nan_if(condition)


def _masked_nan(row: Row, told: Told) -> Told:
    entries = row.call.arrays["indices"][row.row].astype(np.int64)
    read = (entries >= 0) & (entries < row.context) & ~counted(row)
    if not read.any():
        return told
    held = _held(row, HONEST, row.slots(entries[read]))
    return _with(told, np.where(np.isnan(held[:, : told.out.shape[1]]).any(axis=0), np.nan, told.out))


def _of_empty(**values: float) -> Any:
    """Rows without an entry that counts return these."""
    return lambda row, told: _with(told, **values) if told.operands is None else told


def _lse(change: Any) -> Any:
    return lambda row, told: told if told.operands is None else _with(told, lse=change(told))


def _out(change: Any) -> Any:
    return lambda row, told: told if told.operands is None else _with(told, out=change(told))


def _sink(total: Any) -> Any:
    """The sink's part of the normaliser, in units of the keys' part, is something else."""

    def out(told: Told) -> Array:
        if told.sink is None:
            return told.out
        return np.asarray(told.out * (1 + np.exp(told.sink - told.lse))[:, None] / (1 + total(told))[:, None])

    return _out(out)


def _values(change: Any) -> Any:
    """The values are other columns of kv, or other numbers."""
    return _out(lambda told: _operands(told).p @ change(_operands(told).kv, _operands(told).value_dim))


def _shares(change: Any) -> Any:
    """Unnormalised shares [heads, n] become `change(logits, shares)`; the normaliser is still that of the honest ones."""

    def out(told: Told) -> Array:
        shares = np.exp(told.logits - _top(told)[:, None])
        changed = change(told.logits, shares)
        return np.asarray((_keys_part(told) / shares.sum(axis=1))[:, None] * (changed @ _operands(told).values))

    return _out(out)


def _softmax(change: Any) -> Any:
    """The softmax of other logits, its normaliser among them, in some base."""

    def out(told: Told) -> Array:
        shares = change(told.logits)
        return np.asarray((_keys_part(told) / shares.sum(axis=1))[:, None] * (shares @ _operands(told).values))

    return _out(out)


def _operands(told: Told) -> bounds.Operands:
    assert told.operands is not None
    return told.operands


def _keys_part(told: Told) -> Array:
    """What the sink leaves to the keys."""
    return np.asarray(_operands(told).p.sum(axis=1))


def _top(told: Told) -> Array:
    return np.asarray(told.logits.max(axis=1))


def _exp(logits: Array) -> Array:
    return np.asarray(np.exp(logits - logits.max(axis=1, keepdims=True)))


def _not_rescaled(logits: Array, shares: Array) -> Array:
    tiles = np.maximum.reduceat(logits, np.arange(0, logits.shape[1], 64), axis=1)
    running = np.maximum.accumulate(tiles, axis=1).repeat(64, axis=1)[:, : logits.shape[1]]
    return np.asarray(np.exp(logits - running))


def _accumulated(dtype: str) -> Any:
    """The unnormalised output is rounded after every tile of 64 keys."""

    def out(told: Told) -> Array:
        shares, values = _exp(told.logits).astype(np.float32), _operands(told).values.astype(np.float32)
        total: Array = np.zeros_like(told.out, np.float32)
        for first in range(0, len(values), 64):
            total = rounded(total + shares[:, first : first + 64] @ values[first : first + 64], dtype)
        return np.asarray((_keys_part(told) / shares.sum(axis=1))[:, None] * total)

    return _out(out)


def _merged_base_two(told: Told) -> Array:
    """Two splits, weighted with 2^lse though each lse is natural."""
    logits, values = told.logits, _operands(told).values
    halves = [half for half in np.array_split(np.arange(len(values)), 2) if len(half)]
    parts = [_exp(logits[:, half]) for half in halves]
    lses = np.stack([logits[:, half].max(axis=1) + np.log(part.sum(axis=1)) for half, part in zip(halves, parts, strict=True)])
    weights = np.exp2(lses - lses.max(axis=0))
    means = [part @ values[half] / part.sum(axis=1, keepdims=True) for half, part in zip(halves, parts, strict=True)]
    merged = sum(weight[:, None] * mean for weight, mean in zip(weights, means, strict=True))
    return np.asarray(merged / weights.sum(axis=0)[:, None] * _keys_part(told)[:, None])


def _truncated(row: Row, told: Told) -> Told:
    dtype = row.call.arrays["q"].dtype
    stored = told.out.astype(dtype)
    bits = stored.view(f"u{dtype.itemsize}")
    cut = np.asarray(bits - (abs(stored.astype(np.float64)) > abs(told.out)).astype(bits.dtype)).view(dtype)
    return _with(told, cut.astype(np.float64)) if told.operands is not None else told


def _no_maximum(told: Told) -> Array:
    """In float32, where exp of what is not near 0 is infinite or 0."""
    shares, values = np.exp(told.logits.astype(np.float32)), _operands(told).values.astype(np.float32)
    return np.asarray(_keys_part(told)[:, None] * (shares @ values / shares.sum(axis=1, keepdims=True)))


def _lse_transposed(row: Row, told: Told) -> Told:
    rows, heads = row.call.arrays["q"].shape[:2]
    flat = row.row * heads + told.heads
    lses = np.full(len(flat), -np.inf)
    for i, (head, other) in enumerate(zip(*np.divmod(flat, rows), strict=True)):
        if (owner := row.owner(int(other))) is not None:
            lses[i] = tell(row.of(int(other), owner), HONEST, Profile(), np.array([head])).lse[0]
    return _with(told, lse=lses)


def _not_written(row: Row, told: Told) -> Told:
    return _with(told, 0.0, -np.inf)


def _last_row_not_written(row: Row, told: Told) -> Told:
    return _not_written(row, told) if row.row == row.last - 1 > row.first else told


def _wrapped(row: Row, slots: Array) -> Array:
    width = row.call.arrays["kv"].shape[-1]
    return np.asarray((slots * width).astype(np.int32) // width)


def _only_minus_one(change: Any) -> Any:
    """Every entry but -1 is taken to name a key, moved inside by `change(entries, context)`."""
    return lambda row, e: np.where(e == -1, -1, change(e, max(row.context, 1)))


def _other_layout(row: Row, parts: Any) -> Any:
    name, other = row.call.options["kv_layout"], None
    if name.startswith("v32_fp8_656_nsr"):
        other = "ascend_656_nrs_fp8"
    elif name.startswith("ascend_656_nrs"):
        other = "v32_fp8_656_nsr_f32"
    if other is None:
        return parts
    read = unpack(other, row.call.arrays["kv"])
    return parts._replace(scale=read.scale, rope=read.rope)


def _as_fnuz(row: Row, parts: Any) -> Any:
    if parts.values.dtype != ml_dtypes.float8_e4m3fn:
        return parts
    return parts._replace(values=parts.values.view(ml_dtypes.float8_e4m3fnuz))


def _rows_divided(row: Row, _: Any) -> Row | None:
    """The rows are thought to be divided evenly among the requests; what is left over is not computed."""
    each = int(row.call.batch["cu_seqlens_q"][-1]) // len(row.lengths)
    request = row.row // each if each else len(row.lengths)
    return row.of(row.row, request) if request < len(row.lengths) else None


def _in_key_range(row: Row, positions: Array) -> Array:
    if "key_start" not in row.call.batch:
        return positions
    start, end = (int(row.call.batch[name][row.row]) for name in ("key_start", "key_end"))
    return positions[(positions >= start) & (positions < end)]


def _length_read_per_request(row: Row, count: int) -> int:
    return int(row.call.arrays["topk_length"][row.request]) if "topk_length" in row.call.arrays else count


def _last_page_stale(row: Row, p: Array) -> Array:
    """The request's last page is read from the one before."""
    size = row.page_size
    stale = row.paged & (p // size == (row.context - 1) // size) & (p >= size)
    return row.slots(np.where(stale, p - size, p))


def _table_stride(row: Row, p: Array) -> Array:
    """Rows of the block table as long as the longest request needs."""
    if not row.paged:
        return row.slots(p)
    pages, offsets = np.divmod(p, row.page_size)
    flat = row.table.reshape(-1)
    at = row.request * -(-int(row.lengths.max()) // row.page_size) + pages
    return np.asarray(flat[np.clip(at, 0, len(flat) - 1)] * row.page_size + offsets)


def _key_length_from_offsets(row: Row, n: int) -> int:
    return n if row.paged else int(np.diff(row.call.batch["cu_seqlens_k"])[row.request])


def _powers_of_two(scale: Array) -> Array:
    return (scale.astype(np.float32).view(np.uint32) & 0xFF800000).view(np.float32).astype(np.float64)


def _bf16(values: Array) -> Array:
    return rounded(values, "bfloat16").astype(np.float64)


def _log_sum(told: Told) -> Array:
    return np.asarray(told.lse if told.sink is None else np.logaddexp(told.lse, told.sink))


def _fewer(n: int) -> Any:
    return lambda row, count: count - n


def _whole(n: int) -> Any:
    return lambda row, count: count // n * n


def _all_but_last_of(n: int) -> Any:
    return lambda row, p: np.concatenate(np.array_split(p, n)[:-1])


def _lse_without_one_of(n: int) -> Any:
    return _lse(lambda told: told.lse + np.log1p(-1 / n))


# What is said where the case cannot tell the mistakes of a kind apart.
ELSEWHERE = "keys are read from slots that no entry of the row names"
TOO_MANY = "entries that do not count enter"
BLOCKS = "entries behind the last whole block are dropped"
OVERFLOW = "exp overflows"
LEADING = "a row is NaN where a leading block of its entries is all holes"

# fmt: off
ATTEND: tuple[Mistake, ...] = (
    # --- which entries count ---
    Mistake("hole is key 0", "-1 is read as key 0", "entries", lambda row, e: np.where(e == -1, 0, e), (TOO_MANY,)),
    Mistake("hole is last key", "-1 is read as the last key", "entries", lambda row, e: np.where(e == -1, row.context - 1, e), (TOO_MANY,)),
    Mistake("hole ends row", "entries behind the first -1 are dropped", "entries", lambda row, e: e[np.logical_and.accumulate(e != -1)]),
    Mistake("beyond wraps", "only -1 is skipped, and an index past the request's end wraps", "entries", _only_minus_one(lambda e, n: e % n), (TOO_MANY,)),
    Mistake("beyond clamps", "only -1 is skipped, and an index past the request's end is clamped", "entries", _only_minus_one(lambda e, n: e.clip(0, n - 1)), (TOO_MANY,)),
    Mistake("beyond followed", "an index past the request's end is followed", "context", lambda row, n: 1 << 40, (TOO_MANY,)),
    Mistake("repeated once", "an index that stands there twice counts once", "positions", lambda row, p: np.unique(p)),
    Mistake("dense", "the indices are ignored: attention is dense", "positions", lambda row, p: np.arange(min(row.context, LONGEST)), (ELSEWHERE,)),
    Mistake("causal again", "a causal mask is laid over the selected keys", "entries", lambda row, e: np.where(e < row.visible, e, -1)),
    Mistake("masked by row", "a causal mask by row number, aligned top-left, is laid over the selected keys", "entries", lambda row, e: np.where(e < row.row - row.first + 1, e, -1)),
    Mistake("visible entries", "entries past the number of visible keys are not read", "count", lambda row, n: min(n, row.visible)),
    Mistake("key range", "key_start and key_end are applied to the selected keys", "positions", _in_key_range),
    Mistake("topk_length ignored", "topk_length is ignored", "count", lambda row, n: 1 << 30, (TOO_MANY,)),
    Mistake("topk_length per request", "topk_length is read at the request's number, not the row's", "count", _length_read_per_request, (TOO_MANY,)),
    *(Mistake(f"last {n} entries", f"the last {n} entries are dropped", "count", _fewer(n)) for n in (16, 32, 64, 128)),
    *(Mistake(f"blocks of {n}", f"entries behind the last whole block of {n} are dropped", "count", _whole(n), (BLOCKS,)) for n in (16, 32, 64, 128)),
    Mistake("key 0 skipped", "key 0 is skipped, as if 0 were no position", "entries", lambda row, e: np.where(e == 0, -1, e)),
    Mistake("last key skipped", "the request's last key is skipped", "entries", lambda row, e: np.where(e == row.context - 1, -1, e)),
    Mistake("count + 1", "one entry past topk_length is read", "count", lambda row, n: n + 1),
    Mistake("first entry", "the first entry that counts is dropped", "positions", lambda row, p: p[1:]),
    Mistake("last entry", "the last entry that counts is dropped", "positions", lambda row, p: p[:-1]),
    *(Mistake(f"last of {n} splits", f"the last of {n} splits is missing", "positions", _all_but_last_of(n)) for n in (2, 4, 8)),
    Mistake("first row's indices", "the indices of a request's first row are used for all its rows", "entries", lambda row, e: row.call.arrays["indices"][row.first].astype(np.int64)),
    # --- logits ---
    Mistake("scale 1", "softmax_scale is not applied", "scale", lambda row, s: 1.0),
    Mistake("scale of values", "softmax_scale is value_dim^-0.5, whatever is passed", "scale", lambda row, s: row.call.options["value_dim"] ** -0.5),
    Mistake("scale of keys", "softmax_scale is that of the keys' width, whatever is passed", "scale", lambda row, s: row.call.arrays["q"].shape[2] ** -0.5),
    Mistake("scale of V3.2", "softmax_scale is DeepSeek-V3.2's, whatever is passed", "scale", lambda row, s: V32_SCALE),
    Mistake("scale twice", "softmax_scale is applied twice", "scale", lambda row, s: s * s),
    Mistake("rope dropped", "the rotated part of the keys is dropped from the logits", "kv", lambda row, kv: np.where(np.arange(kv.shape[1]) < row.call.options["value_dim"], kv, 0)),
    Mistake("logits float16", "logits are rounded to float16", "results", _softmax(lambda x: _exp(rounded(x, "float16").astype(np.float64)))),
    Mistake("logits bfloat16", "logits are rounded to bfloat16", "results", _softmax(lambda x: _exp(_bf16(x)))),
    Mistake("exp2", "2^x stands for e^x in the softmax", "results", _softmax(lambda x: np.exp2(x - x.max(axis=1, keepdims=True)))),
    Mistake("exp overflows", "exp overflows, as where no maximum is subtracted", "results", _out(_no_maximum), (OVERFLOW,)),
    # --- the sum over keys ---
    Mistake("not rescaled", "the accumulator is not rescaled when the maximum rises", "results", _shares(_not_rescaled)),
    Mistake("accumulator bfloat16", "the output is accumulated in bfloat16", "results", _accumulated("bfloat16")),
    Mistake("accumulator float16", "the output is accumulated in float16", "results", _accumulated("float16")),
    Mistake("P float8", "probabilities are rounded to float8_e4m3fn", "results", _shares(lambda x, p: rounded(p, "float8_e4m3fn").astype(np.float64))),
    Mistake("P bfloat16", "probabilities are rounded to bfloat16", "results", _shares(lambda x, p: _bf16(p))),
    Mistake("KV bfloat16", "keys and values are rounded to bfloat16", "kv", lambda row, kv: _bf16(kv)),
    Mistake("truncated", "the output is truncated, not rounded", "results", _truncated),
    Mistake("merge base 2", "splits are merged by 2^lse, though each lse is natural", "results", _out(_merged_base_two)),
    Mistake("normaliser missing", "the output is not divided by the normaliser", "results", _out(lambda t: t.out * np.exp(t.lse - _top(t))[:, None])),
    # --- NaN ---
    *(Mistake(f"block of {n} empty", f"a row is NaN where its first {n} entries are all holes", "results", _first_block_empty(n), (LEADING,)) for n in (16, 32, 64, 128)),
    *(Mistake(f"some block of {n} empty", f"a row is NaN where a block of {n} of its entries is all holes", "results", _some_block_empty(n)) for n in (16, 32, 64, 128)),
    Mistake("slot 0", "the unread slot 0 of the memory, which holds NaN, enters for entries that do not count", "results", _unread_is_nan(lambda row: 0), (TOO_MANY,)),
    Mistake("masked NaN", "a NaN that entries past topk_length name enters, as by 0 * NaN", "results", _masked_nan, (TOO_MANY,)),
    Mistake("sink inf", "NaN where the sink is +inf", "results", _nan_if(lambda row, t: False if t.sink is None else t.sink == np.inf)),
    Mistake("exp(lse)", "NaN where exp(lse) overflows", "results", _nan_if(lambda row, t: t.lse > 88.7), (OVERFLOW,)),
    # --- rows without a valid entry ---
    Mistake("empty row NaN", "a row without a valid index is NaN", "results", _of_empty(out=np.nan, lse=np.nan)),
    Mistake("empty row key 0", "a row without a valid index attends to key 0", "positions", lambda row, p: p if len(p) or not row.context else np.zeros(1, np.int64)),
    Mistake("empty row lse", "lse of a row without a valid index is +inf", "results", _of_empty(lse=np.inf)),
    # --- sink ---
    Mistake("sink ignored", "attn_sink is ignored", "sink", lambda row, s: np.full_like(s, -np.inf)),
    Mistake("sink twice", "the sink is counted twice", "sink", lambda row, s: s + LN2),
    Mistake("sink base 2", "the sink enters as 2^sink", "results", _sink(lambda t: np.exp2(t.sink - _top(t)) * np.exp(_top(t) - t.lse))),
    Mistake("sink maximum", "the maximum is not subtracted from the sink", "results", _sink(lambda t: np.exp(t.sink + _top(t) - t.lse))),
    Mistake("sink bfloat16", "the sink is rounded to bfloat16", "sink", lambda row, s: _bf16(s)),
    # --- lse ---
    Mistake("lse base 2", "lse is to base 2", "results", _lse(lambda t: t.lse / LN2)),
    Mistake("lse with sink", "lse includes the sink", "results", _lse(_log_sum)),
    Mistake("lse without maximum", "the maximum is missing from lse", "results", _lse(lambda t: t.lse - _top(t))),
    Mistake("lse is maximum", "lse is the maximum alone", "results", _lse(_top)),
    Mistake("lse bfloat16", "lse is rounded to bfloat16", "results", _lse(lambda t: _bf16(t.lse))),
    Mistake("lse float16", "lse is rounded to float16", "results", _lse(lambda t: rounded(t.lse, "float16"))),
    *(Mistake(f"lse lacks 1 of {n}", "a part of the keys' sum is missing from lse", "results", _lse_without_one_of(n)) for n in (2, 4, 8, 16)),
    Mistake("lse transposed", "lse is laid out [heads, rows]", "results", _lse_transposed),
    # --- rows and heads ---
    Mistake("heads swapped", "two neighbouring heads are swapped", "q", lambda row, q: np.concatenate([q[1::-1], q[2:]])),
    Mistake("heads repeat", "heads from 64 on repeat the first ones", "q", lambda row, q: q[np.arange(len(q)) % 64]),
    Mistake("not written", "rows are not computed, but zero", "results", _not_written),
    Mistake("last row", "the last row of a request is not computed, but zero", "results", _last_row_not_written),
    Mistake("rows divided", "rows are divided evenly among requests, whatever cu_seqlens_q says", "request", _rows_divided),
    Mistake("padding", "padding rows are computed", "padding", lambda row, value: value),
    # --- what a key holds ---
    Mistake("last columns", "values are taken from the last columns of kv", "results", _values(lambda kv, n: kv[:, -n:])),
    Mistake("one tile scale", "the first tile's scale is used for all tiles", "tile scales", lambda row, s: np.repeat(s[:, :1], s.shape[1], axis=1)),
    Mistake("tile scales 2^n", "tile scales are cut down to powers of two", "tile scales", lambda row, s: _powers_of_two(s)),
    Mistake("tile scales bfloat16", "tile scales are rounded to bfloat16", "tile scales", lambda row, s: _bf16(s)),
    Mistake("other layout", "the packed cache is read in the other order (scale and rotated part)", "parts", _other_layout),
    Mistake("fnuz", "e4m3fn codes are decoded as e4m3fnuz", "parts", _as_fnuz),
    Mistake("subnormals", "float8 subnormals are decoded as 0", "codes", lambda row, c: np.where(abs(c) < 2.0**-6, 0, c)),
    # --- where a key lies ---
    Mistake("last page stale", "the request's last page is read from the one before", "slots", _last_page_stale, (ELSEWHERE,)),
    Mistake("no table", "the block table, or the request's offset, is ignored: an index is taken as a slot", "slots", lambda row, p: p, (ELSEWHERE,)),
    Mistake("neighbour's pages", "the neighbour request's pages are read", "slots", lambda row, p: row.looked_up(p, row.page_size, row.request + 1), (ELSEWHERE,)),
    Mistake("page size 64", "the page size is taken to be 64", "slots", lambda row, p: row.looked_up(p, 64), (ELSEWHERE,)),
    Mistake("page size 2^n", "the page size is rounded down to a power of two", "slots", lambda row, p: row.looked_up(p, 1 << row.page_size.bit_length() - 1), (ELSEWHERE,)),
    Mistake("table stride", "the block table's rows are taken to be as long as the longest request needs", "slots", _table_stride, (ELSEWHERE,)),
    Mistake("first of page", "the first key of a page is read for all of its keys", "slots", lambda row, p: row.slots(p // row.page_size * row.page_size), (ELSEWHERE,)),
    Mistake("offset wraps", "a 32-bit element offset wraps", "slots", lambda row, p: _wrapped(row, row.slots(p)), (ELSEWHERE,)),
    Mistake("whole pages", "seqlens_k is rounded up to whole pages", "context", lambda row, n: -(-n // row.page_size) * row.page_size, (TOO_MANY,)),
    Mistake("length from offsets", "seqlens_k is ignored: the length is taken from cu_seqlens_k", "context", _key_length_from_offsets, (TOO_MANY,)),
    Mistake("longest for all", "the longest request's length is used for all", "context", lambda row, n: int(row.lengths.max()), (TOO_MANY,)),
)
# fmt: on
