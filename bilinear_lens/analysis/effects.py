"""Are circuits true? What the output loses without a node or an edge, and without all the rest."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge.exceptions import StopAtLayerException

from bilinear_lens.analysis.ablation import text_windows
from bilinear_lens.analysis.circuits import Circuit
from bilinear_lens.analysis.nodes import Edge, Node
from bilinear_lens.analysis.paths import FrozenRun
from bilinear_lens.models.transformer import HookedBilinearTransformer

BATCH = 2048
"""Tokens of text that are run at once."""


@torch.no_grad()
def measure_effects(
    model: HookedBilinearTransformer,
    circuit: Circuit,
    text: Sequence[str] = (),
    *,
    window: int = 128,
) -> Circuit:
    """Measure what the output loses without each node, and without each edge.

    - Without a node: what it writes along the directions that the nodes above it read is taken out
      of the residual stream, by the shortest vector, and the model runs on from there. Of an
      eigenvector that is an edit of its activation, `hook_acts` of `add_eigenbasis`.
    - Without an edge: the node above writes what it would write without the lower one's part of
      what it reads.

    Of a circuit on a prompt, the effect is the share of the output that is lost at the prompt's
    end. Of one from weights, all but the mean over `text` is taken out, and the effect is the mean
    square of the change by the output's variance. The output is the projection of what reaches the
    unembedding.

    Args:
        text: documents, for a circuit from weights.
        window: tokens that the model reads at a time, at most its context.

    Returns:
        The circuit with columns `measured` in its nodes and edges, beside the predicted `score`.

    Raises:
        ValueError: if the circuit is of another model, or from weights and there is no text, or
            less than a window.
    """
    circuit.check_model(model)
    runs = _runs(model, circuit, text, window)
    means = None if circuit.prompt else _Means.over(runs, circuit)
    things = [*circuit.found[1:], *circuit.links]
    changes: list[list[Tensor]] = [[] for _ in things]
    outputs = []
    bar = tqdm(total=len(things) * len(runs), desc="Measuring", leave=False)
    for run in runs:
        restricted = _Restricted(circuit, run, means)
        outputs.append(restricted.output())
        for each, found in zip(things, changes, strict=True):
            found.append(outputs[-1] - restricted.output(*restricted.without(each)))
            bar.update()
    bar.close()
    output = torch.cat(outputs)
    effects = [
        (change.square().mean() / output.var() if means else change / output).item()
        for change in map(torch.cat, changes)
    ]
    n = len(circuit.found) - 1
    return replace(circuit, node_effects=[1.0, *effects[:n]], edge_effects=effects[n:])


@torch.no_grad()
def faithfulness(
    model: HookedBilinearTransformer,
    circuit: Circuit,
    text: Sequence[str],
    *,
    random: Sequence[Circuit] = (),
    window: int = 128,
) -> pd.DataFrame:
    """How much of the output is left when nothing but the circuit writes it.

    What a node reads is held at its mean over `text`, but for what the kept nodes write there; one
    with none below it in the whole circuit reads as it does in the model, so that a deeper circuit,
    which is given less, may leave less. Attention patterns and the scales of the nodes' norms are
    those of the whole model. What the kept nodes write then stands for what the output's MLP (of a
    circuit with a `layer`), or all MLPs and heads, write along the output, and the model runs on
    from there.

    Args:
        text: documents, for the means; of a circuit from weights, also what the output is measured
            on.
        random: circuits of random nodes, from `trace(..., random=seed)`, for a control.
        window: as for `measure_effects`.

    Returns:
        A row for each number of nodes, kept in the circuit's order: columns `circuit`
        (`traced` or `random`), `draw`, `nodes`, `left`: 1 where the output is as it was, 0 where
        it is as without any node, by regression over the text's positions; `explained`: of the
        squared difference between the two, the share that is made up.

    Raises:
        ValueError: if a circuit is of another model, or there is no text, or less than a window.
    """
    reference = _runs(model, None, text, window)
    rows = []
    draws = [("traced", 0, circuit), *(("random", i, each) for i, each in enumerate(random))]
    bar = tqdm(total=sum(len(each.found) for *_, each in draws), desc="Keeping", leave=False)
    for name, draw, each in draws:
        each.check_model(model)
        means = _Means.over(reference, each)
        runs = _runs(model, each, text, window) if each.prompt else reference
        restricted = [_Restricted(each, run, means) for run in runs]
        whole = torch.cat([run.output() for run in restricted])
        outs: list[Tensor] = []
        for n in range(len(each.found)):
            kept = set(each.found[1 : n + 1])
            outs.append(torch.cat([run.output(*run.only(kept)) for run in restricted]))
            gone, left = whole - outs[0], outs[n] - outs[0]
            rows.append(
                {
                    "circuit": name,
                    "draw": draw,
                    "nodes": n,
                    "left": (left @ gone / (gone @ gone)).item(),
                    "explained": 1 - ((whole - outs[n]).square().sum() / (gone @ gone)).item(),
                }
            )
            bar.update()
    bar.close()
    return pd.DataFrame(rows)


def _runs(
    model: HookedBilinearTransformer, circuit: Circuit | None, text: Sequence[str], window: int
) -> list[FrozenRun]:
    if circuit is not None and circuit.prompt is not None:
        return [FrozenRun(model, torch.tensor([circuit.prompt], device=model.cfg.device))]
    if window < 2:
        raise ValueError(f"window={window} must be at least 2 tokens: the first is not counted.")
    windows = text_windows(model, text, n_tokens=min(window, model.cfg.n_ctx))
    return [FrozenRun(model, batch) for batch in windows.split(max(1, BATCH // windows.shape[1]))]


@dataclass(frozen=True, eq=False)
class _Means:
    """Over text."""

    reading: dict[Node, float]
    whole: dict[Node, float]
    carries: dict[Edge, float]
    layer: float
    """What the MLP of the circuit's `layer` writes along the output."""

    @classmethod
    def over(cls, runs: Sequence[FrozenRun], circuit: Circuit) -> "_Means":
        def mean(values: Iterable[Tensor]) -> float:
            # where outputs are measured: at each position but the first
            return torch.cat([value[:, 1:].flatten() for value in values]).mean().item()

        anywhere = {
            node: replace(node, place=replace(node.place, position=None)) for node in circuit.found
        }
        edges = {edge: replace(edge, lower=anywhere[edge.lower]) for edge in circuit.links}
        return cls(
            reading={node: mean(run.reading(node) for run in runs) for node in circuit.found},
            whole={node: mean(run.whole(node) for run in runs) for node in circuit.found},
            carries={edge: mean(run.carries(each) for run in runs) for edge, each in edges.items()},
            layer=mean(_written_by_layer(run, circuit) for run in runs),
        )


