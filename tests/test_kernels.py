"""What the suite itself sees of a chip: kernels that the framework's profiler counted."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsa_portable import registry
from dsa_portable.conformance import lists
from dsa_portable.conformance.execute import recording
from dsa_portable.conformance.execute.kernels import Counted, Profiler, Unseen, watcher
from dsa_portable.conformance.execute.worker import Worker

CASE = next(iter(lists.load("smoke").cases))
COPIES = ("Memcpy HtoD (Pageable -> Device)", "Memcpy DtoH (Device -> Pageable)", "CopyHostToDevice")


def of_torch(monkeypatch: pytest.MonkeyPatch, *ran: tuple[str, ...], supported: tuple[str, ...] = ("CPU", "CUDA")) -> Any:
    """A torch whose profiler sees these events of the device, block by block; on the host it always sees one."""
    blocks = iter(ran)
    members: Mapping[str, str] = {name: name for name in ("CPU", "CUDA", "PrivateUse1")}
    tensor = SimpleNamespace(add_=lambda one: tensor, cpu=lambda: tensor)

    @contextmanager
    def profile(activities: list[str]) -> Iterator[Any]:
        assert set(activities) <= set(supported)
        seen = [SimpleNamespace(name=name, device_type="chip") for name in next(blocks)]
        yield SimpleNamespace(events=lambda: [SimpleNamespace(name="aten::add", device_type="host"), *seen])

    profiler = SimpleNamespace(
        ProfilerActivity=SimpleNamespace(__members__=members), supported_activities=lambda: {*supported}, profile=profile
    )
    torch = SimpleNamespace(
        ones=lambda shape, device: tensor, autograd=SimpleNamespace(DeviceType=SimpleNamespace(CPU="host")), profiler=profiler
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "torch.profiler", profiler)
    return torch


def counted(watcher: Profiler | Unseen) -> int | None:
    with watcher.counting() as found:
        pass
    return found.kernels


@pytest.mark.parametrize(("events", "kernels"), [(("score", "Memset (Device)", *COPIES), 2), (COPIES, 0), ((), 0)])
def test_copies_between_host_and_chip_are_no_kernels(
    monkeypatch: pytest.MonkeyPatch, events: tuple[str, ...], kernels: int
) -> None:
    assert counted(Profiler(of_torch(monkeypatch, ("add",), events), "cuda")) == kernels


def test_a_kind_that_torch_has_no_name_for_is_a_registered_device(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = of_torch(monkeypatch, ("add",), ("score",), supported=("CPU", "PrivateUse1"))
    assert counted(Profiler(torch, "npu")) == 1


def test_a_profiler_that_sees_nothing_of_torch_itself_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert counted(Profiler(of_torch(monkeypatch, COPIES), "cuda")) is None


@pytest.mark.parametrize("kind", ["npu", "cpu", "interpreter"])
def test_a_kind_that_the_profiler_does_not_support_is_not_looked_at(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    assert counted(Profiler(of_torch(monkeypatch), kind)) is None


def test_who_looks_depends_on_the_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    of_torch(monkeypatch, ("add",))
    cpu = registry.load("cpu")
    assert isinstance(watcher(cpu, "cpu"), Unseen)
    assert isinstance(watcher(replace(cpu, arrays="torch"), "cuda"), Profiler)


@pytest.mark.parametrize(("kernels", "reached", "profiled"), [(3, True, True), (0, False, True), (None, True, False)])
def test_a_call_in_which_no_kernel_ran_has_not_reached_the_chip(
    tmp_path: Path, kernels: int | None, reached: bool, profiled: bool
) -> None:
    """Whatever the backend's own witness says: a fallback to the host moves that as well."""

    class Looking:
        @contextmanager
        def counting(self) -> Iterator[Counted]:
            yield Counted(kernels)

    worker = Worker(registry.load("cpu"), tmp_path)
    worker.watcher = Looking()  # type: ignore[assignment]
    worker.run(CASE)
    found = recording.load(tmp_path, CASE)
    assert found is not None
    assert (found.status, found.reached, found.profiled) == ("done", reached, profiled)
