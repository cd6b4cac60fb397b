"""The commands: what they print and write, and errors as one line with exit code 2."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
import torch
from models import CONFIGS, SIZES, random_model
from test_checkpoints import AUTHORS, authors_weights, write
from transformers import AutoModelForCausalLM, LlamaConfig

import bilinear_lens as bl
from bilinear_lens import cli
from bilinear_lens.analysis.overview import overview


def test_the_demo_shows_a_table_its_proof_and_a_page(run, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.lens, "CURVE_TEXTS", 20)  # the whole demo is the README's first command
    code, out, _ = run("demo")
    assert code == 0
    assert "' named' - mean, written by layer 0 of tinystories-1l" in out
    assert "effective rank" in out and "Once upon a time" in out
    assert "90 % of the effect" in out and str(tmp_path / "report.html") in out.replace("\n", "")
    page = (tmp_path / "report.html").read_text()
    for heading in ("Eigenvectors", "Spectrum", "Pairs of tokens", "On text", "Ablation"):
        assert f"<h2>{heading}</h2>" in page
    assert page.count("window.CircuitsVis = CircuitsVis") == 1


def test_explain_prints_a_table_and_writes_nothing(run, tmp_path):
    code, out, _ = run("explain tinystories-4l ' she' --contrast ' he' --layer 3 --k 2")
    assert code == 0 and "' she' - ' he', written by layer 3 of tinystories-4l" in out
    assert len(out.strip().splitlines()) == 4
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("prompt", ["", "--prompt 'There was a girl'"])
def test_a_circuit_is_traced_checked_and_written(run, tmp_path, monkeypatch, prompt):
    monkeypatch.setattr(cli.circuits, "TEXTS", 2)
    monkeypatch.setattr(cli.circuits, "RANDOM", 1)
    line = f"trace tinystories-1l ' named' {prompt} --width 4 --depth 2"
    code, out, _ = run(line)
    assert code == 0 and "' named'" in out and "MLP 0 e0" in out
    assert not list(tmp_path.iterdir())
    code, _, _ = run(f"{line} --out page.html --save circuit.safetensors --graph graph.json")
    assert code == 0
    page = (tmp_path / "page.html").read_text()
    for heading in ("Circuit", "Predicted and measured", "Faithfulness"):
        assert f"<h2>{heading}</h2>" in page
    circuit = bl.Circuit.load(tmp_path / "circuit.safetensors")
    graph = json.loads((tmp_path / "graph.json").read_text())
    assert len(graph["nodes"]) == len(circuit.nodes) > 4
    assert (circuit.prompt is None) == (not prompt)
    for fault in ("--out no/page.html", "--text a.txt", "--layer 3", "--width 0"):
        code, _, err = run(f"{line} {fault}")
        assert code == 2 and len(err.strip().splitlines()) == 1


def test_a_sweep_is_made_searched_and_resumed(run, tmp_path):
    line = "sweep tinystories-1l --out tables --token ' named' --token ' she' --k 4"
    code, out, _ = run(line)
    assert code == 0 and "Wrote tables" in out
    listed = bl.load_sweep(tmp_path / "tables").search(" girl")
    code, out, _ = run("search tables ' girl' --end + --layer 0")
    assert code == 0 and "' named'" in out
    assert len(out.strip().splitlines()) == 1 + (listed["end"] == "+").sum()
    code, out, _ = run("search tables ' she' --role output --limit 3")
    assert code == 0 and len(out.strip().splitlines()) == 4
    code, _, err = run(line)
    assert code == 2 and "--resume" in err
    (shard,) = (tmp_path / "tables/shards").iterdir()
    before = shard.read_bytes()
    shard.write_bytes(before[:-9])
    code, _, err = run("search tables ' girl'")
    assert code == 2 and shard.name in err and "--resume" in err
    code, out, err = run(line + " --resume")
    assert code == 0 and shard.name in out + err and shard.read_bytes() == before
    code, _, err = run("search tables ' girll'")
    assert code == 2 and "' girl'" in err
    code, _, err = run(line.replace("--k 4", "--k 5"))
    assert code == 2 and "k 4 there, 5 here" in err
    code, _, err = run("sweep tinystories-1l --out small --memory 0.0001")
    assert code == 2 and "at least" in err and not (tmp_path / "small").exists()


def test_a_classifier_is_trained_and_explains_an_image(run, tmp_path):
    line = "train vision digits-model --epochs 8 --batch-size 128 --d-model 20 --lr 5e-3 --bf16"
    code, out, _ = run(line)
    assert code == 0 and "Wrote digits-model" in out
    accuracy = float(out.split("test split: ")[1].split()[0])
    test = bl.load_images("digits", "test")
    model = bl.HookedBilinearClassifier.from_pretrained(tmp_path / "digits-model")
    assert accuracy > 0.8
    assert model.accuracy(test.images, test.labels) == pytest.approx(accuracy, abs=1e-4)
    card = (tmp_path / "digits-model" / "README.md").read_text()
    assert f"bilinear-lens {line}" in card and f"{accuracy:.4f}" in card
    code, out, _ = run("explain-image digits-model 7 --classes 2 --k 3 --out seven.html")
    prediction = model.cfg.labels[int(model(test.images[7]).argmax())]
    assert code == 0 and f"labelled {test.names[int(test.labels[7])]}: {prediction}" in out
    assert out.count("rest") == 2
    page = (tmp_path / "seven.html").read_text()
    for heading in ("What fired", f"The class {prediction}", "All classes"):
        assert f"<h2>{heading}</h2>" in page
    picture = PIL.Image.fromarray((255 * test.images[7, 0]).round().byte().numpy())
    picture.save(tmp_path / "seven.png")
    code, from_file, _ = run("explain-image digits-model seven.png --classes 2 --k 3")
    assert code == 0 and f"seven.png: {prediction}" in from_file


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("train vision . --data digits", "exists already"),
        ("train vision new --data nowhere/", "Cannot load the images"),
        ("train vision new --epochs 0", "epochs"),
        ("train vision new --dropout 1", "dropout"),
        ("explain-image nowhere 3", "No model or folder"),
        ("explain-image tinystories-1l 3", "holds no HookedBilinearClassifier"),
        ("explain-image small 999", "images 0 to 359"),
        ("explain-image mnist-1l 3", "such as --data mnist"),
        ("train vision new --layers 6", "residual=True"),
        ("explain-image small absent.png", "as a picture"),
        ("explain-image small large.png", "the model takes [1, 8, 8]"),
        ("explain-image small 3 --k 99", "k=99"),
        ("explain-image deep 3 --out page.html", "Leave out --out"),
    ],
)
def test_faults_around_images_are_named(run, tmp_path, line, message):
    shape = {"input_shape": (1, 8, 8), "n_classes": 10, "d_model": 3}
    bl.HookedBilinearClassifier.from_config(**shape).save_pretrained(tmp_path / "small")
    bl.HookedBilinearClassifier.from_config(**shape, n_layers=2).save_pretrained(tmp_path / "deep")
    PIL.Image.new("L", (9, 8)).save(tmp_path / "large.png")
    before = {path.name for path in tmp_path.iterdir()}
    code, _, err = run(line)
    assert code == 2 and message in " ".join(err.split())
    assert {path.name for path in tmp_path.iterdir()} == before


def test_convert_writes_a_plain_hugging_face_folder(run, tmp_path):
    write(tmp_path / "theirs", AUTHORS, authors_weights(AUTHORS))
    code, out, _ = run("convert theirs ours")
    assert code == 0 and "Wrote ours (without a tokenizer" in out
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert plain.config.hidden_act == "linear"
    assert run("convert theirs ours")[0] == 2


def test_convert_goes_back_to_the_authors_layout(run, tmp_path, model):
    code, out, _ = run("convert tinystories-1l theirs --layout authors")
    assert code == 0 and out.strip() == "Wrote theirs"
    theirs = bl.HookedBilinearTransformer.from_pretrained(tmp_path / "theirs")
    tokens = model.to_tokens("Once upon a time")
    torch.testing.assert_close(
        theirs(tokens).log_softmax(-1), model(tokens).log_softmax(-1), atol=1e-4, rtol=1e-4
    )
    random_model(CONFIGS["qwen3"]).save_pretrained(tmp_path / "qwen")
    code, _, err = run("convert qwen other --layout authors")
    assert code == 2 and "Qwen3ForCausalLM" in err and not (tmp_path / "other").exists()
    assert run("convert theirs other --layout gguf")[0] == 2


def test_info_says_what_a_model_is(run, tmp_path, model):
    code, out, _ = run("info tinystories-1l --tokens 5")
    assert code == 0 and "bilinear: gated, without an activation" in out
    assert "3,146,496, of which 786,432 in MLPs" in out and "8 of width 32" in out
    row = overview(model, n_tokens=5).loc[0]
    line = out.strip().splitlines()[-1]
    assert line.split()[:2] == ["0", "1024"] and f"{row['effective_rank']:.1f} ±" in line
    assert f"({row['random_effective_rank']:.1f})" in line and f"{row['top_8']:.1%}" in line
    code, out, _ = run("info mnist-1l")
    assert code == 0 and "10: 0, 1, 2" in out and "Effective rank of each class" in out
    random_model(LlamaConfig(**SIZES, hidden_act="silu")).save_pretrained(tmp_path / "glu")
    code, out, _ = run("info glu")
    assert code == 0 and "gated through SiLU" in out and "Layers" not in out


def test_push_prints_where_the_model_is(run, tmp_path, monkeypatch):
    asked = []

    class Api:
        def __init__(self, token: str | None) -> None:
            asked.append(token)

        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
            asked.append((repo_id, private, exist_ok))
            return f"https://huggingface.co/{repo_id}"

        def repo_info(self, repo_id: str) -> SimpleNamespace:
            return SimpleNamespace(private=True)

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options) -> None:
            asked.append((repo_id, folder_path.name))

    monkeypatch.setattr("bilinear_lens.models.hub.HfApi", Api)
    random_model(CONFIGS["llama"]).save_pretrained(tmp_path / "model")
    code, _, err = run("push model somebody/model --private")
    assert code == 2 and "model card" in err and not asked
    (tmp_path / "model" / "README.md").write_text("A card.")
    code, out, _ = run("push model somebody/model --private")
    assert code == 0 and out.strip() == "https://huggingface.co/somebody/model"
    assert asked == [None, ("somebody/model", True, True), ("somebody/model", "model")]


def test_train_language_makes_a_model_that_loads(run, tmp_path):
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(bl.held_out_stories()[:12]))
    sizes = "--layers 1 --d-model 24 --d-mlp 28 --heads 3 --n-ctx 32 --vocab-size 300 --epochs 1"
    line = (
        f"train language model --text text.txt --held-out text.txt {sizes} --data 'A few stories'"
    )
    code, out, err = run(line)
    assert code == 0, err
    assert "linear: held-out loss" in out
    assert bl.HookedBilinearTransformer.from_pretrained(tmp_path / "model").cfg.n_layers == 1
    card = (tmp_path / "model" / "README.md").read_text()
    assert "**Data**: A few stories." in card and f"bilinear-lens {line}" in card


def test_errors_are_one_line_with_exit_code_2(run, tmp_path):
    random_model(CONFIGS["llama"]).save_pretrained(tmp_path / "mute")
    swiglu = json.loads((tmp_path / "mute" / "config.json").read_text()) | {"hidden_act": "silu"}
    before = {path.name for path in tmp_path.iterdir()}
    cases = {
        "explain tinystories ' girl'": "No model or folder 'tinystories'",
        "explain tinystories-1l girlfriend": "'girlfriend' is not one token",
        "explain tinystories-1l ' girl' --layer 1": "layer=1 must be between 0 and 0",
        "explain tinystories-1l ' girl' --k 0": "k=0 must be",
        "explain tinystories-1l ' girl' --out no/such.html": "Cannot write no/such.html",
        "explain tinystories-1l ' yacht' --out page.html": "never the right answer",
        "explain mute ' girl'": "has no tokenizer",
        "train language x --text no.txt --held-out no.txt": "There is no file no.txt",
        "explain tinystories-1l ' girl' --text no.txt": "--text is for the page",
        "convert mute other --tokenizer tinystories-1l": "the tokenizer is not this model's",
        "convert nothing somewhere": "No model or folder 'nothing'",
    }
    for line, expected in cases.items():
        code, _, err = run(line)
        assert (code, err.startswith("error: "), err.count("\n")) == (2, True, 1), err
        assert expected in err
    (tmp_path / "mute" / "config.json").write_text(json.dumps(swiglu))
    assert "bilinearize" in run("explain mute ' girl'")[2]
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "command",
    [
        *("", "demo", "info", "explain", "convert", "push"),
        *("train", "train language", "train sae", "train transcoder"),
        *("features", "features list", "features show", "features predict", "features browse"),
    ],
)
def test_help_teaches(run, command):
    code, out, _ = run(f"{command} --help")
    assert code == 0 and "Usage: bilinear-lens" in out
    if command == "explain" or " " in command:
        assert "Example: bilinear-lens" in out


def test_the_installed_command_runs():
    installed = Path(sys.executable).with_name("bilinear-lens")
    done = subprocess.run([installed, "explain", "x", "y"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: No model")
