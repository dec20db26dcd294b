"""What a backend declares, asked once and checked field by field before the first case; a mistake is one sentence."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

import dsa_portable
from dsa_portable.backend import CONTRACT_VERSION, Backend, Device
from dsa_portable.conformance.cases.catalogue import Case
from dsa_portable.conformance.cases.relation import PipelineCase
from dsa_portable.conformance.execute import recording
from dsa_portable.conformance.execute.recording import Key, Subject
from dsa_portable.contract import ANY, Capabilities, PerPhase
from dsa_portable.errors import BackendExited, DSAError, no_exit
from dsa_portable.operators import FEATURES
from dsa_portable.profile import UNIT_ROUNDOFF, Accumulator, Profile

PHASES = ("decode", "prefill")


class DeclarationError(DSAError, TypeError):
    """A backend declares what has no meaning, or cannot be asked."""


# A field's check, and what it accepts in words.
Check = tuple[Callable[[Any], bool], str]


def _one_of(*values: str) -> Check:
    return (lambda value: isinstance(value, str) and value in values, "one of " + ", ".join(values))


def _count(least: int) -> Check:
    return (lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least, f"a whole number from {least} on")


def _line(value: Any) -> bool:
    return isinstance(value, str) and value != "" and "\n" not in value and "\r" not in value


_FLOAT, _LINE = _one_of(*UNIT_ROUNDOFF), (_line, "one line of text")
_TEXTS = (
    lambda value: isinstance(value, Mapping) and all(isinstance(x, str) for item in value.items() for x in item),
    "a mapping of text to text",
)
_POSITIVE = (
    lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0,
    "a positive number",
)
BACKEND: Mapping[str, Check] = {
    "version": _LINE,
    "arrays": _one_of("numpy", "torch"),
    "contract": _LINE,
    "files_sha256": (lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None, "a sha256"),
}
DEVICE: Mapping[str, Check] = {
    "kind": _LINE,
    "chip": (lambda value: value == "" or _line(value), "one line of text"),
    "driver": (lambda value: value == "" or _line(value), "one line of text"),
    "count": _count(0),
    "architecture": (lambda value: isinstance(value, str), "text"),
    "versions": _TEXTS,
}
PROFILE: Mapping[str, Check] = {
    "accumulator": (lambda value: isinstance(value, Accumulator), "an Accumulator"),
    "intermediate": _FLOAT,
    "intermediate_exponent": (lambda value: isinstance(value, int) and not isinstance(value, bool), "a whole number"),
    "head_sum": _FLOAT,
    "logit": _FLOAT,
    "p": _FLOAT,
    "normaliser": _one_of("float32", "rounded"),
    "kv_compute": _FLOAT,
    "scale_compute": _FLOAT,
    "exp_ulp": (lambda value: value == 0 or _POSITIVE[0](value), "a number from 0 on"),
    "finite_max": _POSITIVE,
    "subnormals": _one_of("kept", "flushed"),
    "ties": _one_of("any", "lowest"),
    "deterministic": (lambda value: isinstance(value, bool), "True or False"),
    "qk_compute": _one_of("float64", "float32", "tfloat32", "bfloat16"),
    "maximum": _FLOAT,
    "rescale_threshold": (lambda value: value == 0 or _POSITIVE[0](value), "a number from 0 on"),
    "normaliser_sum": _FLOAT,
    "partials": _FLOAT,
    "lse": _FLOAT,
}
ACCUMULATOR: Mapping[str, Check] = {
    "bits": _count(1),
    "rounding": _one_of("RN", "RZ"),
    "group": _count(1),
    "guard": _count(0),
    "promotion": _count(0),
    "product": _FLOAT,
}
# What P may reach, as a power of e, before its format overflows.
LARGEST_P = {"float16": math.log(65504.0)}
# Fields that contradict each other: the one to name, how to tell, and why.
CONTRADICTIONS: tuple[tuple[str, Callable[[Profile], bool], str], ...] = (
    ("accumulator.guard", lambda p: p.accumulator.guard > 0 and p.accumulator.group == 1, "a group of 1 aligns nothing"),
    (
        "accumulator.promotion",
        lambda p: p.accumulator.promotion > 0 and p.accumulator.bits >= 24,
        "a sum of 24 bits is float32 already",
    ),
    (
        "accumulator.promotion",
        lambda p: p.accumulator.promotion % p.accumulator.group > 0,
        "only whole groups can be promoted",
    ),
    (
        "rescale_threshold",
        lambda p: p.rescale_threshold > LARGEST_P.get(p.p, 80.0),
        "e to it is more than the format of P holds",
    ),
)


def _checked(who: str, what: str, value: Any, table: Mapping[str, Check]) -> None:
    for name, (accepts, accepted) in table.items():
        if not accepts(getattr(value, name)):
            found = f"{what}.{name} is {getattr(value, name)!r}"
            raise DeclarationError(f"backend {who!r}: {found}, but {accepted} is accepted; mend the declaration.")


def device(name: str, found: Any) -> Device:
    """The Device that a backend's probe found, from its fields. Raises DeclarationError."""
    try:
        chip = Device(**found)
    except TypeError as exc:
        raise DeclarationError(f"backend {name!r}: its process told a device that cannot be read ({exc}).") from exc
    _checked(name, "Device", chip, DEVICE)
    return chip


