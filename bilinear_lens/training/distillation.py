"""A loss that keeps a model's predictions near another's, for any Hugging Face Trainer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, TrainerCallback

IGNORED = -100
"""The label of positions that count in no loss."""


class DistillationLoss(TrainerCallback):
    """KL divergence from a frozen teacher's next-token predictions, mixed with the usual loss.

    Give it to `Trainer(compute_loss_func=..., callbacks=[...])`, the same object twice: as a
    callback it lets its weight fall by the step, and logs both losses apart, in nats per token:
    `language_loss`, and `divergence` from the teacher. A hook on the student sees what it reads,
    so the teacher reads the same.

    Args:
        student: the model that is trained.
        teacher: a model of the same vocabulary; it is not trained, teaches without dropout, and
            follows the student's device.
        weight: of the divergence, from 0 to 1; the language-model loss has the rest.
        end: what the weight has become at the last step, along a straight line; by default it
            stays.

    Raises:
        ValueError: if a weight is out of range or the vocabularies differ.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        *,
        weight: float,
        end: float | None = None,
    ) -> None:
        check_weights(weight, weight if end is None else end)
        if not (weight or end):
            raise ValueError("A weight of 0 is no distillation: leave the loss out.")
        ours, theirs = (model.config.get_text_config().vocab_size for model in (student, teacher))
        if ours != theirs:
            raise ValueError(
                f"The teacher has {theirs} tokens, the student {ours}: give a teacher of the same "
                "vocabulary."
            )
        self.teacher = teacher
        self.start, self.end = weight, weight if end is None else end
        self.weight = weight
        self._inputs: dict[str, Any] = {}
        self._seen: list[Tensor] = []
        self._hook = student.register_forward_pre_hook(self._remember, with_kwargs=True)

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.weight = self.start + (self.end - self.start) * state.global_step / state.max_steps

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if self._seen and logs is not None and "loss" in logs:
            language, divergence, n = torch.stack(self._seen).sum(0).tolist()
            logs |= {"language_loss": language / n, "divergence": divergence / n}
            self._seen.clear()

    def detach(self) -> None:
        """Take the hook off the student."""
        self._hook.remove()

    def _remember(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        names = ("input_ids", "attention_mask", "position_ids")
        self._inputs = dict(zip(names, args, strict=False)) | {
            name: kwargs[name] for name in names if kwargs.get(name) is not None
        }
        device = self._inputs["input_ids"].device.type
        # the Trainer computes the student in mixed precision, and nothing around it
        self._autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )
        self._training = module.training

    def __call__(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss of a batch, in nats per token; in evaluation the language-model loss alone.

        Args:
            outputs: the student's, with `logits`, [batch, seq, vocab].
            labels: token ids, [batch, seq]; positions with -100 do not count.
            num_items_in_batch: tokens of all batches that one step accumulates.
        """
        targets = labels[:, 1:]
        weight = self.weight if self._training else 0.0
        theirs = self._teach(outputs.logits.device) if weight else outputs.logits
        # one text at a time, computed again on the way back: at most one in float32
        losses = [
            checkpoint(_losses, *text, distilled=weight > 0, use_reentrant=False)
            for text in zip(outputs.logits[:, :-1], theirs[:, :-1], targets, strict=True)
        ]
        language, divergence = torch.stack(losses).sum(0)
        counted = (targets != IGNORED).sum()
        if weight:
            self._seen.append(torch.stack([language, divergence, counted]).detach())
        n = counted if num_items_in_batch is None else num_items_in_batch
        return ((1 - weight) * language + weight * divergence) / n

    @torch.no_grad()
    def _teach(self, device: torch.device) -> Tensor:
        """The teacher's logits for what the student has just read."""
        training = self.teacher.training
        self.teacher.to(device).eval()  # pyright: ignore[reportArgumentType]
        with self._autocast:
            logits = self.teacher(**self._inputs, use_cache=False).logits
        self.teacher.train(training)
        return logits


def _losses(ours: Tensor, theirs: Tensor, targets: Tensor, *, distilled: bool) -> Tensor:
    """The summed language-model loss of one text and its divergence, in float32."""
    log_probs = ours.float().log_softmax(-1)
    language = functional.nll_loss(log_probs, targets, ignore_index=IGNORED, reduction="sum")
    if not distilled:
        return torch.stack([language, torch.zeros_like(language)])
    taught = theirs.float().log_softmax(-1)
    divergence = functional.kl_div(log_probs, taught, reduction="none", log_target=True)
    return torch.stack([language, divergence.sum(-1).masked_fill(targets == IGNORED, 0.0).sum()])


def check_weights(start: float, end: float) -> None:
    """Refuse weights out of range.

    Raises:
        ValueError: naming them.
    """
    if not (0 <= start <= 1 and 0 <= end <= 1):
        raise ValueError(f"Weights of distillation, {start} to {end}, must be from 0 to 1.")
