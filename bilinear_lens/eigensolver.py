"""The leading eigenpairs of many interactions at once, with a residual for each.

- `plan` chooses the way by shape, number of pairs and memory
- dense, or by `subspace` iteration; matrices from a table, or from the layer's factors
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from bilinear_lens.kernels import fast_float32
from bilinear_lens.spectrum import Spectrum
from bilinear_lens.subspace import RANKS, Factored, Pairs, block_size, decompose, iterate


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
            f"memory={given} bytes is too little for one direction: give at least {needed} "
            f"({math.ceil(1e4 * needed / 2**30) / 1e4} GiB)."
        )
        self.needed = needed


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
