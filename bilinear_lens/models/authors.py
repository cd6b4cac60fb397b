"""The layout in which the bilinear papers' authors publish language models, as a stock Llama.

The only file that knows it.
"""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

KEYS = ("n_head", "n_layer", "n_ctx", "d_model", "d_hidden", "bilinear")
"""By these keys of its config the layout is recognised."""

TOKENIZERS = {
    "ts-4096": "tdooms/ts-tokenizer-4096",
    "mistral": "mistral-community/Mixtral-8x22B-v0.1",
}
"""Where the short names in the configs live on the Hub; others stand for themselves."""

GATES = ("linear", "relu", "silu", "gelu")


def to_llama(config: dict, weights: dict[str, Tensor]) -> LlamaForCausalLM:
    """The paper's authors' language model as a stock Llama, with the same logits.

    Their attention output is scaled by `1 / sqrt(2 n_layer)`, which goes into the output
    projection. Their norms have no weight, which a weight of 1 is; where they have no norm, one
    with a huge epsilon and a weight of its root divides and multiplies by the same number, exactly
    up to rounding.

    Args:
        config: their `config.json` (public repository tdooms/bilinear-decomposition).
        weights: their state dict.

    Raises:
        ValueError: if the MLPs are not bilinear, or config and weights contradict each other.
    """
    for name in ("n_head", "n_layer", "n_ctx", "d_model", "d_hidden"):
        if not isinstance(config[name], int) or config[name] < 1:
            raise ValueError(f"{name} is {config[name]!r} in the config: it must be 1 or more.")
    if config["d_model"] % config["n_head"]:
        raise ValueError(
            f"d_model={config['d_model']} in the config is no multiple of "
            f"n_head={config['n_head']}."
        )
    gate = config.get("gate") or "linear"
    if gate not in GATES:
        raise ValueError(f"gate is {gate!r} in the config: it must be null or {GATES[1:]}.")
    if not config["bilinear"]:
        raise ValueError(
            "This checkpoint has plain MLPs (bilinear: false in its config); a bilinear lens needs "
            "bilinear ones."
        )
    d_model, d_hidden, n_layers = config["d_model"], config["d_hidden"], config["n_layer"]
    has_bias, has_norm = bool(config.get("bias")), config.get("normalization", True)
    epsilon = 1e-8 if has_norm else 1e12
    gain = torch.ones(d_model) * (1.0 if has_norm else epsilon**0.5)
    weights = {
        name: weight
        for name, weight in weights.items()
        if "norm" not in name and not name.endswith("rotary.inv_freq")
    }

    def take(name: str, *shape: int) -> Tensor:
        if name not in weights:
            raise ValueError(f"The checkpoint has no {name}, which its config asks for.")
        weight = weights.pop(name)
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(weight.shape)}; the config asks for {list(shape)}."
            )
        return weight.float()

    n_vocab = len(weights.get("transformer.wte.weight", ()))
    state = {
        "model.embed_tokens.weight": take("transformer.wte.weight", n_vocab, d_model),
        "lm_head.weight": take("lm_head.weight", n_vocab, d_model),
        "model.norm.weight": gain,
    }
    for layer in range(n_layers):
        theirs, ours = f"transformer.h.{layer}.", f"model.layers.{layer}."
        qkv = take(theirs + "attn.qkv.weight", 3 * d_model, d_model).chunk(3)
        output = take(theirs + "attn.o.weight", d_model, d_model) / (2 * n_layers) ** 0.5
        left, right = take(theirs + "mlp.w.weight", 2 * d_hidden, d_model).chunk(2)
        state |= {ours + f"self_attn.{x}_proj.weight": w for x, w in zip("qkv", qkv, strict=True)}
        state |= {
            ours + "self_attn.o_proj.weight": output,
            ours + "mlp.gate_proj.weight": left,
            ours + "mlp.up_proj.weight": right,
            ours + "mlp.down_proj.weight": take(theirs + "mlp.p.weight", d_model, d_hidden),
            ours + "input_layernorm.weight": gain,
            ours + "post_attention_layernorm.weight": gain,
        }
        if has_bias:
            left_bias, right_bias = take(theirs + "mlp.w.bias", 2 * d_hidden).chunk(2)
            state |= {
                ours + "mlp.gate_proj.bias": left_bias,
                ours + "mlp.up_proj.bias": right_bias,
                ours + "mlp.down_proj.bias": torch.zeros(d_model),
            }
    if weights:
        raise ValueError(f"The checkpoint has weights that its config has no use for: {[*weights]}")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=n_vocab,
            hidden_size=d_model,
            intermediate_size=d_hidden,
            num_hidden_layers=n_layers,
            num_attention_heads=config["n_head"],
            max_position_embeddings=config["n_ctx"],
            hidden_act=gate,
            mlp_bias=has_bias,
            rms_norm_eps=epsilon,
            tie_word_embeddings=False,
        )
    )
    model.load_state_dict(state)
    return model.eval()
