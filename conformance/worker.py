"""The process that runs the backend and nothing else: it cannot import the oracle, and it is replaced when it misbehaves.

It reads one JSON line per case from stdin and answers with one on what was stdout; whatever the backend prints goes to stderr.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dsa_portable import ops, registry
from dsa_portable.arrays import NUMPY_DTYPES, device_name
from dsa_portable.backend import Backend
from dsa_portable.batch import ARRAYS as BATCH_ARRAYS
from dsa_portable.batch import Batch
from dsa_portable.conformance import arrays_file, hosts
from dsa_portable.conformance.cases.call import Call, Outputs, drive, request_of, sha256_of
from dsa_portable.conformance.cases.catalogue import CASES
from dsa_portable.conformance.environment import peak_memory
from dsa_portable.conformance.hosts import triton
from dsa_portable.errors import BackendError, Unsupported

REFERENCES = frozenset(
    f"dsa_portable.conformance.{name}" for name in ("oracle", "oracle_dense", "emulator", "criteria", "judge")
)
# How many NaN-filled buffers of each output's size are left for the backend's allocator to hand out again.
STALE_BUFFERS = 3


class NoReference(importlib.abc.MetaPathFinder):
    """Refuses to import what knows the answers, so that no backend can."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Raise for the references, leave everything else to the next finder."""
        if name in REFERENCES:
            raise ImportError(f"{name} cannot be imported in the process that runs a backend")
        return None


def outputs_sha256(outputs: arrays_file.Arrays) -> str:
    """Over every output's name, dtype, shape and bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(outputs.items()):
        digest.update(f"{name} {array.dtype.name} {list(array.shape)}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _nan_bytes(dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """All ones: NaN in every float format, -1 in integers but with the sign bit cleared, so that it is no legal padding."""
    array = np.empty(shape, NUMPY_DTYPES[dtype])
    array.view(np.uint8)[...] = 0xFF
    if array.dtype.kind == "i":
        array[...] = np.iinfo(array.dtype).max
    return array


def _bytes(array: np.ndarray[Any, Any]) -> bytes:
    return np.ascontiguousarray(array).tobytes()


class Malformed(Exception):
    """The call returned what cannot be compared: other results than it was asked for."""


class Runner:
    """Runs cases on one backend; `scratch` takes the outputs."""

    def __init__(self, backend: Backend, scratch: Path) -> None:
        self.backend, self.scratch = backend, scratch

    def run(self, case_id: str) -> dict[str, Any]:
        """Run the case's calls one after another; the answer says what became of them, the outputs lie in `scratch`."""
        answer: dict[str, Any] = {"case": case_id, "status": "done", "seconds": 0.0, "reached": True, "changed_inputs": []}
        inputs: list[str] = []
        outputs: list[str] = []

        def run(call: Call) -> Outputs:
            inputs.append(call.sha256())
            found = self._call(call, answer)
            arrays_file.save(self.scratch / f"{case_id}.{len(outputs)}.npz", found)
            outputs.append(outputs_sha256(found))
            return found

        try:
            drive(CASES[case_id].steps(), run)
        except Unsupported as exc:
            # No duration: a refused call never went to the chip, and is no evidence of where calls go.
            return answer | {"status": "unsupported", "capability": exc.capability, "reason": str(exc), "seconds": None}
        except Malformed as exc:
            return answer | {"status": "malformed", "reason": str(exc)}
        self._check_health()
        shas = {"inputs_sha256": sha256_of(inputs), "outputs_sha256": sha256_of(outputs)}
        return answer | shas | {"calls": len(outputs), "peak_memory": peak_memory(), "interpreted": triton.interpreting()}

    def _call(self, call: Call, answer: dict[str, Any]) -> Outputs:
        """Put the inputs on the device, call, check the inputs, get the outputs; `answer` adds up what was seen."""
        put, get = self.backend.put, self.backend.get

        def put_copy(array: np.ndarray[Any, Any]) -> Any:
            # Where a device shares the host's memory `put` may share the array: what is compared below is not what was passed.
            return put(np.array(array))

        on_device, batch = call.on(put_copy), call.make_batch(put_copy)
        arguments = {**on_device.arrays, **call.options, "batch": batch}
        wants_out = bool(arguments.pop("out", False))
        results = request_of(call).results
        if wants_out:
            arguments["out"] = tuple(put(_nan_bytes(*result)) for result in results.values())
        self._leave_stale_buffers(results)
        self.backend.synchronize()
        before, started = self._witness(), time.perf_counter()
        returned = getattr(ops, call.operator)(**arguments)
        self.backend.synchronize()
        answer["seconds"] += time.perf_counter() - started
        returned = returned if isinstance(returned, tuple) else (returned,)
        worked = self._witness() > before or not len(call.arrays["q"])
        answer["reached"] &= worked and all(device_name(array) in self.backend.devices for array in returned)
        if len(returned) != len(results):
            raise Malformed(f"{len(returned)} arrays for {', '.join(results)}")
        outputs = {name: np.array(get(array)) for name, array in zip(results, returned, strict=True)}
        if strange := [f"{array.dtype} for {name}" for name, array in outputs.items() if not arrays_file.can_hold(array)]:
            raise Malformed(", ".join(strange))
        answer["changed_inputs"] += self._changed(call, on_device, batch)
        return outputs

    def _witness(self) -> int:
        return self.backend.witness() if self.backend.witness else 0

    def _leave_stale_buffers(self, results: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        """An output that the backend allocates and does not fill should hold NaN, not zeros or the last answer."""
        buffers = [self.backend.put(_nan_bytes(*result)) for result in results.values() for _ in range(STALE_BUFFERS)]
        del buffers

    def _changed(self, call: Call, on_device: Call, batch: Batch) -> list[str]:
        """The names of inputs whose bytes are no longer those that were passed."""
        pairs: list[tuple[str, Any, Any]] = [(name, array, on_device.arrays[name]) for name, array in call.arrays.items()]
        lengths = zip(BATCH_ARRAYS, call.make_batch().flatten()[0], batch.flatten()[0], strict=True)
        pairs += [(name, ours, theirs) for name, ours, theirs in lengths if ours is not None]
        return [name for name, ours, theirs in pairs if _bytes(ours) != _bytes(self.backend.get(theirs))]

    def _check_health(self) -> None:
        """A device that failed asynchronously fails here, in the case that broke it, and not in the next one."""
        probe = np.arange(1024, dtype=np.int32)
        echoed = self.backend.get(self.backend.put(probe))
        self.backend.synchronize()
        if not np.array_equal(probe, echoed):
            raise RuntimeError("the device returned other bytes than were put on it")


def main() -> None:
    """Serve cases until stdin closes."""
    name, scratch = sys.argv[1], Path(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.meta_path.insert(0, NoReference())

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        hosts.prepare(name)
        backend, device = registry.load(name), registry.device(name)
        resolved = registry.select(None, device.kind).name
    except BackendError as exc:
        answer({"unavailable": str(exc), "kind": type(exc).__name__})
        return
    answer({"device": {**vars(device), "versions": dict(device.versions)}, "resolved": resolved, "version": backend.version})
    runner = Runner(backend, scratch)
    for line in sys.stdin:
        try:
            with np.errstate(all="ignore"):
                reply = runner.run(json.loads(line)["case"])
        except MemoryError as exc:
            reply = {"status": "error", "reason": f"out of memory: {exc}"}
        except Exception as exc:
            print(traceback.format_exc(), file=sys.stderr)
            reply = {"status": "error", "reason": f"{type(exc).__name__}: {exc}"}
        answer(reply)


if __name__ == "__main__":
    main()
