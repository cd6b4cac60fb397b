"""Plotly figures of pictures: eigenvectors, atoms and images, legible on light and dark pages.

- an image is a vector of pixels with a shape: `(h, w)` or `(1, h, w)` grey, `(3, h, w)` RGB, or
  `(n,)` a plain vector, drawn as one row of cells
- any other number of channels, `(c, h, w)`, is one grey picture `c * w` wide: the channels side by
  side in their order, with nothing between them
- what has a sign is blue above 0, vermilion below and the page's own colour at 0; in RGB, 0 is mid
  grey. Each such picture has a scale of its own
- the constant coordinate of an affine spectrum or tensor is no pixel: it stands in the hover text
"""

import math
from collections.abc import Iterable, Sequence

import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from bilinear_lens.spectrum import Spectrum
from bilinear_lens.tensor import BilinearTensor
from bilinear_lens.views import style
from bilinear_lens.views.checks import (
    check_columns,
    check_finite,
    check_k,
    check_labels,
    check_size,
    check_spectrum,
    check_vectors,
)
from bilinear_lens.views.grid import Grid, escaped, rounded, row_height, signed_text, stack
from bilinear_lens.views.style import DIVERGING, GRID, NEGATIVE, POSITIVE, rgba


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
    check_spectrum(spectrum, shape, k=k)
    if spectrum.values.ndim > 2:
        raise ValueError(
            f"spectrum has shape {list(spectrum.values.shape)}: give [k] or [n_classes, k]."
        )
    single = spectrum.values.ndim == 1
    values = spectrum.values[None] if single else spectrum.values
    vectors = spectrum.vectors[None] if single else spectrum.vectors
    if labels is None:
        labels = [""] if single else [str(number) for number in range(len(values))]
    check_labels(labels, len(values), "classes")
    columns = min(k, spectrum.k)
    figure = style.figure(title)
    bands = stack(figure, title, [row_height(shape, columns)] * len(values))
    grid = Grid(shape, bands, columns=columns, labels=labels)
    for row, label in enumerate(labels):
        for rank in range(columns):
            value = signed_text(values[row, rank].item())
            hover = f"{label} eigenvector {rank}: {value}".strip()
            grid.add(vectors[row, :, rank], row, rank, value, hover, affine=spectrum.affine)
    return grid.draw(figure)


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
    check_spectrum(spectrum, shape, k=k)
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
    figure = style.figure(title, x="rank within its sign")
    bands = stack(figure, title, [max(90, row_height(shape, columns))] * 2)
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
    grid = Grid(shape, bands, columns=columns, x=2, y=2, width=(0.46, 1.0))
    for row, ranks in enumerate(rows):
        for column, rank in enumerate(ranks):
            value = signed_text(values[rank])
            hover = f"eigenvector {rank}: {value}"
            vector = spectrum.vectors[:, rank]
            grid.add(vector, row, column, value, hover, affine=spectrum.affine)
    return grid.draw(figure)


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
    check_columns(table, ["class", "eigenvector", "value", "projection", "activation"], "table")
    check_spectrum(spectrum, shape)
    check_vectors(image[None], shape, "image")
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
    check_finite(logits, "logits")
    check_finite(table["activation"], "activation")
    check_finite(numbers, "value or projection")

    columns = 1 + max(map(len, fired.values()))
    figure = style.figure(title)
    heights = [max(110, 18 * len(logits)), 12] + [row_height(shape, columns)] * len(classes)
    top, _, *bands = stack(figure, title, heights)  # the empty band is the axis's
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
    figure.update_xaxes(domain=(0, 0.64), zeroline=True, zerolinecolor=GRID)
    figure.update_xaxes(title={"text": "logit", "standoff": 4, "font": {"size": 12}})
    figure.update_yaxes(**_ticks(logits.index), domain=top, autorange="reversed", showgrid=False)
    figure.update_layout(bargap=0.25)
    corner = Grid(shape, [top], columns=1, x=2, y=2, width=(0.72, 1.0))
    corner.add(image, 0, 0, "", "image", signed=False)
    corner.draw(figure)
    logit_of = dict(zip(logits.index, logits.tolist(), strict=True))
    labels = [f"{label}  {signed_text(logit_of[label])}" for label in classes]
    grid = Grid(shape, bands, columns=columns, labels=labels, x=3, y=3)
    for entry, label in enumerate(classes):
        for column, row in enumerate(fired[label]):
            rank = int(row["eigenvector"])
            texts = {name: signed_text(row[name]) for name in ("value", "projection", "activation")}
            hover = f"eigenvector {rank}: " + ", ".join(map(" ".join, texts.items()))
            vector = spectrum.vectors[entry, :, rank]
            grid.add(vector, entry, column, texts["activation"], hover, affine=spectrum.affine)
        if rest[label]:
            grid.write(signed_text(sum(rest[label])), entry, columns - 1)
            grid.write("rest", entry, columns - 1, side="top")
    return grid.draw(figure)


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
    check_k(k)
    check_size(tensor.d_in, shape, "the tensor's inputs")
    check_labels(labels, tensor.d_out, "outputs")
    left, right = normalize(tensor.left, dim=1), normalize(tensor.right, dim=1)
    cosine = (left * right).sum(1)
    weights = tensor.down * tensor.left.norm(dim=1) * tensor.right.norm(dim=1)
    norms = weights.norm(dim=0) * ((1 + cosine**2) / 2).sqrt()
    order = norms.argsort(descending=True, stable=True)[:k].tolist()
    figure = style.figure(title)
    height = row_height(shape, len(order))
    *bands, bottom = stack(figure, title, [height, height, 20 * len(labels)], below=84)
    parts = (
        ("l + r", normalize(left + right, dim=1), (1 + cosine) / 2),
        ("l \N{MINUS SIGN} r", normalize(left - right, dim=1), (cosine - 1) / 2),
    )
    names = [name for name, _, _ in parts]
    grid = Grid(shape, bands, columns=len(order), labels=names)
    for row, (name, patterns, values) in enumerate(parts):
        for column, atom in enumerate(order):
            value = signed_text(values[atom].item(), digits=2)
            hover = f"atom {atom}, {name}: {value}"
            grid.add(patterns[atom], row, column, value, hover, affine=tensor.affine)
    grid.draw(figure)
    shown = weights[:, order]
    bound = shown.abs().max().item() or 1.0
    figure.add_heatmap(
        name="weights",
        z=rounded(shown),
        zmin=-bound,
        zmax=bound,
        colorscale=DIVERGING,
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
    check_vectors(images, shape, "images")
    check_labels(labels, len(images), "images")
    if columns < 1:
        raise ValueError(f"columns={columns} must be at least 1.")
    columns = min(columns, len(images))
    figure = style.figure(title)
    bands = stack(figure, title, [row_height(shape, columns)] * math.ceil(len(images) / columns))
    grid = Grid(shape, bands, columns=columns)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        grid.add(image, *divmod(number, columns), label, label, signed=signed)
    return grid.draw(figure)


def _ticks(names: Iterable[object]) -> dict:
    """Numbered ticks: a name may stand twice, and one such as "7" is no number."""
    names = [escaped(name) for name in names]
    return {"tickvals": list(range(len(names))), "ticktext": names}
