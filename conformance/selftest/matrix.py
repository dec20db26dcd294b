"""Every planted fault on every input: which rule kills it where, who survives, and whether an honest kernel is accused.

`python -m dsa_portable.conformance.selftest.matrix` writes kills.json; `dsa-portable selftest` compares with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np

from dsa_portable.conformance.cases.call import Call, Outputs, Steps, drive
from dsa_portable.conformance.judging.judge import judge_call, judge_calls, reference_of
from dsa_portable.conformance.selftest import lightning_index, sparse_attend
from dsa_portable.conformance.selftest.inputs import INPUTS
from dsa_portable.conformance.selftest.plant import Fault, Kernel, kernel
from dsa_portable.conformance.selftest.pool import pool
from dsa_portable.errors import DSAError
from dsa_portable.profile import Profile

KILLS = Path(__file__).with_name("kills.json")
MODULES = MappingProxyType({"lightning_index": lightning_index, "sparse_attend": sparse_attend})
FAULTS: Mapping[str, Fault] = MappingProxyType({fault.code: fault for module in MODULES.values() for fault in module.FAULTS})
OPERATOR: Mapping[str, str] = MappingProxyType({f.code: name for name, module in MODULES.items() for f in module.FAULTS})
HONEST = ""  # in the place of a fault's code
# code -> input -> the rule that the fault breaks there
Kills = dict[str, dict[str, str]]


class SelftestError(DSAError, ValueError):
    """There is no such fault."""


@dataclass
class Matrix:
    """`kills`, the inputs that `accused` the honest kernel and why, and faults that changed no output anywhere."""

    names: list[str] = field(default_factory=list)  # of the inputs that were tried
    kills: Kills = field(default_factory=dict)
    accused: dict[str, str] = field(default_factory=dict)
    idle: set[str] = field(default_factory=set)

    def add(self, name: str, code: str, status: str, why: str, changed: bool) -> None:
        """What became of a fault, or of the honest kernel, on an input."""
        if code == HONEST and status != "PASS":
            self.accused[name] = why
        if code != HONEST and status == "FAIL":
            self.kills[code][name] = why
        if changed:
            self.idle.discard(code)


def planted(code: str, operator: str, profile: Profile) -> Kernel:
    """A fresh kernel with the fault of this code, or the honest one. Raises PlantError."""
    return kernel(profile, FAULTS[code], vars(MODULES[operator])) if code else kernel(profile)


def _try(name: str, codes: Sequence[str]) -> dict[str, tuple[str, str, bool]]:
    """code -> (status, rule or reason, some output is not the honest one's), the honest kernel's among them."""
    case, steps = INPUTS[name].made()
    profile = INPUTS[name].profile
    honest: list[Outputs] = []
    calls = _record(planted(HONEST, case.operator, profile), steps, honest)
    # Of one call, everything but the outputs is the same for all kernels; of several, later calls may depend on results.
    reference = None
    if len(calls) == 1:
        with np.errstate(all="ignore"):
            reference = reference_of(case, calls[0], profile)

    def tried(code: str) -> tuple[str, str, bool]:
        running, outputs, made = planted(code, case.operator, profile), list[Outputs](), calls
        if len(calls) == 1:
            outputs.append(running.run(calls[0]))
        else:
            made = _record(running, INPUTS[name].made()[1], outputs)
        changed = any(_differ(one, other) for one, other in zip(honest, outputs, strict=True))
        if code and not changed:
            return "PASS", "", False
        with np.errstate(all="ignore"):
            if reference is None:
                verdict = judge_calls(case, made, outputs, lambda call: profile)
            else:
                verdict = judge_call(case, made[0], outputs[0], reference)
        return verdict.status, verdict.rule or verdict.reason, changed

    return {code: tried(code) for code in (HONEST, *codes)}


def _record(running: Kernel, steps: Steps, outputs: list[Outputs]) -> list[Call]:
    def answer(call: Call) -> Outputs:
        outputs.append(running.run(call))
        return outputs[-1]

    return drive(steps, answer)


def _differ(one: Outputs, other: Outputs) -> bool:
    return one.keys() != other.keys() or any(one[name].tobytes() != other[name].tobytes() for name in one)


def run(
    codes: Iterable[str] = (),
    names: Iterable[str] | None = None,
    jobs: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Matrix:
    """Plant the faults of these codes, else all, and try each on the inputs of its operator, else all. Raises SelftestError."""
    codes, matrix = [*codes] or [*FAULTS], Matrix()
    matrix.names = [*(INPUTS if names is None else names)]
    if unknown := [code for code in codes if code not in FAULTS]:
        raise SelftestError(f"fault {unknown[0]!r} is not planted, but {', '.join(FAULTS)} are; name one of them.")
    matrix.kills, matrix.idle = {code: {} for code in codes}, {*codes}
    with pool(jobs) as processes:
        for dear in (False, True):
            chosen = [name for name in matrix.names if INPUTS[name].dear is dear]
            left = {name: [c for c in _of(name, codes) if not (dear and matrix.kills[c])] for name in chosen}
            tried = {name: processes.submit(_try, name, mine) for name, mine in left.items() if mine}
            for name, future in tried.items():
                for code, (status, why, changed) in future.result().items():
                    matrix.add(name, code, status, why, changed)
                say(f"{name}: {sum(name in matrix.kills[c] for c in left[name])} of {len(left[name])} faults killed")
    return matrix


def sample(every: int, jobs: int | None = None, say: Callable[[str], None] = lambda line: None) -> Matrix:
    """Every so many faults, on the inputs that kills.json names first for one of them."""
    if every < 1:
        raise SelftestError(f"--sample is {every}, but a number from 1 on is accepted: every so many faults are tried.")
    known, codes = recorded(), [*FAULTS][::every]
    return run(codes, dict.fromkeys(next(iter(known[code])) for code in codes), jobs, say)


def problems(matrix: Matrix) -> list[str]:
    """What is wrong, a line each: survivors, an honest kernel accused, idle edits, another result than kills.json has."""
    known, found = recorded(), []
    for code, killed in matrix.kills.items():
        title, expected = FAULTS[code].title, {n: rule for n, rule in known.get(code, {}).items() if n in matrix.names}
        if code in matrix.idle:
            found.append(f"IDLE      {code} ({title}) changes no output on any input")
        elif not killed:
            found.append(f"SURVIVOR  {code} ({title}) passes {len(_inputs_of(matrix, code))} inputs")
        # A dear input is tried, and so recorded, only where nothing else killed.
        judged = {**expected, **{name: rule for name, rule in killed.items() if not INPUTS[name].dear}}
        if differ := [name for name in judged if killed.get(name) != expected.get(name)]:
            what = f"{differ[0]}: {killed.get(differ[0], 'passes')}, and kills.json has {expected.get(differ[0], 'nothing')}"
            found.append(f"CHANGED   {code} ({title}) on {what}")
    return [*found, *(f"ACCUSED   the honest kernel on {name}: {why}" for name, why in matrix.accused.items())]


def _inputs_of(matrix: Matrix, code: str) -> list[str]:
    return [name for name in matrix.names if code in _of(name, [code])]


def verdict(matrix: Matrix) -> str:
    """The last line."""
    killed = sum(bool(killed) for killed in matrix.kills.values())
    honest = "the honest kernels pass" if not matrix.accused else f"an honest kernel is accused on {len(matrix.accused)}"
    return f"{killed} of {len(matrix.kills)} faults killed, {honest} (SELFTEST)"


def _of(name: str, codes: Iterable[str]) -> list[str]:
    operator = "lightning_index" if name.startswith("index-") else "sparse_attend"
    return [code for code in codes if OPERATOR[code] == operator]


def recorded() -> Kills:
    """kills.json."""
    kills: Kills = json.loads(KILLS.read_text(encoding="utf-8"))
    return kills


def text(kills: Kills) -> str:
    """What kills.json holds: a fault a line."""
    rows = ",\n".join(f" {json.dumps(code)}: {json.dumps(killed)}" for code, killed in kills.items())
    return f"{{\n{rows}\n}}\n"


if __name__ == "__main__":
    KILLS.write_text(text(run(say=partial(print, flush=True)).kills), encoding="utf-8")
