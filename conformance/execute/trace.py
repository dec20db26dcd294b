"""Where a backend failed: the traceback of what it raised, or the last words of a process that died. Both end up in reports."""

from __future__ import annotations

import traceback
from pathlib import Path

# A report has a row for every case: what one of them adds is cut in its middle.
CHARACTERS = 6000
# Of a log, whose process may have printed for hours: as many bytes as hold so many characters.
_LOG_BYTES = 4 * CHARACTERS


def shortened(text: str) -> str:
    """The text, or its head and its tail: the call that failed stands in the one, what it said in the other."""
    if len(text) <= CHARACTERS:
        return text
    half = CHARACTERS // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters are left out]\n{text[-half:]}"


def raised(error: BaseException) -> str:
    """The traceback of an exception, from the first frame that is the backend's, or the last of ours where none is."""
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None and _ours(frames.tb_frame.f_globals.get("__name__")):
        frames = frames.tb_next
    return shortened("".join(traceback.format_exception(type(error), error, frames)).strip())


def _ours(module: object) -> bool:
    """Whether a frame of this module is the suite's or the core's; the process itself runs as `__main__`."""
    name = f"{module}."
    return name == "__main__." or (name.startswith("dsa_portable.") and not name.startswith("dsa_portable.backends."))


def last_words(log: Path) -> str:
    """The end of what a process printed; empty where that cannot be read."""
    try:
        with open(log, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _LOG_BYTES))
            return file.read().decode("utf-8", "replace").strip()[-CHARACTERS:]
    except OSError:
        return ""
