"""Copies of the CUDA backend with a fault in its own text, imported beside the honest one and judged in this process."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsa_portable.arrays import to_numpy
from dsa_portable.backends import cuda
from dsa_portable.backends.cuda import device
from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.cases.catalogue import CASES
from dsa_portable.conformance.judging.judge import judge_call
from dsa_portable.conformance.judging.rules import Verdict

# (file, text that stands there once, text instead)
Edit = tuple[str, str, str]


def copy(folder: Path, name: str, *edits: Edit) -> str:
    """Write a copy of the backend's package, edited, into `folder`; returns its name. Raises LookupError for a stale text."""
    target = folder / name
    shutil.copytree(Path(cuda.__file__).parent, target, ignore=shutil.ignore_patterns("__pycache__"))
    for file, old, new in edits:
        path = target / file
        text = path.read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise LookupError(f"{file} holds {old!r} {text.count(old)} times, not once")
        path.write_text(text.replace(old, new), encoding="utf-8")
    for path in target.rglob("*.py"):
        path.write_text(path.read_text(encoding="utf-8").replace("dsa_portable.backends.cuda", name), encoding="utf-8")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    return name


def outputs(package: str, call: Call) -> Mapping[str, np.ndarray[Any, Any]]:
    """The results of a call by name; what is allocated and not written holds NaN."""
    request = call.request
    function = getattr(importlib.import_module(f"{package}.{call.operator}"), call.operator)
    found = function(request.as_kind("torch"))
    found = found if isinstance(found, tuple) else (found,)
    return {name: np.array(to_numpy(array)) for name, array in zip(request.results, found, strict=True)}


def verdict(package: str, case_id: str) -> Verdict:
    """Of the one call of a named case, under the profile that the backend declares."""
    case = CASES[case_id]
    call = next(case.steps())
    profile = device.profile(device.probe(), call.operator, case.format, case.phase)
    with np.errstate(all="ignore"):
        return judge_call(case, call, outputs(package, call), profile)
