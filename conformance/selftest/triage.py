"""Whether triage names planted faults rightly: `python -m dsa_portable.conformance.selftest.triage` counts.

Each fault is tried on the input that kills.json names first for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from dsa_portable.conformance.cases.call import Call
from dsa_portable.conformance.judging.judge import Reference, judge_call, reference_of
from dsa_portable.conformance.judging.rules import Verdict
from dsa_portable.conformance.judging.triage import matching, words_of
from dsa_portable.conformance.selftest import matrix
from dsa_portable.conformance.selftest.inputs import INPUTS

# Code -> the mistake that it is.
FAULTS: Mapping[str, str] = MappingProxyType(
    {
        # --- lightning_index ---
        "I1": "no ReLU", "I2": "abs for ReLU", "I3": "late ReLU", "I4": "weights dropped", "I5": "weights abs",
        "I7": "upper heads", "I89": "head 5", "I90": "last dimension", "I8": "scale dropped", "I42": "scale 0 is 1",
        "I6": "weights bfloat16", "I46": "weights float16", "I43": "dots float16", "I45": "scores bfloat16",
        "I35": "scale 2^n", "I47": "scale bfloat16", "I36": "fnuz", "I48": "clip 240", "I49": "subnormals", "I50": "swizzle",
        "I51": "weights stride", "I15": "causal + 1", "I16": "causal - 1", "I52": "causal top-left",
        "I53": "no causal in decode", "I54": "no causal to topk", "I55": "row before first key", "I56": "empty row's key",
        "I57": "causal=False ignored", "I58": "key range ignored", "I59": "key range causal", "I60": "key_end inclusive",
        "I61": "key_start by 4", "I62": "key range by offset", "I63": "relative", "I17": "64 too few", "I64": "topk 2048",
        "I65": "first positions", "I30": "smallest", "I66": "buffer 4096", "I18": "buffer -1", "I19": "buffer -3",
        "I20": "buffer -40", "I21": "buffer -150", "I40": "pads first", "I69": "negative by magnitude",
        "I26": "last tile of keys", "I72": "16 bits", "I67": "ties first", "I68": "ties dropped", "I71": "ties highest",
        "I91": "ties highest", "I27": "tail 0", "I39": "tail not written", "I73": "tail repeated", "I76": "score tail",
        "I28": "first twice", "I74": "by score", "I75": "scores by score", "I33": "rows swapped", "I34": "first row for all",
        "I77": "last rows dropped", "I78": "padding", "I22": "no table", "I23": "first of page", "I80": "page size 64",
        "I81": "table stride", "I25": "last page wraps", "I29": "longest for all", "I82": "length before",
        "I83": "next request's keys", "I84": "packed requests", "I32": "scale of the page", "I86": "scale of the next",
        "I87": "other layout", "I88": "other layout",
        "I24": "first positions",  # all keys of the row are read as zeros, and so score alike
        "I70": "negative by magnitude",  # zeros of either sign are not equal there either
        # --- sparse_attend ---
        "A1": "scale 1", "A2": "scale of values", "A33": "scale of keys", "A28": "scale fitted", "A77": "scale of V3.2",
        "A5": "rope dropped", "A34": "logits float16", "A10": "exp2", "A11": "exp overflows", "A12": "not rescaled",
        "A13": "accumulator bfloat16", "A76": "accumulator float16", "A14": "P float8", "A29": "truncated",
        "A8": "last 64 entries", "A73": "blocks of 64", "A9": "last entry", "A32": "last of 8 splits", "A35": "merge base 2",
        "A36": "block of 64 empty", "A3": "hole is last key", "A4": "hole is key 0", "A37": "beyond wraps",
        "A38": "beyond clamps", "A39": "beyond followed", "A40": "hole ends row", "A41": "repeated once", "A42": "dense",
        "A43": "causal again", "A44": "masked by row", "A45": "visible entries", "A75": "key range",
        "A30": "topk_length ignored", "A46": "topk_length per request", "A47": "masked NaN", "A22": "empty row NaN",
        "A23": "hole is key 0",  # by group alone: holes are gathered as key 0, NaN here, which the probability 0 does not hide
        "A48": "empty row lse", "A15": "sink ignored", "A16": "sink base 2", "A17": "sink twice", "A18": "sink maximum",
        "A49": "sink inf", "A50": "exp(lse)", "A51": "sink bfloat16", "A19": "lse base 2", "A20": "lse with sink",
        "A21": "lse without maximum", "A52": "lse bfloat16", "A53": "lse is maximum", "A83": "lse lacks 1 of 8",
        "A54": "lse transposed", "A26": "heads swapped", "A69": "heads repeat", "A27": "last row",
        "A70": "first row's indices", "A71": "rows divided", "A72": "padding", "A7": "last columns", "A25": "one tile scale",
        "A55": "tile scales 2^n", "A56": "tile scales bfloat16", "A57": "other layout", "A58": "other layout",
        "A78": "subnormals", "A59": "fnuz", "A24": "last page stale", "A60": "no table", "A61": "neighbour's pages",
        "A62": "page size 64", "A74": "page size 2^n", "A79": "table stride", "A63": "first of page", "A64": "no table",
        "A65": "no table", "A31": "offset wraps", "A66": "whole pages", "A67": "length from offsets",
        "A68": "longest for all", "A80": "KV bfloat16", "A81": "P bfloat16",
        "A82": "P bfloat16",  # the keys of the input are bfloat16 already
    }
)  # fmt: skip


@dataclass(frozen=True)
class Named:
    """A fault on an input: what triage says of it, and whether that is so; None: nothing was said."""

    code: str
    input: str
    verdict: Verdict
    words: str
    right: bool | None


def named(codes: Iterable[str] = ()) -> Iterator[Named]:
    """What triage makes of these faults, else of all."""
    kills = matrix.recorded()
    by_input = sorted([*codes] or matrix.FAULTS, key=lambda code: next(iter(kills[code])))
    made: tuple[str, Call, Reference] | None = None
    for code in by_input:
        name = next(iter(kills[code]))
        case, steps = INPUTS[name].made()
        if made is None or made[0] != name:
            call = next(steps)
            with np.errstate(all="ignore"):
                made = name, call, reference_of(case, call, INPUTS[name].profile)
        _, call, reference = made
        outputs = matrix.planted(code, call.operator, INPUTS[name].profile).run(call)
        with np.errstate(all="ignore"):
            verdict = judge_call(case, call, outputs, reference)
        found = matching(reference, outputs, verdict) if verdict.status == "FAIL" else []
        words = words_of(found)
        # Where others fit too, the words are those of a group that it is in.
        yield Named(code, name, verdict, words, FAULTS.get(code) in {mistake.name for mistake in found} if words else None)


def main() -> None:
    """Say each fault and the count."""
    counts = {True: 0, False: 0, None: 0}
    for found in named(sys.argv[1:]):
        counts[found.right] += 1
        verdict = {True: "right", False: "WRONG", None: "silent"}[found.right]
        print(f"{verdict:6} {found.code:4} {matrix.FAULTS[found.code].title}: {found.words or '-'}", flush=True)
    total = sum(counts.values())
    share = counts[True] / total
    print(f"{counts[True]} of {total} named rightly ({share:.0%}), {counts[False]} wrongly, {counts[None]} not at all")


if __name__ == "__main__":
    main()
