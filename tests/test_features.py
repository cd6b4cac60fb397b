"""Interactions between latents, against the dense matrix of all of them, and as a law of sums."""

import re
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from models import CONFIGS, random_model, some_tokens

import bilinear_lens as bl
from bilinear_lens.analysis import feature_summary as summaries
from bilinear_lens.analysis.features import latent_basis
from bilinear_lens.analysis.pairs import top_pairs

LAYER, D, N_IN, N_OUT = 1, 24, 53, 7


def made(hook: str, n: int, seed: int, **changes) -> bl.SparseAutoencoder:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    whole = bl.SparseAutoencoder(
        encoder=normal(n, D),
        decoder=normal(n, D),
        encoder_bias=normal(n),
        decoder_bias=normal(D),
        hook_in=hook,
        hook_out=hook,
        k=4,
    )
    return replace(whole, **changes)


def before(hook: str = f"blocks.{LAYER}.mlp.hook_in", **changes) -> bl.SparseAutoencoder:
    return made(hook, N_IN, 5, **changes)


def behind(hook: str = f"blocks.{LAYER}.mlp.hook_out", **changes) -> bl.SparseAutoencoder:
    return made(hook, N_OUT, 6, **changes)


def hooked(name: str = "llama", **options) -> bl.HookedBilinearTransformer:
    return bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS[name]), **options)


@pytest.fixture(scope="module")
def model():
    return hooked()


