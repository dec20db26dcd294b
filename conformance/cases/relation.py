"""Cases of several calls whose results must agree: reruns, other batch mates, slices and pages, and symmetries.

Every call is judged by itself as any case is; a relation then demands equal bits. Where bits may differ, nothing is lost by not
comparing: two results that each lie within their bound of one truth lie within the sum of the bounds of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance.cases.call import Call, Outputs, Steps
from dsa_portable.conformance.cases.lightning_index import IndexCase
from dsa_portable.conformance.cases.sparse_attend import AttendCase
from dsa_portable.conformance.cases.storage import Storage, flat, paged

Array: TypeAlias = np.ndarray[Any, Any]
# (what, one, other): arrays whose bits must be equal.
Pairs: TypeAlias = Iterator[tuple[str, Array, Array]]

PER_ROW = ("q", "weights", "indices", "topk_length")
PER_KEY = ("k", "k_scale", "kv")
RERUNS = 8


@dataclass(frozen=True)
class Relation:
    """`calls` makes the further calls from the first; `pairs` says which parts of the results must be equal, bit for bit."""

    doc: str
    # The second argument makes a call of equal shapes, on other requests and values (SingleCall.before).
    calls: Callable[[Call, Callable[[], Call]], Sequence[Call]]
    pairs: Callable[[Sequence[Call], Sequence[Outputs]], Pairs]


def _of_first(make: Callable[[Call], Sequence[Call]]) -> Callable[[Call, Callable[[], Call]], Sequence[Call]]:
    """For `calls` that need the first call alone."""
    return lambda call, other: make(call)


@dataclass(frozen=True)
class RelationCase:
    """Several calls of one operator, built on an ordinary case."""

    id: str
    why: str
    hazards: tuple[str, ...]
    base: IndexCase | AttendCase
    relation: str

    @property
    def operator(self) -> str:
        """The base case's."""
        return self.base.operator

    @property
    def format(self) -> str:
        """The base case's."""
        return self.base.format

    @property
    def phase(self) -> str:
        """The base case's."""
        return self.base.phase

    @property
    def exact(self) -> bool:
        """The base case's: the symmetries keep products and sums exact."""
        return self.base.exact

    def steps(self, seed: str = "") -> Steps:
        """The first call, then those that the relation makes of it."""
        base = replace(self.base, id=self.id)
        first = base.build(seed)
        # No `yield from`: it would pass on to the tuple the results that are sent in.
        for call in (first, *RELATIONS[self.relation].calls(first, lambda: base.before(first, seed))):  # noqa: UP028
            yield call

    def disagreement(self, calls: Sequence[Call], outputs: Sequence[Outputs]) -> str:
        """What differs where bits must be equal; the empty string where nothing does."""
        for what, one, other in RELATIONS[self.relation].pairs(calls, outputs):
            if one.shape != other.shape:
                return f"{what}: shapes {list(one.shape)} and {list(other.shape)} differ"
            unequal = _bits(one) != _bits(other)
            if unequal.any():
                place = tuple(int(i) for i in np.argwhere(unequal)[0])
                count = f"{int(unequal.sum())} of {one.size} elements differ"
                return f"{what}: {count}, first at {place}: {one[place]} and {other[place]}"
        return ""


def _bits(array: Array) -> Array:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


# --- taking calls apart ---


def _rows(call: Call, request: int) -> range:
    return range(int(call.batch["cu_seqlens_q"][request]), int(call.batch["cu_seqlens_q"][request + 1]))


def _select_rows(call: Call, rows: Sequence[int]) -> dict[str, Array]:
    return {name: array[list(rows)] if name in PER_ROW else array for name, array in call.arrays.items()}


def _prefix_sums(lengths: Sequence[int]) -> Array:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def some_requests(call: Call, requests: Sequence[int]) -> Call:
    """The same rows and keys, of these requests alone and in this order."""
    rows = [row for r in requests for row in _rows(call, r)]
    arrays, batch = _select_rows(call, rows), {"cu_seqlens_q": _prefix_sums([len(_rows(call, r)) for r in requests])}
    batch["seqlens_k"] = call.batch["seqlens_k"][list(requests)]
    for name in ("key_start", "key_end"):
        if name in call.batch:
            batch[name] = call.batch[name][rows]
    if "block_table" in call.batch:
        batch["block_table"] = call.batch["block_table"][list(requests)]
    else:
        starts = call.batch["cu_seqlens_k"]
        batch["cu_seqlens_k"] = _prefix_sums([int(starts[r + 1] - starts[r]) for r in requests])
        keys = np.concatenate([np.arange(starts[r], starts[r + 1]) for r in requests])
        arrays |= {name: array[keys] for name, array in arrays.items() if name in PER_KEY}
    return replace(call, arrays=arrays, batch=batch)


