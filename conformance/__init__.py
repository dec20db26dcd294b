"""The conformance suite: cases are data, the backend runs before any reference exists, another process judges, a report tells.

This package's `run` and `dsa-portable conformance` are the same thing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsa_portable.deprecated import conformance, make_callable

if TYPE_CHECKING:
    from dsa_portable.conformance.session import run as run
else:

    def __getattr__(name: str) -> object:
        # Found when it is asked for: the suite needs pydantic, and who imports one module of this package may not have it.
        if name == "run":
            from dsa_portable.conformance.session import run

            return run
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


make_callable(__name__, conformance)
