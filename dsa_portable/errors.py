"""Every way the library says no: a mistake in the call, a feature that a backend lacks, and three kinds of missing backend."""

from __future__ import annotations


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
    """No backend can serve the call; see the three subclasses for which "no" it is."""


class UnknownBackend(BackendError, LookupError):
    """No installed package registers a backend of this name."""


class BackendNotImportable(BackendError, ImportError):
    """The backend is registered, but its SDK cannot be imported; the message holds the command that cures it."""

    @classmethod
    def because(cls, name: str, cause: Exception, cure: str) -> BackendNotImportable:
        """The error for a cause that is raised `from`, with the command that cures it."""
        return cls(f"backend {name!r} cannot be imported ({type(cause).__name__}: {cause}); run: {cure}")


class DeviceUnavailable(BackendError, RuntimeError):
    """The backend's SDK is there, but no device of its kind is."""
