"""A report of rates for readers: a line per row as it is measured, bench.md whole, and the curves as plots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dsa_portable.conformance.bench.plot import svg

Row = Mapping[str, Any]
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"))
_REASON_SHOWN = 200


def rate(value: float, unit: str) -> str:
    """`226 TFLOP/s`: three digits and a prefix."""
    size, prefix = next(((s, p) for s, p in _PREFIXES if value >= s), (1.0, ""))
    return f"{value / size:.3g} {prefix}{unit}" if value < 1000 * size else f"{value / size:,.0f} {prefix}{unit}"


def duration(seconds: float) -> str:
    """`10.4 ms`."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us"


def spread(rounds: Sequence[float]) -> str:
    """`±2%`: half of what the medians of the rounds span, of the middle one."""
    return f"±{(max(rounds) - min(rounds)) / 2 / sorted(rounds)[len(rounds) // 2]:.0%}"


def short(reason: str) -> str:
    """One line of what somebody else's exception said."""
    flat = " ".join(reason.split())
    return flat if len(flat) <= _REASON_SHOWN else f"{flat[:_REASON_SHOWN]}..."


def line(row: Row) -> str:
    """A row on the terminal."""
    if row["status"] != "OK":
        return f"{row['name']}\n    {row['status']}  {short(row['reason'])}"
    share = "" if row["share"] is None else f"  {row['share']:.1%} of {row['ceiling']}"
    peers = "".join(
        f"\n    {name}: "
        + (f"{duration(p['seconds'])}, {p['ratio']:.2f} x" if "ratio" in p else f"no time, {short(p['reason'])}")
        for name, p in row["peers"].items()
    )
    return f"{row['name']}\n    {duration(row['seconds'])}  {rate(row['rate'], row['unit'])}{share}{peers}"


def bar_line(bar: Row) -> str:
    """A bar on the terminal."""
    measured = "nothing" if bar["measured"] is None else f"{bar['measured']:.2f}"
    met = "met" if bar["met"] else "MISSED"
    return f"bar: {bar['call']}: {measured} of {bar['against']}, {bar['least']:g} are asked: {met}"


def memory(size: int | None) -> str:
    """`1.5 MiB`."""
    return "-" if size is None else f"{size / (1 << 20):.3g} MiB"


def point_line(point: Row) -> str:
    """A point of a curve on the terminal."""
    times = ", ".join(f"{name} {duration(seconds)}" for name, seconds in point["seconds"].items())
    gain = "" if point["gain"] is None else f"; {point['dense']} takes {point['gain']:.2f} x DSA"
    problems = "".join(f"\n    {name}: no time, {short(reason)}" for name, reason in point["problems"].items())
    return f"{point['curve']}, context {point['keys']}: {times}{gain}{problems}"


def text(report: Row) -> str:
    """bench.md."""
    device, clocks = report["device"], report["clocks"]
    versions = ", ".join(f"{name} {value}" for name, value in device["versions"].items())
    ceilings = ", ".join(f"{name} {rate(c['rate'], c['unit'])}" for name, c in report["ceilings"].items())
    commit = report["environment"]["suite_commit"][:12]
    parts = [
        f"# {report['evidence']}: rates of backend {report['backend']['name']} on {device['chip']}",
        f"Evidence: {report['evidence_reason']}. {device['driver']}; {versions}; commit {commit}; {report['started']}; "
        f"`{report['command']}`.",
        f"The machine in the same run: {ceilings or 'not measured'}. A share is the time that the nearer ceiling would take, "
        "over the time taken. Medians of five rounds, in which all contenders had their turns, with half of what they span; on "
        "CUDA the device's own time, caches cold, decode in graphs. A peer's factor is its time over the backend's: above 1 "
        "the backend is faster.",
        *(f"Clocks {when}: {', '.join(f'{k} {v}' for k, v in clocks[when].items())}." for when in clocks if clocks[when]),
        *(f"Peer {name} was not there: {_cell(reason)}." for name, reason in report["peers_missing"].items()),
        _rates(report["rows"]),
        _bars(report["bars"]),
        *_curves(report["curve"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def plots(report: Row) -> dict[str, str]:
    """The curves as SVG, by file name."""
    return {
        _file(name): svg(
            f"{name}: {report['device']['chip']}, {report['evidence']}",
            "keys of context",
            "milliseconds",
            {
                contender: [(p["keys"], 1e3 * p["seconds"][contender]) for p in points if contender in p["seconds"]]
                for contender in named
            },
        )
        for name, points in _by_curve(report["curve"]).items()
        if (named := _contenders(points))
    }


def _rates(rows: Iterable[Row]) -> str:
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    return _table(
        ["call", "time", "rate", "share", "memory", *names],
        [
            [row["name"], *_measured(row), memory(row["peak_memory"]), *(_peer(row["peers"].get(name)) for name in names)]
            for row in rows
        ],
    )


def _bars(bars: Iterable[Row]) -> str:
    rows = []
    for bar in bars:
        measured = "-" if bar["measured"] is None else f"{bar['measured']:.2f}"
        rows.append([bar["call"], bar["against"], measured, f"{bar['least']:g}", "met" if bar["met"] else "missed"])
    return _table(["call", "against", "measured", "asked", ""], rows) if rows else ""


def _measured(row: Row) -> list[str]:
    if row["status"] != "OK":
        return [row["status"], short(row["reason"]), ""]
    share = "" if row["share"] is None else f"{row['share']:.0%} of {row['ceiling']}"
    return [f"{duration(row['seconds'])} {spread(row['rounds'])}", rate(row["rate"], row["unit"]), share]


def _peer(peer: Row | None) -> str:
    return "" if peer is None else f"{peer['ratio']:.2f} x" if "ratio" in peer else "-"


def _curves(points: Iterable[Row]) -> Iterable[str]:
    for name, own in _by_curve(points).items():
        contenders = _contenders(own)
        yield f"## {name[0].upper()}{name[1:]}"
        yield f"![{name}]({_file(name)})" if contenders else ""
        yield _table(
            ["context", *contenders, "fastest dense over DSA"],
            [
                [
                    f"{p['keys']:,}",
                    *(duration(p["seconds"][c]) if c in p["seconds"] else "-" for c in contenders),
                    f"{p['gain']:.2f} x ({p['dense']})" if p["gain"] is not None else "-",
                ]
                for p in own
            ],
        )


def _by_curve(points: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for point in points:
        found.setdefault(point["curve"], []).append(point)
    return found


def _contenders(points: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for point in points for name in point["seconds"]))


def _file(name: str) -> str:
    return f"curve-{name.partition(' ')[0]}.svg"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, cells))} |" for cells in lines)


def _cell(text: str) -> str:
    return short(text).replace("|", "\\|")
