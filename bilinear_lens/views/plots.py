"""Plotly figures, legible on a light and on a dark page."""

from collections.abc import Sequence
from html import escape

import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from bilinear_lens.spectrum import Spectrum
from bilinear_lens.views import style
from bilinear_lens.views.style import DIVERGING, GREY, NEGATIVE, POSITIVE, rgba, visible

_HATCH = "rgba(255, 255, 255, 0.45)"
_KINDS = {
    "top": ((0, 153, 118), "solid", "circle"),
    "bottom": ((186, 104, 168), "dash", "square"),
    "random": ((127, 133, 141), "dot", "diamond"),
}
_TICKS = (1, 3, 10, 30, 100, 300, 1000, 3000)


def spectrum(
    spectrum: Spectrum,
    *,
    top: int = 30,
    title: str | None = None,
    control: Spectrum | None = None,
) -> go.Figure:
    """Eigenvalues by magnitude, largest first; colour and hatching tell the signs apart.

    Args:
        top: how many eigenvalues, or all where there are fewer.
        control: a spectrum to compare with, drawn as a line of `|value|`.

    Raises:
        ValueError: if a spectrum is batched, or `top` is less than 1.
    """
    if top < 1:
        raise ValueError(f"top={top} must be at least 1.")
    values = _values(spectrum, "spectrum")[:top]
    figure = style.figure(title, x="eigenvector", y="|eigenvalue|")
    for name, colour, hatch, sign in (
        ("positive", POSITIVE, "", 1),
        ("negative", NEGATIVE, "/", -1),
    ):
        ranks = [rank for rank, value in enumerate(values) if value * sign > 0]
        figure.add_bar(
            name=name,
            x=ranks,
            y=[abs(values[rank]) for rank in ranks],
            customdata=[values[rank] for rank in ranks],
            marker={
                "color": rgba(colour),
                "pattern": {"shape": hatch, "fillmode": "overlay", "fgcolor": _HATCH, "size": 6},
            },
            hovertemplate="eigenvector %{x}: %{customdata:+.4g}<extra></extra>",
        )
    if control is not None:
        magnitudes = [abs(value) for value in _values(control, "control")[:top]]
        figure.add_scatter(
            name="control",
            x=list(range(len(magnitudes))),
            y=magnitudes,
            mode="lines",
            line={"color": GREY, "width": 2, "dash": "dot"},
            hovertemplate="control %{x}: %{y:.4g}<extra></extra>",
        )
    return figure.update_layout(bargap=0.15, barmode="overlay")


def interaction_matrix(
    matrix: Float[Tensor, "n n"], *, labels: Sequence[str], title: str | None = None
) -> go.Figure:
    """Interactions between pairs of tokens, 0 in the page's own colour.

    Args:
        matrix: symmetric.
        labels: the n tokens.

    Raises:
        ValueError: if the matrix is not square, symmetric and finite, or labels are missing.
    """
    if matrix.shape != (len(labels), len(labels)) or not len(labels):
        raise ValueError(
            f"matrix {list(matrix.shape)} and {len(labels)} labels: give [n, n] and n labels."
        )
    if not matrix.isfinite().all():
        raise ValueError("matrix holds NaN or infinite entries.")
    bound = matrix.abs().max().item() or 1.0
    if (matrix - matrix.mT).abs().max() > 1e-4 * bound:
        raise ValueError("matrix is not symmetric: pass (matrix + matrix.mT) / 2.")
    names = [escape(visible(label), quote=False) for label in labels]
    figure = style.figure(title)
    figure.add_heatmap(
        z=matrix.tolist(),
        zmin=-bound,
        zmax=bound,
        colorscale=DIVERGING,
        hovertext=[[f"{row} and {column}" for column in names] for row in names],
        hovertemplate="%{hovertext}: %{z:+.4g}<extra></extra>",
        colorbar={"outlinewidth": 0, "thickness": 12, "len": 0.7},
    )
    # numbered axes: the same token may stand twice
    ticks = {"tickvals": list(range(len(names))), "ticktext": names, "showgrid": False}
    figure.update_xaxes(**ticks, tickangle=-45, constrain="domain")
    figure.update_yaxes(**ticks, autorange="reversed", scaleanchor="x", constrain="domain")
    return figure.update_layout(height=max(360, 22 * len(names) + 140))


