"""The command that makes a gated model bilinear."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from bilinear_lens.cli.options import (
    DataOption,
    GradientAccumulationOption,
    GradientCheckpointingOption,
    HeldOutOption,
    ReportToOption,
    ResumeOption,
    StreamingOption,
    TextOption,
    TokenizerOption,
)
from bilinear_lens.training.bilinearize import (
    BATCH_SIZE,
    LEARNING_RATE,
    RECOMMENDED,
    BilinearizeRecipe,
)
from bilinear_lens.training.bilinearized import bilinearize_checkpoint
from bilinear_lens.training.card import shown_command

console = Console(highlight=False)


def bilinearize(
    model: Annotated[str, typer.Argument(help="A folder or Hub id with a gated model.")],
    out: Annotated[Path, typer.Argument(help="A new folder for the bilinear model.")],
    text: TextOption,
    held_out: HeldOutOption = None,
    streaming: StreamingOption = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps; otherwise one pass over the text.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Windows at once, on each device.")
    ] = BATCH_SIZE,
    gradient_accumulation: GradientAccumulationOption = 1,
    n_ctx: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 256,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = LEARNING_RATE,
    anneal: Annotated[
        float,
        typer.Option(
            help="Share of the steps over which beta falls from 1 to 0; 0 starts with linear gates."
        ),
    ] = RECOMMENDED.anneal,
    schedule: Annotated[
        str, typer.Option(help="linear, cosine, exponential or smootherstep.")
    ] = RECOMMENDED.schedule,
    layer_by_layer: Annotated[
        bool, typer.Option("--layer-by-layer/--all-layers", help="One layer after the other.")
    ] = RECOMMENDED.layer_by_layer,
    learn_scale: Annotated[
        bool, typer.Option("--learn-scale/--fixed-scale", help="Train each neuron's scale.")
    ] = RECOMMENDED.learn_scale,
    least_squares: Annotated[
        bool,
        typer.Option(
            "--least-squares/--no-least-squares",
            help="Move the gates' weights to the linear gate nearest to the activation.",
        ),
    ] = RECOMMENDED.least_squares,
    distill: Annotated[
        float,
        typer.Option(
            help="Weight of the KL divergence from the original in the loss that is trained on and "
            "logged, at first."
        ),
    ] = RECOMMENDED.distill,
    distill_end: Annotated[
        float, typer.Option(help="The same at the last step.")
    ] = RECOMMENDED.distill_end,
    train: Annotated[
        str, typer.Option(help="Which weights: all, mlp or gate.")
    ] = RECOMMENDED.train,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds, for an interval.")] = 1,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls/--no-controls",
            help="Also train the original on, replace its gates abruptly, and train from scratch.",
        ),
    ] = True,
    bf16: Annotated[bool, typer.Option("--bf16", help="Forward passes in bfloat16.")] = False,
    gradient_checkpointing: GradientCheckpointingOption = False,
    report_to: ReportToOption = "none",
    tokenizer: TokenizerOption = None,
    data: DataOption = None,
    resume: ResumeOption = False,
) -> None:
    """Finetune a gated model (SwiGLU, GeGLU, ReGLU) into a bilinear one, beside controls.

    Example: bilinear-lens bilinearize my-llama my-bilinear-llama --text stories.txt --held-out
    others.txt
    """
    settings: dict[str, Any] = {
        "learning_rate": lr,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation,
        "gradient_checkpointing": gradient_checkpointing,
        "bf16": bf16,
        "report_to": report_to,
    }
    settings |= {"num_train_epochs": 1} if steps is None else {"max_steps": steps}
    summary = bilinearize_checkpoint(
        model,
        out,
        text=text,
        held_out=held_out,
        recipe=BilinearizeRecipe(
            anneal=anneal,
            schedule=schedule,
            layer_by_layer=layer_by_layer,
            learn_scale=learn_scale,
            least_squares=least_squares,
            distill=distill,
            distill_end=distill_end,
            train=train,  # pyright: ignore[reportArgumentType]
        ),
        settings=settings,
        tokenizer=tokenizer,
        n_ctx=n_ctx,
        seeds=range(seeds),
        controls=controls,
        streaming=streaming,
        resume=resume,
        command=shown_command(sys.argv),
        data=data,
    )
    if summary is None:
        console.print(f"{escape(model)} is bilinear already: nothing to do.")
        return
    console.print(
        summary.to_string(float_format="{:.4f}".format, na_rep=""), markup=False, soft_wrap=True
    )
    console.print(f"Wrote {escape(str(out))}")
