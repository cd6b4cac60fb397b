"""Plotly figures of measures: what truncation costs, and one measure against another."""

from itertools import cycle

import pandas as pd
import plotly.graph_objects as go

from bilinear_lens.views import style
from bilinear_lens.views.checks import check_columns, check_finite, check_k
from bilinear_lens.views.grid import escaped, top_margin
from bilinear_lens.views.style import NEGATIVE, POSITIVE, rgba

_MARKS = (
    ((0, 153, 118), "solid", "circle"),
    ((186, 104, 168), "dash", "square"),
    (POSITIVE, "dot", "diamond"),
    (NEGATIVE, "dashdot", "triangle-up"),
    ((190, 140, 10), "longdash", "x"),
    ((127, 133, 141), "longdashdot", "triangle-down"),
)
"""Told apart by colour-blind readers, on white and on black; past six, they come again."""
_AXIS_TITLES = {"lost": "accuracy lost"}


def truncation(curves: pd.DataFrame, *, y: str = "lost", title: str | None = None) -> go.Figure:
    """What keeping `k` parts costs, a line with its interval for each order of taking them.

    Args:
        curves: columns `order` (the name of a line), `k`, and for the measure y `y`, `y_low` and
            `y_high`.
        y: the measure.

    Raises:
        ValueError: if a column is missing, there are no rows, a number is not finite, or a `k` is
            less than 1 (its axis is logarithmic).
    """
    low, high = f"{y}_low", f"{y}_high"
    check_columns(curves, ["order", "k", y, low, high], "curves")
    check_finite(curves[["k", y, low, high]], "curves")
    check_k(min(curves["k"]))
    figure = style.figure(title, x="k", y=escaped(_AXIS_TITLES.get(y, y)))
    groups = curves.sort_values("k").groupby("order", sort=False)
    for (order, rows), (colour, dash, symbol) in zip(groups, cycle(_MARKS)):
        name = escaped(order)
        x = rows["k"].tolist()
        figure.add_scatter(
            name=f"{name} interval",
            x=x + x[::-1],
            y=rows[high].tolist() + rows[low].tolist()[::-1],
            mode="lines",
            fill="toself",
            fillcolor=rgba(colour, 0.18),
            line={"width": 0},
            legendgroup=name,
            showlegend=False,
            hoverinfo="skip",
        )
        figure.add_scatter(
            name=name,
            x=x,
            y=rows[y].tolist(),
            customdata=rows[[low, high]].to_numpy().tolist(),
            mode="lines+markers",
            line={"color": rgba(colour), "dash": dash, "width": 2},
            marker={"symbol": symbol, "size": 7},
            legendgroup=name,
            hovertemplate="%{fullData.name}, k = %{x}: %{y:.4g} "
            "(%{customdata[0]:.4g} to %{customdata[1]:.4g})<extra></extra>",
        )
    ticks = []
    for k in sorted(set(curves["k"])):  # those that have room for a label
        if not ticks or k >= 1.6 * ticks[-1]:
            ticks.append(k)
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return _with_legend_below(figure, title)


def trade_off(
    points: pd.DataFrame, *, x: str = "accuracy", y: str = "lost", title: str | None = None
) -> go.Figure:
    """Two measures against each other, with the intervals of both.

    The y-axis is logarithmic where all of `y` and `y_low` are positive, otherwise linear.

    Args:
        points: columns `group` (colour and symbol), `label` (in the hover text), and for both
            measures m `m`, `m_low` and `m_high`.
        x: the measure on the x-axis.
        y: the measure on the y-axis.

    Raises:
        ValueError: if a column is missing, there are no rows, or a number is not finite.
    """
    measures = [x, f"{x}_low", f"{x}_high", y, f"{y}_low", f"{y}_high"]
    check_columns(points, ["group", "label", *measures], "points")
    check_finite(points[measures], "points")
    titles = [escaped(_AXIS_TITLES.get(name, name)) for name in (x, y)]
    figure = style.figure(title, x=titles[0], y=titles[1])
    groups = points.groupby("group", sort=False)
    for (group, rows), (colour, _, symbol) in zip(groups, cycle(_MARKS)):
        bars = {
            f"error_{axis}": {
                "type": "data",
                "symmetric": False,
                "array": (rows[f"{name}_high"] - rows[name]).tolist(),
                "arrayminus": (rows[name] - rows[f"{name}_low"]).tolist(),
                "color": rgba(colour, 0.5),
                "thickness": 1.5,
                "width": 0,
            }
            for axis, name in (("x", x), ("y", y))
        }
        figure.add_scatter(
            name=escaped(group),
            x=rows[x].tolist(),
            y=rows[y].tolist(),
            hovertext=[escaped(label) for label in rows["label"]],
            mode="markers",
            marker={"color": rgba(colour), "symbol": symbol, "size": 9},
            hovertemplate=f"%{{hovertext}}<br>{titles[0]} %{{x:.4g}}, {titles[1]} %{{y:.4g}}"
            "<extra></extra>",
            **bars,
        )
    if min([*points[y], *points[f"{y}_low"]]) > 0:
        figure.update_yaxes(type="log")
    return _with_legend_below(figure, title)


def _with_legend_below(figure: go.Figure, title: str | None) -> go.Figure:
    """Names of methods may take several lines: below, they cover nothing."""
    figure.update_xaxes(title_standoff=4)
    legend = {"y": -0.28, "yanchor": "top"}
    return figure.update_layout(height=420, margin_t=top_margin(title), legend=legend)
