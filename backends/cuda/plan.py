"""The host's part of a call, decided once: a call that differs from an earlier one in addresses alone is replayed.

What is launched depends on dtypes, shapes, alignments, options, the batch's integers and the environment, which make a plan's
key; values on the device decide nothing. A server's decode steps are such calls.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch

from dsa_portable.backends.cuda import configurations
from dsa_portable.backends.cuda.launch import Submitted, Tape, taped
from dsa_portable.backends.cuda.rows import VARIABLE, deliver, results_of
from dsa_portable.batch import Batch
from dsa_portable.contract import Request

Operate = Callable[[Any, torch.Tensor, list[torch.Tensor]], None]

VARIABLES = (VARIABLE, configurations.PARTS, configurations.KERNELS)
# Prefill has new shapes all the time; the oldest plan makes room.
_MOST_PLANS = 256
# Scratch arrays begin where torch would let them begin.
_ALIGNMENT = 512


class _Step(NamedTuple):
    """A launch: `places` says which arguments are addresses, of which array and how far behind its first byte."""

    program: Any
    grid: tuple[int, ...]
    arguments: list[Any]
    places: tuple[tuple[int, int, int], ...]


class _Plan(NamedTuple):
    steps: tuple[_Step, ...]
    scratch_bytes: int


_plans: OrderedDict[tuple[Any, ...], _Plan] = OrderedDict()


def execute(request: Request, q: torch.Tensor, operate: Operate) -> Any:
    """operate(request, q, results) and the operator's return value; q's device is the current one."""
    key, arrays = _signature(request)
    plan = _plans.get(key) if key else None
    results = results_of(request, q)
    if plan is not None:
        try:
            _replay(plan, q, [*arrays, *results])
            return deliver(request, results)
        except torch.cuda.OutOfMemoryError:
            pass  # said in full below
    with taped() as tape:
        operate(request, q, results)
    if key and (plan := _planned(tape, [*arrays, *results])):
        _plans[key] = plan
        if len(_plans) > _MOST_PLANS:
            _plans.popitem(last=False)
    return deliver(request, results)


def _signature(request: Request) -> tuple[tuple[Any, ...] | None, list[torch.Tensor]]:
    """(key, arrays that are given); no key where an array is elsewhere or has to be copied first."""
    device = request.first.device
    key: list[Any] = [type(request), device, *map(os.environ.get, VARIABLES)]
    values: list[Any] = []
    for value in vars(request).values():
        if isinstance(value, Batch):
            arrays, integers = value.flatten()
            key += integers
            values += arrays
        elif isinstance(value, tuple):
            values += value
        elif not isinstance(value, Mapping):
            values.append(value)
    given = []
    for value in values:
        if not isinstance(value, torch.Tensor):
            key.append(value)
        elif value.device == device and value.is_contiguous() and value.is_cuda:
            key += (value.dtype, value.shape, value.data_ptr() % 16)
            given.append(value)
        else:
            return None, []
    return tuple(key), given


def _planned(tape: Tape, arrays: list[torch.Tensor]) -> _Plan | None:
    """The plan of a call that ran, None where an argument's array is not known for sure."""
    begins, size = [], 0
    for array in tape.scratch:
        begins.append(size)
        size += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    steps = []
    for submitted in tape.submitted:
        step = _step(submitted, arrays, tape.scratch, begins)
        if step is None:
            return None
        steps.append(step)
    return _Plan(tuple(steps), size)


def _step(submitted: Submitted, arrays: list[torch.Tensor], scratch: list[torch.Tensor], begins: list[int]) -> _Step | None:
    places = []
    for i, argument in enumerate(submitted.arguments):
        if isinstance(argument, torch.Tensor):
            address = argument.data_ptr()
            found = {(j, address - a.data_ptr()) for j, a in enumerate(arrays) if 0 <= address - a.data_ptr() < a.nbytes}
            found |= {
                (len(arrays), begin + address - a.data_ptr())
                for a, begin in zip(scratch, begins, strict=True)
                if 0 <= address - a.data_ptr() < a.nbytes
            }
            if len(found) != 1:
                return None
            places.append((i, *found.pop()))
    arguments = [None if isinstance(argument, torch.Tensor) else argument for argument in submitted.arguments]
    return _Step(submitted.program, submitted.grid, arguments, tuple(places)) if submitted.program else None


@cache
def _triton() -> tuple[Any, Any]:
    return import_module("triton").knobs.runtime, import_module("triton.runtime.driver").driver.active


def _replay(plan: _Plan, q: torch.Tensor, arrays: list[torch.Tensor]) -> None:
    runtime, driver = _triton()
    scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8, device=q.device)
    addresses = [array.data_ptr() for array in (*arrays, scratch)]
    stream = driver.get_current_stream(q.device.index)
    # Triton would call a chain of no hooks all the same.
    enter, leave = (
        hook if getattr(hook, "calls", hook) else None for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook)
    )
    for program, grid, arguments, places in plan.steps:
        filled = arguments.copy()
        for i, array, offset in places:
            filled[i] = addresses[array] + offset
        metadata = program.launch_metadata(grid, stream, *filled) if enter or leave else None
        program.run(*grid, stream, program.function, program.packed_metadata, metadata, enter, leave, *filled)
