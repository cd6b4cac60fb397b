"""What a model lost: figures against plain computations, multiple choice, and the study of both."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from datasets import Dataset
from models import CONFIGS, gated, random_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, TrainingArguments

import bilinear_lens as bl
from bilinear_lens.training import controls
from bilinear_lens.training.bilinearize import BilinearizeRecipe
from bilinear_lens.training.controls import bilinearize_study, scratch, summarize_study
from bilinear_lens.training.evaluation import (
    Choices,
    continuation_choices,
    evaluate,
    multiple_choice,
)
from bilinear_lens.training.gates import gated_mlps, is_bilinear
from bilinear_lens.training.text import in_memory, train_tokenizer


def some_windows(n: int = 7, length: int = 13, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 37, (n, length), generator=torch.Generator().manual_seed(seed))


def copier(vocab_size: int = 41) -> Any:
    """A model that expects each token again: its layers write nothing."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=20,
        num_hidden_layers=1,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocab_size, 64))
        model.lm_head.weight.copy_(torch.eye(vocab_size, 64))
    return model


def test_figures_are_those_of_a_plain_computation():
    original, model = random_model(gated("llama")), random_model(gated("llama"))
    with torch.no_grad():
        model.lm_head.weight.add_(
            0.2 * torch.randn(37, 24, generator=torch.Generator().manual_seed(7))
        )  # pyright: ignore
    windows = some_windows()
    ours = evaluate(model.train(), windows, original, batch_size=3)
    assert model.training and not original.training
    model.eval()
    surprise, divergence, same, n = 0.0, 0.0, 0, 0
    with torch.no_grad():
        assert ours.loss == pytest.approx(model(windows, labels=windows).loss.item(), rel=1e-5)
        for window in windows:
            p, q = (each(window[None]).logits[0].softmax(-1) for each in (original, model))
            for position in range(12):
                surprise -= q[position, window[position + 1]].log().item()
                divergence += (p * (p / q).log()).sum(-1)[position].item()
                same += int(p[position].argmax() == q[position].argmax())
                n += 1
    assert ours.loss == pytest.approx(surprise / n, rel=1e-5)
    assert ours.kl == pytest.approx(divergence / n, rel=1e-4)
    assert ours.agreement == pytest.approx(same / n) and 0 < same < n
    other_way = evaluate(original, windows, model)
    assert abs(other_way.kl / ours.kl - 1) > 1e-2  # which of the two is the original matters


def test_a_model_is_at_no_distance_from_itself():
    model = random_model(gated("qwen2-tied"))
    ours = evaluate(model, some_windows(), model)
    assert (ours.kl, ours.agreement) == (0, 1)
    twice = evaluate(model, some_windows(), random_model(gated("qwen2-tied")))
    assert twice.kl == pytest.approx(0, abs=1e-7) and twice.agreement == 1


def test_what_cannot_be_evaluated_is_refused():
    model = random_model(gated("llama"))
    for shape in ((0, 13), (7, 1)):
        with pytest.raises(ValueError, match=rf"\[{shape[0]}, {shape[1]}\] hold no next token"):
            evaluate(model, torch.zeros(shape, dtype=torch.long), model)
    with pytest.raises(ValueError, match="37 and 41 tokens"):
        evaluate(model, some_windows(), copier())


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(in_memory(bl.held_out_stories()[:30]), vocab_size=300, n_ctx=64)


def test_options_go_on_with_texts_at_the_same_place(tokenizer):
    stories = [*bl.held_out_stories()[:9], "Too short."]
    choices = continuation_choices(stories, tokenizer, start=30, length=7, n_options=3, limit=8)
    assert choices.starts.shape == (8, 30) and choices.options.shape == (8, 3, 7)
    ids = [[0, *tokenizer(story)["input_ids"]] for story in stories[:8]]
    assert choices.starts.tolist() == [each[:30] for each in ids]
    passages = [each[30:37] for each in ids]
    assert choices.options[:, 0].tolist() == passages
    for row, options in enumerate(choices.options.tolist()):
        others = [passages.index(option) for option in options[1:]]
        assert row not in others and len(set(others)) == 2
    given = continuation_choices(stories[::-1], tokenizer, start=20, length=7, n_options=3)
    assert len(given.starts) == 9  # without the short one


