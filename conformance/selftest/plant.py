"""A planted fault is an edit of a text that stands there once: of the honest kernel, or of any backend's own files."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from dsa_portable.conformance.cases.call import Call
from dsa_portable.errors import DSAError
from dsa_portable.profile import Profile

KERNEL = Path(__file__).with_name("kernel.py")
# (text that stands there once, text instead)
Edit = tuple[str, str]
# (file of a package, text that stands there once, text instead)
FileEdit = tuple[str, str, str]


class PlantError(DSAError, LookupError):
    """The text of an edit does not stand where it should, or stands there more than once."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong, as an edit: `old` becomes `new`, then each of `more`; `stands_for` is a public bug (repo#number)."""

    code: str
    title: str
    old: str
    new: str
    stands_for: str = ""
    more: tuple[Edit, ...] = ()

    @property
    def edits(self) -> tuple[Edit, ...]:
        """All of them, in order."""
        return ((self.old, self.new), *self.more)


def edited(text: str, edits: Sequence[Edit], where: str) -> str:
    """The text with every edit made. Raises PlantError."""
    for old, new in edits:
        if (count := text.count(old)) != 1:
            raise PlantError(f"{where} holds {old!r} {count} times, but an edit needs it once; mend the edit.")
        text = text.replace(old, new)
    return text


def plant(package: str, folder: Path, name: str, *edits: FileEdit) -> Path:
    """A copy of a backend's package, edited, that can be imported from `folder` as `name`. Raises PlantError."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    target = folder / name
    shutil.copytree(Path(spec.origin).parent, target, ignore=shutil.ignore_patterns("__pycache__"))
    for file, old, new in edits:
        path = target / file
        path.write_text(edited(path.read_text(encoding="utf-8"), [(old, new)], f"{file} of {package}"), encoding="utf-8")
    for path in target.rglob("*.py"):
        path.write_text(path.read_text(encoding="utf-8").replace(package, name), encoding="utf-8")
    return target


@dataclass(frozen=True)
class Kernel:
    """The honest kernel, or it with a fault: outputs by name from a call."""

    namespace: Mapping[str, Any]
    profile: Profile

    def run(self, call: Call) -> dict[str, np.ndarray[Any, Any]]:
        """The call's outputs, as a careless chip computes them: no floating-point warning."""
        with np.errstate(all="ignore"):
            outputs: dict[str, np.ndarray[Any, Any]] = self.namespace[call.operator](call, self.profile)
        return outputs


def executed(file: Path, fault: Fault | None, names: Mapping[str, Any]) -> dict[str, Any]:
    """What the module of a file defines once the fault's edits are made, freshly; they may use `names`. Raises PlantError."""
    where = f"{file.name}, for {fault.code or fault.title}" if fault else file.name
    namespace: dict[str, Any] = {**names, "__name__": "planted"}
    exec(compile(edited(_read(file), fault.edits if fault else (), where), where, "exec"), namespace)
    return namespace


@cache
def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def kernel(profile: Profile, fault: Fault | None = None, names: Mapping[str, Any] | None = None) -> Kernel:
    """A fresh kernel; edits may use `names` beside its own. Raises PlantError."""
    return Kernel(executed(KERNEL, fault, names or {}), profile)
