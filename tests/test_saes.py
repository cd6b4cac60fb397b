"""Sparse autoencoders: three layouts in and out, each against its own tool's formula."""

import json
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from models import CONFIGS, random_model, some_tokens
from safetensors.torch import load_file, save_file

import bilinear_lens as bl
from bilinear_lens.models import sae_layouts
from bilinear_lens.models.saes import embedding_digest, model_digest

N, D = 11, 24


def sae(**changes) -> bl.SparseAutoencoder:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    made = bl.SparseAutoencoder(
        encoder=normal(N, D),
        decoder=normal(N, D),
        encoder_bias=normal(N),
        decoder_bias=normal(D),
        hook_in="blocks.1.mlp.hook_in",
        hook_out="blocks.1.mlp.hook_in",
        k=3,
    )
    return replace(made, **changes)


TRANSCODER = {"hook_out": "blocks.1.hook_mlp_out", "centred": False}
SKIP = torch.randn(D, D, generator=torch.Generator().manual_seed(4))
KINDS = {
    "sparsify": sae(),
    "sparsify transcoder": sae(**TRANSCODER, skip=SKIP),
    "saelens topk": sae(),
    "saelens relu": sae(activation="relu", k=None, centred=False),
    "saelens jumprelu": sae(activation="jumprelu", k=None, threshold=torch.rand(N)),
    "saelens jumprelu transcoder": sae(
        activation="jumprelu", k=None, threshold=torch.rand(N), **TRANSCODER
    ),
    "saelens jumprelu skip transcoder": sae(
        activation="jumprelu", k=None, threshold=torch.rand(N), **TRANSCODER, skip=SKIP
    ),
    "saelens skip transcoder": sae(activation="relu", k=None, **TRANSCODER, skip=SKIP),
    "authors": sae(
        activation="signed_topk",
        encoder=torch.randn(2 * D, D),
        decoder=torch.randn(2 * D, D),
        encoder_bias=torch.zeros(2 * D),
    ),
    "authors normalised": sae(
        activation="signed_topk",
        encoder=torch.randn(2 * D, D),
        decoder=torch.randn(2 * D, D),
        encoder_bias=torch.randn(2 * D),
        scale=4.5,
        hook_in="blocks.1.hook_mlp_out",
        hook_out="blocks.1.hook_mlp_out",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_goes_out_and_in_without_a_change(kind, tmp_path):
    layout: Any = kind.split()[0]
    before = KINDS[kind]
    before.save_pretrained(tmp_path / "one", layout=layout)
    after = bl.SparseAutoencoder.from_pretrained(tmp_path, "one")
    for field in fields(before):
        ours, theirs = getattr(before, field.name), getattr(after, field.name)
        if isinstance(ours, torch.Tensor):
            assert torch.equal(ours, theirs), field.name
        else:
            assert ours == theirs, field.name
    with pytest.raises(ValueError, match="exists already"):
        before.save_pretrained(tmp_path / "one", layout=layout)


def test_the_authors_formula(tmp_path):
    """`W_enc (x / s - b_dec)`, the k largest as they are, `s (W_dec f + b_dec)`."""
    folder, scale, k = tmp_path / "4-mlp-out-x2-k40", 3.7, 40  # of 48: some are negative
    folder.mkdir()
    weights = {
        "w_enc.weight": torch.randn(2 * D, D),
        "w_dec.weight": torch.randn(D, 2 * D),
        "b_dec": torch.randn(D),
    }
    save_file(weights, folder / "model.safetensors")
    config = {"point": ["mlp-out", 4], "target": None, "expansion": 2, "k": k, "d_model": D}
    text = json.dumps({**config, "normalize": scale, "encoder_bias": False, "kwargs": {}})
    (folder / "config.json").write_text(text)
    read = bl.SparseAutoencoder.from_pretrained(folder)
    assert read.hook_in == read.hook_out == "blocks.4.hook_mlp_out"
    x = torch.randn(7, D)
    hidden = (x / scale - weights["b_dec"]) @ weights["w_enc.weight"].mT
    kept = torch.zeros_like(hidden)
    for row, values in zip(kept, hidden, strict=True):
        chosen = values.sort(descending=True).indices[:k]
        row[chosen] = values[chosen]
    made = scale * (kept @ weights["w_dec.weight"].mT + weights["b_dec"])
    torch.testing.assert_close(read.encode(x), kept, rtol=0, atol=1e-6)
    torch.testing.assert_close(read(x), made, rtol=1e-6, atol=1e-6 * made.abs().max().item())
    assert (kept < 0).any()  # values are raw: with another activation this would not pass
    assert not torch.allclose(replace(read, activation="topk").encode(x), kept, atol=1e-3)


@pytest.mark.parametrize("kind", ["sparsify", "sparsify transcoder"])
def test_sparsify_computes_the_same(kind, tmp_path, capsys):
    from sparsify import SparseCoder

    KINDS[kind].save_pretrained(tmp_path / "one")
    coder = SparseCoder.load_from_disk(tmp_path / "one")
    x = torch.randn(7, D)
    theirs = coder(x).sae_out.detach()
    torch.testing.assert_close(KINDS[kind](x), theirs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(replace(KINDS[kind], k=4)(x), theirs, atol=1e-3)


def test_saelens_formulas(tmp_path):
    """As its inference classes have them: `relu`, top-k of them, and the jump at a threshold."""
    weights = {
        "W_enc": torch.randn(D, N),
        "b_enc": torch.randn(N),
        "W_dec": torch.randn(N, D),
        "b_dec": torch.randn(D),
        "threshold": torch.rand(N),
    }
    x = torch.randn(7, D)
    before = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    jump = before.clamp(min=0) * (before > weights["threshold"])
    top = torch.zeros_like(before)
    for row, values in zip(top, before, strict=True):
        chosen = values.sort(descending=True).indices[:2]
        row[chosen] = values[chosen].clamp(min=0)
    configs = {
        "standard": ({"architecture": "standard"}, before.clamp(min=0)),
        "jumprelu": ({"architecture": "jumprelu"}, jump),
        "topk": ({"architecture": "topk", "k": 2}, top),
        "old": (
            {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}, "hook_name": "x"},
            top,
        ),
    }
    for name, (config, expected) in configs.items():
        folder = tmp_path / name
        folder.mkdir()
        save_file(weights, folder / "sae_weights.safetensors")
        at = {"metadata": {"hook_name": "blocks.0.hook_resid_pre"}}
        (folder / "cfg.json").write_text(json.dumps({"apply_b_dec_to_input": True, **at, **config}))
        read = bl.SparseAutoencoder.from_pretrained(folder)
        assert read.hook_in == "blocks.0.hook_resid_pre"
        torch.testing.assert_close(read.encode(x), expected)
        torch.testing.assert_close(read(x), expected @ weights["W_dec"] + weights["b_dec"])


@pytest.mark.parametrize(
    ("module", "transcode", "hooks"),
    [
        ("layers.5.mlp", False, ("blocks.5.mlp.hook_out",) * 2),
        ("h.5.mlp", True, ("blocks.5.mlp.hook_in", "blocks.5.mlp.hook_out")),
        ("gpt_neox.layers.5", False, ("blocks.5.hook_resid_post",) * 2),
        ("layers.5.self_attn", False, ("blocks.5.attn.hook_out",) * 2),
        ("embed_tokens", False, ("hook_embed",) * 2),
        ("blocks.5.hook_resid_mid", False, ("blocks.5.hook_resid_mid",) * 2),
    ],
)
def test_the_hook_point_of_a_hugging_face_module(module, transcode, hooks, tmp_path):
    changes = {"centred": False, "hook_out": "blocks.1.hook_mlp_out"} if transcode else {}
    sae(**changes).save_pretrained(tmp_path / module)
    config = json.loads((tmp_path / module / "cfg.json").read_text())
    for name in ("hook_in", "hook_out", "model_digest"):
        del config[name]  # as sparsify itself writes it
    (tmp_path / module / "cfg.json").write_text(json.dumps(config))
    read = bl.SparseAutoencoder.from_pretrained(tmp_path / module)
    assert (read.hook_in, read.hook_out) == hooks


@pytest.mark.parametrize("name", ["llama", "gemma2-tied"])
@pytest.mark.parametrize("module", ["layers.1.mlp", "layers.1.self_attn", "layers.1"])
def test_a_modules_output_is_the_activation_at_its_hook_point(name, module):
    """Also where an architecture norms what attention and MLPs write."""
    hf = random_model(CONFIGS[name])
    seen = []
    handle = hf.get_submodule(f"model.{module}").register_forward_hook(
        lambda m, inputs, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        hf(input_ids=some_tokens())
    handle.remove()
    _, cache = bl.HookedBilinearTransformer.from_hf(hf).run_with_cache(some_tokens())
    hook = sae_layouts.hook_of_module(module)
    torch.testing.assert_close(cache[hook], seen[0], rtol=1e-3, atol=1e-3)


def test_what_saelens_calls_transcoders(tmp_path):
    for kind, name in [
        ("saelens jumprelu skip transcoder", "jumprelu_skip_transcoder"),
        ("saelens jumprelu transcoder", "jumprelu_transcoder"),
        ("saelens skip transcoder", "skip_transcoder"),
    ]:
        KINDS[kind].save_pretrained(tmp_path / name, layout="saelens")
        assert json.loads((tmp_path / name / "cfg.json").read_text())["architecture"] == name


def test_another_hook_point_is_taken_on_both_sides(tmp_path):
    sae().save_pretrained(tmp_path / "one")
    read = bl.SparseAutoencoder.from_pretrained(tmp_path / "one", hook="blocks.1.hook_resid_mid")
    assert read.hook_in == read.hook_out == "blocks.1.hook_resid_mid" and not read.is_transcoder


def test_bases_and_constants_are_what_encoding_and_decoding_are_made_of():
    for each in KINDS.values():
        x, f = torch.randn(5, D), torch.rand(5, each.n_latents)
        linear = x @ each.encoder_basis.directions.mT + each.constants
        torch.testing.assert_close(each.preactivations(x), linear, rtol=1e-4, atol=1e-4)
        decoded = f @ each.decoder_basis.directions + each.offset
        torch.testing.assert_close(each.decode(f), decoded, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("as_users")
def test_what_a_layout_has_no_place_for_is_refused(tmp_path):
    layout: Any
    for layout, kind, word in [
        ("sparsify", "saelens relu", "activation"),
        ("sparsify", "authors normalised", "activation"),
        ("saelens", "authors", "activation"),
        ("saelens", "sparsify transcoder", "top-k"),
        ("authors", "sparsify", "activation"),
    ]:
        with pytest.raises(ValueError, match=word):
            KINDS[kind].save_pretrained(tmp_path / "new", layout=layout)
    layout = "pickle"
    with pytest.raises(ValueError, match="sparsify, saelens, authors"):
        KINDS["sparsify"].save_pretrained(tmp_path / "new", layout=layout)
    assert not (tmp_path / "new").exists()


def test_files_that_are_not_supported_are_refused_by_name(tmp_path):
    def refused(folder, match, **options):
        with pytest.raises(ValueError, match=match):
            bl.SparseAutoencoder.from_pretrained(folder, **options)

    (tmp_path / "empty" / "below").mkdir(parents=True)
    refused(tmp_path / "empty", "sparsify: cfg.json and sae.safetensors.*subfolder.*below")
    refused(tmp_path / "empty", "no folder 'other'; it has", subfolder="other")
    with pytest.raises(KeyError, match="tinystories-4l-saes"):
        bl.SparseAutoencoder.from_pretrained("nothing")
    KINDS["sparsify"].save_pretrained(tmp_path / "signed")
    early = json.loads((tmp_path / "signed" / "cfg.json").read_text())
    (tmp_path / "signed" / "cfg.json").write_text(json.dumps({**early, "signed": True}))
    refused(tmp_path / "signed", "signed=True")
    KINDS["saelens topk"].save_pretrained(tmp_path / "lens", layout="saelens")
    written = json.loads((tmp_path / "lens" / "cfg.json").read_text())
    for change, match in [
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
        ({"architecture": "gated"}, "architecture='gated'"),
        ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm"),
    ]:
        (tmp_path / "lens" / "cfg.json").write_text(json.dumps({**written, **change}))
        refused(tmp_path / "lens", match)
    KINDS["authors"].save_pretrained(tmp_path / "authors", layout="authors")
    file = tmp_path / "authors" / "config.json"
    written = json.loads(file.read_text())
    for change, match in [
        ({"bilinear_encoder": True}, "bilinear_encoder"),
        ({"point": ["somewhere", 1]}, "mlp_in"),
        ({"point": "mlp-out"}, "a name and a layer"),
    ]:
        file.write_text(json.dumps({**written, **change}))
        refused(tmp_path / "authors", match)
    weights = load_file(tmp_path / "authors" / "model.safetensors")
    del weights["b_dec"]
    file.write_text(json.dumps(written))
    save_file(weights, tmp_path / "authors" / "model.safetensors")
    refused(tmp_path / "authors", "authors, but lacks 'b_dec'")
    (tmp_path / "authors" / "model.safetensors").write_bytes(b"cut")
    refused(tmp_path / "authors", "cut short")
    sae().save_pretrained(tmp_path / "unknown")
    file = tmp_path / "unknown" / "cfg.json"
    file.write_text(json.dumps({"k": 3, "transcode": False}))
    refused(tmp_path / "unknown", "say hook=")
    assert bl.SparseAutoencoder.from_pretrained(tmp_path / "unknown", hook="hook_embed").k == 3


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"decoder": torch.zeros(N + 1, D)}, "decoder has shape"),
        ({"encoder": torch.full((N, D), torch.nan)}, "encoder holds NaN"),
        ({"k": 0}, "k=0 must be between 1 and the 11"),
        ({"k": N + 1}, "k=12"),
        ({"activation": "jumprelu"}, "threshold"),
        ({"scale": 0.0}, "scale"),
        ({"decoder": torch.zeros(N, 5), "decoder_bias": torch.zeros(5)}, "centred"),
    ],
)
def test_weights_that_do_not_fit_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        sae(**changes)


