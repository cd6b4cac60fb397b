"""The hooked model: the law on the trained models, directions, tokens, saving, bad input."""

import copy

import pytest
import torch
from models import CONFIGS, random_model, some_tokens
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import bilinear_lens as bl
from bilinear_lens.analysis.ablation import text_windows
from bilinear_lens.models.checkpoints import built_in

BUILT_IN = ("tinystories-1l", "tinystories-4l")
PROMPT = "One day, a little girl named Lily went to the park. She saw a big dog."


@pytest.fixture(scope="module", params=BUILT_IN)
def built_in_model(request) -> bl.HookedBilinearTransformer:
    return bl.HookedBilinearTransformer.from_pretrained(request.param)


def test_the_law_on_trained_models(built_in_model, record_property):
    _, cache = built_in_model.run_with_cache(bl.held_out_stories()[0])
    for layer in range(built_in_model.cfg.n_layers):
        tensor = built_in_model.bilinear_tensor(layer)
        x = cache[f"blocks.{layer}.mlp.hook_in"]
        for output in (" girl", (" she", " he"), 7):
            u = built_in_model.output_direction(output)
            written = cache[f"blocks.{layer}.hook_mlp_out"] @ u
            spectrum = tensor.eigh(u)
            error = (written - spectrum.activations(x).sum(-1)).abs().max().item()
            record_property(f"layer {layer}, largest error", error)
            assert error < 1e-5 * max(1, written.abs().max().item())
            assert not torch.allclose(spectrum.top(16).activations(x).sum(-1), written, atol=1e-3)


def test_trained_models_are_the_same_in_every_form_and_in_transformers(built_in_model):
    folder = built_in(built_in_model.cfg.model_name)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = built_in_model.to_tokens(PROMPT)
    raw = bl.HookedBilinearTransformer.from_pretrained(built_in_model.cfg.model_name, fold=False)
    with torch.no_grad():
        expected = plain(tokens).logits.log_softmax(-1)
        torch.testing.assert_close(
            built_in_model(tokens).log_softmax(-1), expected, atol=1e-4, rtol=0
        )
        torch.testing.assert_close(raw(tokens).log_softmax(-1), expected, atol=1e-4, rtol=0)


def test_trained_models_write_stories(built_in_model):
    torch.manual_seed(0)
    text = built_in_model.generate(
        "Once upon a time", max_new_tokens=60, temperature=0.7, verbose=False
    )
    words = str(text).lower().split()
    known = set(" ".join(bl.held_out_stories()).lower().split())
    assert sum(word in known for word in words) > 0.9 * len(words)
    assert {"was", "and", "to"} & set(words)


