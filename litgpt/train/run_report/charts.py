"""Curves as the coordinates of SVG elements. The template of the report draws them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from litgpt.train.runs import Points

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 300, 92, 44, 14, 40  # of a chart, and of what is around its axes
MARKED = 60  # a line with at most that many points shows them
COLORS, DASHES = 8, ("", "6 3", "2 3")  # colors in the style sheet, and the strokes that follow when all are used
CHARTED = COLORS * len(DASHES)  # maximum number of runs in a chart
Tick = tuple[str, str]  # position and label


@dataclass(frozen=True)
class Line:
    """A curve of a chart. `kind` is a class in the style sheet; `values` are pairs of step and value, as JSON."""

    label: str
    color: int
    kind: str
    points: Points
    dash: str = ""

    @property
    def values(self) -> str:
        return "[" + ",".join(f"[{step},{value:.7g}]" for step, value in self.points) + "]"

    @property
    def summary(self) -> str:
        low = min(self.points, key=lambda point: point[1])
        ends = f"{self.points[0][1]:.4g} at step {self.points[0][0]:,}, {self.points[-1][1]:.4g} at the end"
        return f"{self.label}: {ends}, lowest {low[1]:.4g} at step {low[0]:,}"


class Chart:
    """A chart of some lines over the steps. From `zero` on, or from the lowest value."""

    def __init__(self, title: str, lines: Sequence[Line], zero: bool = False) -> None:
        self.title, self.lines, self.width, self.height = title, lines, WIDTH, HEIGHT
        self.left, self.right, self.top, self.bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
        steps = [step for line in lines for step, _ in line.points]
        values = [value for line in lines for _, value in line.points]
        self.steps, self.values = span(steps, whole=True), span([*values, 0.0] if zero else values)

    def x(self, step: float) -> str:
        low, high = self.steps
        return f"{self.left + (step - low) / (high - low) * (self.right - self.left):.1f}"

    def y(self, value: float) -> str:
        low, high = self.values
        return f"{self.bottom - (value - low) / (high - low) * (self.bottom - self.top):.1f}"

    def path(self, line: Line) -> str:
        return " ".join(f"{self.x(step)},{self.y(value)}" for step, value in line.points)

    def markers(self, line: Line) -> list[tuple[str, str]]:
        few = len(line.points) == 1 or (line.kind == "validation" and len(line.points) <= MARKED)
        return [(self.x(step), self.y(value)) for step, value in line.points] if few else []

    @property
    def x_ticks(self) -> list[Tick]:
        return [(self.x(value), label) for value, label in ticks(*self.steps, whole=True)]

    @property
    def y_ticks(self) -> list[Tick]:
        return [(self.y(value), label) for value, label in ticks(*self.values)]


def span(values: Sequence[float], whole: bool = False) -> tuple[float, float]:
    """The ends of an axis: a little beyond the values, except for steps."""
    low, high = min(values), max(values)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        gap = 1.0 if whole else abs(high) / 10 or 1.0
        return low - gap, high + gap
    margin = 0.0 if whole else 0.04 * (high - low)
    return (low - margin if low else low), high + margin


def ticks(low: float, high: float, whole: bool = False) -> list[tuple[float, str]]:
    """At most seven round values between two, with their labels."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    step = max(1.0, step) if whole else step
    values = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    top = max(map(abs, values), default=0.0)
    if digits > 4 or top >= 1e9 or (top >= 1e6 and not whole):
        significant = math.floor(math.log10(top)) - math.floor(math.log10(step) + 1e-9) + 1
        return [(value, f"{value:.{significant}g}") for value in values]
    unit, letter = (1e6, "M") if top >= 1e6 else (1e3, "k")
    return [
        (value, f"{value / unit:g}{letter}" if value and top >= 1e5 else f"{value:,.{digits}f}") for value in values
    ]


def envelope(points: Points, most: int) -> Points:
    """About `most` of the points of a curve: the lowest and highest of each part, so that no spike is lost."""
    if len(points) <= most:
        return points
    size = math.ceil((len(points) - 2) / (most // 2 - 1))
    kept = [points[0]]
    for i in range(1, len(points) - 1, size):
        part = range(i, min(i + size, len(points) - 1))
        ends = {min(part, key=lambda j: points[j][1]), max(part, key=lambda j: points[j][1])}
        kept += [points[j] for j in sorted(ends)]
    return [*kept, points[-1]]
