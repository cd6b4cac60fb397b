"""Explanations: what they list adds up to the logits, and wrong questions are refused."""

from itertools import product
from typing import Any

import pytest
import torch

from bilinear_lens import Explanation, HookedBilinearClassifier, explain_image
from bilinear_lens.analysis.explanation import REST

SHAPE, LABELS = (1, 3, 4), ("ant", "bee", "cow", "dog", "eel")
MODELS = list(product([1, 2], [False, True], [False, True]))  # layers, biases, residual


def a_model(n_layers: int = 1, *, bias: bool = False, residual: bool = False, seed: int = 0):
    model = HookedBilinearClassifier.from_config(
        input_shape=SHAPE,
        n_classes=len(LABELS),
        d_model=7,
        d_mlp=9,
        n_layers=n_layers,
        bias=bias,
        residual=residual,
        labels=LABELS,
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():  # large, so that a part left out shows
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / len(weight) ** 0.5)
    return model


def an_image(seed: int = 0) -> torch.Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed))


def rows_of(explanation: Explanation, label: str | None = None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = explanation.table.to_dict("records")  # pyright: ignore[reportAssignmentType]
    return [row for row in rows if label in (None, row["class"])]


def rests(explanation: Explanation) -> list[float]:
    """What the eigenvectors that are not listed add, without its sign."""
    return [abs(row["activation"]) for row in rows_of(explanation) if row["eigenvector"] == REST]


@pytest.mark.parametrize(("n_layers", "bias", "residual"), MODELS)
def test_activations_of_a_class_add_up_to_its_logit(n_layers, bias, residual):
    model = a_model(n_layers, bias=bias, residual=residual)
    with torch.no_grad():
        logits = model(an_image())
    found = explain_image(model, an_image(), classes=5, k=2)
    assert found.logits.index.tolist() == list(LABELS)
    assert found.logits.tolist() == pytest.approx(logits.tolist())
    assert found.prediction == LABELS[int(logits.argmax())]
    assert found.space == ("pixels" if n_layers == 1 else "hidden")
    for label, logit in zip(LABELS, logits.tolist(), strict=True):
        rows = rows_of(found, label)
        activations = [row["activation"] for row in rows]
        assert sum(activations) == pytest.approx(logit, abs=1e-5)
        assert sum(activations[:2]) != pytest.approx(logit, abs=1e-5)
        assert [row["eigenvector"] == REST for row in rows] == [False, False, True]
        assert abs(activations[0]) >= abs(activations[1])
        for row in rows[:2]:
            one = row["value"] * row["projection"] ** 2
            assert row["activation"] == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize(("n_layers", "bias", "residual"), MODELS)
def test_rows_are_the_eigenvectors_of_what_the_last_layer_reads(n_layers, bias, residual):
    model = a_model(n_layers, bias=bias, residual=residual)
    tensors = model.tensors()
    x = an_image().flatten()
    if n_layers == 2:
        _, cache = model.run_with_cache(an_image())
        x = cache["blocks.1.hook_resid_pre"].detach()
    found = explain_image(model, an_image(), classes=["dog", "bee"], k=3)
    assert found.spectrum.values.shape[0] == 2
    for i, label in enumerate(["dog", "bee"]):
        matrix = tensors[-1].interaction(LABELS.index(label))
        full = torch.cat([x, torch.ones(1)]) if tensors[-1].affine else x
        largest = torch.linalg.eigvalsh(matrix).abs().sort(descending=True).values
        everything = found.spectrum.activations(x)[i].abs().sort(descending=True).values
        for n, row in enumerate(rows_of(found, label)[:3]):
            number = int(row["eigenvector"])
            vector = found.spectrum.vectors[i, :, number]
            assert abs(row["value"]) == pytest.approx(largest[number].item(), rel=1e-4)
            torch.testing.assert_close(matrix @ vector, row["value"] * vector, atol=1e-5, rtol=1e-4)
            assert row["projection"] == pytest.approx((vector @ full).item(), abs=1e-5)
            assert abs(row["activation"]) == pytest.approx(everything[n].item(), abs=1e-5)


def test_classes_by_count_name_and_number():
    model = a_model()
    found = explain_image(model, an_image())
    top = found.logits.sort_values(ascending=False).index[:3].tolist()
    assert found.table["class"].unique().tolist() == top
    assert found.prediction == top[0]
    by_name = explain_image(model, an_image(), classes=["eel", "ant"])
    assert by_name.table["class"].unique().tolist() == ["eel", "ant"]
    mixed = explain_image(model, an_image(), classes=[4, "ant"])
    assert mixed.table.equals(by_name.table)
    (one,) = explain_image(model, an_image(), classes=1).table["class"].unique()
    assert one == top[0]


def test_every_eigenvector_listed_leaves_no_rest():
    model = a_model(2, bias=True, residual=True)
    n = explain_image(model, an_image()).spectrum.k
    found = explain_image(model, an_image(), classes=5, k=n)
    assert len(rests(found)) == 5 and max(rests(found)) < 1e-5
    assert min(rests(explain_image(model, an_image(), classes=5, k=1))) > 1e-4
    with pytest.raises(ValueError, match=f"k={n + 1} .* {n} eigenvectors"):
        explain_image(model, an_image(), k=n + 1)


def test_any_shape_of_one_image_is_the_same():
    model = a_model()
    found = explain_image(model, an_image())
    assert found.image.equal(an_image().flatten())
    for image in (an_image().flatten(), an_image()[None], an_image().double()):
        assert explain_image(model, image).table.equals(found.table)
    assert not explain_image(model, an_image(1)).table.equals(found.table)
    assert all(weight.grad is None for weight in model.parameters())
    assert torch.is_grad_enabled()


def test_it_is_readable():
    found = explain_image(a_model(), an_image(), classes=["bee"], k=2)
    lines = repr(found).splitlines()
    best, value = found.logits.idxmax(), found.logits.max()
    assert lines[0].startswith(f"logits: {best} {value:.2f}, ")
    assert lines[1].split() == ["class", "eigenvector", "value", "projection", "activation"]
    assert len(lines) == 5 and all("bee" in line for line in lines[2:])
    assert lines[4].split()[:2] == ["bee", "rest"]
    assert "nan" not in repr(found).lower() and "-1 " not in lines[4]
    assert found.table["eigenvector"].tolist()[-1] == REST  # only the text is changed


def test_wrong_questions_are_named(as_users):
    model, image = a_model(), an_image()
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"k={k} must be between 1"):
            explain_image(model, image, k=k)
    for classes in (0, -1, 6):
        with pytest.raises(ValueError, match=f"classes={classes} must be between 1 and 5"):
            explain_image(model, image, classes=classes)
    for unknown in ("fly", 5, -1):
        with pytest.raises(ValueError, match=f"no class {unknown!r}.*'ant'"):
            explain_image(model, image, classes=[unknown])
    with pytest.raises(ValueError, match="is empty or has a class twice"):
        explain_image(model, image, classes=[])
    for several in (torch.stack([image, image]), torch.zeros(2, 12)):
        with pytest.raises(ValueError, match="holds 2 images"):
            explain_image(model, several)
    with pytest.raises(ValueError, match="holds 0 images"):
        explain_image(model, torch.zeros(0, 12))
    for value in (torch.nan, torch.inf):
        bad = image.clone()
        bad[0, 1, 2] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            explain_image(model, bad)
    for shape in ((1, 4, 3), (13,), (3, 4, 1)):
        with pytest.raises(ValueError, match="do not fit"):
            explain_image(model, torch.zeros(shape))
    with pytest.raises(ValueError, match="floats"):
        explain_image(model, torch.zeros(SHAPE, dtype=torch.uint8))
