"""What views refuse: missing columns, numbers that are not finite, labels that do not fit."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from torch import Tensor

from bilinear_lens.spectrum import Spectrum


def check_spectrum(spectrum: Spectrum, shape: Sequence[int], *, k: int | None = None) -> None:
    check_k(k)
    check_size(spectrum.d_in, shape, "eigenvectors")
    if not (spectrum.values.isfinite().all() and spectrum.vectors.isfinite().all()):
        raise ValueError("The spectrum holds NaN or infinite numbers.")


def check_vectors(images: Tensor, shape: Sequence[int], name: str) -> None:
    if images.ndim != 2 or not len(images):
        raise ValueError(
            f"{name} has {list(images.shape)} numbers: give vectors of pixels, at least one."
        )
    check_size(images.shape[1], shape, name)
    if not images.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite pixels.")


def check_size(size: int, shape: Sequence[int], name: str) -> None:
    if len(shape) not in (1, 2, 3) or min(shape) < 1:
        raise ValueError(
            f"shape={tuple(shape)} must be (channels, h, w), (h, w) or (n,), each at least 1."
        )
    if math.prod(shape) != size:
        raise ValueError(
            f"shape={tuple(shape)} asks for {math.prod(shape)} numbers, but {name} have {size} "
            "(without the constant of an affine one)."
        )


def check_k(k: int | None) -> None:
    if k is not None and k < 1:
        raise ValueError(f"k={k} must be at least 1.")


def check_labels(labels: Sequence[str], n: int, what: str) -> None:
    if len(labels) != n:
        raise ValueError(f"{len(labels)} labels for {n} {what}: give one for each.")


def check_columns(table: pd.DataFrame, columns: Sequence[str], name: str) -> None:
    if missing := [column for column in columns if column not in table.columns]:
        raise ValueError(f"{name} lacks the columns {missing}; it has {list(table.columns)}.")
    if table.empty:
        raise ValueError(f"{name} has no rows.")


def check_finite(numbers: ArrayLike, name: str) -> None:
    if not np.isfinite(np.asarray(numbers, dtype=float)).all():
        raise ValueError(f"{name} holds NaN or infinite numbers.")
