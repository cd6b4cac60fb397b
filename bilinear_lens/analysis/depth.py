"""Depth: a chain of tensors, orthogonalised, diagonalised and truncated with an error bound.

A model of n layers is a tree: its output reads two copies of the layer below, each of which reads
two of the next, down to `2^n` copies of the input (arXiv 2504.02667).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from bilinear_lens.spectrum import Spectrum
from bilinear_lens.tensor import BilinearTensor


@dataclass(frozen=True, eq=False)
class DiagonalChain:
    """A chain in canonical form: between layers, directions by how much of the whole they carry.

    Every layer but the last has orthonormal output coordinates. A chain that `truncate` cut is in
    that form no more, and its weights and norm remain those of the whole.
    """

    tensors: tuple[BilinearTensor, ...]
    weights: tuple[Float[Tensor, " _"], ...]
    """For each cut between layers, the share of the tree's square norm that each direction carries;
    they sum to 1 at each cut."""
    norm: float
    """Frobenius norm of the tree, over all copies of the input."""

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """What the chain computes."""
        return run_chain(self.tensors, x)

    def truncate(self, widths: Sequence[int]) -> "DiagonalChain":
        """Keep the first directions at each cut.

        Raises:
            ValueError: if there is not one width for each cut, from 1 to what the cut has.
        """
        self._check(widths)
        tensors = list(self.tensors)
        for cut, width in enumerate(widths):
            lower, upper = tensors[cut], tensors[cut + 1]
            tensors[cut] = BilinearTensor(lower.left, lower.right, lower.down[:width], lower.affine)
            tensors[cut + 1] = BilinearTensor(
                upper.left[:, :width], upper.right[:, :width], upper.down
            )
        kept = tuple(w[:k] for w, k in zip(self.weights, widths, strict=True))
        return DiagonalChain(tuple(tensors), kept, self.norm)

    def bound(self, widths: Sequence[int]) -> float:
        """At most how far the tree of `truncate(widths)` lies from this one, over `norm`.

        `sqrt(sum over cuts of copies * weight cut)`, with `2^(n - 1 - cut)` copies of a cut:
        projections of different edges add in squares. For an input x, no output then moves by more
        than bound * norm * |x|^(2^n) (with biases, |x|^2 + 1 stands for |x|^2).
        """
        self._check(widths)
        n = len(self.tensors)
        return math.sqrt(
            sum(
                2 ** (n - 1 - cut) * weights[width:].clamp(min=0).sum().item()
                for cut, (weights, width) in enumerate(zip(self.weights, widths, strict=True))
            )
        )

    def _check(self, widths: Sequence[int]) -> None:
        full = [len(weights) for weights in self.weights]
        if len(widths) != len(full) or not all(
            1 <= k <= n for k, n in zip(widths, full, strict=True)
        ):
            raise ValueError(f"widths {list(widths)} must be from 1 to {full}, one for each cut.")


def diagonalize(tensors: Sequence[BilinearTensor]) -> DiagonalChain:
    """Bring a chain, such as `model.tensors()`, to canonical form; it computes the same.

    From the input up, each layer's outputs are made orthonormal and the rest is pushed into the
    next layer (orthogonalise). From the output down, each cut's coordinates are turned to the
    eigenvectors of what all above it reads there (diagonalise). Everything goes through the
    factors' Gram matrices, in float64: `O(rank^2 d)` a layer, and no `d^2 x d` tensor.

    Args:
        tensors: each reads what the one before wrote; if one has biases, all gain the constant as
            one more coordinate.

    Raises:
        ValueError: if the layers do not fit each other, or the chain is zero.
    """
    chain = _homogeneous(tensors)
    # each twice: of nearly dependent outputs, a Gram matrix leaves half the digits at first
    for cut in (cut for cut in range(len(chain) - 1) for _ in range(2)):
        sizes, axes = torch.linalg.eigh(chain[cut].output_gram())
        kept = sizes > 1e-13 * sizes.max()
        if not kept.any():
            raise ValueError(f"Layer {cut} writes nothing: its weights are zero.")
        sizes, axes = sizes[kept], axes[:, kept]
        chain[cut] = chain[cut].change_basis(outputs=(axes / sizes.sqrt()).mT)
        chain[cut + 1] = chain[cut + 1].change_basis(inputs=(axes * sizes.sqrt()).mT)
    weights, metric = [], None
    for cut in reversed(range(len(chain) - 1)):
        metric = chain[cut + 1].input_gram(metric)
        sizes, axes = torch.linalg.eigh(metric)
        sizes, axes = sizes.flip(0), axes.flip(1)
        chain[cut] = chain[cut].change_basis(outputs=axes.mT)
        chain[cut + 1] = chain[cut + 1].change_basis(inputs=axes.mT)
        metric = sizes.diag()
        weights.insert(0, sizes.clamp(min=0))
    norm = chain[-1].norm().item()
    if norm == 0:
        raise ValueError("The last layer writes nothing: its weights are zero.")
    return DiagonalChain(tuple(chain), tuple(w / norm**2 for w in weights), norm)


def run_chain(
    tensors: Sequence[BilinearTensor], x: Float[Tensor, "*batch d_in"]
) -> Float[Tensor, "*batch d_out"]:
    """The last layer's output for an input of the first."""
    for tensor in tensors:
        x = tensor(x)
    return x


