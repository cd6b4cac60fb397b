"""What an MLP wrote, taken apart: sums, plain computations, brute force, and controls that fail."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from jaxtyping import Float, Int
from models import CONFIGS, DECOUPLED, GROUPED, LINEAR, SIZES, random_model, some_tokens
from torch import Tensor
from transformers import Gemma2Config, GraniteConfig, LlamaConfig, PretrainedConfig

import bilinear_lens as bl
from bilinear_lens.analysis.paths import FrozenRun, Part

EXACT = 1e-4
"""Largest error of a sum, relative to the largest that was written."""
VARIANTS: dict[str, PretrainedConfig] = {
    "norm after biases": Gemma2Config(
        **SIZES, **DECOUPLED, hidden_activation="linear", attention_bias=True
    ),
    "multipliers": GraniteConfig(
        **SIZES,
        **GROUPED,
        **LINEAR,
        attention_bias=True,
        mlp_bias=True,
        attention_multiplier=0.4,
        embedding_multiplier=5.0,
        residual_multiplier=0.3,
    ),
}
"""What none of `CONFIGS` has."""
LENGTH = 11
ENDS = torch.tensor([LENGTH - 1, 6])
"""Positions, of the two prompts of `some_tokens`, that are not both at the end."""


@pytest.fixture(scope="module", params=CONFIGS)
def tiny(request) -> bl.HookedBilinearTransformer:
    return bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS[request.param]))


@pytest.fixture(scope="module")
def llama() -> bl.HookedBilinearTransformer:
    return bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS["llama"]))


@pytest.fixture(scope="module", params=["tinystories-1l", "tinystories-4l"])
def trained(request) -> bl.HookedBilinearTransformer:
    return bl.HookedBilinearTransformer.from_pretrained(request.param)


def written_alone(
    model: bl.HookedBilinearTransformer, prompts: list[Int[Tensor, " pos"]]
) -> list[Float[Tensor, "batch d_model"]]:
    """The oracle: what each layer's MLP writes at each prompt's end, by itself, without padding."""
    names = [f"blocks.{layer}.mlp.hook_out" for layer in range(model.cfg.n_layers)]
    with torch.no_grad():
        caches = [model.run_with_cache(prompt[None], names_filter=names)[1] for prompt in prompts]
    return [torch.stack([cache[name][0, -1] for cache in caches]) for name in names]


def summed(found: bl.Attribution) -> Float[Tensor, " batch"]:
    """All products of two parts, of all eigenvectors, and the rest; in 64 bits."""
    whole = found.projections.sum(1, dtype=torch.float64)
    return ((found.spectrum.values * whole**2).sum(1) + found.rest).float()


def relative(error: Tensor, to: Tensor) -> float:
    return (error.abs().max() / to.abs().max()).item()


@pytest.mark.parametrize("composed", [False, True])
def test_the_parts_are_all_that_is_written(tiny, composed):
    for layer, out in enumerate(written_alone(tiny, list(some_tokens()))):
        output = (5, (6, 7), 11)[layer]
        expected = out @ tiny.output_direction(output, layer=layer)
        found = bl.attribute(tiny, some_tokens(), output, layer=layer, composed=composed)
        torch.testing.assert_close(found.written, expected, atol=1e-4, rtol=1e-4)
        assert relative(summed(found) - expected, expected) < EXACT
        assert found.completeness_error < EXACT
        assert len(set(found.parts)) == len(found.parts) == found.projections.shape[1]
        # the control: any part that matters is missed
        largest = int(found.projections.abs().sum((0, 2)).argmax())
        found.projections[:, largest] = 0
        assert relative(summed(found) - expected, expected) > 100 * EXACT
        assert found.completeness_error > 100 * EXACT


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_parts_are_all_there_where_more_stands_on_their_way(name, composed):
    """Biases that pass a norm, and multipliers of what comes into the residual stream."""
    model = bl.HookedBilinearTransformer.from_hf(random_model(VARIANTS[name]))
    for layer, out in enumerate(written_alone(model, list(some_tokens()))):
        expected = out @ model.output_direction(5, layer=layer)
        found = bl.attribute(model, some_tokens(), 5, layer=layer, composed=composed)
        assert relative(summed(found) - expected, expected) < EXACT
        found.projections[:, found.parts.index(Part("biases"))] = 0
        assert relative(summed(found) - expected, expected) > 10 * EXACT


@pytest.mark.parametrize("name", CONFIGS)
def test_raw_weights_do_as_folded_ones(name):
    """Each norm then has a gain besides its scale."""
    model = bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS[name]), fold=False)
    direction = torch.randn(24, generator=torch.Generator().manual_seed(0))
    for layer, out in enumerate(written_alone(model, list(some_tokens()))):
        # a direction of the residual stream, which takes the gain of a norm after the MLP
        expected = out @ model.output_direction(direction, layer=layer)
        found = bl.attribute(model, some_tokens(), direction, layer=layer, composed=True)
        assert relative(summed(found) - expected, expected) < EXACT


@pytest.mark.parametrize("composed", [False, True])
def test_the_parts_of_real_stories_are_all_that_is_written(trained, composed):
    """Stories of different lengths, padded to one batch, on trained models."""
    stories = sorted(bl.held_out_stories(), key=len)
    texts = [stories[0], stories[20], stories[5]]
    prompts = [trained.to_tokens(text)[0] for text in texts]
    lengths = [len(prompt) for prompt in prompts]
    assert len(set(lengths)) == 3 and lengths != sorted(lengths)
    for layer, out in enumerate(written_alone(trained, prompts)):
        found = bl.attribute(trained, texts, " girl", layer=layer, composed=composed)
        expected = out @ trained.output_direction(" girl")
        torch.testing.assert_close(found.written, expected, atol=1e-5, rtol=1e-4)
        assert relative(summed(found) - expected, expected) < EXACT
        assert found.completeness_error < EXACT
        assert [len(tokens) for tokens in found.tokens] == lengths


def test_a_part_of_real_stories_that_is_left_out_is_missed(trained):
    """The control for the test above: the direct path, or one head's token."""
    found = bl.attribute(trained, bl.held_out_stories()[0], " girl", layer=0)
    for part in (Part("embedding"), Part("L0H1", 1, "embedding")):
        at = found.parts.index(part)
        kept, found.projections[:, at] = found.projections[:, at].clone(), 0
        assert found.completeness_error > 10 * EXACT
        found.projections[:, at] = kept
    assert found.completeness_error < EXACT


