"""Gates that become linear: `scale * z * sigmoid(beta z)` with beta from 1 to 0, then folded away.

The annealing of arXiv 2410.08417 (its section on finetuning) for SiLU, and the like for GELU and
ReLU. Everything here changes a stock Hugging Face model in place and leaves a stock model behind.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN, LinearActivation

from bilinear_lens.models.checkpoints import ACTIVATION_NAMES, name_gate_linear
from bilinear_lens.models.components import LINEAR_ACTIVATIONS

RIDGE = 1e-4
"""Of the mean squared input: enough to solve where inputs are collinear, too little to matter."""


def _silu(z: Tensor, beta: Tensor) -> Tensor:
    return z * torch.sigmoid(beta * z)


def _gelu(z: Tensor, beta: Tensor) -> Tensor:
    return z * (0.5 + 0.5 * torch.erf(beta / math.sqrt(2) * z))


def _gelu_tanh(z: Tensor, beta: Tensor) -> Tensor:
    y = beta * z
    return z * (0.5 + 0.5 * torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))


def _relu(z: Tensor, beta: Tensor) -> Tensor:
    # a step has no slope to lower; its height falls instead
    return 0.5 * z + 0.5 * beta * z.abs()


FAMILIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": _silu,
    "swish": _silu,
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "relu": _relu,
}
"""For each activation a family in beta: the activation at 1, half of its input at 0."""


class AnnealedGate(nn.Module):
    """In place of a gate's activation: `scale * z * sigmoid(beta z)`, or its like.

    With `beta` 1 it is the activation; with 0 it is linear, `scale * z / 2`.

    Args:
        activation: a name in `FAMILIES`.
        d_mlp: neurons, each with a scale of its own, 1 at first.
        learn_scale: whether the scales are trained.
    """

    beta: Tensor
    excess: Tensor

    def __init__(self, activation: str, d_mlp: int, *, learn_scale: bool) -> None:
        super().__init__()
        self.family = FAMILIES[activation]
        self.learn_scale = learn_scale
        # of the scale over 1, to which weight decay then draws it; in float32 beside weights of 16
        # bits, which could not hold its steps
        if learn_scale:
            self.excess = nn.Parameter(torch.zeros(d_mlp))
        else:
            self.register_buffer("excess", torch.zeros(d_mlp))
        self.register_buffer("beta", torch.ones(()))  # in checkpoints, so that a run resumes
        self._linear = False  # known here, so that a linear gate costs no more than one

    @property
    def scale(self) -> Float[Tensor, " d_mlp"]:
        return 1 + self.excess

    def set(self, beta: float) -> None:
        """Set beta."""
        self.beta.fill_(beta)
        self._linear = beta == 0

    def forward(self, z: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_mlp"]:
        activated = z / 2 if self._linear else self.family(z, self.beta)
        return (self.scale * activated).to(z.dtype) if self.learn_scale else activated


@dataclass(frozen=True, eq=False)
class GatedMLP:
    """A gated MLP of a Hugging Face model, by its parts."""

    module: nn.Module
    activation: str
    """The attribute that holds the gate's activation."""
    gate: nn.Linear
    """The gate's projection; with the other one behind it in the same weight, as in Phi-3, if
    `fused`."""
    fused: bool

    @property
    def d_mlp(self) -> int:
        return self.gate.out_features // (2 if self.fused else 1)

    @property
    def annealed(self) -> AnnealedGate:
        return getattr(self.module, self.activation)

    def gate_rows(self) -> Iterator[Tensor]:
        """The gate's weight and bias, as views."""
        yield self.gate.weight[: self.d_mlp]
        if self.gate.bias is not None:
            yield self.gate.bias[: self.d_mlp]


def gate_activation(config: PretrainedConfig) -> str | None:
    """The name of the activation in a config's gates, if it names one."""
    config = config.get_text_config()
    names = [getattr(config, name, None) for name in reversed(ACTIVATION_NAMES)]
    return next((name for name in names if name is not None), None)


def is_bilinear(model: PreTrainedModel) -> bool:
    """Whether a model has gated MLPs whose gates are linear.

    Raises:
        ValueError: if it has no gated MLPs.
    """
    gates = [getattr(mlp.module, mlp.activation) for mlp in gated_mlps(model)]
    return all(isinstance(gate, LINEAR_ACTIVATIONS) for gate in gates)


def gated_mlps(model: PreTrainedModel) -> list[GatedMLP]:
    """The gated MLPs of a model, in the order of its layers.

    Raises:
        ValueError: if it has none, or too few: every layer must have one.
    """
    found = []
    mixtures = 0
    for module in model.modules():
        parts = dict(module.named_children())
        mixtures += "experts" in parts
        activation = next((name for name in ("act_fn", "activation_fn") if name in parts), None)
        fused = "gate_up_proj" in parts
        gate = parts.get("gate_up_proj" if fused else "gate_proj")
        if activation and isinstance(gate, nn.Linear) and "down_proj" in parts:
            mlp = GatedMLP(module, activation, gate, fused)
            _check_product(mlp, parts["down_proj"], parts.get("up_proj"))
            found.append(mlp)
    n_layers = model.config.get_text_config().num_hidden_layers
    if len(found) != n_layers or mixtures:  # experts can have a gated MLP beside them
        raise ValueError(
            f"{type(model).__name__} has {len(found)} gated MLPs and {mixtures} mixtures of "
            f"experts in {n_layers} layers; each layer must have one gated MLP, as in Llama, "
            "Mistral, Qwen 2 and 3, Gemma and Phi-3 (a plain MLP is none)."
        )
    return found


