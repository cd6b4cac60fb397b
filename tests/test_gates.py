"""Gates that become linear: from the activation itself to a stock model that computes the same."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from models import CONFIGS, SIZES, gated, loaded_with_report, random_model, some_tokens
from torch import Tensor
from torch.nn import functional
from transformers import (
    Gemma3nTextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.activations import ACT2FN
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

import bilinear_lens as bl
from bilinear_lens.training import gates
from bilinear_lens.training.annealing import SCHEDULES, GateAnnealing
from bilinear_lens.training.gates import (
    FAMILIES,
    AnnealedGate,
    anneal_gates,
    fold_gates,
    gated_mlps,
    is_bilinear,
    least_squares_shifts,
)

D_MLP, D_MODEL, N_LAYERS = (
    SIZES[name] for name in ("intermediate_size", "hidden_size", "num_hidden_layers")
)
architectures = pytest.mark.parametrize("name", CONFIGS)
families = pytest.mark.parametrize("name", FAMILIES)
schedules = pytest.mark.parametrize("schedule", SCHEDULES)


def logits(model, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        out = model(some_tokens() if tokens is None else tokens)
    return getattr(out, "logits", out)


def mlps_of(model: PreTrainedModel) -> list[Any]:
    return [layer.mlp for layer in model.model.layers]  # pyright: ignore[reportCallIssue, reportArgumentType, reportAttributeAccessIssue, reportGeneralTypeIssues]


@contextmanager
def recorded(modules, *, before: bool) -> Iterator[list[list[Tensor]]]:
    """What goes into each module, or comes out of it."""
    seen: list[list[Tensor]] = [[] for _ in modules]
    handles = []
    for module, rows in zip(modules, seen, strict=True):
        if before:
            hook = partial(lambda rows, module, args: rows.append(args[0].detach()), rows)
            handles.append(module.register_forward_pre_hook(hook))
        else:
            hook = partial(lambda rows, module, args, out: rows.append(out.detach()), rows)
            handles.append(module.register_forward_hook(hook))
    yield seen
    for handle in handles:
        handle.remove()


def random_shifts(model: PreTrainedModel, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    biased = [mlp.gate.bias is not None for mlp in gated_mlps(model)]
    return [torch.randn(D_MLP, D_MODEL + bias, generator=generator) / 10 for bias in biased]


@families
def test_a_family_goes_from_the_activation_to_half_of_its_input(name):
    z = torch.linspace(-7, 7, 1401, dtype=torch.float64)
    family = FAMILIES[name]
    torch.testing.assert_close(family(z, torch.ones(())), ACT2FN[name](z), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(family(z, torch.zeros(())), z / 2)
    away = torch.stack([(family(z, torch.tensor(b / 10)) - z / 2).abs() for b in range(11)])
    assert (away.diff(dim=0) >= 0).all()  # ever nearer as beta falls
    assert (away.diff(dim=0)[:, z.abs() > 1] > 0)[:4].all()  # and not all at once
    assert not torch.allclose(family(z, torch.tensor(0.5)), z / 2, atol=0.1)


@families
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_the_slope_of_a_family_is_finite(name, beta):
    z = torch.tensor([-80.0, -1.0, 0.0, 1.0, 80.0], requires_grad=True)
    FAMILIES[name](z, torch.tensor(beta)).sum().backward()
    assert z.grad is not None and z.grad.isfinite().all()
    assert z.grad[2] == 0.5


def test_a_gate_of_relu_leaks_more_and_more():
    for beta in (0.0, 0.3, 1.0):
        z = torch.tensor([-2.0, 2.0])
        ours = FAMILIES["relu"](z, torch.tensor(beta))
        expected = functional.leaky_relu(z, (1 - beta) / (1 + beta)) * (1 + beta) / 2
        torch.testing.assert_close(ours, expected)


@architectures
def test_gated_mlps_are_found_with_their_gates(name):
    model = random_model(gated(name))
    mlps = gated_mlps(model)
    assert [mlp.module for mlp in mlps] == mlps_of(model)
    activations = [
        module.activation_fn if name == "phi3" else module.act_fn for module in mlps_of(model)
    ]
    with (
        recorded(mlps_of(model), before=True) as inputs,
        recorded(activations, before=True) as gates,
    ):
        logits(model)
    for mlp, (x,), (z,) in zip(mlps, inputs, gates, strict=True):
        assert mlp.d_mlp == D_MLP and mlp.fused == (name == "phi3")
        rows = list(mlp.gate_rows())
        assert len(rows) == (2 if name == "llama-biases" else 1)
        torch.testing.assert_close(functional.linear(x, *rows), z)
        with torch.no_grad():
            rows[0].zero_()  # a view, not a copy
        assert not mlp.gate.weight[:D_MLP].any()
        assert mlp.gate.weight.any() == mlp.fused


MIXTURE: dict[str, Any] = {
    **SIZES,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 22,
    "num_experts": 3,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=37, n_positions=32, n_embd=24, n_layer=3, n_head=4),
        MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=2),
        Qwen2MoeConfig(**MIXTURE),  # with a gated MLP beside the experts
        Qwen3MoeConfig(**MIXTURE),
        Qwen3MoeConfig(**MIXTURE, mlp_only_layers=[1]),
    ],
    ids=["gpt2", "mixtral", "qwen2-moe", "qwen3-moe", "qwen3-moe-in-part"],
)
def test_other_mlps_are_refused_and_left_as_they_were(config):
    model = random_model(config)
    before = [type(module) for module in model.modules()]
    with pytest.raises(
        ValueError, match=rf"{type(model).__name__} has .*each layer must have one gated MLP"
    ):
        anneal_gates(model)
    assert [type(module) for module in model.modules()] == before


def test_an_mlp_that_does_more_than_its_parts_is_refused():
    """Gemma 3n's first layers let only the neurons of the largest gates through."""
    mlp = Gemma3nTextMLP(
        Gemma3nTextConfig(hidden_size=24, intermediate_size=[40], num_hidden_layers=1)
    )
    mlp.activation_sparsity = 0.0
    model = random_model(gated("llama"))
    model.model.layers[1].mlp = mlp
    assert len(gated_mlps(model)) == 3  # without that it is a gated MLP like others
    mlp.activation_sparsity = 0.9
    with pytest.raises(ValueError, match=r"Gemma3nTextMLP is not down\(activation"):
        gated_mlps(model)


