"""The second pass of a run on a chip: what passed is asked again, in the other order, in a new process over other stale memory.

A kernel that is wrong now and then is found in one of two calls, or in none; how likely that is, the report says.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, MutableMapping
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

from dsa_portable.conformance.execute.chip import Chip
from dsa_portable.conformance.execute.recording import Recording, Subject
from dsa_portable.conformance.judging.process import Judges
from dsa_portable.conformance.report.schema import FAILING, CaseResult, Status

# A line is said each time so many cases are done.
EVERY = 250


def second_pass(
    subject: Subject,
    rows: MutableMapping[str, CaseResult],
    recordings: Mapping[str, Recording],
    chip: Chip,
    keep: Path,
    say: Callable[[str], None],
) -> None:
    """Ask what passed once more, but for claims that have failed already. Where bits differ the row fails if they may not, or
    by what the other bits are.

    Closes the chip: two processes may not share a device. Raises BackendError where it cannot be started again.
    """
    failed = {_claim(row) for row in rows.values() if row.status in FAILING}
    asked = [id for id, row in rows.items() if row.status is Status.PASS and _claim(row) not in failed][::-1]
    if not asked:
        return
    say(f"second pass: {len(asked)} cases, last to first, in a new process")
    chip.close()
    with tempfile.TemporaryDirectory(prefix="dsa-portable-") as place:
        folder = Path(place)
        with (
            closing(Judges(1, folder, keep=keep, logs=folder, say=say)) as judges,
            closing(chip.afresh(folder, stale=1)) as other,
        ):
            for done, id in enumerate(asked, start=1):
                found = other.record(id)
                if (found.status, found.outputs_sha256) != (recordings[id].status, recordings[id].outputs_sha256):
                    rows[id] = _judged(rows[id], subject, found, judges)
                    if rows[id].status is not Status.PASS:
                        say(f"second pass: {rows[id].status} {id}  {rows[id].reason}")
                for path in folder.glob(f"{id}.*"):
                    path.unlink()
                if done % EVERY == 0:
                    say(f"second pass: {done} of {len(asked)} cases")


def _claim(row: CaseResult) -> tuple[str, str, str]:
    return row.operator, row.format, row.phase


def _judged(row: CaseResult, subject: Subject, found: Recording, judges: Judges) -> CaseResult:
    """The row of a case whose bits were others in the second pass."""
    profile = subject.profiles.get(_claim(row))
    if found.status == "done" and profile is not None and profile.deterministic:
        words = "deterministic is declared, but a second run of the case, in another process and order, returned other bits"
        return row.model_copy(update={"status": Status.FAIL, "rule": "agreement", "reason": words})
    recorded: Future[Recording] = Future()
    recorded.set_result(found)
    again = judges.submit(subject, recorded).result()
    if again.status is Status.PASS:
        return row
    words = f"it passed, and in a second run, in another process and order: {again.reason}"
    status = again.status if again.status in (Status.FAIL, Status.ERROR) else Status.ERROR
    return again.model_copy(update={"status": status, "reason": words})