def half_of_rows(call: Call, first: bool) -> Call:
    """Each request's first or second half of rows, as chunked prefill or another tile would pass them."""
    kept, lengths = [], []
    for r in range(len(call.batch["seqlens_k"])):
        mine = _rows(call, r)
        middle = mine.start + len(mine) // 2
        kept.append(range(mine.start, middle) if first else range(middle, mine.stop))
        # Bottom-right alignment: a chunk that ends earlier sees fewer keys.
        later = mine.stop - middle if first and call.operator == "lightning_index" else 0
        lengths.append(max(0, int(call.batch["seqlens_k"][r]) - later))
    batch = {**call.batch, "cu_seqlens_q": _prefix_sums([len(rows) for rows in kept]), "seqlens_k": np.array(lengths, np.int32)}
    return replace(call, arrays=_select_rows(call, [row for rows in kept for row in rows]), batch=batch)


def restored(call: Call, page_size: int | None) -> Call:
    """The same keys in pages of another size, or flat."""
    lengths = tuple(int(n) for n in call.batch["seqlens_k"])
    storage: Storage = paged(f"repaged {page_size}", lengths, page_size, 0) if page_size else flat(lengths, 0)
    arrays = dict(call.arrays)
    for name in PER_KEY:
        if name in arrays:
            size = call.batch_options["page_size"]
            lead = 2 if size else 1
            memory = arrays[name].reshape(-1, *arrays[name].shape[lead:])
            logical = [memory[call.slots(r, np.arange(length))] for r, length in enumerate(lengths)]
            arrays[name] = storage.place(logical, np.zeros((), memory.dtype))
    kept = {name: array for name, array in call.batch.items() if name not in ("block_table", "cu_seqlens_k", "seqlens_k")}
    return replace(
        call, arrays=arrays, batch={**kept, **storage.batch}, batch_options={**call.batch_options, "page_size": page_size}
    )


# --- invariance: the `deterministic` list ---


def _same(calls: Sequence[Call], outputs: Sequence[Outputs], of: Sequence[int]) -> Pairs:
    for i in of:
        for name in outputs[0]:
            yield f"{name} of call {i} against call 0", outputs[0][name], outputs[i][name]


def _between(call: Call, other: Call) -> list[Call]:
    # Another call between reruns leaves other numbers in whatever the backend keeps.
    # Once back to back, so that a fault of period two shows as well.
    return [call, *(step for _ in range(RERUNS - 2) for step in (other, call))]


def _rerun_calls(call: Call) -> list[Call]:
    # Without the padding rows: fewer rows of q, which a cache that is keyed by shapes tells apart.
    return _between(call, some_requests(call, range(len(call.batch["seqlens_k"]))[::-1]))


def _rerun_pairs(calls: Sequence[Call], outputs: Sequence[Outputs]) -> Pairs:
    """Every rerun, of the call between too, against the first time."""
    for i, call in enumerate(calls):
        first = next(j for j, earlier in enumerate(calls) if earlier is call)
        for name in outputs[i] if i != first else ():
            yield f"{name} of call {i} against call {first}", outputs[first][name], outputs[i][name]


def _mates_calls(call: Call) -> list[Call]:
    requests = range(len(call.batch["seqlens_k"]))
    return [*(some_requests(call, [r]) for r in requests), some_requests(call, requests[::-1])]


def _mates_pairs(calls: Sequence[Call], outputs: Sequence[Outputs]) -> Pairs:
    requests = range(len(calls[0].batch["seqlens_k"]))
    turned = np.concatenate([list(_rows(calls[0], r)) for r in requests[::-1]] or [[]]).astype(int)
    for name, whole in outputs[0].items():
        for r in requests:
            yield f"{name} of request {r} alone", whole[list(_rows(calls[0], r))], outputs[1 + r][name]
        yield f"{name} with the requests in reverse order", whole[turned], outputs[-1][name]


