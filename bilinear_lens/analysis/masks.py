"""Adversarial masks from weights alone: one fixed pattern that turns images into another class."""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilinear_lens.analysis.checks import check_inputs, check_labels
from bilinear_lens.spectrum import Spectrum
from bilinear_lens.tensor import BilinearTensor


def adversarial_masks(
    spectrum: Spectrum, *, k: int = 1, where: Tensor | None = None
) -> Float[Tensor, "n_classes k d_in"]:
    """For each class's top k positive eigenvectors, the input that excites that one alone.

    Rows of the pseudo-inverse of all classes' eigenvectors stacked (arXiv 2410.08417, section 4.4
    and appendix G): adding one moves its own projection, and none of the others'. That costs
    strength: the more eigenvectors a mask must spare, the more of it lies where images do not.
    A mask's sign is that of a positive sum of its eigenvector: pixels are not negative, so images
    mostly project on that side.

    Args:
        spectrum: of all classes, `[n_classes, k]`, without biases (`tensor.quadratic()` leaves
            them out).
        where: pixels that a mask may use (bool, `[d_in]`), such as an edge; by default all.

    Returns:
        Masks of mean square 1 over the pixels.

    Raises:
        ValueError: if a class has fewer than `k` positive eigenvalues, the tensor has biases,
            `where` is no choice of pixels, or the eigenvectors are linearly dependent there.
    """
    if spectrum.affine or spectrum.values.ndim != 2:
        raise ValueError(
            "Masks need the spectrum of all classes, without biases or residual connections: "
            "tensor.quadratic().eigh(torch.eye(n_classes))."
        )
    vectors = spectrum.most_positive(k).vectors.mT.double()
    vectors = torch.where(vectors.sum(-1, keepdim=True) < 0, -vectors, vectors)
    if where is not None:
        if where.dtype != torch.bool or where.shape != (spectrum.d_in,):
            raise ValueError(
                f"where is {where.dtype} {list(where.shape)}; it must be torch.bool "
                f"[{spectrum.d_in}]: whether a mask may use each pixel."
            )
        vectors = vectors * where.to(vectors)
    stacked = vectors.flatten(0, 1)
    inverse = torch.linalg.pinv(stacked)
    moved = stacked @ inverse - torch.eye(len(stacked)).to(stacked)
    if moved.abs().max() > 1e-3:
        pixels = spectrum.d_in if where is None else int(where.sum())
        raise ValueError(
            f"The {len(stacked)} eigenvectors are linearly dependent on the {pixels} pixels: no "
            "mask moves one alone. Take a smaller k, or allow more pixels."
        )
    masks = inverse.mT.reshape(vectors.shape)
    if where is not None:
        masks = masks * where.to(masks)  # of rounding
    return (masks / masks.square().mean(-1, keepdim=True).sqrt()).to(spectrum.vectors)


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

    Pixels that no mask uses stay out of the shuffle.

    Args:
        tensor: the classifier, from pixels to logits.
        masks: of `adversarial_masks`.
        sizes: root mean squares of the mask to add, in units of the pixels' range.
        seed: of the shuffles.

    Returns:
        A row for each size, kind of mask ("weights" or "shuffled"), class and mask: `accuracy`,
        and `targeted`, the share of the images of other classes that are taken for the mask's.

    Raises:
        ValueError: if there are not masks for each class, labels for each input, or images of
            another class; or if the inputs hold NaN.
    """
    n_classes, k, d_in = masks.shape
    if n_classes != tensor.d_out or d_in != tensor.d_in:
        raise ValueError(
            f"masks {list(masks.shape)} must be [{tensor.d_out}, k, {tensor.d_in}] for this tensor."
        )
    check_inputs(inputs, d_in)
    check_labels(labels, len(inputs), n_classes)
    used = masks.flatten(0, 1).any(0).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for c in range(n_classes):
        others = labels != c
        if not others.any():
            raise ValueError(f"All images are of class {c}: none can be taken for it wrongly.")
        for i in range(k):
            shuffled = masks[c, i].clone()
            shuffled[used] = shuffled[used[torch.randperm(len(used), generator=generator)]]
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
