"""A checkpoint's gated model made bilinear, from text, into a folder with a card."""

import math
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from bilinear_lens.models.checkpoints import check_new, load_checkpoint, write_folder
from bilinear_lens.training.bilinearize import (
    RECOMMENDED,
    BilinearizeRecipe,
    recommended_arguments,
)
from bilinear_lens.training.card import device_name, made_by, shown_name
from bilinear_lens.training.controls import (
    FIGURES,
    METHODS,
    bilinearize_study,
    study_folder,
    summarize_study,
)
from bilinear_lens.training.corpus import TextSource, held_out_documents, source_names
from bilinear_lens.training.evaluation import Choices, continuation_choices
from bilinear_lens.training.gates import is_bilinear
from bilinear_lens.training.text import load_text

METHOD_NAMES = {
    "original": "the original",
    "bilinearized": "this model",
    "continued": "the original, trained on",
    "replaced": "the original, without its activation",
    "abrupt": "the original, without its activation, then trained",
    "scratch": "a bilinear model from scratch",
}


def bilinearize_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    text: TextSource,
    held_out: TextSource | None = None,
    recipe: BilinearizeRecipe = RECOMMENDED,
    settings: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    n_ctx: int = 256,
    seeds: Sequence[int] = (0,),
    controls: bool = True,
    streaming: bool = False,
    resume: bool = False,
    command: str | None = None,
    data: str | None = None,
) -> pd.DataFrame | None:
    """Make the gated model of a checkpoint bilinear, and save it with a card that says the cost.

    The folder appears only when all of it is there; runs go to `<out>.runs` meanwhile, and what
    they log for TensorBoard to `<out>.logs`. The model saved is that of the first seed; the
    figures of all runs are in `study.csv`.

    Args:
        source: a folder, a built-in name or a Hub id.
        text: what to train on, as for `load_text`.
        held_out: text for the figures; a dataset's name may do without, and gives its split
            "validation".
        settings: changes to `recommended_arguments`, such as `max_steps` and `learning_rate`.
        controls: also run continued training, abrupt replacement and training from scratch.
        command, data: for the model card.

    Returns:
        What `summarize_study` gives, or None if the model is bilinear already.

    Raises:
        ValueError: as `load_checkpoint`, `load_text` and `bilinearize` do, or if `out` exists.
    """
    out = Path(out)
    check_new(out)
    model, found = load_checkpoint(source, tokenizer=tokenizer)
    if is_bilinear(model):
        warnings.warn(f"{source} is bilinear already: nothing to do.", stacklevel=2)
        return None
    if found is None:
        raise ValueError(f"{source} has no tokenizer that could be had: give one (tokenizer=).")
    documents = load_text(text, streaming=streaming)
    held = held_out_documents(text, held_out, streaming=streaming)
    runs = Path(f"{out}.runs")
    args = recommended_arguments(runs, **settings)
    study = bilinearize_study(
        model,
        documents,
        held,
        args=args,
        out=runs,
        choices=_choices(held, found),
        recipe=recipe,
        methods=METHODS if controls else METHODS[:1],
        seeds=seeds,
        tokenizer=found,
        n_ctx=n_ctx,
        resume=resume,
    )
    summary = summarize_study(study)
    if args.process_index == 0:
        with write_folder(out) as partial:
            shutil.copytree(study_folder(runs, METHODS[0], seeds[0]), partial, dirs_exist_ok=True)
            (partial / FIGURES).unlink()
            study.to_csv(partial / "study.csv", index=False)
            found.save_pretrained(partial)
            card = bilinearized_card(
                out.name,
                source=shown_name(source),
                recipe=recipe,
                args=args,
                n_ctx=n_ctx,
                study=study,
                data=data or ", ".join(source_names(text)),
                command=command,
            )
            (partial / "README.md").write_text(card, encoding="utf-8")
        for logs in runs.glob("*.logs"):
            shutil.move(logs, Path(f"{out}.logs") / logs.stem)
        shutil.rmtree(runs)
    return summary


