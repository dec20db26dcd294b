"""A small model of two layers, drawn: what the projections give, before anything is rotated, spread or quantised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance.cases import values

Array: TypeAlias = np.ndarray[Any, Any]

ROWS, KEYS, TOPK = 16, 1536, 256
INDEX_HEADS, INDEX_DIM = 16, 128
HEADS, KEY_DIM, VALUE_DIM = 16, 576, 512
OUTLIERS = [3, 70, 100]  # dimensions in which the index keys are 8 times larger, as real ones have them: Hadamard's reason


@dataclass(frozen=True)
class Layer:
    """What the projections of one layer give, float32 and not rotated: for the index and for the attention."""

    index_q: Array  # [ROWS, INDEX_HEADS, INDEX_DIM]
    index_k: Array  # [KEYS, INDEX_DIM]
    head_weights: Array  # [ROWS, INDEX_HEADS]
    q: Array  # [ROWS, HEADS, KEY_DIM]
    kv: Array  # [KEYS, KEY_DIM]


def positions() -> tuple[Array, Array]:
    """(of the rows, of the keys): the rows are the last of the keys."""
    keys = np.arange(KEYS)
    return keys[-ROWS:], keys


def layers(seed: str) -> tuple[Layer, Layer]:
    """Two layers that share most of what they see, as neighbours do; index heads differ in size by up to 16."""

    def draw(name: str, *shape: int) -> Array:
        common, own = values.bell(f"{seed}common/{name}", shape), values.bell(f"{seed}own/{name}", (2, *shape))
        return np.asarray((0.8 * common + 0.6 * own) * 2.0**-7).astype(np.float32)

    sizes = np.exp2(np.arange(INDEX_HEADS) % 5 - 2).astype(np.float32)
    index_q = draw("index_q", ROWS, INDEX_HEADS, INDEX_DIM) * sizes[:, None]
    index_k = draw("index_k", KEYS, INDEX_DIM)
    index_k[..., OUTLIERS] *= 8
    parts = (
        index_q,
        index_k,
        draw("weights", ROWS, INDEX_HEADS) + np.float32(1),
        draw("q", ROWS, HEADS, KEY_DIM) * np.float32(0.75),
        draw("kv", KEYS, KEY_DIM),
    )
    first, second = (Layer(*(part[i] for part in parts)) for i in range(2))
    return first, second
