"""A run's four files, each there whole or not at all: written aside, flushed to the disk, then renamed."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from contextlib import suppress
from pathlib import Path

from dsa_portable.conformance.report.ctrf import ctrf
from dsa_portable.conformance.report.junit import junit
from dsa_portable.conformance.report.markdown import summary
from dsa_portable.conformance.report.schema import Report, to_json
from dsa_portable.errors import DSAError

# report.json comes last: where it is new, the others are.
FILES = {"junit.xml": junit, "ctrf.json": ctrf, "summary.md": summary, "report.json": to_json}
# The folder of failed cases' arrays, a .npz each.
FAILED = "failed"
# The folder of what the backend answered, case by case.
RECORDINGS = "recordings"


class ReportDirectoryError(DSAError, ValueError):
    """The report directory cannot be created or written."""


def prepare(directory: Path) -> None:
    """Create the directory and write and remove a file in it, before hours are spent. Raises ReportDirectoryError."""
    probe = directory / f".probe.{os.getpid()}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"dsa-portable")
        probe.unlink()
    except OSError as error:
        raise _unwritable(directory, error) from error


def clear(directory: Path, kept: Container[str] = ()) -> None:
    """Remove a former run's report, which nobody shall take for that of a run that died, and all recordings but the cases kept.

    Raises ReportDirectoryError.
    """
    recordings = directory / RECORDINGS
    try:
        recordings.mkdir(exist_ok=True)
        former = (*(directory / FAILED).glob("*.npz"), *(path for path in recordings.iterdir() if path.stem not in kept))
        for path in (*(directory / name for name in FILES), *former):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(directory, error) from error


def write(report: Report, directory: Path) -> list[Path]:
    """Write report.json, junit.xml, ctrf.json and summary.md over what a former run left. Raises ReportDirectoryError."""
    # All are made before the first is put in place, so that a fault in one face, or a full disk, changes nothing.
    return write_texts(directory, {name: face(report) for name, face in FILES.items()})


def write_texts(directory: Path, named: Mapping[str, str]) -> list[Path]:
    """Write files by name, in this order, each whole or not at all. Raises ReportDirectoryError."""
    texts = {directory / name: text for name, text in named.items()}
    aside = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in texts}
    try:
        for path, text in texts.items():
            with open(aside[path], "wb") as file:
                file.write(text.encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
        for path, written in aside.items():
            os.replace(written, path)
    except OSError as error:
        raise _unwritable(directory, error) from error
    finally:
        for written in aside.values():
            with suppress(OSError):
                written.unlink()
    return [*texts]


def _unwritable(directory: Path, error: OSError) -> ReportDirectoryError:
    return ReportDirectoryError(
        f"the report directory {directory} cannot be written ({error.strerror or error}); name one that can with --out"
    )
