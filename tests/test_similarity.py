"""Comparing and using eigenvectors: similarity, masks, legibility; laws with their controls."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, einsum

from bilinear_lens import BilinearTensor, Spectrum, adversarial_masks, masked_predictions
from bilinear_lens.analysis.legibility import (
    class_templates,
    compressibility,
    random_directions,
    smoothness,
    template_match,
)
from bilinear_lens.analysis.similarity import eigenvector_similarity, interaction_similarity

N_CLASSES, N_IN, RANK = 3, 13, 17
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


def spectrum_tensor(spectrum: Spectrum) -> BilinearTensor:
    """A tensor whose interactions are the spectrum's matrices, from other factors."""
    rows = spectrum.vectors.mT.flatten(0, 1)
    return BilinearTensor(rows, rows, torch.block_diag(*spectrum.values))


@pytest.mark.parametrize("affine", [False, True])
def test_interaction_similarity_is_that_of_dense_matrices(affine):
    a, b = a_tensor(affine=affine), a_tensor(50, rank=5, affine=affine)
    one, other = a.to_dense(), b.to_dense()
    expected = [
        (torch.trace(one[c] @ other[c]) / one[c].norm() / other[c].norm()).item()
        for c in range(N_CLASSES)
    ]
    assert interaction_similarity(a, b).tolist() == pytest.approx(expected)
    assert interaction_similarity(a, a * -2.5).tolist() == pytest.approx([-1] * N_CLASSES)
    assert max(map(abs, expected)) < 0.9


def test_other_factors_are_the_same_interactions_and_the_same_eigenvectors():
    tensor = a_tensor()
    order = torch.randperm(RANK, generator=torch.Generator().manual_seed(0))
    scale = normal(3, RANK, 1).exp()
    same = BilinearTensor(
        (tensor.right / scale)[order], (tensor.left * scale * 2)[order], tensor.down[:, order] / 2
    )
    again = spectrum_tensor(tensor.eigh(EYE))
    for other in (same, again):
        assert interaction_similarity(tensor, other).tolist() == pytest.approx([1] * N_CLASSES)
        cosines = eigenvector_similarity(tensor.eigh(EYE), other.eigh(EYE), k=4)
        torch.testing.assert_close(cosines, torch.ones(N_CLASSES, 4).to(cosines))


def test_degenerate_eigenvectors_rotate_and_interactions_do_not():
    values = torch.tensor([3.0, 3, -2, 1], dtype=torch.float64).expand(N_CLASSES, 4)
    vectors = torch.linalg.qr(normal(0, N_CLASSES, N_IN, 4)).Q
    turn = torch.eye(4, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    one, other = Spectrum(values, vectors), Spectrum(values, vectors @ turn)
    similarity = interaction_similarity(spectrum_tensor(one), spectrum_tensor(other))
    assert similarity.tolist() == pytest.approx([1] * N_CLASSES)
    cosines = eigenvector_similarity(one, other, k=3)
    expected = torch.tensor([0.6, 0.6, 1], dtype=torch.float64).expand(N_CLASSES, 3)
    torch.testing.assert_close(cosines, expected)


def test_eigenvectors_are_matched_by_their_rank_among_the_positive():
    vectors = torch.linalg.qr(normal(0, N_IN, 3)).Q
    one = Spectrum(torch.tensor([-9.0, 5, 2], dtype=torch.float64), vectors)
    other = Spectrum(torch.tensor([4.0, 1], dtype=torch.float64), -7 * vectors[:, 1:])
    cosines = eigenvector_similarity(one, other, k=2)  # of any sign, length and number of pairs
    torch.testing.assert_close(cosines, torch.ones(2).to(cosines))
    swapped = Spectrum(other.values.flip(0), other.vectors)
    assert eigenvector_similarity(one, swapped).item() == pytest.approx(0, abs=1e-12)


def test_similarities_of_what_cannot_be_compared(as_users):
    a, affine = a_tensor(), a_tensor(affine=True)
    spectrum = a.eigh(EYE)
    for other in (affine.eigh(EYE), a.eigh(EYE[:2]), a.eigh(0)):
        with pytest.raises(ValueError, match="same"):
            eigenvector_similarity(spectrum, other)
    positive = int((spectrum.values > 0).sum(-1).min())
    for k in (0, -1, positive + 1, N_IN + 1):
        with pytest.raises(ValueError, match=f"k={k} .* {positive}"):
            eigenvector_similarity(spectrum, spectrum, k=k)
    with pytest.raises(ValueError, match="biases"):
        interaction_similarity(a, affine)
    with pytest.raises(ValueError, match="3 and 2 outputs"):
        interaction_similarity(a, a.change_basis(outputs=EYE[:2]))
    silent = BilinearTensor(a.left, a.right, a.down * torch.tensor([[1], [0], [1]]))
    for zero in (silent, silent + (a + silent * -1) * 0.0, a + a * -1):
        with pytest.raises(ValueError, match=r"zero interaction.*1"):
            interaction_similarity(a, zero)


def test_similarity_of_float32_interactions_is_that_of_their_weights():
    """A layer whose large terms cancel: in float32 its Gram matrix would be rounding."""
    small = a_tensor()
    parts = (a_tensor(50) * 1e3, small, a_tensor(50) * -1e3)
    left, right, down = (
        torch.cat([getattr(part, name) for part in parts], dim=int(name == "down")).float()
        for name in ("left", "right", "down")
    )
    tensor = BilinearTensor(left, right, down)
    whole = BilinearTensor(left.double(), right.double(), down.double())
    expected = interaction_similarity(whole, small)
    found = interaction_similarity(tensor, small)
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=0)
    assert found.min() > 0.99


