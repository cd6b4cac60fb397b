"""Measured effects and faithfulness, against computations by hand on the plain model."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import OlmoConfig

import bilinear_lens as bl

PROMPT = "Once upon a time there was a little girl"
WINDOW = 48


@cache
def model(name: str) -> Any:
    return bl.HookedBilinearTransformer.from_pretrained(name)


@cache
def stories() -> list[str]:
    return bl.held_out_stories()[:3]


@cache
def traced(name: str, prompt: str | None, depth: int = 3) -> Any:
    return bl.trace(model(name), " named", prompt=prompt, width=4, depth=depth)


class ByHand:
    """The model's activations on some text, and what a node of a circuit writes there, from the
    circuit's directions and the model's own activations alone."""

    def __init__(self, name: str, circuit: Any, prompt: str | None) -> None:
        self.model, self.circuit = model(name), circuit
        self.tokens = self.model.to_tokens(prompt) if prompt else self.windows()
        self.prompt = prompt
        with torch.no_grad():
            self.logits, self.cache = self.model.run_with_cache(self.tokens)
        self.answer = self.model.token_id(" named")

    def windows(self) -> Tensor:
        first = self.model.tokenizer.bos_token_id
        rows = [self.model.tokenizer(s, add_special_tokens=False)["input_ids"] for s in stories()]
        stream = [token for row in rows for token in (first, *row)]
        return torch.tensor(stream[: len(stream) // WINDOW * WINDOW]).unflatten(0, (-1, WINDOW))

    def norm(self, node: Any) -> Tensor:
        place = {"head": "ln1", "eigenvector": "ln2"}[node.place.kind]
        return self.cache[f"blocks.{node.place.layer}.{place}.hook_scale"][..., 0]

    def stream(self, node: Any) -> Tensor:
        """What it reads of, before its norm."""
        at = node.place
        name = {
            "embedding": "blocks.0.hook_resid_pre",
            "head": f"blocks.{at.layer}.hook_resid_pre",
            "eigenvector": f"blocks.{at.layer}.hook_resid_mid",
            "output": f"blocks.{at.layer - 1}.hook_resid_post",
        }[at.kind]
        return self.cache[name]

    def written(self, lower: Any, upper: Any, reading: Tensor | None = None) -> Tensor:
        """Along what `upper` reads; `reading` is of the stream before the norm."""
        at, along = lower.place, upper.reads
        if at.kind == "embedding":
            return self.cache["blocks.0.hook_resid_pre"] @ along
        raw: Any = self.stream(lower) @ lower.reads if reading is None else reading
        read: Tensor = raw / self.norm(lower)
        if at.kind == "eigenvector":
            matrix = self.model.bilinear_tensor(at.layer).interaction(along)
            return (lower.reads @ matrix @ lower.reads) * read.square()
        weight = self.model.head_weight(at.layer, at.head) @ along
        pattern = self.cache[f"blocks.{at.layer}.attn.hook_pattern"][:, at.head]
        if at.position is not None:
            pattern = pattern * (torch.arange(pattern.shape[-1]) == at.position)
        return (weight @ lower.reads) * torch.einsum("bqk,bk->bq", pattern, read)

    def after(self, node: Any) -> str:
        at = node.place
        end = {"head": f"{at.layer}.hook_resid_mid", "embedding": "0.hook_resid_pre"}
        return f"blocks.{end.get(at.kind, f'{at.layer}.hook_resid_post')}"

    def mean(self, written: Tensor) -> Tensor:
        return written[:, 1:].mean() if self.prompt is None else torch.zeros(())

    def effect(self, name: str, uppers: list, changes: list[Tensor]) -> float:
        """Of the least change of an activation that changes its projections on what some nodes read
        by so much: on a prompt only where they read."""
        if self.prompt:
            there = torch.arange(self.tokens.shape[1])
            changes = [
                c * (there == u.place.position) for u, c in zip(uppers, changes, strict=True)
            ]
        directions = torch.stack([upper.reads for upper in uppers]).double()
        wanted = torch.stack(changes, -1).double().flatten(0, 1).mT
        delta = torch.linalg.lstsq(directions, wanted, driver="gelsd", rcond=1e-3).solution
        delta = delta.mT.view(*self.tokens.shape, -1).float()
        with torch.no_grad():
            logits = self.model.run_with_hooks(
                self.tokens, fwd_hooks=[(name, lambda activation, hook: activation + delta)]
            )
        before, then = (self.centred(each) for each in (self.logits, logits))
        if self.prompt:
            return (1 - then[0, -1] / before[0, -1]).item()
        return ((before - then)[:, 1:].square().mean() / before[:, 1:].var()).item()

    def centred(self, logits: Tensor) -> Tensor:
        return logits[..., self.answer] - logits.mean(-1)

    def of_node(self, node: Any) -> float:
        uppers = [edge.upper for edge in self.circuit.links if edge.lower is node]
        written = [self.written(node, upper) for upper in uppers]
        changes = [self.mean(each) - each for each in written]
        return self.effect(self.after(node), uppers, changes)

    def of_edge(self, edge: Any) -> float:
        part = self.written(edge.lower, edge.upper)
        lost = self.mean(part) - part
        if edge.upper.place.kind == "output":
            last = f"blocks.{edge.upper.place.layer - 1}.hook_resid_post"
            return self.effect(last, [edge.upper], [lost])
        if self.prompt and edge.upper.place.kind != "head":
            there = torch.arange(self.tokens.shape[1]) == edge.upper.place.position
            lost = lost * there
        reading = self.stream(edge.upper) @ edge.upper.reads + lost
        uppers = [each.upper for each in self.circuit.links if each.lower is edge.upper]
        changes = [
            self.written(edge.upper, upper, reading) - self.written(edge.upper, upper)
            for upper in uppers
        ]
        return self.effect(self.after(edge.upper), uppers, changes)


CASES = [
    ("tinystories-1l", None, 3),
    ("tinystories-1l", PROMPT, 3),
    ("tinystories-4l", PROMPT, 6),
]


@pytest.mark.parametrize(("name", "prompt", "depth"), CASES)
def test_effects_are_those_of_hooks_by_hand(name, prompt, depth):
    circuit = traced(name, prompt, depth)
    kinds = {node.place.kind for node in circuit.found}
    assert kinds == {"output", "eigenvector", "head", "embedding"}
    measured = bl.measure_effects(model(name), circuit, stories(), window=WINDOW)
    by_hand = ByHand(name, circuit, prompt)
    nodes = [by_hand.of_node(node) for node in circuit.found[1:]]
    assert list(measured.nodes["measured"])[1:] == pytest.approx(nodes, rel=5e-3, abs=2e-5)
    edges = [by_hand.of_edge(edge) for edge in circuit.links]
    assert list(measured.edges["measured"]) == pytest.approx(edges, rel=5e-3, abs=2e-5)
    scores = circuit.nodes["score"].tolist()[1:]  # and a prediction is no measurement
    assert scores != pytest.approx(nodes, rel=0.05, abs=1e-3)


@pytest.mark.parametrize("prompt", [None, PROMPT])
@pytest.mark.parametrize("layer", [None, 0])
def test_what_is_left_is_that_of_the_kept_nodes_by_hand(prompt, layer):
    hooked = model("tinystories-1l")
    circuit = bl.trace(hooked, " named", prompt=prompt, layer=layer, width=4, depth=3)
    curve = bl.faithfulness(hooked, circuit, stories(), window=WINDOW)
    text, run = ByHand("tinystories-1l", circuit, None), ByHand("tinystories-1l", circuit, prompt)
    whole_head = {
        node: replace(node, place=replace(node.place, position=None)) for node in circuit.found
    }

    def mean_reading(node) -> Tensor:
        return (text.stream(node) @ node.reads)[:, 1:].mean()

    def mean_written(edge) -> Tensor:
        at = edge.lower.place
        if at.kind == "head" and at.position is not None:  # what its pattern makes of the mean
            there = (text.stream(edge.lower) @ edge.lower.reads / text.norm(edge.lower))[:, 1:]
            constant = there.mean() * run.norm(edge.lower)
            return run.written(edge.lower, edge.upper, constant)
        return text.written(whole_head[edge.lower], edge.upper)[:, 1:].mean()

    def reading(node, kept) -> Tensor | None:
        if not any(edge.upper is node for edge in circuit.links):
            return None
        return mean_reading(node) + below(node, kept)

    def below(node, kept) -> Tensor:
        parts = [
            run.written(edge.lower, node, reading(edge.lower, kept)) - mean_written(edge)
            for edge in circuit.links
            if edge.upper is node and edge.lower in kept
        ]
        return sum(parts, torch.zeros(run.tokens.shape))

    root = circuit.found[0]

    def along(kept) -> Tensor:
        last = run.stream(root)
        if layer is None:
            change = mean_reading(root) - last @ root.reads
        else:
            added = [
                each.stream(root) - each.cache["blocks.0.hook_resid_mid"] for each in (text, run)
            ]
            change = (added[0] @ root.reads)[:, 1:].mean() - added[1] @ root.reads
        stream = last + (change + below(root, kept))[..., None] * root.reads
        logits = hooked.unembed(hooked.ln_final(stream))
        centred = run.centred(logits)
        return centred[0, -1:] if prompt else centred[:, 1:].flatten()

    with torch.no_grad():
        none = along(set())
        gone = run.centred(run.logits)
        gone = (gone[0, -1:] if prompt else gone[:, 1:].flatten()) - none
        for n in range(len(circuit.found)):
            left = along(set(circuit.found[1 : n + 1])) - none
            expected = (left @ gone / (gone @ gone)).item()
            assert curve["left"].iloc[n] == pytest.approx(expected, rel=2e-3, abs=2e-3)
    assert curve["left"].tolist()[-1] > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_other_precision(dtype):
    hooked = bl.HookedBilinearTransformer.from_pretrained("tinystories-1l", dtype=dtype)
    if dtype == torch.float64:
        with pytest.raises(ValueError, match=r"float64.*dtype=torch\.float32"):
            bl.trace(hooked, " named", prompt=PROMPT)
        with pytest.raises(ValueError, match=r"float64.*dtype=torch\.float32"):
            bl.trace(hooked, " named")
        return
    circuit = bl.measure_effects(hooked, bl.trace(hooked, " named", prompt=PROMPT, width=4))
    assert circuit.correlation.to_dict()["nodes"] > 0.9
    left = bl.faithfulness(hooked, circuit, stories(), window=WINDOW)["left"].tolist()
    assert left[-1] > 0.5


def test_a_window_too_short_is_refused():
    circuit = traced("tinystories-1l", None)
    for window in (1, 0, -3):
        with pytest.raises(ValueError, match=f"window={window} must be at least 2"):
            bl.measure_effects(model("tinystories-1l"), circuit, stories(), window=window)


def test_norms_that_subtract_the_mean_are_refused():
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 32}
    config = OlmoConfig(
        **sizes,
        num_hidden_layers=1,
        num_attention_heads=4,
        hidden_act="linear",
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    hooked = bl.HookedBilinearTransformer.from_config(config)
    tokens, direction = torch.tensor([[3, 5, 7]]), torch.randn(24)
    for read in (
        lambda: bl.trace(hooked, direction),
        lambda: bl.trace(hooked, direction, prompt=tokens),
        lambda: bl.attribute(hooked, tokens, direction, layer=0),
        hooked.token_basis,
        lambda: hooked.output_direction(3),
    ):
        with pytest.raises(ValueError, match=r"subtract the mean \(LayerNorm\)"):
            read()


def test_a_prompt_may_be_ids_in_any_form():
    hooked = model("tinystories-1l")
    tokens = hooked.to_tokens(PROMPT)
    nodes = [
        bl.trace(hooked, " named", prompt=prompt, width=2, depth=2).nodes
        for prompt in (PROMPT, tokens, tokens[0], tokens[0].tolist())
    ]
    assert all(each.equals(nodes[0]) for each in nodes[1:])
    for prompt in (tokens.repeat(2, 1), tokens.float()):
        with pytest.raises((ValueError, TypeError), match="prompt"):
            bl.trace(hooked, " named", prompt=prompt)
