"""Truncation and whitening: against matrices written out, with orders, bounds and controls."""

import pytest
import torch
from torch import Tensor, einsum

from bilinear_lens import BilinearTensor, Spectrum, activation_spectrum, truncation_curve
from bilinear_lens.analysis.truncation import (
    by_activation,
    mean_activations,
    paired,
    truncation_errors,
)
from bilinear_lens.analysis.whitening import whiten

N_CLASSES, N_IN, RANK, N = 3, 7, 11, 50
EYE = torch.eye(N_CLASSES, dtype=torch.float64)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_tensor(seed: int = 0, *, rank: int = RANK, affine: bool = False) -> BilinearTensor:
    left, right = normal(seed, 2, rank, N_IN)
    down = normal(seed + 1, N_CLASSES, rank)
    if not affine:
        return BilinearTensor(left, right, down)
    biases = {"left_bias": normal(seed + 2, rank), "down_bias": normal(seed + 3, N_CLASSES)}
    return BilinearTensor.with_biases(left, right, down, **biases)


def skewed(n: int = N, seed: int = 9) -> Tensor:
    """Data of a covariance far from white, in no axis' direction."""
    axes = torch.linalg.qr(normal(5, N_IN, N_IN)).Q
    return normal(seed, n, N_IN) @ (torch.logspace(0, -1.5, N_IN)[:, None] * axes)


def with_constant(x: Tensor, affine: bool) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1).to(x)], 1) if affine else x


def some_labels(tensor: BilinearTensor, x: Tensor) -> Tensor:
    """The tensor's own predictions, a third of them made wrong."""
    labels = tensor(x).argmax(-1)
    return torch.where(torch.arange(len(x)) % 3 == 0, (labels + 1) % N_CLASSES, labels)


def kept_by_hand(spectrum: Spectrum, x: Tensor, k: int) -> Tensor:
    """Logits of the first k pairs of each class, by explicit matrices."""
    x = with_constant(x, spectrum.affine)
    logits = []
    for values, vectors in zip(spectrum.values, spectrum.vectors, strict=True):
        matrix = torch.zeros(len(vectors), len(vectors)).to(vectors)
        for i in range(k):
            matrix += values[i] * torch.outer(vectors[:, i], vectors[:, i])
        logits.append(einsum("ni,ij,nj->n", x, matrix, x))
    return torch.stack(logits, 1)


def orders(tensor: BilinearTensor, data: Tensor) -> dict[str, Spectrum]:
    spectrum = tensor.eigh(EYE)
    return {
        "magnitude": spectrum,
        "paired": paired(spectrum),
        "by activation": by_activation(spectrum, data),
        "orthogonal on data": activation_spectrum(tensor, EYE, data),
    }


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("rank", [2, RANK])
def test_a_curve_is_that_of_explicit_matrices(affine, rank):
    tensor, x = a_tensor(rank=rank, affine=affine), skewed()
    labels = some_labels(tensor, x)
    full = tensor(x).argmax(1)
    accuracy = (full == labels).double().mean().item()
    for name, spectrum in orders(tensor, x).items():
        ks = [2, 1, spectrum.k, 3]
        table = truncation_curve(spectrum, x, labels, ks=ks)
        assert table["k"].tolist() == ks
        lost = []
        for k, row in zip(ks, table.to_dict("records"), strict=True):
            predictions = kept_by_hand(spectrum, x, k).argmax(1)
            expected = (predictions == labels).double().mean().item()
            lost.append((predictions != full).any().item())
            assert row["accuracy"] == pytest.approx(expected), name
            assert row["lost"] == pytest.approx(accuracy - expected)
            assert row["agreement"] == pytest.approx((predictions == full).double().mean().item())
        assert lost[1] and not lost[2]  # one pair is not enough, and all are
        assert table["lost"].tolist()[2] == 0 and table["agreement"].tolist()[2] == 1


def test_the_rest_may_stand_at_its_mean():
    tensor, x = a_tensor(affine=True), skewed()
    labels = some_labels(tensor, x)
    spectrum = tensor.eigh(EYE)
    rest = mean_activations(spectrum, x)
    table = truncation_curve(spectrum, x, labels, ks=[2, 4], rest=rest)
    for k, accuracy in zip([2, 4], table["accuracy"], strict=True):
        logits = kept_by_hand(spectrum, x, k)
        means = (kept_by_hand(spectrum, x, spectrum.k) - logits).mean(0)
        expected = ((logits + means).argmax(1) == labels).double().mean().item()
        assert accuracy == pytest.approx(expected)
    without = truncation_curve(spectrum, x, labels, ks=[2, 4])
    assert without["accuracy"].tolist() != table["accuracy"].tolist()


