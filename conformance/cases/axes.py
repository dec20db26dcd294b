"""The space in which cases are points: one table of axes per operator, and what in it cannot stand together.

An axis is *offered*, where its values are a feature's that a backend declares, or *inherent*: nobody can decline it. The first
value of an axis is the usual one. covering.json holds the rows in which every two values meet; products.py makes cases of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType
from typing import Any, TypeAlias

from dsa_portable.formats import LAYOUTS

HEADLINE = "e4m3/f32/f32"
# The combinations of operand, weights and scale dtypes that chips take; one of them is enough to claim an operand format.
INDEX_FORMATS = (HEADLINE, "e4m3/bf16/f32", "int8/f16/f16", "int8/f32/f32", "bf16/f32/-", "bf16/bf16/-", "f16/f16/-")
ATTEND_FORMATS = ("bf16", "f16", "v32_fp8_656_nsr", "v32_fp8_656_nsr_f32", "ascend_656_nrs_int8", "ascend_656_nrs_fp8", "f32")
FORMATS: Mapping[str, tuple[str, ...]] = MappingProxyType({"lightning_index": INDEX_FORMATS, "sparse_attend": ATTEND_FORMATS})
# Axis -> value: a row of the covering table, or a part of one.
Point: TypeAlias = Mapping[str, str]


@dataclass(frozen=True)
class Value:
    """`fields` of the case that it sets (`around.x` of its surroundings, `shape.x` of what shapes_of reads), and its tag."""

    words: str  # in the case's sentence; empty for the usual value
    fields: Mapping[str, Any]
    tag: str = ""
    optional: bool = False  # a feature's value that no claim needs


@dataclass(frozen=True)
class Axis:
    """`features`: of the contract, whose values it has; none, where nobody can decline it. `doc` says in a line what varies."""

    name: str
    doc: str
    values: Mapping[str, Value]
    features: tuple[str, ...] = ()

    def usual(self, phase: str) -> str:
        """The first value; keys lie in pages in decode and flat in prefill, as they do in serving."""
        return "flat" if self.name == "storage" and phase == "prefill" else next(iter(self.values))


def _axis(name: str, doc: str, values: Mapping[str, Value], *features: str) -> Axis:
    return Axis(name, doc, MappingProxyType(values), features)


def _usual(**fields: Any) -> Value:
    return Value("", fields)


def _needed(words: str, tag: str, **fields: Any) -> Value:
    return Value(words, fields, tag)


def _may(words: str, tag: str, **fields: Any) -> Value:
    return Value(words, fields, tag, optional=True)


def _around(words: str, tag: str, **fields: Any) -> Value:
    return Value(words, {f"around.{name}": value for name, value in fields.items()}, tag)


def _shape(axis: str, words: str, tag: str, value: str) -> Value:
    return Value(words, {f"shape.{axis}": value}, tag)


def _shapes(axis: str, table: Mapping[str, tuple[str, str]]) -> dict[str, Value]:
    return {value: _shape(axis, words, tag, value) for value, (words, tag) in table.items()}


# fmt: off
_SHARED = (
    _axis("requests", "how many requests a call has", _shapes("requests", {
        "few": ("", "ragged"), "one": ("one request", "ragged"), "many": ("65 requests", "ragged"), "none": ("no request", "ragged")})),
    _axis("rows", "query rows of a request", _shapes("rows", {
        "some": ("", "causal-offset"), "single": ("one row a request", "causal-offset"), "odd": ("an odd number of rows", "causal-offset"), "tiles": ("more than 64 rows in a request", "causal-offset"),
        "hundreds": ("more than 256 rows in a request", "causal-offset"), "over": ("more rows than keys in a request", "short-row"),
        "none": ("no row at all", "short-row")})),
    _axis("keys", "keys of a request", _shapes("keys", {
        "mixed": ("", "ragged"), "short": ("requests shorter than topk alone", "short-row"), "edge": ("2047, 2048 and 2049 keys", "short-row"),
        "long": ("long requests alone", "selection"), "longest": ("65,537 keys", "long-context"), "empty": ("no key at all", "short-row")})),
    _axis("sharing", "pages that are held more than once", {
        "none": _usual(), "prefix": _needed("a shared prefix", "paging", shared_pages=2), "twice": _needed("a page held twice", "paging", twice=True)}),
    _axis("maxima", "max_seqlen_q and max_seqlen_k", {
        "exact": _usual(), "loose": _around("maxima that nothing reaches", "ragged", loose=True)}),
    _axis("strides", "how every array lies in memory, out too", {
        "contiguous": _usual(), "sliced": _around("arrays that are slices of wider ones", "strides", strides="sliced"),
        "transposed": _around("arrays that are transposed", "strides", strides="transposed")}),
    _axis("padding", "rows past the last request", {
        "none": _usual(), "clean": _needed("padding rows", "padding-rows", padding_rows=3),
        "garbage": Value("padding rows of NaN", {"padding_rows": 3, "around.garbage": True}, "padding-rows")}),
    _axis("poison", "what lies where a row may not look", {
        "nan": _usual(), "inf": _around("infinity in what is unread", "poison", unread="inf"),
        "neighbours": _around("NaN in the operands of other rows", "visible-nan", neighbours=True)}),
    _axis("before", "the call before it", {
        "any": _usual(), "other": _around("after a call of equal shapes and other lengths", "rerun", before="other"),
        "nan": _around("after a call on NaN alone", "rerun", before="nan")}),
    _axis("storage", "how keys are stored", {
        "page64": _needed("pages of 64", "paging", page_size=64), "flat": _needed("flat keys", "ragged", gap=3), "page128": _needed("pages of 128", "paging", page_size=128),
        "page1": _may("pages of 1", "paging", page_size=1), "page16": _may("pages of 16", "paging", page_size=16),
        "page256": _may("pages of 256", "paging", page_size=256)}, "flat", "page_size"),
)
_OUT = _axis("out", "where results are written", {"new": _usual(), "given": _may("results written into the caller's arrays", "out", **{"options.out": True})}, "out")


def _topk(*optional: int) -> Axis:
    values = {"2048": _usual(topk=2048)} | {str(k): _may(f"topk {k}", "geometry", topk=k) for k in optional}
    return _axis("topk", "entries per row", values, "topk")


def _heads(first: int, needed: tuple[int, ...], optional: tuple[int, ...]) -> Axis:
    values = {str(first): _usual(heads=first)} | {str(h): _needed(f"{h} heads", "geometry", heads=h) for h in needed}
    return _axis("heads", "heads of a query", values | {str(h): _may(f"{h} heads", "geometry", heads=h) for h in optional}, "heads")


AXES: Mapping[str, tuple[Axis, ...]] = MappingProxyType({
    "lightning_index": (*_SHARED,
        _axis("content", "what scores are like", {
            "natural": _usual(content="natural"), **{c: _needed(f"{c} scores", tag, content=c) for c, tag in (
                ("clustered", "clustered-scores"), ("lattice", "exactness"), ("ties", "ties"), ("cancel", "head-sum-precision"),
                ("codes", "range"), ("plateau", "ties"))}}),
        _axis("magnitude", "how large scores are, and of which sign", {
            "usual": _usual(), "tiny": _needed("tiny scores", "range", magnitude="tiny"), "huge": _needed("huge scores", "range", magnitude="huge"),
            "negative": _needed("weights of the other sign", "range", negative=True)}),
        _heads(64, (32,), (16, 17, 66)),
        _axis("head_dim", "index head dimension", {"128": _usual(head_dim=128), "64": _may("head dimension 64", "geometry", head_dim=64)}, "head_dim"),
        _topk(1, 512, 705, 2051, 4096),
        _axis("visibility", "which keys a row sees", {
            "causal": _usual(), "all": _may("every key visible", "not-causal", causal=False),
            "ranges": Value("key ranges to the ends of int32", {"ranges": True, "range_ends": True}, "key-range", optional=True)}, "key_range", "non_causal"),
        _axis("layout", "how keys and scales are packed", {
            "apart": _usual(), "planar": _may("the planar cache", "layout", k_layout="idx_fp8_132_planar"),
            "interleaved": _may("the interleaved cache", "layout", k_layout="idx_fp8_132_interleaved")}, "unpacked", "k_layout"),
        _axis("order", "sorted or not", {"sorted": _usual(), "unsorted": _may("unsorted", "order", **{"options.sorted": False})}, "unsorted"),
        _axis("scores", "returned scores", {"no": _usual(), "yes": _may("returned scores", "returned-scores", **{"options.return_scores": True})}, "return_scores"),
        _OUT),
    "sparse_attend": (*_SHARED,
        _axis("logits", "what logits are like", {
            "peaked": _usual(logits="peaked"), **{x: _needed(words, tag, logits=x) for x, words, tag in (
                ("flat", "flat softmax", "logits"), ("hot", "hot logits", "logits"), ("mean", "equal logits", "exactness"), ("onehot", "one key per head", "exactness"),
                ("above", "logits about 300", "logits"), ("below", "logits about -300", "logits"))}}),
        _axis("scale", "softmax_scale", {"v32": _usual(), "256": _needed("softmax_scale 256^-0.5", "softmax-scale", softmax_scale=256**-0.5)}),
        _axis("ranges", "what the batch has and attention does not read", {
            "none": _usual(), "given": _needed("key ranges that are not read", "key-range", ranges=True)}),
        _axis("lists", "what rows of indices are like", {
            "holes": _usual(), "packed": _needed("lists without holes", "invalid-indices", holes=False), "subset": _needed("lists of half the keys", "invalid-indices", subset=True),
            "slot0": _needed("position 0, flat row 0 and slot 0 unread and NaN", "poison", slot_zero=True)}),
        _heads(64, (128, 16), (8, 17, 48)),
        _axis("dims", "Dqk/value_dim", {"576/512": _usual(), "512/512": _needed("keys as wide as values", "geometry", dims=(512, 512))}, "dims"),
        _topk(1, 512, 705, 4096),
        _axis("lse", "returned lse", {"no": _usual(), "yes": _may("returned lse", "lse", **{"options.return_lse": True})}, "return_lse"),
        _axis("sink", "a sink per head", {"no": _usual(), "yes": Value("sinks about the largest logits", {"sink": True, "sinks_near": True}, "sink", optional=True)}, "attn_sink"),
        _axis("topk_length", "entries that count", {
            "no": _usual(), "yes": Value("topk_length from below 0 to above topk", {"topk_length": True, "lengths_beyond": True}, "topk-length", optional=True)}, "topk_length"),
        _axis("repeated", "indices that appear twice", {"no": _usual(), "yes": _may("repeated indices", "repeated-indices", repeated=True)}, "repeated_indices"),
        _OUT),
})

NOT_FLOAT8 = tuple(format for format in INDEX_FORMATS if not format.startswith("e4m3"))
NOT_PACKED = tuple(format for format in INDEX_FORMATS if format != HEADLINE)
# What cannot stand together, and why: (operator or "", phase or "", axis -> values).
IMPOSSIBLE: tuple[tuple[str, str, Mapping[str, tuple[str, ...]], str], ...] = (
    ("", "", {"requests": ("none",), "rows": ("some", "single", "odd", "tiles", "hundreds", "over")}, "without requests there are no rows"),
    ("", "", {"requests": ("none",), "keys": ("mixed", "short", "edge", "long", "longest")}, "nor keys"),
    ("", "", {"requests": ("one",), "keys": ("mixed",)}, "one request has one length"),
    ("", "", {"requests": ("one",), "rows": ("over",), "keys": ("edge", "long", "longest")}, "its rows would be millions of dot products"),
    ("", "", {"keys": ("empty",), "sharing": ("prefix", "twice")}, "no page is followed"),
    ("", "", {"requests": ("none", "one"), "sharing": ("prefix",)}, "sharing takes two requests"),
    ("", "", {"storage": ("flat",), "sharing": ("prefix", "twice")}, "flat keys have no pages"),
    ("", "decode", {"rows": ("tiles", "hundreds")}, "decode has at most 4 rows a request"),
    ("", "prefill", {"rows": ("none", "single", "odd")}, "prefill has more than 4 rows in a request, odd numbers among them"),
    ("", "prefill", {"requests": ("none",)}, "prefill has rows"),
    ("", "", {"rows": ("none",), "poison": ("neighbours",)}, "there is no row to spoil"),
    ("", "", {"keys": ("empty",), "poison": ("neighbours",)}, "nor a key"),
    ("lightning_index", "", {"format": NOT_PACKED, "layout": ("planar", "interleaved")}, "packed caches hold float8 and float32"),
    ("lightning_index", "", {"format": NOT_FLOAT8, "content": ("codes",)}, "they are float8's"),
    ("sparse_attend", "", {"format": tuple(LAYOUTS), "dims": ("512/512",)}, "packed caches are 576/512"),
    ("lightning_index", "", {"storage": ("flat",), "layout": ("planar",)}, "a planar cache is planar in each page"),
    ("lightning_index", "", {"head_dim": ("64",), "layout": ("planar", "interleaved")}, "packed caches have keys of 128"),
    ("lightning_index", "", {"heads": ("17",), "content": ("cancel",)}, "heads cancel in pairs"),
    ("sparse_attend", "", {"logits": ("onehot",), "topk_length": ("yes",)}, "a length may cut off the one key"),
    ("sparse_attend", "", {"logits": ("onehot",), "repeated": ("yes",)}, "a repetition may take its place"),
    ("sparse_attend", "", {"logits": ("onehot",), "lists": ("subset", "slot0")}, "so may a list that leaves keys out"),
    ("sparse_attend", "", {"logits": ("onehot",), "sharing": ("twice",)}, "so may the other place of a page"),
    ("sparse_attend", "", {"logits": ("onehot",), "topk": ("1",)}, "so may the only entry"),
    ("sparse_attend", "", {"logits": ("onehot",), "dims": ("512/512",)}, "it is found in the rotated part"),
    ("sparse_attend", "", {"logits": ("mean",), "topk_length": ("yes",)}, "the mean of 2^m keys is exact"),
    ("sparse_attend", "", {"logits": ("mean",), "lists": ("slot0",)}, "the mean of 2^m keys is exact"),
    ("sparse_attend", "", {"logits": ("mean",), "sink": ("yes",)}, "a sink makes it no mean"),
    ("sparse_attend", "", {"logits": ("mean", "onehot"), "poison": ("neighbours",)}, "a key that is NaN may be the one"),
)
# fmt: on


def axes(operator: str) -> Mapping[str, Axis]:
    """The operator's axes by name."""
    return {axis.name: axis for axis in AXES[operator]}