@pytest.mark.parametrize("composed", [False, True])
def test_padding_changes_nothing(model, composed):
    """A prompt's parts are those that it has alone; what it does not have adds nothing."""
    prompts = ["Once upon a time there was a big dog.", "A girl.", "She saw a cat"]
    together = bl.attribute(model, prompts, " girl", layer=0, composed=composed)
    for i, prompt in enumerate(prompts):
        alone = bl.attribute(model, prompt, " girl", layer=0, composed=composed)
        rows = [together.parts.index(part) for part in alone.parts]
        torch.testing.assert_close(
            together.projections[i, rows], alone.projections[0], atol=1e-5, rtol=1e-4
        )
        others = set(range(len(together.parts))) - set(rows)
        assert not together.projections[i, sorted(others)].any()
        assert bool(others) == (i > 0)  # the first prompt is the longest
        assert together.tokens[i] == alone.tokens[0] == model.to_str_tokens(prompt)


def test_the_ways_to_give_a_prompt_are_one(model):
    text = "Once upon a time there was a dog."
    found = [
        bl.attribute(model, given, " girl", layer=0).projections
        for given in (text, [text], model.to_tokens(text))
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=0, rtol=0)


def test_eigenvectors_beyond_k_are_the_rest(tiny):
    whole = bl.attribute(tiny, some_tokens(), 5, layer=1)
    assert whole.spectrum.k == whole.activations.shape[1] and not whole.rest.any()
    some = bl.attribute(tiny, some_tokens(), 5, layer=1, k=4)
    assert some.projections.shape == (2, len(some.parts), 4)
    scale = whole.activations.abs().sum(1).max().item()
    torch.testing.assert_close(
        some.activations, whole.activations[:, :4], atol=EXACT * scale, rtol=0
    )
    torch.testing.assert_close(
        some.rest, whole.activations[:, 4:].sum(1), atol=EXACT * scale, rtol=0
    )
    assert some.completeness_error < EXACT < relative(some.rest, some.written)


