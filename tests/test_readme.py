"""The README: its example prints what it says, and what it names is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import bilinear_lens as bl
from bilinear_lens.models.checkpoints import built_in

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


def test_the_example_prints_what_the_readme_says():
    done = subprocess.run(
        [sys.executable, "-c", blocks("python")[0]], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    assert lines == [line.rstrip() for line in blocks("text")[0].splitlines()]


def test_the_sweep_finds_what_the_readme_says(tmp_path):
    commands = next(block for block in blocks("bash") if "bilinear-lens sweep" in block)
    done = subprocess.run(
        ["bash", "-ec", commands],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    shown = [line.rstrip() for line in blocks("text")[1].splitlines()]
    assert [line.rstrip() for line in done.stdout.splitlines()][-len(shown) :] == shown


def test_the_sweep_is_asked_as_the_readme_says(tmp_path):
    asked = next(block for block in blocks("python") if "bl.sweep" in block)
    start = "import bilinear_lens as bl\nload = bl.HookedBilinearTransformer.from_pretrained\n"
    done = subprocess.run(
        [sys.executable, "-c", start + 'model = load("tinystories-1l")\n' + asked],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_the_other_examples_run():
    pictures = next(block for block in blocks("python") if "mnist-1l" in block)
    done = subprocess.run(
        [sys.executable, "-c", pictures], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_the_classifier_is_as_its_card_says():
    card = (built_in("mnist-1l") / "README.md").read_text()
    (row,) = re.findall(r"^`mnist-1l` is .*?\.$", README, re.MULTILINE | re.DOTALL)
    parameters, accuracy = (
        re.search(r"([\d,]+)\s+parameters", card),
        re.search(r"test split: (0\.\d+)", card),
    )
    assert parameters and accuracy and parameters[1] in row and accuracy[1] in row
    model = bl.HookedBilinearClassifier.from_pretrained("mnist-1l")
    assert sum(weight.numel() for weight in model.parameters()) == int(
        parameters[1].replace(",", "")
    )


def test_names_and_files_exist():
    for name in set(re.findall(r"`bl\.(\w+)", README)):
        assert name in bl.__all__
    assert {name for name in bl.__all__ if name != "InteractionTable"} <= set(
        re.findall(r"`bl\.(\w+)", README)
    )
    for file in re.findall(r"^ +(\w+\.py|\w+/) ", blocks("text")[-1], flags=re.MULTILINE):
        assert list((ROOT / "bilinear_lens").rglob(file.rstrip("/")))
    for link in re.findall(r"\]\((notebooks/[^)]+)\)", README):
        assert (ROOT / link).exists()


def test_the_models_losses_are_those_of_their_cards():
    for name in ("tinystories-1l", "tinystories-4l"):
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}`"))
        card = (built_in(name) / "README.md").read_text()
        ours, twin = re.findall(r"^\| .* \| (\d\.\d{4}) \| (\d\.\d{4}) \|$", card, re.MULTILINE)
        assert [*ours, *twin] == re.findall(r"\d\.\d{4}", row)
        (parameters,) = re.findall(r"([\d,]+) parameters", card)
        assert parameters in row


def test_the_converted_models_figures_are_those_of_its_card():
    card = (built_in("stories260k-bilinear") / "README.md").read_text()
    rows = dict(re.findall(r"^\| (?:the )?([^|]*) \| (\d\.\d{4}) ", card, re.MULTILINE))
    original, converted = rows["original"], rows["this model"]
    assert f"{original} and {converted} nats per token" in README
    shown = [original, rows["original, without its activation"], converted]
    shown.append(rows["original, trained on"])
    assert "| " + " | ".join(f"{float(loss):.3f}" for loss in shown) + " |" in README
    cost = float(converted) - float(rows["original, trained on"])
    assert f"{cost:.3f}".lstrip("0") + " behind" in README