def _choices(held_out: Dataset, tokenizer: PreTrainedTokenizerBase) -> Choices | None:
    """Questions of multiple choice, where enough held-out documents are long enough for some."""
    try:
        return continuation_choices(held_out["text"], tokenizer)
    except ValueError as error:
        warnings.warn(f"No multiple choice: {error}", stacklevel=3)
        return None


def bilinearized_card(
    name: str,
    *,
    source: str,
    recipe: BilinearizeRecipe,
    args: TrainingArguments,
    n_ctx: int,
    study: pd.DataFrame,
    data: str,
    command: str | None,
) -> str:
    """A Hugging Face model card in Markdown: how the model was made, and what it cost.

    Args:
        source: a Hub id, which the card then names as its base model, or another name.
    """
    summary = summarize_study(study)
    ours = study[study["method"] == METHODS[0]].iloc[0]
    rows = "\n".join(
        f"| {METHOD_NAMES[str(method)]} | {row['loss']:.4f} | {_cost(str(method), row)} "
        f"| {row['kl']:.4f} | {row['agreement']:.4f} | {_choice(row)} |"
        for method, row in summary.to_dict("index").items()
    )
    idle = () if recipe.anneal else ("schedule", "layer_by_layer")
    chosen = {key: value for key, value in asdict(recipe).items() if key not in idle}
    options = ", ".join(f"{key} {value}" for key, value in chosen.items())
    n_tokens = int(ours["steps"]) * args.train_batch_size * args.world_size * n_ctx
    n_tokens *= args.gradient_accumulation_steps
    base = f"base_model: {source}\n" if "/" in source else ""  # a folder is shown by its name
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
tags: [bilinear, interpretability]
{base}---
# {name}

{source}, whose gated MLPs were made bilinear by finetuning: a stock model with a linear gate.

**How**: {options}. {OptimizerNames(args.optim).value}, learning rate {args.learning_rate:g} \
({SchedulerType(args.lr_scheduler_type).value}), weight decay {args.weight_decay:g}, \
{int(ours["steps"]):,} steps, {n_tokens:,} tokens, seed {int(ours["seed"])}.
**Data**: {data}. **Time**: {ours["seconds"]:,.0f} seconds on {device_name(args.world_size)}.

What it cost, on held-out text; every model was trained on the same text with the same arguments, \
and least squares, annealing and distillation are this model's alone \
("cost" is the loss minus that of the original, trained on, ± its standard error over \
{study["seed"].nunique()} seed(s); "choice" is the accuracy of finding, among four, the passage \
that goes on with a text; `study.csv` has the runs):

| | nats per token | cost | KL to the original | agreement | choice |
|---|---|---|---|---|---|
{rows}
{_worse(summary)}{made_by(command)}
**Use**: `bilinear_lens.HookedBilinearTransformer.from_pretrained(...)`, or
`transformers.AutoModelForCausalLM.from_pretrained(...)`.
"""


def _worse(summary: pd.DataFrame) -> str:
    """A warning where the control is no good measure of the cost."""
    if "continued" not in summary.index:
        return ""
    ours, continued, original = summary.loc[[METHODS[0], "continued", "original"], "loss"]
    if continued <= original:
        return ""
    return f"""
**Mind**: training on made the original worse, so "cost" flatters this model, which is \
{ours - original:+.4f} from the original. Take more steps, or a lower learning rate.
"""


def _choice(row: Mapping[str, float]) -> str:
    return f"{row['multiple_choice']:.3f}" if "multiple_choice" in row else ""


def _cost(method: str, row: Mapping[str, float]) -> str:
    if math.isnan(row["cost"]) or method == "continued":
        return ""
    error = "" if math.isnan(row["cost_error"]) else f" ± {row['cost_error']:.4f}"
    return f"{row['cost']:+.4f}{error}"
