"""Explanation: which eigenvectors made a classifier see a class in one input, adding up exactly."""

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from bilinear_lens.analysis.depth import run_chain
from bilinear_lens.models.classifier import HookedBilinearClassifier
from bilinear_lens.spectrum import Spectrum

REST = -1
"""The number of the row that sums the eigenvectors that are not listed."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """The eigenvectors that fired for one input, for the classes of the largest logits."""

    image: Float[Tensor, " d_in"]
    logits: pd.Series
    """By class."""
    table: pd.DataFrame
    """Columns `class`, `eigenvector` (its rank by magnitude; -1 is the rest), `value`,
    `projection`, `activation`: a class's activations sum to its logit."""
    spectrum: Spectrum
    """Of the classes in the table, `[classes, k]`."""
    space: str
    """What the eigenvectors are patterns of: "pixels", or "hidden" in a model of many layers."""

    @property
    def prediction(self) -> str:
        """The class of the largest logit."""
        return str(self.logits.idxmax())

    def __repr__(self) -> str:
        shown = self.table.replace({"eigenvector": {REST: "rest"}})
        logits = self.logits.sort_values(ascending=False).head(3)
        top = ", ".join(f"{label} {value:.2f}" for label, value in logits.items())
        table = shown.to_string(index=False, na_rep="", float_format="{:.3f}".format)
        return f"logits: {top}\n{table}"


@torch.no_grad()
def explain_image(
    model: HookedBilinearClassifier,
    image: Float[Tensor, "..."],
    *,
    classes: int | list[str | int] | None = None,
    k: int | None = None,
) -> Explanation:
    """Which eigenvectors fired for an image, and how much each adds (arXiv 2410.08417, appendix C).

    A logit is exactly the sum of all its eigenvectors' activations, biases and residual connections
    included. In a model of one layer they are pixel patterns; in a deeper one, patterns of what its
    last layer reads.

    Args:
        image: one image of the model's shape, or flat; a batch of one will do.
        classes: how many, of the largest logits, or which; by default up to 3.
        k: how many eigenvectors of each class to list, the largest activations first; by default
            up to 5.

    Raises:
        ValueError: if the image does not fit, is not finite or is not from 0 to 1, a class is
            unknown or stands twice, or `k` is not between 1 and the number of eigenvectors.
    """
    x = model.flatten(image)
    if x.numel() != model.cfg.d_in:
        n = x.numel() // model.cfg.d_in
        raise ValueError(f"The input {list(image.shape)} holds {n} images: give one.")
    x = x.reshape(-1)
    model.check_pixels(x)
    *below, last = model.tensors()
    read = run_chain(below, x)
    logits = model(x)
    if classes is None:
        classes = min(3, model.cfg.n_classes)
    if isinstance(classes, int):
        if not 1 <= classes <= model.cfg.n_classes:
            raise ValueError(f"classes={classes} must be between 1 and {model.cfg.n_classes}.")
        numbers: list[int] = logits.topk(classes).indices.tolist()
    else:
        numbers = [model.class_number(label) for label in classes]
        if not numbers or len(set(numbers)) < len(numbers):
            raise ValueError(f"classes={classes} is empty or has a class twice.")
    directions = torch.eye(model.cfg.n_classes).to(x)[numbers]
    spectrum = last.eigh(directions)
    k = min(5, spectrum.k) if k is None else k
    if not 1 <= k <= spectrum.k:
        raise ValueError(f"k={k} must be between 1 and the {spectrum.k} eigenvectors there are.")
    projections, activations = spectrum.projections(read), spectrum.activations(read)
    rows = []
    for i, number in enumerate(numbers):
        label = model.cfg.labels[number]
        fired = activations[i].abs().topk(k).indices
        for j in fired.tolist():
            rows.append(
                {
                    "class": label,
                    "eigenvector": j,
                    "value": spectrum.values[i, j].item(),
                    "projection": projections[i, j].item(),
                    "activation": activations[i, j].item(),
                }
            )
        listed = activations[i, fired].double().sum()
        rest = (activations[i].double().sum() - listed).item()
        rows.append({"class": label, "eigenvector": REST, "activation": rest})
    return Explanation(
        image=x,
        logits=pd.Series(logits.tolist(), index=model.cfg.labels),
        table=pd.DataFrame(rows),
        spectrum=spectrum,
        space="pixels" if not below else "hidden",
    )
