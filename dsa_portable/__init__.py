"""DeepSeek Sparse Attention, portable: two operators, one contract, many backends, and the suite that judges them.

>>> indices = dsa_portable.lightning_index(q, k, weights, k_scale=k_scale, topk=2048)
>>> out = dsa_portable.sparse_attend(q_absorbed, kv, indices, softmax_scale=192**-0.5)
"""

from __future__ import annotations

from pathlib import Path

_here = Path(__file__).resolve().parent
if (_here.parent / "backends" / "cpu").is_dir() and not (_here / "backends").is_dir():
    # In a checkout `backends` and `conformance` stand beside this folder, not in it; the wheel maps them into it.
    __path__.append(str(_here.parent))

from dsa_portable.batch import Batch  # noqa: E402
from dsa_portable.deprecated import backends as backends  # noqa: E402
from dsa_portable.deprecated import conformance as conformance  # noqa: E402
from dsa_portable.errors import (  # noqa: E402
    BackendError,
    BackendExited,
    BackendNotImportable,
    DeviceUnavailable,
    DSAError,
    InvalidArgument,
    UnknownBackend,
    Unsupported,
)
from dsa_portable.operators import index_scores, index_select, lightning_index, merge, sparse_attend  # noqa: E402
from dsa_portable.registry import list_backends, use_backend  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BackendExited",
    "BackendNotImportable",
    "Batch",
    "DSAError",
    "DeviceUnavailable",
    "InvalidArgument",
    "UnknownBackend",
    "Unsupported",
    "index_scores",
    "index_select",
    "lightning_index",
    "list_backends",
    "merge",
    "sparse_attend",
    "use_backend",
]
