"""The pairs with the largest interaction, against all products."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bilinear_lens as bl
from bilinear_lens.analysis import pairs as module
from bilinear_lens.analysis.pairs import Pairs, token_pairs, top_pairs


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Few tokens are several blocks, so that all paths are taken."""
    monkeypatch.setattr(module, "ROWS", 16)
    monkeypatch.setattr(module, "COLUMNS", 48)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["32-bit", "16-bit"])
def fast(request, monkeypatch) -> torch.dtype:
    """Both dtypes of the bound, whatever this processor prefers."""
    monkeypatch.setattr(module, "_fast_dtype", lambda device: request.param)
    return request.param


def problem(
    n: int,
    d: int,
    *,
    power: float = 1.0,
    spread: float = 0.3,
    seed: int = 0,
    rank: int | None = None,
) -> tuple[Float[Tensor, "d d"], Float[Tensor, "n d"]]:
    """Eigenvalues `1 / i^power` of both signs, tokens whose norms vary by a factor."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    values = (torch.randint(2, (d,), generator=generator) * 2 - 1) / torch.arange(1, d + 1) ** power
    values[d if rank is None else rank :] = 0
    matrix = (vectors * values) @ vectors.mT
    tokens = torch.randn(n, d, generator=generator)
    tokens *= torch.exp(spread * torch.randn(n, 1, generator=generator))
    return (matrix + matrix.mT) / 2, tokens


def check(matrix: Float[Tensor, "d d"], tokens: Float[Tensor, "n d"], k: int) -> Pairs:
    """`top_pairs`, when it agrees with the oracle: all products at once, in 64 bits."""
    found = top_pairs(matrix, tokens, k)
    n = len(tokens)
    products = tokens.double() @ matrix.double() @ tokens.double().mT
    rows, columns = torch.triu_indices(n, n)
    expected = products[rows, columns].abs().sort(descending=True).values[:k]
    size = tokens.double().norm(dim=1).max() ** 2 * matrix.double().norm()
    tolerance = (1e-14 if tokens.dtype == torch.float64 else 1e-5) * size.item()
    close = {"atol": tolerance, "rtol": 0.0, "check_dtype": False}
    torch.testing.assert_close(found.values.abs(), expected, **close)
    torch.testing.assert_close(found.values, products[found.first, found.second], **close)
    assert found.values.dtype == tokens.dtype and found.first.dtype == torch.long
    assert (found.first <= found.second).all()
    assert len((found.first * n + found.second).unique()) == k
    magnitudes = found.values.abs()
    assert (magnitudes.diff() <= 0).all()
    ties = magnitudes.diff() == 0
    assert ((found.first * n + found.second).diff()[ties] > 0).all()
    return found


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 150),
    d=st.integers(1, 24),
    power=st.sampled_from([0.0, 0.75, 2.0]),
    spread=st.sampled_from([0.0, 0.5, 2.0]),
    share=st.floats(0, 1),
    rank=st.sampled_from([None, 0, 1, 3]),
    scale=st.sampled_from([1e-6, 1.0, 1e5]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_they_are_those_of_all_products(n, d, power, spread, share, rank, scale, dtype, seed):
    matrix, tokens = problem(n, d, power=power, spread=spread, seed=seed, rank=rank)
    n_pairs = n * (n + 1) // 2
    k = max(1, round(min(n_pairs, 300) * share))
    check(matrix.to(dtype) / scale, tokens.to(dtype) * scale, k)


def test_in_worst_cases_too(fast):
    matrix, tokens = problem(130, 20)
    flat, equal = problem(130, 20, power=0.0, spread=0.0)
    huge = tokens.clone()
    huge[7] *= 1e6
    lone = torch.zeros_like(tokens)
    lone[3] = tokens[3]
    cases = {
        "flat": (flat, torch.nn.functional.normalize(equal), 50),
        "identity": (torch.eye(20), tokens, 50),
        "zero": (torch.zeros(20, 20), tokens, 50),
        "rank one": (problem(130, 20, rank=1)[0], tokens, 50),
        "twice the same": (matrix, torch.cat([tokens, tokens]), 100),
        "all the same": (matrix, tokens[:1].repeat(130, 1), 100),
        "one": (matrix, tokens[:1], 1),
        "all pairs": (matrix, tokens, 130 * 131 // 2),
        "all but one": (matrix, tokens, 130 * 131 // 2 - 1),
        "64 bits": (matrix.double(), tokens.double(), 50),
        "one huge": (matrix, huge, 50),
        "one huge, and more": (matrix, huge, 500),
        "none but one": (matrix, lone, 50),
        "no tokens": (matrix, torch.zeros_like(tokens), 50),
    }
    for case in cases.values():
        check(*case)


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_holds(fast, seed):
    """Of every pair and every number of coordinates, not only where it decides."""
    for power, spread, rank in ((0.75, 0.5, None), (0.0, 0.0, None), (1.0, 2.0, 4)):
        matrix, tokens = problem(100, 40, power=power, spread=spread, seed=seed, rank=rank)
        bound = module._Bound.of(matrix, tokens)
        rows = tokens.double()[bound.order]
        products = rows @ matrix.double() @ rows.mT / bound.scale
        assert (products.abs() <= bound.reach[:, None] * bound.reach).all()
        for i, width in enumerate(bound.widths):
            left = bound.coordinates[:, :width] * bound.signs[:width]
            cheap = left @ bound.coordinates[:, :width].mT
            rests = bound.rests[:, i].double()
            assert ((products - cheap).abs() <= rests[:, None] * rests).all()
        # neither is it idle: rounding is a small part of it
        assert (bound.rests[:, -1] ** 2).mean() < 0.1 * (bound.reach**2).mean()


@pytest.mark.parametrize("what", ["rests", "reach"])
def test_a_bound_too_small_loses_pairs(what, monkeypatch):
    """The control: with it, the comparison with the oracle fails."""
    original = module._Bound.of

    def too_small(matrix, tokens):
        bound = original(matrix, tokens)
        bound.rests.mul_(0.1 if what == "rests" else 1)
        bound.reach.mul_(0.3 if what == "reach" else 1)
        return bound

    matrix, tokens = problem(600, 40, power=0.5, spread=0.0)
    check(matrix, tokens, 100)
    monkeypatch.setattr(module._Bound, "of", too_small)
    with pytest.raises(AssertionError):
        check(matrix, tokens, 100)


def evaluated(monkeypatch) -> dict[str, int]:
    """Counts pairs whose products are computed, in full and from the first coordinates."""
    counts = {"block": 0, "pair": 0, "coarse": 0}
    largest, in_full, passing = (
        module._largest,
        module._Bound._passing_in_full,
        module._Bound._passing,
    )

    def count_block(products, *args):
        counts["block"] += products.numel()
        return largest(products, *args)

    def count_pairs(self, first, second, least):
        counts["pair"] += len(first)
        return in_full(self, first, second, least)

    def count_coarse(self, rows, columns, width, least):
        pairs = len(self.order[rows]) * len(self.order[columns])
        counts["coarse"] += round(pairs * self.widths[width] / self.widths[-1])
        return passing(self, rows, columns, width, least)

    monkeypatch.setattr(module, "_largest", count_block)
    monkeypatch.setattr(module._Bound, "_passing_in_full", count_pairs)
    monkeypatch.setattr(module._Bound, "_passing", count_coarse)
    return counts


def test_few_products_are_computed_where_eigenvalues_fall(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 64)
    monkeypatch.setattr(module, "COLUMNS", 256)
    counts = evaluated(monkeypatch)
    matrix, tokens = problem(2000, 64, power=1.5, spread=0.0)
    n_pairs = 2000 * 2001 // 2
    check(matrix, tokens, 20)
    assert counts["block"] < 0.05 * n_pairs and counts["pair"] < 0.01 * n_pairs
    assert counts["coarse"] < 0.6 * n_pairs
    counts.update(block=0, pair=0, coarse=0)
    flat, tokens = problem(2000, 64, power=0.0, spread=0.0)
    check(flat, torch.nn.functional.normalize(tokens), 20)
    assert counts["coarse"] > 0.9 * n_pairs  # the control: nothing can be left out


def test_norms_alone_leave_blocks_out(monkeypatch):
    counts = evaluated(monkeypatch)
    matrix, tokens = problem(600, 20)
    tokens[50:] *= 1e-3
    check(matrix, tokens, 20)
    assert counts["block"] + counts["pair"] + counts["coarse"] < 0.05 * 600 * 601 // 2


def test_the_same_again(fast):
    matrix, tokens = problem(300, 16, power=0.5)
    tokens = torch.cat([tokens, tokens])
    for k in (1, 77, 1000):
        one, two = top_pairs(matrix, tokens, k), top_pairs(matrix, tokens, k)
        for first, second in zip(one, two, strict=True):
            assert torch.equal(first, second)


class LargestTensor(TorchDispatchMode):
    """Notes the number of entries of the largest tensor that an operation returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self.entries = max(self.entries, each.numel())
        return result


