"""Plotly figures of pictures: eigenvectors, atoms and images, legible on light and dark pages.

- an image is a vector of pixels with a shape: `(1, h, w)` grey, `(3, h, w)` RGB, or `(n,)` a plain
  vector, drawn as one row of cells
- what has a sign is blue above 0, vermilion below and the page's own colour at 0; in RGB, 0 is mid
  grey. Each such picture has a scale of its own
- the constant coordinate of an affine spectrum or tensor is no pixel: it stands in the hover text
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import cycle

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import normalize

from bilinear_lens.spectrum import Spectrum
from bilinear_lens.tensor import BilinearTensor
from bilinear_lens.views.plots import _GRID, _figure
from bilinear_lens.views.style import NEGATIVE, POSITIVE, rgba

_DIVERGING = [
    [0, rgba(NEGATIVE)],
    [0.5, rgba(NEGATIVE, 0.0)],
    [0.5, rgba(POSITIVE, 0.0)],
    [1, rgba(POSITIVE)],
]
_GREYS = [[0, "black"], [1, "white"]]
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
_CAPTION = 24
"""Height in screen pixels of the line of text above a picture."""
_SIDE = 0.9
"""Width of a picture; columns are 1 apart."""


def eigenvectors(
    spectrum: Spectrum,
    *,
    shape: Sequence[int],
    labels: Sequence[str] | None = None,
    k: int = 5,
    title: str | None = None,
) -> go.Figure:
    """Eigenvectors of largest `|value|` as pictures under their eigenvalues, a row per class.

    Args:
        spectrum: `[k]` of one class or `[n_classes, k]` of several.
        labels: a name for each class; by default several have their numbers.
        k: how many of each class, or all where there are fewer.

    Raises:
        ValueError: if `k` is less than 1, the spectrum has more batch axes, is not finite or has
            another size than `shape`, or there is not one label for each class.
    """
    _check_spectrum(spectrum, shape, k=k)
    if spectrum.values.ndim > 2:
        raise ValueError(
            f"spectrum has shape {list(spectrum.values.shape)}: give [k] or [n_classes, k]."
        )
    single = spectrum.values.ndim == 1
    values = spectrum.values[None] if single else spectrum.values
    vectors = spectrum.vectors[None] if single else spectrum.vectors
    if labels is None:
        labels = [""] if single else [str(number) for number in range(len(values))]
    _check_labels(labels, len(values), "classes")
    columns = min(k, spectrum.k)
    figure = _figure(title)
    bands = _stack(figure, title, [_height(shape, columns)] * len(values))
    grid = _Grid(figure, shape, bands, columns=columns, labels=labels)
    for row, label in enumerate(labels):
        for rank in range(columns):
            value = _signed(values[row, rank].item())
            hover = f"{label} eigenvector {rank}: {value}".strip()
            grid.add(vectors[row, :, rank], row, rank, value, hover, affine=spectrum.affine)
    return figure


def class_spectrum(
    spectrum: Spectrum, *, shape: Sequence[int], k: int = 4, title: str | None = None
) -> go.Figure:
    """All eigenvalues of a class, beside the eigenvectors of both ends.

    Positive eigenvalues stand above the axis and negative ones below, each by its rank within its
    sign, as do the pictures. The axis begins with those of at least 1% of the largest; a double
    click shows all.

    Args:
        k: how many eigenvectors of each sign, or all where there are fewer.

    Raises:
        ValueError: if `k` is less than 1, or the spectrum is batched, not finite or has another
            size than `shape`.
    """
    _check_spectrum(spectrum, shape, k=k)
    if spectrum.values.ndim != 1:
        raise ValueError(
            f"spectrum has shape {list(spectrum.values.shape)}: give [k], that of one class."
        )
    values = spectrum.values.tolist()
    signs = {
        sign: sorted(
            (rank for rank, value in enumerate(values) if value * sign > 0),
            key=lambda rank: -abs(values[rank]),
        )
        for sign in (1, -1)
    }
    rows = [ranks[:k] for ranks in signs.values()]
    columns = max(1, *map(len, rows))
    figure = _figure(title, x="rank within its sign")
    bands = _stack(figure, title, [max(90, _height(shape, columns))] * 2)
    for name, colour, ranks in zip(
        ("positive", "negative"), (POSITIVE, NEGATIVE), signs.values(), strict=True
    ):
        figure.add_bar(
            name=name,
            x=list(range(len(ranks))),
            y=[values[rank] for rank in ranks],
            customdata=ranks,
            marker={"color": rgba(colour), "line": {"width": 0}},
            hovertemplate="eigenvector %{customdata}: %{y:+.4g}<extra></extra>",
        )
    least = 0.01 * max(map(abs, values))
    shown = max(1, *(sum(abs(values[rank]) >= least for rank in each) for each in signs.values()))
    figure.update_xaxes(domain=(0, 0.4), range=(-0.5, shown - 0.5), nticks=min(shown + 1, 6))
    figure.update_layout(barmode="overlay", bargap=0.1)
    grid = _Grid(figure, shape, bands, columns=columns, x=2, y=2, width=(0.46, 1.0))
    for row, ranks in enumerate(rows):
        for column, rank in enumerate(ranks):
            value = _signed(values[rank])
            hover = f"eigenvector {rank}: {value}"
            vector = spectrum.vectors[:, rank]
            grid.add(vector, row, column, value, hover, affine=spectrum.affine)
    return figure


def explanation(
    image: Float[Tensor, " d_in"],
    logits: pd.Series,
    table: pd.DataFrame,
    spectrum: Spectrum,
    *,
    shape: Sequence[int],
    title: str | None = None,
) -> go.Figure:
    """An image, its logits, and the eigenvectors that make up those of the explained classes.

    Each row's activations and its rest add up to the logit beside the class. Eigenvectors keep the
    spectrum's sign: where the projection (in the hover text) is negative, the image matches what is
    vermilion.

    Args:
        image: pixels; what is outside 0..1 is drawn as 0 or 1.
        logits: by class.
        table: columns `class`, `eigenvector` (rank in the class's spectrum, -1 for the sum of all
            others), `value`, `projection` and `activation`; a row for each picture, in their order.
        spectrum: `[n, k]`, an entry for each distinct class of the table, in their order.

    Raises:
        ValueError: if sizes differ from `shape`, something is not finite, columns are missing, or
            the table's classes and ranks are not those of the logits and the spectrum.
    """
    _check_columns(table, ["class", "eigenvector", "value", "projection", "activation"], "table")
    _check_spectrum(spectrum, shape)
    _check_vectors(image[None], shape, "image")
    classes = list(dict.fromkeys(table["class"]))
    if spectrum.values.ndim != 2 or len(spectrum.values) != len(classes):
        raise ValueError(
            f"spectrum has shape {list(spectrum.values.shape)}; the table has {len(classes)} "
            f"classes: give [{len(classes)}, k]."
        )
    if not logits.index.is_unique or not set(classes) <= set(logits.index):
        raise ValueError(
            f"The logits' labels {list(logits.index)} must be different, and hold the table's "
            f"classes {classes}."
        )
    if not table["eigenvector"].between(-1, spectrum.k - 1).all():
        raise ValueError(
            f"Eigenvectors {sorted(set(table['eigenvector']))} must be between 0 and "
            f"{spectrum.k - 1}, or -1 for the sum of all others."
        )
    fired: dict[str, list[dict]] = {label: [] for label in classes}
    rest: dict[str, list[float]] = {label: [] for label in classes}
    for row in table.to_dict("records"):
        if row["eigenvector"] < 0:
            rest[row["class"]].append(row["activation"])
        else:
            fired[row["class"]].append(row)
    numbers = [(row["value"], row["projection"]) for rows in fired.values() for row in rows]
    _check_finite(logits, "logits")
    _check_finite(table["activation"], "activation")
    _check_finite(numbers, "value or projection")

    columns = 1 + max(map(len, fired.values()))
    figure = _figure(title)
    heights = [max(110, 18 * len(logits)), 12] + [_height(shape, columns)] * len(classes)
    top, _, *bands = _stack(figure, title, heights)  # the empty band is the axis's
    figure.add_bar(
        name="logits",
        orientation="h",
        x=logits.tolist(),
        y=list(range(len(logits))),
        marker_color=[
            rgba(POSITIVE if logit > 0 else NEGATIVE, 1.0 if label in classes else 0.45)
            for label, logit in logits.items()
        ],
        hovertemplate="%{y}: %{x:+.4g}<extra></extra>",
    )
    figure.update_xaxes(domain=(0, 0.64), zeroline=True, zerolinecolor=_GRID)
    figure.update_xaxes(title={"text": "logit", "standoff": 4, "font": {"size": 12}})
    figure.update_yaxes(**_ticks(logits.index), domain=top, autorange="reversed", showgrid=False)
    figure.update_layout(bargap=0.25)
    corner = _Grid(figure, shape, [top], columns=1, x=2, y=2, width=(0.72, 1.0))
    corner.add(image, 0, 0, "", "image", signed=False)
    logit_of = dict(zip(logits.index, logits.tolist(), strict=True))
    labels = [f"{label}  {_signed(logit_of[label])}" for label in classes]
    grid = _Grid(figure, shape, bands, columns=columns, labels=labels, x=3, y=3)
    for entry, label in enumerate(classes):
        for column, row in enumerate(fired[label]):
            rank = int(row["eigenvector"])
            texts = {name: _signed(row[name]) for name in ("value", "projection", "activation")}
            hover = f"eigenvector {rank}: " + ", ".join(map(" ".join, texts.items()))
            vector = spectrum.vectors[entry, :, rank]
            grid.add(vector, entry, column, texts["activation"], hover, affine=spectrum.affine)
        if rest[label]:
            grid.write(_signed(sum(rest[label])), entry, columns - 1)
            grid.write("rest", entry, columns - 1, side="top")
    return figure


def atoms(
    tensor: BilinearTensor,
    *,
    shape: Sequence[int],
    labels: Sequence[str],
    k: int | None = None,
    title: str | None = None,
) -> go.Figure:
    """The two patterns of each atom of a factorised tensor, above its weight for each class.

    An atom is one term `down (left . x) (right . x)`, and atoms stand by the norm of that term as a
    tensor, largest first. With unit `l` and `r` the symmetric matrix of `(l . x) (r . x)` has the
    eigenvectors `l + r` and `l - r`, with eigenvalues `(1 + cos) / 2` and `-(1 - cos) / 2`; the
    weights are `down |left| |right|`.

    Args:
        labels: a name for each output.
        k: how many atoms, or all where there are fewer; None for all.

    Raises:
        ValueError: if `k` is less than 1, inputs have another size than `shape`, or there is not
            one label for each output.
    """
    _check_k(k)
    _check_size(tensor.d_in, shape, "the tensor's inputs")
    _check_labels(labels, tensor.d_out, "outputs")
    left, right = normalize(tensor.left, dim=1), normalize(tensor.right, dim=1)
    cosine = (left * right).sum(1)
    weights = tensor.down * tensor.left.norm(dim=1) * tensor.right.norm(dim=1)
    norms = weights.norm(dim=0) * ((1 + cosine**2) / 2).sqrt()
    order = norms.argsort(descending=True, stable=True)[:k].tolist()
    figure = _figure(title)
    height = _height(shape, len(order))
    *bands, bottom = _stack(figure, title, [height, height, 20 * len(labels)], below=84)
    parts = (
        ("l + r", normalize(left + right, dim=1), (1 + cosine) / 2),
        ("l \N{MINUS SIGN} r", normalize(left - right, dim=1), (cosine - 1) / 2),
    )
    names = [name for name, _, _ in parts]
    grid = _Grid(figure, shape, bands, columns=len(order), labels=names)
    for row, (name, patterns, values) in enumerate(parts):
        for column, atom in enumerate(order):
            value = _signed(values[atom].item(), digits=2)
            hover = f"atom {atom}, {name}: {value}"
            grid.add(patterns[atom], row, column, value, hover, affine=tensor.affine)
    shown = weights[:, order]
    bound = shown.abs().max().item() or 1.0
    figure.add_heatmap(
        name="weights",
        z=_rounded(shown),
        zmin=-bound,
        zmax=bound,
        colorscale=_DIVERGING,
        xgap=1,
        ygap=1,
        yaxis="y3",
        hovertemplate="%{y}, atom %{x}: %{z:+.3g}<extra></extra>",
        colorbar={
            **{"orientation": "h", "thickness": 8, "lenmode": "pixels", "len": 220},
            **{"x": 0, "xanchor": "left", "xpad": 0},
            **{"yref": "container", "y": 0, "yanchor": "bottom", "ypad": 4},
            **{"title": {"text": "weight", "side": "right"}, "outlinewidth": 0, "nticks": 5},
        },
    )
    axis = {"domain": bottom, "anchor": "x", "autorange": "reversed", "automargin": True}
    axis |= {"ticks": "", "showgrid": False, "zeroline": False}
    figure.update_layout(yaxis3={**axis, **_ticks(labels)})
    figure.update_xaxes(title={"text": "atom", "standoff": 2, "font": {"size": 12}})
    return figure.update_xaxes(anchor="y3", showticklabels=True, **_ticks(order))


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
    _check_columns(curves, ["order", "k", y, low, high], "curves")
    _check_finite(curves[["k", y, low, high]], "curves")
    _check_k(min(curves["k"]))
    figure = _figure(title, x="k", y=_text(_AXIS_TITLES.get(y, y)))
    groups = curves.sort_values("k").groupby("order", sort=False)
    for (order, rows), (colour, dash, symbol) in zip(groups, cycle(_MARKS)):
        name = _text(order)
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
    _check_columns(points, ["group", "label", *measures], "points")
    _check_finite(points[measures], "points")
    titles = [_text(_AXIS_TITLES.get(name, name)) for name in (x, y)]
    figure = _figure(title, x=titles[0], y=titles[1])
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
            name=_text(group),
            x=rows[x].tolist(),
            y=rows[y].tolist(),
            hovertext=[_text(label) for label in rows["label"]],
            mode="markers",
            marker={"color": rgba(colour), "symbol": symbol, "size": 9},
            hovertemplate=f"%{{hovertext}}<br>{titles[0]} %{{x:.4g}}, {titles[1]} %{{y:.4g}}"
            "<extra></extra>",
            **bars,
        )
    if min([*points[y], *points[f"{y}_low"]]) > 0:
        figure.update_yaxes(type="log")
    return _with_legend_below(figure, title)


def pictures(
    images: Float[Tensor, "n d_in"],
    *,
    shape: Sequence[int],
    labels: Sequence[str],
    signed: bool,
    columns: int = 10,
    title: str | None = None,
) -> go.Figure:
    """Pictures under their labels, row by row, such as class means or masks.

    Args:
        labels: a name for each picture.
        signed: whether values are on both sides of 0; otherwise what is outside 0..1 is drawn as 0
            or 1.
        columns: the most pictures in a row; few where labels are long.

    Raises:
        ValueError: if there are no images, they are not finite or have another size than `shape`,
            there is not one label for each, or `columns` is less than 1.
    """
    _check_vectors(images, shape, "images")
    _check_labels(labels, len(images), "images")
    if columns < 1:
        raise ValueError(f"columns={columns} must be at least 1.")
    columns = min(columns, len(images))
    figure = _figure(title)
    bands = _stack(figure, title, [_height(shape, columns)] * math.ceil(len(images) / columns))
    grid = _Grid(figure, shape, bands, columns=columns)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        grid.add(image, *divmod(number, columns), label, label, signed=signed)
    return figure


@dataclass(frozen=True)
class _Grid:
    """Rows of pictures on one x-axis and a y-axis for each row.

    All axes are scaled alike, so that pixels stay square at every width of the page.
    """

    figure: go.Figure
    shape: Sequence[int]
    bands: Sequence[tuple[float, float]]
    """Each row's part of the figure's height."""
    columns: int
    labels: Sequence[str] = ()
    """At the left of each row."""
    x: int = 1
    """The x-axis's number."""
    y: int = 1
    """The number of the first row's y-axis."""
    width: tuple[float, float] = (0.0, 1.0)
    """The grid's part of the figure's width."""

    def __post_init__(self) -> None:
        bare = {"showgrid": False, "zeroline": False, "showline": False, "ticks": ""}
        bare |= {"constrain": "domain"}
        span = {"domain": self.width, "range": [-0.5, self.columns - 0.5]}
        last = {"anchor": f"y{self.y + len(self.bands) - 1}", "showticklabels": False}
        axes = {f"xaxis{self.x}": {**bare, **span, **last, "constraintoward": "left"}}
        height = _SIDE * _aspect(self.shape)
        for row, band in enumerate(self.bands):
            axes[f"yaxis{self.y + row}"] = {
                **bare,
                **{"domain": band, "range": [height, 0], "constraintoward": "top"},
                **{"anchor": f"x{self.x}", "scaleanchor": f"x{self.x}", "automargin": True},
                "tickvals": [height / 2],
                "ticktext": [_text(self.labels[row]) if self.labels else ""],
            }
        self.figure.update_layout(axes)

    def add(
        self,
        vector: Float[Tensor, " coords"],
        row: int,
        column: int,
        caption: str,
        hover: str,
        *,
        signed: bool = True,
        affine: bool = False,
    ) -> None:
        """One picture, in a thin frame: at 0 it has the page's own colour."""
        if affine:
            hover += f", constant {_signed(vector[-1].item())}"
            vector = vector[:-1]
        channels, height, width = _sizes(self.shape)
        pixels = vector.reshape(channels, height, width)
        bound = pixels.abs().max().item() or 1.0
        left, bottom = column - _SIDE / 2, _SIDE * _aspect(self.shape)
        dx, dy = _SIDE / width, bottom / height
        place = {
            "name": _text(hover),
            **{"x0": left + dx / 2, "dx": dx, "y0": dy / 2, "dy": dy},
            **{"xaxis": f"x{self.x}", "yaxis": f"y{self.y + row}"},
        }
        if channels == 3:
            shown = 127.5 + 127.5 * pixels / bound if signed else 255 * pixels.clamp(0, 1)
            self.figure.add_image(
                z=shown.round().int().permute(1, 2, 0).tolist(),
                hovertemplate="%{fullData.name}<extra></extra>",
                **place,
            )
        else:
            self.figure.add_heatmap(
                z=_rounded(pixels[0]),
                zmin=-bound if signed else 0,
                zmax=bound if signed else 1,
                colorscale=_DIVERGING if signed else _GREYS,
                showscale=False,
                hovertemplate="%{fullData.name}<br>here %{z:.3g}<extra></extra>",
                **place,
            )
        self.figure.add_shape(
            **{"xref": place["xaxis"], "x0": left, "x1": left + _SIDE},
            **{"yref": place["yaxis"], "y0": 0, "y1": bottom},
            line={"color": _GRID, "width": 1},
        )
        self.write(caption, row, column)

    def write(self, text: str, row: int, column: int, *, side: str = "bottom") -> None:
        """A line with this side of it at the top of a cell: its "bottom" stands above the cell."""
        self.figure.add_annotation(
            text=_text(text),
            **{"xref": f"x{self.x}", "x": column, "yref": f"y{self.y + row}", "y": 0},
            yanchor=side,
            showarrow=False,
            font={"size": 12 if self.columns < 7 else 10},
        )


