"""What a tensor computes on bits: a polynomial whose coefficients name the operation."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bilinear_lens.tensor import BilinearTensor


class Multilinear(NamedTuple):
    """`constant + sum_i linear[i] x_i + sum over i < j of pairs[i, j] x_i x_j`, for each output."""

    constant: Float[Tensor, " d_out"]
    linear: Float[Tensor, "d_out d_in"]
    pairs: Float[Tensor, "d_out d_in d_in"]
    """Symmetric, with an empty diagonal: `[o, i, j]` and `[o, j, i]` both hold the coefficient."""


def multilinear(tensor: BilinearTensor) -> Multilinear:
    """The only polynomial without squares that equals the tensor on inputs of 0 and 1.

    There `x_i^2 = x_i`, so that squares count as linear, and many tensors are one function. The
    coefficients name it: `and` is `x_i x_j`, `or` is `x_i + x_j - x_i x_j`, `xor` is
    `x_i + x_j - 2 x_i x_j`, and `nand`, `nor` and `xnor` are 1 less those. It builds all
    interactions, `d_out * d_in^2` numbers.
    """
    dense = tensor.to_dense()
    d_in = tensor.d_in
    squares = dense.diagonal(dim1=1, dim2=2)
    pairs = 2 * dense[:, :d_in, :d_in]
    linear = squares[:, :d_in]
    constant = dense.new_zeros(tensor.d_out)
    if tensor.affine:
        linear = linear + 2 * dense[:, :d_in, -1]
        constant = squares[:, -1]
    return Multilinear(constant, linear, pairs - torch.diag_embed(2 * squares[:, :d_in]))
