"""Tiny random models: every architecture, all sizes different."""

import copy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import bilinear_lens as bl
from bilinear_lens.models.checkpoints import built_in

SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
DECOUPLED: dict[str, Any] = {**GROUPED, "head_dim": 8}  # heads together wider than the model
LINEAR: dict[str, Any] = {"hidden_act": "linear"}

CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, **DECOUPLED, **LINEAR),
    "llama-biases": LlamaConfig(**SIZES, **LINEAR, mlp_bias=True, attention_bias=True),
    "mistral": MistralConfig(**SIZES, **DECOUPLED, **LINEAR),
    "qwen2-tied": Qwen2Config(**SIZES, **GROUPED, **LINEAR, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, **DECOUPLED, **LINEAR),
    "gemma-tied": GemmaConfig(**SIZES, **DECOUPLED, **LINEAR),
    "gemma2-tied": Gemma2Config(**SIZES, **DECOUPLED, hidden_activation="linear"),
    "gemma3-tied": Gemma3TextConfig(**SIZES, **DECOUPLED, hidden_activation="linear"),
    "olmo2": Olmo2Config(**SIZES, **GROUPED, **LINEAR),
    "granite": GraniteConfig(**SIZES, **GROUPED, **LINEAR),
    "phi3": Phi3Config(**SIZES, **GROUPED, **LINEAR),
}


def random_model(config: PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Large weights, gains and biases, so that a part left out or taken twice shows."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.3 * noise)
            else:
                weight.copy_(noise if "bias" in name else 0.1 * noise)
    return model


def some_tokens(seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, SIZES["vocab_size"], (2, 11), generator=generator)


def gated(name: str, **changes: Any) -> PretrainedConfig:
    """One of `CONFIGS` with the activation that its architecture has, and other changes."""
    config = copy.deepcopy(CONFIGS[name])
    for field in ("hidden_act", "hidden_activation"):
        if getattr(config, field, None) is not None:
            setattr(config, field, "gelu_pytorch_tanh" if "gemma" in name else "silu")
    for field, value in changes.items():
        setattr(config, field, value)
    return config


def loaded_with_report(folder) -> tuple[Any, dict[str, Any]]:
    """A saved model, and which weights its folder had too many or too few."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return loaded


def reading_model(seed: int = 0) -> Any:
    """A small random bilinear model, hooked, that can read text."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(built_in("stories260k"))
    config = LlamaConfig(**{**SIZES, "vocab_size": 512}, **LINEAR, mlp_bias=True)
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return bl.HookedBilinearTransformer.from_hf(model, tokenizer)
