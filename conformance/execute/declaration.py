"""What a backend declares, asked once and checked field by field before the first case; a mistake is one sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from functools import partial
from operator import attrgetter
from typing import Any

import dsa_portable
from dsa_portable.backend import CONTRACT_VERSION, Backend, Device
from dsa_portable.conformance.cases.catalogue import Case
from dsa_portable.conformance.cases.relation import PipelineCase
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


def device(backend: Backend, found: Mapping[str, Any]) -> Device:
    """The Device that the probe found, from its fields. Raises DeclarationError."""
    chip = Device(**found)
    _checked(backend.name, "Device", chip, DEVICE)
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


def capabilities(backend: Backend, chip: Device) -> Capabilities:
    """What the backend offers on this device: every name is known, and every value is ANY or some container of values."""
    declared = _ask(backend, "capabilities()", lambda: backend.capabilities(chip))
    who = f"backend {backend.name!r}: capabilities()"
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


def profiles(
    backend: Backend, chip: Device, offered: Capabilities, asked: Iterable[Key]
) -> tuple[dict[Key, Profile], dict[Key, Mapping[str, str]]]:
    """(profile, who says so of its fields) of every asked (operator, format, phase) whose format is offered, asked once."""
    found: dict[Key, Profile] = {}
    sources: dict[Key, Mapping[str, str]] = {}
    for key in dict.fromkeys(asked):
        operator, format, phase = key
        formats = next(feature for feature in FEATURES[operator] if feature.name == "format")
        if format not in formats.offered(offered, operator, phase):
            continue
        call = f"profile{key}"
        profile = _ask(backend, call, partial(backend.profile, chip, *key))
        if not isinstance(profile, Profile):
            raise DeclarationError(
                f"backend {backend.name!r}: {call} returned {profile!r}, but a Profile is accepted; return one."
            )
        _checked(backend.name, call, profile, PROFILE)
        _checked(backend.name, f"{call}.accumulator", profile.accumulator, ACCUMULATOR)
        for name, contradicts, why in CONTRADICTIONS:
            if contradicts(profile):
                value = attrgetter(name)(profile)
                raise DeclarationError(
                    f"backend {backend.name!r}: {call}.{name} is {value!r}, but {why}; mend the declaration."
                )
        found[key] = profile
        if backend.profile_sources is not None:
            said = _ask(backend, f"profile_sources{key}", partial(backend.profile_sources, chip, *key))
            names = [f.name for f in fields(Profile)]
            if not _TEXTS[0](said) or not set(said) <= set(names):
                raise DeclarationError(
                    f"backend {backend.name!r}: profile_sources{key} returned {said!r}, but {_TEXTS[1]} is accepted, by "
                    "fields of Profile; mend the declaration."
                )
            sources[key] = said
    return found, sources


def subject_of(
    backend: Backend, hello: Mapping[str, Any], cases: Iterable[Case], list_name: str, list_sha256: str, **run: Any
) -> Subject:
    """Who answers: what `backend` declares for the device that its process found, over all `cases`; `run` has the other fields.

    Raises DeclarationError or BackendExited.
    """
    chip = device(backend, hello["device"])
    offered = capabilities(backend, chip)
    parts = [part for case in cases for part in ((case.index, case.attend) if isinstance(case, PipelineCase) else (case,))]
    asked = [(part.operator, part.format, phase) for part in parts for phase in PHASES]
    found, sources = profiles(backend, chip, offered, asked)
    return Subject(
        list_name=list_name,
        list_sha256=list_sha256,
        backend=backend.name,
        version=backend.version,
        resolved=hello["resolved"],
        arrays=backend.arrays,
        contract=backend.contract,
        device=chip,
        capabilities=offered,
        profiles=found,
        sources=sources,
        suite=dsa_portable.__version__,
        interpreted=hello["interpreted"],
        **run,
    )
