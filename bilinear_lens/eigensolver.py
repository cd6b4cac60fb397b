"""The leading eigenpairs of many interactions at once, with a residual for each.

- the symmetric matrices stand as they are, or stay in a layer's factors
- Chebyshev-filtered subspace iteration: each step is one batched product for all of them
- what does not reach the tolerance goes to a dense decomposition
- `plan` chooses the way by shape, number of pairs and memory
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilinear_lens.kernels import fast_float32
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


class Plan(NamedTuple):
    iterate: bool
    """Filtered subspace iteration, or a dense decomposition."""
    table: bool
    """Whether matrices are rows of the symmetrised tensor `[d_out, d^2]`, computed once."""
    factored: bool
    """Whether an iteration starts with the factors, and forms the matrices it needs longer for."""
    group: int
    """Directions whose matrices are formed at a time."""
    chunk: int
    """Directions of a group that are decomposed at a time."""


def plan(n: int, d: int, rank: int, d_out: int, k: int, *, itemsize: int, memory: int) -> Plan:
    """The cheapest way to the top `k` pairs of `n` directions that fits into `memory` bytes.

    Raises:
        ValueError: if not even one direction fits.
    """
    block = block_size(k, d)
    iterate = n > 0 and d >= 128 and 8 * k <= d
    cached = max(16, 2**24 // (itemsize * d * d))  # more would leave the processor's cache
    # in numbers: a direction's matrix, what its decomposition takes beside that, what all share
    matrix, each, shared = d * d, 3 * d * d + 8 * d * block, min(rank, RANKS) * d + d * d
    table = iterate and n > d_out and itemsize * (d_out * matrix + 80 * each) <= memory
    # a pass with the factors costs 4 rank d products a column, to form a matrix rank d^2
    factored = iterate and not table and d > 32 * block
    group = cached
    if table:  # to read it once for every direction would take longer than to multiply
        shared, group = d_out * matrix, 4 * cached
    elif factored:
        matrix, each = 0, each + matrix + 2 * rank * block
    room = memory // itemsize - shared
    chunk = min(max(n, 1), cached, max(0, room) // (matrix + each))
    if chunk < 1:
        raise TooLittleMemory(memory, itemsize * (shared + matrix + each))
    if matrix:
        group = min(group, chunk + (room - chunk * (matrix + each)) // matrix)
    return Plan(iterate, table, factored, min(max(n, 1), max(group, chunk)), chunk)


class TooLittleMemory(ValueError):
    """Working memory that does not hold one direction."""

    def __init__(self, given: int, needed: int) -> None:
        super().__init__(
            f"memory={given} bytes is too little for one direction: give at least {needed}."
        )
        self.needed = needed


def block_size(k: int, d: int) -> int:
    return k + (EXTRA if d < WIDE else EXTRA_WIDE)


class Pairs(NamedTuple):
    """Eigenpairs of each of `n` matrices."""

    values: Float[Tensor, "n k"]
    vectors: Float[Tensor, "n d k"]
    residuals: Float[Tensor, "n k"]
    """`||Q v - value v||`, relative to the largest magnitude of an eigenvalue."""


class Eigensolver:
    """Top eigenpairs of the interactions of one layer, for any number of directions.

    Not differentiable.

    Args:
        affine: as in `Spectrum`.
        gram: gives inner products between the output coordinates' interactions, `[d_out, d_out]`;
            it is asked only where there are many directions.
        n: how many directions there will be, to choose the cheapest way.
        k: how many pairs of each.
        tol: largest `||Q v - value v||`, relative to `||Q||_2`, of a pair found by iteration.
        memory: bytes of working space, beside the factors and what is returned.

    Raises:
        ValueError: if `memory` is too little for one direction.
    """

    def __init__(
        self,
        left: Float[Tensor, "rank d"],
        right: Float[Tensor, "rank d"],
        down: Float[Tensor, "d_out rank"],
        *,
        affine: bool = False,
        gram: Callable[[], Tensor],
        n: int,
        k: int,
        tol: float,
        memory: int,
    ) -> None:
        self.down, self.affine, self.k, self.tol = down, affine, k, tol
        self.span = None
        rank = len(left)
        if k <= 2 * rank < left.shape[1]:  # all eigenvectors lie in the span of the factors' rows
            self.span, factors = torch.linalg.qr(torch.cat([left, right]).mT)
            left, right = factors[:, :rank].mT, factors[:, rank:].mT
        self.left, self.right, self.d = left, right, left.shape[1]
        self.plan = plan(n, self.d, rank, len(down), k, itemsize=left.itemsize, memory=memory)
        self.size = left.abs().max() * right.abs().max()
        self.gram = gram() if self.plan.iterate and n > len(down) else None
        if self.plan.table:
            self.table = left.new_empty(len(down), self.d**2)
            with fast_float32(), torch.no_grad():
                for start in range(0, len(down), self.plan.group):
                    rows = slice(start, start + self.plan.group)
                    self.table[rows] = (
                        Factored(self.left, self.right, down[rows]).dense().flatten(1)
                    )
            # one place for every group's matrices: fresh pages cost as much as the product
            self.buffer = left.new_empty(self.plan.group, self.d**2)
        self.fall = None
        if self.gram is not None:
            # how far a spectrum falls hardly differs between the directions of a layer
            every = max(1, len(down) // 8)
            some = torch.eye(len(down), dtype=down.dtype, device=down.device)[::every]
            last = self(some).values[:, -1].abs() / self.norms(some)
            self.fall = last.nan_to_num().median().item()

    @torch.no_grad()
    def __call__(self, directions: Float[Tensor, "n d_out"]) -> Spectrum:
        """The spectrum of each direction, with residuals."""
        directions, scale = self._scaled(directions)
        with fast_float32():
            groups = directions.split(self.plan.group)
            parts = [pairs for group in groups for pairs in self._group(group)]
            values, vectors, residuals = (torch.cat(part) for part in zip(*parts, strict=True))
            if self.span is not None:
                vectors = self.span @ vectors
        return Spectrum.signed(
            values / scale[:, None], vectors, affine=self.affine, residuals=residuals
        )

    @torch.no_grad()
    def all_values(self, directions: Float[Tensor, "n d_out"]) -> Float[Tensor, "n all"]:
        """All eigenvalues that can differ from zero, in no order: a dense decomposition."""
        directions, scale = self._scaled(directions)
        with fast_float32():
            parts = [
                torch.linalg.eigvalsh(self._matrices(chunk))
                for chunk in directions.split(self.plan.chunk)
            ]
        return torch.cat(parts) / scale[:, None]

    @torch.no_grad()
    def norms(self, directions: Float[Tensor, "n d_out"]) -> Float[Tensor, " n"]:
        """The Frobenius norms of the interactions."""
        directions, scale = self._scaled(directions)
        parts = [self._norms(part) for part in directions.split(self.plan.chunk)]
        return torch.cat(parts) / scale

    def _scaled(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Directions with interactions near 1, whose squares float32 can hold, and by how much.

        Raises:
            ValueError: if the interactions are not finite.
        """
        directions = directions.to(self.down)
        size = (directions @ self.down).norm(dim=1) * self.size
        if not size.isfinite().all():
            raise ValueError(
                "The interactions of these directions are not finite: repair the weights, or bring "
                "them to a smaller scale."
            )
        scale = torch.exp2(-size.clamp(min=1e-30).log2().round())  # a power of two is exact
        return directions * scale[:, None], scale

    def _norms(self, directions: Tensor) -> Tensor:
        if self.gram is None:
            return self._matrices(directions).flatten(1).norm(dim=1)
        exact = directions.to(self.gram)
        return ((exact @ self.gram) * exact).sum(1).clamp(min=0).sqrt().to(directions)

    def _matrices(self, directions: Tensor) -> Tensor:
        if self.plan.table:
            buffer = self.buffer[: len(directions)]
            return torch.mm(directions, self.table, out=buffer).view(-1, self.d, self.d)
        return Factored(self.left, self.right, directions @ self.down).dense()

    def _group(self, directions: Tensor) -> Iterator[Pairs]:
        matrices = (
            Factored(self.left, self.right, directions @ self.down)
            if self.plan.factored
            else self._matrices(directions)
        )
        norms = None if self.gram is None else self._norms(directions)

        def pairs(rows: slice) -> Pairs:
            if self.plan.iterate:
                some = None if norms is None else norms[rows]
                return iterate(matrices[rows], self.k, self.tol, some, self.fall)
            assert isinstance(matrices, Tensor)
            return decompose(matrices[rows], self.k)

        # A thread for each core, and one core for each product: of the many small products of an
        # iteration, no core then waits for another, which may be busy with other work.
        threads = torch.get_num_threads() if directions.device.type == "cpu" else 1
        size = -(-self.plan.chunk // threads)
        chunks = [slice(start, start + size) for start in range(0, max(1, len(directions)), size)]
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield from pool.map(pairs, chunks)


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
