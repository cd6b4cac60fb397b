"""Training a classifier: a plain loop, and the papers' regularisers as noise, hooks and penalties.

Input noise and salt-and-pepper change the images; latent noise and dropout are hooks on what each
layer reads; the L1 penalty is on all weights (arXiv 2410.08417, appendix B).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm
from transformer_lens import HookedRootModule

VANISHED = 1e-10
"""Outputs below this leave gradients that no optimizer can use."""


@dataclass(frozen=True)
class FitRecipe:
    """How to train a classifier.

    Raises:
        ValueError: if an option is out of range, or no number.
    """

    epochs: int = 20
    batch_size: int | None = None
    """By default 2048, or a twentieth of the inputs where those are few."""
    learning_rate: float = 1e-3
    """The highest: it falls to 0 by a cosine."""
    weight_decay: float = 1.0
    """AdamW's; it is what makes spectra steep."""
    input_noise: float = 0.0
    """Standard deviation of the Gaussian noise on each input (pixels run from 0 to 1)."""
    salt_and_pepper: float = 0.0
    """Share of the inputs set to 0 or 1."""
    latent_noise: float = 0.0
    """Gaussian noise on what each layer reads, relative to its own standard deviation."""
    dropout: float = 0.0
    """Share of what each layer reads that is set to 0."""
    l1: float = 0.0
    """Weight of the sum of all weights' magnitudes in the loss."""
    seed: int = 0
    """Of order and noise; `from_config` has its own, of the initial weights."""
    bf16: bool = False
    """Forward passes in bfloat16: about twice as fast on a recent CPU, with float32 weights."""

    def __post_init__(self) -> None:
        wrong = {}
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if value is None and field.default is None:
                continue
            lowest = 1 if name in ("epochs", "batch_size") else 0
            highest = 1 if name in ("dropout", "salt_and_pepper") else math.inf
            kind = Real if field.type is float else Integral
            # NaN is in no range
            if not isinstance(value, kind) or not lowest <= float(value) < highest:
                wrong[name] = value
        if wrong:
            raise ValueError(
                f"Out of range: {wrong}. epochs and batch_size are integers from 1, dropout and "
                "salt_and_pepper below 1, the seed is an integer, and nothing is negative."
            )


