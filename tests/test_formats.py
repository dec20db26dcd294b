"""The formats against bytes written by hand and against their definitions in float64; each check is also shown to fail."""

from __future__ import annotations

import math
import struct
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsa_portable.errors import InvalidArgument
from dsa_portable.formats import (
    LAYOUTS,
    check_cache,
    dequantise,
    layout,
    pack,
    power_of_two_scale,
    quantise_e4m3fn,
    quantise_int8,
    scale_from_ue8m0,
    ue8m0_from_scale,
    unpack,
)

E4M3 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16
NDArray = npt.NDArray[Any]

PLANAR = [name for name, spec in LAYOUTS.items() if spec.planar]
INTERLEAVED = [name for name, spec in LAYOUTS.items() if not spec.planar]
KV = [name for name, spec in LAYOUTS.items() if spec.operator == "sparse_attend"]

# Written out, so that nothing below learns an offset from the table it checks: bytes per token, where scale and rope start.
NSR, NRS = (656, 512, 528), (656, 640, 512)
KV_OFFSETS = {
    "v32_fp8_656_nsr": NSR,
    "v32_fp8_656_nsr_f32": NSR,
    "ascend_656_nrs_int8": NRS,
    "ascend_656_nrs_fp8": NRS,
}


def f32(*numbers: float) -> npt.NDArray[np.float32]:
    return np.array(numbers, np.float32)


def from_bits(bits: NDArray, dtype: Any) -> NDArray:
    return bits.view(dtype)


