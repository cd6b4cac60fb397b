"""Legibility: do eigenvectors look like something? Three numbers for what is judged by eye.

Each has a control in `random_directions`: white, or with the data's own covariance, since anything
that lives where images live is smooth.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor


def smoothness(
    vectors: Float[Tensor, "*batch d_in"], shape: Sequence[int]
) -> Float[Tensor, "*batch"]:
    """Correlation between neighbouring pixels, across and down (Moran's I around 0).

    0 for white noise, about 1 for smooth patterns (a little more where the border is empty).

    Raises:
        ValueError: if the vectors are no images of `shape` = (channels, height, width), or one is
            zero or not finite.
    """
    images = _images(vectors, shape)
    across = (images[..., 1:] * images[..., :-1]).mean((-3, -2, -1))
    down = (images[..., 1:, :] * images[..., :-1, :]).mean((-3, -2, -1))
    return (across + down) / 2 / images.square().mean((-3, -2, -1))


def compressibility(
    vectors: Float[Tensor, "*batch d_in"], shape: Sequence[int], *, share: float = 0.05
) -> Float[Tensor, "*batch"]:
    """The share of the squared norm in the largest `share` of the cosine-transform coefficients.

    Raises:
        ValueError: as `smoothness`, or if `share` is not between 0 and 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be above 0 and at most 1.")
    images = _images(vectors, shape)
    rows, columns = (_cosines(n).to(images) for n in images.shape[-2:])
    energy = (rows @ images @ columns.mT).square().flatten(-3)
    n = math.ceil(share * energy.shape[-1] - 1e-9)  # 0.07 * 100 is a little above 7
    return energy.topk(n, dim=-1).values.sum(-1) / energy.sum(-1)


def class_templates(
    images: Float[Tensor, "n d_in"], labels: Int[Tensor, " n"], n_classes: int
) -> Float[Tensor, "n_classes d_in"]:
    """Each class's mean image, less the mean of these, of unit length.

    Raises:
        ValueError: if a class has no image, a label is no class, or a mean image is that of all.
    """
    if len(labels) != len(images) or not ((labels >= 0) & (labels < n_classes)).all():
        raise ValueError(
            f"{len(images)} images need a label each, from 0 to {n_classes - 1}; the "
            f"{len(labels)} labels are {labels.unique().tolist()}."
        )
    counts = torch.bincount(labels, minlength=n_classes)
    if empty := (counts == 0).nonzero().flatten().tolist():
        raise ValueError(f"The classes {empty} have no image: a template needs one.")
    sums = images.new_zeros(n_classes, images.shape[1]).index_add(0, labels, images)
    means = sums / counts[:, None]
    templates = means - means.mean(0)
    norms = templates.norm(dim=1, keepdim=True)
    if not norms.all():
        raise ValueError("The mean image of a class is that of all: it has no template.")
    return templates / norms


def template_match(
    vectors: Float[Tensor, "*batch d_in"], template: Float[Tensor, "*batch d_in"]
) -> Float[Tensor, "*batch"]:
    """`|cos|` between vectors and templates."""
    norms = vectors.norm(dim=-1) * template.norm(dim=-1)
    return (vectors * template).sum(-1).abs() / norms


def random_directions(
    n: int, images: Float[Tensor, "m d_in"] | int, *, seed: int
) -> Float[Tensor, "n d_in"]:
    """Random unit directions: of the covariance of `images`, or white in `images` dimensions.

    Raises:
        ValueError: if the images are all the same.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(images, int):
        directions = torch.randn(n, images, generator=generator)
    else:
        if len(images) < 2 or (images == images[0]).all():
            raise ValueError("The images are all the same: they have no covariance.")
        mixture = torch.randn(n, len(images), generator=generator).to(images)
        directions = mixture @ (images - images.mean(0))
    return directions / directions.norm(dim=1, keepdim=True)


def _images(vectors: Tensor, shape: Sequence[int]) -> Float[Tensor, "*batch c h w"]:
    if len(shape) != 3 or vectors.shape[-1] != math.prod(shape) or min(shape[1:]) < 2:
        raise ValueError(
            f"vectors {list(vectors.shape)} are no images of shape {list(shape)}: it must be "
            "(channels, height, width), at least 2 x 2."
        )
    if not (vectors.isfinite().all() and vectors.any(-1).all()):
        raise ValueError("A vector is zero, NaN or infinite: it is not of any shape.")
    return vectors.unflatten(-1, tuple(shape))


def _cosines(n: int) -> Float[Tensor, "n n"]:
    """The orthonormal discrete cosine transform of n points."""
    place = torch.arange(n, dtype=torch.float64)
    frequency = place[:, None]
    waves = torch.cos(math.pi * frequency * (2 * place + 1) / (2 * n)) * (2 / n) ** 0.5
    waves[0] /= 2**0.5
    return waves
