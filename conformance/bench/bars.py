"""What a backend must reach under `--check`, as one table of ratios against something measured in the same run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# What a row or a curve is held against: a ceiling of the machine (share of its rate), a peer or dense attention (their time
# over ours).
CEILING, PEER, DENSE = "ceiling", "peer", "dense"


@dataclass(frozen=True)
class Bar:
    """`least` of `against` for calls whose name begins with `call` and holds `within`, or for a curve's point at `keys`."""

    call: str
    kind: str
    against: str
    least: float
    within: str = ""
    keys: int = 0
    versions: Mapping[str, str] | None = None  # of the device: engine, instruction set; None: all
    backend: str = "cpu"

    def holds_for(self, backend: str, versions: Mapping[str, str]) -> bool:
        """Whether it is about this backend as it runs here."""
        return backend == self.backend and all(versions.get(name) == v for name, v in (self.versions or {}).items())


_INDEX, _ATTEND = "lightning_index prefill", "sparse_attend prefill"
_JIT, _ONNX = {"engine": "jit"}, {"engine": "onnx"}
_PAIRS, _TILES = {**_JIT, "isa": "avx512-bf16"}, {**_JIT, "isa": "amx"}
# Of the index the causal prefill, of attention all heads of the model.
_LONG, _HEADS = "of 8192 causal", "bfloat16 32 rows x 128 heads"
BARS = (
    Bar(_INDEX, CEILING, "raw bfloat16 pairs", 0.90, _LONG, versions=_PAIRS),
    Bar(_INDEX, CEILING, "raw AMX tiles", 0.40, _LONG, versions=_TILES),
    Bar(_INDEX, PEER, "torch float32 chunks", 3.8, _LONG, versions=_PAIRS),
    Bar(_INDEX, PEER, "torch float32 chunks", 3.8, _LONG, versions=_TILES),
    Bar(_INDEX, CEILING, "ONNX Runtime Gemm", 0.70, _LONG, versions=_ONNX),
    Bar(_ATTEND, CEILING, "raw bfloat16 pairs", 0.80, _HEADS, versions=_PAIRS),
    Bar(_ATTEND, PEER, "torch rows", 1.4, _HEADS, versions=_PAIRS),
    Bar(_ATTEND, PEER, "torch rows", 2.0, _HEADS, versions=_TILES),
    Bar("decode step", DENSE, "own kernel dense", 12.0, keys=131072, versions=_JIT),
)


def judged(report: Mapping[str, Any], bars: Iterable[Bar] = BARS) -> list[dict[str, Any]]:
    """Each bar that is about this run's backend: what was measured (None: nothing was), and whether it is met."""
    name, versions = report["backend"]["name"], report["device"]["versions"]
    found = []
    for bar in bars:
        if not bar.holds_for(name, versions):
            continue
        for call, measured in _measured(report, bar):
            met = measured is not None and measured >= bar.least
            found.append({"call": call, "against": bar.against, "least": bar.least, "measured": measured, "met": met})
    return found


def _measured(report: Mapping[str, Any], bar: Bar) -> list[tuple[str, float | None]]:
    if bar.kind == DENSE:
        points = [p for p in report["curve"] if p["curve"].startswith(bar.call) and p["keys"] == bar.keys]
        return [(f"{p['curve']}, {p['keys']} keys", _over(p["seconds"], bar.against)) for p in points]
    rows = [r for r in report["rows"] if r["name"].startswith(bar.call) and bar.within in r["name"] and r["status"] == "OK"]
    if bar.kind == PEER:
        return [(r["name"], r["peers"].get(bar.against, {}).get("ratio")) for r in rows]
    ceiling = report["ceilings"].get(bar.against)
    return [(r["name"], r["flops"] / r["seconds"] / ceiling["rate"] if ceiling else None) for r in rows]


def _over(seconds: Mapping[str, float], name: str) -> float | None:
    return seconds[name] / seconds["DSA"] if {name, "DSA"} <= seconds.keys() else None
