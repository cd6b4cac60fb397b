"""Train small language models with bilinear (or gated) MLPs on text, with the Hugging Face Trainer.

The model is a stock `LlamaForCausalLM`: `hidden_act="linear"` makes its MLPs bilinear and
`hidden_act="silu"` makes them SwiGLU, with the same number of parameters.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import IterableDataset
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from bilinear_lens.models.checkpoints import check_new, write_folder
from bilinear_lens.training.card import LanguageResult, model_card
from bilinear_lens.training.corpus import Corpus, TextSource, read_corpus, source_names
from bilinear_lens.training.recipe import LanguageRecipe, gate_name
from bilinear_lens.training.regularisers import latent_noise
from bilinear_lens.training.runs import (
    NOTE,
    NoCheckpointAtEnd,
    StopIfNotFinite,
    check_reporting,
    check_run_folder,
    last_checkpoint,
    note_run,
    remove_run,
    text_digest,
    vocabulary_digest,
)
from bilinear_lens.training.timing import TrainingClock, step_seconds, training_seconds

Equal = Literal["tokens", "time"]


def train_language(
    out: str | Path,
    *,
    text: TextSource,
    held_out: TextSource | None = None,
    recipe: LanguageRecipe,
    tokenizer: str | Path | None = None,
    streaming: bool = False,
    compare: Sequence[str] = (),
    equal: Equal = "tokens",
    resume: bool = False,
    report_to: str = "none",
    command: str | None = None,
    data: str | None = None,
) -> dict[str, LanguageResult]:
    """Train a language model on text and save it as a plain Hugging Face folder.

    The folder holds safetensors, the tokenizer and a model card, and appears only when all of it
    is there. Every tenth of the run the held-out loss is measured and a checkpoint goes to
    `<out>.checkpoints`. Started with `torchrun` or `accelerate launch`, the Trainer spreads the
    run over processes.

    Args:
        text: what to train on: files, a dataset's name (its split "train") or a dataset; see
            `load_text`.
        held_out: text for the reported loss; of a dataset's name, its split "validation". None
            takes that of the dataset that `text` names.
        tokenizer: a folder or Hub id; None trains one of `recipe.vocab_size` on `text` (of a
            stream, on 100,000 documents).
        streaming: read the text while training, windows shuffled among a thousand, and from the
            start again where it ends; a resumed run reads again what it had read.
        compare: activations of gates. For each, a model of the same recipe, size and text goes to
            a folder named by the gate: `<out>-swiglu`, `-reglu`, `-geglu` or `-bilinear`.
        equal: what compared models are given as much of as this one: tokens, or time, as steps of
            each take it, which is measured first.
        resume: go on from the last whole checkpoint, which must be of the same run.
        report_to: where the Trainer logs, too: "tensorboard" (into `<out>.logs`, at the end),
            "wandb" and the like.
        command: the command line, for the model card.
        data: name, origin and licence of the text, for the model card.

    Returns:
        What came of each model, by activation.

    Raises:
        ValueError: before any training, if `out` exists or cannot be made, an option is out of
            range, text cannot be read or is too short, or checkpoints of another run are in the
            way; in training, if the loss or a gradient is no finite number.
    """
    out = Path(out)
    # said here, as by the Trainer: otherwise processes on CPUs do not know of each other
    state = PartialState(cpu=not torch.accelerator.is_available())
    recipes = {each: replace(recipe, activation=each) for each in (recipe.activation, *compare)}
    folders = {
        each: Path(f"{out}-{gate_name(each).lower()}") if each in compare else out
        for each in recipes
    }
    if len(recipes) != 1 + len(compare):
        raise ValueError(
            f"compare={list(compare)} must name activations once, and not this model's own, "
            f"{recipe.activation!r}."
        )
    _check_options(recipe, text, streaming, equal, report_to)
    run = {
        "text": source_names(text),
        "held_out": None if held_out is None else source_names(held_out),
        "tokenizer": None if tokenizer is None else str(tokenizer),
        "streaming": streaming,
        "compare": list(compare),
        "equal": equal,
        "processes": state.num_processes,
    }
    notes = {each: {**run, "recipe": asdict(recipes[each])} for each in recipes}
    for each, folder in folders.items():
        check_new(folder)
        check_run_folder(
            _checkpoints(folder), notes[each] | _counted(_checkpoints(folder)), resume=resume
        )

    corpus = read_corpus(text, held_out, tokenizer, recipe, streaming=streaming)
    seconds = None
    if equal == "time":
        noted = _counted(_checkpoints(out)).get("step_seconds")
        seconds = noted or _time_steps(recipes, corpus)
    steps = recipe.steps(corpus.n_windows, n_processes=state.num_processes)
    read = {
        "windows": text_digest(corpus.windows),
        "held_out_windows": text_digest(corpus.held_out),
        "vocabulary": vocabulary_digest(corpus.tokenizer),
    }
    for each in recipes:
        share = seconds[recipe.activation] / seconds[each] if seconds else 1.0
        notes[each] |= read | {"steps": max(1, round(steps * share)), "step_seconds": seconds}
    if state.is_main_process:
        for each, folder in folders.items():
            # once more: text may have changed under its name
            check_run_folder(_checkpoints(folder), notes[each], resume=resume)
            note_run(_checkpoints(folder), notes[each])
    state.wait_for_everyone()

    models, results = {}, {}
    for each, planned in recipes.items():
        checkpoints, steps = _checkpoints(folders[each]), notes[each]["steps"]
        models[each], results[each] = _train(checkpoints, planned, corpus, steps, report_to)
    if state.is_main_process:
        for each, folder in folders.items():
            card = model_card(
                folder.name,
                recipes[each],
                results,
                n_parameters=models[each].num_parameters(),
                n_processes=state.num_processes,
                n_windows=corpus.n_windows,
                step_seconds=seconds,
                command=command,
                data=data or ", ".join(source_names(text)),
            )
            with write_folder(folder) as whole:
                models[each].save_pretrained(whole)
                corpus.tokenizer.save_pretrained(whole)
                (whole / "README.md").write_text(card, encoding="utf-8")
            remove_run(_checkpoints(folder), Path(f"{folder}.logs"))
    return results


def _check_options(
    recipe: LanguageRecipe, text: TextSource, streaming: bool, equal: str, report_to: str
) -> None:
    if equal not in get_args(Equal):
        raise ValueError(f"equal={equal!r} must be one of {', '.join(get_args(Equal))}.")
    if (streaming or isinstance(text, IterableDataset)) and recipe.tokens is None:
        raise ValueError(
            "The end of a stream is not known: say on how many tokens to train (--tokens, or the "
            "recipe's tokens)."
        )
    check_reporting(report_to)


def _checkpoints(out: Path) -> Path:
    return Path(f"{out}.checkpoints")


def _counted(checkpoints: Path) -> dict:
    """What an unfinished run had read, measured and counted before it began."""
    note = checkpoints / NOTE
    noted = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    names = ("windows", "held_out_windows", "vocabulary", "steps", "step_seconds")
    return {name: noted[name] for name in names if name in noted}


def _time_steps(recipes: Mapping[str, LanguageRecipe], corpus: Corpus) -> dict[str, float]:
    """Seconds of a step by activation, as the main process measures them."""
    measured: dict[str, float] = {}
    if PartialState().is_main_process:
        (recipe, *_) = recipes.values()
        rows = islice(corpus.windows, recipe.batch_size)
        batch = torch.stack([row["input_ids"] for row in rows])  # pyright: ignore[reportArgumentType]
        models = {each: planned.model(corpus.tokenizer) for each, planned in recipes.items()}
        measured = step_seconds(models, recipe, batch)
    return broadcast_object_list([measured])[0]


def _train(
    checkpoints: Path, recipe: LanguageRecipe, corpus: Corpus, steps: int, report_to: str
) -> tuple[PreTrainedModel, LanguageResult]:
    """A trained model, as it is saved, and what came of it."""
    # a checkpoint at a logged step: a resumed run then logs the same mean losses
    log_steps = max(1, steps // 100)
    save_steps = log_steps * max(1, steps // (10 * log_steps))
    set_seed(recipe.seed)
    trainer = Trainer(
        model=recipe.model(corpus.tokenizer),
        args=TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=steps,
            per_device_train_batch_size=recipe.batch_size,
            per_device_eval_batch_size=recipe.batch_size,
            gradient_accumulation_steps=recipe.gradient_accumulation,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=recipe.warmup,
            weight_decay=recipe.weight_decay,
            optim="adamw_torch_fused",
            adam_beta2=0.95,
            max_grad_norm=1.0,
            ddp_find_unused_parameters=False,
            use_cpu=not torch.accelerator.is_available(),
            seed=recipe.seed,
            data_seed=recipe.seed,
            eval_strategy="steps",
            eval_steps=save_steps,
            save_steps=save_steps,
            save_total_limit=2,  # the last may have been saved with weights that are no good
            logging_steps=log_steps,
            logging_nan_inf_filter=False,  # it hides what StopIfNotFinite must see
            report_to=report_to,
        ),
        train_dataset=corpus.windows,  # pyright: ignore[reportArgumentType]
        eval_dataset=corpus.held_out,
        data_collator=default_data_collator,
        callbacks=[StopIfNotFinite(), NoCheckpointAtEnd(), TrainingClock()],
    )
    model: PreTrainedModel = trainer.model  # pyright: ignore[reportAssignmentType]
    if recipe.bf16:
        # the Trainer's own bf16 also copies all logits to float32, which nobody reads
        trainer.autocast_smart_context_manager = partial(  # pyright: ignore[reportAttributeAccessIssue]
            torch.autocast, trainer.args.device.type, torch.bfloat16
        )
    last = last_checkpoint(checkpoints)
    with latent_noise(model, recipe.latent_noise):
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    seconds = training_seconds(trainer.state)
    model.to(torch.bfloat16 if recipe.bf16 else torch.float32)  # pyright: ignore[reportArgumentType]
    model.config.use_cache = True  # which the Trainer turns off
    trainer.model_wrapped = model  # the loss of what is saved
    per_token = trainer.evaluate()["eval_loss"]
    n_processes = PartialState().num_processes
    return model, LanguageResult(
        per_token,
        per_token * corpus.per_byte,
        steps=steps,
        tokens=recipe.tokens_in(steps, corpus.n_windows, n_processes=n_processes),
        seconds=seconds,
    )
