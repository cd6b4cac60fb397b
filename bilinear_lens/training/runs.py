"""Runs of the Hugging Face Trainer: their folders, what resumes them, what stops them."""

import copy
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer import TRAINER_STATE_NAME

from bilinear_lens.training.windows import endless, with_labels

NOTE = "run.json"
"""In a folder of checkpoints: what run they are of."""

_FINISHED = "finished"
"""In the note of a run that came to its end."""

_INDIFFERENT = re.compile(
    "output_dir|run_name|project|trackio_.*|report_to|log_.*|logging_.*|disable_tqdm|debug"
    "|include_num_input_tokens_seen|skip_memory_metrics|torch_empty_cache_steps"
    "|save_.*|enable_jit_checkpoint|resume_from_checkpoint|restore_callback_states_.*"
    "|hub_.*|push_to_hub|do_.*|eval_.*|per_device_eval_batch_size|prediction_loss_only"
    "|include_for_metrics|batch_eval_metrics|(bf16|fp16)_full_eval"
    "|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor)"
    "|dataloader_(multiprocessing_context|in_order)|ddp_(backend|timeout)|local_rank|use_cpu"
)
"""Arguments that do not decide what a run makes: where it is, what it says and saves."""


_POSITIVE = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps")


class StopIfNotFinite(TrainerCallback):
    """Stops a run before a gradient that is no number reaches the weights.

    What was saved before stays good, and the error says where it is.
    """

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if args.fp16:
            return  # its scaler skips such steps
        gradients = [p.grad for p in model.parameters() if p.grad is not None]  # pyright: ignore[reportOptionalMemberAccess]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            self._stop(args, state)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        # a scaler that skips every step never ends by itself
        if not math.isfinite((logs or {}).get("loss", 0.0)):
            self._stop(args, state)

    def _stop(self, args, state) -> NoReturn:
        # one of this very step has the weights that the loss is not finite with
        saved = last_checkpoint(args.output_dir, before=state.global_step)
        kept = f"The last good checkpoint is {saved}." if saved else "No good one was saved yet."
        raise ValueError(
            f"The loss or its gradient is not finite after {state.global_step} steps, with "
            f"learning rate {args.learning_rate:g}. {kept} Start again with a lower learning rate, "
            f"in another folder than {args.output_dir}."
        )


class NoCheckpointAtEnd(TrainerCallback):
    """Leaves out the checkpoint of the last step, from which a resumed Trainer takes one more."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False

    on_epoch_end = on_step_end  # with checkpoints by the epoch, the last one too


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
    noted = json.loads(note.read_text(encoding="utf-8"))
    finished = noted.pop(_FINISHED, False)
    if not resume and finished:
        last = last_checkpoint(folder)
        where = f"; its last checkpoint is {last}" if last else ""
        raise ValueError(
            f"{folder} holds a run already, which came to its end{where}: go on with it "
            "(resume=True, --resume), or give another folder."
        )
    if not resume:
        raise ValueError(
            f"{folder} holds an unfinished run: resume it (resume=True, --resume), or remove that "
            "folder."
        )
    asked = json.loads(json.dumps(run))
    differing = [key for key in {**noted, **asked} if noted.get(key) != asked.get(key)]
    if differing:
        shown = sorted(_difference(key, noted.get(key), asked.get(key)) for key in differing)
        raise ValueError(
            f"{folder} holds another run: {', '.join(shown)} differ. Resume with what {note} says, "
            "or remove that folder."
        )


def _difference(key: str, noted: Any, asked: Any) -> str:
    """A key, with both values where they are short."""
    values = json.dumps(noted), json.dumps(asked)
    return key if max(map(len, values)) > 20 else f"{key} ({values[0]}, not {values[1]})"


def note_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Make a folder of checkpoints that says what run they are of."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / NOTE, json.dumps(run, indent=1))


def note_end(folder: Path) -> None:
    """Say in a run's note that it came to its end."""
    note = folder / NOTE
    noted = json.loads(note.read_text(encoding="utf-8"))
    write_whole(note, json.dumps({**noted, _FINISHED: True}, indent=1))


def remove_run(folder: Path, logs: Path) -> None:
    """Remove a run's folder, but keep what it wrote for TensorBoard, in a folder `logs`."""
    for written in folder.glob("runs/*"):
        logs.mkdir(parents=True, exist_ok=True)
        shutil.move(written, logs / written.name)
    shutil.rmtree(folder)


def write_whole(file: Path, text: str) -> None:
    """Write a text file, which others see whole or not at all."""
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def last_checkpoint(folder: str | Path, *, before: int | None = None) -> Path | None:
    """Where a run goes on: its last whole checkpoint, or None where it has none.

    Args:
        before: a step that it must come before.
    """
    # the Trainer writes its state last: a folder without, or with a part of it, was cut off
    states = Path(folder).glob(f"checkpoint-*/{TRAINER_STATE_NAME}")
    whole = {
        int(state.parent.name.split("-")[1]): state.parent for state in states if _is_json(state)
    }
    return whole.get(max((n for n in whole if before is None or n < before), default=-1))


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def check_reporting(report_to: str | Sequence[str]) -> None:
    """Refuse what the Trainer cannot log to.

    Raises:
        ValueError: if it is not installed, or not known.
    """
    known = get_available_reporting_integrations()
    for each in [report_to] if isinstance(report_to, str) else report_to:
        if each not in ("none", "all", *known):
            raise ValueError(
                f"report_to={each!r} is not installed, or is nothing that the Trainer can log to; "
                f"it can to {', '.join(['none', *known])}."
            )


