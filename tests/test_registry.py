"""Selection, the kinds of "no", and capabilities both ways, on fake plug-ins that are installed as real distributions."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import dsa_portable
from dsa_portable import (
    BackendExited,
    BackendNotImportable,
    Batch,
    DeviceUnavailable,
    InvalidArgument,
    UnknownBackend,
    Unsupported,
    asking,
    index_scores,
    index_select,
    lightning_index,
    registry,
    sparse_attend,
    use_backend,
)
from dsa_portable.formats import LAYOUTS
from dsa_portable.operators import FEATURES

ROOT = Path(__file__).resolve().parents[1]
Q, K, W = np.zeros((2, 1, 4), np.float32), np.zeros((3, 4), np.float32), np.zeros((2, 1), np.float32)

# A backend whose every result is filled with `answer`.
PLUGIN = """
import numpy as np
from dsa_portable.backend import Backend, Device
from dsa_portable.contract import ANY
from dsa_portable.operators import FEATURES
from dsa_portable.profile import Profile

CAPABILITIES = {{operator: {{f.name: ANY for f in features}} for operator, features in FEATURES.items()}}

def probe():
    return Device("cpu", "fake chip", "fake driver")

def answer(request):
    arrays = [np.full(shape, {answer}, dtype) for dtype, shape in request.results.values()]
    return tuple(arrays) if len(arrays) > 1 else arrays[0]

