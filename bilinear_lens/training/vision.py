"""Training image classifiers: data in, a folder with model and card out."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bilinear_lens.models.checkpoints import check_new
from bilinear_lens.models.classifier import HookedBilinearClassifier
from bilinear_lens.models.fitting import FitRecipe
from bilinear_lens.training.card import made_by, shown_name
from bilinear_lens.training.images import load_images


def train_vision(
    out: str | Path,
    *,
    data: str | Path = "digits",
    model: dict[str, Any],
    recipe: FitRecipe,
    image_column: str | None = None,
    label_column: str | None = None,
    command: str | None = None,
) -> tuple[HookedBilinearClassifier, float]:
    """Train a classifier on labelled images and save it, with a card that says how it was made.

    Args:
        out: a new folder.
        data: as `load_images` takes it; it must have a "train" and a "test" split.
        model: fields of `ClassifierConfig`; inputs and classes are the data's.
        recipe: its seed is that of the initial weights, too.
        image_column: as `load_images` takes it, like `label_column`.
        command: what to run to make it again, for the card.

    Returns:
        The model, and its accuracy on the test split.

    Raises:
        ValueError: if `out` exists, the data cannot be loaded, or an option is out of range; all
            before training.
    """
    check_new(out)
    train, test = (
        load_images(data, split, image_column=image_column, label_column=label_column)
        for split in ("train", "test")
    )
    if test.names != train.names[: len(test.names)]:
        raise ValueError(
            f"The classes of the training split are {list(train.names)}, of the test split "
            f"{list(test.names)}: their numbers would not mean the same."
        )
    classifier = HookedBilinearClassifier.from_config(
        input_shape=tuple(train.images.shape[1:]),
        n_classes=len(train.names),
        labels=train.names,
        seed=recipe.seed,
        **model,
    )
    if torch.accelerator.is_available():
        classifier.to(torch.accelerator.current_accelerator())
    history = classifier.fit(
        train.images, train.labels, held_out=(test.images, test.labels), **asdict(recipe)
    )
    accuracy = history["held_out_accuracy"].iloc[-1]
    classifier.cpu().save_pretrained(
        out, card=_card(Path(out).name, classifier, recipe, shown_name(data), accuracy, command)
    )
    return classifier, accuracy


def _card(
    name: str,
    model: HookedBilinearClassifier,
    recipe: FitRecipe,
    data: str,
    accuracy: float,
    command: str | None,
) -> str:
    cfg = model.cfg
    options = ", ".join(
        f"{key} {value:g}" for key, value in asdict(recipe).items() if value is not None
    )
    return f"""\
---
tags: [bilinear, interpretability]
---
# {name}

An image classifier of {cfg.n_layers} bilinear layer(s) of width {cfg.d_model}, without norms\
{", residual" * cfg.residual}{", with biases" * cfg.bias}: {" x ".join(map(str, cfg.input_shape))} \
pixels to {cfg.n_classes} classes.

**Data**: {data}, its training split. **Accuracy** on its test split: {accuracy:.4f}.

**Recipe**: AdamW, cosine schedule; {options}.
{made_by(command)}
**Use**: `bilinear_lens.HookedBilinearClassifier.from_pretrained(...)`.
"""
