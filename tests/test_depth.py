"""Chains: against the tree of tiny ones written out, bounds that hold, and gauges that cancel."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor, einsum

from bilinear_lens import BilinearTensor, HookedBilinearClassifier, diagonalize
from bilinear_lens.analysis.depth import (
    chain_distance,
    chain_similarity,
    composed_spectra,
    run_chain,
)

SIZES = {1: (5, 3), 2: (4, 5, 3), 3: (2, 4, 5, 3)}  # of inputs, between the layers, of outputs
KINDS = ("plain", "biases", "some biases", "residual")
CHAINS = list(product(SIZES, KINDS))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_layer(d_in: int, d_out: int, seed: int, *, rank: int = 7, bias: bool = False):
    left, right = normal(seed, 2, rank, d_in)
    down = normal(seed + 1, d_out, rank) / d_in
    if not bias:
        return BilinearTensor(left, right, down)
    biases = {"left_bias": normal(seed + 2, rank), "down_bias": normal(seed + 3, d_out)}
    return BilinearTensor.with_biases(left, right, down, **biases)


def a_chain(n: int, kind: str = "plain", seed: int = 0) -> list[BilinearTensor]:
    sizes = SIZES[n]
    chain = []
    for i in range(n):
        bias = kind == "biases" or (kind == "some biases" and i == n // 2)
        layer = a_layer(sizes[i], sizes[i + 1], seed + 10 * i, bias=bias)
        if kind == "residual":
            layer = layer.with_linear(normal(seed + 5, sizes[i + 1], sizes[i]))
        chain.append(layer)
    return chain


def dense_tree(chain: list[BilinearTensor]) -> Tensor:
    """The output against all copies of the input, `[d_out, coords ** copies]`, constant and all."""
    affine = any(layer.affine for layer in chain)
    tree = None
    for number, layer in enumerate(chain):
        dense = einsum("or,ri,rj->oij", layer.down, layer.left, layer.right)
        dense = (dense + dense.mT) / 2
        if affine and not layer.affine and dense.shape[1] == layer.d_in:
            padded = torch.zeros(len(dense), layer.d_in + 1, layer.d_in + 1).to(dense)
            padded[:, :-1, :-1] = dense
            dense = padded
        if affine and number < len(chain) - 1:
            constant = torch.zeros_like(dense[:1])
            constant[0, -1, -1] = 1
            dense = torch.cat([dense, constant])
        if tree is None:
            tree = dense.flatten(1)
        else:
            tree = einsum("oab,ax,by->oxy", dense, tree, tree).flatten(1)
    assert tree is not None
    return tree


def canonical_tree(tensors) -> Tensor:
    """As `dense_tree`, where the constants are coordinates already."""
    tree = None
    for layer in tensors:
        dense = einsum("or,ri,rj->oij", layer.down, layer.left, layer.right)
        dense = (dense + dense.mT) / 2
        tree = (
            dense.flatten(1)
            if tree is None
            else einsum("oab,ax,by->oxy", dense, tree, tree).flatten(1)
        )
    assert tree is not None
    return tree


def all_widths(chain) -> list[tuple[int, ...]]:
    return list(product(*[range(1, len(weights) + 1) for weights in chain.weights]))


@pytest.mark.parametrize(("n", "kind"), CHAINS)
def test_a_diagonal_chain_computes_the_same(n, kind):
    tensors = a_chain(n, kind)
    chain, x = diagonalize(tensors), normal(9, 2, 11, SIZES[n][0])
    expected = x
    for tensor in tensors:
        expected = tensor(expected)
    torch.testing.assert_close(chain(x), expected, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(run_chain(tensors, x), expected)
    torch.testing.assert_close(
        canonical_tree(chain.tensors), dense_tree(tensors), atol=1e-9, rtol=1e-7
    )
    assert chain.norm == pytest.approx(dense_tree(tensors).norm().item())
    full = [len(weights) for weights in chain.weights]
    torch.testing.assert_close(chain.truncate(full)(x), expected, atol=1e-9, rtol=1e-7)
    assert chain.bound(full) == 0
    if n > 1:
        fewer = [width - 1 for width in full]
        assert not torch.allclose(chain.truncate(fewer)(x), expected, rtol=1e-3)


@pytest.mark.parametrize(("n", "kind"), CHAINS)
def test_all_layers_but_the_last_have_orthonormal_outputs(n, kind):
    tensors = a_chain(n, kind)
    chain = diagonalize(tensors)
    for tensor in chain.tensors[:-1]:
        flat = tensor.to_dense().flatten(1)
        torch.testing.assert_close(flat @ flat.mT, torch.eye(len(flat)).to(flat), atol=1e-8, rtol=0)
    flat = tensors[0].to_dense().flatten(1)
    assert not torch.allclose(flat @ flat.mT, torch.eye(len(flat)).to(flat), atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 3])
def test_weights_are_squared_singular_values_of_the_unfolded_tree(n, kind):
    tensors = a_chain(n, kind)
    chain, tree = diagonalize(tensors), dense_tree(tensors)
    coords = SIZES[n][0] + any(tensor.affine for tensor in tensors)
    for cut, weights in enumerate(chain.weights):
        branch = coords ** (2 ** (cut + 1))  # the inputs below one copy of the cut
        unfolded = tree.unflatten(1, (branch, -1)).movedim(1, 0).flatten(1)
        expected = torch.linalg.svdvals(unfolded).square()
        expected = (expected / expected.sum())[: len(weights)]
        torch.testing.assert_close(weights, expected, atol=1e-9, rtol=1e-6)
        assert weights.sum().item() == pytest.approx(1)
        assert (weights.diff() <= 0).all()


def check_bound(chain, widths, *, tree: Tensor) -> float:
    """The bound's ratio to the distance, which it must not fall below."""
    cut, bound = chain.truncate(widths), chain.bound(widths)
    distance = ((canonical_tree(cut.tensors) - tree).norm() / tree.norm()).item()
    assert distance <= bound * (1 + 1e-9) + 1e-9
    assert chain_distance(chain.tensors, cut.tensors) == pytest.approx(distance, abs=1e-7)
    return distance / bound if bound else 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [2, 3])