def random_parts(name: str, tokens: tuple[int, ...], seed: int = 0) -> tuple[NDArray, NDArray, NDArray | None]:
    """Every bit pattern, NaN included, in values and rope; scales that the layout allows."""
    spec, rng = LAYOUTS[name], np.random.default_rng(seed)
    values = from_bits(rng.integers(0, 256, (*tokens, spec.value_dim), np.uint8), spec.value_dtype)
    tiles = () if spec.value_dim == spec.tile else (spec.value_dim // spec.tile,)
    scale = rng.uniform(0.5, 2, (*tokens, *tiles)).astype(np.float32)
    if spec.power_of_two:
        scale = power_of_two_scale(scale)
    rope = from_bits(rng.integers(0, 2**16, (*tokens, 64), np.uint16), BF16) if spec.rope_dim else None
    return values, scale, rope


def same_bits(a: NDArray | None, b: NDArray | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# --- the table ---


def test_the_table_holds_exactly_the_six_layouts() -> None:
    assert {
        name: (
            s.operator,
            s.planar,
            s.bytes_per_token,
            s.value_dtype.name,
            s.value_dim,
            s.rope_dim,
            s.key_dim,
            s.tile,
            s.power_of_two,
        )
        for name, s in LAYOUTS.items()
    } == {
        "idx_fp8_132_planar": ("lightning_index", True, 132, "float8_e4m3fn", 128, 0, 128, 128, False),
        "idx_fp8_132_interleaved": ("lightning_index", False, 132, "float8_e4m3fn", 128, 0, 128, 128, False),
        "v32_fp8_656_nsr": ("sparse_attend", False, 656, "float8_e4m3fn", 512, 64, 576, 128, True),
        "v32_fp8_656_nsr_f32": ("sparse_attend", False, 656, "float8_e4m3fn", 512, 64, 576, 128, False),
        "ascend_656_nrs_int8": ("sparse_attend", False, 656, "int8", 512, 64, 576, 128, False),
        "ascend_656_nrs_fp8": ("sparse_attend", False, 656, "float8_e4m3fn", 512, 64, 576, 128, False),
    }
    assert all(spec.name == name and spec.users and spec.note for name, spec in LAYOUTS.items())


def test_the_table_is_read_only() -> None:
    with pytest.raises(TypeError):
        LAYOUTS["mine"] = layout("idx_fp8_132_planar")  # type: ignore[index]
    with pytest.raises(AttributeError):
        layout("idx_fp8_132_planar").planar = False  # type: ignore[misc]


def test_unknown_layout_lists_the_known() -> None:
    with pytest.raises(InvalidArgument, match="'fp8_132'") as refusal:
        layout("fp8_132")
    assert all(name in str(refusal.value) for name in LAYOUTS)


# --- bytes by hand ---


def index_parts() -> tuple[NDArray, NDArray]:
    """One page of two tokens: 1.0 (0x38) and scale 0.5; -448 (0xfe) and scale 3."""
    values = np.empty((1, 2, 128), E4M3)
    values[0, 0], values[0, 1] = 1.0, -448.0
    return values, f32(0.5, 3.0).reshape(1, 2)


PLANAR_PAGE = b"\x38" * 128 + b"\xfe" * 128 + struct.pack("<2f", 0.5, 3.0)
INTERLEAVED_PAGE = b"\x38" * 128 + struct.pack("<f", 0.5) + b"\xfe" * 128 + struct.pack("<f", 3.0)


@pytest.mark.parametrize(("name", "page"), [("idx_fp8_132_planar", PLANAR_PAGE), ("idx_fp8_132_interleaved", INTERLEAVED_PAGE)])
def test_index_cache_bytes(name: str, page: bytes) -> None:
    values, scale = index_parts()
    cache = pack(name, values, scale)
    assert cache.shape == (1, 2, 132)
    assert cache.tobytes() == page
    read = unpack(name, np.frombuffer(page, np.uint8).reshape(1, 2, 132))
    assert same_bits(read.values, values)
    assert same_bits(read.scale, scale)
    assert read.rope is None


def test_planar_scales_end_their_own_page() -> None:
    values, scale = np.zeros((2, 64, 128), E4M3), np.zeros((2, 64), np.float32)
    values[1, 5, 7], scale[1, 5] = 448.0, 1.5
    flat = pack("idx_fp8_132_planar", values, scale).reshape(-1)
    page = 64 * 132
    expected = np.zeros(2 * page, np.uint8)
    expected[page + 5 * 128 + 7] = 0x7E
    expected[page + 64 * 128 + 5 * 4 : page + 64 * 128 + 6 * 4] = list(struct.pack("<f", 1.5))
    assert np.array_equal(flat, expected)


def test_planar_and_interleaved_share_a_shape_and_nothing_else() -> None:
    values, scale = index_parts()
    planar, interleaved = pack("idx_fp8_132_planar", values, scale), pack("idx_fp8_132_interleaved", values, scale)
    assert planar.shape == interleaved.shape
    assert planar.tobytes() != interleaved.tobytes()
    misread = unpack("idx_fp8_132_planar", interleaved)
    assert not same_bits(misread.values, values)
    assert not same_bits(misread.scale, scale)


def test_planar_and_interleaved_agree_on_pages_of_one_token() -> None:
    values, scale, _ = random_parts("idx_fp8_132_planar", (3, 1))
    assert same_bits(pack("idx_fp8_132_planar", values, scale), pack("idx_fp8_132_interleaved", values, scale))


def kv_parts(name: str) -> tuple[NDArray, NDArray, NDArray, dict[str, bytes]]:
    """One token, and its bytes part by part. Every byte of a part differs from its neighbours."""
    integers = layout(name).value_dtype == np.int8
    codes = [i % 120 for i in range(512)]  # 0 ... 119: positive and finite, as e4m3 and as int8
    values = np.array(codes, np.int8) if integers else from_bits(np.array(codes, np.uint8), E4M3)
    scale = f32(0.25, 1.0, 2.0, 1024.0)
    rope = np.arange(64, dtype=np.float32).astype(BF16)  # bf16 is the upper half of float32
    written = {
        "values": bytes(codes),
        "scale": bytes.fromhex("0000803e 0000803f 00000040 00008044"),
        "rope": b"".join(struct.pack("<f", i)[2:] for i in range(64)),
    }
    return values.reshape(1, 1, 512), scale.reshape(1, 1, 4), rope.reshape(1, 1, 64), written


@pytest.mark.parametrize("name", KV)
def test_kv_cache_bytes(name: str) -> None:
    values, scale, rope, written = kv_parts(name)
    width, scale_at, rope_at = KV_OFFSETS[name]
    token = bytearray(width)
    token[0:512] = written["values"]
    token[scale_at : scale_at + 16] = written["scale"]
    token[rope_at : rope_at + 128] = written["rope"]
    assert len(token) == 656
    cache = pack(name, values, scale, rope)
    assert cache.shape == (1, 1, 656)
    assert cache.tobytes() == bytes(token)
    read = unpack(name, np.frombuffer(bytes(token), np.uint8).reshape(1, 1, 656))
    assert all(same_bits(a, b) for a, b in zip(read, (values, scale, rope), strict=True))


def test_nsr_and_nrs_share_a_shape_and_not_an_order() -> None:
    values, scale, rope, _ = kv_parts("ascend_656_nrs_fp8")
    ascend, v32 = pack("ascend_656_nrs_fp8", values, scale, rope), pack("v32_fp8_656_nsr", values, scale, rope)
    assert ascend.shape == v32.shape
    assert ascend.tobytes()[:512] == v32.tobytes()[:512]
    misread = unpack("v32_fp8_656_nsr", ascend)
    assert same_bits(misread.values, values)
    assert not same_bits(misread.scale, scale)
    assert not same_bits(misread.rope, rope)


def test_the_two_v32_layouts_differ_only_in_what_they_allow() -> None:
    values, scale, rope, _ = kv_parts("v32_fp8_656_nsr")
    assert same_bits(pack("v32_fp8_656_nsr", values, scale, rope), pack("v32_fp8_656_nsr_f32", values, scale, rope))


def test_big_endian_input_becomes_little_endian_bytes() -> None:
    values, scale = index_parts()
    assert pack("idx_fp8_132_planar", values, scale.astype(">f4")).tobytes() == PLANAR_PAGE


# --- round trips and views ---


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("tokens", [(3, 5), (1, 1), (2, 64), (0, 4), (4, 0)])
def test_round_trip(name: str, tokens: tuple[int, int]) -> None:
    parts = random_parts(name, tokens)
    copies = [None if part is None else part.copy() for part in parts]
    cache = pack(name, *parts)
    assert cache.shape == (*tokens, layout(name).bytes_per_token)
    assert all(same_bits(a, b) for a, b in zip(unpack(name, cache), parts, strict=True))
    assert all(same_bits(a, b) for a, b in zip(parts, copies, strict=True)), "inputs were written to"
    if cache.size:
        cache[0, 0, 3] ^= 1
        assert not same_bits(unpack(name, cache).values, parts[0]), "a changed byte went unseen"


@pytest.mark.parametrize("name", INTERLEAVED)
def test_flat_form_is_the_paged_form_reshaped(name: str) -> None:
    parts = random_parts(name, (3, 4))
    flat = [None if part is None else part.reshape(12, *part.shape[2:]) for part in parts]
    cache = pack(name, *flat)  # type: ignore[arg-type]
    assert cache.shape == (12, layout(name).bytes_per_token)
    assert cache.tobytes() == pack(name, *parts).tobytes()
    assert all(same_bits(a, b) for a, b in zip(unpack(name, cache), flat, strict=True))


@pytest.mark.parametrize("name", LAYOUTS)
def test_pack_takes_strided_parts(name: str) -> None:
    parts = random_parts(name, (4, 6))
    strided = [None if part is None else part[::2, ::3] for part in parts]
    dense = [None if part is None else np.ascontiguousarray(part) for part in strided]
    assert same_bits(pack(name, *strided), pack(name, *dense))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LAYOUTS)
def test_unpack_gives_views(name: str) -> None:
    padded = np.zeros((3, 5000), np.uint8)  # pages with a gap after them, as servers allocate them
    width = layout(name).bytes_per_token
    paged = np.lib.stride_tricks.as_strided(padded, (3, 7, width), (5000, width, 1))
    for cache in (np.zeros((3, 7, width), np.uint8), paged):
        for part in unpack(name, cache):
            assert part is None or np.shares_memory(part, cache)
    unpack(name, paged).scale[1, 2] = 1.0
    assert padded[1].any()
    assert not padded[[0, 2]].any()


@pytest.mark.parametrize("name", LAYOUTS)
def test_unpack_allocates_nothing_of_the_size_of_the_cache(name: str) -> None:
    cache = np.zeros((64, 64, layout(name).bytes_per_token), np.uint8)
    tracemalloc.start()
    unpack(name, cache)
    peak = tracemalloc.get_traced_memory()[1]
    cache.copy()
    assert tracemalloc.get_traced_memory()[1] >= cache.nbytes, "this check would not see a copy"
    tracemalloc.stop()
    assert peak < cache.nbytes / 8


@pytest.mark.parametrize("name", LAYOUTS)
def test_unpack_reads_a_cache_in_any_memory_order(name: str) -> None:
    parts = random_parts(name, (3, 4))
    cache = np.asfortranarray(pack(name, *parts))
    assert all(same_bits(a, b) for a, b in zip(unpack(name, cache), parts, strict=True))


# --- refusals of pack, unpack and check_cache ---


def test_arbitrary_scales_are_refused_by_the_power_of_two_layout_only() -> None:
    values, scale, rope, _ = kv_parts("v32_fp8_656_nsr")
    scale[0, 0, 2] = 3.0
    with pytest.raises(InvalidArgument, match=r"v32_fp8_656_nsr: scale\[0, 0, 2\] is 3"):
        pack("v32_fp8_656_nsr", values, scale, rope)
    assert unpack("v32_fp8_656_nsr_f32", pack("v32_fp8_656_nsr_f32", values, scale, rope)).scale[0, 0, 2] == 3.0


@pytest.mark.parametrize("scale", [0.0, np.float32(2.0**-128), 1.5, np.nextafter(np.float32(2), np.float32(0))])
def test_a_finite_scale_that_ue8m0_cannot_hold_is_refused(scale: float) -> None:
    values, _, rope, _ = kv_parts("v32_fp8_656_nsr")
    with pytest.raises(InvalidArgument, match="powers of two"):
        pack("v32_fp8_656_nsr", values, np.full((1, 1, 4), scale, np.float32), rope)


@pytest.mark.parametrize("name", LAYOUTS)
def test_poison_passes_through(name: str) -> None:
    values, scale, rope = random_parts(name, (2, 3))
    values[0] = np.int8(-128) if values.dtype == np.int8 else np.float32(np.nan)
    scale[0, :2], scale[1, 0], scale[1, 1] = np.nan, np.inf, -np.inf
    if rope is not None:
        rope[0] = np.nan
    read = unpack(name, pack(name, values, scale, rope))
    assert all(same_bits(a, b) for a, b in zip(read, (values, scale, rope), strict=True))


@pytest.mark.parametrize("name", PLANAR)
def test_flat_form_is_refused_by_planar_layouts(name: str) -> None:
    values, scale, _ = random_parts(name, (2, 3))
    with pytest.raises(InvalidArgument, match=r"only \[num_pages, page_size, 128\] .* planar page"):
        pack(name, values[0], scale[0])
    with pytest.raises(InvalidArgument, match=r"only \[num_pages, page_size, 132\] .* planar page"):
        unpack(name, np.zeros((3, 132), np.uint8))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_head_axis_is_refused(name: str) -> None:
    width = layout(name).bytes_per_token
    with pytest.raises(InvalidArgument, match="num_pages, page_size"):
        unpack(name, np.zeros((2, 3, 1, width), np.uint8))
    with pytest.raises(InvalidArgument, match="num_pages, page_size"):
        pack(name, *(None if part is None else part[:, :, None] for part in random_parts(name, (2, 3))))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("idx_fp8_132_planar", {"rope": np.zeros((2, 3, 64), BF16)}, "rope is bfloat16 .* pass rope=None"),
        ("idx_fp8_132_planar", {"scale": np.ones((2, 4), np.float32)}, r"scale is .* \[2, 3\] is accepted"),
        ("idx_fp8_132_planar", {"scale": np.ones((2, 3, 1), np.float32)}, r"scale is .* \[2, 3\] is accepted"),
        ("idx_fp8_132_planar", {"scale": np.ones((2, 3), np.float16)}, "scale is float16 .* float32 is accepted"),
        ("idx_fp8_132_planar", {"values": np.ones((2, 3, 128), np.uint8)}, "values is uint8 .* float8_e4m3fn is accepted"),
        ("idx_fp8_132_planar", {"values": np.ones((2, 3, 64), E4M3)}, r"values is .* \[2, 3, 128\] is accepted"),
        ("v32_fp8_656_nsr", {"rope": None}, r"rope is None, .* bfloat16 \[..., 64\]"),
        ("v32_fp8_656_nsr", {"rope": np.zeros((2, 3, 64), np.float16)}, "rope is float16 .* bfloat16 is accepted"),
        ("v32_fp8_656_nsr", {"rope": np.zeros((3, 2, 64), BF16)}, r"rope is .* \[2, 3, 64\] is accepted"),
        ("v32_fp8_656_nsr", {"scale": np.ones((2, 3), np.float32)}, r"scale is .* \[2, 3, 4\] is accepted"),
        ("v32_fp8_656_nsr", {"values": np.ones((2, 3, 512), np.int8)}, "values is int8 .* float8_e4m3fn is accepted"),
        ("ascend_656_nrs_int8", {"values": np.ones((2, 3, 512), E4M3)}, "values is float8_e4m3fn .* int8 is accepted"),
    ],
)
def test_pack_refuses(name: str, change: dict[str, NDArray | None], message: str) -> None:
    parts: dict[str, Any] = dict(zip(("values", "scale", "rope"), random_parts(name, (2, 3)), strict=True))
    pack(name, **parts)
    with pytest.raises(InvalidArgument, match=f"^{name}: {message}"):
        pack(name, **parts | change)


