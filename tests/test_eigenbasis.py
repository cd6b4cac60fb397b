"""Eigenvectors as hook points: cached, edited, and gone without a trace."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from jaxtyping import Float
from models import CONFIGS, random_model, some_tokens
from torch import Tensor

import bilinear_lens as bl

LAYER = 1
OUT = f"blocks.{LAYER}.mlp.hook_out"
OUTPUTS = [5, (6, 7), 11]
CLOSE: dict[str, Any] = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module", params=CONFIGS)
def shared(request) -> bl.HookedBilinearTransformer:
    return bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS[request.param]))


@pytest.fixture
def tiny(shared) -> Iterator[bl.HookedBilinearTransformer]:
    """Each architecture, without the eigenbases that an earlier test added."""
    yield shared
    for layer, block in enumerate(shared.blocks):
        for name in list(block.mlp.eigen):
            shared.remove_eigenbasis(name, layer)


@pytest.fixture
def llama() -> bl.HookedBilinearTransformer:
    return bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS["llama"]))


def acts_of(name: str, layer: int = LAYER) -> str:
    return f"blocks.{layer}.mlp.eigen.{name}.hook_acts"


def cached(model: bl.HookedBilinearTransformer, hooks=()) -> dict[str, Tensor]:
    with torch.no_grad(), model.hooks(fwd_hooks=list(hooks)):
        logits, cache = model.run_with_cache(some_tokens())
    return {**cache, "logits": logits}


def rows_of(model: bl.HookedBilinearTransformer, layer: int = LAYER) -> Float[Tensor, "n d_model"]:
    return torch.stack([model.output_direction(output, layer=layer) for output in OUTPUTS])


def some_edit(seed: int, *, n: int = 3, k: int = 4) -> Float[Tensor, "batch pos direction k"]:
    return torch.randn(*some_tokens().shape, n, k, generator=torch.Generator().manual_seed(seed))


def dense_acts(
    model: bl.HookedBilinearTransformer, x: Float[Tensor, "b pos d"], layer: int = LAYER
) -> Float[Tensor, "b pos n coords"]:
    """The oracle: eigenvectors of the materialised tensor, largest magnitude first, in 64 bits."""
    tensor = model.bilinear_tensor(layer)
    x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) if tensor.affine else x
    found = []
    for direction in rows_of(model, layer).double():
        interaction = torch.einsum("o,oij->ij", direction, tensor.to_dense().double())
        values, vectors = torch.linalg.eigh(interaction)
        order = values.abs().argsort(descending=True)
        found.append((values * (x.double() @ vectors) ** 2)[..., order])
    return torch.stack(found, dim=-2).float()


def test_without_an_edit_nothing_changes(tiny):
    """To the last bit, for as many eigenvectors as one likes; an edit of nothing is none either."""
    before = cached(tiny)
    for k in (1, 4, 24):
        with tiny.eigenbasis("some", LAYER, OUTPUTS, k):
            after = cached(tiny)
            same = cached(tiny, [(acts_of("some"), lambda acts, hook: acts.clone())])
        assert set(after) - set(before) == {acts_of("some")}
        for name, activation in before.items():
            torch.testing.assert_close(after[name], activation, atol=0, rtol=0)
        torch.testing.assert_close(same["logits"], before["logits"], atol=0, rtol=0)


def test_what_is_cached_is_what_each_eigenvector_adds(tiny):
    """Against eigenvectors of the dense tensor; all of them together are what the MLP writes."""
    coords = tiny.bilinear_tensor(LAYER).left.shape[1]
    with tiny.eigenbasis("all", LAYER, OUTPUTS, coords), tiny.eigenbasis("top", LAYER, OUTPUTS, 3):
        cache = cached(tiny)
    everything, top = cache[acts_of("all")], cache[acts_of("top")]
    assert everything.shape == (2, 11, 3, coords) and top.shape == (2, 11, 3, 3)
    written = cache[OUT] @ rows_of(tiny).mT
    scale = max(1.0, written.abs().max().item())
    assert (everything.sum(-1) - written).abs().max() < 1e-4 * scale
    expected = dense_acts(tiny, cache[f"blocks.{LAYER}.mlp.hook_in"])
    assert (everything - expected).abs().max() < 1e-3 * scale
    assert (top - expected[..., :3]).abs().max() < 1e-3 * scale
    assert (top.sum(-1) - written).abs().max() > 0.01 * scale  # three of them are not all


def test_an_edit_moves_the_output_by_just_that(tiny):
    """Each direction by its own edit, nothing across them, and only that: the dense oracle."""
    rows, edit = rows_of(tiny), some_edit(0)
    edit[:, :, 1] = 0  # the direction in the middle is left alone
    tiny.add_eigenbasis("some", LAYER, OUTPUTS, 4)
    before = cached(tiny)
    after = cached(tiny, [(acts_of("some"), lambda acts, hook: acts + edit)])
    moved = after[OUT] - before[OUT]
    scale = max(1.0, before[OUT].abs().max().item())
    assert (moved @ rows.mT - edit.sum(-1)).abs().max() < 1e-4 * scale
    assert (moved @ rows[1]).abs().max() < 1e-4 * scale
    gram = rows.double() @ rows.double().mT
    shortest = torch.linalg.solve(gram, edit.sum(-1).double().flatten(0, 1).mT).mT @ rows.double()
    assert (moved.flatten(0, 1) - shortest).abs().max() < 1e-4 * scale
    assert moved.abs().max() > 0.1
    x = before[f"blocks.{LAYER}.mlp.hook_in"]
    tensor = tiny.bilinear_tensor(LAYER)
    homogeneous = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) if tensor.affine else x
    dense = torch.einsum("oij,bpi,bpj->bpo", tensor.to_dense(), homogeneous, homogeneous)
    assert (after[OUT] - dense - shortest.view_as(dense)).abs().max() < 1e-3 * scale
    assert (after["logits"] - before["logits"]).abs().max() > 1e-2
    # the rest of the model sees it as it would any other edit of the output
    by_hand = cached(tiny, [(OUT, lambda out, hook: after[OUT])])
    torch.testing.assert_close(by_hand["logits"], after["logits"])


def test_an_edit_in_place_counts_too(llama):
    """As hooks of TransformerLens often are written, with and without returning what they edit."""
    llama.add_eigenbasis("some", LAYER, OUTPUTS, 4)

    def fresh(acts, hook):
        return torch.cat([acts[..., :1] + 3, acts[..., 1:]], dim=-1)

    def returned(acts, hook):
        acts[..., 0] += 3
        return acts

    def silent(acts, hook):
        acts[..., 0] += 3

    clean = cached(llama)["logits"]
    expected = cached(llama, [(acts_of("some"), fresh)])
    assert (expected["logits"] - clean).abs().max() > 1e-2
    for hook in (returned, silent):
        after = cached(llama, [(acts_of("some"), hook)])
        torch.testing.assert_close(after["logits"], expected["logits"], **CLOSE)
        torch.testing.assert_close(after[OUT], expected[OUT], **CLOSE)


def test_it_sees_what_hooks_make_of_the_input(llama):
    """An edit of `hook_in` changes what the eigenvectors show, as it changes the output."""
    llama.add_eigenbasis("all", LAYER, OUTPUTS, 24)
    shift = torch.randn(24, generator=torch.Generator().manual_seed(6))
    before = cached(llama)
    after = cached(llama, [(f"blocks.{LAYER}.mlp.hook_in", lambda x, hook: x + shift)])
    written = after[OUT] @ rows_of(llama).mT
    torch.testing.assert_close(after[acts_of("all")].sum(-1), written, **CLOSE)
    assert not torch.allclose(written, before[OUT] @ rows_of(llama).mT, atol=1e-2)


def test_an_ablated_eigenvector_is_that_of_the_ablation_hooks(llama):
    """Two ways to the same: setting its activation to zero, and `ablate_eigenvectors`."""
    direction = llama.output_direction(5)
    top = llama.bilinear_tensor(LAYER).eigh(direction).top(3)
    with llama.eigenbasis("five", LAYER, [5], 3):
        silent = cached(llama, [(acts_of("five"), lambda acts, hook: torch.zeros_like(acts))])
    ablated = cached(llama, bl.ablate_eigenvectors(top, direction, layer=LAYER))
    torch.testing.assert_close(silent["logits"], ablated["logits"], **CLOSE)
    assert not torch.allclose(silent["logits"], cached(llama)["logits"], atol=1e-2)


def test_several_in_one_layer_add(llama):
    edits = {"a": some_edit(1, n=1), "b": some_edit(2, n=2)}
    llama.add_eigenbasis("a", LAYER, [5], 4)
    llama.add_eigenbasis("b", LAYER, [6, 7], 4)
    clean = cached(llama)
    assert clean[acts_of("a")].shape[2] == 1 and clean[acts_of("b")].shape[2] == 2

    def moved(*names: str) -> Tensor:
        hooks = [(acts_of(n), lambda acts, hook, e=edits[n]: acts + e) for n in names]
        after = cached(llama, hooks)
        for name, edit in edits.items():  # what one shows does not depend on the other
            expected = clean[acts_of(name)] + (edit if name in names else 0)
            torch.testing.assert_close(after[acts_of(name)], expected, **CLOSE)
        return after[OUT] - clean[OUT]

    first, second, both = moved("a"), moved("b"), moved("a", "b")
    torch.testing.assert_close(both, first + second, **CLOSE)
    assert min(first.abs().max(), second.abs().max()) > 0.1
    llama.remove_eigenbasis("a", LAYER)  # and the other stays as it was
    assert acts_of("a") not in cached(llama)
    torch.testing.assert_close(moved_alone(llama, edits["b"]), second, **CLOSE)


def moved_alone(model: bl.HookedBilinearTransformer, edit: Tensor) -> Tensor:
    after = cached(model, [(acts_of("b"), lambda acts, hook: acts + edit)])
    return after[OUT] - cached(model)[OUT]


def test_several_layers_see_what_the_earlier_ones_leave(tiny):
    """The same name in two layers is two; an edit of the lower changes what the upper shows."""
    edit = some_edit(3)
    for layer in (0, 2):
        tiny.add_eigenbasis("some", layer, OUTPUTS, 4)
    before = cached(tiny)
    after = cached(tiny, [(acts_of("some", 0), lambda acts, hook: acts + edit)])
    upper, hook_in = acts_of("some", 2), "blocks.2.mlp.hook_in"
    assert (after[upper] - before[upper]).abs().max() > 1e-2
    for cache in (before, after):
        expected = dense_acts(tiny, cache[hook_in], layer=2)[..., :4]
        scale = max(1.0, expected.abs().max().item())
        assert (cache[upper] - expected).abs().max() < 1e-3 * scale
    later = cached(tiny, [(upper, lambda acts, hook: acts + edit)])
    torch.testing.assert_close(later[acts_of("some", 0)], before[acts_of("some", 0)])
    assert (later["logits"] - before["logits"]).abs().max() > 1e-2


def test_outputs_rows_and_a_basis_are_the_same_directions(tiny):
    """All take the gain of a norm after the MLP, where there is one."""
    rows = torch.stack([tiny.output_direction(output) for output in OUTPUTS])
    for given, directions in {
        "outputs": OUTPUTS,
        "rows": rows,
        "basis": bl.Basis(rows, ["five", "six against seven", "eleven"]),
    }.items():
        tiny.add_eigenbasis(given, LAYER, directions, 3)
    cache = cached(tiny)
    for given in ("rows", "basis"):
        torch.testing.assert_close(cache[acts_of(given)], cache[acts_of("outputs")], atol=0, rtol=0)
    assert not torch.allclose(cache[acts_of("rows")][:, :, 0], cache[acts_of("rows")][:, :, 1])


def test_gradients_flow_into_an_edit(tiny):
    """A step of an edit counts as the same step of the output, by the dense pseudo-inverse."""
    tiny.add_eigenbasis("some", LAYER, OUTPUTS, 4)
    tokens = some_tokens()
    shift = torch.zeros(2, 11, 24, requires_grad=True)
    edit = torch.zeros(2, 11, 3, 4, requires_grad=True)
    hooks = [
        (acts_of("some"), lambda acts, hook: acts + edit),
        (OUT, lambda out, hook: out + shift),
    ]
    tiny.run_with_hooks(tokens, fwd_hooks=hooks, return_type="loss").backward()
    assert edit.grad is not None and shift.grad is not None
    write = torch.linalg.pinv(rows_of(tiny).double()).float()  # [d_model, direction]
    expected = (shift.grad @ write)[..., None].expand(-1, -1, -1, 4)
    torch.testing.assert_close(edit.grad, expected, atol=1e-6, rtol=1e-3)
    assert edit.grad.abs().max() > 1e-4


def test_a_gradient_is_the_slope_of_the_loss(llama):
    """Central differences in the direction of the gradient, and a backward hook that sees it."""
    llama.add_eigenbasis("some", LAYER, OUTPUTS, 4)
    seen = {}

    def look(grad, hook):
        seen["grad"] = grad[0] if isinstance(grad, tuple) else grad

    with llama.hooks(bwd_hooks=[(acts_of("some"), look)]):
        llama(some_tokens(), return_type="loss").backward()
    grad = seen["grad"]
    step = 3 * grad / grad.norm()

    def loss(edit: Tensor) -> float:
        hooks = [(acts_of("some"), lambda acts, hook: acts + edit)]
        with torch.no_grad():
            return llama.run_with_hooks(some_tokens(), fwd_hooks=hooks, return_type="loss").item()

    # small against the activations, and far above the rounding of the loss
    slope = (loss(0.05 * step) - loss(-0.05 * step)) / 0.1
    assert slope == pytest.approx((grad * step).sum().item(), rel=0.02)
    assert slope > 1e-3


def test_gradients_of_the_weights_are_as_they_were(llama):
    """What the eigenvectors show is taken off again, so that training is not disturbed."""

    def gradients() -> dict[str, Tensor]:
        llama.zero_grad()
        llama(some_tokens(), return_type="loss").backward()
        named = llama.original_model.named_parameters()
        return {n: p.grad.clone() for n, p in named if p.grad is not None}

    before = gradients()
    with llama.eigenbasis("some", LAYER, OUTPUTS, 24):
        after = gradients()
    assert before and set(after) == set(before)
    assert max(grad.abs().max().item() for grad in before.values()) > 1e-3
    for name, grad in before.items():
        torch.testing.assert_close(after[name], grad, atol=1e-6, rtol=1e-4)


def state(model: bl.HookedBilinearTransformer) -> dict[str, Any]:
    """All that an eigenbasis must leave as it found it."""
    activations = cached(model)
    return {
        "hooks": set(model.hook_dict),
        "modules": {name for name, _ in model.named_modules()},
        "cache": set(activations),
        "weights": set(model.state_dict()),
        "buffers": {name for name, _ in model.named_buffers()},
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "fingerprint": model.fingerprint(),
        "logits": activations["logits"],
    }


def compared(now: dict[str, Any], then: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    torch.testing.assert_close(now["logits"], then["logits"], atol=0, rtol=0)
    for name in set(then) - {"logits", *but}:
        assert now[name] == then[name], name


def test_it_is_no_part_of_the_weights(tiny):
    """Hook points come, weights and buffers do not; so that what is saved is the model."""
    before = state(tiny)
    with tiny.eigenbasis("some", LAYER, OUTPUTS, 4):
        within = state(tiny)
    compared(within, before, but=("hooks", "modules", "cache"))
    for kind in ("hooks", "cache"):  # and the comparison can fail
        assert within[kind] - before[kind] == {acts_of("some")}


def test_removed_it_leaves_no_trace(tiny):
    before = state(tiny)
    for layer, name in ((LAYER, "some"), (LAYER, "more"), (2, "some")):
        tiny.add_eigenbasis(name, layer, OUTPUTS, 4)
    edit = some_edit(4)
    tiny.add_hook(acts_of("some"), lambda acts, hook: acts + edit)
    assert not torch.allclose(cached(tiny)["logits"], before["logits"], atol=1e-2)
    for layer, name in ((LAYER, "more"), (2, "some"), (LAYER, "some")):
        tiny.remove_eigenbasis(name, layer)
    compared(state(tiny), before)
    with pytest.raises(KeyError, match="does not exist"):  # rather than a hook that never fires
        tiny.run_with_hooks(some_tokens(), fwd_hooks=[(acts_of("some"), lambda acts, hook: acts)])
    tiny.add_eigenbasis("some", LAYER, OUTPUTS, 4)  # the name is free again, and has no hooks
    torch.testing.assert_close(cached(tiny)["logits"], before["logits"], atol=0, rtol=0)


def test_the_context_manager_restores_after_an_exception_too(llama):
    before = state(llama)
    with llama.eigenbasis("some", LAYER, OUTPUTS, 4):
        assert acts_of("some") in llama.hook_dict
    compared(state(llama), before)
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        llama.eigenbasis("some", LAYER, OUTPUTS, 4),
    ):
        assert acts_of("some") in llama.hook_dict
        raise RuntimeError("on purpose")
    compared(state(llama), before)

    def fail(acts, hook):
        raise RuntimeError("on purpose")

    with (
        pytest.raises(RuntimeError, match="on purpose"),
        llama.eigenbasis("some", LAYER, OUTPUTS, 4),
    ):
        llama.run_with_hooks(some_tokens(), fwd_hooks=[(acts_of("some"), fail)])
    compared(state(llama), before)


def test_hooks_on_it_are_reset_with_all_others(llama):
    edit = some_edit(5)
    llama.add_eigenbasis("some", LAYER, OUTPUTS, 4)
    clean = cached(llama)["logits"]
    llama.run_with_hooks(some_tokens(), fwd_hooks=[(acts_of("some"), lambda a, hook: a + edit)])
    torch.testing.assert_close(cached(llama)["logits"], clean, atol=0, rtol=0)
    llama.add_hook(acts_of("some"), lambda acts, hook: acts + edit)
    assert not torch.allclose(cached(llama)["logits"], clean, atol=1e-2)
    llama.reset_hooks()
    torch.testing.assert_close(cached(llama)["logits"], clean, atol=0, rtol=0)
    assert acts_of("some") in llama.hook_dict  # the hook point itself stays


def test_sixteen_bit_models_are_edited_in_their_own_type():
    half = bl.HookedBilinearTransformer.from_pretrained("tinystories-1l", dtype=torch.bfloat16)
    tokens = half.to_tokens("Once upon a time, there was a little girl.")
    with torch.no_grad():
        clean = half(tokens)
        half.add_eigenbasis("girl", 0, [" girl"], 8)
        torch.testing.assert_close(half(tokens), clean, atol=0, rtol=0)
        _, before = half.run_with_cache(tokens)
        push = [(acts_of("girl", 0), lambda acts, hook: acts + 1)]  # of 8 eigenvectors
        with half.hooks(fwd_hooks=push):
            _, after = half.run_with_cache(tokens)
    name = "blocks.0.mlp.hook_out"
    assert after[name].dtype == torch.bfloat16 and after[acts_of("girl", 0)].dtype == torch.float32
    moved = (after[name].float() - before[name].float()) @ half.output_direction(" girl")
    torch.testing.assert_close(moved, torch.full_like(moved, 8), atol=0, rtol=0.02)


def fault(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def test_bad_input_is_named_and_adds_nothing(llama, as_users):
    before = state(llama)
    rows = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))
    dependent = torch.stack([rows[0], rows[1], 2 * rows[0]])
    cases: dict[str, tuple[str, Any, Any, Any]] = {
        "layer=3 must be between 0 and 2": ("some", 3, [5], 2),
        "layer=-1 must be": ("some", -1, [5], 2),
        "k=0 must be": ("some", LAYER, [5], 0),
        "k=-1 must be": ("some", LAYER, [5], -1),
        "k=25 must be": ("some", LAYER, [5], 25),
        "at least one output": ("some", LAYER, [], 2),
        "must be [d_model=24]": ("some", LAYER, rows[:, :23], 2),
        "shape [25]; it must be": ("some", LAYER, bl.Basis(torch.eye(25)[:2], list("ab")), 2),
        "Token id 37": ("some", LAYER, [5, 37], 2),
        "zero": ("some", LAYER, [(5, 5)], 2),
        "The 3 directions must be linearly independent": ("some", LAYER, dependent, 2),
        "The 2 directions must be": ("some", LAYER, [5, 5], 2),
        "The 25 directions must be": ("some", LAYER, torch.eye(24)[[*range(24), 0]], 2),
    }
    for expected, case in cases.items():
        assert expected in fault(lambda case=case: llama.add_eigenbasis(*case))
    for name in ("a b", "", "1st", "a.b", "she-he", "items", "keys", "forward"):
        message = fault(lambda name=name: llama.add_eigenbasis(name, LAYER, [5], 2))
        assert f"name={name!r} must be a Python name" in message
    compared(state(llama), before)


def test_a_taken_or_unknown_name_is_named(llama):
    llama.add_eigenbasis("some", LAYER, OUTPUTS, 4)
    before = state(llama)
    taken = fault(lambda: llama.add_eigenbasis("some", LAYER, [8], 2))
    assert "already" in taken and f"remove_eigenbasis('some', {LAYER})" in taken
    assert "'some'" in fault(lambda: llama.remove_eigenbasis("other", LAYER))
    assert "Layer 2 has no eigenbasis 'some'" in fault(lambda: llama.remove_eigenbasis("some", 2))
    for layer in (-1, 3):
        message = fault(lambda layer=layer: llama.remove_eigenbasis("some", layer))
        assert f"layer={layer}" in message
    compared(state(llama), before)  # the one that is there stays as it was
    llama.remove_eigenbasis("some", LAYER)
    assert "no eigenbasis 'some'" in fault(lambda: llama.remove_eigenbasis("some", LAYER))


def test_dependence_in_single_precision_is_seen():
    m = bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS["llama"]))
    with pytest.raises(ValueError, match="linearly independent"):
        m.add_eigenbasis("x", 1, [5, 6, (5, 6)], 2)


def test_the_names_of_a_modules_attributes_are_refused():
    m = bl.HookedBilinearTransformer.from_hf(random_model(CONFIGS["llama"]))
    for name in ("training", "_modules", "_parameters"):
        with pytest.raises(ValueError, match="Python name"):
            m.add_eigenbasis(name, 1, [5], 2)


def test_one_string_is_one_output(model):
    with pytest.raises(ValueError), model.eigenbasis("x", 0, " she", 3):
        pass


def test_a_hook_that_changes_the_shape_is_refused(tiny):
    hooks = [(acts_of("some"), lambda acts, hook: acts[..., :1])]
    within = tiny.eigenbasis("some", LAYER, OUTPUTS, 4)
    with within, pytest.raises(ValueError, match="what it edits"):
        tiny.run_with_hooks(some_tokens(), fwd_hooks=hooks)
    for name in ("class", "keys", "a b"):
        with pytest.raises(ValueError, match="must be a Python name"):
            tiny.add_eigenbasis(name, LAYER, OUTPUTS, 4)
    with pytest.raises(ValueError, match="must be a list"):
        tiny.add_eigenbasis("pair", LAYER, (3, 5), 4)
