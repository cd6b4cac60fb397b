"""Commands for a model: demo, info, explain, explain-image, convert, push."""

import math
import os
from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import bilinear_lens as bl
from bilinear_lens.analysis.overview import BILINEAR, describe, output_ranks, overview
from bilinear_lens.cli.options import ContrastOption, TokenizerOption
from bilinear_lens.models.checkpoints import (
    Layout,
    check_new,
    holds_classifier,
    load_checkpoint,
    save_checkpoint,
)
from bilinear_lens.models.hub import push_to_hub
from bilinear_lens.pages.reports import image_page, passage, token_page
from bilinear_lens.training.images import read_image
from bilinear_lens.training.text import load_text
from bilinear_lens.views.report import save_page

console = Console(highlight=False)

CURVE_TEXTS = 100
"""Documents for an ablation curve: enough for an interval, few enough for a minute."""


def demo(
    out: Annotated[Path, typer.Option(help="Where to write the page.")] = Path("report.html"),
) -> None:
    """Read the token " named" in a model that ships with the package, and check it by ablation.

    Needs no network. Takes about a minute on two idle cores.
    """
    model = bl.HookedBilinearTransformer.from_pretrained("tinystories-1l")
    _explain(model, " named", layer=0, k=8, contrast="mean", out=out, text=None)


def info(
    model: Annotated[
        str, typer.Argument(help="A built-in model, a folder or a Hugging Face Hub id.")
    ],
    tokens: Annotated[int, typer.Option(help="Output tokens to sample, in each layer.")] = 64,
) -> None:
    """Print what a model is, whether it is bilinear, and how concentrated its spectra are.

    Example: bilinear-lens info tinystories-4l
    """
    if holds_classifier(model):
        classifier = bl.HookedBilinearClassifier.from_pretrained(model, dtype="auto")
        _print_facts(describe(classifier))
        _print_layers(overview(classifier), "classes")
        ranks = output_ranks(classifier).pivot(
            index="layer", columns="output", values="effective_rank"
        )
        console.print("\n[bold]Effective rank of each class[/]")
        ranks = ranks[[*classifier.cfg.labels]].dropna().T
        ranks.index.name = None
        console.print(ranks.to_string(float_format="{:.1f}".format), markup=False)
        return
    plain, tokenizer = load_checkpoint(model, dtype="auto")
    facts = describe(plain, tokenizer)
    _print_facts(facts)
    if facts["MLPs"] == BILINEAR:
        hooked = bl.HookedBilinearTransformer.from_hf(plain.float())
        _print_layers(overview(hooked, n_tokens=tokens), "tokens")


def explain(
    model: Annotated[
        str,
        typer.Argument(
            help="A built-in model (tinystories-1l, tinystories-4l), a folder or a "
            "Hugging Face Hub id."
        ),
    ],
    token: Annotated[
        str, typer.Argument(help="The output token; quote it, most begin with a space: ' girl'.")
    ],
    layer: Annotated[int, typer.Option(help="Whose MLP, from 0.")] = 0,
    k: Annotated[int, typer.Option(help="How many eigenvectors.")] = 8,
    contrast: ContrastOption = "mean",
    out: Annotated[
        Path | None, typer.Option(help="Also ablate, on text, and write a page there (.html).")
    ] = None,
    tokenizer: TokenizerOption = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text for the page, .txt or .txt.gz, documents separated by "
            "<|endoftext|>; held-out TinyStories otherwise."
        ),
    ] = None,
) -> None:
    """Print what a layer listens for when it writes TOKEN; with --out, write a page about it.

    Example: bilinear-lens explain tinystories-1l ' she' --contrast ' he' --out she.html
    """
    hooked = bl.HookedBilinearTransformer.from_pretrained(model, tokenizer=tokenizer)
    _explain(hooked, token, layer=layer, k=k, contrast=contrast, out=out, text=text)


def convert(
    src: Annotated[str, typer.Argument(help="A folder or Hub id, in any layout that loads.")],
    dst: Annotated[Path, typer.Argument(help="A new folder.")],
    layout: Annotated[
        Layout, typer.Option(help="Of DST; authors is that of the bilinear papers' authors.")
    ] = "hugging-face",
    tokenizer: TokenizerOption = None,
) -> None:
    """Write a checkpoint as a plain Hugging Face folder, or in the papers' authors' layout.

    Reads both. A Hugging Face folder loads with AutoModelForCausalLM and needs no remote code. The
    logits are the same, whichever the layout; what the authors' cannot say is refused.

    Example: bilinear-lens convert tdooms/ts-medium ts-medium
    """
    check_new(dst)
    model, loaded = load_checkpoint(src, dtype="auto", tokenizer=tokenizer)
    save_checkpoint(model, loaded, dst, layout=layout)
    note = "" if loaded else " (without a tokenizer: none could be had)"
    console.print(f"Wrote {escape(str(dst))}{note}")


def push(
    folder: Annotated[Path, typer.Argument(help="A saved model, with a README.md as its card.")],
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="Made if there is none.")],
    private: Annotated[
        bool, typer.Option("--private", help="In a repository that others cannot see.")
    ] = False,
) -> None:
    """Upload a saved model to the Hugging Face Hub: config, weights, tokenizer and card.

    Log in first: `hf auth login`. Example: bilinear-lens push my-digits somebody/my-digits
    """
    console.print(escape(push_to_hub(folder, repo_id, private=private)), soft_wrap=True)


