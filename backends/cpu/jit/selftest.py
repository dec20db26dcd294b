"""A call whose every sum is exact, tried before the engine is chosen unasked: whatever compiles wrongly here is not used."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from dsa_portable.backends.cpu.index_select import top
from dsa_portable.backends.cpu.jit.kernels.score import TILE
from dsa_portable.backends.cpu.jit.lightning_index import lightning_index
from dsa_portable.batch import Batch
from dsa_portable.operators.lightning_index import IndexRequest

# More than two tiles of keys, and not a whole group behind them; small integers, so that equal scores are common.
ROWS, KEYS, TOPK = 3, 2 * TILE + 21, 40
SEED = 2026


def disagreement() -> str:
    """What is wrong with the compiled index on this processor; empty where nothing is. Raises as compile.chosen does."""
    rng = np.random.default_rng(SEED)
    q, k = (rng.integers(-4, 5, shape).astype(np.float32) for shape in ((ROWS, 64, 128), (KEYS, 128)))
    weights, scales = (rng.integers(-2, 3, shape).astype(np.float32) for shape in ((ROWS, 64), (KEYS,)))
    e4m3 = ml_dtypes.float8_e4m3fn
    request = IndexRequest.checked(
        q=q.astype(e4m3),
        k=k.astype(e4m3),
        weights=weights,
        k_scale=abs(scales),
        topk=TOPK,
        batch=Batch.dense(ROWS, KEYS, causal=False),
        return_scores=True,
    )
    indices, scores = lightning_index(request)
    exact = np.einsum("th,ths->ts", weights, np.maximum(q @ k.T, 0)) * abs(scales)
    wanted = np.stack([top(row, TOPK) for row in exact])
    if not np.array_equal(indices, wanted) or not np.array_equal(scores, np.take_along_axis(exact, wanted, 1)):
        return "its kernels give wrong numbers on this processor"
    return ""
