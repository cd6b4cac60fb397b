"""What making a model bilinear costs, beside what else the same budget could have bought."""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from bilinear_lens.models.checkpoints import name_gate_linear, write_folder
from bilinear_lens.training.annealing import GateAnnealing
from bilinear_lens.training.bilinearize import RECOMMENDED, BilinearizeRecipe, bilinearize
from bilinear_lens.training.evaluation import Choices, evaluate, multiple_choice
from bilinear_lens.training.gates import gated_mlps
from bilinear_lens.training.runs import (
    check_arguments,
    check_run_folder,
    note_end,
    note_run,
    remove_run,
    tensors_digest,
    text_and_arguments,
    train,
    weights_digest,
    write_whole,
)
from bilinear_lens.training.timing import TrainingClock, training_seconds
from bilinear_lens.training.windows import as_windows, first_windows

ABRUPT = BilinearizeRecipe(anneal=0.0, least_squares=False, distill=0.0)
FIGURES = "figures.json"
"""In the folder of a run: what came of it."""

METHODS = ("bilinearized", "continued", "abrupt", "scratch")
"""Ours; the gated model trained on; its activation taken away at once; a random bilinear model."""


def bilinearize_study(
    model: PreTrainedModel,
    dataset: Dataset | IterableDataset,
    held_out: Dataset,
    *,
    args: TrainingArguments,
    out: str | Path,
    choices: Choices | None = None,
    recipe: BilinearizeRecipe = RECOMMENDED,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = (0,),
    tokenizer: PreTrainedTokenizerBase | None = None,
    n_ctx: int = 256,
    eval_windows: int = 256,
    resume: bool = False,
) -> pd.DataFrame:
    """Make a gated model bilinear, and the controls, on the same text and with the same settings.

    Each run is a folder in `out`, `<method>-<seed>`, with the model and its figures.

    Args:
        model: the gated model; it stays as it is.
        dataset, recipe, tokenizer, n_ctx: as for `bilinearize`.
        held_out: windows or documents for the figures.
        args: for every run; `output_dir` and the seeds are set for each.
        choices: questions, of `training.evaluation.continuation_choices`; None leaves that figure
            out.
        methods: some of bilinearized, continued, abrupt and scratch.
        eval_windows: how many windows of `held_out` count.
        resume: go on with the study in `out`: what is there is not run again. Seeds and methods
            may be more than before.

    Returns:
        Rows with `method`, `seed`, `loss` (nats per token), `kl` to the original (nats per token),
        `agreement` with its most probable next token, `multiple_choice` accuracy, `steps` and
        `seconds` of training. Two rows are of no run: the original, and the original "replaced",
        without its activation and without training. `summarize_study` compares them.

    Raises:
        ValueError: as `bilinearize` does, or if a method is unknown.
    """
    if unknown := set(methods) - set(METHODS):
        raise ValueError(f"No method {sorted(unknown)}: there are {', '.join(METHODS)}.")
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ValueError(f"seeds={list(seeds)} must be different ones, and one at least.")
    gated_mlps(model)
    out = Path(out)
    model.to(args.device)  # pyright: ignore[reportArgumentType]
    windows = as_windows(dataset, tokenizer, model=model, n_ctx=n_ctx)
    check_arguments(windows, args)
    held = first_windows(as_windows(held_out, tokenizer, model=model, n_ctx=n_ctx), eval_windows)
    note = {
        "recipe": asdict(recipe),
        "model": weights_digest(model),
        **text_and_arguments(windows, args),
        "held_out": tensors_digest([held, *(choices.tensors() if choices else [])]),
    }
    for each in ("seed", "data_seed"):
        note.pop(each, None)
    if args.process_index == 0:
        check_run_folder(out, note, resume=resume)
        note_run(out, note)
    PartialState().wait_for_everyone()

    def figures(trained: PreTrainedModel) -> dict[str, float]:
        batch_size = args.per_device_eval_batch_size
        found = asdict(evaluate(trained, held, model, batch_size=batch_size))
        if choices is not None:
            right = multiple_choice(trained, choices, batch_size=batch_size)
            found["multiple_choice"] = right.mean().item()
        return found

    def replaced() -> PreTrainedModel:
        annealing = GateAnnealing(copy.deepcopy(model), share=0.0)
        annealing.set(1.0)
        return annealing.fold()

    rows = [
        _once(out / f"{name}.json", lambda get=get, name=name: {"method": name, **figures(get())})
        for name, get in {"original": lambda: model, "replaced": replaced}.items()
    ]
    progress = tqdm(list(product(seeds, methods)), desc="Runs")
    for seed, method in progress:
        progress.set_description(f"Runs: {method}, seed {seed}")
        folder = study_folder(out, method, seed)
        if not folder.exists():
            run_args = replace(args, output_dir=f"{folder}.checkpoints", seed=seed, data_seed=seed)
            clock = TrainingClock()
            trained = _run(method, model, windows, recipe, run_args, clock)
            row = {
                "method": method,
                "seed": seed,
                **figures(trained),
                "steps": clock.state.global_step,
                "seconds": training_seconds(clock.state),
            }
            if args.process_index == 0:
                with write_folder(folder) as partial:
                    trained.save_pretrained(partial)
                    (partial / FIGURES).write_text(json.dumps(row, indent=1))
                remove_run(Path(f"{folder}.checkpoints"), logs=Path(f"{folder}.logs"))
            PartialState().wait_for_everyone()
        rows.append(json.loads((folder / FIGURES).read_text()))
    if args.process_index == 0:
        note_end(out)
    return pd.DataFrame(rows)


def summarize_study(study: pd.DataFrame) -> pd.DataFrame:
    """The methods of a `bilinearize_study`, side by side.

    Returns:
        For each method the means over seeds, `cost`, its loss minus that of continued training
        with the same seed (missing where there is none), and `cost_error`, the standard error of
        that difference (missing where there is one seed).
    """
    runs = study.set_index(["method", "seed"])["loss"].unstack("method")
    costs = runs.sub(runs.get("continued", pd.Series(dtype=float)), axis=0)
    means = pd.DataFrame(study.drop(columns="seed").groupby("method", sort=False).mean())
    return means.assign(cost=costs.mean(), cost_error=costs.sem(), seeds=runs.count())


def _once(file: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file holds, computed and written if there is none."""
    if not file.exists():
        write_whole(file, json.dumps(compute(), indent=1))
    return json.loads(file.read_text(encoding="utf-8"))


def study_folder(out: Path, method: str, seed: int) -> Path:
    """Where a run of a study lies, with its model and figures."""
    return out / f"{method}-{seed}"


def scratch(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A bilinear model of the same shape with random weights."""
    config = copy.deepcopy(model.config)
    name_gate_linear(config)
    set_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=model.dtype).to(model.device)


def _run(
    method: str,
    model: PreTrainedModel,
    windows: Dataset | IterableDataset,
    recipe: BilinearizeRecipe,
    args: TrainingArguments,
    clock: TrainingClock,
) -> PreTrainedModel:
    if method in ("bilinearized", "abrupt"):
        if method == "abrupt":
            recipe = replace(ABRUPT, train=recipe.train)
        return bilinearize(model, windows, args=args, recipe=recipe, callbacks=[clock], resume=True)
    start = copy.deepcopy(model) if method == "continued" else scratch(model, args.seed)
    note = {"method": method, "model": weights_digest(model)}
    return train(start, windows, args=args, note=note, callbacks=[clock], resume=True).eval()