def test_activations_are_those_of_the_input(tiny):
    """`value (vector . x)^2` of the dense tensor at each prompt's end."""
    found = bl.attribute(tiny, some_tokens(), 5, layer=2)
    with torch.no_grad():
        _, cache = tiny.run_with_cache(some_tokens())
    x = cache["blocks.2.mlp.hook_in"][:, -1]
    tensor = tiny.bilinear_tensor(2)
    interaction = torch.einsum("o,oij->ij", tiny.output_direction(5, layer=2), tensor.to_dense())
    x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1) if tensor.affine else x
    values, vectors = torch.linalg.eigh(interaction.double())
    order = values.abs().argsort(descending=True)
    expected = (values * (x.double() @ vectors) ** 2)[:, order].float()
    scale = expected.abs().max().item()
    torch.testing.assert_close(found.activations, expected, atol=1e-3 * scale, rtol=0)


def test_what_was_written_is_the_residual_stream(tiny):
    """Before attention, before the MLP and at the end, by the names of who wrote it."""
    run = FrozenRun(tiny, some_tokens())
    with torch.no_grad():
        _, cache = tiny.run_with_cache(some_tokens())
    names = ["embedding"]
    for layer in range(3):
        found, parts = run.written(layer, attention=False)
        assert found == [*names, "biases"]
        expected = cache[f"blocks.{layer}.hook_resid_pre"]
        assert relative(parts.sum(2) - expected, expected) < 1e-5
        names += [f"L{layer}H{head}" for head in range(4)]
        found, parts = run.written(layer, attention=True)
        assert found == [*names, "biases"] and parts.shape == (2, LENGTH, len(found), 24)
        expected = cache[f"blocks.{layer}.hook_resid_mid"]
        assert relative(parts.sum(2) - expected, expected) < 1e-5
        for missing in (0, len(found) - 2):  # the control: without a part that is there
            assert relative(parts.sum(2) - parts[:, :, missing] - expected, expected) > 1e-3
        names.append(f"MLP {layer}")
    found, parts = run.written(3, attention=False)
    assert found == [*names, "biases"]
    expected = cache["blocks.2.hook_resid_post"]
    assert relative(parts.sum(2) - expected, expected) < 1e-5


def test_biases_are_a_part_of_their_own():
    """Those of attention's output and values; a model without has none."""
    for name, there in (("llama-biases", True), ("qwen2-tied", True), ("llama", False)):
        model = bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS[name]))
        found = bl.attribute(model, some_tokens(), 5, layer=1)
        at = found.parts.index(Part("biases"))
        assert found.projections[:, at].any() == there
        found.projections[:, at] = 0
        assert (found.completeness_error > 100 * EXACT) == there