def test_trained_models_know_the_held_out_stories(built_in_model):
    """The model card's loss, within what 40 of its 3,110 stories allow."""
    windows = text_windows(built_in_model, bl.held_out_stories()[:40], n_tokens=256)
    with torch.no_grad():
        loss = built_in_model(windows, return_type="loss").item()
    card = (built_in(built_in_model.cfg.model_name) / "README.md").read_text()
    expected = float(card.split("this model | ")[1].split(" ")[0])
    assert abs(loss - expected) < 0.15
    shuffled = windows[:, torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        assert built_in_model(shuffled, return_type="loss").item() > expected + 1


def test_an_output_direction_is_a_difference_of_logits(model):
    with torch.no_grad():
        logits, cache = model.run_with_cache(PROMPT)
    x = cache["ln_final.hook_normalized"][0, -1]
    girl, he = model.token_id(" girl"), model.token_id(" he")
    last = logits[0, -1]
    cases = {
        " girl": last[girl] - last.mean(),
        girl: last[girl] - last.mean(),
        (" girl", " he"): last[girl] - last[he],
        (" girl", he): last[girl] - last[he],
    }
    for output, expected in cases.items():
        torch.testing.assert_close(
            x @ model.output_direction(output), expected, atol=1e-4, rtol=1e-4
        )
    against_he = model.output_direction(" girl", contrast=" he")
    torch.testing.assert_close(against_he, model.output_direction((" girl", " he")))
    vector = torch.randn(256, generator=torch.Generator().manual_seed(0))
    assert model.output_direction(vector) is not None
    torch.testing.assert_close(model.output_direction(vector), vector)


def test_the_token_basis_is_what_the_mlp_sees_of_a_lone_token(model):
    """Without attention, layer 0's MLP sees each token's embedding, normed."""
    tokens = model.to_tokens(PROMPT)
    silent = [("blocks.0.hook_attn_out", lambda out, hook: out * 0)]
    with torch.no_grad(), model.hooks(fwd_hooks=silent):
        _, cache = model.run_with_cache(tokens)
    seen = cache["blocks.0.mlp.hook_in"][0]
    basis = model.token_basis()
    torch.testing.assert_close(basis.directions[tokens[0]], seen, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(basis[" girl"], basis.directions[model.token_id(" girl")])
    rms = basis.directions.square().mean(-1).sqrt()
    assert rms.max() <= 1.0001  # below 1 by the norm's epsilon
    assert rms[tokens[0, 1:]].min() > 0.9


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_sees_a_lone_token_as_its_basis_says(name):
    model = bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS[name]))
    basis, tokens = model.token_basis().directions, some_tokens()
    silent = [("blocks.0.attn.hook_out", lambda out, hook: out * 0)]
    with torch.no_grad(), model.hooks(fwd_hooks=silent):
        _, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(basis[tokens], cache["blocks.0.mlp.hook_in"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2-tied", "gemma3-tied", "olmo2"])
def test_a_layers_output_direction_takes_the_gain_of_a_norm_after_the_mlp(name):
    """What reaches the residual stream along u is what the MLP writes along it, times a scale."""
    model = bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS[name]))
    with torch.no_grad():
        _, cache = model.run_with_cache(some_tokens())
    added, written = cache["blocks.1.hook_mlp_out"], cache["blocks.1.mlp.hook_out"]
    plain, fitted = model.output_direction(5), model.output_direction(5, layer=1)
    scale = written.square().mean(-1).sqrt() if name != "llama" else 1
    reached = added @ plain * scale
    torch.testing.assert_close(written @ fitted, reached, atol=1e-3, rtol=1e-3)
    assert torch.allclose(written @ plain, reached, atol=1e-3) == (name == "llama")
    torch.testing.assert_close(bl.interactions(model, 5, layer=1, k=1).direction, fitted)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architectures_output_direction_reads_its_logits(name):
    config = copy.deepcopy(CONFIGS[name])
    vars(config)["final_logit_softcapping"] = None  # Gemma 2's bends the logits
    model = bl.HookedBilinearTransformer.from_hf(random_model(config))
    with torch.no_grad():
        logits, cache = model.run_with_cache(some_tokens())
    final = cache["blocks.2.hook_out"]
    x = final / final.square().mean(-1, keepdim=True).sqrt()
    expected = logits[..., 5] - logits[..., 6]
    torch.testing.assert_close(x @ model.output_direction((5, 6)), expected, atol=1e-3, rtol=1e-3)
    mean = logits[..., 5] - logits.mean(-1)
    torch.testing.assert_close(x @ model.output_direction(5), mean, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(mean, expected, atol=1e-2)


def test_a_raw_direction_is_not_centred(model):
    unembedding = model.W_U.detach()
    girl = model.token_id(" girl")
    raw = model.output_direction(" girl", contrast=None)
    torch.testing.assert_close(raw, unembedding[:, girl])
    torch.testing.assert_close(raw - model.output_direction(" girl"), unembedding.mean(dim=1))
    assert unembedding.mean(dim=1).norm() > 0.01 * raw.norm()


def test_labels_are_readable_and_one_for_each_token(built_in_model):
    assert len(built_in_model.token_labels) == built_in_model.cfg.d_vocab
    assert built_in_model.token_labels[built_in_model.token_id(" girl")] == " girl"
    assert "\n" in built_in_model.token_labels
    assert not any("\ufffd" in label for label in built_in_model.token_labels)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_saving_makes_a_plain_hugging_face_folder(name, fold, tmp_path):
    if name == "phi3" and fold:
        model = bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS[name]))
        with pytest.raises(ValueError, match="fold=False"):
            model.save_pretrained(tmp_path / "saved")
        assert not list(tmp_path.iterdir())
        return
    model = bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS[name]), fold=fold)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tokens = some_tokens()
    with torch.no_grad():
        expected = random_model(CONFIGS[name])(tokens).logits.log_softmax(-1)
        actual = again(tokens).logits.log_softmax(-1)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]
    hooked = bl.HookedBilinearTransformer.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(hooked(tokens).log_softmax(-1), expected, atol=1e-4, rtol=0)


def test_saving_keeps_the_tokenizer_and_what_was_changed(model, tmp_path):
    changed = bl.HookedBilinearTransformer.from_pretrained("tinystories-1l")
    with torch.no_grad():
        changed.blocks[0].mlp.out.weight[:, 0] = 0
    changed.save_pretrained(tmp_path / "saved")
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "saved").decode([500]) == (model.token_labels[500])
    )
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    assert not weights["model.layers.0.mlp.down_proj.weight"][:, 0].any()
    again = bl.HookedBilinearTransformer.from_pretrained(tmp_path / "saved")
    assert not torch.allclose(again(PROMPT), model(PROMPT), atol=1e-4)
    torch.testing.assert_close(again(PROMPT), changed(PROMPT), atol=1e-4, rtol=1e-4)


