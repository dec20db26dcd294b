"""A verdict on one case, and the names of the rules that it can break."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

# Rule -> section of docs/judging.md and what it demands. Reports and planted faults name rules by these words.
RULES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "capability": ("2", "what is declared is answered, and what is not is refused"),
        "inputs": ("2", "no call writes to its inputs"),
        "result": ("2", "results have the declared names, dtypes and shapes"),
        "visible": ("2", "min(topk, visible) entries, each a visible position"),
        "unique": ("2", "no entry repeats another"),
        "tail": ("2", "-1 behind the entries, and scores of -inf"),
        "order": ("2", "positions ascend unless sorted=False"),
        "certificate": ("3.2", "the set is a top-k of scores within their bounds"),
        "population": ("3.3", "no more keys exchanged than honest kernels of the profile exchange"),
        "score": ("3.4", "every returned score lies within its bound"),
        "score rms": ("3.3", "returned scores err as those of honest kernels do"),
        "ties": ("6", "of equal scores the lowest positions, where that is declared"),
        "empty row": ("2", "out is 0 and lse -inf in rows without a valid index"),
        "nan": ("2", "out and lse are numbers where no operand that counts is NaN or infinite"),
        "exact": ("5", "bit equality where nothing can round"),
        "bound": ("4.1", "out lies within a proven bound"),
        "rms": ("4.2", "the error of a row and head is that of honest kernels"),
        "bias": ("4.3", "errors do not lean to one side"),
        "lse": ("4.4", "lse lies within a proven bound"),
        "lse rms": ("4.4", "lse errs as that of honest kernels does"),
        "agreement": ("6", "calls that must give equal bits do"),
    }
)


@dataclass
class Verdict:
    """PASS, FAIL, ERROR or UNSUPPORTED, why, and the figures that were measured on the way."""

    status: str = "PASS"
    reason: str = ""
    rule: str | None = None
    metrics: dict[str, float | int | str | None] = field(default_factory=dict)
    selective_rows: int | None = None
    vacuous_rows: int | None = None
    arrays: dict[str, Array] = field(default_factory=dict)
    row: int | None = None  # that is being judged
    rows: dict[int, str] = field(default_factory=dict)  # row that fails by itself -> the first rule it breaks

    @classmethod
    def failed(cls, rule: str, reason: str) -> Verdict:
        """A FAIL that needs no arrays."""
        verdict = cls()
        verdict.fail(rule, reason)
        return verdict

    def fail(self, rule: str, reason: str, **arrays: Any) -> None:
        """Record a broken rule; the first one gives the reason, and the arrays (row, truth, bound) kept for the engineer."""
        assert rule in RULES
        if self.row is not None:
            self.rows.setdefault(self.row, rule)
        if self.status != "FAIL":
            self.status, self.rule, self.reason = "FAIL", rule, reason
            self.arrays = {name: np.asarray(array) for name, array in arrays.items()}

    def worst(self, name: str, value: float) -> None:
        """Keep the largest value seen of a metric; NaN counts as infinite."""
        value = float(np.nan_to_num(value, nan=np.inf, posinf=np.inf))
        previous = self.metrics.get(name)
        self.metrics[name] = value if not isinstance(previous, (int, float)) else max(previous, value)
