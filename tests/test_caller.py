"""The caller's helpers against numbers worked out by hand, and the properties that a model relies on."""

from __future__ import annotations

from math import cos, sin
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from dsa_portable import InvalidArgument
from dsa_portable.caller import ROTATIONS, Style, fold_weights, hadamard, prepare_index, rope
from dsa_portable.formats import dequantise

STYLES = pytest.mark.parametrize("style", ["half", "interleaved"])
# theta = 4 in four dimensions: pair 0 turns by the position, pair 1 by half of it. Here x = (1, 2, 3, 4) stands at position 2.
BY_HAND: dict[Style, list[float]] = {
    "half": [1 * cos(2) - 3 * sin(2), 2 * cos(1) - 4 * sin(1), 1 * sin(2) + 3 * cos(2), 2 * sin(1) + 4 * cos(1)],
    "interleaved": [1 * cos(2) - 2 * sin(2), 1 * sin(2) + 2 * cos(2), 3 * cos(1) - 4 * sin(1), 3 * sin(1) + 4 * cos(1)],
}


def random(seed: int, *shape: int) -> npt.NDArray[np.float64]:
    return np.random.default_rng(seed).standard_normal(shape)


def turned_dot(q: npt.NDArray[Any], k: npt.NDArray[Any], at_q: int, at_k: int, style: Style) -> float:
    turned = [rope(x[None], np.array([at]), style=style) for x, at in ((q, at_q), (k, at_k))]
    return float((turned[0] * turned[1]).sum())


# --- rope ---


@pytest.mark.parametrize("style", BY_HAND)
def test_rope_by_hand(style: Style) -> None:
    found = rope(np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([2]), style=style, theta=4.0)
    np.testing.assert_allclose(found[0], BY_HAND[style], rtol=1e-15)


@STYLES
def test_rope_keeps_lengths_and_depends_on_the_distance_alone(style: Style) -> None:
    q, k = random(0, 64), random(1, 64)
    near = turned_dot(q, k, 7, 3, style)
    assert turned_dot(q, k, 100_007, 100_003, style) == pytest.approx(near, rel=1e-9)
    assert turned_dot(q, k, 7, 4, style) != pytest.approx(near, rel=1e-3)
    assert turned_dot(q, q, 5, 5, style) == pytest.approx(q @ q, rel=1e-12)


def test_the_styles_are_one_rotation_in_another_order_of_dimensions() -> None:
    x, positions = random(2, 6, 3, 8), np.arange(6)
    half, interleaved = (rope(x, positions, style=style) for style in ("half", "interleaved"))
    assert not np.allclose(half, interleaved)
    order = np.arange(8).reshape(2, 4).T.ravel()  # (0, 4), (1, 5) ...: the halves' pairs, side by side
    np.testing.assert_array_equal(rope(x[..., order], positions, style="interleaved"), half[..., order])


@pytest.mark.parametrize("rotation", ROTATIONS.values(), ids=ROTATIONS)
def test_only_the_named_dimensions_turn(rotation: tuple[Style, slice]) -> None:
    style, dims = rotation
    x = random(3, 4, 2, 128)
    found = rope(x, np.arange(4), style=style, dims=dims)
    others = np.ones(128, bool)
    others[dims] = False
    assert others.sum() == 64
    np.testing.assert_array_equal(found[..., others], x[..., others])
    np.testing.assert_array_equal(found[..., dims], rope(x[..., dims], np.arange(4), style=style))
    np.testing.assert_array_equal(found[0], x[0])  # position 0 turns nothing
    assert (found[1:, :, dims] != x[1:, :, dims]).all()


def test_conventions_of_the_models() -> None:
    assert ROTATIONS["deepseek-v3.2 indexer"] == ("half", slice(0, 64))
    assert ROTATIONS["glm-5 indexer"] == ("interleaved", slice(0, 64))
    assert ROTATIONS["multi-head latent attention"] == ("interleaved", slice(-64, None))


@pytest.mark.parametrize("dtype", ["float32", "float64", ml_dtypes.bfloat16, "float16"])
def test_rope_rounds_once_and_does_not_write_to_x(dtype: npt.DTypeLike) -> None:
    x = random(4, 5, 8).astype(dtype)
    before = x.copy()
    found = rope(x, np.arange(5))
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(found, rope(x.astype(np.float64), np.arange(5)).astype(dtype))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"x": np.ones((3, 4), np.int32)}, "int32"),
        ({"positions": np.arange(4)}, "one for each entry"),
        ({"positions": np.zeros(3)}, "integers are accepted"),
        ({"style": "neox"}, "half or interleaved"),
        ({"dims": slice(0, 3)}, "an even number"),
    ],
)
def test_rope_refuses(changed: dict[str, Any], told: str) -> None:
    arguments: dict[str, Any] = {"x": np.ones((3, 4)), "positions": np.arange(3)} | changed
    with pytest.raises(InvalidArgument, match=told):
        rope(**arguments)


# --- hadamard ---


def test_hadamard_by_hand() -> None:
    # H_4 has the rows ++++, +-+-, ++--, +--+; 4^-0.5 is a half.
    found = hadamard(np.array([1.0, 2.0, 3.0, 5.0]))
    np.testing.assert_array_equal(found, [11 / 2, -3 / 2, -5 / 2, 1 / 2])


