"""Quantisers and the named packed caches: what every port gets wrong, once and in NumPy. NumPy in, NumPy out."""

from dsa_portable.formats.caches import LAYOUTS, CacheLayout, CachePart, Unpacked, check_cache, layout, pack, unpack
from dsa_portable.formats.quantise import (
    dequantise,
    power_of_two_scale,
    quantise_e4m3fn,
    quantise_int8,
    scale_from_ue8m0,
    ue8m0_from_scale,
)

__all__ = [
    "LAYOUTS",
    "CacheLayout",
    "CachePart",
    "Unpacked",
    "check_cache",
    "dequantise",
    "layout",
    "pack",
    "power_of_two_scale",
    "quantise_e4m3fn",
    "quantise_int8",
    "scale_from_ue8m0",
    "ue8m0_from_scale",
    "unpack",
]
