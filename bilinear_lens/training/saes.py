"""Sparse autoencoders of a model's activations, trained by EleutherAI's sparsify.

Hook points are TransformerLens's, and of the model above the last of them nothing is computed.
"""

import contextlib
import io
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from bilinear_lens.models.activations import activations_at
from bilinear_lens.models.checkpoints import check_new
from bilinear_lens.models.saes import (
    SparseAutoencoder,
    embedding_digest,
    model_digest,
    width_at,
)
from bilinear_lens.training.reconstruction import Trained, packed_for, save_trained
from bilinear_lens.training.runs import check_run_folder, note_run, text_digest


@dataclass(frozen=True)
class SaeRecipe:
    """How sparse autoencoders are trained.

    Raises:
        ValueError: if an option is out of range.
    """

    expansion: int = 8
    """Latents for each dimension of the activation."""
    k: int = 32
    """Latents that are active at a token."""
    epochs: int = 1
    """Passes over the text."""
    batch_size: int = 16
    """Windows a step."""
    window: int = 256
    """Tokens that the model reads at a time, at most its context."""
    learning_rate: float | None = None
    """Adam's highest; None is sparsify's own, which falls with the root of the latents. It falls to
    0 along a straight line."""
    warmup: float = 0.05
    """Share of the steps over which it rises."""
    auxiliary: float = 1 / 32
    """Weight of the loss that revives dead latents (Gao et al., arXiv 2406.04093)."""
    dead_after: int = 500_000
    """Tokens without activation after which a latent is called dead in training."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("expansion", "k", "epochs", "batch_size", "dead_after"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more.")
        if self.window < 2:
            raise ValueError(f"window={self.window} must be 2 tokens or more.")
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0 and finite.")
        if not 0 <= self.warmup < 1 or not 0 <= self.auxiliary < float("inf"):
            raise ValueError(
                f"warmup={self.warmup} must be a share of the steps, and "
                f"auxiliary={self.auxiliary} 0 or more."
            )


def train_saes(
    model: TransformerBridge,
    text: Dataset | Sequence[str],
    hooks: str | Sequence[str],
    *,
    out: str | Path,
    held_out: Dataset | Sequence[str],
    recipe: SaeRecipe | None = None,
    resume: bool = False,
    command: str | None = None,
    data: str | None = None,
) -> dict[str, Trained[SparseAutoencoder]]:
    """Train sparse autoencoders of a model's activations, all at once, and save them.

    `out` gets a folder in sparsify's layout for each hook point, and a card with what they lose on
    held-out text. It appears whole; until then, a tenth of the run at a time,
    `<out>.checkpoints` holds what a killed run goes on from, to the same SAEs.

    Args:
        text: documents, or a dataset of them (`load_text`).
        hooks: names such as `blocks.2.mlp.hook_in`.
        resume: go on from the last whole checkpoint, which must be of the same run.
        command: the command line, for the card.
        data: name, origin and licence of the text, for the card.

    Returns:
        What came of each hook point.

    Raises:
        ValueError: before any training, if the extra `sae` is not installed, a hook point is not
            known or its activations are no vectors, the text is too short, `out` exists or
            checkpoints of another run are in the way; in training, if an activation is not finite.
    """
    recipe, out = recipe or SaeRecipe(), Path(out)
    hooks = [hooks] if isinstance(hooks, str) else list(hooks)
    trainer_class = _trainer()
    check_new(out)
    widths = {hook: width_at(model, hook) for hook in hooks}
    if len({id(model.hook_dict[hook]) for hook in hooks}) < max(1, len(hooks)):
        raise ValueError(f"hooks={hooks} must name at least one hook point, and each only once.")
    for hook, width in widths.items():
        if recipe.k > recipe.expansion * width:
            raise ValueError(
                f"k={recipe.k} is more than the {recipe.expansion * width} latents of {hook}."
            )
    windows = packed_for(model, text, window=recipe.window)
    packed_for(model, held_out, window=recipe.window)  # refuses what is too short, before training
    usable = len(windows) // recipe.batch_size * recipe.batch_size
    if not usable:
        raise ValueError(
            f"The text has {len(windows)} windows of {recipe.window} tokens, fewer than a batch of "
            f"{recipe.batch_size}: give more text, or a smaller batch_size."
        )
    digest = embedding_digest(model)
    digests = {hook: model_digest(model, hook) for hook in hooks}
    run = {"hooks": hooks, "recipe": asdict(recipe), "model": digest, "text": text_digest(windows)}
    checkpoints = Path(f"{out}.checkpoints")
    check_run_folder(checkpoints, run, resume=resume)
    note_run(checkpoints, run)

    epochs = [windows.shuffle(seed=recipe.seed + epoch) for epoch in range(recipe.epochs)]
    rows = concatenate_datasets([epoch.select(range(usable)) for epoch in epochs])
    rows = rows.select_columns("input_ids").with_format("torch")
    steps = len(rows) // recipe.batch_size
    with _quiet(model):
        trainer = trainer_class(
            _config(recipe, hooks, steps, checkpoints), rows, _Source(model, hooks)
        )
        last = _last(checkpoints)
        if last is not None:
            trainer.load_state(str(last))
        if trainer.global_step < steps:  # otherwise it was cut off after its last step
            trainer.fit()
    saes = {
        hook: SparseAutoencoder(
            encoder=coder.encoder.weight,
            decoder=coder.W_dec,
            encoder_bias=coder.encoder.bias,
            decoder_bias=coder.b_dec,
            hook_in=hook,
            hook_out=hook,
            k=recipe.k,
            model_digest=digests[hook],
        )
        for hook, coder in trainer.saes.items()
    }
    tokens = rows.num_rows * windows[0]["input_ids"].numel()
    trained = save_trained(
        out,
        model,
        saes,
        held_out,
        introduction=f"Sparse autoencoders (TopK, k = {recipe.k}) of activations of "
        f"`{model.cfg.model_name}`, trained by [sparsify](https://github.com/EleutherAI/sparsify) "
        f"on {tokens:,} tokens{f' of {data}' if data else ''}.",
        window=recipe.window,
        command=command,
    )
    shutil.rmtree(checkpoints)
    return trained


class _Source:
    """A model as sparsify's Trainer takes one, with hook points for modules."""

    def __init__(self, model: TransformerBridge, hooks: Sequence[str]) -> None:
        self.model, self.points = model, {hook: model.hook_dict[hook] for hook in hooks}
        self.base_model, self.device = self, torch.device(str(model.cfg.device))
        self.dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}

    def __call__(self, input_ids: Tensor) -> None:
        activations_at(self.model, input_ids, self.points)

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        return iter(self.points.items())

    def get_submodule(self, name: str) -> nn.Module:
        return self.points[name]

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.model.parameters()

    def requires_grad_(self, requires: bool) -> None:
        self.model.requires_grad_(requires)


