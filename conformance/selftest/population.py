"""Judges the honest population: `dsa-portable selftest --honest`. Whoever is accused here is accused wrongly.

The proofs (structure, certificate, bounds) need no numbers set: every core case is run once, by a quarter of the kernels. The
statistical rules have constants: ten seeds of small templates say whether they are wide enough, ten others count.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from dsa_portable.conformance.cases.catalogue import CASES, LISTS
from dsa_portable.conformance.cases.core import LSE, SCORES
from dsa_portable.conformance.cases.lightning_index import IndexCase
from dsa_portable.conformance.cases.sparse_attend import AttendCase
from dsa_portable.conformance.judging import bounds
from dsa_portable.conformance.judging.judge import judge_call, reference_of
from dsa_portable.conformance.judging.lightning_index import Truth
from dsa_portable.conformance.selftest.honest import KERNELS
from dsa_portable.conformance.selftest.pool import pool
from dsa_portable.errors import DSAError
from dsa_portable.profile import envelope

Single: TypeAlias = IndexCase | AttendCase
# Kernel -> (rule that it broke, or status, or empty; share of each limit that it used).
Found: TypeAlias = dict[str, tuple[str, dict[str, float]]]

FOLDER = Path(__file__).parent
# Seeds 10 to 19 and 20 to 29 counted before. Each ten showed one alarm (a third order of summation; what overflows beside a
# maximum that is renewed late), which was mended, and so count no more.
SETTING, COUNTING = (tuple(f"honest {first + i} " for i in range(10)) for first in (0, 30))


def _index(name: str, format: str, requests: tuple[tuple[int, int], ...], **fields: Any) -> IndexCase:
    return IndexCase(f"honest-index-{name}", "Honest kernels.", (), format, requests, options=SCORES, **fields)


def _attend(name: str, format: str, logits: str, **fields: Any) -> AttendCase:
    return AttendCase(
        f"honest-attend-{name}", "Honest kernels.", (), format, ((2, 3000),), logits=logits, options=LSE, **fields
    )


# Core cases are many and long: each is run by one kernel in so many, the next by the next ones.
PARTS = 4
# At most 2^14 rows times keys, or 2 rows: statistics need many draws more than they need large ones.
TEMPLATES: Mapping[str, Single] = MappingProxyType(
    {
        case.id: case
        for case in (
            _index("e4m3", "e4m3/f32/f32", ((4, 4096),)),
            _index("e4m3-heads32", "e4m3/f32/f32", ((2, 8192),), heads=32),
            _index("e4m3-topk512", "e4m3/f32/f32", ((8, 2048),), topk=512),
            _index("e4m3-powers", "e4m3/f32/f32", ((4, 4096),), power_of_two_scales=True),
            _index("e4m3-codes", "e4m3/f32/f32", ((4, 4096),), content="codes"),
            _index("e4m3-clustered", "e4m3/f32/f32", ((4, 4096),), content="clustered"),
            _index("e4m3-bf16", "e4m3/bf16/f32", ((4, 4096),)),
            _index("e4m3-dim64", "e4m3/f32/f32", ((4, 4096),), head_dim=64),
            _index("int8", "int8/f32/f32", ((4, 4096),)),
            _index("int8-f16", "int8/f16/f16", ((4, 4096),)),
            _index("int8-clustered", "int8/f16/f16", ((4, 4096),), content="clustered", topk=512),
            _index("bf16", "bf16/f32/-", ((4, 4096),)),
            _index("bf16-bf16", "bf16/bf16/-", ((4, 4096),), heads=32),
            _index("bf16-clustered", "bf16/f32/-", ((4, 4096),), content="clustered"),
            _index("f16", "f16/f16/-", ((4, 4096),)),
            _index("ragged", "e4m3/f32/f32", ((2, 2100), (1, 5000), (2, 2500))),
            _attend("bf16-flat", "bf16", "flat", heads=64),
            _attend("bf16-peaked", "bf16", "peaked", heads=128),
            _attend("bf16-hot", "bf16", "hot", heads=64),
            _attend("bf16-heads8", "bf16", "peaked", heads=8),
            _attend("bf16-sink", "bf16", "peaked", heads=16, sink=True),
            _attend("bf16-topk512", "bf16", "hot", heads=16, topk=512),
            _attend("bf16-dim512", "bf16", "peaked", heads=16, dims=(512, 512)),
            _attend("bf16-full", "bf16", "flat", heads=16, holes=False),
            _attend("f16-peaked", "f16", "peaked", heads=64),
            _attend("f16-hot", "f16", "hot", heads=16),
            _attend("f32-flat", "f32", "flat", heads=16),
            _attend("f32-peaked", "f32", "peaked", heads=64),
            _attend("f32-hot", "f32", "hot", heads=16),
            _attend("nsr-peaked", "v32_fp8_656_nsr", "peaked", heads=64),
            _attend("nsr-f32-hot", "v32_fp8_656_nsr_f32", "hot", heads=16),
            _attend("int8-flat", "ascend_656_nrs_int8", "flat", heads=16),
        )
    }
)
# Where each statistical rule's share of its limit is found: (metric, its limit: a number or another metric).
SHARES: Mapping[str, tuple[str, str | float]] = MappingProxyType(
    {
        "certificate": ("v", 1.0),
        "population": ("exchanged", "exchanged_limit"),
        "score": ("score_error_over_bound", 1.0),
        "score rms": ("score_rms_error", "score_rms_limit"),
        "bound": ("error_over_bound", 1.0),
        "rms": ("rms_ratio", bounds.KAPPA),
        "bias": ("slope_excess", "slope_limit"),
        "lse": ("lse_error_over_bound", 1.0),
        "lse rms": ("lse_rms_ratio", bounds.KAPPA),
    }
)


class PopulationError(DSAError, ValueError):
    """No honest kernel has this name, or there is no such sample."""


@dataclass(frozen=True)
class Unit:
    """A case that all honest kernels of its operator run, with the seed of its values."""

    case: str
    seed: str = ""
    part: int | None = None  # of the operator's kernels every fourth, from this one on; None: all

    @property
    def key(self) -> str:
        """How a file of results names it."""
        return f"{self.case} | {self.seed.strip()}"


def units() -> list[Unit]:
    """Every core case of one call, by a quarter of the kernels in turn, then every template with every seed, by all."""
    singles = [id for id in LISTS["core"] if isinstance(CASES[id], IndexCase | AttendCase)]
    proofs = [Unit(id, part=i % PARTS) for i, id in enumerate(singles)]
    return proofs + [Unit(id, seed) for seed in (*SETTING, *COUNTING) for id in TEMPLATES]


def sample(every: int) -> list[Unit]:
    """Every so many templates, with the first counting seed. Raises PopulationError."""
    if every < 1:
        raise PopulationError(f"--sample is {every}, but a number from 1 on is accepted: every so many templates are run.")
    return [Unit(id, COUNTING[0]) for id in [*TEMPLATES][::every]]


def judged(unit: Unit, names: Sequence[str]) -> Found:
    """What the judge says of each kernel on a unit; truth and call are shared by all, a reference by those of one profile."""
    case = TEMPLATES.get(unit.case) or CASES[unit.case]
    assert isinstance(case, IndexCase | AttendCase)
    call = case.build(unit.seed)
    truth: dict[bool, list[Truth]] = {}
    reference = cache(lambda profile: reference_of(case, call, profile, truth=truth))
    found: Found = {}
    mine = [name for name in names if KERNELS[name].operator == case.operator]
    for name in mine if unit.part is None else mine[unit.part :: PARTS]:
        honest = KERNELS[name]
        with np.errstate(all="ignore"):
            verdict = judge_call(case, call, honest.kernel().run(call), reference(honest.profile))
        found[name] = (
            ("" if verdict.status in ("PASS", "UNSUPPORTED") else verdict.rule or verdict.status),
            _shares(verdict.metrics),
        )
    return found


def _shares(metrics: Mapping[str, Any]) -> dict[str, float]:
    known = dict(metrics)
    if "slope" in known:
        known["slope_excess"] = bounds.slope_excess(known["slope"], known["slope_emulated"])
    found = {}
    for rule, (metric, limit) in SHARES.items():
        allowed = known.get(limit) if isinstance(limit, str) else limit
        if known.get(metric) is not None and allowed:
            found[rule] = float(f"{known[metric] / allowed:.3g}")
    return found


def version() -> str:
    """Of everything that results follow from: kernels, judge and cases. Results of another version are not resumed."""
    digest = sha256()
    for folder in ("judging", "selftest", "cases"):
        for path in sorted((FOLDER.parent / folder).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run(
    chosen: Iterable[Unit],
    names: Sequence[str] = (),
    jobs: int | None = None,
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Found]:
    """Unit key -> what was found; each unit is appended to `out` as it is done, and not run again. Raises PopulationError."""
    names = [*names] or [*KERNELS]
    if unknown := [name for name in names if name not in KERNELS]:
        raise PopulationError(f"honest kernel {unknown[0]!r} does not exist, but {'; '.join(KERNELS)} do; name one of them.")
    mark, chosen = version(), list(chosen)
    done = dict(_resumed(out, mark)) if out else {}
    with pool(jobs) as processes:
        waiting = {processes.submit(judged, unit, names): unit for unit in chosen if unit.key not in done}
        for future in as_completed(waiting):
            unit = waiting[future]
            done[unit.key] = future.result()
            if out:
                with out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"version": mark, "unit": unit.key, "found": done[unit.key]}) + "\n")
            accused = [f"{name} ({rule})" for name, (rule, _) in done[unit.key].items() if rule]
            say(f"{unit.key}: {len(accused)} of {len(done[unit.key])} honest kernels accused {', '.join(accused)}".rstrip())
    return {unit.key: done[unit.key] for unit in chosen}


def _resumed(out: Path, mark: str) -> Iterator[tuple[str, Found]]:
    for line in out.read_text(encoding="utf-8").splitlines() if out.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the line that an interrupted run was writing
        if row["version"] == mark:
            yield row["unit"], {name: (rule, shares) for name, (rule, shares) in row["found"].items()}


def table(results: Mapping[str, Found]) -> list[str]:
    """A kernel a line: alarms in proofs, of the setting seeds and of the counting ones, and the largest share of a limit."""
    groups = {"proofs": ("",), "setting": SETTING, "counting": COUNTING}
    seeds = {seed.strip(): group for group, names in groups.items() for seed in names}
    lines = [f"{'honest kernel':62} {'envelope':11} {'proofs':>7} {'setting':>8} {'counting':>9}  largest share of a limit"]
    for name, honest in KERNELS.items():
        alarms, shares = dict.fromkeys(groups, 0), dict[str, float]()
        for key, found in results.items():
            if name in found:
                rule, used = found[name]
                alarms[seeds[key.partition(" | ")[2]]] += bool(rule)
                for each, share in used.items():
                    shares[each] = max(shares.get(each, 0.0), share)
        if shares:
            most = sorted(shares, key=lambda rule: -shares[rule])[:2]
            largest = ", ".join(f"{rule} {shares[rule]:.2f}" for rule in most)
            inside = envelope(honest.operator, honest.profile) or "none"
            lines.append(f"{name:62} {inside:11} {alarms['proofs']:7} {alarms['setting']:8} {alarms['counting']:9}  {largest}")
    return lines


def verdict(results: Mapping[str, Found]) -> str:
    """The last line."""
    rows = [(rule, name) for found in results.values() for name, (rule, _) in found.items()]
    alarms = sum(bool(rule) for rule, _ in rows)
    return f"{len({name for _, name in rows})} honest kernels, {len(rows)} verdicts, {alarms} alarms (SELFTEST)"
