"""Symmetric quantisers: `x ~ values * scale`, with one scale per group of consecutive entries of the last axis.

The scale that is returned is the scale that divided, to the bit, so `dequantise` never has to guess.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from dsa_portable.arrays import describe
from dsa_portable.errors import InvalidArgument

NDArray: TypeAlias = npt.NDArray[Any]

E4M3FN_MAX = 448.0
INT8_MAX = 127.0
AMAX_FLOOR = 1e-4  # DeepSeek-V3.2's: keeps the scale of a zero group a normal, invertible number

_FLOATS = ("float32", "bfloat16", "float16")
_MANTISSA = np.uint32(0x007FFFFF)
_SMALLEST_NORMAL = np.uint32(0x00800000)
_UE8M0_ZERO = np.uint32(0x00400000)  # 2^-127, code 0: the one ue8m0 value that is subnormal in float32


def power_of_two_scale(scale: NDArray) -> npt.NDArray[np.float32]:
    """`2^ceil(log2 scale)`: the smallest power of two >= scale, exact because it works on the bits.

    Args:
        scale: float32, any shape, finite, > 0 and <= 2^127; subnormals are rounded up like every other number.

    Returns:
        float32, same shape.

    Raises:
        InvalidArgument: another dtype, or a scale outside the range above.

    Source: DeepSeek-V3.2-Exp, `act_quant` with scale_fmt "ue8m0".
    """
    scale = _native("power_of_two_scale", "scale", scale, ("float32",))
    if not ((scale > 0) & (scale <= np.float32(2.0**127))).all():
        raise InvalidArgument(
            "power_of_two_scale: scale has an entry outside (0, 2^127], but only there is the next power of two a float32; "
            "pass finite positive scales."
        )
    bits = scale.view(np.uint32)
    normal = (bits + _MANTISSA) & ~_MANTISSA
    # A subnormal has no exponent field to carry into: fill every bit below its highest one, then step to the next.
    filled = bits - np.uint32(1)
    for shift in (1, 2, 4, 8, 16):
        filled = filled | (filled >> np.uint32(shift))
    return np.asarray(np.where(bits < _SMALLEST_NORMAL, filled + np.uint32(1), normal)).view(np.float32)


def quantise_e4m3fn(
    x: NDArray, *, group: int | None = None, power_of_two: bool = True
) -> tuple[NDArray, npt.NDArray[np.float32]]:
    """`scale = max(amax, 1e-4) / 448`, rounded up to a power of two or not; `values = e4m3fn(clamp(x / scale, +-448))`.

    Args:
        x: float32, bfloat16 or float16 `[..., D]`, finite; the arithmetic is float32.
        group: entries per scale, a divisor of D; None is the whole last axis.
        power_of_two: round the scale up to a power of two, so that ue8m0 holds it and the division is exact.

    Returns:
        values: float8_e4m3fn `[..., D]`, rounded to nearest even, subnormals kept, never NaN.
        scale: float32 `[..., D / group]`, or `[...]` with group=None; > 0.

    Raises:
        InvalidArgument: another dtype, a group that does not divide D, or an x that is not finite.

    Source: DeepSeek-V3.2-Exp, `act_quant` (group 128).
    """
    grouped, amax = _groups("quantise_e4m3fn", x, group)
    scale: npt.NDArray[np.float32] = np.maximum(amax, np.float32(AMAX_FLOOR)) / np.float32(E4M3FN_MAX)
    if power_of_two:
        scale = power_of_two_scale(scale)
    # Clamped before the cast: x / scale can round to just above 448, where some libraries saturate and some give NaN.
    clamped = np.clip(grouped / scale, np.float32(-E4M3FN_MAX), np.float32(E4M3FN_MAX))
    return clamped.astype(ml_dtypes.float8_e4m3fn).reshape(np.shape(x)), scale[..., 0]


def quantise_int8(
    x: NDArray, *, group: int | None = None, scale_dtype: Literal["float32", "float16"] = "float32"
) -> tuple[npt.NDArray[np.int8], NDArray]:
    """`scale = scale_dtype(amax / 127)`; `values = clamp(round_half_even(x / scale), +-127)`, so -128 never appears.

    Args:
        x: float32, bfloat16 or float16 `[..., D]`, finite; the arithmetic is float32.
        group: entries per scale, a divisor of D; None is the whole last axis.
        scale_dtype: "float32" or "float16"; the division uses the scale as rounded.

    Returns:
        values: int8 `[..., D]`; a group whose scale rounds to 0 (all zeros, or too small for scale_dtype) is 0.
        scale: scale_dtype `[..., D / group]`, or `[...]` with group=None; >= 0.

    Raises:
        InvalidArgument: another dtype, a group that does not divide D, an x that is not finite, or a scale that
            scale_dtype cannot hold.

    Source: Ascend A2/A3's INT8 indexer cache, float16 scales (per token, as by `npu_dynamic_quant`).
    """
    if scale_dtype not in ("float32", "float16"):
        raise InvalidArgument(f"quantise_int8: scale_dtype is {scale_dtype!r}, but float32 or float16 is accepted.")
    grouped, amax = _groups("quantise_int8", x, group)
    with np.errstate(over="ignore"):
        scale = (amax / np.float32(INT8_MAX)).astype(scale_dtype)
    if not np.isfinite(scale).all():
        raise InvalidArgument(
            f"quantise_int8: |x| reaches {amax.max():g}, but with float16 scales |x| / 127 < 65520 is accepted; pass "
            "scale_dtype='float32'."
        )
    divisor = scale.astype(np.float32)
    scaled = np.divide(grouped, divisor, out=np.zeros_like(grouped), where=divisor > 0)
    values = np.clip(np.rint(scaled), np.float32(-INT8_MAX), np.float32(INT8_MAX)).astype(np.int8)
    return values.reshape(np.shape(x)), scale[..., 0]


def dequantise(values: NDArray, scale: NDArray, *, group: int | None = None, dtype: npt.DTypeLike = np.float32) -> NDArray:
    """`values * scale`, multiplied in float32 and then rounded to dtype; exact for dtype=float64, multiplied in float64.

    Args:
        values: float8_e4m3fn or int8 `[..., D]`; NaN stays NaN.
        scale: float32 or float16 `[..., D / group]`, or `[...]` with group=None; of any value, NaN too.
        group: entries per scale, a divisor of D; None is the whole last axis.
        dtype: float32, float64, float16 or bfloat16.

    Returns:
        dtype `[..., D]`.

    Raises:
        InvalidArgument: another dtype, a group that does not divide D, or a scale of another shape.
    """
    values = _native("dequantise", "values", values, ("float8_e4m3fn", "int8"))
    scale = _native("dequantise", "scale", scale, ("float32", "float16"))
    target = np.dtype(dtype)
    if target.name not in (*_FLOATS, "float64"):
        raise InvalidArgument(f"dequantise: dtype is {target.name}, but {' or '.join(_FLOATS)} or float64 is accepted.")
    *expected, size = _grouped_shape("dequantise", "values", values, group)
    if list(scale.shape) != expected:
        raise InvalidArgument(
            f"dequantise: scale is {describe(scale)} for values {list(values.shape)} with group={group}, but the shape "
            f"{expected} is accepted; pass the group it was quantised with."
        )
    work = np.promote_types(target, np.float32)
    grouped = values.reshape(*expected, size).astype(work)
    with np.errstate(invalid="ignore", over="ignore"):  # unread slots may hold anything
        product: NDArray = (grouped * scale[..., None].astype(work)).astype(target)
    return product.reshape(values.shape)


def ue8m0_from_scale(scale: NDArray) -> npt.NDArray[np.uint8]:
    """`code = log2(scale) + 127`, exact only: nothing is rounded.

    Args:
        scale: float32, any shape; every entry a power of two in 2^-127 ... 2^127.

    Returns:
        uint8, same shape, 0 ... 254.

    Raises:
        InvalidArgument: another dtype, or an entry that is no such power of two.

    Source: OCP Microscaling Formats v1.0, E8M0.
    """
    scale = _native("ue8m0_from_scale", "scale", scale, ("float32",))
    exact = is_ue8m0(scale) & ~np.signbit(scale)
    if not exact.all():
        raise InvalidArgument(
            f"ue8m0_from_scale: scale has the entry {scale[~exact][0]:g}, but powers of two in 2^-127 ... 2^127 are "
            "accepted; round up with power_of_two_scale(scale) first and quantise with the rounded scale."
        )
    return np.asarray(scale.view(np.uint32) >> np.uint32(23)).astype(np.uint8)


def scale_from_ue8m0(code: NDArray) -> npt.NDArray[np.float32]:
    """`scale = 2^(code - 127)`; code 255 is NaN, and code 0 is the float32 subnormal 2^-127.

    Args:
        code: uint8, any shape.

    Returns:
        float32, same shape.

    Raises:
        InvalidArgument: another dtype.

    Source: OCP Microscaling Formats v1.0, E8M0.
    """
    code = _native("scale_from_ue8m0", "code", code, ("uint8",))
    scale: npt.NDArray[np.float32] = code.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    return scale


def is_ue8m0(scale: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """True where `|scale|` is a power of two that ue8m0 holds; False for 0, NaN and infinity."""
    magnitude = scale.view(np.uint32) & np.uint32(0x7FFFFFFF)
    normal = (magnitude & _MANTISSA == 0) & (magnitude != 0) & np.isfinite(scale)
    return np.asarray(normal | (magnitude == _UE8M0_ZERO))


def _groups(who: str, x: NDArray, group: int | None) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """x as float32 `[..., D / group, group]` (`[..., D]` with group=None), and max |x| of each group, axis kept."""
    x = _native(who, "x", x, _FLOATS)
    grouped = x.reshape(_grouped_shape(who, "x", x, group)).astype(np.float32)
    amax = np.abs(grouped).max(axis=-1, keepdims=True)
    if not np.isfinite(amax).all():  # the maximum of a group with a NaN is NaN
        raise InvalidArgument(f"{who}: x holds NaN or infinity, but finite values are accepted; poison the result instead.")
    return grouped, amax


def _grouped_shape(who: str, name: str, array: NDArray, group: int | None) -> tuple[int, ...]:
    """The shape with the last axis split into groups; without its own last axis it is the shape of the scale."""
    depth = array.shape[-1] if array.ndim else 0
    if depth < 1 or (group is not None and (group < 1 or depth % group)):
        raise InvalidArgument(
            f"{who}: {name} is {describe(array)} with group={group}, but a last axis of whole groups is accepted; pass "
            "a group that divides it."
        )
    return array.shape if group is None else (*array.shape[:-1], depth // group, group)


def _native(who: str, name: str, array: NDArray, accepted: tuple[str, ...]) -> NDArray:
    """The array in the host's byte order, as its bits are read below, or InvalidArgument for another dtype."""
    array = np.asarray(array)
    if array.dtype.name not in accepted:
        raise InvalidArgument(f"{who}: {name} is {describe(array)}, but {' or '.join(accepted)} is accepted; cast it.")
    return array.astype(array.dtype.newbyteorder("="), copy=False)
