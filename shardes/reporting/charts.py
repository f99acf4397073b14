"""Line charts and stacked areas as inline SVG, in the CSS colors --c0, --c1, ..."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 760, 270
LEFT, RIGHT, TOP, BOTTOM = 64, 12, 10, 34  # margins


@dataclass
class Series:
    """A curve of values by x.

    Attributes:
        band: the lowest and highest value around the curve, by x.
        dots: whether each value is marked.
    """

    name: str
    points: Mapping[float, float]
    band: Mapping[float, tuple[float, float]] = field(default_factory=dict)
    dots: bool = False


def line_chart(series: Sequence[Series], x_label: str = "iteration") -> str:
    """A chart with a legend; an empty string if no curve has a value."""
    series = [curve for curve in series if curve.points]
    if not series:
        return ""
    values = [y for curve in series for y in curve.points.values()]
    values += [y for curve in series for limits in curve.band.values() for y in limits]
    frame = Frame([x for curve in series for x in curve.points], values, x_label)
    shapes = []
    for number, curve in enumerate(series):
        if curve.band:
            edge = [(x, low) for x, (low, _) in curve.band.items()]
            edge += [(x, high) for x, (_, high) in reversed(list(curve.band.items()))]
            shapes.append(
                f'<polygon points="{frame.path(edge)}" fill="var(--c{number})" opacity=".16"/>'
            )
    for number, curve in enumerate(series):
        path = frame.path(curve.points.items())
        shapes.append(
            f'<polyline points="{path}" fill="none" stroke="var(--c{number})" stroke-width="2"/>'
        )
        if curve.dots or len(curve.points) == 1:
            shapes += [
                f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.5" '
                f'fill="var(--c{number})">'
                f"<title>{escape(curve.name)}, {x_label} {x:g}: {y:.4g}</title></circle>"
                for x, y in curve.points.items()
            ]
    return _figure([curve.name for curve in series], frame, shapes)


def stacked_chart(parts: Mapping[str, Mapping[float, float]], x_label: str = "iteration") -> str:
    """Parts of a sum, stacked; all have the same x. An empty string if there are no values."""
    xs = sorted({x for values in parts.values() for x in values})
    if not xs:
        return ""
    below = dict.fromkeys(xs, 0.0)
    tops = {x: math.fsum(values.get(x, 0.0) for values in parts.values()) for x in xs}
    frame = Frame(xs if len(xs) > 1 else [xs[0], xs[0] + 1], [0.0, *tops.values()], x_label)
    shapes = []
    for number, (name, values) in enumerate(parts.items()):
        above = {x: below[x] + values.get(x, 0.0) for x in xs}
        edge = [*below.items(), *reversed(list(above.items()))]
        shapes.append(
            f'<polygon points="{frame.path(edge)}" fill="var(--c{number})" '
            f'stroke="var(--c{number})" stroke-width=".5"><title>{escape(name)}</title></polygon>'
        )
        below = above
    return _figure(list(parts), frame, shapes)


class Frame:
    """Axes whose ranges contain all values."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], x_label: str):
        self._x0, self._x1 = min(xs), max(xs)
        if self._x0 == self._x1:
            self._x0, self._x1 = self._x0 - 1, self._x1 + 1
        low, high = min(ys), max(ys)
        margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
        self._y0, self._y1 = (low if low == 0 else low - margin), high + margin
        self._label = x_label

    def x(self, value: float) -> float:
        return LEFT + (value - self._x0) / (self._x1 - self._x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return (
            HEIGHT - BOTTOM - (value - self._y0) / (self._y1 - self._y0) * (HEIGHT - TOP - BOTTOM)
        )

    def path(self, points: Iterable[tuple[float, float]]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def shapes(self) -> list[str]:
        """The grid, the ticks and the label of the x axis."""
        shapes = []
        for value in ticks(self._y0, self._y1, 5):
            y = self.y(value)
            shapes.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
            )
            shapes.append(
                f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:,.6g}</text>'
            )
        for value in ticks(self._x0, self._x1, 8):
            if value == int(value):
                shapes.append(
                    f'<text x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 16}" '
                    f'text-anchor="middle">{value:,.6g}</text>'
                )
        middle = (LEFT + WIDTH - RIGHT) / 2
        shapes.append(
            f'<text x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">{escape(self._label)}</text>'
        )
        return shapes


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers between two values."""
    least = (high - low) / count
    power = 10 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    return [
        round(number * step, 12)
        for number in range(math.ceil(low / step), math.floor(high / step) + 1)
    ]


def _figure(names: Sequence[str], frame: Frame, shapes: Sequence[str]) -> str:
    legend = "".join(
        f'<span><i style="background:var(--c{number})"></i>{escape(name)}</span>'
        for number, name in enumerate(names)
    )
    return (
        f'<figure><figcaption class="legend">{legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(", ".join(names))}">'
        f"{''.join(frame.shapes())}{''.join(shapes)}</svg></figure>\n"
    )
