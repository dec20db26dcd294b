"""`dsa-portable compile`: every default configuration built for chips that are not there. COMPILE-ONLY: a table, no verdict.

The operators run over torch's meta tensors and record what they would launch; each kernel is then compiled in a process of its
own, because a compiler can hang, and read with the tools that Triton brings.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from dsa_portable.backends.cuda.launch import Launched, recorded
from dsa_portable.batch import Batch
from dsa_portable.errors import InvalidArgument
from dsa_portable.formats import LAYOUTS
from dsa_portable.operators import AttendRequest, IndexRequest

# Bytes of shared memory that one program may have; Triton compiles programs that need more.
SHARED_LIMIT = {
    "sm_80": 166912,
    "sm_86": 101376,
    "sm_89": 101376,
    "sm_90": 232448,
    "sm_100": 232448,
    "sm_103": 232448,
    "sm_120": 101376,
    "gfx942": 65536,
    "gfx950": 163840,
}
SECONDS = 120
# Operator and format, heads, rows and keys of each request, page size: between them they launch every default configuration.
CALLS: tuple[tuple[str, str, int, tuple[int, int], int | None], ...] = (
    ("lightning_index", "float8_e4m3fn", 64, (4096, 65536), None),
    ("lightning_index", "float8_e4m3fn", 64, (1, 65536), 64),
    ("lightning_index", "idx_fp8_132_planar", 64, (1, 65536), 64),
    ("lightning_index", "bfloat16", 64, (4096, 65536), None),
    ("lightning_index", "int8", 64, (4096, 65536), None),
    ("sparse_attend", "bfloat16", 128, (4096, 65536), None),
    ("sparse_attend", "bfloat16", 16, (4096, 65536), 64),
    ("sparse_attend", "float16", 128, (1, 65536), 64),
    ("sparse_attend", "float32", 16, (4096, 65536), None),
    ("sparse_attend", "v32_fp8_656_nsr", 128, (1, 65536), 64),
    ("sparse_attend", "ascend_656_nrs_int8", 128, (4096, 65536), None),
)
TOPK, REQUESTS = 2048, 4
HEADER = """\
| evidence | target | kernel | bytes of shared memory | registers | bytes spilled | matrix products, async copies |
| --- | --- | --- | --- | --- | --- | --- |"""


@dataclass(frozen=True)
class Row:
    """One line of the table; `spills` in bytes, `problem` where there is no program."""

    target: str
    kernel: str
    shared: int = 0
    registers: int = 0
    spills: int = 0
    instructions: tuple[str, ...] = ()
    problem: str = ""

    def line(self) -> str:
        """Of the table below HEADER, the evidence class in every row."""
        limit = SHARED_LIMIT[self.target]
        fits = f"{self.shared} of {limit}" + (" TOO MUCH" if self.shared > limit else "")
        built = (fits, str(self.registers), str(self.spills), " ".join(self.instructions))
        cells = ("COMPILE-ONLY", self.target, self.kernel, *((self.problem, "", "", "") if self.problem else built))
        return f"| {' | '.join(cells)} |"


def launches(architecture: str) -> dict[str, Launched]:
    """What the default calls launch on an architecture, by a name that says how each differs from the others."""
    torch = import_module("torch")
    found: dict[str, Launched] = {}
    for operator, stored, heads, (rows, keys), page_size in CALLS:
        empty = partial(torch.empty, device="meta")
        batch = Batch.of([rows] * REQUESTS, [keys] * REQUESTS)
        where: tuple[int, ...] = (REQUESTS * keys,)
        if page_size:
            pages = keys // page_size
            table = np.arange(REQUESTS * pages, dtype=np.int32).reshape(REQUESTS, pages)
            batch, where = batch.with_pages(table, page_size), (REQUESTS * pages, page_size)
        packed = stored if stored in LAYOUTS else None
        index = operator == "lightning_index"
        operand = ("float8_e4m3fn" if index else "bfloat16") if packed else stored
        width = 128 if index else 576
        q = empty((REQUESTS * rows, heads, width), dtype=getattr(torch, operand))
        token, dtype = (LAYOUTS[packed].bytes_per_token, torch.uint8) if packed else (width, q.dtype)
        cache = empty((*where, token), dtype=dtype)
        request: Any
        if index:
            scale = empty(where, dtype=torch.float32) if stored in ("float8_e4m3fn", "int8") else None
            weights = empty((len(q), heads), dtype=torch.float32)
            operands = {"q": q, "k": cache, "weights": weights, "k_scale": scale}
            request = IndexRequest.checked(**operands, topk=TOPK, batch=batch, k_layout=packed)
        else:
            indices = empty((len(q), TOPK), dtype=torch.int32)
            operands = {"q": q, "kv": cache, "indices": indices}
            request = AttendRequest.checked(**operands, softmax_scale=0.1, batch=batch, kv_layout=packed, return_lse=True)
        function = getattr(import_module(f"dsa_portable.backends.cuda.{operator}"), operator)
        with recorded(architecture) as launched:
            function(request.as_kind("torch"))
        found |= {name: one for one in launched if (name := _name(stored, one)) not in found}
    return found


def _name(stored: str, launched: Launched) -> str:
    kernel = launched.kernel.__name__
    if kernel not in ("score_rows", "score_row", "attend_rows", "attend_rows_hopper"):
        return " ".join([kernel, *(f"{n}={launched.constants[n]}" for n in ("PARTS", "CAPACITY") if n in launched.constants)])
    blocks = " ".join(f"{name.removeprefix('BLOCK_')}{size}" for name, size in launched.configuration.blocks.items())
    shape = f"w{launched.configuration.num_warps} s{launched.configuration.num_stages}"
    return f"{kernel} {stored} {blocks} {shape}"


def compiled(target: str, launched: Launched) -> Any:
    """Triton's program for a launch, specialised as the launch itself would be."""
    backends = import_module("triton.backends.compiler")
    parameters = launched.kernel.arg_names
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    values = dict(zip(parameters, launched.arguments, strict=False)) | dict(launched.constants)
    for i, name in enumerate(parameters):
        value, plain = values[name], launched.kernel.params[i].do_not_specialize
        if name in launched.constants or value is None or (isinstance(value, int) and value == 1 and not plain):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        signature[name] = _type(value)
        if not plain and not isinstance(value, float) and (not isinstance(value, int) or value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = _source(launched.kernel)(fn=launched.kernel, signature=signature, constexprs=constants, attrs=attributes)
    is_amd = target.startswith("gfx")
    chip = backends.GPUTarget("hip", target, 64) if is_amd else backends.GPUTarget("cuda", int(target[3:]), 32)
    options = {"num_warps": launched.configuration.num_warps, "num_stages": launched.configuration.num_stages}
    return import_module("triton").compile(source, target=chip, options=options)


def _source(kernel: Any) -> Any:
    """How Triton takes a kernel of its own language, or of Gluon."""
    if kernel.is_gluon():
        return import_module("triton.experimental.gluon._runtime").GluonASTSource
    return import_module("triton.compiler").ASTSource


def _type(value: Any) -> str:
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32"
    names = {"float8_e4m3fn": "fp8e4nv", "bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "uint8": "u8"}
    dtype = str(value.dtype).removeprefix("torch.")
    return "*" + names.get(dtype, dtype.replace("int", "i"))


def read(target: str, name: str, program: Any) -> Row:
    """The row of a compiled program."""
    if target.startswith("gfx"):
        text = program.asm["amdgcn"]
        found = {key: int(re.search(rf"\.{key}:\s*(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")}  # type: ignore[index]
        used = sorted(set(re.findall(r"v_mfma_\w+", text)))
        return Row(target, name, program.metadata.shared, found["vgpr_count"], 4 * found["vgpr_spill_count"], tuple(used[:3]))
    text = program.asm["ptx"]
    architecture = re.search(r"\.target (\w+)", text)[1]  # type: ignore[index]
    tools = Path(str(import_module("triton").__file__)).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(text)
        file.flush()
        assembler = tools / ("ptxas-blackwell" if int(target[3:]) >= 100 else "ptxas")
        command = [str(assembler), "-v", f"--gpu-name={architecture}", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True).stderr
    registers = max(map(int, re.findall(r"Used (\d+) registers", said)))
    spills = sum(map(int, re.findall(r"(\d+) bytes spill stores", said)))
    used = sorted(set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(\w+)|mma\.sync\.aligned\.(\w+)|(tcgen05\.mma)", text)))
    names = dict.fromkeys(part for parts in used for part in parts if part)
    copies = ["cp.async"] if "cp.async" in text else []
    return Row(target, name, program.metadata.shared, registers, spills, (*list(names)[:3], *copies))


def _built(target: str, name: str) -> Row:
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, target, name]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return Row(target, name, problem=f"NOT COMPILED: no end within {SECONDS} s")
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return Row(**json.loads(lines[-1]))
    last = next((line.strip() for line in reversed(done.stderr.splitlines()) if line.strip()), "no word")
    return Row(target, name, problem=f"NOT COMPILED: {last[:160]}")


def table(targets: Sequence[str], only: str = "") -> Iterator[Row]:
    """A row for each target and default configuration whose name holds `only`. Raises InvalidArgument for an unknown target."""
    if unknown := [target for target in targets if target not in SHARED_LIMIT]:
        raise InvalidArgument(f"--target is {unknown[0]!r}, but {', '.join(SHARED_LIMIT)} are accepted; name some of them.")
    tasks = [(target, name) for target in targets for name in launches(target) if only in name]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        yield from pool.map(lambda task: _built(*task), tasks)


if __name__ == "__main__":
    _target, _kernel = sys.argv[1:]
    _row = read(_target, _kernel, compiled(_target, launches(_target)[_kernel]))
    print(json.dumps(vars(_row)))
