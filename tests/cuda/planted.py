"""Copies of the CUDA backend with a fault in its own text, imported beside the honest one and judged in this process."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsa_portable.arrays import to_numpy
from dsa_portable.backends.cuda import device
from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.cases.catalogue import CASES
from dsa_portable.conformance.judging.judge import judge_call
from dsa_portable.conformance.judging.rules import Verdict
from dsa_portable.conformance.selftest.plant import FileEdit, plant


def copy(folder: Path, name: str, *edits: FileEdit) -> str:
    """A copy of the backend's package, edited, that can be imported; returns its name. Raises PlantError for a stale text."""
    plant("dsa_portable.backends.cuda", folder, name, *edits)
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
