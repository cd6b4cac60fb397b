"""Text as a run reads it: a tokenizer, windows to train on, and windows held out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from bilinear_lens.models.checkpoints import load_tokenizer
from bilinear_lens.training.card import shown_name
from bilinear_lens.training.recipe import LanguageRecipe
from bilinear_lens.training.text import (
    batches,
    in_memory,
    load_text,
    pack,
    tokens_per_byte,
    train_tokenizer,
)
from bilinear_lens.training.windows import endless

TOKENIZER_DOCUMENTS = 100_000
"""Of a stream, which may have no end: a tokenizer is trained on so many."""

TRAIN_ONLY = ("fineweb-edu", "HuggingFaceFW/fineweb")
"""Datasets without a validation split begin so."""

TextSource = str | Path | Sequence[str | Path] | Dataset | IterableDataset
"""What `load_text` takes."""


@dataclass(frozen=True)
class Corpus:
    """Text as a run reads it."""

    tokenizer: PreTrainedTokenizerBase
    windows: Dataset | IterableDataset
    held_out: Dataset
    per_byte: float
    """Tokens for one byte of the held-out text."""

    @property
    def n_windows(self) -> int | None:
        return len(self.windows) if isinstance(self.windows, Dataset) else None


def read_corpus(
    text: TextSource,
    held_out: TextSource | None,
    tokenizer: str | Path | None,
    recipe: LanguageRecipe,
    *,
    streaming: bool,
) -> Corpus:
    """Read, tokenize and pack; `train_language` says what each option is.

    Raises:
        ValueError: if text or tokenizer cannot be read, do not fit, or there is too little text.
    """
    held = held_out_documents(text, held_out, streaming=streaming)
    documents = load_text(text, streaming=streaming)
    if tokenizer is None:
        some = documents
        if isinstance(some, IterableDataset):
            some = some.take(TOKENIZER_DOCUMENTS)
        tok = train_tokenizer(some, vocab_size=recipe.vocab_size, n_ctx=recipe.n_ctx)
    else:
        tok = load_tokenizer(tokenizer)
    shape = {"n_ctx": recipe.n_ctx, "vocab_size": len(tok)}
    windows = pack(documents, tok, **shape)
    if isinstance(windows, IterableDataset):
        if next(iter(windows), None) is None:
            raise ValueError(
                f"The stream has fewer than one window of n_ctx={recipe.n_ctx} tokens. Give more "
                "text or a smaller n_ctx."
            )
        windows = endless(windows, seed=recipe.seed)
    return Corpus(
        tok,
        windows,
        pack(held, tok, **shape),
        tokens_per_byte(held, tok),
    )


def held_out_documents(
    text: TextSource, held_out: TextSource | None, *, streaming: bool
) -> Dataset:
    """Text for the reported loss, in memory or on the disk, since it is read many times.

    Args:
        held_out: None takes the split "validation" of the dataset that `text` names.

    Raises:
        ValueError: as for `load_text`, or if `held_out` is None and `text` is no name, or the name
            of a dataset without that split.
    """
    if held_out is not None:
        documents = load_text(held_out, split="validation", streaming=streaming)
    else:
        names = [text] if isinstance(text, str | Path) else text
        if not names:
            raise ValueError("text is empty: give files or the name of a dataset.")
        if isinstance(text, Dataset | IterableDataset) or any(Path(str(n)).exists() for n in names):
            raise ValueError(
                "held_out is missing (--held-out): give other text for the reported loss. Only the "
                "name of a dataset may do without, which then gives its own validation split."
            )
        whole = [str(name).partition("@")[0] for name in names]
        remedy = (
            "Give other text for the reported loss (held_out, --held-out), such as a part of it, "
            f"and train on the rest: --text '{whole[0]}@train[1000:]' "
            f"--held-out '{whole[0]}@train[:1000]'."
        )
        if whole[0].startswith(TRAIN_ONLY):  # which would be downloaded whole before it is said
            raise ValueError(
                f"held_out is missing: {whole[0]} has no validation split, only train. {remedy}"
            )
        try:
            documents = load_text(whole, split="validation", streaming=streaming)
        except ValueError as error:
            if "split" not in str(error.__cause__):
                raise
            raise ValueError(f"held_out is missing: {error.__cause__} {remedy}") from error
    if isinstance(documents, IterableDataset):
        return in_memory(chain.from_iterable(batches(documents)))
    return documents


def source_names(source: TextSource) -> list[str]:
    """What text is called in notes and cards, without the folders of this machine."""
    if isinstance(source, Dataset):
        return [f"{len(source):,} documents"]
    if isinstance(source, IterableDataset):
        return ["a stream of documents"]
    sources = [source] if isinstance(source, str | Path) else source
    return [shown_name(each) for each in sources]
