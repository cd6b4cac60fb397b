"""Top token pairs by branch and bound, against all products. `pytest -n 0 -s tests/benchmarks`."""

import math
import time
from collections.abc import Callable
from statistics import median

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import bilinear_lens as bl
from bilinear_lens.analysis.pairs import COLUMNS, ROWS, Pairs, top_pairs

K = 100


def brute_force(matrix: Float[Tensor, "d d"], tokens: Float[Tensor, "n d"], k: int) -> Pairs:
    """All products, in blocks as large as ours; only those above the k-th so far are sorted."""
    first = second = torch.zeros(0, dtype=torch.long)
    best, least = tokens.new_zeros(0), -1.0
    for top in range(0, len(tokens), ROWS):
        mapped = tokens[top : top + ROWS] @ matrix
        for left in range(top, len(tokens), COLUMNS):
            products = mapped @ tokens[left : left + COLUMNS].mT
            magnitudes = products.abs()
            if left < top + ROWS:  # below the diagonal stands what is above it
                below = torch.ones_like(magnitudes, dtype=torch.bool).tril(top - left - 1)
                magnitudes.masked_fill_(below, -1)
            near = (magnitudes.amax(1) > least).nonzero()[:, 0]
            row, column = (magnitudes[near] > least).nonzero().unbind(1)
            first = torch.cat([first, near[row] + top])
            second = torch.cat([second, column + left])
            best = torch.cat([best, products[near[row], column]])
            kept = best.abs().topk(min(k, len(best))).indices
            first, second, best = first[kept], second[kept], best[kept]
            if len(best) == k:
                least = best.abs().min().item()
    return Pairs(first, second, best)


def embeddings(n: int, d: int, *, share: float, seed: int = 0) -> Float[Tensor, "n d"]:
    """Tokens of norm sqrt(d), of whose square `share` lies in 64 directions, falling."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(n, 64, generator=generator) / torch.arange(1, 65) ** 0.5
    directions = torch.linalg.qr(torch.randn(d, 64, generator=generator)).Q.mT
    low = low / low.square().sum(1).mean().sqrt() * math.sqrt(share)
    noise = torch.randn(n, d, generator=generator) * math.sqrt((1 - share) / d)
    return torch.nn.functional.normalize(low @ directions + noise) * math.sqrt(d)


def falling(d: int, power: float, seed: int = 1) -> Float[Tensor, "d d"]:
    """Eigenvalues `1 / i^power` of both signs, random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    signs = torch.randint(2, (d,), generator=generator) * 2 - 1
    matrix = (vectors * (signs / torch.arange(1, d + 1) ** power)) @ vectors.mT
    return (matrix + matrix.mT) / 2


def pairs(n: int = 32000, d: int = 1024) -> list[dict]:
    """Medians of three interleaved rounds for each case, in seconds."""
    half = embeddings(n, d, share=0.5)
    model = bl.HookedBilinearTransformer.from_pretrained("tinystories-1l")
    named = model.bilinear_tensor(0).interaction(model.output_direction(" named"))
    cases = {
        "eigenvalues 1/i^.75": (falling(d, 0.75), half),
        "eigenvalues 1/i^.75, isotropic tokens": (
            falling(d, 0.75),
            embeddings(n, d, share=0.0),
        ),
        "eigenvalues 1/i": (falling(d, 1.0), half),
        "eigenvalues 1/i^.5": (falling(d, 0.5), half),
        "flat spectrum, isotropic tokens": (falling(d, 0.0), embeddings(n, d, share=0.0)),
        "all products zero": (torch.zeros(d, d), half),
        "equal tokens": (falling(d, 0.75), half[:1].repeat(n, 1)),
        "tinystories-1l, ' named'": (named, model.token_basis().directions),
    }
    return [_row(work, matrix, tokens) for work, (matrix, tokens) in cases.items()]


def _row(work: str, matrix: Float[Tensor, "d d"], tokens: Float[Tensor, "n d"]) -> dict:
    ours, theirs = [], []
    for _ in range(3):
        found, seconds = _timed(top_pairs, matrix, tokens)
        ours.append(seconds)
        expected, seconds = _timed(brute_force, matrix, tokens)
        theirs.append(seconds)
        largest = expected.values.abs().sort(descending=True).values
        torch.testing.assert_close(found.values.abs(), largest, rtol=1e-4, atol=1e-5)
    n, d = tokens.shape
    return {
        "work": f"top {K} pairs, n={n}, d={d}, {work}",
        "against": "all products in blocks",
        "ours_s": median(ours),
        "theirs_s": median(theirs),
        "ratio": median(theirs) / median(ours),
    }


def _timed(
    find: Callable[[Tensor, Tensor, int], Pairs], matrix: Tensor, tokens: Tensor
) -> tuple[Pairs, float]:
    start = time.perf_counter()
    found = find(matrix, tokens, K)
    return found, time.perf_counter() - start


def test_top_pairs():
    rows = pd.DataFrame(pairs())
    print(f"\n{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(rows.to_string(index=False, float_format="{:.3g}".format))
