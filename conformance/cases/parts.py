"""The parts list as tables: kernels that score and do not select, and kernels that select and do not score."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeAlias

from dsa_portable.conformance.cases.axes import HEADLINE
from dsa_portable.conformance.cases.core import BOUNDARY_LENGTHS, PACKED, named
from dsa_portable.conformance.cases.index_scores import ScoresCase
from dsa_portable.conformance.cases.index_select import SelectCase

Case: TypeAlias = ScoresCase | SelectCase

# fmt: off
# One of each set of alternatives is enough for a claim, so in every format both head counts meet flat keys and pages of both sizes.
SCORES_TEMPLATES = (
    ScoresCase("decode-lengths", "One row per request, lengths 0, 1 and beyond: -inf where a row does not see, and everywhere in padding rows.",
               ("short-row", "ragged", "padding-rows", "scale"), "", ((1, 0), (1, 1), (1, 700), (1, 2049)), padding_rows=3, gap=5),
    ScoresCase("decode-flat", "32 heads over flat keys, draft rows that see one key more each.",
               ("ragged", "causal-offset"), "", ((4, 900), (2, 130)), heads=32, gap=1),
    ScoresCase("decode-paged64", "Pages in random order, a shared prefix, garbage in unused table entries, NaN in unused slots.",
               ("paging", "poison", "causal-offset"), "", ((4, 1500), (1, 700), (2, 65)), page_size=64, shared_pages=4, padding_rows=1),
    ScoresCase("decode-paged128", "The same with pages of 128 and 32 heads.",
               ("paging", "poison"), "", ((1, 900), (3, 1200), (1, 127)), heads=32, page_size=128, shared_pages=2),
    ScoresCase("decode-h64-page128", "64 heads over pages of 128.", ("paging", "poison"), "", ((3, 700), (1, 90)), page_size=128, shared_pages=2),
    ScoresCase("decode-h32-page64", "32 heads over pages of 64.", ("paging", "poison"), "", ((3, 700), (1, 90)), heads=32, page_size=64, shared_pages=2),
    ScoresCase("prefill-ragged", "Requests of unequal lengths, more rows than keys in one, a chunk at the end of its context in another.",
               ("ragged", "short-row", "causal-offset", "padding-rows", "scale"), "", ((8, 1500), (0, 500), (12, 1000), (17, 17), (20, 5)), padding_rows=3, gap=7),
    ScoresCase("prefill-cancel", "Pairs of heads with weights a and d - a: what is lost of the weights or the head sum is all there is.",
               ("weights-precision", "head-sum-precision", "exactness", "ragged"), "", ((12, 1000), (5, 40)), heads=32, content="cancel"),
    ScoresCase("prefill-lattice", "Small integers: every product and sum is exact, so every score is exact in every legal arithmetic.",
               ("exactness",), "", ((12, 1200), (8, 500)), content="lattice", gap=1),
    ScoresCase("prefill-paged64", "Chunks over paged keys.", ("paging", "poison", "causal-offset"), "", ((12, 1300), (8, 400)), page_size=64, shared_pages=3),
    ScoresCase("prefill-paged128", "The same with pages of 128 and 32 heads.",
               ("paging", "poison", "padding-rows"), "", ((12, 1300), (5, 129)), heads=32, page_size=128, padding_rows=2),
    ScoresCase("prefill-h64-page128", "64 heads over pages of 128.", ("paging", "poison"), "", ((6, 700), (5, 90)), page_size=128, shared_pages=2),
    ScoresCase("prefill-h32-page64", "32 heads over pages of 64.", ("paging", "poison"), "", ((6, 700), (5, 90)), heads=32, page_size=64, shared_pages=2),
    ScoresCase("prefill-h32-flat", "32 heads over flat keys of several requests.", ("ragged", "causal-offset"), "", ((6, 700), (5, 90)), heads=32, gap=1),
)
SCORES_FORMATS = (HEADLINE, "int8/f32/f32", "bf16/f32/-")
SCORES_OPTIONS = (
    ScoresCase("prefill-codes", "Every code of the operand format: +-448, subnormals, -0.0.", ("range",), HEADLINE, ((8, 1500),), content="codes"),
    ScoresCase("prefill-range", "key_start and key_end per row: beyond both ends, across the causal boundary, empty, reversed.",
               ("key-range", "short-row"), HEADLINE, ((56, 1000), (16, 300)), ranges=True, padding_rows=2),
    ScoresCase("decode-range", "Ranges in decode, over pages.", ("key-range", "paging"), HEADLINE, ((2, 900), (2, 450)), ranges=True, page_size=64),
    ScoresCase("prefill-not-causal", "causal=False: every row sees every key of its request.", ("not-causal",), HEADLINE, ((8, 1000), (9, 33)), causal=False),
    ScoresCase("prefill-visible-nan", "NaN in one row's weights and in one visible key: other rows are untouched, and so is -inf.",
               ("visible-nan",), HEADLINE, ((6, 500), (9, 400), (6, 300)), visible_nan=True),
    ScoresCase("decode-out", "Results written into an array of the caller's that held NaN bytes.", ("out", "short-row"), HEADLINE,
               ((1, 800), (2, 40), (1, 0)), padding_rows=2, options=(("out", True),)),
)
# A backend may read packed caches alone.
SCORES_PACKED = tuple(
    ScoresCase(f"{phase}-{label}-h{heads}-{f'page{page_size}' if page_size else 'flat'}",
               f"Keys in the {label} cache alone: {heads} heads over {f'pages of {page_size}' if page_size else 'flat keys'}.",
               ("layout", "paging" if page_size else "ragged", "causal-offset", "poison"), HEADLINE, requests,
               heads=heads, page_size=page_size, shared_pages=2 if page_size else 0, gap=0 if page_size else 3, k_layout=k_layout, padding_rows=1)
    for label, k_layout, pages in PACKED
    for phase, requests in (("decode", ((2, 700), (1, 90), (1, 1), (1, 0))), ("prefill", ((6, 700), (5, 90), (3, 2))))
    for heads in (64, 32)
    for page_size in pages
)
SELECT = (
    SelectCase("decode-lengths", "One row per request, lengths 0, 1, topk-1, topk, topk+1 and beyond, NaN and +inf in every column not seen.",
               ("short-row", "ragged", "padding-rows", "selection", "poison"), BOUNDARY_LENGTHS, padding_rows=3),
    SelectCase("decode-paged", "The batch of a paged cache, which is not passed: garbage in unused table entries, draft rows, a row's last key its best.",
               ("paging", "causal-offset", "poison"), ((4, 4100), (1, 2500), (2, 65)), page_size=64, padding_rows=1),
    SelectCase("decode-long", "65,537 and 65,600 scores that share their leading bits: no candidate may be lost to a buffer.",
               ("long-context", "clustered-scores"), ((2, 65537), (2, 65600)), content="clustered"),
    SelectCase("decode-out", "Results written into an array of the caller's that held no legal padding.", ("out", "short-row"),
               ((1, 3000), (2, 40), (1, 0)), padding_rows=2, options=(("out", True),)),
    SelectCase("decode-range", "Ranges in decode.", ("key-range",), ((2, 9000), (2, 4500)), ranges=True),
    SelectCase("prefill-ragged", "Requests of unequal lengths, more rows than keys in one, a chunk at the end of its context in another.",
               ("ragged", "short-row", "causal-offset", "padding-rows"), ((40, 3000), (0, 500), (33, 2049), (17, 17), (20, 5)), padding_rows=3),
    SelectCase("prefill-ties", "Seven values among thousands of scores: as many of those equal at the boundary as fit.",
               ("ties", "exactness"), ((16, 4099), (8, 2500)), content="ties"),
    SelectCase("prefill-zeros", "The boundary lies among +0.0 and -0.0, which are equal.", ("ties", "exactness"), ((8, 4097), (6, 6)), content="zeros"),
    SelectCase("prefill-bits", "Scores of every sign, exponent and significand, subnormals apart: what is compared is the whole number.",
               ("range", "selection"), ((12, 5000), (4, 3000)), content="bits"),
    SelectCase("prefill-monotone", "Rising scores in one row and falling ones in the next: all of the best lie at one end.",
               ("selection",), ((8, 9000),), content="monotone"),
    SelectCase("prefill-key-ranges", "key_start and key_end per row: beyond both ends, across the causal boundary, empty, reversed.",
               ("key-range", "short-row"), ((76, 4500), (16, 300)), ranges=True, padding_rows=2),
    SelectCase("prefill-not-causal", "causal=False: every row sees every key of its request.", ("not-causal",), ((16, 4500), (9, 33)), causal=False),
    SelectCase("prefill-unsorted", "sorted=False: any order, unique and packed.", ("order",), ((12, 5000), (3, 700)), options=(("sorted", False),)),
    SelectCase("prefill-visible-nan", "A visible NaN in one row and -inf in another: other rows are untouched, spoilt ones stay well-formed.",
               ("visible-nan",), ((9, 5000), (6, 2600)), visible_nan=True),
    SelectCase("prefill-topk512", "topk = 512.", ("geometry", "selection"), ((16, 3000), (4, 4)), topk=512),
)
# fmt: on


def _cases() -> Iterable[Case]:
    for format in SCORES_FORMATS:
        yield from (named(case, format) for case in SCORES_TEMPLATES)
    yield from map(named, (*SCORES_OPTIONS, *SCORES_PACKED))
    yield from (replace(case, id=f"index-select-{case.id}") for case in SELECT)


CASES: tuple[Case, ...] = tuple(_cases())
