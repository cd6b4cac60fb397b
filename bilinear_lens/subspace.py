"""Chebyshev-filtered subspace iteration on many symmetric matrices at once.

Each step is one batched product. A pair is certain from its residual; what does not reach the
tolerance goes to a dense decomposition.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilinear_lens.spectrum import Spectrum, eigh_by_magnitude

EXTRA, EXTRA_WIDE, WIDE = 8, 24, 512
"""Columns of a block beyond k, and from which size on it has more: there a product costs no less
with fewer. An eigenvector is overlooked only if all columns miss it."""
DEGREES = (8, 10, *13 * (12,))
"""Of each pass's filter: even, so that none maps an eigenvector to zero, and small, so that the
columns of a block stay independent in float32."""
CUT = 0.85
"""A filter damps what is below this share of the k-th eigenvalue found so far."""
FRESH, FRESH_PASS = 2, 2
"""Columns drawn anew, and before which pass, against a start that was blind to an eigenvector."""
RANKS = 1024
"""Ranks of the factors that are multiplied at a time."""
TRIAL = 4
"""Passes after which the pace of convergence tells who will not get there."""


@dataclass(frozen=True, eq=False)
class Factored:
    """Symmetric matrices `Q[n] = sum_r weight[n, r] (left[r] right[r]^T + transpose) / 2`."""

    left: Float[Tensor, "rank d"]
    right: Float[Tensor, "rank d"]
    weight: Float[Tensor, "n rank"]

    def __getitem__(self, rows: Int[Tensor, " m"] | slice) -> "Factored":
        return Factored(self.left, self.right, self.weight[rows])

    def __matmul__(self, block: Float[Tensor, "n d p"]) -> Float[Tensor, "n d p"]:
        """Four products with the factors, which all the matrices share."""
        n, d, p = block.shape
        columns, weight = block.movedim(1, 0).reshape(d, n * p), self.weight.mT[..., None] / 2
        result = columns.new_zeros(d, n * p)
        for one, other in ((self.left, self.right), (self.right, self.left)):
            inner = (one @ columns).view(-1, n, p).mul_(weight)
            result.addmm_(other.mT, inner.view(-1, n * p))
        return result.view(d, n, p).movedim(0, 1)

    def dense(self) -> Float[Tensor, "n d d"]:
        d = self.left.shape[1]
        matrices = self.weight.new_empty(len(self.weight), d, d)
        half = self.weight.new_empty(d, d)
        for matrix, weight in zip(matrices, self.weight, strict=True):
            half.zero_()
            for rows in torch.arange(len(weight), device=weight.device).split(RANKS):
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                half.addmm_((self.left[part] * weight[part, None]).mT, self.right[part])
            torch.add(half, half.mT, out=matrix).div_(2)
        return matrices


def block_size(k: int, d: int) -> int:
    return k + (EXTRA if d < WIDE else EXTRA_WIDE)


class Pairs(NamedTuple):
    """Eigenpairs of each of `n` matrices."""

    values: Float[Tensor, "n k"]
    vectors: Float[Tensor, "n d k"]
    residuals: Float[Tensor, "n k"]
    """`||Q v - value v||`, relative to the largest magnitude of an eigenvalue."""


@dataclass(frozen=True, eq=False)
class Ritz:
    """The best approximate eigenpairs within a block, and the products `Q vectors`."""

    values: Float[Tensor, "n p"]
    vectors: Float[Tensor, "n d p"]
    products: Float[Tensor, "n d p"]

    @classmethod
    def of(
        cls, matrices: Tensor | Factored, block: Float[Tensor, "n d p"], *, twice: bool = False
    ) -> "Ritz":
        block = orthonormal(block, twice=twice)
        products = matrices @ block
        inner = block.mT @ products
        values, vectors = eigh_by_magnitude((inner + inner.mT) / 2)
        return cls(values, block @ vectors, products @ vectors)

    def select(self, rows: Int[Tensor, " m"]) -> "Ritz":
        return Ritz(self.values[rows], self.vectors[rows], self.products[rows])

    def cut(self, k: int) -> Float[Tensor, " n"]:
        """Below what the next filter damps."""
        values = self.values.abs()
        return torch.maximum(CUT * values[:, k - 1], values[:, -1])

    def pairs(self, k: int) -> Pairs:
        values, vectors = self.values[:, :k], self.vectors[..., :k]
        errors = (self.products[..., :k] - vectors * values[:, None]).norm(dim=1)
        tiny = torch.finfo(errors.dtype).tiny
        return Pairs(values, vectors, errors / values[:, :1].abs().clamp(min=tiny))


@torch.no_grad()
def decompose(matrices: Float[Tensor, "n d d"], k: int) -> Pairs:
    """The top `k` pairs of symmetric matrices, by a dense decomposition."""
    top = Spectrum.of(matrices).top(k)
    return Ritz(top.values, top.vectors, matrices @ top.vectors).pairs(k)


@torch.no_grad()
def iterate(
    matrices: Float[Tensor, "n d d"] | Factored,
    k: int,
    tol: float,
    norms: Float[Tensor, " n"] | None = None,
    fall: float | None = None,
) -> Pairs:
    """The top `k` pairs by filtered subspace iteration, and dense where that does not converge.

    That a pair is one is certain from its residual. That none was overlooked is certain where the
    norms prove it, and otherwise rests on the random columns of the block: all of them would have
    to miss the same eigenvector, those drawn anew too.

    Zhou, Saad, Tiago and Chelikowsky, "Self-consistent-field calculations using
    Chebyshev-filtered subspace iteration" (2006), with an even filter, because both signs count.

    Args:
        norms: Frobenius norms. Where what they leave beside the block is less than the k-th
            eigenvalue, none can have been overlooked, and one pass may do.
        fall: what share of its norm a matrix's k-th eigenvalue may be expected to be.
    """
    weight = matrices.weight if isinstance(matrices, Factored) else matrices
    n, d = len(weight), (matrices.left if isinstance(matrices, Factored) else matrices).shape[1]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(d, block_size(k, d) + FRESH, generator=generator).to(weight)
    start, fresh = start[:, FRESH:], start[:, :FRESH]
    block = start.expand(n, -1, -1)
    ritz = Ritz(block[:, 0], block, matrices @ block)
    if norms is None or fall is None:
        ritz = Ritz.of(matrices, ritz.products)
        cut, largest = ritz.cut(k), ritz.values[:, 0].abs()
    else:
        cut, largest = CUT * fall * norms, norms
    found = Pairs(*(torch.empty_like(part) for part in ritz.pairs(k)))
    live, worst = torch.arange(n, device=weight.device), weight.new_ones(n)
    for i, degree in enumerate(DEGREES):
        if i == FRESH_PASS:
            block = torch.cat([ritz.vectors[..., :-FRESH], fresh.expand(len(live), -1, -1)], dim=-1)
            ritz = Ritz(ritz.values, block, matrices @ block)
        ritz = Ritz.of(matrices, chebyshev(matrices, ritz, cut, largest, degree), twice=i > 0)
        cut, largest = ritz.cut(k), ritz.values[:, 0].abs()
        pairs = ritz.pairs(k)
        for whole, part in zip(found, pairs, strict=True):
            whole[live] = part
        before, worst = worst, pairs.residuals.amax(1)
        done = worst <= tol
        if i < FRESH_PASS:
            # without norms, nothing is proven; with them, to the digits that float32 leaves
            square = torch.full_like(worst, torch.inf) if norms is None else norms**2
            beside = square - ritz.values.square().sum(1)
            done &= (beside + 1e-5 * square < ritz.values[:, k - 1].square()) & (
                beside > -1e-5 * square
            )
        passes = ((worst / tol).log() / (before / worst).log()).nan_to_num()
        passes = passes.where(worst < before, len(DEGREES)).clamp(min=1)
        hopeless = ~done & (passes > len(DEGREES) - 1 - i) & (i + 1 >= TRIAL)
        rows = hopeless.nonzero()[:, 0]
        if len(rows):
            rest = matrices[rows]
            rest = rest.dense() if isinstance(rest, Factored) else rest
            for whole, part in zip(found, decompose(rest, k), strict=True):
                whole[live[rows]] = part
            done |= hopeless
        left = (~done).nonzero()[:, 0]
        if len(left) == 0:
            break
        # a copy of the matrices costs about a product
        if len(left) < 0.8 * len(live) or len(rows):
            live, matrices, ritz = live[left], matrices[left], ritz.select(left)
            cut, largest, worst, passes = (each[left] for each in (cut, largest, worst, passes))
        # a product with the factors costs 4 rank d a column, a matrix rank d^2, once
        if isinstance(matrices, Factored) and 4 * start.shape[1] * degree * passes.median() > d:
            matrices = matrices.dense()
    return found


def chebyshev(
    matrices: Float[Tensor, "n d d"] | Factored,
    ritz: Ritz,
    cut: Float[Tensor, " n"],
    largest: Float[Tensor, " n"],
    degree: int,
) -> Float[Tensor, "n d p"]:
    """The block times a Chebyshev polynomial, which is at most 1 below `cut`.

    Of steep spectra the degree is less: what a column has of the largest eigenvector by rounding
    must not outgrow the rest of it.
    """
    cut = cut.maximum(1e-6 * largest).clamp(min=1e-30)
    growth = (largest / cut).clamp(min=1.01).acosh()  # of its logarithm, by degree
    degrees = (25 / growth / 2).floor().clamp(1, degree // 2) * 2
    scale, degrees = (1 / cut)[:, None, None], degrees[:, None, None]
    least = int(degrees.min())
    previous, block = ritz.vectors, ritz.products * scale
    for reached in range(1, degree):
        following = (matrices @ (block * (2 * scale))).sub_(previous)
        if reached >= least:
            following = torch.where(reached < degrees, following, block)
        previous, block = block, following
    return block


def orthonormal(block: Float[Tensor, "n d p"], *, twice: bool = False) -> Float[Tensor, "n d p"]:
    """Orthonormal columns with the same span, by Cholesky; by QR where columns depend.

    Once leaves what the condition of the columns costs, twice is as good as QR.
    """
    block = block / block.norm(dim=1, keepdim=True).clamp(min=1e-30)
    for _ in range(1 + twice):
        factor, failed = torch.linalg.cholesky_ex(block.mT @ block)
        if failed.any():
            return torch.linalg.qr(block).Q
        block = torch.linalg.solve_triangular(factor, block.mT, upper=False).mT
    return block
