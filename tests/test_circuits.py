"""Circuits: shares that sum to one, effects that hooks confirm, and planted circuits found."""

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pandas as pd
import pytest
import torch
from models import CONFIGS, random_model, some_tokens
from safetensors.torch import save_file
from transformers import LlamaConfig

import bilinear_lens as bl
from bilinear_lens.analysis.nodes import Node, Place, unit
from bilinear_lens.analysis.paths import FrozenRun
from bilinear_lens.analysis.readers import PromptReader, VocabularyReader

PROMPT = "Once upon a time there was a little girl"
TINY: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "hidden_act": "linear",
}


@cache
def model(name: str = "tinystories-1l") -> Any:
    return bl.HookedBilinearTransformer.from_pretrained(name)


@cache
def stories() -> list[str]:
    return bl.held_out_stories()[:6]


@cache
def on_prompt() -> Any:
    return bl.measure_effects(model(), bl.trace(model(), " named", prompt=PROMPT))


@cache
def from_weights() -> Any:
    return bl.trace(model(), " named", width=6, depth=3)


def expanded(reader: PromptReader | VocabularyReader, upper: Node) -> list:
    """The edges from all writers, with each MLP's eigenvectors."""
    edges = []
    for edge in reader.writers(upper):
        if edge.lower.place.kind == "MLP":
            edges += reader.eigenvectors(edge, 10**6)
        else:
            edges.append(edge)
    return edges


@pytest.mark.parametrize("name", CONFIGS)
def test_shares_on_a_prompt_are_exact_at_every_step(name):
    hooked = bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS[name]))
    run = FrozenRun(hooked, some_tokens()[:1])
    reader = PromptReader(run)
    biased = name == "llama-biases" or name.startswith("qwen2")
    generator = torch.Generator().manual_seed(3)
    root, _ = unit(Place("output", 3, position=9), torch.randn(24, generator=generator))
    kinds = set()
    upper: Node | None = root
    while upper is not None:
        edges = expanded(reader, upper)
        for edge in edges:
            share = run.carries(edge) / run.whole(upper)
            at = upper.place.position
            assert edge.share == pytest.approx(share[0, at].item(), rel=2e-3, abs=1e-4)
        total = sum(edge.share for edge in edges)
        assert biased or total == pytest.approx(1, abs=1e-3)
        kinds.add(upper.place.kind)
        below = [edge.lower for edge in edges if edge.lower.place.kind not in ("embedding",)]
        # down through an eigenvector of each layer, then through a head
        wanted = [n for n in below if n.place.kind == "eigenvector"] or below
        upper = max(wanted, key=lambda node: node.place.height) if wanted else None
    assert kinds == {"output", "eigenvector", "head"}


def test_shares_without_a_part_do_not_sum_to_one():
    reader = PromptReader(FrozenRun(model(), model().to_tokens(PROMPT)))
    root, _ = unit(Place("output", 1, position=9), model().output_direction(" named"))
    edges = expanded(reader, root)
    assert sum(edge.share for edge in edges) == pytest.approx(1, abs=1e-4)
    largest = max(edges, key=lambda edge: abs(edge.share))
    assert sum(edge.share for edge in edges if edge is not largest) < 0.5


