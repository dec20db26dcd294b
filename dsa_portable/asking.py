"""What a backend says of itself, asked in a process of its own: what a plug-in does in its import or probe, it does there.

`python -m dsa_portable.asking NAME` loads the backend and answers in one line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from dsa_portable import registry
from dsa_portable.contract import PerPhase
from dsa_portable.errors import BackendError, BackendNotImportable
from dsa_portable.operators import FEATURES

# A probe that imports an SDK takes seconds; one that needs more is taken for one that hangs.
SECONDS = 60.0


@dataclass(frozen=True)
class Said:
    """`lines` are those of `dsa-portable backends`; `problem` is why there is no declaration, and the rest is then empty."""

    problem: str = ""
    auto: bool = False
    devices: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()


@cache
def ask(name: str, probe: bool = True) -> Said:
    """Load a backend in another process, which has this one's variables and path; once for each name.

    probe: also find its device and what it declares, for which it imports its SDK.
    """
    path = os.pathsep.join(dict.fromkeys(entry or os.getcwd() for entry in sys.path))
    words = [sys.executable or "python3", "-m", __name__, name, *(["probe"] if probe else [])]
    env, nothing = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}, subprocess.DEVNULL
    try:
        done = subprocess.run(words, env=env, stdin=nothing, stdout=subprocess.PIPE, stderr=nothing, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return Said(problem=f"backend {name!r} did not say what it is within {SECONDS:g} s: it hangs; tell its authors")
    except OSError as exc:  # a program that brings its own Python
        return Said(problem=f"backend {name!r} cannot be asked what it is, as no Python starts ({exc}); name it")
    try:
        said = json.loads(done.stdout.splitlines()[-1])
        return Said(str(said["problem"]), bool(said["auto"]), tuple(said["devices"]), tuple(map(str, said["lines"])))
    except (ValueError, KeyError, TypeError, IndexError):
        code = done.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return Said(problem=f"backend {name!r} {how} before it said what it is; tell its authors")


def claims(name: str, where: str) -> bool:
    """Whether a backend takes arrays on the device kind unasked. One that is not ours is asked in another process: nobody named
    it, so what it does when it is imported must not be done to a caller who may not even want it. Raises BackendNotImportable.
    """
    if registry.registered(name).module.startswith(f"{__package__}.backends."):
        backend = registry.load(name)
        return backend.auto and where in backend.devices
    said = ask(name, probe=False)
    if said.problem:
        raise BackendNotImportable(said.problem)
    return said.auto and where in said.devices


def described(name: str) -> list[str]:
    """The lines of `dsa-portable backends` for a backend: available or why not, and what it declares. It runs its code here."""
    try:
        backend, device, reason = registry.load(name), None, ""
    except BackendError as exc:
        return [f"{name}: unavailable", f"  reason      {exc}"]
    try:
        device = registry.device(name)
    except BackendError as exc:
        reason = str(exc)
    lines = [f"{name} {backend.version}: {'available' if device is not None else 'unavailable'}"]
    chosen = "" if backend.auto else "; only by name"
    lines.append(f"  arrays      {backend.arrays} on {', '.join(backend.devices)}{chosen}; contract {backend.contract}")
    if device is not None:
        versions = ", ".join(f"{package} {version}" for package, version in device.versions.items())
        lines.append(f"  device      {device.count} x {device.chip} ({device.driver}); {versions}")
    else:
        lines.append(f"  reason      {reason}")
        if backend.install not in reason:
            lines.append(f"  cure        {backend.install}")
    try:
        return lines + _declared(backend.capabilities(device))
    except (Exception, SystemExit) as exc:
        return [*lines, f"  declares    nothing that can be read ({type(exc).__name__}: {exc}); tell the plug-in's author"]


def _declared(capabilities: Any) -> list[str]:
    lines = []
    for operator, features in FEATURES.items():
        declared = capabilities.get(operator, {})
        declared = {f.name: f.implied for f in features if declared and f.implied} | dict(declared)
        offered = [f"{f.name}={_values(declared[f.name])}" for f in features if f.name in declared]
        missing = [f.name for f in features if f.name not in declared]
        rest = f"; not offered: {', '.join(missing)}" if missing else ""
        lines.append(f"  {operator}: {'; '.join(offered) or 'nothing'}{rest}")
    return lines


def _values(values: Any) -> str:
    if isinstance(values, PerPhase):
        return f"decode {_values(values.decode)}, prefill {_values(values.prefill)}"
    return (
        "yes"
        if values == (True,)
        else ",".join(str(v) for v in values)
        if isinstance(values, (tuple, list, frozenset))
        else repr(values)
    )


def main(arguments: Sequence[str]) -> None:
    """Answer on what was stdout; a plug-in's own lines go to stderr."""
    answers, as_text = os.fdopen(os.dup(1), "w", encoding="utf-8"), json.dumps
    os.dup2(2, 1)
    name = arguments[0]
    lines = tuple(described(name)) if "probe" in arguments else ()
    try:
        backend = registry.load(name)
        said = Said("", backend.auto, tuple(backend.devices), lines)
    except BackendError as exc:
        said = Said(str(exc), lines=lines)
    answers.write("\n" + as_text(asdict(said)) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