@torch.enable_grad()
def fit(
    model: HookedRootModule,
    data: tuple[Tensor, Tensor],
    recipe: FitRecipe,
    *,
    reads: Sequence[str],
    held_out: tuple[Tensor, Tensor] | None,
    progress: bool,
) -> pd.DataFrame:
    """Train in place on vectors and targets that were checked.

    Args:
        reads: names of the hooks at which latent noise and dropout act.

    Returns:
        See `HookedBilinearClassifier.fit`.

    Raises:
        ValueError: if the outputs vanish, or the loss is no finite number any more.
    """
    x, targets = data
    generator = torch.Generator(x.device).manual_seed(recipe.seed)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    batch_size = recipe.batch_size or max(1, min(2048, len(x) // 20))
    steps = recipe.epochs * -(-len(x) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    hooks = _regularisers(recipe, reads, generator)
    history = []
    with tqdm(total=steps, disable=not progress, desc="Training", unit="step") as bar:
        for epoch in range(1, recipe.epochs + 1):
            order = torch.randperm(len(x), generator=generator, device=x.device)
            total, before = _Total(), [weight.detach().clone() for weight in parameters]
            with model.hooks(fwd_hooks=hooks):
                for batch in order.split(batch_size):
                    with torch.autocast(x.device.type, torch.bfloat16, enabled=recipe.bf16):
                        out = model(_noisy(x[batch], recipe, generator))
                    if not (history or total.losses) and out.detach().abs().max() < VANISHED:
                        raise ValueError(
                            "The model's outputs vanish, so nothing can be learned: each layer "
                            "squares the scale of what it reads. Take fewer layers, or "
                            "residual=True."
                        )
                    loss = _loss(out, targets[batch])
                    total.add(loss, out, targets[batch])
                    if recipe.l1:
                        loss = loss + recipe.l1 * sum(weight.abs().sum() for weight in parameters)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.update()
            row = {"epoch": epoch, **total.means()}
            if not math.isfinite(row["loss"]):
                with torch.no_grad():
                    for weight, kept in zip(parameters, before, strict=True):
                        weight.copy_(kept)
                raise ValueError(
                    f"The loss is {row['loss']} in epoch {epoch}; the model keeps the weights that "
                    f"it had before: lower learning_rate={recipe.learning_rate}."
                )
            if held_out is not None:
                row |= {
                    f"held_out_{name}": value for name, value in _measure(model, *held_out).items()
                }
            history.append(row)
            bar.set_postfix(
                {name: f"{value:.4f}" for name, value in row.items()} | {"epoch": epoch}
            )
    return pd.DataFrame(history)


def check_targets(x: Tensor, targets: Tensor, n_classes: int, *, every_class: bool) -> None:
    """Refuse what a model cannot be trained or measured on.

    Args:
        x: inputs as vectors, `[n, d_in]`.
        every_class: whether each class needs an example.

    Raises:
        ValueError: if counts, shapes or ranges do not fit, or a class is empty.
    """
    if not isinstance(targets, Tensor):
        raise ValueError(
            f"The targets are {type(targets).__name__}; give a tensor: torch.as_tensor(targets)."
        )
    if x.shape[:1] != targets.shape[:1] or not len(x):
        raise ValueError(
            f"Inputs {list(x.shape)} and targets {list(targets.shape)}: give at least one input, "
            "and as many targets."
        )
    if targets.is_floating_point():
        if targets.shape != (len(x), n_classes) or not targets.isfinite().all():
            raise ValueError(
                f"Float targets {list(targets.shape)} must be finite and [{len(x)}, {n_classes}]; "
                "class numbers are integers."
            )
        return
    if targets.ndim != 1:
        raise ValueError(f"Class numbers {list(targets.shape)} must be [{len(x)}].")
    if targets.dtype == torch.bool:
        raise ValueError("Class numbers are integers, not bool: targets.long().")
    smallest, largest = int(targets.min()), int(targets.max())
    if smallest < 0 or largest >= n_classes:
        raise ValueError(
            f"Labels run from {smallest} to {largest}; this model has the classes 0 to "
            f"{n_classes - 1}."
        )
    if every_class:
        counts = torch.bincount(targets, minlength=n_classes)
        if empty := (counts == 0).nonzero().flatten().tolist():
            raise ValueError(
                f"The classes {empty} have no example: make the model with fewer classes, or "
                "give examples."
            )


def _loss(out: Tensor, targets: Tensor) -> Tensor:
    if targets.is_floating_point():
        return functional.mse_loss(out.float(), targets)
    return functional.cross_entropy(out.float(), targets)


class _Total:
    """Sums over batches, without waiting for the device at each."""

    def __init__(self) -> None:
        self.n, self.losses, self.hits = 0, [], []

    def add(self, loss: Tensor, out: Tensor, targets: Tensor) -> None:
        self.n += len(targets)
        self.losses.append(loss.detach() * len(targets))
        if not targets.is_floating_point():
            self.hits.append((out.detach().argmax(-1) == targets).sum())

    def means(self) -> dict[str, float]:
        sums = {"loss": self.losses, "accuracy": self.hits}
        return {name: sum(s).item() / self.n for name, s in sums.items() if s}  # pyright: ignore


@torch.no_grad()
def _measure(model: HookedRootModule, x: Tensor, targets: Tensor) -> dict[str, float]:
    """Loss and accuracy without noise."""
    total = _Total()
    for batch, batch_targets in zip(x.split(4096), targets.split(4096), strict=True):
        out = model(batch)
        total.add(_loss(out, batch_targets), out, batch_targets)
    return total.means()


def _noisy(x: Tensor, recipe: FitRecipe, generator: torch.Generator) -> Tensor:
    if recipe.input_noise:
        x = x + recipe.input_noise * _normal(x, generator)
    if recipe.salt_and_pepper:
        draw = torch.rand(x.shape, generator=generator, device=x.device)
        share = recipe.salt_and_pepper
        x = torch.where(draw < share, (draw < share / 2).to(x), x)
    return x


def _regularisers(
    recipe: FitRecipe, reads: Sequence[str], generator: torch.Generator
) -> list[tuple[str | Callable, Callable]]:
    def add_noise(x: Tensor, hook: object) -> Tensor:
        # of a single number there is no deviation: 0, not NaN
        deviation = x.detach().std(dim=-1, keepdim=True, correction=min(1, x.shape[-1] - 1))
        scale = recipe.latent_noise * deviation
        return x + scale * _normal(x, generator)

    def drop(x: Tensor, hook: object) -> Tensor:
        kept = torch.rand(x.shape, generator=generator, device=x.device) >= recipe.dropout
        return x * kept / (1 - recipe.dropout)

    chosen = [add_noise] * (recipe.latent_noise > 0) + [drop] * (recipe.dropout > 0)
    return [(name, hook) for name in reads for hook in chosen]


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