def test_no_truncation_is_further_away_than_its_bound(n, kind):
    tight, loose = 0, 1
    for seed in range(0, 500, 100):
        tensors = a_chain(n, kind, seed)
        chain = diagonalize(tensors)
        tree = canonical_tree(chain.tensors)
        for widths in all_widths(chain):
            ratio = check_bound(chain, widths, tree=tree)
            if chain.bound(widths):
                tight, loose = max(tight, ratio), min(loose, ratio)
    # so that the bound could not be much smaller
    assert tight > 0.97
    assert loose < 0.9


def test_small_cuts_reach_the_bound():
    """The layer below writes one coordinate that little is made of: 4 copies of it are cut."""
    tensors = a_chain(3)
    lower = tensors[0]
    down = torch.cat([lower.down[:3], 1e-3 * lower.down[3:]])
    chain = diagonalize([BilinearTensor(lower.left, lower.right, down), *tensors[1:]])
    assert chain.tensors[0].d_out == 3  # 2 inputs have only 3 products
    chain = diagonalize(a_chain(2, seed=7))
    upper = chain.tensors[1]
    scale = torch.tensor([1, 1, 1, 1, 1e-3]).to(upper.left)
    quiet = BilinearTensor(upper.left * scale, upper.right * scale, upper.down)
    chain = diagonalize([chain.tensors[0], quiet])
    widths = [4]
    ratio = check_bound(chain, widths, tree=canonical_tree(chain.tensors))
    assert 0 < chain.bound(widths) < 0.01 and ratio > 0.999
    one_copy = math.sqrt(chain.weights[0][4:].sum().item())
    assert ratio * chain.bound(widths) > 1.4 * one_copy  # each of the two copies counts


