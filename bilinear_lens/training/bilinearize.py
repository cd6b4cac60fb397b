"""From a gated language model to a bilinear one, by training on the Hugging Face Trainer."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from bilinear_lens.training.annealing import GateAnnealing, check_schedule
from bilinear_lens.training.distillation import DistillationLoss, check_weights
from bilinear_lens.training.gates import gated_mlps, is_bilinear, least_squares_shifts
from bilinear_lens.training.runs import train, weights_digest
from bilinear_lens.training.windows import as_windows, first_windows

FIT_TOKENS = 16_384
FIT_TOKENS_PER_INPUT, LEAST_TOKENS_PER_INPUT = 16, 4
"""For the least-squares fit of the linear gates: so many tokens, and for wide layers so many for
each input. A fit on hardly more tokens than inputs is worse than none."""
BATCH_SIZE, LEARNING_RATE = 16, 2e-3
"""Windows at once on each device, and the highest learning rate, of `recommended_arguments`."""


@dataclass(frozen=True)
class BilinearizeRecipe:
    """How gates become linear; `TrainingArguments` say how the model is trained meanwhile.

    Raises:
        ValueError: if an option is out of range.
    """

    anneal: float = 0.0
    """Share of the steps over which beta falls from 1 to 0; 0 replaces the gates at once."""
    schedule: str = "linear"
    """How beta falls: linear, cosine, exponential or smootherstep."""
    layer_by_layer: bool = False
    """Layers become linear one after the other, not all together."""
    learn_scale: bool = False
    """Each neuron's scale c is trained."""
    least_squares: bool = True
    """Move the gates' weights, as beta falls, by what brings the linear gate nearest to the
    activation on the first windows of the text."""
    distill: float = 0.8
    """Weight of the KL divergence from the original's predictions, at first; the language-model
    loss has the rest."""
    distill_end: float = 0.0
    """The same at the end: it falls along a straight line."""
    train: Literal["all", "mlp", "gate"] = "all"
    """Which weights are trained: all, those of the MLPs, or those of their gates (in Phi-3 one
    weight with the other projection)."""

    def __post_init__(self) -> None:
        check_schedule(self.schedule, self.anneal)
        if not self.anneal and (self.layer_by_layer or self.schedule != "linear"):
            raise ValueError(
                f"schedule={self.schedule!r}, layer_by_layer={self.layer_by_layer}: with anneal=0 "
                "gates are not annealed; give a share of the steps."
            )
        check_weights(self.distill, self.distill_end)
        if self.train not in ("all", "mlp", "gate"):
            raise ValueError(f"train={self.train!r} must be 'all', 'mlp' or 'gate'.")


RECOMMENDED = BilinearizeRecipe()
"""What did best on `stories260k`; `notebooks/language_study.py` is the study."""


def recommended_arguments(output_dir: str | Path, **changes: Any) -> TrainingArguments:
    """Arguments for the Trainer that did best in the same study.

    Args:
        changes: any of `TrainingArguments`; `max_steps` or `num_train_epochs` at least.
    """
    settings = {
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.02,
        "adam_beta2": 0.95,
        "per_device_train_batch_size": BATCH_SIZE,
        "logging_nan_inf_filter": False,  # it hides what StopIfNotFinite must see
        "use_cpu": not torch.accelerator.is_available(),
        "logging_steps": 0.01,
        "save_steps": 0.1,
        "save_total_limit": 2,  # the last may have been saved with weights that are no good
        "report_to": "none",
    }
    return TrainingArguments(output_dir=str(output_dir), **{**settings, **changes})


