"""Training small language models: the loss falls, a run resumes, bad input costs no work."""

import gzip
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from models import CONFIGS, SIZES, random_model, some_tokens
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPTNeoXConfig,
    TrainerCallback,
    TrainingArguments,
)

import bilinear_lens as bl
from bilinear_lens.models.checkpoints import built_in
from bilinear_lens.training import language
from bilinear_lens.training import text as text_module
from bilinear_lens.training.card import shown_command
from bilinear_lens.training.corpus import read_corpus
from bilinear_lens.training.distillation import DistillationLoss
from bilinear_lens.training.evaluation import evaluate
from bilinear_lens.training.language import train_language
from bilinear_lens.training.recipe import LanguageRecipe
from bilinear_lens.training.regularisers import latent_noise
from bilinear_lens.training.runs import (
    last_checkpoint,
    remove_run,
    text_and_arguments,
    train,
)
from bilinear_lens.training.text import load_text, pack, train_tokenizer
from bilinear_lens.training.timing import step_seconds
from bilinear_lens.training.windows import as_windows, endless, first_windows

RECIPE = LanguageRecipe(
    n_layers=1,
    d_model=24,
    d_mlp=28,
    n_heads=3,
    n_ctx=32,
    vocab_size=300,
    epochs=4.0,
    batch_size=8,
    learning_rate=1e-2,
    latent_noise=0.1,
)
SHORT = replace(RECIPE, tokens=40 * 8 * 32)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("text")
    stories = bl.held_out_stories()
    (folder / "train.txt").write_text("<|endoftext|>".join(stories[:30]))
    with gzip.open(folder / "held-out.txt.gz", "wt") as stream:
        stream.write("<|endoftext|>".join(stories[30:40]))
    return {"text": [folder / "train.txt"], "held_out": [folder / "held-out.txt.gz"]}


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """A bilinear and a SwiGLU model, with their checkpoints, and what was said of them."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "remove_run", lambda folder, logs: None)
        results = train_language(
            folder / "model", recipe=RECIPE, compare=["silu"], command="run me", **texts
        )
    return folder, results


def curve(checkpoints: Path) -> list[dict[str, float]]:
    """What a run with kept checkpoints logged, without its times."""
    last = last_checkpoint(checkpoints)
    assert last is not None
    rows = json.loads((last / "trainer_state.json").read_text())["log_history"]
    kept = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss")
    return [{name: row[name] for name in kept if name in row} for row in rows]


def assert_same_run(a: Path, b: Path) -> None:
    """Equal losses at every logged step, and equal weights."""
    assert curve(Path(f"{a}.checkpoints")) == curve(Path(f"{b}.checkpoints"))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert ours.keys() == theirs.keys()
    assert all(weight.equal(theirs[name]) for name, weight in ours.items())


class Stopped(Exception):
    """In place of a power cut."""


class Interrupted(language.Trainer):
    """Stops in the middle."""

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.state.global_step > 0.55 * self.state.max_steps:
            raise Stopped


def test_a_trained_model_has_learned_and_is_bilinear(whole):
    folder, results = whole
    assert list(results) == ["linear", "silu"]
    for result in results.values():
        assert result.per_token < 0.8 * math.log(300)
        assert result.per_byte < result.per_token
    model = bl.HookedBilinearTransformer.from_pretrained(folder / "model", dtype="auto")
    assert model.W_E.dtype == torch.bfloat16
    assert model.W_E[0].any()  # the first token of a text is trained, too
    assert json.loads((folder / "model" / "config.json").read_text())["use_cache"]
    with pytest.raises(ValueError, match="bilinearize"):
        bl.HookedBilinearTransformer.from_pretrained(folder / "model-swiglu")
    ours, theirs = (
        load_file(folder / name / "model.safetensors") for name in ("model", "model-swiglu")
    )
    assert {name: w.shape for name, w in ours.items()} == {n: w.shape for n, w in theirs.items()}


def test_the_card_says_what_was_made_and_what_it_took(whole, texts):
    folder, results = whole
    ours, card = results["linear"], (folder / "model" / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    (file,) = texts["text"]
    n_windows = len(pack(load_text(Path(file)), tokenizer, n_ctx=32))
    assert ours.tokens == 4 * n_windows * 32 and ours.steps == 4 * math.ceil(n_windows / 8)
    assert results["silu"].tokens == ours.tokens and ours.seconds > 0
    for said in (
        f"| bilinear, this model | {ours.per_token:.4f} | {ours.per_byte:.4f} |",
        f"| SwiGLU | {results['silu'].per_token:.4f} | {results['silu'].per_byte:.4f} |",
        f"**Data**: train.txt. **Tokens seen**: {ours.tokens:,} in 4 epochs.",
        "weight decay 0.1, latent noise 0.1",
        f"{ours.seconds:,.0f} seconds of training on a CPU",
        "```\nrun me\n```",
        "library_name: transformers",
        "tags: [bilinear, interpretability]",
    ):
        assert said in card
    assert "tags: [swiglu, " in (folder / "model-swiglu" / "README.md").read_text()


def test_the_reported_loss_is_that_of_the_saved_model(whole, texts):
    folder, results = whole
    plain = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    (file,) = texts["held_out"]
    documents = load_text(Path(file))
    tokens = pack(documents, tokenizer, n_ctx=32)[:]["input_ids"]
    with torch.no_grad():
        loss = plain(tokens, labels=tokens).loss.item()
    ours = results["linear"]
    assert ours.per_token == pytest.approx(loss, abs=0.02)  # evaluated in bfloat16
    stories = list(documents["text"])
    n_tokens = sum(len(tokenizer(story)["input_ids"]) + 1 for story in stories)
    n_bytes = sum(len(story.encode()) for story in stories)
    assert ours.per_byte == pytest.approx(ours.per_token * n_tokens / n_bytes)


def test_a_run_that_was_cut_off_resumes_to_the_same_model(whole, texts, tmp_path, monkeypatch):
    """Its newest checkpoint was being written, and is passed over."""
    monkeypatch.setattr(language, "remove_run", lambda folder, logs: None)
    options: dict[str, Any] = {"recipe": RECIPE, **texts}
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(language, "Trainer", Interrupted)
        train_language(tmp_path / "cut", **options)
    assert not (tmp_path / "cut").exists()
    checkpoints = tmp_path / "cut.checkpoints"
    last = last_checkpoint(checkpoints)
    assert last is not None
    for later in (24, 48):
        name = f"checkpoint-{int(last.name.split('-')[1]) + later}"
        newest = shutil.copytree(last, checkpoints / name)
        (newest / "model.safetensors").write_bytes(b"cut off")
        state = (newest / "trainer_state.json").read_text()
        (newest / "trainer_state.json").write_text(state[: len(state) // 2])
    (newest / "trainer_state.json").unlink()
    assert last_checkpoint(checkpoints) == last
    with pytest.raises(ValueError, match="resume"):
        train_language(tmp_path / "cut", **options)
    other = dict(options, recipe=replace(RECIPE, seed=1))
    with pytest.raises(ValueError, match="another run: recipe differ"):
        train_language(tmp_path / "cut", resume=True, **other)
    (tmp_path / "train.txt").write_text("<|endoftext|>".join(bl.held_out_stories()[:20]))
    changed = dict(options, text=[tmp_path / "train.txt"])
    with pytest.raises(ValueError, match=r"run: held_out_windows, steps \(\d+, not \d+\), vocab"):
        train_language(tmp_path / "cut", resume=True, **changed)
    (file,) = texts["text"]
    stories = file.read_text()
    (tmp_path / "train.txt").write_text(stories[:-40] + stories[-40:].upper())
    with pytest.raises(ValueError, match=r"another run: .*\bwindows differ"):
        train_language(tmp_path / "cut", resume=True, **changed)
    train_language(tmp_path / "cut", resume=True, **options)
    assert_same_run(tmp_path / "cut", whole[0] / "model")


def test_a_run_of_so_many_tokens_resumes_with_its_own_text_alone(texts, tmp_path, monkeypatch):
    """Other text under the same name, with the same number of steps."""
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "train.txt"
    stories = bl.held_out_stories()
    file.write_text("<|endoftext|>".join(stories[:30]))
    options: dict[str, Any] = {"text": file, "held_out": texts["held_out"], "recipe": SHORT}
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(language, "Trainer", Interrupted)
        train_language(tmp_path / "cut", **options)
    for other in (stories[50:80], stories[29::-1]):
        file.write_text("<|endoftext|>".join(other))
        with pytest.raises(ValueError, match=r"another run: .*\bwindows differ"):
            train_language(tmp_path / "cut", resume=True, **options)


def test_a_run_that_was_killed_resumes_to_the_same_model(whole, texts, tmp_path, monkeypatch):
    script = (
        "import sys; from bilinear_lens.training.language import LanguageRecipe, train_language; "
        f"train_language(sys.argv[1], text=[sys.argv[2]], held_out=[sys.argv[3]], recipe={RECIPE})"
    )
    files = [*texts["text"], *texts["held_out"]]
    command = [sys.executable, "-c", script, tmp_path / "killed", *files]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and last_checkpoint(tmp_path / "killed.checkpoints") is None:
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -signal.SIGKILL and not (tmp_path / "killed").exists()
    monkeypatch.setattr(language, "remove_run", lambda folder, logs: None)
    train_language(tmp_path / "killed", recipe=RECIPE, resume=True, **texts)
    assert_same_run(tmp_path / "killed", whole[0] / "model")


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_what_was_good(
    texts, tmp_path, monkeypatch
):
    class Failing(language.Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if model.training and self.state.global_step == 25:
                loss = loss * math.nan  # pyright: ignore[reportOperatorIssue]
            return loss

    monkeypatch.setattr(language, "Trainer", Failing)
    with pytest.raises(ValueError, match=r"not finite after 25 steps.*/checkpoint-24\.") as caught:
        train_language(tmp_path / "model", recipe=SHORT, **texts)
    last = last_checkpoint(tmp_path / "model.checkpoints")
    assert last is not None and f"good checkpoint is {last}" in str(caught.value)
    assert all(w.isfinite().all() for w in load_file(last / "model.safetensors").values())
    assert not (tmp_path / "model").exists()


def test_a_stream_is_read_while_training_and_resumes(texts, tmp_path, monkeypatch):
    """More tokens than it has, over a tokenizer that was made before, in batches of two parts."""
    tokenizer = train_tokenizer(load_text(texts["text"]), vocab_size=300, n_ctx=32)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    few = "<|endoftext|>".join(bl.held_out_stories()[:5])
    (tmp_path / "few.txt").write_text(few)
    options: dict[str, Any] = {
        "text": str(tmp_path / "few.txt"),
        "held_out": texts["held_out"],
        "streaming": True,
        "tokenizer": tmp_path / "tokenizer",
        "recipe": replace(SHORT, gradient_accumulation=2, gradient_checkpointing=True, bf16=False),
    }
    n_tokens = 40 * 8 * 32
    assert SHORT.tokens == n_tokens > 2 * len(tokenizer(few)["input_ids"])
    monkeypatch.setattr(language, "remove_run", lambda folder, logs: None)
    results = train_language(tmp_path / "whole", **options)
    assert (results["linear"].steps, results["linear"].tokens) == (20, n_tokens)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(language, "Trainer", Interrupted)
        train_language(tmp_path / "cut", **options)
    train_language(tmp_path / "cut", resume=True, **options)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    weights = load_file(tmp_path / "cut" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


def test_compared_models_can_have_equal_time(texts, tmp_path, monkeypatch):
    """Steps are timed once: a resumed run has the counts of its beginning."""
    options: dict[str, Any] = {"recipe": SHORT, "compare": ["relu"], "equal": "time", **texts}
    monkeypatch.setattr(language, "step_seconds", lambda *args: {"linear": 0.3, "relu": 0.4})
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(language, "Trainer", Interrupted)
        train_language(tmp_path / "model", **options)
    monkeypatch.setattr(language, "step_seconds", lambda *args: pytest.fail("timed again"))
    with pytest.raises(ValueError, match=r"compare \(.*\), equal \(.*\) differ"):
        train_language(
            tmp_path / "model", resume=True, **(options | {"compare": [], "equal": "tokens"})
        )
    results = train_language(tmp_path / "model", resume=True, **options)
    assert [result.steps for result in results.values()] == [40, 30]
    assert results["relu"].tokens == 0.75 * results["linear"].tokens
    for name in ("model", "model-reglu"):
        card = (tmp_path / name / "README.md").read_text()
        assert "(bilinear 40 steps of 0.3 s, ReGLU 30 steps of 0.4 s, measured before)" in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model-reglu"]


def test_the_steps_of_each_model_are_timed(texts):
    corpus = read_corpus(**texts, tokenizer=None, recipe=RECIPE, streaming=False)
    recipe = replace(RECIPE, gradient_checkpointing=True)
    models = {n: replace(recipe, n_layers=n).model(corpus.tokenizer) for n in (6, 1)}
    batch = corpus.held_out[:8]["input_ids"]
    times = step_seconds({str(n): model for n, model in models.items()}, recipe, batch)
    assert set(times) == {"6", "1"} and min(times.values()) > 0


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("n_processes", [1, 2])
@pytest.mark.parametrize("epochs", [0.3, 2.0])
def test_steps_and_tokens_are_counted(accumulation, n_processes, epochs):
    recipe = replace(RECIPE, epochs=epochs, batch_size=5, gradient_accumulation=accumulation)
    windows = 5 * accumulation * n_processes
    a_pass = [min(windows, 37 - start) for start in range(0, 37, windows)]
    seen = (a_pass * 2)[: math.ceil(epochs * len(a_pass))]
    steps = recipe.steps(37, n_processes=n_processes)
    assert steps == len(seen)
    assert recipe.tokens_in(steps, 37, n_processes=n_processes) == 32 * sum(seen)
    by_tokens = replace(recipe, tokens=1 + 32 * 2 * windows)
    assert by_tokens.steps(None, n_processes=n_processes) == 3
    assert by_tokens.tokens_in(3, None, n_processes=n_processes) == 32 * 3 * windows


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_s_name_brings_its_own_held_out_text(monkeypatch, streaming):
    stories = {"train": bl.held_out_stories()[:30], "validation": bl.held_out_stories()[30:40]}

    def load_dataset(name, configuration, *, split, streaming):
        assert (name, configuration) == ("owner/name", None)
        part, _, rows = split.partition("[")
        start, _, end = rows.strip("]").partition(":")
        assert not (streaming and rows)  # as the library has it
        chosen = slice(int(start or 0), int(end) if end else None)
        rows = Dataset.from_dict({"text": stories[part][chosen]})
        return rows.to_iterable_dataset() if streaming else rows

    monkeypatch.setattr(text_module, "load_dataset", load_dataset)
    corpus = read_corpus("owner/name", None, None, RECIPE, streaming=streaming)
    assert (corpus.n_windows is None) == streaming
    expected = pack(text_module.in_memory(stories["validation"]), corpus.tokenizer, n_ctx=32)
    assert corpus.held_out[:]["input_ids"].equal(expected[:]["input_ids"])
    parts = read_corpus(
        "owner/name@train[5:]", "owner/name@train[:5]", None, RECIPE, streaming=streaming
    )
    held = pack(text_module.in_memory(stories["train"][:5]), parts.tokenizer, n_ctx=32)
    assert parts.held_out[:]["input_ids"].equal(held[:]["input_ids"])
    again = read_corpus("owner/name@train[5:]", None, None, RECIPE, streaming=streaming)
    assert again.tokenizer.get_vocab() == parts.tokenizer.get_vocab()
    expected = pack(text_module.in_memory(stories["validation"]), again.tokenizer, n_ctx=32)
    assert again.held_out[:]["input_ids"].equal(expected[:]["input_ids"])
    with pytest.raises(ValueError, match="held_out is missing"):
        read_corpus(Dataset.from_dict({"text": ["a"]}), None, None, RECIPE, streaming=False)


@pytest.mark.parametrize("name", ["fineweb-edu", "HuggingFaceFW/fineweb-edu:CC-MAIN-2024-10"])
def test_a_dataset_without_a_validation_split_is_named_with_a_remedy(monkeypatch, name):
    """Before it is downloaded, where that is known."""
    monkeypatch.setattr(text_module, "load_dataset", lambda *args, **_: pytest.fail("was asked"))
    with pytest.raises(ValueError, match=r"missing: .* has no validation split") as caught:
        read_corpus(name, None, None, RECIPE, streaming=True)
    assert f"--text '{name}@train[1000:]' --held-out '{name}@train[:1000]'" in str(caught.value)

    def load_dataset(*args, **options):
        raise ValueError("Unknown split \"validation\". Should be one of ['train'].")

    monkeypatch.setattr(text_module, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"held_out is missing: Unknown split.*owner/name@train\["):
        read_corpus("owner/name", None, None, RECIPE, streaming=False)


def test_an_endless_stream_is_shuffled_and_begins_again():
    numbers = [row["n"] for row in endless(stream_of(7), seed=1).take(21)]
    assert sorted(numbers) == sorted([*range(7)] * 3) and numbers != [*range(7)] * 3
    assert numbers == [row["n"] for row in endless(stream_of(7), seed=1).take(21)]
    assert numbers != [row["n"] for row in endless(stream_of(7), seed=2).take(21)]


def stream_of(n: int) -> IterableDataset:
    return Dataset.from_dict({"n": list(range(n))}).to_iterable_dataset()


def test_bad_input_is_named_before_any_work(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(language, "_train", lambda *args: pytest.fail("work has begun"))

    def fault(out="model", recipe=RECIPE, **change) -> str:
        with pytest.raises(ValueError) as caught:
            train_language(tmp_path / out, recipe=recipe, **(texts | change))
        return str(caught.value)

    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "blank.txt").write_text(" <|endoftext|> ")
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xe8")
    (tmp_path / "short.txt").write_text("A cat.")
    assert "exists already" in fault("there")
    assert "Cannot write" in fault("file/model")
    assert "There is no file" in fault(text=[tmp_path / "nothing.txt"])
    assert "No text in" in fault(text=[tmp_path / "blank.txt"])
    assert "Cannot read" in fault(text=[tmp_path / "latin.txt"])
    assert "fewer than one window" in fault(held_out=[tmp_path / "short.txt"])
    assert "held_out is missing" in fault(held_out=None)
    assert "on how many tokens" in fault(streaming=True)
    stream = {"text": tmp_path / "short.txt", "streaming": True, "recipe": SHORT}
    assert "stream has fewer than one window" in fault(**stream)
    assert "Cannot load the tokenizer" in fault(tokenizer=tmp_path / "there")
    assert "report_to='paper' is not installed" in fault(report_to="paper")
    for compare in (["linear"], ["silu", "silu"]):
        assert "name activations once" in fault(compare=compare)
    assert "activation='no'" in fault(compare=["no"])
    changes: list[dict[str, Any]] = [
        {"activation": "no"},
        {"weight_decay": -1.0},
        {"latent_noise": math.nan},
        {"n_layers": 0},
        {"d_model": 20},
        {"vocab_size": 100},
        {"epochs": 0.0},
        {"tokens": 0},
        {"gradient_accumulation": 0},
    ]
    for change in changes:
        with pytest.raises(ValueError, match=next(iter(change))):
            LanguageRecipe(**change)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"there", "file", "blank.txt", "latin.txt", "short.txt"}


FAMILIES = ("llama", "mistral", "qwen2-tied", "qwen3", "gemma-tied", "gemma2-tied", "gemma3-tied")


def readers(model) -> list[torch.nn.Module]:
    attention_and_mlps = [
        part for each in model.model.layers for part in (each.self_attn, each.mlp)
    ]
    return [*attention_and_mlps, model.lm_head]


@pytest.mark.parametrize("family", FAMILIES)
def test_latent_noise_has_its_size_everywhere_in_training_alone(family):
    model = random_model(CONFIGS[family])
    tokens = some_tokens().repeat(16, 1)
    seen: list[torch.Tensor] = []

    def record(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    before = [part.register_forward_pre_hook(record, with_kwargs=True) for part in readers(model)]
    with torch.no_grad():
        clean = model(tokens).logits
        with latent_noise(model, 0.3):
            after = [
                part.register_forward_pre_hook(record, with_kwargs=True) for part in readers(model)
            ]
            assert model(tokens).logits.equal(clean)
            seen.clear()
            noisy = model.train()(tokens).logits
            for handle in [*before, *after]:
                handle.remove()
    assert len(seen) == 2 * (2 * 3 + 1) and not noisy.allclose(clean, atol=1e-2)
    for x, y in zip(seen[::2], seen[1::2], strict=True):
        relative = (y - x) / x.std(dim=-1, keepdim=True)
        assert relative.std().item() == pytest.approx(0.3, rel=0.05)
        assert relative.mean().item() == pytest.approx(0, abs=0.02)
    with torch.no_grad():
        assert model(tokens).logits.equal(clean)
    assert not any(part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("family", ["llama", "gemma2-tied"])
def test_gradients_flow_through_latent_noise_and_checkpointing_keeps_them(family):
    gradients = []
    for checkpointing in (False, True):
        model = random_model(CONFIGS[family]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        tokens = some_tokens()
        torch.manual_seed(0)
        with latent_noise(model, 0.3):
            model(tokens, labels=tokens).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    without, with_it = gradients
    for name, gradient in without.items():
        assert gradient is not None and gradient.isfinite().all() and gradient.any()
        torch.testing.assert_close(gradient, with_it[name])


def test_latent_noise_leaves_no_trace_of_an_error_and_refuses_what_it_cannot_do():
    model = random_model(CONFIGS["llama"])
    with pytest.raises(Stopped), latent_noise(model, 0.3):
        raise Stopped
    assert not any(part._forward_pre_hooks for part in model.modules())
    with latent_noise(model, 0.0):
        assert not any(part._forward_pre_hooks for part in model.modules())
    with pytest.raises(ValueError, match=r"latent_noise=-0\.1"), latent_noise(model, -0.1):
        pass
    other = AutoModelForCausalLM.from_config(GPTNeoXConfig(**SIZES))
    with pytest.raises(ValueError, match="GPTNeoXForCausalLM has 3"), latent_noise(other, 0.1):
        pass


def rows(n: int = 40, **columns: Any) -> Dataset:
    """Windows of tokens, each another."""
    numbers = torch.randint(1, 36, (n, 6), generator=torch.Generator().manual_seed(3))
    return Dataset.from_dict({"input_ids": numbers.tolist(), **columns})


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings = {"max_steps": 3, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    return TrainingArguments(
        str(folder), **{"save_steps": 1, "logging_steps": 1, **settings, **changes}
    )


def run(folder: Path, dataset: Any = None, *, args: Any = None, **options: Any) -> Any:
    model = random_model(CONFIGS["llama"])
    windows = (rows() if dataset is None else dataset).with_format("torch")
    return train(model, windows, args=arguments(folder, **(args or {})), note={}, **options)


def changed(dataset: Dataset, row: int, column: str) -> Dataset:
    columns = dataset.to_dict()
    columns[column][row] = columns[column][row][::-1]  # pyright: ignore[reportIndexIssue]
    return Dataset.from_dict(columns)  # pyright: ignore[reportArgumentType]


def test_a_note_has_everything_that_decides_a_run(tmp_path, monkeypatch):
    plain = text_and_arguments(rows(), arguments(tmp_path))
    assert json.loads(json.dumps(plain)) == plain

    def differing(dataset: Any = None, **changes: Any) -> set[str]:
        other = text_and_arguments(dataset or rows(), arguments(tmp_path, **changes))
        return {name for name in {**plain, **other} if plain.get(name) != other.get(name)}

    decisive = {
        "adam_beta2": 0.9,
        "optim": "sgd",
        "data_seed": 1,
        "neftune_noise_alpha": 5.0,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "dataloader_drop_last": True,
        "bf16": True,
    }
    for name, value in decisive.items():
        assert differing(**{name: value}) == {name}
    indifferent = {
        "output_dir": str(tmp_path / "other"),
        "run_name": "other",
        "save_steps": 7,
        "save_total_limit": 1,
        "logging_steps": 7,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "dataloader_num_workers": 1,
        "disable_tqdm": False,
    }
    there = text_and_arguments(
        rows(),
        TrainingArguments(**{**arguments(tmp_path).to_dict(), **indifferent, "hub_token": None}),
    )
    assert there == plain

    labelled = rows(labels=rows()["input_ids"][:])
    for row in (0, 7, 16, 23, 32, 39):
        assert differing(changed(rows(), row, "input_ids")) == {"text"}
        one, other = (
            text_and_arguments(each, arguments(tmp_path))
            for each in (labelled, changed(labelled, row, "labels"))
        )
        assert {name for name in one if one[name] != other[name]} == {"text"}
    stream = changed(rows(), 7, "input_ids").to_iterable_dataset()
    assert text_and_arguments(stream, arguments(tmp_path))["text"] != plain["text"]
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    assert differing() == {"world_size"}


def test_arguments_that_a_run_has_used_decide_the_same_run(tmp_path):
    args = arguments(tmp_path / "run", gradient_checkpointing=True, bf16=True)
    model, windows = random_model(CONFIGS["llama"]), rows().with_format("torch")
    before = text_and_arguments(windows, args)
    train(model, windows, args=args, note={})
    assert text_and_arguments(windows, args) == before
    assert args.logging_nan_inf_filter


def test_a_run_that_is_done_says_so_and_where(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise Stopped

    with pytest.raises(Stopped):
        run(tmp_path / "run", callbacks=[Stop()])
    with pytest.raises(ValueError, match="holds an unfinished run: resume it"):
        run(tmp_path / "run")
    whole = run(tmp_path / "run", resume=True).state_dict()
    with pytest.raises(
        ValueError, match=r"came to its end.*/checkpoint-2: .*resume=True"
    ) as caught:
        run(tmp_path / "run")
    assert "unfinished" not in str(caught.value)
    with pytest.raises(ValueError, match=r"another run: seed \(42, not 3\) differ"):
        run(tmp_path / "run", resume=True, args={"seed": 3})
    again = run(tmp_path / "run", resume=True)
    assert all(weight.equal(again.state_dict()[name]) for name, weight in whole.items())


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_run_that_is_done_takes_no_step_too_many_when_resumed(tmp_path, strategy):
    class Steps(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            ended.append(state.global_step)

    ended: list[int] = []
    for resume in (False, True):
        args = {"save_strategy": strategy}
        run(tmp_path / "run", args=args, callbacks=[Steps()], resume=resume)
    assert ended == [3, 3]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "float32"])
def test_a_logged_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch, precision):
    """Though a scaler skips the steps, and the arguments ask to hide such losses."""

    def loss(outputs, labels, num_items_in_batch=None):
        return outputs["logits"].sum() * math.nan

    class Half(TrainerCallback):
        """A device that can run with fp16, as a CPU cannot."""

        def on_train_begin(self, args, state, control, **kwargs):
            args.fp16 = precision == "fp16"

    args = {"bf16": precision == "bf16"}
    with pytest.raises(ValueError, match=r"not finite after \d steps"):
        run(tmp_path / "run", args=args, callbacks=[Half()], loss=loss)


def test_pads_are_not_learned(tmp_path):
    """Rows with a mask and without labels are those with the pads' labels masked."""
    mask = [[1] * 4 + [0] * 2] * 40
    labels = [row[:4] + [-100] * 2 for row in rows()["input_ids"][:]]
    asked = run(tmp_path / "asked", rows(attention_mask=mask, labels=labels)).state_dict()
    ours = run(tmp_path / "mask", rows(attention_mask=mask)).state_dict()
    assert all(weight.equal(ours[name]) for name, weight in asked.items())
    other = run(tmp_path / "none").state_dict()
    assert not all(weight.equal(other[name]) for name, weight in asked.items())


