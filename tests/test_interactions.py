"""Interaction tables against brute force over the vocabulary."""

import html.parser

import pytest
import torch
from models import CONFIGS, random_model

import bilinear_lens as bl
from bilinear_lens.analysis.interactions import random_spectrum


@pytest.fixture(scope="module", params=["llama", "llama-biases"])
def tiny(request) -> bl.HookedBilinearTransformer:
    return bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS[request.param]))


def test_a_table_lists_the_tokens_furthest_along_each_eigenvector(tiny):
    table = bl.interactions(tiny, 5, layer=1, k=3, n_tokens=4)
    frame = table.to_pandas()
    assert len(frame) == 3 * 2 * 4
    tokens = tiny.token_basis().directions
    spectrum = tiny.bilinear_tensor(1).eigh(tiny.output_direction(5))
    for i in range(3):
        projections = spectrum.projections(tokens)[:, i]
        rows = frame[frame.eigenvector == i]
        value = spectrum.values[i].item()
        assert rows.value.iloc[0] == pytest.approx(value, rel=1e-4)
        share = value * abs(value) / spectrum.values.square().sum().item()
        assert rows.share.iloc[0] == pytest.approx(share, rel=1e-4)
        listed = rows.projection.tolist()
        expected = projections.sort(descending=True).values
        if abs(expected[-1]) > expected[0]:  # the table turns the largest projection positive
            expected = -expected.flip(0)
        assert listed[:4] == pytest.approx(expected[:4].tolist(), rel=1e-3, abs=1e-4)
        assert listed[4:] == pytest.approx(expected.flip(0)[:4].tolist(), rel=1e-3, abs=1e-4)
        ours = rows.contribution.to_numpy()
        assert ours == pytest.approx(value * rows.projection.to_numpy() ** 2, rel=1e-4)
        assert (rows.end == ["+"] * 4 + ["-"] * 4).all()
    assert table.top_share == pytest.approx(
        (spectrum.values[:3].square().sum() / spectrum.values.square().sum()).item(), rel=1e-4
    )


@pytest.mark.parametrize("k", [1, 7, 37 * 38 // 2])
def test_pairs_are_those_of_all_products(tiny, k, monkeypatch):
    table = bl.interactions(tiny, 5, layer=1, k=2, n_tokens=2)
    tokens = table.tokens.directions
    products = tokens @ table.interaction[:24, :24] @ tokens.mT
    rows, columns = torch.triu_indices(37, 37)
    expected = products[rows, columns]
    expected = expected[expected.abs().argsort(descending=True)][:k]
    pairs = table.pairs(k)
    torch.testing.assert_close(
        torch.tensor(pairs.interaction.tolist()), expected, atol=1e-5, rtol=1e-4
    )
    for row in pairs.head(20).to_dict("records"):
        value = products[int(row["token_a"][1:]), int(row["token_b"][1:])].item()
        assert row["interaction"] == pytest.approx(value, rel=1e-3, abs=1e-5)
    assert not pairs.duplicated(["token_a", "token_b"]).any()


def test_pairs_of_a_large_vocabulary_come_in_blocks(model):
    """4096 tokens are more than one block; the oracle takes them all at once."""
    table = bl.interactions(model, " girl", layer=0)
    tokens = table.tokens.directions
    largest = (tokens @ table.interaction @ tokens.mT).abs().triu().flatten().topk(50).values
    pairs = table.pairs(50)
    torch.testing.assert_close(
        torch.tensor(pairs.interaction.abs().tolist()), largest, atol=1e-6, rtol=1e-4
    )


def test_pairs_of_tokens_without_an_embedding_stand_once():
    plain = random_model(CONFIGS["llama"])
    with torch.no_grad():
        plain.model.embed_tokens.weight[[3, 11]] = 0
    table = bl.interactions(
        bl.HookedBilinearTransformer.from_hf(plain), 5, layer=1, k=2, n_tokens=2
    )
    pairs = table.pairs(37 * 38 // 2)
    assert len(pairs) == 37 * 38 // 2
    assert not pairs.duplicated(["token_a", "token_b"]).any()


def test_a_layer_that_writes_nothing_is_named():
    plain = random_model(CONFIGS["llama"])
    with torch.no_grad():
        plain.model.layers[1].mlp.down_proj.weight.zero_()
    with pytest.raises(ValueError, match="Layer 1 writes nothing"):
        bl.interactions(bl.HookedBilinearTransformer.from_hf(plain), 5, layer=1)


def test_a_contrast_is_a_pair_however_it_is_given(model):
    pair = bl.interactions(model, (" she", " he"), layer=0)
    contrast = bl.interactions(model, " she", layer=0, contrast=" he")
    assert pair.output == contrast.output == "' she' - ' he'"
    torch.testing.assert_close(pair.spectrum.values, contrast.spectrum.values)
    swapped = bl.interactions(model, (" he", " she"), layer=0)
    torch.testing.assert_close(swapped.interaction, -pair.interaction)
    assert bl.interactions(model, " she", layer=0).output == "' she' - mean"
    assert bl.interactions(model, " she", layer=0, contrast=None).output == "' she'"
    vector = bl.interactions(model, pair.direction, layer=0)
    torch.testing.assert_close(vector.spectrum.values, pair.spectrum.values)


def test_a_trained_table_says_more_than_a_random_one(model):
    """ " named" listens for what has a name; in a random model nothing is that concentrated."""
    table = bl.interactions(model, " named", layer=0)
    first = table.to_pandas().query("eigenvector == 0 and end == '+'").token.tolist()
    assert {" girl", " boy"} & set(first)
    assert table.effective_rank < 0.9 * table.random_effective_rank
    assert table.top_share > 1.5 * table.random_top_share
    tensor = model.bilinear_tensor(0)
    ranks = [random_spectrum(tensor, seed=seed).effective_rank().item() for seed in range(4)]
    assert max(ranks) - min(ranks) < 0.05 * ranks[0]  # the control itself is stable
    assert random_spectrum(tensor, seed=1).effective_rank().item() == ranks[1]


class Text(html.parser.HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


def test_the_table_prints_and_its_html_is_escaped():
    evil = "<script>alert(1)</script>&amp;"
    model = bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS["llama"]), name=evil)
    model.__dict__["token_labels"] = [f"{evil}{i}" for i in range(37)]
    table = bl.interactions(model, 5, layer=1, k=2, n_tokens=3)
    page = Text(table._repr_html_())
    assert "script" not in page.tags and page.tags.count("tr") == 3
    assert evil in page.text and f"{evil}5" in page.text
    assert "color" not in table._repr_html_()  # the notebook's own, light or dark
    assert "effective rank" in repr(table) and "random" in repr(table)
    assert len(repr(table).splitlines()) == 4


def test_bad_input_is_named(model, as_users):
    cases = {
        "n_tokens=0": {"n_tokens": 0},
        "n_tokens=4097": {"n_tokens": 4097},
        "k=0": {"k": 0},
        "k=-1": {"k": -1},
        "k=257": {"k": 257},
        "layer=1": {"layer": 1},
        "is not one token": {"contrast": " girlfriends"},
    }
    for expected, change in cases.items():
        with pytest.raises(ValueError, match=expected):
            bl.interactions(model, " girl", **({"layer": 0} | change))
    table = bl.interactions(model, " girl", layer=0)
    for k in (0, -1, 4096 * 4097 // 2 + 1):
        with pytest.raises(ValueError, match=f"k={k}"):
            table.pairs(k)
