"""The process that runs the backend and nothing else: it can import no answers, and it is replaced when it misbehaves.

It reads a JSON line per case from stdin, leaves a recording and says so on what was stdout; the backend prints to stderr.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from dsa_portable import operators, registry
from dsa_portable.arrays import NUMPY_DTYPES, device_name
from dsa_portable.backend import Backend
from dsa_portable.batch import ARRAYS as BATCH_ARRAYS
from dsa_portable.batch import Batch
from dsa_portable.conformance import hosts, lists
from dsa_portable.conformance.cases.call import Call, Outputs, drive, sha256_of
from dsa_portable.conformance.cases.catalogue import CASES
from dsa_portable.conformance.cases.surroundings import STRIDES
from dsa_portable.conformance.execute import arrays_file, declaration, emulation, kernels, recording, trace
from dsa_portable.conformance.execute.declaration import DeclarationError
from dsa_portable.conformance.execute.emulation import EmulationError
from dsa_portable.conformance.execute.process import end_with_parent, peak_memory
from dsa_portable.conformance.execute.recording import Recording, outputs_sha256
from dsa_portable.conformance.hosts import triton
from dsa_portable.errors import BackendError, Unsupported

# Packages that know answers.
ANSWERS = tuple(f"dsa_portable.conformance.{name}" for name in ("judging", "selftest", "bench"))
# How many stale buffers of each output's size are left for the backend's allocator to hand out again.
STALE_BUFFERS = 3
# What every byte of them is, and of what a caller passes as `out`: all ones are NaN in every float format, and the other is a
# finite number of 3e38 in float32 and bfloat16, for what cleans up NaN.
STALE = (0xFF, 0x7F)


class NoAnswers(importlib.abc.MetaPathFinder):
    """Refuses to import what knows the answers, so that no backend can."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Raise for these packages, leave everything else to the next finder."""
        if name in ANSWERS or name.startswith(tuple(f"{package}." for package in ANSWERS)):
            raise ImportError(f"{name} cannot be imported in the process that runs a backend")
        return None


