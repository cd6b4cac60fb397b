"""What the Trainer costs beside a hand-written loop: a ratio within one run, printed.

`pytest -n 0 -s tests/benchmarks`, on idle cores. Nothing here asserts a time; what is asserted is
that both sides come to the same loss.
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, set_seed

import bilinear_lens as bl
from bilinear_lens.training import language
from bilinear_lens.training.corpus import Corpus, read_corpus
from bilinear_lens.training.language import train_language
from bilinear_lens.training.recipe import LanguageRecipe

ROUNDS = 5
RECIPE = LanguageRecipe(
    n_layers=2,
    d_model=128,
    d_mlp=384,
    n_heads=4,
    n_ctx=128,
    vocab_size=1024,
    batch_size=16,
    tokens=40 * 16 * 128,
)


def by_hand(model: PreTrainedModel, windows: torch.Tensor, recipe: LanguageRecipe) -> None:
    """The same batch size, precision, optimizer, schedule and clipping, on tokens in memory."""
    steps = recipe.steps(len(windows))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    warmup = math.ceil(recipe.warmup * steps)

    def rate(step: int) -> float:
        if step < warmup:
            return step / warmup
        return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    done = 0
    while done < steps:
        for batch in windows[torch.randperm(len(windows))].split(recipe.batch_size):
            with torch.autocast(model.device.type, torch.bfloat16):
                loss = model(batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done += 1
            if done == steps:
                return


@torch.no_grad()
def loss_on(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    return model.eval()(tokens, labels=tokens).loss.item()


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_the_trainer_beside_a_hand_written_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stories = bl.held_out_stories()
    for name, some in (("train", stories[:300]), ("held-out", stories[300:])):
        (tmp_path / f"{name}.txt").write_text("<|endoftext|>".join(some))
    texts: dict[str, Any] = {"text": tmp_path / "train.txt", "held_out": tmp_path / "held-out.txt"}
    corpus: Corpus = read_corpus(**texts, tokenizer=None, recipe=RECIPE, streaming=False)
    corpus.tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert isinstance(corpus.windows, Dataset)
    windows, held_out = (part[:]["input_ids"] for part in (corpus.windows, corpus.held_out))

    # neither side saves or evaluates while the clock runs
    arguments = language.TrainingArguments
    quiet: dict[str, Any] = {"save_strategy": "no", "eval_strategy": "no"}
    monkeypatch.setattr(
        language, "TrainingArguments", lambda **options: arguments(**(options | quiet))
    )
    times: dict[str, list[float]] = {"ours": [], "by hand": []}
    losses: dict[str, float] = {}
    for number in range(1 + ROUNDS):  # the first warms up
        recipe = replace(RECIPE, seed=number)
        (result,) = train_language(
            tmp_path / f"model-{number}", tokenizer=tmp_path / "tokenizer", recipe=recipe, **texts
        ).values()
        set_seed(number)
        model = recipe.model(corpus.tokenizer)
        times["by hand"].append(seconds(partial(by_hand, model, windows, recipe)))
        times["ours"].append(result.seconds)
        losses = {"ours": result.per_token, "by hand": loss_on(model, held_out)}
    steps = RECIPE.steps(len(windows))
    rows = [
        {
            "loop": name,
            "ms a step": 1e3 * median(taken[1:]) / steps,
            "tokens a second": steps * 16 * 128 / median(taken[1:]),
            "held-out loss": losses[name],
        }
        for name, taken in times.items()
    ]
    ratios = [a / b for a, b in zip(times["ours"][1:], times["by hand"][1:], strict=True)]
    versions = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    print(f"\n{RECIPE.model(corpus.tokenizer).num_parameters():,} parameters ({versions})")
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.4g}".format))
    ratio = median(times["ours"][1:]) / median(times["by hand"][1:])
    print(f"ours / by hand: {ratio:.3f} (rounds {', '.join(f'{r:.3f}' for r in ratios)})")
    assert losses["ours"] == pytest.approx(losses["by hand"], abs=0.2)