fields = dict(
    name="{name}", version="1", devices=("cpu",), arrays="numpy", install="pip install fake-sdk", probe=probe,
    operators={{operator: "{module}:answer" for operator in FEATURES}},
    capabilities=lambda device: CAPABILITIES, profile=lambda *_: Profile(), put=np.array, get=np.array, auto=False,
)
{changes}
BACKEND = Backend(**fields)
"""

Install = Callable[..., str]


def forget() -> None:
    for cached in (registry._entry_points, registry.load, registry.device, registry.operator, asking.ask):
        cached.cache_clear()
    importlib.invalidate_caches()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution `fake-NAME` with one entry point and one module; returns the module's name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv(registry.VARIABLE, raising=False)
    before = set(sys.modules)

    def write(
        name: str, changes: str = "", *, answer: int = 0, package: str = "", entry: str = "", source: str | None = None
    ) -> str:
        package = package or f"fake-{name}"
        module = package.replace("-", "_")
        text = PLUGIN.format(name=name, module=module, answer=answer, changes=changes) if source is None else source
        (tmp_path / f"{module}.py").write_text(text)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{name} = {entry or f'{module}:BACKEND'}\n")
        forget()
        return module

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("fake_"):
            del sys.modules[name]
    forget()


def call(**options: Any) -> int:
    """Whose answer it is; the real one of these zeros is 0."""
    return int(lightning_index(Q, K, W, topk=1, **options)[0, 0])


def status(name: str) -> registry.Status:
    return next(s for s in dsa_portable.list_backends() if s.name == name)


# --- selection -------------------------------------------------------------------------------------------------------------


def test_argument_over_context_over_variable_over_auto(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    for answer, name in enumerate(("argument", "context", "variable"), start=1):
        install(name, answer=answer)
    assert call() == 0
    assert registry.requested() is None
    monkeypatch.setenv(registry.VARIABLE, "variable")
    assert call() == 3
    with use_backend("context"):
        assert call() == 2
        assert call(backend="argument") == 1
        with use_backend("argument"):
            assert call() == 1
        assert call() == 2
    assert call() == 3
    assert call(backend="cpu") == 0


def test_an_empty_variable_asks_for_nothing(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("variable", answer=3)
    monkeypatch.setenv(registry.VARIABLE, "")
    assert call() == 0
    with pytest.raises(UnknownBackend, match="backend '' is not registered"):
        call(backend="")


def test_use_backend_ends_with_its_block_and_its_thread(install: Install) -> None:
    install("context", answer=2)
    seen: list[int] = []
    with use_backend("context"):
        thread = threading.Thread(target=lambda: seen.append(call()))
        thread.start()
        thread.join()
        seen.append(call())
    assert seen == [0, 2]
    assert call() == 0
    with pytest.raises(UnknownBackend), use_backend("context"):
        call(backend="typo")
    assert call() == 0


def test_the_variable_in_a_process_of_its_own(install: Install, tmp_path: Path) -> None:
    install("variable", answer=3)
    code = (
        "import numpy, dsa_portable\n"
        "z = numpy.zeros((1, 1, 4), 'f')\n"
        "print(dsa_portable.lightning_index(z, z[0], z[0, :, :1], topk=1))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", registry.VARIABLE: "variable"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[3]]"


def test_two_that_claim_the_device(install: Install) -> None:
    install("rival", 'fields["auto"] = True', answer=5)
    with pytest.raises(
        InvalidArgument, match="backends cpu and rival both claim arrays on cpu; name one with backend= or DSA_B"
    ):
        call()
    assert call(backend="rival") == 5
    assert call(backend="cpu") == 0


def test_only_by_name_without_auto(install: Install) -> None:
    install("generic", 'fields["devices"] = ("cpu", "dsp")', answer=5)
    with pytest.raises(UnknownBackend, match=r"none of .*, generic.* claims arrays on dsp; name one or move them"):
        registry.select(None, "dsp")
    assert registry.select("generic", "dsp").name == "generic"


def test_auto_goes_where_the_arrays_are(install: Install) -> None:
    install("dsp", 'fields |= {"auto": True, "devices": ("dsp",)}')
    assert registry.select(None, "dsp").name == "dsp"
    assert registry.select(None, "cpu").name == "cpu"
    with pytest.raises(InvalidArgument, match="q is on cpu, but backend 'dsp' takes arrays on dsp; move them"):
        call(backend="dsp")


# --- three kinds of no -----------------------------------------------------------------------------------------------------


def test_unknown(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("known")
    assert {"cpu", "known"} <= set(registry.names())
    words = f"backend 'typo' is not registered, but {', '.join(registry.names())} are; install or pick one"
    with pytest.raises(UnknownBackend, match=words):
        call(backend="typo")
    with pytest.raises(UnknownBackend, match=words), use_backend("typo"):
        pass
    monkeypatch.setenv(registry.VARIABLE, "typo")
    with pytest.raises(UnknownBackend, match=words):
        call()


def test_a_package_that_fails_to_import(install: Install) -> None:
    install("broken", source="import fake_missing_sdk")
    with pytest.raises(BackendNotImportable) as caught:
        call(backend="broken")
    assert str(caught.value) == (
        "backend 'broken' cannot be imported (ModuleNotFoundError: No module named 'fake_missing_sdk'); "
        "run: pip install --force-reinstall fake-broken"
    )
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
    # It stops nobody else, and it is listed with its reason.
    assert call() == 0
    assert status("broken").backend is None
    assert "fake_missing_sdk" in status("broken").reason
    assert status("cpu").available


def test_where_nobody_is_left_the_broken_package_is_named(install: Install) -> None:
    install("broken", source="1 / 0")
    with pytest.raises(UnknownBackend, match=r"claims arrays on dsp .*ZeroDivisionError.*--force-reinstall fake-broken"):
        registry.select(None, "dsp")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("BACKEND = None", "fake_odd:BACKEND of fake-odd is no Backend named 'odd'; mend its entry point"),
        (PLUGIN.format(name="other", module="m", answer=0, changes=""), "is no Backend named 'odd'"),
        ("", "AttributeError"),
    ],
    ids=["no Backend", "another name", "no attribute"],
)
def test_an_entry_point_that_lies(install: Install, source: str, words: str) -> None:
    install("odd", source=source)
    with pytest.raises(BackendNotImportable, match=words):
        registry.load("odd")
    assert call() == 0


@pytest.mark.parametrize(
    ("version", "fits"), [("1.0", True), ("1.1", True), ("2.0", False), ("0.9", False), ("1.2", False), ("1", False)]
)
def test_contract_versions(install: Install, version: str, fits: bool) -> None:
    install("versioned", f'fields["contract"] = "{version}"', answer=4)
    if fits:
        assert call(backend="versioned") == 4
        return
    words = f"'versioned' was written for contract {version}, but this is 1.1; install versions that agree"
    with pytest.raises(BackendNotImportable, match=re.escape(words)):
        call(backend="versioned")


def test_two_packages_of_one_name(install: Install) -> None:
    install("twin", package="fake-one")
    install("twin", package="fake-two")
    with pytest.raises(
        BackendNotImportable, match="'twin' is registered as both fake_one:BACKEND and fake_two:BACKEND; uninstall"
    ):
        call(backend="twin")
    assert registry.names().count("twin") == 1
    assert call() == 0


def test_one_entry_point_that_is_reported_twice_is_one_backend(install: Install) -> None:
    install("twin", package="fake-one", answer=6)
    install("twin", package="fake-two", entry="fake_one:BACKEND")
    assert call(backend="twin") == 6


def test_a_probe_without_its_sdk(install: Install) -> None:
    install("sdk", "def probe():\n    import fake_missing_sdk\nfields['probe'] = probe")
    with pytest.raises(BackendNotImportable) as caught:
        call(backend="sdk")
    assert str(caught.value).endswith("No module named 'fake_missing_sdk'); run: pip install fake-sdk")
    assert isinstance(caught.value.__cause__, ImportError)
    found = status("sdk")
    assert found.backend is not None
    assert (found.device, found.available) == (None, False)
    assert found.reason == str(caught.value)


def test_a_probe_without_a_device(install: Install) -> None:
    reason = "no NPU is visible; set VISIBLE_DEVICES."
    install(
        "device",
        "from dsa_portable import DeviceUnavailable\n"
        f"def probe():\n    raise DeviceUnavailable({reason!r})\n"
        "fields['probe'] = probe",
    )
    with pytest.raises(DeviceUnavailable) as caught:
        call(backend="device")
    assert str(caught.value) == status("device").reason == reason


@pytest.mark.parametrize("error", ["OSError('libdriver.so')", "RuntimeError('driver too old')", "KeyError('x')"])
def test_a_probe_that_fails(install: Install, error: str) -> None:
    install("probe", f"def probe():\n    raise {error}\nfields['probe'] = probe")
    with pytest.raises(DeviceUnavailable) as caught:
        call(backend="probe")
    assert str(caught.value) == f"backend 'probe' failed its probe ({error}); check driver and device."
    assert repr(caught.value.__cause__) == error


def test_a_probe_is_asked_until_it_finds_a_device_and_then_no_more(install: Install) -> None:
    module = install(
        "late",
        "asked = []\ndef probe():\n    asked.append(1)\n    if len(asked) == 1:\n        raise OSError\n"
        "    return Device('cpu', 'fake', 'fake')\nfields['probe'] = probe",
        answer=8,
    )
    with pytest.raises(DeviceUnavailable):
        call(backend="late")
    assert [call(backend="late"), call(backend="late")] == [8, 8]
    assert len(sys.modules[module].asked) == 2


@pytest.mark.parametrize("target", ["fake_missing_sdk:answer", "{module}:missing"])
def test_an_operator_that_cannot_be_imported(install: Install, target: str) -> None:
    install("lost", f"fields['operators'] = {{'lightning_index': '{target.format(module='fake_lost')}'}}")
    with pytest.raises(BackendNotImportable, match=r"'lost' cannot be imported \(.*\); run: pip install fake-sdk$") as caught:
        call(backend="lost")
    assert caught.value.__cause__ is not None


def test_an_operator_that_is_not_offered(install: Install) -> None:
    install("half", "del fields['operators']['sparse_attend']", answer=1)
    assert call(backend="half") == 1
    with pytest.raises(Unsupported, match="backend 'half' does not offer sparse_attend") as caught:
        sparse_attend(Q, K, np.zeros((2, 1), np.int32), softmax_scale=1.0, value_dim=2, backend="half")
    assert caught.value.capability == "sparse_attend"


# --- capabilities, both ways -----------------------------------------------------------------------------------------------

PAGED: dict[str, Any] = {"batch": Batch.of([2], [3], block_table=np.zeros((1, 1), np.int32), page_size=4)}
BOUNDS = np.zeros(2, np.int32)
CACHE, KV_CACHE = "idx_fp8_132_interleaved", "v32_fp8_656_nsr"
INDEX: dict[str, Any] = {"q": Q, "k": K, "weights": W, "topk": 2}
ATTEND: dict[str, Any] = {"q": Q, "kv": K, "indices": np.zeros((2, 2), np.int32), "softmax_scale": 0.5, "value_dim": 2}
# A call that asks for the feature, for every feature that a call can ask for.
ASKS: dict[str, dict[str, dict[str, Any]]] = {
    "lightning_index": {
        **{name: {} for name in ("format", "heads", "head_dim", "topk", "flat", "unpacked")},
        "page_size": {**PAGED, "k": np.zeros((1, 4, 4), np.float32)},
        "ragged": {"batch": Batch.of([1, 1], [1, 2])},
        "out": {"out": np.zeros((2, 2), np.int32)},
        "k_layout": {
            "q": np.zeros((2, 1, 128), ml_dtypes.float8_e4m3fn),
            "k": np.zeros((3, 132), np.uint8),
            "k_layout": CACHE,
        },
        "unsorted": {"sorted": False},
        "return_scores": {"return_scores": True},
        "key_range": {"batch": Batch.of([2], [3], key_start=BOUNDS, key_end=BOUNDS)},
        "non_causal": {"batch": Batch.of([2], [3], causal=False)},
    },
    "sparse_attend": {
        **{name: {} for name in ("format", "heads", "dims", "topk", "flat")},
        "page_size": {**PAGED, "kv": np.zeros((1, 4, 4), np.float32)},
        "ragged": {"batch": Batch.of([1, 1], [1, 2])},
        "out": {"out": np.zeros((2, 1, 2), np.float32)},
        "return_lse": {"return_lse": True},
        "attn_sink": {"attn_sink": np.zeros(1, np.float32)},
        "topk_length": {"topk_length": BOUNDS},
    },
}
_PARTS = ("key_range", "non_causal", "ragged", "format")
ASKS["index_scores"] = {
    **{
        name: ASKS["lightning_index"][name]
        for name in (*_PARTS, "heads", "head_dim", "flat", "page_size", "unpacked", "k_layout")
    },
    "out": {"out": np.zeros((2, 3), np.float32)},
}
ASKS["index_select"] = {
    **{name: ASKS["lightning_index"][name] for name in (*_PARTS, "topk", "unsorted", "out")},
    "ragged": {"batch": Batch.of([1, 1], [3, 2])},
}
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lightning_index": (lightning_index, INDEX),
    "sparse_attend": (sparse_attend, ATTEND),
    "index_scores": (index_scores, {name: INDEX[name] for name in ("q", "k", "weights")}),
    "index_select": (index_select, {"scores": np.zeros((2, 3), np.float32), "topk": 2}),
}


def test_every_feature_of_a_call_is_asked_for_below() -> None:
    for operator, features in FEATURES.items():
        assert set(ASKS[operator]) == {f.name for f in features if f.in_call}


@pytest.mark.parametrize(("operator", "feature"), [(o, f) for o, asks in ASKS.items() for f in asks])
def test_declared_works_and_undeclared_is_unsupported(install: Install, operator: str, feature: str) -> None:
    """And what is refused is refused before the backend's operator is even imported."""
    install("all")
    install(
        "less",
        f"CAPABILITIES = {{o: dict(c) for o, c in CAPABILITIES.items()}}\nCAPABILITIES['{operator}']['{feature}'] = ()\n"
        f"fields['operators'] = {{'{operator}': 'fake_missing_sdk:answer'}}",
    )
    function, arguments = CALLS[operator]
    asked = {**arguments, **ASKS[operator][feature]}
    function(**asked, backend="all")
    with pytest.raises(Unsupported) as caught:
        function(**asked, backend="less")
    assert caught.value.capability == feature
    for words in ("backend 'less' does not offer", f"it does not declare '{feature}'", "change the call or the backend"):
        assert words in str(caught.value)