def test_a_mask_moves_its_own_eigenvector_alone():
    k, spectrum = 2, a_tensor().eigh(EYE)
    masks = adversarial_masks(spectrum, k=k)
    assert masks.shape == (N_CLASSES, k, N_IN)
    torch.testing.assert_close(masks.square().mean(-1), torch.ones(N_CLASSES, k).to(masks))
    vectors = []
    for values, columns in zip(spectrum.values, spectrum.vectors, strict=True):
        order = [i for i in values.argsort(descending=True).tolist() if values[i] > 0][:k]
        vectors += [columns[:, i] * columns[:, i].sum().sign() for i in order]
    stacked = torch.stack(vectors)
    x = normal(3, 5, N_IN)
    for number, mask in enumerate(masks.flatten(0, 1)):
        moved = (x + mask) @ stacked.mT - x @ stacked.mT
        assert (moved[:, number] > 0.1).all()
        others = [i for i in range(len(stacked)) if i != number]
        assert moved[:, others].abs().max() < 1e-9
    naive = stacked @ stacked.mT  # eigenvectors of different classes do move each other
    assert (naive - torch.eye(len(naive))).abs().max() > 0.1


def test_masks_stay_where_they_may_be():
    spectrum = a_tensor().eigh(EYE)
    where = torch.arange(N_IN) % 3 != 0
    masks = adversarial_masks(spectrum, k=2, where=where)
    assert not masks[..., ~where].any() and masks[..., where].all()
    torch.testing.assert_close(masks.square().mean(-1), torch.ones(3, 2).to(masks))
    free = adversarial_masks(spectrum, k=2)
    assert free[..., ~where].all()
    order = spectrum.values.argsort(-1, descending=True)[:, None, :2].expand(3, N_IN, 2)
    stacked = spectrum.vectors.gather(-1, order).mT.flatten(0, 1)
    for restricted, clean in ((masks, True), (free * where, False)):
        moved = stacked @ restricted.flatten(0, 1).mT
        others = moved - moved.diagonal().diag()
        assert (others.abs().max() < 1e-9) == clean


def test_an_eigenvector_without_a_side_has_a_mask():
    left = torch.zeros(N_CLASSES, N_IN, dtype=torch.float64)
    for c in range(N_CLASSES):
        left[c, 2 * c], left[c, 2 * c + 1] = 1, -1
    spectrum = BilinearTensor(left, left, EYE).eigh(EYE)
    masks = adversarial_masks(spectrum, k=1)
    assert masks.isfinite().all() and (masks.abs() > 1e-9).sum().item() == 2 * N_CLASSES