@pytest.mark.parametrize("name", ["tinystories-1l", "llama-biases"])
def test_shares_over_the_vocabulary_are_those_of_random_tokens(name):
    """A plain computation, on tokens drawn from the Gaussian that the reader assumes."""
    built_in = name.startswith("tiny")
    hooked = (
        model(name)
        if built_in
        else bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS[name]))
    )
    reader, d_model, n_layers = VocabularyReader(hooked), hooked.cfg.d_model, hooked.cfg.n_layers
    generator = torch.Generator().manual_seed(0)
    along = torch.randn(d_model, generator=generator)
    upper, _ = unit(Place("output", n_layers), along)
    edges = list(reader.writers(upper))
    tokens = hooked.token_basis().directions
    x = torch.randn(200_000, d_model, generator=generator, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(tokens.mT.cov().double())
    x = (x @ (vectors * values.clamp(min=0).sqrt()).mT).float() + tokens.mean(0)

    variances, written = {}, {}
    for edge in edges:
        at = edge.lower.place
        if at.kind == "embedding":
            variances[edge] = (hooked.embed(torch.arange(len(tokens))).float() @ upper.reads).var()
        elif at.kind == "head":
            assert at.head is not None
            reads = hooked.head_weight(at.layer, at.head) @ upper.reads
            torch.testing.assert_close(edge.weight * edge.lower.reads, reads)
            variances[edge] = (tokens @ reads).var()
        else:
            written[edge] = hooked.bilinear_tensor(at.layer)(x) @ upper.reads
    total = sum(variances.values()) + sum(each.var() for each in written.values())
    for edge, variance in variances.items():
        assert edge.share == pytest.approx((variance / total).item(), rel=0.02)
    for mlp in written:
        for edge in reader.eigenvectors(mlp, 3):
            adds = edge.weight * (x @ edge.lower.reads + edge.lower.constant) ** 2
            assert edge.share == pytest.approx((adds.var() / total).item(), rel=0.03)
            assert edge.share < mlp.share  # which bounds them


def test_eigenvectors_that_cancel_are_found():
    """A neuron that takes one token's axis from another's writes little on tokens that have both,
    and each of its two eigenvectors much."""
    plain = random_model(LlamaConfig(**TINY))
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            weight.fill_(1.0) if "norm" in name else weight.mul_(1e-3)
        embedding: Any = plain.get_input_embeddings()
        embedding.weight[:, :2] += torch.linspace(-1, 1, 40)[:, None]
        embedding.weight[:, 2] += 2
        decoder: Any = plain.get_decoder()
        layer = decoder.layers[0].mlp
        layer.gate_proj.weight[0, :2] += torch.tensor([1.0, 1.0])
        layer.up_proj.weight[0, :2] += torch.tensor([1.0, -1.0])
        layer.down_proj.weight[5, 0] += 1
    hooked = bl.HookedBilinearTransformer.from_hf(plain)
    circuit = bl.trace(hooked, torch.eye(16)[5], width=2, depth=1)
    assert circuit.nodes["kind"].tolist()[1:] == ["eigenvector", "eigenvector"]
    assert circuit.nodes["score"].iloc[1:].min() > 1  # more than all writers together
    assert circuit.nodes["eigenvalue"].iloc[1:].prod() < 0
    (mlp,) = (
        edge
        for edge in VocabularyReader(hooked).writers(circuit.found[0])
        if edge.lower.place.kind == "MLP"
    )
    assert mlp.share > circuit.nodes["score"].iloc[1:].max()


def test_opposite_directions_of_a_head_are_one_node():
    """Heads with a single value channel each, which read one direction, whatever they write."""
    plain = random_model(LlamaConfig(**TINY))
    with torch.no_grad():
        decoder: Any = plain.get_decoder()
        values = decoder.layers[0].self_attn.v_proj.weight
        values[torch.arange(16) % 8 != 0] = 0
    hooked = bl.HookedBilinearTransformer.from_hf(plain)
    circuit = bl.trace(hooked, torch.eye(16)[5], layer=0, width=8, depth=2)
    edges = [edge for edge in circuit.links if edge.lower.place.kind == "head"]
    assert len({edge.lower for edge in edges}) == 2 < len(edges)
    assert {edge.weight > 0 for edge in edges} == {True, False}
    for edge in edges:
        assert edge.lower.place.head is not None
        reads = hooked.head_weight(0, edge.lower.place.head) @ edge.upper.reads
        torch.testing.assert_close(edge.weight * edge.lower.reads, reads, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("prompt", [True, False])
def test_the_search_is_brute_force_without_the_force(prompt):
    """Three layers, where MLPs are decomposed only if they may be among the best."""
    plain = random_model(CONFIGS["llama"])
    with torch.no_grad():  # MLPs that write as much as heads do
        for name, weight in plain.named_parameters():
            weight.mul_(8.0 if "down_proj" in name else 1.0)
    hooked = bl.HookedBilinearTransformer.from_hf(plain)
    direction = torch.randn(24, generator=torch.Generator().manual_seed(8))
    tokens = some_tokens()[:1] if prompt else None
    circuit = bl.trace(hooked, direction, prompt=tokens, width=5, depth=3)
    reader: Any = VocabularyReader(hooked)
    if tokens is not None:
        reader = PromptReader(FrozenRun(hooked, tokens))
    beam, seen, links = [circuit.found[0]], [circuit.found[0]], []
    for _ in range(3):
        edges = [edge for upper in beam for edge in expanded(reader, upper)]
        edges = [edge for edge in edges if edge.lower.place.kind != "MLP" and edge.share]
        beam = []
        for edge in sorted(edges, key=lambda edge: -abs(edge.score)):
            if len(beam) == 5:
                break
            at, same = edge.lower.place, None
            for node in seen:
                cosine = abs(node.reads @ edge.lower.reads).item()
                if node.place == at and (at.kind == "embedding" or cosine >= 0.99):
                    same = node
            if same is None:
                same = edge.lower
                seen.append(same)
                beam.append(same)
            links.append(replace(edge, lower=same))
        for node in sorted(seen[1:], key=lambda node: node.place.height, reverse=True):
            node.score = sum(edge.score for edge in links if edge.lower is node)
        beam = [node for node in beam if node.place.kind != "embedding"]
    ours = sorted((edge.lower.name, edge.upper.name, edge.share) for edge in circuit.links)
    theirs = sorted((edge.lower.name, edge.upper.name, edge.share) for edge in links)
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    assert [row[2] for row in ours] == pytest.approx([row[2] for row in theirs], rel=1e-4)
    assert len({name for name, *_ in ours if name.startswith("MLP")}) > 3


def test_a_trace_is_the_same_each_time_and_random_ones_by_their_seed():
    first, again = (bl.trace(model(), " named", prompt=PROMPT, width=5) for _ in range(2))
    pd.testing.assert_frame_equal(first.nodes, again.nodes)
    pd.testing.assert_frame_equal(first.edges, again.edges)
    draws = [bl.trace(model(), " named", prompt=PROMPT, width=5, random=seed) for seed in (1, 1, 2)]
    pd.testing.assert_frame_equal(draws[0].nodes, draws[1].nodes)
    assert list(draws[0].nodes["node"]) != list(draws[2].nodes["node"])
    assert draws[0].nodes["score"].iloc[1:].abs().max() < first.nodes["score"].iloc[1]


def test_the_best_of_the_first_step_are_found():
    """By brute force over all writers."""
    reader = PromptReader(FrozenRun(model(), model().to_tokens(PROMPT)))
    root, _ = unit(Place("output", 1, position=9), model().output_direction(" named"))
    best = sorted(expanded(reader, root), key=lambda edge: -abs(edge.share))[:7]
    circuit = bl.trace(model(), " named", prompt=PROMPT, width=7, depth=1)
    found = circuit.edges.sort_values("share", key=abs, ascending=False)
    assert found["share"].tolist() == pytest.approx([edge.share for edge in best], rel=1e-5)
    assert len(circuit.nodes) == 8


def test_nodes_that_read_the_same_are_one():
    nodes, edges = on_prompt().nodes, on_prompt().edges
    assert edges["lower"].duplicated().any()  # a token that several heads read
    assert not nodes["node"].duplicated().any()
    into = edges.groupby("lower")["score"].sum()
    for row in nodes.iloc[1:].to_dict("records"):
        assert row["score"] == pytest.approx(into[row["node"]])


def test_an_eigenvector_s_effect_is_that_of_an_edit_of_its_hook():
    circuit, hooked = on_prompt(), model()
    node = circuit.found[1]
    assert node.place.kind == "eigenvector"
    tokens, direction = hooked.to_tokens(PROMPT), hooked.output_direction(" named")
    token = hooked.token_id(" named")

    def drop(acts, hook):
        acts[:, -1, 0, node.index] = 0
        return acts

    def logit(hooks) -> float:
        logits = hooked.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1]
        return (logits[token] - logits.mean()).item()

    with torch.no_grad(), hooked.eigenbasis("top", 0, direction[None], 64):
        clean = logit([])
        without = logit([("blocks.0.mlp.eigen.top.hook_acts", drop)])
    measured = circuit.nodes.iloc[1]["measured"]
    assert measured == pytest.approx(1 - without / clean, rel=1e-4)
    assert 0.3 < measured < 1


def test_predictions_agree_with_what_is_measured_and_controls_are_small():
    circuit = on_prompt()
    for frame in (circuit.nodes.iloc[1:], circuit.edges):
        assert frame["score"].corr(frame["measured"]) > 0.95
    x, y = circuit.nodes.iloc[1:]["score"], circuit.nodes.iloc[1:]["measured"]
    x, y = x - x.mean(), y - y.mean()
    assert circuit.correlation["nodes"] == pytest.approx((x @ y) / (x @ x * (y @ y)) ** 0.5)
    assert circuit.correlation["edges"] > 0.95
    with pytest.raises(ValueError, match="measure_effects"):
        bl.trace(model(), " named", depth=1).correlation  # noqa: B018
    random = bl.measure_effects(model(), bl.trace(model(), " named", prompt=PROMPT, random=0))
    sizes = [each.nodes["measured"].iloc[1:].abs().mean() for each in (circuit, random)]
    assert sizes[0] > 5 * sizes[1]


def test_an_edge_from_a_token_to_a_head_is_all_that_the_head_reads_of_it():
    """In the first layer heads read nothing but tokens: without that edge nothing is left of it."""
    edges = on_prompt().edges.set_index(["lower", "upper"])["measured"]
    nodes = on_prompt().nodes.set_index("node")["measured"]
    heads = on_prompt().nodes.query("kind == 'head'")
    for row in heads.to_dict("records"):
        lower = f"embedding@{row['position']}"
        if (lower, row["node"]) in edges:
            assert edges[lower, row["node"]] == pytest.approx(nodes[row["node"]], abs=1e-5)


@pytest.mark.parametrize("prompt", [PROMPT, None])
def test_with_every_eigenvector_all_is_left_and_with_none_nothing(prompt):
    hooked = model()
    d_model = hooked.cfg.d_model
    circuit = bl.trace(hooked, " named", prompt=prompt, layer=0, depth=1, width=d_model)
    curve = bl.faithfulness(hooked, circuit, stories()[:1], window=32)
    assert list(curve["nodes"]) == list(range(len(circuit.nodes)))
    assert curve["left"].iloc[0] == pytest.approx(0, abs=1e-5)
    assert curve["left"].iloc[-1] == pytest.approx(1, abs=2e-3)
    assert curve["explained"].iloc[-1] == pytest.approx(1, abs=2e-3)
    few = curve["left"].iloc[1]
    assert few > (0.5 if prompt else 0.05) and abs(1 - few) > 1e-2


def test_a_circuit_is_more_faithful_than_random_ones():
    circuit = from_weights()
    draws = [bl.trace(model(), " named", width=6, depth=3, random=seed) for seed in range(2)]
    curve = bl.faithfulness(model(), circuit, stories(), random=draws, window=64)
    last: Any = curve.groupby(["circuit", "draw"]).last()["left"]
    assert last["traced"].iloc[0] > 0.15 > 2 * last["random"].max()
    assert set(curve["draw"][curve["circuit"] == "random"]) == {0, 1}


def test_effects_of_a_circuit_from_weights_are_shares_of_variance():
    measured: Any = bl.measure_effects(model(), from_weights(), stories(), window=64)
    values = measured.nodes["measured"]
    assert values.iloc[0] == 1 and (values >= 0).all() and values.iloc[1:].max() > 0.01


def test_the_best_nodes_and_the_paths_between_them():
    circuit = on_prompt()
    top = circuit.top(4)
    assert list(top.nodes["node"]) == list(circuit.nodes["node"][:5])
    kept = set(top.nodes["node"])
    within = circuit.edges["lower"].isin(kept) & circuit.edges["upper"].isin(kept)
    pd.testing.assert_frame_equal(top.edges, circuit.edges[within].reset_index(drop=True))
    name = "embedding@7"
    ways = circuit.paths(name)
    score = circuit.nodes.set_index("node")["score"][name]
    assert ways["share"].sum() == pytest.approx(score) and len(ways) > 1
    assert all(way[0] == "' named'" and way[-1] == name for way in ways["path"])
    with pytest.raises(ValueError, match="not below 'embedding@7'"):
        circuit.paths("MLP 0 e0@9", "embedding@7")
    with pytest.raises(KeyError, match="No node 'L9H9'"):
        circuit.paths("L9H9")
    for n in (0, len(circuit.nodes)):
        with pytest.raises(ValueError, match=f"n={n} must be between 1 and"):
            circuit.top(n)


@pytest.mark.parametrize("make", [on_prompt, from_weights])
def test_a_saved_circuit_is_the_same(make, tmp_path):
    circuit = make()
    circuit.save(tmp_path / "circuit.safetensors")
    loaded = bl.Circuit.load(tmp_path / "circuit.safetensors")
    pd.testing.assert_frame_equal(loaded.nodes, circuit.nodes)
    pd.testing.assert_frame_equal(loaded.edges, circuit.edges)
    assert loaded.title == circuit.title
    again = bl.measure_effects(model(), loaded, stories(), window=64)
    expected = bl.measure_effects(model(), circuit, stories(), window=64)
    # effects are small differences of outputs in float32
    pd.testing.assert_frame_equal(again.nodes, expected.nodes, rtol=1e-3, atol=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["circuit.safetensors"]


def test_files_that_are_no_circuits_are_refused(tmp_path):
    file = tmp_path / "circuit.safetensors"
    for content in (b"", b"no tensors"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is no circuit"):
            bl.Circuit.load(file)
    save_file({"reads": torch.zeros(2, 3)}, file)
    with pytest.raises(ValueError, match="is no circuit"):
        bl.Circuit.load(file)
    with pytest.raises(ValueError, match="is no circuit"):
        bl.Circuit.load(tmp_path / "nothing")
    circuit = from_weights()
    links = [replace(edge, lower=edge.upper, upper=edge.lower) for edge in circuit.links]
    replace(circuit, links=links).save(file)
    with pytest.raises(ValueError, match="does not go up"):
        bl.Circuit.load(file)
    with pytest.raises(ValueError, match="Cannot write"):
        circuit.save(tmp_path / "nowhere" / "circuit")
    with pytest.raises(ValueError, match="Cannot write"):
        circuit.save(tmp_path)
    assert not tmp_path.with_name(f"{tmp_path.name}.part").exists()
    changes: list[tuple[dict, str]] = [
        ({"names": circuit.names[1:]}, "names"),
        ({"prompt": [1], "prompt_tokens": []}, "prompt"),
        ({"prompt": [1], "prompt_tokens": ["a"], "found": on_prompt().found}, "."),
        ({"links": [replace(circuit.links[0], share=float("nan"))]}, "NaN"),
        ({"node_effects": [1.0]}, "node_effects"),
    ]
    for change, message in changes:
        try:
            replace(circuit, **change).save(file)
        except KeyError:
            continue  # edges of nodes that are not there
        with pytest.raises(ValueError, match=f"is no circuit.*{message}"):
            bl.Circuit.load(file)


def test_a_circuit_of_another_model_is_refused():
    other = model("tinystories-4l")
    with pytest.raises(ValueError, match=r"of tinystories-1l.*trace the output again"):
        bl.measure_effects(other, on_prompt())
    with pytest.raises(ValueError, match="trace the output again"):
        bl.faithfulness(other, on_prompt(), stories())
    with pytest.raises(ValueError, match="list of documents"):
        bl.measure_effects(model(), from_weights())


SCHEMA = {
    "metadata": {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str},
    "nodes": {
        "node_id": str,
        "feature": int,
        "layer": str,
        "ctx_idx": int,
        "feature_type": str,
        "jsNodeId": str,
        "clerp": str,
        "influence": float,
    },
    "links": {"source": str, "target": str, "weight": float},
}
"""What circuit-tracer's `graph_models.py` and Neuronpedia's `graph-schema.json` require."""


@pytest.mark.parametrize("make", [on_prompt, from_weights])
def test_the_graph_has_what_circuit_tracer_and_neuronpedia_require(make):
    circuit = make()
    graph = json.loads(circuit.to_json())
    assert set(graph) == {"metadata", "qParams", "nodes", "links"}
    for part, fields in SCHEMA.items():
        rows = [graph[part]] if part == "metadata" else graph[part]
        for row in rows:
            assert all(isinstance(row[name], kind) for name, kind in fields.items())
    ids = [node["node_id"] for node in graph["nodes"]]
    assert len(set(ids)) == len(ids) == len(circuit.nodes)
    assert {end for link in graph["links"] for end in (link["source"], link["target"])} == set(ids)
    weights = [link["weight"] for link in graph["links"]]
    assert weights == pytest.approx(circuit.edges["score"].tolist())
    n_tokens = len(graph["metadata"]["prompt_tokens"])
    assert all(0 <= node["ctx_idx"] < n_tokens for node in graph["nodes"])
    logits = [node for node in graph["nodes"] if node["feature_type"] == "logit"]
    assert len(logits) == 1 and logits[0]["layer"] == str(model().cfg.n_layers + 1)
    scores = circuit.nodes["score"].abs()
    for node, score in zip(graph["nodes"], scores, strict=True):  # ties in any order
        larger, as_large = scores[scores > score].sum() + score, scores[scores >= score].sum()
        assert larger - 1e-6 <= node["influence"] * scores.sum() <= as_large + 1e-6


def test_what_cannot_be_traced_is_refused():
    hooked = model()
    faults: list[tuple[dict[str, Any], str]] = [
        ({"width": 0}, "width=0 and depth=4 must be"),
        ({"depth": 0}, "depth=0 must be"),
        ({"layer": 1}, "layer=1 must be between 0 and 0"),
        ({"prompt": "a " * 1000}, "context"),
        ({"output": torch.zeros(hooked.cfg.d_model)}, "zero"),
    ]
    for options, message in faults:
        with pytest.raises(ValueError, match=message):
            bl.trace(hooked, **{"output": " named", **options})
    with pytest.raises((KeyError, ValueError), match="nonesuch"):
        bl.trace(hooked, " nonesuch")


def test_without_a_prompt_scales_after_blocks_are_not_known():
    hooked = bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS["gemma2-tied"]))
    with pytest.raises(ValueError, match=r"norms what its blocks write.*give one"):
        bl.trace(hooked, torch.ones(24))


def test_activations_that_are_not_finite_are_named():
    broken = random_model(CONFIGS["llama"])
    with torch.no_grad():
        embedding: Any = broken.get_input_embeddings()
        embedding.weight[5] = 1e30
    hooked = bl.HookedBilinearTransformer.from_hf(broken)
    with pytest.raises(ValueError, match=r"hook_\w+ is NaN or infinite"):
        bl.trace(hooked, torch.ones(24), prompt=torch.tensor([3, 5, 7]))


def planted(d_model: int, seed: int, *, neuron: bool = True) -> tuple[Any, int, int, int, int]:
    """A neuron for one skip-trigram amid random weights: `second`, with `first` brought by a head,
    writes `answer`.

    Tokens have an axis each of the first half of the residual stream; the head takes `first` to one
    of the second half.
    """
    n_tokens = n_brought = d_model // 2
    generator = torch.Generator().manual_seed(seed)
    config = LlamaConfig(
        vocab_size=n_tokens,
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        num_hidden_layers=1,
        num_attention_heads=4,
        hidden_act="linear",
    )
    first, second, answer = torch.randperm(n_tokens, generator=generator)[:3].tolist()
    head, inner, axis = torch.randint(4, (3,), generator=generator).tolist()
    plain = random_model(config, seed)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            weight.fill_(1.0) if "norm" in name else weight.mul_(0.2)
        embedding: Any = plain.get_input_embeddings()
        embedding.weight[:, :n_tokens] += torch.eye(n_tokens)
        decoder: Any = plain.get_decoder()
        layer = decoder.layers[0]
        channel = head * (d_model // 4) + inner
        layer.self_attn.v_proj.weight[channel, first] += 1
        layer.self_attn.o_proj.weight[n_brought + axis, channel] += 1
        if neuron:
            unembedding: Any = plain.get_output_embeddings()
            direction = unembedding.weight[answer] - unembedding.weight.mean(0)
            layer.mlp.gate_proj.weight[0, second] += 1
            layer.mlp.up_proj.weight[0, n_brought + axis] += 1
            layer.mlp.down_proj.weight[:, 0] += direction / direction.norm()
    return bl.HookedBilinearTransformer.from_hf(plain), first, second, answer, head


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("d_model", [32, 64, 128])
def test_a_planted_skip_trigram_comes_first(d_model, seed):
    hooked, first, second, answer, head = planted(d_model, seed)
    labels = hooked.token_labels
    sources = ["embedding", *(f"L0H{i}" for i in range(4))]
    best = bl.interactions(hooked, answer, layer=0, sources=sources).pairs(1).iloc[0]
    assert best["token_a"] == repr(labels[second])
    assert best["token_b"] == f"{labels[first]!r} via L0H{head}"

    nodes: Any = bl.trace(hooked, answer, layer=0, width=6, depth=2).nodes
    # a product of two directions is a pair of eigenvectors, with eigenvalues of both signs
    pair = nodes[nodes["kind"] == "eigenvector"].nlargest(2, "score")
    assert set(pair["eigenvector"]) == {0, 1} and pair["eigenvalue"].prod() < 0
    assert labels[second] in set(pair["reads_most"].sum() + pair["reads_least"].sum())
    best_head = nodes[nodes["kind"] == "head"].nlargest(1, "score").iloc[0]
    assert best_head["head"] == head
    assert labels[first] in best_head["reads_most"] + best_head["reads_least"]


def test_nothing_is_found_where_nothing_is_planted():
    hooked, first, second, answer, head = planted(64, 0, neuron=False)
    sources = ["embedding", f"L0H{head}"]
    best = bl.interactions(hooked, answer, layer=0, sources=sources).pairs(1).iloc[0]
    labels = hooked.token_labels
    names = (repr(labels[second]), f"{labels[first]!r} via L0H{head}")
    assert (best["token_a"], best["token_b"]) != names