@pytest.mark.parametrize(("n", "kind"), CHAINS)
def test_no_input_moves_an_output_by_more_than_the_bound(n, kind):
    for seed in (0, 300):
        tensors = a_chain(n, kind, seed)
        chain = diagonalize(tensors)
        affine = any(tensor.affine for tensor in tensors)
        x = normal(9, 300, SIZES[n][0]) * normal(8, 300, 1).exp()
        powers = (x.square().sum(1) + affine) ** (2 ** (n - 1))
        nearest = 0.0
        for widths in all_widths(chain):
            moved = (chain(x) - chain.truncate(widths)(x)).norm(dim=1)
            allowed = chain.bound(widths) * chain.norm * powers
            assert (moved <= allowed * (1 + 1e-7) + 1e-7 * chain.norm * powers).all()
            nearest = max(nearest, (moved / allowed.clamp(min=1e-9)).max().item())
        assert n == 1 or nearest > 0.02


def test_the_bound_of_a_chain_cut_before_is_over_the_whole_norm():
    chain = diagonalize(a_chain(3, "biases"))
    first = chain.truncate([4, 5])
    assert first.norm == chain.norm
    whole = canonical_tree(first.tensors)
    for widths in product(range(1, 5), range(1, 6)):
        distance = (canonical_tree(first.truncate(widths).tensors) - whole).norm().item()
        assert distance <= first.bound(widths) * first.norm * (1 + 1e-9) + 1e-9
    assert [len(weights) for weights in first.weights] == [4, 5]


@pytest.mark.parametrize("kind", ["plain", "biases"])
def test_layers_that_write_dependent_coordinates_are_made_narrower(kind):
    tensors = a_chain(2, kind)
    mixture = normal(3, 5, 3) @ normal(4, 3, 5)
    lower = tensors[0].change_basis(outputs=mixture)
    chain, x = diagonalize([lower, tensors[1]]), normal(9, 11, 4)
    assert len(chain.weights[0]) == 3 + (kind == "biases")
    expected = tensors[1](lower(x))
    torch.testing.assert_close(chain(x), expected, atol=1e-9, rtol=1e-7)
    assert chain_distance([lower, tensors[1]], a_chain(2, kind)) > 0.1
    # a coordinate that nothing reads is the last, of no weight
    left, right = tensors[1].left.clone(), tensors[1].right.clone()
    left[:, 2] = right[:, 2] = 0
    upper = BilinearTensor(left, right, tensors[1].down, tensors[1].affine)
    deaf = diagonalize([tensors[0], upper])
    assert deaf.weights[0][-1] < 1e-12 < 1e-6 < deaf.weights[0][-2]
    widths = [len(deaf.weights[0]) - 1]
    torch.testing.assert_close(deaf.truncate(widths)(x), upper(tensors[0](x)), atol=1e-6, rtol=1e-6)


def test_nearly_dependent_outputs_stay_orthonormal():
    tensors = a_chain(2)
    almost = torch.eye(5).double()
    almost[4] = almost[3] + 1e-5 * almost[4]
    lower = tensors[0].change_basis(outputs=almost)
    upper = tensors[1].change_basis(inputs=torch.linalg.inv(almost).mT)
    chain = diagonalize([lower, upper])
    flat = chain.tensors[0].to_dense().flatten(1)
    torch.testing.assert_close(flat @ flat.mT, torch.eye(5).to(flat), atol=1e-6, rtol=0)
    x = normal(9, 11, 4)
    torch.testing.assert_close(chain(x), run_chain(tensors, x), atol=1e-7, rtol=1e-5)
    check_bound(chain, [3], tree=canonical_tree(chain.tensors))