def some_latents(n: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    latents = torch.zeros(n, N_IN)
    for row in latents:
        row[torch.randperm(N_IN, generator=generator)[:5]] = torch.rand(5, generator=generator)
    return latents


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("name", ["llama", "llama-biases", "gemma2-tied"])
def test_an_mlp_between_latents_is_what_it_is_between_activations(name, side):
    """Biases of the SAE and of the MLP included; an SAE without its constant does not."""
    model, inputs, outputs = hooked(name), before(scale=1.7), behind()
    latents = some_latents()
    written = model.bilinear_tensor(LAYER)(inputs.decode(latents))
    basis = outputs.encoder_basis if side == "encoder" else outputs.decoder_basis
    tensor = bl.latent_tensor(model, inputs, outputs, side=side)
    torch.testing.assert_close(tensor(latents), written @ basis.directions.mT, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        tensor.quadratic()(latents), written @ basis.directions.mT, rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("name", ["llama", "llama-biases"])
def test_listed_pairs_are_those_of_the_dense_matrix(name):
    model, inputs, outputs = hooked(name), before(), behind()
    latent, k = 3, 6
    found = bl.feature_interactions(model, latent, inputs=inputs, outputs=outputs, k=k, n_latents=5)
    tensor = model.bilinear_tensor(LAYER)
    q = tensor.quadratic().interaction(outputs.encoder[latent])
    dense = inputs.decoder @ q @ inputs.decoder.mT
    total = dense.square().sum()

    pairs: Any = found.pairs
    cross = pairs[pairs["kind"] == "cross"]
    upper = dense.triu(1).flatten()
    top = upper.abs().topk(k).indices
    torch.testing.assert_close(
        torch.tensor(cross["interaction"].to_numpy()).float(), upper[top], rtol=1e-4, atol=1e-5
    )
    assert [*zip(cross["a"], cross["b"], strict=True)] == [divmod(i, N_IN) for i in top.tolist()]
    torch.testing.assert_close(
        torch.tensor(cross["share"].to_numpy()).float(), 2 * upper[top] ** 2 / total
    )

    own = pairs[pairs["kind"] == "self"]
    diagonal = dense.diagonal()
    assert own["a"].tolist() == diagonal.abs().topk(k).indices.tolist() == own["b"].tolist()
    assert found.self_share == pytest.approx((diagonal.square().sum() / total).item(), rel=1e-4)
    assert found.listed == pytest.approx(cross["share"].sum() + own["share"].sum())

    constant = pairs[pairs["kind"] == "constant"]
    whole = tensor.interaction(outputs.encoder[latent])
    offset = torch.cat([inputs.decoder_bias, torch.ones(int(tensor.affine))])
    linear = (inputs.decoder @ whole[:D]) @ offset
    assert constant["a"].tolist() == linear.abs().topk(k).indices.tolist()
    assert constant["b"].isna().all() and constant["share"].isna().all()

    held = 2 * dense.square().sum(1) - diagonal.square()
    assert found.latents["latent"].tolist() == held.topk(5).indices.tolist()
    torch.testing.assert_close(
        torch.tensor(found.latents["share"].to_numpy()).float(), held.topk(5).values / total
    )
    chosen = found.latents["latent"].tolist()
    torch.testing.assert_close(found.matrix, dense[chosen][:, chosen], rtol=1e-4, atol=1e-5)


def test_the_sum_over_all_pairs_is_what_the_layer_writes(model):
    """With every pair listed the output is theirs exactly; with one left out it is not."""
    inputs = before(encoder=torch.eye(9, D), decoder=torch.randn(9, D), encoder_bias=torch.zeros(9))
    outputs, f = behind(), torch.rand(9)
    found = bl.feature_interactions(model, 2, inputs=inputs, outputs=outputs, k=9, n_latents=1)
    everything = top_pairs(found.interaction, inputs.decoder, 36, distinct=True)
    cross = sum(
        2 * value * f[a] * f[b]
        for a, b, value in zip(*(each.tolist() for each in everything), strict=True)
    )
    rows: Any = found.pairs[found.pairs["kind"] != "cross"]
    rest = sum(
        row.interaction * f[row.a] * (2.0 if row.kind == "constant" else f[row.a])
        for row in rows.itertuples()
    )
    constant = inputs.offset @ found.interaction @ inputs.offset
    written = outputs.encoder[2] @ model.bilinear_tensor(LAYER)(inputs.decode(f))
    torch.testing.assert_close(cross + rest + constant, written, rtol=1e-4, atol=1e-4)
    assert abs(rest + constant - written) > 1e-2


def test_an_sae_of_the_residual_stream_is_read_through_the_norm():
    """Up to the norm's scale, which squares; also where the gain was not folded."""
    tokens = some_tokens()
    for fold in (True, False):
        model = hooked(fold=fold)
        inputs, outputs = before(f"blocks.{LAYER}.hook_resid_mid"), behind()
        _, cache = model.run_with_cache(tokens)
        resid = cache[inputs.hook_in]
        latents = inputs.encode(resid)
        rebuilt = replace(inputs).decode(latents)
        scale = (rebuilt.square().mean(-1, keepdim=True) + model.cfg.eps).sqrt()
        read = model.blocks[LAYER].ln2(rebuilt)
        expected = model.bilinear_tensor(LAYER)(read) @ outputs.encoder.mT * scale**2
        made_of = bl.latent_tensor(model, inputs, outputs)(latents)
        torch.testing.assert_close(made_of, expected, rtol=1e-3, atol=1e-2)


def test_the_gain_of_a_norm_behind_the_mlp_is_in_the_direction():
    """Where an architecture norms what MLPs write, `hook_mlp_out` lies behind that norm."""
    model, tokens = hooked("gemma2-tied"), some_tokens()
    outputs = behind(f"blocks.{LAYER}.hook_mlp_out")
    found = bl.feature_interactions(model, 2, inputs=before(), outputs=outputs)
    _, cache = model.run_with_cache(tokens)
    written, normed = (cache[f"blocks.{LAYER}.{at}"] for at in ("mlp.hook_out", "hook_mlp_out"))
    along, read = written @ found.direction, normed @ outputs.encoder[2]
    scale = (written.square().mean(-1) + model.cfg.eps).sqrt()
    torch.testing.assert_close(along / scale, read, rtol=1e-3, atol=1e-3)
    plain = bl.feature_interactions(model, 2, inputs=before(), outputs=behind())
    assert not torch.allclose(plain.direction, found.direction, rtol=1e-2)


def test_an_output_may_be_a_token(model):
    found = bl.feature_interactions(model, (5, 7), inputs=before())
    torch.testing.assert_close(found.direction, model.output_direction((5, 7)))
    assert found.latent is None and found.output == "'#5' - '#7'"
    with pytest.raises(ValueError, match="give outputs="):  # a latent's number, forgotten whose
        bl.feature_interactions(model, 5, inputs=before())


def test_it_shows_itself(model):
    found = bl.feature_interactions(model, 3, inputs=before(), outputs=behind(), k=2)
    for text in (repr(found), found._repr_html_()):
        assert "latent 3 of blocks.1.mlp.hook_out" in text and "constant" in text
        assert f"{found.pairs['interaction'][0]:+.3g}" in text


@pytest.mark.parametrize("distinct", [True, False])
@pytest.mark.parametrize("n", [9, 400])  # by brute force, and by branch and bound
def test_top_pairs_of_two_different_tokens(n, distinct):
    torch.manual_seed(0)
    matrix, tokens, k = torch.randn(8, 8), torch.randn(n, 8), 12
    matrix = matrix + matrix.mT
    tokens[0] *= 9  # whose pair with itself is the largest
    dense = (tokens @ matrix @ tokens.mT).triu(int(distinct)).flatten()
    found = top_pairs(matrix, tokens, k, distinct=distinct)
    torch.testing.assert_close(found.values.abs(), dense.abs().topk(k).values, rtol=1e-4, atol=1e-4)
    assert (found.first == found.second).any() != distinct
    with pytest.raises(ValueError, match=f"the {n * (n + (-1 if distinct else 1)) // 2} pairs"):
        top_pairs(matrix, tokens, n * n, distinct=distinct)


def dense_summary(matrix: torch.Tensor, q: torch.Tensor) -> dict[str, float]:
    off = matrix.double()[~torch.eye(len(matrix), dtype=torch.bool)]
    own, values = matrix.double().diagonal(), torch.linalg.eigvalsh(q.double())
    z = (off - off.mean()) / off.std(correction=0)
    z_own = (own - own.mean()) / own.std(correction=0)
    largest = (off - off.mean()).abs().argmax()
    return {
        "effective_rank": (values.abs().sum() ** 2 / values.square().sum()).item(),
        "top_2": (values.square().sort().values[-2:].sum() / values.square().sum()).item(),
        "norm": matrix.norm().item(),
        "self_share": (own.square().sum() / matrix.double().square().sum()).item(),
        "kurtosis": z.pow(4).mean().item() - 3,
        "self_kurtosis": z_own.pow(4).mean().item() - 3,
        "outliers": int((z.abs() > summaries.OUTLIER).sum()) // 2,
        "interaction": off[largest].item(),
        "deviations": z.abs().max().item(),
    }


@pytest.mark.parametrize("name", ["llama", "llama-biases"])
def test_a_summary_is_that_of_the_dense_matrices(name, monkeypatch):
    monkeypatch.setattr(summaries, "ROWS", 8)
    monkeypatch.setattr(summaries, "COLUMNS", 16)
    monkeypatch.setattr(summaries, "OUTLIER", 3.0)  # of few latents none is ten deviations off
    model, inputs, outputs = hooked(name), before(), behind()
    table: Any = bl.feature_summary(model, inputs=inputs, outputs=outputs)
    assert table["latent"].tolist() == list(range(N_OUT)) and table["outliers"].sum() > 0
    basis = latent_basis(model, inputs).directions
    for row in table.to_dict("records"):
        q = model.bilinear_tensor(LAYER).interaction(outputs.encoder[row["latent"]])
        dense = basis @ q @ basis.mT
        expected = dense_summary(dense, q)
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=2e-3, abs=1e-3), key
        assert dense[row["a"], row["b"]].item() == pytest.approx(row["interaction"], rel=1e-4)
    chosen = bl.feature_summary(model, inputs=inputs, outputs=outputs, latents=[4, 2])
    pd.testing.assert_frame_equal(
        chosen, table.iloc[[4, 2]].reset_index(drop=True), rtol=1e-4, atol=1e-5
    )


def test_a_planted_interaction_stands_out():
    """Of one pair that is multiplied for an output, and random others, both tell."""
    torch.manual_seed(0)
    d, n = 64, 96
    latents = torch.nn.functional.normalize(torch.randn(n, d), dim=1)
    left, right = 0.05 * torch.randn(2, 20, d)
    left[0], right[0] = 4 * latents[3], 4 * latents[50]
    tensor = bl.BilinearTensor(left, right, torch.eye(2, 20))
    table: Any = summaries.summarize_interactions(tensor, torch.eye(2), latents)
    assert {table["a"][0], table["b"][0]} == {3, 50}
    assert table["kurtosis"][0] > 10 * max(1, table["kurtosis"][1])
    assert table["top_2"][0] > 0.9


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"inputs": behind()}, r"what an MLP reads.*this one is of blocks.1.mlp.hook_out"),
        ({"inputs": before("blocks.7.mlp.hook_in")}, r"no hook point 'blocks.7.mlp.hook_in'"),
        ({"inputs": before(model_digest="x")}, "another model"),
        ({"outputs": before()}, "what an MLP writes"),
        ({"outputs": behind("blocks.0.mlp.hook_out")}, "layer 1's MLP writes"),
        ({"outputs": behind(hook_in="blocks.1.mlp.hook_in", centred=False)}, "side='decoder'"),
        ({"output": N_OUT}, r"Latents \[7\] must be numbers between 0 and 6"),
        ({"output": "x"}, "number of a latent"),
        ({"side": "left"}, "side='left'"),
        ({"k": 0}, "k=0 and n_latents=12"),
        ({"k": 54}, "between 1 and the 53 latents"),
    ],
)
def test_what_cannot_be_read_is_refused(model, options, match):
    given = {"output": 3, "inputs": before(), "outputs": behind(), **options}
    with pytest.raises(ValueError, match=match):
        bl.feature_interactions(model, given.pop("output"), **given)


def test_a_transcoder_is_no_basis_of_what_an_mlp_reads(model):
    transcoder = before(hook_out="blocks.1.hook_mlp_out", centred=False)
    with pytest.raises(ValueError, match=r"a transcoder to blocks\.1\.hook_mlp_out"):
        bl.feature_interactions(model, 3, inputs=transcoder, outputs=behind())


def test_too_little_memory_is_said_before_work(model):
    """And what is asked for is enough."""
    with pytest.raises(ValueError, match="memory=1000 bytes is too little") as refused:
        bl.feature_summary(model, inputs=before(), outputs=behind(), memory=1000)
    (needed,) = re.findall(r"at least (\d+)", str(refused.value))
    with pytest.raises(ValueError, match="is too little"):
        bl.feature_summary(model, inputs=before(), outputs=behind(), memory=int(needed) - 1)
    assert (
        len(bl.feature_summary(model, inputs=before(), outputs=behind(), memory=int(needed))) == 7
    )


def test_a_latent_without_a_direction_is_named_before_work(model):
    outputs = behind()
    outputs.encoder[4] = 0
    with pytest.raises(ValueError, match=r"directions \[4\] are zero"):
        bl.feature_summary(model, inputs=before(), outputs=outputs)
