"""Commands about latents of sparse autoencoders around an MLP: list, show, predict, browse."""

from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import bilinear_lens as bl
from bilinear_lens.cli.options import ModelArgument, TokenizerOption
from bilinear_lens.models.checkpoints import check_new
from bilinear_lens.pages.features import feature_browser
from bilinear_lens.training.text import load_text
from bilinear_lens.views.style import visible

app = typer.Typer(
    no_args_is_help=True,
    help="Latents of sparse autoencoders around an MLP: what builds them, read from the weights.",
)
console = Console(highlight=False)

MEANING = 2
"""Examples that tell what a latent means, by three tokens each."""
ORDERS = ("kurtosis", "outliers", "effective_rank", "top_2", "self_share", "deviations")

SHOWN = ["latent", "effective_rank", "top_2", "kurtosis", "outliers", "a", "b", "deviations"]
"""Columns in the terminal: what says how concentrated a latent's interactions are."""

SaesArgument = Annotated[
    str, typer.Argument(help="A folder or Hub id with SAEs, or tinystories-4l-saes.")
]
LayerOption = Annotated[int, typer.Option(help="Of the MLP.")]
InputsOption = Annotated[
    str | None, typer.Option(help="The subfolder of the SAE before it: blocks.N.mlp.hook_in.")
]
OutputsOption = Annotated[
    str | None, typer.Option(help="The subfolder of the SAE behind it: blocks.N.mlp.hook_out.")
]
SideOption = Annotated[
    str, typer.Option(help="encoder: what makes a latent active; decoder: what writes along it.")
]
FeatureTextOption = Annotated[
    list[str] | None,
    typer.Option(help="Text for examples: files or a dataset's name; held-out TinyStories else."),
]


@app.command("list")
def list_latents(
    model: ModelArgument,
    saes: SaesArgument,
    layer: LayerOption,
    inputs: InputsOption = None,
    outputs: OutputsOption = None,
    side: SideOption = "encoder",
    by: Annotated[str, typer.Option(help=f"One of {', '.join(ORDERS)}.")] = "kurtosis",
    limit: Annotated[int, typer.Option(min=1, help="Rows shown.")] = 20,
    memory: Annotated[float, typer.Option(help="Working memory, GiB.")] = 1.0,
    out: Annotated[Path | None, typer.Option(help="Also write all rows there (.csv).")] = None,
    tokenizer: TokenizerOption = None,
) -> None:
    """List output latents by what their interactions are like, to find those worth a look.

    Example: bilinear-lens features list tinystories-4l tinystories-4l-saes --layer 2
    """
    if by not in ORDERS:
        raise ValueError(f"--by {by} must be one of {', '.join(ORDERS)}.")
    if out is not None:
        check_new(out)
    hooked, before, behind = _load(model, saes, layer, inputs, outputs, tokenizer)
    table = bl.feature_summary(
        hooked, inputs=before, outputs=behind, side=side, memory=round(memory * 2**30)
    )
    table = table.sort_values(by, ascending=by == "effective_rank", ignore_index=True)
    _print(table.head(limit).filter(SHOWN))
    if out is not None:
        table.to_csv(out, index=False)
        console.print(f"Wrote {escape(str(out.resolve()))}", soft_wrap=True)


@app.command()
def show(
    model: ModelArgument,
    saes: SaesArgument,
    latent: Annotated[int, typer.Argument(help="The number of an output latent.")],
    layer: LayerOption,
    inputs: InputsOption = None,
    outputs: OutputsOption = None,
    side: SideOption = "encoder",
    k: Annotated[int, typer.Option(min=1, help="Pairs of each kind.")] = 10,
    text: FeatureTextOption = None,
    tokenizer: TokenizerOption = None,
) -> None:
    """Print which pairs of input latents build an output latent, and what they mean.

    Example: bilinear-lens features show tinystories-4l tinystories-4l-saes 3 --layer 2
    """
    documents, _ = _documents(text)
    hooked, before, behind = _load(model, saes, layer, inputs, outputs, tokenizer)
    found = bl.feature_interactions(hooked, latent, inputs=before, outputs=behind, side=side, k=k)
    read = sorted({int(i) for end in ("a", "b") for i in found.pairs[end].dropna()})
    meanings = bl.latent_examples(hooked, before, documents, latents=read)
    own = bl.latent_examples(hooked, behind, documents, latents=[latent])
    console.print(f"[bold]{escape(found.header)}[/]", soft_wrap=True)
    console.print(f"latent {latent}: {escape(_meaning(own, latent))}", soft_wrap=True)
    rows = found.pairs.copy()
    for end in ("a", "b"):
        rows[end] = [
            "constant" if pd.isna(i) else f"{i}: {_meaning(meanings, int(i))}" for i in rows[end]
        ]
    _print(rows)


