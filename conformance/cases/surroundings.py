"""What surrounds a call's numbers: how its arrays lie in memory, what stands where nobody may look, what ran before it.

No port can decline any of it, and none of it changes a result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.batch import DECODE_ROWS

Array: TypeAlias = np.ndarray[Any, Any]
Put: TypeAlias = Callable[[Array], Any]

# Bytes on either side of a sliced array's rows: an array of a wider one begins where vectors of 16 bytes may.
MARGIN = 16
# Beyond the true maxima, as a caller that captures graphs passes them.
LOOSE_ROWS, LOOSE_KEYS = 3, 1000


def _contiguous(array: Array, put: Put) -> Any:
    return put(array)


def _bytes_of_no_number(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    array = np.empty(shape, dtype)
    array.view(np.uint8)[...] = 0xFF
    return array


def _sliced(array: Array, put: Put) -> Any:
    """The middle of an array that is wider by MARGIN bytes at either end of a row, and longer by a row at either end."""
    columns, rows = max(1, MARGIN // array.itemsize), int(array.ndim > 1)
    shape = [*array.shape[:-1], array.shape[-1] + 2 * columns]
    shape[0] += 2 * rows
    inside = (*[slice(1, 1 + array.shape[0])] * rows, *[slice(None)] * (array.ndim - 1 - rows), slice(columns, -columns))
    wide = _bytes_of_no_number(tuple(shape), array.dtype)
    wide[inside] = array
    return put(wide)[inside]


def _transposed(array: Array, put: Put) -> Any:
    """Neighbours in memory are those of the outermost axis; one axis: every other element of twice as many."""
    if array.ndim == 1:
        wide = _bytes_of_no_number((2 * array.size,), array.dtype)
        wide[::2] = array
        return put(wide)[::2]
    stored, order = put(np.ascontiguousarray(array.T)), tuple(reversed(range(array.ndim)))
    return stored.transpose(order) if isinstance(stored, np.ndarray) else stored.permute(order)


# (array, put) -> the same numbers where `put` puts arrays, laid out so.
STRIDES: Mapping[str, Callable[[Array, Put], Any]] = MappingProxyType(
    {"contiguous": _contiguous, "sliced": _sliced, "transposed": _transposed}
)


@dataclass(frozen=True)
class Surroundings:
    """Each field names a value of an axis that no port can decline (axes.py says what they mean)."""

    strides: str = "contiguous"
    loose: bool = False  # max_seqlen_q and max_seqlen_k are bounds that nothing reaches
    garbage: bool = False  # padding rows hold NaN and indices of any kind, in every argument of a row
    unread: str = "nan"  # what lies where nobody may look: nan, inf
    neighbours: bool = False  # NaN in some row's own operands, and in a key that few rows count
    before: str = ""  # a call that ran just before: other, nan

    def filler(self, dtype: np.dtype[Any]) -> Array:
        """What an unread place of this dtype holds; int8 has its largest value, under scales of NaN or infinity."""
        number = (
            127.0 if dtype == np.int8 else np.inf if self.unread == "inf" and not dtype.name.startswith("float8") else np.nan
        )
        return np.array(number).astype(np.float32).astype(dtype)

    def maxima(self, requests: tuple[tuple[int, int], ...]) -> dict[str, int]:
        """max_seqlen_q and max_seqlen_k, where they are not the true ones; those of decode leave the call one."""
        if not self.loose:
            return {}
        rows, keys = (max((pair[i] for pair in requests), default=0) for i in (0, 1))
        return {"max_seqlen_q": DECODE_ROWS if rows <= DECODE_ROWS else rows + LOOSE_ROWS, "max_seqlen_k": keys + LOOSE_KEYS}


USUAL = Surroundings()