def _ask(backend: Backend, what: str, ask: Callable[[], Any]) -> Any:
    try:
        with no_exit(backend.name):
            return ask()
    except BackendExited:
        raise
    except Exception as exc:
        unknown = re.match(r"(Profile|Accumulator)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(exc))
        if isinstance(exc, TypeError) and unknown:
            raise DeclarationError(
                f"backend {backend.name!r}: {what} names the field {unknown[2]!r}, which {unknown[1]} of contract "
                f"{CONTRACT_VERSION} does not have; correct its spelling, or use a newer dsa-portable."
            ) from exc
        raise DeclarationError(f"backend {backend.name!r}: {what} raised {exc!r}; mend the declaration.") from exc


def _each(values: Any) -> Iterable[Any]:
    """The values of a container; of a range its ends, for there may be a billion between them."""
    return values[:: max(1, len(values) - 1)] if isinstance(values, range) else values


def _capabilities(name: str, declared: Any) -> Capabilities:
    """What is offered: every name is known, and every value is ANY or some container of values that a call can have."""
    who = f"backend {name!r}: capabilities()"
    if not isinstance(declared, Mapping):
        raise DeclarationError(f"{who} returned {declared!r}, but a mapping is accepted; return operator -> feature -> values.")
    for operator, features in declared.items():
        if operator not in FEATURES or not isinstance(features, Mapping):
            raise DeclarationError(
                f"{who} has {operator!r} -> {features!r}, but {', '.join(FEATURES)} are accepted, each with a mapping of "
                "features; mend the declaration."
            )
        known = [feature.name for feature in FEATURES[operator]]
        for name, values in features.items():
            if name not in known:
                raise DeclarationError(
                    f"{who} has the feature {name!r} of {operator}, but {', '.join(known)} are known; correct its spelling."
                )
            phases = [values.decode, values.prefill] if isinstance(values, PerPhase) else [values]
            if not all(v is ANY or isinstance(v, (tuple, list, set, frozenset, range)) for v in phases):
                raise DeclarationError(
                    f"{who} offers {name} = {values!r} for {operator}, but ANY or a tuple, list, set or range of values is "
                    f"accepted, or a PerPhase of two such; write ({values!r},) for one value."
                )
            feature = FEATURES[operator][known.index(name)]
            every = (value for offered in phases if offered is not ANY for value in _each(offered))
            for value in every:
                if not feature.values.hold(value):
                    raise DeclarationError(
                        f"{who} offers {name} = {value!r} for {operator}, which no call can have, but {feature.values.words} "
                        "can be offered; correct it, or leave it out."
                    )
    return declared


def _profile(name: str, call: str, profile: Any) -> Profile:
    """A profile of which every field has a meaning, and none contradicts another."""
    if not isinstance(profile, Profile):
        raise DeclarationError(f"backend {name!r}: {call} returned {profile!r}, but a Profile is accepted; return one.")
    _checked(name, call, profile, PROFILE)
    _checked(name, f"{call}.accumulator", profile.accumulator, ACCUMULATOR)
    for which, contradicts, why in CONTRADICTIONS:
        if contradicts(profile):
            value = attrgetter(which)(profile)
            raise DeclarationError(f"backend {name!r}: {call}.{which} is {value!r}, but {why}; mend the declaration.")
    return profile


def _sources(name: str, call: str, said: Any) -> Mapping[str, str]:
    """Who says so of which field of a profile."""
    if not _TEXTS[0](said) or not set(said) <= {f.name for f in fields(Profile)}:
        raise DeclarationError(
            f"backend {name!r}: {call} returned {said!r}, but {_TEXTS[1]} is accepted, by fields of Profile; mend the "
            "declaration."
        )
    return said  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Declared:
    """What a backend says of itself on a device, over the cases of a list: asked once, in its own process."""

    version: str
    arrays: str
    contract: str
    capabilities: Capabilities
    profiles: Mapping[Key, Profile]
    sources: Mapping[Key, Mapping[str, str]]  # who says so of a profile's field
    files_sha256: str  # over the files of the packages that its operators lie in: a kernel that was changed is another


def files_sha256(backend: Backend) -> str:
    """Of a backend's own files: those beside the modules of its operators, and below."""
    digest = hashlib.sha256()
    for module in sorted({target.partition(":")[0] for target in backend.operators.values()}):
        spec = find_spec(module.rpartition(".")[0] or module)
        folders = list(spec.submodule_search_locations or []) if spec else []
        files = [Path(spec.origin)] if spec and spec.origin and not folders else []
        files += [path for folder in folders for path in sorted(Path(folder).rglob("*")) if path.is_file()]
        for path in files:
            if path.suffix != ".pyc":
                digest.update(f"{path.name} ".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def asked(backend: Backend, found: Mapping[str, Any], cases: Iterable[Case]) -> Declared:
    """A backend's declaration for the device that its probe found, a profile for each format that it offers. It runs its code.

    Raises DeclarationError or BackendExited.
    """
    chip = device(backend.name, found)
    offered = _capabilities(backend.name, _ask(backend, "capabilities()", lambda: backend.capabilities(chip)))
    parts = [part for case in cases for part in ((case.index, case.attend) if isinstance(case, PipelineCase) else (case,))]
    profiles, sources = dict[Key, Profile](), dict[Key, Mapping[str, str]]()
    for key in dict.fromkeys((part.operator, part.format, phase) for part in parts for phase in PHASES):
        operator, format, phase = key
        formats = next(feature for feature in FEATURES[operator] if feature.name == "format")
        if format not in formats.offered(offered, operator, phase):
            continue
        call = f"profile{key}"
        profiles[key] = _profile(backend.name, call, _ask(backend, call, partial(backend.profile, chip, *key)))
        if backend.profile_sources is not None:
            call = f"profile_sources{key}"
            sources[key] = _sources(backend.name, call, _ask(backend, call, partial(backend.profile_sources, chip, *key)))
    files = _ask(backend, "the files of its operators", partial(files_sha256, backend))
    return Declared(backend.version, backend.arrays, backend.contract, offered, profiles, sources, files)


def told(name: str, stored: Any) -> Declared:
    """A declaration as a backend's process told it (recording.as_json), checked anew: nobody vouches for that process.

    Raises DeclarationError.
    """
    try:
        found = Declared(**recording.declared_from(stored))
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise DeclarationError(f"backend {name!r}: its process told a declaration that cannot be read ({exc!r}).") from exc
    _checked(name, "Backend", found, BACKEND)
    _capabilities(name, found.capabilities)
    for key, profile in found.profiles.items():
        _profile(name, f"profile{key}", profile)
    for key, said in found.sources.items():
        _sources(name, f"profile_sources{key}", said)
    return found


def subject_of(name: str, hello: Mapping[str, Any], list_name: str, list_sha256: str, **run: Any) -> Subject:
    """Who answers, from what the process of the backend said when it was started; `run` has the other fields.

    Raises DeclarationError.
    """
    return Subject(
        list_name=list_name,
        list_sha256=list_sha256,
        backend=name,
        resolved=str(hello["resolved"]),
        device=device(name, hello["device"]),
        suite=dsa_portable.__version__,
        interpreted=bool(hello["interpreted"]),
        **vars(told(name, hello["declared"])),
        **run,
    )
