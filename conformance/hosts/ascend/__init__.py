"""Stand-ins for CANN, the software below torch_npu: the real torch_npu runs on them, and no chip does."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

# The backend that runs on the stand-in, and where its libraries are kept: they are made anew when torch_npu changes.
BACKEND, EMULATE = "ascend", "DSA_EMULATE"


def cache_folder() -> Path:
    """Below the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsa-portable" / "ascend"


def prepare(backend: str) -> None:
    """Start the host runtime for the product that `--emulate` names, where the backend is ours. Raises HostUnavailable."""
    if backend == BACKEND and (chip := os.environ.get(EMULATE)):
        import_module(f"{__name__}.runtime").start(cache_folder(), chip)
