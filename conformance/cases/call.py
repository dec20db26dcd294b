"""A case's inputs, made: the arrays and options of one call, the same bytes everywhere, with their sha256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.arrays import NUMPY_DTYPES
from dsa_portable.batch import ARRAYS as BATCH_ARRAYS
from dsa_portable.batch import Batch
from dsa_portable.conformance.cases.surroundings import STRIDES, USUAL
from dsa_portable.contract import Request
from dsa_portable.operators import REQUESTS

Array: TypeAlias = np.ndarray[Any, Any]
# One call's results by name, and a case's calls one after another: what `send` passes in is the last call's results, or None.
Outputs: TypeAlias = Mapping[str, Array]
Steps: TypeAlias = Generator["Call", Outputs | None, None]


@dataclass(frozen=True)
class Call:
    """One call of an operator on NumPy arrays; `batch` holds Batch's arrays, `options` everything that is no array."""

    operator: str
    arrays: Mapping[str, Array]
    batch: Mapping[str, Array]
    options: Mapping[str, Any]
    batch_options: Mapping[str, Any] = field(default_factory=dict)
    dependent: tuple[str, ...] = ()  # arrays that are an earlier call's results, and so no part of the frozen inputs
    strides: str = "contiguous"  # a row of surroundings.STRIDES: how every array lies in memory, and `out`
    prelude: bool = False  # made for what it leaves behind, and not judged

    def sha256(self) -> str:
        """Over every array's name, dtype, shape and bytes, and the options."""
        digest = hashlib.sha256()
        described = {"operator": self.operator, "options": dict(self.options), "batch": dict(self.batch_options)}
        described |= {"strides": self.strides} if self.strides != "contiguous" else {}
        digest.update(json.dumps(described, sort_keys=True).encode())
        arrays = {name: array for name, array in self.arrays.items() if name not in self.dependent}
        for name, array in sorted({**arrays, **{f"batch.{n}": a for n, a in self.batch.items()}}.items()):
            digest.update(f"{name} {array.dtype.name} {list(array.shape)}".encode())
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()

    def make_batch(self, put: Callable[[Array], Any] = lambda array: array) -> Batch:
        """The Batch, its arrays where `put` puts them; the maxima come from the host's lengths unless the case has its own."""
        fields: dict[str, Any] = {**self.batch, **self.batch_options}
        host = Batch(**fields)
        arrays, integers = host.flatten()
        return Batch.unflatten([None if a is None else STRIDES[self.strides](a, put) for a in arrays], integers)

    def on(self, put: Callable[[Array], Any]) -> Call:
        """The same call with every array copied to a device (the batch's lengths stay on the host)."""
        return replace(self, arrays={name: STRIDES[self.strides](array, put) for name, array in self.arrays.items()})

    def slots(self, request: int, positions: Array) -> Array:
        """Rows of the keys' memory, pages flattened, that hold these positions of a request."""
        if "block_table" not in self.batch:
            return int(self.batch["cu_seqlens_k"][request]) + positions
        size, table = self.batch_options["page_size"], self.batch["block_table"][request].astype(np.int64)
        return np.asarray(table[positions // size] * size + positions % size)

    @cached_property
    def request(self) -> Request:
        """The checked request that the operator would make of this call, for its features and results; no backend is asked."""
        arguments: dict[str, Any] = {**self.arrays, **self.options}
        wants_out = arguments.pop("out", False)
        request = REQUESTS[self.operator].checked(**arguments, batch=self.make_batch())
        if not wants_out:
            return request
        return replace(request, out=tuple(np.empty(shape, NUMPY_DTYPES[dtype]) for dtype, shape in request.results.values()))

    @property
    def format(self) -> str:
        """As the operator's claim names it."""
        return self.request.format

    @property
    def phase(self) -> str:
        """`decode` or `prefill`, as Batch.phase has it, of this call alone."""
        return self.request.batch.phase

    def __post_init__(self) -> None:
        assert set(self.batch) <= set(BATCH_ARRAYS)


class SingleCall:
    """A case of one call, or of one and what runs before it: it has `build(seed)`."""

    around = USUAL

    def build(self, seed: str = "") -> Call:
        """The call; `seed` draws other values of the same shapes."""
        raise NotImplementedError

    def steps(self, seed: str = "") -> Steps:
        """The one call, after the one that runs before it."""
        call = self.build(seed)
        if self.around.before:
            yield replace(self.before(call, seed), prelude=True)
        yield call

    def before(self, call: Call, seed: str) -> Call:
        """A call of the same shapes: on other requests and numbers, or on NaN alone."""
        if self.around.before == "nan":
            return replace(call, arrays={name: _all_nan(array) for name, array in call.arrays.items()})
        return self.reversed().build(f"{seed}before/")

    def reversed(self) -> SingleCall:
        """The case with its requests in reverse order."""
        raise NotImplementedError

    def disagreement(self, calls: Sequence[Call], outputs: Sequence[Outputs]) -> str:
        """A single call has nothing to agree with."""
        return ""


def _all_nan(array: Array) -> Array:
    """All ones are NaN in every float format, and so in the scales of a packed cache; indices stay."""
    if array.dtype == np.int32:
        return array
    spoilt = np.empty_like(array)
    spoilt.view(np.uint8)[...] = 0x7F if array.dtype == np.int8 else 0xFF
    return spoilt


def drive(steps: Steps, run: Callable[[Call], Outputs | None]) -> list[Call]:
    """Run a case's calls one after another, each with what `run` returned for the one before; returns the calls."""
    calls: list[Call] = []
    try:
        call = next(steps)
        while True:
            calls.append(call)
            call = steps.send(run(call))
    except StopIteration:
        return calls


def sha256_of(digests: Sequence[str]) -> str:
    """One digest for the calls of a case; a single call's is its own."""
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
