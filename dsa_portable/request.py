"""One checked call: what a backend's operator receives. Every check that needs no kernel has already passed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias, TypeVar

import numpy as np

from dsa_portable.arrays import Array, describe, device_of, dtype_name, host_as_kind, is_array, on_host
from dsa_portable.batch import Batch, batch_as_kind
from dsa_portable.errors import InvalidArgument, Unsupported
from dsa_portable.formats import layout
from dsa_portable.signature import (
    LIGHTNING_INDEX,
    SCALED,
    SHORT,
    SPARSE_ATTEND,
    Signature,
    check_arrays,
    check_count,
    check_flag,
    check_scale,
)

_T = TypeVar("_T")


class _Call:
    def as_kind(self: _T, wanted: str) -> _T:
        """The same call over the same memory, with every host array of the wanted kind (`numpy` or `torch`).

        Itself where nothing changes kind; nothing is checked again, as no value changes.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        changed = {name: new for name, value in values.items() if (new := _shared(value, wanted)) is not value}
        return replace(self, **changed) if changed else self  # type: ignore[type-var]


def _shared(value: Any, wanted: str) -> Any:
    if isinstance(value, tuple):
        parts = tuple(_shared(v, wanted) for v in value)
        return parts if any(new is not old for new, old in zip(parts, value, strict=True)) else value
    return batch_as_kind(value, wanted) if isinstance(value, Batch) else host_as_kind(value, wanted)


