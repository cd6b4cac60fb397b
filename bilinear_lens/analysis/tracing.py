"""`trace`: the circuit of an output, found by beam search."""

import heapq
import random as shuffling
import warnings
from collections import Counter
from collections.abc import Sequence
from itertools import count
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from bilinear_lens.analysis.circuits import Circuit
from bilinear_lens.analysis.interactions import output_label
from bilinear_lens.analysis.nodes import Edge, Node, Place, unit
from bilinear_lens.analysis.paths import FrozenRun
from bilinear_lens.analysis.readers import PromptReader, VocabularyReader
from bilinear_lens.basis import Basis
from bilinear_lens.models.directions import Output
from bilinear_lens.models.transformer import HookedBilinearTransformer
from bilinear_lens.models.vocabulary import Token

PARALLEL = 0.99
"""Nodes of one place that read directions with at least this cosine are one."""

LARGE = 20.0
"""Shares above this are of something that is nearly zero."""

N_TOKENS = 5
"""Listed at each end of what a node reads."""


@torch.no_grad()
def trace(
    model: HookedBilinearTransformer,
    output: Output,
    *,
    prompt: str | Sequence[int] | Int[Tensor, "*one pos"] | None = None,
    layer: int | None = None,
    width: int = 8,
    depth: int = 4,
    contrast: Token | Literal["mean"] | None = "mean",
    random: int | None = None,
) -> Circuit:
    """Follow an output down through eigenvectors and heads to tokens, by beam search.

    Args:
        prompt: take the shares on this text, or these token ids (`[pos]`, or `[1, pos]` as
            `to_tokens` gives them), at whose end the output is written, with attention patterns and
            norm scales held: they are exact, and with those of biases sum to 1 (`PromptReader`).
            Without, they are of variances over the vocabulary, from weights alone
            (`VocabularyReader`).
        layer: of the MLP whose eigenvectors are the first step; None takes all that writes to the
            residual stream.
        width: how many nodes are found at each step.
        depth: how many steps.
        contrast: as for `output_direction`.
        random: a seed: at each step, take writers at random instead of those that carry most, for
            a control.

    Costs, at each step and for each node, a product with the weights of every head below, and the
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
    ids = None if prompt is None else _ids(model, prompt)
    reader: VocabularyReader | PromptReader
    if ids is None:
        _check_no_norms_after(model)
        reader, position = VocabularyReader(model), None
    else:
        reader = PromptReader(FrozenRun(model, torch.tensor([ids], device=model.cfg.device)))
        position = len(ids) - 1
    root, _ = unit(Place("output", model.cfg.n_layers, position=position), direction)
    root.score = 1.0
    label = output_label(model, output, contrast)
    found, links = _search(reader, root, layer, width, depth, random)
    if not links:
        where = "" if ids is None else " on this prompt"
        raise ValueError(f"Nothing writes along {label}{where}: there is no circuit.")
    if random is None and max((abs(edge.share) for edge in links), default=0.0) > LARGE:
        warnings.warn(
            "Parts of what a node reads cancel, so that some shares are far above 1: of what is "
            "nearly zero on this prompt, they say little.",
            stacklevel=3,  # past the decorator
        )
    basis = model.token_basis()
    return Circuit(
        model=model.cfg.model_name,
        fingerprint=model.fingerprint(),
        output=label,
        layer=layer,
        prompt=ids,
        prompt_tokens=None if ids is None else [model.token_labels[each] for each in ids],
        found=found,
        links=links,
        names=_names(label, found),
        tokens=[_ends(node, basis) for node in found],
    )


def _ids(
    model: HookedBilinearTransformer, prompt: str | Sequence[int] | Int[Tensor, "*one pos"]
) -> list[int]:
    if isinstance(prompt, str):
        return model.to_tokens(prompt)[0].tolist()
    tokens = torch.as_tensor(prompt)
    if tokens.ndim == 2 and len(tokens) == 1:
        tokens = tokens[0]
    if tokens.ndim != 1 or tokens.is_floating_point():
        raise ValueError(
            f"prompt is {tokens.dtype} of shape {list(tokens.shape)}; give a text, or the token "
            "ids of one, [pos] or [1, pos]."
        )
    return tokens.tolist()


def _check_no_norms_after(model: HookedBilinearTransformer) -> None:
    if any(hasattr(model.blocks[0], norm) for norm in ("ln1_post", "ln2_post")):
        raise ValueError(
            f"{model.cfg.model_name} norms what its blocks write, by a scale that depends on the "
            "prompt: give one (prompt=...)."
        )


def _search(
    reader: VocabularyReader | PromptReader,
    root: Node,
    layer: int | None,
    width: int,
    depth: int,
    random: int | None,
) -> tuple[list[Node], list[Edge]]:
    """At each step, of all that write below the nodes of the last step, those that carry most of
    the root, or some at random. Writers of one place that read parallel directions are one."""
    found, links, beam = [root], [], [root]
    order = count()
    draw = None if random is None else shuffling.Random(random)
    for _ in tqdm(range(depth), desc="Tracing", leave=False):
        heap: list[tuple[float, int, Edge]] = []

        def push(edge: Edge, heap=heap) -> None:
            if edge.share != 0:
                rank = -abs(edge.score) if draw is None else draw.random()
                heapq.heappush(heap, (rank, next(order), edge))

        for upper in beam:
            for edge in reader.writers(upper):
                at = edge.lower.place
                if upper is root and layer is not None and (at.kind, at.layer) != ("MLP", layer):
                    continue
                push(edge)
        beam = []
        while heap and len(beam) < width:
            *_, edge = heapq.heappop(heap)
            if edge.lower.place.kind == "MLP":
                for each in reader.eigenvectors(
                    edge, width if draw is None else edge.lower.reads.numel()
                ):
                    push(each)
                continue
            known = next((node for node in found if _same(node, edge.lower)), None)
            if known is None:
                found.append(known := edge.lower)
                beam.append(known)
            opposite = known.place.kind == "head" and known.reads @ edge.lower.reads < 0
            weight = -edge.weight if opposite else edge.weight
            links.append(Edge(known, edge.upper, weight, edge.share))
        beam = [node for node in beam if node.place.kind != "embedding"]
        _add_scores(found, links)
    return _best_first(found, links), links


def _best_first(found: list[Node], links: list[Edge]) -> list[Node]:
    """The output, then again and again the node that carries most of those below what is there."""
    below: dict[Node, list[Node]] = {}
    for edge in links:
        below.setdefault(edge.upper, []).append(edge.lower)
    rank = {node: (-abs(node.score), i) for i, node in enumerate(found)}
    heap, order = [(rank[found[0]], found[0])], {}
    while heap:
        _, node = heapq.heappop(heap)
        if node not in order:
            order[node] = None
            for each in below.get(node, []):
                heapq.heappush(heap, (rank[each], each))
    return list(order)


def _same(node: Node, other: Node) -> bool:
    if node.place != other.place:
        return False
    return node.place.kind == "embedding" or bool((node.reads @ other.reads).abs() >= PARALLEL)


def _add_scores(found: list[Node], links: list[Edge]) -> None:
    """Each node's share of the output: the sum over its edges, from above to below."""
    for node in sorted(found[1:], key=lambda node: node.place.height, reverse=True):
        node.score = sum(edge.score for edge in links if edge.lower is node)


def _names(output: str, found: list[Node]) -> list[str]:
    """The output's label, and for each node its place, numbered where there are several."""
    names = [output.removesuffix(" - mean"), *(node.name for node in found[1:])]
    often, seen = Counter(names), Counter()
    for i, name in enumerate(names):
        if often[name] > 1:
            seen[name] += 1
            names[i] = f"{name} #{seen[name]}"
    return names


def _ends(node: Node, basis: Basis) -> tuple[list[str], list[str]]:
    """The tokens that project most on what a node reads, and those that project least."""
    if node.place.kind == "embedding":
        return [], []
    projections = basis.directions @ node.reads.to(basis.directions)
    ends = (projections.topk(N_TOKENS, largest=most).indices for most in (True, False))
    most, least = ([str(basis.labels[i]) for i in end.tolist()] for end in ends)
    return most, least