@pytest.mark.parametrize("activation", ["mish", "tanh", "linear"])
def test_a_gate_without_a_family_is_refused_and_left_as_it_was(activation):
    model = random_model(LlamaConfig(**SIZES, hidden_act=activation))
    with pytest.raises(ValueError, match=rf"LlamaForCausalLM go through '{activation}'.*silu"):
        anneal_gates(model)
    assert all(isinstance(mlp.act_fn, type(ACT2FN[activation])) for mlp in mlps_of(model))


@architectures
def test_a_model_is_bilinear_by_its_config(name):
    assert is_bilinear(random_model(CONFIGS[name]))
    assert not is_bilinear(random_model(gated(name)))


@architectures
def test_an_annealed_model_begins_as_it_was(name):
    model: Any = random_model(gated(name)).double()  # by far less than float32 rounds
    expected, weights = logits(model), copy.deepcopy(model.state_dict())
    annealing = GateAnnealing(model, share=0.5, shifts=random_shifts(model))
    annealing.set(0.0)
    torch.testing.assert_close(logits(model), expected, atol=1e-9, rtol=0)
    assert all(model.state_dict()[key].equal(weight) for key, weight in weights.items())
    annealing.set(0.1)
    assert not torch.allclose(logits(model), expected, atol=1e-3)