def check_arguments(windows: Dataset | IterableDataset, args: TrainingArguments) -> None:
    """Refuse what a run cannot be made with.

    Raises:
        ValueError: if `args.report_to` is not installed, the text is a stream and `args` do not say
            how many steps, a number is out of range, or the Trainer would copy the model to several
            devices in one process.
    """
    check_reporting(args.report_to or "none")
    if isinstance(windows, IterableDataset) and args.max_steps <= 0:
        raise ValueError(
            "The end of a stream is not known: say in the arguments for how many steps to train "
            f"(max_steps={args.max_steps})."
        )
    for name in _POSITIVE:
        if (value := getattr(args, name)) <= 0:
            raise ValueError(f"{name}={value} must be above 0.")
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        raise ValueError(
            f"max_steps={args.max_steps} and num_train_epochs={args.num_train_epochs:g} leave no "
            "step to take."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"This process sees {args.n_gpu} GPUs, among which the Trainer would split each batch: "
            "start a process for each, with torchrun or accelerate launch."
        )


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
        ValueError: as `check_arguments` does, if `args.output_dir` holds another run, or one and
            `resume` is False, or if the loss is not finite.
    """
    folder = Path(args.output_dir or "trainer_output")
    check_arguments(windows, args)
    if model.dtype.itemsize < 4:
        warnings.warn(
            f"Small steps vanish in {model.dtype} weights: load the model in float32 (bf16=True "
            "still computes in bfloat16).",
            stacklevel=3,
        )
    note = {**note, **text_and_arguments(windows, args)}
    if isinstance(windows, IterableDataset):
        windows = endless(windows, seed=args.seed)
    if args.process_index == 0:
        check_run_folder(folder, note, resume=resume)
        note_run(folder, note)
    PartialState().wait_for_everyone()
    args = copy.copy(args)  # another, since it hides what StopIfNotFinite must see
    args.logging_nan_inf_filter = False
    had_cache = vars(model.config).get("use_cache")
    own = {name: each for name, each in vars(model).items() if name == "forward"}
    frozen = not all(p.requires_grad for p in model.parameters())
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=windows,  # pyright: ignore[reportArgumentType]
        eval_dataset=held_out,  # pyright: ignore[reportArgumentType]
        data_collator=with_labels,
        callbacks=[StopIfNotFinite(), NoCheckpointAtEnd(), *callbacks],
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
        spread: PreTrainedModel = trainer.model_wrapped  # pyright: ignore[reportAssignmentType]
        model = _gather(spread, whole, args)
    # what the Trainer leaves: no cache, and with 16 bits a forward that rounds to them
    if had_cache is None:
        vars(model.config).pop("use_cache", None)
    else:
        model.config.use_cache = had_cache
    for name in ("forward", "_original_forward"):
        vars(model).pop(name, None)
    if whole is None:
        vars(model).update(own)
    if args.process_index == 0:
        note_end(folder)
    return model


def _gather(
    spread: PreTrainedModel, whole: PreTrainedModel, args: TrainingArguments
) -> PreTrainedModel:
    """Put a spread model's weights into a whole one: a device holds no more than one at a time."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    # the main process alone has them
    weights: dict[str, Any] = get_model_state_dict(spread, options=options)
    for name, weight in whole.state_dict().items():
        each = weights[name] if args.process_index == 0 else weight
        weight.copy_(broadcast(each.to(args.device, weight.dtype, copy=True)))  # pyright: ignore[reportArgumentType]
    return whole


def _copy_without_hooks(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model, {id(model._forward_pre_hooks): OrderedDict()})


def weights_digest(model: PreTrainedModel) -> str:
    """A SHA-256 of a model's weights."""
    return tensors_digest(weight for _, weight in sorted(model.state_dict().items()))


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A SHA-256 of a tokenizer's tokens and their numbers."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """A SHA-256 of what tensors hold."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def text_digest(windows: Dataset | IterableDataset) -> str:
    """A SHA-256 of some windows: 8 each from the beginning, middle and end, or a stream's first.

    Raises:
        ValueError: if there are none.
    """
    names = ("input_ids", "labels", "attention_mask")
    windows = windows.with_format("torch")
    if isinstance(windows, Dataset):
        n = len(windows)
        starts = (0, max(0, n // 2 - 4), max(0, n - 8))
        chosen = sorted({i for start in starts for i in range(start, min(n, start + 8))})
        rows = list(windows.select(chosen))
    else:
        rows = list(windows.take(8))
    if not rows:
        raise ValueError("The text has no window: give more, or a smaller n_ctx.")
    return tensors_digest(row[name] for row in rows for name in names if name in row)  # pyright: ignore[reportArgumentType, reportCallIssue]


def text_and_arguments(
    windows: Dataset | IterableDataset, args: TrainingArguments
) -> dict[str, Any]:
    """What decides a run, beside the model: some of its text, and the arguments, as JSON has them.

    Left out of the arguments is what a run says, saves and evaluates, and where.
    """
    decisive = {
        name: value for name, value in args.to_dict().items() if not _INDIFFERENT.fullmatch(name)
    }
    if isinstance(windows, Dataset):
        length = {"windows": len(windows)}
    else:  # the workers share a stream out
        length = {"dataloader_num_workers": args.dataloader_num_workers}
    text = {**length, "text": text_digest(windows)}
    note = {**decisive, "world_size": args.world_size, **text}
    return json.loads(json.dumps(note, default=str))
