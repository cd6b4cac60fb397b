"""What writes along a direction that a node reads: from weights alone, or on a prompt.

A reader says which heads, MLPs, eigenvectors and tokens write along it, and what share of what the
node reads each carries.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

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
from bilinear_lens.tensor import BilinearTensor


@dataclass(frozen=True, eq=False)
class VocabularyReader:
    """Shares of variance over the vocabulary, from the weights alone.

    Each writer reads a token drawn at random, and a head attends to one: what reaches heads and
    MLPs is Gaussian with the covariance C of the token directions. Along a direction d the variance
    of what a head writes is then that of its reading, `r^T C r` with `r = W_V W_O d`; that of an
    MLP is `2 tr(Q C Q C)` with its interaction Q, and of one of its eigenvectors
    `2 (value v^T C v)^2`; the embedding's is its own over the vocabulary. A share is of the sum
    over all writers.
    """

    model: HookedBilinearTransformer

    @cached_property
    def embedding(self) -> Float[Tensor, "d_model d_model"]:
        return self.model.embedded(range(self.model.cfg.d_vocab)).mT.cov()

    @cached_property
    def covariance(self) -> Float[Tensor, "d_model d_model"]:
        return self.model.token_basis().directions.mT.cov()

    @cached_property
    def grams(self) -> list[Float[Tensor, "d_model d_model"]]:
        """For each layer G, so that the variance of what its MLP writes along d is `2 d^T G d`."""
        values, vectors = torch.linalg.eigh(self.covariance.double())
        root = (vectors * values.clamp(min=0).sqrt() @ vectors.mT).to(self.covariance)
        found = []
        for layer in range(self.model.cfg.n_layers):
            tensor = self.model.bilinear_tensor(layer)
            left, right = (each[:, : len(root)] @ root for each in (tensor.left, tensor.right))
            found.append(BilinearTensor(left, right, tensor.down).output_gram())
        return found

    def writers(self, upper: Node) -> Iterable[Edge]:
        """From each writer below; an MLP stands for all its eigenvectors, and carries more."""
        d, at = upper.reads, upper.place
        found = [(d @ self.embedding @ d, Node(Place("embedding", -1), d), 1.0)]
        for layer in range(at.layer + (at.kind == "eigenvector")):
            for head, reads in enumerate(head_reads(self.model, layer, d)):
                node, length = unit(Place("head", layer, head), reads)
                found.append((reads @ self.covariance @ reads, node, length))
        for layer in range(at.layer):
            along = d * into_stream(self.model, layer, "mlp")
            found.append((self._variance(layer, along), Node(Place("MLP", layer), along), 1.0))
        total = sum(variance.item() for variance, _, _ in found)
        for variance, lower, weight in found:
            yield Edge(lower, upper, weight, variance.item() / total)

    def eigenvectors(self, mlp: Edge, k: int) -> Iterable[Edge]:
        """From the k eigenvectors of an MLP, in the direction that it is read, that carry most."""
        place, along = mlp.lower.place, mlp.lower.reads
        d_model = len(along)
        spectrum = self.model.bilinear_tensor(place.layer).eigh(along)
        vectors = spectrum.vectors[:d_model]
        spread = (vectors * (self.covariance @ vectors)).sum(0)
        variances = 2 * (spectrum.values * spread) ** 2
        shares = mlp.share * variances / self._variance(place.layer, along)
        for i in shares.topk(min(k, spectrum.k)).indices.tolist():
            node, factor = _eigenvector(self.model, mlp, spectrum, i)
            weight = spectrum.values[i].item() * factor
            yield Edge(node, mlp.upper, weight, shares[i].item())

    def _variance(self, layer: int, along: Float[Tensor, " d_model"]) -> Tensor:
        return 2 * along @ self.grams[layer] @ along


@dataclass(frozen=True, eq=False)
class PromptReader:
    """Shares of what a node reads on a prompt, with attention patterns and norm scales held.

    They are exact, sum to 1 with those of biases, and may be negative. A head stands once for each
    position that it reads. An eigenvector adds the square of what it reads, of which a part that
    carries a share of the reading is given that share: `vector . part` times `vector . x`. Heads
    and eigenvectors read directions along which the prompt's activation is positive.
    """

    run: FrozenRun

    @cached_property
    def grams(self) -> list[Float[Tensor, "d_model d_model"]]:
        """For each layer G, so that the squared norm of the interaction along d is `d^T G d`."""
        layers = range(self.model.cfg.n_layers)
        return [self.model.bilinear_tensor(layer).output_gram() for layer in layers]

    @property
    def model(self) -> HookedBilinearTransformer:
        return self.run.model

    def writers(self, upper: Node) -> Iterable[Edge]:
        """As `VocabularyReader` has them; of an MLP, a bound of what any eigenvector adds."""
        d, at = upper.reads, upper.place
        here = _position(at)
        whole = self.run.whole(upper)[0, here]
        start = self.run.cache["blocks.0.hook_resid_pre"][0, here] @ d
        yield Edge(
            Node(Place("embedding", -1, position=here), d), upper, 1.0, (start / whole).item()
        )
        for layer in range(at.layer + (at.kind == "eigenvector")):
            reads = head_reads(self.model, layer, d)
            for head, read in enumerate(reads):
                node, length = unit(Place("head", layer, head), read)
                reading = self.run.reading(node)
                shares = length * self.run.carried(node, reading)[0, here] / whole
                signs = 1 - 2 * (reading[0] < 0).float()
                for position in range(here + 1):
                    sign, place = signs[position].item(), replace(node.place, position=position)
                    lower = Node(place, sign * node.reads)
                    yield Edge(lower, upper, sign * length, shares[position].item())
        for layer in range(at.layer):
            along = d * into_stream(self.model, layer, "mlp")
            x = self.run.cache[f"blocks.{layer}.mlp.hook_in"][0, here]
            squares = x @ x + self.model.bilinear_tensor(layer).affine
            most = (along @ self.grams[layer] @ along).sqrt() * squares  # |Q| bounds eigenvalues
            most = most * self.run.inverse_scale(layer, "ln2_post")[0, here]
            lower = Node(Place("MLP", layer, position=here), along)
            yield Edge(lower, upper, 1.0, (most / whole).item())

    def eigenvectors(self, mlp: Edge, k: int) -> Iterable[Edge]:
        """As `VocabularyReader` has them."""
        layer, here = mlp.lower.place.layer, _position(mlp.lower.place)
        spectrum = self.model.bilinear_tensor(layer).eigh(mlp.lower.reads)
        adds = spectrum.activations(self.run.cache[f"blocks.{layer}.mlp.hook_in"][0, here])
        adds = adds * self.run.inverse_scale(layer, "ln2_post")[0, here]
        whole = self.run.whole(mlp.upper)[0, here].item()
        for i in adds.abs().topk(min(k, spectrum.k)).indices.tolist():
            node, factor = _eigenvector(self.model, mlp, spectrum, i)
            if self.run.whole(node)[0, here] < 0:  # it squares what it reads
                node = replace(node, reads=-node.reads, constant=-node.constant)
            yield Edge(node, mlp.upper, spectrum.values[i].item() * factor, adds[i].item() / whole)


def _eigenvector(
    model: HookedBilinearTransformer, mlp: Edge, spectrum: Spectrum, index: int
) -> tuple[Node, float]:
    place = replace(mlp.lower.place, kind="eigenvector")
    return eigenvector_node(model, place, spectrum.vectors[:, index], index)


def _position(place: Place) -> int:
    assert place.position is not None, "on a prompt, every node has a position"
    return place.position
