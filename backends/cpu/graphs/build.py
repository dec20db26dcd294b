"""The .onnx files beside this one are compiled from the .onnxtxt sources and committed: running them needs no `onnx`.

    python backends/cpu/graphs/build.py            writes the models
    python backends/cpu/graphs/build.py --check    writes nothing; exit 1 if a committed model is not what its source says

Sources are in the textual syntax of `onnx.parser`. `${format}` in a source is an operand dtype: such a source makes one
model per format. A function of the domain `dsa.portable` is written in one source and may be called from all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from string import Template

import onnx
import onnx.checker
import onnx.parser

HERE = Path(__file__).resolve().parent
DOMAIN = "dsa.portable"

# Operand dtype, as the contract names it -> as ONNX text spells it.
ONNX_TYPE = {
    "float8_e4m3fn": "float8e4m3fn",
    "int8": "int8",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "float32": "float",
}

# Source -> the formats of its models; none: one model, which computes in float32.
FORMATS: dict[str, tuple[str, ...]] = {
    "index_scores": (),
    "attend": (),
    "attend_rows": ("bfloat16", "float16", "float32"),
    "lightning_index": ("float8_e4m3fn", "int8", "bfloat16", "float16", "float32"),
    "sparse_attend": ("bfloat16", "float16", "float32"),
}


def read_sources() -> dict[str, str]:
    """Return the text of every source by its name in `FORMATS`."""
    return {name: (HERE / f"{name}.onnxtxt").read_text(encoding="utf-8") for name in FORMATS}


def compile_models(sources: Mapping[str, str]) -> dict[str, onnx.ModelProto]:
    """Return the checked models of `sources` by file name, each with the functions it calls and no others."""
    parsed = {
        (f"{name}.{fmt}.onnx" if fmt else f"{name}.onnx"): _parse(text, fmt)
        for name, text in sources.items()
        for fmt in FORMATS[name] or ("",)
    }
    functions = {function.name: function for model in parsed.values() for function in model.functions}
    for model in parsed.values():
        called = _called(model.graph.node, functions)
        del model.functions[:]
        model.functions.extend(functions[name] for name in sorted(called))
        onnx.checker.check_model(model, full_check=True)
    return parsed


def _parse(text: str, fmt: str) -> onnx.ModelProto:
    model = onnx.parser.parse_model(Template(text).substitute(format=ONNX_TYPE[fmt]) if fmt else text)
    # The textual syntax has no place for a graph's own doc string, which some viewers show instead of the model's.
    model.graph.doc_string = model.doc_string
    return model


def _called(nodes: Iterable[onnx.NodeProto], functions: Mapping[str, onnx.FunctionProto]) -> set[str]:
    """Return the names of the functions that `nodes` call, in subgraphs and through other functions too."""
    direct = {node.op_type for node in _flatten(nodes) if node.domain == DOMAIN}
    return direct.union(*(_called(functions[name].node, functions) for name in direct))


def _flatten(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            yield from _flatten(attribute.g.node)


def serialize(model: onnx.ModelProto) -> bytes:
    """Return the bytes of `model`, the same on every run."""
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def main(arguments: list[str] | None = None) -> int:
    """Write the models, or with `--check` compare them; return the exit status."""
    parser = argparse.ArgumentParser(description="Compile the ONNX sources of the CPU backend.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a committed model differs")
    check = parser.parse_args(arguments).check

    models = {name: serialize(model) for name, model in compile_models(read_sources()).items()}
    committed = {path.name: path.read_bytes() for path in HERE.glob("*.onnx")}
    differing = sorted(name for name in models.keys() | committed.keys() if models.get(name) != committed.get(name))
    if check:
        for name in differing:
            print(f"{name} is not what its source makes: run python backends/cpu/graphs/build.py.", file=sys.stderr)
        return 1 if differing else 0
    for name in differing:
        if name in models:
            (HERE / name).write_bytes(models[name])
            print(f"wrote {name}")
        else:
            (HERE / name).unlink()
            print(f"removed {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