def test_a_cache_of_another_width_is_told_whose_width_it_has() -> None:
    with pytest.raises(InvalidArgument, match="656 bytes per token are accepted") as refusal:
        check_cache("v32_fp8_656_nsr", np.zeros((2, 64, 132), np.uint8))
    assert "132 is the width of idx_fp8_132_planar, idx_fp8_132_interleaved" in str(refusal.value)
    assert "ascend" not in str(refusal.value)
    with pytest.raises(InvalidArgument, match="132 bytes per token") as refusal:
        check_cache("idx_fp8_132_planar", np.zeros((2, 64, 656), np.uint8))
    assert all(name in str(refusal.value) for name in KV)
    with pytest.raises(InvalidArgument, match="no layout has 576"):
        check_cache("v32_fp8_656_nsr", np.zeros((2, 64, 576), np.uint8))


@pytest.mark.parametrize("name", LAYOUTS)
def test_check_cache(name: str) -> None:
    width = layout(name).bytes_per_token
    check_cache(name, np.zeros((2, 3, width), np.uint8))
    for dtype in (np.int8, E4M3, np.float32):
        with pytest.raises(InvalidArgument, match="uint8 is accepted"):
            check_cache(name, np.zeros((2, 3, width), dtype))
    with pytest.raises(InvalidArgument, match="no layout has 0"):
        check_cache(name, np.zeros((), np.uint8))
    with pytest.raises(InvalidArgument, match=f"{width} bytes"):
        unpack(name, np.zeros((2, 3, width + 1), np.uint8))