def test_mean_activations_are_means_over_all_inputs():
    spectrum, x = a_tensor(affine=True).eigh(EYE), skewed(2500)  # more than one batch
    torch.testing.assert_close(mean_activations(spectrum, x), spectrum.activations(x).mean(0))


def test_paired_alternates_signs_until_one_runs_out():
    values = torch.tensor([[-9.0, 8, 7, 6, 5, -1], [6, -5, -4, -3, -2, -1]])
    spectrum = Spectrum(values, torch.eye(6).expand(2, 6, 6))
    expected = [[8, -9, 7, -1, 6, 5], [6, -5, -4, -3, -2, -1]]
    assert paired(spectrum).values.tolist() == expected
    shuffled = Spectrum(values.flip(1), spectrum.vectors.flip(2))
    assert paired(shuffled).values.tolist() == expected  # whatever the order before


@pytest.mark.parametrize("affine", [False, True])
def test_an_order_is_a_permutation(affine):
    tensor, x = a_tensor(affine=affine), skewed()
    spectrum = tensor.eigh(EYE)
    for ordered in (paired(spectrum), by_activation(spectrum, x)):
        assert ordered.affine == affine
        assert not ordered.values.equal(spectrum.values)
        torch.testing.assert_close(ordered.matrix(), spectrum.matrix())
        sorted_values = (each.values.sort(-1).values for each in (ordered, spectrum))
        torch.testing.assert_close(*sorted_values)


def test_by_activation_orders_by_mean_activations():
    spectrum, x = a_tensor().eigh(EYE), skewed()
    means = mean_activations(by_activation(spectrum, x), x).abs()
    assert (means.diff(dim=-1) <= 0).all()
    assert not (mean_activations(spectrum, x).abs().diff(dim=-1) <= 0).all()


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("rank", [2, RANK])
def test_an_activation_spectrum_is_the_same_matrix_with_uncorrelated_projections(affine, rank):
    tensor, x = a_tensor(rank=rank, affine=affine), skewed(400)
    spectrum = activation_spectrum(tensor, EYE, x)
    torch.testing.assert_close(spectrum.matrix(), tensor.interaction(EYE), atol=1e-8, rtol=1e-8)
    assert (spectrum.values.abs().diff(dim=-1) <= 1e-9).all()

    def moments(spectrum: Spectrum) -> Tensor:
        projections = with_constant(x, affine) @ spectrum.vectors
        return projections.mT @ projections / len(x)

    eye = torch.eye(spectrum.k).to(x)
    assert (moments(spectrum) - eye).abs().max() < 0.1  # the ridge, in the weakest direction
    assert (moments(tensor.eigh(EYE)) - eye).abs().max() > 0.5
    means = mean_activations(spectrum, x)
    torch.testing.assert_close(means[:, :2], spectrum.values[:, :2], atol=0.1, rtol=0.02)
    single = activation_spectrum(tensor, 1, x)
    torch.testing.assert_close(single.values, spectrum.values[1])


def test_pixels_that_never_change_keep_the_matrix():
    """In float32: what is seldom seen comes back from a division by almost nothing."""
    d = 40
    left, right, down = normal(0, d, d), normal(1, d, d), normal(2, N_CLASSES, d)
    tensor = BilinearTensor(left.float(), right.float(), down.float())
    x = normal(3, 100, d).float() * torch.logspace(1, -2, d)
    x[:, 5:25] = 0
    spectrum = activation_spectrum(tensor, 2, x)
    exact = tensor.interaction(2)
    assert spectrum.vectors.dtype == torch.float32
    assert (spectrum.matrix() - exact).norm() < 1e-5 * exact.norm()


def test_on_gaussian_data_no_order_has_a_lower_variance():
    """Of what is cut, `x^T D x`: 2 tr(D C D C) over Gaussian inputs of covariance C."""
    tensor, x = a_tensor(), skewed(400)
    c = x.mT @ x / len(x)
    found = orders(tensor, x)
    for k in range(1, N_IN):
        variances = {}
        for name, spectrum in found.items():
            cut = spectrum.matrix() - spectrum.top(k).matrix()
            variances[name] = 2 * einsum("oij,jk,okl,li->o", cut, c, cut, c)
        best = variances.pop("orthogonal on data")
        tail = found["orthogonal on data"].values[:, k:]
        torch.testing.assert_close(best, 2 * tail.square().sum(1), atol=0.03, rtol=0.01)
        for name, variance in variances.items():
            assert (best <= variance * 1.001 + 1e-9).all(), (name, k)
            assert k == N_IN - 1 or (best < 0.9 * variance).any(), (name, k)
    sample = skewed(20_000)
    spectrum = found["orthogonal on data"]
    cut = spectrum.activations(sample)[..., 2:].sum(-1)
    torch.testing.assert_close(
        cut.var(0), 2 * spectrum.values[:, 2:].square().sum(1), atol=0, rtol=0.5
    )