def test_logs_outlive_the_folder_of_a_run(tmp_path):
    for number in range(2):
        written = tmp_path / "run" / "runs" / f"{number}" / "events"
        written.parent.mkdir(parents=True)
        written.write_text(f"{number}")
        remove_run(tmp_path / "run", tmp_path / "run.logs")
        assert not (tmp_path / "run").exists()
    assert [(tmp_path / "run.logs" / f"{n}" / "events").read_text() for n in range(2)] == ["0", "1"]
    (tmp_path / "run").mkdir()
    remove_run(tmp_path / "run", tmp_path / "no.logs")
    assert [path.name for path in tmp_path.iterdir()] == ["run.logs"]


def test_a_language_model_s_logs_are_kept(texts, tmp_path, monkeypatch):
    class Logging(language.Trainer):
        def train(self, *args, **kwargs):
            log = Path(str(self.args.output_dir)) / "runs" / "today" / "events"
            log.parent.mkdir(parents=True)
            log.write_text("a curve")
            return super().train(*args, **kwargs)

    monkeypatch.setattr(language, "Trainer", Logging)
    train_language(tmp_path / "model", recipe=replace(SHORT, tokens=2 * 8 * 32), **texts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.logs"]
    assert (tmp_path / "model.logs" / "today" / "events").read_text() == "a curve"


def test_a_run_that_cannot_begin_leaves_no_note(tmp_path):
    stream = rows().to_iterable_dataset()
    with pytest.raises(ValueError, match=r"end of a stream is not known.*max_steps=-1"):
        run(tmp_path / "run", stream, args={"max_steps": -1, "num_train_epochs": 2})
    with pytest.raises(ValueError, match="report_to='paper' is not installed"):
        run(tmp_path / "run", args={"report_to": "paper"})
    assert not (tmp_path / "run").exists()
    run(tmp_path / "run", stream)


def test_windows_longer_than_the_model_s_context_are_refused():
    model = random_model(CONFIGS["llama"])
    longest = model.config.max_position_embeddings
    tokenizer = train_tokenizer(bl.held_out_stories()[:3], vocab_size=300, n_ctx=8)
    documents = text_module.in_memory(bl.held_out_stories()[:30])
    fault = rf"n_ctx={longest + 1} tokens.*max_position_embeddings={longest}:"
    with pytest.raises(ValueError, match=fault):
        as_windows(documents, tokenizer, model=model, n_ctx=longest + 1)
    ids = [[1] * (longest + 1)]
    with pytest.raises(ValueError, match=fault):
        as_windows(Dataset.from_dict({"input_ids": ids}), None, model=model, n_ctx=5)
    fits = Dataset.from_dict({"input_ids": [[1] * longest]})
    assert len(as_windows(fits, None, model=model, n_ctx=5)) == 1  # pyright: ignore[reportArgumentType]


def test_a_model_whose_config_holds_that_of_its_text_is_trained(tmp_path):
    text = {"vocab_size": 48, "hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8}
    vision = {"hidden_size": 8, "intermediate_size": 9, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = Gemma3Config(
        text_config=text | heads | {"max_position_embeddings": 7, "pad_token_id": 0},
        vision_config=vision,
        mm_tokens_per_image=4,
    )
    model = Gemma3ForConditionalGeneration(config)
    assert not hasattr(config, "vocab_size")
    windows = as_windows(rows(4), None, model=model, n_ctx=6)
    assert len(list(windows)) == 4
    with pytest.raises(ValueError, match="max_position_embeddings=7"):
        as_windows(Dataset.from_dict({"input_ids": [[1] * 8]}), None, model=model, n_ctx=6)
    assert DistillationLoss(model, model, weight=0.5).teacher is model
    assert evaluate(model, first_windows(windows, 4), model).kl == 0


def test_a_command_is_shown_without_the_folders_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a b.txt").write_text("text")
    argv = ["/usr/bin/else", "train", "language", f"{tmp_path}/out/new/", "--text=in/a b.txt"]
    argv += [f"--held-out={tmp_path}/in/c.txt", "--text", "owner/name:en", "--lr", "2e-3"]
    argv += ["--data", "Stories, 1/2 of them; " + "long " * 100, "--tokenizer", "in", "../there"]
    shown = shlex.split(shown_command(argv))
    assert shown[:5] == ["bilinear-lens", "train", "language", "new", "--text=a b.txt"]
    assert shown[5:10] == ["--held-out=c.txt", "--text", "owner/name:en", "--lr", "2e-3"]
    assert shown[10:] == [*argv[10:12], "--tokenizer", "in", "there"]


@pytest.mark.slow
def test_two_processes_train_one_model(texts, tmp_path):
    """What `torchrun` starts: one folder, one set of checkpoints, the same steps' worth of text."""
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "from bilinear_lens.training.language import LanguageRecipe, train_language\n"
        f"recipe = {RECIPE!r}\n"
        "results = train_language(sys.argv[1], text=[sys.argv[2]], held_out=[sys.argv[3]], "
        "recipe=recipe, compare=['silu'], equal='time')\n"
        "print(results)\n"
    )
    torchrun = Path(sys.executable).with_name("torchrun")
    files = [tmp_path / "model", *texts["text"], *texts["held_out"]]
    done = subprocess.run(
        [torchrun, "--nproc-per-node", "2", script, *files],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model-swiglu", "train.py"]
    assert bl.HookedBilinearTransformer.from_pretrained(tmp_path / "model").cfg.n_layers == 1
    assert "x 2 devices" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.slow
def test_the_built_in_models_cards_are_true():
    """The held-out loss on the cards, measured again on the whole text where it can be had."""
    file = Path(os.environ.get("TINYSTORIES_HELD_OUT", "heldout.txt.gz"))
    if not file.exists():
        pytest.skip("TINYSTORIES_HELD_OUT does not name the held-out text of the model cards")
    for name in ("tinystories-1l", "tinystories-4l"):
        folder = built_in(name)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = pack(load_text(file), tokenizer, n_ctx=256)[:]["input_ids"]
        with torch.no_grad():
            losses = [plain(part, labels=part).loss.item() for part in tokens.split(32)]
        card = (folder / "README.md").read_text()
        stated = float(card.split("this model | ")[1].split(" ")[0])
        assert sum(losses) / len(losses) == pytest.approx(stated, abs=0.005)
        assert json.loads((folder / "config.json").read_text())["hidden_act"] == "linear"
