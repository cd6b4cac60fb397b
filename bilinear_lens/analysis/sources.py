"""What can reach the input of an MLP, as bases: tokens, tokens through a head, earlier MLPs."""

import re
from collections.abc import Sequence

import torch

from bilinear_lens.analysis.nodes import into_stream
from bilinear_lens.basis import Basis
from bilinear_lens.models.transformer import HookedBilinearTransformer

MODES = 32
"""Output directions of an earlier MLP that are listed."""


@torch.no_grad()
def source_basis(model: HookedBilinearTransformer, source: str, *, layer: int) -> Basis:
    """The directions by which a source reaches the input of layer `layer`'s MLP.

    Each is as the MLP would see it beside a token's embedding of the usual size, with attention
    whole: what a source adds to the residual stream, over the root mean square of the embedding.

    Args:
        source: `embedding`, each token at the MLP's own position, as `token_basis` has it; a head,
            `L0H3`, each token that it attends to, straight from its embedding; an earlier MLP,
            `MLP 1`, its output directions by HOSVD, a standard deviation each for isotropic
            inputs.

    Raises:
        ValueError: if there is no such source, or it comes after the MLP.
    """
    tensor = model.bilinear_tensor(layer)
    if source == "embedding":
        return Basis(model.token_directions(range(model.cfg.d_vocab)), _quoted(model))
    head, mlp = re.fullmatch(r"L(\d+)H(\d+)", source), re.fullmatch(r"MLP (\d+)", source)
    scale = model.embedded(range(model.cfg.d_vocab)).square().mean().sqrt()
    if head:
        at, number = map(int, head.groups())
        if at > layer or number >= model.cfg.n_heads:
            raise ValueError(
                f"source={source!r} does not reach layer {layer}'s MLP: heads 0 to "
                f"{model.cfg.n_heads - 1} of layers 0 to {layer} do."
            )
        rows = model.token_directions(range(model.cfg.d_vocab)) @ model.head_weight(at, number)
        rows = rows * into_stream(model, at, "attn")
        return Basis(rows / scale, [f"{token} via {source}" for token in _quoted(model)])
    if mlp is None:
        raise ValueError(
            f"source={source!r} must be 'embedding', a head such as 'L0H3', or an earlier MLP such "
            "as 'MLP 0'."
        )
    at = int(mlp.group(1))
    if at >= layer:
        raise ValueError(
            f"source={source!r} does not reach layer {layer}'s MLP: only earlier ones do."
        )
    modes = model.bilinear_tensor(at).hosvd(min(MODES, tensor.d_out))
    rows = modes.directions * (2**0.5 * modes.singular_values / scale)[:, None]
    rows = rows * into_stream(model, at, "mlp")
    return Basis(rows, [f"{source}, direction {i}" for i in range(len(rows))])


def join(bases: Sequence[Basis]) -> Basis:
    """Bases one after the other."""
    labels = [label for basis in bases for label in basis.labels]
    return Basis(torch.cat([basis.directions for basis in bases]), labels)


def _quoted(model: HookedBilinearTransformer) -> list[str]:
    return [repr(label) for label in model.token_labels]
