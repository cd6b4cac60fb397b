"""Similarity: do two models compute the same thing? By eigenvectors, and free of their gauge.

Eigenvectors of close eigenvalues mix freely, so their cosine understates agreement; the cosine of
interaction matrices, and of whole tensors (`BilinearTensor.similarity`), does not.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from bilinear_lens.spectrum import Spectrum
from bilinear_lens.tensor import BilinearTensor


def eigenvector_similarity(a: Spectrum, b: Spectrum, *, k: int = 1) -> Float[Tensor, "*batch k"]:
    """`|cos|` between the i-th most positive eigenvectors of both, for i below k.

    The measure of arXiv 2410.08417, figure 5. An affine spectrum's constant counts.

    Raises:
        ValueError: if the spectra differ in shape, or have fewer than `k` positive eigenvalues.
    """
    if a.vectors.shape[:-1] != b.vectors.shape[:-1] or a.affine != b.affine:
        raise ValueError(
            f"vectors {list(a.vectors.shape)} and {list(b.vectors.shape)} must be of the same "
            "outputs and inputs."
        )
    first, second = (spectrum.most_positive(k).vectors for spectrum in (a, b))
    return (first * second).sum(-2).abs() / (first.norm(dim=-2) * second.norm(dim=-2))


def interaction_similarity(a: BilinearTensor, b: BilinearTensor) -> Float[Tensor, " d_out"]:
    """`tr(A B) / (|A| |B|)` between the interaction matrices of each output, from the factors.

    Raises:
        ValueError: if the spaces differ, or an interaction is zero.
    """
    if a.d_out != b.d_out:
        raise ValueError(f"The tensors have {a.d_out} and {b.d_out} outputs: compare equals.")
    one, other = a.double(), b.double()
    inner = one.output_gram(other).diagonal()
    squares = torch.stack([one.output_gram().diagonal(), other.output_gram().diagonal()])
    # of terms that cancel, rounding leaves a square of this size, of either sign
    terms = torch.stack([_squared_terms(one), _squared_terms(other)])
    if empty := (squares <= 1e-14 * terms).any(0).nonzero().flatten().tolist():
        raise ValueError(f"The similarity to a zero interaction is not defined: outputs {empty}.")
    return (inner / squares.sqrt().prod(0)).to(a.down)


def _squared_terms(tensor: BilinearTensor) -> Float[Tensor, " d_out"]:
    """The summed squared norms of an output's products."""
    norms = tensor.left.norm(dim=1) * tensor.right.norm(dim=1)
    return (tensor.down * norms).square().sum(1)
