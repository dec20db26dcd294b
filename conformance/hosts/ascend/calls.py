"""`python -m dsa_portable.conformance.hosts.ascend.calls CHIP CASE... [--out FOLDER]`: the aclnn calls of a case, as JSON.

What a vendor's engineer lays beside his own trace: every aclnn operator in its order, tensors with shape, strides, dtype and
offset, attributes as they were passed. The backend runs over the real torch_npu in host memory; nothing is judged.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from dsa_portable import operators, registry
from dsa_portable.conformance.cases.call import Call, Outputs, drive
from dsa_portable.conformance.cases.catalogue import CASES
from dsa_portable.conformance.hosts.ascend import BACKEND, aclnn, cache_folder, runtime
from dsa_portable.errors import DSAError, InvalidArgument


def recorded(case_id: str, host: runtime.Runtime) -> list[dict[str, Any]]:
    """The calls of a case, run now. Raises Unsupported where the backend does not offer what the case asks for."""
    backend = registry.load(BACKEND)
    found: list[dict[str, Any]] = []

    def run(call: Call) -> Outputs:
        on_device, batch = call.on(backend.put), call.make_batch(backend.put)
        arguments = {**on_device.arrays, **call.options, "batch": batch}
        arguments.pop("out", None)
        host.clear()
        returned = getattr(operators, call.operator)(**arguments, backend=BACKEND)
        backend.synchronize()
        found.extend(map(_as_json, host.calls))
        returned = returned if isinstance(returned, tuple) else (returned,)
        return {name: backend.get(array) for name, array in zip(call.request.results, returned, strict=True)}

    drive(CASES[case_id].steps(), run)
    return found


def _as_json(call: aclnn.Call) -> dict[str, Any]:
    names = aclnn.OPERATORS[call.operator].names
    arguments = call.named() if names else dict(enumerate(call.arguments))
    return {"operator": call.operator, "arguments": {str(name): _plain(value) for name, value in arguments.items()}}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """Write FOLDER/CASE.json for each case; 2 for a mistake in the call, 4 where the stand-in cannot run."""
    parser = argparse.ArgumentParser(prog="python -m dsa_portable.conformance.hosts.ascend.calls")
    parser.add_argument("chip", choices=list(runtime.CHIPS))
    parser.add_argument("case", nargs="+")
    parser.add_argument("--out", type=Path, default=Path("dsa-calls"))
    options = parser.parse_args(arguments)
    try:
        if unknown := [case for case in options.case if case not in CASES]:
            raise InvalidArgument(f"case {unknown[0]!r} is not known; see the ids with dsa-portable conformance --list-cases.")
        host = runtime.start(cache_folder(), options.chip)
        options.out.mkdir(parents=True, exist_ok=True)
        for case in options.case:
            found = {"case": case, "chip": host.chip, "cann": host.cann, "evidence": "EMULATED", "calls": recorded(case, host)}
            path = options.out / f"{case}.json"
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{path}: {len(found['calls'])} calls")
    except DSAError as exc:
        print(exc, file=sys.stderr)
        return 2 if isinstance(exc, InvalidArgument) else 4
    return 0


if __name__ == "__main__":
    sys.exit(main())
