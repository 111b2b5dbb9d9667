"""Small line charts as SVG text: panels one above the other over the same x."""

import math
from collections.abc import Mapping, Sequence
from typing import Final
from xml.sax.saxutils import escape

import msgspec

WIDTH, PANEL, LEFT, GAP, TOP = 860, 190, 52, 44, 64
TICKS: Final = (1, 2, 5)
FONT: Final = "font-family='sans-serif' font-size='12' fill='#333'"


class Line(msgspec.Struct, frozen=True):
    """A named line; its points are (x, y), in order of x."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]


def chart(title: str, x_name: str, panels: Mapping[str, Sequence[Line]]) -> str:
    """The picture; each panel has its name as the title of its y axis. Lines are steps."""
    height = TOP + len(panels) * (PANEL + GAP)
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' role='img'>",
        f"<title>{escape(title)}</title><rect width='100%' height='100%' fill='white'/>",
        f"<text x='{LEFT}' y='20' {FONT} font-weight='bold'>{escape(title)}</text>",
        *_legend(max(panels.values(), key=len)),
    ]
    longest = max(x for lines in panels.values() for line in lines for x, _ in line.points)
    for number, (name, lines) in enumerate(panels.items()):
        parts += _panel(name, lines, longest, TOP + number * (PANEL + GAP), x_name)
    return "\n".join([*parts, "</svg>", ""])


def _legend(lines: Sequence[Line]) -> list[str]:
    parts, x = [], LEFT
    for line in lines:
        parts.append(f"<path d='M{x} 38h18' stroke='{line.colour}' stroke-width='3'/>")
        parts.append(_text(x + 24, 42, line.name))
        x += 44 + 7 * len(line.name)
    return parts


def _panel(name: str, lines: Sequence[Line], longest: float, top: int, x_name: str) -> list[str]:
    highest = max(y for line in lines for _, y in line.points) or 1.0
    wide = WIDTH - LEFT - 16

    def across(x: float) -> float:
        return LEFT + wide * x / longest

    def up(y: float) -> float:
        return top + PANEL * (1 - y / highest)

    parts = [_text(LEFT, top - 6, name)]
    for y in _ticks(highest):
        parts += [
            f"<path d='M{LEFT} {up(y):.1f}h{wide}' stroke='#e5e5e5'/>",
            _text(LEFT - 6, up(y) + 4, f"{y:g}", "end"),
        ]
    parts += [_text(across(x), top + PANEL + 16, f"{x:g}", "middle") for x in _ticks(longest)]
    parts.append(_text(WIDTH - 16, top + PANEL + 30, x_name, "end"))
    for line in lines:
        path = _steps([(across(x), up(y)) for x, y in line.points])
        parts.append(f"<path d='{path}' fill='none' stroke='{line.colour}' stroke-width='1.5'/>")
    return parts


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' {FONT}>{escape(words)}</text>"


def _steps(points: Sequence[tuple[float, float]]) -> str:
    """A path that goes across until the level changes."""
    (left, level), last = points[0], points[-1][0]
    path = f"M{left:.1f} {level:.1f}"
    for x, y in points[1:]:
        if y != level:
            path += f"H{x:.1f}V{y:.1f}"
            level = y
    return f"{path}H{last:.1f}"


def _ticks(highest: float) -> list[float]:
    """Round numbers from 0 to ``highest``, about five of them."""
    power = 10.0 ** math.floor(math.log10(highest / 5))
    step = next(power * tick for tick in (*TICKS, 10) if power * tick >= highest / 5)
    return [number * step for number in range(int(highest / step) + 1)]
