"""What reaches an MLP on a prompt: its input as an exact sum of what was written before.

With attention patterns and norm scales held at the prompt's values, all between two MLPs is linear:

- the residual stream is a sum of what the embedding, heads, MLPs and biases wrote
- what a head writes is a sum over the tokens that it attends to, and over what was written there
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.ActivationCache import ActivationCache

from bilinear_lens.analysis.nodes import Edge, Node, Place, check_precision, gain, into_stream
from bilinear_lens.models.transformer import HookedBilinearTransformer


class Part(NamedTuple):
    """A part of an MLP's input."""

    writer: str
    """`embedding`, `biases`, `MLP 1`, or a head, `L1H3`."""
    position: int | None = None
    """Of a head: where it read."""
    read: str | None = None
    """Of a head: the writer of what it read there, or `composed`: all but the embedding."""


@dataclass(frozen=True, eq=False)
class FrozenRun:
    """A run on prompts of equal length, with attention patterns and norm scales held."""

    model: HookedBilinearTransformer
    tokens: Int[Tensor, "batch pos"]

    @cached_property
    def cache(self) -> ActivationCache:
        """Raises ValueError if the model is float64, or an activation not finite."""
        check_precision(self.model)
        ends = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_scale", "hook_pattern")
        ends += ("hook_v", "hook_z", "mlp.hook_in", "mlp.hook_out")
        with torch.no_grad():
            _, cache = self.model.run_with_cache(
                self.tokens, names_filter=lambda name: name.endswith(ends)
            )
        for name, activation in cache.items():
            if not activation.isfinite().all():
                raise ValueError(f"{name} is NaN or infinite on this prompt.")
        floats = {name: activation.float() for name, activation in cache.items()}
        return ActivationCache(floats, self.model)

    def written(
        self, layer: int, *, attention: bool
    ) -> tuple[list[str], Float[Tensor, "batch pos part d_model"]]:
        """What stands in the residual stream before a layer's attention, or before its MLP.

        Args:
            attention: with what the layer's own attention wrote.

        Returns:
            Writers, and what each wrote at each position, which sums to the residual stream.
        """
        start = self.cache["blocks.0.hook_resid_pre"]
        names, parts, biases = ["embedding"], [start], torch.zeros_like(start)
        for each in range(layer + attention):
            attn = self.model.blocks[each].attn
            after = self.after_attention(each)
            z = self.cache[f"blocks.{each}.attn.hook_z"]
            heads = einsum(z, attn.W_O.float(), "b pos head d, head d model -> b pos head model")
            parts += [head * after for head in heads.unbind(2)]
            names += [f"L{each}H{head}" for head in range(heads.shape[2])]
            if attn.b_O is not None:
                biases = biases + attn.b_O.float() * after
            if each < layer:
                ends = (f"blocks.{each}.hook_resid_{end}" for end in ("mid", "post"))
                before, then = (self.cache[end] for end in ends)
                parts.append(then - before)
                names.append(f"MLP {each}")
        return [*names, "biases"], torch.stack([*parts, biases], dim=2)

    def into_mlp(
        self,
        layer: int,
        positions: Int[Tensor, " batch"],
        vectors: Float[Tensor, "d_model k"],
        *,
        composed: bool = False,
    ) -> tuple[list[Part], Float[Tensor, "batch part k"]]:
        """What each part of an MLP's input adds to its projections on some vectors.

        Args:
            positions: one of each prompt.
            composed: split what heads read by its writers; otherwise into the embedding and
                the rest.

        Returns:
            Parts, and their projections, which sum to `hook_in @ vectors`.
        """
        rows = torch.arange(len(self.tokens), device=self.tokens.device)

        reading = self.norm(layer, "ln2")[rows, positions][..., None] * vectors
        names, written = self.written(layer, attention=True)
        whole = einsum(written[rows, positions], reading, "b part model, b model k -> b part k")
        own = [i for i, name in enumerate(names) if "H" not in name]
        parts, projections = [Part(names[i]) for i in own], [whole[:, own]]
        biases = parts.index(Part("biases"))
        for each in range(layer + 1):
            attn = self.model.blocks[each].attn
            after = self.after_attention(each)[rows, positions][..., None]
            out = einsum(attn.W_O.float(), reading * after, "head d model, b model k -> b head d k")
            weight = self.cache[f"blocks.{each}.attn.hook_pattern"][rows, :, positions]
            out = einsum(weight, out, "b head pos, b head d k -> b head pos d k")
            read, values, bias = self._values(each, composed)
            found = einsum(values, out, "b pos read head d, b head pos d k -> b head pos read k")
            projections.append(found.flatten(1, 3))
            parts += [
                Part(f"L{each}H{head}", position, name)
                for head in range(found.shape[1])
                for position in range(found.shape[2])
                for name in read
            ]
            if bias is not None:
                projections[0][:, biases] += einsum(bias, out, "head d, b head pos d k -> b k")
        return parts, torch.cat(projections, dim=1)

    def _values(
        self, layer: int, composed: bool
    ) -> tuple[list[str], Float[Tensor, "batch pos read head d_head"], Tensor | None]:
        """A layer's values, split by the writer of what they were made of, and their bias."""
        weight, bias = self.model.head_values(layer), self.model.blocks[layer].attn.b_V
        if bias is not None:
            bias = bias.float().view(-1, weight.shape[2])
            bias = bias.repeat_interleave(len(weight) // len(bias), dim=0)
        read, written = self.written(layer, attention=False)
        if not composed:
            rest = written[:, :, 1:].sum(2)
            read, written = ["embedding", "composed"], torch.stack([written[:, :, 0], rest], dim=2)
        written = written * self.norm(layer, "ln1")[:, :, None]
        values = einsum(written, weight, "b pos read model, head model d -> b pos read head d")
        return read, values, bias

    def norm(self, layer: int, name: str) -> Float[Tensor, "batch pos #d_model"]:
        """What a block's norm multiplies its input by, with its scale held."""
        return gain(self.model, layer, name) * self.inverse_scale(layer, name)[..., None]

    def inverse_scale(self, layer: int, name: str) -> Float[Tensor, "batch pos"]:
        """One by the scale of a block's norm; ones without that norm."""
        name = f"blocks.{layer}.{name}.hook_scale"
        if name not in self.cache:
            return torch.ones_like(self.cache["blocks.0.hook_resid_pre"][..., 0])
        return 1 / self.cache[name][..., 0]

    def after_attention(self, layer: int) -> Float[Tensor, "batch pos #d_model"]:
        """What a head's output is multiplied by on its way to the residual stream."""
        factor = into_stream(self.model, layer, "attn")
        return factor * self.inverse_scale(layer, "ln1_post")[..., None]

    def stream(self, place: Place) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream that a node reads there."""
        match place.kind:
            case "output":
                return self.cache[f"blocks.{place.layer - 1}.hook_resid_post"]
            case "embedding":
                return self.cache["blocks.0.hook_resid_pre"]
            case "head":
                return self.cache[f"blocks.{place.layer}.hook_resid_pre"]
            case _:
                return self.cache[f"blocks.{place.layer}.hook_resid_mid"]

    def reading(self, node: Node) -> Float[Tensor, "batch pos"]:
        """What a node reads, where it reads."""
        return self.whole(node) * self.reading_scale(node)

    def whole(self, node: Node) -> Float[Tensor, "batch pos"]:
        """What a node reads before its norm divides it by a scale."""
        along = self.stream(node.place) @ node.reads
        return along + node.constant / self.reading_scale(node)

    def reading_scale(self, node: Node) -> Float[Tensor, "batch pos"] | float:
        """What a node's norm multiplies by, where it reads."""
        norm = {"head": "ln1", "eigenvector": "ln2"}.get(node.place.kind)
        return 1.0 if norm is None else self.inverse_scale(node.place.layer, norm)

    def carried(
        self, head: Node, reading: Float[Tensor, "batch read"]
    ) -> Float[Tensor, "batch pos read"]:
        """What a head makes of what it reads at each position, where it writes."""
        at = head.place
        pattern = self.cache[f"blocks.{at.layer}.attn.hook_pattern"][:, at.head]
        return pattern * reading[:, None] * self.inverse_scale(at.layer, "ln1_post")[..., None]

    def activation(
        self, node: Node, reading: Float[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos"]:
        """What a node makes of what it reads, where it writes, but for the weight of an edge."""
        at = node.place
        match at.kind:
            case "head":
                carried = self.carried(node, reading)
                return carried.sum(-1) if at.position is None else carried[..., at.position]
            case "eigenvector":
                return reading**2 * self.inverse_scale(at.layer, "ln2_post")
            case _:
                return reading

    def carries(
        self, edge: Edge, reading: Float[Tensor, "batch pos"] | None = None
    ) -> Float[Tensor, "batch pos"]:
        """What the lower node of an edge writes along what the upper one reads.

        Args:
            reading: what the lower node reads; None is what it reads in this run.
        """
        if edge.lower.place.kind == "embedding":
            return self.stream(edge.lower.place) @ edge.upper.reads
        reading = self.reading(edge.lower) if reading is None else reading
        return edge.weight * self.activation(edge.lower, reading)
