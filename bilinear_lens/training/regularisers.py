"""Regularisers for language models, on stock Hugging Face models."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def latent_noise(model: PreTrainedModel, std: float) -> Iterator[None]:
    """Within, Gaussian noise on what each attention, each MLP and the unembedding read.

    In training mode only, so that evaluation is as without, and drawn from torch's own generators,
    which the Trainer seeds and saves. A layer that gradient checkpointing computes again draws the
    same noise again. Afterwards no hook is left (arXiv 2406.03947, whose models have .33).

    Args:
        model: with `self_attn` and `mlp` in each layer, as in Llama, Mistral, Qwen 2 and 3, Gemma.
        std: the noise's standard deviation, relative to the activation's own at that position.

    Raises:
        ValueError: if `std` is out of range, or the model has other parts.
    """
    if not 0 <= std < math.inf:
        raise ValueError(f"latent_noise={std} must be 0 or more, and finite.")
    handles = [
        reader.register_forward_pre_hook(_add_noise(std), with_kwargs=True)
        for reader in (_readers(model) if std else [])
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _readers(model: PreTrainedModel) -> list[nn.Module]:
    """What reads the residual stream through a norm: each attention, each MLP, the unembedding."""
    found = [part for name, part in model.named_modules() if name.endswith((".self_attn", ".mlp"))]
    unembedding = model.get_output_embeddings()
    n_layers = model.config.get_text_config().num_hidden_layers
    if len(found) != 2 * n_layers or unembedding is None:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} parts named self_attn or mlp in {n_layers} "
            "layers: latent noise needs one of each in every layer, and an unembedding, as in "
            "Llama, Mistral, Qwen 2 and 3 and Gemma."
        )
    return [*found, unembedding]


def _add_noise(std: float):
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if not module.training:
            return None
        if args:
            return (noisy(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": noisy(kwargs["hidden_states"])}

    def noisy(x: Tensor) -> Tensor:
        return x + std * x.detach().std(dim=-1, keepdim=True) * torch.randn_like(x)

    return hook