def ablation_curve(
    curve: pd.DataFrame, *, measure: str = "logit", title: str | None = None
) -> go.Figure:
    """An effect against the number of eigenvectors, with its bootstrap interval.

    Args:
        curve: columns `eigenvectors` ("top", "bottom" or "random"), `k`, and for the measure m
            `m`, `m_low` and `m_high`.
        measure: "logit" or "loss".

    Raises:
        ValueError: if a column is missing, or a kind of eigenvectors is unknown.
    """
    low, high = f"{measure}_low", f"{measure}_high"
    missing = {"eigenvectors", "k", measure, low, high} - set(curve.columns)
    if missing:
        raise ValueError(
            f"The curve lacks the columns {sorted(missing)}; it has {list(curve.columns)}."
        )
    unknown = set(curve["eigenvectors"]) - set(_KINDS)
    if unknown:
        raise ValueError(f"eigenvectors {sorted(unknown)} must be of {list(_KINDS)}.")
    if curve.empty:
        raise ValueError("The curve has no rows: ablate at least one number of eigenvectors.")
    figure = style.figure(title, x="eigenvectors", y=f"effect on the {measure}")
    for kind, (colour, dash, symbol) in _KINDS.items():
        rows = curve.query("eigenvectors == @kind").sort_values("k")
        if rows.empty:
            continue
        x = rows["k"].tolist()
        style.add_band(figure, kind, x, rows[low].tolist(), rows[high].tolist(), colour)
        figure.add_scatter(
            name=kind,
            x=x,
            y=rows[measure].tolist(),
            customdata=rows[["k", low, high]].to_numpy().tolist(),
            mode="lines+markers",
            line={"color": rgba(colour), "dash": dash, "width": 2},
            marker={"symbol": symbol, "size": 7},
            legendgroup=kind,
            hovertemplate=f"{kind} %{{customdata[0]}}: %{{y:.4g}} "
            "(%{customdata[1]:.4g} to %{customdata[2]:.4g})<extra></extra>",
        )
    ticks = [tick for tick in _TICKS if tick <= max(curve["k"])]
    figure.update_xaxes(type="log", tickvals=ticks, ticktext=[str(tick) for tick in ticks])
    return figure


def vocabulary(
    tokens: pd.DataFrame,
    *,
    x: str,
    y: str,
    control: float | int | None = None,
    title: str | None = None,
) -> go.Figure:
    """A point for each token of a vocabulary, over its frequency; medians of tenths as a line.

    Args:
        tokens: a row for each token: `output`, its label, and the columns `x`, positive, and `y`.
        control: what `y` would be by chance, drawn as a dotted line.

    Raises:
        ValueError: if a column is missing, or `x` is not positive everywhere.
    """
    missing = {"output", x, y} - set(tokens.columns)
    if missing:
        raise ValueError(f"tokens lacks the columns {sorted(missing)}; it has {[*tokens.columns]}.")
    if not len(tokens) or min(tokens[x].tolist()) <= 0:
        raise ValueError(f"{x} must be positive, because its axis is logarithmic: add one half?")
    figure = style.figure(title, x=x.replace("_", " "), y=y.replace("_", " "))
    figure.add_scatter(
        name="tokens",
        x=tokens[x].tolist(),
        y=tokens[y].tolist(),
        mode="markers",
        marker={"color": rgba(POSITIVE, 0.35), "size": 4},
        hovertext=[escape(visible(label), quote=False) for label in tokens["output"]],
        hovertemplate="%{hovertext}: %{y:.4g}<extra></extra>",
    )
    tenths = tokens.groupby(pd.qcut(tokens[x], 10, duplicates="drop"), observed=True)[[x, y]]
    medians = tenths.median()
    figure.add_scatter(
        name="medians",
        x=medians[x].tolist(),
        y=medians[y].tolist(),
        mode="lines+markers",
        line={"color": rgba(NEGATIVE), "width": 3},
        hovertemplate="median %{y:.4g}<extra></extra>",
    )
    if control is not None:
        figure.add_scatter(
            name="random weights",
            x=[tokens[x].min(), tokens[x].max()],
            y=[control, control],
            mode="lines",
            line={"color": GREY, "width": 2, "dash": "dot"},
            hovertemplate="random weights %{y:.4g}<extra></extra>",
        )
    return figure.update_layout(height=480).update_xaxes(type="log")


def _values(spectrum: Spectrum, name: str) -> list[float]:
    if spectrum.values.ndim != 1:
        raise ValueError(
            f"{name} holds {list(spectrum.values.shape)} eigenvalues: give that of one direction."
        )
    return spectrum.values.tolist()
