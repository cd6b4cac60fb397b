"""What reaches an MLP: heads and earlier MLPs against plain computations, and pairs of sources."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float
from models import CONFIGS, GROUPED, LINEAR, SIZES, random_model
from torch import Tensor
from transformers import GraniteConfig

import bilinear_lens as bl
from bilinear_lens.analysis import pairs as pairs_module
from bilinear_lens.analysis import sources as sources_module
from bilinear_lens.analysis.pairs import Pairs, top_cross_pairs, top_pairs
from bilinear_lens.analysis.paths import FrozenRun, Part
from bilinear_lens.analysis.sources import join, source_basis

SMALL = ["llama", "llama-biases", "mistral", "qwen2-tied", "qwen3", "gemma-tied", "granite", "phi3"]
"""Where what a head writes goes into the residual stream as it is."""
CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module", params=SMALL)
def tiny(request) -> bl.HookedBilinearTransformer:
    return bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS[request.param]))


@pytest.fixture(scope="module", params=["llama", "llama-biases"])
def either(request) -> bl.HookedBilinearTransformer:
    """Without biases and with grouped queries, or with biases and without groups."""
    return bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS[request.param]))


@pytest.fixture
def small_blocks(monkeypatch) -> Iterator[None]:
    """Few rows are several blocks of pairs, so that all paths are taken."""
    monkeypatch.setattr(pairs_module, "ROWS", 8)
    monkeypatch.setattr(pairs_module, "COLUMNS", 24)
    yield


def lone_tokens(model: bl.HookedBilinearTransformer) -> dict[str, Tensor]:
    """Each token in a prompt by itself, where every head attends to nothing else."""
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.arange(37)[:, None])
    return {name: activation[:, 0] for name, activation in cache.items()}


def test_a_head_writes_what_it_writes_of_a_lone_token(tiny):
    """Against the forward pass: what a head of layer 0 adds to the residual stream."""
    cache, attn = lone_tokens(tiny), tiny.blocks[0].attn
    scale = cache["blocks.0.hook_resid_pre"].square().mean().sqrt()
    values = cache["blocks.0.attn.hook_z"]
    if attn.b_V is not None:  # a value's bias is no token's
        bias = attn.b_V.detach().view(-1, values.shape[-1])
        values = values - bias.repeat_interleave(4 // len(bias), dim=0)
    seen = []
    for head in range(4):
        basis = source_basis(tiny, f"L0H{head}", layer=2)
        written = values[:, head] @ attn.W_O[head].detach()
        torch.testing.assert_close(basis.directions, written / scale, **CLOSE)
        assert list(basis.labels) == [f"'#{token}' via L0H{head}" for token in range(37)]
        seen.append(basis.directions)
    for a in range(4):  # the control: heads that share their values do not write the same
        for b in range(a):
            assert not torch.allclose(seen[a], seen[b], atol=1e-2)


@pytest.mark.parametrize("name", ["llama", "llama-biases", "mistral", "gemma-tied"])
def test_a_head_is_its_weights_in_the_plain_model(name):
    """From the Hugging Face weights, before any folding: `e W_V W_O / scale`."""
    config, plain = CONFIGS[name], random_model(CONFIGS[name])
    model = bl.HookedBilinearTransformer.from_hf(random_model(config))
    groups, width = config.num_key_value_heads, getattr(config, "head_dim", None) or 24 // 4
    assert (groups < config.num_attention_heads) == (name != "llama-biases")
    gemma = name == "gemma-tied"  # its embeddings are scaled, and its gains count from zero
    embedding = plain.model.embed_tokens.weight.detach() * (24**0.5 if gemma else 1)
    rms = (embedding.square().mean(1, keepdim=True) + config.rms_norm_eps).sqrt()
    for layer in (0, 1):
        block = plain.model.layers[layer]
        normed = embedding / rms * (block.input_layernorm.weight.detach() + gemma)
        for head in range(4):
            group = head * groups // 4
            value = block.self_attn.v_proj.weight.detach()[group * width : (group + 1) * width]
            out = block.self_attn.o_proj.weight.detach()[:, head * width : (head + 1) * width]
            expected = normed @ value.mT @ out.mT / embedding.square().mean().sqrt()
            found = source_basis(model, f"L{layer}H{head}", layer=1).directions
            torch.testing.assert_close(found, expected, **CLOSE)
            assert expected.abs().max() > 0.01


def test_a_head_of_a_trained_model_has_its_tokens_names(model):
    basis = source_basis(model, "L0H3", layer=0)
    assert basis.directions.shape == (4096, 256)
    assert basis.labels[model.token_id(" girl")] == "' girl' via L0H3"
    girl = basis["' girl' via L0H3"]
    e = model.W_E[model.token_id(" girl")].detach()
    scale = model.W_E.detach().square().mean().sqrt()
    normed = e / (e.square().mean() + model.cfg.eps).sqrt()
    written = normed @ model.W_V[0, 3] @ model.W_O[0, 3] / scale
    torch.testing.assert_close(girl, written.detach(), atol=1e-4, rtol=1e-3)
    assert written.norm() > 0.1


def test_the_embedding_is_the_token_basis_by_quoted_names(either):
    for layer in (0, 2):
        basis, tokens = source_basis(either, "embedding", layer=layer), either.token_basis()
        torch.testing.assert_close(basis.directions, tokens.directions, atol=0, rtol=0)
        assert list(basis.labels) == [f"'{label}'" for label in tokens.labels]
        assert basis.labels[5] == "'#5'"


def scale_of(model: bl.HookedBilinearTransformer) -> float:
    return model.W_E.detach().square().mean().sqrt().item()


def test_an_earlier_mlp_is_the_modes_of_its_dense_tensor(either):
    """All 24, the largest first; of a mode's sign nothing is said, so their squares compare."""
    dense = either.bilinear_tensor(0).to_dense().flatten(1).double()
    basis = source_basis(either, "MLP 0", layer=1)
    rows = basis.directions.double() * scale_of(either) / 2**0.5
    assert rows.shape == (24, 24)
    assert list(basis.labels) == [f"MLP 0, direction {i}" for i in range(24)]
    directions, sizes, _ = torch.linalg.svd(dense, full_matrices=False)
    torch.testing.assert_close(rows.norm(dim=1), sizes, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rows.mT @ rows, dense @ dense.mT, atol=1e-4, rtol=1e-4)
    along = (rows / rows.norm(dim=1, keepdim=True) @ directions).abs()
    torch.testing.assert_close(along, torch.eye(24).double(), atol=1e-2, rtol=0)
    for layer in (1, 2):  # which MLP reads it does not matter, which one writes does
        again = source_basis(either, "MLP 0", layer=layer).directions
        torch.testing.assert_close(again, basis.directions)
    other = source_basis(either, "MLP 1", layer=2).directions
    assert not torch.allclose(other, basis.directions, atol=1e-2)


