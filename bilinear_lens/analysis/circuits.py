"""Circuits: what an output reads, from eigenvectors and heads down to tokens, by beam search."""

import heapq
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from bilinear_lens.analysis.paths import FrozenRun
from bilinear_lens.models.transformer import HookedBilinearTransformer

PARALLEL = 0.99
"""Writers of one place that read directions with at least this cosine are one node."""


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
    """Something that writes along a direction that the nodes above it read."""

    place: Place
    along: Float[Tensor, " d_model"]
    """The direction in the residual stream along which it writes, for the first node above it."""
    reads: Float[Tensor, " d_model"]
    """The direction that it reads; of the embedding, `along`."""
    index: int | None = None
    """Of an eigenvector, in the order of its spectrum."""
    value: float | None = None
    """Of an eigenvector, its eigenvalue."""
    score: float = 0.0


@dataclass(frozen=True)
class Edge:
    """What a node carries of what the node above it reads."""

    lower: Node
    upper: Node
    share: float


class Reader(Protocol):
    """What writes below a node, and how much of what the node reads each carries."""

    model: HookedBilinearTransformer

    @abstractmethod
    def writers(self, node: Node) -> Iterable[tuple[float, Node]]:
        """Each writer with its share; of an MLP, at least the share of its largest eigenvector."""

    @abstractmethod
    def eigenvectors(self, mlp: Node, upper: Node, k: int) -> Iterable[tuple[float, Node]]:
        """The top eigenvectors of an MLP, each with its share."""


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

    def writers(self, node: Node) -> Iterable[tuple[float, Node]]:
        d, at = node.reads, node.place
        found = [(d @ self.covariance @ d, Node(Place("embedding", -1), d, d))]
        for layer in range(at.layer + (at.kind == "eigenvector")):
            attn = self.model.blocks[layer].attn
            inner = attn.W_O.float() @ d
            groups = attn.W_V.float().repeat_interleave(len(attn.W_O) // len(attn.W_V), dim=0)
            reads = (groups @ inner[..., None])[..., 0]
            found += [
                (read @ read, Node(Place("head", layer, head), d, read))
                for head, read in enumerate(reads)
            ]
        for layer in range(at.layer):
            variance = 2 * d @ self.grams[layer] @ d
            found.append((variance, Node(Place("MLP", layer), d, d)))
        total = sum(variance for variance, _ in found)
        return [((variance / total).item(), lower) for variance, lower in found]

    def eigenvectors(self, mlp: Node, upper: Node, k: int) -> Iterable[tuple[float, Node]]:
        layer = mlp.place.layer
        tensor = self.model.bilinear_tensor(layer)
        spectrum = tensor.eigh(mlp.along, min(k, tensor.d_in))
        whole = (mlp.along @ self.grams[layer] @ mlp.along).item()
        (share,) = (share for share, each in self.writers(upper) if each.place == mlp.place)
        for i, (value, vector) in enumerate(zip(spectrum.values.tolist(), spectrum.vectors.mT)):
            node = Node(Place("eigenvector", layer), mlp.along, vector[: tensor.d_in], i, value)
            yield share * value**2 / whole, node


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

    def writers(self, node: Node) -> Iterable[tuple[float, Node]]:
        cache, d, at = self.run.cache, node.reads, node.place
        whole, here = d @ self.stream(node), at.position
        start = cache["blocks.0.hook_resid_pre"][0, here]
        yield (d @ start / whole).item(), Node(Place("embedding", -1, position=here), d, d)
        for layer in range(at.layer + (at.kind == "eigenvector")):
            for share, lower in self._heads(layer, here, d):
                yield share / whole.item(), lower
        for layer in range(at.layer):
            x = cache[f"blocks.{layer}.mlp.hook_in"][0, here]
            along = d * self.run.after_mlp(layer)[0, here]
            most = self.model.bilinear_tensor(layer).interaction(along).norm() * (x @ x)
            lower = Node(Place("MLP", layer, position=here), along, along)
            yield (most / whole).item(), lower

    def _heads(self, layer: int, here: int, d: Tensor) -> Iterable[tuple[float, Node]]:
        attn = self.model.blocks[layer].attn
        after = self.run.after_attention(layer)
        inner = attn.W_O @ (d * (after[0, here] if isinstance(after, Tensor) else after))
        groups = attn.W_V.repeat_interleave(len(attn.W_O) // len(attn.W_V), dim=0)
        reads = (groups @ inner[..., None])[..., 0]
        pattern = self.run.cache[f"blocks.{layer}.attn.hook_pattern"][0, :, here]
        norm = self.run.norm(layer, "ln1")
        stream = self.run.cache[f"blocks.{layer}.hook_resid_pre"][0]
        for position in range(here + 1):
            seen = reads * (norm[0, position] if isinstance(norm, Tensor) else norm)
            seen = seen * pattern[:, position, None]
            for head, read in enumerate(seen):
                place = Place("head", layer, head, position)
                yield (read @ stream[position]).item(), Node(place, d, read)

    def eigenvectors(self, mlp: Node, upper: Node, k: int) -> Iterable[tuple[float, Node]]:
        layer, here = mlp.place.layer, mlp.place.position
        tensor = self.model.bilinear_tensor(layer)
        spectrum = tensor.eigh(mlp.along)
        x = self.run.cache[f"blocks.{layer}.mlp.hook_in"][0, here]
        projections, adds = spectrum.projections(x), spectrum.activations(x)
        whole = (upper.reads @ self.stream(upper)).item()
        norm = self.run.norm(layer, "ln2")
        scale = norm[0, here] if isinstance(norm, Tensor) else norm
        for i in adds.abs().topk(min(k, spectrum.k)).indices.tolist():
            reads = spectrum.values[i] * projections[i] * spectrum.vectors[: tensor.d_in, i] * scale
            place = Place("eigenvector", layer, position=here)
            node = Node(place, mlp.along, reads, i, spectrum.values[i].item())
            yield adds[i].item() / whole, node


def search(reader: Reader, root: Node, *, width: int, depth: int) -> tuple[list[Node], list[Edge]]:
    """The paths that carry most, by beam search from the top.

    At each step, of all that write below the nodes found in the last step, the `width` that carry
    most of the root are kept. Writers of one place that read parallel directions are one node.
    """
    nodes, edges, beam = [root], [], [root]
    order = count()
    for _ in tqdm(range(depth), desc="Tracing", leave=False):
        heap: list[tuple[float, int, float, Node, Node]] = []

        def push(share: float, lower: Node, upper: Node) -> None:
            heapq.heappush(heap, (-abs(upper.score * share), next(order), share, lower, upper))

        for upper in beam:
            for share, lower in reader.writers(upper):
                push(share, lower, upper)
        beam = []
        while heap and len(beam) < width:
            carried, _, share, lower, upper = heapq.heappop(heap)
            if carried == 0:
                break
            if lower.place.kind == "MLP":
                for share, each in reader.eigenvectors(lower, upper, width):
                    push(share, each, upper)
                continue
            known = next((node for node in nodes if same(node, lower)), None)
            if known is None:
                nodes.append(lower)
                beam.append(lower)
            edges.append(Edge(known or lower, upper, share))
            (known or lower).score += upper.score * share
        beam = [node for node in beam if node.place.kind != "embedding"]
    return nodes, edges


def same(node: Node, other: Node) -> bool:
    """Whether two nodes are one."""
    if node.place != other.place:
        return False
    cosine = torch.nn.functional.cosine_similarity(node.reads, other.reads, dim=0)
    return bool(cosine.abs() >= PARALLEL)
