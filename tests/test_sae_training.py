"""Training sparse autoencoders and bilinear transcoders, and what is said of how well they do."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import gated as gated_config
from models import random_model, reading_model
from test_features import before, behind
from torch.nn import functional
from transformers import GPT2Config

import bilinear_lens as bl
from bilinear_lens.models.bridges import load_bridge
from bilinear_lens.training import saes, transcoders
from bilinear_lens.training.reconstruction import windows_of

STORIES = bl.held_out_stories()
TEXT, HELD_OUT = STORIES[:40], STORIES[40:46]
HOOKS = ["blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"]
SMALL = bl.SaeRecipe(expansion=3, k=4, batch_size=8, window=32)
LAYERS = bl.TranscoderRecipe(rank=30, batch_size=8, window=32)


@pytest.fixture(scope="module")
def model():
    return reading_model()


def train(model, out, hooks=HOOKS, recipe=SMALL, **options):
    given = {"held_out": HELD_OUT, **options}
    return bl.train_saes(model, given.pop("text", TEXT), hooks, out=out, recipe=recipe, **given)


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("saes") / "ours"
    return out, train(model, out, command="bilinear-lens train sae", data="stories")


def test_saes_are_trained_measured_and_saved(model, trained):
    out, made = trained
    assert set(made) == set(HOOKS)
    assert not Path(f"{out}.checkpoints").exists()
    card = (out / "README.md").read_text()
    figures = json.loads((out / "metrics.json").read_text())
    other = reading_model(seed=1)
    for hook, each in made.items():
        read = bl.SparseAutoencoder.from_pretrained(out, hook)
        assert torch.equal(read.encoder, each.made.encoder) and read.hook_in == hook
        read.check_model(model)
        again = bl.evaluate_reconstruction(model, read, HELD_OUT, window=32)
        assert again.to_dict() == pytest.approx(each.reconstruction.to_dict(), rel=1e-4)
        assert figures[hook] == pytest.approx(again.to_dict(), rel=1e-4)
        assert f"| `{hook}` | {again.nmse:.4f}" in card
        norms = read.decoder.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-2, atol=1e-2)
        with pytest.raises(ValueError, match="another model"):
            read.check_model(other)
    assert "bilinear-lens train sae" in card and "tokens of stories" in card


def test_training_learns(model, tmp_path):
    """Beside an SAE of one step: the error falls, and so does what the model loses."""
    short = train(model, tmp_path / "short", HOOKS[0], text=TEXT[:1])
    long = train(model, tmp_path / "long", HOOKS[0], replace(SMALL, epochs=8, learning_rate=5e-3))
    errors = [each[HOOKS[0]].reconstruction for each in (short, long)]
    assert errors[1].nmse < 0.8 * errors[0].nmse
    assert abs(errors[1].added) < 0.5 * abs(errors[0].added)  # of random weights, of either sign


def test_nothing_of_the_model_or_of_torch_is_left_changed(model, tmp_path, capsys):
    before_training = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.requires_grad_(True)
    model.W_E.requires_grad_(True)
    train(model, tmp_path / "new", HOOKS[0])
    assert all(weight.requires_grad for weight in model.parameters())
    assert torch.get_float32_matmul_precision() == "highest"
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before_training[name]), name
    assert "SAE" not in capsys.readouterr().out  # sparsify prints
    assert not any(model.hook_dict[HOOKS[0]]._forward_hooks)


def test_reconstruction_is_measured_as_defined(model):
    """Against sums by hand over all tokens, and losses of Hugging Face's model under hooks."""
    windows = windows_of(model, HELD_OUT, window=32)
    for sae in (before(k=6), behind(k=3)):
        found = bl.evaluate_reconstruction(model, sae, HELD_OUT, window=32, batch_size=3)
        _, cache = model.run_with_cache(windows, names_filter=sae.hook_in)
        y = cache[sae.hook_in].flatten(0, 1)
        made, acts = sae(y), sae.encode(y)
        error = (y - made).square().sum().item()
        assert found.nmse == pytest.approx(error / y.square().sum().item(), rel=1e-4)
        variance = (y - y.mean(0)).square().sum().item()
        assert found.variance_explained == pytest.approx(1 - error / variance, rel=1e-4)
        assert found.l0 == pytest.approx((acts != 0).sum(1).float().mean().item())
        assert found.dead == pytest.approx((~(acts != 0).any(0)).float().mean().item())

        def loss(hooks) -> float:
            logits = model.run_with_hooks(windows, fwd_hooks=hooks)[:, :-1]
            return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()

        zero = [(sae.hook_out, lambda x, hook: torch.zeros_like(x))]
        clean, patched, ablated = loss([]), loss(sae.hooks()), loss(zero)
        assert (found.loss, found.patched, found.ablated) == pytest.approx(
            (clean, patched, ablated), rel=1e-4
        )
        recovered = 1 - (patched - clean) / (ablated - clean)
        assert found.recovered == pytest.approx(recovered, rel=1e-2)
        assert found.added == pytest.approx((patched - clean) / clean, rel=1e-2, abs=1e-4)


