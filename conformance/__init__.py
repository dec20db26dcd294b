"""The conformance suite: cases are data, the backend runs before any reference exists, another process judges, a report tells.

`dsa_portable.conformance(...)`, `dsa-portable conformance` and this package's `run` are the same thing.
"""

from __future__ import annotations

from typing import Any

from dsa_portable.callable_module import make_callable


def run(**options: Any) -> Any:
    """Run a list on a backend and return the Report; options are those of `runner.run`."""
    from dsa_portable.conformance.session import run as run_list

    return run_list(**options)


make_callable(__name__, run)
