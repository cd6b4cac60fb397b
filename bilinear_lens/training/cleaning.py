"""Clean stories (broken characters, curly quotation marks, spaces, duplicates) and write them.

What is left alone, since no rule tells it from good text: stories that stop in the middle (many end
in "The End", without a full stop), words of other languages, and characters that lost a byte.
"""

import gzip
import os
import re
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain
from pathlib import Path

from datasets import Dataset
from tqdm.auto import tqdm

from bilinear_lens.training.text import END_OF_TEXT, Texts, batches, in_memory

_BYTES = {bytes([byte]).decode("cp1252", "ignore") or chr(byte): byte for byte in range(128, 256)}
"""The byte of each character, in the encoding that UTF-8 was taken for."""
_REST = "".join(character for character, byte in _BYTES.items() if byte < 0xC0)
# Letters with accents, punctuation and emoji, as UTF-8 bytes that became characters. Each begins
# with what does not stand before such characters in good text, as "é" or "ß" would.
_DAMAGED = re.compile(f"[ÂÃ][{_REST}]|â[{_REST}]{{2}}|ðŸ[{_REST}]{{2}}")
# "é" as "Ã©", put in lower case later; without quotation marks, which follow a Portuguese "ã".
_DAMAGED_LOWER = re.compile("ã([¡-ª¬-º¼-¿])")
_LOST_BYTE = "â€"
"""A closing quotation mark whose third byte, 9D, is no character in cp1252 and was dropped."""

_QUOTES = str.maketrans(dict.fromkeys("“”„‟", '"') | dict.fromkeys("\u2018\u2019\u201a\u201b", "'"))
_SPACES = re.compile(r"[^\S\n]+")
_LINE_ENDS = re.compile(r" ?\n ?")
_BLANK_LINES = re.compile(r"\n{3,}")
_NO_LETTER_OR_DIGIT = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class CleaningCounts:
    """What `clean` did, in documents and in bytes of UTF-8."""

    read: int
    empty: int
    """Without a letter or a digit."""
    duplicates: int
    kept: int
    repaired: int
    """Of those kept: with characters that had been decoded wrongly."""
    quotes: int
    """Of those kept: with quotation marks or apostrophes that were not straight."""
    spaces: int
    """Of those kept: with spaces or line ends that were not plain."""
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        rows = {
            "documents read": self.read,
            "  empty": self.empty,
            "  duplicates": self.duplicates,
            "  kept": self.kept,
            "    characters repaired": self.repaired,
            "    quotes made straight": self.quotes,
            "    spaces made plain": self.spaces,
            "bytes read": self.bytes_before,
            "bytes kept": self.bytes_after,
        }
        return "\n".join(f"{name:<26}{count:>16,}" for name, count in rows.items())


def clean(documents: Texts, *, lowercase: bool = False) -> tuple[Dataset, CleaningCounts]:
    """Documents fit to train a small model on, and what was done, in one pass.

    - UTF-8 that was read as Windows-1252 is decoded again, where it is damaged ("â€œ" to a
      quotation mark, "Ã©" to "é").
    - Curly quotation marks and apostrophes become straight ones.
    - Any run of spaces and tabs becomes one space, none at the ends of lines; at most one line in a
      row is blank. So indentation is lost: clean no code.
    - Of documents with the same letters and digits, whatever their case, the first is kept.

    The result is in memory. Duplicates are known by 16 bytes a document.

    Args:
        documents: strings, or a dataset or stream with a column "text"; None counts as empty.
        lowercase: also put everything in lower case.

    Raises:
        ValueError: if no document has a letter or a digit.
    """
    counts = dict.fromkeys(("read", "empty", "duplicates", "kept"), 0)
    counts |= dict.fromkeys(("repaired", "quotes", "spaces", "bytes_before", "bytes_after"), 0)
    seen: set[bytes] = set()

    def cleaned():
        total = len(documents) if isinstance(documents, Dataset) else None
        texts = chain.from_iterable(batches(documents))
        for text in tqdm(texts, total=total, desc="Cleaning", unit=" documents"):
            text = text or ""  # a dataset may have rows without
            counts["read"] += 1
            counts["bytes_before"] += len(text.encode())
            repaired = repair_characters(text)
            straight = repaired.translate(_QUOTES)
            plain = plain_spaces(straight)
            letters = _NO_LETTER_OR_DIGIT.sub("", plain.casefold())
            key = blake2b(letters.encode(), digest_size=16).digest()
            if not letters or key in seen:
                counts["duplicates" if letters else "empty"] += 1
                continue
            seen.add(key)
            kept = plain.lower() if lowercase else plain
            counts["kept"] += 1
            counts["repaired"] += repaired != text
            counts["quotes"] += straight != repaired
            counts["spaces"] += plain != straight
            counts["bytes_after"] += len(kept.encode())
            yield kept

    kept = in_memory(cleaned())
    if not len(kept):
        raise ValueError(f"None of {counts['read']} documents has a letter or a digit.")
    return kept, CleaningCounts(**counts)


def repair_characters(text: str) -> str:
    """Text whose UTF-8 was read as Windows-1252, decoded again where it is damaged."""
    text = _DAMAGED.sub(lambda run: _decode(run[0]), text).replace(_LOST_BYTE, "”")
    return _DAMAGED_LOWER.sub(lambda run: _decode("Ã" + run[1]), text)


def _decode(run: str) -> str:
    return bytes(_BYTES[character] for character in run).decode("utf-8")


def plain_spaces(text: str) -> str:
    """Text with single spaces, none at the ends of lines, and at most one blank line in a row."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = _LINE_ENDS.sub("\n", _SPACES.sub(" ", text))
    return _BLANK_LINES.sub("\n\n", text).strip()


def check_new_text(file: str | Path) -> None:
    """Refuse, before any work, a file that `save_text` could not write.

    Raises:
        ValueError: if it exists, its ending is not known, or its folder cannot be written to.
    """
    file = Path(file)
    if file.exists():
        raise ValueError(f"{file} exists already: give another name, or remove it.")
    if not file.name.endswith((".txt.gz", ".jsonl", ".parquet")):
        raise ValueError(f"Cannot write {file}: its name must end in .txt.gz, .jsonl or .parquet.")
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise ValueError(f"Cannot write {file}: name a file in a folder that you may write.")


def save_text(documents: Dataset, file: str | Path) -> None:
    """Write documents as `load_text` reads them; the file appears whole or not at all.

    Args:
        file: .txt.gz (`<|endoftext|>` between documents), .jsonl or .parquet.

    Raises:
        ValueError: as for `check_new_text`, or if `<|endoftext|>` stands in a document that goes
            to a .txt.gz file.
    """
    check_new_text(file)
    partial = Path(f"{file}.partial")
    try:
        if str(file).endswith(".jsonl"):
            documents.to_json(partial, lines=True, force_ascii=False)
        elif str(file).endswith(".parquet"):
            documents.to_parquet(partial)
        else:
            _write_text(documents, partial)
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)


def _write_text(documents: Dataset, file: Path) -> None:
    with gzip.open(file, "wt", encoding="utf-8", newline="\n") as stream:
        for number, text in enumerate(chain.from_iterable(batches(documents))):
            if END_OF_TEXT in text:
                raise ValueError(
                    f"Document {number} holds {END_OF_TEXT}, which stands between documents in a "
                    ".txt.gz file: write .jsonl or .parquet."
                )
            stream.write(f"\n{END_OF_TEXT}\n{text}" if number else text)
