"""The layout in which the bilinear papers' authors publish language models, and a stock Llama.

The only file that knows it.
"""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

KEYS = ("n_head", "n_layer", "n_ctx", "d_model", "d_hidden", "bilinear")
"""By these keys of its config the layout is recognised."""

TOKENIZERS = {
    "ts-4096": "tdooms/ts-tokenizer-4096",
    "mistral": "mistral-community/Mixtral-8x22B-v0.1",
}
"""Where the short names in the configs live on the Hub; others stand for themselves."""

THIS_FOLDER = "."
"""What a config of ours has for a tokenizer whose files lie beside it."""

GATES = ("linear", "relu", "silu", "gelu")

EPSILON = 1e-8
"""Of their norms."""

NO_NORM_EPSILON = 1e12
"""So large that a norm divides by its root, whatever the input."""

SAME_MATHEMATICS = ("LlamaForCausalLM", "MistralForCausalLM")
"""Architectures that the layout can hold; others scale, norm or bias what it does not."""


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
    epsilon = EPSILON if has_norm else NO_NORM_EPSILON
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


@torch.no_grad()
def from_llama(model: PreTrainedModel) -> tuple[dict, dict[str, Tensor]]:
    """Config and state dict, in their layout, of a stock Llama with the same logits.

    Exact up to float32's rounding, in which the weights are given:

    - The gains of norms go into the weights that read them. A tied unembedding is untied.
    - Their norms' epsilon is 1e-8. With another, all that is written to the residual stream is
      multiplied by `s = sqrt(1e-8 / eps)`: the norm of `s x` with 1e-8 is that of `x` with `eps`,
      and nothing reads the stream but through a norm.
    - Their attention's output is scaled by `1 / sqrt(2 n_layer)`, which is divided out.
    - Grouped keys and values are repeated, one for each head.

    Args:
        model: a `LlamaForCausalLM`, or a `MistralForCausalLM` whose window spans its context.

    Raises:
        ValueError: if the layout has no place for what the model does.
    """
    _check_expressible(model)
    config = model.config
    n_heads, n_layers = config.num_attention_heads, config.num_hidden_layers
    d_head = config.hidden_size // n_heads
    ours = {name: weight.detach().float().cpu() for name, weight in model.state_dict().items()}
    epsilon = config.rms_norm_eps
    has_bias, has_norm = "model.layers.0.mlp.up_proj.bias" in ours, epsilon < NO_NORM_EPSILON
    scale = (EPSILON / epsilon) ** 0.5 if has_norm else 1.0
    divisor = 1.0 if has_norm else epsilon**0.5  # what such a norm divides by, as a gain

    def read(name: str, norm: str) -> Tensor:
        return ours[f"{name}.weight"] * (ours[f"{norm}.weight"] / divisor)

    def each_head(weight: Tensor) -> Tensor:
        heads = weight.unflatten(0, (config.num_key_value_heads, d_head))
        return heads.repeat_interleave(n_heads // len(heads), dim=0).flatten(0, 1)

    theirs = {
        "transformer.wte.weight": ours["model.embed_tokens.weight"] * scale,
        "lm_head.weight": read("lm_head", "model.norm"),
    }
    for layer in range(n_layers):
        block, to = f"model.layers.{layer}.", f"transformer.h.{layer}."
        q, k, v = (
            read(f"{block}self_attn.{x}_proj", block + "input_layernorm") for x in ("q", "k", "v")
        )
        left, right = (
            read(f"{block}mlp.{x}_proj", block + "post_attention_layernorm") for x in ("gate", "up")
        )
        output = ours[block + "self_attn.o_proj.weight"] * (scale * (2 * n_layers) ** 0.5)
        theirs |= {
            to + "attn.qkv.weight": torch.cat([q, each_head(k), each_head(v)]),
            to + "attn.o.weight": output,
            to + "attn.rotary.inv_freq": 10000 ** (-torch.arange(0, d_head, 2) / d_head),
            to + "mlp.w.weight": torch.cat([left, right]),
            to + "mlp.p.weight": ours[block + "mlp.down_proj.weight"] * scale,
        }
        if has_bias:
            biases = [ours[f"{block}mlp.{x}_proj.bias"] for x in ("gate", "up")]
            theirs[to + "mlp.w.bias"] = torch.cat(biases)
    return {
        "n_head": n_heads,
        "n_layer": n_layers,
        "n_ctx": config.max_position_embeddings,
        "d_model": config.hidden_size,
        "d_hidden": config.intermediate_size,
        "bilinear": True,
        "gate": None if config.hidden_act == "linear" else config.hidden_act,
        "bias": has_bias,
        "normalization": has_norm,
        "tokenizer": None,
    }, theirs


def _check_expressible(model: PreTrainedModel) -> None:
    """Refuse what their layout cannot say.

    Raises:
        ValueError: naming what the model has, and what the layout asks for.
    """
    config, architecture = model.config, type(model).__name__
    remedy = "Keep it in the Hugging Face layout."
    if architecture not in SAME_MATHEMATICS:
        raise ValueError(
            f"This is a {architecture}; the authors' layout has a place for the mathematics of "
            f"{' and '.join(SAME_MATHEMATICS)}. {remedy}"
        )
    d_model, n_heads = config.hidden_size, config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or d_model // n_heads
    n_ctx, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    biases = [
        name
        for name, weight in model.named_parameters()
        if name.endswith(".bias")
        and not name.endswith(("gate_proj.bias", "up_proj.bias"))
        and weight.any()
    ]
    if d_head * n_heads != d_model:
        has, asks = f"heads of width {d_head}", f"d_model / n_head = {d_model} / {n_heads}"
    elif biases:
        has, asks = f"a non-zero {biases[0]}", "biases of the gate and up projections alone"
    elif config.rope_parameters != {"rope_type": "default", "rope_theta": 10000}:
        has, asks = f"rotary embeddings of {config.rope_parameters}", "base 10000, not scaled"
    elif window and window < n_ctx:
        has, asks = f"a sliding window of {window}", f"attention to its whole context of {n_ctx}"
    elif config.hidden_act not in GATES:
        has, asks = f"the activation {config.hidden_act!r}", f"one of {', '.join(GATES)}"
    elif config.rms_norm_eps <= 0:
        has, asks = f"rms_norm_eps={config.rms_norm_eps}", "an epsilon above zero"
    else:
        return
    raise ValueError(f"This model has {has}; the authors' layout asks for {asks}. {remedy}")
