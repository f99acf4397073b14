"""The report's figures: line charts and stacked bars, by plotly."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import plotly.graph_objects as go

HEIGHT = 340  # pixels
# Each stands out from a white and from a black page.
COLORS = ("#3b82d6", "#d9711c", "#159a6c", "#9a68d8", "#d14d86", "#98851c", "#858890")


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


def line_chart(
    series: Sequence[Series],
    x_label: str = "iteration",
    log_x: bool = False,
    from_zero: bool = False,
) -> go.Figure | None:
    """A chart, with a legend if it takes one to tell what is drawn; None if no curve has a value.

    Args:
        from_zero: whether the y axis begins at 0.
    """
    series = [curve for curve in series if curve.points]
    if not series:
        return None
    figure = _figure([x for curve in series for x in curve.points], x_label, log_x)
    figure.update_layout(showlegend=len(series) > 1 or bool(series[0].band))
    figure.update_yaxes(rangemode="tozero" if from_zero else "normal")
    for number, curve in enumerate(series):
        color = COLORS[number % len(COLORS)]
        group = dict(name=escape(curve.name), legendgroup=str(number))
        red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
        edge = dict(line_width=0, mode="lines", hoverinfo="skip", showlegend=False)
        for end, fill in ((0, None), (1, "tonexty")) if curve.band else ():
            figure.add_scatter(
                x=list(curve.band), y=[limits[end] for limits in curve.band.values()],
                fill=fill, fillcolor=f"rgba({red}, {green}, {blue}, 0.16)", **edge, **group,
            )  # fmt: skip
        marked = curve.dots or len(curve.points) == 1
        figure.add_scatter(
            x=list(curve.points), y=list(curve.points.values()), line=dict(color=color, width=2),
            mode="lines+markers" if marked else "lines", marker_size=7, **group,
        )  # fmt: skip
    return figure


def stacked_chart(
    parts: Mapping[str, Mapping[float, float]], x_label: str = "iteration"
) -> go.Figure | None:
    """Parts of a sum as stacked bars; None if there are no values."""
    xs = sorted({x for values in parts.values() for x in values})
    if not xs:
        return None
    figure = _figure(xs, x_label)
    figure.update_layout(barmode="stack", bargap=0.1)
    for number, (name, values) in enumerate(parts.items()):
        figure.add_bar(
            x=xs, y=[values.get(x, 0.0) for x in xs], name=escape(name),
            marker=dict(color=COLORS[number % len(COLORS)], line_width=0),
        )  # fmt: skip
    return figure


def _figure(xs: Iterable[float], x_label: str, log_x: bool = False) -> go.Figure:
    """A figure without curves. The page's script adds the colors of the light or dark theme."""
    axis: dict[str, Any] = dict(title=dict(text=x_label, standoff=6), hoverformat=".6~g")
    if log_x:
        axis |= dict(type="log", dtick=1, exponentformat="power", minor_ticks="outside")
    elif max(xs) - min(xs) < 8:
        axis |= dict(dtick=1, tickformat="d")  # iterations have no fractions
    return go.Figure(
        layout=dict(
            template=go.layout.Template(),
            height=HEIGHT,
            margin=dict(l=8, r=8, t=8, b=8),
            legend=dict(orientation="h", y=1.02, yanchor="bottom", x=0, traceorder="normal"),
            showlegend=True,
            hovermode="x unified",
            uirevision=True,  # a change of theme keeps the zoom
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            xaxis=axis,
            yaxis=dict(hoverformat=".4~g", exponentformat="power"),
        )
    )
