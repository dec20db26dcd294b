"""Lines in a log-log plot as SVG, for reports that must not need a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 460, 84, 190, 44, 60
COLOURS = ("#0b6fb8", "#d1495b", "#3b8f4a", "#8a5fb0", "#c98a1b", "#555555")
Points = Sequence[tuple[float, float]]


def svg(title: str, x_label: str, y_label: str, lines: Mapping[str, Points]) -> str:
    """The drawing: x ticks at the points' own values, y ticks at 1, 2 and 5 of each decade. Takes positive numbers."""
    points = [point for line in lines.values() for point in line]
    xs, ys = sorted({x for x, _ in points}), [y for _, y in points]
    low, high = _below(min(ys)), _above(max(ys))
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def across(x: float) -> float:
        return LEFT + inner_width * (math.log(x / xs[0]) / math.log(xs[-1] / xs[0]) if len(xs) > 1 else 0.5)

    def up(y: float) -> float:
        return TOP + inner_height * (1 - math.log(y / low) / math.log(high / low))

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, TOP - 18, title, size=15),
        _text(LEFT + inner_width / 2, HEIGHT - 14, x_label, anchor="middle"),
        f'<text transform="translate(20 {TOP + inner_height / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
    ]
    for x in xs:
        parts += [
            _line(across(x), TOP, across(x), TOP + inner_height),
            _text(across(x), TOP + inner_height + 20, _short(x), "middle"),
        ]
    for y in _ticks(low, high):
        parts += [_line(LEFT, up(y), LEFT + inner_width, up(y)), _text(LEFT - 8, up(y) + 4, f"{y:g}", "end")]
    for i, (name, line) in enumerate(lines.items()):
        colour, places = COLOURS[i % len(COLOURS)], [(across(x), up(y)) for x, y in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
        parts += [
            f'<rect x="{WIDTH - RIGHT + 16}" y="{TOP + 20 * i}" width="12" height="12" fill="{colour}"/>',
            _text(WIDTH - RIGHT + 34, TOP + 20 * i + 11, name),
        ]
    return "\n".join([*parts, "</svg>", ""])


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'


def _short(x: float) -> str:
    return f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"


def _ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    every = [m * 10.0**d for d in decades for m in (1, 2, 5)]
    return [y for y in every if low * (1 - 1e-9) <= y <= high * (1 + 1e-9)]


def _below(y: float) -> float:
    return max(t for t in _ticks(y / 10, y))


def _above(y: float) -> float:
    return min(t for t in _ticks(y * (1 + 1e-6), y * 10))
