"""Circuits: what an output reads, through eigenvectors and heads down to tokens."""

import json
from dataclasses import asdict, dataclass, fields, replace
from html import escape
from itertools import compress
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bilinear_lens.analysis.attribution_graph import attribution_graph
from bilinear_lens.analysis.nodes import Edge, Node, Place
from bilinear_lens.models.transformer import HookedBilinearTransformer

_FORMAT = "bilinear_lens circuit"
"""Under which the metadata of a file has all that is no tensor."""


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
    """The output first, then always the node that carries most of those below the ones before."""
    links: list[Edge]
    names: list[str]
    """Of each node: `L0H3`, `MLP 1 e4`, on a prompt with its position, `L0H3@5`; numbered where
    there are several."""
    tokens: list[tuple[list[str], list[str]]]
    """For each node, the tokens that project most on what it reads, and those that do least."""
    node_effects: list[float] | None = None
    """As measured; see `measure_effects`."""
    edge_effects: list[float] | None = None

    @property
    def nodes(self) -> pd.DataFrame:
        """A row for each node.

        Columns `node`, `kind`, `layer`, `head`, `eigenvector`, `eigenvalue` (of its strongest
        edge), `position`, `token`, `score`: the share of the output that comes through the node, on
        a prompt of its value, from weights of its variance over the vocabulary; `measured`, if it
        was; `reads_most`, `reads_least`: tokens at both ends of what it reads.
        """
        strongest: dict[Node, float] = {}
        for edge in sorted(self.links, key=lambda edge: abs(edge.share)):
            strongest[edge.lower] = edge.weight
        rows = [
            {
                "node": name,
                "kind": node.place.kind,
                "layer": node.place.layer,
                "head": node.place.head,
                "eigenvector": node.index,
                "eigenvalue": None if node.index is None else strongest[node],
                "position": node.place.position,
                "token": self._token(node),
                "score": node.score,
                "reads_most": most,
                "reads_least": least,
            }
            for name, node, (most, least) in zip(self.names, self.found, self.tokens, strict=True)
        ]
        whole = dict.fromkeys(("head", "eigenvector", "position"), "Int64")  # not all have them
        return _measured(pd.DataFrame(rows).astype(whole), self.node_effects)

    def _token(self, node: Node) -> str | None:
        position = node.place.position
        return None if position is None else (self.prompt_tokens or [])[position]

    @property
    def edges(self) -> pd.DataFrame:
        """A row for each edge.

        Columns `lower`, `upper`, `weight`: times the lower node's activation is what it writes, so
        that of an eigenvector it is the eigenvalue; `share` of what the upper node reads; `score`:
        the share of the output that comes along the edge; `measured`, if it was.
        """
        at = dict(zip(self.found, self.names, strict=True))
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

    @property
    def correlation(self) -> pd.Series:
        """Of predicted with measured effects: entries `nodes`, below the output, `edges`, and of
        their ranks, which few large ones do not decide, `nodes, ranks` and `edges, ranks`.

        Raises:
            ValueError: if they were not measured.
        """
        if self.node_effects is None:
            raise ValueError("No effect was measured: measure_effects(model, circuit) does that.")
        tables = {"nodes": self.nodes.iloc[1:], "edges": self.edges}
        tables = {name: table[["score", "measured"]] for name, table in tables.items()}
        tables |= {f"{name}, ranks": table.rank() for name, table in tables.items()}
        return pd.Series({name: t["score"].corr(t["measured"]) for name, t in tables.items()})

    def top(self, n: int) -> "Circuit":
        """The output and the n nodes that come first, with the edges between them.

        Raises:
            ValueError: if n is not between 1 and the number of nodes below the output.
        """
        if not 1 <= n < len(self.found):
            raise ValueError(f"n={n} must be between 1 and the {len(self.found) - 1} nodes.")
        kept = set(self.found[: n + 1])
        within = [edge.lower in kept and edge.upper in kept for edge in self.links]
        effects = self.edge_effects
        return replace(
            self,
            found=self.found[: n + 1],
            links=list(compress(self.links, within)),
            names=self.names[: n + 1],
            tokens=self.tokens[: n + 1],
            node_effects=self.node_effects and self.node_effects[: n + 1],
            edge_effects=effects and list(compress(effects, within)),
        )

    def paths(self, lower: str, upper: str | None = None) -> pd.DataFrame:
        """All ways from a node up to another.

        Args:
            lower, upper: names, as in `nodes`; None is the output.

        Returns:
            Columns `path`, the names from above to below, and `share` of what `upper` reads; the
            largest magnitude first.

        Raises:
            KeyError: if there is no such node.
            ValueError: if `lower` is not below `upper`.
        """
        at = dict(zip(self.names, self.found, strict=True))
        upper = upper or self.names[0]
        for name in (lower, upper):
            if name not in at:
                raise KeyError(f"No node {name!r} in this circuit; there are {', '.join(at)}.")
        if at[lower].place.height >= at[upper].place.height:
            raise ValueError(f"{lower!r} is not below {upper!r}: paths go up, from lower to upper.")
        names = {node: name for name, node in at.items()}
        ways, rows = [([lower], 1.0)], []
        while ways:
            names_up, share = ways.pop()
            for edge in self.links:
                if names[edge.lower] == names_up[0]:
                    way = [names[edge.upper], *names_up], share * edge.share
                    (rows if edge.upper is at[upper] else ways).append(way)
        rows.sort(key=lambda row: -abs(row[1]))
        return pd.DataFrame(rows, columns=["path", "share"])

    def check_model(self, model: HookedBilinearTransformer) -> None:
        """Refuse another model than the circuit's.

        Raises:
            ValueError: if the model's weights are others.
        """
        if model.fingerprint() != self.fingerprint:
            raise ValueError(
                f"This circuit is of {self.model}, and not of these weights of "
                f"{model.cfg.model_name}: trace the output again."
            )

    def save(self, path: str | Path) -> None:
        """Write the circuit to a safetensors file, whole or not at all.

        Raises:
            ValueError: if the file cannot be written.
        """
        index = {node: i for i, node in enumerate(self.found)}
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {name: value for name, value in said.items() if name not in ("found", "links")}
        plain["nodes"] = [
            {**asdict(node.place), "index": node.index, "constant": node.constant}
            for node in self.found
        ]
        tensors = {
            "reads": torch.stack([node.reads for node in self.found]).cpu(),
            "scores": _table([node.score for node in self.found]),
            "edges": _table(
                [
                    [index[edge.lower], index[edge.upper], edge.weight, edge.share]
                    for edge in self.links
                ]
            ).reshape(-1, 4),
        }
        path = Path(path)
        part = path.with_name(f"{path.name}.part")
        try:
            save_file(tensors, part, {_FORMAT: json.dumps(plain)})
            part.replace(path)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise ValueError(f"Cannot write {path}: {error}. Name a file in a folder.") from error

    @classmethod
    def load(cls, path: str | Path) -> "Circuit":
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is no circuit.
        """
        try:
            with safe_open(path, "pt") as file:
                said = (file.metadata() or {}).get(_FORMAT)
                if said is None:
                    raise ValueError(f"it has no {_FORMAT!r} in its metadata")
                reads, scores, edges = (file.get_tensor(n) for n in ("reads", "scores", "edges"))
            return cls(**_parts(json.loads(said), reads, scores, edges))
        except (
            OSError,
            SafetensorError,
            AttributeError,
            IndexError,
            KeyError,
            TypeError,
            ValueError,
        ) as error:
            raise ValueError(f"{path} is no circuit that `Circuit.save` wrote: {error}") from error

    def to_json(self) -> str:
        """The circuit in the graph schema of circuit-tracer and Neuronpedia.

        `analysis.attribution_graph` says which fields are filled.
        """
        graph = attribution_graph(
            self.nodes, self.edges, model=self.model, title=self.title, prompt=self.prompt_tokens
        )
        return json.dumps(graph, indent=1)

    def __repr__(self) -> str:
        nodes = self.nodes[["node", "token", "score", "reads_most", "reads_least"]]
        words = {end: list(map(" ".join, nodes[end])) for end in ("reads_most", "reads_least")}
        shown = nodes.assign(**words).round({"score": 4}).fillna("")
        return f"{self.title}\n{shown.to_string(max_rows=20, index=False)}"

    def _repr_html_(self) -> str:
        return f"<p>{escape(self.title)}</p>{self.nodes.to_html(max_rows=20)}"

    @property
    def title(self) -> str:
        """What the circuit is of."""
        prompt = "".join(self.prompt_tokens or [])
        where = f"on {prompt!r}" if prompt else "from weights"
        return f"{self.output} in {self.model}, {where}"


def _parts(
    plain: dict[str, Any], reads: torch.Tensor, scores: torch.Tensor, edges: torch.Tensor
) -> dict[str, Any]:
    """A circuit's fields, of what a file holds.

    Raises:
        ValueError: if they contradict each other; others where one is missing.
    """
    if not all(tensor.isfinite().all() for tensor in (reads, scores, edges)):
        raise ValueError("it holds NaN or infinite numbers")
    found = [
        Node(
            Place(**{name: each[name] for name in ("kind", "layer", "head", "position")}),
            vector,
            each["index"],
            each["constant"],
            score,
        )
        for each, vector, score in zip(plain.pop("nodes"), reads, scores.tolist(), strict=True)
    ]
    ends = edges[:, :2].long().tolist()
    if any(not 0 <= end < len(found) for pair in ends for end in pair):
        raise ValueError("an edge joins a node that is not there")
    links = [
        Edge(found[lower], found[upper], weight, share)
        for (lower, upper), (weight, share) in zip(ends, edges[:, 2:].tolist(), strict=True)
    ]
    if any(edge.lower.place.height >= edge.upper.place.height for edge in links):
        raise ValueError("an edge does not go up")
    prompt, shown = plain["prompt"] or [], plain["prompt_tokens"] or []
    if len(prompt) != len(shown) or any(
        (each.place.position or 0) >= max(1, len(prompt)) for each in found
    ):
        raise ValueError("its prompt is not that of its nodes")
    tokens = [(most, least) for most, least in plain.pop("tokens")]
    for name, rows, n in (
        ("names", plain["names"], len(found)),
        ("tokens", tokens, len(found)),
        ("node_effects", plain["node_effects"], len(found)),
        ("edge_effects", plain["edge_effects"], len(links)),
    ):
        if rows is not None and len(rows) != n:
            raise ValueError(f"it has {len(rows)} {name}, and {n} nodes or edges that need one")
    return {**plain, "tokens": tokens, "found": found, "links": links}


def _measured(frame: pd.DataFrame, effects: list[float] | None) -> pd.DataFrame:
    if effects is not None:
        frame.insert(list(frame.columns).index("score") + 1, "measured", effects)
    return frame


def _table(rows: list) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)
