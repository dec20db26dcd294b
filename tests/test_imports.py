"""Imports point one way, the core stays light, and what is packaged is what is on disk."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsa_portable import registry

ROOT = Path(__file__).resolve().parents[1]
# Where each room stands in a checkout, and the name it is imported by.
ROOMS = {"dsa_portable": "dsa_portable", "backends": "dsa_portable.backends", "conformance": "dsa_portable.conformance"}
# The composition root: the command, and the lazy conformance() that goes in 0.2.0.
EXEMPT = {"dsa_portable/cli.py", "dsa_portable/deprecated.py"}
CORE_NEEDS = {"numpy", "ml_dtypes", "dsa_portable", *sys.stdlib_module_names}
FACES = "dsa_portable.faces"
# arrays.py imports torch to make a first tensor; faces belong to their callers, and the core imports none of them.
TORCH_FILES = {"dsa_portable/arrays.py"}


def imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import at any depth; `from a import b` may name a module b, so it counts as a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{name.name}") for name in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def under(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def allowed(room: str, package: str, file: str, module: str) -> bool:
    """Backends, conformance and faces import the core; the core imports none of them, and needs numpy and ml_dtypes alone."""
    face = under(package, FACES)
    if under(module, FACES) and not face:
        return False
    if room == "conformance":
        return not under(module, "dsa_portable.backends")
    if room == "backends":
        own = ".".join(package.split(".")[:3])
        return not under(module, "dsa_portable.conformance") and (
            not under(module, "dsa_portable.backends") or under(module, own)
        )
    if under(module, "dsa_portable.backends") or under(module, "dsa_portable.conformance"):
        return False
    return module.split(".")[0] in CORE_NEEDS | ({"torch"} if face or file in TORCH_FILES else set())


def violations(root: Path) -> list[str]:
    found = []
    for room, name in ROOMS.items():
        for path in sorted((root / room).rglob("*.py")):
            file = path.relative_to(root).as_posix()
            if file in EXEMPT:
                continue
            package = ".".join([name, *path.parent.relative_to(root / room).parts])
            for line, module in imports(ast.parse(path.read_text(encoding="utf-8")), package):
                if not allowed(room, package, file, module):
                    found.append(f"{file}:{line} imports {module}")
    return found


def test_imports_point_one_way() -> None:
    assert len(list((ROOT / "dsa_portable").rglob("*.py"))) > 10
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "is_fine"),
    [
        ("dsa_portable/dispatch.py", "from dsa_portable.backends.cpu import BACKEND", False),
        ("dsa_portable/dispatch.py", "from dsa_portable import conformance", False),
        ("dsa_portable/dispatch.py", "def f():\n    import dsa_portable.conformance.judging.judge", False),
        ("dsa_portable/dispatch.py", "import_module('dsa_portable.backends')", False),
        ("dsa_portable/dispatch.py", "import torch", False),
        ("dsa_portable/formats/caches.py", "from ..conformance import judge", False),
        ("dsa_portable/formats/caches.py", "from . import quantise", True),
        ("dsa_portable/dispatch.py", "from dsa_portable import batch, registry", True),
        ("dsa_portable/dispatch.py", "from dsa_portable import faces", False),
        ("dsa_portable/dispatch.py", "import_module('dsa_portable.faces.torch_library')", False),
        ("dsa_portable/torch_library.py", "import torch", False),
        ("dsa_portable/faces/torch_library.py", "import torch\nfrom dsa_portable import faces, operators", True),
        ("dsa_portable/faces/torch_library.py", "import torch_npu", False),
        ("dsa_portable/faces/torch_library.py", "from dsa_portable.backends.cpu import BACKEND", False),
        ("dsa_portable/faces/torch_library.py", "from dsa_portable.conformance import run", False),
        ("backends/cpu/rows.py", "from dsa_portable.faces import torch_library", False),
        ("conformance/session.py", "import dsa_portable.faces", False),
        ("dsa_portable/arrays.py", "def f():\n    import_module('torch')", True),
        ("dsa_portable/arrays.py", "import_module('torch_npu')", False),
        ("dsa_portable/cli.py", "from dsa_portable.conformance import run", True),
        ("dsa_portable/__init__.py", "import_module('dsa_portable.conformance')", False),
        ("conformance/session.py", "from dsa_portable import backends", False),
        ("conformance/session.py", "import dsa_portable.backends.cpu.settings as s", False),
        ("conformance/cases/lightning_index.py", "from ...backends import cpu", False),
        (
            "conformance/session.py",
            "from dsa_portable import registry\nfrom dsa_portable.conformance.judging import oracle",
            True,
        ),
        ("backends/cpu/rows.py", "from dsa_portable.conformance.judging.oracle import index", False),
        ("backends/cpu/rows.py", "from dsa_portable.backends.cuda import BACKEND", False),
        ("backends/cpu/rows.py", "from dsa_portable.backends.cpu import settings\nfrom dsa_portable.batch import Batch", True),
    ],
)
def test_a_planted_import_is_seen(tmp_path: Path, file: str, line: str, is_fine: bool) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(line + "\n")
    found = violations(tmp_path)
    assert all(f.startswith(f"{file}:") for f in found)
    assert bool(found) != is_fine


# The suite's rooms from the roof down: each may import those below it, and no arrow runs back up.
FLOORS = ("conftest", "session", "selftest", "bench", "judging", "report", "execute", "lists", "hosts", "cases")
MOST_ARROWS = 22


def arrows(root: Path) -> set[tuple[str, str]]:
    """(room, room it imports) of the suite."""
    found = set()
    for path in (root / "conformance").rglob("*.py"):
        room, *deeper = path.relative_to(root / "conformance").with_suffix("").parts
        package = ".".join(["dsa_portable.conformance", *([room, *deeper][:-1])])
        for _, module in imports(ast.parse(path.read_text(encoding="utf-8")), package):
            other = module.removeprefix("dsa_portable.conformance.").partition(".")[0]
            if module.startswith("dsa_portable.conformance.") and other in FLOORS and room in FLOORS and other != room:
                found.add((room, other))
    return found


def test_the_rooms_of_the_suite_stand_on_floors() -> None:
    drawn = arrows(ROOT)
    standing = {
        path.stem for path in (ROOT / "conformance").glob("[a-z]*") if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert standing - {"pytest_options", "test_list"} == {*FLOORS}, "the two import nothing of ours"
    assert {room for arrow in drawn for room in arrow} == {*FLOORS}
    assert [(one, other) for one, other in drawn if FLOORS.index(one) > FLOORS.index(other)] == []
    assert len(drawn) <= MOST_ARROWS, sorted(drawn)


def test_an_arrow_that_runs_up_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "conformance" / "execute" / "worker.py"
    path.parent.mkdir(parents=True)
    path.write_text("from dsa_portable.conformance.judging import oracle\nfrom dsa_portable.conformance import lists\n")
    assert arrows(tmp_path) == {("execute", "judging"), ("execute", "lists")}


def test_what_runs_a_backend_needs_no_pydantic_and_can_import_no_answer() -> None:
    worker = "from dsa_portable.conformance.execute import worker"
    assert "pydantic" not in imported_by(worker)
    assert "pydantic" in imported_by(f"{worker}, declaration\nimport dsa_portable.conformance.report.schema"), (
        "the check can fail"
    )
    code = f"{worker}\nsys.meta_path.insert(0, worker.NoAnswers())\n"
    code += "for name in ('judging', 'judging.judge', 'judging.emulator', 'selftest', 'selftest.kernel', 'bench.reference'):\n"
    code += (
        "    try:\n        __import__(f'dsa_portable.conformance.{name}')\n        raise SystemExit(f'{name} was imported')\n"
    )
    code += "    except ImportError:\n        pass"
    assert "dsa_portable" in imported_by(code)


def imported_by(code: str) -> set[str]:
    """The top-level modules in a fresh process after this code."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_the_core_imports_no_sdk() -> None:
    core = "import dsa_portable, dsa_portable.formats, dsa_portable.profile"
    loaded = imported_by(core)
    assert not loaded & {"torch", "torch_npu", "triton", "onnxruntime", "onnx", "pydantic"}
    assert {"dsa_portable", "numpy", "ml_dtypes"} <= loaded
    assert "onnxruntime" in imported_by(f"{core}\nsys.modules['onnxruntime'] = sys"), "the check above can fail"