def test_hadamard_is_sylvesters_orthogonal_and_its_own_inverse() -> None:
    matrix = np.ones((1, 1))
    for _ in range(7):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    found = hadamard(np.eye(128))
    np.testing.assert_allclose(found, matrix * 128**-0.5, rtol=1e-15)
    np.testing.assert_allclose(found @ found.T, np.eye(128), atol=1e-14)
    q, k = random(5, 3, 128), random(6, 5, 128)
    np.testing.assert_allclose(hadamard(q) @ hadamard(k).T, q @ k.T, atol=1e-12)
    assert not np.allclose(hadamard(q) @ k.T, q @ k.T, atol=1.0)


def test_hadamard_keeps_shape_and_dtype_and_spreads_an_outlier() -> None:
    x = np.zeros((2, 3, 64), ml_dtypes.bfloat16)
    x[..., 9] = 16
    found = hadamard(x)
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    np.testing.assert_array_equal(abs(found.astype(np.float32)), np.full(x.shape, 2, np.float32))


@pytest.mark.parametrize("x", [np.ones(12), np.ones((2, 0)), np.float64(1), np.ones(4, np.int8)])
def test_hadamard_refuses(x: npt.NDArray[Any]) -> None:
    with pytest.raises(InvalidArgument, match="hadamard: x is"):
        hadamard(x)


# --- prepare_index ---


def test_fold_weights_by_hand() -> None:
    # 4 heads, 16 dimensions: H^-0.5 * D^-0.5 = 1/8.
    found = fold_weights(np.array([[8.0, -16.0, 0.0, 4.0]]), np.array([[0.5, 2.0, 1.0, 0.25]], np.float32), 16)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[0.5, -4.0, 0.0, 0.125]])


def test_prepare_index_by_hand() -> None:
    # Position 0 turns nothing, and each Hadamard rotation leaves one entry: (56, 0, 0, 0) and (0, 14, 0, 0).
    k = np.full((1, 4), 28.0, np.float32)
    q = np.array([[[7.0, -7.0, 7.0, -7.0]]], np.float32)
    zero = np.array([0])
    q8, k8, weights, k_scale = prepare_index(q, k, np.array([[3.0]]), positions_q=zero, positions_k=zero, rope_style="half")
    # amax 56 / 448 = 2^-3 and 14 / 448 = 2^-5, both exact; the weight is 3 * 2^-5 * 1 * 4^-0.5.
    np.testing.assert_array_equal(k8.astype(np.float32), [[448, 0, 0, 0]])
    np.testing.assert_array_equal(k_scale, [2.0**-3])
    np.testing.assert_array_equal(q8.astype(np.float32), [[[0, 448, 0, 0]]])
    np.testing.assert_array_equal(weights, [[3 * 2.0**-6]])


@STYLES
@pytest.mark.parametrize("power_of_two", [True, False])
def test_prepare_index_keeps_the_scores_but_for_quantisation(style: Style, power_of_two: bool) -> None:
    rows, keys, heads, dim = 5, 40, 8, 128
    q, k, head_weights = random(7, rows, heads, dim), random(8, keys, dim), random(9, rows, heads)
    q *= np.exp2(np.arange(heads) - 4.0)[:, None]
    at_q, at_k = np.arange(35, 40), np.arange(keys)
    found = prepare_index(q, k, head_weights, positions_q=at_q, positions_k=at_k, rope_style=style, power_of_two=power_of_two)
    assert [a.dtype.name for a in found] == ["float8_e4m3fn", "float8_e4m3fn", "float32", "float32"]
    assert [a.shape for a in found] == [(rows, heads, dim), (keys, dim), (rows, heads), (keys,)]
    assert (np.frexp(found.k_scale)[0] == 0.5).all() == power_of_two

    def scores(q: npt.NDArray[Any], k: npt.NDArray[Any], weights: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        return np.einsum("th,thk->tk", weights, np.maximum(np.einsum("thd,kd->thk", q, k), 0))

    turned = [rope(x, at, style=style, dims=slice(0, 64)) for x, at in ((q, at_q), (k, at_k))]
    truth = scores(*turned, head_weights * (heads * dim) ** -0.5)
    back = dequantise(found.k, found.k_scale, dtype=np.float64)
    ours = scores(found.q.astype(np.float64), back, found.weights.astype(np.float64))
    # e4m3 rounds either factor of a product by at most 2^-4 of itself: sqrt(2 / 3) * 2^-4 = 0.051 root mean square.
    error = np.sqrt(((ours - truth) ** 2).mean() / (truth**2).mean())
    assert 0.002 < error < 0.06


def test_what_prepare_index_quantised_comes_back() -> None:
    k = random(10, 9, 128).astype(np.float32)
    at = np.arange(9)
    q = random(11, 9, 2, 128).astype(np.float32)
    found = prepare_index(q, k, np.ones((9, 2)), positions_q=at, positions_k=at, rope_style="half")
    kept = hadamard(rope(k, at, style="half", dims=slice(0, 64)))
    back = dequantise(found.k, found.k_scale)
    assert (abs(back - kept) <= np.maximum(2.0**-4 * abs(kept), 2.0**-10 * found.k_scale[:, None])).all()
    np.testing.assert_allclose(hadamard(back), rope(k, at, style="half", dims=slice(0, 64)), atol=0.25)


def test_prepare_index_refuses_weights_of_another_shape() -> None:
    at = np.arange(2)
    with pytest.raises(InvalidArgument, match=r"head_weights .* \[Tq, H\]"):
        prepare_index(np.ones((2, 3, 8)), np.ones((2, 8)), np.ones(2), positions_q=at, positions_k=at, rope_style="half")