def _stack(
    figure: go.Figure, title: str | None, heights: Sequence[float | int], *, below: int = 10
) -> list[tuple[float, float]]:
    """Bands from top to bottom, with room for a caption above each; sets the figure's height.

    Args:
        heights: in screen pixels.
        below: the bottom margin.

    Returns:
        The part of the figure's height that each takes.
    """
    above = _top_margin(title)
    total = sum(heights) + _CAPTION * len(heights)
    margin = {"t": above, "b": below}
    figure.update_layout(height=total + above + below, margin=margin, showlegend=False)
    tops = [total - sum(heights[:row]) - _CAPTION * (row + 1) for row in range(len(heights))]
    return [
        (max(top - height, 0.0) / total, top / total)
        for top, height in zip(tops, heights, strict=True)
    ]


def _with_legend_below(figure: go.Figure, title: str | None) -> go.Figure:
    """Names of methods may take several lines: below, they cover nothing."""
    figure.update_xaxes(title_standoff=4)
    legend = {"y": -0.28, "yanchor": "top"}
    return figure.update_layout(height=420, margin_t=_top_margin(title), legend=legend)


def _top_margin(title: str | None) -> int:
    return 40 if title else 8


def _text(text: object) -> str:
    return escape(str(text), quote=False)


def _ticks(names: Iterable[object]) -> dict:
    """Numbered ticks: a name may stand twice, and one such as "7" is no number."""
    names = [_text(name) for name in names]
    return {"tickvals": list(range(len(names))), "ticktext": names}


