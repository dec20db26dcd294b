"""From a checked request to its backend's results, in the caller's kind of arrays."""

from __future__ import annotations

from typing import Any

from dsa_portable import registry
from dsa_portable.arrays import as_kind, device_name, kind
from dsa_portable.contract import Request, require
from dsa_portable.errors import no_exit


def call(request: Request, argument: str | None) -> Any:
    """What the backend makes of it: the one named by `argument`, else as registry.select has it."""
    chosen = registry.select(argument, device_name(request.first))
    found = registry.device(chosen.name)
    with no_exit(chosen.name):
        require(request, chosen.capabilities(found), chosen.name)
        results = registry.operator(chosen.name, request.operator)(request.as_kind(chosen.arrays))
    if request.out is not None:
        return request.out if len(request.out) > 1 else request.out[0]
    wanted = kind(request.first)
    return tuple(as_kind(r, wanted) for r in results) if isinstance(results, tuple) else as_kind(results, wanted)