def chain_similarity(a: Sequence[BilinearTensor], b: Sequence[BilinearTensor]) -> float:
    """The cosine between two trees: 1 for the same layers in whatever coordinates.

    For one layer it is `BilinearTensor.similarity`. Biases and depth are exact.

    Raises:
        ValueError: if the chains differ in depth, inputs or outputs, or one is zero.
    """
    first, second, inner = _products(a, b)
    if min(first, second) <= 0:
        raise ValueError("The similarity to a chain that is zero is not defined.")
    return inner / (math.sqrt(first) * math.sqrt(second))


def chain_distance(a: Sequence[BilinearTensor], b: Sequence[BilinearTensor]) -> float:
    """`|a - b| / |a|` in the Frobenius norm of the trees, to about 1e-8.

    Raises:
        ValueError: as `chain_similarity`, where `a` is zero.
    """
    first, second, inner = _products(a, b)
    if first <= 0:
        raise ValueError("The distance relative to a chain that is zero is not defined.")
    return math.sqrt(max(0.0, first + second - 2 * inner) / first)


def composed_spectra(
    tensors: Sequence[BilinearTensor], direction: Float[Tensor, " d_out"] | int, *, k: int
) -> list[Spectrum]:
    """Eigenvectors of composed layers, from the output down to the input.

    The last layer's k eigenvectors are k output directions for the layer below; its k eigenvectors
    for each of them are the directions for the next, and so on: the i-th spectrum is batched over
    `[k] * i`. Where a layer has biases, its eigenvectors' constant coordinate is no direction of
    the layer below: it adds to the projection there.

    Raises:
        ValueError: as `BilinearTensor.eigh`, or if the layers do not fit each other.
    """
    _check_fit(tensors)
    spectra = [tensors[-1].eigh(direction, k)]
    for tensor in reversed(tensors[:-1]):
        above = spectra[-1]
        directions = above.vectors[..., : above.d_in, :].mT
        # an eigenvector may be the constant alone: the layer below writes nothing along it
        silent = ~directions.any(-1, keepdim=True)
        below = tensor.eigh(directions.masked_fill(silent, 1.0), k)
        spectra.append(Spectrum(below.values.masked_fill(silent, 0.0), below.vectors, below.affine))
    return spectra


def _products(
    a: Sequence[BilinearTensor], b: Sequence[BilinearTensor]
) -> tuple[float, float, float]:
    """`<a, a>`, `<b, b>` and `<a, b>`."""
    _check_fit(a)
    _check_fit(b)
    if len(a) != len(b) or (a[0].d_in, a[-1].d_out) != (b[0].d_in, b[-1].d_out):
        raise ValueError(
            f"Chains of {len(a)} and {len(b)} layers, {a[0].d_in} to {a[-1].d_out} and "
            f"{b[0].d_in} to {b[-1].d_out} coordinates: compare equals."
        )
    affine = any(tensor.affine for tensor in (*a, *b))
    first, second = (_homogeneous(chain, affine=affine) for chain in (a, b))
    return _inner(first, first), _inner(second, second), _inner(first, second)


def _inner(a: Sequence[BilinearTensor], b: Sequence[BilinearTensor]) -> float:
    """The inner product of two trees, by that of their branches, from the input up."""
    gram = a[0].output_gram(b[0])
    for mine, theirs in zip(a[1:], b[1:], strict=True):
        gram = mine.change_basis(inputs=gram.mT).output_gram(theirs)
    return gram.trace().item()


def _check_fit(tensors: Sequence[BilinearTensor]) -> None:
    if not tensors:
        raise ValueError("The chain has no layer.")
    for lower, upper in pairwise(tensors):
        if lower.d_out != upper.d_in:
            raise ValueError(
                f"A layer writes {lower.d_out} coordinates, but the next reads {upper.d_in}."
            )


def _homogeneous(
    tensors: Sequence[BilinearTensor], *, affine: bool | None = None
) -> list[BilinearTensor]:
    """The chain in float64, with any constant as an explicit coordinate between the layers."""
    _check_fit(tensors)
    if affine is None:
        affine = any(tensor.affine for tensor in tensors)
    chain = []
    for layer, tensor in enumerate(tensors):
        left, right, down = (w.double() for w in (tensor.left, tensor.right, tensor.down))
        if affine and not tensor.affine:
            left, right = (torch.cat([w, w.new_zeros(len(w), 1)], dim=1) for w in (left, right))
        if affine and layer < len(tensors) - 1:  # it also writes the constant: 1 times 1
            one = torch.eye(left.shape[1], dtype=left.dtype, device=left.device)[-1:]
            left, right = torch.cat([left, one]), torch.cat([right, one])
            down = torch.block_diag(down, down.new_ones(1, 1))
        chain.append(BilinearTensor(left, right, down, affine and layer == 0))
    return chain
