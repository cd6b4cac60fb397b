"""What writes along a direction that a node reads: from weights alone, or on a prompt.

Readers say which heads, MLPs, eigenvectors and tokens write along it, and what share of what the
node reads each carries.
"""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from bilinear_lens.analysis.nodes import (
    Edge,
    Node,
    Place,
    eigenvector_node,
    head_reads,
    into_stream,
    unit,
)
from bilinear_lens.analysis.paths import FrozenRun
from bilinear_lens.models.transformer import HookedBilinearTransformer
from bilinear_lens.spectrum import Spectrum


class Reader(Protocol):
    """What writes below a node, and how much of what the node reads each carries."""

    model: HookedBilinearTransformer

    @abstractmethod
    def writers(self, upper: Node) -> Iterable[Edge]:
        """From each writer below; from a whole MLP, at least the share of any eigenvector."""

    @abstractmethod
    def eigenvectors(self, mlp: Edge, k: int) -> Iterable[Edge]:
        """From the k eigenvectors of an MLP that carry most, of the direction that it is read."""


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
    def grams(self) -> list[Float[Tensor, "d_model d_model"]]:
        layers = range(self.model.cfg.n_layers)
        return [self.model.bilinear_tensor(layer).output_gram() for layer in layers]

    @cached_property
    def covariance(self) -> Float[Tensor, "d_model d_model"]:
        every = torch.arange(self.model.cfg.d_vocab, device=self.model.cfg.device)
        return self.model.embed(every).float().mT.cov()

    def writers(self, upper: Node) -> Iterable[Edge]:
        d, at = upper.reads, upper.place
        found = [(d @ self.covariance @ d, Node(Place("embedding", -1), d), 1.0)]
        for layer in range(at.layer + (at.kind == "eigenvector")):
            for head, reads in enumerate(head_reads(self.model, layer, d)):
                node, length = unit(Place("head", layer, head), reads)
                found.append((torch.tensor(length**2), node, length))
        for layer in range(at.layer):
            along = d * into_stream(self.model, layer, "mlp")
            variance = 2 * along @ self.grams[layer] @ along
            found.append((variance, Node(Place("MLP", layer), along), 1.0))
        total = sum(variance.item() for variance, _, _ in found)
        for variance, lower, weight in found:
            yield Edge(lower, upper, weight, variance.item() / total)

    def eigenvectors(self, mlp: Edge, k: int) -> Iterable[Edge]:
        place, along = mlp.lower.place, mlp.lower.reads
        tensor = self.model.bilinear_tensor(place.layer)
        spectrum = tensor.eigh(along, min(k, tensor.d_in))
        whole = (along @ self.grams[place.layer] @ along).item()
        for i, value in enumerate(spectrum.values.tolist()):
            node, factor = _eigenvector(self.model, mlp, spectrum, i)
            yield Edge(node, mlp.upper, value * factor, mlp.share * value**2 / whole)


@dataclass(frozen=True, eq=False)
class PromptReader:
    """Shares of what a node reads on a prompt, with attention patterns and norm scales held.

    They are exact, sum to 1 with those of biases, and may be negative. A head stands once for each
    position that it reads. An eigenvector adds the square of what it reads, of which a part that
    carries a share of the reading is given that share: `vector . part` times `vector . x`.
    """

    run: FrozenRun

    @property
    def model(self) -> HookedBilinearTransformer:
        return self.run.model

    def writers(self, upper: Node) -> Iterable[Edge]:
        d, at = upper.reads, upper.place
        here = at.position
        whole = self.run.whole(upper)[0, here]
        start = self.run.cache["blocks.0.hook_resid_pre"][0, here] @ d
        yield Edge(Node(Place("embedding", -1, position=here), d), upper, 1.0, (start / whole).item())
        for layer in range(at.layer + (at.kind == "eigenvector")):
            reads = head_reads(self.model, layer, d)
            for head, read in enumerate(reads):
                node, length = unit(Place("head", layer, head), read)
                written = length * self.run.carried(node, self.run.reading(node))[0, here]
                for position, part in enumerate((written[: here + 1] / whole).tolist()):
                    lower = Node(replace(node.place, position=position), node.reads)
                    yield Edge(lower, upper, length, part)
        for layer in range(at.layer):
            along = d * into_stream(self.model, layer, "mlp")
            x = self.run.cache[f"blocks.{layer}.mlp.hook_in"][0, here]
            squares = x @ x + self.model.bilinear_tensor(layer).affine
            most = self.model.bilinear_tensor(layer).interaction(along).norm() * squares
            most = most * self.run.inverse_scale(layer, "ln2_post")[0, here]
            lower = Node(Place("MLP", layer, position=here), along)
            yield Edge(lower, upper, 1.0, (most / whole).item())

    def eigenvectors(self, mlp: Edge, k: int) -> Iterable[Edge]:
        layer, here = mlp.lower.place.layer, mlp.lower.place.position
        spectrum = self.model.bilinear_tensor(layer).eigh(mlp.lower.reads)
        adds = spectrum.activations(self.run.cache[f"blocks.{layer}.mlp.hook_in"][0, here])
        adds = adds * self.run.inverse_scale(layer, "ln2_post")[0, here]
        whole = self.run.whole(mlp.upper)[0, here].item()
        for i in adds.abs().topk(min(k, spectrum.k)).indices.tolist():
            node, factor = _eigenvector(self.model, mlp, spectrum, i)
            yield Edge(node, mlp.upper, spectrum.values[i].item() * factor, adds[i].item() / whole)


def _eigenvector(
    model: HookedBilinearTransformer, mlp: Edge, spectrum: Spectrum, index: int
) -> tuple[Node, float]:
    place = replace(mlp.lower.place, kind="eigenvector")
    return eigenvector_node(model, place, spectrum.vectors[:, index], index)