def test_an_earlier_mlps_directions_have_the_length_of_a_standard_deviation():
    """Of what it writes along each, for isotropic inputs: by drawing them."""
    model = bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS["llama"]))
    x = torch.randn(100_000, 24, generator=torch.Generator().manual_seed(0))
    rows = source_basis(model, "MLP 1", layer=2).directions * scale_of(model)
    lengths = rows.norm(dim=1)
    drawn = (model.bilinear_tensor(1)(x) @ (rows / lengths[:, None]).mT).std(dim=0)
    torch.testing.assert_close(drawn, lengths, atol=0, rtol=0.03)
    assert lengths[0] > 1.3 * lengths[-1]  # they are not all the same length


def test_only_the_largest_directions_of_an_mlp_are_listed(either, monkeypatch):
    everything = source_basis(either, "MLP 0", layer=1)
    monkeypatch.setattr(sources_module, "MODES", 5)
    few = source_basis(either, "MLP 0", layer=1)
    assert len(few) == 5
    torch.testing.assert_close(few.directions, everything.directions[:5])
    assert (everything.directions.norm(dim=1).diff() <= 1e-6).all()


def test_bases_are_joined_in_their_order(either):
    names = ["L1H2", "embedding", "MLP 0"]
    bases = [source_basis(either, name, layer=1) for name in names]
    joined = join(bases)
    assert len(joined) == 37 + 37 + 24 == len(set(joined.labels))
    for basis in bases:
        for i in (0, 17):
            torch.testing.assert_close(joined[basis.labels[i]], basis.directions[i])


