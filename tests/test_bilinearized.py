"""A checkpoint made bilinear, into a folder with a card: from Python and from the command line."""

import re
import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import bilinear_lens as bl
from bilinear_lens.cli import app
from bilinear_lens.models.checkpoints import built_in, load_checkpoint
from bilinear_lens.training import bilinearized
from bilinear_lens.training.bilinearized import bilinearize_checkpoint
from bilinear_lens.training.evaluation import evaluate
from bilinear_lens.training.windows import as_windows, first_windows

SETTINGS = {"max_steps": 2, "per_device_train_batch_size": 2, "disable_tqdm": True}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("text")
    stories = bl.held_out_stories()
    (folder / "train.txt").write_text("<|endoftext|>".join(stories[:8]))
    (folder / "held-out.txt").write_text("<|endoftext|>".join(stories[8:20]))
    return {"text": folder / "train.txt", "held_out": folder / "held-out.txt"}


@pytest.fixture(scope="module")
def converted(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "model"
    summary = bilinearize_checkpoint(
        "stories260k", out, settings=SETTINGS, n_ctx=64, seeds=(3, 4), command="run me", **texts
    )
    return out, summary


def test_the_folder_is_a_stock_bilinear_model_with_its_tokenizer(converted):
    out, _ = converted
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert plain.config.hidden_act == "linear"
    hooked = bl.HookedBilinearTransformer.from_pretrained(out)
    tokens = torch.tensor([AutoTokenizer.from_pretrained(out)("Once upon a time")["input_ids"]])
    with torch.no_grad():
        expected = plain(tokens).logits.log_softmax(-1)
        torch.testing.assert_close(hooked(tokens).log_softmax(-1), expected, atol=1e-4, rtol=0)


def test_the_card_says_how_it_was_made_and_what_it_cost(converted):
    out, summary = converted
    card = (out / "README.md").read_text()
    for said in ("stories260k", "2 steps", "256 tokens", "2 seed(s)", "run me", "train.txt"):
        assert said in card
    rows = {
        name: re.search(rf"^\| {re.escape(name)} \| (.*) \|$", card, re.MULTILINE)
        for name in bilinearized.METHOD_NAMES.values()
    }
    assert set(summary.index) == set(bilinearized.METHOD_NAMES)
    for method, name in bilinearized.METHOD_NAMES.items():
        row = rows[name]
        assert row and float(row[1].split(" | ")[0]) == round(summary.loc[method, "loss"], 4)
    assert f"{summary.loc['bilinearized', 'cost']:+.4f} ±" in card


def test_the_card_names_a_base_model_and_warns_where_training_on_made_it_worse(converted):
    study = pd.read_csv(converted[0] / "study.csv")
    options: dict[str, Any] = {
        "source": "a model",
        "recipe": bl.BilinearizeRecipe(),
        "args": bl.recommended_arguments("run", max_steps=2),
        "n_ctx": 64,
        "data": "some text",
        "command": None,
    }
    losses = {"original": 1.5, "bilinearized": 1.75}
    for continued, warns in ((1.4, False), (1.625, True)):
        found = losses | {"continued": continued}
        changed = study.assign(loss=[found.get(method, 2.0) for method in study["method"]])
        card = bilinearized.bilinearized_card("name", study=changed, **options)
        assert ("is +0.2500 from the original" in " ".join(card.split())) == warns
        assert "base_model" not in card
    from_hub = {**options, "source": "someone/a-model"}
    card = bilinearized.bilinearized_card("name", study=study, **from_hub)
    assert "base_model: someone/a-model\n---\n" in card


def test_what_is_bilinear_already_stays_as_it_is(texts, tmp_path):
    with pytest.warns(UserWarning, match="bilinear already"):
        done = bilinearize_checkpoint("tinystories-1l", tmp_path / "no", settings=SETTINGS, **texts)
    assert done is None and not list(tmp_path.iterdir())


def test_a_study_that_was_cut_off_goes_on(texts, tmp_path, monkeypatch):
    run = bilinearized.bilinearize_study

    def cut(*args, **kwargs):
        kwargs["methods"] = kwargs["methods"][:1]
        run(*args, **kwargs)
        raise KeyboardInterrupt

    options = {"settings": SETTINGS, "n_ctx": 64, **texts}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(bilinearized, "bilinearize_study", cut)
        bilinearize_checkpoint("stories260k", tmp_path / "model", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["model.runs"]
    with pytest.raises(ValueError, match="resume"):
        bilinearize_checkpoint("stories260k", tmp_path / "model", **options)
    other = {**options, "settings": {**SETTINGS, "max_steps": 3}}
    with pytest.raises(ValueError, match="another run: max_steps"):
        bilinearize_checkpoint("stories260k", tmp_path / "model", resume=True, **other)
    done = bilinearize_checkpoint(
        "stories260k", tmp_path / "model", resume=True, controls=False, **options
    )
    assert done is not None and "bilinearized" in done.index
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_command_names_its_faults_in_one_line(texts, tmp_path):
    def fault(*arguments: object) -> str:
        command = ["bilinearize", *map(str, arguments), "--text", str(texts["text"])]
        result = CliRunner().invoke(app, command)
        assert isinstance(result.exception, (ValueError, KeyError))
        return str(result.exception)

    held_out = ("--held-out", texts["held_out"], "--steps", 1)
    (tmp_path / "there").mkdir()
    assert "exists already" in fault("stories260k", tmp_path / "there", *held_out)
    assert "held_out is missing" in fault("stories260k", tmp_path / "new")
    assert "must be a share" in fault("stories260k", tmp_path / "new", *held_out, "--anneal", 2)
    assert "schedule='no'" in fault("stories260k", tmp_path / "new", *held_out, "--schedule", "no")
    for option in ("--steps", "--batch-size", "--gradient-accumulation", "--seeds", "--n-ctx"):
        command = ["bilinearize", "stories260k", str(tmp_path / "new"), "--text", "a", option, "0"]
        assert CliRunner().invoke(app, command).exit_code == 2
    assert "No model or folder" in fault(tmp_path / "nothing", tmp_path / "new", *held_out)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_command_makes_a_model_bilinear(texts, tmp_path):
    out = tmp_path / "model"
    arguments = ["--text", texts["text"], "--held-out", texts["held_out"], "--no-controls"]
    arguments += ["--steps", 1, "--batch-size", 2, "--n-ctx", 64]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = CliRunner().invoke(app, ["bilinearize", "stories260k", *map(str, [out, *arguments])])
    assert done.exit_code == 0 and "bilinearized" in done.output
    assert bl.HookedBilinearTransformer.from_pretrained(out).cfg.n_layers == 5


DATA = Path(__file__).parents[2] / "shared" / "data" / "tinystories"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data/tinystories")
def test_the_model_that_ships_is_as_its_card_says():
    card = (built_in("stories260k-bilinear") / "README.md").read_text()
    rows = dict(re.findall(r"^\| (?:the )?([^|]*) \| (\d\.\d{4}) ", card, re.MULTILINE))
    (original, tokenizer), (ours, _) = map(load_checkpoint, ("stories260k", "stories260k-bilinear"))
    text = bl.load_text(DATA / "heldout.txt.gz")
    held_out = first_windows(as_windows(text, tokenizer, model=original, n_ctx=256), 256)
    found = evaluate(ours, held_out, original)
    assert found.loss == pytest.approx(float(rows["this model"]), abs=2e-4)
    assert evaluate(original, held_out, original).loss == pytest.approx(
        float(rows["original"]), abs=2e-4
    )
