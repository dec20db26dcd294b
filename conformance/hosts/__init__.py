"""Stand-ins for a chip: the only rooms that patch an SDK. What runs here is never HARDWARE."""

from __future__ import annotations

from importlib import import_module


def prepare(backend: str) -> None:
    """Start what stands in for a backend's chip where the environment asks for it, before any SDK is imported."""
    import_module("dsa_portable.conformance.hosts.triton").prepare()
    import_module("dsa_portable.conformance.hosts.ascend").prepare(backend)