def test_memory_is_that_of_blocks(fast, monkeypatch):
    """No tensor is larger than two numbers for each pair of a block, or than the tokens."""
    monkeypatch.setattr(module, "ROWS", 32)
    monkeypatch.setattr(module, "COLUMNS", 128)
    n, d = 1500, 12
    tokens = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    for matrix in (torch.zeros(d, d), problem(1, d, power=1.0)[0], torch.eye(d)):
        with LargestTensor() as largest:
            top_pairs(matrix, tokens, 10)
        # 34 numbers of a token are sums of squares
        assert n * d <= largest.entries <= max(2 * 32 * 128, 34 * n) < n**2 / 40


@pytest.mark.parametrize("affine", [False, True])
def test_pairs_of_several_directions(affine):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 7, 5, generator=generator)
    down = torch.randn(3, 7, generator=generator)
    bias = torch.randn(7, generator=generator) if affine else None
    tensor = bl.BilinearTensor.with_biases(left, right, down, left_bias=bias)
    tokens = bl.Basis(torch.randn(40, 5, generator=generator), [f"t{i}" for i in range(40)])
    directions = torch.randn(2, 3, generator=generator)
    frame = token_pairs(tensor, directions, tokens, k=4)
    assert list(frame.columns) == ["direction", "token_a", "token_b", "interaction"]
    assert frame.direction.tolist() == [0] * 4 + [1] * 4
    for number, direction in enumerate(directions):
        products = tokens.directions @ tensor.interaction(direction)[:5, :5] @ tokens.directions.mT
        rows = frame.iloc[4 * number : 4 * number + 4]
        largest = products.abs().triu().flatten().topk(4).values
        assert rows.interaction.abs().tolist() == pytest.approx(largest.tolist(), rel=1e-4)
        values = products[
            [tokens.index(label) for label in rows.token_a],
            [tokens.index(label) for label in rows.token_b],
        ]
        assert rows.interaction.tolist() == pytest.approx(values.tolist(), rel=1e-4)
    with pytest.raises(ValueError, match=r"size 4; this tensor needs 5"):
        token_pairs(tensor, directions, bl.Basis(torch.eye(4), list("abcd")))


def test_the_table_of_a_model_lists_them(model, monkeypatch):
    monkeypatch.undo()  # blocks of real size
    table = bl.interactions(model, " named", layer=0)
    tokens = table.tokens.directions
    pairs = table.pairs(50)
    assert list(pairs.columns) == ["token_a", "token_b", "interaction"]
    products = (tokens @ table.interaction @ tokens.mT).triu()
    order = products.abs().flatten().topk(50).indices
    expected = products.flatten()[order].tolist()
    assert pairs.interaction.tolist() == pytest.approx(expected, rel=1e-4)
    names = table.tokens.labels
    ends = {(names[i // len(names)], names[i % len(names)]) for i in order.tolist()}
    assert set(zip(pairs.token_a, pairs.token_b, strict=True)) == ends


def test_a_wrong_number_is_named():
    matrix, tokens = problem(4, 3)
    for k in (0, -1, 11):
        with pytest.raises(ValueError, match=rf"k={k} must be between 1 and the 10 pairs"):
            top_pairs(matrix, tokens, k)
    assert math.isfinite(top_pairs(matrix, tokens, 10).values.sum())
