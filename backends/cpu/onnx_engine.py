"""The default engine: ONNX Runtime runs the shipped graphs, the same that `export onnx` writes, one thread per session call.

Calls come from several Python threads; a session with a pool of its own would spin against them and lose half the machine.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import ml_dtypes
import numpy as np
import onnxruntime

from dsa_portable.backends.cpu.settings import Array, Float32

RESULTS = ["out", "largest_logit", "largest_p"]
# As onnx.TensorProto numbers it.
BFLOAT16 = 16


@cache
def session(graph: str) -> onnxruntime.InferenceSession:
    """A single-threaded session of one shipped graph; sessions may be called from many threads at once."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    model = (files("dsa_portable.backends.cpu") / "graphs" / f"{graph}.onnx").read_bytes()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Engine:
    """See settings.Engine."""

    threads_itself = False

    def index_scores(self, q: Float32, k: Float32, weights: Float32, k_scale: Float32) -> Float32:
        """See settings.Engine."""
        feeds = {"q": q, "k": k, "weights": weights, "k_scale": k_scale}
        scores: Float32 = session("index_scores").run(["scores"], feeds)[0]
        return scores

    def attend(self, q: Float32, kv: Float32, softmax_scale: float, value_dim: int) -> tuple[Float32, Float32, Float32]:
        """See settings.Engine."""
        feeds = {"q": q, "kv": kv, **_options(softmax_scale, value_dim)}
        out, top, largest_p = session("attend").run(RESULTS, feeds)
        return out, top, 1 / largest_p

    def attend_rows(
        self, q: Float32, kv: Array, positions: Array, softmax_scale: float, value_dim: int
    ) -> tuple[Float32, Float32, Float32]:
        """See settings.Engine."""
        feeds = {"q": q, "positions": np.asarray(positions, np.int64), **_options(softmax_scale, value_dim)}
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in feeds.items()}
        # Of a cache of bfloat16, which NumPy does not have, ONNX Runtime is told that these sixteen bits are some.
        if kv.dtype == ml_dtypes.bfloat16:
            values["kv"] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(kv.view(np.uint16), BFLOAT16)
        else:
            values["kv"] = onnxruntime.OrtValue.ortvalue_from_numpy(kv)
        found = session(f"attend_rows.{kv.dtype.name}").run_with_ort_values(RESULTS, values)
        out, top, largest_p = (np.array(value.numpy(), np.float32) for value in found)
        return out, top, np.float32(1) / largest_p


def _options(softmax_scale: float, value_dim: int) -> dict[str, Array]:
    return {"softmax_scale": np.array(softmax_scale, np.float32), "value_dim": np.array([value_dim], np.int64)}
