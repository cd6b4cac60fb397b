"""Training small language models: the loss falls, a run resumes, bad input costs no work."""

import gzip
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bilinear_lens as bl
from bilinear_lens.models.checkpoints import built_in
from bilinear_lens.training import language
from bilinear_lens.training.language import LanguageRecipe, train_language
from bilinear_lens.training.text import load_text, pack, train_tokenizer

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
)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("text")
    stories = bl.held_out_stories()
    (folder / "train.txt").write_text("<|endoftext|>".join(stories[:30]))
    with gzip.open(folder / "held-out.txt.gz", "wt") as stream:
        stream.write("<|endoftext|>".join(stories[30:40]))
    return {"text": [folder / "train.txt"], "held_out": [folder / "held-out.txt.gz"]}


def test_a_trained_model_has_learned_and_is_bilinear(texts, tmp_path):
    losses = train_language(tmp_path / "model", recipe=RECIPE, twin=True, command="run me", **texts)
    assert set(losses) == {"linear", "silu"}
    for loss in losses.values():
        assert loss.per_token < 0.8 * math.log(300)
        assert loss.per_byte < loss.per_token
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model-swiglu"]
    model = bl.HookedBilinearTransformer.from_pretrained(tmp_path / "model", dtype="auto")
    assert model.W_E.dtype == torch.bfloat16
    assert model.W_E[0].any()  # the first token of a text is trained, too
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"{losses['linear'].per_token:.4f}" in card and f"{losses['silu'].per_byte:.4f}" in card
    assert "run me" in card and "bilinear, this model" in card
    with pytest.raises(ValueError, match="bilinearize"):
        bl.HookedBilinearTransformer.from_pretrained(tmp_path / "model-swiglu")


def test_the_reported_loss_is_that_of_the_saved_model(texts, tmp_path):
    losses = train_language(tmp_path / "model", recipe=RECIPE, **texts)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    (file,) = texts["held_out"]
    documents = load_text(Path(file))
    tokens = pack(documents, tokenizer, n_ctx=32)[:]["input_ids"]
    with torch.no_grad():
        loss = plain(tokens, labels=tokens).loss.item()
    assert losses["linear"].per_token == pytest.approx(loss, abs=0.02)  # evaluated in bfloat16
    stories = list(documents["text"])
    n_tokens = sum(len(tokenizer(story)["input_ids"]) + 1 for story in stories)
    n_bytes = sum(len(story.encode()) for story in stories)
    assert losses["linear"].per_byte == pytest.approx(
        losses["linear"].per_token * n_tokens / n_bytes
    )


class Stopped(Exception):
    """In place of a power cut."""


def test_a_run_that_was_cut_off_resumes_to_the_same_model(texts, tmp_path, monkeypatch):
    tokenizer = train_tokenizer(load_text(texts["text"]), vocab_size=300, n_ctx=32)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options: dict[str, Any] = {"recipe": RECIPE, "tokenizer": tmp_path / "tokenizer", **texts}
    whole = train_language(tmp_path / "whole", **options)

    class Interrupted(language.Trainer):
        def _maybe_log_save_evaluate(self, *args, **kwargs):
            super()._maybe_log_save_evaluate(*args, **kwargs)
            if self.state.global_step > 0.5 * self.state.max_steps:
                raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(language, "Trainer", Interrupted)
        train_language(tmp_path / "cut", **options)
    assert not (tmp_path / "cut").exists()
    with pytest.raises(ValueError, match="resume"):
        train_language(tmp_path / "cut", **options)
    other = dict(options, recipe=replace(RECIPE, seed=1))
    with pytest.raises(ValueError, match="another recipe"):
        train_language(tmp_path / "cut", resume=True, **other)
    resumed = train_language(tmp_path / "cut", resume=True, **options)
    assert resumed["linear"].per_token == pytest.approx(whole["linear"].per_token, abs=5e-3)
    assert not (tmp_path / "cut.checkpoints").exists()


def test_bad_input_is_named_before_any_work(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(language, "_trainer", lambda *args: pytest.fail("work has begun"))

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
    with pytest.raises(ValueError, match="no SwiGLU twin"):
        train_language(
            tmp_path / "x", recipe=replace(RECIPE, activation="silu"), twin=True, **texts
        )
    changes: list[dict[str, Any]] = [
        {"activation": "no"},
        {"weight_decay": -1.0},
        {"n_layers": 0},
        {"d_model": 20},
        {"vocab_size": 100},
        {"epochs": 0.0},
    ]
    for change in changes:
        with pytest.raises(ValueError, match=next(iter(change))):
            LanguageRecipe(**change)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"there", "file", "blank.txt", "latin.txt", "short.txt"}


@pytest.mark.slow
def test_two_processes_train_one_model(texts, tmp_path):
    """What `torchrun` starts: one folder, one set of checkpoints, the same steps' worth of text."""
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "from bilinear_lens.training.language import LanguageRecipe, train_language\n"
        f"recipe = {RECIPE!r}\n"
        "losses = train_language(sys.argv[1], text=[sys.argv[2]], held_out=[sys.argv[3]], "
        "recipe=recipe, twin=True)\n"
        "print(losses)\n"
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