@pytest.mark.usefixtures("as_users")
def test_activations_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"width 5; this SAE reads 24 at blocks.1.mlp.hook_in"):
        sae().encode(torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"blocks.1.mlp.hook_in holds NaN"):
        sae().encode(torch.full((2, D), torch.nan))


@pytest.fixture(scope="module")
def hooked():
    return bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS["llama"]))


@pytest.mark.parametrize("kind", ["sparsify", "sparsify transcoder"])
def test_hooks_let_the_model_go_on_with_the_reconstruction(kind, hooked):
    each, tokens = KINDS[kind], some_tokens()
    with hooked.hooks(fwd_hooks=each.hooks()):
        _, cache = hooked.run_with_cache(tokens)
    _, clean = hooked.run_with_cache(tokens)
    torch.testing.assert_close(cache[each.hook_out], each(clean[each.hook_in]))
    assert not torch.allclose(cache[each.hook_out], clean[each.hook_out], atol=1e-2)
    _, again = hooked.run_with_cache(tokens)  # the hooks left no trace
    assert torch.equal(again[each.hook_out], clean[each.hook_out])


def test_an_sae_of_another_model_width_or_hook_point_is_refused(hooked):
    sae().check_model(hooked)
    replace(sae(), model_digest=embedding_digest(hooked)).check_model(hooked)
    for changes, match in [
        ({"hook_in": "blocks.9.mlp.hook_in"}, "no hook point 'blocks.9.mlp.hook_in'; near ones"),
        ({"hook_in": "blocks.1.mlp.hook_pre"}, "has width 28; this was trained on a width of 24"),
        ({"hook_in": "blocks.1.attn.hook_pattern"}, "No vector for each token"),
        ({"model_digest": "other"}, "another model than"),
    ]:
        with pytest.raises(ValueError, match=match):
            sae(**changes).check_model(hooked)


def test_a_digest_is_the_models_whatever_its_dtype_and_folding():
    digests = {
        embedding_digest(
            bl.HookedBilinearTransformer.from_hf(
                random_model(CONFIGS["llama"]).to(dtype),  # pyright: ignore[reportArgumentType]
                fold=fold,
            )
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for fold in (True, False)
    }
    folded, raw = (
        bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS["llama"]), fold=fold)
        for fold in (True, False)
    )
    theirs = sae(model_digest=model_digest(folded, "blocks.1.mlp.hook_in"))
    theirs.check_model(folded)
    with pytest.raises(ValueError, match="another fold="):
        theirs.check_model(raw)
    at = "blocks.1.hook_resid_mid"  # before the norm both are the same
    replace(theirs, hook_in=at, hook_out=at, model_digest=model_digest(folded, at)).check_model(raw)
    other = bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS["llama"], seed=1))
    assert len(digests) == 1 and embedding_digest(other) not in digests