def test_from_config_makes_a_random_model():
    torch.manual_seed(0)
    model = bl.HookedBilinearTransformer.from_config(CONFIGS["llama"])
    assert model(some_tokens()).shape == (2, 11, 37)
    assert model.bilinear_tensor(2).rank == 28


def test_devices_and_dtypes_are_passed_on(tmp_path):
    model = bl.HookedBilinearTransformer.from_pretrained(
        "tinystories-1l", dtype=torch.bfloat16, device="cpu"
    )
    assert model.W_U.dtype == torch.bfloat16
    assert model.output_direction(" girl").dtype == torch.float32
    assert model.bilinear_tensor(0).left.dtype == torch.float32
    saved = bl.HookedBilinearTransformer.from_pretrained("tinystories-1l", dtype="auto")
    assert saved.W_E.dtype == torch.bfloat16
    saved.save_pretrained(tmp_path / "saved")
    again = load_file(tmp_path / "saved" / "model.safetensors")
    assert again["model.embed_tokens.weight"].dtype == torch.bfloat16


def fault(call, error=ValueError) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def test_bad_tokens_and_directions_are_named(model, as_users):
    several = fault(lambda: model.output_direction(" girlfriendship"))
    assert "is not one token of this model" in several and "' friendship'" in several
    assert "' girl'" in fault(lambda: model.output_direction("girl"))
    assert "is not one token" in fault(lambda: model.output_direction(""))
    assert "single token" in fault(lambda: model.output_direction((" she", " he"), " it"))
    for token in (-1, 4096):
        assert f"Token id {token}" in fault(lambda token=token: model.output_direction(token))
    assert "' zebras'" in fault(lambda: model.output_direction((" girl", " zebras")))
    assert "d_model=256" in fault(lambda: model.output_direction(torch.ones(255)))
    assert "zero" in fault(lambda: model.output_direction(torch.zeros(256)))
    assert "zero" in fault(lambda: model.output_direction((" girl", " girl")))
    assert "not finite" in fault(lambda: model.output_direction(torch.ones(256) / 0))
    for layer in (-1, 1):
        assert f"layer={layer}" in fault(lambda layer=layer: model.bilinear_tensor(layer))
    assert "256 coordinates" in fault(lambda: model.bilinear_tensor(0).eigh(0, k=257))


def test_bad_prompts_are_named(model):
    assert "empty prompt" in fault(lambda: model(""))
    assert "empty prompt" in fault(lambda: model.to_tokens([]))
    assert "empty prompt" in fault(lambda: model(torch.zeros(1, 0, dtype=torch.long)))
    assert "empty prompt" in fault(lambda: model.generate("", max_new_tokens=2, verbose=False))
    long = "Once upon a time " * 100
    assert "context is 256" in fault(lambda: model(long))
    assert "context is 256" in fault(lambda: model(torch.zeros(1, 257, dtype=torch.long)))
    assert model.to_tokens(long, truncate=True).shape == (1, 256)


def word_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def test_an_unknown_word_is_not_the_unknown_token():
    tokenizer = word_tokenizer("[UNK]", "the", "girl")
    model = bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS["llama"]), tokenizer)
    assert model.token_id("girl") == 2 and model.token_id("[UNK]") == 0
    assert "it reads as ['[UNK]']" in fault(lambda: model.token_id("zebra"))
    assert len(tokenizer) == 3  # the caller's own is left alone


def test_a_tokenizer_of_another_model_is_named():
    tokenizer = word_tokenizer("[UNK]", *(f"w{i}" for i in range(50)))
    plain = random_model(CONFIGS["llama"])
    message = fault(lambda: bl.HookedBilinearTransformer.from_hf(plain, tokenizer))
    assert "ids up to 50, but the model has 37" in message
    model = bl.HookedBilinearTransformer.from_hf(plain)
    assert "Token ids" in fault(lambda: model(torch.tensor([[37]])))


def test_without_folding_or_a_tokenizer_only_what_needs_them_fails():
    raw = bl.HookedBilinearTransformer.from_pretrained("tinystories-1l", fold=False)
    assert "fold=True" in fault(lambda: raw.output_direction(" girl"))
    assert "fold=True" in fault(raw.token_basis)
    assert raw.bilinear_tensor(0).d_in == 256
    mute = bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS["llama"]))
    assert "tokenizer" in fault(lambda: mute.output_direction(" girl"))
    assert "tokenizer" in fault(lambda: mute("Once"))
    assert mute.token_basis().labels[5] == "#5"
    assert mute.output_direction(5).shape == (24,)
    assert len(bl.interactions(mute, 5, layer=1, k=2, n_tokens=3).to_pandas()) == 12
