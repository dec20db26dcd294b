"""The `dsa-portable` command: which backends there are, the conformance run and what it kept, rates, kernels, the ONNX export.

An error is one line and an exit code: 0 no failure; 1 a failure; 2 usage or harness; 3 nothing executed, or not
all that was asked for; 4 backend unavailable.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from traceback import print_exception
from types import FrameType
from typing import Any, NoReturn

import dsa_portable
from dsa_portable import asking, registry
from dsa_portable.errors import BackendError, BackendNotImportable, DSAError, InvalidArgument
from dsa_portable.operators import REQUESTS

FAILED, USAGE, INCOMPLETE, UNAVAILABLE = 1, 2, 3, 4


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    options = _parser().parse_args(arguments)
    try:
        code = options.run(options)
    except BackendError as exc:
        code = _say_error(exc, UNAVAILABLE, options.traceback)
    except DSAError as exc:
        code = _say_error(exc, USAGE, options.traceback)
    except KeyboardInterrupt:
        code = _say_error("interrupted before the first case", INCOMPLETE, options.traceback)
    except BrokenPipeError:
        code = USAGE
    except (Exception, SystemExit) as exc:
        # Nothing of ours exits before here: an exit is a plug-in's. Python's own exit code would be 1, or the plug-in's 0, and
        # those say that a case failed, or that none did.
        code = _say_error(exc, USAGE, options.traceback, _unexpected(exc))
    sys.exit(code)


def _say_error(error: object, code: int, traceback: bool, sentence: str = "") -> int:
    if traceback and isinstance(error, BaseException):
        print_exception(error)
    else:
        print(f"dsa-portable: {sentence or error}", file=sys.stderr)
    return code


def _unexpected(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name in ("pydantic", "onnx", "onnxruntime"):
        return f"{error.name} is not installed; run: pip install 'dsa-portable[cpu]'"
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__} in the harness or a plug-in ({first}); see where with: dsa-portable --traceback ..."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dsa-portable", description="DeepSeek Sparse Attention: backends and conformance.")
    parser.add_argument("--version", action="version", version=f"dsa-portable {dsa_portable.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error was raised")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    backends = commands.add_parser("backends", help="list all backends: available or why not, and what each declares")
    backends.set_defaults(run=_backends)

    run = commands.add_parser("conformance", help="run the conformance suite on a backend and write its report")
    _add_selection(run)
    run.set_defaults(run=_conformance, waivers=None)

    ci = commands.add_parser("ci", help="the same for a vendor's own CI: failures that he knows of are waived, new ones block")
    _add_selection(ci)
    ci.add_argument("--waivers", type=Path, required=True, metavar="FILE", help="TOML: id, owner, reason, issue, expires")
    ci.set_defaults(run=_conformance)

    certify = commands.add_parser("certify", help="the same for a certificate: whole, of a clean tree, with no waivers")
    _add_run(certify)
    certify.set_defaults(run=_certify)

    show = commands.add_parser("show", help="tell what is kept of a failed case: arrays, and where expected and got differ")
    show.add_argument("file", type=Path, metavar="FILE", help="failed/ID.npz of a report directory")
    show.set_defaults(run=_show)

    selftest = commands.add_parser("selftest", help="plant every known fault and see which case kills it; runs no backend")
    selftest.add_argument("--fault", action="append", default=[], metavar="CODE", help="this fault alone; may be repeated")
    selftest.add_argument(
        "--sample", type=int, metavar="N", help="every N-th fault, on the first input that is known to kill it"
    )
    selftest.add_argument("--jobs", type=int, metavar="N", help="processes (default: one for each core)")
    selftest.add_argument("--honest", action="store_true", help="judge the honest population instead: nobody may be accused")
    selftest.add_argument("--out", type=Path, metavar="FILE", help="results of --honest, line by line; a run goes on from them")
    selftest.set_defaults(run=_selftest)

    bench = commands.add_parser("bench", help="time a backend beside what its machine and its peers give in the same run")
    bench.add_argument("--backend", help="name; default: DSA_BACKEND, else cpu")
    bench.add_argument("--op", metavar="OPERATOR", help="lightning_index or sparse_attend alone (default both)")
    bench.add_argument(
        "--out", type=Path, default=Path("dsa-bench"), metavar="DIR", help="for bench.json and bench.md (dsa-bench)"
    )
    bench.add_argument(
        "--check", action="store_true", help="compare every call with float64 at a small size, before it is timed"
    )
    bench.add_argument("--only", default="", metavar="TEXT", help="only workloads with this in their name")
    bench.add_argument("--peer", action="append", default=[], metavar="NAME", help="only this peer; may be repeated")
    bench.add_argument(
        "--curve", "--plot", action="store_true", help="also what longer contexts cost against dense attention, drawn as SVG"
    )
    bench.set_defaults(run=_bench)

    build = commands.add_parser("compile", help="build the CUDA backend's kernels for chips that are not there; runs nothing")
    build.add_argument("--target", required=True, metavar="CHIPS", help="for example sm_80,sm_90,sm_100,gfx942")
    build.add_argument("--only", default="", metavar="TEXT", help="only configurations with this in their name")
    build.set_defaults(run=_compile)

    export = commands.add_parser("export", help="write the CPU backend's operators as ONNX models")
    export.add_argument("what", choices=["onnx"])
    export.add_argument("directory", type=Path)
    export.set_defaults(run=_export)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    """What every run can be told."""
    parser.add_argument("--backend", help="name; default: DSA_BACKEND, else cpu")
    parser.add_argument(
        "--list",
        default="core",
        metavar="NAME",
        help="the list to run: core-2026.11 or another release, or a family (smoke, core, deterministic, full, parts)",
    )
    parser.add_argument("--out", type=Path, help="report directory (default dsa-report, with --case dsa-report-case)")
    parser.add_argument("--timeout-scale", type=float, default=1.0, metavar="X", help="multiply every time limit")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes that judge (default: one for each core)")


def _add_selection(parser: argparse.ArgumentParser) -> None:
    """And one that need not be all of it."""
    _add_run(parser)
    parser.add_argument("--level", help=argparse.SUPPRESS)  # the name that --list had; it goes in 0.2.0
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="ID",
        help="run this case alone, or those that a pattern matches; may be repeated",
    )
    parser.add_argument("--list-cases", action="store_true", help="print the list's case ids and what each is for, and stop")
    parser.add_argument("--fail-fast", action="store_true", help="stop after the first FAIL or ERROR")
    parser.add_argument("--once", action="store_true", help="do not ask what passed a second time: quicker, and earns no claim")
    parser.add_argument("--resume", action="store_true", help="go on with the interrupted run in the report directory")
    parser.add_argument("--emulate", metavar="CHIP", help="let the backend stand in for a chip; the evidence is then EMULATED")


# A closed terminal, Ctrl-C, and a CI job that is cancelled.
_ENDS = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGINT", "SIGTERM") if hasattr(signal, name))


def _terminated(signum: int, frame: FrameType | None) -> None:
    # Once: the report is being written then, and a second one would lose it.
    for end in _ENDS:
        signal.signal(end, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_with_a_report() -> None:
    """However the run is ended, it leaves a report of what was done."""
    for end in _ENDS:
        if signal.getsignal(end) is not signal.SIG_IGN:  # as nohup wants it
            signal.signal(end, _terminated)


def _conformance(options: argparse.Namespace) -> int:
    lists = importlib.import_module("dsa_portable.conformance.lists")
    if options.level is not None:
        print("dsa-portable: --level goes in dsa-portable 0.2.0; use --list.", file=sys.stderr)
        options.list = options.level
    if options.list_cases:
        catalogue = importlib.import_module("dsa_portable.conformance.cases.catalogue")
        for case_id in lists.load(options.list).cases:
            print(f"{case_id}\n    {catalogue.CASES[case_id].why} [{', '.join(catalogue.CASES[case_id].hazards)}]")
        return 0
    report = _report(
        options,
        # A rerun of one case must not replace the report that named it.
        out=options.out or Path("dsa-report-case" if options.case else "dsa-report"),
        cases=options.case,
        resume=options.resume,
        emulate=options.emulate,
        fail_fast=options.fail_fast,
        once=options.once,
        waivers=options.waivers,
    )
    return int(report.exit_code)


def _certify(options: argparse.Namespace) -> int:
    report = _report(options, out=options.out or Path("dsa-report"), certify=True)
    return int(report.exit_code) or (0 if report.level else INCOMPLETE)


def _report(options: argparse.Namespace, **run: Any) -> Any:
    _end_with_a_report()
    return importlib.import_module("dsa_portable.conformance").run(
        backend=options.backend,
        list=options.list,
        jobs=options.jobs,
        timeout_scale=options.timeout_scale,
        say=lambda line: print(line, flush=True),
        command=shlex.join(["dsa-portable", *sys.argv[1:]]),
        tty=sys.stdout.isatty(),
        **run,
    )


def _show(options: argparse.Namespace) -> int:
    print(importlib.import_module("dsa_portable.conformance.report.show").show(options.file))
    return 0


def _honest(options: argparse.Namespace) -> int:
    population = importlib.import_module("dsa_portable.conformance.selftest.population")
    units = population.units() if options.sample is None else population.sample(options.sample)
    found = population.run(units, (), options.jobs, options.out, partial(print, flush=True))
    print("\n".join([*population.table(found), population.verdict(found)]))
    return FAILED if any(rule for unit in found.values() for rule, _ in unit.values()) else 0


def _selftest(options: argparse.Namespace) -> int:
    if options.honest:
        print("evidence SELFTEST: the suite examines itself, no backend is run")
        return _honest(options)
    matrix = importlib.import_module("dsa_portable.conformance.selftest.matrix")
    print("evidence SELFTEST: the suite examines itself, no backend is run")
    say = partial(print, flush=True)
    if options.sample is not None:
        found = matrix.sample(options.sample, options.jobs, say)
    else:
        found = matrix.run(options.fault, None, options.jobs, say)
    problems = matrix.problems(found)
    print("\n".join([*problems, matrix.verdict(found)]))
    return FAILED if problems else 0


def _backends(options: argparse.Namespace) -> int:
    for name in registry.names():
        said = asking.ask(name)
        print("\n".join(said.lines or (f"{name}: unavailable", f"  reason      {said.problem}")))
    return 0


def _bench(options: argparse.Namespace) -> int:
    run = importlib.import_module("dsa_portable.conformance.bench.run")
    _end_with_a_report()
    if registry.requested(options.backend) is None:
        print("no backend named (--backend, DSA_BACKEND): this run is of the cpu backend")
    return int(
        run.run(
            backend=options.backend,
            operator=options.op,
            out=options.out,
            check=options.check,
            only=options.only,
            peers=options.peer,
            curve=options.curve,
            say=lambda line: print(line, flush=True),
            command=shlex.join(["dsa-portable", *sys.argv[1:]]),
        )
    )


def _compile(options: argparse.Namespace) -> int:
    try:
        importlib.import_module("triton")
        module = importlib.import_module("dsa_portable.backends.cuda.compile")
        rows = module.table(options.target.split(","), options.only)
    except ImportError as exc:
        raise BackendNotImportable.because("cuda", exc, "pip install 'dsa-portable[cuda]'") from exc
    print(f"evidence COMPILE-ONLY: built, 0 tests executed\n\n{module.HEADER}")
    found = []
    for row in rows:
        print(row.line(), flush=True)
        found.append(row)
    if not found:
        return INCOMPLETE
    return FAILED if any(row.problem for row in found) else 0


def _export(options: argparse.Namespace) -> int:
    graphs = Path(importlib.import_module("dsa_portable.backends.cpu").__file__ or "").parent / "graphs"
    # Of whole operators, a model per format; the others are tiles, for engines.
    models = sorted(path for path in graphs.glob("*.*.onnx") if path.name.partition(".")[0] in REQUESTS)
    try:
        options.directory.mkdir(parents=True, exist_ok=True)
        for model in models:
            shutil.copyfile(model, options.directory / model.name)
            print(options.directory / model.name)
    except OSError as exc:
        raise InvalidArgument(f"{options.directory} cannot be written ({exc.strerror}); name a directory that can.") from exc
    return 0


if __name__ == "__main__":
    main()
