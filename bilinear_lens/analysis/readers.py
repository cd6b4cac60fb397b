"""What writes along a direction that something above reads: from weights alone, or on a prompt.

A node of a circuit reads a direction of the residual stream. Readers say which heads, MLPs,
eigenvectors and tokens write along it, and what share of what it reads each carries.
"""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from bilinear_lens.analysis.paths import FrozenRun
from bilinear_lens.models.transformer import HookedBilinearTransformer


@dataclass(frozen=True)
class Place:
    """Where in a model something is."""

    kind: str
    """`output`, `eigenvector`, `head`, `embedding`, or `MLP`: all eigenvectors of one together."""
    layer: int
    """Of an MLP or a head; -1 of the embedding, the number of layers of an output."""
    head: int | None = None
    position: int | None = None
    """On a prompt: where it reads."""


@dataclass(eq=False)
class Node:
    """Something that reads a direction and writes along those that the nodes above it read."""

    place: Place
    reads: Float[Tensor, " d_model"]
    """Of the embedding, the direction along which it is read."""
    index: int | None = None
    """Of an eigenvector, in the order of its spectrum."""
    value: float | None = None
    """Of an eigenvector, its eigenvalue."""
    score: float = 0.0


@dataclass(frozen=True, eq=False)
class Edge:
    """What a node writes along the direction that the node above it reads."""

    lower: Node
    upper: Node
    share: float
    """Of what the upper node reads."""

    @property
    def score(self) -> float:
        """The share of the output."""
        return self.share * self.upper.score


class Reader(Protocol):
    """What writes below a node, and how much of what the node reads each carries."""

    model: HookedBilinearTransformer

    @abstractmethod
    def writers(self, upper: Node) -> Iterable[Edge]:
        """From each writer below; from a whole MLP, at least the share of any eigenvector."""

    @abstractmethod
    def eigenvectors(self, mlp: Edge, k: int) -> Iterable[Edge]:
        """From the eigenvectors of an MLP that carry most."""


