"""`python bound.py FOLDER PRODUCT CASE...`: the adapter over the real torch_npu's meta kernels; what it returned, as JSON."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from dsa_portable.conformance.hosts.ascend import stubs

stubs.load(Path(sys.argv[1]))

import torch  # noqa: E402
import torch_npu  # noqa: E402, F401

from dsa_portable.arrays import from_numpy  # noqa: E402
from dsa_portable.backends.ascend import device, vendor  # noqa: E402
from dsa_portable.conformance.cases.catalogue import CASES  # noqa: E402
from dsa_portable.operators import REQUESTS  # noqa: E402

called: list[str] = []
honest = vendor.call


def recorded(operator: str, **arguments: Any) -> Any:
    called.append(operator)
    return honest(operator, **arguments)


def bound(name: str) -> Any:
    """[[dtype, shape], ...] expected and found, and the vendor operators that were called."""
    call = next(CASES[name].steps())
    on_meta = call.on(lambda array: from_numpy(array.copy()).to("meta"))
    batch = call.make_batch(lambda array: from_numpy(array.copy()).to("meta"))
    arguments = {**on_meta.arrays, **call.options, "batch": batch}
    arguments.pop("out", None)
    request = REQUESTS[call.operator].checked(**arguments)
    called.clear()
    found = getattr(importlib.import_module(f"dsa_portable.backends.ascend.{call.operator}"), call.operator)(request)
    found = found if isinstance(found, tuple) else (found,)
    expected = [[dtype, list(shape)] for dtype, shape in call.request.results.values()]
    return expected, [[str(x.dtype).removeprefix("torch."), list(x.shape)] for x in found], sorted(set(called))


vendor.call = recorded
device.product = lambda: sys.argv[2]
print(json.dumps({name: bound(name) for name in sys.argv[3:]}))
assert torch.npu.device_count() == 0