def test_declarations_import_no_sdk() -> None:
    loaded = imported_by("from dsa_portable import registry\nfor name in registry.names():\n    registry.load(name)")
    assert not loaded & {"torch", "torch_npu", "triton", "onnxruntime", "onnx", "pydantic"}


def test_the_packages_of_pyproject_are_the_folders_on_disk() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^packages = (\[.*?^\])", text, re.DOTALL | re.MULTILINE)
    assert listed is not None
    folders = {
        ".".join([name, *path.parent.relative_to(ROOT / room).parts])
        for room, name in ROOMS.items()
        for path in (ROOT / room).rglob("__init__.py")
    }
    packages = ast.literal_eval(listed[1])
    assert sorted(packages) == sorted(set(packages)) == sorted(folders)


def test_every_module_lies_in_a_package() -> None:
    """Only `graphs` holds a script that is not shipped: it builds the files beside it."""
    loose = {
        path.parent.relative_to(ROOT).as_posix()
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
        if not (path.parent / "__init__.py").exists()
    }
    assert loose <= {"backends/cpu/graphs"}


def test_every_built_in_backend_is_registered() -> None:
    built_in = {path.parent.name for path in (ROOT / "backends").glob("*/__init__.py")}
    assert built_in <= set(registry.names())
    assert all(registry.load(name).name == name for name in built_in)


SMALL = {
    "dsa_portable/registry.py": 160,
    "dsa_portable/__init__.py": 60,
    "conformance/session.py": 180,
    "conformance/judging/oracle.py": 130,
}


@pytest.mark.parametrize("file", SMALL)
def test_files_that_stay_small(file: str) -> None:
    assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) <= SMALL[file]
