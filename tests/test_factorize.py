"""Factorizations: planted atoms come back, and what is said of them is measured densely."""

import pytest
import tensorly
import torch
from tensorly.decomposition import parafac, partial_tucker
from tensorly.tenalg import multi_mode_dot  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor, einsum

from bilinear_lens import BilinearTensor, Factorization, Spectrum, factorize
from bilinear_lens.analysis.factorize import tucker
from bilinear_lens.analysis.whitening import whiten

N_IN, N_OUT, RANK = 6, 3, 4


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_tensor(
    seed: int = 0, *, rank: int = RANK, d_in: int = N_IN, d_out: int = N_OUT, affine: bool = False
) -> BilinearTensor:
    """`rank` atoms, planted."""
    left, right = normal(seed, 2, rank, d_in)
    down = normal(seed + 1, d_out, rank)
    if not affine:
        return BilinearTensor(left, right, down)
    biases = {"left_bias": normal(seed + 2, rank), "right_bias": normal(seed + 3, rank)}
    return BilinearTensor.with_biases(left, right, down, **biases)


def run(tensor: BilinearTensor, n_atoms: int, **options) -> Factorization:
    return factorize(tensor, n_atoms, progress=False, **options)


def dense(tensor: BilinearTensor) -> Tensor:
    half = einsum("or,ri,rj->oij", tensor.down, tensor.left, tensor.right)
    return (half + half.transpose(1, 2)) / 2


def cosine(a: Tensor, b: Tensor) -> float:
    return ((a * b).sum() / a.norm() / b.norm()).item()


def products(tensor: BilinearTensor) -> Tensor:
    """Each atom's symmetrised product, of norm 1."""
    half = einsum("ri,rj->rij", tensor.left, tensor.right)
    whole = (half + half.mT) / 2
    return whole / whole.norm(dim=(1, 2), keepdim=True)


def unit_weights(tensor: BilinearTensor) -> Tensor:
    """The outputs' weights of atoms of norm 1."""
    half = einsum("ri,rj->rij", tensor.left, tensor.right)
    return tensor.down * ((half + half.mT) / 2).norm(dim=(1, 2))


def matched(found: BilinearTensor, planted: BilinearTensor) -> tuple[Tensor, Tensor]:
    """For each planted atom, the cosine of the nearest one found, and its number."""
    cosines = (products(planted).flatten(1) @ products(found).flatten(1).mT).abs()
    return cosines.max(1)


@pytest.mark.parametrize("affine", [False, True])
def test_planted_atoms_come_back(affine):
    tensor = a_tensor(affine=affine)
    found = run(tensor, RANK, steps=200)
    assert found.similarity > 1 - 1e-6
    cosines, order = matched(found.tensor, tensor)
    assert cosines.min() > 0.999 and sorted(order.tolist()) == list(range(RANK))
    assert found.tensor.affine == affine
    x = normal(9, 11, N_IN)
    torch.testing.assert_close(found.tensor(x), tensor(x), atol=2e-2, rtol=2e-2)
    fewer = run(tensor, RANK - 1)
    assert fewer.similarity < 0.999
    cosines, _ = matched(fewer.tensor, tensor)
    assert cosines.min() < 0.99


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"symmetric": True}, {"atoms_per_output": 2}, {"sparsity": 0.1}]
)
def test_the_similarity_is_that_of_the_dense_tensors(affine, options):
    tensor = a_tensor(rank=7, affine=affine)
    found = run(tensor, 4, restarts=2, steps=30, **options)
    assert found.similarity == pytest.approx(cosine(dense(tensor), dense(found.tensor)), abs=1e-9)
    assert found.similarity == pytest.approx(tensor.similarity(found.tensor).item(), abs=1e-9)
    assert found.similarity == max(found.restarts) and len(found.restarts) == 2
    assert 0.5 < found.similarity < 0.9999
    # the best weights of these directions, scale included: the rest is orthogonal to it
    rest = dense(tensor) - dense(found.tensor)
    assert abs((rest * dense(found.tensor)).sum()) < 1e-6 * dense(tensor).norm() ** 2


