"""Stored rows to float32, exactly: gathering from flat or paged memory, unpacking caches, widening small formats."""

from __future__ import annotations

from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from dsa_portable.backends.cpu.settings import Float32
from dsa_portable.batch import Batch
from dsa_portable.formats import layout, unpack

Array: TypeAlias = np.ndarray[Any, Any]

_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def widen(array: Array) -> Float32:
    """The same values in float32; every operand format is a subset of it."""
    if array.dtype == ml_dtypes.bfloat16:
        # bfloat16 is the upper half of float32: four times faster than a cast through ml_dtypes.
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return np.asarray(_E4M3[array.view(np.uint8)])
    return array.astype(np.float32)


def places(batch: Batch, request: int, positions: Array) -> Array | tuple[Array, Array]:
    """What indexes a flat array, or a paged one, at these positions of a request."""
    if batch.block_table is None:
        assert batch.cu_seqlens_k is not None
        return np.asarray(batch.cu_seqlens_k[request] + positions)
    assert batch.page_size is not None
    return batch.block_table[request, positions // batch.page_size], positions % batch.page_size


def index_keys(
    k: Array, k_scale: Array | None, k_layout: str | None, where: Array | tuple[Array, ...]
) -> tuple[Float32, Float32]:
    """(keys [n, D], scales [n]) at these places."""
    if k_layout is not None:
        parts = unpack(k_layout, k)
        return widen(parts.values[where]), widen(parts.scale[where])
    keys = widen(k[where])
    return keys, np.ones(len(keys), np.float32) if k_scale is None else widen(k_scale[where])


def attention_rows(kv: Array, kv_layout: str | None, where: Array | tuple[Array, ...]) -> Float32:
    """kv [n, Dqk] at these places; a packed row is value * scale of its tile, in float32."""
    if kv_layout is None:
        return widen(kv[where])
    parts, tile = unpack(kv_layout, kv), layout(kv_layout).tile
    assert parts.rope is not None
    values = widen(parts.values[where])
    tiles = values.reshape(len(values), -1, tile)
    tiles *= parts.scale[where][..., None]
    return np.concatenate([values, widen(parts.rope[where])], axis=1)