@torch.no_grad()
def _check_product(mlp: GatedMLP, down: nn.Module, up: nn.Module | None) -> None:
    """Refuse an MLP that does more than its parts say, such as Gemma 3n's, which leaves out some
    neurons.

    Raises:
        ValueError: naming it.
    """
    weight = mlp.gate.weight
    x = torch.linspace(-1, 1, 3 * mlp.gate.in_features).view(3, -1).to(weight)
    z = mlp.gate(x)
    z, right = z.chunk(2, dim=-1) if up is None else (z, up(x))
    parts = down(getattr(mlp.module, mlp.activation)(z) * right)
    training = mlp.module.training
    whole = mlp.module.eval()(x)
    mlp.module.train(training)
    if not torch.allclose(whole.float(), parts.float(), rtol=1e-2, atol=1e-2 * parts.abs().max()):
        raise ValueError(
            f"{type(mlp.module).__name__} is not down(activation(gate(x)) * up(x)): between its "
            "projections there is something else, which a linear gate would leave."
        )


def anneal_gates(model: PreTrainedModel, *, learn_scale: bool = False) -> list[GatedMLP]:
    """Put an `AnnealedGate` in the place of each gate's activation; the model computes the same.

    Raises:
        ValueError: if the model has no gated MLPs, or gates of an activation without a family.
    """
    mlps = gated_mlps(model)
    name = gate_activation(model.config)
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(
            f"The gates of {type(model).__name__} go through {name!r}, for which no way to a "
            f"linear gate is known. These have one: {known}."
        )
    for mlp in mlps:
        gate = AnnealedGate(name, mlp.d_mlp, learn_scale=learn_scale)
        setattr(mlp.module, mlp.activation, gate.to(mlp.gate.weight.device))
    return mlps


@torch.no_grad()
def fold_gates(model: PreTrainedModel, mlps: Iterable[GatedMLP]) -> None:
    """Make a model whose gates are linear, beta 0, a stock one: `hidden_act="linear"`.

    The scales go into the gates' weights, and the logits stay the same.

    Raises:
        ValueError: if a gate is not linear yet.
    """
    mlps = list(mlps)
    for layer, mlp in enumerate(mlps):
        if (beta := mlp.annealed.beta.item()) != 0:
            raise ValueError(f"The gate of layer {layer} has beta {beta:g}; it must be 0 to fold.")
    for mlp in mlps:
        for rows in mlp.gate_rows():
            rows.mul_((mlp.annealed.scale / 2).view(-1, *[1] * (rows.ndim - 1)))
        setattr(mlp.module, mlp.activation, LinearActivation())
    name_gate_linear(model.config)


@torch.no_grad()
def least_squares_shifts(
    model: PreTrainedModel,
    windows: Int[Tensor, "n n_ctx"],
    *,
    batch_size: int = 8,
) -> list[Float[Tensor, "d_mlp d_in"]]:
    """What to add to each gate's weights, so that half of its output is near the activation's.

    For each layer it solves `min |gate(x) / 2 - activation(gate(x))|^2` over the weights of the
    linear gate on the left, on the inputs x that `windows` bring to the layer.

    Args:
        model: as it is before its gates are replaced.
        windows: token ids of real text.

    Returns:
        For each layer [d_mlp, d_model]; where the gate has a bias, its shift is one more column.
    """
    mlps = gated_mlps(model)
    activation = ACT2FN[gate_activation(model.config)]
    exact = torch.float32 if model.device.type == "mps" else torch.float64  # mps has no other
    sums: dict[int, tuple[Tensor, Tensor]] = {}

    def add(layer: int, mlp: GatedMLP, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2)
        weight, *bias = mlp.gate_rows()
        error = activation(z := functional.linear(x, weight, *bias)) - z / 2
        if bias:
            x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        x, error = x.to(exact), error.to(exact)
        gram, cross = sums.get(layer, (0, 0))
        sums[layer] = gram + x.mT @ x, cross + x.mT @ error

    hooks = [
        mlp.module.register_forward_pre_hook(partial(add, layer, mlp))
        for layer, mlp in enumerate(mlps)
    ]
    training = model.training
    try:
        for batch in tqdm(windows.split(batch_size), desc="Fitting linear gates", leave=False):
            model.eval()(input_ids=batch.to(model.device), use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    shifts = []
    for layer, mlp in enumerate(mlps):
        gram, cross = sums.pop(layer)
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        # the linear gate's output is halved, so its weights move by twice the fit of the error
        shifts.append(2 * torch.linalg.solve(gram, cross).mT.to(mlp.gate.weight.dtype))
    return shifts