@dataclass(frozen=True)
class IndexRequest(_Call):
    """A checked call of `lightning_index`; `dims` binds Tq, H, D and Tk, or num_pages and page_size."""

    operator = "lightning_index"

    q: Array
    k: Array
    weights: Array
    k_scale: Array | None
    batch: Batch
    topk: int
    k_layout: str | None
    return_scores: bool
    sorted: bool
    out: tuple[Array, ...] | None
    dims: Mapping[str, int]

    @property
    def format(self) -> str:
        """`operand/weights/scale`, e.g. `e4m3/f32/f32` or `bf16/bf16/-`."""
        packed = "-" if self.k_layout is None else "f32"
        scale = packed if self.k_scale is None else SHORT[dtype_name(self.k_scale)]
        return f"{SHORT[dtype_name(self.q)]}/{SHORT[dtype_name(self.weights)]}/{scale}"

    @property
    def results(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of what the call returns, in order."""
        shape = (self.dims["Tq"], self.topk)
        found: dict[str, tuple[str, tuple[int, ...]]] = {"indices": ("int32", shape)}
        return found | {"scores": ("float32", shape)} if self.return_scores else found


@dataclass(frozen=True)
class AttendRequest(_Call):
    """A checked call of `sparse_attend`; `dims` binds Tq, Hq, Dqk, topk and Tk, or num_pages and page_size."""

    operator = "sparse_attend"

    q: Array
    kv: Array
    indices: Array
    softmax_scale: float
    value_dim: int
    attn_sink: Array | None
    topk_length: Array | None
    batch: Batch
    kv_layout: str | None
    return_lse: bool
    out: tuple[Array, ...] | None
    dims: Mapping[str, int]

    @property
    def format(self) -> str:
        """The packed cache's name, or the dtype of q and kv: `bf16`, `f16`, `f32`."""
        return self.kv_layout or SHORT[dtype_name(self.kv)]

    @property
    def results(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of what the call returns, in order."""
        shape = (self.dims["Tq"], self.dims["Hq"], self.value_dim)
        found: dict[str, tuple[str, tuple[int, ...]]] = {"out": (dtype_name(self.q), shape)}
        return found | {"lse": ("float32", shape[:2])} if self.return_lse else found


Request: TypeAlias = IndexRequest | AttendRequest


def index_request(
    q: Array,
    k: Array,
    weights: Array,
    k_scale: Array | None,
    topk: int,
    batch: Batch | None,
    k_layout: str | None,
    return_scores: bool,
    sorted: bool,
    index_space: str,
    out: Array | tuple[Array, ...] | None,
) -> IndexRequest:
    """Check a call of `lightning_index`; raises InvalidArgument, or Unsupported for what is reserved."""
    _check_common(LIGHTNING_INDEX, index_space, "k_layout", k_layout)
    paged = _paged(LIGHTNING_INDEX, batch)
    values = {"q": q, "k": k, "weights": weights, "k_scale": k_scale}
    dims = check_arrays(LIGHTNING_INDEX, values, paged=paged, packed={"k": k_layout})
    key_dtype = dtype_name(k) if k_layout is None else layout(k_layout).value_dtype.name
    _check_same_dtype(LIGHTNING_INDEX, "k", key_dtype, q)
    if k_layout is not None and k_scale is not None:
        raise InvalidArgument(f"lightning_index: k_scale was passed, but {k_layout} holds its own scales; pass k_scale=None.")
    if k_layout is None and (k_scale is None) == (key_dtype in SCALED):
        state = "missing" if k_scale is None else "passed"
        raise InvalidArgument(
            f"lightning_index: k_scale is {state} for {key_dtype} keys, but {' and '.join(SCALED)} keys need one and others "
            f"have none; {'pass it' if k_scale is None else 'fold it into the keys'}."
        )
    topk = check_count(LIGHTNING_INDEX, "topk", topk)
    return_scores = check_flag(LIGHTNING_INDEX, "return_scores", return_scores)
    sorted = check_flag(LIGHTNING_INDEX, "sorted", sorted)
    batch = _bound(LIGHTNING_INDEX, batch, dims, q)
    request = IndexRequest(q, k, weights, k_scale, batch, topk, k_layout, return_scores, sorted, _tuple(out), dims)
    _check_out(request, request.results)
    return request


def attend_request(
    q: Array,
    kv: Array,
    indices: Array,
    softmax_scale: float,
    value_dim: int,
    attn_sink: Array | None,
    topk_length: Array | None,
    batch: Batch | None,
    kv_layout: str | None,
    return_lse: bool,
    index_space: str,
    out: Array | tuple[Array, ...] | None,
) -> AttendRequest:
    """Check a call of `sparse_attend`; raises InvalidArgument, or Unsupported for what is reserved."""
    _check_common(SPARSE_ATTEND, index_space, "kv_layout", kv_layout)
    paged = _paged(SPARSE_ATTEND, batch)
    values = {"q": q, "kv": kv, "indices": indices, "attn_sink": attn_sink, "topk_length": topk_length}
    dims = check_arrays(SPARSE_ATTEND, values, paged=paged, packed={"kv": kv_layout})
    _check_same_dtype(SPARSE_ATTEND, "kv", "bfloat16" if kv_layout else dtype_name(kv), q)
    scale = check_scale(SPARSE_ATTEND, "softmax_scale", softmax_scale)
    value_dim = check_count(SPARSE_ATTEND, "value_dim", value_dim, upper=dims["Dqk"])
    return_lse = check_flag(SPARSE_ATTEND, "return_lse", return_lse)
    batch = _bound(SPARSE_ATTEND, batch, dims, q)
    request = AttendRequest(
        q, kv, indices, scale, value_dim, attn_sink, topk_length, batch, kv_layout, return_lse, _tuple(out), dims
    )
    _check_out(request, request.results)
    return request


def _check_common(signature: Signature, index_space: str, layout_argument: str, layout_name: str | None) -> None:
    if index_space != "request":
        raise Unsupported(
            f"{signature.name}: index_space is {index_space!r}, but contract 1.0 has 'request' alone; convert with the Batch's "
            "to_flat(), to_slots(), from_flat() or from_slots().",
            "index_space",
        )
    if layout_name is not None and layout(layout_name).operator != signature.name:
        raise InvalidArgument(
            f"{signature.name}: {layout_argument} is {layout_name!r}, but that is a cache of {layout(layout_name).operator}; "
            f"pass one of {signature.name}'s own."
        )


def _paged(signature: Signature, batch: Batch | None) -> bool:
    if batch is not None and not isinstance(batch, Batch):
        raise InvalidArgument(
            f"{signature.name}: batch is {describe(batch)}, but a Batch or None is accepted; build one with Batch.of()."
        )
    return batch is not None and batch.block_table is not None


def _check_same_dtype(signature: Signature, name: str, dtype: str, q: Array) -> None:
    if dtype_name(q) != dtype:
        raise InvalidArgument(
            f"{signature.name}: q is {dtype_name(q)}, but {name} holds {dtype}; nothing is cast silently, so pass one dtype."
        )


def _bound(signature: Signature, batch: Batch | None, dims: Mapping[str, int], q: Array) -> Batch:
    if batch is None:
        return Batch.dense(dims["Tq"], dims["Tk"])
    for array in batch.flatten()[0]:
        if array is not None and not on_host(array) and device_of(array) != device_of(q):
            raise InvalidArgument(
                f"{signature.name}: batch holds {describe(array)}, but q is on {device_of(q)}; keep it on the host or beside q."
            )
    if batch.page_size is not None and batch.page_size != dims["page_size"]:
        raise InvalidArgument(
            f"{signature.name}: batch.page_size is {batch.page_size}, but the cache has pages of {dims['page_size']}; use "
            "batch.with_pages()."
        )
    batch.check_bounds(dims["Tq"], dims["num_pages"] if batch.block_table is not None else dims["Tk"])
    return batch


def _tuple(out: Array | tuple[Array, ...] | None) -> tuple[Array, ...] | None:
    return out if out is None or isinstance(out, tuple) else (out,)


def _check_out(request: Request, results: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    if request.out is None:
        return
    if len(request.out) != len(results):
        raise InvalidArgument(
            f"{request.operator}: out has {len(request.out)} arrays, but the call returns {' and '.join(results)}; pass one "
            "array for each, in a tuple."
        )
    device = device_of(request.q)
    for array, (name, (dtype, shape)) in zip(request.out, results.items(), strict=True):
        where = f"{request.operator}: out for {name} is {describe(array)}"
        fits = is_array(array) and (dtype_name(array), tuple(array.shape), device_of(array)) == (dtype, shape, device)
        if not fits:
            raise InvalidArgument(f"{where}, but {dtype} {list(shape)} on {device} is accepted; allocate it so.")
        if isinstance(array, np.ndarray) and not array.flags.writeable:
            raise InvalidArgument(f"{where} and read-only, but results are written there; pass a writeable array.")
