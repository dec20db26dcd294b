"""The packed caches by name: which byte holds what. Layouts share shapes, so a layout is never inferred from one.

Every multi-byte number is little-endian. One row of the table drives `pack`, `unpack`, the checks and the docs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from dsa_portable.arrays import Array, describe, dtype_name
from dsa_portable.errors import InvalidArgument
from dsa_portable.formats.quantise import is_ue8m0

NDArray: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class CachePart:
    """One part of a token's bytes: `count` numbers of `dtype`; name is `values`, `scale` or `rope`."""

    name: str
    dtype: np.dtype[Any]
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The part's own axes after `[num_pages, page_size]`: one number per token has none."""
        return () if self.count == 1 else (self.count,)

    @property
    def nbytes(self) -> int:
        """Bytes per token."""
        return self.count * self.dtype.itemsize

    @property
    def bits(self) -> np.dtype[Any]:
        """The unsigned integer of the dtype's width: bfloat16 has no byte order of its own in NumPy, integers have."""
        return np.dtype(f"=u{self.dtype.itemsize}")


class PartAddress(NamedTuple):
    """Number i of the part of a token is at first + page * page_stride + slot * slot_stride + i, in numbers of `dtype`."""

    dtype: str
    first: int
    page_stride: int
    slot_stride: int


