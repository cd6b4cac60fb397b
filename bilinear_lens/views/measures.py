"""Plotly figures of measures: what truncation costs, what a circuit leaves, one against another."""

from collections.abc import Hashable, Iterable
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
        curves: columns `k` and that of the measure, as `bl.truncation_curve` returns; if there are
            several lines, `order` (the name of each), and if they have intervals, both `y_low` and
            `y_high` for a measure `y`.
        y: the measure; it names the line where there is no `order`.

    Raises:
        ValueError: if a column is missing, there are no rows, a number is not finite, or a `k` is
            less than 1 (its axis is logarithmic).
    """
    bounds = _bounds(curves, y)
    check_columns(curves, ["k", y, *bounds], "curves")
    check_finite(curves[["k", y, *bounds]], "curves")
    check_k(min(curves["k"]))
    hover = "%{fullData.name}, k = %{x}: %{y:.4g}"
    if bounds:
        hover += " (%{customdata[0]:.4g} to %{customdata[1]:.4g})"
    figure = style.figure(title, x="k", y=escaped(_AXIS_TITLES.get(y, y)))
    groups = _groups(curves.sort_values("k"), "order", y)
    for (order, rows), (colour, dash, symbol) in zip(groups, cycle(_MARKS)):
        name = escaped(order)
        x = rows["k"].tolist()
        if bounds:
            low, high = (rows[bound].tolist() for bound in bounds)
            style.add_band(figure, name, x, low, high, colour)
        figure.add_scatter(
            name=name,
            x=x,
            y=rows[y].tolist(),
            customdata=rows[bounds].to_numpy().tolist() if bounds else None,
            mode="lines+markers",
            line={"color": rgba(colour), "dash": dash, "width": 2},
            marker={"symbol": symbol, "size": 7},
            legendgroup=name,
            hovertemplate=f"{hover}<extra></extra>",
        )
    ticks = []
    for k in sorted(set(curves["k"])):  # those that have room for a label
        if not ticks or k >= 1.6 * ticks[-1]:
            ticks.append(k)
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return _with_legend_below(figure, title)


def faithfulness(curve: pd.DataFrame, *, title: str | None = None) -> go.Figure:
    """What is left of an output when only a circuit's first nodes write it.

    Args:
        curve: as `bl.faithfulness` returns: a line for the traced circuit, and one for the mean of
            the random ones, with their range.

    Raises:
        ValueError: if a column is missing, there are no rows, or a number is not finite.
    """
    check_columns(curve, ["circuit", "nodes", "left"], "curve")
    kept = curve[curve["nodes"] > 0].groupby(["circuit", "nodes"], sort=False)["left"]
    shown = kept.agg(left="mean", left_low="min", left_high="max").reset_index()
    shown = shown.rename(columns={"circuit": "order", "nodes": "k"})
    return truncation(shown, y="left", title=title).update_xaxes(title="nodes")


def trade_off(
    points: pd.DataFrame, *, x: str = "accuracy", y: str = "lost", title: str | None = None
) -> go.Figure:
    """Two measures against each other, with the intervals that they have.

    The y-axis is logarithmic where all of `y` and `y_low` are positive, otherwise linear.

    Args:
        points: columns of both measures; if there are any, `group` (colour and symbol), `label` (in
            the hover text) and, for the interval of a measure `m`, both `m_low` and `m_high`.
        x: the measure on the x-axis.
        y: the measure on the y-axis; it names the points where there is no `group`.

    Raises:
        ValueError: if a column is missing, there are no rows, or a number is not finite.
    """
    bounds = {"x": _bounds(points, x), "y": _bounds(points, y)}
    measures = [x, y, *bounds["x"], *bounds["y"]]
    check_columns(points, measures, "points")
    check_finite(points[measures], "points")
    titles = [escaped(_AXIS_TITLES.get(name, name)) for name in (x, y)]
    figure = style.figure(title, x=titles[0], y=titles[1])
    hover = f"{titles[0]} %{{x:.4g}}, {titles[1]} %{{y:.4g}}<extra></extra>"
    if labelled := "label" in points.columns:
        hover = f"%{{hovertext}}<br>{hover}"
    groups = _groups(points, "group", y)
    for (group, rows), (colour, _, symbol) in zip(groups, cycle(_MARKS)):
        bars = {
            f"error_{axis}": {
                "type": "data",
                "symmetric": False,
                "array": (rows[bounds[axis][1]] - rows[name]).tolist(),
                "arrayminus": (rows[name] - rows[bounds[axis][0]]).tolist(),
                "color": rgba(colour, 0.5),
                "thickness": 1.5,
                "width": 0,
            }
            for axis, name in (("x", x), ("y", y))
            if bounds[axis]
        }
        figure.add_scatter(
            name=escaped(group),
            x=rows[x].tolist(),
            y=rows[y].tolist(),
            hovertext=[escaped(label) for label in rows["label"]] if labelled else None,
            mode="markers",
            marker={"color": rgba(colour), "symbol": symbol, "size": 9},
            hovertemplate=hover,
            **bars,
        )
    if points[[y, *bounds["y"][:1]]].to_numpy().min() > 0:
        figure.update_yaxes(type="log")
    return _with_legend_below(figure, title)


def _bounds(table: pd.DataFrame, measure: str) -> list[str]:
    """Both columns of a measure's interval, or none where the table has neither."""
    bounds = [f"{measure}_low", f"{measure}_high"]
    return bounds if any(bound in table.columns for bound in bounds) else []


def _groups(table: pd.DataFrame, column: str, name: str) -> Iterable[tuple[Hashable, pd.DataFrame]]:
    """Rows by what stands in the column, or all of them under `name` where it is missing."""
    return table.groupby(column, sort=False) if column in table.columns else [(name, table)]


def _with_legend_below(figure: go.Figure, title: str | None) -> go.Figure:
    """Names of methods may take several lines: below, they cover nothing."""
    figure.update_xaxes(title_standoff=4)
    legend = {"y": -0.28, "yanchor": "top"}
    return figure.update_layout(height=420, margin_t=top_margin(title), legend=legend)
