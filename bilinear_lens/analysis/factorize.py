"""Factorize: one CP decomposition of a whole tensor, whose few atoms all outputs share.

Eigenvectors are orthogonal and belong to one output each. An atom is a symmetrised product of two
input directions, not orthogonal to the others, with a weight for each output.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from bilinear_lens.analysis.whitening import whiten
from bilinear_lens.spectrum import Spectrum
from bilinear_lens.tensor import BilinearTensor

SHRINK = 0.85
"""What is left of each output's atoms after one round of pruning."""


@dataclass(frozen=True, eq=False)
class Factorization:
    """A tensor as a sum of few atoms, the largest first."""

    tensor: BilinearTensor
    """`left` and `right` hold the two unit directions of each atom, `down` the outputs' weights."""
    similarity: float
    """Cosine with the original, in the metric of the fit."""
    restarts: tuple[float, ...]
    """The similarity that each start reached."""

    @property
    def atoms_per_output(self) -> list[int]:
        """How many atoms each output uses."""
        return (self.tensor.down != 0).sum(1).tolist()


def factorize(
    tensor: BilinearTensor,
    n_atoms: int,
    *,
    atoms_per_output: int | None = None,
    sparsity: float = 0.0,
    symmetric: bool = False,
    contrast: bool = False,
    inputs: Float[Tensor, "n d_in"] | None = None,
    restarts: int = 4,
    steps: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> Factorization:
    """The atoms whose sum has the largest cosine with `tensor`.

    For given directions the best weights are a linear system in Gram matrices of the factors, so
    only the directions are searched, by L-BFGS; nothing of size `d_in^2` is formed, and an
    evaluation costs `O(n_atoms rank d)` in the d dimensions that the tensor reads. Pruning solves
    systems of up to `d_out n_atoms` unknowns.

    Args:
        n_atoms: how many atoms all outputs share.
        atoms_per_output: how many of them an output may use. The weights are pruned by what they
            cost the fit, a few at a time, and the directions fitted again after each round.
        sparsity: weight of the Hoyer penalty, `|d|_1 / |d|_2` of an output's weights (of unit
            atoms, over sqrt(n_atoms)), which does not depend on scale; it acts before pruning. An
            output that is zero has none. It makes weights small; only `atoms_per_output` makes
            them 0.
        symmetric: both directions of an atom are the same: squares instead of products.
        contrast: compare outputs up to a part that they share, as logits do: only differences
            between outputs count.
        inputs: data, in whose metric the cosine is taken (`whiten`); by default that of pixels.
        restarts: random starts; the one of highest similarity is kept.
        steps: iterations of L-BFGS a round.
        seed: of the starts.

    Raises:
        ValueError: if a number is out of range, or the tensor is zero; as `whiten`.
    """
    if atoms_per_output is not None and not 1 <= atoms_per_output <= n_atoms:
        raise ValueError(
            f"atoms_per_output={atoms_per_output} must be between 1 and n_atoms={n_atoms}."
        )
    if not isinstance(tensor, BilinearTensor):
        raise ValueError(f"Give a BilinearTensor, such as model.tensors()[0]: {type(tensor)}.")
    if n_atoms < 1 or restarts < 1 or steps < 1 or sparsity < 0:
        raise ValueError(
            f"n_atoms={n_atoms}, restarts={restarts} and steps={steps} must be at least 1, and "
            f"sparsity={sparsity} not negative."
        )
    left, right, down = (w.detach().double() for w in (tensor.left, tensor.right, tensor.down))
    target, filters = BilinearTensor(left, right, down, tensor.affine), None
    if inputs is not None:
        target, filters = whiten(target, inputs)
    terms = target.left.norm(dim=1) * target.right.norm(dim=1) * target.down.norm(dim=0)
    # differences between outputs alone: the target of a contrast lies in this projection
    metric = torch.eye(target.d_out).to(target.down) - (1 / target.d_out if contrast else 0)
    target = BilinearTensor(target.left, target.right, metric @ target.down)
    norm = target.norm()
    if norm <= 1e-7 * terms.norm():  # what rounding leaves of terms that cancel
        raise ValueError("The tensor is zero (or, with contrast, the same for all outputs).")
    target = target * (1 / norm.item())
    modes = Spectrum.of(target.input_gram())  # the best atoms lie in the span of the target's own
    kept = modes.values > 1e-14 * modes.values.max()
    span = modes.vectors[:, kept]
    target = target.change_basis(inputs=span.mT)
    found = []
    for start in tqdm(range(restarts), desc="Factorizing", unit="start", disable=not progress):
        directions = _start(target, n_atoms, symmetric=symmetric, seed=seed + start)
        directions = _search(target, directions, None, metric, steps=steps, sparsity=sparsity)
        support = torch.ones_like(target.down[:, :1], dtype=torch.bool).repeat(1, n_atoms)
        count = n_atoms
        while atoms_per_output is not None and count > atoms_per_output:
            count = max(atoms_per_output, int(SHRINK * count))
            support = _pruned(target, directions, support, metric, count)
            directions = _search(target, directions, support, metric, steps=steps)
        left, right = _atoms(directions)
        full = atoms_per_output is None or atoms_per_output == n_atoms
        down, _ = _weights(target, left, right, None if full else support, metric)
        atoms = BilinearTensor(left, right, down)
        found.append((target.similarity(atoms.change_basis(outputs=metric)).item(), atoms))
    similarity, atoms = max(found, key=lambda each: each[0])
    span = span if filters is None else filters @ span
    atoms = BilinearTensor(atoms.left @ span.mT, atoms.right @ span.mT, atoms.down * norm)
    return Factorization(
        _largest_first(atoms, tensor), similarity, tuple(each[0] for each in found)
    )


def tucker(tensor: BilinearTensor, n_inputs: int, n_outputs: int | None = None) -> BilinearTensor:
    """The tensor projected on its leading modes: the truncated HOSVD, beside CP.

    One orthonormal basis of `n_inputs` input directions for both inputs and all outputs, and one
    of `n_outputs` output directions (arXiv 2410.08417, appendix D). The constant of a tensor with
    biases counts as an input.

    Raises:
        ValueError: if a number is not between 1 and the size of its side.
    """
    n_outputs = tensor.d_out if n_outputs is None else n_outputs
    coords = tensor.left.shape[1]
    if not 1 <= n_inputs <= coords:
        raise ValueError(f"n_inputs={n_inputs} must be between 1 and {coords}.")
    inputs = Spectrum.of(tensor.double().input_gram()).top(n_inputs).vectors.to(tensor.left)
    outputs = tensor.hosvd(n_outputs).directions
    return BilinearTensor(
        tensor.left @ inputs @ inputs.mT,
        tensor.right @ inputs @ inputs.mT,
        outputs.mT @ outputs @ tensor.down,
        tensor.affine,
    )


def _start(
    target: BilinearTensor, n_atoms: int, *, symmetric: bool, seed: int
) -> Float[Tensor, "sides atoms coords"]:
    """Random directions in the span of the target's own factors."""
    generator = torch.Generator().manual_seed(seed)
    mixture = torch.randn(2, n_atoms, target.rank, generator=generator).to(target.left)
    directions = mixture @ torch.stack([target.left, target.right])
    # a square needs both: from one side's alone the other may be out of reach
    return directions.sum(0, keepdim=True) if symmetric else directions


def _atoms(directions: Float[Tensor, "sides atoms coords"]) -> tuple[Tensor, Tensor]:
    """Both directions of each atom, scaled so that their symmetrised product has norm 1."""
    left, right = directions[0], directions[-1]
    left, right = (w / w.norm(dim=1, keepdim=True) for w in (left, right))
    cosines = (left * right).sum(1, keepdim=True)
    return left * (2 / (1 + cosines**2)).sqrt(), right


def _grams(target: BilinearTensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Inner products between atoms, and of each output's interaction with each atom."""
    atoms = ((left @ left.mT) * (right @ right.mT) + (left @ right.mT) * (right @ left.mT)) / 2
    parallel = (target.left @ left.mT) * (target.right @ right.mT)
    crossed = (target.left @ right.mT) * (target.right @ left.mT)
    ridge = 1e-10 * torch.eye(len(atoms)).to(atoms)  # two atoms may become one
    return atoms + ridge, target.down @ (parallel + crossed) / 2


def _weights(
    target: BilinearTensor,
    left: Tensor,
    right: Tensor,
    support: Bool[Tensor, "d_out atoms"] | None,
    metric: Float[Tensor, "d_out d_out"],
) -> tuple[Float[Tensor, "d_out atoms"], Float[Tensor, ""]]:
    """The best weights on a support, and how much of the target's square norm they explain."""
    atoms, outputs = _grams(target, left, right)
    if support is None:
        down = torch.linalg.solve(atoms, outputs.mT).mT
    else:
        down = torch.zeros_like(outputs).masked_scatter(
            support, torch.linalg.solve(_system(atoms, support, metric), outputs[support])
        )
    return down, (down * outputs).sum()


def _system(atoms: Tensor, support: Tensor, metric: Tensor) -> Tensor:
    """The normal equations of the weights on a support: the outputs are coupled by the metric."""
    output, atom = support.nonzero(as_tuple=True)
    return metric[output][:, output] * atoms[atom][:, atom] + 1e-10 * torch.eye(len(atom)).to(atoms)


def _search(
    target: BilinearTensor,
    directions: Float[Tensor, "sides atoms coords"],
    support: Bool[Tensor, "d_out atoms"] | None,
    metric: Float[Tensor, "d_out d_out"],
    *,
    steps: int,
    sparsity: float = 0.0,
) -> Float[Tensor, "sides atoms coords"]:
    """Directions of a higher similarity, by L-BFGS, with the best weights at every step.

    The target has norm 1. A step that goes astray is left out: the best directions seen count.
    """
    directions = (directions / directions.norm(dim=-1, keepdim=True)).requires_grad_()
    best, lowest = directions.detach().clone(), float("inf")
    optimizer = torch.optim.LBFGS(
        [directions], max_iter=steps, history_size=20, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        nonlocal best, lowest
        optimizer.zero_grad()
        down, explained = _weights(target, *_atoms(directions), support, metric)
        value = 1 - explained.clamp(min=1e-30).sqrt()
        if sparsity:
            norms = down.norm(dim=1).clamp(min=1e-10)  # an output may be zero, but for rounding
            hoyer = down.abs().sum(1) / (norms * down.shape[1] ** 0.5)
            value = value + sparsity * hoyer.mean()
        value.backward()
        if value.item() < lowest:
            best, lowest = directions.detach().clone(), value.item()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    return best


def _pruned(
    target: BilinearTensor,
    directions: Float[Tensor, "sides atoms coords"],
    support: Bool[Tensor, "d_out atoms"],
    metric: Float[Tensor, "d_out d_out"],
    count: int,
) -> Bool[Tensor, "d_out atoms"]:
    """The support with `count` atoms for each output: what costs the fit least goes first."""
    atoms, outputs = _grams(target, *_atoms(directions))
    support = support.clone()
    while (over := support.sum(1) > count).any():
        system = _system(atoms, support, metric)
        weights = torch.linalg.solve(system, outputs[support])
        # the explained square norm falls by weight^2 / (inverse of the system)_ii without it
        inverse = torch.linalg.inv(system).diagonal()
        cost = torch.full_like(outputs, torch.inf).masked_scatter(support, weights**2 / inverse)
        cheapest = cost.argmin(dim=1)[over]
        support[over.nonzero().flatten(), cheapest] = False
    return support


def _largest_first(atoms: BilinearTensor, like: BilinearTensor) -> BilinearTensor:
    """The atoms by size, with unit directions, in the original's space and precision."""
    sizes = atoms.left.norm(dim=1) * atoms.right.norm(dim=1)
    left, right = (w / w.norm(dim=1, keepdim=True) for w in (atoms.left, atoms.right))
    down = atoms.down * sizes
    products = (1 + (left * right).sum(1) ** 2).sqrt()  # their norms, but for a constant factor
    order = (down.norm(dim=0) * products).argsort(descending=True)
    return BilinearTensor(
        left[order].to(like.left),
        right[order].to(like.left),
        down[:, order].to(like.left),
        like.affine,
    )