def rows_and_matrix(
    n: int, m: int, d: int, seed: int
) -> tuple[Float[Tensor, "d d"], Float[Tensor, "n d"], Float[Tensor, "m d"]]:
    """Eigenvalues of both signs that fall, and rows of both that are about as long."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    signs = torch.randint(2, (d,), generator=generator) * 2 - 1
    matrix = (vectors * (signs / torch.arange(1, d + 1))) @ vectors.mT
    first, second = torch.randn(n + m, d, generator=generator).split([n, m])
    return (matrix + matrix.mT) / 2, first, second


def check(
    matrix: Float[Tensor, "d d"], first: Float[Tensor, "n d"], second: Float[Tensor, "m d"], k: int
) -> Pairs:
    """`top_cross_pairs`, when it agrees with the oracle: all products at once, in 64 bits."""
    found = top_cross_pairs(matrix, first, second, k)
    products = first.double() @ matrix.double() @ second.double().mT
    expected = products.flatten().abs().sort(descending=True).values[:k]
    tolerance = 1e-5 * (products.abs().max().item() + 1e-30)
    close: dict[str, Any] = {"atol": tolerance, "rtol": 1e-5, "check_dtype": False}
    assert len(found.values) == k
    torch.testing.assert_close(found.values.abs(), expected, **close)
    torch.testing.assert_close(found.values, products[found.first, found.second], **close)
    assert len((found.first * len(second) + found.second).unique()) == k
    assert (found.values.abs().diff() <= 0).all()
    return found


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 60),
    m=st.integers(1, 60),
    d=st.integers(1, 9),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_pairs_of_two_sources_are_those_of_all_products(n, m, d, share, seed):
    matrix, first, second = rows_and_matrix(n, m, d, seed)
    check(matrix, first, second, max(1, round(n * m * share)))


@pytest.mark.parametrize("k", [1, 40, 70 * 50 - 1, 70 * 50])
def test_pairs_of_many_rows_come_in_blocks(small_blocks, k):
    matrix, first, second = rows_and_matrix(70, 50, 7, 0)
    check(matrix, first, second, k)
    check(matrix, 100 * first, second, k)  # one source is much the stronger
    check(matrix, first, first, min(k, 70 * 70))  # the same rows twice are two sources


def test_pairs_of_one_source_are_left_out(small_blocks):
    """The control: there are larger ones, and without telling sources apart they are found."""
    matrix, first, second = rows_and_matrix(40, 30, 5, 1)
    first = 10 * first
    crossed = check(matrix, first, second, 100)
    everything = top_pairs(matrix, torch.cat([first, second]), 100)
    assert (everything.second < 40).all()  # all hundred within the first source
    assert everything.values[-1].abs() > crossed.values[0].abs()
    assert crossed.first.max() < 40 and crossed.second.max() < 30
    # of the same pairs, the order of the sources says which end is which
    turned = top_cross_pairs(matrix, second, first, 100)
    torch.testing.assert_close(turned.values, crossed.values, atol=1e-4, rtol=1e-5)
    assert list(zip(turned.second.tolist(), turned.first.tolist(), strict=True)) == list(
        zip(crossed.first.tolist(), crossed.second.tolist(), strict=True)
    )


SOURCES = {
    "two": ["embedding", "L0H1"],
    "three": ["L1H0", "embedding", "MLP 0"],
    "two heads": ["L0H2", "L0H3"],
}


def brute_force(table: bl.InteractionTable, sources: list[str]) -> dict[tuple[str, str], float]:
    """All products of two rows of different sources, by their labels, in the sources' order."""
    rows = table.tokens.directions
    products = (rows @ table.interaction[:24, :24] @ rows.mT).tolist()
    sizes = [24 if source.startswith("MLP") else 37 for source in sources]
    source = [number for number, size in enumerate(sizes) for _ in range(size)]
    names = table.tokens.labels
    return {
        (names[a], names[b]): products[a][b]
        for a in range(len(names))
        for b in range(len(names))
        if source[a] < source[b]
    }