def _stale(byte: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Bytes of STALE; integers are the largest there are, so that they are no legal padding."""
    array = np.empty(shape, NUMPY_DTYPES[dtype])
    array.view(np.uint8)[...] = byte
    if array.dtype.kind == "i":
        array[...] = np.iinfo(array.dtype).max
    return array


def _bytes(array: np.ndarray[Any, Any]) -> bytes:
    return np.ascontiguousarray(array).tobytes()


class Malformed(Exception):
    """The call returned what cannot be compared: other results than it was asked for."""


@dataclass
class Seen:
    """What adds up over a case's calls."""

    seconds: float = 0.0
    reached: bool = True
    profiled: bool = True
    changed_inputs: list[str] = field(default_factory=list)


class Worker:
    """Runs cases on one backend; `folder` takes the recordings, and stale memory holds the bytes `stale`."""

    def __init__(self, backend: Backend, folder: Path, stale: int = STALE[0], kind: str = "") -> None:
        self.backend, self.folder, self.stale = backend, folder, stale
        self.watcher = kernels.watcher(backend, kind)

    def run(self, case: str) -> None:
        """Run the case's calls one after another and leave its recording."""
        seen = Seen()
        inputs: list[str] = []
        outputs: list[Outputs] = []

        def run(call: Call) -> Outputs:
            inputs.append(call.sha256())
            outputs.append(self._call(call, seen))
            return outputs[-1]

        try:
            drive(CASES[case].steps(), run)
        except Unsupported as exc:
            # No duration: a refused call never went to the chip, and is no evidence of where calls go.
            recording.save(self.folder, Recording(case, "unsupported", str(exc), exc.capability))
            return
        except Malformed as exc:
            recording.save(self.folder, Recording(case, "malformed", str(exc), seconds=seen.seconds, reached=seen.reached))
            return
        self._check_health()
        done = Recording(
            case,
            "done",
            seconds=seen.seconds,
            reached=seen.reached,
            profiled=seen.profiled,
            interpreted=triton.interpreting(),
            changed_inputs=tuple(seen.changed_inputs),
            calls=len(outputs),
            inputs_sha256=sha256_of(inputs),
            outputs_sha256=outputs_sha256(outputs),
            peak_memory=peak_memory(),
        )
        recording.save(self.folder, done, outputs)

    def _call(self, call: Call, seen: Seen) -> Outputs:
        """Put the inputs on the device, call, check the inputs, get the outputs; `seen` adds up what was seen."""
        put, get = self.backend.put, self.backend.get

        def put_copy(array: np.ndarray[Any, Any]) -> Any:
            # Where a device shares the host's memory `put` may share the array: what is compared below is not what was passed.
            return put(np.array(array))

        on_device, batch = call.on(put_copy), call.make_batch(put_copy)
        arguments = {**on_device.arrays, **call.options, "batch": batch}
        wants_out = bool(arguments.pop("out", False))
        results = call.request.results
        if wants_out:
            arguments["out"] = tuple(STRIDES[call.strides](_stale(self.stale, *result), put) for result in results.values())
        self._leave_stale_buffers(results)
        self.backend.synchronize()
        before = self._witness()
        with self.watcher.counting() as counted:
            started = time.perf_counter()
            returned = getattr(operators, call.operator)(**arguments)
            self.backend.synchronize()
            seen.seconds += time.perf_counter() - started
        returned = returned if isinstance(returned, tuple) else (returned,)
        worked = self._witness() > before and counted.kernels != 0
        seen.profiled &= counted.kernels is not None
        seen.reached &= (worked or not call.request.dims["Tq"]) and all(
            device_name(array) in self.backend.devices for array in returned
        )
        if len(returned) != len(results):
            raise Malformed(f"{len(returned)} arrays for {', '.join(results)}")
        got = {name: get(array) for name, array in zip(results, returned, strict=True)}
        if masked := [name for name, array in got.items() if isinstance(array, np.ma.MaskedArray)]:
            raise Malformed(f"a masked array for {', '.join(masked)}")
        outputs = {name: np.array(array) for name, array in got.items()}
        if swapped := [name for name, array in outputs.items() if not array.dtype.isnative]:
            raise Malformed(f"numbers of another byte order for {', '.join(swapped)}")
        if strange := [f"{array.dtype} for {name}" for name, array in outputs.items() if not arrays_file.can_hold(array)]:
            raise Malformed(", ".join(strange))
        seen.changed_inputs += self._changed(call, on_device, batch)
        return outputs

    def _witness(self) -> int:
        return self.backend.witness() if self.backend.witness else 0

    def _leave_stale_buffers(self, results: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        """An output that the backend allocates and does not fill should hold NaN, not zeros or the last answer."""
        buffers = [self.backend.put(_stale(self.stale, *result)) for result in results.values() for _ in range(STALE_BUFFERS)]
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
    end_with_parent()
    name, folder, ours = sys.argv[1], Path(sys.argv[2]), os.getpid()
    cases = [CASES[id] for id in lists.load(sys.argv[3]).cases]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.meta_path.insert(0, NoAnswers())
    # Kept before a backend's code can put others in their place.
    as_text, from_text = json.dumps, json.loads

    def answer(message: dict[str, Any], token: str = "") -> None:
        if os.getpid() != ours:  # what a backend forked, and did not end, comes back here as well
            os._exit(0)
        answers.write(as_text({**message, "token": token}) + "\n")
        answers.flush()

    try:
        if os.environ.get(emulation.VARIABLE):
            emulation.check(registry.load(name))
        hosts.prepare(name)
        backend, device = registry.load(name), registry.device(name)
        resolved = registry.select(None, device.kind).name
        found = {**vars(device), "versions": dict(device.versions)}
        declared = declaration.asked(backend, found, cases)
    except (BackendError, DeclarationError, EmulationError) as exc:
        answer({"unavailable": str(exc), "kind": type(exc).__name__})
        return
    told = {"device": found, "resolved": resolved, "interpreted": triton.requested()}
    answer({**told, "declared": recording.as_json(declared)})
    worker = Worker(backend, folder, STALE[int(sys.argv[4])], device.kind)
    for line in sys.stdin:
        question = from_text(line)
        case = question["case"]
        try:
            with np.errstate(all="ignore"):
                worker.run(case)
        except MemoryError as exc:
            recording.save(folder, Recording(case, "error", f"out of memory: {exc}", traceback=trace.raised(exc)))
        except Exception as exc:
            print(traceback.format_exc(), file=sys.stderr)
            recording.save(folder, Recording(case, "error", f"{type(exc).__name__}: {exc}", traceback=trace.raised(exc)))
        answer({"case": case}, question["token"])


if __name__ == "__main__":
    main()
