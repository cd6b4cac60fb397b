"""Commands for text: clean."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from bilinear_lens.training import cleaning
from bilinear_lens.training.text import load_text

console = Console(highlight=False)


def clean(
    out: Annotated[Path, typer.Argument(help="A new file: .txt.gz, .jsonl or .parquet.")],
    source: Annotated[
        list[str],
        typer.Argument(
            help="Files (.txt, documents separated by <|endoftext|>, or .jsonl, plain or .gz, or "
            ".parquet), or a dataset's name: tinystories, fineweb-edu, "
            "owner/name[:configuration], and which part: tinystories@validation."
        ),
    ],
    split: Annotated[str, typer.Option(help="The part of a named dataset.")] = "train",
    lowercase: Annotated[
        bool, typer.Option("--lowercase", help="Also put everything in lower case.")
    ] = False,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Leave no copy of a named dataset on the disk.")
    ] = False,
) -> None:
    """Clean text: broken characters, curly quotation marks, spaces, duplicates.

    Example: bilinear-lens clean stories.txt.gz tinystories --lowercase
    """
    cleaning.check_new_text(out)
    documents = load_text(source, split=split, streaming=streaming)
    cleaned, counts = cleaning.clean(documents, lowercase=lowercase)
    cleaning.save_text(cleaned, out)
    console.print(str(counts), markup=False)
    console.print(f"Wrote {escape(str(out))}")
