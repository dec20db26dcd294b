"""Shared libraries in CANN's place that do nothing, so that the real torch_npu can be imported where CANN is not installed.

torch_npu resolves every symbol when it is loaded, so the libraries need the names of all functions that it uses; they are read
from the installed wheel. A function that is called answers with an error: with success, operators would return whatever lay in
memory. torch_npu then finds no device, and its operators work on the meta device and on fake tensors alone.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from ctypes.util import find_library
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from dsa_portable.errors import DeviceUnavailable

TOOLS = ("gcc", "nm", "readelf")
# What torch_npu is linked against and its wheel lacks: the libraries, and their functions, which are all of plain C.
LIBRARY = re.compile(r"lib(hccl|ascendcl|acl_.*|ge_.*|graph)\.so")
FUNCTION = re.compile(r"(acl[A-Za-z]|rt[A-Z]|Msprof|Hccl)[A-Za-z0-9]*")
# One of them holds all functions, and the others are empty.
FIRST = "libascendcl.so"
# ACL_ERROR_RT_DRV_INTERNAL_ERROR where nothing else is said: no device, and a chip without a name.
ERROR = 507899
ANSWERS = {
    "aclrtGetDeviceCount": "int aclrtGetDeviceCount(unsigned *count) { *count = 0; return 0; }",
    "aclrtGetSocName": 'const char *aclrtGetSocName(void) { return ""; }',
}
# What the folder was made from, so that it is made once.
MARK = "made-from"


class HostUnavailable(DeviceUnavailable):
    """The stand-in for the chip's software cannot be built or loaded here."""


def build(folder: Path) -> list[Path]:
    """Write the libraries for the installed torch_npu into a folder, unless they are there; returns their paths.

    Raises HostUnavailable where torch_npu, gcc, nm or readelf is missing.
    """

    def source(package: Path, functions: list[str]) -> str:
        return "\n".join(ANSWERS.get(name, f"int {name}(void) {{ return {ERROR}; }}") for name in functions)

    return make(folder, source, [Path(__file__)])


def make(
    folder: Path, source: Callable[[Path, list[str]], str], origins: Iterable[Path], opened: Iterable[str] = ()
) -> list[Path]:
    """What `build` does, with other C: `source` gives it for a torch_npu's folder and the functions that it needs.

    origins: the files that the C comes from; the libraries are made again when one changes.  opened: libraries that torch_npu
    is not linked against, but opens.
    """
    package = find_spec("torch_npu")
    if package is None or package.origin is None:
        raise HostUnavailable(
            "torch_npu is not installed, and the libraries are made from it; run: pip install torch torch-npu"
        )
    digests = [sha256(path.read_bytes()).hexdigest() for path in origins]
    made_from = f"torch_npu {version('torch-npu')}, {' '.join(digests)}\n"
    mark = folder / MARK
    if not mark.exists() or mark.read_text(encoding="utf-8") != made_from:
        if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
            raise HostUnavailable(
                f"{' and '.join(missing)} not found on PATH; install gcc and binutils to build the libraries."
            )
        libraries, functions = needed(Path(package.origin).parent)
        text = source(Path(package.origin).parent, functions)
        folder.mkdir(parents=True, exist_ok=True)
        # Made aside and moved into place, the mark last: another process may build here too, or have the old ones loaded.
        with TemporaryDirectory(dir=folder) as temporary:
            aside = Path(temporary)
            # Whoever opens one of the empty libraries finds all functions behind it.
            behind = ("-Wl,--no-as-needed", f"-L{aside}", f"-l:{FIRST}", "-Wl,-rpath,$ORIGIN")
            for name in sorted({*libraries, *opened}, key=lambda name: name != FIRST):
                command = ("gcc", "-shared", "-fPIC", "-w", "-x", "c", "-", f"-Wl,-soname,{name}", "-o", str(aside / name))
                _run(*command, *(() if name == FIRST else behind), text=text if name == FIRST else "")
            (aside / MARK).write_text(made_from, encoding="utf-8")
            made = sorted(aside.iterdir(), key=lambda path: path.name == MARK)
            for path in made:
                path.replace(folder / path.name)
        for old in set(folder.glob("*.so")) - {folder / path.name for path in made}:
            old.unlink(missing_ok=True)
    return sorted(folder.glob("*.so"))


def load(folder: Path) -> None:
    """Load the libraries of a folder for torch, which is imported later.

    Raises HostUnavailable where torch is imported already, where CANN is installed, and where the folder is not built.
    """
    if "torch" in sys.modules:
        raise HostUnavailable("torch is imported already, and looks for torch_npu's libraries then; load them before.")
    if (place := cann(folder)) is not None:
        raise HostUnavailable(f"CANN itself is installed ({place}); use it, or take it from the environment of this process.")
    if not (folder / MARK).exists():
        raise HostUnavailable(f"{folder} holds no libraries; build them there first.")
    for path in sorted(folder.glob("*.so"), key=lambda path: path.name != FIRST):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def cann(folder: Path) -> str | None:
    """What tells that the loader would find CANN, or None; the folder of the stand-ins is not CANN wherever it is named."""
    if home := os.environ.get("ASCEND_HOME_PATH"):
        return f"ASCEND_HOME_PATH={home}"
    searched = [Path(entry).resolve() for entry in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if entry]
    if folder.resolve() in searched:
        return None
    return next((str(place / FIRST) for place in searched if (place / FIRST).exists()), find_library("ascendcl"))


def needed(package: Path) -> tuple[list[str], list[str]]:
    """The names of the libraries and of the functions that a torch_npu is linked against and does not bring."""
    linked = sorted(path for path in (*package.glob("lib/lib*.so"), *package.glob("_C*.so")) if "atb" not in path.name)
    entries = "".join(_run("readelf", "--dynamic", str(path)) for path in linked)
    symbols = "".join(_run("nm", "--dynamic", "--undefined-only", str(path)) for path in linked)
    libraries = sorted(set(filter(LIBRARY.fullmatch, re.findall(r"\(NEEDED\).*\[(.*)\]", entries))))
    functions = sorted(set(filter(FUNCTION.fullmatch, re.findall(r" U (\w+)", symbols))))
    if FIRST not in libraries or not functions:
        raise HostUnavailable(f"{package} is not linked against {FIRST}; install a torch-npu of a release that is.")
    return libraries, functions


def _run(*command: str, text: str = "") -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise HostUnavailable(f"{command[0]} failed with exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def main(words: list[str]) -> int:
    """`python -m dsa_portable.conformance.hosts.ascend.stubs FOLDER`: build the libraries there."""
    if len(words) != 1:
        print("usage: python -m dsa_portable.conformance.hosts.ascend.stubs FOLDER", file=sys.stderr)
        return 2
    try:
        print(f"{len(build(Path(words[0])))} libraries in {words[0]}")
    except HostUnavailable as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
