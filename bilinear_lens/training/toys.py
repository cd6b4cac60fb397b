"""Toys whose solution is known: Boolean operations over pairs of inputs, and modular addition."""

from itertools import combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_OPERATIONS = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "nand": lambda a, b: ~(a & b),
    "nor": lambda a, b: ~(a | b),
    "xnor": lambda a, b: ~(a ^ b),
}
OPERATIONS = tuple(_OPERATIONS)


def boolean_pairs(
    n_inputs: int, operation: str, *, n_samples: int, on: float = 0.3, seed: int = 0
) -> tuple[Float[Tensor, "n_samples n_inputs"], Float[Tensor, "n_samples n_pairs"]]:
    """Random bits, and an operation of every two of them.

    The toy of tdooms/bilinear-interp (tutorials/writeups/toy.md), there with 4 inputs.

    Args:
        operation: "and", "or", "xor", "nand", "nor" or "xnor".
        on: the probability that a bit is 1.

    Returns:
        Inputs and targets, 0 or 1; the pairs i < j in the order of `pair_labels`.

    Raises:
        ValueError: if the operation is unknown, or a number is out of range.
    """
    first, second = torch.tensor(_pairs(n_inputs, operation)).mT
    if n_samples < 1 or not 0 < on < 1:
        raise ValueError(
            f"n_samples={n_samples} must be at least 1, and on={on} between 0 and 1, neither "
            "included."
        )
    bits = torch.rand(n_samples, n_inputs, generator=torch.Generator().manual_seed(seed)) < on
    return bits.float(), _OPERATIONS[operation](bits[:, first], bits[:, second]).float()


def pair_labels(n_inputs: int, operation: str) -> tuple[str, ...]:
    """Names of the outputs of `boolean_pairs`, such as "0 and 1".

    Raises:
        ValueError: if the operation is unknown, or there are fewer than two inputs.
    """
    return tuple(f"{i} {operation} {j}" for i, j in _pairs(n_inputs, operation))


def modular_addition(p: int) -> tuple[Float[Tensor, "n {2*p}"], Int[Tensor, " n"]]:
    """Every sum of two numbers modulo `p`, in order: `n = p * p`.

    Returns:
        Inputs, the one-hot vectors of both numbers side by side, and labels, `(a + b) mod p`.

    Raises:
        ValueError: if `p` is less than 2.
    """
    if p < 2:
        raise ValueError(f"p={p} must be at least 2.")
    numbers = torch.cartesian_prod(torch.arange(p), torch.arange(p))
    return torch.eye(p)[numbers].flatten(1), numbers.sum(1) % p


def _pairs(n_inputs: int, operation: str) -> list[tuple[int, int]]:
    if operation not in _OPERATIONS:
        raise ValueError(f"operation={operation!r} must be one of {', '.join(OPERATIONS)}.")
    if n_inputs < 2:
        raise ValueError(f"n_inputs={n_inputs} must be at least 2, to make a pair.")
    return list(combinations(range(n_inputs), 2))