def other_gauge(tensors: list[BilinearTensor], seed: int) -> list[BilinearTensor]:
    """The same function: invertible matrices between the layers, and sides swapped."""
    chain = list(tensors)
    for cut in range(len(chain) - 1):
        size = chain[cut].d_out
        change = normal(seed + cut, size, size)
        chain[cut] = chain[cut].change_basis(outputs=change)
        chain[cut + 1] = chain[cut + 1].change_basis(inputs=torch.linalg.inv(change).mT)
    last = chain[-1]
    chain[-1] = BilinearTensor(last.right * 3, last.left / 3, last.down, last.affine)
    return chain


@pytest.mark.parametrize(("n", "kind"), CHAINS)
def test_similarity_and_distance_are_those_of_the_trees_in_any_gauge(n, kind):
    one, two = a_chain(n, kind), a_chain(n, kind, 500)
    a, b = dense_tree(one), dense_tree(two)
    cosine = ((a * b).sum() / a.norm() / b.norm()).item()
    assert abs(cosine) < 0.95
    assert chain_similarity(one, two) == pytest.approx(cosine, abs=1e-9)
    assert chain_distance(one, two) == pytest.approx(((a - b).norm() / a.norm()).item())
    turned = other_gauge(one, 3)
    assert chain_similarity(one, turned) == pytest.approx(1)
    assert chain_distance(one, turned) < 1e-6
    assert chain_similarity(turned, two) == pytest.approx(cosine, abs=1e-7)
    assert chain_similarity(one, [*two[:-1], two[-1] * -2]) == pytest.approx(-cosine, abs=1e-9)
    assert chain_distance(one, [*one[:-1], one[-1] * 0.75]) == pytest.approx(0.25)
    torch.testing.assert_close(
        diagonalize(turned).weights, diagonalize(one).weights, atol=1e-8, rtol=1e-5
    )
    if n == 1:
        assert cosine == pytest.approx(one[0].similarity(two[0]).item())


def test_chains_of_other_widths_and_with_biases_in_one_compare():
    wide = a_chain(2)
    narrow = [a_layer(4, 2, 70), a_layer(2, 3, 80, bias=True)]
    a, b = dense_tree([*wide[:-1], with_no_constant(wide[-1])]), dense_tree(narrow)
    expected = ((a * b).sum() / a.norm() / b.norm()).item()
    assert chain_similarity(wide, narrow) == pytest.approx(expected)
    assert chain_similarity(narrow, wide) == pytest.approx(expected)


def with_no_constant(tensor: BilinearTensor) -> BilinearTensor:
    """With a constant coordinate that it does not read."""
    left, right = (torch.cat([w, torch.zeros_like(w[:, :1])], 1) for w in tensor_sides(tensor))
    return BilinearTensor(left, right, tensor.down, True)


def tensor_sides(tensor: BilinearTensor) -> tuple[Tensor, Tensor]:
    return tensor.left, tensor.right


def test_a_trained_shape_of_model():
    model = HookedBilinearClassifier.from_config(
        input_shape=(11,), n_classes=3, d_model=5, d_mlp=7, n_layers=3, bias=True, residual=True
    )
    chain = diagonalize(model.tensors())
    x = normal(9, 13, 11).float()
    torch.testing.assert_close(chain(x).float(), model(x).detach(), atol=1e-5, rtol=1e-4)


def nested(spectra, x: Tensor, *, constants: bool = True) -> Tensor:
    """The output rebuilt: each spectrum's values times the squares of what is below."""
    lowest = spectra[-1]
    below = (lowest.values * lowest.projections(x) ** 2).sum(-1)
    for spectrum in reversed(spectra[:-1]):
        if spectrum.affine and constants:
            below = below + spectrum.vectors[..., -1, :]
        below = (spectrum.values * below**2).sum(-1)
    return below


