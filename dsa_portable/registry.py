"""Which backend serves a call: `backend=` argument > `use_backend()` > `DSA_BACKEND` > where the arrays live. Never a fallback.

Built-in backends and anybody else's come through one mechanism, the entry-point group `dsa_portable.backends`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import NoneType
from typing import Any

from dsa_portable import errors
from dsa_portable.backend import CONTRACT_VERSION, Backend, Device

GROUP, VARIABLE = "dsa_portable.backends", "DSA_BACKEND"
_chosen: ContextVar[str | None] = ContextVar("dsa_portable_backend", default=None)


@dataclass(frozen=True)
class Status:
    """One line of `dsa-portable backends`: the declaration if it loads, the device if there is one, else reason and cure."""

    name: str
    backend: Backend | None
    device: Device | None
    reason: str = ""

    @property
    def available(self) -> bool:
        """True where the backend can serve a call now."""
        return self.device is not None


@cache
def _entry_points() -> dict[tuple[str, str], EntryPoint]:
    # An editable install and a checkout on the path can both report the same entry point: one backend, not two.
    return {(p.name, p.value): p for p in sorted(entry_points(group=GROUP))}


def names() -> list[str]:
    """Every registered backend's name; nothing is imported."""
    return sorted({name for name, _ in _entry_points()})


def registered(name: str) -> EntryPoint:
    """Where the declaration of this name lies; nothing is imported. Raises UnknownBackend, BackendNotImportable for two."""
    points = [point for key, point in _entry_points().items() if key[0] == name]
    if not points:
        raise errors.UnknownBackend(f"backend {name!r} is not registered, but {', '.join(names())} are; install or pick one.")
    if len(points) > 1:
        values = " and ".join(p.value for p in points)
        raise errors.BackendNotImportable(f"backend {name!r} is registered as both {values}; uninstall one of the packages.")
    return points[0]


@cache
def load(name: str) -> Backend:
    """The declaration of this name. Raises as `registered` does, or BackendNotImportable where its own module fails."""
    point = registered(name)
    package = point.dist.name if point.dist else point.module
    try:
        backend = point.load()
    except (Exception, SystemExit) as exc:
        raise errors.BackendNotImportable.because(name, exc, f"pip install --force-reinstall {package}") from exc
    if not isinstance(backend, Backend) or backend.name != name:
        raise errors.BackendNotImportable(f"{point.value} of {package} is no Backend named {name!r}; mend its entry point.")
    (major, _, minor), (ours, _, newest) = backend.contract.partition("."), CONTRACT_VERSION.partition(".")
    if major != ours or not minor.isdecimal() or int(minor) > int(newest):
        what = f"{name!r} was written for contract {backend.contract}, but this is {CONTRACT_VERSION}"
        raise errors.BackendNotImportable(f"backend {what}; install versions that agree.")
    return backend


@cache
def device(name: str) -> Device:
    """The device of a backend. Raises BackendNotImportable (with the command that cures it) or DeviceUnavailable."""
    try:
        return load(name).probe()
    except errors.BackendError:
        raise
    except ImportError as exc:
        raise errors.BackendNotImportable.because(name, exc, load(name).install) from exc
    except (Exception, SystemExit) as exc:
        raise errors.DeviceUnavailable(f"backend {name!r} failed its probe ({exc!r}); check driver and device.") from exc


@cache
def operator(name: str, operation: str) -> Callable[[Any], Any]:
    """The backend's function for one operator, imported now. Raises as `device` does, or Unsupported where it has none."""
    backend, _ = load(name), device(name)
    if operation not in backend.operators:
        raise errors.Unsupported(f"backend {name!r} does not offer {operation}; name one that does.", operation)
    try:
        return EntryPoint(operation, backend.operators[operation], GROUP).load()  # type: ignore[no-any-return]
    except (Exception, SystemExit) as exc:
        raise errors.BackendNotImportable.because(name, exc, backend.install) from exc


def list_backends() -> list[Status]:
    """All registered backends, each with its device or the reason why it has none."""
    result = []
    for name in names():
        backend = None
        try:
            backend = load(name)
            result.append(Status(name, backend, device(name)))
        except errors.BackendError as exc:
            result.append(Status(name, backend, None, str(exc)))
    return result


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Name the backend for the calls inside a `with` block (of this thread or task). Raises as `load` does, on entry."""
    load(name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def requested(argument: str | None = None) -> str | None:
    """The name that was asked for, or None for auto; an empty `DSA_BACKEND` asks for nothing. Raises InvalidArgument."""
    if not isinstance(argument, (str, NoneType)):
        raise errors.InvalidArgument(f"backend is {argument!r}, but a name or None is accepted; pass one.")
    return argument if argument is not None else _chosen.get() or os.environ.get(VARIABLE) or None


def select(argument: str | None, where: str) -> Backend:
    """The backend for arrays on the device kind `where`."""
    name = requested(argument)
    if name is None:
        return _auto(where)
    if where not in load(name).devices:
        takes = " or ".join(load(name).devices)
        raise errors.InvalidArgument(f"q is on {where}, but backend {name!r} takes arrays on {takes}; move them.")
    return load(name)


def _auto(where: str) -> Backend:
    fitting, others, claims_where = [], "", import_module(f"{__package__}.asking").claims
    for name in names():
        try:
            fitting += [name] if claims_where(name, where) else []
        except errors.BackendError as exc:
            others += f" ({exc})"  # what cannot be loaded claims nothing and stops nobody, but explains why nobody is left
    if len(fitting) > 1:
        claims = " and ".join(fitting)
        raise errors.InvalidArgument(f"backends {claims} both claim arrays on {where}; name one with backend= or {VARIABLE}.")
    if not fitting:
        raise errors.UnknownBackend(f"none of {', '.join(names())} claims arrays on {where}{others}; name one or move them.")
    return load(fitting[0])
