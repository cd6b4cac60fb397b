"""What a model is, and how concentrated its layers' spectra are."""

import numpy as np
import pytest
import torch
from models import CONFIGS, GROUPED, SIZES, random_model
from transformers import GPT2Config, LlamaConfig, MambaConfig, MixtralConfig, PretrainedConfig

import bilinear_lens as bl
from bilinear_lens.analysis.overview import BILINEAR, describe, output_ranks, overview
from bilinear_lens.models.checkpoints import load_checkpoint


def hooked(name: str = "llama", **options) -> bl.HookedBilinearTransformer:
    return bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS[name]), **options)


def test_the_means_are_those_of_interaction_tables():
    model = hooked()
    rows = overview(model, n_tokens=7).to_dict("records")
    ranks = output_ranks(model, n_tokens=7).to_dict("records")
    assert [row["layer"] for row in rows] == [0, 1, 2] and len(ranks) == 21
    for rank in ranks[::4]:
        layer, token = rank["layer"], model.token_labels.index(rank["output"])
        read = bl.interactions(model, token, layer=layer, k=8)
        expected = {
            "effective_rank": read.effective_rank,
            "top_1": read.shares[0].abs().item(),
            "top_8": read.top_share,
        }
        assert {name: rank[name] for name in expected} == pytest.approx(expected, rel=1e-4)
        controls = rows[layer]["random_effective_rank"], rows[layer]["random_top_8"]
        expected = read.random_effective_rank, read.random_top_share
        assert controls == pytest.approx(expected, rel=1e-4)
    for row in rows:
        layer, dense = row["layer"], model.bilinear_tensor(row["layer"]).to_dense()
        assert row["norm"] == pytest.approx(dense.norm().item(), rel=1e-4)
        assert (row["rank"], row["outputs"]) == (28, 7)
        mean = np.mean([rank["effective_rank"] for rank in ranks if rank["layer"] == layer])
        assert row["effective_rank"] == pytest.approx(mean)


def test_the_interval_covers_the_vocabularys_mean():
    model = hooked()
    whole = overview(model, n_tokens=10**6)
    assert set(whole["outputs"]) == {SIZES["vocab_size"]}
    for bound in ("effective_rank_low", "effective_rank_high"):
        np.testing.assert_array_equal(whole[bound], whole["effective_rank"])
    covered = []
    for seed in range(40):
        sample = overview(model, n_tokens=12, seed=seed)
        mean = whole["effective_rank"]
        inside = (sample["effective_rank_low"] < mean) & (mean < sample["effective_rank_high"])
        covered += inside.tolist()
    assert 0.85 < np.mean(covered) < 1
    one, again, other = (overview(model, n_tokens=12, seed=seed) for seed in (3, 3, 4))
    assert one.equals(again) and not one.equals(other)


@pytest.mark.parametrize("name", ["llama-biases", "phi3", "gemma2-tied"])
def test_every_kind_of_bilinear_model_has_an_overview(name):
    table = overview(hooked(name), n_tokens=3)
    assert set(table["rank"]) == {28} and table.notna().all(axis=None)
    for row in table.to_dict("records"):
        assert row["top_1"] < row["top_8"] <= 1 + 1e-6


def test_random_weights_are_as_their_control_and_planted_ones_are_not():
    sizes = {"input_shape": (30,), "n_classes": 6, "d_model": 40, "d_mlp": 50}
    model = bl.HookedBilinearClassifier.from_config(**sizes)
    random = overview(model).loc[0]
    assert random["effective_rank"] == pytest.approx(random["random_effective_rank"], rel=0.1)
    with torch.no_grad():
        model.blocks[0].mlp.W_out[1:] = 0  # pyright: ignore
    planted = overview(model).loc[0]
    assert planted["effective_rank"] <= 2 + 1e-4 and planted["top_8"] == pytest.approx(1)


def test_a_classifiers_layers_are_read_by_its_classes():
    shape = {"input_shape": (5,), "n_classes": 3, "d_model": 7, "n_layers": 2}
    for residual, read in ((True, [True, True]), (False, [False, True])):
        model = bl.HookedBilinearClassifier.from_config(**shape, residual=residual)
        table = overview(model)
        assert table["effective_rank"].notna().tolist() == read
        assert set(table["outputs"]) == {3} and not np.isnan(table["norm"]).any()
        ranks = output_ranks(model).dropna()
        assert len(ranks) == 3 * sum(read)
        spectrum = model.bilinear_tensor(1, inputs="hidden").eigh(model.output_direction("2"))
        expected = spectrum.effective_rank().item()
        assert ranks["effective_rank"].iloc[-1] == pytest.approx(expected, rel=1e-4)
        assert describe(model)["MLPs"] == BILINEAR and describe(model)["classes"] == "3: 0, 1, 2"
    single = bl.HookedBilinearClassifier.from_config(input_shape=(5,), n_classes=1, d_model=7)
    assert overview(single).notna().all(axis=None)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(**SIZES, hidden_act="silu"), "gated through SiLU: not bilinear"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "bilinear-lens bilinearize"),
        (GPT2Config(n_layer=1, n_embd=24, n_head=4, vocab_size=37), "plain: not"),
        (MixtralConfig(**SIZES, **GROUPED, num_local_experts=2), "mixtures of experts: not"),
        (MambaConfig(vocab_size=37, hidden_size=16, num_hidden_layers=1), "none that"),
        *((config, BILINEAR) for config in CONFIGS.values()),
    ],
)
def test_what_the_mlps_are(config: PretrainedConfig, expected: str):
    assert expected in describe(random_model(config))["MLPs"]


def test_the_facts_are_those_of_the_config():
    model = random_model(CONFIGS["llama"]).to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    facts = describe(model)
    assert facts["heads"] == "4 of width 8, 2 of keys and values"
    assert facts["width"] == "24, MLPs 28" and facts["layers"] == "3"
    assert facts["context"] == "32 tokens" and facts["vocabulary"] == "37 tokens"
    assert facts["weights"] == "bfloat16" and facts["tokenizer"] == "none"
    total = sum(weight.numel() for weight in model.parameters())
    assert facts["parameters"] == f"{total:,}, of which {3 * 3 * 24 * 28:,} in MLPs"


def test_folded_and_foldable_norms_are_told_apart(tmp_path):
    assert describe(random_model(CONFIGS["llama"]))["norms"].startswith("foldable")
    assert "those after an MLP stay" in describe(random_model(CONFIGS["olmo2"]))["norms"]
    for name in ("llama", "gemma-tied"):
        hooked(name).save_pretrained(tmp_path / name)
        plain, _ = load_checkpoint(tmp_path / name)
        assert describe(plain)["norms"].startswith("folded")


def test_faults_are_named():
    with pytest.raises(ValueError, match="n_tokens=1 must be 2 or more"):
        overview(hooked(), n_tokens=1)
    with pytest.raises(ValueError, match="fold=True"):
        overview(hooked(fold=False))