@pytest.mark.parametrize("kind", ["plain", "biases", "some biases"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_composed_spectra_with_all_pairs_are_the_output(n, kind):
    tensors = [
        a_layer(d_in, d_out, 10 * i, rank=1, bias=kind == "biases" or (kind != "plain" and i == 1))
        for i, (d_in, d_out) in enumerate([(4, 5), (5, 6), (6, 3)][:n])
    ]
    x, u = normal(9, 11, 4), normal(8, tensors[-1].d_out)
    k = 4  # a rank of 1 (2 with biases) has 2 (4) pairs at most
    spectra = composed_spectra(tensors, u, k=k)
    assert [spectrum.values.shape for spectrum in spectra] == [(k,) * (i + 1) for i in range(n)]
    expected = run_chain(tensors, x) @ u
    torch.testing.assert_close(nested(spectra, x), expected, atol=1e-8, rtol=1e-7)
    if n > 1 and kind == "biases":
        assert not torch.allclose(nested(spectra, x, constants=False), expected, rtol=1e-2)
    fewer = composed_spectra(tensors, u, k=1)
    assert not torch.allclose(nested(fewer, x), expected, rtol=1e-2)
    first = composed_spectra(tensors, 1, k=k)
    torch.testing.assert_close(nested(first, x), run_chain(tensors, x)[:, 1], atol=1e-8, rtol=1e-7)


def test_an_eigenvector_of_the_constant_alone_has_nothing_below():
    lower, square = a_layer(4, 5, 0), a_layer(5, 3, 10, rank=1)
    upper = BilinearTensor.with_biases(
        square.left, square.right, square.down, down_bias=9 * normal(3, 3).abs() + 9
    )
    x = normal(9, 11, 4)
    spectra = composed_spectra([lower, upper], 0, k=4)
    alone = spectra[0].vectors[:-1].abs().amax(0) < 1e-12
    assert alone.sum() == 1 and not spectra[1].values[alone].any()
    assert spectra[1].values[~alone].all()
    torch.testing.assert_close(nested(spectra, x), run_chain([lower, upper], x)[:, 0])


def test_what_makes_no_chain_is_named(as_users):
    tensors = a_chain(2)
    chain = diagonalize(tensors)
    for widths in ([], [0], [6], [5, 1], [-1]):
        for call in (chain.truncate, chain.bound):
            with pytest.raises(ValueError, match=r"widths .* from 1 to \[5\]"):
                call(widths)
    swapped = tensors[::-1]
    for call in (
        lambda: diagonalize(swapped),
        lambda: chain_similarity(swapped, swapped),
        lambda: composed_spectra(swapped, 0, k=1),
    ):
        with pytest.raises(ValueError, match="writes 3 coordinates, but the next reads 4"):
            call()
    for call in (
        lambda: diagonalize([]),
        lambda: chain_similarity([], []),
        lambda: chain_distance(tensors, []),
        lambda: composed_spectra([], 0, k=1),
    ):
        with pytest.raises(ValueError, match="no layer"):
            call()
    narrower = tensors[1].change_basis(outputs=normal(0, 2, 3))
    for other in (tensors[:1], [tensors[0], narrower], a_chain(3)):
        with pytest.raises(ValueError, match="compare equals"):
            chain_similarity(tensors, other)
    with pytest.raises(ValueError, match="Layer 0 writes nothing"):
        diagonalize([tensors[0] * 0, tensors[1]])
    with pytest.raises(ValueError, match="last layer writes nothing"):
        diagonalize([tensors[0], tensors[1] * 0])
    silent = [tensors[0], tensors[1] * 0]
    with pytest.raises(ValueError, match="zero"):
        chain_similarity(tensors, silent)
    with pytest.raises(ValueError, match="zero"):
        chain_distance(silent, tensors)
    assert chain_distance(tensors, silent) == pytest.approx(1)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k={k}"):
            composed_spectra(tensors, 0, k=k)
    with pytest.raises(ValueError, match="Output 3"):
        composed_spectra(tensors, 3, k=1)
