"""Lines over time as SVG: drawn by the server, so that a page that is drawn again and again does not flicker."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 210
LEFT, RIGHT, TOP, BOTTOM = 72, 12, 12, 28
MOST_POINTS = 400


@dataclass(frozen=True)
class Line:
    """One line.

    Attributes:
        name: In the legend; empty for a lone line.
        points: x and y, x ascending.
        style: Class of its colour: `base`, `tuned`, or `s0` … `s4`.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "s0"


@dataclass(frozen=True)
class Tick:
    """A mark of an axis: where, and what it says."""

    at: float
    text: str


@dataclass(frozen=True)
class Plot:
    """A plot as its template draws it.

    Attributes:
        title: What it shows.
        lines: Name, style, path, last point and last value of each line.
        x: Ticks.
        y: Ticks.
        unit: Of x.
        spoken: For who does not see it.
    """

    title: str
    lines: Sequence[tuple[str, str, str, tuple[float, float], str]]
    x: Sequence[Tick]
    y: Sequence[Tick]
    unit: str
    spoken: str
    width: int = WIDTH
    height: int = HEIGHT


def plot(
    title: str, lines: Sequence[Line], unit: str, *, end: float | None = None, zero: bool = False
) -> Plot | None:
    """A plot of some lines; None where no line has a point.

    Args:
        title: What it shows.
        lines: Each with its points.
        unit: Of x.
        end: Where x ends, for a run that is not over.
        zero: Whether y begins at zero.
    """
    known = [
        Line(
            one.name, _thin([p for p in one.points if math.isfinite(p[0]) and math.isfinite(p[1])]), one.style
        )
        for one in lines
    ]
    known = [one for one in known if one.points]
    if not known:
        return None
    xs = [p[0] for one in known for p in one.points]
    ys = [p[1] for one in known for p in one.points]
    low_x, high_x = (0.0 if end else min(xs)), max(*xs, end or -math.inf) if len(xs) > 1 or end else xs[0] + 1
    low_y, high_y = (min(0.0, *ys) if zero else min(ys)), max(ys)
    if high_y - low_y < 1e-12 * max(1.0, abs(high_y)):
        margin = abs(high_y) * 0.1 or 1.0
        low_y, high_y = low_y - margin, high_y + margin
    marks = _ticks(low_y, high_y, 4)
    low_y, high_y = min(low_y, marks[0]), max(high_y, marks[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - low_x) / (high_x - low_x or 1)
        up = (y - low_y) / (high_y - low_y)
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )

    drawn = []
    for one in known:
        places = [at(x, y) for x, y in one.points]
        path = "M" + "L".join(f"{x} {y}" for x, y in places)
        drawn.append((one.name, one.style, path, places[-1], short(one.points[-1][1])))
    spoken = "; ".join(
        f"{one.name or title} from {short(one.points[0][1])} to {short(one.points[-1][1])}" for one in known
    )
    return Plot(
        title,
        drawn,
        [Tick(at(x, low_y)[0], short(x)) for x in _ticks(low_x, high_x, 5) if low_x <= x <= high_x],
        [Tick(at(low_x, y)[1], short(y)) for y in marks],
        unit,
        f"{title} over {unit}: {spoken}",
    )


def short(value: float) -> str:
    """A number in few characters."""
    size = abs(value)
    for scale, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= scale:
            return f"{value / scale:.4g}{suffix}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS`, the last one among them."""
    if len(points) <= MOST_POINTS:
        return points
    step = len(points) / MOST_POINTS
    return [points[min(len(points) - 1, round(step * (i + 1)) - 1)] for i in range(MOST_POINTS)]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from below to above a range."""
    raw = (high - low) / count
    if raw <= 0 or not math.isfinite(raw):
        return [low]
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]
