"""Options that several commands share, with their help."""

from typing import Annotated

import typer

ModelArgument = Annotated[str, typer.Argument(help="A built-in model, a folder or a Hub id.")]
WindowOption = Annotated[int, typer.Option(help="Tokens of a window, at most the model's context.")]
TokenizerOption = Annotated[
    str | None,
    typer.Option(help="A folder, built-in model or Hub id with the tokenizer, instead of its own."),
]
ContrastOption = Annotated[
    str, typer.Option(help="A token to measure against; the mean over all tokens otherwise.")
]
TextOption = Annotated[
    list[str],
    typer.Option(
        help="Training text: files (.txt, documents separated by <|endoftext|>, or .jsonl, "
        "plain or .gz, or .parquet; may be repeated), or a dataset's name: tinystories, "
        "fineweb-edu, owner/name[:configuration], and which part: 'fineweb-edu@train[1000:]'."
    ),
]
HeldOutOption = Annotated[
    list[str] | None,
    typer.Option(
        help="Text for the reported loss, likewise; of a dataset its split validation, which "
        "is what a named --text needs no --held-out for."
    ),
]
StreamingOption = Annotated[
    bool,
    typer.Option("--streaming", help="Read the text while training; needs --steps or --tokens."),
]
GradientAccumulationOption = Annotated[int, typer.Option(min=1, help="Batches a step.")]
GradientCheckpointingOption = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
]
ReportToOption = Annotated[
    str, typer.Option(help="Where to log, too: none, tensorboard, wandb, ...")
]
DataOption = Annotated[
    str | None, typer.Option(help="The text's name, origin and licence, for the model card.")
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on where a run was cut off, from its last checkpoint.")
]
