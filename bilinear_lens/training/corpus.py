"""Text as a run reads it: a tokenizer, windows to train on, and windows held out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bilinear_lens.training.recipe import LanguageRecipe
from bilinear_lens.training.text import (
    BATCH,
    batches,
    in_memory,
    load_text,
    pack,
    tokens_per_byte,
    train_tokenizer,
)

TOKENIZER_DOCUMENTS = 100_000
"""Of a stream, which may have no end: a tokenizer is trained on so many."""

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
        try:
            tok = AutoTokenizer.from_pretrained(tokenizer)
        except (OSError, ValueError) as error:
            raise ValueError(f"Cannot load a tokenizer from {tokenizer}: {error}") from error
    shape = {"n_ctx": recipe.n_ctx, "vocab_size": len(tok)}
    windows = pack(documents, tok, **shape)
    if isinstance(windows, IterableDataset):
        if next(iter(windows), None) is None:
            raise ValueError(
                f"The stream has fewer than one window of n_ctx={recipe.n_ctx} tokens. Give more "
                "text or a smaller n_ctx."
            )
        # in one pass without an end: a resumed run skips no further than this pass
        windows = windows.shuffle(seed=recipe.seed, buffer_size=BATCH).repeat(None)
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
        ValueError: as for `load_text`, or if `held_out` is None and `text` is no name.
    """
    names = [text] if isinstance(text, str | Path) else text
    if held_out is None and (
        isinstance(text, Dataset | IterableDataset) or any(Path(str(n)).exists() for n in names)
    ):
        raise ValueError(
            "held_out is missing: give other text for the reported loss. Only the name of a "
            "dataset may do without, which then gives its own validation split."
        )
    source = text if held_out is None else held_out
    documents = load_text(source, split="validation", streaming=streaming)
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
    return [Path(each).name if Path(each).exists() else str(each) for each in sources]
