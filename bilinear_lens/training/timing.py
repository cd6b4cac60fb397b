"""How long training takes: a clock that a resumed run takes up again, and the time of a step."""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from statistics import median

import torch
from accelerate import PartialState
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerState

from bilinear_lens.training.recipe import LanguageRecipe
from bilinear_lens.training.regularisers import latent_noise

WARM_UP, ROUNDS = 3, 11


class TrainingClock(TrainerCallback):
    """Puts "clock", seconds since the run began, into the Trainer's log, which checkpoints keep.

    What a run lost since its last checkpoint does not count.
    """

    state: TrainerState

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.state = state
        before = state.log_history[-1]["clock"] if state.log_history else 0.0
        self.start = time.perf_counter() - before

    def on_log(self, args, state, control, **kwargs) -> None:
        state.log_history[-1]["clock"] = time.perf_counter() - self.start


def training_seconds(state: TrainerState) -> float:
    """What a run with a `TrainingClock` took, without its evaluations."""
    evaluations = sum(row.get("eval_runtime", 0.0) for row in state.log_history)
    return state.log_history[-1]["clock"] - evaluations


def step_seconds(
    models: Mapping[str, PreTrainedModel],
    recipe: LanguageRecipe,
    batch: Int[Tensor, "batch n_ctx"],
) -> dict[str, float]:
    """The time of a training step of each model, which trains it a little.

    The models take turns, so that what else the machine does touches all of them alike; each
    time is the median of 11 steps, after 3 to warm up.

    Args:
        recipe: its batches, precision and regularisers.
        batch: a batch of the run's own shape.
    """
    steps = {name: _step(model, recipe, batch) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(WARM_UP + ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: median(taken[WARM_UP:]) for name, taken in times.items()}


def _step(model: PreTrainedModel, recipe: LanguageRecipe, batch: Tensor) -> Callable[[], None]:
    model.to(PartialState().device).train()  # pyright: ignore[reportArgumentType]
    tokens = batch.to(model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, fused=True)
    low = torch.autocast(model.device.type, torch.bfloat16) if recipe.bf16 else nullcontext()

    def step() -> None:
        with latent_noise(model, recipe.latent_noise):
            for _ in range(recipe.gradient_accumulation):
                with low:
                    loss = model(tokens, labels=tokens, use_cache=False).loss
                loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step