# --- the power-of-two rule ---


def by_definition(scale: float) -> float:
    return 2.0 ** math.ceil(math.log2(scale))


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(1.0, 1.0), (1.0000001, 2.0), (0.75, 1.0), (3.0, 4.0), (4.0, 4.0), (2.0**127, 2.0**127), (2.0**-126, 2.0**-126)],
)
def test_power_of_two_by_hand(scale: float, expected: float) -> None:
    assert power_of_two_scale(f32(scale)) == f32(expected)


def test_power_of_two_at_the_edges_of_every_binade() -> None:
    exponent = np.arange(0, 254, dtype=np.uint32)[:, None] << np.uint32(23)
    mantissa = np.array([0, 1, 2, 3, 0x3FFFFF, 0x400000, 0x400001, 0x7FFFFE, 0x7FFFFF], np.uint32)
    scale = (exponent | mantissa).reshape(-1)[1:].view(np.float32)  # all but 0.0
    expected = [by_definition(float(s)) for s in scale]
    assert power_of_two_scale(scale).tolist() == expected
    plain_rounding = np.exp2(np.round(np.log2(scale)))
    assert plain_rounding.tolist() != expected, "these scales would not tell ceil from round"


@given(st.integers(1, 0x7F000000))
def test_power_of_two_is_its_definition(bits: int) -> None:
    scale = np.array([bits], np.uint32).view(np.float32)
    rounded = power_of_two_scale(scale)
    assert rounded.dtype == np.float32
    assert float(rounded[0]) == by_definition(float(scale[0]))
    assert same_bits(power_of_two_scale(rounded), rounded)