def _height(shape: Sequence[int], columns: int) -> float:
    """Height in screen pixels of a row of so many pictures."""
    return min(100, 720 / columns) * min(_aspect(shape), 1.5)


def _sizes(shape: Sequence[int]) -> tuple[int, int, int]:
    channels, height, width = (1, 1, *shape) if len(shape) == 1 else shape
    return channels, height, width


def _aspect(shape: Sequence[int]) -> float:
    """Height of a picture by its width; a long vector is drawn higher than its cells are wide."""
    _, height, width = _sizes(shape)
    return max(height / width, 0.15)


def _signed(value: float, *, digits: int = 3) -> str:
    return f"{value:+.{digits}g}".replace("-", "\N{MINUS SIGN}")


def _rounded(matrix: Float[Tensor, "rows columns"]) -> list[list[float]]:
    """Three digits of each number: what a colour can show."""
    return [[float(f"{value:.3g}") for value in row] for row in matrix.tolist()]


def _check_spectrum(spectrum: Spectrum, shape: Sequence[int], *, k: int | None = None) -> None:
    _check_k(k)
    _check_size(spectrum.d_in, shape, "eigenvectors")
    if not (spectrum.values.isfinite().all() and spectrum.vectors.isfinite().all()):
        raise ValueError("The spectrum holds NaN or infinite numbers.")