def every_vector(model: bl.HookedBilinearTransformer) -> Float[Tensor, "d_model k"]:
    return torch.randn(model.cfg.d_model, 5, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("composed", [False, True])
def test_what_reaches_an_mlp_is_its_input(tiny, composed):
    """On any vectors, at positions of one's own; and the parts are those that there are."""
    run, vectors = FrozenRun(tiny, some_tokens()), every_vector(tiny)
    with torch.no_grad():
        _, cache = tiny.run_with_cache(some_tokens())
    for layer in range(3):
        parts, projections = run.into_mlp(layer, ENDS, vectors, composed=composed)
        x = cache[f"blocks.{layer}.mlp.hook_in"][torch.arange(2), ENDS]
        assert projections.shape == (2, len(parts), 5)
        assert relative(projections.sum(1) - x @ vectors, x @ vectors) < EXACT
        expected = {Part("embedding"), Part("biases")}
        expected |= {Part(f"MLP {each}") for each in range(layer)}
        for each in range(layer + 1):
            read = ["embedding", "biases"]
            for below in range(each):
                read += [f"L{below}H{head}" for head in range(4)] + [f"MLP {below}"]
            expected |= {
                Part(f"L{each}H{head}", position, name)
                for head in range(4)
                for position in range(LENGTH)
                for name in (read if composed else ["embedding", "composed"])
            }
        assert set(parts) == expected and len(parts) == len(expected)


def test_heads_split_by_writers_are_the_heads_split_in_two(tiny):
    run, vectors = FrozenRun(tiny, some_tokens()), every_vector(tiny)
    direct = dict(zip(*columns(run.into_mlp(2, ENDS, vectors)), strict=True))
    split: dict[Part, Tensor] = {}
    for part, projection in zip(
        *columns(run.into_mlp(2, ENDS, vectors, composed=True)), strict=True
    ):
        if part.position is not None and part.read != "embedding":
            part = part._replace(read="composed")
        split[part] = split.get(part, torch.zeros(2, 5)) + projection
    assert set(split) == set(direct)
    scale = max(projection.abs().max().item() for projection in direct.values())
    for part, projection in direct.items():
        torch.testing.assert_close(split[part], projection, atol=1e-5 * scale, rtol=0)


def columns(found: tuple[list[Part], Tensor]) -> tuple[list[Part], tuple[Tensor, ...]]:
    parts, projections = found
    return parts, projections.unbind(1)


def test_parts_are_what_a_plain_computation_says(llama):
    """The direct path, a head's token and a head's reading of a head, one number at a time.

    Heads 2 and 3 share the keys and values of group 1.
    """
    vectors = every_vector(llama)
    found = dict(
        zip(
            *columns(FrozenRun(llama, some_tokens()).into_mlp(2, ENDS, vectors, composed=True)),
            strict=True,
        )
    )
    with torch.no_grad():
        _, cache = llama.run_with_cache(some_tokens())

    def wrote(layer: int, head: int, row: int, end: int, read: Tensor, position: int) -> Tensor:
        attn = llama.blocks[layer].attn
        value = read / cache[f"blocks.{layer}.ln1.hook_scale"][row, position]
        weight = cache[f"blocks.{layer}.attn.hook_pattern"][row, head, end, position]
        return weight * (value @ attn.W_V[head // 2] @ attn.W_O[head])

    for row, end in enumerate(ENDS.tolist()):
        scale = cache["blocks.2.ln2.hook_scale"][row, end]
        stream = cache["blocks.0.hook_resid_pre"][row]
        lower = [wrote(0, 3, row, 4, stream[before], before) for before in range(5)]
        expected = {
            Part("embedding"): stream[end],
            Part("MLP 1"): cache["blocks.1.hook_mlp_out"][row, end],
            Part("L0H3", 4, "embedding"): wrote(0, 3, row, end, stream[4], 4),
            Part("L2H1", 3, "embedding"): wrote(2, 1, row, end, stream[3], 3),
            Part("L1H2", 4, "L0H3"): wrote(1, 2, row, end, torch.stack(lower).sum(0), 4),
            Part("L2H2", 5, "MLP 0"): wrote(
                2, 2, row, end, cache["blocks.0.hook_mlp_out"][row, 5], 5
            ),
        }
        for part, vector in expected.items():
            number = (vector / scale) @ vectors
            torch.testing.assert_close(found[part][row], number, atol=1e-5, rtol=1e-3)
            assert number.abs().max() > 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "0.attn.hook_pattern",
        "1.attn.hook_pattern",
        "0.ln1.hook_scale",
        "1.ln2.hook_scale",
        "0.attn.hook_z",
        "0.hook_resid_pre",
        "0.hook_resid_post",
    ],
)
def test_of_another_run_the_parts_do_not_sum(llama, name):
    """The control: each activation that is held counts, by a tenth more of it."""
    vectors = every_vector(llama)
    run = FrozenRun(llama, some_tokens())
    x = run.cache["blocks.1.mlp.hook_in"][torch.arange(2), ENDS] @ vectors

    def error() -> float:
        _, projections = run.into_mlp(1, ENDS, vectors, composed=True)
        return relative(projections.sum(1) - x, x)

    assert error() < EXACT
    with torch.no_grad():
        run.cache[f"blocks.{name}"].mul_(1.1)
    assert error() > 10 * EXACT


Product = tuple[int, frozenset[str]]
"""An eigenvector and two parts, or one twice, in either order."""


def brute_force(found: bl.Attribution, prompt: int) -> dict[Product, float]:
    """All products of an eigenvector and an unordered pair of parts that are not zero."""
    each = found.projections[prompt]
    first, second = torch.triu_indices(len(each), len(each))
    products = found.spectrum.values * each[first] * each[second]
    products[first != second] *= 2
    names = [found.label(part, prompt) for part in found.parts]
    ends = [frozenset((names[a], names[b])) for a, b in zip(first, second, strict=True)]
    return {
        (i, pair): adds
        for pair, row in zip(ends, products.tolist(), strict=True)
        for i, adds in enumerate(row)
        if adds != 0
    }


@pytest.mark.parametrize("composed", [False, True])
@pytest.mark.parametrize("layer", [0, 1])
def test_products_are_the_largest_of_all(llama, layer, composed):
    found = bl.attribute(llama, some_tokens()[:, :4], 5, layer=layer, k=3, composed=composed)
    for prompt in (0, 1):
        everything = brute_force(found, prompt)
        sizes = sorted(map(abs, everything.values()), reverse=True)
        for n in (20, 100):
            listed = found.products(n, prompt)
            assert list(listed.columns) == ["eigenvector", "part_a", "part_b", "adds"]
            assert listed.adds.abs().tolist() == pytest.approx(sizes[:n], rel=1e-5)
            pairs = map(frozenset, zip(listed.part_a, listed.part_b, strict=True))
            keys: list[Product] = list(zip(listed.eigenvector, pairs, strict=True))
            assert len(set(keys)) == n  # none stands twice
            expected = [everything[key] for key in keys]
            assert listed.adds.tolist() == pytest.approx(expected, rel=1e-5)


def test_all_products_are_all_there_is(llama):
    """Each once, and they sum to what the eigenvectors write; fewer do not."""
    found = bl.attribute(llama, some_tokens()[:, :4], 5, layer=0, k=3)
    for prompt in (0, 1):
        everything = brute_force(found, prompt)
        listed = found.products(10**6, prompt)
        assert len(listed) == len(everything)
        total = found.activations[prompt].sum().item()
        scale = found.activations[prompt].abs().sum().item()
        assert listed.adds.sum() == pytest.approx(total, abs=1e-4 * scale)
        assert found.products(20, prompt).adds.sum() != pytest.approx(total, abs=1e-2 * scale)


def test_by_part_sums_to_what_the_eigenvectors_write(tiny):
    found = bl.attribute(tiny, some_tokens(), 5, layer=1, k=7, composed=True)
    for prompt in (0, 1):
        frame = found.by_part(prompt)
        assert list(frame.columns) == ["part", "adds"]
        assert len(frame) == len(found.parts) == frame.part.nunique()
        assert (frame.adds.abs().diff().dropna() <= 0).all()
        total = found.activations[prompt].sum().item()
        assert frame.adds.sum() == pytest.approx(
            total, abs=1e-5 * found.activations[prompt].abs().sum().item()
        )
        by_name = dict(zip(frame.part, frame.adds, strict=True))
        # by hand: a part with each other, once from either side
        x = found.projections[prompt]
        for i in (0, 1, 2, 13):
            adds = sum(
                (found.spectrum.values * x[i] * x[other]).sum().item() for other in range(len(x))
            )
            name = found.label(found.parts[i], prompt)
            scale = frame.adds.abs().max()
            assert by_name[name] == pytest.approx(adds, abs=1e-4 * scale)


def test_parts_have_names(model):
    texts = ["Once upon a time there was a dog", "One day she saw a big red ball"]
    found = bl.attribute(model, texts, (" she", " he"), layer=0)
    assert found.output == "' she' - ' he'" and found.layer == 0
    for prompt, (tokens, text) in enumerate(zip(found.tokens, texts, strict=True)):
        assert tokens == model.to_str_tokens(text)
        names = {
            Part("embedding"): f"{tokens[-1]!r} here",
            Part("MLP 0"): "MLP 0",
            Part("biases"): "biases",
            Part("L0H3", 2, "embedding"): f"{tokens[2]!r}@2 via L0H3",
            Part("L1H0", 2, "L0H3"): f"L0H3 at {tokens[2]!r}@2 via L1H0",
            Part("L1H0", 2, "composed"): f"composed at {tokens[2]!r}@2 via L1H0",
        }
        for part, name in names.items():
            assert found.label(part, prompt) == name
    labels = {"mean": "' girl' - mean", " he": "' girl' - ' he'"}
    for contrast, label in labels.items():
        assert bl.attribute(model, texts, " girl", layer=0, contrast=contrast).output == label
    raw = bl.attribute(model, texts, " girl", layer=0, contrast=None)
    assert raw.output == "' girl'"
    direction = model.output_direction(" girl", contrast=None)
    given = bl.attribute(model, texts, direction, layer=0)
    assert given.output == "a direction"
    torch.testing.assert_close(given.written, raw.written, atol=0, rtol=0)


def fault(call: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def test_bad_input_is_named(model, as_users):
    cases: dict[str, dict[str, Any]] = {
        "is not one token of this model": {"output": " girlfriendship"},
        "Token id 4096": {"output": 4096},
        "d_model=256": {"output": torch.ones(255)},
        "zero": {"output": (" girl", " girl")},
        "against: a pair": {"output": (" she", " he"), "contrast": " it"},
        "layer=1 must be between 0 and 0": {"layer": 1},
        "layer=-1": {"layer": -1},
        "k=0": {"k": 0},
        "k=-1": {"k": -1},
        "k=257": {"k": 257},
        "empty prompt": {"prompts": ""},
        "An empty prompt": {"prompts": ["A girl.", ""]},
        "empty prompt has no tokens": {"prompts": torch.zeros(2, 0, dtype=torch.long)},
        "context is 256": {"prompts": "Once upon a time " * 100},
        "has 257 tokens": {"prompts": torch.zeros(1, 257, dtype=torch.long)},
        "Token ids": {"prompts": torch.tensor([[5, 4096]])},
    }
    for expected, change in cases.items():
        options = {"prompts": "A girl.", "output": " girl", "layer": 0} | change
        prompts, output = options.pop("prompts"), options.pop("output")
        message = fault(lambda p=prompts, o=output, rest=options: bl.attribute(model, p, o, **rest))
        assert expected in message


def test_an_activation_that_is_not_finite_is_named():
    """A NaN weight shows where it first comes to the surface; so does one that overflows."""
    for weight, number in (("v", float("nan")), ("o", float("inf"))):
        model = bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS["llama"]))
        with torch.no_grad():
            getattr(model.blocks[1].attn, weight).weight[3, 2] = number
        first = {"v": "blocks.1.attn.hook_v", "o": "blocks.1.hook_resid_mid"}[weight]
        for call in (
            lambda m=model: bl.attribute(m, some_tokens(), 5, layer=2),
            lambda m=model: FrozenRun(m, some_tokens()).cache,
        ):
            assert f"{first} is NaN or infinite" in fault(call)
    model = bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS["llama"]))
    assert FrozenRun(model, some_tokens()).cache  # the control


