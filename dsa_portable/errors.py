"""Every way the library says no: a mistake in the call, a feature that a backend lacks, and four ways to have no backend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class DSAError(Exception):
    """Base of every error that dsa-portable raises on purpose."""


class InvalidArgument(DSAError, ValueError):
    """The call is outside the contract: wrong rank, dtype, dimension, length, or a value that can have no meaning."""


class Unsupported(DSAError, NotImplementedError):
    """The call is inside the contract, but the backend does not offer it; `capability` is the declared feature that says so."""

    def __init__(self, message: str, capability: str) -> None:
        super().__init__(message)
        self.capability = capability


class BackendError(DSAError):
    """No backend can serve the call; see the four subclasses for which "no" it is."""


class UnknownBackend(BackendError, LookupError):
    """No installed package registers a backend of this name."""


class BackendNotImportable(BackendError, ImportError):
    """The backend is registered, but its SDK cannot be imported; the message holds the command that cures it."""

    @classmethod
    def because(cls, name: str, cause: BaseException, cure: str) -> BackendNotImportable:
        """The error for a cause that is raised `from`, with the command that cures it."""
        return cls(f"backend {name!r} cannot be imported ({type(cause).__name__}: {cause}); run: {cure}")


class DeviceUnavailable(BackendError, RuntimeError):
    """The backend's SDK is there, but no device of its kind is."""


class BackendExited(BackendError, RuntimeError):
    """The backend's own code called sys.exit, which would end the caller's process, and with 0 as if all were well."""


@contextmanager
def no_exit(name: str) -> Iterator[None]:
    """A block of a backend's own code that must not end the process. Raises BackendExited where it tries to."""
    try:
        yield
    except SystemExit as exc:
        raise BackendExited(f"backend {name!r} called sys.exit({exc.code!r}), which it must not; tell its authors.") from exc
