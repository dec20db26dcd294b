"""What the full list adds to core: long contexts, large calls, every geometry in every format, symmetries, all pipelines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeAlias

from dsa_portable.conformance.cases.axes import ATTEND_FORMATS, HEADLINE, INDEX_FORMATS
from dsa_portable.conformance.cases.core import (
    ATTEND_OPTIONS,
    INDEX_OPTIONS,
    LSE,
    PIPELINES,
    SCORES,
    named,
    pipeline,
)
from dsa_portable.conformance.cases.lightning_index import IndexCase
from dsa_portable.conformance.cases.relation import PipelineCase, RelationCase
from dsa_portable.conformance.cases.sparse_attend import AttendCase

Case: TypeAlias = IndexCase | AttendCase | RelationCase | PipelineCase

# fmt: off
LARGE_INDEX = (
    IndexCase("decode-262144", "262,144 keys whose scores share their leading bits.", ("long-context", "clustered-scores"), "", ((2, 262144),), heads=32, content="clustered"),
    IndexCase("prefill-65537", "A chunk at the end of 65,537 keys.", ("long-context", "selection", "scale"), "", ((24, 65537),)),
    IndexCase("prefill-large", "Many rows over many keys, causal.", ("selection", "causal-offset", "scale"), "", ((256, 8192),), page_size=64),
)
LONGEST_INDEX = IndexCase("decode-1048576", "A million keys.", ("long-context", "clustered-scores"), HEADLINE, ((1, 1 << 20),), heads=32, content="clustered")
LARGE_ATTEND = (
    AttendCase("prefill-large", "32 rows of 128 heads over long paged keys.", ("paging", "logits", "poison"), "", ((20, 40000), (12, 9000)), page_size=64, logits="peaked"),
    AttendCase("prefill-topk8192", "8,192 entries per row.", ("geometry",), "", ((3, 20000),), heads=64, topk=8192, logits="flat"),
    AttendCase("decode-heads48", "48 heads.", ("geometry",), "", ((2, 4100), (1, 30)), heads=48, page_size=64),
)
BIG_OFFSET = AttendCase("decode-big-offset", "The last keys lie more than 2^31 elements into the cache.", ("big-offset", "paging"), "v32_fp8_656_nsr", ((2, 3400000),), heads=16, page_size=64, holes=False)
# More rows than a grid's second dimension holds; caches of more bytes or elements than an int32 counts.
MANY_ROWS = (
    named(IndexCase("prefill-70000-rows", "70,000 rows in a call.", ("big-offset", "short-row"), HEADLINE, ((70000, 40),))),
    named(AttendCase("prefill-70000-rows", "70,000 rows of 16 heads.", ("big-offset", "short-row"), "bf16", ((70000, 4),), heads=16, holes=False)),
    named(AttendCase("prefill-far-out", "Results of more than 2^31 elements.", ("big-offset", "short-row"), "bf16", ((33000, 9),), heads=128, holes=False, rows_alike=250)),
)
FAR_INDEX = tuple(
    IndexCase("decode-far-pages", "Pages on both sides of element 2^31 of the cache.", ("big-offset", "paging"), format, ((2, 2900), (1, 2100)), heads=32, page_size=64, spare_pages=270000)
    for format in INDEX_FORMATS
)
FAR_PACKED = tuple(
    IndexCase(f"decode-far-pages-{label}", "Pages on both sides of byte 2^31 of the cache.", ("big-offset", "paging", "layout"), HEADLINE, ((2, 2900), (1, 2100)), heads=32,
              page_size=64, k_layout=k_layout, spare_pages=260000)
    for label, k_layout in (("planar", "idx_fp8_132_planar"), ("interleaved", "idx_fp8_132_interleaved"))
)
FAR_ATTEND = tuple(
    AttendCase(f"decode-far-pages-h{heads}", f"Pages on both sides of element 2^31 of the cache, {heads} heads.", ("big-offset", "paging"), format, ((2, 2900), (1, 2100)), heads=heads,
               page_size=64, spare_pages=60000)
    for format in ATTEND_FORMATS
    for heads in (128, 64, 16)
)
SYMMETRIES = (
    RelationCase("heads-reversed", "Index heads and their weights in reverse order change nothing.", ("symmetry", "exactness"),
                 IndexCase("symmetry", "", (), "", ((8, 3000), (4, 60)), content="lattice", options=SCORES), "heads-reversed"),
    RelationCase("weights-times-8", "Weights times a power of two: the same selection, eight times the scores.", ("symmetry",),
                 IndexCase("symmetry", "", (), "", ((8, 5000),), options=SCORES), "weights-times-8"),
    RelationCase("keys-reversed", "Keys in reverse order: the same scores are kept.", ("symmetry", "exactness"),
                 IndexCase("symmetry", "", (), "", ((8, 3000), (4, 60)), content="lattice", causal=False, options=SCORES), "keys-reversed"),
    RelationCase("heads-reversed", "Query heads in reverse order give the output in reverse order.", ("symmetry", "exactness"),
                 AttendCase("symmetry", "", (), "", ((4, 2500),), heads=64, logits="onehot", options=LSE), "heads-reversed"),
    RelationCase("entries-reversed", "Entries of a row in reverse order: the exact mean stays.", ("symmetry", "exactness"),
                 AttendCase("symmetry", "", (), "", ((4, 2500),), heads=64, logits="mean"), "entries-reversed"),
)
SHIFT = RelationCase("attend-f32-values-shifted", "A constant added to every value adds it to the output, which float32 holds exactly.", ("symmetry", "exactness"),
                     AttendCase("symmetry", "", (), "f32", ((4, 2500),), heads=64, logits="mean"), "values-shifted")
# fmt: on


def _elsewhere(options: Iterable[Case], formats: tuple[str, ...], tried: str) -> Iterable[Case]:
    """What core tries in one format alone, in all others; packed index caches hold float8 alone."""
    for case in options:
        for format in formats:
            fits = not isinstance(case, IndexCase) or not (case.k_layout or case.content == "codes" or case.power_of_two_scales)
            scaled = not getattr(case, "visible_nan", False) or not format.endswith("/-")
            wide = not isinstance(case, AttendCase) or case.dims == (576, 512) or format in ("f16", "f32")
            if format != tried and fits and scaled and wide and isinstance(case, (IndexCase, AttendCase)):
                yield replace(named(case, format), smoke=False)


def _symmetries() -> Iterable[RelationCase]:
    for case in SYMMETRIES:
        for format in INDEX_FORMATS if isinstance(case.base, IndexCase) else ATTEND_FORMATS:
            base = named(case.base, format)
            yield replace(case, id=f"{base.id}-{case.id}", base=base)


def _pipelines() -> Iterable[PipelineCase]:
    first = PIPELINES[0]
    for format in INDEX_FORMATS[1:]:
        yield pipeline(f"{format.replace('/', '-')}", replace(first.index, format=format), first.attend)
    for format in ATTEND_FORMATS[1:]:
        yield pipeline(f"{format}", first.index, replace(first.attend, format=format))


CASES: tuple[Case, ...] = (
    *(named(case, format) for case in LARGE_INDEX for format in INDEX_FORMATS),
    named(LONGEST_INDEX),
    *(named(case, format) for case in LARGE_ATTEND for format in ATTEND_FORMATS),
    named(BIG_OFFSET),
    *MANY_ROWS,
    *map(named, (*FAR_INDEX, *FAR_PACKED)),
    *map(named, FAR_ATTEND),
    *_elsewhere(INDEX_OPTIONS, INDEX_FORMATS, HEADLINE),
    *_elsewhere(ATTEND_OPTIONS, ATTEND_FORMATS, "bf16"),
    *_symmetries(),
    SHIFT,
    *_pipelines(),
)
