"""Why an Ascend backend is not there: each reason is one sentence with its cure, and comes before any kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from dsa_portable import DeviceUnavailable, InvalidArgument, registry
from dsa_portable.backends.ascend import BACKEND, device, schemas
from dsa_portable.conformance.report.schema import ProfileEntry
from dsa_portable.errors import BackendNotImportable
from dsa_portable.profile import WORDS


def npu(*, available: bool = True, name: str = "Ascend910B3") -> Any:
    """What the probe asks of torch.npu."""
    return SimpleNamespace(is_available=lambda: available, device_count=lambda: int(available), get_device_name=lambda _: name)


def sdk(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    operators = SimpleNamespace()
    for operator, text in schemas.GENERATIONS["C"].items():
        setattr(operators, operator, SimpleNamespace(default=SimpleNamespace(_schema=text)))
    torch = SimpleNamespace(npu=npu(**options), ops=SimpleNamespace(npu=operators), __version__="2.13.0")
    monkeypatch.setattr(device, "_sdk", lambda: (torch, SimpleNamespace(__version__="2.13.0")))
    monkeypatch.setattr(device, "_schema", lambda operator: schemas.GENERATIONS["C"].get(operator))
    monkeypatch.setattr(device, "_opapi", lambda: SimpleNamespace(**dict.fromkeys(device.SYMBOLS.values())))


def test_a_chip_that_is_there_is_named_with_its_product(monkeypatch: pytest.MonkeyPatch) -> None:
    sdk(monkeypatch)
    found = device.probe()
    assert (found.kind, found.chip, found.architecture) == ("npu", "Ascend910B3", "A2")
    assert found.versions["schemas"] == "C"


def test_no_npu(monkeypatch: pytest.MonkeyPatch) -> None:
    sdk(monkeypatch, available=False)
    with pytest.raises(DeviceUnavailable, match=r"^torch_npu finds no NPU; check the driver with npu-smi info"):
        device.probe()


def test_a_chip_without_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    sdk(monkeypatch, name="Ascend310P3")
    with pytest.raises(DeviceUnavailable, match=r"^Ascend310P3 has none of the operators, but A3 .*950 .*; use one of them\.$"):
        device.probe()


def test_a_torch_npu_without_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    sdk(monkeypatch)
    monkeypatch.setattr(device, "_schema", lambda operator: None)
    with pytest.raises(DeviceUnavailable, match="torch_npu has no npu_lightning_indexer"):
        device.probe()


def test_a_cann_that_is_too_old_is_told_by_its_symbol(monkeypatch: pytest.MonkeyPatch) -> None:
    sdk(monkeypatch)
    monkeypatch.setattr(device, "_opapi", lambda: SimpleNamespace(aclnnLightningIndexer=0, aclnnQuantLightningIndexer=0))
    with pytest.raises(DeviceUnavailable, match=r"has no aclnnSparseFlashAttention, which npu_sparse_flash_attention calls"):
        device.probe()


@pytest.mark.parametrize("autoload", ["0", "1"])
def test_torch_npu_without_cann_is_explained(autoload: str) -> None:
    """With autoload even `import torch` fails, and the sentence is the same."""
    ask = "try:\n    registry.device('ascend')\nexcept Exception as e:\n    print(type(e).__name__, e)"
    code = f"from dsa_portable import registry\n{ask}"
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith(
        "DeviceUnavailable torch-npu is installed, but CANN is not on this process's library path ("
    ), done
    assert "source its set_env.sh" in done.stdout
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in done.stdout


def test_without_torch_npu_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ModuleNotFoundError("No module named 'torch_npu'")

    monkeypatch.setattr(device, "_sdk", missing)
    registry.device.cache_clear()
    with pytest.raises(BackendNotImportable, match=r"pip install 'dsa-portable\[ascend\]'"):
        registry.device("ascend")


def test_a_scratch_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSA_ASCEND_SCRATCH", "lots")
    with pytest.raises(InvalidArgument, match=r"DSA_ASCEND_SCRATCH is 'lots', but a whole number of bytes is accepted"):
        device.scratch_bytes()


@pytest.mark.parametrize("operator", ["lightning_index", "sparse_attend"])
def test_every_declared_field_cites_a_document_or_says_that_it_is_assumed(operator: str) -> None:
    """What a profile leaves at its default is a promise too."""
    assert BACKEND.profile_sources is not None
    sources = BACKEND.profile_sources(None, operator, "bf16", "prefill")
    unused = {
        "lightning_index": {name for name, (operators, _) in WORDS.items() if "lightning_index" not in operators},
        "sparse_attend": {
            "qk_compute",
            "intermediate",
            "intermediate_exponent",
            "head_sum",
            "finite_max",
            "scale_compute",
            "ties",
        },
    }
    assert set(sources) | unused[operator] == set(vars(device.profile(None, operator, "bf16", "prefill")))
    assert "assumed" in ProfileEntry.model_fields["sources"].description  # type: ignore[operator]