def test_atoms_are_unit_directions_the_largest_first():
    found = run(a_tensor(rank=7), 5, restarts=1, steps=30).tensor
    ones = torch.ones(5).double()
    torch.testing.assert_close(found.left.norm(dim=1), ones)
    torch.testing.assert_close(found.right.norm(dim=1), ones)
    sizes = einsum("or,ri,rj->roij", found.down, found.left, found.right)
    sizes = ((sizes + sizes.mT) / 2).flatten(1).norm(dim=1)
    assert (sizes.diff() <= 0).all()


def test_symmetric_atoms_are_squares():
    tensor = a_tensor(rank=7)
    squares = run(tensor, 5, symmetric=True)
    torch.testing.assert_close(squares.tensor.left, squares.tensor.right)
    free = run(tensor, 5)
    assert not torch.allclose(free.tensor.left.abs(), free.tensor.right.abs(), atol=0.1)
    assert squares.similarity < free.similarity
    planted = BilinearTensor(tensor.left[:4], tensor.left[:4], tensor.down[:, :4])
    found = run(planted, 4, symmetric=True)
    assert found.similarity > 1 - 1e-6 and matched(found.tensor, planted)[0].min() > 0.999


def test_squares_reach_both_sides_of_a_product():
    """(a . x)(b . x) with b across a: of squares of directions along `a` alone, none fits."""
    a, b = torch.eye(N_IN).double()[:2, None]
    tensor = BilinearTensor(a, b, normal(2, N_OUT, 1))
    assert run(tensor, 1, symmetric=True).similarity == pytest.approx(0.5**0.5, abs=1e-6)
    assert run(tensor, 2, symmetric=True).similarity > 1 - 1e-6


SUPPORT = torch.tensor([(0, 1), (1, 2), (3, 4), (4, 5), (0, 5)])


def a_sparse_tensor() -> BilinearTensor:
    """6 atoms, of which each of 5 outputs uses 2."""
    tensor = a_tensor(rank=6, d_in=8, d_out=5)
    used = torch.zeros(5, 6, dtype=torch.bool).scatter(1, SUPPORT, True)
    weights = tensor.down.sign() * (1 + tensor.down.abs())
    return BilinearTensor(tensor.left, tensor.right, weights * used)


def test_a_planted_support_comes_back():
    planted = a_sparse_tensor()
    found = run(planted, 6, atoms_per_output=2)
    assert found.similarity > 1 - 1e-6
    cosines, order = matched(found.tensor, planted)
    assert cosines.min() > 0.999
    assert (found.tensor.down[:, order] != 0).equal(planted.down != 0)
    assert run(planted, 6, atoms_per_output=1, restarts=1).similarity < 0.95


@pytest.mark.parametrize("contrast", [False, True])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_each_output_has_its_number_of_atoms(contrast, count):
    tensor = a_tensor(rank=9, d_out=5)
    found = run(tensor, 7, atoms_per_output=count, contrast=contrast, restarts=1, steps=30)
    assert found.atoms_per_output == [count] * 5
    assert (found.tensor.down != 0).sum(1).tolist() == [count] * 5
    full = run(tensor, 7, contrast=contrast, restarts=1, steps=30)
    assert full.atoms_per_output == [7] * 5
    assert found.similarity < full.similarity


def test_pruning_is_better_than_any_support_at_random():
    tensor = a_tensor(rank=9, d_out=5)
    found = run(tensor, 6, atoms_per_output=2, restarts=1)
    atoms = products(found.tensor).flatten(1)
    target = dense(tensor).flatten(1)

    def reached(supports: list[Tensor]) -> float:
        explained = 0.0
        for row, support in zip(target, supports, strict=True):
            chosen = atoms[support].mT
            fitted = chosen @ torch.linalg.lstsq(chosen, row[:, None]).solution[:, 0]
            explained += fitted.square().sum().item()
        return explained**0.5 / target.norm().item()

    own = [row.nonzero().flatten() for row in found.tensor.down]
    assert reached(own) == pytest.approx(found.similarity, abs=1e-7)
    generator = torch.Generator().manual_seed(0)
    others = [
        reached([torch.randperm(6, generator=generator)[:2] for _ in range(5)]) for _ in range(50)
    ]
    assert max(others) < found.similarity


