"""What a backend may or may not offer, as one table: it refuses calls, marks cases UNSUPPORTED, and fills docs/contract.md.

A feature's `value(request)` is None where the call does not use it; otherwise the backend's declaration must contain the value.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from dsa_portable.errors import Unsupported
from dsa_portable.request import Request


class _Any:
    """Declares that every value is offered."""

    def __contains__(self, value: object) -> bool:
        return True

    def __repr__(self) -> str:
        return "any"


ANY = _Any()
YES = (True,)
# operator -> feature -> the values offered; a feature that is not named is not offered.
Capabilities: TypeAlias = Mapping[str, Mapping[str, Container[Any]]]


@dataclass(frozen=True)
class Feature:
    """One thing a call can ask for: `required` holds the values that a claim cannot do without (one of each set is enough)."""

    name: str
    value: Callable[[Any], Any]
    doc: str
    required: tuple[Any, ...] = ()
    in_call: bool = True  # False: it lies in the data, where only the suite can see it


def _when(condition: bool) -> bool | None:
    return True if condition else None


_SHARED = (
    Feature("flat", lambda r: _when(r.batch.block_table is None), "keys in one flat array", YES),
    Feature("page_size", lambda r: r.batch.page_size, "paged keys, positions per page", (64, 128)),
    Feature("ragged", lambda r: _when(r.batch.num_requests > 1), "several requests of unequal lengths", YES),
    Feature("out", lambda r: _when(r.out is not None), "results written into arrays of the caller's"),
)

FEATURES: dict[str, tuple[Feature, ...]] = {
    "lightning_index": (
        Feature("format", lambda r: r.format, "operand/weights/scale dtypes; each with a phase is a claim of its own"),
        Feature("heads", lambda r: r.dims["H"], "index heads", (64, 32)),
        Feature("head_dim", lambda r: r.dims["D"], "index head dimension", (128,)),
        Feature("topk", lambda r: r.topk, "entries per row", (2048,)),
        *_SHARED,
        Feature("k_layout", lambda r: r.k_layout, "packed index caches, by name"),
        Feature("unsorted", lambda r: _when(not r.sorted), "`sorted=False`"),
        Feature("return_scores", lambda r: _when(r.return_scores), "the scores of the returned indices"),
        Feature("key_range", lambda r: _when(r.batch.key_start is not None), "`key_start` and `key_end` per row"),
        Feature("non_causal", lambda r: _when(not r.batch.causal and r.batch.key_start is None), "`causal=False`"),
    ),
    "sparse_attend": (
        Feature(
            "format", lambda r: r.format, "dtype of q and kv, or the packed cache; each with a phase is a claim of its own"
        ),
        Feature("heads", lambda r: r.dims["Hq"], "query heads", (128, 64, 16)),
        Feature("dims", lambda r: f"{r.dims['Dqk']}/{r.value_dim}", "Dqk/value_dim", ("576/512",)),
        Feature("topk", lambda r: r.dims["topk"], "entries per row", (2048,)),
        *_SHARED,
        Feature("return_lse", lambda r: _when(r.return_lse), "the natural-logarithm lse"),
        Feature("attn_sink", lambda r: _when(r.attn_sink is not None), "a sink per head"),
        Feature("topk_length", lambda r: _when(r.topk_length is not None), "a length per row of `indices`"),
        Feature("repeated_indices", lambda r: None, "an index that appears twice counts twice", in_call=False),
    ),
}


def gap(request: Request, capabilities: Capabilities) -> tuple[Feature, Any] | None:
    """The first feature that the call uses and the declaration lacks, with the value asked for; None if all is offered."""
    declared = capabilities.get(request.operator, {})
    for feature in FEATURES[request.operator]:
        value = feature.value(request)
        if value is not None and value not in declared.get(feature.name, ()):
            return feature, value
    return None


def require(request: Request, capabilities: Capabilities, backend: str) -> None:
    """Raise Unsupported, naming the capability, where the backend does not offer what the call asks for."""
    missing = gap(request, capabilities)
    if missing is None:
        return
    feature, value = missing
    offered = capabilities.get(request.operator, {}).get(feature.name, ())
    asked = feature.name if value is True else f"{feature.name} = {value!r}"
    choice = f"it offers {offered!r}" if offered and value is not True else f"it does not declare '{feature.name}'"
    raise Unsupported(
        f"backend '{backend}' does not offer {asked} ({feature.doc}) for {request.operator}: {choice}; change the call or the "
        "backend.",
        feature.name,
    )


def table() -> str:
    """The feature table of docs/contract.md."""
    lines = ["| operator | feature | claim needs | meaning |", "| --- | --- | --- | --- |"]
    for operator, features in FEATURES.items():
        for f in features:
            needs = "one value" if f.name == "format" else " or ".join(str(v) for v in f.required if v is not True)
            needs = needs or ("required" if f.required else "optional")
            lines.append(f"| {operator} | `{f.name}` | {needs} | {f.doc} |")
    return "\n".join(lines)
