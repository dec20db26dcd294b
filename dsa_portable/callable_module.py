"""`dsa_portable.backends` and `dsa_portable.conformance` are folders and functions at once; an import must not lose the call.

Python binds an imported subpackage over any function of the same name in the parent, so the subpackage answers the call itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_callable(module: str, function: Callable[..., Any]) -> None:
    """From now on, calling the imported module calls `function`."""
    kind = type("CallableModule", (ModuleType,), {"__call__": staticmethod(function)})
    sys.modules[module].__class__ = kind
