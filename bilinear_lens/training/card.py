"""The model card of a trained language model."""

import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bilinear_lens.training.recipe import LanguageRecipe, gate_name


@dataclass(frozen=True)
class LanguageResult:
    """What training made: loss on held-out text, in nats, and what it took."""

    per_token: float
    per_byte: float
    steps: int
    tokens: int
    """Seen in training, repetitions included."""
    seconds: float
    """Of training, without evaluations."""


def model_card(
    name: str,
    recipe: LanguageRecipe,
    results: Mapping[str, LanguageResult],
    *,
    n_parameters: int,
    n_processes: int,
    n_windows: int | None,
    step_seconds: Mapping[str, float] | None,
    command: str | None,
    data: str,
) -> str:
    """A Hugging Face model card in Markdown.

    Args:
        results: of this model and those it is compared with, by activation.
        n_windows: the text's; None of a stream.
        step_seconds: the time of a step by activation, where all models were trained for the same
            time.
    """
    gate, ours = gate_name(recipe.activation), results[recipe.activation]
    rows = "\n".join(
        f"| {gate_name(activation)}{', this model' * (activation == recipe.activation)} "
        f"| {each.per_token:.4f} | {each.per_byte:.4f} |"
        for activation, each in results.items()
    )
    batch = f"{recipe.batch_size} x {recipe.n_ctx} tokens"
    for number, unit in ((recipe.gradient_accumulation, "batches"), (n_processes, "devices")):
        batch += f" x {number} {unit}" if number > 1 else ""
    passes = f" in {ours.tokens / recipe.n_ctx / n_windows:.3g} epochs" if n_windows else ""
    precision = "bfloat16" if recipe.bf16 else "float32"
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags: [{gate.lower()}, interpretability]
---
# {name}

A language model with {gate} MLPs: a stock
`LlamaForCausalLM` with `hidden_act="{recipe.activation}"`, {recipe.n_layers} layer(s) of width
{recipe.d_model} (MLP {recipe.d_mlp}, {recipe.n_heads} heads), context {recipe.n_ctx}, \
{recipe.vocab_size} tokens, {n_parameters:,} parameters, {precision}.

**Data**: {data}. **Tokens seen**: {ours.tokens:,}{passes}.
AdamW, learning rate {recipe.learning_rate:g} (cosine), \
batch {batch}, {ours.steps:,} steps, {precision}, seed {recipe.seed}.
**Regularisers**: weight decay {recipe.weight_decay:g}, latent noise {recipe.latent_noise:g}.

**Time**: {ours.seconds:,.0f} seconds of training on {device_name(n_processes)}, \
{ours.tokens / ours.seconds:,.0f} tokens a second.

{_comparison(results, step_seconds)}

| MLP | nats per token | nats per byte |
|---|---|---|
{rows}
{made_by(command)}
**Use**: `bilinear_lens.HookedBilinearTransformer.from_pretrained(...)`, or
`transformers.AutoModelForCausalLM.from_pretrained(...)`. It is there to be read, not to be used.
"""


def _comparison(
    results: Mapping[str, LanguageResult], step_seconds: Mapping[str, float] | None
) -> str:
    if len(results) == 1:
        return "Held-out loss:"
    if step_seconds is None:
        return "Held-out loss, of models of the same size trained the same way on the same tokens:"
    times = ", ".join(
        f"{gate_name(activation)} {each.steps:,} steps of {step_seconds[activation]:.3g} s"
        for activation, each in results.items()
    )
    return (
        "Held-out loss, of models of the same size trained the same way on the same text for the "
        f"same time ({times}, measured before):"
    )


def made_by(command: str | None) -> str:
    """The part of a card that tells the command line, if there was one."""
    return f"\nMade by:\n\n```\n{command}\n```\n" if command else ""


def shown_name(source: object) -> str:
    """What a file, a folder or a name is called, without the folders of this machine."""
    return Path(str(source)).name if Path(str(source)).exists() else str(source)


def shown_command(argv: Sequence[str]) -> str:
    """A command line as a card shows it: of files and folders the last name alone.

    Args:
        argv: as in `sys.argv`: the program, whatever its path, and its words.
    """
    return shlex.join(["bilinear-lens", *map(_without_folders, argv[1:])])


def _without_folders(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    try:
        is_path = path.is_absolute() or path.exists() or path.parent.is_dir()
    except OSError:  # too long for a path
        is_path = False
    return f"{option}{equals}{path.name}" if is_path and path.name else word


def device_name(n_processes: int = 1) -> str:
    """What training ran on, in words."""
    name = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"a CPU ({platform.machine()}, {torch.get_num_threads()} thread(s))"
    )
    return f"{n_processes} x {name}" if n_processes > 1 else name
