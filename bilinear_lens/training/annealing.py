"""The way from a gated model to a bilinear one, as a callback for any Hugging Face Trainer."""

import math
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from bilinear_lens.training.gates import anneal_gates, fold_gates, gated_mlps

STEEPNESS = 4.0
"""Of the exponential schedule: its last tenth falls a fortieth as fast as its first."""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: t,
    "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2,
    "exponential": lambda t: math.expm1(-STEEPNESS * t) / math.expm1(-STEEPNESS),
    "smootherstep": lambda t: t**3 * (6 * t**2 - 15 * t + 10),
}
"""How far the gates have become linear, from 0 to 1, by the share `t` of the annealing."""


class GateAnnealing(TrainerCallback):
    """Anneals a model's gates while a Trainer trains it; `fold` then makes a stock model of it.

    Put it into `Trainer(callbacks=[...])` and call `fold()` after `train()`. Beta is saved with
    the weights, so that a resumed run goes on where it was.

    Args:
        model: a Hugging Face model with gated MLPs; its gates are replaced in place, and at first
            compute the same.
        share: of the steps, over which beta falls from 1 to 0; 0 makes the gates linear at once.
        schedule: linear, cosine, exponential or smootherstep.
        layer_by_layer: the layers become linear one after the other, from the first on, in equal
            parts of `share`; otherwise all together.
        learn_scale: whether each neuron's scale is trained.
        shifts: for each layer, what its gate's weights move by as beta falls, [d_mlp, d_model]
            (with a bias in the gate, another column); see
            `training.gates.least_squares_shifts`.

    Raises:
        ValueError: if the model has no gated MLPs, an option is out of range, or 16-bit weights
            are to move by steps that they cannot hold.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        share: float,
        schedule: str = "linear",
        layer_by_layer: bool = False,
        learn_scale: bool = False,
        shifts: Sequence[Tensor] | None = None,
    ) -> None:
        check_schedule(schedule, share)
        self.model = model
        self.share = share
        self.schedule = SCHEDULES[schedule]
        self.layer_by_layer = layer_by_layer
        self.shifts = shifts
        if shifts is not None and share and model.dtype.itemsize < 4:
            raise ValueError(
                f"The steps of a least-squares shift vanish in {model.dtype} weights: load the "
                "model in float32 (bf16=True still computes in bfloat16), or anneal=0."
            )
        self.mlps = anneal_gates(model, learn_scale=learn_scale)
        self._betas = [1.0] * len(self.mlps)  # known here, so that no step waits for the device

    def beta(self, progress: float, layer: int) -> float:
        """Of a layer's gate, after a share `progress` of all steps."""
        through = progress / self.share if self.share else 1.0
        if self.layer_by_layer:
            through = through * len(self.mlps) - layer
        return 1 - self.schedule(min(max(through, 0.0), 1.0))

    def check_arguments(self, args: TrainingArguments) -> None:
        """Refuse what the annealing cannot do.

        Raises:
            ValueError: if gates are to move bit by bit while FSDP has them spread over devices, or
                an earlier checkpoint, whose gates are not linear, may be taken at the end.
        """
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end may take a checkpoint whose gates are not linear yet: "
                "leave it out."
            )
        fsdp = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        if fsdp and self.shifts is not None and self.share:
            raise ValueError(
                "FSDP spreads the gates' weights over devices, where least-squares shifts cannot "
                "move them as beta falls: give least_squares=False, anneal=0, or no FSDP."
            )

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.check_arguments(args)
        self._betas = [mlp.annealed.beta.item() for mlp in self.mlps]  # of a resumed run

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.set(state.global_step / state.max_steps)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.set(state.global_step / state.max_steps)

    @torch.no_grad()
    def set(self, progress: float) -> None:
        """Set every gate for a share `progress` of all steps."""
        for layer, mlp in enumerate(self.mlps):
            # rounded as the buffer is, so that a resumed run moves by the same steps
            beta = torch.tensor(self.beta(progress, layer), dtype=torch.float32).item()
            fallen, self._betas[layer] = self._betas[layer] - beta, beta
            mlp.annealed.set(beta)
            if fallen and self.shifts is not None:
                shift, d_in = self.shifts[layer].to(mlp.gate.weight), mlp.gate.in_features
                parts = shift[:, :d_in], shift[:, d_in:].squeeze(1)
                for rows, part in zip(mlp.gate_rows(), parts, strict=False):
                    rows.add_(fallen * part)

    def fold(self, model: PreTrainedModel | None = None) -> PreTrainedModel:
        """Make the model a stock one with `hidden_act="linear"`, in place.

        Args:
            model: a copy of the annealed one, where training has left the weights there, as
                under FSDP.

        Raises:
            ValueError: if a gate is not linear yet: training has not come to its end.
        """
        model = model or self.model
        fold_gates(model, gated_mlps(model))
        return model


def check_schedule(schedule: str, share: float) -> None:
    """Refuse what is no schedule.

    Raises:
        ValueError: naming the schedules, or the range of the share.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} must be one of {', '.join(SCHEDULES)}.")
    if not 0 <= share <= 1:
        raise ValueError(f"{share} must be a share of the steps to anneal over, from 0 to 1.")
