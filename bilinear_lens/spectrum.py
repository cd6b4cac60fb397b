"""Spectrum: eigenvalues and eigenvectors of interaction matrices, largest magnitude first."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Eigenpairs of one or many symmetric matrices, in an order: `eigh`'s is by `|value|`.

    An eigenvector's sign is arbitrary; here its entry of largest magnitude is positive, unless
    `oriented` chose otherwise.

    Raises:
        ValueError: if there is not one value for each vector.
    """

    values: Float[Tensor, "*batch k"]
    vectors: Float[Tensor, "*batch coords k"]
    """Columns; those of `eigh` are orthonormal."""
    affine: bool = False
    """Whether the last coordinate is a constant 1, which callers do not pass."""
    residuals: Float[Tensor, "*batch k"] | None = None
    """Of `eigh`'s pairs: `||Q v - value v||`, relative to `||Q||_2`."""

    def __post_init__(self) -> None:
        if self.vectors.ndim < 2 or self.values.shape != (
            *self.vectors.shape[:-2],
            self.vectors.shape[-1],
        ):
            raise ValueError(
                f"values {list(self.values.shape)} and vectors {list(self.vectors.shape)} must be "
                "[..., k] and [..., d_in, k]."
            )

    @classmethod
    def of(cls, matrix: Float[Tensor, "*batch d d"], *, affine: bool = False) -> "Spectrum":
        """All eigenpairs of symmetric matrices."""
        return cls.signed(*eigh_by_magnitude(matrix), affine=affine)

    @classmethod
    def signed(
        cls,
        values: Float[Tensor, "*batch k"],
        vectors: Float[Tensor, "*batch coords k"],
        *,
        affine: bool = False,
        residuals: Float[Tensor, "*batch k"] | None = None,
    ) -> "Spectrum":
        """The spectrum with each eigenvector's entry of largest magnitude made positive."""
        return cls(values, vectors * _sign_of_largest(vectors), affine, residuals)

    @property
    def d_in(self) -> int:
        """Size of the input that the caller passes."""
        return self.vectors.shape[-2] - self.affine

    @property
    def k(self) -> int:
        return self.values.shape[-1]

    def __repr__(self) -> str:
        shown = ", ".join(f"{value:.3g}" for value in self.values.flatten()[:4].tolist())
        return f"Spectrum(k={self.k}, d_in={self.d_in}, values=[{shown}, ...])"

    def top(self, k: int) -> "Spectrum":
        """The first `k` pairs: of `eigh`'s, those of largest magnitude.

        Raises:
            ValueError: if `k` is not in 1..k.
        """
        self._check_k(k)
        return self._select(slice(k))

    def bottom(self, k: int) -> "Spectrum":
        """The last `k` pairs: of `eigh`'s, those of smallest magnitude of those there are.

        Raises:
            ValueError: if `k` is not in 1..k.
        """
        self._check_k(k)
        return self._select(slice(-k, None))

    def reordered(self, order: Int[Tensor, "*batch n"]) -> "Spectrum":
        """The pairs of the given numbers, in that order, for each matrix."""
        columns = order[..., None, :].expand(*self.vectors.shape[:-1], order.shape[-1])
        residuals = None if self.residuals is None else self.residuals.gather(-1, order)
        return Spectrum(
            self.values.gather(-1, order), self.vectors.gather(-1, columns), self.affine, residuals
        )

    def _select(self, columns: slice) -> "Spectrum":
        residuals = None if self.residuals is None else self.residuals[..., columns]
        return Spectrum(
            self.values[..., columns], self.vectors[..., columns], self.affine, residuals
        )

    def most_positive(self, k: int) -> "Spectrum":
        """The `k` pairs of largest eigenvalue, largest first.

        Raises:
            ValueError: if a matrix (a class) has fewer than `k` positive eigenvalues.
        """
        values, order = self.values.sort(dim=-1, descending=True)
        if k < 1 or k > self.k or (values[..., k - 1] <= 0).any():
            raise ValueError(
                f"k={k} must be at least 1 and at most the number of positive eigenvalues, of "
                f"which the poorest class has {int((values > 0).sum(-1).min())}."
            )
        return self.reordered(order[..., :k])

    def oriented(self, directions: Float[Tensor, "n {self.d_in}"]) -> "Spectrum":
        """The same spectrum, signed so that the largest projection on `directions` is positive."""
        if self.values.ndim != 1:
            raise ValueError("Only the spectrum of a single direction can be oriented.")
        signs = _sign_of_largest(self.projections(directions))
        return replace(self, vectors=self.vectors * signs)

    def projections(self, x: Float[Tensor, "*inputs {self.d_in}"]) -> Float[Tensor, "..."]:
        """`vector . x` for each eigenvector: `[*inputs, *batch, k]`.

        Raises:
            ValueError: if `x` has another size than `d_in`.
        """
        x = coordinates(x.to(self.vectors.dtype), self.d_in, self.affine)
        columns = self.vectors.movedim(-2, 0).flatten(1)
        return (x @ columns).unflatten(-1, self.values.shape)

    def activations(self, x: Float[Tensor, "*inputs {self.d_in}"]) -> Float[Tensor, "..."]:
        """`value * (vector . x)^2`: what each eigenvector adds for the input `x`.

        Returns:
            `[*inputs, *batch, k]`; over all eigenpairs it sums to `direction . B(x)`.
        """
        return self.values * self.projections(x) ** 2

    def matrix(self) -> Float[Tensor, "*batch coords coords"]:
        """The symmetric matrix that these eigenpairs make up."""
        return (self.vectors * self.values[..., None, :]) @ self.vectors.mT

    def _check_k(self, k: int) -> None:
        if not 1 <= k <= self.k:
            raise ValueError(f"k={k} must be between 1 and the {self.k} eigenpairs there are.")

    def effective_rank(self) -> Float[Tensor, "*batch"]:
        """`(sum |value|)^2 / sum value^2`: how many eigenvalues matter, from 1 to k.

        Of a spectrum cut by `top`, it is that of what was kept (arXiv 2410.08417, appendix E).
        """
        return effective_ranks(self.values)


def effective_ranks(values: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch"]:
    """`Spectrum.effective_rank` of eigenvalues alone."""
    return values.abs().sum(-1) ** 2 / (values**2).sum(-1)


def eigh_by_magnitude(
    matrix: Float[Tensor, "*batch d d"],
) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch d d"]]:
    """Eigenvalues and eigenvectors of symmetric matrices, largest magnitude first."""
    values, vectors = torch.linalg.eigh(matrix)
    # flipped, so that of +a and -a the positive one comes first, whatever the size
    values, vectors = values.flip(-1), vectors.flip(-1)
    order = values.abs().argsort(dim=-1, descending=True, stable=True)
    return values.gather(-1, order), vectors.gather(-1, order[..., None, :].expand_as(vectors))


def coordinates(
    x: Float[Tensor, "*batch d"], d_in: int, affine: bool
) -> Float[Tensor, "*batch coords"]:
    """Inputs as a tensor or spectrum takes them: of an affine one, with the constant coordinate."""
    if x.shape[-1:] != (d_in,):
        raise ValueError(f"x has shape {list(x.shape)}; its last axis must be d_in={d_in}.")
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], dim=-1) if affine else x


def _sign_of_largest(columns: Float[Tensor, "*batch n k"]) -> Float[Tensor, "*batch 1 k"]:
    """The sign of each column's entry of largest magnitude, 1 for a zero column."""
    largest = columns.gather(-2, columns.abs().argmax(dim=-2, keepdim=True))
    return torch.where(largest < 0, -1.0, 1.0).to(columns.dtype)
