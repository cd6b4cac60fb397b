"""Circuits in the graph schema of circuit-tracer, which Neuronpedia draws."""

from importlib.metadata import version
from itertools import accumulate
from typing import Any

import pandas as pd


def attribution_graph(
    nodes: pd.DataFrame, edges: pd.DataFrame, *, model: str, title: str, prompt: list[str] | None
) -> dict[str, Any]:
    """A circuit as circuit-tracer's `graph_models.py` and Neuronpedia's graph schema have it.

    Filled are, of `metadata`, `slug`, `scan` (the model), `prompt_tokens`, `prompt` and `info`; of
    each node `node_id`, `jsNodeId`, `feature` (its number in the circuit), `layer`, `ctx_idx`,
    `feature_type`, `clerp` (its name and what it reads), `influence` (the share of all scores that
    it and larger ones have) and `is_target_logit`; of each link `source`, `target` and `weight`
    (the share of the output). Eigenvectors and heads are both of the type "cross layer transcoder",
    the one that all frontends draw as a feature. There is no activation and no probability. Of a
    circuit from weights the prompt is empty, and its one token is the output.

    Args:
        nodes, edges: of a `Circuit`.
    """
    names = [str(name) for name in nodes["node"]]
    ranked = nodes["score"].abs().rank(method="first", ascending=False)
    sizes = sorted(nodes["score"].abs(), reverse=True)
    influence = [total / sum(sizes) for total in accumulate(sizes)]
    rows = [
        _node(i, row, influence[int(ranked.iloc[i]) - 1])
        for i, row in enumerate(nodes.to_dict("records"))
    ]
    ids = dict(zip(names, (row["node_id"] for row in rows), strict=True))
    links = [
        {"source": ids[edge["lower"]], "target": ids[edge["upper"]], "weight": edge["score"]}
        for edge in edges.to_dict("records")
    ]
    return {
        "metadata": {
            "slug": "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split()),
            "scan": model,
            "prompt_tokens": [title] if prompt is None else prompt,
            "prompt": "" if prompt is None else "".join(prompt),
            "info": {
                "description": title,
                "generator": {"name": "bilinear_lens", "version": version("bilinear_lens")},
            },
        },
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": rows,
        "links": links,
    }


def _node(number: int, row: dict[Any, Any], influence: float) -> dict[str, Any]:
    kind, position = row["kind"], row["position"]
    at = 0 if pd.isna(position) else int(position)
    layer = {"embedding": "E", "output": str(row["layer"] + 1)}.get(kind, str(row["layer"]))
    types = {"embedding": "embedding", "output": "logit"}
    reads = "" if not row["reads_most"] else f": {' '.join(row['reads_most'])}"
    return {
        "node_id": f"{layer}_{number}_{at}",
        "jsNodeId": f"{layer}_{number}-0",
        "feature": number,
        "layer": layer,
        "ctx_idx": at,
        "reverse_ctx_idx": 0,
        "run_idx": 0,
        "feature_type": types.get(kind, "cross layer transcoder"),
        "clerp": f"{row['node']}{reads}",
        "influence": influence,
        "activation": None,
        "token_prob": 0.0,
        "is_target_logit": kind == "output",
    }
