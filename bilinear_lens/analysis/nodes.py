"""What circuits are made of: directions that are read at places of a model, and what writes there.

A node reads a unit direction of the residual stream, `reads`, and writes along the directions of
the nodes above it. What it writes is a weight, which belongs to the edge, times its activation:

- `embedding`: what it reads of the token's embedding
- `head`: what it reads where the head attends, summed by the attention pattern
- `eigenvector` of an MLP: the square of what it reads; the weight is its eigenvalue
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bilinear_lens.models.transformer import HookedBilinearTransformer

Kind = Literal["output", "eigenvector", "head", "embedding", "MLP"]


@dataclass(frozen=True)
class Place:
    """Where in a model something is."""

    kind: Kind
    """`MLP` is all eigenvectors of one together."""
    layer: int
    """Of an MLP or a head; -1 of the embedding, the number of layers of an output."""
    head: int | None = None
    position: int | None = None
    """On a prompt: where it reads."""

    @property
    def height(self) -> tuple[int, bool]:
        """By which places are ordered: what is above reads what is below."""
        return self.layer, self.kind == "eigenvector"


@dataclass(eq=False)
class Node:
    """Something that reads a direction and writes along those that the nodes above it read."""

    place: Place
    reads: Float[Tensor, " d_model"]
    """Of unit length; of the residual stream before its norm, which then divides by its scale."""
    index: int | None = None
    """Of an eigenvector, in the order of its spectrum."""
    constant: float = 0.0
    """Of an eigenvector of a layer with biases: what it reads besides."""
    score: float = 0.0
    """The share of the output that comes through it."""

    @property
    def name(self) -> str:
        """`L0H3`, `MLP 1 e4`, on a prompt with its position, `L0H3@5`."""
        at = self.place
        names = {"head": f"L{at.layer}H{at.head}", "eigenvector": f"MLP {at.layer} e{self.index}"}
        name = names.get(at.kind, at.kind)
        return name if at.position is None else f"{name}@{at.position}"


@dataclass(frozen=True, eq=False)
class Edge:
    """What a node writes along the direction that the node above it reads."""

    lower: Node
    upper: Node
    weight: float
    """Times the lower node's activation is what it writes, but for norm scales."""
    share: float
    """Of what the upper node reads."""

    @property
    def score(self) -> float:
        """The share of the output."""
        return self.share * self.upper.score


def check_precision(model: HookedBilinearTransformer) -> None:
    """Refuse weights finer than what circuits are computed in.

    Raises:
        ValueError: if the model is float64.
    """
    if model.cfg.dtype == torch.float64:
        raise ValueError(
            f"{model.cfg.model_name} is float64, and circuits are read in float32: load it with "
            "dtype=torch.float32."
        )


def gain(model: HookedBilinearTransformer, layer: int, norm: str) -> Tensor | float:
    """What a block's norm multiplies by, but for its scale: ones where it is folded or absent."""
    module = getattr(model.blocks[layer], norm, None)
    return model.norm_gain(module) if isinstance(module, nn.Module) else 1.0


def into_stream(model: HookedBilinearTransformer, layer: int, after: str) -> Tensor | float:
    """What a block's `attn` or `mlp` output is multiplied by on its way to the residual stream."""
    norm = {"attn": "ln1_post", "mlp": "ln2_post"}[after]
    return gain(model, layer, norm) * getattr(model.cfg, "residual_multiplier", 1.0)


def head_reads(
    model: HookedBilinearTransformer, layer: int, along: Float[Tensor, " d_model"]
) -> Float[Tensor, "head d_model"]:
    """What each head of a layer reads of the residual stream to write along a direction."""
    out = model.blocks[layer].attn.W_O.float()
    inner = out @ (along * into_stream(model, layer, "attn"))
    return (model.head_values(layer) @ inner[..., None])[..., 0] * gain(model, layer, "ln1")


def eigenvector_node(
    model: HookedBilinearTransformer, place: Place, vector: Float[Tensor, " d_in"], index: int
) -> tuple[Node, float]:
    """The node of an eigenvector, and by what its eigenvalue is multiplied for a unit direction."""
    d_model = model.cfg.d_model
    reads = vector[:d_model] * gain(model, place.layer, "ln2")
    length = reads.norm().item()
    constant = vector[-1].item() / length if len(vector) > d_model else 0.0
    return Node(place, reads / length, index, constant), length**2


def unit(
    place: Place, reads: Float[Tensor, " d_model"], index: int | None = None
) -> tuple[Node, float]:
    """The node that reads along a direction, and the direction's length."""
    length = reads.norm().item()
    return Node(place, reads / max(length, torch.finfo(reads.dtype).tiny), index), length
