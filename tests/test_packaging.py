"""What the documents say is so: their examples run, their trees, tables and links name what exists; and the scripts of ci/."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import metadata
from pathlib import Path

import pytest

import dsa_portable
from dsa_portable import registry
from dsa_portable.conformance.cases.catalogue import LISTS
from dsa_portable.conformance.execute import process
from dsa_portable.conformance.report.schema import Evidence, Status

ROOT = Path(__file__).resolve().parents[1]
README, CONTRIBUTING = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md"))
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
BASH = shutil.which("bash")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of this language, without their indentation."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def column(text: str, heading: str) -> list[str]:
    """The first column of the table whose first heading this is."""
    table = re.search(rf"^\| {heading} \|.*\n\|[ -|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert table is not None, heading
    return [line.split("|")[1].strip().strip("`") for line in table[1].splitlines()]


# --- the README's examples ---


def test_the_example_prints_what_its_comment_says() -> None:
    example = blocks(README, "python")[0]
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == example.splitlines()[-1].partition("# ")[2] != ""


SDK = """
__version__ = "1.2"
device_count = lambda: COUNT
device_name = lambda index: "Acme One"
driver_version = lambda: "7.0"
kernels_completed = lambda: 0
"""


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (
            2,
            (
                "acme 0.1.0: available",
                "2 x Acme One (7.0); torch_acme 1.2",
                "heads=64",
                "not offered: key_range, non_causal, out, k_layout",
            ),
        ),
        (0, ("acme 0.1.0: unavailable", "no Acme device was found; load the driver and look with acme-smi.")),
        (None, ("acme 0.1.0: unavailable", "No module named 'torch_acme'", "run: pip install dsa-portable-acme")),
    ],
)
def test_the_example_of_a_chip_is_a_backend(tmp_path: Path, count: int | None, words: tuple[str, ...]) -> None:
    """As it stands in the README, with and without the chip and its SDK."""
    (entry_points,) = re.findall(
        r'^\[project.entry-points."(.*?)"\]\n(\w+ = )"(.*?)"$', "\n".join(blocks(README, "toml")), re.MULTILINE
    )
    info = tmp_path / "dsa_portable_acme-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dsa-portable-acme\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[{}]\n{}{}\n".format(*entry_points))
    (tmp_path / "dsa_portable_acme").mkdir()
    (tmp_path / "dsa_portable_acme" / "__init__.py").write_text(blocks(README, "python")[-1])
    if count is not None:
        (tmp_path / "torch_acme.py").write_text(SDK.replace("COUNT", str(count)))
    done = subprocess.run(
        [sys.executable, "-c", COMMAND],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path[1:]])},
        capture_output=True,
        text=True,
        check=True,
    )
    for word in words:
        assert word in done.stdout


COMMAND = "import sys; from dsa_portable.cli import main; main(['backends'])"


# --- trees, tables, links ---


def tree(text: str) -> Iterator[str]:
    """The paths that a layout tree names: a folder ends in a slash, and what is indented below it lies in it."""
    above: list[tuple[int, str]] = []
    for line in text.splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        above = [entry for entry in above if entry[0] < indent]
        path = "".join(entry[1] for entry in above) + name
        above.append((indent, name))
        yield path


def test_the_layout_tree_names_what_exists_and_all_top_level_folders() -> None:
    named = list(tree(re.search(r"## Layout\n\n```\n(.*?)```", CONTRIBUTING, re.DOTALL)[1]))  # type: ignore[index]
    assert [path for path in named if not (ROOT / path).is_dir()] == []
    ignored = {"build/", "dist/", "dsa-report/", "dsa-bench/"}
    folders = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert {path for path in named if path.count("/") == 1} == {
        name for name in folders - ignored if not name.endswith((".egg-info/", "__pycache__/"))
    }


def test_a_layout_tree_is_read_as_paths() -> None:
    assert list(tree("a/   first\n  b/   inner\n    c.py\n  d/\ne/")) == ["a/", "a/b/", "a/b/c.py", "a/d/", "e/"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_paths_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r"\b(?:docs|ci|conformance|backends)/[\w./]+\.\w+", text)
    assert targets or document == "CHANGELOG.md"
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_every_variable_is_in_the_readme() -> None:
    folders = ("dsa_portable", "backends", "conformance")
    code = "".join(path.read_text(encoding="utf-8") for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    code += "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "ci").glob("*.sh")))
    read = set(re.findall(r"\bDSA_[A-Z]+(?:_[A-Z]+)*\b", code)) | {"NO_COLOR", "TRITON_INTERPRET", "PYTHON"}
    read -= {process.MARK}  # by which a run knows the processes that it started; nobody sets it
    assert sorted(column(README, "variable")) == sorted(read)


def test_every_status_class_code_list_and_backend_is_in_the_readme() -> None:
    assert column(README, "case") == [status.value for status in Status]
    assert column(README, "class") == [evidence.value for evidence in Evidence]
    assert column(README, "exit code") == ["0", "1", "2", "3", "4"]
    assert column(README, "list") == list(LISTS)
    built_in = {path.parent.name for path in (ROOT / "backends").glob("*/__init__.py")}
    rows = re.findall(r"^\| `(\w+)` \|(.*)$", README[README.index("## Support") : README.index("## How to read")], re.MULTILINE)
    assert {name for name, rest in rows if "planned | none" not in rest} == built_in


def test_a_result_in_the_readme_is_of_the_list_that_is_shipped() -> None:
    core = json.loads((ROOT / "conformance" / "frozen" / "core-2026.12.json").read_text(encoding="utf-8"))
    assert set(re.findall(r"\bcore-[\d.]+\d", README)) == {core["name"]}


# --- the package ---


def test_one_version_everywhere() -> None:
    pyproject = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    newest = re.search(r"^## (\S+),", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert pyproject is not None
    assert newest is not None
    built_in = [registry.load(path.parent.name).version for path in (ROOT / "backends").glob("*/__init__.py")]
    assert {pyproject[1], newest[1], dsa_portable.__version__, *built_in} == {dsa_portable.__version__}


def test_the_licence() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert text.split()[:4] == ["Apache", "License", "Version", "2.0,"]
    assert "END OF TERMS AND CONDITIONS" in text
    assert metadata("dsa-portable")["License"] == "Apache-2.0"


def test_what_is_not_python_is_shipped_or_a_source() -> None:
    """The wheel takes modules and package-data; what else lies in the packages is the sources of generated files."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text[text.index("[tool.setuptools.package-data]") :].split("\n\n")[0]
    patterns = dict(re.findall(r'^"([\w.]+)" = (\[.*\])$', section, re.MULTILINE))
    folders = {name: name.removeprefix("dsa_portable.").replace(".", "/") for name in patterns}
    shipped = {
        path
        for name, globs in patterns.items()
        for glob in ast.literal_eval(globs)
        for path in (ROOT / folders[name]).glob(glob)
    }
    assert len(shipped) > 10
    present = {
        path
        for folder in ("dsa_portable", "backends", "conformance")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".py" and path.parent.name != "__pycache__"
    }
    assert {path.suffix for path in present - shipped} == {".onnxtxt"}


