"""The report as fixed-width text. Everything wraps at 100 columns but a reproducer, which must be copied whole."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from dsa_portable.conformance.report.schema import FAILING, CaseResult, Report, Status
from dsa_portable.conformance.report.text import grouped, one_line, outside, rows_shown, tried

WIDTH = 100
_RED, _GREEN, _YELLOW, _PLAIN = "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[0m"
_COLUMNS = ("operator", "format", "phase", "envelope", "level")


def header(run: Report) -> str:
    """The lines above the progress: backend, list and evidence class, `outside`, then what stands behind them."""
    backend, tests, device = run.backend, run.list, run.device
    chip = "none found"
    if device is not None:
        chip = f"{device.chip} x{device.count} ({device.kind} {device.architecture}".rstrip() + f"), driver {device.driver}"
    emulated = f", emulating {run.emulates}" if run.emulates else ""
    rows = [
        ("backend", f"{backend.name} {backend.version}, {backend.arrays} arrays, contract {backend.contract}"),
        ("chip", chip),
        ("evidence", f"{run.evidence}{emulated}: {run.evidence_reason}"),
        ("list", f"{tests.name}, {tests.cases} cases, sha256 {tests.sha256}"),
    ]
    asked = one_line(backend.requested) or "nothing"
    first = f"conformance of backend {backend.resolved} (asked for: {asked}), list {tests.name}, evidence {run.evidence}"
    lines = [one_line(first), outside(run), *(_field(name, text, 10) for name, text in rows)]
    return "\n".join(line for line in lines if line)


def progress(case: CaseResult, done: int, of: int, elapsed: float) -> str:
    """A judged case as a line: how many are done, the time since the start, how long the others need at this rate."""
    width, left = len(str(of)), elapsed / done * (of - done)
    seconds = "" if case.seconds is None else f"{case.seconds:8.3f} s"
    reason = f"  {one_line(case.reason)}" if case.reason else ""
    clock = f"{_clock(elapsed)}, {_clock(left)} left"
    return f"[{done:>{width}}/{of}  {clock}] {case.status!s:11} {case.id:46}{seconds}{reason}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:3}:{rest:02}"


def table(report: Report, *, tty: bool = False) -> str:
    """The finished run: verdict, claims, counts, every failed case with its reproducer, verdict. Colours only for a `tty`."""
    verdict = _verdict(report, tty)
    parts = [outside(report), verdict, _claims(report), _counts(report)]
    parts += [_failure(case, tty) for case in report.cases if case.status in FAILING]
    return "\n\n".join([*filter(None, parts), f"exit code {report.exit_code}\n{verdict}"])


def _verdict(report: Report, tty: bool) -> str:
    # Green is for a granted level alone: a run that grants none must not look like one that does.
    colour = _RED if report.exit_code == 1 else _GREEN if report.level is not None else _YELLOW
    return f"{colour}{report.verdict}{_PLAIN}" if tty else report.verdict


def _claims(report: Report) -> str:
    rows = [(*claim.key, claim.envelope or "none", claim.level or "-") for claim in report.claims]
    widths = [max(len(row[i]) for row in [_COLUMNS, *rows]) for i in range(len(_COLUMNS))]
    lines = [_row(_COLUMNS, widths), _row(["-" * width for width in widths], widths)]
    words = {(entry.operator, entry.format, entry.phase): entry.words for entry in report.profiles}
    for claim, row in zip(report.claims, rows, strict=True):
        counts = ", ".join(f"{status} {count}" for status, count in claim.counts.items() if count) or "no cases"
        why = f"; no level: {one_line(claim.reason)}" if claim.level is None else ""
        lines += [_row(row, widths), _wrapped(f"{counts}{why}", 4)]
        said = {"declared": words.get(claim.key), "tried": tried(claim, report.run.passes)}
        lines += [_wrapped(f"{name}: {text}", 4) for name, text in said.items() if text]
    return "\n".join(lines if rows else ["no claim was made"])


def _counts(report: Report) -> str:
    lines = [f"{len(report.cases)} cases: " + ", ".join(f"{status} {count}" for status, count in report.counts.items())]
    for status in (Status.UNSUPPORTED, Status.NOT_RUN, Status.WAIVED):
        lines += [_field(status.value, f"{count} x {reason}", 13) for reason, count in grouped(report.cases, status)]
    return "\n".join([*lines, rows_shown(report)]).rstrip()


def _failure(case: CaseResult, tty: bool) -> str:
    status = f"{_RED}{case.status}{_PLAIN}" if tty else str(case.status)
    rows = [("tests", case.why), ("reason", case.reason), ("kept", case.artefact or "")]
    lines = [f"{status} {case.id}", *(_field(name, text, 8, 2) for name, text in rows if text)]
    return "\n".join([*lines, f"  run     {case.reproducer}"])


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _field(name: str, text: str, width: int, indent: int = 0) -> str:
    return _wrapped(text, width + indent, " " * indent + name.ljust(width))


def _wrapped(text: str, indent: int, first: str | None = None) -> str:
    margin = " " * indent
    return textwrap.fill(
        one_line(text), WIDTH, initial_indent=first or margin, subsequent_indent=margin, break_on_hyphens=False
    )
