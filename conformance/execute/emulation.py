"""A backend that stands in for a chip: which one, for one run, here and in the backend's process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from dsa_portable.backend import Backend
from dsa_portable.errors import DSAError

# Names the chip to a backend that stands in for one; setting it is the same as --emulate.
VARIABLE = "DSA_EMULATE"


class EmulationError(DSAError, ValueError):
    """The backend does not stand in for the chip that was named."""


@contextmanager
def emulating(chip: str | None) -> Iterator[str | None]:
    """Name the chip, else the environment's, to the backend's process inside the block alone; which it is."""
    chip = chip or os.environ.get(VARIABLE) or None
    before = os.environ.get(VARIABLE)
    os.environ.update({} if chip is None else {VARIABLE: chip})
    try:
        yield chip
    finally:
        os.environ.pop(VARIABLE, None)
        os.environ.update({} if before is None else {VARIABLE: before})


def check(backend: Backend) -> None:
    """Raise EmulationError where the chip that was named is none that the backend stands in for; asked in its own process."""
    chip = os.environ.get(VARIABLE) or None
    if chip is not None and chip not in backend.emulates:
        known = ", ".join(backend.emulates) or "none"
        raise EmulationError(f"backend {backend.name!r} emulates {known}, but --emulate {chip} was passed; name one of them.")
