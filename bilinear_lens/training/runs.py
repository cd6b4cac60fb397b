"""Runs of the Hugging Face Trainer: their folders, what resumes them, what stops them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

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
        if torch.stack(torch._foreach_norm(gradients)).isfinite().all():
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
    (folder / NOTE).write_text(json.dumps(run, indent=1), encoding="utf-8")


def last_checkpoint(folder: str | Path) -> Path | None:
    """Where a run goes on: its last whole checkpoint, or None where it has none."""
    # the Trainer writes its state last: a folder without was cut off
    whole = [state.parent for state in Path(folder).glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    return max(whole, key=lambda checkpoint: int(checkpoint.name.split("-")[1]), default=None)
