"""Toys with a known answer: the generators, the readings, and that trained models hold them."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from bilinear_lens import BilinearTensor, HookedBilinearClassifier
from bilinear_lens.analysis.fourier import fourier_power
from bilinear_lens.analysis.polynomial import Multilinear, multilinear
from bilinear_lens.training.toys import OPERATIONS, boolean_pairs, modular_addition, pair_labels

N_BITS = 4
PAIRS = list(combinations(range(N_BITS), 2))
FIRST, SECOND = torch.tensor(PAIRS).mT
ON = 0.3
TRUTH = {  # the outputs for 00, 01, 10, 11; constant, linear and pair coefficient
    "and": ((0, 0, 0, 1), (0, 0, 1)),
    "or": ((0, 1, 1, 1), (0, 1, -1)),
    "xor": ((0, 1, 1, 0), (0, 1, -2)),
    "nand": ((1, 1, 1, 0), (1, 0, -1)),
    "nor": ((1, 0, 0, 0), (1, -1, 1)),
    "xnor": ((1, 0, 0, 1), (1, -1, 2)),
}
TOLERANCE = 0.05
P = 11


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_bits(n: int) -> Tensor:
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * n)


def test_every_operation_is_its_truth_table():
    assert set(OPERATIONS) == set(TRUTH)
    for operation, (table, _) in TRUTH.items():
        x, y = boolean_pairs(3, operation, n_samples=200, seed=5)
        expected = [
            [table[2 * int(row[i]) + int(row[j])] for i, j in ((0, 1), (0, 2), (1, 2))] for row in x
        ]
        assert y.tolist() == expected
        assert len(x.unique(dim=0)) == 8  # so that every case was seen


def test_bits_are_on_as_often_as_asked_and_follow_the_seed():
    x, _ = boolean_pairs(5, "xor", n_samples=4000, on=0.2, seed=1)
    assert set(x.unique().tolist()) == {0, 1}
    assert x.mean().item() == pytest.approx(0.2, abs=0.01)
    assert boolean_pairs(5, "xor", n_samples=4000, on=0.2, seed=1)[0].equal(x)
    assert not boolean_pairs(5, "xor", n_samples=4000, on=0.2, seed=2)[0].equal(x)


def test_pairs_are_named_in_the_order_of_the_targets():
    assert pair_labels(3, "and") == ("0 and 1", "0 and 2", "1 and 2")
    x, y = boolean_pairs(5, "and", n_samples=100)
    for k, label in enumerate(pair_labels(5, "and")):
        i, j = map(int, label.split(" and "))
        assert y[:, k].equal(x[:, i] * x[:, j])


def test_modular_addition_is_every_sum():
    x, labels = modular_addition(5)
    assert x.shape == (25, 10)
    a, b = x[:, :5].argmax(1), x[:, 5:].argmax(1)
    assert x[:, :5].sum(1).eq(1).all() and x[:, 5:].sum(1).eq(1).all()
    assert [(i % 5, i // 5) for i in range(25)] == list(zip(b.tolist(), a.tolist(), strict=True))
    assert labels.tolist() == [(i + j) % 5 for i in range(5) for j in range(5)]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: boolean_pairs(4, "implies", n_samples=1), "implies"),
        (lambda: boolean_pairs(1, "and", n_samples=1), "n_inputs=1"),
        (lambda: boolean_pairs(4, "and", n_samples=0), "n_samples=0"),
        (lambda: boolean_pairs(4, "and", n_samples=1, on=1.0), "on=1.0"),
        (lambda: pair_labels(4, "AND"), "AND"),
        (lambda: pair_labels(1, "and"), "n_inputs=1"),
        (lambda: modular_addition(1), "p=1"),
        (lambda: fourier_power(torch.ones(3, 8), 7), r"\[3, 8\].*p=7"),
        (lambda: fourier_power(torch.ones(3, 0), 7), r"\[3, 0\]"),
        (lambda: fourier_power(torch.ones(3, 4), 1), "p=1"),
        (lambda: fourier_power(torch.eye(7)[:2] - torch.eye(7)[0], 7), "zero"),
        (lambda: fourier_power(torch.full((7,), torch.nan), 7), "NaN"),
    ],
)
def test_what_makes_no_sense_is_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()


@pytest.mark.parametrize("affine", [False, True])
def test_the_polynomial_is_the_tensor_on_every_input_of_bits(affine):
    left, right, down = normal(0, 7, 5), normal(1, 7, 5), normal(2, 3, 7)
    tensor = BilinearTensor(left, right, down)
    if affine:
        tensor = BilinearTensor.with_biases(
            left, right, down, left_bias=normal(3, 7), down_bias=normal(4, 3)
        )
    found = multilinear(tensor)
    x = all_bits(5).double()
    torch.testing.assert_close(written_out(found, x), tensor(x))
    assert found.pairs.equal(found.pairs.mT) and not found.pairs.diagonal(dim1=1, dim2=2).any()
    assert found.constant.any() == affine
    assert not torch.allclose(written_out(found, x / 2), tensor(x / 2))  # bits only


def written_out(polynomial: Multilinear, x: Tensor) -> Tensor:
    """The polynomial, one term at a time."""
    out = polynomial.constant + sum(
        polynomial.linear[:, i] * x[:, i, None] for i in range(x.shape[1])
    )
    for i, j in combinations(range(x.shape[1]), 2):
        out = out + polynomial.pairs[:, i, j] * (x[:, i] * x[:, j])[:, None]
    return out


def test_tensors_that_agree_on_bits_have_one_polynomial():
    tensor = BilinearTensor.with_biases(
        normal(0, 7, 5), normal(1, 7, 5), normal(2, 3, 7), left_bias=normal(3, 7)
    )
    squares = BilinearTensor(torch.eye(5).double(), torch.eye(5).double(), normal(4, 3, 5))
    same = tensor.with_linear(-squares.down) + squares.with_linear(torch.zeros(3, 5).double())
    assert tensor.similarity(same) < 0.99
    torch.testing.assert_close(multilinear(same), multilinear(tensor))


def test_power_is_that_of_the_discrete_fourier_transform():
    for p in (6, 7):
        vectors = normal(0, 3, 2, p)
        turns = torch.arange(p, dtype=torch.float64)
        angles = 2 * torch.pi * turns[:, None] * turns / p
        power = (vectors @ angles.cos()) ** 2 + (vectors @ angles.sin()) ** 2
        expected = torch.zeros(3, 2, p // 2 + 1, dtype=torch.float64)
        for k in range(p):
            expected[..., min(k, p - k)] += power[..., k]
        torch.testing.assert_close(
            fourier_power(vectors, p), expected / expected.sum(-1, keepdim=True)
        )
        both = expected.sum(1) / expected.sum((1, 2))[:, None]
        torch.testing.assert_close(fourier_power(vectors.flatten(1), p), both)


def test_a_wave_of_any_phase_is_one_frequency_and_noise_is_none():
    turns = torch.arange(P, dtype=torch.float64)
    waves = torch.stack([(2 * torch.pi * 3 * turns / P + phase).cos() for phase in (0, 0.4, 2)])
    assert fourier_power(waves, P)[:, 3].tolist() == pytest.approx([1, 1, 1])
    noise = fourier_power(normal(0, 2000, P), P).mean(0)
    assert noise[1:].tolist() == pytest.approx([2 / P] * (P // 2), abs=0.02)


def boolean_model(operation: str, *, d_mlp: int = 12, seed: int = 0) -> HookedBilinearClassifier:
    x, y = boolean_pairs(N_BITS, operation, n_samples=512, on=ON, seed=seed)
    model = HookedBilinearClassifier.from_config(
        input_shape=(N_BITS,),
        n_classes=len(PAIRS),
        d_model=13,
        d_mlp=d_mlp,
        bias=True,
        labels=pair_labels(N_BITS, operation),
        seed=seed,
    )
    model.fit(
        x,
        y,
        epochs=500,
        batch_size=512,
        learning_rate=0.03,
        weight_decay=0.1,
        input_noise=0.0,
        progress=False,
    )
    return model


def polynomial_of(operation: str) -> Multilinear:
    """What the operation is, over all pairs."""
    constant, linear, pair = TRUTH[operation][1]
    own = torch.arange(len(PAIRS))
    linears = torch.zeros(len(PAIRS), N_BITS)
    linears[own, FIRST] = linears[own, SECOND] = float(linear)
    pairs = torch.zeros(len(PAIRS), N_BITS, N_BITS)
    pairs[own, FIRST, SECOND] = pairs[own, SECOND, FIRST] = float(pair)
    return Multilinear(torch.full((len(PAIRS),), float(constant)), linears, pairs)


def largest_error(found: Multilinear, expected: Multilinear) -> float:
    return max((one - other).abs().max().item() for one, other in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def boolean_polynomials() -> dict[str, Multilinear]:
    return {name: multilinear(boolean_model(name).tensors()[0]) for name in OPERATIONS}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_trained_toy_is_its_operation_and_no_other(operation, boolean_polynomials):
    expected = polynomial_of(operation)
    for trained_on, found in boolean_polynomials.items():
        error = largest_error(found, expected)
        assert error < TOLERANCE if trained_on == operation else error > 1 - TOLERANCE


def test_too_few_products_interfere_as_the_best_projection_does(boolean_polynomials):
    """Products and a bias make an affine space of outputs: the targets' principal components are
    the best of its size, and no pair's own coefficient is whole."""
    bits = all_bits(N_BITS)
    weight = (ON**bits * (1 - ON) ** (1 - bits)).prod(1)
    targets = bits[:, FIRST] * bits[:, SECOND]
    centred = (targets - weight @ targets) * weight[:, None].sqrt()
    components = torch.linalg.svdvals(centred).square() / len(PAIRS)

    def measures(polynomial: Multilinear) -> tuple[float, float, float]:
        """Loss, a pair's coefficient in its own output, and in the others'."""
        loss = (weight @ (written_out(polynomial, bits) - targets).square()).mean()
        on_pairs = polynomial.pairs[:, FIRST, SECOND]
        own = on_pairs.diagonal()
        return loss.item(), own.mean().item(), (on_pairs - own.diag()).abs().max().item()

    for d_mlp in (2, 4):
        loss, own, others = measures(multilinear(boolean_model("and", d_mlp=d_mlp).tensors()[0]))
        assert 1 <= loss / components[d_mlp:].sum().item() < 1.05
        assert own == pytest.approx(d_mlp / len(PAIRS), abs=0.03)
        assert others > 0.2
    loss, own, others = measures(boolean_polynomials["and"])
    assert loss < 1e-4 and own == pytest.approx(1, abs=TOLERANCE) and others < TOLERANCE


def test_modular_addition_is_made_of_few_frequencies():
    """Trained on all of Z_p^2: the question is not whether it generalises, but how it adds."""
    p = 17
    x, labels = modular_addition(p)
    model = HookedBilinearClassifier.from_config(
        input_shape=(2 * p,), n_classes=p, d_model=30, d_mlp=32
    )

    def concentration() -> float:
        """The strongest frequency's share of the first 4 eigenvectors of each class."""
        spectrum = model.tensors()[0].eigh(torch.eye(p) - 1 / p, k=4)
        return fourier_power(spectrum.vectors.mT, p).amax(-1).mean().item()

    random = fourier_power(normal(0, 2000, 2 * p), p).amax(-1).mean().item()
    assert model.accuracy(x, labels) < 0.2
    assert concentration() == pytest.approx(random, abs=0.05)
    model.fit(
        x,
        labels,
        epochs=500,
        batch_size=len(x),
        learning_rate=0.01,
        weight_decay=2.0,
        input_noise=0.0,
        progress=False,
    )
    assert model.accuracy(x, labels) == 1
    assert concentration() > 0.8 > 2 * random