@dataclass(frozen=True, eq=False)
class IsotropicReader:
    """Shares of variance, from the weights alone.

    Every head and MLP reads a normed residual stream; take it as Gaussian with covariance 1. Along
    a direction d the variance is then `2 ||Q_d||_F^2` of what an MLP writes, `2 value^2` of one
    of its eigenvectors, `||W_V W_O d||^2` of a head that attends to one token, and the
    embedding's is that over the vocabulary. A share is of the sum over all writers.
    """

    model: HookedBilinearTransformer

    @cached_property
    def grams(self) -> list[Tensor]:
        layers = range(self.model.cfg.n_layers)
        return [self.model.bilinear_tensor(layer).output_gram() for layer in layers]

    @cached_property
    def covariance(self) -> Tensor:
        every = torch.arange(self.model.cfg.d_vocab, device=self.model.cfg.device)
        return self.model.embed(every).float().mT.cov()

    def writers(self, upper: Node) -> Iterable[Edge]:
        d, at = upper.reads, upper.place
        found = [(d @ self.covariance @ d, Node(Place("embedding", -1), d))]
        for layer in range(at.layer + (at.kind == "eigenvector")):
            attn = self.model.blocks[layer].attn
            inner = attn.W_O.float() @ d
            groups = attn.W_V.float().repeat_interleave(len(attn.W_O) // len(attn.W_V), dim=0)
            reads = (groups @ inner[..., None])[..., 0]
            found += [
                (read @ read, Node(Place("head", layer, head), read))
                for head, read in enumerate(reads)
            ]
        for layer in range(at.layer):
            variance = 2 * d @ self.grams[layer] @ d
            found.append((variance, Node(Place("MLP", layer), d)))
        total = sum(variance for variance, _ in found)
        return [Edge(lower, upper, (variance / total).item()) for variance, lower in found]

    def eigenvectors(self, mlp: Edge, k: int) -> Iterable[Edge]:
        layer, d = mlp.lower.place.layer, mlp.upper.reads
        tensor = self.model.bilinear_tensor(layer)
        spectrum = tensor.eigh(d, min(k, tensor.d_in))
        whole = (d @ self.grams[layer] @ d).item()
        for i, (value, vector) in enumerate(
            zip(spectrum.values.tolist(), spectrum.vectors.mT, strict=True)
        ):
            lower = Node(Place("eigenvector", layer), vector[: tensor.d_in], i, value)
            yield Edge(lower, mlp.upper, mlp.share * value**2 / whole)


@dataclass(frozen=True, eq=False)
class PromptReader:
    """Shares of what a direction reads on a prompt, with attention patterns and norms held.

    Along a head and the embedding it is linear; an eigenvector adds `value (vector . x)^2`, and
    what it reads has the share `vector . part / vector . x` of that. Shares sum to 1, with those of
    biases, and may be negative.
    """

    run: FrozenRun

    @property
    def model(self) -> HookedBilinearTransformer:
        return self.run.model

    def stream(self, node: Node) -> Float[Tensor, " d_model"]:
        """The residual stream that a node reads, at its position."""
        at = node.place
        if at.kind == "output":
            name = f"blocks.{at.layer - 1}.hook_resid_post"
        else:
            name = f"blocks.{at.layer}.hook_resid_{'pre' if at.kind == 'head' else 'mid'}"
        return self.run.cache[name][0, at.position]

    def writers(self, upper: Node) -> Iterable[Edge]:
        cache, d, at = self.run.cache, upper.reads, upper.place
        whole, here = d @ self.stream(upper), at.position
        start = cache["blocks.0.hook_resid_pre"][0, here]
        found = [(d @ start, Node(Place("embedding", -1, position=here), d))]
        for layer in range(at.layer + (at.kind == "eigenvector")):
            found += self._heads(layer, here, d)
        for layer in range(at.layer):
            x = cache[f"blocks.{layer}.mlp.hook_in"][0, here]
            along = d * self.run.after_mlp(layer)[0, here]
            most = self.model.bilinear_tensor(layer).interaction(along).norm() * (x @ x)
            found.append((most, Node(Place("MLP", layer, position=here), along)))
        return [Edge(lower, upper, (part / whole).item()) for part, lower in found]

    def _heads(self, layer: int, here: int, d: Tensor) -> list[tuple[Tensor, Node]]:
        """What each head writes along d from each position that it attends to."""
        attn = self.model.blocks[layer].attn
        after = self.run.after_attention(layer)
        inner = attn.W_O @ (d * (after[0, here] if isinstance(after, Tensor) else after))
        groups = attn.W_V.repeat_interleave(len(attn.W_O) // len(attn.W_V), dim=0)
        reads = (groups @ inner[..., None])[..., 0]
        pattern = self.run.cache[f"blocks.{layer}.attn.hook_pattern"][0, :, here]
        norm = self.run.norm(layer, "ln1")
        stream = self.run.cache[f"blocks.{layer}.hook_resid_pre"][0]
        found = []
        for position in range(here + 1):
            seen = reads * (norm[0, position] if isinstance(norm, Tensor) else norm)
            for head, read in enumerate(seen * pattern[:, position, None]):
                place = Place("head", layer, head, position)
                found.append((read @ stream[position], Node(place, read)))
        return found

    def eigenvectors(self, mlp: Edge, k: int) -> Iterable[Edge]:
        layer, here = mlp.lower.place.layer, mlp.lower.place.position
        tensor = self.model.bilinear_tensor(layer)
        spectrum = tensor.eigh(mlp.lower.reads)
        x = self.run.cache[f"blocks.{layer}.mlp.hook_in"][0, here]
        projections, adds = spectrum.projections(x), spectrum.activations(x)
        whole = (mlp.upper.reads @ self.stream(mlp.upper)).item()
        norm = self.run.norm(layer, "ln2")
        scale = norm[0, here] if isinstance(norm, Tensor) else norm
        for i in adds.abs().topk(min(k, spectrum.k)).indices.tolist():
            vector = spectrum.vectors[: tensor.d_in, i]
            reads = spectrum.values[i] * projections[i] * vector * scale
            place = Place("eigenvector", layer, position=here)
            lower = Node(place, reads, i, spectrum.values[i].item())
            yield Edge(lower, mlp.upper, adds[i].item() / whole)
