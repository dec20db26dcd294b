"""The one home of names that go in 0.2.0: each still works until then, and warns with its successor.

`dsa_portable.backends` and `dsa_portable.conformance` are folders and were functions too. Python binds an imported subpackage
over any function of the same name in the parent, so until 0.2.0 the subpackage answers the call itself.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from dsa_portable.registry import list_backends

if TYPE_CHECKING:
    from dsa_portable.conformance import run
else:

    def run(**options: Any) -> Any:
        """The suite's own `run`, imported when it is called: the core must not bring the suite with it."""
        return import_module("dsa_portable.conformance").run(**options)


_P = ParamSpec("_P")
_T = TypeVar("_T")


def renamed(former: str, successor: str, given: _T | None, value: _T) -> _T:
    """The value of an argument that was renamed: what was given under its former name, with a warning, else `value`."""
    if given is None:
        return value
    _warn(former, successor, ours=3)
    return given


def _warn(former: str, successor: str, *, ours: int = 2) -> None:
    # The frame above `ours` is the caller's own line: this function and what was called under the former name are ours.
    warnings.warn(f"{former} goes in dsa-portable 0.2.0; use {successor}.", DeprecationWarning, stacklevel=ours + 1)


def _renamed(former: str, successor: str, function: Callable[_P, _T]) -> Callable[_P, _T]:
    def call(*arguments: _P.args, **options: _P.kwargs) -> _T:
        _warn(former, successor)
        return function(*arguments, **options)

    return call


backends = _renamed("dsa_portable.backends()", "dsa_portable.list_backends()", list_backends)
conformance = _renamed("dsa_portable.conformance()", "`from dsa_portable.conformance import run`", run)


def make_callable(module: str, function: Callable[..., object]) -> None:
    """From now on, calling the imported module calls `function`."""
    kind = type("CallableModule", (ModuleType,), {"__call__": staticmethod(function)})
    sys.modules[module].__class__ = kind


def moved(former: str, successor: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module that was renamed: every name of the successor, with a warning."""

    def attribute(name: str) -> Any:
        value = getattr(import_module(successor), name)
        _warn(former, successor)
        return value

    return attribute
