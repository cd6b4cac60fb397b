"""Circuits: what an output reads, through eigenvectors and heads down to tokens."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import pandas as pd
import torch
from torch import Tensor

from bilinear_lens.analysis.nodes import Edge, Node
from bilinear_lens.models.transformer import HookedBilinearTransformer


@dataclass(frozen=True, eq=False)
class Circuit:
    """What an output reads, as a graph: nodes write along what the nodes above them read."""

    model: str
    fingerprint: str
    """Of the model's weights."""
    output: str
    layer: int | None
    """Of the MLP whose eigenvectors are the first step, or None for all that writes."""
    prompt: list[int] | None
    """Token ids, of a circuit on a prompt."""
    prompt_tokens: list[str] | None
    found: list[Node]
    """The output first, then as they were found."""
    links: list[Edge]
    tokens: list[tuple[list[str], list[str]]]
    """For each node, the tokens that project most on what it reads, and those that do least."""
    node_effects: list[float] | None = None
    """As measured; see `measure_effects`."""
    edge_effects: list[float] | None = None

    @cached_property
    def ids(self) -> list[str]:
        """A name for each node: `L0H3`, `MLP 1 e4`, on a prompt with its position, `L0H3@5`."""
        names = [node.name for node in self.found]
        seen: Counter[str] = Counter()
        for i, name in enumerate(names):
            seen[name] += 1
            if names.count(name) > 1:
                names[i] = f"{name} #{seen[name]}"
        return names

    @property
    def nodes(self) -> pd.DataFrame:
        """A row for each node.

        Columns `node`, `kind`, `layer`, `head`, `eigenvector`, `position`, `token`, `score`: the
        share of the output that comes through the node, on a prompt of its value, from weights of
        its variance for isotropic inputs; `measured`, if it was; `reads_most`, `reads_least`:
        tokens at both ends of what it reads.
        """
        rows = [
            {
                "node": name,
                "kind": node.place.kind,
                "layer": node.place.layer,
                "head": node.place.head,
                "eigenvector": node.index,
                "position": node.place.position,
                "token": None if self.prompt_tokens is None else self.prompt_tokens[node.place.position],
                "score": node.score,
                "reads_most": most,
                "reads_least": least,
            }
            for name, node, (most, least) in zip(self.ids, self.found, self.tokens, strict=True)
        ]
        return _measured(pd.DataFrame(rows), self.node_effects)

    @property
    def edges(self) -> pd.DataFrame:
        """A row for each edge.

        Columns `lower`, `upper`, `weight`: times the lower node's activation is what it writes, so
        that of an eigenvector it is the eigenvalue; `share` of what the upper node reads; `score`:
        the share of the output that comes along the edge; `measured`, if it was.
        """
        at = {node: name for node, name in zip(self.found, self.ids, strict=True)}
        rows = [
            {
                "lower": at[edge.lower],
                "upper": at[edge.upper],
                "weight": edge.weight,
                "share": edge.share,
                "score": edge.score,
            }
            for edge in self.links
        ]
        columns = ["lower", "upper", "weight", "share", "score"]
        return _measured(pd.DataFrame(rows, columns=columns), self.edge_effects)

    def check_model(self, model: HookedBilinearTransformer) -> None:
        """Refuse another model than the circuit's.

        Raises:
            ValueError: if the model's weights are others.
        """
        if model.fingerprint() != self.fingerprint:
            raise ValueError(
                f"This circuit is of {self.model} with other weights than this "
                f"{model.cfg.model_name}: trace the output again."
            )


def _measured(frame: pd.DataFrame, effects: list[float] | None) -> pd.DataFrame:
    if effects is not None:
        frame.insert(frame.columns.get_loc("score") + 1, "measured", effects)  # pyright: ignore[reportArgumentType]
    return frame