@pytest.mark.parametrize(
    "scale", [0.0, -0.0, -1.0, np.nan, np.inf, -np.inf, np.nextafter(np.float32(2.0**127), np.float32(np.inf))]
)
def test_power_of_two_refuses(scale: float) -> None:
    with pytest.raises(InvalidArgument, match="finite positive"):
        power_of_two_scale(f32(1.0, scale))


def test_power_of_two_takes_float32_only_in_any_byte_order() -> None:
    with pytest.raises(InvalidArgument, match=r"float64 \[1\].* float32 is accepted"):
        power_of_two_scale(np.ones(1))
    assert power_of_two_scale(np.array([3.0], ">f4")) == f32(4.0)


# --- e4m3fn ---


def e4m3_numbers() -> list[float]:
    """Every finite e4m3fn number from the format's definition: 4 exponent bits, bias 7, 3 mantissa bits; 0x7f is NaN."""
    numbers = []
    for code in range(0x7F):
        exponent, mantissa = code >> 3, code & 7
        numbers.append(mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return numbers


def test_e4m3fn_dtype_is_the_format() -> None:
    assert np.arange(0x7F, dtype=np.uint8).view(E4M3).astype(np.float64).tolist() == e4m3_numbers()


@pytest.mark.parametrize(
    ("amax", "scale"),
    [
        (448.0, 1.0),
        (449.0, 2.0),
        (447.0, 1.0),
        (896.0, 2.0),
        (224.0, 0.5),
        (224.00002, 1.0),
        (0.0, 2.0**-22),  # 1e-4 / 448 = 2.23e-7, between 2^-23 = 1.19e-7 and 2^-22 = 2.38e-7
        (1e-30, 2.0**-22),
        (1e-4, 2.0**-22),
        (2e-4, 2.0**-21),
    ],
)
def test_e4m3fn_scale_by_hand(amax: float, scale: float) -> None:
    x = np.zeros((1, 128), np.float32)
    x[0, 77] = -amax
    values, got = quantise_e4m3fn(x)
    assert got.tolist() == [scale]
    assert values[0, 77] == np.float32(-amax / scale).astype(E4M3)
    assert not values[0, :77].astype(np.float32).any()


def test_e4m3fn_scale_that_is_no_power_of_two() -> None:
    _, scale = quantise_e4m3fn(f32(449.0, 0.0), power_of_two=False)
    assert scale == np.float32(449.0) / np.float32(448.0)
    _, floor = quantise_e4m3fn(f32(0.0), power_of_two=False)
    assert floor == np.float32(1e-4) / np.float32(448.0)


def test_e4m3fn_clamps_what_divides_to_more_than_448(monkeypatch: pytest.MonkeyPatch) -> None:
    amax = np.linspace(1, 2, 1001, dtype=np.float32)
    over = amax / (amax / np.float32(448)) > 448
    assert over.any(), "no amax here needs the clamp"
    values, scale = quantise_e4m3fn(np.stack([amax, -amax], axis=1), power_of_two=False)
    assert np.array_equal(scale, amax / np.float32(448))
    assert (values.astype(np.float32) == [448, -448]).all()
    # ml_dtypes rounds 448.00003 to 448 by itself; a cast to float32 in its place shows what the cast is given.
    monkeypatch.setattr(ml_dtypes, "float8_e4m3fn", np.float32)
    assert quantise_e4m3fn(amax[:, None], power_of_two=False)[0].max() == 448


finite = st.floats(-(2.0**100), 2.0**100, width=32)


@settings(max_examples=200)
@given(st.lists(finite, min_size=1, max_size=8), st.booleans())
def test_e4m3fn_is_the_nearest_number(numbers: list[float], power_of_two: bool) -> None:
    x = f32(*numbers)
    values, scale = quantise_e4m3fn(x, power_of_two=power_of_two)
    amax = max(float(np.float32(1e-4)), float(np.abs(x).max()))
    definition = amax / 448
    if power_of_two:
        assert float(scale) == by_definition(definition)
    else:
        assert float(scale) == pytest.approx(definition, rel=2.0**-24)
    grid = np.array(e4m3_numbers())
    for number, value in zip(x.astype(np.float64) / float(scale), values.astype(np.float64), strict=True):
        distance = np.abs(grid - min(abs(number), 448.0)).min()
        assert abs(abs(value) - min(abs(number), 448.0)) <= distance + (0 if power_of_two else abs(number) * 2.0**-24)
        assert value == 0 or math.copysign(1, value) == math.copysign(1, number)


def test_e4m3fn_ties_to_even() -> None:
    x = f32(448.0, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10)  # 16 | 18 | 20 are neighbours, and so are 0 | 2^-9 | 2^-8
    assert quantise_e4m3fn(x)[0].astype(np.float32).tolist() == [448.0, 16.0, 20.0, 0.0, 2.0**-8]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_groups_have_their_own_scales(dtype: Any) -> None:
    x = np.ones((2, 3, 512), dtype)
    x[1, 2, 128:256] = 900.0 if dtype is np.float32 else 896.0
    values, scale = quantise_e4m3fn(x, group=128)
    assert scale.shape == (2, 3, 4)
    assert scale.dtype == np.float32
    assert values.shape == x.shape
    assert scale[1, 2].tolist() == [2.0**-8, 4.0 if dtype is np.float32 else 2.0, 2.0**-8, 2.0**-8]
    assert quantise_e4m3fn(x)[1].shape == (2, 3)
    assert quantise_e4m3fn(x, group=512)[1].shape == (2, 3, 1)
    assert np.array_equal(quantise_e4m3fn(x)[1], quantise_e4m3fn(x, group=512)[1][..., 0])
    part, part_scale = quantise_e4m3fn(x[..., 128:256])
    assert same_bits(np.ascontiguousarray(values[..., 128:256]), part)
    assert np.array_equal(scale[..., 1], part_scale)


@pytest.mark.parametrize("quantise", [quantise_e4m3fn, quantise_int8])
def test_quantisers_leave_x_alone_and_take_strides(quantise: Any) -> None:
    x = np.random.default_rng(1).standard_normal((4, 6, 128)).astype(np.float32)
    kept = x.copy()
    values, scale = quantise(x.transpose(1, 0, 2)[::2], group=64)
    dense, dense_scale = quantise(np.ascontiguousarray(kept.transpose(1, 0, 2)[::2]), group=64)
    assert same_bits(x, kept)
    assert same_bits(values, dense)
    assert same_bits(scale, dense_scale)
    assert [a.shape for a in quantise(x[:0])] == [(0, 6, 128), (0, 6)]


@pytest.mark.parametrize("quantise", [quantise_e4m3fn, quantise_int8])
def test_quantisers_refuse(quantise: Any) -> None:
    good = np.ones((2, 128), np.float32)
    quantise(good)
    for poison in (np.nan, np.inf, -np.inf):
        bad = good.copy()
        bad[1, 3] = poison
        with pytest.raises(InvalidArgument, match="NaN or infinity"):
            quantise(bad)
    for group in (0, -128, 96, 256):
        with pytest.raises(InvalidArgument, match=f"group={group}"):
            quantise(good, group=group)
    for x in (np.ones((2, 0), np.float32), np.float32(1)):
        with pytest.raises(InvalidArgument, match="last axis of whole groups"):
            quantise(x)
    for dtype in (np.float64, np.int32, E4M3):
        with pytest.raises(InvalidArgument, match="float32 or bfloat16 or float16 is accepted"):
            quantise(good.astype(dtype))


# --- int8 ---


def test_int8_ties_to_even() -> None:
    x = f32(127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5)
    values, scale = quantise_int8(x)
    assert scale == 1.0
    assert values.tolist() == [127, 0, 2, 2, 0, -2, -2, 126]
    half_up = np.floor(x + 0.5)
    assert values.tolist() != half_up.tolist()


def test_int8_divides_by_the_scale_as_rounded() -> None:
    x = f32(1000.0, 998.0)  # 1000 / 127 = 7.874016 is 7.875 in float16
    values, scale = quantise_int8(x, scale_dtype="float16")
    assert scale.dtype == np.float16
    assert float(scale) == 7.875
    assert values.tolist() == [127, 127]
    x = f32(127.0 * 2.0**-24 * 1.49, 0.0)  # the scale rounds down to the smallest float16, and the quotient is 189
    values, scale = quantise_int8(np.stack([x, -x]), scale_dtype="float16")
    assert scale.tolist() == [2.0**-24] * 2
    assert values.tolist() == [[127, 0], [-127, 0]]


@pytest.mark.parametrize(("scale_dtype", "tiny"), [("float32", 1e-45), ("float16", 1e-6)])
def test_int8_of_a_group_whose_scale_is_zero_is_zero(scale_dtype: Any, tiny: float) -> None:
    values, scale = quantise_int8(np.array([[0.0, -0.0], [tiny, -tiny], [1.0, -1.0]], np.float32), scale_dtype=scale_dtype)
    assert values.tolist() == [[0, 0], [0, 0], [127, -127]]
    assert scale[:2].tolist() == [0.0, 0.0]
    assert scale[2] > 0


def test_int8_scale_must_fit() -> None:
    x = f32(127.0 * 65519.0)
    assert quantise_int8(x, scale_dtype="float16")[1] == 65504.0
    with pytest.raises(InvalidArgument, match="scale_dtype='float32'"):
        quantise_int8(f32(127.0 * 65520.0), scale_dtype="float16")
    with pytest.raises(InvalidArgument, match="'bfloat16'"):
        quantise_int8(x, scale_dtype="bfloat16")  # type: ignore[arg-type]


@given(st.lists(finite, min_size=1, max_size=8))
def test_int8_is_within_half_a_step(numbers: list[float]) -> None:
    x = f32(*numbers)
    values, scale = quantise_int8(x)
    assert values.min() >= -127
    error = np.abs(dequantise(values, scale, dtype=np.float64) - x)
    # half a step, and what float32 loses in the two divisions; below 127 subnormals the scale has no digits left
    assert (error <= 0.5 * float(scale) * (1 + 2.0**-15) + 127 * 2.0**-149).all()


# --- dequantise ---


def test_dequantise_by_hand() -> None:
    values = np.array([[1.0, -2.0, 448.0, 2.0**-9]], np.float32).astype(E4M3)
    assert dequantise(values, f32(3.0)).tolist() == [[3.0, -6.0, 1344.0, 3 * 2.0**-9]]
    assert dequantise(values, f32(3.0, 0.5).reshape(1, 2), group=2).tolist() == [[3.0, -6.0, 224.0, 2.0**-10]]
    assert dequantise(np.array([[-127, 3]], np.int8), np.array([0.5], np.float16)).tolist() == [[-63.5, 1.5]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, BF16])
