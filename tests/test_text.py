"""Text: documents as they were written, from every kind of source; tokens and windows of them."""

import gzip
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset, config
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, default_data_collator

import bilinear_lens as bl
from bilinear_lens.training import text
from bilinear_lens.training.text import load_text, pack, tokens_per_byte, train_tokenizer

END = "<|endoftext|>"
DOCUMENTS = ["One  two.\nThree é.", "“日本”", "Four\n\nfive."]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(bl.held_out_stories()[:30], vocab_size=300, n_ctx=32)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The folder in which `datasets` leaves what it has read."""
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def write(file: Path, documents: list[str | None]) -> Path:
    rows = [{"n": number, "text": document} for number, document in enumerate(documents)]
    if file.name.endswith(".parquet"):
        Dataset.from_list(rows).to_parquet(file)
        return file
    content = f"\n{END}\n".join(document or "" for document in documents)
    if ".jsonl" in file.name:
        content = "".join(json.dumps(row) + "\n" for row in rows)
    elif ".json" in file.name:
        content = json.dumps(rows)
    data = content.encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet"]
)
def test_every_kind_of_file_gives_its_documents(tmp_path, cache, name, streaming):
    file = write(tmp_path / name, [None, f" {DOCUMENTS[0]}\n", " \n", *DOCUMENTS[1:]])
    loaded = load_text(str(file), streaming=streaming)
    assert isinstance(loaded, IterableDataset if streaming else Dataset)
    assert list(loaded) == [{"text": document} for document in DOCUMENTS]
    assert loaded.column_names == ["text"]
    assert not [left for left in cache.rglob("*") if left.is_file() and left.stat().st_size]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.parquet"])
def test_a_changed_file_gives_its_new_text_even_if_it_looks_the_same(tmp_path, name):
    file = write(tmp_path / name, ["old"])
    os.utime(file, (1, 1))
    assert load_text(file)["text"] == ["old"]
    write(file, ["new"])
    os.utime(file, (1, 1))
    assert load_text(file)["text"] == ["new"]


def test_files_are_joined_and_are_the_shards_of_a_stream(tmp_path):
    files = [write(tmp_path / f"{n}.txt", [f"{n} a", f"{n} b"]) for n in range(3)]
    files.append(write(tmp_path / "3.jsonl", ["3 a"]))
    expected = ["0 a", "0 b", "1 a", "1 b", "2 a", "2 b", "3 a"]
    assert load_text(files)["text"] == expected
    stream = load_text(files, streaming=True)
    assert isinstance(stream, IterableDataset) and stream.num_shards == 4
    parts = [pickle.loads(pickle.dumps(stream)).shard(num_shards=2, index=n) for n in range(2)]
    read = [[row["text"] for row in part] for part in parts]
    assert all(read) and sorted(read[0] + read[1]) == expected


def test_separators_stand_anywhere_in_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(
        f"\ufeff{END}one{END}{END} two\r\nthree <|endof\ntext|>{END}four".encode()
    )
    assert load_text(tmp_path / "a.txt")["text"] == ["one", "two\nthree <|endof\ntext|>", "four"]


def test_a_stream_is_read_as_it_is_asked_for(tmp_path):
    """The file is damaged at its end, which is no matter to its first documents."""
    file = tmp_path / "a.txt.gz"
    lines = os.urandom(200_000).hex("\n", 40)
    file.write_bytes(gzip.compress(f"first{END}{lines}".encode())[:-40])
    rows = iter(load_text(file, streaming=True))
    assert next(rows) == {"text": "first"}
    with pytest.raises(ValueError, match=r"Cannot read .*a\.txt\.gz"):
        list(rows)
    with pytest.raises(ValueError, match=r"Cannot read .*a\.txt\.gz"):
        load_text(file)


def test_more_documents_than_a_part_stay_in_order():
    documents = [f"document {number}" for number in range(2 * text.BATCH + 7)]
    assert text.in_memory(documents)["text"] == documents
    assert [len(batch) for batch in text.batches(documents)] == [text.BATCH, text.BATCH, 7]


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("tinystories", ("roneneldan/TinyStories", None)),
        ("fineweb-edu", ("HuggingFaceFW/fineweb-edu", "sample-10BT")),
        (["owner/name"], ("owner/name", None)),
        ("owner/name:en", ("owner/name", "en")),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_names_are_asked_of_the_hub(monkeypatch, source, asked, streaming):
    def load_dataset(name, configuration, *, split, streaming):
        assert (name, configuration, split) == (*asked, "validation")
        rows = Dataset.from_dict({"id": [1, 2, 3], "text": [" a ", None, "b"]})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(text, "load_dataset", load_dataset)
    loaded = load_text(source, split="validation", streaming=streaming)
    assert isinstance(loaded, IterableDataset if streaming else Dataset)
    assert list(loaded) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("part", "streamed", "kept"),
    [
        ("test", "test", "abcde"),
        ("train[2:]", "train", "cde"),
        ("train[:3]", "train", "abc"),
        ("train[1:3]", "train", "bc"),
    ],
)
def test_names_may_say_which_rows(monkeypatch, part, streamed, kept):
    asked: list[tuple] = []

    def load_dataset(name, configuration, *, split, streaming):
        asked.append((name, configuration, split))
        rows = Dataset.from_dict({"text": list("abcde")})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(text, "load_dataset", load_dataset)
    load_text(f"fineweb-edu@{part}", split="validation")
    stream = load_text(f"owner/name:en@{part}", split="validation", streaming=True)
    assert list(stream) == [
        {"text": each} for each in kept
    ]  # the library gives a stream's rows whole
    assert asked == [
        ("HuggingFaceFW/fineweb-edu", "sample-10BT", part),
        ("owner/name", "en", streamed),
    ]


def test_a_name_that_is_a_file_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(text, "load_dataset", lambda *args, **options: pytest.fail("was asked"))
    for name in ("tinystories", "owner/name"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("here")
        assert load_text(name)["text"] == ["here"]


@pytest.mark.parametrize(
    "name",
    ["nothing", "a/b.txt", "a/b.jsonl", "./a", "~/a", "/a", "a/b/c", Path("a/b"), ["a/b", "c/d"]],
)
def test_what_is_no_name_is_not_asked_of_the_hub(monkeypatch, name):
    monkeypatch.setattr(text, "load_dataset", lambda *args, **options: pytest.fail("was asked"))
    with pytest.raises(ValueError, match=r"There is no file .*Give files that exist"):
        load_text(name)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("Couldn't reach the Hub.")

    monkeypatch.setattr(text, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"'tinystories', split 'no': Couldn't reach .*Give files"):
        load_text("tinystories", split="no")


def test_a_dataset_keeps_its_rows_and_its_text_alone():
    dataset = Dataset.from_dict({"id": [1, 2], "text": [" a", ""]})
    assert load_text(dataset)[:] == {"text": [" a", ""]}
    assert list(load_text(dataset.to_iterable_dataset())) == [{"text": " a"}, {"text": ""}]


def test_bad_input_is_named(tmp_path):
    def fault(source, **options) -> str:
        with pytest.raises(ValueError) as caught:
            load_text(source, **options)
        return str(caught.value)

    (tmp_path / "latin.txt").write_bytes(b"\xe9\xe8")
    (tmp_path / "plain.txt.gz").write_bytes(b"plain")
    (tmp_path / "bad.jsonl").write_text('{"text": "x')
    (tmp_path / "bad.parquet").write_text("PAR1")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "other.jsonl").write_text('{"title": "x", "body": "y"}')
    (tmp_path / "other.json").write_text('[{"title": "x", "body": "y"}]')
    (tmp_path / "number.jsonl").write_text('{"text": 3}')
    write(tmp_path / "blank.txt", [" ", "\n"])
    write(tmp_path / "null.jsonl", [None])
    for streaming in (False, True):
        for name in ("latin.txt", "plain.txt.gz", "bad.jsonl", "bad.parquet", "empty.jsonl", ""):
            file = tmp_path / name
            assert f"Cannot read {file}" in fault(file, streaming=streaming)
        for name in ("blank.txt", "null.jsonl"):
            message = fault(tmp_path / name, streaming=streaming)
            assert "No text in" in message and name in message
        for name in ("other.jsonl", "other.json"):
            message = fault(tmp_path / name, streaming=streaming)
            assert name in message and """no column "text", only ['title', 'body']""" in message
        assert "holds int64: give strings" in fault(tmp_path / "number.jsonl", streaming=streaming)
    assert "rename_column" in fault(Dataset.from_dict({"title": ["x"]}))


def test_the_tokenizer_encodes_every_text_and_words_with_their_space(tokenizer):
    assert len(tokenizer) == 300
    for document in ("The bird said héllo.", "\x00\t日本", " a  b\n"):
        assert tokenizer.decode(tokenizer(document)["input_ids"]) == document
    assert tokenizer.convert_ids_to_tokens(tokenizer(" the")["input_ids"]) == ["Ġthe"]


def test_the_tokenizer_is_the_same_from_a_list_a_dataset_and_a_stream():
    stories = bl.held_out_stories()[:20]
    dataset = text.in_memory(stories)
    made = [
        train_tokenizer(documents, vocab_size=280, n_ctx=32).get_vocab()
        for documents in (stories, iter(stories), dataset, dataset.to_iterable_dataset())
    ]
    assert len(made[0]) == 280 and made.count(made[0]) == len(made)


@pytest.mark.parametrize("streaming", [False, True])
def test_windows_hold_the_documents_in_order(tokenizer, streaming, cache):
    documents = ["One two.", "Three.", "Four five six."]
    dataset = text.in_memory(documents)
    windows = pack(dataset.to_iterable_dataset() if streaming else dataset, tokenizer, n_ctx=5)
    assert isinstance(windows, IterableDataset if streaming else Dataset)
    rows = list(windows)
    assert all(row["input_ids"].shape == (5,) for row in rows)
    assert all(row["input_ids"].equal(row["labels"]) for row in rows)
    stream = torch.cat([row["input_ids"] for row in rows])
    whole = END + END.join(documents)
    assert whole.startswith(tokenizer.decode(stream))
    n_tokens = len(tokenizer(whole)["input_ids"])
    assert len(stream) == n_tokens - n_tokens % 5
    assert not cache.exists()


@pytest.mark.parametrize("streaming", [False, True])
def test_windows_go_to_a_trainer_as_tensors(tokenizer, streaming):
    dataset = text.in_memory(["One two three four."] * 4)
    windows = pack(dataset.to_iterable_dataset() if streaming else dataset, tokenizer, n_ctx=6)
    batch = next(iter(DataLoader(windows, batch_size=3, collate_fn=default_data_collator)))  # pyright: ignore[reportArgumentType]
    for name in ("input_ids", "labels"):
        assert batch[name].shape == (3, 6) and batch[name].dtype == torch.int64


def test_each_thousand_documents_is_packed_apart(tokenizer):
    """With two tokens a document and windows of three, one token is left of each thousand."""
    n_documents = 2 * text.BATCH
    windows = pack(text.in_memory(["a"] * n_documents), tokenizer, n_ctx=3)
    (a,), first = tokenizer("a")["input_ids"], tokenizer.bos_token_id
    whole = torch.tensor([first, a] * text.BATCH)[: 2 * text.BATCH // 3 * 3].view(-1, 3)
    assert 2 * text.BATCH % 3 and windows[:]["input_ids"].equal(torch.cat([whole, whole]))


def test_the_last_token_stands_for_a_first_that_is_not_there(tokenizer):
    dataset = text.in_memory(["One two."])
    expected = pack(dataset, tokenizer, n_ctx=2)[:]["input_ids"]
    bare = {"tokenizer_object": tokenizer.backend_tokenizer}
    with_last = PreTrainedTokenizerFast(**bare, eos_token=END)
    assert with_last.bos_token_id is None
    assert pack(dataset, with_last, n_ctx=2)[:]["input_ids"].equal(expected)
    for count in (
        lambda bare: pack(dataset, bare, n_ctx=2),
        lambda bare: tokens_per_byte([], bare),
    ):
        with pytest.raises(ValueError, match="no first token"):
            count(PreTrainedTokenizerFast(**bare))


def test_packing_refuses_too_little_text_and_a_tokenizer_that_does_not_fit(tokenizer):
    dataset = text.in_memory(bl.held_out_stories()[:3])
    top = max(map(max, tokenizer(dataset["text"][:])["input_ids"]))
    assert len(pack(dataset, tokenizer, n_ctx=8, vocab_size=top + 1))
    with pytest.raises(ValueError, match=rf"does not fit the model.* {top}, .*vocab_size={top}\."):
        pack(dataset, tokenizer, n_ctx=8, vocab_size=top)
    with pytest.raises(ValueError, match="fewer than one window of n_ctx=100000"):
        pack(dataset, tokenizer, n_ctx=100_000)
    with pytest.raises(ValueError, match='no column "text"'):
        pack(dataset.rename_column("text", "story"), tokenizer, n_ctx=8)


def test_tokens_for_a_byte_are_counted_one_document_at_a_time(tokenizer):
    documents = [*DOCUMENTS, *bl.held_out_stories()[:3]]
    n_tokens = sum(len(tokenizer(document)["input_ids"]) + 1 for document in documents)
    n_bytes = sum(len(document.encode()) for document in documents)
    dataset = text.in_memory(documents)
    for given in (documents, dataset, dataset.to_iterable_dataset()):
        assert tokens_per_byte(given, tokenizer) == pytest.approx(n_tokens / n_bytes)
    with pytest.raises(ValueError, match="no text"):
        tokens_per_byte([], tokenizer)
