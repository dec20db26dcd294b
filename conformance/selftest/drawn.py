"""How many mechanically drawn faults of a backend a frozen list kills: `python -m dsa_portable.conformance.selftest.drawn`.

Each fault runs in the process of a real run, case by case beside the honest backend, small cases first. Where both return the
same bits there is nothing to judge; else the judge of a real run says whether it is killed. A fault that changes nothing on any
case is idle: somebody should look, and where no call can show it, say why in EQUIVALENT.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dsa_portable.conformance import lists
from dsa_portable.conformance.cases.catalogue import CASES, Case
from dsa_portable.conformance.cases.relation import PipelineCase, RelationCase
from dsa_portable.conformance.execute.chip import WORKER, Chip
from dsa_portable.conformance.execute.declaration import subject_of
from dsa_portable.conformance.execute.recording import Recording, Subject
from dsa_portable.conformance.judging.judge import judge
from dsa_portable.conformance.judging.process import ONE_THREAD, cores
from dsa_portable.conformance.selftest.edits import (
    SEED,
    SOURCES,
    VARIABLES,
    Edit,
    draw,
    folder_of,
    package_of,
    transplant,
)
from dsa_portable.conformance.selftest.pool import pool
from dsa_portable.errors import BackendError

PLANTED = "dsa_portable.conformance.selftest.planted_worker"
COUNT = 15
# (file, line before, line after) -> why no call can show it, in one sentence.
EQUIVALENT: Mapping[tuple[str, str, str], str] = MappingProxyType(
    {
        (
            "sparse_attend.py",
            "if len(positions) <= step:",
            "if len(positions) < step:",
        ): "Where the keys fill one step, the loop over steps has one: the same numbers in the same order.",
        (
            "index_select.py",
            "keys = np.where(np.isnan(scores), np.float32(-np.inf), scores)",
            "keys = np.where(np.isnan(scores), np.float16(-np.inf), scores)",
        ): "Minus infinity is the same number in float16.",
        (
            "sparse_attend.py",
            "step = 1 << (max(64, memory // (4 * (3 * width + 3 * heads))).bit_length() - 1)",
            "step = 1 << (min(64, memory // (4 * (3 * width + 3 * heads))).bit_length() - 1)",
        ): "A step only splits a sum, whose order the contract leaves open: the bits differ and every bound holds.",
        (
            "kernels/sparse_attend.py",
            "other = tl.load(part_out + place[:, None] * VALUE_DIM + dims[None, :], mask=real_head[:, None], other=0.0)",
            "other = tl.load(part_out + place[:, None] * VALUE_DIM + dims[None, :], mask=real_head[:, None])",
        ): "What is loaded for a head that is not there meets no other head, and write_row stores it nowhere.",
        (
            "kernels/lightning_index.py",
            "stop = tl.minimum(begin + ROWS, last_row)",
            "stop = (last_row)",
        ): "A program then computes the rows behind its own as well: the same numbers, written where they stand; it is slower.",
        (
            "kernels/top_k.py",
            "enough = above >= wanted",
            "enough = above > wanted",
        ): "Where as many as are wanted lie above, the search ends one key lower and takes none of those there: the same set.",
    }
)


@dataclass
class Trial:
    """What became of an edit: `killed_by` has case, rule and reason; else it survived `cases`, or `changed` no output there."""

    number: int
    edit: Edit
    cases: int = 0
    changed: bool = False
    killed_by: dict[str, str] = field(default_factory=dict)

    @property
    def result(self) -> str:
        """`killed`, `survived`, `idle` or `equivalent`."""
        if self.killed_by:
            return "killed"
        return "equivalent" if self.proof else "survived" if self.changed else "idle"

    @property
    def proof(self) -> str:
        """Why no call can show it; empty: nobody says so."""
        return EQUIVALENT.get((self.edit.file, self.edit.before, self.edit.after), "")

    @property
    def row(self) -> dict[str, Any]:
        """As drawn.json has it."""
        edit = {name: getattr(self.edit, name) for name in ("file", "line", "kind", "before", "after")}
        found = {"result": self.result, "cases": self.cases, "killed_by": self.killed_by or None, "proof": self.proof or None}
        return {"number": self.number, **edit, **found}


def size(case: Case) -> int:
    """Of its inputs and its work, roughly: queries x keys x heads."""
    if isinstance(case, PipelineCase):
        return size(case.index) + size(case.attend)
    if isinstance(case, RelationCase):
        return 2 * size(case.base)
    return sum((rows + 1) * keys for rows, keys in case.requests) * getattr(case, "heads", 1)


@dataclass
class Bench:
    """The honest backend's process and answers, and what trials beside it share."""

    backend: str
    cases: Sequence[str]
    frozen: lists.FrozenList
    folder: Path
    judges: Executor
    scale: float
    honest: dict[str, Future[Recording]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.chip, self.asker = self._chip("honest", (WORKER,)), ThreadPoolExecutor(1)
        self.subject: Subject = subject_of(
            self.backend,
            self.chip.hello,
            list_name=self.frozen.name,
            list_sha256=self.frozen.sha256,
            requested=self.backend,
            emulate=None,
            variables=VARIABLES[self.backend],
        )
        self.honest = {id: self.asker.submit(self.chip.record, id) for id in self.cases}

    def _chip(self, name: str, module: Sequence[str]) -> Chip:
        recordings = self.folder / name / "recordings"
        recordings.mkdir(parents=True)
        log = self.folder / f"{name}.log"
        return Chip(self.backend, recordings, self.frozen.name, scale=self.scale, log=log, module=module)

    def close(self) -> None:
        """End the honest backend, and what it is at."""
        self.asker.shutdown(wait=False, cancel_futures=True)
        self.chip.close()

    def judged(self, found: Recording) -> tuple[str, str, str]:
        """(status, rule, reason) as a run would report them."""
        row = self.judges.submit(judge, CASES[found.case], found, self.subject).result()
        return str(row.status.value), row.rule or "", row.reason or ""

    def trial(self, number: int, edit: Edit) -> Trial:
        """Case by case until one kills."""
        tried = Trial(number, edit)
        planted = transplant(self.backend, edit, self.folder / f"{number}")
        try:
            chip = self._chip(f"{number}", (PLANTED, package_of(self.backend).rpartition(".")[0], str(planted)))
        except BackendError as exc:
            tried.killed_by = {"case": "", "rule": "ERROR", "reason": str(exc)}
            return tried
        with closing(chip):
            for id in self.cases:
                honest, found = self.honest[id].result(), chip.record(id)
                tried.cases += found.status != "unsupported"
                if _answer(found) != _answer(honest):
                    tried.changed = True
                    status, rule, reason = self.judged(found)
                    # Where the honest backend fails too, the case says nothing of the edit.
                    if status in ("FAIL", "ERROR") and self.judged(honest)[0] not in ("FAIL", "ERROR"):
                        tried.killed_by = {"case": id, "rule": rule or status, "reason": reason}
                        break
                (chip.folder / f"{id}.npz").unlink(missing_ok=True)
        return tried


def _answer(found: Recording) -> tuple[Any, ...]:
    return found.status, found.capability, found.calls, found.outputs_sha256, found.changed_inputs


def run(
    backend: str,
    drawn: Mapping[int, Edit],
    frozen: lists.FrozenList,
    patterns: Sequence[str] = (),
    jobs: int | None = None,
    scale: float = 0.5,
    say: Callable[[str], None] = lambda line: None,
) -> list[Trial]:
    """Try each edit on the cases of a list that a pattern matches, else all.

    Raises ListError, or BackendError where the honest backend cannot be started.
    """
    wanted = frozen.matching(patterns)
    cases = sorted((id for id in frozen.cases if id in wanted), key=lambda id: size(CASES[id]))
    os.environ.update({**ONE_THREAD, **VARIABLES[backend]})
    jobs, trials = jobs or cores(), []
    with (
        tempfile.TemporaryDirectory(prefix="dsa-drawn-") as folder,
        pool(jobs) as judges,
        closing(Bench(backend, cases, frozen, Path(folder), judges, scale)) as bench,
        ThreadPoolExecutor(jobs) as threads,
    ):
        waiting = [threads.submit(bench.trial, number, edit) for number, edit in drawn.items()]
        for future in as_completed(waiting):
            trials.append(future.result())
            say(line(trials[-1]))
    return sorted(trials, key=lambda trial: trial.number)


def line(trial: Trial) -> str:
    """A trial in a line."""
    how = f"by {trial.killed_by['case'] or 'its start'} ({trial.killed_by['rule']})" if trial.killed_by else ""
    edit = trial.edit
    return f"{trial.number:3} {trial.result} {how} after {trial.cases} cases: {shown(edit)}".replace("  after", " after")


def shown(edit: Edit) -> str:
    """An edit in a line."""
    return f"{edit.file}:{edit.line} {edit.kind}: {edit.before}  ->  {edit.after}"


def sources_sha256(backend: str) -> str:
    """Of everything that is edited: other sources draw other edits."""
    digest = hashlib.sha256()
    for file in SOURCES[backend]:
        digest.update((folder_of(backend) / file).read_bytes())
    return digest.hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, try, say, and write drawn.json."""
    parser = argparse.ArgumentParser(description="Draw faults of a backend's sources by a seed and see which case kills each.")
    parser.add_argument("--backend", choices=[*SOURCES], action="append", help="default: every one")
    parser.add_argument("--count", type=int, default=COUNT, help=f"edits of each backend ({COUNT})")
    parser.add_argument("--seed", default=SEED, help=f"what they are drawn by ({SEED})")
    parser.add_argument("--list", default="core", help="a frozen list, or a family for its newest (core)")
    parser.add_argument("--case", action="append", default=[], metavar="PATTERN", help="only these of it; may be repeated")
    parser.add_argument("--only", default="", metavar="N,N", help="only the edits of these numbers")
    parser.add_argument("--jobs", type=int, help="trials at a time, and judges (one for each core)")
    parser.add_argument("--timeout-scale", type=float, default=0.5, help="of two minutes for a case (0.5)")
    parser.add_argument("--out", type=Path, default=Path("drawn.json"), metavar="FILE", help="for the results (drawn.json)")
    parser.add_argument("--show", action="store_true", help="print the edits and try none")
    options = parser.parse_args(arguments)
    only, frozen, say = {int(n) for n in options.only.split(",") if n}, lists.load(options.list), partial(print, flush=True)
    report: dict[str, Any] = {"seed": options.seed, "list": frozen.name, "cases": options.case, "backends": {}}
    for backend in options.backend or SOURCES:
        drawn = dict(enumerate(draw(backend, options.count, options.seed), 1))
        drawn = {number: edit for number, edit in drawn.items() if not only or number in only}
        if options.show:
            say("\n".join(f"{backend} {number:3} {shown(edit)}" for number, edit in drawn.items()))
            continue
        trials = run(backend, drawn, frozen, options.case, options.jobs, options.timeout_scale, say)
        counts = {result: sum(t.result == result for t in trials) for result in ("killed", "survived", "idle", "equivalent")}
        say(f"{backend}: " + ", ".join(f"{count} {result}" for result, count in counts.items()) + " (SELFTEST)")
        report["backends"][backend] = {"sources_sha256": sources_sha256(backend), "edits": [t.row for t in trials]}
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
