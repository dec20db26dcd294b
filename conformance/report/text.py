"""What every face of the report says in the same words."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable

from dsa_portable.conformance.report.schema import EXECUTED, FAILING, CaseResult, Claim, Report, Status

# The folder of what is kept of failing cases: arrays and a text of each.
FAILED = "failed"
# A reason longer than this is cut wherever many stand one after another; report.json and failed/ID.txt have it whole.
REASON_SHOWN = 600


def escaped(text: str) -> str:
    """The text with its lines; control characters, which a backend's message may carry to the terminal, are escaped."""
    return "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in text)


def one_line(text: str) -> str:
    """The text on one line, escaped."""
    return escaped(" ".join(text.split()))


def cut(text: str) -> str:
    """The text, or as much of its beginning as is shown of a reason."""
    return text if len(text) <= REASON_SHOWN else f"{text[:REASON_SHOWN]}..."


def suite_name(report: Report, key: tuple[str, str, str]) -> str:
    """A claim's cases as a suite: a dashboard may show this name alone, so it carries the evidence class and the backend."""
    return " ".join([f"{report.evidence}:", report.backend.name, *key])


# A number by itself: those of `int32` and of a case's id are names.
_NUMBER = re.compile(r"(?<![\w.-])-?(0x[0-9a-fA-F]+|\d+(\.\d+)?(e[-+]?\d+)?)(?!\w)")


def alike(cases: Iterable[CaseResult]) -> list[list[CaseResult]]:
    """The failing cases by their cause, in the order of the first ones: status, rule, and the reason but for its numbers."""
    groups: dict[tuple[object, ...], list[CaseResult]] = {}
    for case in cases:
        if case.status in FAILING:
            groups.setdefault((case.status, case.rule, _NUMBER.sub("0", one_line(case.reason))), []).append(case)
    return [*groups.values()]


def failure_file(case: CaseResult) -> str:
    """Where the text of a failing case lies, below the report directory."""
    return f"{FAILED}/{case.id}.txt"


def failure_text(case: CaseResult) -> str:
    """All of a failing case that is no array."""
    return escaped(f"id: {case.id}\n{details(case, case.reason)}\n")


def details(case: CaseResult, reason: str | None = None) -> str:
    """All that a reader needs of a case, a line each, and the traceback at the end; the reason is cut, but for one given."""
    named = {
        "status": case.status.value,
        "rule": case.rule or "",
        "tests": case.why,
        "reason": cut(case.reason) if reason is None else reason,
        "hazards": ", ".join(case.hazards),
        "metrics": json.dumps(case.metrics, ensure_ascii=False),
        "kept": case.artefact or "",
        "run": case.reproducer,
    }
    lines = [f"{name}: {text}" for name, text in named.items() if text]
    return "\n".join([*lines, *(["traceback:", case.traceback] if case.traceback else [])])


def grouped(cases: Iterable[CaseResult], status: Status) -> list[tuple[str, int]]:
    """The reasons of the cases of one status with their counts, the commonest first."""
    return Counter(one_line(case.reason) for case in cases if case.status is status).most_common()


def outside(report: Report) -> str:
    """What a backend outside every envelope reads first; empty where each of its profiles lies in one."""
    named = [f"{entry.operator} {entry.format} {entry.phase}" for entry in report.profiles if entry.envelope is None]
    if not named:
        return ""
    which = "" if len(named) == len(report.profiles) else f" of {', '.join(named)}"
    return f"no envelope: rows{which} inform, no level"


def rows_shown(report: Report) -> str:
    """How many index rows of the executed cases test selection, and how many cannot; empty where none was executed."""
    rows = [(case.selective_rows or 0, case.vacuous_rows or 0) for case in report.cases if case.status in EXECUTED]
    selective, vacuous = sum(row[0] for row in rows), sum(row[1] for row in rows)
    if not selective + vacuous:
        return ""
    return f"index rows: {selective} test selection, {vacuous} see no more keys than topk and prove nothing about it"


def noticed(passed: int, passes: int) -> str:
    """Which errors that come and go this many cases would have shown, each run so often; empty where there are few.

    A kernel that is wrong in one call of k, at random, passes n calls with probability (1 - 1/k)^n, which is 0.05 for k = n/3.
    """
    calls = passed * passes
    if passes < 2 or calls < 6:
        return ""
    return f"{passed} cases passed {passes} times: wrong at random in one call of {calls // 3}, it would have shown with 95%"


MISSING_SHOWN = 3


def tried(claim: Claim, passes: int) -> str:
    """What the claim's cases tried of what is declared, and what they did not."""
    found = claim.coverage
    if found is None:
        return ""
    parts = list(filter(None, [noticed(claim.counts[Status.PASS], passes)]))
    if found.values:
        parts.insert(0, f"{found.values_tried} of {found.values} values, {found.pairs_tried} of {found.pairs} pairs")
    if found.missing:
        more = f" and {len(found.missing) - MISSING_SHOWN} more" if len(found.missing) > MISSING_SHOWN else ""
        parts.append(f"not tried: {', '.join(found.missing[:MISSING_SHOWN])}{more}")
    for words, features in (("sampled", found.sampled), ("declared, and no case has it", found.untested)):
        if features:
            named = (f"{name} {', '.join(map(str, values))}" for name, values in features.items())
            parts.append(f"{words}: {'; '.join(named)}")
    return "; ".join(parts)
