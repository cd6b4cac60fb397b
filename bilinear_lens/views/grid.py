"""Rows of pictures in one Plotly figure, square pixels at every width of the page."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from bilinear_lens.views.style import DIVERGING, GRID

_GREYS = [[0, "black"], [1, "white"]]
_CAPTION = 24
"""Height in screen pixels of the line of text above a picture."""
SIDE = 0.9
"""Width of a picture; columns are 1 apart."""


@dataclass(frozen=True)
class Grid:
    """Rows of pictures on one x-axis and a y-axis for each row.

    All axes are scaled alike, so that pixels stay square at every width of the page. Pictures are
    collected, and `draw` hands them to the figure all at once: one at a time, Plotly copies those
    before it for each.
    """

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

    _traces: list[dict] = field(default_factory=list, init=False)
    _frames: list[dict] = field(default_factory=list, init=False)
    _notes: list[dict] = field(default_factory=list, init=False)

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
            hover += f", constant {signed_text(vector[-1].item())}"
            vector = vector[:-1]
        pixels = vector.reshape(_sizes(self.shape))
        bound = pixels.abs().max().item() or 1.0
        left, bottom = column - SIDE / 2, SIDE * aspect(self.shape)
        rows, columns = _cells(self.shape)
        dx, dy = SIDE / columns, bottom / rows
        place = {
            "name": escaped(hover),
            **{"x0": left + dx / 2, "dx": dx, "y0": dy / 2, "dy": dy},
            **{"xaxis": f"x{self.x}", "yaxis": f"y{self.y + row}"},
        }
        if len(pixels) == 3:
            shown = 127.5 + 127.5 * pixels / bound if signed else 255 * pixels.clamp(0, 1)
            picture = {
                "type": "image",
                "z": shown.round().int().permute(1, 2, 0).tolist(),
                "hovertemplate": "%{fullData.name}<extra></extra>",
            }
        else:
            picture = {
                "type": "heatmap",
                "z": rounded(pixels.transpose(0, 1).flatten(1)),
                "zmin": -bound if signed else 0,
                "zmax": bound if signed else 1,
                "colorscale": DIVERGING if signed else _GREYS,
                "showscale": False,
                "hovertemplate": "%{fullData.name}<br>here %{z:.3g}<extra></extra>",
            }
        self._traces.append(picture | place)
        self._frames.append(
            {
                **{"xref": place["xaxis"], "x0": left, "x1": left + SIDE},
                **{"yref": place["yaxis"], "y0": 0, "y1": bottom},
                "line": {"color": GRID, "width": 1},
            }
        )
        self.write(caption, row, column)

    def write(self, text: str, row: int, column: int, *, side: str = "bottom") -> None:
        """A line with this side of it at the top of a cell: its "bottom" stands above the cell."""
        self._notes.append(
            {
                "text": escaped(text),
                **{"xref": f"x{self.x}", "x": column, "yref": f"y{self.y + row}", "y": 0},
                **{"yanchor": side, "showarrow": False},
                "font": {"size": 12 if self.columns < 7 else 10},
            }
        )

    def draw(self, figure: go.Figure) -> go.Figure:
        """Adds the axes and all that the grid holds to the figure, once."""
        bare = {"showgrid": False, "zeroline": False, "showline": False, "ticks": ""}
        bare |= {"constrain": "domain"}
        span = {"domain": self.width, "range": [-0.5, self.columns - 0.5]}
        last = {"anchor": f"y{self.y + len(self.bands) - 1}", "showticklabels": False}
        axes = {f"xaxis{self.x}": {**bare, **span, **last, "constraintoward": "left"}}
        height = SIDE * aspect(self.shape)
        for row, band in enumerate(self.bands):
            axes[f"yaxis{self.y + row}"] = {
                **bare,
                **{"domain": band, "range": [height, 0], "constraintoward": "top"},
                **{"anchor": f"x{self.x}", "scaleanchor": f"x{self.x}", "automargin": True},
                "tickvals": [height / 2],
                "ticktext": [escaped(self.labels[row]) if self.labels else ""],
            }
        figure.add_traces(self._traces)
        layout = figure["layout"]
        items = {
            "shapes": [*layout["shapes"], *self._frames],
            "annotations": [*layout["annotations"], *self._notes],
        }
        return figure.update_layout(axes | items)


def stack(
    figure: go.Figure, title: str | None, heights: Sequence[float | int], *, below: int = 10
) -> list[tuple[float, float]]:
    """Bands from top to bottom, with room for a caption above each; sets the figure's height.

    Args:
        heights: in screen pixels.
        below: the bottom margin.

    Returns:
        The part of the figure's height that each takes.
    """
    above = top_margin(title)
    total = sum(heights) + _CAPTION * len(heights)
    margin = {"t": above, "b": below}
    figure.update_layout(height=total + above + below, margin=margin, showlegend=False)
    tops = [total - sum(heights[:row]) - _CAPTION * (row + 1) for row in range(len(heights))]
    return [
        (max(top - height, 0.0) / total, top / total)
        for top, height in zip(tops, heights, strict=True)
    ]


def top_margin(title: str | None) -> int:
    return 40 if title else 8


def escaped(text: object) -> str:
    return escape(str(text), quote=False)


def row_height(shape: Sequence[int], columns: int) -> float:
    """Height in screen pixels of a row of so many pictures."""
    return min(100, 720 / columns) * min(aspect(shape), 1.5)


def _sizes(shape: Sequence[int]) -> tuple[int, int, int]:
    channels, height, width = [1] * (3 - len(shape)) + list(shape)
    return channels, height, width


def _cells(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a picture: channels that are not colours stand side by side."""
    channels, height, width = _sizes(shape)
    return height, width if channels == 3 else channels * width


def aspect(shape: Sequence[int]) -> float:
    """Height of a picture by its width; the cells of a very wide one are higher than wide."""
    rows, columns = _cells(shape)
    return max(rows / columns, 0.15)


def signed_text(value: float, *, digits: int = 3) -> str:
    return f"{value:+.{digits}g}".replace("-", "\N{MINUS SIGN}")


def rounded(matrix: Float[Tensor, "rows columns"]) -> list[list[float]]:
    """Three digits of each number: what a colour can show."""
    return [[float(f"{value:.3g}") for value in row] for row in matrix.tolist()]
