"""Which backend serves a call: `backend=` argument > `use_backend()` > `DSA_BACKEND` > where the arrays live. Never a fallback.

Built-in backends and anybody else's come through one mechanism, the entry-point group `dsa_portable.backends`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from dsa_portable.backend import CONTRACT_VERSION, Backend, Device
from dsa_portable.errors import BackendError, BackendNotImportable, DeviceUnavailable, InvalidArgument, UnknownBackend

GROUP = "dsa_portable.backends"
VARIABLE = "DSA_BACKEND"
_chosen: ContextVar[str | None] = ContextVar("dsa_portable_backend", default=None)


@dataclass(frozen=True)
class Status:
    """One line of `dsa-portable backends`: the declaration if it loads, the device if there is one, else the reason and cure."""

    name: str
    backend: Backend | None
    device: Device | None
    reason: str = ""

    @property
    def available(self) -> bool:
        """True where the backend can serve a call now."""
        return self.device is not None


@lru_cache(maxsize=1)
def _entry_points() -> dict[str, tuple[EntryPoint, ...]]:
    found: dict[str, tuple[EntryPoint, ...]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda p: (p.name, p.value)):
        # An editable install and a checkout on the path can both report the same entry point: one backend, not two.
        if point.value not in [p.value for p in found.get(point.name, ())]:
            found[point.name] = (*found.get(point.name, ()), point)
    return found


def names() -> list[str]:
    """Every registered backend's name; nothing is imported."""
    return sorted(_entry_points())


@cache
def load(name: str) -> Backend:
    """The declaration of this name. Raises UnknownBackend, or BackendNotImportable where its own module fails."""
    points = _entry_points().get(name, ())
    if not points:
        raise UnknownBackend(
            f"backend {name!r} is not registered, but {', '.join(names())} are; install its package or pick one."
        )
    if len(points) > 1:
        raise BackendNotImportable(
            f"backend {name!r} is registered twice ({' and '.join(p.value for p in points)}); uninstall one of the packages."
        )
    try:
        backend = points[0].load()
    except Exception as exc:
        raise BackendNotImportable(f"backend {name!r} ({points[0].value}) cannot be imported: {exc}; reinstall it.") from exc
    if not isinstance(backend, Backend) or backend.name != name:
        raise BackendNotImportable(f"entry point {name!r} ({points[0].value}) is no Backend of that name; mend its package.")
    if backend.contract.split(".")[0] != CONTRACT_VERSION.split(".")[0]:
        raise BackendNotImportable(
            f"backend {name!r} was written for contract {backend.contract}, but this is {CONTRACT_VERSION}; update its package."
        )
    return backend


@cache
def device(name: str) -> Device:
    """The device of a backend. Raises BackendNotImportable (with the command that cures it) or DeviceUnavailable."""
    backend = load(name)
    try:
        return backend.probe()
    except BackendError:
        raise
    except ImportError as exc:
        raise BackendNotImportable(f"backend {name!r} needs what is not installed ({exc}); run: {backend.install}") from exc
    except Exception as exc:
        raise DeviceUnavailable(
            f"backend {name!r}: its probe failed ({type(exc).__name__}: {exc}); check driver and device."
        ) from exc


@cache
def operator(name: str, operation: str) -> Callable[[Any], Any]:
    """The backend's function for one operator, imported now."""
    device(name)
    module, _, attribute = load(name).operators[operation].partition(":")
    try:
        function: Callable[[Any], Any] = getattr(import_module(module), attribute)
    except ImportError as exc:
        raise BackendNotImportable(f"backend {name!r} needs what is not installed ({exc}); run: {load(name).install}") from exc
    return function


def backends() -> list[Status]:
    """All registered backends, each with its device or the reason why it has none."""
    result = []
    for name in names():
        backend = None
        try:
            backend = load(name)
            result.append(Status(name, backend, device(name)))
        except BackendError as exc:
            result.append(Status(name, backend, None, str(exc)))
    return result


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Name the backend for the calls inside a `with` block (of this thread or task). Raises UnknownBackend at once."""
    load(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def requested(argument: str | None = None) -> str | None:
    """The name that was asked for, or None for auto; an empty `DSA_BACKEND` asks for nothing."""
    return argument or _chosen.get() or os.environ.get(VARIABLE) or None


def select(argument: str | None, where: str) -> Backend:
    """The backend for arrays on the device kind `where`."""
    name = requested(argument)
    if name is None:
        return _auto(where, [load(n) for n in names()])
    backend = load(name)
    if where not in backend.devices:
        raise InvalidArgument(
            f"q is on {where}, but backend {name!r} takes arrays on {' or '.join(backend.devices)}; move them, nothing is copied silently."
        )
    return backend


def _auto(where: str, candidates: Sequence[Backend]) -> Backend:
    fitting = [b for b in candidates if b.auto and where in b.devices]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        claims = " and ".join(b.name for b in fitting)
        raise InvalidArgument(f"backends {claims} both claim arrays on {where}; name one with backend= or {VARIABLE}.")
    raise UnknownBackend(
        f"no registered backend claims arrays on {where}, but {', '.join(names())} exist; name one or move the arrays."
    )
