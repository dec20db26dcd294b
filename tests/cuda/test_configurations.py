"""DSA_CUDA_KERNELS: which attention runs where, and one sentence where what was asked for cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton

from dsa_portable import registry, sparse_attend
from dsa_portable.backends.cuda import configurations
from dsa_portable.conformance.hosts import triton as host
from dsa_portable.errors import DeviceUnavailable, InvalidArgument, Unsupported

interpreted = pytest.mark.skipif(not host.requested(), reason="there is a chip in place of the interpreter")


def chosen(architecture: str = "sm_90", dtype: str = "bfloat16", version: str = "3.6.0") -> bool:
    return configurations.hopper(architecture, dtype, version, packed=False) is not None


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("version", ["3.6.0", "3.7.1"])
def test_hopper_runs_every_16_bit_attention_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, dtype: str, version: str
) -> None:
    monkeypatch.delenv(configurations.KERNELS, raising=False)
    assert chosen(dtype=dtype, version=version)
    monkeypatch.setenv(configurations.KERNELS, "hopper")
    assert chosen(dtype=dtype, version=version)
    monkeypatch.setenv(configurations.KERNELS, "portable")
    assert not chosen(dtype=dtype, version=version)


@pytest.mark.parametrize(
    ("architecture", "dtype", "version", "why"),
    [
        ("sm_80", "bfloat16", "3.6.0", "the device is sm_80, and they are for sm_90"),
        ("sm_100", "bfloat16", "3.6.0", "the device is sm_100, and they are for sm_90"),
        ("sm_90", "bfloat16", "3.5.1", "triton is 3.5.1, and they were written for the Gluon of 3.6, 3.7"),
        ("sm_90", "bfloat16", "3.10.0", "triton is 3.10.0, and they were written for the Gluon of 3.6, 3.7"),
        ("sm_90", "float32", "3.6.0", "q is float32, and they take bfloat16, float16"),
    ],
)
def test_what_hopper_kernels_cannot_run_is_portable_or_refused(
    monkeypatch: pytest.MonkeyPatch, architecture: str, dtype: str, version: str, why: str
) -> None:
    monkeypatch.delenv(configurations.KERNELS, raising=False)
    assert not chosen(architecture, dtype, version)
    monkeypatch.setenv(configurations.KERNELS, "hopper")
    with pytest.raises(Unsupported) as refused:
        chosen(architecture, dtype, version)
    assert str(refused.value) == f"sparse_attend: DSA_CUDA_KERNELS is 'hopper', but {why}; unset it or set 'portable'."


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(configurations.KERNELS, "fast")
    with pytest.raises(InvalidArgument, match="DSA_CUDA_KERNELS is 'fast', but 'portable' and 'hopper' are accepted"):
        chosen()


@interpreted
def test_asked_for_where_there_is_no_hopper_the_backend_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(configurations.KERNELS, "hopper")
    with pytest.raises(DeviceUnavailable, match="DSA_CUDA_KERNELS is 'hopper', but the device is interpreter"):
        registry.load("cuda").probe()
    assert "f32" not in registry.load("cuda").capabilities(None)["sparse_attend"]["format"]


@interpreted
def test_a_call_is_refused_and_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    q, kv = torch.zeros(1, 16, 576, dtype=torch.float16), torch.zeros(32, 576, dtype=torch.float16)
    indices = torch.from_numpy(np.arange(32, dtype=np.int32)[None])
    assert sparse_attend(q, kv, indices, softmax_scale=0.1, backend="cuda").shape == (1, 16, 512)
    monkeypatch.setenv(configurations.KERNELS, "hopper")
    with pytest.raises(Unsupported, match="the device is interpreter, and they are for sm_90"):
        sparse_attend(q, kv, indices, softmax_scale=0.1, backend="cuda")


def test_this_tritons_gluon_is_one_of_those() -> None:
    assert triton.__version__.rpartition(".")[0] in configurations.GLUON