def test_with_nothing_in_place_of_the_mean_another_order_may_win():
    """Of diagonal Q = (5, -4, -4) on white data, the mean square error counts means: keeping a
    -4 leaves 5 - 4 = 1 to the mean, keeping the 5 leaves -8."""
    direction = torch.tensor([5.0, -4, -4], dtype=torch.float64)
    white = 3**0.5 * torch.eye(3, dtype=torch.float64)
    tensor = BilinearTensor(white, white / 3, direction[None])
    spectrum = activation_spectrum(tensor, 0, white)
    torch.testing.assert_close(spectrum.values.abs()[0].item(), 5.0, atol=1e-2, rtol=0)

    def error(cut: Tensor, *, mean: bool) -> float:
        return (2 * cut.square().sum() + mean * cut.sum() ** 2).item()

    largest, other = spectrum.values[1:], spectrum.values[[0, 2]]
    assert error(largest, mean=False) < error(other, mean=False)
    assert error(largest, mean=True) > error(other, mean=True)


@pytest.mark.parametrize("affine", [False, True])
def test_whitened_data_has_unit_moments_and_the_function_is_kept(affine):
    tensor, x = a_tensor(affine=affine), skewed(200)
    whitened, filters = whiten(tensor, x, ridge=1e-9)
    y = with_constant(x, affine) @ filters
    torch.testing.assert_close(y.mT @ y / len(y), torch.eye(y.shape[1]).to(y), atol=1e-4, rtol=0)
    torch.testing.assert_close(whitened(y), tensor(x))
    assert not whitened.affine
    single = whiten(a_tensor(affine=affine), x[:3])  # fewer inputs than coordinates
    torch.testing.assert_close(
        single.tensor(with_constant(x, affine) @ single.filters), tensor(x), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("affine", [False, True])
def test_no_input_moves_an_output_by_more_than_the_bound(affine):
    tensor, data = a_tensor(affine=affine), skewed()
    size = lambda x: with_constant(x, affine).square().sum(1)  # noqa: E731
    for name in ("magnitude", "paired"):
        spectrum = orders(tensor, data)[name]
        for k in (1, 3, 6, spectrum.k):
            worst = spectrum.values[:, k:].abs().amax(-1) if k < spectrum.k else torch.zeros(3)
            c = int(worst.argmax())
            x = data
            if k < spectrum.k:  # along the first eigenvector that is cut, and far out
                first = spectrum.vectors[c, :, k + int(spectrum.values[c, k:].abs().argmax())]
                x = torch.cat([data, 1e6 * (first[:N_IN] / first[-1] if affine else first)[None]])
            if affine and k < spectrum.k:
                x[-1] /= 1e6
            (row,) = truncation_errors(spectrum, x, ks=[k]).to_dict("records")
            assert row["bound"] == pytest.approx(worst.max().item())
            moved = (tensor(x) - kept_by_hand(spectrum, x, k)).abs() / size(x)[:, None]
            assert row["error"] == pytest.approx(moved.max().item(), abs=1e-9)
            assert row["error"] <= row["bound"] * (1 + 1e-9)
            if k < spectrum.k:
                assert row["error"] > 0.999 * row["bound"]  # reached, so no smaller bound holds
                (row,) = truncation_errors(spectrum, data, ks=[k]).to_dict("records")
                assert row["error"] < 0.999 * row["bound"]


@pytest.mark.parametrize("affine", [False, True])
def test_certified_predictions_do_not_change(affine):
    tensor = a_tensor(affine=affine)
    spectrum = tensor.eigh(EYE)
    values = spectrum.values * torch.logspace(0, -4, spectrum.k).to(spectrum.values)
    spectrum = Spectrum(values, spectrum.vectors, affine)
    x = skewed()
    ks = [1, 2, 4, 6, spectrum.k]
    table = truncation_errors(spectrum, x, ks=ks)
    full = kept_by_hand(spectrum, x, spectrum.k)
    sizes = with_constant(x, affine).square().sum(1)
    first, second = full.topk(2).values.mT
    for k, row in zip(ks, table.to_dict("records"), strict=True):
        unchanged = kept_by_hand(spectrum, x, k).argmax(1) == full.argmax(1)
        assert row["agreement"] == pytest.approx(unchanged.double().mean().item())
        certified = torch.zeros(len(x), dtype=torch.bool)
        for i in range(len(x)):
            bounds = [0.0 if k == spectrum.k else v[k:].abs().max().item() for v in values]
            best = int(full[i].argmax())
            certified[i] = all(
                full[i, best] - full[i, c] > (bounds[best] + bounds[c]) * sizes[i]
                for c in range(N_CLASSES)
                if c != best
            )
        assert row["certified"] == pytest.approx(certified.double().mean().item())
        assert unchanged[certified].all()
    assert table["certified"].is_monotonic_increasing
    certified = table["certified"].tolist()
    assert 0 < certified[1] < 1 and certified[4] == 1
    # the control: a hundredth of the bound would vouch for predictions that do change
    unchanged = kept_by_hand(spectrum, x, 1).argmax(1) == full.argmax(1)
    bound = values[:, 1:].abs().max()
    assert not unchanged[first - second > 0.02 * bound * sizes].all()


def test_the_bound_survives_float32_and_blank_inputs():
    tensor = a_tensor()
    left, right, down = (w.float() for w in (tensor.left, tensor.right, tensor.down))
    spectrum = BilinearTensor(left, right, down).eigh(EYE)
    steep = Spectrum(
        spectrum.values * torch.logspace(0, -9, spectrum.k), spectrum.vectors, spectrum.affine
    )
    x = torch.cat([skewed().float(), torch.zeros(1, N_IN)])
    table = truncation_errors(steep, x, ks=range(1, spectrum.k + 1))
    assert table.notna().to_numpy().all()
    assert (table["error"] <= table["bound"]).to_numpy().all()
    errors = table["error"].tolist()
    assert errors[0] > 0 and errors[-1] == 0


def test_bad_input_is_named(as_users):
    tensor, x = a_tensor(), skewed()
    labels = some_labels(tensor, x)
    spectrum = tensor.eigh(EYE)
    for ks in ([], [0], [1, 8], [-1]):
        for call in (
            lambda ks=ks: truncation_curve(spectrum, x, labels, ks=ks),
            lambda ks=ks: truncation_errors(spectrum, x, ks=ks),
        ):
            with pytest.raises(ValueError, match=r"between 1 and the 7"):
                call()
    one_class = tensor.eigh(0)
    batch_of_one = tensor.eigh(EYE[:1])
    for few in (one_class, batch_of_one):
        with pytest.raises(ValueError, match="spectrum of all classes"):
            truncation_curve(few, x, labels, ks=[1])
        with pytest.raises(ValueError, match="spectrum of all classes"):
            truncation_errors(few, x, ks=[1])
    with pytest.raises(ValueError, match="not orthonormal"):
        truncation_errors(activation_spectrum(tensor, EYE, x), x, ks=[1])
    nan = x.clone()
    nan[3, 2] = torch.nan
    for bad, named in ((nan, "NaN"), (x / 0, "NaN"), (x[:0], "at least one as a vector")):
        for call in (
            lambda bad=bad: truncation_curve(spectrum, bad, labels[: len(bad)], ks=[1]),
            lambda bad=bad: truncation_errors(spectrum, bad, ks=[1]),
            lambda bad=bad: by_activation(spectrum, bad),
            lambda bad=bad: activation_spectrum(tensor, EYE, bad),
        ):
            with pytest.raises(ValueError, match=named):
                call()
    with pytest.raises(ValueError, match=r"50 inputs and labels \[49\]"):
        truncation_curve(spectrum, x, labels[1:], ks=[1])
    with pytest.raises(ValueError, match=r"rest \[3, 2\]"):
        truncation_curve(spectrum, x, labels, ks=[1], rest=torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"\[n, 7\]"):
        truncation_curve(spectrum, x[:, 1:], labels, ks=[1])
    for ridge in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="ridge="):
            whiten(tensor, x, ridge=ridge)
    with pytest.raises(ValueError, match="all zero"):
        whiten(tensor, torch.zeros(4, N_IN))
    with pytest.raises(ValueError, match=r"\[n, 7\]"):
        whiten(tensor, x[:, 1:])
