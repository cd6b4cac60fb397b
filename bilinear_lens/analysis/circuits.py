"""Circuits: what an output reads, through eigenvectors and heads down to tokens."""

import heapq
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Literal

import pandas as pd
import torch
from tqdm.auto import tqdm

from bilinear_lens.analysis.interactions import output_label
from bilinear_lens.analysis.paths import FrozenRun
from bilinear_lens.analysis.readers import Edge, IsotropicReader, Node, Place, PromptReader, Reader
from bilinear_lens.basis import Basis
from bilinear_lens.models.transformer import HookedBilinearTransformer, Output, Token

PARALLEL = 0.99
"""Writers of one place that read directions with at least this cosine are one node."""

N_TOKENS = 5
"""Listed at each end of what a node reads."""


@dataclass(frozen=True, eq=False)
class Circuit:
    """What an output reads, as a graph: nodes write along what the nodes above them read."""

    model: str
    fingerprint: str
    """Of the model's weights."""
    output: str
    prompt: list[str] | None
    """Tokens, of a circuit on a prompt."""
    found: list[Node]
    """The output first, then as they were found."""
    links: list[Edge]
    tokens: list[tuple[list[str], list[str]]]
    """For each node, the tokens that project most on what it reads, and those that do least."""

    @cached_property
    def ids(self) -> list[str]:
        """A name for each node: `L0H3`, `MLP 1 e4`, on a prompt with its position, `L0H3@5`."""
        names = [_name(node) for node in self.found]
        seen: Counter[str] = Counter()
        for i, name in enumerate(names):
            seen[name] += 1
            if names.count(name) > 1:
                names[i] = f"{name} #{seen[name]}"
        return names

    @property
    def nodes(self) -> pd.DataFrame:
        """A row for each node.

        Columns `node`, `kind`, `layer`, `head`, `eigenvector`, `eigenvalue`, `position`, `token`,
        `score`: the share of the output that comes through the node: on a prompt of its logit,
        from weights alone of its variance for isotropic inputs; `reads_most`, `reads_least`.
        """
        rows = []
        for name, node, (most, least) in zip(self.ids, self.found, self.tokens, strict=True):
            at = node.place
            token = None if self.prompt is None else self.prompt[at.position]
            rows.append(
                {
                    "node": name,
                    "kind": at.kind,
                    "layer": at.layer,
                    "head": at.head,
                    "eigenvector": node.index,
                    "eigenvalue": node.value,
                    "position": at.position,
                    "token": token,
                    "score": node.score,
                    "reads_most": most,
                    "reads_least": least,
                }
            )
        return pd.DataFrame(rows)

    @property
    def edges(self) -> pd.DataFrame:
        """A row for each edge: `lower`, `upper`, `share` of what the upper node reads, and
        `score`, the share of the output that comes along it."""
        at = {id(node): name for node, name in zip(self.found, self.ids, strict=True)}
        return pd.DataFrame(
            [
                {
                    "lower": at[id(edge.lower)],
                    "upper": at[id(edge.upper)],
                    "share": edge.share,
                    "score": edge.share * edge.upper.score,
                }
                for edge in self.links
            ]
        )


def trace(
    model: HookedBilinearTransformer,
    output: Output,
    *,
    prompt: str | None = None,
    layer: int | None = None,
    width: int = 8,
    depth: int = 4,
    contrast: Token | Literal["mean"] | None = "mean",
) -> Circuit:
    """Follow an output down through eigenvectors and heads to tokens, by beam search.

    Args:
        prompt: take the shares on this text, at whose end the output is written, with attention
            patterns and norm scales held: they are exact, and sum to 1 (`PromptReader`). Without,
            they are of the variance for isotropic inputs, from weights alone (`IsotropicReader`).
        layer: of the MLP whose eigenvectors are the first step; None takes all that writes to the
            residual stream.
        width: how many nodes are kept at each step.
        depth: how many steps.
        contrast: as for `output_direction`.

    Costs, at each step and for each node, a product with the weights of every head below, and
    eigenvectors of those MLPs that could be among the best: at most `width * depth * n_layers`
    decompositions of a matrix of `d_model`.

    Raises:
        ValueError: if the output, layer, width or depth is out of range, the prompt is empty or
            too long, an activation is not finite, or, without a prompt, the architecture norms
            what its blocks write, by a scale that weights do not know.
    """
    if width < 1 or depth < 1:
        raise ValueError(f"width={width} and depth={depth} must be at least 1.")
    if layer is not None:
        model.bilinear_tensor(layer)
    direction = model.output_direction(output, contrast)
    reader: Reader
    if prompt is None:
        reader, position, words = IsotropicReader(model), None, None
    else:
        reader = PromptReader(FrozenRun(model, model.to_tokens(prompt)))
        words = [model.token_labels[token] for token in reader.run.tokens[0].tolist()]
        position = len(words) - 1
    root = Node(Place("output", model.cfg.n_layers, position=position), direction, score=1.0)
    with torch.no_grad():
        found, links = _search(reader, root, layer, width, depth)
        basis = model.token_basis()
        tokens = [_ends(node, basis) for node in found]
    return Circuit(
        model=model.cfg.model_name,
        fingerprint=model.fingerprint(),
        output=output_label(model, output, contrast),
        prompt=words,
        found=found,
        links=links,
        tokens=tokens,
    )


def _search(
    reader: Reader, root: Node, layer: int | None, width: int, depth: int
) -> tuple[list[Node], list[Edge]]:
    """At each step, of all that write below the nodes found in the last step, those that carry
    most of the root. Writers of one place that read parallel directions are one node."""
    found, links, beam = [root], [], [root]
    order = count()
    for _ in tqdm(range(depth), desc="Tracing", leave=False):
        heap: list[tuple[float, int, Edge]] = []
        for upper in beam:
            for edge in reader.writers(upper):
                if (
                    upper is not root
                    or layer is None
                    or (edge.lower.place.kind, edge.lower.place.layer) == ("MLP", layer)
                ):
                    heapq.heappush(heap, (-abs(edge.score), next(order), edge))
        beam = []
        while heap and len(beam) < width:
            score, _, edge = heapq.heappop(heap)
            if score == 0:
                break
            if edge.lower.place.kind == "MLP":
                for each in reader.eigenvectors(edge, width):
                    heapq.heappush(heap, (-abs(each.score), next(order), each))
                continue
            known = next((node for node in found if _same(node, edge.lower)), None)
            if known is None:
                found.append(known := edge.lower)
                beam.append(known)
            links.append(Edge(known, edge.upper, edge.share))
            known.score += edge.score
        beam = [node for node in beam if node.place.kind != "embedding"]
    return found, links


def _same(node: Node, other: Node) -> bool:
    if node.place != other.place:
        return False
    cosine = torch.nn.functional.cosine_similarity(node.reads, other.reads, dim=0)
    return bool(cosine.abs() >= PARALLEL)


def _name(node: Node) -> str:
    at = node.place
    name = {
        "head": f"L{at.layer}H{at.head}",
        "eigenvector": f"MLP {at.layer} e{node.index}",
    }.get(at.kind, at.kind)
    return name if at.position is None else f"{name}@{at.position}"


def _ends(node: Node, basis: Basis) -> tuple[list[str], list[str]]:
    """The tokens that project most on what a node reads, and those that project least."""
    projections = basis.directions @ node.reads.to(basis.directions)
    ends = (projections.topk(N_TOKENS, largest=most).indices for most in (True, False))
    most, least = ([basis.labels[i] for i in end.tolist()] for end in ends)
    return most, least
