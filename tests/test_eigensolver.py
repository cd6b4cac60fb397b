"""The iterative eigensolver against dense float64, on spectra that are hard for it."""

import pytest
import torch
from torch import Tensor

from bilinear_lens import BilinearTensor, Spectrum, eigensolver, subspace
from bilinear_lens.eigensolver import plan
from bilinear_lens.kernels import fast_float32
from bilinear_lens.subspace import Factored, Pairs, iterate

D, K, TOL = 160, 8, 1e-5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rotation(seed: int, d: int = D) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, generator=generator(seed), dtype=torch.float64)).Q


def with_values(values: Tensor, seed: int = 0) -> Tensor:
    vectors = rotation(seed, len(values))
    return (vectors * values) @ vectors.mT


def falling(power: float, d: int = D) -> Tensor:
    signs = torch.where(torch.rand(d, generator=generator(1)) < 0.5, -1.0, 1.0)
    return (signs / torch.arange(1, d + 1) ** power).double()


def low_rank(rank: int, noise: float = 0.0) -> Tensor:
    values = noise * falling(0.1)
    values[:rank] = falling(0.3)[:rank]
    return values


SPECTRA = {
    "falling fast": falling(1.0),
    "falling slowly": falling(0.3),
    "flat": falling(0.0),
    "nearly flat": falling(0.02),
    "rank 3, less than k": low_rank(3),
    "rank 3 and noise": low_rank(3, 1e-2),
    "rank 12 and little noise": low_rank(12, 1e-6),
    "one huge": torch.cat([torch.tensor([1e4], dtype=torch.float64), falling(0.5, D - 1)]),
    "pairs of +a and -a": falling(0.5).abs().repeat_interleave(2)[:D]
    * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(D // 2),
    "each eight times": falling(0.5).repeat_interleave(8)[:D],
    "a cluster at k": torch.cat([falling(0.5)[:5], torch.full((20,), 0.4), falling(0.9)[25:]]),
    "all positive": falling(0.7).abs(),
    "zero": torch.zeros(D, dtype=torch.float64),
}


def check(found: Pairs, matrices: Tensor, k: int = K) -> None:
    """Values, residuals and orthonormality, of all matrices."""
    exact = torch.linalg.eigvalsh(matrices.double())
    exact = exact.gather(-1, exact.abs().argsort(-1, descending=True))
    largest = exact[:, :1].abs().clamp(min=1e-30)
    # by magnitude: of +a and -a either may come first within rounding
    errors = (found.values.double().abs() - exact[:, :k].abs()) / largest
    assert errors.abs().max() < TOL
    vectors = found.vectors.double()
    residuals = (matrices.double() @ vectors - vectors * found.values[:, None]).norm(dim=1)
    assert (residuals / largest).max() < 1.5 * TOL
    assert (found.residuals.double() - residuals / largest).abs().max() < TOL / 2
    identity = torch.eye(k, dtype=torch.float64)
    assert (vectors.mT @ vectors - identity).abs().max() < 1e-4


@pytest.mark.parametrize("name", SPECTRA)
def test_the_top_pairs_are_those_of_a_dense_decomposition(name):
    matrices = torch.stack([with_values(SPECTRA[name], seed) for seed in range(4)])
    check(iterate(matrices.float(), K, TOL), matrices)


def test_spectra_of_all_kinds_in_one_batch():
    matrices = torch.stack([with_values(values, 3) for values in SPECTRA.values()])
    check(iterate(matrices.float(), K, TOL), matrices)


@pytest.mark.parametrize("again", [True, False])
def test_an_eigenvector_that_the_start_is_blind_to_is_found(monkeypatch, again):
    """The start has nothing of the sixth eigenvector; the columns drawn anew bring it back.

    In float64, in which rounding does not.
    """
    matrix = with_values(falling(0.5), 5)[None]
    missed = Spectrum.of(matrix[0]).vectors[:, 5:6]
    randn, fresh = torch.randn, subspace.FRESH * again

    def blind(*size: int, **options) -> Tensor:
        drawn = randn(*size, **options).double()
        seen = drawn - missed @ (missed.mT @ drawn)
        return torch.cat([drawn[:, :fresh], seen[:, fresh:]], dim=1)

    monkeypatch.setattr(torch, "randn", blind)
    found = iterate(matrix, K, TOL)
    assert found.residuals.max() <= TOL
    if again:
        check(found, matrix)
    else:  # the residuals alone would not tell
        with pytest.raises(AssertionError):
            check(found, matrix)


def factors(d: int, rank: int, d_out: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    left, right = torch.randn(2, rank, d, generator=generator(seed)) / d**0.5
    strength = 1 / torch.arange(1, rank + 1) ** 0.7
    return left, right, torch.randn(d_out, rank, generator=generator(seed + 1)) * strength


def test_matrices_in_factors_act_as_the_dense_ones():
    left, right, weight = factors(D, 300, 5)
    matrices = Factored(left, right, weight)
    torch.testing.assert_close(
        matrices.dense()[2], BilinearTensor(left, right, weight).interaction(2)
    )
    block = torch.randn(5, D, 3, generator=generator())
    torch.testing.assert_close(matrices @ block, matrices.dense() @ block, rtol=1e-4, atol=1e-4)
    rows = torch.tensor([3, 1])
    torch.testing.assert_close(matrices[rows].dense(), matrices.dense()[rows])


@pytest.mark.parametrize("norms", [False, True])
def test_factors_give_the_same_pairs(norms):
    matrices = Factored(*factors(D, 300, 6))
    dense = matrices.dense()
    check(iterate(matrices, K, TOL, dense.flatten(1).norm(dim=1) if norms else None), dense)


def test_one_pass_is_enough_only_where_the_norm_proves_it(monkeypatch):
    steep, flat = (with_values(low_rank(6, noise), 1)[None].float() for noise in (1e-7, 1e-2))
    passes = []
    chebyshev = subspace.chebyshev
    monkeypatch.setattr(subspace, "chebyshev", lambda *given: passes.append(1) or chebyshev(*given))

    def count(matrices: Tensor, k: int, norms: Tensor | None) -> int:
        passes.clear()
        iterate(matrices, k, TOL, norms)
        return len(passes)

    assert count(steep, 6, steep.flatten(1).norm(dim=1)) == 1
    assert count(steep, 6, None) >= 2
    assert count(steep, 6, 2 * steep.flatten(1).norm(dim=1)) >= 2  # something is left beside
    assert count(flat, 6, flat.flatten(1).norm(dim=1)) >= 1


@pytest.mark.parametrize("n", [1, 7, 400])
@pytest.mark.parametrize("affine", [False, True])
def test_eigh_of_many_directions_is_that_of_each(n, affine):
    left, right, down = factors(D + affine, 4 * D, 130)
    tensor = BilinearTensor(left, right, down, affine)
    directions = torch.randn(n, 130, generator=generator(4))
    spectrum = tensor.eigh(directions, K)
    assert tensor.eigensolver(K, n=n).plan.iterate
    assert tensor.eigensolver(K, n=n).plan.table == (n > 130)
    assert spectrum.residuals is not None and spectrum.residuals.shape == (n, K)
    assert spectrum.residuals.max() <= TOL
    assert spectrum.affine == affine
    rows = torch.arange(n)[:: max(1, n // 7)]
    check(
        Pairs(spectrum.values, spectrum.vectors, spectrum.residuals),
        tensor.interaction(directions),
    )
    for row in rows.tolist():
        one = tensor.eigh(directions[row])
        torch.testing.assert_close(
            spectrum.values[row], one.values[:K], rtol=1e-4, atol=1e-5 * one.values[0].abs().item()
        )


@pytest.mark.parametrize("dead", [2, 6])
def test_outputs_that_nothing_writes_to_do_no_harm(dead):
    """Of few outputs, some or all are dead: their interactions are zero."""
    left, right, down = factors(D, 300, 6)
    down[:dead] = 0
    spectrum = BilinearTensor(left, right, down).eigh(torch.eye(6).repeat(2, 1), K)
    assert spectrum.residuals is not None and spectrum.residuals.max() <= TOL
    assert spectrum.values[:dead].abs().max() == 0
    assert (spectrum.values[dead:6].abs() > 0).all()


def test_a_spectrum_keeps_its_residuals_in_order():
    spectrum = BilinearTensor(*factors(20, 30, 4)).eigh(torch.eye(4))
    residuals = spectrum.residuals
    assert residuals is not None
    order = torch.tensor([[2, 0]]).expand(4, 2)
    for part, columns in (
        (spectrum.top(3), [0, 1, 2]),
        (spectrum.bottom(2), [-2, -1]),
        (spectrum.reordered(order), [2, 0]),
    ):
        assert part.residuals is not None and part.residuals.equal(residuals[:, columns])
    assert residuals.max() < TOL


def test_the_dense_way_takes_what_does_not_converge(monkeypatch):
    matrices = torch.stack([with_values(SPECTRA["falling slowly"], seed) for seed in range(3)])
    taken = []
    decompose = subspace.decompose
    monkeypatch.setattr(subspace, "decompose", lambda m, k: taken.append(len(m)) or decompose(m, k))
    check(iterate(matrices.float(), K, TOL), matrices)
    assert not taken
    found = iterate(matrices.float(), K, 1e-9)  # more than float32 can give
    assert sum(taken) == 3
    check(found, matrices)


def test_the_plan_follows_shape_pairs_and_memory():
    wide = {"d": 1024, "rank": 4096, "d_out": 1024, "itemsize": 4}
    widest = {"d": 4096, "rank": 11_008, "d_out": 4096, "itemsize": 4}
    narrow = {"d": 256, "rank": 1024, "d_out": 256, "itemsize": 4}
    assert plan(4096, k=8, memory=2**30, **narrow).table
    assert not plan(200, k=8, memory=2**30, **narrow).table  # fewer directions than outputs
    assert not plan(4096, k=8, memory=2**26, **narrow).table
    assert not plan(4096, k=64, memory=2**30, **narrow).iterate
    assert not plan(4096, k=8, memory=2**30, d=64, rank=256, d_out=64, itemsize=4).iterate
    assert plan(32_000, k=8, memory=2**31, **widest).factored
    assert not plan(32_000, k=8, memory=2**30, **wide).factored
    assert plan(32_000, k=8, memory=2**33, **wide).table
    for memory in (2**27, 2**28, 2**30):
        chosen = plan(32_000, k=8, memory=memory, **wide)
        assert (chosen.group + 3 * chosen.chunk) * 1024**2 * 4 < memory


def test_too_little_memory_says_how_much_is_needed(as_users):
    tensor = BilinearTensor(*factors(256, 512, 256))
    with pytest.raises(ValueError, match=r"memory=1000 .* at least (\d+)") as caught:
        tensor.eigh(torch.eye(256), 4, memory=1000)
    needed = int(str(caught.value).split("at least ")[1].split()[0])
    tensor.eigh(torch.eye(256)[:2], 4, memory=needed)
    with pytest.raises(ValueError, match="too little"):
        tensor.eigh(torch.eye(256)[:2], 4, memory=needed - 1)


@pytest.mark.parametrize("size", [1e-12, 1e-7, 1e9])
def test_weights_of_any_size(size):
    """Squares of such numbers leave the range of float32."""
    left, right, down = factors(D, 300, 4)
    one = BilinearTensor(left, right, down).eigh(torch.eye(4), K)
    other = BilinearTensor(size * left, size * right, down).eigh(torch.eye(4), K)
    torch.testing.assert_close(other.values / size**2, one.values, rtol=1e-4, atol=1e-4)
    assert other.residuals is not None and other.residuals.min() > 0
    assert other.residuals.max() <= TOL


def test_directions_may_be_none_and_interactions_must_be_finite(as_users):
    tensor = BilinearTensor(*factors(D, 300, 4))
    assert tensor.eigh(torch.zeros(0, 4), 2).values.shape == (0, 2)
    with pytest.raises(ValueError, match="not finite"):
        (tensor * 1e38).eigh(torch.eye(4) * 1e30, 2)


def test_a_layer_too_wide_for_the_default_memory_is_still_read(monkeypatch):
    """Only a budget that the caller gave is a reason to refuse."""
    tensor = BilinearTensor(*factors(D, 300, 4))
    given = []
    real = eigensolver.plan

    def small(*sizes: int, itemsize: int, memory: int) -> eigensolver.Plan:
        given.append(memory)
        return real(*sizes, itemsize=itemsize, memory=memory if len(given) > 1 else 10)

    monkeypatch.setattr(eigensolver, "plan", small)
    assert tensor.eigh(0).k == D
    assert len(given) == 2


def test_fast_products_leave_the_setting_as_it_was():
    settings = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before = settings.fp32_precision
    a, b = torch.randn(2, 300, 300, generator=generator())
    with fast_float32():
        product = a @ b
    assert settings.fp32_precision == before
    assert (product - a.double() @ b.double()).norm() < 1e-6 * product.norm()
