"""What became of a case each time it was asked, a line each beside the recordings: a run that is resumed takes nothing back."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

from pydantic import ValidationError

from dsa_portable.conformance.report.schema import FAILING, Attempt, CaseResult, Status

FILE = "outcomes.jsonl"
# Of a reason; the row of the last attempt has its own whole.
_REASON_KEPT = 300


class Outcomes:
    """Of the recordings in a folder; each is known by its bytes, so that judging one again adds nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / FILE
        self.known: dict[str, list[tuple[str, Attempt]]] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []:
            try:
                stored = json.loads(line)
                attempt = Attempt(**stored["attempt"])
                self.known.setdefault(stored["case"], []).append((stored["recording"], attempt))
            except (ValueError, KeyError, TypeError, ValidationError):
                continue  # the line that an interrupted run was writing

    def _mark(self, case: str) -> str:
        try:
            return sha256((self.folder / f"{case}.json").read_bytes()).hexdigest()
        except OSError:
            return ""

    def has(self, case: str) -> bool:
        """Whether the outcome of the recording that is there was noted."""
        return self._mark(case) in [mark for mark, _ in self.known.get(case, [])]

    def settled(self, row: CaseResult) -> CaseResult:
        """The row with what became of the case before; noted, where it is new. What failed and passes now is FLAKY."""
        mark, known = self._mark(row.id), self.known.setdefault(row.id, [])
        if mark not in [other for other, _ in known]:
            attempt = Attempt(status=row.status, rule=row.rule, reason=row.reason[:_REASON_KEPT])
            known.append((mark, attempt))
            stored = {"case": row.id, "recording": mark, "attempt": attempt.model_dump(mode="json")}
            self.folder.mkdir(exist_ok=True)  # a backend may have removed it
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(stored) + "\n")
        earlier = [attempt for other, attempt in known if other != mark]
        failed = [attempt for attempt in earlier if attempt.status in FAILING]
        if not failed or row.status is not Status.PASS:
            return row.model_copy(update={"attempts": earlier})
        words = f"passed at attempt {len(earlier) + 1}, after {failed[-1].status}: {failed[-1].reason}"
        return row.model_copy(update={"status": Status.FLAKY, "reason": words, "attempts": earlier})
