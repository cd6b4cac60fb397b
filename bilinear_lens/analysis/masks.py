"""Adversarial masks from weights alone: one fixed pattern that turns images into another class."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilinear_lens.spectrum import Spectrum
from bilinear_lens.tensor import BilinearTensor


def adversarial_masks(
    spectrum: Spectrum, *, k: int = 10, where: Tensor | None = None
) -> Float[Tensor, "n_classes k d_in"]:
    """For each class's top k positive eigenvectors, the input that excites that one alone.

    Rows of the pseudo-inverse of all classes' eigenvectors stacked (arXiv 2410.08417, section 4.4
    and appendix G): adding one moves its own projection, and none of the other 10 k - 1.
    A mask's sign is that of a positive sum of its eigenvector: pixels are not negative, so images
    mostly project on that side.

    Args:
        spectrum: of all classes, `[n_classes, k]`, without biases.
        where: pixels that a mask may use (bool, `[d_in]`), such as an edge; by default all.

    Returns:
        Masks of mean square 1 over the pixels.

    Raises:
        ValueError: if a class has fewer than `k` positive eigenvalues, or the tensor has biases.
    """
    if spectrum.affine or spectrum.values.ndim != 2:
        raise ValueError("Masks need the spectrum of all classes of a model without biases.")
    values, order = spectrum.values.sort(dim=-1, descending=True)
    if k < 1 or k > spectrum.k or (values[:, k - 1] <= 0).any():
        raise ValueError(
            f"k={k} must be at least 1 and at most the number of positive eigenvalues, of which "
            f"the poorest class has {int((values > 0).sum(-1).min())}."
        )
    order = order[:, None, :k].expand(*spectrum.vectors.shape[:-1], k)
    vectors = spectrum.vectors.gather(-1, order).mT
    vectors = vectors * vectors.sum(-1, keepdim=True).sign()
    if where is not None:
        vectors = vectors * where.to(vectors)
    masks = torch.linalg.pinv(vectors.flatten(0, 1)).mT.view_as(vectors)
    return masks / masks.square().mean(-1, keepdim=True).sqrt()


@torch.no_grad()
def masked_predictions(
    tensor: BilinearTensor,
    inputs: Float[Tensor, "n d_in"],
    labels: Int[Tensor, " n"],
    masks: Float[Tensor, "n_classes k d_in"],
    *,
    sizes: Sequence[float | int],
    seed: int = 0,
) -> pd.DataFrame:
    """What masks do to a classifier, beside the same masks with their pixels shuffled.

    Args:
        tensor: the classifier, from pixels to logits.
        masks: of `adversarial_masks`.
        sizes: root mean squares of the mask to add, in units of the pixels' range.
        seed: of the shuffles.

    Returns:
        A row for each size, kind of mask ("weights" or "shuffled"), class and mask: `accuracy`,
        and `targeted`, the share of the images of other classes that are taken for the mask's.

    Raises:
        ValueError: if there are not masks for each class, or no image of another class.
    """
    n_classes, k, d_in = masks.shape
    if n_classes != tensor.d_out or d_in != tensor.d_in:
        raise ValueError(
            f"masks {list(masks.shape)} must be [{tensor.d_out}, k, {tensor.d_in}] for this tensor."
        )
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for c in range(n_classes):
        others = labels != c
        if not others.any():
            raise ValueError(f"All images are of class {c}: none can be taken for it wrongly.")
        for i in range(k):
            shuffled = masks[c, i][torch.randperm(d_in, generator=generator)]
            for kind, mask in (("weights", masks[c, i]), ("shuffled", shuffled)):
                for size in sizes:
                    predictions = tensor(inputs + size * mask).argmax(-1)
                    rows.append(
                        {
                            "size": size,
                            "mask": kind,
                            "class": c,
                            "eigenvector": i,
                            "accuracy": (predictions == labels).float().mean().item(),
                            "targeted": (predictions[others] == c).float().mean().item(),
                        }
                    )
    return pd.DataFrame(rows)
