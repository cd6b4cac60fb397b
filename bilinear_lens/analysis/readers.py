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
from torch.nn.functional import pad

from bilinear_lens.analysis.nodes import (
    Edge,
    Node,
    Place,
    check_precision,
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
    MLPs is Gaussian with the mean m and covariance C of the token directions. Along a direction d
    the variance of what a head writes is then that of its reading, `r^T C r` with `r = W_V W_O d`;
    that of an MLP is `2 tr(Q C Q C) + 4 m^T Q C Q m` with its interaction Q, and of one of its
    eigenvectors `2 (value s)^2 + 4 s (value v^T m)^2` with `s = v^T C v`; the embedding's is its
    own over the vocabulary. A share is of the sum over all writers. Eigenvectors of one MLP may
    cancel, so that each carries more than all together.
    """

    model: HookedBilinearTransformer

    @cached_property
    def embedding(self) -> Float[Tensor, "d_model d_model"]:
        return self.model.embedded(range(self.model.cfg.d_vocab)).mT.cov()

    @cached_property
    def covariance(self) -> Float[Tensor, "d_model d_model"]:
        return self.tokens.mT.cov()

    @cached_property
    def mean(self) -> Float[Tensor, " d_model"]:
        return self.tokens.mean(0)

    @cached_property
    def tokens(self) -> Float[Tensor, "n d_model"]:
        check_precision(self.model)
        return self.model.token_basis().directions

    def writers(self, upper: Node) -> Iterable[Edge]:
        """From each writer below; an MLP stands for its eigenvectors, with a bound of their
        variances as its weight: none has a larger share."""
        d, at = upper.reads, upper.place
        found = [(d @ self.embedding @ d, Node(Place("embedding", -1), d), 1.0)]
        for layer in range(at.layer + (at.kind == "eigenvector")):
            for head, reads in enumerate(head_reads(self.model, layer, d)):
                node, length = unit(Place("head", layer, head), reads)
                found.append(
                    (length**2 * (node.reads @ self.covariance @ node.reads), node, length)
                )
        total, bounds = sum(variance.item() for variance, _, _ in found), []
        for layer in range(at.layer):
            along = d * into_stream(self.model, layer, "mlp")
            variance, bound = self._of_mlp(layer, along)
            total += variance
            bounds.append((bound, Node(Place("MLP", layer), along), bound))
        if total == 0:  # then there is nothing to share
            return
        for variance, lower, weight in [*found, *bounds]:
            yield Edge(lower, upper, weight, float(variance) / total)

    def _of_mlp(self, layer: int, along: Float[Tensor, " d_model"]) -> tuple[float, float]:
        """The variance of what an MLP writes, and what no eigenvector's exceeds."""
        tensor = self.model.bilinear_tensor(layer)
        matrix = tensor.interaction(along)
        covariance, mean = self._moments(tensor)
        spread, moved = matrix @ covariance, matrix @ mean
        variance = 2 * (spread * spread.mT).sum() + 4 * moved @ covariance @ moved
        # 2 (v^T Q C v) (v^T Q (C + 2 m m^T) v), and v has length 1
        second = spread + 2 * torch.outer(moved, mean)
        return variance.item(), (2 * spread.norm() * second.norm()).item()

    def _moments(
        self, tensor: BilinearTensor
    ) -> tuple[Float[Tensor, "coords coords"], Float[Tensor, " coords"]]:
        """The covariance and mean of what an MLP reads, with the constant 1 beside its biases."""
        if not tensor.affine:
            return self.covariance, self.mean
        return pad(self.covariance, (0, 1, 0, 1)), pad(self.mean, (0, 1), value=1.0)

    def eigenvectors(self, mlp: Edge, k: int) -> Iterable[Edge]:
        """From the k eigenvectors of an MLP, in the direction that it is read, that carry most."""
        place, along = mlp.lower.place, mlp.lower.reads
        tensor = self.model.bilinear_tensor(place.layer)
        spectrum = tensor.eigh(along)
        covariance, mean = self._moments(tensor)
        spread = (spectrum.vectors * (covariance @ spectrum.vectors)).sum(0)
        moved = mean @ spectrum.vectors
        variances = spectrum.values**2 * (2 * spread**2 + 4 * spread * moved**2)
        shares = variances * (mlp.share / mlp.weight)
        for i in shares.topk(min(k, spectrum.k)).indices.tolist():
            node, factor = _eigenvector(self.model, mlp, spectrum, i)
            weight = spectrum.values[i].item() * factor
            yield Edge(node, mlp.upper, weight, shares[i].item())


@dataclass(frozen=True, eq=False)
class PromptReader:
    """Shares of what a node reads on a prompt, with attention patterns and norm scales held.

    They are exact, sum to 1 with those of biases (which are no nodes), and may be negative. A head
    stands once for each position that it reads. An eigenvector adds the square of what it reads, of
    which a part that carries a share of the reading is given that share: `vector . part` times
    `vector . x`. Heads and eigenvectors read directions along which the prompt's activation is
    positive.
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
        if whole == 0:  # then there is nothing to share
            return
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
