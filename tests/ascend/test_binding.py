"""What the adapter sends binds to the real torch_npu, and results have the contract's shapes and dtypes. No value is seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsa_portable.backends.ascend import schemas

from .test_adapter import ON_950, SAMPLE

BOUND = Path(__file__).with_name("bound.py")


@pytest.mark.parametrize(("product", "cases"), [("A2", SAMPLE), ("950", ON_950)])
def test_the_adapter_s_calls_bind_to_the_real_torch_npu(stubs: Path, product: str, cases: tuple[str, ...]) -> None:
    command = [sys.executable, str(BOUND), str(stubs), product, *cases]
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == set(cases)
    for case, (expected, results, called) in found.items():
        assert results == expected, case
        assert called, case
    if product == "A2":
        assert {operator for _, _, called in found.values() for operator in called} == set(schemas.OPERATORS)
