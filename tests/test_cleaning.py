"""Cleaning: what is damaged comes back as it was, what is good stays, and the counts are true."""

# ruff: noqa: RUF001 - marks that look like others are what is tested

import dataclasses
import shlex
import sys

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

import bilinear_lens as bl
from bilinear_lens import cli
from bilinear_lens.training import cleaning
from bilinear_lens.training.cleaning import clean, plain_spaces, repair_characters, save_text
from bilinear_lens.training.text import in_memory, load_text

GOOD = (
    "“Très cher”, “Spaß”… «blessé…» Ångström, “maçã” MAÇÃ, naïve São João’s café, 日本語 – été »",
    "Â is a letter, â too; 5 € and ™, ‘ê’ — Œuvre, ð, a “ß”",
)


def damage(text: str) -> str:
    """UTF-8 read as Windows-1252, by a program that drops the five bytes it does not know."""
    return text.encode().decode("cp1252", "ignore")


@given(st.text(alphabet="ab .\n“”‘’–—…éñèÉüç½°£€™😀🌸", max_size=30))
def test_damaged_characters_come_back(text):
    assert repair_characters(damage(text)) == text


@pytest.mark.parametrize("text", GOOD)
def test_good_characters_stay(text):
    assert repair_characters(text) == text


def test_damage_in_real_stories_is_repaired():
    """As it stands in the original data set: in lower case, closing marks without a byte."""
    damaged = "ben said, â€œwho are you?â€\n\nben shook his head. â€œi havenâ€™t â€” cafã©.â€"
    cleaned, counts = clean([damaged])
    assert cleaned["text"] == [
        'ben said, "who are you?"\n\nben shook his head. "i haven\'t — café."'
    ]
    assert (counts.repaired, counts.quotes, counts.spaces) == (1, 1, 0)


@given(st.text(alphabet="ab \t\n\r\x0b\xa0\u200a\u2029", max_size=30))
def test_spaces_are_plain_and_words_keep_their_order(text):
    plain = plain_spaces(text)
    assert plain.split() == text.split()
    assert plain == plain.strip() and not set(plain) & set("\t\r\x0b\xa0\u200a\u2029")
    assert not any(run in plain for run in ("  ", " \n", "\n ", "\n\n\n"))
    assert plain_spaces(plain) == plain


def test_of_documents_that_differ_in_case_space_and_marks_the_first_is_kept():
    documents = ["A cat, 1.", "a CAT 1!", "A\ncat: “1”", "A cat, 2.", "Acat1", " ...", "", "É", "e"]
    cleaned, counts = clean(documents)
    assert cleaned["text"] == ["A cat, 1.", "A cat, 2.", "É", "e"]
    assert (counts.read, counts.duplicates, counts.empty, counts.kept) == (9, 3, 2, 4)


def test_a_damaged_document_is_a_duplicate_of_the_good_one():
    good = "“Where’s the café?” — 🌸 asked."
    cleaned, counts = clean([good, damage(good)])
    assert cleaned["text"] == ['"Where\'s the café?" — 🌸 asked.'] and counts.duplicates == 1


def test_the_counts_are_those_of_the_documents():
    documents = ["good.", "“b”", "c  d", damage("é “f”\t"), "GOOD"]
    cleaned, counts = clean(documents)
    assert dataclasses.asdict(counts) == {
        "read": 5,
        "empty": 0,
        "duplicates": 1,
        "kept": 4,
        "repaired": 1,
        "quotes": 2,
        "spaces": 2,
        "bytes_before": sum(len(document.encode()) for document in documents),
        "bytes_after": sum(len(document.encode()) for document in cleaned["text"]),
    }
    rows = dict(line.strip().rsplit(maxsplit=1) for line in str(counts).splitlines())
    assert rows["duplicates"] == "1" and rows["characters repaired"] == "1"
    assert len({len(line) for line in str(counts).splitlines()}) == 1


def test_strings_datasets_and_streams_are_cleaned_alike():
    stories = [*bl.held_out_stories()[:20], damage("“Él”"), "ÉL"]
    dataset = in_memory(stories)
    results = [clean(given) for given in (iter(stories), dataset, dataset.to_iterable_dataset())]
    assert len(results[0][0]) == 21
    for cleaned, counts in results:
        assert cleaned[:] == results[0][0][:] and counts == results[0][1]
    again, counts = clean(results[0][0])
    assert again[:] == results[0][0][:]
    assert counts.repaired == counts.quotes == counts.spaces == counts.duplicates == 0


def test_lower_case_is_asked_for():
    assert clean(["A “Cat” É."])[0]["text"] == ['A "Cat" É.']
    assert clean(["A “Cat” É."], lowercase=True)[0]["text"] == ['a "cat" é.']


def test_rows_without_text_are_empty():
    dataset = Dataset.from_dict({"text": ["a", None, "b"]})
    for documents in (dataset, dataset.to_iterable_dataset()):
        cleaned, counts = clean(documents)
        assert cleaned["text"] == ["a", "b"]
        assert (counts.read, counts.empty, counts.bytes_before) == (3, 1, 2)


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match="None of 2 documents has a letter"):
        clean(["...", " "])


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl", "a.parquet"])
def test_what_is_written_is_read_again(tmp_path, name):
    documents = ["one\n\ntwo “é”", "日本 🌸", *(f"document {number}" for number in range(1500))]
    save_text(Dataset.from_dict({"text": documents}), tmp_path / name)
    assert load_text(tmp_path / name)["text"] == documents
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"Document 1 holds <\|endoftext\|>.*parquet"):
        save_text(Dataset.from_dict({"text": ["a", "b<|endoftext|>"]}), tmp_path / "a.txt.gz")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a command line in a folder of its own; gives exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def command(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bilinear-lens", *shlex.split(line)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return command


@pytest.mark.parametrize("streaming", ["", " --streaming"])
def test_the_command_writes_clean_text_and_its_counts(run, tmp_path, streaming):
    (tmp_path / "a.txt").write_text("“One.”<|endoftext|>ONE<|endoftext|>two  three")
    (tmp_path / "b.jsonl").write_text('{"text": "Four â€\u0153x"}')
    code, out, _ = run("clean out.txt.gz a.txt b.jsonl --lowercase" + streaming)
    assert code == 0 and "Wrote out.txt.gz" in out
    documents, counts = clean(load_text(["a.txt", "b.jsonl"]), lowercase=True)
    assert str(counts) in out and counts.duplicates == 1
    assert load_text("out.txt.gz")["text"] == documents["text"][:]
    assert documents["text"] == ['"one."', "two three", 'four "x']


def test_the_command_refuses_before_any_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr(cleaning, "clean", lambda *args, **options: pytest.fail("work has begun"))
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "there.jsonl").write_text("")
    for line, fault in {
        "clean there.jsonl a.txt": "there.jsonl exists already",
        "clean out.csv a.txt": "must end in .txt.gz, .jsonl or .parquet",
        "clean no/out.jsonl a.txt": "name a file in a folder",
        "clean out.jsonl nothing.txt": "There is no file nothing.txt",
    }.items():
        code, _, err = run(line)
        assert code == 2 and fault in err and len(err.splitlines()) == 1
    assert {file.name for file in tmp_path.iterdir()} == {"a.txt", "there.jsonl"}