def _slices_pairs(calls: Sequence[Call], outputs: Sequence[Outputs]) -> Pairs:
    first: list[int] = []
    second: list[int] = []
    for r in range(len(calls[0].batch["seqlens_k"])):
        mine = _rows(calls[0], r)
        first += mine[: len(mine) // 2]
        second += mine[len(mine) // 2 :]
    for name, whole in outputs[0].items():
        yield f"{name} of the first halves", whole[first], outputs[1][name]
        yield f"{name} of the second halves", whole[second], outputs[2][name]


# --- symmetries: the `full` list, on inputs where nothing rounds ---


def _heads_reversed(call: Call) -> list[Call]:
    turned = {n: np.ascontiguousarray(a[:, ::-1]) if n in ("q", "weights") else a for n, a in call.arrays.items()}
    if "attn_sink" in turned:
        turned["attn_sink"] = np.ascontiguousarray(turned["attn_sink"][::-1])
    return [replace(call, arrays=turned)]


def _heads_pairs(calls: Sequence[Call], outputs: Sequence[Outputs]) -> Pairs:
    for name, one in outputs[0].items():
        yield f"{name} with the heads reversed", one, outputs[1][name][:, ::-1] if name in ("out", "lse") else outputs[1][name]


def _weights_times_8(call: Call) -> list[Call]:
    weights = call.arrays["weights"]
    return [replace(call, arrays={**call.arrays, "weights": (weights * weights.dtype.type(8)).astype(weights.dtype)})]


def _times_8_pairs(calls: Sequence[Call], outputs: Sequence[Outputs]) -> Pairs:
    yield "indices with 8 times the weights", outputs[0]["indices"], outputs[1]["indices"]
    if "scores" in outputs[0]:
        yield "8 times the scores", outputs[0]["scores"] * np.float32(8), outputs[1]["scores"]


def _keys_reversed(call: Call) -> list[Call]:
    arrays = dict(call.arrays)
    starts, lengths = call.batch["cu_seqlens_k"], call.batch["seqlens_k"]
    for name in ("k", "k_scale"):
        if name in arrays:
            turned = arrays[name].copy()
            for start, length in zip(starts, lengths, strict=False):
                turned[start : start + length] = arrays[name][start : start + length][::-1]
            arrays[name] = turned
    return [replace(call, arrays=arrays)]


def _keys_pairs(calls: Sequence[Call], outputs: Sequence[Outputs]) -> Pairs:
    # Which of equal scores are kept depends on positions; the scores that are kept do not.
    # Adding 0 makes -0.0 the +0.0 that it equals.
    one, other = (np.sort(found["scores"] + np.float32(0), axis=1) for found in outputs)
    yield "sorted scores with the keys reversed", one, other


def _entries_reversed(call: Call) -> list[Call]:
    return [replace(call, arrays={**call.arrays, "indices": np.ascontiguousarray(call.arrays["indices"][:, ::-1])})]


def _values_shifted(call: Call) -> list[Call]:
    kv, width = call.arrays["kv"], int(call.options["value_dim"])
    shifted = kv.copy()
    shifted[..., :width] = (kv[..., :width].astype(np.float32) + 3).astype(kv.dtype)
    return [replace(call, arrays={**call.arrays, "kv": shifted})]


def _shift_pairs(calls: Sequence[Call], outputs: Sequence[Outputs]) -> Pairs:
    named = np.asarray((calls[0].arrays["indices"] >= 0).any(axis=1))
    named[int(calls[0].batch["cu_seqlens_q"][-1]) :] = False
    one = outputs[0]["out"][named].astype(np.float32) + 3
    yield "out with every value 3 larger", one, outputs[1]["out"][named].astype(np.float32)


RELATIONS: Mapping[str, Relation] = MappingProxyType(
    {
        "rerun": Relation(
            f"the same call {RERUNS} times, another between",
            _of_first(_rerun_calls),
            lambda calls, outputs: _same(calls, outputs, [i for i, call in enumerate(calls) if i and call is calls[0]]),
        ),
        "rerun-equal-shapes": Relation(
            f"the same call {RERUNS} times, one of equal shapes on other requests and values between",
            lambda call, other: _between(call, other()),
            _rerun_pairs,
        ),
        "batch-mates": Relation("every request alone, and the batch in reverse order", _of_first(_mates_calls), _mates_pairs),
        "query-slices": Relation(
            "each request's rows in two halves",
            lambda call, other: [half_of_rows(call, True), half_of_rows(call, False)],
            _slices_pairs,
        ),
        "page-size": Relation(
            "the same keys in pages of 128, and flat",
            lambda call, other: [restored(call, 128), restored(call, None)],
            lambda calls, outputs: _same(calls, outputs, range(1, len(outputs))),
        ),
        "heads-reversed": Relation("heads in reverse order", _of_first(_heads_reversed), _heads_pairs),
        "weights-times-8": Relation("weights times a power of two", _of_first(_weights_times_8), _times_8_pairs),
        "keys-reversed": Relation("keys in reverse order", _of_first(_keys_reversed), _keys_pairs),
        "entries-reversed": Relation(
            "entries of each row in reverse order",
            _of_first(_entries_reversed),
            lambda calls, outputs: _same(calls, outputs, [1]),
        ),
        "values-shifted": Relation("a constant added to every value", _of_first(_values_shifted), _shift_pairs),
    }
)


@dataclass(frozen=True)
class PipelineCase:
    """End to end: attention over the indices that the same backend's index has just returned, which are certified first."""

    id: str
    why: str
    hazards: tuple[str, ...]
    index: IndexCase
    attend: AttendCase
    smoke: bool = False  # a case of the smoke list too

    operator = "sparse_attend"

    @property
    def format(self) -> str:
        """The attention's."""
        return self.attend.format

    @property
    def phase(self) -> str:
        """The attention's."""
        return self.attend.phase

    exact = False

    def steps(self, seed: str = "") -> Steps:
        """The index call, then the attention call, whose indices are the first call's result."""
        outputs = yield replace(self.index, id=f"{self.id}/index").build(seed)
        call = replace(self.attend, id=f"{self.id}/attend", holes=False).build(seed)
        if outputs is not None:
            call = replace(call, arrays={**call.arrays, "indices": outputs["indices"]})
        yield replace(call, dependent=("indices",))

    def disagreement(self, calls: Sequence[Call], outputs: Sequence[Outputs]) -> str:
        """None beyond the two verdicts."""
        return ""
