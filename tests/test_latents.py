"""Latents on text: how eigenvectors predict them, where they are active, what is lost without."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from models import CONFIGS, random_model, reading_model
from test_features import LAYER, N_IN, N_OUT, D, before, behind

import bilinear_lens as bl
from bilinear_lens.analysis import latent_prediction as predictions
from bilinear_lens.analysis.ablation import text_windows


@pytest.fixture(scope="module")
def model():
    return reading_model()


TEXT = bl.held_out_stories()[:12]


def activations(model, hook: str, window: int = 32) -> torch.Tensor:
    """Of all windows at once: what streams are compared with."""
    windows = text_windows(model, TEXT, n_tokens=window)
    _, cache = model.run_with_cache(windows, names_filter=hook)
    return cache[hook]


def curve(model, outputs, **options):
    given = {"least_active": 5, "n_bootstrap": 20, "window": 32, **options}
    return bl.latent_prediction(model, outputs, TEXT, **given)


def test_all_eigenvectors_predict_exactly_and_few_of_another_latent_do_not(model):
    """Biases of the MLP and the SAE included: the law, and its negative controls."""
    outputs = behind(k=2)
    table: Any = curve(model, outputs, ks=[1, 4, D + 1]).set_index(["tokens", "predictor", "k"])
    for tokens in ("active", "tail"):
        for predictor in ("eigenvectors", "random"):
            row = table.loc[(tokens, predictor, D + 1)]
            assert row["correlation"] == pytest.approx(1, abs=1e-4)
            assert row["r2"] == pytest.approx(1, abs=1e-3)
            assert row["correlation_low"] == pytest.approx(1, abs=1e-4)
        assert table.loc[(tokens, "shuffled", D + 1), "correlation"] < 0.8
    # where the latent is not active, the preactivation is no prediction of its activation
    assert table.loc[("all", "eigenvectors", D + 1), "correlation"] < 0.95
    few = [table.loc[("active", each, 4), "correlation"] for each in ("eigenvectors", "random")]
    assert few[0] > few[1] + 0.1
    assert (table["correlation_low"] <= table["correlation"] + 1e-9).all()


def test_a_prediction_is_that_of_the_top_eigenvectors(model):
    """For one latent, by NumPy from the whole spectrum and all activations."""
    outputs, latent = behind(k=3), 2
    table = curve(model, outputs, latents=[latent], ks=[1, 3]).set_index(
        ["tokens", "predictor", "k"]
    )
    x = activations(model, f"blocks.{LAYER}.mlp.hook_in").flatten(0, 1)
    acts = outputs.encode(activations(model, outputs.hook_out)).flatten(0, 1)[:, latent].numpy()
    q = model.bilinear_tensor(LAYER).interaction(outputs.encoder[latent])
    values, vectors = np.linalg.eigh(q.double().numpy())
    order = np.argsort(-np.abs(values))
    seen = np.concatenate([x.double().numpy(), np.ones((len(x), 1))], axis=1)
    constant = (outputs.encoder_bias - outputs.encoder @ outputs.decoder_bias)[latent].item()
    active = acts != 0
    tail = active & (acts >= np.quantile(acts[active], 0.9))
    for k in (1, 3):
        top = order[:k]
        predicted = ((seen @ vectors[:, top]) ** 2 * values[top]).sum(1) + constant
        for tokens, at in (("active", active), ("all", acts > -np.inf), ("tail", tail)):
            row = table.loc[(tokens, "eigenvectors", k)]
            expected = np.corrcoef(predicted[at], acts[at])[0, 1]
            assert row["correlation"] == pytest.approx(expected, abs=1e-3)
            error = ((predicted - acts)[at] ** 2).sum()
            r2 = 1 - error / ((acts[at] - acts[at].mean()) ** 2).sum()
            assert row["r2"] == pytest.approx(r2, rel=1e-2, abs=1e-2)


def test_intervals_cover_latents_and_text(model):
    """They hold the mean, and are about as wide as the spread of the latents makes them."""
    outputs = behind(k=3)
    wide = curve(model, outputs, ks=[2], n_bootstrap=400)
    row = wide.query("tokens == 'active' and predictor == 'eigenvectors'").iloc[0]
    single = [
        curve(model, outputs, latents=[i], ks=[2])
        .query("tokens == 'active' and predictor == 'eigenvectors'")["correlation"]
        .item()
        for i in range(N_OUT)
    ]
    assert row["correlation"] == pytest.approx(np.mean(single), abs=1e-6)
    half = 1.96 * np.std(single) / N_OUT**0.5  # of the latents drawn, windows apart
    assert half * 0.7 < row["correlation_high"] - row["correlation"] < 3 * half + 0.05
    assert row["correlation_low"] < row["correlation"] < row["correlation_high"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ks": [0, 2]}, r"ks=.* between 1 and the 25 eigenvectors"),
        ({"ks": [26]}, "ks="),
        ({"latents": [N_OUT]}, "between 0 and 6"),
        ({"latents": [1], "least_active": 10**6}, "fewer than 1000000"),
        ({"least_active": 10**6}, "No latent of blocks.1.mlp.hook_out is active"),
        ({"n_bootstrap": 0}, "n_bootstrap=0"),
    ],
)
def test_what_cannot_be_predicted_is_refused(model, options, match):
    with pytest.raises(ValueError, match=match):
        curve(model, behind(), **options)


def test_text_that_is_too_short_and_other_places_are_refused(model):
    with pytest.raises(ValueError, match="fewer than one window"):
        bl.latent_prediction(model, behind(), ["Hi"])
    with pytest.raises(ValueError, match="what an MLP writes"):
        bl.latent_prediction(model, before(), TEXT)
    with pytest.raises(ValueError, match="fewer than one window"):
        bl.latent_examples(model, before(), ["Hi"])


@pytest.mark.parametrize("around", [0, 3, 40])
def test_examples_are_the_largest_of_all_text(model, around):
    sae, n, window = before(k=2), 3, 32
    found = bl.latent_examples(
        model, sae, TEXT, n=n, around=around, window=window, batch=3 * window
    )
    acts = sae.encode(activations(model, sae.hook_in))
    windows = text_windows(model, TEXT, n_tokens=window)
    peaks = acts.amax(1)  # [windows, latents]
    torch.testing.assert_close(found.values, peaks.topk(n, dim=0).values.mT.clamp(min=0))
    assert torch.equal(found.active, (acts != 0).sum((0, 1)))
    compared = 0
    for latent in (found.active > 0).nonzero().flatten().tolist()[:8]:
        assert found.density(latent) == found.active[latent] / windows.numel()
        of = acts[..., latent][acts[..., latent] != 0]
        assert found.mean(latent) == pytest.approx(of.mean().item(), rel=1e-4)
        where = peaks[:, latent].topk(n).indices.tolist()
        for place, example in zip(where, found.of(latent), strict=False):
            if (peaks[:, latent] == peaks[place, latent]).sum() > 1:
                continue  # any of those that tie may stand here
            compared += 1
            peak = int(acts[place, :, latent].argmax())
            shown = slice(max(0, peak - around), peak + around + 1)
            assert example.tokens == [model.token_labels[i] for i in windows[place, shown]]
            assert example.activations == pytest.approx(acts[place, shown, latent].tolist())
            assert example.tokens[example.peak] == model.token_labels[windows[place, peak]]
        shown = found.shown([latent])
        assert shown["tokens"] == [[each.tokens for each in found.of(latent)]]
        first = found.of(latent)[0]
        assert first.tokens[first.peak] in found.words(latent, n)
    assert compared > 12


def test_examples_that_tie_are_whole(model):
    """Text that repeats, so that later batches have the very activations of earlier ones."""
    found = bl.latent_examples(
        model, before(k=2), [TEXT[0]] * 9, n=4, around=3, window=32, batch=64
    )
    for latent in (found.active > 0).nonzero().flatten().tolist():
        for example in found.of(latent):
            assert example.activations[example.peak] == max(example.activations) > 0


def test_examples_of_some_latents_are_those_of_all(model):
    sae = before()
    some = bl.latent_examples(model, sae, TEXT, latents=[7, 2], n=4, window=32)
    every = bl.latent_examples(model, sae, TEXT, n=4, window=32)
    for latent in (7, 2):
        assert some.of(latent) == every.of(latent)
    with pytest.raises(ValueError, match="No examples were collected of latent 3"):
        some.of(3)


def test_raw_top_k_may_be_most_active_below_zero(model):
    sae = before(activation="signed_topk", encoder_bias=torch.full((N_IN,), -1e3), k=N_IN)
    found = bl.latent_examples(model, sae, TEXT, n=2, window=32)
    first = found.of(3)[0]
    assert first.activations[first.peak] == min(first.activations) < 0


def test_a_norm_behind_the_mlp_is_refused_and_a_transcoder_read_where_it_reads(model):
    gemma = bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS["gemma2-tied"]))
    normed = behind(f"blocks.{LAYER}.hook_mlp_out")
    found = bl.feature_interactions(gemma, 2, inputs=before(), outputs=normed)
    with pytest.raises(ValueError, match="norms what its MLPs write"):
        bl.latent_effects(gemma, found, TEXT)
    with pytest.raises(ValueError, match="norms what its MLPs write"):
        bl.latent_prediction(gemma, normed, TEXT)
    transcoder = behind(hook_in=f"blocks.{LAYER}.mlp.hook_in", centred=False, k=2)
    found = bl.feature_interactions(
        model, 2, inputs=before(), outputs=transcoder, side="decoder", n_latents=3
    )
    acts = transcoder.encode(activations(model, transcoder.hook_in))[..., 2]
    inside = before().encode(activations(model, transcoder.hook_in))
    often = int((inside[acts != 0] != 0).sum(0).argmax())
    rows: Any = bl.latent_effects(model, found, TEXT, {"x": [often]}, window=32, n_bootstrap=5)
    assert rows["n_tokens"][0] == ((acts != 0) & (inside[..., often] != 0)).sum() > 0


def test_a_dead_latent_is_said_to_be_dead(model):
    bias = before().encoder_bias.clone()
    bias[5] = -1e6
    found = bl.latent_examples(model, before(encoder_bias=bias), TEXT, window=32)
    assert found.density(5) == found.mean(5) == 0 and found.words(5, 3) == []
    with pytest.raises(ValueError, match=r"Latent 5 of blocks\.1.mlp.hook_in is dead"):
        found.of(5)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"latents": [N_IN]}, "between 0 and 52"), ({"n": 0}, "n=0"), ({"around": -1}, "around=-1")],
)
def test_examples_that_cannot_be_collected_are_refused(model, options, match):
    with pytest.raises(ValueError, match=match):
        bl.latent_examples(model, before(), TEXT, **options)


def test_activations_that_are_not_finite_are_refused(model):
    broken = bl.HookedBilinearTransformer.from_pretrained("stories260k-bilinear")
    with torch.no_grad():
        broken.blocks[0].mlp.out.weight[0, 0] = torch.nan
    sae = replace(
        before(),
        encoder=torch.randn(9, 64),
        decoder=torch.randn(9, 64),
        encoder_bias=torch.zeros(9),
        decoder_bias=torch.zeros(64),
    )
    with pytest.raises(ValueError, match=r"hook_in .*holds NaN"):
        bl.latent_examples(broken, sae, TEXT)


@pytest.mark.parametrize("at", ["mlp.hook_in", "hook_resid_mid"])
def test_effects_are_those_of_the_running_model(model, at):
    """Each latent ablated by hooks, its MLP's output and the SAE behind it read from the cache."""
    inputs, outputs, latent, window = before(f"blocks.{LAYER}.{at}", k=6), behind(k=3), 2, 32
    found = bl.feature_interactions(model, latent, inputs=inputs, outputs=outputs, n_latents=3)
    windows = text_windows(model, TEXT, n_tokens=window)
    names = [inputs.hook_in, outputs.hook_out]
    _, clean = model.run_with_cache(windows, names_filter=names)
    acts = inputs.encode(clean[inputs.hook_in])
    there = outputs.encode(clean[outputs.hook_out])[..., latent] != 0
    along = clean[outputs.hook_out] @ outputs.encoder[latent]
    often = (acts[there] != 0).sum(0).topk(2).indices.tolist()
    groups = {"one": often[:1], "two": often}
    table = bl.latent_effects(model, found, TEXT, groups, window=window, n_bootstrap=50)
    for name, group in groups.items():
        with model.hooks(fwd_hooks=bl.ablate_latents(inputs, group)):
            _, cache = model.run_with_cache(windows, names_filter=names)
        mask = there & (acts[..., group] != 0).any(-1)
        row = table.query(f"group == '{name}' and ablated == 'group'").iloc[0]
        change = (cache[outputs.hook_out] @ outputs.encoder[latent] - along)[mask]
        assert row["n_tokens"] == mask.sum() > 3
        assert row["output"] == pytest.approx(along[mask].mean().item(), rel=1e-3, abs=1e-3)
        assert row["change"] == pytest.approx(change.mean().item(), rel=1e-3, abs=1e-3)
        still = outputs.encode(cache[outputs.hook_out])[..., latent][mask] != 0
        assert row["still_active"] == pytest.approx(still.float().mean().item(), abs=0.02)
        assert row["change_low"] < row["change"] < row["change_high"]


