"""The CUDA backend where there is no GPU: Triton's interpreter, repaired, before any kernel is defined."""

from __future__ import annotations

from dsa_portable.conformance.hosts import triton

triton.prepare()