def hoyer(found: Factorization) -> float:
    """1 where an output uses one atom, 0 where it uses all alike."""
    weights = unit_weights(found.tensor)
    n = weights.shape[1] ** 0.5
    ratio = weights.abs().sum(1) / weights.norm(dim=1)
    return ((n - ratio) / (n - 1)).mean().item()


def test_sparsity_makes_weights_sparser_whatever_the_scale():
    tensor = a_tensor(rank=7)
    plain, sparse = (run(tensor, 5, sparsity=sparsity, restarts=3) for sparsity in (0.0, 0.1))
    assert hoyer(sparse) > hoyer(plain) + 0.1
    assert sparse.similarity < plain.similarity
    for scale in (1e-18, 1e6):
        for options in ({"sparsity": 0.1}, {"atoms_per_output": 2}):
            one, other = (
                run(each, 5, restarts=1, steps=20, **options) for each in (tensor, tensor * scale)
            )
            assert one.similarity == pytest.approx(other.similarity, abs=1e-6)
            torch.testing.assert_close(
                other.tensor.down / scale, one.tensor.down, atol=1e-3, rtol=1e-3
            )


def centred(tensor: Tensor) -> Tensor:
    return tensor - tensor.mean(0)


def test_a_contrast_does_not_see_what_outputs_share():
    tensor = a_tensor(rank=7)
    common = 30 * normal(7, 1, 7)
    shared = BilinearTensor(tensor.left, tensor.right, tensor.down + common)
    one, other = (run(each, 4, contrast=True, restarts=2) for each in (tensor, shared))
    assert one.similarity == pytest.approx(other.similarity, abs=1e-6)
    assert one.similarity == pytest.approx(
        cosine(centred(dense(tensor)), centred(dense(one.tensor))), abs=1e-9
    )
    without = run(shared, 4, restarts=2).similarity
    assert abs(without - run(tensor, 4, restarts=2).similarity) > 1e-3
    sparse = run(shared, 4, contrast=True, atoms_per_output=2, restarts=1)
    assert sparse.similarity == pytest.approx(
        cosine(centred(dense(shared)), centred(dense(sparse.tensor))), abs=1e-9
    )
    x = normal(9, 200, N_IN)
    logits = tensor(x)
    differences = [each - each.mean(1, keepdim=True) for each in (logits, other.tensor(x))]
    assert cosine(*differences) > 0.9


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("contrast", [False, True])
def test_with_data_the_cosine_is_that_after_whitening(affine, contrast):
    tensor = a_tensor(rank=7, affine=affine)
    x = normal(9, 50, N_IN) * torch.logspace(0.5, -1.5, N_IN)
    found = run(tensor, 2, inputs=x, contrast=contrast, restarts=2)
    full = torch.cat([x, torch.ones(50, 1).double()], 1) if affine else x
    moments = full.mT @ full / 50
    moments += 1e-4 * moments.diagonal().mean() * torch.eye(len(moments))
    a, b = (centred(dense(t)) if contrast else dense(t) for t in (tensor, found.tensor))

    def inner(a: Tensor, b: Tensor) -> float:
        return einsum("oij,jk,okl,li->", a, moments, b, moments).item()

    expected = inner(a, b) / (inner(a, a) * inner(b, b)) ** 0.5
    assert found.similarity == pytest.approx(expected, abs=1e-8)
    whitened = [whiten(t, x).tensor for t in (tensor, found.tensor)]
    if not contrast:
        assert found.similarity == pytest.approx(whitened[0].similarity(whitened[1]).item())
    plain = run(tensor, 2, contrast=contrast, restarts=2)
    c = centred(dense(plain.tensor)) if contrast else dense(plain.tensor)
    assert found.similarity > inner(a, c) / (inner(a, a) * inner(c, c)) ** 0.5 + 1e-3
    assert plain.similarity > cosine(a, b)


