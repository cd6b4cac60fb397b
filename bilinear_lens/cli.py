"""`bilinear-lens`: commands that parse, call the library, and print."""

import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console
from rich.markup import escape

import bilinear_lens as bl
from bilinear_lens.models.checkpoints import check_new, load_checkpoint, save_checkpoint
from bilinear_lens.models.fitting import FitRecipe
from bilinear_lens.pages import image_page, passage, token_page
from bilinear_lens.training.images import read_image
from bilinear_lens.training.language import LanguageRecipe, train_language
from bilinear_lens.training.text import read_stories
from bilinear_lens.training.vision import train_vision
from bilinear_lens.views.report import save_page

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Read bilinear transformers from their weights: the eigenvectors of what each MLP writes.",
)
train = typer.Typer(no_args_is_help=True, help="Train models.")
app.add_typer(train, name="train")
console = Console(highlight=False)

TokenizerOption = Annotated[
    str | None,
    typer.Option(help="A folder, built-in model or Hub id with the tokenizer, instead of its own."),
]

CURVE_TEXTS = 100
"""Documents for an ablation curve: enough for an interval, few enough for a minute."""


def main() -> None:
    """The entry point: a fault of the input is one line and exit code 2."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        app(prog_name="bilinear-lens")
    except (ValueError, KeyError) as error:
        message = " ".join(str(error.args[0] if error.args else error).split())
        Console(stderr=True, highlight=False).print(
            f"[bold red]error:[/] {escape(message)}", soft_wrap=True
        )
        sys.exit(2)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where to write the page.")] = Path("report.html"),
) -> None:
    """Read the token " named" in a model that ships with the package, and check it by ablation.

    Needs no network. Takes about a minute on two idle cores.
    """
    model = bl.HookedBilinearTransformer.from_pretrained("tinystories-1l")
    _explain(model, " named", layer=0, k=8, contrast="mean", out=out, text=None)


@app.command()
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
    contrast: Annotated[
        str, typer.Option(help="A token to measure against; the mean over all tokens otherwise.")
    ] = "mean",
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


@app.command()
def convert(
    src: Annotated[str, typer.Argument(help="A folder or Hub id, in any layout that loads.")],
    dst: Annotated[Path, typer.Argument(help="A new folder.")],
    tokenizer: TokenizerOption = None,
) -> None:
    """Write a checkpoint as a plain Hugging Face folder.

    Reads the layout of the bilinear papers' authors, too. The result loads with
    AutoModelForCausalLM, needs no remote code, and gives the same logits.
    """
    check_new(dst)
    model, loaded = load_checkpoint(src, dtype="auto", tokenizer=tokenizer)
    save_checkpoint(model, loaded, dst)
    note = "" if loaded else " (without a tokenizer: none could be had)"
    console.print(f"Wrote {escape(str(dst))}{note}")


@train.command()
def language(
    out: Annotated[Path, typer.Argument(help="A new folder for the model.")],
    text: Annotated[
        list[Path],
        typer.Option(
            help="Training text, .txt or .txt.gz, documents separated by <|endoftext|>. "
            "May be repeated."
        ),
    ],
    held_out: Annotated[list[Path], typer.Option(help="Text for the reported loss.")],
    layers: Annotated[int, typer.Option(help="Number of layers.")] = LanguageRecipe.n_layers,
    d_model: Annotated[int, typer.Option(help="Width.")] = LanguageRecipe.d_model,
    d_mlp: Annotated[int, typer.Option(help="Hidden width of the MLPs.")] = LanguageRecipe.d_mlp,
    heads: Annotated[int, typer.Option(help="Attention heads a layer.")] = LanguageRecipe.n_heads,
    n_ctx: Annotated[int, typer.Option(help="Context, in tokens.")] = LanguageRecipe.n_ctx,
    vocab_size: Annotated[
        int, typer.Option(help="Tokens of the BPE tokenizer trained on the text.")
    ] = LanguageRecipe.vocab_size,
    activation: Annotated[
        str, typer.Option(help="Of the gate: linear (bilinear), silu, relu or gelu.")
    ] = LanguageRecipe.activation,
    epochs: Annotated[float, typer.Option(help="Passes over the text.")] = LanguageRecipe.epochs,
    batch_size: Annotated[
        int, typer.Option(help="Windows of n-ctx tokens a step.")
    ] = LanguageRecipe.batch_size,
    lr: Annotated[
        float, typer.Option(help="Highest learning rate.")
    ] = LanguageRecipe.learning_rate,
    weight_decay: Annotated[
        float, typer.Option(help="AdamW's; more of it makes spectra steeper.")
    ] = LanguageRecipe.weight_decay,
    seed: Annotated[int, typer.Option(help="Of initialisation and order.")] = LanguageRecipe.seed,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A folder with a tokenizer to use instead.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    data: Annotated[
        str | None, typer.Option(help="The text's name, origin and licence, for the model card.")
    ] = None,
    twin: Annotated[
        bool, typer.Option("--twin", help="Also train a SwiGLU model the same way, to compare.")
    ] = False,
) -> None:
    """Train a small bilinear language model on text files.

    Example: bilinear-lens train language my-model --text stories.txt --held-out others.txt
    """
    losses = train_language(
        out,
        text=text,
        held_out=held_out,
        recipe=LanguageRecipe(
            n_layers=layers,
            d_model=d_model,
            d_mlp=d_mlp,
            n_heads=heads,
            n_ctx=n_ctx,
            vocab_size=vocab_size,
            activation=activation,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=lr,
            weight_decay=weight_decay,
            seed=seed,
        ),
        tokenizer=tokenizer,
        resume=resume,
        command=shlex.join(["bilinear-lens", *sys.argv[1:]]),
        data=data,
        twin=twin,
    )
    for gate, loss in losses.items():
        console.print(
            f"{gate}: held-out loss {loss.per_token:.4f} nats per token, "
            f"{loss.per_byte:.4f} per byte"
        )
    console.print(f"Wrote {escape(str(out))}")


@train.command()
def vision(
    out: Annotated[Path, typer.Argument(help="A new folder for the model.")],
    data: Annotated[
        str,
        typer.Option(
            help="digits (ships with the package), a folder with idx files, a folder with train/ "
            "and test/ (in each a folder of images for each class), or a dataset's name: mnist, "
            "fashion-mnist, ylecun/mnist, ..."
        ),
    ] = "digits",
    d_model: Annotated[int, typer.Option(help="Width.")] = bl.ClassifierConfig.d_model,
    d_mlp: Annotated[
        int | None, typer.Option(help="Products a layer computes; as many as --d-model otherwise.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = bl.ClassifierConfig.n_layers,
    residual: Annotated[
        bool, typer.Option("--residual", help="Layers add to their input.")
    ] = False,
    bias: Annotated[bool, typer.Option("--bias", help="Layers have biases.")] = False,
    epochs: Annotated[int, typer.Option(help="Passes over the images.")] = FitRecipe.epochs,
    batch_size: Annotated[
        int | None, typer.Option(help="Images a step; 2048, or fewer of a small set, otherwise.")
    ] = FitRecipe.batch_size,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = FitRecipe.learning_rate,
    weight_decay: Annotated[
        float, typer.Option(help="AdamW's; more of it makes spectra steeper.")
    ] = FitRecipe.weight_decay,
    input_noise: Annotated[
        float, typer.Option(help="Standard deviation of Gaussian noise on the pixels.")
    ] = FitRecipe.input_noise,
    salt_and_pepper: Annotated[
        float, typer.Option(help="Share of the pixels set to 0 or 1.")
    ] = FitRecipe.salt_and_pepper,
    latent_noise: Annotated[
        float, typer.Option(help="Noise on what each layer reads, relative to its own size.")
    ] = FitRecipe.latent_noise,
    dropout: Annotated[
        float, typer.Option(help="Share of what each layer reads set to 0.")
    ] = FitRecipe.dropout,
    l1: Annotated[float, typer.Option(help="Penalty on the weights' magnitudes.")] = FitRecipe.l1,
    seed: Annotated[int, typer.Option(help="Of weights, order and noise.")] = FitRecipe.seed,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Forward passes in bfloat16: about twice as fast.")
    ] = False,
    image_column: Annotated[
        str | None, typer.Option(help="Where a dataset has several columns of images.")
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Where a dataset has several columns of classes, or strings.")
    ] = None,
) -> None:
    """Train a bilinear image classifier.

    Example: bilinear-lens train vision my-digits --epochs 60 --input-noise 0.2 --lr 3e-3
    """
    _, accuracy = train_vision(
        out,
        data=data,
        model={
            "d_model": d_model,
            "d_mlp": d_mlp,
            "n_layers": layers,
            "residual": residual,
            "bias": bias,
        },
        recipe=FitRecipe(
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=lr,
            weight_decay=weight_decay,
            input_noise=input_noise,
            salt_and_pepper=salt_and_pepper,
            latent_noise=latent_noise,
            dropout=dropout,
            l1=l1,
            seed=seed,
            bf16=bf16,
        ),
        image_column=image_column,
        label_column=label_column,
        command=shlex.join(["bilinear-lens", *sys.argv[1:]]),
    )
    console.print(f"accuracy on the test split: {accuracy:.4f}")
    console.print(f"Wrote {escape(str(out))}")


@app.command("explain-image")
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
        _check_writable(out)
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
        _check_writable(out)
    elif text is not None:
        raise ValueError("--text is for the page: give --out, too.")
    table = bl.interactions(model, token, layer=layer, k=k, contrast=contrast)
    console.print(repr(table), markup=False, soft_wrap=True)
    if out is None:
        return
    documents = read_stories([text]) if text else bl.held_out_stories()
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


def _check_writable(file: Path) -> None:
    """Before the work, not after it."""
    if file.is_dir() or not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise ValueError(
            f"Cannot write {file}: name a file in a folder that exists and that you may write."
        )
