"""Kernels that llvmlite compiles for the processor at hand; no compiler on the user's machine, no lock of Python's held."""