def optional(operator: str, point: Point) -> list[str]:
    """The axes on which the point has a value that no claim needs."""
    known = axes(operator)
    return [name for name, value in point.items() if name in known and known[name].values[value].optional]


SHAPE = {"requests", "rows", "keys"}
# Where a case can show nothing but how it copes with its shape, or (the last entry) not that one value.
_NOTHING: tuple[tuple[Mapping[str, tuple[str, ...]], tuple[str, str] | None], ...] = (
    ({"requests": ("none",)}, None), ({"rows": ("none",)}, None), ({"keys": ("empty",)}, None),
    ({"requests": ("one", "none")}, ("before", "other")),
)  # fmt: skip
BLIND: Mapping[str, tuple[tuple[Mapping[str, tuple[str, ...]], tuple[str, str] | None], ...]] = MappingProxyType({
    # Where rows see no more keys than topk, or one more, there is hardly a choice.
    "lightning_index": (*_NOTHING, ({"keys": ("short", "edge")}, None)), "sparse_attend": _NOTHING,
})  # fmt: skip
# A case uses at most so many values that no claim needs.
MOST_OPTIONAL = 2


def possible(operator: str, phase: str, point: Point) -> bool:
    """Whether these values can stand together in one case."""
    if len(optional(operator, point)) > MOST_OPTIONAL:
        return False
    return not any(
        of in ("", operator) and during in ("", phase) and all(point.get(name) in values for name, values in barred.items())
        for of, during, barred, _ in IMPOSSIBLE
    )


def at_base(operator: str, phase: str, point: Point) -> bool:
    """Whether the point has the usual alternative of every feature that a claim needs; pages, where something asks for them."""
    paged = point.get("sharing", "none") != "none" or point.get("layout") == "planar"
    usual = {"storage": "page64"} if paged else {}
    for name, value in point.items():
        axis = axes(operator).get(name)
        if axis and axis.features and not axis.values[value].optional and value != usual.get(name, axis.usual(phase)):
            return False
    return True


def met(operator: str, point: Point, strength: int) -> set[frozenset[tuple[str, str]]]:
    """The values, or every two, that a case of these values tries: beside them it uses none that a claim can do without.

    So a value that a backend does not declare takes no pair of others with it.
    """
    spare = {(name, point[name]) for name in optional(operator, point)}
    others = [one for one in point.items() if one not in spare]
    free = strength - len(spare)
    found = {frozenset((*spare, *chosen)) for chosen in combinations(others, free)} if free >= 0 else set()
    barren = [goal for blind, goal in BLIND[operator] if all(point.get(name) in values for name, values in blind.items())]
    return {one for one in found if all(SHAPE & {n for n, _ in one} if not goal else goal not in one for goal in barren)}