# --- the scripts ---

needs_bash = pytest.mark.skipif(BASH is None, reason="the scripts are for bash")
SCRIPTS = ("ci/conformance.sh", "ci/test.sh", "ci/environment.sh", ".ci/run")


@needs_bash
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@needs_bash
def test_an_unknown_suite_is_refused_with_the_known_ones() -> None:
    done = subprocess.run(["bash", ROOT / "ci/test.sh", "tpu"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "tpu is no test suite, but core, engines, torch, cuda and ascend are; name one of them.\n"


@needs_bash
@pytest.mark.parametrize("script", ["ci/conformance.sh", "ci/test.sh"])
def test_a_python_that_is_too_old_or_missing_is_the_harness_s_failure(tmp_path: Path, script: str) -> None:
    """Exit code 2, because 1 would say that a case failed; nothing is made."""
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for python in (old, tmp_path / "missing"):
        done = subprocess.run(
            ["bash", ROOT / script], env={**os.environ, "PYTHON": str(python)}, capture_output=True, text=True
        )
        assert done.returncode == 2
        assert done.stderr == f"{python} is no Python >= 3.10 with the venv module; install one, or name one with PYTHON=.\n"


def wheel(folder: Path, name: str, *, metadata: str = "", files: dict[str, str] | None = None) -> Path:
    """A pure wheel of version 2.0, made without a build tool."""
    path, info = folder / f"{name}-2.0-py3-none-any.whl", f"{name}-2.0.dist-info"
    texts = {
        **{file.replace("INFO", info): text for file, text in (files or {}).items()},
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n{metadata}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in texts.items():
            archive.writestr(file, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in [*texts, f"{info}/RECORD"]))
    return path


WHAT_WAS_ASKED = """
import os, sys
from importlib.metadata import distributions

def main():
    print("have", *sorted({found.name for found in distributions()} - {"pip", "setuptools"}))
    print("given", *sorted(name for name in os.environ if name.startswith("DSA_")), os.environ["DSA_BACKEND"], *sys.argv[1:])
"""
BUILD = """
import os, shutil

def build_editable(folder, *_):
    (name,) = os.listdir("ready")
    shutil.copy(f"ready/{name}", folder)
    return name
"""


def project(root: Path, name: str, *, metadata: str = "", files: dict[str, str] | None = None) -> Path:
    """A folder that pip can install editable, with no build tool."""
    root.mkdir(parents=True)
    (root / "pyproject.toml").write_text('[build-system]\nrequires = []\nbuild-backend = "build"\nbackend-path = ["."]\n')
    (root / "build.py").write_text(BUILD)
    wheel(root / "ready", name, metadata=metadata, files=files)
    return root


def lab(folder: Path) -> Path:
    """A checkout with this one's scripts, of a project that needs `engine`, beside a folder of wheels that has it."""
    root = project(
        folder / "checkout",
        "dsa_portable",
        metadata="Provides-Extra: cpu\nRequires-Dist: engine>=2; extra == 'cpu'\n",
        files={"lab.py": WHAT_WAS_ASKED, "INFO/entry_points.txt": "[console_scripts]\ndsa-portable = lab:main\n"},
    )
    shutil.copytree(ROOT / "ci", root / "ci")
    wheel(folder / "wheels", "engine")
    return root


def conformance(root: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", root / "ci" / "conformance.sh", *arguments],
        cwd=root.parent,
        env={**os.environ, "PYTHON": sys.executable, "DSA_WHEELS": "wheels", **variables},
        capture_output=True,
        text=True,
    )


@needs_bash
@pytest.mark.slow
def test_without_an_index_all_comes_from_the_folder_of_wheels_and_the_plug_ins_with_it(tmp_path: Path) -> None:
    root = lab(tmp_path)
    for name in ("driver", "tool"):
        wheel(tmp_path / "wheels", name)
    wheel(tmp_path / "built", "acme", metadata="Requires-Dist: driver\n")
    project(tmp_path / "sources" / "probe", "probe")
    named = {"DSA_BACKEND": "acme", "DSA_PLUGIN": "./built/acme-2.0-py3-none-any.whl sources/probe tool>=1"}
    first = conformance(root, "--case", "an id", **named)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines() == [
        "have acme driver dsa_portable engine probe tool",
        "given DSA_BACKEND acme conformance --list core --out dsa-report --case an id",
    ]
    again = conformance(root, **named)
    assert (again.returncode, again.stderr) == (0, "")
    wheel(tmp_path / "built", "acme")  # built anew under its old name, it is installed anew
    assert conformance(root, **named).stdout.splitlines()[0] == "have acme dsa_portable engine probe tool"


@needs_bash
def test_a_wheel_that_the_folder_lacks_is_named(tmp_path: Path) -> None:
    root = lab(tmp_path)
    (tmp_path / "wheels" / "engine-2.0-py3-none-any.whl").unlink()
    done = conformance(root)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"making the environment {root}/.ci-env/conformance",
        f"DSA_WHEELS=wheels has no wheel of engine>=2 that {sys.executable} can install; add it to the folder.",
    ]
    assert not (root / ".ci-env" / "conformance" / "made-from").exists()


@needs_bash
@pytest.mark.parametrize(
    ("variable", "named", "says"),
    [
        (
            "DSA_WHEELS",
            "gone",
            "DSA_WHEELS names gone, which is no folder; name one with the wheels to install from, or unset it.",
        ),
        (
            "DSA_PLUGIN",
            "torch ./gone[fast]",
            "DSA_PLUGIN names ./gone, which does not exist; name a wheel, a folder with a pyproject.toml, or a requirement.",
        ),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_made(tmp_path: Path, variable: str, named: str, says: str) -> None:
    root = lab(tmp_path)
    done = conformance(root, **{variable: named})
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{says}\n")
    assert not (root / ".ci-env").exists()