@schedules
@pytest.mark.parametrize("layer_by_layer", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_beta_falls_from_one_to_zero_within_the_share(schedule, layer_by_layer, share):
    annealing = GateAnnealing(
        random_model(gated("llama")), share=share, schedule=schedule, layer_by_layer=layer_by_layer
    )
    grid = [step / 300 for step in range(301)]
    for layer in range(N_LAYERS):
        betas = torch.tensor([annealing.beta(at, layer) for at in grid], dtype=torch.float64)
        begin, end = 0.0, share
        if layer_by_layer:
            begin, end = share * layer / N_LAYERS, share * (layer + 1) / N_LAYERS
        times = torch.tensor(grid, dtype=torch.float64)
        assert (betas.diff() <= 0).all()
        if share:
            assert annealing.beta(0.0, layer) == 1
            assert (betas[times < begin - 1e-9] == 1).all()
            inside = betas[(times > begin + 1e-9) & (times < end - 1e-9)]
            assert ((inside > 0) & (inside < 1)).all() and (inside.diff() < 0).all()
        assert (betas[times >= end].abs() < 1e-12).all()
        assert all(annealing.beta(progress, layer) == 0 for progress in grid if progress >= share)


def test_schedules_are_what_their_names_say():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    expected = {
        "linear": t,
        "cosine": 0.5 - 0.5 * torch.cos(math.pi * t),
        "exponential": (1 - torch.exp(-4 * t)) / (1 - math.exp(-4)),
        "smootherstep": 6 * t**5 - 15 * t**4 + 10 * t**3,
    }
    assert list(SCHEDULES) == list(expected)
    for schedule, values in expected.items():
        ours = torch.tensor([SCHEDULES[schedule](each) for each in t.tolist()])
        torch.testing.assert_close(ours.double(), values, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["llama", "llama-biases", "phi3"])
def test_where_the_gates_are_depends_on_the_progress_alone(name):
    """Half way, after many steps, after one, or after a detour: weights moved by `1 - beta`."""
    start = random_model(gated(name))
    shifts = random_shifts(start)
    ways = [[0.4], [0.9, 0.2, 0.4], [step / 1000 * 0.4 for step in range(1001)]]
    for way in ways:
        model = copy.deepcopy(start)
        annealing = GateAnnealing(
            model, share=0.8, schedule="cosine", layer_by_layer=True, shifts=shifts
        )
        for progress in way:
            annealing.set(progress)
        for layer, (mlp, before) in enumerate(zip(annealing.mlps, gated_mlps(start), strict=True)):
            beta = annealing.beta(0.4, layer)
            assert mlp.annealed.beta.item() == pytest.approx(beta)
            moved = (1 - beta) * shifts[layer]
            atol = 1e-5
            weight, *bias = mlp.gate_rows()
            old, *old_bias = before.gate_rows()
            torch.testing.assert_close(
                weight.float(), old.float() + moved[:, :D_MODEL], atol=atol, rtol=0
            )
            if bias:
                expected = old_bias[0].float() + moved[:, D_MODEL]
                torch.testing.assert_close(bias[0].float(), expected, atol=atol, rtol=0)
            assert mlp.gate.weight[D_MLP:].equal(before.gate.weight[D_MLP:])
        betas = [annealing.beta(0.4, layer) for layer in range(N_LAYERS)]
        assert betas[0] == 0 and 0 < betas[1] < 1 and betas[2] == 1


def test_16_bits_that_would_lose_small_steps_are_refused():
    start = random_model(gated("llama-biases")).bfloat16()
    shifts, model = random_shifts(start), copy.deepcopy(start)
    with pytest.raises(ValueError, match=r"vanish in torch\.bfloat16 weights"):
        GateAnnealing(model, share=1.0, shifts=shifts)
    assert not any(isinstance(module, AnnealedGate) for module in model.modules())
    annealing = GateAnnealing(model, share=0.0, shifts=shifts)
    annealing.set(0.0)
    for mlp, old, shift in zip(annealing.mlps, gated_mlps(start), shifts, strict=True):
        parts = shift[:, :D_MODEL], shift[:, D_MODEL]
        for after, before, part in zip(mlp.gate_rows(), old.gate_rows(), parts, strict=True):
            torch.testing.assert_close(after.float(), before.float() + part, atol=1e-3, rtol=2**-7)
    assert annealing.fold().dtype == torch.bfloat16


def test_scales_learn_beside_weights_of_16_bits():
    model = random_model(gated("llama")).bfloat16()
    annealing = GateAnnealing(model, share=1.0, learn_scale=True)
    optimizer = torch.optim.SGD([mlp.annealed.excess for mlp in annealing.mlps], lr=1e-4)
    model(some_tokens(), labels=some_tokens()).loss.backward()
    optimizer.step()
    assert all((mlp.annealed.scale != 1).any() for mlp in annealing.mlps)
    assert model(some_tokens()).logits.dtype == torch.bfloat16


def test_folding_before_the_end_is_refused():
    model = random_model(gated("llama"))
    annealing = GateAnnealing(model, share=0.5, layer_by_layer=True)
    annealing.set(0.34)  # of its three parts, two are over
    before = logits(model)
    with pytest.raises(ValueError, match=r"layer 2 has beta 0\.96; it must be 0"):
        annealing.fold()
    torch.testing.assert_close(logits(model), before)
    annealing.set(0.5)
    assert is_bilinear(annealing.fold())


@architectures
def test_a_folded_model_is_a_stock_one_that_computes_the_same(name, tmp_path):
    model = random_model(gated(name))
    annealing = GateAnnealing(model, share=0.5, learn_scale=True, shifts=random_shifts(model))
    annealing.set(1.0)
    generator = torch.Generator().manual_seed(4)
    for mlp in annealing.mlps:
        mlp.annealed.excess.data = torch.rand(D_MLP, generator=generator) - 0.5
    outer = [mlp.module for mlp in annealing.mlps]
    with recorded(outer, before=False) as written:
        expected = logits(model)
    folded = annealing.fold()
    assert folded is model
    torch.testing.assert_close(logits(folded), expected, atol=1e-5, rtol=1e-5)

    folded.save_pretrained(tmp_path)
    loaded, report = loaded_with_report(tmp_path)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is type(random_model(CONFIGS[name]))
    named = [getattr(loaded.config, field, None) for field in ("hidden_act", "hidden_activation")]
    assert set(named) - {None} == {"linear"}
    assert logits(loaded).equal(logits(folded))

    hooked = bl.HookedBilinearTransformer.from_hf(loaded)
    with torch.no_grad():
        _, cache = hooked.run_with_cache(some_tokens())
    for layer, (out,) in enumerate(written):
        x = cache[f"blocks.{layer}.mlp.hook_in"]
        torch.testing.assert_close(hooked.bilinear_tensor(layer)(x), out, atol=1e-4, rtol=1e-4)
    # the scales are in the weights: without them the model is another
    other = random_model(gated(name))
    plain = GateAnnealing(other, share=0.0, shifts=random_shifts(other))
    plain.set(1.0)
    assert not torch.allclose(logits(plain.fold()), expected, atol=1e-3)


def test_scales_are_trained_only_when_asked():
    for learn_scale in (False, True):
        model = random_model(gated("llama"))
        mlps = anneal_gates(model, learn_scale=learn_scale)
        model(some_tokens(), labels=some_tokens()).loss.backward()
        scales = [mlp.annealed.excess for mlp in mlps]
        assert all((scale.grad is not None) == learn_scale for scale in scales)
    (gate, *_) = (mlp.annealed for mlp in mlps)
    gate.excess.data.fill_(0.5)
    gate.excess.grad = torch.zeros_like(gate.excess)
    torch.optim.SGD([gate.excess], lr=0.1, weight_decay=1.0).step()
    torch.testing.assert_close(gate.scale.detach(), torch.full((D_MLP,), 1.45))  # drawn to 1
    with pytest.raises(ValueError, match="layer 0 has beta 1;"):
        fold_gates(model, mlps)


@pytest.mark.parametrize("name", ["llama", "llama-biases", "phi3", "gemma2-tied"])
def test_shifts_are_those_of_least_squares(name, monkeypatch):
    model = random_model(gated(name)).train()
    weights = copy.deepcopy(model.state_dict())
    generator = torch.Generator().manual_seed(5)
    windows = torch.randint(0, 37, (13, 17), generator=generator)
    modules = mlps_of(model)
    with recorded(modules, before=True) as inputs:
        logits(model, windows)
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    ridged = least_squares_shifts(model, windows, batch_size=5)
    with monkeypatch.context() as patch:
        patch.setattr(gates, "RIDGE", 1e-10)
        shifts = least_squares_shifts(model, windows, batch_size=5)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert model.training
    assert all(model.state_dict()[key].equal(weight) for key, weight in weights.items())

    activation = functional.gelu if "gemma" in name else functional.silu
    options: dict[str, Any] = {"approximate": "tanh"} if "gemma" in name else {}
    for module, (x,), shift, near in zip(modules, inputs, shifts, ridged, strict=True):
        x = x.flatten(0, 1).double()
        if name == "phi3":
            weight, bias = module.gate_up_proj.weight[:D_MLP], None
        else:
            weight, bias = module.gate_proj.weight, module.gate_proj.bias
        z = functional.linear(x.float(), weight, bias).double()
        target = activation(z, **options)
        parameters = weight.detach().double().mT
        if bias is not None:
            x = torch.cat([x, torch.ones(len(x), 1).double()], dim=1)
            parameters = torch.cat([parameters, bias.detach().double()[None]])
        best = torch.linalg.lstsq(x, 2 * target).solution
        assert near.shape == shift.shape == (D_MLP, x.shape[1])
        torch.testing.assert_close(
            parameters + shift.double().mT, best, atol=1e-4 * best.abs().max().item(), rtol=0
        )

        def error(move, x=x, start=parameters, target=target) -> float:
            return (x @ (start + move) / 2 - target).square().mean().item()

        move = near.double().mT
        assert (
            error(best - parameters) <= error(move) < error(best - parameters) + 0.01 * error(0.0)
        )
        assert error(move) < 0.7 * error(0.0) and error(0.0) < 0.7 * error(-move)


def test_shifts_leave_no_hook_behind_an_error():
    model = random_model(gated("llama"))
    with pytest.raises(IndexError):
        least_squares_shifts(model, torch.full((3, 5), 37))
    assert not any(module._forward_pre_hooks for module in model.modules())
