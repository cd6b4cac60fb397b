"""Text for language models: read stories, train a tokenizer on them, pack them into windows."""

import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"


def read_stories(files: Sequence[str | Path]) -> list[str]:
    """The stories in UTF-8 text files (plain or gzip), separated by `<|endoftext|>`.

    Raises:
        ValueError: if a file is missing, is not UTF-8 text, or the files hold no story.
    """
    stories: list[str] = []
    for file in map(Path, files):
        opener = gzip.open if file.suffix == ".gz" else open
        try:
            with opener(file, "rt", encoding="utf-8") as stream:
                text = stream.read()
        except FileNotFoundError as error:
            raise ValueError(f"There is no file {file}.") from error
        except (OSError, EOFError, UnicodeDecodeError) as error:
            raise ValueError(f"Cannot read {file} as UTF-8 text: {error}.") from error
        stories += [story.strip() for story in text.split(END_OF_TEXT) if story.strip()]
    if not stories:
        raise ValueError(
            f"No text in {[str(file) for file in files]}. "
            f"Give UTF-8 files, .txt or .txt.gz, with stories separated by {END_OF_TEXT}."
        )
    return stories


def train_tokenizer(
    stories: Sequence[str], *, vocab_size: int, n_ctx: int
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text can be encoded, and " word" is a token of its own.

    `<|endoftext|>` stands before each story, so it is both the first and the last token of one.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=n_ctx,
        clean_up_tokenization_spaces=False,
    )


def pack(
    stories: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, n_ctx: int
) -> tuple[Dataset, float]:
    """Windows of `n_ctx` tokens, and the number of tokens for one byte of text.

    The stories are joined, each after the tokenizer's first token, and cut into windows without
    overlap; the last, shorter window is dropped.

    Raises:
        ValueError: if the stories do not fill one window.
    """
    first = tokenizer.bos_token_id
    if not isinstance(first, int):
        raise ValueError("The tokenizer has no first token (bos_token): set one, such as its end.")

    def encode(batch: Mapping[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded: list[list[int]] = tokenizer(
            batch["text"], add_special_tokens=False, verbose=False
        )["input_ids"]  # pyright: ignore[reportAssignmentType]
        return {"input_ids": [[first, *ids] for ids in encoded]}

    def cut(batch: Mapping[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        stream = [token for ids in batch["input_ids"] for token in ids]
        windows = [stream[i : i + n_ctx] for i in range(0, len(stream) - n_ctx + 1, n_ctx)]
        return {"input_ids": windows, "labels": windows}

    encoded = Dataset.from_dict({"text": list(stories)}).map(
        encode, batched=True, remove_columns="text", desc="Tokenizing"
    )
    n_tokens = sum(map(len, encoded["input_ids"]))
    if n_tokens < n_ctx:
        raise ValueError(
            f"The text has {n_tokens} tokens, fewer than one window of n_ctx={n_ctx}. "
            "Give more text or a smaller n_ctx."
        )
    windows = encoded.map(cut, batched=True, batch_size=len(stories), desc="Packing")
    return windows, n_tokens / sum(len(story.encode()) for story in stories)
