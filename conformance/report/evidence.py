"""What a run is evidence of: read from what was recorded, never from what a backend says of itself."""

from __future__ import annotations

from collections.abc import Mapping

from dsa_portable.conformance.execute.recording import Recording, Subject
from dsa_portable.conformance.report.schema import CaseResult, Evidence, Status

# What a probe writes where it does not know.
UNNAMED = ("", "unknown", "n/a", "none", "-", "?")
# Why a run is of a chip: on the backend's word alone, and where the framework could look as well.
DECLARED = "as declared by the backend: its probe named chip and driver, and its witness moved in every call"
SEEN = "the framework's profiler saw kernels on the device in every call; chip and driver are as the backend's probe named them"
# Before the first case of a run that may be of a chip.
YET = "yet to be shown: whether its calls reach the chip"


def evidence_of(subject: Subject, recordings: Mapping[str, Recording], rows: Mapping[str, CaseResult]) -> tuple[Evidence, str]:
    """(class, why it is that one) of the rows so far and the recordings they were judged from."""
    if subject.interpreted:
        return Evidence.SIMULATED, "TRITON_INTERPRET is set: kernels ran in Triton's interpreter on the host"
    if inside := [id for id in rows if id in recordings and recordings[id].interpreted]:
        return Evidence.SIMULATED, f"the backend switched Triton's interpreter on, seen in {inside[0]} first"
    if subject.emulate is not None:
        return Evidence.EMULATED, f"--emulate {subject.emulate}"
    if any(name.strip().lower() in UNNAMED for name in (subject.device.chip, subject.device.driver)):
        return Evidence.EMULATED, "the backend's probe does not name chip and driver"
    # A call that was refused has no duration: it never went to the chip, and says nothing about those that did.
    executed = [id for id, row in rows.items() if row.status in (Status.PASS, Status.FAIL) and row.seconds is not None]
    if not rows:
        return Evidence.EMULATED, YET
    if not executed:
        return Evidence.EMULATED, "no call has reached the chip"
    if unreached := [id for id in executed if not recordings[id].reached]:
        return (
            Evidence.EMULATED,
            f"no work was seen on the chip in {len(unreached)} of {len(executed)} cases, {unreached[0]} first",
        )
    if all(recordings[id].profiled for id in executed):
        return Evidence.HARDWARE, SEEN
    return Evidence.HARDWARE, DECLARED
