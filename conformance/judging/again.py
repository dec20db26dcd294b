"""What a failure takes: failing cases are asked again alone, for a command that shows the failure. No verdict changes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, MutableMapping
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

from dsa_portable.conformance.execute import recording
from dsa_portable.conformance.execute.chip import Chip
from dsa_portable.conformance.execute.recording import Recording, Subject
from dsa_portable.conformance.judging.process import Judges
from dsa_portable.conformance.report.outcomes import Outcomes
from dsa_portable.conformance.report.rows import passing_alone
from dsa_portable.conformance.report.schema import CaseResult, Status
from dsa_portable.errors import BackendError

# So many of a run's failing cases are asked again: each costs a start of the backend's process, or two.
ASKED_AGAIN = 5


def outcomes_so_far(subject: Subject, folder: Path, again: Collection[str], judges: Judges) -> Outcomes:
    """What became of the cases of a folder. Of those that are to be asked `again`, what was left unjudged is judged first: no
    failure is forgotten by asking once more.
    """
    outcomes = Outcomes(folder)
    for id in again:
        if (found := recording.load(folder, id)) is not None and not outcomes.has(id):
            recorded: Future[Recording] = Future()
            recorded.set_result(found)
            outcomes.settled(judges.submit(subject, recorded).result())
    return outcomes


def ask_again(subject: Subject, rows: MutableMapping[str, CaseResult], chip: Chip, say: Callable[[str], None]) -> None:
    """Ask the first failing cases that followed another in their process alone, in a new one, and mend their rows' commands.

    Closes the chip: two processes may not share a device.
    """
    failing = [id for id, row in rows.items() if row.status in (Status.FAIL, Status.ERROR) and chip.predecessors.get(id)]
    if not failing:
        return
    asked, left = failing[:ASKED_AGAIN], len(failing[ASKED_AGAIN:])
    beyond = f"; {left} more are not" if left else ""
    say(f"{len(asked)} failing {'case is' if len(asked) == 1 else 'cases are'} asked again alone{beyond}")
    chip.close()
    with tempfile.TemporaryDirectory(prefix="dsa-portable-") as place:
        folder = Path(place)
        recording.save_subject(folder, subject)
        with closing(Judges(1, folder, keep=folder / "failed", logs=folder, say=say)) as judges:

            def passes(*ids: str) -> bool:
                """Whether the last of these cases passes, asked one after another in a process of their own."""
                recorded: Future[Recording] = Future()
                with closing(chip.afresh(folder)) as other:
                    recorded.set_result([other.record(id) for id in ids][-1])
                return judges.submit(subject, recorded).result().status is Status.PASS

            try:
                for id in asked:
                    before = chip.predecessors[id]
                    if passes(id):
                        rows[id] = passing_alone(rows[id], subject, before, after_it=not passes(before, id))
            except BackendError as exc:
                say(f"no more are asked again: the backend could not be started: {exc}")