@pytest.mark.parametrize("sources", SOURCES.values(), ids=SOURCES)
def test_a_tables_pairs_are_of_two_sources(either, sources):
    table = bl.interactions(either, 5, layer=1, k=2, n_tokens=2, sources=sources)
    everything = brute_force(table, sources)
    sizes = sorted(map(abs, everything.values()), reverse=True)
    for k in (1, 30, 37 * 24):
        frame = table.pairs(k)
        assert list(frame.columns) == ["token_a", "token_b", "interaction"]
        found = list(zip(frame.token_a, frame.token_b, strict=True))
        assert len(set(found)) == len(found) == k
        assert frame.interaction.abs().tolist() == pytest.approx(sizes[:k], rel=1e-3, abs=1e-5)
        expected = [everything[pair] for pair in found]
        assert frame.interaction.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    if len(sources) == 3:  # each two of them are among the pairs
        writers = {tuple(name.split("'")[-1][:5] for name in pair) for pair in found}
        assert len(writers) == 3


@pytest.mark.parametrize("source", ["L1H3", "MLP 0"])
def test_a_table_of_one_source_pairs_its_own_rows(either, source):
    """As that of the tokens does; so nothing is left out."""
    table = bl.interactions(either, 5, layer=1, k=2, n_tokens=2, sources=[source])
    rows = table.tokens.directions
    products = (rows @ table.interaction[:24, :24] @ rows.mT).triu().flatten()
    largest = products[products.abs().argsort(descending=True)][:50]
    assert table.pairs(50).interaction.tolist() == pytest.approx(
        largest.tolist(), rel=1e-3, abs=1e-5
    )
    assert table.sources == (len(rows),)


def test_a_table_reads_its_eigenvectors_in_the_sources(either):
    sources = ["embedding", "L1H2", "MLP 0"]
    table = bl.interactions(either, 5, layer=1, k=3, n_tokens=4, sources=sources)
    plain = bl.interactions(either, 5, layer=1, k=3, n_tokens=4)
    assert table.sources == (37, 37, 24) and plain.sources == ()
    # which way they are read changes no eigenvalue, and eigenvectors in their sign alone
    torch.testing.assert_close(table.spectrum.values, plain.spectrum.values)
    signs = (table.spectrum.vectors * plain.spectrum.vectors).sum(0)
    torch.testing.assert_close(signs.abs(), torch.ones(3), atol=1e-4, rtol=0)
    expected = join([source_basis(either, source, layer=1) for source in sources])
    torch.testing.assert_close(table.tokens.directions, expected.directions)
    assert list(table.tokens.labels) == list(expected.labels)
    frame = table.to_pandas()
    projections = table.spectrum.projections(expected.directions)
    for i in range(3):
        assert projections[projections[:, i].abs().argmax(), i] > 0
        rows = frame[frame.eigenvector == i]
        order = projections[:, i].argsort(descending=True).tolist()
        names = [expected.labels[row] for row in order]
        assert rows.token.tolist() == names[:4] + names[::-1][:4]
    # some of what is listed is no token by itself, and is shown as it is called
    through = [name for name in frame.token if "via" in name or "MLP" in name]
    assert through and through[0] in repr(bl.interactions(either, 5, layer=1, sources=sources))
    assert '"' not in repr(table) and '"' not in str(frame.token.tolist()[0])


def test_no_source_is_the_tokens(either):
    for sources in ([], ()):
        table = bl.interactions(either, 5, layer=1, k=2, n_tokens=3, sources=sources)
        basis = either.token_basis()
        assert list(table.tokens.labels) == list(basis.labels)
        torch.testing.assert_close(table.tokens.directions, basis.directions)