def test_by_part_of_the_shorter_prompt(model):
    found = bl.attribute(model, ["A girl.", "Once upon a time there was a dog."], " girl", layer=0)
    total = found.activations[0].sum().item()
    assert found.by_part(0).adds.sum() == pytest.approx(total, abs=1e-5)


def test_the_largest_product_of_all():
    m = bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS["llama"]))
    found = bl.attribute(m, some_tokens()[:, :4], 5, layer=0, k=3)
    found.projections[:] = 0
    found.projections[:, 0, 0], found.projections[:, 1, 0] = 1.0, 0.9
    value = found.spectrum.values[0].item()
    assert found.products(1).adds.item() == pytest.approx(2 * 0.9 * value)


def test_sixteen_bits():
    half = bl.HookedBilinearTransformer.from_pretrained("tinystories-1l", dtype=torch.bfloat16)
    assert bl.attribute(half, "A girl.", " girl", layer=0).completeness_error < 0.05


@pytest.mark.parametrize("prompts", [[], torch.zeros(0, 3, dtype=torch.long), torch.tensor([1, 2])])
def test_no_prompts(model, as_users, prompts):
    with pytest.raises(ValueError):
        bl.attribute(model, prompts, " girl", layer=0)


def test_a_larger_epsilon():
    config = LlamaConfig(**SIZES, **DECOUPLED, **LINEAR, rms_norm_eps=1e-3)
    m = bl.HookedBilinearTransformer.from_hf(random_model(config))
    assert bl.attribute(m, some_tokens(), 5, layer=1).completeness_error < 1e-4
