"""The default engine: ONNX Runtime runs the shipped graphs, the same that `export onnx` writes, one thread per session call.

Calls come from several Python threads; a session with a pool of its own would spin against them and lose half the machine.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import numpy as np
import onnxruntime

from dsa_portable.backends.cpu.settings import Float32


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
        feeds = {
            "q": q,
            "kv": kv,
            "softmax_scale": np.array(softmax_scale, np.float32),
            "value_dim": np.array([value_dim], np.int64),
        }
        out, top, largest_p = session("attend").run(["out", "largest_logit", "largest_p"], feeds)
        return out, top, 1 / largest_p
