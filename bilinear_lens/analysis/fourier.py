"""Frequencies of Z_p: what a model of modular addition is made of."""

import torch
from jaxtyping import Float
from torch import Tensor


def fourier_power(
    vectors: Float[Tensor, "*batch coords"], p: int
) -> Float[Tensor, "*batch {p//2+1}"]:
    """How a vector's squared norm is spread over the frequencies 0 to p // 2 of Z_p.

    A frequency and its conjugate are one: together the cosine and the sine of it. Of a Gaussian
    vector, each frequency but 0 (and p / 2) holds about 2 / p.

    Args:
        vectors: over the one-hot inputs of one number, or of several side by side, whose powers
            add: eigenvectors are the rows of `spectrum.vectors.mT`, without a constant coordinate.
        p: the modulus.

    Returns:
        Shares, which sum to 1.

    Raises:
        ValueError: if `vectors` are no whole numbers of `p` wide, zero or not finite.
    """
    if p < 2 or not vectors.shape[-1] or vectors.shape[-1] % p:
        raise ValueError(
            f"vectors {list(vectors.shape)} must be one or several times p={p} wide, p at least "
            "2: leave out the constant coordinate of an affine spectrum."
        )
    waves = torch.fft.rfft(vectors.unflatten(-1, (-1, p)))
    power = waves.abs().square().sum(-2)
    power[..., 1 : (p + 1) // 2] *= 2  # their conjugates, which rfft leaves out
    total = power.sum(-1, keepdim=True)
    if not (total.isfinite() & (total > 0)).all():
        raise ValueError("vectors hold zero vectors, NaN or infinite entries: leave those out.")
    return power / total
