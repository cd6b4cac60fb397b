"""Runs of the Hugging Face Trainer: their folders, what resumes them, what stops them."""

import copy
import hashlib
import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from jaxtyping import Int
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer import TRAINER_STATE_NAME

from bilinear_lens.training.text import pack

NOTE = "run.json"
"""In a folder of checkpoints: what run they are of."""


class StopIfNotFinite(TrainerCallback):
    """Stops a run before a gradient that is no number reaches the weights.

    What was saved before stays good, and the error says where it is.
    """

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if args.fp16:
            return  # its scaler skips such steps
        gradients = [p.grad for p in model.parameters() if p.grad is not None]  # pyright: ignore[reportOptionalMemberAccess]
        if torch.nn.utils.get_total_norm(gradients).isfinite():
            return
        saved = last_checkpoint(args.output_dir)
        kept = f"The last good checkpoint is {saved}." if saved else "No checkpoint was saved yet."
        raise ValueError(
            f"The loss or its gradient is not finite after {state.global_step} steps, with "
            f"learning rate {args.learning_rate:g}. {kept} Start again with a lower learning rate."
        )


def check_run_folder(folder: Path, run: Mapping[str, Any], *, resume: bool) -> None:
    """Refuse a folder of checkpoints in use, or one whose run this one does not go on with.

    Args:
        run: what decides the run, as JSON has it.

    Raises:
        ValueError: if the folder cannot be written, or holds something else.
    """
    parent = next(each for each in [folder, *folder.absolute().parents] if each.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"Cannot write {folder}: {parent} is no folder that you may write.")
    note = folder / NOTE
    if not note.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"{folder} is in use and holds no unfinished run: give a new folder, or remove it."
            )
        return
    if not resume:
        raise ValueError(
            f"{folder} holds an unfinished run: resume it (resume=True, --resume), or remove that "
            "folder."
        )
    noted = json.loads(note.read_text(encoding="utf-8"))
    asked = json.loads(json.dumps(run))
    if noted != asked:
        differing = [key for key in {**noted, **asked} if noted.get(key) != asked.get(key)]
        raise ValueError(
            f"{folder} holds another run: {', '.join(sorted(differing))} differ. Resume with what "
            f"{note} says, or remove that folder."
        )


def note_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Make a folder of checkpoints that says what run they are of."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / NOTE, json.dumps(run, indent=1))


def write_whole(file: Path, text: str) -> None:
    """Write a text file, which others see whole or not at all."""
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def last_checkpoint(folder: str | Path) -> Path | None:
    """Where a run goes on: its last whole checkpoint, or None where it has none."""
    # the Trainer writes its state last: a folder without was cut off
    whole = [state.parent for state in Path(folder).glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    return max(whole, key=lambda checkpoint: int(checkpoint.name.split("-")[1]), default=None)


def train(
    model: PreTrainedModel,
    windows: Dataset | IterableDataset,
    *,
    args: TrainingArguments,
    note: dict[str, Any],
    held_out: Dataset | IterableDataset | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    loss: Callable | None = None,
    resume: bool = False,
) -> PreTrainedModel:
    """Train a model in place, on the Trainer, in a folder that knows what run it holds.

    Args:
        note: what decides the run, beside the text and `args`.

    Returns:
        The model; under FSDP, which spreads it over devices, another one with its whole weights.

    Raises:
        ValueError: if `args.output_dir` holds another run, or one and `resume` is False; or if the
            loss is not finite.
    """
    folder = Path(args.output_dir or "trainer_output")
    note = {**note, **text_and_arguments(windows, args)}
    if args.process_index == 0:
        check_run_folder(folder, note, resume=resume)
        note_run(folder, note)
    use_cache = model.config.use_cache
    own = {name: each for name, each in vars(model).items() if name == "forward"}
    frozen = not all(p.requires_grad for p in model.parameters())
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=windows,  # pyright: ignore[reportArgumentType]
        eval_dataset=held_out,  # pyright: ignore[reportArgumentType]
        data_collator=_with_labels,
        callbacks=[StopIfNotFinite(), *callbacks],
        compute_loss_func=loss,
    )
    whole = _copy_without_hooks(model) if trainer.is_fsdp_enabled else None
    if args.gradient_checkpointing and frozen:
        model.enable_input_require_grads()
    checkpoint = last_checkpoint(folder) if resume else None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if args.gradient_checkpointing and frozen:
        model.disable_input_require_grads()
    if whole is not None:
        options = StateDictOptions(full_state_dict=True)
        spread: PreTrainedModel = trainer.model_wrapped  # pyright: ignore[reportAssignmentType]
        whole.load_state_dict(get_model_state_dict(spread, options=options))
        model = whole
    # what the Trainer leaves: no cache, and with 16 bits a forward that rounds to them
    model.config.use_cache = use_cache
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)
    if whole is None:
        vars(model).update(own)
    return model


