"""The operators' arguments as data: this declaration checks calls, fills the tables of docs/contract.md and shapes cases."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from dsa_portable.arrays import Array, as_int, describe, device_of, dtype_name, is_array
from dsa_portable.errors import InvalidArgument, Unsupported
from dsa_portable.formats import check_cache, layout

FLOATS = ("float32", "bfloat16", "float16")
SCALED = ("float8_e4m3fn", "int8")
# Index operands that a later contract may take: FNUZ of gfx942, HiFloat8 of Ascend, MXFP4 as ml_dtypes and torch name it.
RESERVED = ("float8_e4m3fnuz", "hifloat8", "mxfp4", "float4_e2m1fn", "float4_e2m1fn_x2")
SMALLEST_SCALE, LARGEST_SCALE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
# Every other named dimension is at least 1.
MAY_BE_EMPTY = ("Tq", "Tk", "num_pages")
SHORT = {"float8_e4m3fn": "e4m3", "int8": "int8", "bfloat16": "bf16", "float16": "f16", "float32": "f32"}


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

    def dims(self, paged: bool) -> tuple[str, ...]:
        """The named dimensions, outermost first, of the flat or the paged form."""
        return tuple((self.shapes.get("any") or self.shapes["paged" if paged else "flat"]).split())

    def form(self, paged: bool) -> str:
        """The same for error messages: `[Tk, D] (flat, as there is no block_table)`."""
        why = "paged, as the batch has a block_table" if paged else "flat, as there is no block_table"
        return f"[{', '.join(self.dims(paged))}]" + ("" if "any" in self.shapes else f" ({why})")


@dataclass(frozen=True)
class Option:
    """One argument that is no array."""

    name: str
    accepts: str
    doc: str
    default: str = "required"


@dataclass(frozen=True)
class Result:
    """One returned array."""

    name: str
    dtype: str
    dims: str
    doc: str


@dataclass(frozen=True)
class Signature:
    """One operator: formula, arrays in, options, arrays out."""

    name: str
    formula: str
    arguments: tuple[Argument, ...]
    options: tuple[Option, ...]
    results: tuple[Result, ...]

    def argument(self, name: str) -> Argument:
        """The array argument of this name."""
        return next(a for a in self.arguments if a.name == name)


ANY_ROWS = {"any": "Tq topk"}
COMMON = (
    Option("batch", "Batch or None", "which rows and keys belong together; None is one dense causal sequence", "None"),
    Option("out", "array or tuple of arrays", "where to write the results, in the results' dtypes and shapes", "None"),
    Option("backend", "name or None", "overrides `use_backend()` and `DSA_BACKEND`", "None"),
)

LIGHTNING_INDEX = Signature(
    name="lightning_index",
    formula="score[t,s] = k_scale[s] * sum_h weights[t,h] * relu(q[t,h,:] . k[s,:]);  indices[t] = the topk best s",
    arguments=(
        Argument(
            "q",
            (*SCALED, *FLOATS),
            {"any": "Tq H D"},
            "rotated, quantised queries; their scale is in `weights`",
            reserved=RESERVED,
        ),
        Argument(
            "k",
            (*SCALED, *FLOATS),
            {"flat": "Tk D", "paged": "num_pages page_size D"},
            "keys, one head, in q's dtype; uint8 with the layout's bytes per token when `k_layout` names a packed cache",
            reserved=RESERVED,
        ),
        Argument("weights", FLOATS, {"any": "Tq H"}, "head weights of either sign, times query scale, H^-0.5 and D^-0.5"),
        Argument(
            "k_scale",
            ("float32", "float16"),
            {"flat": "Tk", "paged": "num_pages page_size"},
            "key scales, finite, >= 0; required for float8 and int8 keys, forbidden for others and for packed caches",
            optional=True,
        ),
    ),
    options=(
        Option("topk", "int >= 1", "entries per row of the result"),
        Option("k_layout", "name of an index cache layout or None", "how a packed k is stored; never inferred", "None"),
        Option("return_scores", "bool", "also return the scores of the returned indices", "False"),
        Option("sorted", "bool", "True: ascending position; False: any order, still unique and packed", "True"),
        Option(
            "index_space", '"request"', "indices are positions in the row's own request; other spaces are reserved", '"request"'
        ),
        *COMMON,
    ),
    results=(
        Result("indices", "int32", "Tq topk", "unique, packed to the left, tail -1"),
        Result("scores", "float32", "Tq topk", "with `return_scores`: the scores of `indices`, -inf in the tail"),
    ),
)

SPARSE_ATTEND = Signature(
    name="sparse_attend",
    formula="P = softmax_j(softmax_scale * q[t,h,:] . kv[idx_j,:]);  out[t,h] = sum_j P_j * kv[idx_j,:value_dim]",
    arguments=(
        Argument("q", FLOATS, {"any": "Tq Hq Dqk"}, "absorbed queries: latent part first, rotated part last"),
        Argument(
            "kv",
            FLOATS,
            {"flat": "Tk Dqk", "paged": "num_pages page_size Dqk"},
            "keys and values in one, in q's dtype; uint8 with the layout's bytes per token when `kv_layout` names a cache",
        ),
        Argument("indices", ("int32",), ANY_ROWS, "positions in the row's own request; outside [0, seqlens_k) is skipped"),
        Argument("attn_sink", ("float32",), {"any": "Hq"}, "adds exp(attn_sink) to the denominator; never enters lse", True),
        Argument("topk_length", ("int32",), {"any": "Tq"}, "how many leading entries of the row of `indices` count", True),
    ),
    options=(
        Option(
            "softmax_scale",
            "finite float > 0, normal in float32",
            "V3.2 uses 192^-0.5 * mscale^2, not Dqk^-0.5: there is no default",
        ),
        Option("value_dim", "int in 1 .. Dqk", "leading columns of kv that are the value", "512"),
        Option("kv_layout", "name of a KV cache layout or None", "how a packed kv is stored; never inferred", "None"),
        Option("return_lse", "bool", "also return the natural-logarithm lse over the keys", "False"),
        Option(
            "index_space", '"request"', "indices are positions in the row's own request; other spaces are reserved", '"request"'
        ),
        *COMMON,
    ),
    results=(
        Result("out", "q's dtype", "Tq Hq value_dim", "0 in an empty row"),
        Result("lse", "float32", "Tq Hq", "with `return_lse`: natural logarithm, keys only, -inf in an empty row"),
    ),
)

SIGNATURES = {s.name: s for s in (LIGHTNING_INDEX, SPARSE_ATTEND)}

# Not an operator of backends: it runs on NumPy or torch, wherever the parts live.
MERGE = Signature(
    name="merge",
    formula="out = sum_i exp(lse_i) * out_i / (sum_i exp(lse_i) + exp(attn_sink));  lse = log sum_i exp(lse_i)",
    arguments=(
        Argument("outs", FLOATS, {"any": "Tq Hq value_dim"}, "a sequence: attention over disjoint key shards, without a sink"),
        Argument("lses", ("float32",), {"any": "Tq Hq"}, "a sequence, one per out; a part is not read where its lse is -inf"),
        Argument("attn_sink", ("float32",), {"any": "Hq"}, "applied once, here; never enters lse", True),
    ),
    options=(),
    results=(
        Result("out", "the parts' dtype", "Tq Hq value_dim", "computed in float32; 0 in a row that no part saw"),
        Result("lse", "float32", "Tq Hq", "-inf in a row that no part saw"),
    ),
)


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
        names = argument.dims(paged)
        layout_name = packed.get(argument.name)
        if value.ndim != len(names):
            raise InvalidArgument(f"{where}, but the shape {argument.form(paged)} is accepted; reshape it.")
        if layout_name is not None:
            check_cache(layout_name, value)
            if not paged and layout(layout_name).planar:
                raise InvalidArgument(f"{where}, but {layout_name} is stored page by page; pass a batch with a block_table.")
        elif dtype_name(value) in argument.reserved:
            raise Unsupported(f"{where}, but contract 1.0 only reserves this format; use {argument.dtypes[0]}.", "format")
        elif dtype_name(value) not in argument.dtypes:
            raise InvalidArgument(f"{where}, but {' or '.join(argument.dtypes)} is accepted; cast it, or name its layout.")
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


def check_count(signature: Signature, name: str, value: object, upper: int | None = None) -> int:
    """The int >= 1 (and <= upper) that value is, or raise."""
    count = as_int(value)
    if count is None or count < 1 or (upper is not None and count > upper):
        accepted = ">= 1" if upper is None else f"in 1 .. {upper}"
        raise InvalidArgument(f"{signature.name}: {name} is {value!r}, but an int {accepted} is accepted; pass one.")
    return count


def check_scale(signature: Signature, name: str, value: Any) -> float:
    """The finite float > 0 that value is, or raise; kernels hold it in float32, so it must be a normal number there."""
    try:
        scale = float(value) if isinstance(value, Real) and not isinstance(value, bool) else 0.0
    except OverflowError:
        scale = math.inf
    if not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
        raise InvalidArgument(
            f"{signature.name}: {name} is {value!r}, but a finite float > 0, normal in float32, is accepted; pass one."
        )
    return scale


def check_flag(signature: Signature, name: str, value: object) -> bool:
    """The bool that value is, or raise."""
    if not isinstance(value, (bool, np.bool_)):
        raise InvalidArgument(f"{signature.name}: {name} is {value!r}, but a bool is accepted; pass True or False.")
    return bool(value)


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
