"""Which output latents are worth a look: what the interactions that build each are like.

- a latent's interactions are an `n x n` matrix `D Q D^T` of `n` input latents; it exists in blocks
- norm, mean and deviation of all its entries are exact from `d x d` matrices, so that one pass over
  the blocks counts outliers and sums fourth powers
"""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from bilinear_lens.analysis.features import latent_basis, latent_directions
from bilinear_lens.eigensolver import TooLittleMemory
from bilinear_lens.kernels import fast_float32
from bilinear_lens.models.saes import SparseAutoencoder
from bilinear_lens.models.transformer import HookedBilinearTransformer
from bilinear_lens.spectrum import effective_ranks
from bilinear_lens.tensor import BilinearTensor

ROWS, COLUMNS = 1024, 2048
"""The block of interactions that is held at once, no higher than wide."""
GROUP = 32
"""Outputs whose spectra are computed at a time, where memory allows."""
OUTLIER = 10.0
"""Standard deviations from the mean."""


@torch.no_grad()
def feature_summary(
    model: HookedBilinearTransformer,
    *,
    inputs: SparseAutoencoder,
    outputs: SparseAutoencoder,
    side: str = "encoder",
    latents: Sequence[int] | None = None,
    memory: int = 2**30,
) -> pd.DataFrame:
    """Summarise the interactions that build each output latent; `inputs` and the rest are as in
    `feature_interactions`.

    Args:
        latents: which output latents; all otherwise.
        memory: bytes of working space, beside weights and results.

    Returns:
        As `summarize_interactions`, by `latent`.

    Raises:
        ValueError: as `feature_interactions`, or if `memory` is too little for one output.
    """
    basis = latent_basis(model, inputs)
    directions = latent_directions(model, outputs, layer=basis.layer, side=side)
    chosen = list(range(outputs.n_latents)) if latents is None else list(latents)
    outputs.check_latents(chosen)
    tensor = model.bilinear_tensor(basis.layer)
    table = summarize_interactions(tensor, directions[chosen], basis.directions, memory=memory)
    table.insert(0, "latent", chosen)
    return table


@torch.no_grad()
def summarize_interactions(
    tensor: BilinearTensor,
    directions: Float[Tensor, "n d_out"],
    latents: Float[Tensor, "n_latents coords"],
    *,
    memory: int = 2**30,
) -> pd.DataFrame:
    """What the interactions `d_i^T Q d_j` between latents are like, for each output direction.

    Costs `n_latents^2 d` products of two numbers for each direction, half of what the matrix has;
    needs memory for a block of it.

    Args:
        latents: the directions of input latents; of an affine tensor with its constant coordinate.

    Returns:
        A row for each direction:

        - `norm`: the root of the sum of all squared interactions
        - `effective_rank` and `top_2`, the share of `||Q||_F^2` that its two largest eigenvalues
          hold, of the interaction Q itself
        - `self_share`: the part of the squared norm on the diagonal
        - `kurtosis`: the excess kurtosis of the interactions between two latents, 0 for a normal
          distribution; `self_kurtosis`: of those of a latent with itself
        - `outliers`: how many pairs of two latents are more than 10 standard deviations off
        - `a`, `b`, `interaction`: the largest of those, and `deviations` how many it is off

        (arXiv 2410.08417, section 5, and the authors' code, which take them of dense matrices.)

    Raises:
        ValueError: if sizes do not fit, or `memory` is too little for one direction.
    """
    n = len(latents)
    if latents.shape[1:] != tensor.left.shape[1:] or n < 3:
        raise ValueError(
            f"latents have shape {list(latents.shape)}; give three or more of size "
            f"{tensor.left.shape[1]}."
        )
    latents = latents.to(tensor.left)
    metric, total = latents.mT @ latents, latents.sum(0)
    held = latents.element_size() * (latents.numel() + 8 * ROWS * COLUMNS)
    zero = (~directions.any(dim=1)).nonzero().flatten().tolist()
    if zero:
        raise ValueError(
            f"The directions {zero[:10]} are zero (of {len(zero)} in all): nothing builds those "
            "latents, leave them out."
        )
    try:
        solver = tensor.eigensolver(1, n=GROUP, memory=max(1, memory - held))
    except TooLittleMemory as error:
        raise TooLittleMemory(memory, error.needed + held) from None
    parts, rows = [], []
    with tqdm(total=len(directions), desc="Summarising", leave=False) as bar, fast_float32():
        for group in directions.split(GROUP):
            parts.append(_spectra(solver.all_values(group)))
            for direction in group:
                matrix = tensor.interaction(direction)
                rows.append(_entries(matrix, latents, metric, total))
                bar.update()
    return pd.concat(parts, ignore_index=True).join(pd.DataFrame(rows))


def _spectra(values: Float[Tensor, "n all"]) -> pd.DataFrame:
    squares = values.square()
    top = squares.topk(2, dim=1).values.sum(1) / squares.sum(1)
    return pd.DataFrame({"effective_rank": effective_ranks(values).tolist(), "top_2": top.tolist()})


def _entries(
    matrix: Float[Tensor, "d d"],
    latents: Float[Tensor, "n d"],
    metric: Float[Tensor, "d d"],
    total: Float[Tensor, " d"],
) -> dict[str, float]:
    """Moments of the entries of `latents @ matrix @ latents.mT`, and the largest of two latents."""
    n = len(latents)
    mapped = latents @ matrix
    own = (mapped * latents).sum(1)
    weighted = matrix @ metric
    square = (weighted * weighted.mT).sum().double()
    own_square = own.double().square().sum()
    pairs = n * (n - 1)
    mean = ((total @ matrix @ total).double() - own.double().sum()) / pairs
    variance = ((square - own_square) / pairs - mean.square()).clamp(min=0)
    deviation, offset = variance.sqrt().item(), mean.item()
    fourth, outliers, best = 0.0, 0, (-1.0, 0, 0)
    far = (OUTLIER * deviation) ** 2
    for top in range(0, n, ROWS):
        rows = mapped[top : top + ROWS]
        for left in range(top, n, COLUMNS):
            block = (rows @ latents[left : left + COLUMNS].mT).sub_(offset).square_()
            if left == top:  # below the diagonal stands what is above it
                block = block.triu_(1)
            flat = block.flatten()
            fourth += 2 * (flat @ flat).item()
            largest, where = flat.max(0)
            if largest > far:
                outliers += int((flat > far).sum())
            if largest > best[0]:
                row, column = divmod(int(where), block.shape[1])
                best = (largest.item(), top + row, left + column)
    _, a, b = best
    value = (mapped[a] @ latents[b]).item()
    centred = own.double() - own.double().mean()
    return {
        "norm": square.clamp(min=0).sqrt().item(),
        "self_share": (own_square / square).item(),
        "kurtosis": fourth / pairs / deviation**4 - 3 if deviation else float("nan"),
        "self_kurtosis": (centred.pow(4).mean() / centred.square().mean().square()).item() - 3,
        "outliers": outliers,
        "a": a,
        "b": b,
        "interaction": value,
        "deviations": abs(value - offset) / deviation if deviation else float("nan"),
    }
