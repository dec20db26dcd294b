"""The core list as tables: a template says how a call is shaped and which hazard it is for, formats say in what it is tried."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeAlias, TypeVar

from dsa_portable.conformance.cases.axes import ATTEND_FORMATS, HEADLINE, INDEX_FORMATS
from dsa_portable.conformance.cases.lightning_index import IndexCase
from dsa_portable.conformance.cases.relation import PipelineCase
from dsa_portable.conformance.cases.sparse_attend import AttendCase
from dsa_portable.formats import LAYOUTS

Case: TypeAlias = IndexCase | AttendCase | PipelineCase
_Named = TypeVar("_Named", bound=IndexCase | AttendCase)

LSE = (("return_lse", True),)
SCORES = (("return_scores", True),)
BOUNDARY_LENGTHS = ((1, 0), (1, 1), (1, 2047), (1, 2048), (1, 2049), (1, 4097), (1, 16385))

# fmt: off
INDEX_TEMPLATES = (
    IndexCase("decode-lengths", "One row per request, lengths 0, 1, topk-1, topk, topk+1 and beyond: short rows are exact, padding rows are -1.",
              ("short-row", "ragged", "padding-rows", "selection"), "", BOUNDARY_LENGTHS, padding_rows=3, gap=5, smoke=True),
    IndexCase("decode-paged64", "Pages in random order, a shared prefix, garbage in unused table entries, NaN in unused slots.",
              ("paging", "poison", "causal-offset"), "", ((4, 8193), (1, 5000), (2, 2049), (1, 65)), page_size=64, shared_pages=16, padding_rows=1, smoke=True),
    IndexCase("decode-paged128", "The same with pages of 128 and 32 heads, as GLM-5 has them.",
              ("paging", "poison", "geometry"), "", ((1, 4100), (3, 2200), (1, 127), (2, 6401)), heads=32, page_size=128, shared_pages=8),
    IndexCase("decode-long", "65,537 and 65,600 keys whose scores share their leading bits: no candidate may be lost to a buffer.",
              ("long-context", "clustered-scores"), "", ((2, 65537), (2, 65600)), heads=32, content="clustered"),
    IndexCase("prefill-ragged", "Requests of unequal lengths, more rows than keys in one, a chunk at the end of its context in another.",
              ("ragged", "short-row", "causal-offset", "padding-rows"), "", ((40, 3000), (0, 500), (33, 2049), (17, 17), (20, 5)), padding_rows=3, gap=7, smoke=True),
    IndexCase("prefill-paged64", "Chunks over paged keys; the key at the causal boundary and the one after it score highest.",
              ("paging", "causal-offset", "poison", "scale"), "", ((24, 8200), (16, 4160)), page_size=64, shared_pages=20, smoke=True),
    IndexCase("prefill-paged128", "Pages of 128 and 32 heads.",
              ("paging", "geometry", "selection"), "", ((64, 4096), (5, 129)), heads=32, page_size=128, padding_rows=2),
    IndexCase("prefill-long", "A chunk of 16 rows at the end of 16,385 keys.",
              ("long-context", "selection"), "", ((16, 16385),), heads=32),
    IndexCase("prefill-lattice", "Small integers: every product and sum is exact, so the selection is exact in every legal arithmetic.",
              ("exactness", "ties"), "", ((16, 4099), (8, 2500)), content="lattice", gap=1, smoke=True),
)
INDEX_SCORES = (
    IndexCase("decode-scores", "Returned scores belong to the returned indices, -inf in the tail.",
              ("returned-scores", "scale"), "", ((2, 8192), (1, 100), (4, 3000)), options=SCORES, smoke=True),
    IndexCase("prefill-scores", "Returned scores over a chunk: their error tells more than the selection does.",
              ("returned-scores", "scale", "causal-offset"), "", ((24, 8192), (9, 9)), options=SCORES, smoke=True),
)
INDEX_CANCEL = IndexCase("prefill-cancel", "Pairs of heads with weights a and d - a: only what lies below 8 bits of the weights decides.",
                         ("weights-precision", "head-sum-precision", "exactness"), "", ((16, 4096),), content="cancel", smoke=True)
# The formats that the smoke list tries; a template says whether it is one of its cases.
SMOKE_FORMATS = (HEADLINE, "bf16", "v32_fp8_656_nsr")
INDEX_OPTIONS = (
    IndexCase("prefill-pow2", "Scales that are powers of two, as V3.2 quantises.", ("scale",), HEADLINE, ((16, 6000),), power_of_two_scales=True),
    IndexCase("prefill-codes", "Every code of the operand format: +-448, subnormals, -0.0; e4m3 read as another float8 shows.", ("range",), HEADLINE,
              ((16, 4500),), content="codes", smoke=True),
    IndexCase("prefill-codes-scores", "The scores of every code of the operand format.", ("range", "returned-scores"), HEADLINE, ((8, 2500),), content="codes", options=SCORES, smoke=True),
    IndexCase("prefill-plateau", "Dot products that relu cuts to 0 and scales that are 0: every score is +0.0 or -0.0, thousands of exact ties.",
              ("ties", "exactness"), HEADLINE, ((8, 4097), (6, 6)), content="plateau", smoke=True),
    IndexCase("prefill-range", "key_start and key_end per row: beyond both ends, across the causal boundary, empty, reversed.",
              ("key-range", "short-row"), HEADLINE, ((24, 5000), (16, 300)), ranges=True, padding_rows=2, smoke=True),
    IndexCase("decode-range", "Ranges in decode, over pages.", ("key-range", "paging"), HEADLINE, ((2, 9000), (2, 4500)), ranges=True, page_size=64, smoke=True),
    IndexCase("prefill-not-causal", "causal=False: every row sees every key of its request.", ("not-causal",), HEADLINE, ((16, 4500), (9, 33)), causal=False, smoke=True),
    IndexCase("prefill-visible-nan", "NaN in one row's weights and in one visible key: other rows are untouched, spoilt rows stay well-formed.",
              ("visible-nan",), HEADLINE, ((6, 5000), (9, 4000), (6, 2600)), visible_nan=True, smoke=True),
    IndexCase("prefill-visible-inf", "Rows whose best 2,048 must hold scores of -inf: visible ones, and no place that nobody sees.", ("selection", "ragged"), HEADLINE, ((6, 3000), (5, 2600)), visible_inf=True),
    IndexCase("decode-visible-inf", "The same in decode, over pages.", ("selection", "ragged"), HEADLINE, ((2, 3000), (3, 2600)), page_size=64, visible_inf=True),
    IndexCase("prefill-unsorted", "sorted=False: any order, unique and packed.", ("order",), HEADLINE, ((12, 5000), (3, 700)), options=(("sorted", False),), smoke=True),
    IndexCase("decode-out", "Results written into arrays of the caller's that held NaN bytes.", ("out", "short-row"), HEADLINE,
              ((1, 3000), (2, 40), (1, 0)), padding_rows=2, options=(("out", True),), smoke=True),
    IndexCase("prefill-planar", "The 132-byte cache with all values of a page before all its scales (DeepGEMM, vLLM).", ("layout", "paging"), HEADLINE,
              ((16, 4200), (8, 3000)), page_size=64, k_layout="idx_fp8_132_planar", smoke=True),
    IndexCase("prefill-interleaved", "The 132-byte cache with each token's scale behind its values (AITER, FlagGems).", ("layout", "paging"), HEADLINE,
              ((16, 4200), (8, 3000)), page_size=64, k_layout="idx_fp8_132_interleaved", smoke=True),
    IndexCase("decode-page1", "Pages of one key.", ("geometry", "paging"), HEADLINE, ((2, 2500), (1, 90)), page_size=1),
    IndexCase("decode-page16", "Pages of 16 keys.", ("geometry", "paging"), HEADLINE, ((2, 4500), (1, 90)), page_size=16),
    IndexCase("decode-page256", "Pages of 256 keys.", ("geometry", "paging"), HEADLINE, ((2, 4500), (1, 90)), page_size=256),
    IndexCase("prefill-topk1", "topk = 1.", ("geometry", "selection"), HEADLINE, ((16, 3000), (4, 4)), topk=1, smoke=True),
    IndexCase("prefill-topk512", "topk = 512.", ("geometry", "selection"), HEADLINE, ((16, 3000), (4, 4)), topk=512, smoke=True),
    IndexCase("prefill-topk4096", "topk = 4096.", ("geometry", "selection"), HEADLINE, ((8, 9000), (4, 40)), topk=4096),
    IndexCase("prefill-heads16", "16 index heads.", ("geometry",), HEADLINE, ((16, 5000),), heads=16),
    IndexCase("prefill-dim64", "Index head dimension 64.", ("geometry",), HEADLINE, ((16, 5000),), head_dim=64),
)

# Name, layout, ways to store it: page sizes, and None for flat. A planar cache is planar in each page.
PACKED: tuple[tuple[str, str, tuple[int | None, ...]], ...] = (
    ("planar", "idx_fp8_132_planar", (64, 128)),
    ("interleaved", "idx_fp8_132_interleaved", (64, 128, None)),
)
# A backend may read packed caches alone: each layout meets every head count and every way to store keys in both phases.
INDEX_PACKED = tuple(
    IndexCase(f"{phase}-{label}-h{heads}-{f'page{page_size}' if page_size else 'flat'}",
              f"Keys in the {label} cache alone: {heads} heads over {f'pages of {page_size}' if page_size else 'flat keys'}.",
              ("layout", "paging" if page_size else "ragged", "causal-offset", "poison"), HEADLINE, requests,
              heads=heads, page_size=page_size, shared_pages=2 if page_size else 0, gap=0 if page_size else 3, k_layout=k_layout, padding_rows=1,
              options=SCORES if page_size == 64 and heads == 64 else ())
    for label, k_layout, pages in PACKED
    for phase, requests in (("decode", ((2, 4100), (1, 2048), (1, 2049), (1, 90), (1, 0))), ("prefill", ((9, 4100), (5, 2300), (6, 90), (3, 2))))
    for heads in (64, 32)
    for page_size in pages
)

ATTEND_TEMPLATES = (
    AttendCase("decode-paged64", "One row per request over permuted and shared pages, holes anywhere, requests of 0 and 1 key, NaN in every unread slot.",
               ("paging", "poison", "invalid-indices", "short-row", "padding-rows"), "", ((1, 65537), (1, 2049), (1, 1), (1, 0), (1, 8000)),
               page_size=64, shared_pages=4, padding_rows=1, logits="peaked", smoke=True),
    AttendCase("decode-paged128", "Two draft rows per request, pages of 128, 64 heads, hot logits.",
               ("paging", "logits", "invalid-indices"), "", ((2, 4100), (2, 130), (2, 16385)), heads=64, page_size=128, logits="hot"),
    AttendCase("decode-flat", "16 heads, as under tensor parallelism, flat keys, requests around topk keys.",
               ("ragged", "short-row", "logits"), "", ((1, 2047), (3, 2048), (2, 2049), (4, 5)), heads=16, gap=3, logits="flat", smoke=True),
    AttendCase("prefill-flat", "128 heads over flat keys, flat softmax: a dropped part changes little, so the error is judged by its statistics.",
               ("ragged", "poison", "invalid-indices", "logits", "softmax-scale"), "", ((5, 6000), (2, 3)), gap=2, padding_rows=1, logits="flat", smoke=True),
    AttendCase("prefill-heads16", "16 heads, peaked softmax.",
               ("logits", "rope-part", "padding-rows"), "", ((20, 5000), (7, 2048)), heads=16, logits="peaked", padding_rows=2),
    AttendCase("prefill-paged64", "64 heads over pages, hot logits: nothing may overflow.",
               ("paging", "logits", "poison"), "", ((8, 4160), (6, 700)), heads=64, page_size=64, shared_pages=3, logits="hot", smoke=True),
    AttendCase("prefill-onehot", "One key per head outweighs all others: the output is its value bit for bit.",
               ("exactness", "rope-part"), "", ((5, 3000), (2, 1)), heads=64, logits="onehot", smoke=True),
)
# One of each set is enough for a claim, so every head count meets every way to store keys.
INDEX_GRID = (
    *(IndexCase(f"{phase}-h{heads}-page{page_size}", f"{heads} heads over pages of {page_size}.", ("paging", "causal-offset", "poison"), "", requests,
                heads=heads, page_size=page_size, shared_pages=2)
      for phase, requests in (("decode", ((3, 4100), (1, 2300), (1, 90))), ("prefill", ((9, 4100), (5, 2300), (6, 90))))
      for heads, page_size in ((64, 128), (32, 64))),
    IndexCase("prefill-h32-flat", "32 heads over flat keys of several requests.", ("ragged", "causal-offset"), "", ((9, 4100), (5, 2300), (6, 90)),
              heads=32, gap=3),
)
ATTEND_GRID = tuple(
    AttendCase(f"{phase}-h{heads}-{f'page{page_size}' if page_size else 'flat'}", f"{heads} heads over {f'pages of {page_size}' if page_size else 'flat keys'}, hot logits.",
               ("paging" if page_size else "ragged", "logits", "invalid-indices"), "", requests, heads=heads, page_size=page_size, shared_pages=2 if page_size else 0, logits="hot")
    for phase, requests, grid in (
        ("decode", ((2, 2900), (1, 2100), (1, 70)), ((128, None), (128, 128), (64, None), (64, 64), (16, 64), (16, 128))),
        ("prefill", ((5, 2900), (1, 2100), (1, 70)), ((128, 64), (128, 128), (64, 128), (16, 64), (16, 128))),
    )
    for heads, page_size in grid
)
ATTEND_LSE = (
    AttendCase("prefill-lse", "Natural-logarithm lse over flat keys, short and padding rows at -inf.", ("lse", "short-row"), "",
               ((5, 6000), (2, 0), (2, 7)), heads=64, padding_rows=1, logits="peaked", options=LSE, smoke=True),
    AttendCase("decode-lse", "The same over pages.", ("lse", "paging"), "", ((1, 4100), (2, 130), (1, 0)), heads=64, page_size=64, options=LSE, smoke=True),
)
# In every format: exp(lse) overflows float32 where logits are hot, and so does exp(sink).
ATTEND_SINK_HOT = tuple(
    AttendCase(f"{phase}-sink-hot", "Sinks about the largest of hot logits, where exp of neither is a float32.", ("sink", "logits", "lse"), "", requests,
               heads=64, page_size=page_size, logits="hot", sink=True, sinks_near=True, options=LSE)
    for phase, requests, page_size in (("decode", ((2, 2900), (1, 70), (1, 0)), 64), ("prefill", ((5, 2900), (1, 70), (1, 0)), None))
)
# Keys as wide as values: a port of such models has every head count and every way to store keys tried, in both phases.
ATTEND_512 = tuple(
    AttendCase(f"{phase}-dim512-h{heads}-{f'page{page_size}' if page_size else 'flat'}",
               f"Keys as wide as values, {heads} heads over {f'pages of {page_size}' if page_size else 'flat keys'}, {logits} softmax.",
               ("geometry", "paging" if page_size else "ragged", "logits", "invalid-indices"), "bf16", requests, heads=heads, dims=(512, 512),
               page_size=page_size, shared_pages=2 if page_size else 0, padding_rows=1, logits=logits, options=LSE if page_size != 128 else ())
    for phase, requests in (("decode", ((2, 2900), (1, 2049), (1, 70), (1, 1), (1, 0))), ("prefill", ((5, 2900), (1, 2100), (1, 70))))
    for heads, rotated in ((128, 0), (64, 1), (16, 2))
    for page_size, logits in zip((None, 64, 128), (("flat", "peaked", "hot") * 2)[rotated : rotated + 3], strict=True)
)
ATTEND_OPTIONS = (
    AttendCase("prefill-mean", "Equal logits over 2^m keys of small integers: the exact mean.", ("exactness",), "bf16", ((4, 2500), (2, 64)), logits="mean", heads=64, smoke=True),
    AttendCase("prefill-sink", "Sinks of -inf, finite values and +inf, never in the lse.", ("sink", "lse"), "bf16", ((5, 3000), (2, 0)), heads=64, sink=True, options=LSE, smoke=True),
    AttendCase("decode-sink", "Sinks over pages.", ("sink", "paging"), "bf16", ((2, 3000), (1, 1)), heads=128, sink=True, page_size=64, smoke=True),
    AttendCase("prefill-topk-length", "Entries past topk_length name real keys that hold NaN.", ("topk-length", "poison"), "bf16", ((9, 5000),), heads=64, topk_length=True, smoke=True),
    AttendCase("prefill-repeated", "Every fourth index repeats an earlier one.", ("repeated-indices",), "bf16", ((6, 4000),), heads=64, repeated=True, options=LSE, smoke=True),
    AttendCase("decode-out", "Results written into arrays of the caller's that held NaN bytes.", ("out", "short-row"), "bf16",
               ((1, 3000), (1, 0), (2, 40)), heads=64, padding_rows=2, options=(("out", True),), smoke=True),
    AttendCase("prefill-dim512", "Keys as wide as values, 512/512.", ("geometry",), "bf16", ((6, 3000),), heads=64, dims=(512, 512)),
    AttendCase("prefill-heads8", "8 heads.", ("geometry",), "bf16", ((12, 3000),), heads=8),
    AttendCase("prefill-topk512", "topk = 512.", ("geometry",), "bf16", ((6, 3000),), heads=64, topk=512, smoke=True),
    AttendCase("decode-page1", "Pages of one key.", ("geometry", "paging"), "bf16", ((2, 3000),), heads=64, page_size=1),
    AttendCase("decode-page256", "Pages of 256 keys.", ("geometry", "paging"), "bf16", ((2, 3000), (1, 255)), heads=64, page_size=256),
)
# fmt: on


def named(case: _Named, label: str = "") -> _Named:
    """The template in a format, with operator and format in its id; a packed cache makes every case one of its layout."""
    format = label or case.format
    hazards = (*case.hazards, "layout") if format in LAYOUTS else case.hazards
    spelled = format.replace("/-", "").replace("/", "-")
    smoke = case.smoke and format in SMOKE_FORMATS
    return replace(
        case, id=f"{case.prefix}-{spelled}-{case.id}", format=format, hazards=tuple(dict.fromkeys(hazards)), smoke=smoke
    )


def _index() -> Iterable[Case]:
    for format in INDEX_FORMATS:
        for case in (*INDEX_TEMPLATES, *INDEX_GRID, *INDEX_SCORES):
            yield named(case, format)
        if format.split("/")[1] != "bf16":
            yield named(INDEX_CANCEL, format)
    yield from map(named, (*INDEX_OPTIONS, *INDEX_PACKED))


def _attend() -> Iterable[Case]:
    for format in ATTEND_FORMATS:
        for case in (*ATTEND_TEMPLATES, *ATTEND_GRID, *ATTEND_LSE, *ATTEND_SINK_HOT):
            yield named(case, format)
    yield from map(named, (*ATTEND_OPTIONS, *ATTEND_512))


_PIPELINE_INDEX = IndexCase("", "", (), HEADLINE, ((5, 5000), (2, 2300), (1, 700)), page_size=64)
_PIPELINE_ATTEND = AttendCase("", "", (), "bf16", _PIPELINE_INDEX.requests, heads=64, page_size=64, every_key=True)


def pipeline(id: str, index: IndexCase, attend: AttendCase, smoke: bool = False) -> PipelineCase:
    """An end-to-end case of these two halves."""
    why = "Attention over the indices that the same backend has just selected and that were certified first."
    return PipelineCase(f"end-to-end-{id}", why, ("end-to-end", "selection"), index, attend, smoke)


_DECODE = ((1, 5000), (2, 2300), (1, 700))
PIPELINES = (
    pipeline("prefill", _PIPELINE_INDEX, _PIPELINE_ATTEND, smoke=True),
    pipeline(
        "decode",
        replace(_PIPELINE_INDEX, requests=_DECODE),
        replace(_PIPELINE_ATTEND, requests=_DECODE, format="v32_fp8_656_nsr"),
        smoke=True,
    ),
)

CASES: tuple[Case, ...] = (*_index(), *_attend(), *PIPELINES)