@contextlib.contextmanager
def _quiet(model: TransformerBridge) -> Iterator[None]:
    """Without what sparsify prints, and leaving what it sets as it was before.

    Raises:
        ValueError: at an activation that is not finite.
    """
    frozen = {name: weight.requires_grad for name, weight in model.named_parameters()}
    precision = torch.get_float32_matmul_precision()
    from sparsify import sparse_coder, utils  # which print

    decoder = sparse_coder.decoder_impl
    if torch.device(str(model.cfg.device)).type == "cpu":  # where its Triton kernel cannot run
        sparse_coder.decoder_impl = utils.eager_decode
    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
            yield
    finally:
        sparse_coder.decoder_impl = decoder
        torch.set_float32_matmul_precision(precision)
        for name, weight in model.named_parameters():
            weight.requires_grad_(frozen[name])


def _trainer() -> type:
    """sparsify's Trainer, with checkpoints that are whole and can be gone on from exactly.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            from sparsify import Trainer
    except ImportError as error:
        raise ValueError(
            "Sparse autoencoders are trained by sparsify, which is not installed: "
            "pip install 'bilinear-lens[sae]'"
        ) from error

    class WholeCheckpoints(Trainer):
        def save(self) -> None:
            done, total = self.global_step, len(self.dataset) // self.cfg.batch_size  # pyright: ignore
            # in its loop, the step is counted after what it made is saved
            self.global_step = min(done + 1, total)
            folder = Path(self.cfg.save_dir) / f"checkpoint-{self.global_step}"
            partial = folder.with_name(f"{folder.name}.{os.getpid()}.part")
            self._checkpoint(self.saes, str(partial), True)
            if folder.exists():  # the end of a run that was resumed there
                shutil.rmtree(folder)
            partial.rename(folder)
            self.global_step = done
            for old in _checkpoints(Path(self.cfg.save_dir))[:-2]:
                shutil.rmtree(old)

    return WholeCheckpoints


def _config(recipe: SaeRecipe, hooks: Sequence[str], steps: int, folder: Path) -> Any:
    from sparsify import SparseCoderConfig, TrainConfig  # which prints

    return TrainConfig(
        SparseCoderConfig(expansion_factor=recipe.expansion, k=recipe.k),
        batch_size=recipe.batch_size,
        optimizer="adam",
        lr=recipe.learning_rate,
        lr_warmup_steps=round(recipe.warmup * steps),
        auxk_alpha=recipe.auxiliary,
        dead_feature_threshold=recipe.dead_after,
        hookpoints=list(hooks),
        init_seeds=[recipe.seed],
        save_every=max(1, steps // 10),
        save_dir=str(folder),
        log_to_wandb=False,
    )


def _checkpoints(folder: Path) -> list[Path]:
    found = [each for each in folder.glob("checkpoint-*") if re.fullmatch(r".*-\d+", each.name)]
    return sorted(found, key=lambda each: int(each.name.rsplit("-", 1)[1]))


def _last(folder: Path) -> Path | None:
    found = _checkpoints(folder)
    return found[-1] if found else None