def test_dequantise_dtypes(dtype: Any) -> None:
    values, scale = np.array([[127, 5]], np.int8), f32(1.1)
    exact = np.array([[127, 5]]) * float(scale[0])
    got = dequantise(values, scale, dtype=dtype)
    assert got.dtype == dtype
    rounded = exact.astype(np.float32)
    assert rounded.tolist() != exact.tolist(), "float32 and float64 products would not differ"
    assert same_bits(got, exact if dtype is np.float64 else rounded.astype(dtype))


def test_dequantise_carries_poison_without_spreading_it() -> None:
    values = np.array([[0.0, np.nan], [0.0, 2.0], [0.0, 2.0]], np.float32).astype(E4M3)
    got = dequantise(values, f32(1.0, np.inf, 1.0))
    assert np.isnan(got).tolist() == [[False, True], [True, False], [False, False]]
    assert got[2].tolist() == [0.0, 2.0]


def test_dequantise_refuses() -> None:
    values, scale = np.ones((2, 3, 512), np.int8), np.ones((2, 3, 4), np.float32)
    dequantise(values, scale, group=128)
    for group in (None, 256):
        with pytest.raises(InvalidArgument, match=f"group={group}"):
            dequantise(values, scale, group=group)
    with pytest.raises(InvalidArgument, match="values is float32"):
        dequantise(values.astype(np.float32), scale, group=128)
    with pytest.raises(InvalidArgument, match="scale is float64"):
        dequantise(values, scale.astype(np.float64), group=128)
    with pytest.raises(InvalidArgument, match="dtype is int8"):
        dequantise(values, scale, group=128, dtype=np.int8)


