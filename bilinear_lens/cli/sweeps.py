"""Commands for whole vocabularies: sweep, search."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import bilinear_lens as bl
from bilinear_lens.cli.options import ContrastOption

console = Console(highlight=False)


def sweep(
    model: Annotated[
        str, typer.Argument(help="A built-in model, a folder or a Hugging Face Hub id.")
    ],
    out: Annotated[Path, typer.Option(help="A new folder for the Parquet files.")],
    layer: Annotated[
        list[int] | None, typer.Option(help="Whose MLP, from 0; may be repeated. All otherwise.")
    ] = None,
    token: Annotated[
        list[str] | None,
        typer.Option(help="An output; may be repeated. The whole vocabulary otherwise."),
    ] = None,
    k: Annotated[int, typer.Option(help="How many eigenvectors of each output.")] = 8,
    n_tokens: Annotated[int, typer.Option(help="Tokens at each end of an eigenvector.")] = 10,
    contrast: ContrastOption = "mean",
    effective_rank: Annotated[
        bool,
        typer.Option("--effective-rank", help="Also each output's, from all its eigenvalues."),
    ] = False,
    vectors: Annotated[
        bool, typer.Option("--vectors", help="Also write the eigenvectors, as safetensors.")
    ] = False,
    memory: Annotated[
        float, typer.Option(help="GiB of working space beside the model, of each worker.")
    ] = 1.0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where this sweep in --out stopped.")
    ] = False,
    executor: Annotated[
        str | None,
        typer.Option(help="local, ray or slurm: shards in other processes (extra `cluster`)."),
    ] = None,
    workers: Annotated[int, typer.Option(help="How many at a time, with --executor.")] = 1,
    partition: Annotated[str | None, typer.Option(help="Slurm's.")] = None,
    time: Annotated[
        str | None, typer.Option(help="Slurm's limit for a shard, such as 2:00:00.")
    ] = None,
) -> None:
    """Write the eigenvector tables of a whole vocabulary, every layer, to Parquet.

    Example: bilinear-lens sweep tinystories-1l --out tables
    """
    made = bl.sweep(
        model,
        out=out,
        layers=layer,
        outputs=token,
        k=k,
        n_tokens=n_tokens,
        contrast=contrast,
        effective_rank=effective_rank,
        vectors=vectors,
        memory=int(memory * 2**30),
        resume=resume,
        executor=executor,  # pyright: ignore[reportArgumentType]
        workers=workers,
        partition=partition,
        time=time,
    )
    if made is None:
        console.print(f"Submitted; --resume does what is missing in {escape(str(out))} later.")
        return
    layers = made.summary().layers.dropna(axis="columns", how="all")
    console.print(layers.to_string(index=False, float_format="{:.3g}".format), markup=False)
    console.print(f"Wrote {escape(str(out))}: bilinear-lens search {escape(str(out))} TOKEN")


def search(
    sweep: Annotated[Path, typer.Argument(help="The folder of a sweep.")],
    token: Annotated[
        str, typer.Argument(help="A token; quote it, most begin with a space: ' she'.")
    ],
    role: Annotated[
        str,
        typer.Option(help="input: what listens for it; output: what it listens for."),
    ] = "input",
    end: Annotated[str, typer.Option(help="Of the eigenvectors: +, - or either.")] = "either",
    layer: Annotated[int | None, typer.Option(help="One layer; all otherwise.")] = None,
    limit: Annotated[int, typer.Option(help="How many rows.")] = 20,
) -> None:
    """Print which outputs listen for TOKEN, or what TOKEN listens for as an output.

    Example: bilinear-lens search tables ' she'
    """
    rows = bl.load_sweep(sweep).search(
        token,
        role=role,  # pyright: ignore[reportArgumentType]
        end=end,  # pyright: ignore[reportArgumentType]
        layer=layer,
        limit=limit,
    )
    if rows.empty:
        console.print(f"No eigenvector of this sweep lists {escape(repr(token))}.")
        return
    for column in ("output", "input"):
        rows[column] = rows[column].map(repr)
    console.print(
        rows.to_string(index=False, float_format="{:.3g}".format), markup=False, soft_wrap=True
    )