@dataclass(frozen=True)
class CacheLayout:
    """One packed cache: the parts of a token in the order of their bytes.

    `planar`: a page holds the first part of all its tokens, then the second of all; else a token's bytes are together.
    `tile`: values per scale. `power_of_two`: scales are powers of two by definition. `operator`: the one that reads it.
    """

    name: str
    operator: str
    planar: bool
    parts: tuple[CachePart, ...]
    tile: int
    power_of_two: bool
    users: tuple[str, ...]
    note: str

    @property
    def bytes_per_token(self) -> int:
        """The last axis of the cache."""
        return sum(part.nbytes for part in self.parts)

    @property
    def value_dtype(self) -> np.dtype[Any]:
        """The dtype of the quantised values."""
        return self._part("values").dtype

    @property
    def value_dim(self) -> int:
        """Quantised numbers per token."""
        return self._part("values").count

    @property
    def rope_dim(self) -> int:
        """Unquantised rotated numbers per token; 0 where the layout has none."""
        return sum(part.count for part in self.parts if part.name == "rope")

    @property
    def key_dim(self) -> int:
        """Numbers per key: values, then rope."""
        return self.value_dim + self.rope_dim

    def addresses(self, page_size: int) -> dict[str, PartAddress]:
        """Where each part lies in a cache of such pages, for kernels that read it in place."""
        found, start = {}, 0
        for part in self.parts:
            size = part.dtype.itemsize
            first, token = (start * page_size, part.nbytes) if self.planar else (start, self.bytes_per_token)
            page = page_size * self.bytes_per_token
            found[part.name] = PartAddress(part.dtype.name, first // size, page // size, token // size)
            start += part.nbytes
        return found

    def _part(self, name: str) -> CachePart:
        return next(part for part in self.parts if part.name == name)


_INDEX_VALUES = CachePart("values", np.dtype(ml_dtypes.float8_e4m3fn), 128)
_INDEX_SCALE = CachePart("scale", np.dtype(np.float32), 1)
_E4M3 = CachePart("values", np.dtype(ml_dtypes.float8_e4m3fn), 512)
_INT8 = CachePart("values", np.dtype(np.int8), 512)
_SCALE = CachePart("scale", np.dtype(np.float32), 4)
_ROPE = CachePart("rope", np.dtype(ml_dtypes.bfloat16), 64)

# fmt: off
_ROWS = (
    CacheLayout("idx_fp8_132_planar", "lightning_index", True, (_INDEX_VALUES, _INDEX_SCALE), 128, False,
                ("DeepGEMM", "vLLM on CUDA", "SGLang on CUDA"),
                "a page is page_size * 128 bytes of values, then page_size * 4 of scales, under the interleaved shape"),
    CacheLayout("idx_fp8_132_interleaved", "lightning_index", False, (_INDEX_VALUES, _INDEX_SCALE), 128, False,
                ("AITER", "FlagGems", "SGLang on HIP"),
                "the planar layout's shape with other bytes"),
    CacheLayout("v32_fp8_656_nsr", "sparse_attend", False, (_E4M3, _SCALE, _ROPE), 128, True,
                ("FlashMLA", "SGLang", "vLLM"),
                "nope, scale, rope; SM100 kernels cut any other scale down to a power of two without a word"),
    CacheLayout("v32_fp8_656_nsr_f32", "sparse_attend", False, (_E4M3, _SCALE, _ROPE), 128, False,
                ("FlashInfer on SM120 with kv_scale_format arbitrary_fp32",),
                "the bytes of v32_fp8_656_nsr with any scale"),
    CacheLayout("ascend_656_nrs_int8", "sparse_attend", False, (_INT8, _ROPE, _SCALE), 128, False,
                ("npu_kv_quant_sparse_flash_attention on Ascend A2, A3, 950",),
                "nope, rope, scale: the shape of v32_fp8_656_nsr in another order"),
    CacheLayout("ascend_656_nrs_fp8", "sparse_attend", False, (_E4M3, _ROPE, _SCALE), 128, False,
                ("npu_kv_quant_sparse_flash_attention on Ascend 950",),
                "nope, rope, scale: the shape of v32_fp8_656_nsr in another order"),
)
# fmt: on

LAYOUTS: Mapping[str, CacheLayout] = MappingProxyType({row.name: row for row in _ROWS})


class Unpacked(NamedTuple):
    """The parts of a cache; `rope` is None for an index cache."""

    values: NDArray
    scale: NDArray
    rope: NDArray | None = None


def layout(name: str) -> CacheLayout:
    """The layout of this name. Raises InvalidArgument for an unknown one, with the known names."""
    if not isinstance(name, str) or name not in LAYOUTS:
        raise InvalidArgument(f"cache layout {name!r} is not known, but {', '.join(LAYOUTS)} are; pass one of them.")
    return LAYOUTS[name]


def check_cache(name: str, cache: Array) -> None:
    """Raise InvalidArgument unless cache (NumPy or torch) is uint8 with the layout's bytes per token as last axis."""
    spec = layout(name)
    if dtype_name(cache) != "uint8":
        raise InvalidArgument(f"{name}: the cache is {describe(cache)}, but uint8 is accepted; view it as uint8.")
    width = cache.shape[-1] if cache.ndim else 0
    if width != spec.bytes_per_token:
        others = ", ".join(other.name for other in LAYOUTS.values() if other.bytes_per_token == width)
        cure = f"{width} is the width of {others}: name that" if others else f"no layout has {width}: pass what pack returned"
        raise InvalidArgument(
            f"{name}: the cache is {describe(cache)}, but {spec.bytes_per_token} bytes per token are accepted; {cure}."
        )


def pack(name: str, values: NDArray, scale: NDArray, rope: NDArray | None = None) -> npt.NDArray[np.uint8]:
    """The bytes of `values | scale | rope` in the order of the layout; nothing is rounded or cast.

    Args:
        name: a key of `LAYOUTS`.
        values: the layout's value_dtype `[num_pages, page_size, value_dim]`; NaN is legal.
        scale: float32 `[num_pages, page_size]` for an index cache, `[num_pages, page_size, value_dim / tile]` else.
            In a power_of_two layout every finite entry is a power of two in 2^-127 ... 2^127, of either sign; NaN and
            infinity are legal, as unread slots may hold them.
        rope: bfloat16 `[num_pages, page_size, rope_dim]`; None for an index cache.

    Returns:
        uint8 `[num_pages, page_size, bytes_per_token]`. A layout that is not planar also takes the flat form
        `[Tk, ...]`, and then returns `[Tk, bytes_per_token]`.

    Raises:
        InvalidArgument: an unknown name, a wrong dtype or shape, a missing or surplus rope, a scale that the layout
            does not allow.

    Source: the users that the layout's row names.
    """
    spec = layout(name)
    given = {"values": values, "scale": scale, "rope": rope}
    if spec.rope_dim == 0 and rope is not None:
        raise InvalidArgument(f"{name}: rope is {describe(rope)}, but this layout has none; pass rope=None.")
    arrays = {part.name: _checked_part(spec, part, given[part.name]) for part in spec.parts}
    tokens = arrays["values"].shape[:-1]
    _check_rank(spec, "values", arrays["values"], spec.value_dim)
    for part in spec.parts:
        array = arrays[part.name]
        if array.shape != tokens + part.shape:
            raise InvalidArgument(
                f"{name}: {part.name} is {describe(array)} beside values {list(arrays['values'].shape)}, but the shape "
                f"{[*tokens, *part.shape]} is accepted; pass the same tokens in every part."
            )
    if spec.power_of_two:
        _check_power_of_two(spec, arrays["scale"])
    cache = np.empty((*tokens, spec.bytes_per_token), np.uint8)
    for part, region in _regions(spec, cache):
        numbers = np.ascontiguousarray(arrays[part.name]).reshape(*tokens, part.count)
        region[...] = numbers.view(part.bits).astype(part.bits.newbyteorder("<"), copy=False).view(np.uint8)
    return cache


def unpack(name: str, cache: npt.NDArray[np.uint8]) -> Unpacked:
    """The parts of a cache, without arithmetic: NaN, -0.0 and whatever unread slots hold come back bit for bit.

    On a little-endian host the parts are views wherever the cache's strides allow one: writing to them writes to it.

    Args:
        name: a key of `LAYOUTS`.
        cache: uint8 `[num_pages, page_size, bytes_per_token]`; also `[Tk, bytes_per_token]` if not planar.

    Returns:
        `Unpacked(values, scale, rope)` in the dtypes and shapes that `pack` takes.

    Raises:
        InvalidArgument: an unknown name, another dtype, width or rank.

    Source: the users that the layout's row names.
    """
    spec = layout(name)
    cache = np.asarray(cache)
    check_cache(name, cache)
    _check_rank(spec, "the cache", cache, spec.bytes_per_token)
    parts: dict[str, NDArray] = {}
    for part, region in _regions(spec, cache):
        # NumPy reinterprets bytes only where they are adjacent.
        adjacent = region if region.strides[-1] == 1 else np.ascontiguousarray(region)
        bits = adjacent.view(part.bits.newbyteorder("<")).astype(part.bits, copy=False)
        parts[part.name] = bits.view(part.dtype).reshape(*cache.shape[:-1], *part.shape)
    return Unpacked(**parts)


def _regions(spec: CacheLayout, cache: npt.NDArray[np.uint8]) -> Iterator[tuple[CachePart, npt.NDArray[np.uint8]]]:
    """Each part with its bytes in the cache, `[..., part.nbytes]`: the only place that knows where a part lies."""
    start = 0
    for part in spec.parts:
        stop = start + part.nbytes
        if spec.planar:
            num_pages, page_size, width = cache.shape
            page = cache.reshape(num_pages, page_size * width)
            yield part, page[:, start * page_size : stop * page_size].reshape(num_pages, page_size, part.nbytes)
        else:
            yield part, cache[..., start:stop]
        start = stop


def _checked_part(spec: CacheLayout, part: CachePart, array: NDArray | None) -> NDArray:
    if array is None:
        raise InvalidArgument(
            f"{spec.name}: {part.name} is None, but this layout stores {part.dtype.name} [..., {part.count}]; pass it."
        )
    array = np.asarray(array)
    if array.dtype.name != part.dtype.name:
        raise InvalidArgument(
            f"{spec.name}: {part.name} is {describe(array)}, but {part.dtype.name} is accepted; convert it, or name "
            "another layout."
        )
    return array.astype(part.dtype, copy=False)  # only ever the byte order


def _check_rank(spec: CacheLayout, what: str, array: NDArray, width: int) -> None:
    if array.ndim == 3 or (array.ndim == 2 and not spec.planar):
        return
    paged = f"[num_pages, page_size, {width}]"
    if spec.planar:
        raise InvalidArgument(
            f"{spec.name}: {what} is {describe(array)}, but only {paged} is accepted, because a planar page stores all "
            "its values before its scales; reshape it to pages."
        )
    raise InvalidArgument(
        f"{spec.name}: {what} is {describe(array)}, but {paged} or [Tk, {width}] is accepted; reshape it, without a head axis."
    )


def _check_power_of_two(spec: CacheLayout, scale: npt.NDArray[np.float32]) -> None:
    wrong = np.isfinite(scale) & ~is_ue8m0(scale)
    if wrong.any():
        where = [int(axis[0]) for axis in np.nonzero(wrong)]
        raise InvalidArgument(
            f"{spec.name}: scale{where} is {scale[wrong][0]:g}, but only powers of two in 2^-127 ... 2^127 are accepted "
            "(NaN or 1 in an unused slot); quantise with power_of_two=True, or name a layout that takes any scale."
        )