def explain_image(
    model: Annotated[
        str, typer.Argument(help="mnist-1l, or a folder or Hub id with a classifier.")
    ],
    image: Annotated[
        str, typer.Argument(help="A picture file, or the number of an image of --data, from 0.")
    ],
    data: Annotated[
        str, typer.Option(help="Where numbered images are from, as for `train vision`: test split.")
    ] = "digits",
    classes: Annotated[
        int | None, typer.Option(help="How many classes, of the largest logits; up to 3 otherwise.")
    ] = None,
    k: Annotated[
        int | None, typer.Option(help="How many eigenvectors of each class; up to 5 otherwise.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Also write a page there (.html); of a model of one layer."),
    ] = None,
) -> None:
    """Print which eigenvectors fired for IMAGE, and how much each adds to its logits.

    Example: bilinear-lens explain-image my-digits 7 --out seven.html
    """
    if out is not None:
        check_writable(out)
    classifier = bl.HookedBilinearClassifier.from_pretrained(model)
    if out is not None and classifier.cfg.n_layers > 1:
        raise ValueError(
            f"{model} has {classifier.cfg.n_layers} layers: the eigenvectors that add up to its "
            "logits are patterns of hidden activations, no pictures. Leave out --out."
        )
    if image.isdecimal():
        held = bl.load_images(data, "test")
        number = int(image)
        if number >= len(held):
            raise ValueError(f"{data} has the images 0 to {len(held) - 1}, no {number}.")
        if held.images.shape[1:] != classifier.cfg.input_shape:
            raise ValueError(
                f"The images of {data} are {list(held.images.shape[1:])}; {model} takes "
                f"{list(classifier.cfg.input_shape)}: choose others, such as "
                "--data mnist."
            )
        pixels, name = held.images[number], f"image {number} of {data}"
        name += f", labelled {held.names[int(held.labels[number])]}"
    else:
        pixels, name = read_image(image, classifier.cfg.input_shape), Path(image).name
    explanation = bl.explain_image(classifier, pixels, classes=classes, k=k)
    console.print(f"{escape(name)}: {escape(explanation.prediction)}")
    console.print(repr(explanation), markup=False, soft_wrap=True)
    if out is not None:
        save_page(out, image_page(classifier, explanation, name=name))
        console.print(f"\nWrote {escape(str(out.resolve()))}: open it in a browser.")


def _explain(
    model: bl.HookedBilinearTransformer,
    token: str,
    *,
    layer: int,
    k: int,
    contrast: str,
    out: Path | None,
    text: Path | None,
) -> None:
    if out is not None:
        check_writable(out)
    elif text is not None:
        raise ValueError("--text is for the page: give --out, too.")
    table = bl.interactions(model, token, layer=layer, k=k, contrast=contrast)
    console.print(repr(table), markup=False, soft_wrap=True)
    if out is None:
        return
    documents = list(load_text(text)["text"]) if text else bl.held_out_stories()
    source = text.name if text else "held-out TinyStories"
    start = " ".join(documents[0].split()[:8])
    torch.manual_seed(0)
    generated = str(model.generate(start, max_new_tokens=80, temperature=0.7, verbose=False))
    console.print("\n[bold]The model writes[/]\n" + escape(generated))
    curve = bl.ablation_curve(model, token, documents[:CURVE_TEXTS], layer=layer, contrast=contrast)
    console.print(
        f"\n[bold]Ablation[/]: change of the logit, {escape(table.output)}, where the token is the "
        f"right answer in {escape(source)}, without k eigenvectors"
    )
    effects = curve.pivot(index="k", columns="eigenvectors", values="logit")
    effects = effects.reindex(columns=["top", "random", "bottom"]).round(2) + 0.0  # no -0.00
    effects.columns.name = None
    console.print(
        effects.to_string(float_format="{:.2f}".format),
        markup=False,
    )
    reached = bl.k_reaching(curve)
    console.print(
        f"90 % of the effect: top {reached['top']}, random {reached['random']}, "
        f"bottom {reached['bottom']} eigenvectors"
    )
    page = token_page(
        model,
        table,
        curve=curve,
        read=passage(model, documents, model.token_id(token)),
        source=source,
        generated=generated,
    )
    save_page(out, page)
    console.print(f"\nWrote {escape(str(out.resolve()))}: open it in a browser.")


def _print_facts(facts: dict[str, str]) -> None:
    grid = Table.grid(padding=(0, 2))
    for name, fact in facts.items():
        grid.add_row(name, escape(fact))
    console.print(grid)


def _print_layers(layers: pd.DataFrame, outputs: str) -> None:
    """`overview`, a row for each layer."""
    console.print(
        f"\n[bold]Layers[/], by the mean over {layers['outputs'].iloc[0]} output {outputs}; in "
        "brackets that of Gaussian weights",
        soft_wrap=True,
    )
    table = Table("layer", "rank", "norm", box=None, header_style="bold")
    for heading in ("effective rank (95 %)", "top 1 holds", "top 8 hold"):
        table.add_column(heading, justify="right")
    for row in layers.to_dict("records"):
        read = ["nothing that classes read", "", ""]
        if not math.isnan(row["effective_rank"]):
            half = (row["effective_rank_high"] - row["effective_rank_low"]) / 2
            read = [
                f"{row['effective_rank']:.1f} ± {half:.1f} ({row['random_effective_rank']:.1f})",
                *(f"{row[f'top_{k}']:.1%} ({row[f'random_top_{k}']:.1%})" for k in (1, 8)),
            ]
        table.add_row(str(row["layer"]), str(row["rank"]), f"{row['norm']:.3g}", *read)
    console.print(table)


def check_writable(file: Path) -> None:
    """Before the work, not after it."""
    if file.is_dir() or not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise ValueError(
            f"Cannot write {file}: name a file in a folder that exists and that you may write."
        )
