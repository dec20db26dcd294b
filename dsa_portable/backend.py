"""What a backend declares. There is no base class: a module holds one `Backend(...)` and an entry point names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from dsa_portable.arrays import Array
from dsa_portable.contract import Capabilities
from dsa_portable.profile import Profile

# The contract this package implements (docs/contract.md); a backend names the one it was written for.
CONTRACT_VERSION = "1.1"


@dataclass(frozen=True)
class Device:
    """The chip that a probe found; a probe that finds none raises DeviceUnavailable with the reason."""

    kind: str  # where its arrays live, as in `Backend.devices`
    chip: str
    driver: str
    count: int = 1
    architecture: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Backend:
    """One declaration. `operators` are "module:function" strings, so that declaring imports no SDK; each function takes its
    operator's request (dsa_portable.operators) and returns its results as arrays, a tuple where there are two.

    probe() imports the SDK (ImportError: it is missing) and returns the Device, or raises DeviceUnavailable.
    capabilities(device) and profile(device, operator, format, phase) take None where no device is known yet.
    put(numpy) -> array on the device; get(array) -> numpy; synchronize() waits for the device.
    witness() -> a count of work that the chip has done; a run whose count stands still is not HARDWARE.
    """

    name: str
    version: str
    devices: tuple[str, ...]
    arrays: Literal["numpy", "torch"]
    operators: Mapping[str, str]
    install: str
    probe: Callable[[], Device]
    capabilities: Callable[[Device | None], Capabilities]
    profile: Callable[[Device | None, str, str, str], Profile]
    put: Callable[[np.ndarray[Any, Any]], Array]
    get: Callable[[Array], np.ndarray[Any, Any]]
    synchronize: Callable[[], None] = lambda: None
    witness: Callable[[], int] | None = None
    # Like profile, but what says so: field -> a document, or "assumed"; None where the backend's own authors are the source.
    profile_sources: Callable[[Device | None, str, str, str], Mapping[str, str]] | None = None
    # For `dsa-portable bench`: name -> (a call, its operations), the most that the chip does of what the operators are made of.
    ceilings: Callable[[], Mapping[str, tuple[Callable[[], object], int]]] | None = None
    auto: bool = True  # False: chosen by name only, as a generic backend must be
    emulates: tuple[str, ...] = ()  # chips it can stand in for under `--emulate`
    contract: str = CONTRACT_VERSION
