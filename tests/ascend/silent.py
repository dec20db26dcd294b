"""`python silent.py FOLDER CASE [OPERATOR]`: a case over the host runtime, where an operator may answer 0 and do nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from dsa_portable import operators, registry
from dsa_portable.conformance.cases.catalogue import CASES
from dsa_portable.conformance.hosts.ascend import aclnn, runtime
from dsa_portable.conformance.judging.judge import judge_call

folder, name, *silent = sys.argv[1:]
runtime.start(Path(folder), "A2")
honest = aclnn._compute


def compute(operator: aclnn.Operator, arguments: list[object]) -> None:
    """As it was, but for the operator that says nothing and does nothing."""
    if not any(operator is aclnn.OPERATORS[each] for each in silent):
        honest(operator, arguments)


aclnn._compute = compute
backend, device = registry.load("ascend"), registry.device("ascend")
case = CASES[name]
call = next(case.steps())
on_device, batch = call.on(backend.put), call.make_batch(backend.put)
returned = getattr(operators, call.operator)(**on_device.arrays, **call.options, batch=batch, backend="ascend")
returned = returned if isinstance(returned, tuple) else (returned,)
outputs = {result: backend.get(array) for result, array in zip(call.request.results, returned, strict=True)}
profile = backend.profile(device, call.operator, case.format, case.phase)
with np.errstate(all="ignore"):
    verdict = judge_call(case, call, outputs, profile)
print(json.dumps([verdict.status, verdict.rule, verdict.reason]))