class Killed(Exception):
    pass


def test_a_run_that_was_killed_resumes_to_the_same_saes(model, tmp_path, monkeypatch):
    """Whole checkpoints, of a run of three epochs that ends in the middle of its second."""
    recipe = replace(SMALL, epochs=3)
    whole = train(model, tmp_path / "whole", recipe=recipe)
    calls, read = [0], saes.activations_at

    def until_killed(*args):
        calls[0] += 1
        if calls[0] > 60:
            raise Killed
        return read(*args)

    monkeypatch.setattr(saes, "activations_at", until_killed)
    with pytest.raises(Killed):
        train(model, tmp_path / "cut", recipe=recipe)
    monkeypatch.setattr(saes, "activations_at", read)
    checkpoints = tmp_path / "cut.checkpoints"
    steps = sorted(int(each.name.split("-")[1]) for each in checkpoints.glob("checkpoint-*"))
    assert len(steps) == 2 and not (tmp_path / "cut").exists()
    (checkpoints / f"checkpoint-{steps[-1] + 99}.1.part").mkdir()  # cut off as it was written
    with pytest.raises(ValueError, match="unfinished run: resume it"):
        train(model, tmp_path / "cut", recipe=recipe)
    with pytest.raises(ValueError, match=r"another run.*recipe"):
        train(model, tmp_path / "cut", recipe=replace(recipe, k=3), resume=True)
    resumed = train(model, tmp_path / "cut", recipe=recipe, resume=True)
    for hook in HOOKS:
        for name in ("encoder", "decoder", "encoder_bias", "decoder_bias"):
            ours, theirs = (getattr(each[hook].made, name) for each in (resumed, whole))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_run_that_was_killed_after_its_last_step_resumes(model, tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise Killed

    whole = train(model, tmp_path / "whole", HOOKS[0])
    monkeypatch.setattr(saes, "save_trained", killed)
    with pytest.raises(Killed):
        train(model, tmp_path / "cut", HOOKS[0])
    monkeypatch.undo()
    resumed = train(model, tmp_path / "cut", HOOKS[0], resume=True)
    assert torch.equal(resumed[HOOKS[0]].made.encoder, whole[HOOKS[0]].made.encoder)


def test_the_extra_that_is_missing_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sparsify", None)
    with pytest.raises(ValueError, match=r"pip install 'bilinear-lens\[sae\]'"):
        train(model, tmp_path / "new")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"hooks": "blocks.1.mlp.hook_inn"}, r"near ones: .*blocks\.1.mlp.hook_in"),
        ({"hooks": []}, "at least one hook point"),
        ({"hooks": [HOOKS[1], "blocks.1.mlp.hook_out"]}, "each only once"),
        ({"hooks": "blocks.1.attn.hook_pattern"}, "No vector for each token"),
        ({"recipe": replace(SMALL, k=73)}, "k=73 is more than the 72 latents"),
        ({"text": ["Hi"]}, "fewer than one window"),
        ({"text": TEXT[:1], "recipe": replace(SMALL, batch_size=99)}, "a batch of 99"),
        ({"held_out": ["Hi"]}, "fewer than one window"),
        ({"text": "Hi"}, "list of documents"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_any_work(model, tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        train(model, tmp_path / "new", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (bl.SaeRecipe, {"k": 0}),
        (bl.SaeRecipe, {"expansion": 0}),
        (bl.SaeRecipe, {"window": 1}),
        (bl.SaeRecipe, {"learning_rate": -1.0}),
        (bl.SaeRecipe, {"warmup": 1.0}),
        (bl.SaeRecipe, {"auxiliary": -1.0}),
        (bl.TranscoderRecipe, {"rank": 0}),
        (bl.TranscoderRecipe, {"window": 1}),
        (bl.TranscoderRecipe, {"learning_rate": float("nan")}),
    ],
)
def test_recipes_out_of_range_are_refused(recipe, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        recipe(**options)


def test_activations_that_are_not_finite_end_a_run(tmp_path):
    broken = reading_model()
    with torch.no_grad():
        broken.blocks[1].mlp.out.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="holds NaN"):
        train(broken, tmp_path / "new")
    with pytest.raises(ValueError, match="holds NaN"):
        bl.train_transcoders(broken, TEXT, out=tmp_path / "other", held_out=HELD_OUT, recipe=LAYERS)


# transcoders


@pytest.fixture(scope="module")
def gated():
    return load_bridge("stories260k")


def test_any_model_is_hooked_and_folded(gated):
    """A bilinear one as ours; another, as a plain bridge that computes what the model does."""
    assert isinstance(load_bridge("stories260k-bilinear"), bl.HookedBilinearTransformer)
    assert not isinstance(gated, bl.HookedBilinearTransformer)
    hf, _ = bl.load_checkpoint("stories260k")
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = hf(input_ids=tokens).logits.log_softmax(-1)
    torch.testing.assert_close(gated(tokens).log_softmax(-1), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_what_transformerlens_computes_otherwise_is_refused(activation, tmp_path):
    """It takes gates' activations that it does not know for SiLU, once weights are folded."""
    random_model(gated_config("llama", hidden_act=activation)).save_pretrained(tmp_path / "x")
    if activation == "relu":
        assert load_bridge(tmp_path / "x").cfg.n_layers == 3
        return
    with pytest.raises(ValueError, match="does not compute what x does"):
        load_bridge(tmp_path / "x")


@pytest.mark.parametrize("fold", [True, False])
def test_a_plain_model_keeps_its_activations(fold, tmp_path):
    """Of GPT-2: what its MLPs write is what Hugging Face's write, whether folded or not."""
    config = GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=4, n_positions=32)
    config.bos_token_id = config.eos_token_id = 0
    random_model(config).save_pretrained(tmp_path / "x")
    hf, _ = bl.load_checkpoint(tmp_path / "x")
    module = hf.get_submodule("transformer.h.1.mlp")
    seen = {}
    module.register_forward_hook(lambda m, inputs, out: seen.update(read=inputs[0], out=out))
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        hf(input_ids=tokens)
    bridge = load_bridge(tmp_path / "x", fold=fold)
    _, cache = bridge.run_with_cache(tokens)
    torch.testing.assert_close(cache["blocks.1.mlp.hook_out"], seen["out"], rtol=1e-3, atol=1e-4)
    same = torch.allclose(cache["blocks.1.mlp.hook_in"], seen["read"], rtol=1e-3, atol=1e-4)
    assert same != fold  # the norm's gain went into the weights


def test_a_transcoder_of_a_bilinear_mlp_learns_what_it_computes(tmp_path):
    """Of the same rank, it can be exact; of a product less, or with a gate that is none, not."""
    model = load_bridge("stories260k-bilinear")
    made = bl.train_transcoders(
        model,
        STORIES[:40],
        out=tmp_path / "new",
        held_out=HELD_OUT,
        layers=[2],
        recipe=bl.TranscoderRecipe(epochs=3, batch_size=4, window=64, learning_rate=1e-2),
    )["blocks.2.mlp"]
    assert made.reconstruction.variance_explained > 0.6
    assert made.reconstruction.recovered > 0.5
    assert made.reconstruction.l0 is None


def test_a_transcoder_is_a_tensor_saved_and_loaded(gated, tmp_path):
    out = tmp_path / "new"
    made = bl.train_transcoders(
        gated, TEXT[:12], out=out, held_out=HELD_OUT, layers=[1, 3], recipe=LAYERS
    )
    assert list(made) == ["blocks.1.mlp", "blocks.3.mlp"]
    assert "| `blocks.3.mlp` |" in (out / "README.md").read_text()
    one = made["blocks.3.mlp"].made
    read = bl.BilinearTranscoder.from_pretrained(out, "blocks.3.mlp")
    x = torch.randn(5, 64)
    assert torch.equal(read(x), one(x)) and repr(read) == repr(one)
    assert one.skip is not None
    by_hand = ((x @ one.left.mT) * (x @ one.right.mT)) @ one.down.mT + one.bias + x @ one.skip.mT
    torch.testing.assert_close(read(x), by_hand, rtol=1e-4, atol=1e-5)
    direction = torch.randn(64)
    spectrum = read.tensor.eigh(direction)
    torch.testing.assert_close(
        spectrum.activations(x).sum(-1), read(x) @ direction, rtol=1e-3, atol=1e-4
    )
    tokens = windows_of(gated, HELD_OUT, window=16)[:2]
    _, clean = gated.run_with_cache(tokens)
    with gated.hooks(fwd_hooks=read.hooks()):
        _, cache = gated.run_with_cache(tokens)
    torch.testing.assert_close(cache[read.hook_out], read(clean[read.hook_in]))
    read.check_model(gated)
    with pytest.raises(ValueError, match="another model"):
        replace(read, model_digest="x").check_model(gated)
    with pytest.raises(ValueError, match="no hook point"):
        replace(read, hook_in="blocks.9.mlp.hook_in").check_model(gated)
    with pytest.raises(ValueError, match="exists already"):
        one.save_pretrained(out)
    with pytest.raises(ValueError, match="holds no BilinearTranscoder"):
        before().save_pretrained(tmp_path / "sae")
        (tmp_path / "sae" / "config.json").write_text("{}")
        bl.BilinearTranscoder.from_pretrained(tmp_path / "sae")


def test_transcoders_that_were_killed_resume_to_the_same(gated, tmp_path, monkeypatch):
    def run(out, **options):
        recipe = replace(LAYERS, epochs=3)
        return bl.train_transcoders(
            gated, TEXT[:8], out=out, held_out=HELD_OUT, layers=[2], recipe=recipe, **options
        )["blocks.2.mlp"].made

    read, calls, limit = transcoders.activations_at, [0], [10**6]

    def until_killed(*args):
        calls[0] += 1
        if calls[0] > limit[0]:
            raise Killed
        return read(*args)

    monkeypatch.setattr(transcoders, "activations_at", until_killed)
    whole = run(tmp_path / "whole")
    calls[0], limit[0] = 0, 2 * calls[0] // 3
    with pytest.raises(Killed):
        run(tmp_path / "cut")
    monkeypatch.setattr(transcoders, "activations_at", read)
    resumed = run(tmp_path / "cut", resume=True)
    for name in ("left", "right", "down", "bias", "skip"):
        torch.testing.assert_close(getattr(resumed, name), getattr(whole, name))


@pytest.mark.parametrize("layers", [[5], [-1], []])
def test_layers_that_are_not_there_are_refused(gated, tmp_path, layers):
    with pytest.raises(ValueError, match="must be between 0 and 4"):
        bl.train_transcoders(gated, TEXT, out=tmp_path / "new", held_out=HELD_OUT, layers=layers)
    assert not list(tmp_path.iterdir())
