"""Spectra: order, signs, truncation and effective rank."""

import pytest
import torch

from bilinear_lens import Spectrum


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_spectrum(seed: int = 0, *batch: int) -> Spectrum:
    half = normal(seed, *batch, 5, 5)
    return Spectrum.of(half + half.mT)


def test_the_largest_magnitude_comes_first():
    values = a_spectrum(0, 3).values
    assert (values.abs().diff(dim=-1) <= 0).all()
    assert (values < 0).any() and (values > 0).any()
    assert not (values.diff(dim=-1) <= 0).all()


def test_of_opposite_eigenvalues_the_positive_comes_first():
    rotation = torch.linalg.qr(normal(1, 4, 4)).Q
    for diagonal in ([2.0, -2, 1, -1], [-1.0, 1, -2, 2]):
        exact = Spectrum.of(torch.diag(torch.tensor(diagonal)))
        assert exact.values.tolist() == [2, -2, 1, -1]
    turned = Spectrum.of(rotation @ torch.diag(normal(2, 4)) @ rotation.mT)
    assert (turned.values.abs().diff() <= 0).all()


def test_signs_do_not_depend_on_the_decomposition():
    spectrum = a_spectrum(0, 3)
    largest = spectrum.vectors.gather(-2, spectrum.vectors.abs().argmax(-2, keepdim=True))
    assert (largest > 0).all()
    flipped = Spectrum.signed(spectrum.values, -spectrum.vectors)
    torch.testing.assert_close(flipped.vectors, spectrum.vectors)


def test_oriented_makes_the_largest_projection_positive():
    spectrum, directions = a_spectrum(), normal(3, 7, 5)
    oriented = spectrum.oriented(directions)
    projections = oriented.projections(directions)
    assert (projections.abs().max(0).values == projections.max(0).values).all()
    torch.testing.assert_close(oriented.matrix(), spectrum.matrix())
    before = spectrum.projections(directions)
    assert not (before.abs().max(0).values == before.max(0).values).all()


def test_the_top_is_the_best_truncation_and_the_bottom_the_rest():
    spectrum = a_spectrum()
    top, bottom = spectrum.top(2), spectrum.bottom(3)
    torch.testing.assert_close(top.matrix() + bottom.matrix(), spectrum.matrix())
    lost = (spectrum.matrix() - top.matrix()).norm()
    torch.testing.assert_close(lost, spectrum.values[2:].norm())
    assert lost < (spectrum.matrix() - spectrum.bottom(2).matrix()).norm()


def test_effective_rank_counts_equal_eigenvalues():
    vectors = torch.eye(5)
    flat = Spectrum(torch.tensor([1.0, -1, 1, 1, -1]), vectors)
    steep = Spectrum(torch.tensor([1.0, 0, 0, 0, 0]), vectors)
    assert (flat.effective_rank().item(), steep.effective_rank().item()) == (5, 1)
    assert a_spectrum(0, 3).effective_rank().shape == (3,)


def test_bad_input_is_named(as_users):
    spectrum = a_spectrum()
    with pytest.raises(ValueError, match=r"values \[4\] and vectors \[5, 5\]"):
        Spectrum(spectrum.values[:4], spectrum.vectors)
    with pytest.raises(ValueError, match="k=6 must be between 1 and the 5"):
        spectrum.top(6)
    with pytest.raises(ValueError, match="single direction"):
        a_spectrum(0, 3).oriented(normal(3, 7, 5))
