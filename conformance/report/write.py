"""A run's four files and its failures' texts, each there whole or not at all: written aside, flushed, then renamed."""

from __future__ import annotations

import os
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from dsa_portable.conformance.report.ctrf import ctrf
from dsa_portable.conformance.report.junit import junit
from dsa_portable.conformance.report.markdown import summary
from dsa_portable.conformance.report.schema import FAILING, Report, to_json
from dsa_portable.conformance.report.text import FAILED as FAILED
from dsa_portable.conformance.report.text import failure_file, failure_text
from dsa_portable.errors import DSAError

# report.json comes last: where it is new, the others are.
FILES = {"junit.xml": junit, "ctrf.json": ctrf, "summary.md": summary, "report.json": to_json}
# What the run that goes on in a directory holds.
LOCK = ".lock"
# The folder of what the backend answered, case by case.
RECORDINGS = "recordings"

try:
    import fcntl
except ImportError:  # where there are no such locks, nobody is kept out
    fcntl = None  # type: ignore[assignment]


class ReportDirectoryError(DSAError, ValueError):
    """The report directory cannot be created or written."""


@contextmanager
def owned(directory: Path) -> Iterator[None]:
    """The directory, made where it is not there and found writable before hours are spent, for this run alone.

    Raises ReportDirectoryError, where another run is in it too.
    """
    mark = directory / LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(mark, "wb")  # noqa: SIM115 - it is held as long as the run goes on
    except OSError as error:
        raise _unwritable(directory, error) from error
    with file:
        if not _locked(file):
            raise ReportDirectoryError(
                f"another run is writing into {directory}; wait until it has ended, or name another directory with --out."
            )
        try:
            file.write(b"dsa-portable")
            file.flush()
        except OSError as error:
            with suppress(OSError):
                mark.unlink()
            raise _unwritable(directory, error) from error
        try:
            yield
        finally:
            with suppress(OSError):
                mark.unlink()


def _locked(file: BinaryIO) -> bool:
    """Take the file for this process; it is given back however the process ends."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def clear(directory: Path, kept: Container[str] = ()) -> None:
    """Remove a former run's report, which nobody shall take for that of a run that died, and all recordings but the names kept.

    Raises ReportDirectoryError.
    """
    recordings = directory / RECORDINGS
    try:
        recordings.mkdir(exist_ok=True)
        failed = (path for kind in ("npz", "txt") for path in (directory / FAILED).glob(f"*.{kind}"))
        former = (*failed, *(path for path in recordings.iterdir() if path.stem not in kept))
        for path in (*(directory / name for name in FILES), *former):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(directory, error) from error


def write(report: Report, directory: Path) -> list[Path]:
    """Write report.json, junit.xml, ctrf.json and summary.md over what a former run left, and a text of each failing case.

    Raises ReportDirectoryError.
    """
    failing = {failure_file(case): failure_text(case) for case in report.cases if case.status in FAILING}
    if failing:
        try:
            (directory / FAILED).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(directory, error) from error
    # All are made before the first is put in place, so that a fault in one face, or a full disk, changes nothing.
    return write_texts(directory, failing | {name: face(report) for name, face in FILES.items()})


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
        f"the report directory {directory} cannot be written ({error.strerror or error}); name one that can with --out, or "
        "make room: what is in its recordings is kept, and --resume makes the report of it without asking again"
    )