def test_predicted_changes_are_exact_where_the_sae_reconstructs(model):
    """An SAE that loses nothing: latents are the coordinates, of both signs."""
    eye = torch.eye(D)
    inputs = replace(
        before(),
        encoder=torch.cat([eye, -eye]),
        decoder=torch.cat([eye, -eye]),
        encoder_bias=torch.zeros(2 * D),
        decoder_bias=torch.zeros(D),
        activation="relu",
        k=None,
    )
    found = bl.feature_interactions(model, 2, inputs=inputs, outputs=behind(), n_latents=2)
    table: Any = bl.latent_effects(model, found, TEXT, window=32, n_bootstrap=5)
    for row in table.to_dict("records"):
        assert row["change"] == pytest.approx(row["predicted"], rel=1e-3, abs=1e-4)
        assert row["correlation"] == pytest.approx(1, abs=1e-4)
    lossy = bl.feature_interactions(model, 2, inputs=before(), outputs=behind(), n_latents=2)
    rows: Any = bl.latent_effects(model, lossy, TEXT, window=32, n_bootstrap=5)
    assert len(rows["correlation"].dropna()) > 2 and rows["correlation"].max() < 0.999


def test_the_control_takes_out_as_many_others():
    from bilinear_lens.analysis.latent_ablation import _as_many_others

    torch.manual_seed(0)
    acts = torch.rand(50, 12) * (torch.rand(50, 12) < 0.6)
    inside = (acts != 0) & torch.isin(torch.arange(12), torch.tensor([1, 2, 3]))
    out = _as_many_others(acts, inside, torch.Generator().manual_seed(1))
    assert not (out & inside).any() and not (out & (acts == 0)).any()
    others = ((acts != 0) & ~inside).sum(1)
    assert torch.equal(out.sum(1), torch.minimum(inside.sum(1), others))
    assert out.any(0).sum() > 6  # drawn, not always the same