@app.command()
def predict(
    model: ModelArgument,
    saes: SaesArgument,
    layer: LayerOption,
    outputs: OutputsOption = None,
    text: FeatureTextOption = None,
    tokenizer: TokenizerOption = None,
) -> None:
    """Print how well a few eigenvectors predict the latents behind an MLP on text.

    Example: bilinear-lens features predict tinystories-4l tinystories-4l-saes --layer 2
    """
    documents, _ = _documents(text)
    hooked = bl.HookedBilinearTransformer.from_pretrained(model, tokenizer=tokenizer)
    behind = bl.SparseAutoencoder.from_pretrained(saes, outputs or f"blocks.{layer}.mlp.hook_out")
    _check_layer(behind, layer)
    curve = bl.latent_prediction(hooked, behind, documents)
    for score in ("correlation", "r2"):
        bounds = (curve.pop(f"{score}_{end}") for end in ("low", "high"))
        numbers = zip(curve[score], *bounds, strict=True)
        curve[score] = [f"{each:.3f} ({low:.3f} to {high:.3f})" for each, low, high in numbers]
    console.print(f"{curve.pop('n_latents').iloc[0]} latents of {behind.hook_out}, 95 % intervals")
    _print(curve)


@app.command()
def browse(
    model: ModelArgument,
    saes: SaesArgument,
    layer: LayerOption,
    out: Annotated[Path, typer.Option(help="A new folder, for its index.html.")],
    inputs: InputsOption = None,
    outputs: OutputsOption = None,
    side: SideOption = "encoder",
    latent: Annotated[
        list[int] | None, typer.Option(help="An output latent; all otherwise. May be repeated.")
    ] = None,
    text: FeatureTextOption = None,
    tokenizer: TokenizerOption = None,
) -> None:
    """Write pages about latents, linked by their interactions, with a search: they open offline.

    Example: bilinear-lens features browse tinystories-4l tinystories-4l-saes --layer 2 --out pages
    """
    check_new(out)
    documents, source = _documents(text)
    hooked, before, behind = _load(model, saes, layer, inputs, outputs, tokenizer)
    feature_browser(
        hooked, before, behind, documents, out, latents=latent, side=side, source=source
    )
    console.print(f"Wrote {escape(str((out / 'index.html').resolve()))}", soft_wrap=True)


def _load(
    model: str,
    saes: str,
    layer: int,
    inputs: str | None,
    outputs: str | None,
    tokenizer: str | None,
) -> tuple[bl.HookedBilinearTransformer, bl.SparseAutoencoder, bl.SparseAutoencoder]:
    load = bl.SparseAutoencoder.from_pretrained
    before = load(saes, inputs or f"blocks.{layer}.mlp.hook_in")
    behind = load(saes, outputs or f"blocks.{layer}.mlp.hook_out")
    for sae in (before, behind):
        _check_layer(sae, layer)
    hooked = bl.HookedBilinearTransformer.from_pretrained(model, tokenizer=tokenizer)
    return hooked, before, behind


def _check_layer(sae: bl.SparseAutoencoder, layer: int) -> None:
    if not sae.hook_out.startswith(f"blocks.{layer}."):
        raise ValueError(f"--layer {layer} is another one than that of the SAE of {sae.hook_out}.")


def _documents(text: list[str] | None) -> tuple[list[str], str]:
    if text is None:
        return bl.held_out_stories(), "held-out TinyStories"
    return list(load_text(text)["text"]), ", ".join(Path(each).name for each in text)


def _meaning(examples: bl.LatentExamples, latent: int) -> str:
    if not examples.density(latent):
        return "dead on this text"
    ends = (e.tokens[max(0, e.peak - 2) : e.peak + 1] for e in examples.of(latent)[:MEANING])
    return " | ".join("".join(map(visible, end)) for end in ends)


def _print(rows: pd.DataFrame) -> None:
    table = Table(*map(str, rows.columns), box=None, header_style="bold")
    for row in rows.itertuples(index=False):
        numbers = (f"{each:.4g}" if isinstance(each, float) else str(each) for each in row)
        cells = ("" if each == "nan" else each for each in numbers)
        table.add_row(*map(escape, cells))
    console.print(table)
