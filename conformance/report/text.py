"""What every face of the report says in the same words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable

from dsa_portable.conformance.report.schema import EXECUTED, CaseResult, Claim, Report, Status


def one_line(text: str) -> str:
    """The text on one line; control characters, which a backend's message may carry to the terminal, are escaped."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in " ".join(text.split()))


def suite_name(report: Report, key: tuple[str, str, str]) -> str:
    """A claim's cases as a suite: a dashboard may show this name alone, so it carries the evidence class and the backend."""
    return " ".join([f"{report.evidence}:", report.backend.name, *key])


def details(case: CaseResult) -> str:
    """All that a dashboard's reader needs of a case, a line each."""
    named = {
        "status": case.status.value,
        "tests": case.why,
        "reason": case.reason,
        "hazards": ", ".join(case.hazards),
        "metrics": json.dumps(case.metrics, ensure_ascii=False),
        "kept": case.artefact or "",
        "run": case.reproducer,
    }
    return "\n".join(f"{name}: {text}" for name, text in named.items() if text)


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
