"""Basis: directions of a space with a label each. Tokens, heads, latents and pixels are all one."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Basis:
    """Labelled directions, not necessarily orthogonal or of unit length.

    `basis[" girl"]` or `basis[3]` is a direction; `basis[[" girl", 3]]` is a smaller basis.

    Raises:
        ValueError: if there is not one label for each direction, or a direction is not finite.
    """

    directions: Float[Tensor, "n d"]
    labels: Sequence[str]

    def __post_init__(self) -> None:
        if self.directions.ndim != 2 or len(self.directions) != len(self.labels):
            raise ValueError(
                f"directions {list(self.directions.shape)} and {len(self.labels)} labels: give "
                "[n, d] directions and n labels."
            )
        if not self.directions.isfinite().all():
            raise ValueError("directions hold NaN or infinite entries.")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self.labels[:4]))
        return f"Basis({len(self)} directions of size {self.directions.shape[1]}: {shown}, ...)"

    @overload
    def __getitem__(self, label: str | int) -> Tensor: ...
    @overload
    def __getitem__(self, label: Sequence[str | int]) -> "Basis": ...
    def __getitem__(self, label: str | int | Sequence[str | int]) -> "Tensor | Basis":
        if isinstance(label, (str, int)):
            return self.directions[self.index(label)]
        rows = [self.index(each) for each in label]
        return Basis(self.directions[rows], [self.labels[row] for row in rows])

    def index(self, label: str | int) -> int:
        """The row of a label.

        Raises:
            KeyError: if the label is unknown (the near ones are listed) or stands more than once.
            IndexError: if a row number is out of range.
        """
        if isinstance(label, int):
            if not 0 <= label < len(self):
                raise IndexError(f"Row {label} must be between 0 and {len(self) - 1}.")
            return label
        rows = self._rows.get(label)
        if rows is None:
            near = get_close_matches(label, self._rows, n=5, cutoff=0.5)
            raise KeyError(f"No direction is labelled {label!r}; near ones: {near}.")
        if len(rows) > 1:
            raise KeyError(f"{len(rows)} directions are labelled {label!r}; give a row of {rows}.")
        return rows[0]

    @cached_property
    def _rows(self) -> dict[str, list[int]]:
        rows: dict[str, list[int]] = {}
        for row, label in enumerate(self.labels):
            rows.setdefault(label, []).append(row)
        return rows

    def nearest(self, vector: Float[Tensor, " d"], k: int = 10) -> list[tuple[str, float]]:
        """The `k` labels that project most on `vector`, with `direction . vector`.

        Ordered by magnitude, so that both ends of an eigenvector appear.

        Raises:
            ValueError: if `vector` has another size, or `k` is not in 1..n.
        """
        if vector.shape != self.directions.shape[1:]:
            raise ValueError(
                f"vector has shape {list(vector.shape)}; this basis needs "
                f"{list(self.directions.shape[1:])}."
            )
        if not 1 <= k <= len(self):
            raise ValueError(f"k={k} must be between 1 and the {len(self)} directions there are.")
        projections = self.directions @ vector.to(self.directions)
        rows: list[int] = torch.topk(projections.abs(), k).indices.tolist()
        return [(self.labels[row], float(projections[row])) for row in rows]
