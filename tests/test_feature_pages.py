"""Latents on pages and in the terminal: what they say is what was found, and links lead there."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pandas as pd
import pytest
from models import reading_model
from test_browser import browser, faults, requests, show  # noqa: F401 - a fixture is used by name
from test_features import N_OUT, before, behind

import bilinear_lens as bl
from bilinear_lens.analysis.feature_summary import feature_summary
from bilinear_lens.analysis.latent_prediction import latent_prediction
from bilinear_lens.cli import features as commands
from bilinear_lens.pages.features import feature_browser
from bilinear_lens.views import features as views
from bilinear_lens.views import tokens

TEXT = bl.held_out_stories()[:8]
EVIL = "</script><script>window.hacked=1</script><img/src=x/onerror=window.hacked=1>"
SAES = "tinystories-4l tinystories-4l-saes"


@pytest.fixture(scope="module")
def model():
    return reading_model()


@pytest.fixture(scope="module")
def pages(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages") / "new"
    model.token_labels[model.token_labels.index("e")] = EVIL  # a token may be anything
    bias = behind().encoder_bias.clone()
    bias[6] = -1e6  # never active
    feature_browser(
        model,
        before(),
        behind(encoder_bias=bias),
        TEXT,
        folder,
        latents=[2, 4, 6],
        k=3,
        source=EVIL,
    )
    del model.token_labels  # as it is read from the tokenizer
    return folder


class Links(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "a":
            self.found += [value or "" for name, value in attrs if name == "href"]


def test_pages_say_what_was_found_and_every_link_leads_somewhere(model, pages):
    for latent in (2, 4):
        html = (pages / "out" / f"{latent}.html").read_text()
        found = bl.feature_interactions(model, latent, inputs=before(), outputs=behind(), k=3)
        cross: Any = found.pairs[found.pairs["kind"] == "cross"]
        for row in cross.itertuples():
            assert f"../in/{row.a}.html" in html and f"../in/{row.b}.html" in html
            assert f"{row.interaction:+.3g}".replace("-", "&minus;") in html
            back = (pages / "in" / f"{row.a}.html").read_text()
            assert f"../out/{latent}.html" in back
    for file in pages.rglob("*.html"):
        for link in Links(file.read_text()).found:
            assert link.startswith("#") or (file.parent / link).is_file(), (file, link)
    assert "dead" in (pages / "out" / "6.html").read_text()


def test_a_folder_of_pages_is_whole_or_absent(model, tmp_path):
    with pytest.raises(ValueError, match="fewer than one window"):
        feature_browser(model, before(), behind(), ["Hi"], tmp_path / "new", source="x")
    with pytest.raises(ValueError, match="exists already"):
        feature_browser(model, before(), behind(), TEXT, tmp_path, source="x")
    with pytest.raises(ValueError, match=r"Latents \[7\]"):
        feature_browser(
            model, before(), behind(), TEXT, tmp_path / "new", latents=[N_OUT], source="x"
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_index_is_searched_and_leads_to_pages(browser, pages, theme):  # noqa: F811
    from selenium.webdriver.common.by import By

    show(browser, pages / "index.html", theme=theme)
    rows = browser.find_elements(By.CSS_SELECTOR, "#found tr")
    entries = len(list(pages.glob("*/*.html")))
    assert len(rows) == entries and f"{entries} of {entries}" in browser.page_source
    field = browser.find_element(By.ID, "search")
    field.send_keys("output latent 4")
    rows = browser.find_elements(By.CSS_SELECTOR, "#found tr")
    assert [row.find_element(By.TAG_NAME, "a").text for row in rows] == ["output latent 4"]
    rows[0].find_element(By.TAG_NAME, "a").click()
    assert browser.find_element(By.TAG_NAME, "h1").text == "Output latent 4"
    peaks = browser.find_elements(By.CSS_SELECTOR, ".latent-text .peak")
    assert peaks and all(peak.is_displayed() for peak in peaks)
    link = browser.find_element(By.CSS_SELECTOR, ".latent-links a")
    name = link.text
    link.click()
    assert browser.find_element(By.TAG_NAME, "h1").text.lower() == name
    for page in ("index.html", "out/2.html", "out/6.html"):
        show(browser, pages / page, theme=theme)
        assert not browser.execute_script("return window.hacked")
        assert faults(browser) == [] == requests(browser)
        assert not browser.execute_script(
            "return document.documentElement.scrollWidth > document.documentElement.clientWidth"
        )


def test_examples_are_drawn_by_circuitsvis(browser, tmp_path):  # noqa: F811
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    view = tokens.examples(
        [[[" a", EVIL, " girl"], [" boy"]], [[" dog"]]],
        [[[0.0, 2.5, 0.5], [1.0]], [[3.0]]],
        labels=["latent 3", "latent 8"],
        name="blocks.2.mlp.hook_in",
    )
    view.save(tmp_path / "view.html")
    show(browser, tmp_path / "view.html")
    WebDriverWait(browser, 10).until(lambda b: "girl" in b.find_element(By.TAG_NAME, "main").text)
    text = browser.find_element(By.TAG_NAME, "main").text
    assert "boy" in text and "latent 3" in text and "blocks.2.mlp.hook_in" in text
    assert not browser.execute_script("return window.hacked")
    assert requests(browser) == []


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (([], [], []), "0 labels"),
        (([[[" a"]]], [[[1.0, 2.0]]], ["x"]), "an activation for each token"),
        (([[[" a"]]], [[[1.0]]], ["x", "y"]), "2 labels"),
        (([[]], [[]], ["x"]), "at least one piece"),
        (([[[" a"]]], [[[float("nan")]]], ["x"]), "NaN"),
    ],
)
def test_examples_that_cannot_be_drawn_are_refused(given, match):
    pieces, activations, labels = given
    with pytest.raises(ValueError, match=match):
        tokens.examples(pieces, activations, labels=labels, name="x")


def test_pieces_shade_by_activation_and_escape():
    html = views.pieces([views.Piece(["<b>", " y"], [0.5, 1.0], 1), views.Piece(["z"], [0.25], 0)])
    assert "&lt;b&gt;" in html and "<b>1.00</b>" in html and "<b>0.25</b>" in html
    shades = [float(each) for each in re.findall(r"rgba\(59, 125, 216, ([\d.]+)\)", html)]
    assert shades == [0.3, 0.6, 0.15]
    assert "rgba(217" in views.pieces([views.Piece(["x"], [-1.0], 0)])


# commands


def test_features_are_listed_and_shown(run, tmp_path, monkeypatch):
    seen = {}

    def few(*args, **kwargs):
        seen["table"] = feature_summary(*args, **kwargs, latents=[156, 3, 7])
        return seen["table"]

    monkeypatch.setattr(commands.bl, "feature_summary", few)
    code, out, err = run(f"features list {SAES} --layer 2 --limit 2 --out all.csv")
    assert code == 0, err
    lines = out.strip().splitlines()
    assert "kurtosis" in lines[0] and lines[1].split()[0] == "156" and len(lines) == 4
    written = pd.read_csv(tmp_path / "all.csv")
    assert written["latent"].tolist()[0] == 156 and len(written) == 3
    assert written["kurtosis"].is_monotonic_decreasing

    (tmp_path / "text.txt").write_text("<|endoftext|>".join(bl.held_out_stories()[:30]))
    code, out, err = run(f"features show {SAES} 156 --layer 2 --k 2 --text text.txt")
    assert code == 0, err
    assert (
        "latent 156 of blocks.2.mlp.hook_out" in out and "␣boy␣named" in out and "constant" in out
    )

    code, out, err = run(
        f"features browse {SAES} --layer 2 --latent 156 --out pages --text text.txt"
    )
    assert code == 0, err
    assert (tmp_path / "pages" / "out" / "156.html").is_file() and "index.html" in out


def test_predictions_are_printed(run, monkeypatch):
    def few(model, outputs, documents):
        return latent_prediction(
            model, outputs, documents[:12], latents=[156], ks=[1, 8], n_bootstrap=5, least_active=5
        )

    monkeypatch.setattr(commands.bl, "latent_prediction", few)
    code, out, err = run(f"features predict {SAES} --layer 2")
    assert code == 0, err
    assert "1 latents of blocks.2.mlp.hook_out" in out and out.count("eigenvectors") == 6
    assert re.search(r"active +eigenvectors +8 +0\.\d{3} \(0\.\d{3} to [01]\.\d{3}\)", out)


def test_training_commands_make_folders(run, tmp_path):
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(bl.held_out_stories()[:12]))
    text = "--text text.txt --held-out text.txt --window 32 --batch-size 4"
    code, out, err = run(
        f"train sae stories260k --hook blocks.1.mlp.hook_in {text} --expansion 2 --k 3"
    )
    assert code == 0, err
    assert "blocks.1.mlp.hook_in: normalised MSE" in out and "L0 3.0" in out
    folder = tmp_path / "my-stories260k-saes"
    assert bl.SparseAutoencoder.from_pretrained(folder, "blocks.1.mlp.hook_in").n_latents == 128
    card = (folder / "README.md").read_text()
    assert "bilinear-lens train sae stories260k --hook blocks.1.mlp.hook_in" in card
    code, out, err = run(
        f"train transcoder stories260k --layer 1 {text} --rank 9 --no-skip --out tc"
    )
    assert code == 0, err
    made = bl.BilinearTranscoder.from_pretrained(tmp_path / "tc", "blocks.1.mlp")
    assert made.left.shape == (9, 64) and made.skip is None
    assert json.loads((tmp_path / "tc" / "metrics.json").read_text()).keys() == {"blocks.1.mlp"}


def test_errors_of_features_are_one_line(run, tmp_path):
    before_run = list(tmp_path.iterdir())
    cases = {
        f"features show {SAES} 768 --layer 2": "must be numbers between 0 and 767",
        f"features show {SAES} 3 --layer 1": "no folder 'blocks.1.mlp.hook_in'; it has",
        f"features list {SAES} --layer 2 --by size": "--by size must be one of",
        f"features list {SAES} --layer 2 --memory 0.001": "is too little",
        "features show tinystories-1l tinystories-4l-saes 3 --layer 2": "no hook point",
        "features show tinystories-4l nowhere 3 --layer 2": "tinystories-4l-saes",
        f"features predict {SAES} --layer 3 --outputs blocks.2.mlp.hook_out": "another one",
        "train sae stories260k --hook x --text no.txt": "There is no file no.txt",
        "train transcoder stories260k --layer 9 --text no.txt": "There is no file no.txt",
    }
    for line, expected in cases.items():
        code, _, err = run(line)
        assert (code, err.startswith("error: "), err.count("\n")) == (2, True, 1), err
        assert expected in err
    assert list(tmp_path.iterdir()) == before_run
    (tmp_path / "tinystories-4l-saes").mkdir()  # which of the two is meant?
    assert "is a folder here, too" in run(f"features show {SAES} 3 --layer 2")[2]


def test_the_saes_that_ship_are_as_their_card_says():
    model = bl.HookedBilinearTransformer.from_pretrained("tinystories-4l")
    from bilinear_lens.models.checkpoints import built_in

    card = (built_in("tinystories-4l-saes") / "README.md").read_text()
    for hook in ("blocks.2.mlp.hook_in", "blocks.2.mlp.hook_out"):
        sae = bl.SparseAutoencoder.from_pretrained("tinystories-4l-saes", hook)
        sae.check_model(model)
        with pytest.raises(ValueError, match="another model"):
            replace(sae, model_digest="x").check_model(model)
        figures = re.search(rf"`{hook}` \| (0\.\d+) \| (0\.\d+)", card)
        assert figures is not None
        found = bl.evaluate_reconstruction(model, sae, bl.held_out_stories()[:20])
        assert found.nmse == pytest.approx(float(figures[1]), rel=0.1)  # on a part of that text
        assert found.variance_explained == pytest.approx(float(figures[2]), rel=0.05)