def test_the_seed_decides():
    tensor = a_tensor(rank=7)
    first, again, other = (run(tensor, 3, restarts=2, steps=5, seed=seed) for seed in (1, 1, 8))
    assert first.restarts == again.restarts and first.tensor.down.equal(again.tensor.down)
    assert first.tensor.left.equal(again.tensor.left)
    assert first.restarts != other.restarts
    assert len(set(first.restarts)) == 2
    with torch.no_grad():
        quiet = run(tensor, 3, restarts=2, steps=5, seed=1)
    assert quiet.restarts == first.restarts
    learned = BilinearTensor(tensor.left.requires_grad_(), tensor.right, tensor.down)
    trained = run(learned, 3, restarts=2, steps=5, seed=1)
    assert trained.restarts == first.restarts and tensor.left.grad is None
    assert not trained.tensor.left.requires_grad


def test_float32_stays_float32():
    tensor = a_tensor(rank=7)
    half = BilinearTensor(tensor.left.float(), tensor.right.float(), tensor.down.float())
    found = run(half, 4, restarts=1)
    assert found.tensor.left.dtype == torch.float32
    assert found.similarity == pytest.approx(half.similarity(found.tensor).item(), abs=1e-5)


def parafac_similarity(whole: Tensor, rank: int, starts: int = 3) -> float:
    reached = []
    for seed in range(starts):
        found = parafac(whole.numpy(), rank, n_iter_max=400, init="random", random_state=seed)
        rebuilt = torch.as_tensor(tensorly.cp_to_tensor(found))
        reached.append(cosine(whole, rebuilt))
    return max(reached)


@pytest.mark.parametrize("n_atoms", [1, 2, 3])
def test_the_cosine_is_that_of_alternating_least_squares(n_atoms):
    """A square is one product of tensorly's; a symmetrised product is two."""
    tensor = a_tensor(rank=9)
    whole = dense(tensor)
    squares = run(tensor, n_atoms, symmetric=True, restarts=6).similarity
    assert squares == pytest.approx(parafac_similarity(whole, n_atoms), abs=0.01)
    pairs = run(tensor, n_atoms, restarts=3).similarity
    assert pairs < parafac_similarity(whole, 2 * n_atoms) + 1e-4
    assert pairs > squares


def test_input_modes_are_those_of_tucker():
    tensor, k = a_tensor(rank=9), 2
    whole = dense(tensor)
    axes = Spectrum.of(tensor.input_gram()).top(k).vectors
    unfolded = torch.as_tensor(tensorly.unfold(whole.numpy(), 1).copy())
    u, s, _ = torch.linalg.svd(unfolded, full_matrices=False)
    torch.testing.assert_close(Spectrum.of(tensor.input_gram()).values, s.square())
    torch.testing.assert_close(axes @ axes.mT, u[:, :k] @ u[:, :k].mT, atol=1e-7, rtol=0)
    cut = tensor.change_basis(inputs=axes.mT).change_basis(inputs=axes)
    (core, factors), _ = partial_tucker(whole.numpy(), rank=[k, k], modes=[1, 2], n_iter_max=200)
    known = torch.as_tensor(multi_mode_dot(core, factors, modes=[1, 2]))
    best = cosine(whole, known)
    assert best - 0.05 < tensor.similarity(cut).item() <= best + 1e-9
    # 3 products of 2 directions are all that there are: more than any 1 of all directions
    assert run(tensor, 3).similarity >= best - 1e-3


def degenerate() -> dict[str, BilinearTensor]:
    tensor = a_tensor(rank=7)
    silent = torch.cat([tensor.down, torch.zeros(1, 7).double()])
    left, right, down = tensor.left, tensor.right, tensor.down
    return {
        "rank 1": a_tensor(rank=1),
        "one input": BilinearTensor(left[:, :1], right[:, :1], down),
        "one output": BilinearTensor(left, right, down[:1]),
        "a silent output": BilinearTensor(left, right, silent),
        "terms twice": tensor + tensor,
        "dead terms": tensor + BilinearTensor(left * 0, right, down) + tensor * 0.0,
    }


