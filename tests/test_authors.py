"""From a stock Llama to the layout of the bilinear papers' authors, and back."""

import json
import math
from typing import Any

import pytest
import torch
from models import CONFIGS, GROUPED, LINEAR, SIZES, random_model
from safetensors.torch import load_file
from test_checkpoints import AUTHORS, authors_forward, authors_weights, write
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, PreTrainedModel

import bilinear_lens as bl
from bilinear_lens.models.authors import from_llama, to_llama
from bilinear_lens.models.checkpoints import built_in, load_checkpoint, save_checkpoint

TOKENS = torch.tensor([3, 14, 15, 9, 2, 6, 5, 35])


def difference(actual: Tensor, expected: Tensor) -> float:
    """Relative to the largest logit."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(TOKENS[None]).logits[0].double()


def read_plainly(config: dict, weights: dict[str, Tensor]) -> Tensor:
    """The logits by the layout's description, in float64."""
    return authors_forward(config, {name: w.double() for name, w in weights.items()}, TOKENS)


@pytest.mark.parametrize(
    "change", [{}, {"bias": True}, {"normalization": False}, {"gate": "silu"}], ids=str
)
def test_there_and_back_again(change):
    config = AUTHORS | change
    weights = authors_weights(config)
    expected = read_plainly(config, weights)
    model = to_llama(config, weights)
    for _ in range(2):
        their_config, theirs = from_llama(model)
        shared = AUTHORS.keys() - {"tokenizer", "repo"}
        assert {name: their_config[name] for name in shared} == {
            name: config[name] for name in shared
        }
        assert difference(read_plainly(their_config, theirs), expected) < 1e-5
        model = to_llama(their_config, theirs)
        assert difference(logits(model), expected) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, **GROUPED, **LINEAR, rms_norm_eps=1e-5, tie_word_embeddings=True),
        LlamaConfig(**SIZES, **LINEAR, rms_norm_eps=1e-10, mlp_bias=True),
        MistralConfig(**SIZES, **GROUPED, hidden_act="relu", rms_norm_eps=1e-5),
    ],
    ids=["llama-grouped-tied", "llama-biases", "mistral-relu"],
)
def test_gains_epsilon_groups_and_ties_are_carried_over(config):
    model = random_model(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("down_proj.bias"):
                weight.zero_()
            if "embed_tokens" in name or "o_proj" in name or "down_proj.weight" in name:
                weight *= 0.01  # so that the epsilon matters
    expected = logits(model)
    their_config, theirs = from_llama(model)
    assert difference(read_plainly(their_config, theirs), expected) < 1e-5
    assert difference(logits(to_llama(their_config, theirs)), expected) < 1e-5

    scale = math.sqrt(1e-8 / config.rms_norm_eps)
    not_scaled = {
        name: weight / scale if name.endswith(("wte.weight", "o.weight", "p.weight")) else weight
        for name, weight in theirs.items()
    }
    error = difference(read_plainly(their_config, not_scaled), expected)
    assert error > (0.05 if config.rms_norm_eps > 1e-8 else 1e-4)


def test_a_saved_folder_has_its_tokenizer(tmp_path):
    model, tokenizer = load_checkpoint(built_in("tinystories-1l"))
    assert tokenizer is not None
    save_checkpoint(model, tokenizer, tmp_path / "theirs", layout="authors")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert "model_type" not in config and config["bilinear"] and config["gate"] is None
    hooked = bl.HookedBilinearTransformer.from_pretrained(tmp_path / "theirs")
    assert hooked.token_id(" girl") == tokenizer.convert_tokens_to_ids("\u0120girl")
    assert difference(hooked(TOKENS[None])[0].log_softmax(-1), logits(model).log_softmax(-1)) < 1e-5
    again = load_file(tmp_path / "theirs" / "model.safetensors")
    assert {weight.dtype for weight in again.values()} == {torch.float32}


def llama(**change) -> LlamaConfig:
    return LlamaConfig(**{**SIZES, **LINEAR, **change})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CONFIGS["qwen2-tied"], "Qwen2ForCausalLM"),
        (CONFIGS["granite"], "GraniteForCausalLM"),
        (CONFIGS["llama"], "heads of width 8"),
        (llama(attention_bias=True), "non-zero model.layers.0.self_attn"),
        (llama(mlp_bias=True), "non-zero model.layers.0.mlp.down_proj.bias"),
        (llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), "500000"),
        (
            llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
            "'linear'",
        ),
        (MistralConfig(**SIZES, **GROUPED, **LINEAR, sliding_window=31), "sliding window of 31"),
        (llama(hidden_act="gelu_new"), "activation 'gelu_new'"),
        (llama(rms_norm_eps=0.0), "rms_norm_eps=0.0"),
    ],
)
def test_what_the_layout_cannot_say_is_refused(config, message, tmp_path):
    model = random_model(config)
    with pytest.raises(ValueError, match=message) as refusal:
        save_checkpoint(model, None, tmp_path / "theirs", layout="authors")
    assert "Keep it in the Hugging Face layout" in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_a_window_that_spans_the_context_and_zero_biases_are_no_obstacle():
    for config in (
        MistralConfig(**SIZES, **GROUPED, **LINEAR, sliding_window=32),
        llama(attention_bias=True),
    ):
        model = random_model(config)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(".bias"):
                    weight.zero_()
        assert difference(read_plainly(*from_llama(model)), logits(model)) < 1e-5


def test_there_are_two_layouts(tmp_path, as_users):
    unknown: Any = "gguf"
    with pytest.raises(ValueError, match="one of hugging-face, authors"):
        save_checkpoint(random_model(llama()), None, tmp_path / "x", layout=unknown)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_beside_comes_before_one_by_name(tmp_path):
    config = AUTHORS | {"tokenizer": "nobody/nothing"}
    weights = authors_weights(config)
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = torch.randn(4096, 24, generator=torch.Generator().manual_seed(0))
    folder = write(tmp_path / "theirs", config, weights)
    assert load_checkpoint(folder)[1] is None
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((built_in("tinystories-1l") / name).read_bytes())
    _, tokenizer = load_checkpoint(folder)
    assert tokenizer is not None and len(tokenizer) == 4096
