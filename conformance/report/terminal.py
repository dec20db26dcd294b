"""The report as text of 100 columns, or of a narrower terminal's. What is copied whole, as a reproducer, is not wrapped."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Sequence

from dsa_portable.conformance.report.evidence import YET
from dsa_portable.conformance.report.schema import FAILING, CaseResult, Report, Status
from dsa_portable.conformance.report.text import alike, cut, failure_file, grouped, one_line, outside, rows_shown, tried

WIDTH = 100
# A terminal narrower than this breaks lines itself.
_NARROWEST = 40
# So many cases of one cause are named.
_NAMED = 3
_RED, _GREEN, _YELLOW, _PLAIN = "\x1b[31m", "\x1b[32m", "\x1b[33m", "\x1b[0m"
_COLUMNS = ("operator", "format", "phase", "envelope", "level")


def header(run: Report, *, tty: bool = False) -> str:
    """The lines above the progress: backend, list and evidence class, `outside`, then what stands behind them."""
    backend, tests, device = run.backend, run.list, run.device
    chip = "none found"
    if device is not None:
        chip = f"{device.chip} x{device.count} ({device.kind} {device.architecture}".rstrip() + f"), driver {device.driver}"
    emulated = f", emulating {run.emulates}" if run.emulates else ""
    rows = [
        ("backend", f"{backend.name} {backend.version}, {backend.arrays} arrays, contract {backend.contract}"),
        ("chip", chip),
        ("evidence", run.evidence_reason if run.evidence_reason == YET else f"{run.evidence}{emulated}: {run.evidence_reason}"),
        ("list", f"{tests.name}, {tests.cases} cases, sha256 {tests.sha256}"),
    ]
    asked = one_line(backend.requested) or f"nothing, so {backend.name}"
    # What a run will be evidence of only its calls show: the first line must not name another class than the last.
    stands = "yet to be shown" if not tests.executed and run.evidence_reason == YET else str(run.evidence)
    first = f"conformance of backend {backend.resolved} (asked for: {asked}), list {tests.name}, evidence {stands}"
    lines = [one_line(first), outside(run), *(labelled(name, text, 10, _width(tty)) for name, text in rows)]
    return "\n".join(line for line in lines if line)


def progress(case: CaseResult, done: int, of: int, elapsed: float, *, tty: bool = False) -> str:
    """A judged case as a line: how many are done, the time since the start, how long the others need at this rate."""
    width, left = len(str(of)), elapsed / done * (of - done)
    seconds = "" if case.seconds is None else f"{case.seconds:8.3f} s"
    reason = f"  {cut(one_line(case.reason))}" if case.reason else ""
    clock = f"{_clock(elapsed)}, {_clock(left)} left"
    return f"[{done:>{width}}/{of}  {clock}] {_coloured(case.status, tty, 11)} {case.id:46}{seconds}{reason}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:3}:{rest:02}"


def table(report: Report, *, tty: bool = False) -> str:
    """The finished run: verdict, claims, counts, failures by cause with a reproducer, verdict. Colours only for a `tty`."""
    verdict, width = _verdict(report, tty), _width(tty)
    parts = [outside(report), verdict, _claims(report, width), _counts(report, width)]
    parts += [_failures(group, tty, width) for group in alike(report.cases)]
    return "\n\n".join([*filter(None, parts), f"exit code {report.exit_code}\n{verdict}"])


def _width(tty: bool) -> int:
    """Of the terminal, where there is one and it is narrower; a pipe's reader gets the same text everywhere."""
    return max(_NARROWEST, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)) if tty else WIDTH


def _coloured(status: Status, tty: bool, width: int = 0) -> str:
    # No green: a case that passes is no level.
    colour = "" if status is Status.PASS else _RED if status in FAILING else _YELLOW
    return _painted(str(status).ljust(width), colour, tty)


def _painted(text: str, colour: str, tty: bool) -> str:
    # https://no-color.org: set to anything but the empty text, the variable means no colours.
    return f"{colour}{text}{_PLAIN}" if colour and tty and not os.environ.get("NO_COLOR") else text


def _verdict(report: Report, tty: bool) -> str:
    # Green is for a granted level alone: a run that grants none must not look like one that does.
    colour = _RED if report.exit_code == 1 else _GREEN if report.level is not None else _YELLOW
    return _painted(report.verdict, colour, tty)


def _claims(report: Report, width: int) -> str:
    rows = [(*claim.key, claim.envelope or "none", claim.level or "-") for claim in report.claims]
    widths = [max(len(row[i]) for row in [_COLUMNS, *rows]) for i in range(len(_COLUMNS))]
    lines = [_row(_COLUMNS, widths), _row(["-" * width for width in widths], widths)]
    words = {(entry.operator, entry.format, entry.phase): entry.words for entry in report.profiles}
    for claim, row in zip(report.claims, rows, strict=True):
        counts = ", ".join(f"{status} {count}" for status, count in claim.counts.items() if count) or "no cases"
        why = f"; no level: {one_line(claim.reason)}" if claim.level is None else ""
        lines += [_row(row, widths), _wrapped(f"{counts}{why}", 4, width)]
        said = {"declared": words.get(claim.key), "tried": tried(claim, report.run.passes)}
        lines += [_wrapped(f"{name}: {text}", 4, width) for name, text in said.items() if text]
    return "\n".join(lines if rows else ["no claim was made"])


def _counts(report: Report, width: int) -> str:
    counts = ", ".join(f"{status} {count}" for status, count in report.counts.items())
    lines = [_wrapped(f"{len(report.cases)} cases: {counts}", 4, width, "")]
    for status in (Status.UNSUPPORTED, Status.NOT_RUN, Status.WAIVED):
        told = [f"{count} x {cut(reason)}" for reason, count in grouped(report.cases, status)]
        lines += [labelled(status.value, text, 13, width) for text in told]
    return "\n".join(filter(None, [*lines, _wrapped(rows_shown(report), 4, width, "")]))


def _failures(group: Sequence[CaseResult], tty: bool, width: int) -> str:
    """Cases that fail for one cause: the first of them, and the names of some."""
    first, others = group[0], [case.id for case in group[1:]]
    named, more = others[: _NAMED - 1], len(others[_NAMED - 1 :])
    also = f"{', '.join(named)}" + (f", {more} more in report.json" if more else "")
    count = f", and {len(others)} more for the same reason" if others else ""
    rows = [("tests", first.why), ("reason", cut(one_line(first.reason))), ("also", also)]
    kept = " ".join(filter(None, [first.artefact, failure_file(first)]))
    lines = [f"{_coloured(first.status, tty)} {first.id}{count}"]
    lines += [labelled(name, text, 8, width, 2) for name, text in rows if text]
    return "\n".join([*lines, f"  kept    {kept}", f"  run     {first.reproducer}"])


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def labelled(name: str, text: str, width: int, columns: int = WIDTH, indent: int = 0) -> str:
    """A text behind its name, wrapped at so many columns."""
    return _wrapped(text, width + indent, columns, " " * indent + name.ljust(width))


def _wrapped(text: str, indent: int, columns: int, first: str | None = None) -> str:
    margin = " " * indent
    return textwrap.fill(
        one_line(text),
        columns,
        initial_indent=margin if first is None else first,
        subsequent_indent=margin,
        break_on_hyphens=False,
        break_long_words=False,  # a sha256 is copied
    )
