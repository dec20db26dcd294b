"""The caller's side in NumPy: RoPE, the Hadamard rotation and quantisation, as the models have them and as ports confuse them.

The operators begin behind all of this (docs/contract.md, boundary); nothing here is called by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from dsa_portable.arrays import describe
from dsa_portable.errors import InvalidArgument
from dsa_portable.formats import quantise_e4m3fn

NDArray: TypeAlias = npt.NDArray[Any]
Style: TypeAlias = Literal["half", "interleaved"]

_FLOATS = ("float32", "float64", "bfloat16", "float16")


class Rotation(NamedTuple):
    """Which dimensions of a head RoPE turns, and which of them form a pair."""

    style: Style
    dims: slice


# DeepSeek-V3.2's first published inference code had "interleaved" in its indexer; the model is "half".
ROTATIONS: Mapping[str, Rotation] = MappingProxyType(
    {
        "deepseek-v3.2 indexer": Rotation("half", slice(0, 64)),
        "glm-5 indexer": Rotation("interleaved", slice(0, 64)),
        "multi-head latent attention": Rotation("interleaved", slice(-64, None)),
    }
)


class IndexOperands(NamedTuple):
    """What `lightning_index` takes, under its argument names."""

    q: NDArray
    k: NDArray
    weights: npt.NDArray[np.float32]
    k_scale: npt.NDArray[np.float32]


def rope(
    x: NDArray, positions: NDArray, *, style: Style = "half", theta: float = 10000.0, dims: slice = slice(None)
) -> NDArray:
    """`(a, b) -> (a cos t - b sin t, a sin t + b cos t)`, `t = position * theta^(-2 i / d)`, for pair i of d dimensions.

    Args:
        x: float32, float64, bfloat16 or float16 `[T, ..., D]`.
        positions: integers `[T]`, the token's position in its request.
        style: pair i is dimensions `(i, i + d/2)` for "half" (also called neox), `(2 i, 2 i + 1)` for "interleaved".
        theta: > 0, the base; a model that stretches its frequencies (YaRN) has others than these.
        dims: which dimensions are turned, an even number; the others are returned as they are.

    Returns:
        x's dtype and shape; the arithmetic is float64 and is rounded once.

    Raises:
        InvalidArgument: another dtype, an odd number of dimensions, positions of another length, an unknown style.

    Source: Su et al., RoFormer (2021), 3.2.2; the styles as in `ROTATIONS`, from DeepSeek-V3.2-Exp and GLM-5.
    """
    x, positions = _float("rope", x), np.asarray(positions)
    if style not in ("half", "interleaved"):
        raise InvalidArgument(f"rope: style is {style!r}, but half or interleaved is accepted; see ROTATIONS.")
    if x.ndim < 2 or positions.shape != x.shape[:1] or positions.dtype.kind not in "iu":
        raise InvalidArgument(
            f"rope: positions is {describe(positions)} for x {list(x.shape)}, but integers are accepted, one for each entry of "
            "x's first axis."
        )
    part = x[..., dims].astype(np.float64)
    half, odd = divmod(part.shape[-1], 2)
    if odd:
        raise InvalidArgument(f"rope: dims names {part.shape[-1]} dimensions, but pairs are turned; name an even number.")
    angle = positions[:, None] * theta ** (-np.arange(half) / half)
    angle = angle.reshape(len(x), *[1] * (x.ndim - 2), half)
    a, b = (part[..., :half], part[..., half:]) if style == "half" else (part[..., 0::2], part[..., 1::2])
    turned = (a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle))
    out = x.copy()
    joined = np.concatenate(turned, axis=-1) if style == "half" else np.stack(turned, axis=-1).reshape(part.shape)
    out[..., dims] = joined.astype(x.dtype)
    return np.asarray(out)


def hadamard(x: NDArray) -> NDArray:
    """`x H_D D^-0.5` with Sylvester's `H_2n = [[H_n, H_n], [H_n, -H_n]]`: orthogonal, symmetric and its own inverse.

    Applied to q and to k it leaves every q.k as it is and only changes what quantisation loses; applied to one of them it
    destroys the scores.

    Args:
        x: float32, float64, bfloat16 or float16 `[..., D]`, D a power of two.

    Returns:
        x's dtype and shape; the arithmetic is float64 and is rounded once.

    Raises:
        InvalidArgument: another dtype, or a D that is no power of two.

    Source: DeepSeek-V3.2-Exp, `rotate_activation` (D = 128).
    """
    x = _float("hadamard", x)
    size = x.shape[-1] if x.ndim else 0
    if size < 1 or size & (size - 1):
        raise InvalidArgument(f"hadamard: x is {describe(x)}, but a last axis of 1, 2, 4, 8, ... is accepted; pad it.")
    y = x.reshape(-1, size).astype(np.float64)
    for bit in range(size.bit_length() - 1):
        pairs = y.reshape(len(y), -1, 2, 1 << bit)
        y = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2).reshape(len(y), size)
    return np.asarray((y * size**-0.5).astype(x.dtype)).reshape(x.shape)


def prepare_index(
    q: NDArray,
    k: NDArray,
    head_weights: NDArray,
    *,
    positions_q: NDArray,
    positions_k: NDArray,
    rope_style: Style,
    rope_dims: slice = slice(0, 64),
    theta: float = 10000.0,
    power_of_two: bool = True,
) -> IndexOperands:
    """`q8 * q_scale ~ hadamard(rope(q))`, k alike, `weights = head_weights * q_scale * H^-0.5 * D^-0.5`.

    Args:
        q: float32, float64, bfloat16 or float16 `[Tq, H, D]`, projected, not rotated.
        k: the same `[Tk, D]`, projected and normalised, not rotated.
        head_weights: floats of either sign `[Tq, H]`, as projected.
        positions_q, positions_k: integers `[Tq]` and `[Tk]`.
        rope_style, rope_dims, theta: as `rope` has them; the model's row of `ROTATIONS`.
        power_of_two: scales are rounded up to powers of two, as DeepSeek-V3.2's are.

    Returns:
        q: float8_e4m3fn `[Tq, H, D]`; its scale, one a row and head, is in the weights.
        k: float8_e4m3fn `[Tk, D]`.
        weights: float32 `[Tq, H]`.
        k_scale: float32 `[Tk]`.

    Raises:
        InvalidArgument: what `rope`, `hadamard` and `quantise_e4m3fn` refuse, or head_weights of another shape.

    Source: DeepSeek-V3.2-Exp, `Indexer.forward`. A positive scale commutes with relu, so folding it into the weights is exact.
    """
    if np.shape(head_weights) != np.shape(q)[:2] or np.ndim(q) != 3:
        raise InvalidArgument(
            f"prepare_index: head_weights is {describe(head_weights)} for q {list(np.shape(q))}, but [Tq, H] beside [Tq, H, D] "
            "is accepted."
        )
    turned = (
        hadamard(rope(x, positions, style=rope_style, theta=theta, dims=rope_dims))
        for x, positions in ((q, positions_q), (k, positions_k))
    )
    (q8, q_scale), (k8, k_scale) = (quantise_e4m3fn(x.astype(np.float32), power_of_two=power_of_two) for x in turned)
    return IndexOperands(q8, k8, fold_weights(head_weights, q_scale, q8.shape[2]), k_scale)


def fold_weights(head_weights: NDArray, q_scale: NDArray, head_dim: int) -> npt.NDArray[np.float32]:
    """`head_weights * q_scale * H^-0.5 * head_dim^-0.5`, float32 `[Tq, H]`, for both given as `[Tq, H]`.

    Source: DeepSeek-V3.2-Exp, `Indexer.forward`; DeepGEMM's fp8_mqa_logits has no argument for the scale of q.
    """
    heads = np.shape(head_weights)[1]
    factor = np.float32(heads**-0.5 * head_dim**-0.5)
    return np.asarray(np.asarray(head_weights).astype(np.float32) * np.asarray(q_scale).astype(np.float32) * factor)


def _float(who: str, x: NDArray) -> NDArray:
    x = np.asarray(x)
    if x.dtype.name not in _FLOATS:
        raise InvalidArgument(f"{who}: x is {describe(x)}, but {', '.join(_FLOATS)} are accepted; cast it.")
    return x
