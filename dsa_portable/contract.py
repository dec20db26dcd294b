"""What the declaration of an operator feeds: the checks of calls, what backends may decline, the tables of docs/contract.md.

An operator's request is a dataclass whose fields say everything of an argument: dtypes and named dimensions or accepted values,
default, meaning, and the features that it brings; see operators/.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache
from numbers import Real
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, TypeVar

import numpy as np

from dsa_portable.arrays import (
    Array,
    as_int,
    describe,
    device_of,
    dtype_name,
    host_as_kind,
    is_array,
    on_host,
    overlap,
    overlaps_itself,
    strange,
)
from dsa_portable.batch import MAX_PLACES, Batch, batch_as_kind
from dsa_portable.errors import InvalidArgument, Unsupported
from dsa_portable.formats import check_cache, layout

FLOATS = ("float32", "bfloat16", "float16")
SCALED = ("float8_e4m3fn", "int8")
# Index operands that a later contract may take: FNUZ of gfx942, HiFloat8 of Ascend, MXFP4 as ml_dtypes and torch name it.
RESERVED = ("float8_e4m3fnuz", "hifloat8", "mxfp4", "float4_e2m1fn", "float4_e2m1fn_x2")
SMALLEST_SCALE, LARGEST_SCALE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
# Every other named dimension is at least 1.
MAY_BE_EMPTY = ("Tq", "Tk", "num_pages", "S")
SHORT = {"float8_e4m3fn": "e4m3", "int8": "int8", "bfloat16": "bf16", "float16": "f16", "float32": "f32"}


# --- what a backend may or may not offer ---


class _Any:
    """Declares that every value is offered."""

    def __contains__(self, value: object) -> bool:
        return True

    def __repr__(self) -> str:
        return "any"


ANY = _Any()
YES = (True,)


@dataclass(frozen=True)
class PerPhase:
    """Declares values that are offered in one phase and not, or other ones, in the other."""

    decode: Container[Any] = ()
    prefill: Container[Any] = ()


# operator -> feature -> the values offered; a feature that is not named is not offered, but for those that are implied.
Capabilities: TypeAlias = Mapping[str, Mapping[str, Container[Any] | PerPhase]]


@dataclass(frozen=True)
class Values:
    """Which values a feature can have in any call, and how they are called."""

    hold: Callable[[Any], bool]
    words: str


FLAG = Values(lambda value: value is True, "True alone")
COUNTS = Values(lambda value: type(value) is int and value >= 1, "whole numbers from 1 on")


def names(known: Iterable[str]) -> Values:
    """The values are these names."""
    found = tuple(known)
    return Values(lambda value: isinstance(value, str) and value in found, ", ".join(found))


@dataclass(frozen=True)
class Feature:
    """One thing a call can ask for: `required` holds the values that a claim cannot do without (one of each set is enough)."""

    name: str
    value: Callable[[Any], Any]
    doc: str
    required: tuple[Any, ...] = ()
    in_call: bool = True  # False: it lies in the data, where only the suite can see it
    instead: str = ""  # a feature that a claim may have in its place
    implied: tuple[Any, ...] = ()  # what is offered where a declaration does not name it
    values: Values = FLAG

    def offered(self, capabilities: Capabilities, operator: str, phase: str) -> Container[Any]:
        """The values that a backend offers of it."""
        declared = capabilities.get(operator)
        values = () if declared is None else declared.get(self.name, self.implied)
        if isinstance(values, PerPhase):
            return values.decode if phase == "decode" else values.prefill
        return values


def when(condition: bool) -> bool | None:
    """The value of a feature that is used or not."""
    return True if condition else None


# --- declarations ---

# What checks an option: (signature, name, value, dims) -> the value to hold.
Check: TypeAlias = Callable[["Signature", str, Any, Mapping[str, int]], Any]
REQUIRED = object()
_R = TypeVar("_R", bound="Request")


@dataclass(frozen=True)
class Argument:
    """One array argument: `shapes` maps how it is stored (`any`, or `flat` and `paged`) to its named dimensions.

    `reserved`: dtypes that are named for a later contract, and Unsupported in this one.
    """

    name: str
    dtypes: tuple[str, ...]
    shapes: Mapping[str, str]
    doc: str
    optional: bool = False
    reserved: tuple[str, ...] = ()
    packed_by: str = ""  # the option that names a packed cache in this argument's place
    features: tuple[Feature, ...] = ()

    def dims(self, paged: bool) -> tuple[str, ...]:
        """The named dimensions, outermost first, of the flat or the paged form."""
        return tuple((self.shapes.get("any") or self.shapes["paged" if paged else "flat"]).split())

    def form(self, paged: bool) -> str:
        """The same for error messages: `[Tk, D] (flat, as there is no block_table)`."""
        why = "paged, as the batch has a block_table" if paged else "flat, as there is no block_table"
        return f"[{', '.join(self.dims(paged))}]" + ("" if "any" in self.shapes else f" ({why})")


@dataclass(frozen=True)
class Option:
    """One argument that is no array; `check` returns the value that the request holds, or raises."""

    name: str
    accepts: str
    doc: str
    default: str = "required"
    check: Check | None = None
    features: tuple[Feature, ...] = ()


@dataclass(frozen=True)
class Result:
    """One returned array."""

    name: str
    dtype: str
    dims: str
    doc: str


@dataclass(frozen=True)
class Signature:
    """One operator: formula, arrays in, options, arrays out, each in the order in which it is checked and shown.

    `part_of`: the operator that this one is a part of, whose caches it takes; parts alone never earn a level.
    """

    name: str
    formula: str
    arguments: tuple[Argument, ...]
    options: tuple[Option, ...]
    results: tuple[Result, ...]
    features: tuple[Feature, ...] = ()  # what a call can ask for; what lies in the data, where nobody can refuse it, is last
    part_of: str = ""

    def argument(self, name: str) -> Argument:
        """The array argument of this name."""
        return next(a for a in self.arguments if a.name == name)


# --- fields of a request ---


def array(
    dtypes: tuple[str, ...],
    doc: str,
    *,
    dims: str = "",
    flat: str = "",
    paged: str = "",
    optional: bool = False,
    reserved: tuple[str, ...] = (),
    packed_by: str = "",
    features: tuple[Feature, ...] = (),
) -> Any:
    """A field that holds an array of these dtypes, with the named dimensions `dims`, or `flat` and `paged`."""
    shapes = {"any": dims} if dims else {"flat": flat, "paged": paged}
    declared = Argument("", dtypes, shapes, doc, optional, reserved, packed_by, features)
    return field(default=None if optional else MISSING, metadata={"declared": declared})


def option(
    accepts: str, doc: str, *, default: Any = REQUIRED, check: Check | None = None, features: tuple[Feature, ...] = ()
) -> Any:
    """A field that holds anything else; `check` makes the value that is held of the one that is passed, or raises."""
    shown = "required" if default is REQUIRED else repr(default)
    declared = Option("", accepts, doc, shown, check, features)
    return field(default=MISSING if default is REQUIRED else default, metadata={"declared": declared})


# Arguments of every operator that its backends never see.
INDEX_SPACE = Option(
    "index_space", '"request"', "indices are positions in the row's own request; other spaces are reserved", '"request"'
)
BACKEND = Option("backend", "name or None", "overrides `use_backend()` and `DSA_BACKEND`", "None")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A checked call, which is what a backend's operator receives; `dims` binds the named dimensions of its arrays."""

    operator: ClassVar[str]
    formula: ClassVar[str]
    returns: ClassVar[tuple[Result, ...]]
    part_of: ClassVar[str] = ""

    if TYPE_CHECKING:  # Every operator declares them itself, so that its fields stand in its own order.
        batch: Batch
        out: tuple[Array, ...] | None
        dims: Mapping[str, int]

    @classmethod
    @cache
    def signature(cls) -> Signature:
        """The declaration, read from the fields."""
        found = [f for f in fields(cls) if "declared" in f.metadata]
        declared: list[Argument | Option] = [replace(f.metadata["declared"], name=f.name) for f in found]
        arguments = tuple(d for d in declared if isinstance(d, Argument))
        options = tuple(d for d in declared if isinstance(d, Option))
        brought = [feature for d in declared for feature in d.features]
        features = tuple(sorted(brought, key=lambda feature: not feature.in_call))
        options = (*options, INDEX_SPACE, BACKEND)
        return Signature(cls.operator, cls.formula, arguments, options, cls.returns, features, cls.part_of)

    @property
    def first(self) -> Array:
        """The first argument, whose kind and device are the results' too."""
        return getattr(self, self.signature().arguments[0].name)

    @classmethod
    def checked(cls: type[_R], *, index_space: str = "request", **values: Any) -> _R:
        """The request of a call. Raises InvalidArgument, or Unsupported for what is reserved; no kernel runs."""
        signature = cls.signature()
        values = cls.defaults() | values
        packed = {a.name: values[a.packed_by] for a in signature.arguments if a.packed_by}
        _check_common(signature, index_space, packed)
        batch, out = values["batch"], values["out"]
        paged = _paged(signature, batch)
        dims = check_arrays(signature, values, paged=paged, packed=packed)
        cls.check(values)
        for declared in signature.options:
            if declared.check is not None:
                values[declared.name] = declared.check(signature, declared.name, values[declared.name], dims)
        values["batch"] = _bound(signature, batch, dims, values[signature.arguments[0].name])
        values["out"] = out if out is None or isinstance(out, tuple) else (out,)
        request = cls(**values, dims=dims)
        _check_out(request)
        return request

    @classmethod
    @cache
    def defaults(cls) -> dict[str, Any]:
        """What a call may leave out, with the values that stand for it."""
        return {f.name: f.default for f in fields(cls) if f.default is not MISSING} | {"batch": None}

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """What arrays must have in common beyond their dimensions. Raises InvalidArgument."""

    @property
    def format(self) -> str:
        """As claims name it."""
        raise NotImplementedError

    @property
    def results(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Name -> (dtype, shape) of what the call returns, in order."""
        raise NotImplementedError

    def as_kind(self: _R, wanted: str) -> _R:
        """The same call over the same memory, with every host array of the wanted kind (`numpy` or `torch`).

        Itself where nothing changes kind; nothing is checked again, as no value changes.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        changed = {name: new for name, value in values.items() if (new := _shared(value, wanted)) is not value}
        return replace(self, **changed) if changed else self


def _shared(value: Any, wanted: str) -> Any:
    if isinstance(value, tuple):
        parts = tuple(_shared(v, wanted) for v in value)
        return parts if any(new is not old for new, old in zip(parts, value, strict=True)) else value
    return batch_as_kind(value, wanted) if isinstance(value, Batch) else host_as_kind(value, wanted)


def _check_common(signature: Signature, index_space: str, packed: Mapping[str, str | None]) -> None:
    if index_space != "request":
        raise Unsupported(
            f"{signature.name}: index_space is {index_space!r}, but this contract has 'request' alone; convert with "
            "the Batch's to_flat(), to_slots(), from_flat() or from_slots().",
            "index_space",
        )
    for argument, layout_name in packed.items():
        if layout_name is not None and layout(layout_name).operator != (signature.part_of or signature.name):
            raise InvalidArgument(
                f"{signature.name}: {signature.argument(argument).packed_by} is {layout_name!r}, but that is a cache of "
                f"{layout(layout_name).operator}; pass one of {signature.part_of or signature.name}'s own."
            )


def _paged(signature: Signature, batch: Batch | None) -> bool:
    if batch is not None and not isinstance(batch, Batch):
        raise InvalidArgument(
            f"{signature.name}: batch is {describe(batch)}, but a Batch or None is accepted; build one with Batch.of()."
        )
    return batch is not None and batch.block_table is not None


def _bound(signature: Signature, batch: Batch | None, dims: Mapping[str, int], first: Array) -> Batch:
    if batch is None:
        return Batch.dense(dims["Tq"], dims["Tk"] if "Tk" in dims else dims["S"])
    name, place = signature.arguments[0].name, device_of(first)
    where = f"{signature.name}: batch"
    for array in batch.flatten()[0]:
        if array is not None and not on_host(array) and device_of(array) != place:
            raise InvalidArgument(
                f"{where} holds {describe(array)}, but {name} is on {place}; keep it on the host or beside {name}."
            )
    if "S" in dims and batch.max_seqlen_k != dims["S"]:
        raise InvalidArgument(
            f"{where}.max_seqlen_k is {batch.max_seqlen_k}, but {name} has {dims['S']} columns; pass as many, or a view of "
            "a wider buffer."
        )
    # Where no keys are passed, how they are stored is not read.
    if batch.page_size is not None and batch.page_size != dims.get("page_size", batch.page_size):
        raise InvalidArgument(
            f"{signature.name}: batch.page_size is {batch.page_size}, but the cache has pages of {dims['page_size']}; use "
            "batch.with_pages()."
        )
    batch.check_bounds(dims["Tq"], dims.get("num_pages" if batch.block_table is not None else "Tk", MAX_PLACES))
    return batch


def _check_out(request: Request) -> None:
    if request.out is None:
        return
    results = request.results
    if len(request.out) != len(results):
        raise InvalidArgument(
            f"{request.operator}: out has {len(request.out)} arrays, but the call returns {' and '.join(results)}; pass one "
            "array for each, in a tuple."
        )
    device = device_of(request.first)
    for array, (name, (dtype, shape)) in zip(request.out, results.items(), strict=True):
        where = f"{request.operator}: out for {name} is {describe(array)}"
        fits = is_array(array) and (dtype_name(array), tuple(array.shape), device_of(array)) == (dtype, shape, device)
        if not fits:
            raise InvalidArgument(f"{where}, but {dtype} {list(shape)} on {device} is accepted; allocate it so.")
        if isinstance(array, np.ndarray) and not array.flags.writeable:
            raise InvalidArgument(f"{where} and read-only, but results are written there; pass a writeable array.")
        if overlaps_itself(array):
            raise InvalidArgument(f"{where}, whose numbers share memory with each other; pass an array that was not broadcast.")
        passed = [(a.name, value) for a in request.signature().arguments if (value := getattr(request, a.name)) is not None]
        passed += [(f"out for {other}", value) for other, value in zip(results, request.out, strict=True) if value is not array]
        for other, value in passed:
            if overlap(array, value):
                raise InvalidArgument(f"{where} and shares memory with {other}, which it would overwrite; pass another array.")


def check_same_dtype(operator: str, name: str, dtype: str, q: Array) -> None:
    """Raise InvalidArgument where q has another dtype than `name` holds."""
    if dtype_name(q) != dtype:
        raise InvalidArgument(
            f"{operator}: q is {dtype_name(q)}, but {name} holds {dtype}; nothing is cast silently, so pass one dtype."
        )


# --- checks ---


def shown(value: object) -> str:
    """The value in a message, cut where it is long."""
    return reprlib.repr(value)


def check_arrays(
    signature: Signature, values: Mapping[str, Array | None], *, paged: bool, packed: Mapping[str, str | None]
) -> dict[str, int]:
    """Bind the named dimensions of every array that was passed, or raise; `packed` maps an argument to its layout's name."""
    dims: dict[str, int] = {}
    owner: dict[str, str] = {}
    first: Array | None = None
    for argument in signature.arguments:
        value = values[argument.name]
        if value is None:
            if not argument.optional:
                raise InvalidArgument(f"{signature.name}: {argument.name} is None, but it is required: {argument.doc}.")
            continue
        where = f"{signature.name}: {argument.name} is {describe(value)}"
        if not is_array(value):
            raise InvalidArgument(f"{where}, but a NumPy array or a torch tensor is accepted; convert it first.")
        if why := strange(value):
            raise InvalidArgument(f"{where} and {why}.")
        names = argument.dims(paged)
        layout_name = packed.get(argument.name)
        if value.ndim != len(names):
            raise InvalidArgument(f"{where}, but the shape {argument.form(paged)} is accepted; reshape it.")
        if layout_name is not None:
            check_cache(layout_name, value)
            if not paged and layout(layout_name).planar:
                raise InvalidArgument(f"{where}, but {layout_name} is stored page by page; pass a batch with a block_table.")
        elif dtype_name(value) in argument.reserved:
            raise Unsupported(f"{where}, but this contract only reserves this format; use {argument.dtypes[0]}.", "format")
        elif dtype_name(value) not in argument.dtypes:
            cure = "cast it, or name its layout" if argument.packed_by else "cast it"
            raise InvalidArgument(f"{where}, but {' or '.join(argument.dtypes)} is accepted; {cure}.")
        first = value if first is None else first
        if device_of(value) != device_of(first):
            raise InvalidArgument(
                f"{where}, but {signature.arguments[0].name} is on {device_of(first)}; move them to one device."
            )
        sizes = list(value.shape)
        if layout_name is not None:
            sizes[-1] = layout(layout_name).key_dim
        for name, size in zip(names, sizes, strict=True):
            if size == 0 and name not in MAY_BE_EMPTY:
                raise InvalidArgument(f"{where}: its {name} is 0, but at least 1 is accepted; pass an array that has some.")
            if dims.setdefault(name, size) != size:
                raise InvalidArgument(
                    f"{where}: its {name} is {size}, but {owner[name]} has {name} = {dims[name]}; pass arrays that agree."
                )
            owner.setdefault(name, argument.name)
    return dims


def count(signature: Signature, name: str, value: object, dims: Mapping[str, int], largest: str = "") -> int:
    """The int >= 1 (and <= the dimension `largest`) that value is, or raise."""
    # Positions are int32, and so is how many of them there can be.
    count, upper = as_int(value), dims[largest] if largest else MAX_PLACES - 1
    if count is None or count < 1 or count > upper:
        accepted = f"in 1 .. {upper}" if largest or (count is not None and count > upper) else ">= 1"
        raise InvalidArgument(f"{signature.name}: {name} is {shown(value)}, but an int {accepted} is accepted; pass one.")
    return count


def scale(signature: Signature, name: str, value: Any, dims: Mapping[str, int]) -> float:
    """The finite float > 0 that value is, or raise; kernels hold it in float32, so it must be a normal number there."""
    try:
        scale = float(value) if isinstance(value, Real) and not isinstance(value, bool) else 0.0
    except OverflowError:
        scale = math.inf
    if not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
        raise InvalidArgument(
            f"{signature.name}: {name} is {shown(value)}, but a finite float > 0, normal in float32, is accepted; pass one."
        )
    return scale


def flag(signature: Signature, name: str, value: object, dims: Mapping[str, int]) -> bool:
    """The bool that value is, or raise."""
    if not isinstance(value, (bool, np.bool_)):
        raise InvalidArgument(f"{signature.name}: {name} is {value!r}, but a bool is accepted; pass True or False.")
    return bool(value)


def gap(request: Request, capabilities: Capabilities) -> tuple[Feature, Any] | None:
    """The first feature that the call uses and the declaration lacks, with the value asked for; None if all is offered."""
    for feature in request.signature().features:
        value = feature.value(request)
        if value is not None and value not in feature.offered(capabilities, request.operator, request.batch.phase):
            return feature, value
    return None


def require(request: Request, capabilities: Capabilities, backend: str) -> None:
    """Raise Unsupported, naming the capability, where the backend does not offer what the call asks for."""
    missing = gap(request, capabilities)
    if missing is None:
        return
    feature, value = missing
    offered = feature.offered(capabilities, request.operator, request.batch.phase)
    asked = feature.name if value is True else f"{feature.name} = {value!r}"
    choice = f"it offers {offered!r}" if offered and value is not True else f"it does not declare '{feature.name}'"
    raise Unsupported(
        f"backend '{backend}' does not offer {asked} ({feature.doc}) for {request.operator}: {choice}; change the call or the "
        "backend.",
        feature.name,
    )


# --- tables ---


def table(signature: Signature) -> str:
    """The operator's Markdown tables for docs/contract.md."""
    lines = [f"`{signature.formula}`", "", "| argument | dtype or values | shape | meaning |", "| --- | --- | --- | --- |"]
    for a in signature.arguments:
        shapes = "; ".join(f"`[{', '.join(d.split())}]`{'' if kind == 'any' else ' ' + kind}" for kind, d in a.shapes.items())
        lines.append(f"| `{a.name}`{' (optional)' if a.optional else ''} | {', '.join(a.dtypes)} | {shapes} | {a.doc} |")
    for o in signature.options:
        default = "" if o.default == "required" else f"; default {o.default}"
        lines.append(f"| `{o.name}` | {o.accepts}{default} | | {o.doc} |")
    lines += ["", "| result | dtype | shape | meaning |", "| --- | --- | --- | --- |"]
    lines += [f"| `{r.name}` | {r.dtype} | `[{', '.join(r.dims.split())}]` | {r.doc} |" for r in signature.results]
    return "\n".join(lines)


def feature_table(offered: Mapping[str, tuple[Feature, ...]]) -> str:
    """The feature table of docs/contract.md."""
    lines = ["| operator | feature | claim needs | meaning |", "| --- | --- | --- | --- |"]
    for operator, features in offered.items():
        for f in features:
            needs = "one value" if f.name == "format" else " or ".join(str(v) for v in f.required if v is not True)
            needs = needs or ("required" if f.required else "optional")
            needs += f", or `{f.instead}`" * bool(f.instead)
            lines.append(f"| {operator} | `{f.name}` | {needs} | {f.doc} |")
    return "\n".join(lines)
