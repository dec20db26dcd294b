"""Which calls are replayed, and with whose addresses; that a replay computes what a first call does is in test_device.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsa_portable import Batch
from dsa_portable.backends.cuda import plan
from dsa_portable.backends.cuda.launch import Submitted, Tape
from dsa_portable.operators import AttendRequest

PROGRAM = object()


def planned(*arguments: Any, arrays: list[torch.Tensor], scratch: tuple[torch.Tensor, ...] = ()) -> Any:
    """The plan of one launch."""
    return plan._planned(Tape([Submitted(PROGRAM, (1, 1, 1), arguments)], list(scratch)), arrays)


def test_an_argument_is_its_arrays_address_and_how_far_behind() -> None:
    q, kv, first, second = (torch.empty(100) for _ in range(4))
    found = planned(7, kv[3:], None, q, second[2:], 0.5, arrays=[q, kv], scratch=(first, second))
    assert found.steps == ((PROGRAM, (1, 1, 1), [7, None, None, None, None, 0.5], ((1, 1, 12), (3, 0, 0), (4, 2, 512 + 8))),)
    assert found.scratch_bytes == 1024


def test_an_array_that_is_not_known_for_sure_is_not_planned() -> None:
    q = torch.empty(100)
    assert planned(q, arrays=[q]) is not None
    assert planned(q.clone(), arrays=[q]) is None, "a copy lies elsewhere in the next call"
    assert planned(q[50:], arrays=[q, q[50:]]) is None, "one address of two arrays, which may be two in the next call"


def test_the_interpreter_has_no_programs_to_replay() -> None:
    q = torch.empty(100)
    assert plan._planned(Tape([Submitted(None, (1, 1, 1), (q,))], []), [q]) is None


class Device(torch.Tensor):
    """A host tensor that says that it lies on a device."""

    is_cuda = True  # type: ignore[assignment]


def request(**changes: Any) -> Any:
    """A request of sparse_attend over such tensors."""
    arrays = {
        "q": torch.zeros(2, 4, 576, dtype=torch.bfloat16),
        "kv": torch.zeros(64, 576, dtype=torch.bfloat16),
        "indices": torch.zeros(2, 8, dtype=torch.int32),
    }
    arrays |= {name: value for name, value in changes.items() if name in arrays}
    batch = Batch.of([1, 1], [32, 32], causal=changes.get("causal", True))
    tensors, integers = batch.flatten()
    batch = Batch.unflatten([None if a is None else torch.from_numpy(a).as_subclass(Device) for a in tensors], integers)
    wrapped = {name: value.as_subclass(Device) for name, value in arrays.items()}
    sink = changes.get("attn_sink")
    return AttendRequest.checked(
        **wrapped,
        softmax_scale=changes.get("softmax_scale", 0.1),
        attn_sink=sink if sink is None else sink.as_subclass(Device),
        batch=batch,
        return_lse=changes.get("return_lse", True),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"q": torch.zeros(2, 8, 576, dtype=torch.bfloat16)},
        {"kv": torch.zeros(65, 576, dtype=torch.bfloat16)},
        {"q": torch.zeros(2 * 4 * 576 + 1, dtype=torch.bfloat16)[1:].view(2, 4, 576)},
        {"softmax_scale": 0.2},
        {"return_lse": False},
        {"causal": False},
        {"attn_sink": torch.zeros(4)},
    ],
    ids=["shape", "keys", "alignment", "scale", "results", "batch", "option"],
)
def test_what_decides_a_launch_makes_another_key(changes: dict[str, Any]) -> None:
    key, arrays = plan._signature(request())
    assert key is not None
    assert key == plan._signature(request())[0], "addresses alone make no other plan"
    assert len(arrays) == 3 + 3
    assert plan._signature(request(**changes))[0] != key


@pytest.mark.parametrize("name", plan.VARIABLES)
def test_the_environment_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    key = plan._signature(request())[0]
    monkeypatch.setenv(name, "portable" if name == "DSA_CUDA_KERNELS" else "3")
    assert plan._signature(request())[0] != key


def test_what_has_to_be_copied_first_has_no_key() -> None:
    assert plan._signature(request(kv=torch.zeros(64, 1152, dtype=torch.bfloat16)[:, :576]))[0] is None
