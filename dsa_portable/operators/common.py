"""Fields that several requests have, the features they bring, and what scoring and selecting share with the whole index."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsa_portable.arrays import Array, dtype_name
from dsa_portable.contract import (
    COUNTS,
    FLOATS,
    RESERVED,
    SCALED,
    SHORT,
    YES,
    Feature,
    Request,
    array,
    check_same_dtype,
    count,
    flag,
    names,
    option,
    when,
)
from dsa_portable.errors import InvalidArgument
from dsa_portable.formats import LAYOUTS, layout

_INDEX_CACHES = [name for name, cache in LAYOUTS.items() if cache.operator == "lightning_index"]
# `operand/weights/scale`: keys that need scales have some.
_SCORED_FORMATS = tuple(
    f"{SHORT[operand]}/{SHORT[weight]}/{scale}"
    for operand in (*SCALED, *FLOATS)
    for weight in FLOATS
    for scale in (("f32", "f16") if operand in SCALED else ("-",))
)
# How keys are stored: features of whatever reads keys.
STORED = (
    Feature("flat", lambda r: when(r.batch.block_table is None), "keys in one flat array", YES, instead="page_size"),
    Feature(
        "page_size", lambda r: r.batch.page_size, "paged keys, positions per page", (64, 128), instead="flat", values=COUNTS
    ),
)
RAGGED = (Feature("ragged", lambda r: when(r.batch.num_requests > 1), "several requests of unequal lengths", YES),)
# Which keys a row sees: features of whatever masks.
SEEN = (
    Feature("key_range", lambda r: when(r.batch.key_start is not None), "`key_start` and `key_end` per row"),
    Feature("non_causal", lambda r: when(not r.batch.causal and r.batch.key_start is None), "`causal=False`"),
)
_OUT = Feature("out", lambda r: when(r.out is not None), "results written into arrays of the caller's")


def batch(*features: Feature) -> Any:
    """Which rows see which keys; `features` are what the operator can be asked for of it."""
    doc = "which rows and keys belong together; None is one dense causal sequence"
    return option("Batch or None", doc, default=None, features=features)


def out() -> Any:
    """Where to write."""
    doc = "where to write the results, in the results' dtypes and shapes"
    return option("array or tuple of arrays", doc, default=None, features=(_OUT,))


def topk() -> Any:
    """How many are selected."""
    features = (Feature("topk", lambda r: r.topk, "entries per row", (2048,), values=COUNTS),)
    return option("int >= 1", "entries per row of the result", check=count, features=features)


def ascending() -> Any:
    """In which order they stand."""
    return option(
        "bool",
        "True: ascending position; False: any order, still unique and packed",
        default=True,
        check=flag,
        features=(Feature("unsorted", lambda r: when(not r.sorted), "`sorted=False`"),),
    )


def k_layout() -> Any:
    """How packed keys are stored."""
    return option(
        "name of an index cache layout or None",
        "how a packed k is stored; never inferred",
        default=None,
        features=(
            Feature(
                "unpacked",
                lambda r: when(r.k_layout is None),
                "keys, and their scales, in arrays of their own; offered unless `()` is declared",
                YES,
                instead="k_layout",
                implied=YES,
            ),
            Feature("k_layout", lambda r: r.k_layout, "packed index caches, by name", values=names(_INDEX_CACHES)),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Scored(Request):
    """What keys are scored with; a request that scores declares `batch`, `out` and `k_layout` itself, in its own order."""

    if TYPE_CHECKING:
        k_layout: str | None

    q: Array = array(
        (*SCALED, *FLOATS),
        "rotated, quantised queries; their scale is in `weights`",
        dims="Tq H D",
        reserved=RESERVED,
        features=(
            Feature(
                "format",
                lambda r: r.format,
                "operand/weights/scale dtypes; each with a phase is a claim of its own",
                values=names(_SCORED_FORMATS),
            ),
            Feature("heads", lambda r: r.dims["H"], "index heads", (64, 32), values=COUNTS),
            Feature("head_dim", lambda r: r.dims["D"], "index head dimension", (128,), values=COUNTS),
        ),
    )
    k: Array = array(
        (*SCALED, *FLOATS),
        "keys, one head, in q's dtype; uint8 with the layout's bytes per token when `k_layout` names a packed cache",
        flat="Tk D",
        paged="num_pages page_size D",
        reserved=RESERVED,
        packed_by="k_layout",
    )
    weights: Array = array(FLOATS, "head weights of either sign, times query scale, H^-0.5 and D^-0.5", dims="Tq H")
    k_scale: Array | None = array(
        ("float32", "float16"),
        "key scales, finite, >= 0; required for float8 and int8 keys, forbidden for others and for packed caches",
        flat="Tk",
        paged="num_pages page_size",
        optional=True,
    )

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Keys are of q's dtype, and have scales just where their dtype needs them."""
        k_layout, k_scale = values["k_layout"], values["k_scale"]
        key_dtype = dtype_name(values["k"]) if k_layout is None else layout(k_layout).value_dtype.name
        check_same_dtype(cls.operator, "k", key_dtype, values["q"])
        if k_layout is not None and k_scale is not None:
            held = f"{k_layout} holds its own scales"
            raise InvalidArgument(f"{cls.operator}: k_scale was passed, but {held}; pass k_scale=None.")
        if k_layout is None and (k_scale is None) == (key_dtype in SCALED):
            state = "missing" if k_scale is None else "passed"
            raise InvalidArgument(
                f"{cls.operator}: k_scale is {state} for {key_dtype} keys, but {' and '.join(SCALED)} keys need one and "
                f"others have none; {'pass it' if k_scale is None else 'fold it into the keys'}."
            )

    @property
    def format(self) -> str:
        """`operand/weights/scale`, e.g. `e4m3/f32/f32` or `bf16/bf16/-`."""
        packed = "-" if self.k_layout is None else "f32"
        scale = packed if self.k_scale is None else SHORT[dtype_name(self.k_scale)]
        return f"{SHORT[dtype_name(self.q)]}/{SHORT[dtype_name(self.weights)]}/{scale}"
