"""Whitening: coordinates in which data has unit second moments, so that norms are its averages."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bilinear_lens.analysis.checks import check_inputs
from bilinear_lens.spectrum import coordinates
from bilinear_lens.tensor import BilinearTensor


class Whitened(NamedTuple):
    """A tensor of whitened inputs, and the way back."""

    tensor: BilinearTensor
    """Of `y` with `E[y y^T]` the identity; the constant of an affine tensor is one of them."""
    filters: Float[Tensor, "coords coords"]
    """`filters @ v` reads from an input what `v` reads from its whitened form: `y = filters^T x`"""


def whiten(
    tensor: BilinearTensor, inputs: Float[Tensor, "n {tensor.d_in}"], *, ridge: float = 1e-4
) -> Whitened:
    """The same function of whitened inputs.

    Args:
        inputs: data, such as training images.
        ridge: added to the diagonal of the second moments, relative to its mean: pixels that never
            change need it.

    Raises:
        ValueError: if there are no inputs, they are of another size, all zero or hold NaN, or the
            ridge is not positive.
    """
    if not ridge > 0:
        raise ValueError(f"ridge={ridge} must be positive.")
    check_inputs(inputs, tensor.d_in)
    if not inputs.any():
        raise ValueError(f"The inputs {list(inputs.shape)} are all zero.")
    x = coordinates(inputs, tensor.d_in, tensor.affine).double()
    moments = x.mT @ x / len(x)
    moments.diagonal().add_(ridge * moments.diagonal().mean())
    sizes, axes = torch.linalg.eigh(moments)
    root = (axes * sizes.sqrt()).to(tensor.left)  # x = root @ y
    filters = (axes * sizes.rsqrt()).to(tensor.left)
    return Whitened(BilinearTensor(tensor.left @ root, tensor.right @ root, tensor.down), filters)