def _written_by_layer(run: FrozenRun, circuit: Circuit) -> Float[Tensor, "batch pos"]:
    if circuit.layer is None:
        return run.whole(circuit.found[0])
    before, after = (
        run.cache[f"blocks.{circuit.layer}.hook_resid_{end}"] for end in ("mid", "post")
    )
    return (after - before) @ circuit.found[0].reads


@dataclass(frozen=True, eq=False)
class _Restricted:
    """A model's run without parts of a circuit, or with nothing else."""

    circuit: Circuit
    run: FrozenRun
    means: _Means | None
    """What is left of what is taken out; None leaves nothing."""

    def output(self, name: str = "", change: Tensor | float = 0.0) -> Float[Tensor, " n"]:
        """What reaches the unembedding along the output, at the prompt's end, or at each position
        of text but the first, with a change of an activation."""
        model, root = self.run.model, self.circuit.found[0]
        last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
        if name in ("", last):
            stream = self.run.cache[last] + change
        else:

            def move(activation: Tensor, hook: object) -> Tensor:
                return (activation + change).to(activation)

            hooks = [(name, move), (last, _stop)]
            stream = model.run_with_hooks(self.run.tokens, fwd_hooks=hooks, return_type=None)
        scales: list[Tensor] = []
        keep = [("ln_final.hook_scale", lambda scale, hook: scales.append(scale[..., 0]))]
        with model.hooks(fwd_hooks=keep):
            model.ln_final(stream.to(model.cfg.dtype))
        along, position = stream.float() @ root.reads / scales[0], root.place.position
        return along[:, 1:].flatten() if position is None else along[:, position]

    def without(self, each: Node | Edge) -> tuple[str, Tensor]:
        """The hook's name and the change of the residual stream that take out a node or an edge."""
        return self._node(each) if isinstance(each, Node) else self._edge(each)

    def _node(self, node: Node) -> tuple[str, Tensor]:
        """The change of the residual stream that takes out what a node writes."""
        above = [edge for edge in self.circuit.links if edge.lower is node]
        changes = [self._at(edge, self._mean(edge) - self.run.carries(edge)) for edge in above]
        return _stream_after(node), _shortest(above, changes)

    def _edge(self, edge: Edge) -> tuple[str, Tensor]:
        """The change of what the upper node writes when it does not read the lower one's part."""
        upper, part = edge.upper, self.run.carries(edge) - self._mean(edge)
        if upper.place.kind == "output":
            change = -part[..., None] * upper.reads
            return f"blocks.{upper.place.layer - 1}.hook_resid_post", change
        above = [each for each in self.circuit.links if each.lower is upper]
        reading = self.run.reading(upper) - part * self.run.reading_scale(upper)
        changes = [
            self._at(each, self.run.carries(each, reading) - self.run.carries(each))
            for each in above
        ]
        return _stream_after(upper), _shortest(above, changes)

    def only(self, kept: set[Node]) -> tuple[str, Tensor]:
        """The change of the residual stream that leaves nothing but some nodes of the circuit."""
        root, layer = self.circuit.found[0], self.circuit.layer
        means = self._needed_means
        change = means.layer - _written_by_layer(self.run, self.circuit)
        change = change + self._written_below(root, kept)
        last = root.place.layer - 1 if layer is None else layer
        return f"blocks.{last}.hook_resid_post", change[..., None] * root.reads

    def _written_below(self, upper: Node, kept: set[Node]) -> Float[Tensor, "batch pos"]:
        """What those kept below a node write along what it reads, beyond their means."""
        total = torch.zeros_like(self.run.whole(upper))
        for edge in self.circuit.links:
            if edge.upper is upper and edge.lower in kept:
                written = self.run.carries(edge, self._reading(edge.lower, kept))
                total = total + written - self._mean(edge)
        return total

    def _reading(self, node: Node, kept: set[Node]) -> Float[Tensor, "batch pos"] | None:
        """What a node reads of those kept below it; None is what it reads in the model."""
        if not any(edge.upper is node for edge in self.circuit.links):
            return None
        whole = self._needed_means.whole[node] + self._written_below(node, kept)
        return whole * self.run.reading_scale(node)

    def _mean(self, edge: Edge) -> Float[Tensor, "batch pos"] | float:
        """What is left of what a node writes when it is taken out."""
        if self.means is None:
            return 0.0
        if edge.lower.place.kind == "head" and edge.lower.place.position is not None:
            reading = torch.full_like(self.run.whole(edge.lower), self.means.reading[edge.lower])
            return self.run.carries(edge, reading)
        return self.means.carries[edge]

    def _at(self, edge: Edge, change: Float[Tensor, "batch pos"]) -> Float[Tensor, "batch pos"]:
        """On a prompt, only where the upper node reads."""
        position = edge.upper.place.position
        if position is None:
            return change
        only = torch.zeros_like(change)
        only[:, position] = change[:, position]
        return only

    @property
    def _needed_means(self) -> _Means:
        assert self.means is not None
        return self.means


def _stop(stream: Tensor, hook: object) -> NoReturn:
    """The run ends here and gives the stream: logits would cost as much again."""
    raise StopAtLayerException(stream)


def _stream_after(node: Node) -> str:
    """Where a node writes."""
    at = node.place
    match at.kind:
        case "embedding":
            return "blocks.0.hook_resid_pre"
        case "head":
            return f"blocks.{at.layer}.hook_resid_mid"
        case _:
            return f"blocks.{at.layer}.hook_resid_post"


def _shortest(
    above: Sequence[Edge], changes: Sequence[Float[Tensor, "batch pos"]]
) -> Float[Tensor, "batch pos d_model"]:
    """The shortest vectors that change the projections on what some nodes read by so much."""
    directions = torch.stack([edge.upper.reads for edge in above])
    return torch.stack(list(changes), dim=-1) @ torch.linalg.pinv(directions, rtol=1e-3).mT
