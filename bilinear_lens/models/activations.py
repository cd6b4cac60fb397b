"""Activations at hook points: read some, or let a model go on with others."""

import re
from collections.abc import Callable, Iterable

from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

Hooks = list[tuple[str | Callable, Callable]]
"""As TransformerLens types them; ours name their hook by a string."""


def activations_at(
    model: TransformerBridge, tokens: Int[Tensor, "n pos"], hooks: Iterable[str]
) -> dict[str, Tensor]:
    """The activations at some hook points; nothing is computed above the last of them.

    Raises:
        ValueError: if one holds NaN or infinite entries.
    """
    names, seen = set(hooks), {}
    with model.hooks(fwd_hooks=[(name, _keeping(seen, name)) for name in names]):
        model(tokens, return_type=None, stop_at_layer=_layer_above(names))
    for name, activation in seen.items():
        if not activation.isfinite().all():
            raise ValueError(
                f"The activation at {name} of {model.cfg.model_name} holds NaN or infinite "
                "entries: repair the model, or load it in a wider dtype."
            )
    return seen


def _layer_above(hooks: Iterable[str]) -> int | None:
    """The first layer that some hook points do not need; None where one is of no layer."""
    layers = [re.match(r"blocks\.(\d+)\.", hook) for hook in hooks]
    return max(int(match[1]) for match in layers if match) + 1 if all(layers) else None


def replacing(function: Callable[[Tensor], Tensor], hook_in: str, hook_out: str) -> Hooks:
    """Hooks by which the activation at `hook_out` becomes `function` of that at `hook_in`."""
    if hook_in == hook_out:
        return [(hook_in, lambda x, hook: function(x).to(x))]
    seen: dict[str, Tensor] = {}

    def replace(out: Tensor, hook: object) -> Tensor:
        return function(seen.pop(hook_in)).to(out)

    return [(hook_in, _keeping(seen, hook_in)), (hook_out, replace)]


def _keeping(seen: dict[str, Tensor], name: str) -> Callable[[Tensor, object], None]:
    """A hook that keeps what passes it by the name that was asked for, of several that it has."""

    def keep(x: Tensor, hook: object) -> None:
        seen[name] = x

    return keep
