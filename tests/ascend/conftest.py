"""The real torch_npu where there is neither CANN nor an NPU: libraries in CANN's place, built once."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsa_portable.conformance.hosts.ascend import stubs as host


@pytest.fixture(scope="session")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stubs")
    host.build(folder)
    return folder