def _copy_without_hooks(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model, {id(model._forward_pre_hooks): OrderedDict()})


def _with_labels(rows: list[dict[str, Any]]) -> dict[str, Any]:
    batch = default_data_collator(rows)
    return {"labels": batch["input_ids"], **batch}


def as_windows(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    model: PreTrainedModel,
    n_ctx: int,
) -> Dataset | IterableDataset:
    """Windows of token ids that a model can be trained on.

    Args:
        dataset: as for `bilinearize`.

    Raises:
        ValueError: if there are no windows, or the tokens are not the model's.
    """
    columns = dataset.column_names or list(next(iter(dataset), ()))
    if "input_ids" in columns:
        windows = dataset.with_format("torch")
    elif tokenizer is None:
        raise ValueError(
            f"The dataset has the columns {columns}: give windows of token ids (input_ids), or "
            "documents (text) and the model's tokenizer."
        )
    else:
        windows = pack(dataset, tokenizer, n_ctx=n_ctx, vocab_size=model.config.vocab_size)
    some = first_windows(windows, 4)
    if int(some.max()) >= model.config.vocab_size:
        raise ValueError(
            f"The windows hold token {int(some.max())}; the model has "
            f"{model.config.vocab_size}: its tokenizer is another."
        )
    training = model.training
    with torch.no_grad():
        loss = float(model.eval()(some.to(model.device), labels=some.to(model.device)).loss)
    model.train(training)
    if math.isnan(loss):
        raise ValueError("On the text the model has a loss of NaN: its weights are not finite.")
    if loss > math.log(model.config.vocab_size) + 1:
        raise ValueError(
            f"On the text the model has a loss of {loss:.2f} nats per token, worse than a guess "
            f"({math.log(model.config.vocab_size):.2f}): the tokenizer is not the model's."
        )
    return windows


def first_windows(windows: Dataset | IterableDataset, n: int) -> Int[Tensor, "n n_ctx"]:
    """The first `n` windows, or as many as there are.

    Raises:
        ValueError: if there are none, or they cannot be a batch to learn from.
    """
    rows = [row["input_ids"] for row in windows.take(n)]  # pyright: ignore[reportArgumentType, reportCallIssue]
    if not rows:
        raise ValueError("The text has no window: give more, or a smaller n_ctx.")
    lengths = {len(row) for row in rows}
    if len(lengths) > 1 or min(lengths) < 2:
        raise ValueError(
            f"The windows have {', '.join(map(str, sorted(lengths)))} tokens: they must be equally "
            "long, and two tokens at least."
        )
    return torch.stack(rows)


def weights_digest(model: PreTrainedModel) -> str:
    """A SHA-256 of a model's weights."""
    return tensors_digest(weight for _, weight in sorted(model.state_dict().items()))


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """A SHA-256 of what tensors hold."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def text_and_arguments(
    windows: Dataset | IterableDataset, args: TrainingArguments
) -> dict[str, Any]:
    """What decides a run, beside the model: the first windows of its text, and the arguments."""
    names = (
        "num_train_epochs",
        "max_steps",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "max_grad_norm",
        "seed",
        "bf16",
    )
    decisive = {name: getattr(args, name) for name in names}
    length = {"windows": len(windows)} if isinstance(windows, Dataset) else {}
    return {**decisive, **length, "text": tensors_digest([first_windows(windows, 8)])}