def bilinearize(
    model: PreTrainedModel,
    dataset: Dataset | IterableDataset,
    *,
    args: TrainingArguments,
    recipe: BilinearizeRecipe = RECOMMENDED,
    tokenizer: PreTrainedTokenizerBase | None = None,
    n_ctx: int = 256,
    eval_dataset: Dataset | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    resume: bool = False,
) -> PreTrainedModel:
    """Finetune a gated language model (SwiGLU, GeGLU, ReGLU) into a bilinear one.

    The gate becomes `scale * z * sigmoid(beta z)` with beta from 1 to 0, or its like for GELU and
    ReLU, and is linear from then on; the scales are folded into the weights at the end. This is
    the annealing of arXiv 2410.08417, its section on finetuning, with what later work adds:
    schedules, a least-squares start and distillation. The recommended recipe does without
    annealing, `anneal=0`: beta is 0 from the first step on.

    The loss that is logged is the one that is trained on: with distillation that is no
    language-model loss, and grows while its weight falls. Evaluation gives the latter.

    Args:
        model: a Hugging Face causal language model whose layers all have gated MLPs: Llama,
            Mistral, Qwen 2 and 3, Gemma, Phi-3. It stays as it is; to teach, it moves to the
            device of the training.
        dataset: documents in a column "text", for which the tokenizer is needed, or windows of
            token ids in a column "input_ids". A stream is shuffled among a thousand windows and
            begins again where it ends.
        args: what the Trainer needs: where checkpoints go, steps, learning rate, precision,
            accumulation, FSDP, where to log. `recommended_arguments` has what did best for us.
        n_ctx: tokens of the windows that documents are cut into.
        eval_dataset: windows or documents on which the Trainer evaluates as `args` say.
        resume: go on from the last whole checkpoint in `args.output_dir`, which must be of the
            same model, text and settings.

    Returns:
        A stock model with `hidden_act="linear"`; `HookedBilinearTransformer.from_hf` takes it.
        A model that is bilinear already is returned as it is, with a warning.

    Raises:
        ValueError: before any training, if the model has no gated MLPs or gates of an activation
            that cannot be annealed, the text is too short or the tokenizer does not fit, or
            checkpoints of another run are in the way; during training, if the loss is not finite.
    """
    if is_bilinear(model):
        warnings.warn(f"{type(model).__name__} is bilinear already: nothing to do.", stacklevel=2)
        return model
    student = copy.deepcopy(model)
    if not args.fsdp:  # which spreads the weights itself
        student.to(args.device)  # pyright: ignore[reportArgumentType]
    windows = as_windows(dataset, tokenizer, model=student, n_ctx=n_ctx)
    held_out = eval_dataset
    if held_out is not None:
        held_out = as_windows(held_out, tokenizer, model=student, n_ctx=n_ctx)
    annealing = prepare(student, recipe, windows)
    annealing.check_arguments(args)
    weights = {"weight": recipe.distill, "end": recipe.distill_end}
    loss = DistillationLoss(student, model, **weights) if any(weights.values()) else None
    trained = train(
        student,
        windows,
        args=args,
        note={"recipe": asdict(recipe), "model": weights_digest(model)},
        held_out=held_out,
        callbacks=[annealing, *([loss] if loss else []), *callbacks],
        loss=loss,
        resume=resume,
    )
    if loss:
        loss.detach()
    bilinear = annealing.fold(trained).eval()
    if name := Path(model.config.name_or_path or "").name:
        bilinear.config.name_or_path = f"{name}-bilinear"
    for ours, theirs in zip(bilinear.parameters(), model.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
    return bilinear


def prepare(
    model: PreTrainedModel, recipe: BilinearizeRecipe, windows: Dataset | IterableDataset
) -> GateAnnealing:
    """Put annealed gates into a model, in place, and choose which of its weights are trained.

    Raises:
        ValueError: if the model has no gated MLPs, or gates of an activation without a family.
    """
    shifts = None
    if recipe.least_squares:
        shifts = least_squares_shifts(model, _fit_windows(model, windows))
    annealing = GateAnnealing(
        model,
        share=recipe.anneal,
        schedule=recipe.schedule,
        layer_by_layer=recipe.layer_by_layer,
        learn_scale=recipe.learn_scale,
        shifts=shifts,
    )
    annealing.set(0.0)  # at once where there is no annealing, before FSDP spreads the weights
    if recipe.train != "all":
        model.requires_grad_(False)
        for mlp in annealing.mlps:
            (mlp.module if recipe.train == "mlp" else mlp.gate).requires_grad_(True)
            mlp.annealed.requires_grad_(True)  # its scale, if that is learned
    return annealing


def _fit_windows(model: PreTrainedModel, windows: Dataset | IterableDataset) -> Tensor:
    """Windows enough to fit linear gates.

    Raises:
        ValueError: if there are too few.
    """
    n_inputs = gated_mlps(model)[0].gate.in_features
    n_ctx = first_windows(windows, 1).shape[1]
    some = first_windows(windows, -(-max(FIT_TOKENS, FIT_TOKENS_PER_INPUT * n_inputs) // n_ctx))
    least = LEAST_TOKENS_PER_INPUT * n_inputs
    if some.numel() < least:
        raise ValueError(
            f"The text has {some.numel()} tokens, too few to fit gates of {n_inputs} inputs by "
            f"least squares: give {least} or more, or least_squares=False."
        )
    return some