@pytest.mark.parametrize("affine", [False, True])
def test_masked_predictions_are_counted_by_hand(affine):
    tensor, x = a_tensor(affine=affine), normal(4, 40, N_IN)
    labels = torch.where(torch.arange(40) % 4 == 0, torch.arange(40) % 3, tensor(x).argmax(1))
    masks = adversarial_masks(a_tensor().eigh(EYE), k=2)
    sizes = [0.0, 0.7, 5]
    table = masked_predictions(tensor, x, labels, masks, sizes=sizes)
    assert len(table) == 2 * N_CLASSES * 2 * len(sizes)
    rows: list[dict[str, Any]] = table.to_dict("records")  # pyright: ignore[reportAssignmentType]
    weights = [row for row in rows if row["mask"] == "weights"]
    for row in weights:
        mask = masks[row["class"], row["eigenvector"]]
        right = taken = others = 0
        for image, label in zip(x, labels.tolist(), strict=True):
            prediction = int(tensor(image + row["size"] * mask).argmax())
            right += prediction == label
            if label != row["class"]:
                others += 1
                taken += prediction == row["class"]
        assert row["accuracy"] == pytest.approx(right / 40)
        assert row["targeted"] == pytest.approx(taken / others)
    clean = table[table["size"] == 0].groupby("class")[["accuracy", "targeted"]].nunique()
    assert (clean == 1).to_numpy().all()
    strong, none = ([row["targeted"] for row in weights if row["size"] == size] for size in (5, 0))
    assert sum(strong) / len(strong) > sum(none) / len(none) + 0.2


def test_the_control_is_the_same_mask_shuffled():
    """A tensor that adds up squared pixels: which pixels they are is all that a shuffle changes."""
    seen = []

    class Spy(BilinearTensor):
        def __call__(self, x):
            seen.append(x[0])
            return super().__call__(x)

    tensor = a_tensor()
    spy = Spy(tensor.left, tensor.right, tensor.down)
    masks = adversarial_masks(tensor.eigh(EYE), k=1)
    x = torch.zeros(6, N_IN, dtype=torch.float64)
    labels = torch.arange(6) % 3
    tables = [
        masked_predictions(spy, x, labels, masks, sizes=[2.0], seed=seed) for seed in (5, 5, 6)
    ]
    first, again, other = (seen[start : start + 6] for start in (0, 6, 12))
    for c in range(N_CLASSES):
        own, control = first[2 * c], first[2 * c + 1]
        torch.testing.assert_close(own, 2 * masks[c, 0])
        assert not control.equal(own)
        torch.testing.assert_close(control.sort().values, own.sort().values)
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert not first[1].equal(other[1]) and first[0].equal(other[0])
    assert tables[0].equals(tables[1])


def test_masks_that_cannot_be(as_users):
    tensor, x = a_tensor(), normal(4, 6, N_IN)
    spectrum, labels = tensor.eigh(EYE), torch.arange(6) % 3
    masks = adversarial_masks(spectrum, k=2)
    with pytest.raises(ValueError, match="without biases"):
        adversarial_masks(a_tensor(affine=True).eigh(EYE), k=2)
    with pytest.raises(ValueError, match="all classes"):
        adversarial_masks(tensor.eigh(0), k=2)
    poorest = int((spectrum.values > 0).sum(-1).min())
    for k in (0, -1, poorest + 1, 99):
        with pytest.raises(ValueError, match=f"poorest class has {poorest}"):
            adversarial_masks(spectrum, k=k)
    with pytest.raises(ValueError, match="linearly dependent on the 5 pixels"):
        adversarial_masks(spectrum, k=2, where=torch.arange(N_IN) < 5)
    with pytest.raises(ValueError, match="linearly dependent on the 13 pixels"):
        adversarial_masks(spectrum, k=5)  # 15 eigenvectors of 13 pixels
    for where in (torch.ones(N_IN), torch.ones(N_IN + 1, dtype=torch.bool)):
        with pytest.raises(ValueError, match="where is torch"):
            adversarial_masks(spectrum, k=2, where=where)
    with pytest.raises(ValueError, match=r"masks \[2, 2, 13\]"):
        masked_predictions(tensor, x, labels, masks[:2], sizes=[1])
    with pytest.raises(ValueError, match="All images are of class 1"):
        masked_predictions(tensor, x, torch.ones(6, dtype=torch.long), masks, sizes=[1])
    with pytest.raises(ValueError, match=r"6 inputs and labels \[5\]"):
        masked_predictions(tensor, x, labels[1:], masks, sizes=[1])
    with pytest.raises(ValueError, match="NaN"):
        masked_predictions(tensor, x / 0, labels, masks, sizes=[1])


