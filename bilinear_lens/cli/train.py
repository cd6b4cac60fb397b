"""Commands that train: language, vision, sae, transcoder."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import bilinear_lens as bl
from bilinear_lens.cli.options import (
    DataOption,
    GradientAccumulationOption,
    GradientCheckpointingOption,
    HeldOutOption,
    ModelArgument,
    ReportToOption,
    ResumeOption,
    StreamingOption,
    TextOption,
    TokenizerOption,
    WindowOption,
)
from bilinear_lens.models.bridges import load_bridge
from bilinear_lens.models.fitting import FitRecipe
from bilinear_lens.training.card import shown_command
from bilinear_lens.training.corpus import held_out_documents, source_names
from bilinear_lens.training.language import Equal, train_language
from bilinear_lens.training.recipe import LanguageRecipe
from bilinear_lens.training.reconstruction import Trained
from bilinear_lens.training.saes import SaeRecipe, train_saes
from bilinear_lens.training.text import load_text
from bilinear_lens.training.transcoders import TranscoderRecipe, train_transcoders
from bilinear_lens.training.vision import train_vision

app = typer.Typer(no_args_is_help=True, help="Train models.")
console = Console(highlight=False)


@app.command()
def language(
    out: Annotated[Path, typer.Argument(help="A new folder for the model.")],
    text: TextOption,
    held_out: HeldOutOption = None,
    streaming: StreamingOption = False,
    layers: Annotated[int, typer.Option(help="Number of layers.")] = LanguageRecipe.n_layers,
    d_model: Annotated[int, typer.Option(help="Width.")] = LanguageRecipe.d_model,
    d_mlp: Annotated[int, typer.Option(help="Hidden width of the MLPs.")] = LanguageRecipe.d_mlp,
    heads: Annotated[int, typer.Option(help="Attention heads a layer.")] = LanguageRecipe.n_heads,
    n_ctx: Annotated[int, typer.Option(help="Context, in tokens.")] = LanguageRecipe.n_ctx,
    vocab_size: Annotated[
        int, typer.Option(help="Tokens of the BPE tokenizer trained on the text.")
    ] = LanguageRecipe.vocab_size,
    activation: Annotated[
        str, typer.Option(help="Of the gate: linear (bilinear), silu, relu, gelu, ...")
    ] = LanguageRecipe.activation,
    epochs: Annotated[float, typer.Option(help="Passes over the text.")] = LanguageRecipe.epochs,
    tokens: Annotated[
        int | None, typer.Option(help="Train on so many, instead of --epochs.")
    ] = LanguageRecipe.tokens,
    batch_size: Annotated[
        int, typer.Option(help="Windows of n-ctx tokens at once, on each device.")
    ] = LanguageRecipe.batch_size,
    gradient_accumulation: GradientAccumulationOption = LanguageRecipe.gradient_accumulation,
    gradient_checkpointing: GradientCheckpointingOption = LanguageRecipe.gradient_checkpointing,
    bf16: Annotated[
        bool, typer.Option(help="Forward passes and the saved model in bfloat16, or in float32.")
    ] = LanguageRecipe.bf16,
    lr: Annotated[
        float, typer.Option(help="Highest learning rate.")
    ] = LanguageRecipe.learning_rate,
    weight_decay: Annotated[
        float, typer.Option(help="AdamW's; more of it makes spectra steeper.")
    ] = LanguageRecipe.weight_decay,
    latent_noise: Annotated[
        float,
        typer.Option(
            help="Noise on what attention, MLPs and the unembedding read, relative to its size."
        ),
    ] = LanguageRecipe.latent_noise,
    seed: Annotated[int, typer.Option(help="Of weights, order and noise.")] = LanguageRecipe.seed,
    tokenizer: Annotated[
        str | None, typer.Option(help="A folder or Hub id of a tokenizer to use instead.")
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help="Also train a model with this activation in its gate (silu, relu, gelu, ...), "
            "into OUT-swiglu and so on. May be repeated."
        ),
    ] = None,
    equal: Annotated[
        Equal, typer.Option(help="What compared models are given as much of.")
    ] = "tokens",
    resume: ResumeOption = False,
    report_to: ReportToOption = "none",
    data: DataOption = None,
) -> None:
    """Train a small bilinear language model.

    Example: bilinear-lens train language my-model --text stories.txt --held-out others.txt
    """
    results = train_language(
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
            tokens=tokens,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            gradient_checkpointing=gradient_checkpointing,
            bf16=bf16,
            learning_rate=lr,
            weight_decay=weight_decay,
            latent_noise=latent_noise,
            seed=seed,
        ),
        tokenizer=tokenizer,
        streaming=streaming,
        compare=compare or (),
        equal=equal,
        resume=resume,
        report_to=report_to,
        command=shown_command(sys.argv),
        data=data,
    )
    for gate, result in results.items():
        console.print(
            f"{gate}: held-out loss {result.per_token:.4f} nats per token, "
            f"{result.per_byte:.4f} per byte ({result.tokens:,} tokens, {result.seconds:,.0f} s)"
        )
    console.print(f"Wrote {escape(str(out))}")


@app.command()
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
        command=shown_command(sys.argv),
    )
    console.print(f"accuracy on the test split: {accuracy:.4f}")
    console.print(f"Wrote {escape(str(out))}")


@app.command()
def sae(
    model: ModelArgument,
    hook: Annotated[
        list[str],
        typer.Option(help="A hook point, such as blocks.2.mlp.hook_in. May be repeated."),
    ],
    text: TextOption,
    held_out: HeldOutOption = None,
    out: Annotated[
        Path | None, typer.Option(help="A new folder; my-MODEL-saes otherwise, in this one.")
    ] = None,
    expansion: Annotated[
        int, typer.Option(help="Latents for each dimension of the activation.")
    ] = SaeRecipe.expansion,
    k: Annotated[int, typer.Option(help="Latents that are active at a token.")] = SaeRecipe.k,
    epochs: Annotated[int, typer.Option(help="Passes over the text.")] = SaeRecipe.epochs,
    batch_size: Annotated[int, typer.Option(help="Windows a step.")] = SaeRecipe.batch_size,
    window: WindowOption = SaeRecipe.window,
    lr: Annotated[
        float | None, typer.Option(help="Adam's highest; sparsify's own otherwise.")
    ] = SaeRecipe.learning_rate,
    seed: Annotated[int, typer.Option(help="Of weights and order.")] = SaeRecipe.seed,
    tokenizer: TokenizerOption = None,
    data: DataOption = None,
    resume: ResumeOption = False,
) -> None:
    """Train sparse autoencoders (TopK) of a model's activations, with EleutherAI's sparsify.

    Example: bilinear-lens train sae tinystories-4l --hook blocks.2.mlp.hook_in
    --hook blocks.2.mlp.hook_out --text stories.txt --held-out others.txt
    """
    out = out or Path(f"my-{Path(model).name}-saes")
    trained = train_saes(
        load_bridge(model, tokenizer=tokenizer),
        load_text(text),
        hook,
        out=out,
        held_out=held_out_documents(text, held_out, streaming=False),
        recipe=SaeRecipe(
            expansion=expansion,
            k=k,
            epochs=epochs,
            batch_size=batch_size,
            window=window,
            learning_rate=lr,
            seed=seed,
        ),
        resume=resume,
        command=shown_command(sys.argv),
        data=data or ", ".join(source_names(text)),
    )
    _print_trained(trained, out)


@app.command()
def transcoder(
    model: ModelArgument,
    text: TextOption,
    held_out: HeldOutOption = None,
    layer: Annotated[
        list[int] | None, typer.Option(help="A layer; all otherwise. May be repeated.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A new folder; my-MODEL-transcoders otherwise.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="Products that a layer computes; as wide as the MLP otherwise."),
    ] = TranscoderRecipe.rank,
    skip: Annotated[
        bool, typer.Option("--skip/--no-skip", help="Add a linear map of the input.")
    ] = TranscoderRecipe.skip,
    epochs: Annotated[int, typer.Option(help="Passes over the text.")] = TranscoderRecipe.epochs,
    batch_size: Annotated[int, typer.Option(help="Windows a step.")] = TranscoderRecipe.batch_size,
    window: WindowOption = TranscoderRecipe.window,
    lr: Annotated[
        float, typer.Option(help="Highest learning rate.")
    ] = TranscoderRecipe.learning_rate,
    seed: Annotated[int, typer.Option(help="Of weights and order.")] = TranscoderRecipe.seed,
    tokenizer: TokenizerOption = None,
    data: DataOption = None,
    resume: ResumeOption = False,
) -> None:
    """Train a bilinear layer in the place of each MLP of a model that is not bilinear.

    Example: bilinear-lens train transcoder gpt2 --text stories.txt --held-out others.txt
    """
    out = out or Path(f"my-{Path(model).name}-transcoders")
    trained = train_transcoders(
        load_bridge(model, tokenizer=tokenizer),
        load_text(text),
        out=out,
        held_out=held_out_documents(text, held_out, streaming=False),
        layers=layer,
        recipe=TranscoderRecipe(
            rank=rank,
            skip=skip,
            epochs=epochs,
            batch_size=batch_size,
            window=window,
            learning_rate=lr,
            seed=seed,
        ),
        resume=resume,
        command=shown_command(sys.argv),
        data=data or ", ".join(source_names(text)),
    )
    _print_trained(trained, out)


def _print_trained(trained: Mapping[str, Trained], out: Path) -> None:
    for name, each in trained.items():
        measured = each.reconstruction
        latents = "" if measured.l0 is None else f", L0 {measured.l0:.1f}, dead {measured.dead:.1%}"
        console.print(
            f"{escape(name)}: normalised MSE {measured.nmse:.4f}, variance explained "
            f"{measured.variance_explained:.4f}, loss recovered {measured.recovered:.4f}, added "
            f"{measured.added:.4f}{latents}",
            soft_wrap=True,
        )
    console.print(f"Wrote {escape(str(out))}")