def test_ablating_latents_leaves_all_else(model):
    inputs, windows = before(), text_windows(model, TEXT[:2], n_tokens=32)
    _, clean = model.run_with_cache(windows)
    every = inputs.encode(clean[inputs.hook_in])
    chosen = (every != 0).sum((0, 1)).topk(2).indices.tolist()
    with model.hooks(fwd_hooks=bl.ablate_latents(inputs, chosen)):
        _, cache = model.run_with_cache(windows)
    acts = every[..., chosen]
    expected = clean[inputs.hook_in] - acts @ inputs.decoder[chosen]
    torch.testing.assert_close(cache[f"blocks.{LAYER}.mlp.gate.hook_in"], expected)
    assert acts.any()
    with pytest.raises(ValueError, match="between 0 and 52"):
        bl.ablate_latents(inputs, [99])
    with pytest.raises(ValueError, match="transcoder"):
        bl.ablate_latents(before(hook_out="blocks.1.hook_mlp_out", centred=False), [1])


def test_a_bootstrap_of_windows_is_weighted_by_their_tokens():
    """Correlation and R^2 from sums, against NumPy on the tokens of resampled windows."""
    torch.manual_seed(0)
    predicted, actual = torch.randn(40, 2), torch.randn(40)
    mask = torch.rand(40) < 0.7
    weights = torch.tensor([[1, 1, 1, 1], [0, 3, 1, 0]]).double()
    sums = predictions._sums(predicted, actual, mask, 10)
    scores = predictions._scores(weights, sums)
    for row, each in enumerate(weights.long().tolist()):
        chosen = [i for w, n in enumerate(each) for i in [*range(10 * w, 10 * w + 10)] * n]
        chosen = [i for i in chosen if mask[i]]
        for k in range(2):
            p, a = predicted[chosen, k].numpy(), actual[chosen].numpy()
            assert scores[row, k, 0].item() == pytest.approx(np.corrcoef(p, a)[0, 1], abs=1e-6)
            r2 = 1 - ((p - a) ** 2).sum() / ((a - a.mean()) ** 2).sum()
            assert scores[row, k, 1].item() == pytest.approx(r2, abs=1e-5)
