"""The component on each architecture, against the Hugging Face model, which knows no folding."""

import copy

import pytest
import torch
from models import CONFIGS, SIZES, random_model, some_tokens
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import GPT2Config, LlamaConfig, MixtralConfig, StableLmConfig

import bilinear_lens as bl
from bilinear_lens.models.activations import Hooks

FORMS = ("raw", "unfolded", "folded")
architectures = pytest.mark.parametrize("name", CONFIGS)


def hooked(name: str, form: str) -> bl.HookedBilinearTransformer:
    model = bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS[name]), fold=form == "folded")
    if form == "unfolded":
        model.enable_compatibility_mode(no_processing=True, disable_warnings=True)
    return model


def log_probs(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(tokens)
    return getattr(out, "logits", out).log_softmax(-1)


@architectures
@pytest.mark.parametrize("form", FORMS)
def test_log_probabilities_are_those_of_hugging_face(name, form, record_property):
    tokens = some_tokens()
    expected = log_probs(random_model(CONFIGS[name]), tokens)
    difference = (log_probs(hooked(name, form), tokens) - expected).abs().max().item()
    record_property("largest difference of log-probabilities", difference)
    assert difference < 1e-4


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2-tied", "qwen3", "gemma-tied"])
def test_the_stock_component_is_wrong_once_folded(name):
    """When this fails, TransformerLens was mended, and our component is no longer needed for it."""
    model, tokens = random_model(CONFIGS[name]), some_tokens()
    expected = log_probs(model, tokens)
    stock = build_bridge_from_module(model, type(model).__name__, hf_config=CONFIGS[name])
    stock.enable_compatibility_mode(disable_warnings=True)
    assert (log_probs(stock, tokens) - expected).abs().max() > 0.1


@architectures
@pytest.mark.parametrize("form", FORMS)
def test_the_tensor_is_what_the_mlp_computes(name, form):
    model = hooked(name, form)
    direction = torch.randn(SIZES["hidden_size"], generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        _, cache = model.run_with_cache(some_tokens())
    for layer in range(SIZES["num_hidden_layers"]):
        x = cache[f"blocks.{layer}.mlp.hook_in"]
        written = cache[f"blocks.{layer}.mlp.hook_out"]
        tensor = model.bilinear_tensor(layer)
        torch.testing.assert_close(tensor(x), written, atol=1e-4, rtol=1e-4)
        activations = tensor.eigh(direction).activations(x).sum(-1)
        torch.testing.assert_close(activations, written @ direction, atol=1e-4, rtol=1e-4)
        other = model.bilinear_tensor((layer + 1) % 3)
        assert not torch.allclose(other(x), written, atol=1e-2)


@architectures
def test_a_tensor_reads_the_block_output_except_behind_another_norm(name):
    model = hooked(name, "folded")
    with torch.no_grad():
        _, cache = model.run_with_cache(some_tokens())
    same = torch.allclose(cache["blocks.1.mlp.hook_out"], cache["blocks.1.hook_mlp_out"])
    assert same == (name not in ("gemma2-tied", "gemma3-tied", "olmo2"))


@architectures
def test_cache_names_and_weights_are_those_of_transformer_lens(name):
    model = hooked(name, "folded")
    with torch.no_grad():
        _, cache = model.run_with_cache(some_tokens())
    prefix = "blocks.1.mlp."
    gate, into = cache[prefix + "hook_pre"], cache[prefix + "hook_pre_linear"]
    torch.testing.assert_close(cache[prefix + "hook_post"], gate * into)
    left, right, down = (getattr(model, name) for name in ("W_gate", "W_in", "W_out"))
    assert (left.shape, right.shape, down.shape) == ((3, 24, 28), (3, 24, 28), (3, 28, 24))
    tensor = model.bilinear_tensor(1)
    rank, d_in = 28, 24
    torch.testing.assert_close(tensor.left[:rank, :d_in], left[1].mT)
    torch.testing.assert_close(tensor.right[:rank, :d_in], right[1].mT)


@architectures
def test_generation_with_a_cache_is_greedy_choice(name):
    model, tokens = hooked(name, "folded"), some_tokens()[:1]
    generated = model.generate(tokens, max_new_tokens=6, do_sample=False, verbose=False)
    expected = tokens
    plain = random_model(CONFIGS[name])
    for _ in range(6):
        choice = log_probs(plain, expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, choice], dim=1)
        if choice.item() == SIZES["eos_token_id"]:
            break
    assert torch.equal(torch.as_tensor(generated), expected)


@architectures
def test_hooks_and_gradients_reach_the_mlp(name):
    model, tokens = hooked(name, "folded"), some_tokens()
    before = log_probs(model, tokens)
    zero: Hooks = [("blocks.2.mlp.hook_post", lambda x, hook: x * 0)]
    assert not torch.allclose(model.run_with_hooks(tokens, fwd_hooks=zero).log_softmax(-1), before)
    torch.testing.assert_close(log_probs(model, tokens), before)
    seen = {}
    with model.hooks(bwd_hooks=[("blocks.1.mlp.hook_in", lambda g, hook: seen.update(g=g))]):
        model(tokens).log_softmax(-1)[..., 3].sum().backward()
    assert seen["g"].abs().max() > 0
    assert model.blocks[1].mlp.out.weight.grad.abs().max() > 0


@architectures
@pytest.mark.parametrize("form", FORMS)
def test_a_deep_copy_is_a_model_of_its_own(name, form):
    model, tokens = hooked(name, form), some_tokens()
    expected = log_probs(model, tokens)
    other = copy.deepcopy(model)
    torch.testing.assert_close(log_probs(other, tokens), expected)
    with torch.no_grad():
        other.blocks[0].mlp.out.weight.neg_()
    assert not torch.allclose(log_probs(other, tokens), expected)
    torch.testing.assert_close(log_probs(model, tokens), expected)


@pytest.mark.parametrize("activation", ["linear", None, "identity"])
def test_every_way_to_write_a_linear_gate(activation):
    """Transformers knows "linear"; the others come from code that has its own modules."""
    plain = random_model(CONFIGS["llama"])
    tokens = some_tokens()
    expected = log_probs(plain, tokens)
    if activation != "linear":
        for layer in plain.model.layers:
            layer.mlp.act_fn = torch.nn.Identity()
        vars(plain.config)["hidden_act"] = activation
    model = bl.HookedBilinearTransformer.from_hf(plain)
    torch.testing.assert_close(log_probs(model, tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "tanh"])
def test_a_gate_with_an_activation_is_refused(activation):
    plain = random_model(LlamaConfig(**SIZES, hidden_act=activation))
    with pytest.raises(ValueError, match=r"activation.*bilinearize"):
        bl.HookedBilinearTransformer.from_hf(plain)


def test_an_activation_that_is_no_module_is_refused():
    plain = random_model(CONFIGS["llama"])
    for layer in plain.model.layers:
        layer.mlp._modules.pop("act_fn")
        layer.mlp.act_fn = torch.nn.functional.silu
    with pytest.raises(ValueError, match=r"Layer 0's MLP is not the product.*bilinearize"):
        bl.HookedBilinearTransformer.from_hf(plain)


def test_an_architecture_that_transformer_lens_gets_wrong_is_refused():
    """When this fails, TransformerLens was mended, and StableLM may be listed as tested."""
    config = StableLmConfig(**SIZES, num_key_value_heads=2, hidden_act="linear")
    with pytest.raises(ValueError, match="wires StableLmForCausalLM otherwise"):
        bl.HookedBilinearTransformer.from_hf(random_model(config))


def test_other_mlps_are_refused():
    gpt2 = GPT2Config(vocab_size=37, n_positions=32, n_embd=24, n_layer=2, n_head=4)
    with pytest.raises(ValueError, match="plain MLPs"):
        bl.HookedBilinearTransformer.from_config(gpt2)
    mixtral = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2)
    with pytest.raises(ValueError, match="mixture-of-experts MLPs"):
        bl.HookedBilinearTransformer.from_config(mixtral)


def test_weights_that_are_not_finite_are_refused():
    plain = random_model(CONFIGS["llama"])
    with torch.no_grad():
        plain.model.layers[1].mlp.up_proj.weight[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        bl.HookedBilinearTransformer.from_hf(plain)
