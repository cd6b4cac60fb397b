"""The command that traces a circuit."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import bilinear_lens as bl
from bilinear_lens.cli.lens import check_writable
from bilinear_lens.cli.options import ContrastOption, TokenizerOption
from bilinear_lens.pages.reports import circuit_page
from bilinear_lens.training.text import load_text
from bilinear_lens.views import graphs
from bilinear_lens.views.report import save_page
from bilinear_lens.views.style import visible

console = Console(highlight=False)

TEXTS, RANDOM = 10, 3
"""Documents that a circuit is checked on, and random circuits beside it."""


def trace(
    model: Annotated[str, typer.Argument(help="A built-in model, a folder or a Hub id.")],
    token: Annotated[str, typer.Argument(help="The output, such as ' named'.")],
    prompt: Annotated[
        str | None,
        typer.Option(help="Trace on this text, at its end; from weights alone otherwise."),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Of the MLP to begin with; all that writes otherwise.")
    ] = None,
    width: Annotated[int, typer.Option(help="Nodes found at each step.")] = 8,
    depth: Annotated[int, typer.Option(help="Steps.")] = 4,
    contrast: ContrastOption = "mean",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Also check the circuit on text, beside random ones (minutes), and write a page "
            "there (.html)."
        ),
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Also write the circuit there, for `bl.Circuit.load`.")
    ] = None,
    graph: Annotated[
        Path | None,
        typer.Option(help="Also write the graph there, as circuit-tracer and Neuronpedia have it."),
    ] = None,
    tokenizer: TokenizerOption = None,
    text: Annotated[
        Path | None,
        typer.Option(help="Text to check on, for the page; held-out TinyStories otherwise."),
    ] = None,
) -> None:
    """Print what TOKEN reads, through eigenvectors and heads down to tokens.

    Example: bilinear-lens trace tinystories-1l ' named' --prompt 'There was a little girl'
    --out named.html
    """
    for file in (out, save, graph):
        if file is not None:
            check_writable(file)
    if text is not None and out is None:
        raise ValueError("--text is for the page: give --out, too.")
    documents = list(load_text(text)["text"]) if text else bl.held_out_stories()
    hooked = bl.HookedBilinearTransformer.from_pretrained(model, tokenizer=tokenizer)
    options = {"prompt": prompt, "layer": layer, "width": width, "depth": depth}
    circuit = bl.trace(hooked, token, contrast=contrast, **options)
    if out is not None:  # refuses what is too large, before minutes of work
        graphs.circuit(circuit.nodes, circuit.edges)
    console.print(f"[bold]{escape(circuit.title)}[/]", soft_wrap=True)
    # on a prompt, what it reads is at the end that projects most
    ends = ["reads_most"] if prompt else ["reads_most", "reads_least"]
    names = [end.replace("_", " ") for end in ends]
    table = Table("node", "token", "score", *names, box=None, header_style="bold")
    for row in circuit.nodes.to_dict("records"):
        reads = (" ".join(map(visible, row[end])) for end in ends)
        at = "" if row["token"] is None else visible(row["token"])
        table.add_row(*map(escape, (row["node"], at, f"{row['score']:.4f}", *reads)))
    console.print(table)
    if save is not None:
        circuit.save(save)
    if graph is not None:
        save_page(graph, circuit.to_json())
    if out is not None:
        documents = documents[:TEXTS]
        drawn = [
            bl.trace(hooked, token, contrast=contrast, random=seed, **options)
            for seed in range(RANDOM)
        ]
        curve = bl.faithfulness(hooked, circuit, documents, random=drawn)
        page = circuit_page(
            bl.measure_effects(hooked, circuit, documents),
            random=[bl.measure_effects(hooked, each, documents) for each in drawn],
            curve=curve,
            source=text.name if text else "held-out TinyStories",
        )
        save_page(out, page)
    for file in (out, save, graph):
        if file is not None:
            console.print(f"Wrote {escape(str(file.resolve()))}")