SHAPE = (2, 9, 12)
SIZE = math.prod(SHAPE)


def images_of(function) -> Tensor:
    """A flat image of a function of channel, row and column."""
    axes = (torch.arange(n, dtype=torch.float64) for n in SHAPE)
    channel, row, column = torch.meshgrid(*axes, indexing="ij")
    return function(channel, row, column).flatten()


def test_noise_is_rough_and_ramps_are_smooth():
    noise = smoothness(normal(0, 300, 5, SIZE), SHAPE)
    assert noise.shape == (300, 5) and abs(noise.mean().item()) < 0.01
    ramp = images_of(lambda c, i, j: 2 * i + j - 13.5)
    checkerboard = images_of(lambda c, i, j: (-1.0) ** (i + j))
    stripes = images_of(lambda c, i, j: (-1.0) ** i + 0 * j)
    constant = images_of(lambda c, i, j: 0 * c - 3)
    found = smoothness(torch.stack([ramp, checkerboard, stripes, constant]), SHAPE)
    assert 0.75 < found[0] < 1
    assert found[1:].tolist() == pytest.approx([-1, 0, 1])
    turned = smoothness(ramp.view(SHAPE).mT.flatten(), SHAPE)  # the shape matters
    assert turned < found[0] - 0.1
    channels = images_of(lambda c, i, j: (-1.0) ** c)
    assert smoothness(channels, SHAPE).item() == pytest.approx(1)  # within channels only


def test_smoothness_is_a_mean_over_neighbours():
    image = normal(1, *SHAPE)
    c, h, w = SHAPE
    across = [image[k, i, j] * image[k, i, j + 1] for k in range(c) for i in range(h) for j in range(w - 1)]  # noqa: E501  # fmt: skip
    down = [image[k, i, j] * image[k, i + 1, j] for k in range(c) for i in range(h - 1) for j in range(w)]  # noqa: E501  # fmt: skip
    expected = (sum(across) / len(across) + sum(down) / len(down)) / 2 / image.square().mean()
    torch.testing.assert_close(smoothness(image.flatten(), SHAPE), expected)


def cosine(n: int, frequency: int) -> Tensor:
    """By its formula."""
    wave = [math.cos(math.pi * frequency * (j + 0.5) / n) for j in range(n)]
    return torch.tensor(wave, dtype=torch.float64) / math.sqrt(n / (1 if frequency == 0 else 2))


def test_single_waves_are_fully_compressible_and_noise_is_not():
    single = 1 / SIZE
    for down in (0, 1, 5):
        for across in (0, 3, 11):
            wave = torch.zeros(SHAPE, dtype=torch.float64)
            wave[1] = torch.outer(cosine(9, down), cosine(12, across))
            assert wave.norm().item() == pytest.approx(1)
            assert compressibility(wave.flatten(), SHAPE, share=single).item() == pytest.approx(1)
    noise = normal(0, 40, SIZE)
    for share in (single, 0.05, 0.5):
        assert compressibility(noise, SHAPE, share=share).max() < 0.96
    torch.testing.assert_close(compressibility(noise, SHAPE, share=1.0), torch.ones(40).double())


def test_compressibility_is_that_of_the_orthonormal_cosine_transform():
    image = normal(0, *SHAPE)
    rows = torch.stack([cosine(9, f) for f in range(9)])
    columns = torch.stack([cosine(12, f) for f in range(12)])
    torch.testing.assert_close(rows @ rows.mT, torch.eye(9).double())
    transformed = einsum("fi,gj,cij->cfg", rows, columns, image)
    try:
        from scipy.fft import dctn
    except ImportError:
        pass
    else:
        known = dctn(image.numpy(), axes=(1, 2), norm="ortho")
        torch.testing.assert_close(transformed, torch.as_tensor(known))
    energy = transformed.square().flatten().sort(descending=True).values
    for n in (1, 7, 108):
        found = compressibility(image.flatten(), SHAPE, share=n / SIZE)
        torch.testing.assert_close(found, energy[:n].sum() / energy.sum())