def test_a_value_that_is_not_offered_is_named(install: Install) -> None:
    install("narrow", "CAPABILITIES['lightning_index'] = {**CAPABILITIES['lightning_index'], 'heads': (64, 32)}")
    with pytest.raises(Unsupported, match=r"heads = 1 \(index heads\) for lightning_index: it offers \(64, 32\);"):
        call(backend="narrow")


def test_a_data_feature_is_no_ones_business_in_a_call(install: Install) -> None:
    install(
        "unique",
        "attend = CAPABILITIES['sparse_attend'] = {**CAPABILITIES['sparse_attend']}\ndel attend['repeated_indices']",
    )
    assert sparse_attend(**ATTEND, backend="unique").shape == (2, 1, 2)


def test_the_asked_layouts_exist() -> None:
    assert {CACHE, KV_CACHE} <= set(LAYOUTS)


# --- listing ---------------------------------------------------------------------------------------------------------------


def test_names_and_statuses(install: Install) -> None:
    module = install("listed", answer=1)
    assert {"cpu", "listed"} <= set(registry.names())
    assert module not in sys.modules, "asking for names imports nothing"
    assert [s.name for s in dsa_portable.list_backends()] == registry.names() == sorted(registry.names())
    found = status("listed")
    assert found.available
    assert found.device is not None
    assert (found.device.chip, found.reason) == ("fake chip", "")


