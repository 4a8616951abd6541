"""Small charts as SVG that takes its colours from the page's style sheet, so that they are right in light and dark.

All text is escaped. A chart is as wide as its column; its numbers are in the units of its view box.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 12, 40
"""Margins, in which ticks and labels stand."""
_ROOM = 0.04
"""Part of an axis that is left free at each end."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """A scale from numbers to the share of a chart's side, and the ticks on it."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False
    label: str = ""

    def share(self, value: float) -> float:
        """Where a number lies, from 0 to 1; numbers beyond the ends lie on them."""
        if self.log:
            low, high, value = math.log10(self.low), math.log10(self.high), math.log10(max(value, self.low))
        else:
            low, high = self.low, self.high
        return min(1.0, max(0.0, (value - low) / (high - low)))


def linear(values: Iterable[float], label: str = "", whole: bool = False) -> Axis:
    """An axis for these numbers, with some room at its ends; ``whole``: ticks at whole numbers only."""
    from matplotlib.ticker import MaxNLocator  # a third of a second, when all is done

    known = list(values) or [0.0, 1.0]
    low, high = min(known), max(known)
    pad = _ROOM * (high - low) or max(abs(high), 1.0) * 0.1
    ticks = MaxNLocator(6, integer=whole).tick_values(low, high)
    inside = [float(tick) for tick in ticks if low - pad <= tick <= high + pad]
    return Axis(low - pad, high + pad, [(tick, f"{tick:g}") for tick in inside], label=label)


def logarithmic(values: Iterable[float], label: str = "") -> Axis:
    """A logarithmic axis with ticks at powers of ten; what is not positive lies at its lower end, called 0."""
    known = list(values)
    positive = [value for value in known if value > 0] or [0.01, 1.0]
    first, last = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    last = max(last, first + 1)
    every = -(-(last - first) // 5)
    powers = range(first, last + 1, every)
    ticks = [(10.0**power, f"{10.0**power:g}" if abs(power) < 4 else f"1e{power}") for power in powers]
    low = 10.0**first
    if len(positive) < len(known):
        low /= 10
        ticks = [(low, "0"), *ticks]
    return Axis(low, 10.0**last, ticks, True, label)


class Chart:
    """Lines and points in a frame. Classes of the style sheet give colours: ``target``, ``baseline``, ``good``..."""

    def __init__(self, x: Axis, y: Axis, title: str, height: int = HEIGHT) -> None:
        """``title`` tells those who do not see it what it shows."""
        self._x, self._y, self._title, self._height = x, y, title, height
        self._parts: list[Markup] = []

    def _at(self, point: Point) -> tuple[str, str]:
        x = _LEFT + self._x.share(point[0]) * (WIDTH - _LEFT - _RIGHT)
        y = self._height - _BOTTOM - self._y.share(point[1]) * (self._height - _TOP - _BOTTOM)
        return f"{x:.1f}", f"{y:.1f}"

    def line(self, points: Iterable[tuple[float, float | None]], kind: str) -> Chart:
        """A line through points; it is broken where a point has no number."""
        path, pen = [], "M"
        for x, y in points:
            if y is None:
                pen = "M"
                continue
            path.append(pen + " ".join(self._at((x, y))))
            pen = "L"
        return self._add(Markup('<path class="line {}" d="{}"/>').format(kind, "".join(path)))

    def steps(self, points: Sequence[Point], kind: str) -> Chart:
        """A line that goes right before it goes up or down: what lies above and right of it is beaten."""
        corners: list[Point] = []
        for point in points:
            if corners:
                corners.append((point[0], corners[-1][1]))
            corners.append(point)
        return self.line(corners, kind)

    def dots(self, points: Sequence[Point], kind: str, radius: float = 3, names: Sequence[str] = ()) -> Chart:
        """Points, each with the text that a pointer over it shows."""
        for place, point in enumerate(points):
            x, y = self._at(point)
            name = Markup("<title>{}</title>").format(names[place]) if names else ""
            dot = Markup('<circle class="dot {}" cx="{}" cy="{}" r="{}">{}</circle>')
            self._add(dot.format(kind, x, y, f"{radius:g}", name))
        return self

    def across(self, y: float, kind: str) -> Chart:
        """A line from side to side."""
        return self.line([(self._x.low, y), (self._x.high, y)], f"{kind} thin")

    def upright(self, x: float, kind: str) -> Chart:
        """A line from bottom to top."""
        return self.line([(x, self._y.low), (x, self._y.high)], f"{kind} thin")

    def _add(self, part: Markup) -> Chart:
        self._parts.append(part)
        return self

    def svg(self) -> Markup:
        """The chart's element."""
        begin = Markup('<svg viewBox="0 0 {} {}" role="img"><title>{}</title>').format(WIDTH, self._height, self._title)
        return begin + self._frame() + Markup("").join(self._parts) + Markup("</svg>")

    def _frame(self) -> Markup:
        """Grid lines, the numbers beside them, and the labels of the axes."""
        bottom, right, parts = self._height - _BOTTOM, WIDTH - _RIGHT, []
        for value, text in self._x.ticks:
            x, _ = self._at((value, self._y.low))
            parts.append(Markup('<path class="grid" d="M{} {}V{}"/>').format(x, _TOP, bottom))
            parts.append(Markup('<text x="{}" y="{}" class="mid">{}</text>').format(x, bottom + 14, text))
        for value, text in self._y.ticks:
            _, y = self._at((self._x.low, value))
            parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(_LEFT, y, right))
            parts.append(Markup('<text x="{}" y="{}" class="end" dy="4">{}</text>').format(_LEFT - 5, y, text))
        middle = (_LEFT + right) / 2
        parts.append(
            Markup('<text x="{}" y="{}" class="mid">{}</text>').format(middle, self._height - 6, self._x.label)
        )
        if self._y.label:
            place = f"translate(12 {(_TOP + bottom) / 2:g}) rotate(-90)"
            parts.append(Markup('<text transform="{}" class="mid">{}</text>').format(place, self._y.label))
        return Markup("").join(parts)


def bare_scatter(kinds: Sequence[tuple[str, Sequence[Point]]], title: str) -> Markup:
    """A square of points without numbers at its sides: what counts is how they lie."""
    everything = [point for _, points in kinds for point in points]
    x, y = (linear([point[side] for point in everything]) for side in (0, 1))
    side, parts = 200, []
    for kind, points in kinds:
        places = ((6 + x.share(a) * (side - 12), side - 6 - y.share(b) * (side - 12)) for a, b in points)
        path = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in places)
        parts.append(Markup('<path class="cloud {}" d="{}"/>').format(kind, path))
    begin = Markup('<svg viewBox="0 0 {0} {0}" role="img" class="square"><title>{1}</title>').format(side, title)
    frame = Markup('<rect class="grid" x="0.5" y="0.5" width="{0}" height="{0}"/>').format(side - 1)
    return begin + frame + Markup("").join(parts) + Markup("</svg>")