def _check_vectors(images: Tensor, shape: Sequence[int], name: str) -> None:
    if images.ndim != 2 or not len(images):
        raise ValueError(
            f"{name} has {list(images.shape)} numbers: give vectors of pixels, at least one."
        )
    _check_size(images.shape[1], shape, name)
    if not images.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite pixels.")


def _check_size(size: int, shape: Sequence[int], name: str) -> None:
    if len(shape) not in (1, 3) or min(shape) < 1 or (len(shape) == 3 and shape[0] not in (1, 3)):
        raise ValueError(f"shape={tuple(shape)} must be (1, h, w) grey, (3, h, w) RGB or (n,).")
    if math.prod(shape) != size:
        raise ValueError(
            f"shape={tuple(shape)} asks for {math.prod(shape)} numbers, but {name} have {size} "
            "(without the constant of an affine one)."
        )


def _check_k(k: int | None) -> None:
    if k is not None and k < 1:
        raise ValueError(f"k={k} must be at least 1.")


def _check_labels(labels: Sequence[str], n: int, what: str) -> None:
    if len(labels) != n:
        raise ValueError(f"{len(labels)} labels for {n} {what}: give one for each.")


def _check_columns(table: pd.DataFrame, columns: Sequence[str], name: str) -> None:
    if missing := [column for column in columns if column not in table.columns]:
        raise ValueError(f"{name} lacks the columns {missing}; it has {list(table.columns)}.")
    if table.empty:
        raise ValueError(f"{name} has no rows.")


def _check_finite(numbers: ArrayLike, name: str) -> None:
    if not np.isfinite(np.asarray(numbers, dtype=float)).all():
        raise ValueError(f"{name} holds NaN or infinite numbers.")