# --- a backend that ends the process: with 0, nothing would tell of it ---

LEFT = "backend 'gone' called sys.exit(0), which it must not; tell its authors."
EXIT = "def leave(*arguments):\n    raise SystemExit(0)\n"


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        ("raise SystemExit(0)", BackendNotImportable, "'gone' cannot be imported (SystemExit: 0); run: pip install"),
        (f"{EXIT}fields['probe'] = leave", DeviceUnavailable, "'gone' failed its probe (SystemExit(0)); check driver"),
        (f"{EXIT}fields['capabilities'] = leave", BackendExited, LEFT),
        (f"{EXIT}def answer(request):\n    leave()", BackendExited, LEFT),
    ],
    ids=["on import", "in the probe", "in the capabilities", "in an operator"],
)
def test_a_backend_does_not_end_the_callers_process(install: Install, body: str, error: type[Exception], words: str) -> None:
    install("gone", body)
    with pytest.raises(error, match=re.escape(words)):
        call(backend="gone")
    assert {found.name for found in registry.list_backends()} >= {"gone", "cpu"}


# --- what nobody named -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("misdeed", ["import os; os._exit(0)", "import sys; sys.exit(0)", "import os; os.kill(os.getpid(), 9)"])
def test_a_plug_in_that_nobody_named_does_nothing_to_the_caller(install: Install, misdeed: str) -> None:
    install("rude", source=misdeed)
    assert call() == 0, "the automatic choice is asked of it in another process"
    assert "fake_rude" not in sys.modules
    said = asking.ask("rude")
    assert said.problem
    assert not said.lines or said.lines[0] == "rude: unavailable"


def test_one_that_claims_the_arrays_is_chosen_and_only_then_imported(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("polite", "fields['auto'], fields['devices'] = True, ('moon',)")
    assert asking.ask("polite", probe=False) == asking.Said(auto=True, devices=("moon",))
    assert "fake_polite" not in sys.modules
    assert registry.select(None, "moon").name == "polite"
    assert "fake_polite" in sys.modules
