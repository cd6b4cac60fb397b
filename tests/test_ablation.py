"""Ablation: identities, negative controls, and nothing left behind."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from models import CONFIGS, random_model, some_tokens

import bilinear_lens as bl
from bilinear_lens.analysis.ablation import text_windows

LAYER = 1


@pytest.fixture(params=CONFIGS)
def tiny(request) -> bl.HookedBilinearTransformer:
    return bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS[request.param]))


def written(model, hooks) -> torch.Tensor:
    """What the layer writes, under hooks."""
    seen = {}

    def look(out, hook):
        seen["out"] = out

    with torch.no_grad():
        model.run_with_hooks(
            some_tokens(), fwd_hooks=[*hooks, (f"blocks.{LAYER}.mlp.hook_out", look)]
        )
    return seen["out"]


def test_ablated_and_kept_parts_are_what_they_say(tiny):
    direction = torch.randn(24, generator=torch.Generator().manual_seed(0))
    spectrum = tiny.bilinear_tensor(LAYER).eigh(direction)
    clean = written(tiny, [])
    with torch.no_grad():
        _, cache = tiny.run_with_cache(some_tokens())
    x = cache[f"blocks.{LAYER}.mlp.hook_in"]
    top = spectrum.top(3)
    explained = top.activations(x).sum(-1)
    ablated = written(tiny, bl.ablate_eigenvectors(top, direction, layer=LAYER))
    kept = written(tiny, bl.keep_eigenvectors(top, direction, layer=LAYER))
    close: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(ablated @ direction, clean @ direction - explained, **close)
    torch.testing.assert_close(kept @ direction, explained, **close)
    across = torch.linalg.qr(torch.cat([direction[:, None], torch.eye(24)[:, :23]], 1)).Q[:, 1:]
    for changed in (ablated, kept):  # nothing else that the layer writes is touched
        torch.testing.assert_close(changed @ across, clean @ across, **close)
    assert not torch.allclose(ablated @ direction, clean @ direction, atol=1e-2)


def test_keeping_all_changes_nothing_and_keeping_some_does(tiny):
    direction = tiny.output_direction(5)
    spectrum = tiny.bilinear_tensor(LAYER).eigh(direction)
    tokens = some_tokens()
    with torch.no_grad():
        clean = tiny(tokens)

        def run(spectrum):
            hooks = bl.keep_eigenvectors(spectrum, direction, layer=LAYER)
            return tiny.run_with_hooks(tokens, fwd_hooks=hooks)

        scale = max(1.0, clean.abs().max().item())
        assert (run(spectrum) - clean).abs().max() < 1e-5 * scale
        assert (run(spectrum.top(1)) - clean).abs().max() > 1e-3


def test_a_projected_out_eigenvector_is_not_seen(tiny):
    direction = tiny.output_direction(5)
    tensor = tiny.bilinear_tensor(LAYER)
    spectrum = tensor.eigh(direction).top(2)
    with torch.no_grad(), tiny.hooks(fwd_hooks=bl.project_out(spectrum, layer=LAYER)):
        _, cache = tiny.run_with_cache(some_tokens())
    x = cache[f"blocks.{LAYER}.mlp.hook_in"]
    seen = torch.linalg.qr(spectrum.vectors[:24])[0]
    assert (x @ seen).abs().max() < 1e-4
    out = cache[f"blocks.{LAYER}.mlp.hook_out"]
    torch.testing.assert_close(tensor(x), out, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(out, written(tiny, []), atol=1e-2)


def test_hooks_see_what_earlier_and_later_hooks_leave(tiny):
    """Keeping every eigenvector of a blinded layer changes nothing, in either order."""
    direction = tiny.output_direction(5)
    spectrum = tiny.bilinear_tensor(LAYER).eigh(direction)
    blind = bl.project_out(spectrum.top(2), layer=LAYER)
    keep = bl.keep_eigenvectors(spectrum, direction, layer=LAYER)
    expected = written(tiny, blind)
    for hooks in (blind + keep, keep + blind):
        torch.testing.assert_close(written(tiny, hooks), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(written(tiny, keep), expected, atol=1e-2)


def test_sixteen_bit_models_lose_nothing_but_what_is_taken(model):
    half = bl.HookedBilinearTransformer.from_pretrained("tinystories-1l", dtype=torch.bfloat16)
    direction = half.output_direction(" girl")
    spectrum = half.bilinear_tensor(0).eigh(direction)
    tokens = half.to_tokens("Once upon a time, there was a little girl.")
    with torch.no_grad():
        _, clean = half.run_with_cache(tokens)
        with half.hooks(fwd_hooks=bl.keep_eigenvectors(spectrum, direction, layer=0)):
            _, kept = half.run_with_cache(tokens)
    before, after = (cache["blocks.0.mlp.hook_out"].float() for cache in (clean, kept))
    assert after.dtype == torch.float32 and kept["blocks.0.mlp.hook_out"].dtype == torch.bfloat16
    assert (after - before).norm() < 0.01 * before.norm()  # bfloat16 has 8 bits


def test_an_eigenvector_of_the_constant_alone_blinds_nothing():
    vectors = torch.eye(25)[:, -1:]
    constant = bl.Spectrum(torch.ones(1), vectors, affine=True)
    (_, hook) = bl.project_out(constant, layer=0)[0]
    x = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hook(x, None), x)


def test_no_hook_is_left_behind_after_an_exception(tiny):
    direction, tokens = tiny.output_direction(5), some_tokens()
    spectrum = tiny.bilinear_tensor(LAYER).eigh(direction)
    with torch.no_grad():
        clean = tiny(tokens)
    hooks = bl.ablate_eigenvectors(spectrum, direction, layer=LAYER)
    with pytest.raises(RuntimeError, match="on purpose"), tiny.hooks(fwd_hooks=hooks):
        assert not torch.allclose(tiny(tokens), clean)
        raise RuntimeError("on purpose")
    with torch.no_grad():
        torch.testing.assert_close(tiny(tokens), clean, atol=0, rtol=0)

    def fail(x, hook):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        tiny.run_with_hooks(tokens, fwd_hooks=[*hooks, ("blocks.2.hook_resid_pre", fail)])
    with torch.no_grad():
        torch.testing.assert_close(tiny(tokens), clean, atol=0, rtol=0)


def test_lists_of_hooks_add(tiny):
    tensor, clean = tiny.bilinear_tensor(LAYER), written(tiny, [])
    directions = [tiny.output_direction(5), tiny.output_direction(6)]
    hooks = [bl.ablate_eigenvectors(tensor.eigh(u).top(3), u, layer=LAYER) for u in directions]
    changes = [written(tiny, each) - clean for each in hooks]
    both = written(tiny, hooks[0] + hooks[1]) - clean
    torch.testing.assert_close(both, changes[0] + changes[1], atol=1e-4, rtol=1e-4)
    assert all(change.abs().max() > 1e-2 for change in changes)


def test_a_curve_on_real_text_beats_its_controls(model):
    stories = bl.held_out_stories()[:60]
    curve = bl.ablation_curve(model, " girl", stories, layer=0, ks=[1, 8, 128, 256], n_random=2)
    assert curve.groupby("eigenvectors").k.apply(list).to_dict() == {
        name: [1, 8, 128, 256] for name in ("top", "bottom", "random")
    }
    at = curve.set_index(["eigenvectors", "k"])
    everything = at.loc[("top", 256), "logit"]
    assert everything < -2
    assert at.loc[("top", 8), "logit"] < 0.5 * everything
    assert at.loc[("top", 8), "logit_high"] < at.loc[("random", 8), "logit_low"]
    for control in ("random", "bottom"):
        assert abs(at.loc[(control, 8), "logit"]) < 0.05 * abs(everything)
        assert at.loc[(control, 256), "logit"] == pytest.approx(everything, abs=1e-3)
    assert at.loc[("top", 8), "loss"] > 0
    intervals = curve[["logit_low", "logit", "logit_high"]].to_numpy()
    assert (np.diff(intervals) >= 0).all()
    reached = bl.k_reaching(curve).to_dict()
    assert reached["top"] < reached["random"] == reached["bottom"] == 256
    again = bl.ablation_curve(model, " girl", stories, layer=0, ks=[1, 8, 128, 256], n_random=2)
    assert again.equals(curve)


def test_a_contrast_is_measured_like_the_pair(model):
    options = {"layer": 0, "ks": [256], "n_random": 1}
    stories = bl.held_out_stories()[:20]
    pair = bl.ablation_curve(model, (" she", " he"), stories, **options)
    contrast = bl.ablation_curve(model, " she", stories, contrast=" he", **options)
    assert contrast.equals(pair)
    alone = bl.ablation_curve(model, " she", stories, **options)
    assert min(abs(alone["logit"] - pair["logit"])) > 0.1


def test_the_k_that_reaches_a_share_lasts():
    effects = {"top": [-5, -9.2, -8, -9.5, -10], "random": [0, 0, 0, -1, -10]}
    curve = pd.DataFrame(
        [
            {"eigenvectors": name, "k": k, "logit": effect}
            for name, row in effects.items()
            for k, effect in zip([1, 2, 4, 8, 16], row, strict=True)
        ]
    ).sample(frac=1, random_state=0)
    assert bl.k_reaching(curve).to_dict() == {"top": 8, "random": 16}
    assert bl.k_reaching(curve, 0.5).to_dict() == {"top": 1, "random": 16}

    with pytest.raises(ValueError, match="up to all of them"):
        bl.k_reaching(curve.query("k < 16"))
    with pytest.raises(ValueError, match="share=2"):
        bl.k_reaching(curve, 2.0)


@pytest.mark.parametrize("output", [" she", (" she", " he")])
def test_a_curve_measures_the_logit_by_its_definition(model, output):
    """Ablating everything removes the layer's part of the logit, up to the final norm's scale."""
    stories = bl.held_out_stories()[:30]
    curve = bl.ablation_curve(model, output, stories, layer=0, ks=[256], n_random=1)
    windows = text_windows(model, stories, n_tokens=256)
    direction = model.output_direction(output)
    she, he = model.token_id(" she"), model.token_id(" he")
    changes, losses = [], []
    for window in windows:
        with torch.no_grad():
            clean, cache = model.run_with_cache(window[None])
            out = cache["blocks.0.hook_mlp_out"]
            unit = direction / direction.norm()
            hook = [
                ("blocks.0.hook_mlp_out", lambda x, hook, u=unit, o=out: x - (o @ u)[..., None] * u)
            ]
            ablated = model.run_with_hooks(window[None], fwd_hooks=hook)
        where = (window[1:] == she).nonzero()[:, 0]
        change = ablated - clean
        against = change[0, where].mean(-1) if output == " she" else change[0, where, he]
        changes.append(change[0, where, she] - against)
        loss = clean.log_softmax(-1) - ablated.log_softmax(-1)
        losses.append(loss[0, where, she])
    top = curve[curve.eigenvectors == "top"].iloc[0]
    assert top.n_positions == len(torch.cat(changes))
    assert top.logit == pytest.approx(torch.cat(changes).mean().item(), rel=1e-3)
    assert top.loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-3)


def test_bad_input_is_named(model, as_users):
    spectrum, direction = model.bilinear_tensor(0).eigh(0), model.output_direction(" girl")
    for wrong in (direction * 0, direction / 0):
        with pytest.raises(ValueError, match="zero or not finite"):
            bl.ablate_eigenvectors(spectrum, wrong, layer=0)
    batched = model.bilinear_tensor(0).eigh(torch.eye(256)[:2])
    with pytest.raises(ValueError, match="one direction"):
        bl.keep_eigenvectors(batched, direction, layer=0)
    with pytest.raises(ValueError, match="one direction"):
        bl.project_out(batched, layer=0)
    foreign = bl.Spectrum(torch.ones(1), torch.eye(5)[:, :1])
    for hooks in (
        bl.ablate_eigenvectors(foreign, torch.ones(5), layer=0),
        bl.project_out(foreign, layer=0),
    ):
        with pytest.raises(ValueError, match="has width 256, but"):
            model.run_with_hooks("A girl.", fwd_hooks=hooks)
    stories = bl.held_out_stories()[:5]
    for name in ("n_random", "n_bootstrap", "batch_size"):
        options: dict[str, Any] = {name: 0}
        with pytest.raises(ValueError, match=f"{name}=0"):
            bl.ablation_curve(model, " girl", stories, layer=0, **options)
    for text in ([], "A girl."):
        with pytest.raises(ValueError, match="list of documents"):
            bl.ablation_curve(model, " girl", text, layer=0)
    for ks in ([0], [257], [], [-1]):
        with pytest.raises(ValueError, match="ks="):
            bl.ablation_curve(model, " girl", stories, layer=0, ks=ks)
    with pytest.raises(ValueError, match="never the right answer"):
        bl.ablation_curve(model, " yacht", stories, layer=0)
    with pytest.raises(ValueError, match="fewer than one window"):
        bl.ablation_curve(model, " girl", ["A girl."], layer=0)
    with pytest.raises(ValueError, match="give a token or a pair"):
        bl.ablation_curve(model, direction, stories, layer=0)
