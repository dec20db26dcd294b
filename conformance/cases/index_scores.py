"""Cases of index_scores: those of lightning_index, without a selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsa_portable.conformance.cases.lightning_index import IndexCase


@dataclass(frozen=True)
class ScoresCase(IndexCase):
    """One call of index_scores on the inputs of an IndexCase; `topk` is not read."""

    operator, prefix = "index_scores", "index-scores"

    def _options(self) -> dict[str, Any]:
        return {"k_layout": self.k_layout, **dict(self.options)}
