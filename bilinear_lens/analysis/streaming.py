"""Activations of a model on text, a batch at a time."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from bilinear_lens.models.activations import activations_at

BATCH = 2048
"""Tokens that are run at once."""


def stream(
    model: TransformerBridge,
    windows: Int[Tensor, "n n_tokens"],
    hooks: Sequence[str],
    *,
    title: str,
    batch: int = BATCH,
) -> Iterator[dict[str, Tensor]]:
    """The activations at some hook points, `[windows, pos, ...]` in float32, for each batch.

    Args:
        title: of the progress bar.
        batch: tokens that are run at once, at least a window.

    Raises:
        ValueError: if an activation holds NaN or infinite entries.
    """
    size = max(1, batch // windows.shape[1])
    for some in tqdm(windows.split(size), desc=title, leave=False):
        with torch.no_grad():
            seen = activations_at(model, some, hooks)
        yield {name: activation.float() for name, activation in seen.items()}