@pytest.mark.parametrize("name", LAYOUTS)
def test_quantise_pack_unpack_dequantise(name: str) -> None:
    spec = layout(name)
    x = np.random.default_rng(2).standard_normal((2, 4, spec.value_dim)).astype(np.float32)
    rope = np.ones((2, 4, 64), BF16) if spec.rope_dim else None
    group = spec.tile if spec.rope_dim else None
    if spec.value_dtype == np.int8:
        values, scale = quantise_int8(x, group=group)
    else:
        values, scale = quantise_e4m3fn(x, group=group, power_of_two=spec.power_of_two)
    read = unpack(name, pack(name, values, scale, rope))
    again = dequantise(read.values, read.scale, group=group)
    assert np.abs(again - x).max() < 0.2
    assert np.corrcoef(again.ravel(), x.ravel())[0, 1] > 0.999


# --- ue8m0 ---


def test_ue8m0_all_codes() -> None:
    codes = np.arange(256, dtype=np.uint8)
    scale = scale_from_ue8m0(codes)
    assert scale.dtype == np.float32
    assert scale[:255].tolist() == [math.ldexp(1.0, code - 127) for code in range(255)]
    assert np.isnan(scale[255])
    assert same_bits(ue8m0_from_scale(scale[:255]), codes[:255])
    assert scale_from_ue8m0(codes.reshape(2, 128)).shape == (2, 128)


@pytest.mark.parametrize("scale", [3.0, 0.0, -2.0, np.nan, np.inf, 2.0**-128, 2.0**-149, 1.0000001])
def test_ue8m0_refuses_what_it_would_have_to_round(scale: float) -> None:
    with pytest.raises(InvalidArgument, match=r"round up with power_of_two_scale"):
        ue8m0_from_scale(f32(1.0, scale))


def test_ue8m0_refuses_other_dtypes() -> None:
    with pytest.raises(InvalidArgument, match=r"float64 .* float32 is accepted"):
        ue8m0_from_scale(np.ones(1))
    with pytest.raises(InvalidArgument, match=r"int64 .* uint8 is accepted"):
        scale_from_ue8m0(np.array([127]))


@given(st.integers(0x00000001, 0x7F000000))
def test_ue8m0_takes_every_rounded_scale_it_can_hold(bits: int) -> None:
    rounded = power_of_two_scale(np.array([bits], np.uint32).view(np.float32))
    if rounded[0] < 2.0**-127:
        with pytest.raises(InvalidArgument):
            ue8m0_from_scale(rounded)
    else:
        assert same_bits(scale_from_ue8m0(ue8m0_from_scale(rounded)), rounded)
