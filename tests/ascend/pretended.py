"""Run by test_adapter.py: make a pretend NPU, run cases of core through the adapter and edited copies of it, print verdicts."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dsa_portable.backend import Device
from dsa_portable.backends.ascend import device, schemas
from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.cases.catalogue import CASES
from dsa_portable.conformance.hosts.ascend import pretend, reference
from dsa_portable.conformance.judging.judge import judge_call
from dsa_portable.conformance.selftest.plant import plant
from dsa_portable.operators import REQUESTS

SOC = {"A2": "Ascend910B3", "A3": "Ascend910_9382", "950": "Ascend950PR_9589"}


def edited(folder: Path, name: str, edit: list[str] | None) -> str:
    """The name of the adapter's package, or of a copy with a text replaced."""
    if edit is None:
        return "dsa_portable.backends.ascend"
    file, old, new = edit
    return plant("dsa_portable.backends.ascend", folder, name, (file, old, new)).name


def outputs(package: str, call: Call) -> dict[str, Any]:
    """The results of a call on the pretend device, by name."""
    arguments = {**call.on(device.put).arrays, **call.options, "batch": call.make_batch(device.put)}
    results = call.request.results
    wants_out = arguments.pop("out", False)
    out = tuple(device.put(np.zeros(shape, np.int8)).to(dtype_of(dtype)) for dtype, shape in results.values())
    request = REQUESTS[call.operator].checked(**arguments, out=out if wants_out else None)
    function = getattr(importlib.import_module(f"{package}.{call.operator}"), call.operator)
    pretend.HOST_READS.clear()
    found = function(request)
    READS.extend(pretend.HOST_READS)
    found = out if wants_out else found if isinstance(found, tuple) else (found,)
    return {name: device.get(tensor) for name, tensor in zip(results, found, strict=True)}


def dtype_of(name: str) -> Any:
    return getattr(importlib.import_module("torch"), name)


READS: list[str] = []


def main() -> None:
    """The product and its tasks, title -> (edit or None, cases), as JSON in the first argument."""
    product, tasks = json.loads(sys.argv[1])
    table = {name: (schemas.GENERATIONS["C"][name], getattr(reference, name)) for name in schemas.OPERATORS}
    pretend.setup(SOC[product], table)
    chip = Device("npu", SOC[product], "pretend", 1, product)
    verdicts: dict[str, dict[str, Any]] = {}
    seen: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, folder)
        for number, (title, (edit, cases)) in enumerate(tasks.items()):
            package = edited(Path(folder), f"planted{number}", edit)
            verdicts[title] = {name: verdict(package, chip, name) for name in cases}
            seen = seen or {"host_reads": list(READS), "operators": sorted(pretend.USED)}
        before = device.witness()
        outputs("dsa_portable.backends.ascend", next(CASES["attend-bf16-decode-out"].steps()))
        seen["witness"] = device.witness() - before
    print(json.dumps({"verdicts": verdicts, **seen}))


def verdict(package: str, chip: Device, name: str) -> tuple[str, str | None, str]:
    """(status, rule, reason) of a named case; a call that is refused or breaks is an ERROR."""
    case = CASES[name]
    call = next(case.steps())
    profile = device.profile(chip, call.operator, case.format, case.phase)
    try:
        with np.errstate(all="ignore"):
            found = judge_call(case, call, outputs(package, call), profile)
    except Exception as exc:
        return "ERROR", None, f"{type(exc).__name__}: {exc}"
    return found.status, found.rule, found.reason


if __name__ == "__main__":
    main()
