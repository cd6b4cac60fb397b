"""Text for language models: read documents, train a tokenizer on them, pack them into windows."""

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Literal, TypeVar, overload

from datasets import (
    Dataset,
    Features,
    IterableDataset,
    List,
    Value,
    concatenate_datasets,
    load_dataset,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
HUB_NAMES = {
    "tinystories": "roneneldan/TinyStories",
    "fineweb-edu": "HuggingFaceFW/fineweb-edu:sample-10BT",
}
BATCH = 1000
"""Documents at a time: what `pack` joins."""

_TABLES = {".parquet": "parquet"} | dict.fromkeys(
    (".json", ".jsonl", ".json.gz", ".jsonl.gz"), "json"
)
"""The reader in `datasets`, by a file's ending; other files are plain text."""
_FEATURES = Features({"text": Value("string")})

_SOME_ROWS = re.compile(r"(?P<split>\w+)\[(?P<start>\d*):(?P<end>\d*)\]")

Texts = Iterable[str] | Dataset | IterableDataset
AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset, Dataset | IterableDataset)


@overload
def load_text(
    source: str | Path | Sequence[str | Path] | Dataset,
    *,
    split: str = ...,
    streaming: Literal[False] = ...,
) -> Dataset: ...
@overload
def load_text(
    source: str | Path | Sequence[str | Path] | Dataset | IterableDataset,
    *,
    split: str = ...,
    streaming: bool = ...,
) -> Dataset | IterableDataset: ...
def load_text(
    source: str | Path | Sequence[str | Path] | Dataset | IterableDataset,
    *,
    split: str = "train",
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Documents, one a row, in the one column "text", stripped; empty ones are left out.

    Args:
        source: one or several files: text in UTF-8, plain or .gz, with `<|endoftext|>` between
            documents, or .json, .jsonl (plain or .gz) or .parquet with a column "text"; or the
            name of a dataset, for which alone the network is used: "tinystories", "fineweb-edu"
            (its sample of 10 billion tokens), "owner/name" or "owner/name:configuration", each
            with "@split" or some of its rows, "@train[1000:]" or "@train[:1000]", if not those
            of `split`; or a dataset with a column "text", whose rows stay as they are.
        split: the part of a named dataset; files and datasets are taken whole, whatever it says.
        streaming: read documents when they are asked for. Files are otherwise read into memory,
            and named datasets to disk.

    Raises:
        ValueError: if a file is missing, cannot be read or has no text, there is no column "text"
            of strings, or a name, its configuration or its split cannot be had.
    """
    if isinstance(source, Dataset | IterableDataset):
        return _text_column(source)
    sources = [source] if isinstance(source, str | Path) else list(source)
    if len(sources) == 1 and _is_name(sources[0]):
        return _from_hub(str(sources[0]), split, streaming)
    files = [str(file) for file in sources]
    for file in files:
        if not Path(file).exists():
            raise ValueError(
                f"There is no file {file}. Give files that exist, or one dataset's name, such as "
                '"tinystories" or "owner/name".'
            )
    if next(_read(files), None) is None:
        raise ValueError(
            f"No text in {files}. Give UTF-8 files, .txt or .txt.gz, with documents separated by "
            f'{END_OF_TEXT}, or .jsonl or .parquet with a column "text".'
        )
    if streaming:
        return IterableDataset.from_generator(
            _rows, features=_FEATURES, gen_kwargs={"files": files}
        )
    return in_memory(_read(files))


def in_memory(documents: Iterable[str]) -> Dataset:
    """Documents as a dataset in memory, which leaves no file behind."""
    # In parts, because a column of strings in one piece cannot hold more than 2 GiB.
    parts = [Dataset.from_dict({"text": part}, _FEATURES) for part in batches(documents)]
    return concatenate_datasets(parts or [Dataset.from_dict({"text": []}, _FEATURES)])


def batches(documents: Texts) -> Iterator[list[str]]:
    """Documents, up to 1,000 at a time."""
    if isinstance(documents, Dataset | IterableDataset):
        for batch in documents.iter(BATCH):
            yield list(batch["text"])  # pyright: ignore[reportArgumentType, reportCallIssue]
        return
    rest = iter(documents)
    while batch := list(islice(rest, BATCH)):
        yield batch


def _is_name(source: str | Path) -> bool:
    """Whether it names a dataset; files come first, and a mistyped file is no dataset."""
    if isinstance(source, Path) or Path(source).is_file():
        return False
    source = source.partition("@")[0]
    name = source.partition(":")[0]
    ending = (*_TABLES, ".txt", ".gz")
    is_path = name.startswith((".", "/", "~")) or name.endswith(ending) or Path(source).exists()
    return source in HUB_NAMES or (name.count("/") == 1 and not is_path)


def _from_hub(source: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    source, _, own = source.partition("@")
    split = own or split
    name, _, configuration = HUB_NAMES.get(source, source).partition(":")
    # of streams the library gives no rows by number
    rows = _SOME_ROWS.fullmatch(split) if streaming else None
    asked = rows["split"] if rows else split
    try:
        dataset = _text_column(
            load_dataset(name, configuration or None, split=asked, streaming=streaming)  # pyright: ignore[reportArgumentType]
        )
        if rows:
            start = int(rows["start"] or 0)
            dataset = dataset.skip(start)
            if rows["end"]:
                dataset = dataset.take(max(0, int(rows["end"]) - start))
    except Exception as error:  # the library raises a dozen kinds
        reason = str(error).rstrip(".")
        raise ValueError(
            f"Cannot load the dataset {source!r}, split {split!r}: {reason}. Give files, which "
            'need no network, or "owner/name" or "owner/name:configuration" of a dataset on the '
            f"Hugging Face Hub; {', '.join(HUB_NAMES)} are short names."
        ) from error
    return dataset.map(_strip, batched=True, features=_FEATURES)


def _strip(batch: Mapping[str, list[str | None]]) -> dict[str, list[str]]:
    return {"text": [text.strip() for text in batch["text"] if text and text.strip()]}


def _text_column(dataset: AnyDataset) -> AnyDataset:
    """The column "text" alone.

    Raises:
        ValueError: if there is none, or it does not hold strings.
    """
    if dataset.features is None:  # a stream says nothing of its columns before it is read
        row = next(iter(dataset), {})
        columns = {name: type(value).__name__ for name, value in row.items()}
    else:
        columns = {name: getattr(kind, "dtype", "lists") for name, kind in dataset.features.items()}
    if "text" not in columns:
        raise ValueError(
            f'There is no column "text", only {list(columns)}: give documents under that name, '
            "such as with dataset.rename_column."
        )
    if columns["text"] not in ("str", "string", "large_string", "NoneType", "null"):
        raise ValueError(f'The column "text" holds {columns["text"]}: give strings.')
    return dataset.select_columns("text")


def _rows(files: list[str]) -> Iterator[dict[str, str]]:
    """What `_read` gives, as rows; in a process of several, `files` are a part of the list."""
    for text in _read(files):
        yield {"text": text}


def _read(files: list[str]) -> Iterator[str]:
    """The documents of local files, stripped, one at a time."""
    for file in files:
        reader = next((_TABLES[ending] for ending in _TABLES if file.endswith(ending)), None)
        for text in _read_table(file, reader) if reader else _read_text(file):
            if text and text.strip():
                yield text.strip()


def _read_table(file: str, reader: str) -> Iterator[str | None]:
    try:
        # Streamed, because the library's cache knows a file by its time, not by what is in it.
        rows = load_dataset(reader, data_files=file, split="train", streaming=True)
        for batch in batches(_text_column(rows)):
            yield from batch
    except Exception as error:  # the library raises a dozen kinds
        reason = str(error).rstrip(".") or "it is empty"
        raise ValueError(f"Cannot read {file} as {reader}: {reason}.") from error


def _read_text(file: str) -> Iterator[str]:
    opener = gzip.open if file.endswith(".gz") else open
    document: list[str] = []
    try:
        with opener(file, "rt", encoding="utf-8-sig") as stream:
            for line in stream:
                *ends, rest = line.split(END_OF_TEXT)
                for end in ends:
                    yield "".join([*document, end])
                    document = []
                document.append(rest)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"Cannot read {file} as UTF-8 text: {error}.") from error
    yield "".join(document)


def train_tokenizer(documents: Texts, *, vocab_size: int, n_ctx: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: every text can be encoded, and " word" is a token of its own.

    `<|endoftext|>` stands before each document, so it is both the first and the last token of one.
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
    tokenizer.train_from_iterator(batches(documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=n_ctx,
        clean_up_tokenization_spaces=False,
    )


def pack(
    documents: AnyDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_ctx: int,
    vocab_size: int | None = None,
) -> AnyDataset:
    """Windows of `n_ctx` tokens in the columns input_ids and labels, as tensors.

    A thousand documents at a time are joined, each after the tokenizer's first token (its last
    where it has no first), and cut into windows without overlap. What is left of each thousand,
    less than a window, is dropped.

    Args:
        documents: a dataset or a stream, with a column "text"; the windows are of the same kind.
        vocab_size: the model's, if the tokenizer was not made for it.

    Raises:
        ValueError: if the tokenizer has neither a first nor a last token, gives tokens that the
            model lacks, or the documents of a dataset fill no window.
    """
    _first_token(tokenizer)
    windows = _text_column(documents).map(
        _cut,
        batched=True,
        batch_size=BATCH,
        remove_columns="text",
        features=Features(
            # as tensors they are int64; stored, half of that will do
            {name: List(Value("int32"), length=n_ctx) for name in ("input_ids", "labels")}
        ),
        fn_kwargs={
            "tokenizer": tokenizer,
            "n_ctx": n_ctx,
            "vocab_size": vocab_size,
        },
    )
    if isinstance(windows, Dataset) and not len(windows):
        raise ValueError(
            f"The text has fewer than one window of n_ctx={n_ctx} tokens. Give more text or a "
            "smaller n_ctx."
        )
    return windows.with_format("torch")


def tokens_per_byte(documents: Texts, tokenizer: PreTrainedTokenizerBase) -> float:
    """Tokens for one byte of text, the first token of each document included.

    Raises:
        ValueError: as for `pack`, or if there is no text.
    """
    _first_token(tokenizer)
    n_tokens = n_bytes = 0
    for batch in batches(documents):
        n_tokens += sum(map(len, encode(batch, tokenizer)))
        n_bytes += sum(len(text.encode()) for text in batch)
    if not n_bytes:
        raise ValueError("There is no text to count the tokens of.")
    return n_tokens / n_bytes


def _first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise ValueError("The tokenizer has no first token (bos_token): set one, such as its end.")


def encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids of each text, after the tokenizer's first token (its last where it has none).

    Raises:
        ValueError: if the tokenizer has neither.
    """
    first = _first_token(tokenizer)
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)[
        "input_ids"
    ]  # pyright: ignore[reportAssignmentType]
    return [[first, *ids] for ids in encoded]


def _cut(
    batch: Mapping[str, list[str]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    n_ctx: int,
    vocab_size: int | None,
) -> dict[str, list[list[int]]]:
    stream = list(chain.from_iterable(encode(batch["text"], tokenizer)))
    if vocab_size is not None and max(stream) >= vocab_size:
        raise ValueError(
            f"The tokenizer does not fit the model: it gives token {max(stream)}, and the model "
            f"has vocab_size={vocab_size}. Give the model's own tokenizer."
        )
    windows = [stream[i : i + n_ctx] for i in range(0, len(stream) - n_ctx + 1, n_ctx)]
    return {"input_ids": windows, "labels": windows}