def test_where_there_is_no_first_token_the_last_one_stands(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.bos_token = None
    choices = continuation_choices(bl.held_out_stories()[:4], plain, start=20, length=7)
    ids = [plain.eos_token_id, *tokenizer(bl.held_out_stories()[2])["input_ids"]]
    assert choices.starts[2].tolist() == ids[:20]


def test_too_few_texts_are_refused(tokenizer):
    stories = bl.held_out_stories()[:3]
    with pytest.raises(ValueError, match="Of 3 texts 3 have 112 tokens or more; 4 are needed"):
        continuation_choices(stories, tokenizer)
    with pytest.raises(ValueError, match="Of 3 texts 0 have 5007 tokens"):
        continuation_choices(stories, tokenizer, start=5000, length=7)
    with pytest.raises(ValueError, match="Of 0 texts 0"):
        continuation_choices([], tokenizer)


def questions(n: int, *, n_options: int = 4, seed: int = 2) -> Choices:
    """The true option has the start's last token once more, each other one another token."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(1, 37, (n, 5), generator=generator)
    order = torch.stack([torch.randperm(36, generator=generator) + 1 for _ in range(n)])
    others = [
        row[row != start[-1]][: n_options - 1] for row, start in zip(order, starts, strict=True)
    ]
    tokens = torch.cat([starts[:, -1:], torch.stack(others)], dim=1)
    return Choices(starts, tokens[:, :, None].repeat(1, 1, 3))


def test_who_knows_is_right_and_who_guesses_is_right_by_chance():
    choices = questions(53)
    model = copier().train()
    right = multiple_choice(model, choices, batch_size=7)
    assert right.shape == (53,) and right.all() and model.training
    turned = replace(choices, options=choices.options.flip(1))
    assert not multiple_choice(model, turned).any()

    n = 400
    options = torch.randint(1, 37, (n, 4, 3), generator=torch.Generator().manual_seed(3))
    guesses = multiple_choice(random_model(CONFIGS["llama"]), Choices(questions(n).starts, options))
    spread = math.sqrt(n * 0.25 * 0.75)
    assert abs(guesses.sum().item() - n / 4) < 3 * spread


def test_the_likelihood_is_that_of_the_whole_option_after_the_start():
    model, choices = random_model(gated("llama")), questions(11, n_options=3)
    options = torch.randint(1, 37, (11, 3, 4), generator=torch.Generator().manual_seed(4))
    ours = multiple_choice(model, Choices(choices.starts, options), batch_size=4)
    expected = []
    for start, rows in zip(choices.starts, options, strict=True):
        scores = []
        for option in rows:
            with torch.no_grad():
                log_probs = model(torch.cat([start, option])[None]).logits[0].log_softmax(-1)
            scores.append(sum(log_probs[4 + i, token].item() for i, token in enumerate(option)))
        expected.append(float(scores[0] > max(scores[1:])))
    assert ours.tolist() == expected and 0 < sum(expected) < 11


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_a_model_that_says_nothing_is_not_right(value):
    """Neither one that finds all options equal, nor one that has become no number."""
    model = random_model(gated("llama"))
    with torch.no_grad():
        model.lm_head.weight.fill_(value)  # pyright: ignore
    assert not multiple_choice(model, questions(9)).any()


RECIPE = BilinearizeRecipe(anneal=0.5)


def study(out: str | Path, *, args: Any = None, **changes: Any) -> pd.DataFrame:
    def windows(n: int, seed: int) -> Dataset:
        return Dataset.from_dict({"input_ids": some_windows(n, seed=seed).tolist()})

    settings: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    options: dict[str, Any] = {
        "model": random_model(gated("llama")),
        "dataset": windows(12, seed=5),
        "held_out": windows(6, seed=6),
        "args": TrainingArguments(output_dir=str(out), **{**settings, **(args or {})}),
        "out": out,
        "choices": questions(11),
        "methods": ("bilinearized", "continued"),
        "recipe": RECIPE,
        "eval_windows": 5,
    }
    return bilinearize_study(**(options | changes))


FIGURES = ["loss", "kl", "agreement", "multiple_choice"]


def test_a_study_has_a_row_for_each_run_and_resumes(tmp_path, monkeypatch):
    calls: list[str] = []
    run = controls._run
    monkeypatch.setattr(
        controls, "_run", lambda method, *rest: calls.append(method) or run(method, *rest)
    )
    first = study(tmp_path / "study")
    assert calls == ["bilinearized", "continued"]
    assert list(first["method"]) == ["original", "replaced", *calls]
    assert {"seed", "steps", "seconds", *FIGURES} <= set(first.columns)
    rows: list[dict[str, Any]] = first.to_dict("records")
    assert [row["seed"] for row in rows[2:]] == [0, 0] == [row["steps"] - 1 for row in rows[2:]]
    assert all(math.isnan(row["seed"]) for row in rows[:2])
    assert all(row["seconds"] > 0 for row in rows[2:])
    assert rows[0]["kl"] == 0 and rows[0]["agreement"] == 1
    held_out = some_windows(6, seed=6)[:5]
    original = random_model(gated("llama"))
    bare = random_model(gated("llama"))
    with torch.no_grad():
        for mlp in gated_mlps(bare):
            setattr(mlp.module, mlp.activation, torch.nn.Identity())
            mlp.gate.weight.div_(2)
    assert rows[1]["loss"] == pytest.approx(evaluate(bare, held_out, original).loss, rel=1e-5)
    for row, bilinear in ((2, True), (3, False)):
        method = rows[row]["method"]
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "study" / f"{method}-0")
        assert is_bilinear(saved) == bilinear
        figures = evaluate(saved, held_out, original)
        assert rows[row]["loss"] == pytest.approx(figures.loss, rel=1e-6)
        assert rows[row]["kl"] == pytest.approx(figures.kl, rel=1e-5) and figures.kl > 1e-4
        right = multiple_choice(saved, questions(11)).mean().item()
        assert rows[row]["multiple_choice"] == pytest.approx(right)
    left = sorted(path.name for path in (tmp_path / "study").iterdir())
    assert left == ["bilinearized-0", "continued-0", "original.json", "replaced.json", "run.json"]

    calls.clear()
    pd.testing.assert_frame_equal(study(tmp_path / "study", resume=True), first)
    assert not calls
    more = study(tmp_path / "study", resume=True, seeds=(0, 1), methods=("continued", "scratch"))
    assert calls == ["scratch", "continued", "scratch"]
    assert list(more["method"])[2:] == ["continued", "scratch"] * 2
    pd.testing.assert_series_equal(more.loc[2, FIGURES], first.loc[3, FIGURES], check_names=False)


@pytest.fixture
def no_runs(monkeypatch):
    monkeypatch.setattr(controls, "_run", lambda *rest: pytest.fail("work has begun"))


@pytest.mark.usefixtures("no_runs")
def test_what_is_no_study_is_refused(tmp_path):
    def fault(**changes) -> str:
        with pytest.raises(ValueError) as caught:
            study(tmp_path / "study", **changes)
        return str(caught.value)

    gpt2 = GPT2Config(vocab_size=37, n_positions=32, n_embd=24, n_layer=3, n_head=4)
    assert "No method ['distilled']: there are bilinearized" in fault(methods=("distilled",))
    assert "0 gated MLPs" in fault(model=random_model(gpt2))
    assert "no window" in fault(held_out=Dataset.from_dict({"input_ids": []}))
    assert "max_steps=0" in fault(args={"max_steps": 0})
    assert "seeds=[]" in fault(seeds=()) and "seeds=[1, 1]" in fault(seeds=(1, 1))
    assert not (tmp_path / "study").exists()  # so that the mended call is no second one


@pytest.mark.usefixtures("no_runs")
def test_another_study_s_folder_is_refused(tmp_path):
    def begin(**changes) -> str:
        with pytest.raises((ValueError, pytest.fail.Exception)) as caught:
            study(tmp_path / "study", **changes)
        return str(caught.value)

    assert begin() == "work has begun"
    assert "unfinished run: resume it" in begin()
    assert begin(resume=True) == "work has begun"
    assert "another run: recipe differ" in begin(resume=True, recipe=replace(RECIPE, distill=0.5))
    assert "another run: held_out differ" in begin(resume=True, eval_windows=4)
    other = random_model(gated("llama"), seed=1)
    assert "another run: model differ" in begin(resume=True, model=other)
    dataset = Dataset.from_dict({"input_ids": some_windows(12, seed=8).tolist()})
    assert "another run: text differ" in begin(resume=True, dataset=dataset)
    assert json.loads((tmp_path / "study" / "run.json").read_text())["recipe"]["anneal"] == 0.5


def test_a_study_is_summed_up_by_seed():
    losses = {
        "bilinearized": [2.5, 2.0, 2.4],
        "continued": [2.0, 1.9, 2.1],
        "scratch": [3.0, 3.1, 3.5],
    }
    rows: list[dict[str, Any]] = [
        {"method": "original", "seed": None, "loss": 2.2, "kl": 0.0, "agreement": 1.0}
    ]
    for seed in range(3):
        for method, values in losses.items():
            rows.append(
                {
                    "method": method,
                    "seed": seed,
                    "loss": values[seed],
                    "kl": 0.1 * seed,
                    "agreement": 0.5,
                }
            )
    summary = summarize_study(pd.DataFrame(rows))
    assert list(summary.index) == ["original", *losses]
    ours = summary.loc["bilinearized"]
    assert ours["loss"] == pytest.approx(2.3) and ours["kl"] == pytest.approx(0.1)
    assert ours["cost"] == pytest.approx(0.3)  # of 0.5, 0.1 and 0.3
    assert ours["cost_error"] == pytest.approx(0.2 / math.sqrt(3))
    assert ours["seeds"] == 3
    assert summary.loc["scratch", "cost"] == pytest.approx(1.2)
    assert summary.loc["continued", "cost"] == 0 and summary.loc["continued", "cost_error"] == 0
    assert summary.loc["original", "loss"] == 2.2

    one = summarize_study(pd.DataFrame(rows[:3]))
    assert one.loc["bilinearized", "cost"] == pytest.approx(0.5)
    assert math.isnan(one.loc["bilinearized", "cost_error"])  # pyright: ignore[reportArgumentType]
    alone = summarize_study(pd.DataFrame(rows[:2]))
    assert alone.loc["bilinearized", "loss"] == 2.5
    assert math.isnan(alone.loc["bilinearized", "cost"])  # pyright: ignore[reportArgumentType]


def test_a_model_from_scratch_is_bilinear_of_the_same_shape():
    model = random_model(gated("gemma2-tied"))
    a, b, c = (scratch(model, seed).state_dict() for seed in (0, 0, 1))
    assert {n: w.shape for n, w in a.items()} == {n: w.shape for n, w in model.state_dict().items()}
    name = "model.layers.1.mlp.gate_proj.weight"
    assert a[name].equal(b[name]) and not a[name].equal(c[name])
    assert not a[name].equal(model.state_dict()[name])
    assert is_bilinear(scratch(model, 0)) and not is_bilinear(model)
