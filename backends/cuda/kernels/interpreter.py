"""A kernel that tells whether Triton's interpreter knows what a bfloat16 number is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _square(number, result):
    tl.store(result, tl.load(number) * tl.load(number))


def multiplies_numbers() -> bool:
    """1.5 * 1.5 = 2.25, where the plain interpreter multiplies the bits."""
    number = torch.tensor([1.5], dtype=torch.bfloat16)
    result = torch.zeros_like(number)
    _square[(1,)](number, result)
    return bool(result.item() == 2.25)