def test_templates_are_differences_of_means_and_match_themselves():
    images = normal(0, 30, SIZE)
    labels = torch.arange(30) % 5 % 4  # classes of different sizes
    templates = class_templates(images, labels, 4)
    means = torch.stack([images[labels == c].mean(0) for c in range(4)])
    expected = means - (means[0] + means[1] + means[2] + means[3]) / 4
    torch.testing.assert_close(templates, expected / expected.norm(dim=1, keepdim=True))
    assert not torch.allclose(means.mean(0), images.mean(0))
    match = template_match(-3 * templates, templates)
    torch.testing.assert_close(match, torch.ones(4).double())
    other = template_match(templates, templates.roll(1, 0))
    torch.testing.assert_close(other, (templates * templates.roll(1, 0)).sum(1).abs())
    assert other.max() < 0.9


def test_random_directions_live_where_the_images_do():
    images = normal(0, 7, 3) @ normal(1, 3, SIZE) + 5
    directions = random_directions(200, images, seed=3)
    torch.testing.assert_close(directions.norm(dim=1), torch.ones(200).double())
    span = torch.linalg.svd(images - images.mean(0), full_matrices=False).Vh[:3]
    torch.testing.assert_close(directions @ span.mT @ span, directions)
    white = random_directions(200, SIZE, seed=3)
    assert (white.double() @ span.mT).norm(dim=1).max() < 0.9
    torch.testing.assert_close(white.norm(dim=1), torch.ones(200))
    spread = random_directions(4000, images, seed=0)
    centred = images - images.mean(0)
    strongest = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    assert (spread @ strongest).square().mean() > 0.4  # of three directions
    for source in (images, SIZE):
        same = [random_directions(5, source, seed=seed) for seed in (1, 1, 2)]
        assert same[0].equal(same[1]) and not same[0].equal(same[2])


def test_what_is_no_image_is_refused(as_users):
    for shape in ((9, 12), (1, 9, 12), (216, 1, 1), (2, 108, 1)):
        with pytest.raises(ValueError, match="no images of shape"):
            smoothness(normal(0, SIZE), shape)
        with pytest.raises(ValueError, match="no images of shape"):
            compressibility(normal(0, SIZE), shape)
    for share in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="share="):
            compressibility(normal(0, SIZE), SHAPE, share=share)
    batch = normal(0, 3, SIZE)
    for value in (0.0, float("nan"), float("inf")):
        bad = batch.clone()
        bad[1] = value
        for measure in (smoothness, compressibility):
            with pytest.raises(ValueError, match="zero, NaN or infinite"):
                measure(bad, SHAPE)
    images, labels = normal(0, 6, SIZE), torch.tensor([0, 2, 2, 0, 2, 4])
    with pytest.raises(ValueError, match=r"\[1, 3\] have no image"):
        class_templates(images, labels, 5)
    with pytest.raises(ValueError, match="from 0 to 3"):
        class_templates(images, labels, 4)
    with pytest.raises(ValueError, match="6 images need a label each"):
        class_templates(images, labels[:5], 5)
    with pytest.raises(ValueError, match="no template"):
        class_templates(images, torch.zeros(6, dtype=torch.long), 1)
    for same in (images[:1], images[:1].expand(4, SIZE)):
        with pytest.raises(ValueError, match="all the same"):
            random_directions(2, same, seed=0)


def test_a_shuffled_mask_stays_where_masks_may_be():
    tensor = BilinearTensor(normal(0, 4, 7), normal(1, 4, 7), normal(2, 3, 4))
    masks = torch.zeros(3, 1, 7, dtype=torch.float64)
    masks[:, :, 2] = 1.0  # one pixel: a shuffle within it changes nothing
    x, labels = normal(3, 20, 7), torch.arange(20) % 3
    table = masked_predictions(tensor, x, labels, masks, sizes=[2.0])
    kinds = table.set_index(["mask", "class"])[["accuracy", "targeted"]]
    assert kinds.loc["weights"].equals(kinds.loc["shuffled"])
    masks[:, :, 5] = -3.0
    table = masked_predictions(tensor, x, labels, masks, sizes=[2.0], seed=1)
    kinds = table.set_index(["mask", "class"])[["accuracy", "targeted"]]
    assert not kinds.loc["weights"].equals(kinds.loc["shuffled"])