def fault(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def test_a_bad_source_is_named(either):
    unknown = "must be 'embedding', a head such as 'L0H3', or an earlier MLP"
    cases = {
        ("tokens", 1): unknown,
        ("", 1): unknown,
        ("L0", 1): unknown,
        ("l0h0", 1): unknown,
        ("L0H0 ", 1): unknown,
        ("L-1H0", 1): unknown,
        ("MLP", 1): unknown,
        ("mlp 0", 1): unknown,
        ("MLP -1", 1): unknown,
        ("L0H4", 1): "does not reach layer 1's MLP: heads 0 to 3 of layers 0 to 1 do",
        ("L2H0", 1): "does not reach layer 1's MLP: heads 0 to 3 of layers 0 to 1 do",
        ("L1H0", 0): "does not reach layer 0's MLP: heads 0 to 3 of layers 0 to 0 do",
        ("MLP 1", 1): "does not reach layer 1's MLP: only earlier ones do",
        ("MLP 2", 1): "does not reach layer 1's MLP",
        ("MLP 7", 2): "does not reach layer 2's MLP",
        ("embedding", 3): "layer=3 must be between 0 and 2",
        ("embedding", -1): "layer=-1",
    }
    for (source, layer), expected in cases.items():
        for call in (
            lambda s=source, at=layer: source_basis(either, s, layer=at),
            lambda s=source, at=layer: bl.interactions(
                either, 5, layer=at, sources=["embedding", s]
            ),
        ):
            message = fault(call)
            assert expected in message
            assert source == "embedding" or f"source={source!r}" in message
    for source, layer in (("L1H3", 1), ("MLP 0", 1)):  # the control: the last that do reach it
        assert len(source_basis(either, source, layer=layer)) > 0


def test_a_number_out_of_range_is_named(either):
    sources = ["embedding", "MLP 0"]
    for change, expected in (
        ({"k": 25}, "k=25 must be between 1 and d_in=24"),
        ({"k": 0}, "k=0"),
        ({"n_tokens": 37 + 24 + 1}, "n_tokens=62 must be between 1 and 61"),
        ({"n_tokens": 0}, "n_tokens=0"),
    ):
        options: dict[str, Any] = {"layer": 1, "sources": sources} | change
        assert expected in fault(lambda o=options: bl.interactions(either, 5, **o))
    table = bl.interactions(either, 5, layer=1, k=2, n_tokens=61, sources=sources)
    for k in (0, -1, 37 * 24 + 1):
        message = fault(lambda k=k: table.pairs(k))
        assert f"k={k} must be between 1 and the {37 * 24} pairs there are" in message
    assert len(table.pairs(37 * 24)) == 37 * 24
    matrix, first, second = rows_and_matrix(3, 4, 5, 0)
    for k in (0, -1, 13):
        message = fault(lambda k=k: top_cross_pairs(matrix, first, second, k))
        assert f"k={k} must be between 1 and the 12 pairs there are" in message


def test_ties_at_zero():
    found = top_cross_pairs(
        torch.eye(3), torch.tensor([[0.0, 0, 0], [1, 2, 3]]), torch.ones(2, 3), 4
    )
    assert len(found.values) == 4


@pytest.mark.parametrize("name", ["gemma2-tied", "gemma3-tied", "olmo2", "granite"])
def test_a_head_source_points_where_it_reaches_the_mlp(name):
    """Of a lone token; compared by direction, so that the norms' scales do not matter."""
    config = copy.deepcopy(CONFIGS[name])
    if name == "granite":
        config = GraniteConfig(
            **SIZES, **GROUPED, **LINEAR, residual_multiplier=0.3, embedding_multiplier=5.0
        )
    m = bl.HookedBilinearTransformer.from_hf(random_model(config))
    run, zero = FrozenRun(m, torch.arange(37)[:, None]), torch.zeros(37, dtype=torch.long)
    parts, projections = run.into_mlp(0, zero, torch.eye(24))
    expected = projections[:, parts.index(Part("L0H3", 0, "embedding"))]
    found = bl.source_basis(m, "L0H3", layer=0).directions
    torch.testing.assert_close(
        torch.nn.functional.normalize(found),
        torch.nn.functional.normalize(expected),
        atol=1e-4,
        rtol=0,
    )
    # as the MLP sees it beside an embedding of the usual size: relative to the embedding's own
    embedding = bl.source_basis(m, "embedding", layer=0).directions.norm(dim=1).mean()
    seen = projections[:, parts.index(Part("embedding"))].norm(dim=1).mean()
    ratio = (found.norm(dim=1).mean() / embedding) / (expected.norm(dim=1).mean() / seen)
    if name == "granite":
        assert 0.8 < ratio < 1.25
