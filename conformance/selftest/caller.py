"""An honest caller of both operators, straight: what happens before and between them. A planted fault is an edit of this text.

`dsa_portable.caller.prepare_index` does in one call what `prepare` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from dsa_portable.caller import ROTATIONS, IndexOperands, fold_weights, hadamard, rope
from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.cases.sparse_attend import V32_SCALE
from dsa_portable.conformance.selftest import kernel
from dsa_portable.conformance.selftest.model import INDEX_DIM, KEYS, ROWS, TOPK, VALUE_DIM, Layer, positions
from dsa_portable.formats import quantise_e4m3fn
from dsa_portable.profile import Profile

Array: TypeAlias = np.ndarray[Any, Any]
INDEXER, ATTENTION = ROTATIONS["deepseek-v3.2 indexer"], ROTATIONS["multi-head latent attention"]


def prepare(layer: Layer) -> IndexOperands:
    """Operands of lightning_index: rotated, spread, quantised, the queries' scale folded into the weights."""
    rows, keys = positions()
    style, dims = INDEXER
    q, k = rope(layer.index_q, rows, style=style, dims=dims), rope(layer.index_k, keys, style=style, dims=dims)
    q, k = hadamard(q), hadamard(k)
    (q, q_scale), (k, k_scale) = quantise_e4m3fn(q), quantise_e4m3fn(k)
    return IndexOperands(q, k, fold_weights(layer.head_weights, q_scale, INDEX_DIM), k_scale)


def run(model: Sequence[Layer]) -> list[tuple[Array, Array]]:
    """(indices, out) of each layer."""
    batch = {
        "cu_seqlens_q": np.array([0, ROWS], np.int32),
        "cu_seqlens_k": np.array([0, KEYS], np.int32),
        "seqlens_k": np.array([KEYS], np.int32),
    }
    selected = []
    for layer in model:
        index: dict[str, Any] = {"topk": TOPK, "k_layout": None}
        call = Call("lightning_index", prepare(layer)._asdict(), batch, index, {"page_size": None, "causal": True})
        selected.append(kernel.lightning_index(call, Profile())["indices"])
    found = []
    rows, keys = positions()
    style, dims = ATTENTION
    for layer, indices in zip(model, selected, strict=True):
        q, kv = rope(layer.q, rows, style=style, dims=dims), rope(layer.kv, keys, style=style, dims=dims)
        arrays = {"q": q.astype(ml_dtypes.bfloat16), "kv": kv.astype(ml_dtypes.bfloat16), "indices": indices}
        attend: dict[str, Any] = {"softmax_scale": V32_SCALE, "value_dim": VALUE_DIM, "kv_layout": None}
        found.append((indices, kernel.sparse_attend(Call("sparse_attend", arrays, batch, attend), Profile())["out"]))
    return found
