"""Train small language models with bilinear (or gated) MLPs on text, with the Hugging Face Trainer.

The model is a stock `LlamaForCausalLM`: `hidden_act="linear"` makes its MLPs bilinear and
`hidden_act="silu"` makes them SwiGLU, with the same number of parameters.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.activations import ACT2FN
from transformers.trainer_utils import get_last_checkpoint

from bilinear_lens.models.checkpoints import check_new
from bilinear_lens.training.text import load_text, pack, tokens_per_byte, train_tokenizer


@dataclass(frozen=True)
class LanguageRecipe:
    """Everything that decides what `train_language` makes, apart from the text."""

    n_layers: int = 1
    d_model: int = 256
    d_mlp: int = 1024
    n_heads: int = 8
    n_ctx: int = 256
    vocab_size: int = 4096
    activation: str = "linear"
    """The gate's activation: "linear" is bilinear, "silu" SwiGLU, "relu" ReGLU, "gelu" GeGLU."""
    epochs: float = 10.0
    batch_size: int = 32
    """Windows of `n_ctx` tokens a step, on each device."""
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises; it then falls as a cosine."""
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("n_layers", "d_model", "d_mlp", "n_heads", "n_ctx", "vocab_size", "batch_size")
        for name in (*sizes, "epochs", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}.")
        if self.weight_decay < 0 or not 0 <= self.warmup < 1:
            raise ValueError(
                f"weight_decay={self.weight_decay} must be 0 or more, and warmup={self.warmup} a "
                "share of the steps."
            )
        if self.activation not in ACT2FN:
            raise ValueError(
                f"activation={self.activation!r} must be linear, silu, relu, gelu or another that "
                "Transformers knows."
            )
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"d_model={self.d_model} must be a multiple of 2 * n_heads={2 * self.n_heads}: "
                "rotary positions turn each head's dimensions in pairs."
            )
        if self.vocab_size < 257:
            raise ValueError(
                f"vocab_size={self.vocab_size} cannot hold the 256 bytes and the end of text: "
                "give 257 or more."
            )

    def model(self, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
        """A freshly initialised model; the seed must have been set by the caller."""
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.d_model,
            intermediate_size=self.d_mlp,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            max_position_embeddings=self.n_ctx,
            hidden_act=self.activation,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
        # No pad token: Llama would freeze its embedding at zero, and it is the first token, too.
        tokens = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": None}
        for name, token in tokens.items():
            setattr(config, f"{name}_token_id", token)
        return LlamaForCausalLM(config)


@dataclass(frozen=True)
class HeldOutLoss:
    """Loss of a language model on text that it was not trained on, in nats."""

    per_token: float
    per_byte: float


def train_language(
    out: str | Path,
    *,
    text: Sequence[str | Path],
    held_out: Sequence[str | Path],
    recipe: LanguageRecipe,
    tokenizer: str | Path | None = None,
    resume: bool = False,
    command: str | None = None,
    data: str | None = None,
    twin: bool = False,
) -> dict[str, HeldOutLoss]:
    """Train a language model on text files and save it as a plain Hugging Face folder.

    The folder holds bfloat16 safetensors, the tokenizer and a model card, and appears only when
    all of it is there. Checkpoints go to `<out>.checkpoints` every tenth of the run. Started with
    `torchrun` or `accelerate launch`, the Trainer spreads the run over processes.

    Args:
        text: files to train on; see `load_text`.
        held_out: files for the reported loss.
        tokenizer: a folder with a tokenizer; None trains one of `recipe.vocab_size` on `text`.
        resume: go on from the last checkpoint, which must come from the same recipe.
        command: the command line, for the model card.
        data: name, origin and licence of the text, for the model card.
        twin: also train a SwiGLU model of the same recipe, into `<out>-swiglu`, for comparison.

    Returns:
        The held-out loss by activation.

    Raises:
        ValueError: before any work, if `out` exists or cannot be made, if the text cannot be read
            or is too short, or if checkpoints of another run are in the way.
    """
    out = Path(out)
    recipes = {recipe.activation: (out, recipe)}
    if twin and recipe.activation == "silu":
        raise ValueError("A SwiGLU model (activation=silu) has no SwiGLU twin: train it alone.")
    if twin:
        recipes["silu"] = (Path(f"{out}-swiglu"), replace(recipe, activation="silu"))
    for folder, planned in recipes.values():
        _check_free(folder, planned, resume)
    documents, held_out_documents = load_text(text), load_text(held_out)
    if tokenizer is None:
        tok = train_tokenizer(documents, vocab_size=recipe.vocab_size, n_ctx=recipe.n_ctx)
    else:
        tok = AutoTokenizer.from_pretrained(tokenizer)
    windows = pack(documents, tok, n_ctx=recipe.n_ctx)
    held_out_windows = pack(held_out_documents, tok, n_ctx=recipe.n_ctx)
    per_byte = tokens_per_byte(held_out_documents, tok)

    losses, models = {}, {}
    for activation, (folder, planned) in recipes.items():
        trainer = _trainer(folder, planned, windows, held_out_windows, tok)
        if trainer.is_world_process_zero():
            _note_recipe(folder, planned)
        trainer.accelerator.wait_for_everyone()
        trainer.train(resume_from_checkpoint=resume and get_last_checkpoint(_checkpoints(folder)))
        model = trainer.model.to(torch.bfloat16)  # pyright: ignore[reportOptionalMemberAccess, reportArgumentType]
        trainer.model = trainer.model_wrapped = model  # the loss of what is saved
        per_token = trainer.evaluate()["eval_loss"]
        losses[activation] = HeldOutLoss(per_token, per_token * per_byte)
        models[activation] = model
    if not PartialState().is_main_process:
        return losses
    for activation, (folder, planned) in recipes.items():
        partial = Path(f"{folder}.partial")
        models[activation].save_pretrained(partial)
        tok.save_pretrained(partial)
        n_tokens = round(len(windows) * planned.epochs) * planned.n_ctx
        card = model_card(
            folder.name,
            planned,
            losses,
            n_parameters=models[activation].num_parameters(),
            n_tokens=n_tokens,
            command=command,
            data=data or ", ".join(Path(file).name for file in text),
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.rename(folder)
        shutil.rmtree(_checkpoints(folder))
    return losses


def _checkpoints(out: Path) -> Path:
    return Path(f"{out}.checkpoints")


def _check_free(out: Path, recipe: LanguageRecipe, resume: bool) -> None:
    """Refuse a folder in use, and checkpoints that this run cannot go on from."""
    check_new(out)
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"Cannot write {out}: {parent} is no folder that you may write.")
    note = _checkpoints(out) / "recipe.json"
    if note.exists() and not resume:
        raise ValueError(
            f"{note.parent} holds an unfinished run: resume it (resume=True, --resume), or remove "
            "that folder."
        )
    if note.exists() and json.loads(note.read_text()) != asdict(recipe):
        raise ValueError(
            f"{note.parent} holds a run of another recipe: resume with the options in {note}, or "
            "remove that folder."
        )


def _note_recipe(out: Path, recipe: LanguageRecipe) -> None:
    """Make the folder of checkpoints, which says what recipe they are of."""
    _checkpoints(out).mkdir(parents=True, exist_ok=True)
    (_checkpoints(out) / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1))


def _trainer(out: Path, recipe: LanguageRecipe, windows, held_out, tokenizer) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(_checkpoints(out)),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=not torch.accelerator.is_available(),
        seed=recipe.seed,
        data_seed=recipe.seed,
        eval_strategy="epoch",
        save_steps=0.1,
        save_total_limit=1,
        logging_steps=0.01,
        report_to="none",
    )
    return Trainer(
        model_init=lambda: recipe.model(tokenizer),
        args=arguments,
        train_dataset=windows,
        eval_dataset=held_out,
        data_collator=default_data_collator,
    )


def model_card(
    name: str,
    recipe: LanguageRecipe,
    losses: dict[str, HeldOutLoss],
    *,
    n_parameters: int,
    n_tokens: int,
    command: str | None,
    data: str,
) -> str:
    """A Hugging Face model card in Markdown."""
    kinds = {"linear": "bilinear", "silu": "SwiGLU", "relu": "ReGLU", "gelu": "GeGLU"}
    rows = "\n".join(
        f"| {kinds.get(act, act)}{', this model' * (act == recipe.activation)} "
        f"| {loss.per_token:.4f} | {loss.per_byte:.4f} |"
        for act, loss in losses.items()
    )
    made = f"\nMade by:\n\n```\n{command}\n```\n" if command else ""
    return f"""\
---
library_name: transformers
tags: [bilinear, interpretability]
---
# {name}

A language model with {kinds.get(recipe.activation, recipe.activation)} MLPs: a stock
`LlamaForCausalLM` with `hidden_act="{recipe.activation}"`, {recipe.n_layers} layer(s) of width
{recipe.d_model} (MLP {recipe.d_mlp}, {recipe.n_heads} heads), context {recipe.n_ctx}, \
{recipe.vocab_size} tokens, {n_parameters:,} parameters, bfloat16.

**Data**: {data}. **Tokens seen**: {n_tokens:,} in {recipe.epochs:g} epochs.
AdamW, learning rate {recipe.learning_rate:g} (cosine), weight decay {recipe.weight_decay:g}, \
batch {recipe.batch_size} x {recipe.n_ctx} tokens, seed {recipe.seed}.

Held-out loss, of models trained the same way:

| MLP | nats per token | nats per byte |
|---|---|---|
{rows}
{made}
**Use**: `bilinear_lens.HookedBilinearTransformer.from_pretrained(...)`, or
`transformers.AutoModelForCausalLM.from_pretrained(...)`. It is there to be read, not to be used.
"""
