"""out = sum_i exp(lse_i) * out_i / (sum_i exp(lse_i) + exp(attn_sink)): attention over key shards, put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np

from dsa_portable.arrays import Array, as_kind, cast, describe, device_of, dtype_name, is_array, kind, namespace
from dsa_portable.contract import FLOATS, Argument, Result, Signature, check_arrays
from dsa_portable.errors import InvalidArgument

LARGEST_FLOAT32 = float(np.finfo(np.float32).max)

# Not an operator of backends: it runs on NumPy or torch, wherever the parts live.
MERGE = Signature(
    name="merge",
    formula="out = sum_i exp(lse_i) * out_i / (sum_i exp(lse_i) + exp(attn_sink));  lse = log sum_i exp(lse_i)",
    arguments=(
        Argument("outs", FLOATS, {"any": "Tq Hq value_dim"}, "a sequence: attention over disjoint key shards, without a sink"),
        Argument(
            "lses",
            ("float32",),
            {"any": "Tq Hq"},
            "a sequence, one per out; -inf: the part is not read; +inf or NaN: out and lse are NaN",
        ),
        Argument("attn_sink", ("float32",), {"any": "Hq"}, "applied once, here; never enters lse", optional=True),
    ),
    options=(),
    results=(
        Result("out", "the parts' dtype", "Tq Hq value_dim", "computed in float32; 0 in a row that no part saw"),
        Result("lse", "float32", "Tq Hq", "-inf in a row that no part saw"),
    ),
)


def merge(outs: Sequence[Array], lses: Sequence[Array], attn_sink: Array | None = None) -> tuple[Array, Array]:
    """out = sum_i exp(lse_i) * out_i / (sum_i exp(lse_i) + exp(attn_sink)); lse = log sum_i exp(lse_i).

    outs: float32, bfloat16 or float16 [Tq, Hq, value_dim] each, attention over disjoint key shards, computed without a sink.
    lses: float32 [Tq, Hq] each, natural logarithm; a part is not read where its lse is -inf; where any lse is +inf or NaN, out
        and lse of that row and head are NaN. FlashMLA writes +inf for an empty row: convert it to -inf first.
    attn_sink: float32 [Hq], applied once, here; -inf is no sink, +inf gives out 0, NaN leaves out of its head unspecified in
        the rows that a part saw.
    Returns (out in the parts' dtype, lse float32, without the sink), computed in float32 where the parts live; a row that no
    part saw: out 0, lse -inf. Raises InvalidArgument for no part, or parts that disagree in shape, dtype or device.
    """
    _check_parts(outs, lses, attn_sink)
    xp, wanted = namespace(outs[0]), kind(outs[0])
    parts = [cast(as_kind(out, wanted), "float32") for out in outs]
    logs = [as_kind(lse, wanted) for lse in lses]
    top = reduce(xp.maximum, logs)
    # maximum keeps NaN, and no part can outweigh an infinite one: neither is a number of this row and head.
    spoilt = xp.isnan(top) | (top == math.inf)
    top = xp.where(xp.isinf(top), xp.zeros_like(top), top)
    with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
        weights = [xp.exp(lse - top) for lse in logs]
        total = sum(weights[1:], start=weights[0])
        lse = top + xp.log(total)
        if attn_sink is not None:
            # The larger of the two is subtracted: exp(sink - top) overflows beyond 88, and would leave the parts exactly 0.
            sink = xp.clip(as_kind(attn_sink, wanted), None, LARGEST_FLOAT32)  # inf - inf is NaN
            largest = xp.maximum(top, sink)
            kept = xp.exp(top - largest)
            weights = [weight * kept for weight in weights]
            total = total * kept + xp.exp(sink - largest)
        shares = [weight / xp.where(total == 0, xp.ones_like(total), total) for weight in weights]
        # 0 * NaN is NaN: what weighs nothing is left out, not multiplied by zero. Beside a sink of NaN not even its share is 0.
        terms = [
            xp.where(((log == -math.inf) | (share == 0))[..., None], xp.zeros_like(part), share[..., None] * part)
            for log, share, part in zip(logs, shares, parts, strict=True)
        ]
        nan = xp.full_like(lse, math.nan)
        out = xp.where(spoilt[..., None], nan[..., None], sum(terms[1:], start=terms[0]))
        return cast(out, dtype_name(outs[0])), xp.where(spoilt, nan, lse)


def _check_parts(outs: Sequence[Array], lses: Sequence[Array], attn_sink: Array | None) -> None:
    for name, parts in (("outs", outs), ("lses", lses)):
        if not (isinstance(parts, Sequence) or is_array(parts)):
            raise InvalidArgument(f"merge: {name} is {describe(parts)}, but a list or tuple of arrays is accepted; pass one.")
    if len(outs) == 0 or len(outs) != len(lses):
        raise InvalidArgument(
            f"merge: there are {len(outs)} outs and {len(lses)} lses, but one lse per out is accepted; pass pairs."
        )
    first = None
    for out, lse in zip(outs, lses, strict=True):
        dims = check_arrays(MERGE, {"outs": out, "lses": lse, "attn_sink": attn_sink}, paged=False, packed={})
        first = first or (out, dims)
        if dims != first[1] or dtype_name(out) != dtype_name(first[0]) or device_of(out) != device_of(first[0]):
            raise InvalidArgument(
                f"merge: outs has {describe(out)} beside {describe(first[0])}, but one shape, dtype and device is accepted; "
                "pass parts of one call."
            )
