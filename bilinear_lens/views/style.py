"""What all views share: a colour for each sign, how a token is written, an empty figure."""

from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

POSITIVE = (59, 125, 216)
NEGATIVE = (217, 85, 44)
"""Blue and vermilion: told apart by colour-blind readers, legible on white and on black.

Only CircuitsVis's text view cannot take them: it mixes white with blue (to violet) and with red.
"""

_PICTURES = {code: chr(0x2400 + code) for code in range(32)} | {
    ord(" "): "␣",
    ord("\n"): "⏎",
    ord("\t"): "⇥",
    0xA0: "⍽",
}


def rgba(colour: tuple[int, int, int], opacity: float = 1.0) -> str:
    """The colour as CSS and Plotly read it."""
    return f"rgba({', '.join(map(str, colour))}, {opacity:.3g})"


def visible(token: str) -> str:
    """The token with its spaces, line breaks and control characters drawn: `" girl"` is `␣girl`."""
    return token.translate(_PICTURES)


DIVERGING = [
    [0, rgba(NEGATIVE)],
    [0.5, rgba(NEGATIVE, 0.0)],
    [0.5, rgba(POSITIVE, 0.0)],
    [1, rgba(POSITIVE)],
]
"""A Plotly colour scale around 0, which has the page's own colour."""

GREY = "#7f858d"
GRID = "rgba(127, 133, 141, 0.25)"


def figure(title: str | None, *, x: str = "", y: str = "") -> go.Figure:
    """An empty figure without a background of its own, in greys that any background bears."""
    axis = {"gridcolor": GRID, "linecolor": GRID, "zeroline": False, "automargin": True}
    return go.Figure(
        layout={
            "template": "none",
            "title": {
                "text": escape(title or "", quote=False),
                "font": {"size": 16},
                "x": 0,
                "y": 1,
                "yanchor": "top",
                "pad": {"t": 10, "l": 10},
            },
            "paper_bgcolor": "rgba(0, 0, 0, 0)",
            "plot_bgcolor": "rgba(0, 0, 0, 0)",
            "font": {"color": GREY, "family": "system-ui, sans-serif", "size": 13},
            "margin": {"l": 10, "r": 10, "t": 75 if title else 48, "b": 10},
            "xaxis": {**axis, "title": {"text": x}, "showgrid": False},
            "yaxis": {**axis, "title": {"text": y}},
            "hoverlabel": {"bgcolor": "#2b2f36", "bordercolor": GREY, "font": {"color": "white"}},
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
            "modebar": {
                "bgcolor": "rgba(0, 0, 0, 0)",
                "color": GREY,
                "activecolor": GREY,
                "remove": ["sendChartToCloud"],
            },
        }
    )


def add_band(
    figure: go.Figure,
    name: str,
    x: Sequence[float | int],
    low: Sequence[float | int],
    high: Sequence[float | int],
    colour: tuple[int, int, int],
) -> None:
    """An interval around the line `name`, which is drawn after it."""
    figure.add_scatter(
        name=f"{name} interval",
        x=[*x, *reversed(x)],
        y=[*high, *reversed(low)],
        mode="lines",
        fill="toself",
        fillcolor=rgba(colour, 0.18),
        line={"width": 0},
        legendgroup=name,
        showlegend=False,
        hoverinfo="skip",
    )