@pytest.mark.parametrize("name", degenerate())
@pytest.mark.parametrize(
    "options",
    [{}, {"sparsity": 0.3}, {"symmetric": True}, {"atoms_per_output": 1}, {"contrast": True}],
)
def test_degenerate_tensors_are_fitted(name, options):
    tensor = degenerate()[name]
    if "contrast" in options and tensor.d_out == 1:
        with pytest.raises(ValueError, match="same for all outputs"):
            run(tensor, 4, **options)
        return
    found = run(tensor, 4, restarts=2, steps=30, **options)
    assert all(
        w.isfinite().all() for w in (found.tensor.left, found.tensor.right, found.tensor.down)
    )
    assert 0.4 < found.similarity < 1 + 1e-6
    if name in ("rank 1", "one input"):
        assert found.similarity > 1 - 1e-6
    if name == "a silent output" and "contrast" not in options:
        assert found.atoms_per_output[-1] == 0


@pytest.mark.parametrize("options", [{}, {"atoms_per_output": 3}, {"sparsity": 0.1}])
def test_more_atoms_than_there_are_do_no_harm(options):
    found = run(a_tensor(), 9, restarts=3, **options)  # one start may end in another optimum
    assert found.similarity > 1 - (1e-2 if "sparsity" in options else 1e-3)
    x = normal(9, 11, N_IN)
    tolerance = 0.1 * a_tensor()(x).abs().max().item()
    torch.testing.assert_close(found.tensor(x), a_tensor()(x), atol=tolerance, rtol=0)


def test_what_cannot_be_factorized_is_named(as_users):
    tensor, x = a_tensor(), normal(9, 20, N_IN)
    for options in ({"n_atoms": 0}, {"restarts": 0}, {"steps": 0}, {"sparsity": -0.1}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name}={options[name]}"):
            factorize(tensor, **{"n_atoms": 2, **options})
    for count in (0, 3, -1):
        with pytest.raises(ValueError, match=f"atoms_per_output={count} must be between 1"):
            run(tensor, 2, atoms_per_output=count)
    for zero in (tensor * 0.0, tensor + tensor * -1.0):
        with pytest.raises(ValueError, match="zero"):
            run(zero, 2)
    same = BilinearTensor(tensor.left, tensor.right, tensor.down[:1].repeat(5, 1))
    with pytest.raises(ValueError, match="same for all outputs"):
        run(same, 2, contrast=True)
    assert run(same, RANK).similarity > 1 - 1e-4
    with pytest.raises(ValueError, match="NaN"):
        run(tensor, 2, inputs=x / 0)
    with pytest.raises(ValueError, match=r"\[n, 6\]"):
        run(tensor, 2, inputs=x[:, 1:])
    with pytest.raises(ValueError, match="all zero"):
        run(tensor, 2, inputs=x * 0)


@pytest.mark.parametrize("affine", [False, True])
def test_tucker_is_the_truncated_hosvd(affine):
    tensor = a_tensor(affine=affine)
    whole = dense(tensor)
    coords = whole.shape[-1]
    modes = torch.linalg.svd(whole.movedim(1, 0).flatten(1), full_matrices=False)[0][:, :3]
    outputs = torch.linalg.svd(whole.flatten(1), full_matrices=False)[0][:, :2]
    inside, kept = modes @ modes.mT, outputs @ outputs.mT
    expected = einsum("po,oij,ik,jl->pkl", kept, whole, inside, inside)
    torch.testing.assert_close(dense(tucker(tensor, 3, 2)), expected)
    torch.testing.assert_close(dense(tucker(tensor, coords)), whole)
    assert not torch.allclose(dense(tucker(tensor, 2)), whole)
    with pytest.raises(ValueError, match=f"between 1 and {coords}"):
        tucker(tensor, coords + 1)
