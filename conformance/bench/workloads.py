"""What is timed, as a table; each row knows its products and the bytes that it cannot avoid to move."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dsa_portable.arrays import NUMPY_DTYPES
from dsa_portable.batch import DECODE_ROWS, Batch
from dsa_portable.conformance.bench.machine import Machine, Operands
from dsa_portable.formats import layout, pack, quantise_e4m3fn

INDEX_DIM, KEY_DIM, VALUE_DIM = 128, 576, 512
SOFTMAX_SCALE = 192**-0.5
PAGE_SIZE = 64
# So many rows of a call have indices of their own; drawing them for all would take longer than the call.
DISTINCT_ROWS = 512


@dataclass(frozen=True)
class Size:
    """Rows of all requests together, keys of each request."""

    rows: int
    keys: int
    topk: int = 2048
    requests: int = 1


@dataclass(frozen=True)
class Workload:
    """One call: `small` is its size on a host's processor; `layout` names a packed, paged cache, None is a flat array."""

    operator: str
    heads: int
    size: Size
    small: Size
    dtype: str
    causal: bool = False
    layout: str | None = None

    @property
    def phase(self) -> str:
        """`decode` or `prefill`, as the contract tells them apart."""
        return "decode" if self.rows_each <= DECODE_ROWS else "prefill"

    @property
    def rows_each(self) -> int:
        """Rows of one request."""
        return self.size.rows // self.size.requests

    @property
    def name(self) -> str:
        """What `--only` looks in."""
        s = self.size
        whose = f"{s.requests} requests" if self.phase == "decode" else f"{s.rows} rows"
        extra = " causal" * self.causal + (f" {self.layout}" if self.layout else "")
        return f"{self.operator} {self.phase} {self.dtype} {whose} x {self.heads} heads, {s.topk} of {s.keys}{extra}"

    @property
    def pairs(self) -> int:
        """(row, key) pairs that are multiplied: the visible ones in lightning_index, the selected ones in sparse_attend."""
        s, n = self.size, self.rows_each
        if self.operator == "sparse_attend":
            return s.rows * min(s.topk, s.keys)
        return s.requests * (n * s.keys - (n * (n - 1) // 2 if self.causal else 0))

    @property
    def flops(self) -> int:
        """Of the matrix products alone: 2 per pair, head and dimension."""
        depth = INDEX_DIM if self.operator == "lightning_index" else KEY_DIM + VALUE_DIM
        return 2 * self.pairs * self.heads * depth

    @property
    def bytes_moved(self) -> int:
        """Each operand that is read and each result, once; of kv the selected keys, up to all of them."""
        s, width = self.size, NUMPY_DTYPES[self.dtype].itemsize
        indices = 4 * s.rows * s.topk
        if self.operator == "lightning_index":
            scale, weights = 4 * (self.dtype == "float8_e4m3fn"), 4
            return (
                s.requests * s.keys * (INDEX_DIM * width + scale)
                + s.rows * self.heads * (INDEX_DIM * width + weights)
                + indices
            )
        token = layout(self.layout).bytes_per_token if self.layout else KEY_DIM * width
        distinct = s.requests * min(self.rows_each * min(s.topk, s.keys), s.keys)
        return distinct * token + s.rows * self.heads * (KEY_DIM + VALUE_DIM) * width + indices

    def on(self, machine: Machine) -> Workload:
        """The row at the size for this machine."""
        return replace(self, size=self.small) if machine.is_host else self

    def tiny(self) -> Workload:
        """The same call, small enough for an independent float64 computation."""
        s, requests = self.size, min(self.size.requests, 3)
        rows = requests * min(self.rows_each, 64)
        return replace(self, size=Size(rows, min(s.keys, 768), min(s.topk, 256), requests))


def _index(size: Size, small: Size, *, causal: bool = False, layout: str | None = None) -> Workload:
    return Workload("lightning_index", 64, size, small, "float8_e4m3fn", causal, layout)


def _attend(heads: int, size: Size, small: Size, *, layout: str | None = None) -> Workload:
    return Workload("sparse_attend", heads, size, small, "bfloat16", layout=layout)


# Of a host's processor: some tenths of a second where kernels are good.
CHUNK, ROWS, ONE = Size(4096, 65536), Size(32, 131072), Size(1, 131072)
TABLE = (
    *(_attend(heads, CHUNK, ROWS) for heads in (128, 64, 32, 16)),
    *(_attend(128, Size(r, 65536, 2048, r), Size(s, 32768, 2048, s)) for r, s in ((64, 8), (8, 2))),
    _attend(128, Size(1, 65536, 2048, 1), ONE),
    _attend(128, Size(64, 65536, 2048, 64), Size(8, 32768, 2048, 8), layout="v32_fp8_656_nsr"),
    _index(CHUNK, Size(512, 8192)),
    _index(CHUNK, Size(2048, 2048), causal=True),
    _index(Size(4096, 8192), Size(512, 8192), causal=True),
    _index(Size(1024, 131072), Size(32, 131072), causal=True),
    *(_index(Size(r, 65536, 2048, r), Size(s, 32768, 2048, s), causal=True) for r, s in ((64, 8), (8, 2))),
    _index(Size(1, 65536, 2048, 1), ONE, causal=True),
    _index(Size(64, 65536, 2048, 64), Size(8, 32768, 2048, 8), causal=True, layout="idx_fp8_132_planar"),
)


def operands(machine: Machine, w: Workload) -> Operands:
    """Random operands of the call, on the device."""
    return _index_operands(machine, w) if w.operator == "lightning_index" else _attend_operands(machine, w)


def _index_operands(machine: Machine, w: Workload) -> Operands:
    s = w.size
    shared = {
        "q": machine.normal((s.rows, w.heads, INDEX_DIM), w.dtype),
        "weights": machine.normal((s.rows, w.heads)),
        "topk": s.topk,
        "batch": _batch(machine, w),
    }
    if w.layout:
        return {**shared, "k": _packed(machine, w, w.layout), "k_layout": w.layout}
    k = machine.normal((s.requests * s.keys, INDEX_DIM), w.dtype)
    scaled = w.dtype == "float8_e4m3fn"
    scale = machine.backend.put(machine.random.uniform(0.5, 1.5, s.requests * s.keys).astype(np.float32)) if scaled else None
    return {**shared, "k": k, **({"k_scale": scale} if scaled else {})}


def _attend_operands(machine: Machine, w: Workload) -> Operands:
    return {**attend_operands(machine, w), "indices": machine.backend.put(_selected(machine.random, w.size))}


def attend_operands(machine: Machine, w: Workload) -> Operands:
    """The operands of sparse_attend but for `indices`, which a model gets from lightning_index."""
    s = w.size
    shared = {
        "q": machine.normal((s.rows, w.heads, KEY_DIM), w.dtype),
        "softmax_scale": SOFTMAX_SCALE,
        "batch": _batch(machine, w),
    }
    if w.layout:
        return {**shared, "kv": _packed(machine, w, w.layout), "kv_layout": w.layout}
    return {**shared, "kv": machine.normal((s.requests * s.keys, KEY_DIM), w.dtype)}


def _batch(machine: Machine, w: Workload) -> Batch:
    s = w.size
    batch = Batch.of([w.rows_each] * s.requests, [s.keys] * s.requests, causal=w.causal or w.operator == "sparse_attend")
    if w.layout:
        pages = s.requests * -(-s.keys // PAGE_SIZE)
        table = machine.random.permutation(pages).astype(np.int32).reshape(s.requests, -1)
        batch = batch.with_pages(table, PAGE_SIZE)
    return machine.place(batch)


def _packed(machine: Machine, w: Workload, name: str) -> object:
    """The cache of one request, once per request: bytes of other addresses, as cold as bytes of other values."""
    spec, shape = layout(name), (-(-w.size.keys // PAGE_SIZE), PAGE_SIZE)
    group = spec.tile if spec.operator == "sparse_attend" else None
    values, scale = quantise_e4m3fn(machine.random.standard_normal((*shape, spec.value_dim), np.float32), group=group)
    rope = machine.random.standard_normal((*shape, spec.rope_dim), np.float32).astype(NUMPY_DTYPES["bfloat16"])
    return machine.copies(pack(name, values, scale, rope if spec.rope_dim else None), w.size.requests)


def _selected(random: np.random.Generator, s: Size) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    """int32 [rows, topk]: ascending positions drawn without repetition, -1 in the tail: no locality that a cache could use."""
    count, distinct = min(s.topk, s.keys), min(s.rows, DISTINCT_ROWS)
    drawn = np.full((distinct, s.topk), -1, np.int32)
    for row in drawn:
        row[:count] = np.sort(random.choice(s.keys, count, replace=False, shuffle=False))
    return drawn[np.arange(s.rows) % distinct]
