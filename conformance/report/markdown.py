"""The report as Markdown for a CI job's summary page. What came from outside is escaped: no message can forge a heading."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from dsa_portable.conformance.report.schema import FAILING, NOTES, CaseResult, Report, Status
from dsa_portable.conformance.report.text import REASON_SHOWN, grouped, one_line, outside, rows_shown, tried

# Summary pages are cut at a fixed size; report.json holds every failure.
_FAILURES_SHOWN = 50


def summary(report: Report) -> str:
    """The text of summary.md; its first and its last line name the evidence class."""
    chip = f" on {_text(report.device.chip)}" if report.device else ""
    emulated = f", emulating {_text(report.emulates)}" if report.emulates else ""
    parts = [
        f"# {report.evidence}: backend {_text(report.backend.resolved)}{chip}{emulated}",
        _text(outside(report)),
        f"**{_text(report.verdict)}**",
        f"Evidence: {_text(report.evidence_reason)}",
        *_claimed(report),
        _table(("Status", "Cases"), [(status.value, str(count)) for status, count in report.counts.items()]),
        rows_shown(report),
        *_failures(report),
        f"List {_text(report.list.name)}: {report.list.executed} of {report.list.cases} cases executed, sha256 "
        f"`{report.list.sha256}`",
        "<details><summary>Environment</summary>",
        _table(("What", "Value"), [*_environment(report)]),
        "</details>",
        "<details><summary>Declared numerics</summary>",
        _table(("Operator", "Format", "Phase", "Envelope", "Declared", "Assumed"), [*_profiles(report)]),
        "</details>",
        f"**{_text(report.verdict)}** (exit code {report.exit_code})",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _claimed(report: Report) -> Iterator[str]:
    granted = [claim for claim in report.claims if claim.level is not None]
    yield "## What is claimed, and what is not"
    if report.level is not None:
        yield f"Level granted: **{_text(report.level)}**."
    elif NOTES[report.evidence]:
        yield f"Nothing is claimed: {report.evidence} evidence is {NOTES[report.evidence]}."
    else:
        yield f"No level is granted to the backend; {len(granted)} of {len(report.claims)} claims are granted."
    rows = [
        (
            *claim.key,
            claim.envelope or "none",
            claim.level or "-",
            "" if claim.level else claim.reason,
            tried(claim, report.run.passes),
        )
        for claim in report.claims
    ]
    yield _table(("Operator", "Format", "Phase", "Envelope", "Level", "Why none", "Tried"), rows)
    yield "\n".join(
        f"- {_text(status.value)}, {count} x {_text(reason, REASON_SHOWN)}"
        for status in (Status.UNSUPPORTED, Status.NOT_RUN, Status.WAIVED)
        for reason, count in grouped(report.cases, status)
    )


def _failures(report: Report) -> Iterator[str]:
    failed = [case for case in report.cases if case.status in FAILING]
    if failed:
        yield f"## Failures: {len(failed)}"
    yield from (_failure(case) for case in failed[:_FAILURES_SHOWN])
    if len(failed) > _FAILURES_SHOWN:
        yield f"{len(failed) - _FAILURES_SHOWN} more are in report.json."


def _failure(case: CaseResult) -> str:
    kept = f" Kept: {_text(case.artefact)}." if case.artefact else ""
    return (
        f"**{case.status} {_text(case.id)}**: {_text(case.reason, REASON_SHOWN)}\n\n"
        # Indented, not fenced: no text can end an indented block early.
        f"Tests: {_text(case.why)}{kept}\n\n    {one_line(case.reproducer)}"
    )


def _environment(report: Report) -> Iterator[tuple[str, str]]:
    yield "backend", f"{report.backend.name} {report.backend.version}, {report.backend.arrays} arrays"
    yield "backend asked for", report.backend.requested or "nothing"
    yield "contract", report.backend.contract
    if report.device is not None:
        device = report.device
        yield "chip", f"{device.chip} x{device.count} ({device.kind} {device.architecture}".rstrip() + ")"
        yield "driver", device.driver
        yield from device.versions.items()
    for name, value in report.environment.model_dump(exclude={"packages", "variables"}).items():
        yield name.replace("_", " "), "unknown" if value is None else str(value)
    yield "packages", ", ".join(f"{name} {version}" for name, version in report.environment.packages.items())
    yield from report.environment.variables.items()
    yield "command", report.run.command
    yield "started, finished", f"{report.run.started}, {report.run.finished}"
    yield "seconds", f"{report.run.seconds:.1f}"
    for process, peak in report.run.peak_memory_bytes.items():
        yield f"peak memory of the {process}", f"{peak / 2**20:.0f} MiB"
    yield "workers replaced", str(report.run.workers_replaced)


def _profiles(report: Report) -> Iterator[tuple[str, ...]]:
    for entry in report.profiles:
        assumed = ", ".join(name for name, source in entry.sources.items() if source == "assumed")
        yield entry.operator, entry.format, entry.phase, entry.envelope or "none", entry.words, assumed or "nothing"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *([_text(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def _text(text: str, limit: int | None = None) -> str:
    text = one_line(text)
    if limit is not None and len(text) > limit:
        text = f"{text[:limit]}..."
    return re.sub(r"([\\`*_\[\]<>|&#~!])", r"\\\1", text)
