"""Windows of token ids that a model can be trained on, and what is refused."""

import math
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from jaxtyping import Int
from torch import Tensor
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from bilinear_lens.training.text import BATCH, pack


def with_labels(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of rows, whose labels are their own tokens if they have none, pads left out."""
    batch = default_data_collator(rows)
    labels = batch["input_ids"]
    if "attention_mask" in batch:
        labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    return {"labels": labels, **batch}


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
        ValueError: if it is no dataset, there are no windows, they are longer than the model's
            context, or the tokens are not the model's.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise ValueError(
            f"Text must come as a dataset, not a {type(dataset).__name__}: bl.load_text(files), or "
            "Dataset.from_dict({'text': documents})."
        )
    config = model.config.get_text_config()
    columns = dataset.column_names or list(next(iter(dataset), ()))
    if "input_ids" in columns:
        windows = dataset.with_format("torch")
        if isinstance(dataset, Dataset):
            _check_rows(dataset, config.vocab_size)
    elif tokenizer is None:
        raise ValueError(
            f"The dataset has the columns {columns}: give windows of token ids (input_ids), or "
            "documents (text) and the model's tokenizer."
        )
    else:
        _check_length(n_ctx, config)
        windows = pack(dataset, tokenizer, n_ctx=n_ctx, vocab_size=config.vocab_size)
    read: list[dict[str, Any]] = list(windows.take(4))  # pyright: ignore[reportAssignmentType]
    some = _stack(read)
    _check_length(some.shape[1], config)
    _check_tokens(int(some.min()), int(some.max()), config.vocab_size)
    names = ("input_ids", "attention_mask")
    rows = [{name: row[name] for name in names if name in row} for row in read]
    batch = {name: each.to(model.device) for name, each in with_labels(rows).items()}
    training = model.training
    with torch.no_grad():
        loss = float(model.eval()(**batch).loss)
    model.train(training)
    if math.isnan(loss):
        raise ValueError("On the text the model has a loss of NaN: its weights are not finite.")
    if loss > math.log(config.vocab_size) + 1:
        raise ValueError(
            f"On the text the model has a loss of {loss:.2f} nats per token, worse than a guess "
            f"({math.log(config.vocab_size):.2f}): the tokenizer is not the model's."
        )
    return windows


def _check_rows(windows: Dataset, vocab_size: int) -> None:
    """Refuse windows of several lengths, or of tokens that the model does not have."""
    lengths: set[int] = set()
    batch: Any
    for batch in windows.select_columns("input_ids").with_format("numpy").iter(BATCH):
        rows = batch["input_ids"]  # an array of arrays where they are not equally long
        lengths |= {rows.shape[1]} if rows.ndim == 2 else set(map(len, rows))
        if len(lengths) > 1:
            raise ValueError(
                f"The windows have from {min(lengths)} to {max(lengths)} tokens: they must be "
                "equally long."
            )
        _check_tokens(int(rows.min()), int(rows.max()), vocab_size)


def _check_tokens(least: int, most: int, vocab_size: int) -> None:
    if least < 0 or most >= vocab_size:
        raise ValueError(
            f"The windows hold tokens from {least} to {most}; the model has {vocab_size}: its "
            "tokenizer is another."
        )


def _check_length(n_ctx: int, config: PreTrainedConfig) -> None:
    if n_ctx < 2:
        raise ValueError(f"n_ctx={n_ctx} must be at least 2: a token, and one to predict.")
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and n_ctx > longest:
        raise ValueError(
            f"Windows of n_ctx={n_ctx} tokens are longer than the model's context, "
            f"max_position_embeddings={longest}: give a smaller n_ctx."
        )


def endless(windows: IterableDataset, *, seed: int) -> IterableDataset:
    """A stream of windows, shuffled among a thousand, and from the start again where it ends.

    That is one pass without an end: a resumed run skips no further than this pass.
    """
    return windows.shuffle(seed=seed, buffer_size=BATCH).repeat(None)


def first_windows(windows: Dataset | IterableDataset, n: int) -> Int[Tensor, "n n_ctx"]:
    """The first `n` windows, or as many as there are.

    Raises:
        ValueError: if there are none, or they cannot be a batch to learn from, or have pads.
    """
    rows: list[dict[str, Any]] = list(windows.take(n))  # pyright: ignore[reportAssignmentType]
    if any((row.get("attention_mask", torch.ones(1)) == 0).any() for row in rows):
        raise ValueError(
            "Windows for a fit or for figures have pads (attention_mask is 0): give windows "
            "without, or documents."
        )
    return _stack(rows)


def _stack(read: list[dict[str, Any]]) -> Int[Tensor, "n n_ctx"]:
    rows = [row["input_ids"] for row in read]
    if not rows:
        raise ValueError("The text has no window: give more, or a smaller n_ctx.")
    lengths = {len(row) for row in rows}
    if len(lengths) > 1 or min(lengths) < 2:
        raise ValueError(
            f"The windows have {', '.join(map(str, sorted(lengths)))} tokens: they must be equally "
            "long, and two tokens at least."
        )
    return torch.stack(rows)
