"""BilinearMLPBridge: the TransformerLens component of a bilinear MLP, and how adapters take it.

TransformerLens's own gated component applies SiLU for every activation name that it does not
know, "linear" included, once weights are folded. Ours has no activation to get wrong.
"""

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import GatedMLPBridge
from transformer_lens.model_bridge.generalized_components.joint_gate_up_mlp import (
    JointGateUpMLPBridge,
)
from transformers.activations import LinearActivation

from bilinear_lens.tensor import BilinearTensor

LINEAR_ACTIVATIONS = (nn.Identity, LinearActivation)
"""What a linear gate has in the place of its activation."""


class BilinearMLPBridge(GatedMLPBridge):
    """A gated MLP whose gate has no activation: `out(gate(x) * in(x))`.

    Hooks: `hook_in`, `hook_pre` (gate side, the tensor's left), `hook_pre_linear` (in side, its
    right), `hook_post` (their product), `hook_out`. They fire in every mode of the bridge.
    """

    eigen: nn.ModuleDict
    """Each an `Eigenbasis`, by name."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.eigen = nn.ModuleDict()

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        x = self.hook_in(hidden_states)
        product = self.gate(x) * getattr(self, "in")(x)
        out = self.out(product)
        for eigenbasis in self.eigen.values():
            out = eigenbasis(x, out)
        return self.hook_out(out)

    def bilinear_tensor(self) -> BilinearTensor:
        """What the component computes, from `hook_in` to `hook_out`."""
        parts = [getattr(self, name) for name in ("gate", "in", "out")]
        left, right, down = (part.weight.detach() for part in parts)
        left_bias, right_bias, down_bias = (
            None if part.bias is None else part.bias.detach() for part in parts
        )
        return BilinearTensor.with_biases(
            left, right, down, left_bias=left_bias, right_bias=right_bias, down_bias=down_bias
        )


class JointBilinearMLPBridge(JointGateUpMLPBridge, BilinearMLPBridge):
    """The same where one weight holds both input projections, as in Phi-3."""

    forward = BilinearMLPBridge.forward  # pyright: ignore[reportAssignmentType]


def check_bilinear(model: nn.Module, adapter: ArchitectureAdapter) -> None:
    """Refuse a Hugging Face model that has no bilinear MLPs, saying what it has instead.

    Raises:
        ValueError: if its MLPs are plain, a mixture of experts, or gated through an activation.
    """
    blocks = adapter.components["blocks"] if adapter.components else None
    mlp = blocks.submodules.get("mlp") if blocks else None
    name = type(model).__name__
    if blocks is None or not isinstance(mlp, GatedMLPBridge):
        kind = "none" if mlp is None else type(mlp).__name__
        mixture = "mixture-of-experts" if "MoE" in kind else "plain"
        raise ValueError(
            f"{name} has {mixture} MLPs ({kind}); a bilinear lens needs gated MLPs with a linear "
            'gate, such as LlamaForCausalLM with hidden_act="linear".'
        )
    for layer, block in enumerate(model.get_submodule(str(blocks.name)).children()):
        for child_name, child in block.get_submodule(str(mlp.name)).named_children():
            if "act" in child_name and not isinstance(child, LINEAR_ACTIVATIONS):
                raise ValueError(
                    f"The gate of {name}'s layer {layer} goes through an activation, "
                    f"{type(child).__name__}, so its MLP is not a tensor. Make it bilinear first, "
                    "by finetuning that removes the activation (bilinear_lens.bilinearize), or "
                    'load a model with hidden_act="linear".'
                )


def check_linear_gates(bridge: nn.Module) -> None:
    """Refuse MLPs whose Hugging Face code is not the product that our component computes.

    `check_bilinear` sees activations that are modules; this one sees any.

    Raises:
        ValueError: naming the first such layer.
    """
    for layer, block in enumerate(bridge.get_submodule("blocks").children()):
        mlp = block.get_submodule("mlp")
        weight = mlp.get_parameter("in.weight")
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 2, weight.shape[1], generator=generator).to(weight)
        with torch.no_grad():
            theirs, ours = mlp.get_submodule("_original_component")(x), mlp(x)
        if (theirs - ours).norm() > 0.05 * ours.norm():
            raise ValueError(
                f"Layer {layer}'s MLP is not the product of two linear maps, so it is not a "
                "tensor: its code applies an activation. Make it bilinear first, by finetuning "
                "that removes the activation (bilinear_lens.bilinearize)."
            )


def use_bilinear_components(adapter: ArchitectureAdapter) -> None:
    """Replace the adapter's gated MLP component by ours."""
    submodules = adapter.components["blocks"].submodules
    old = submodules["mlp"]
    if isinstance(old, JointGateUpMLPBridge):
        submodules["mlp"] = JointBilinearMLPBridge(
            name=str(old.name),
            config=old.config,
            submodules={"out": old.submodules["out"]},
            split_gate_up_matrix=old.split_gate_up_matrix,
            fused_attr=old.fused_attr,
        )
    else:
        submodules["mlp"] = BilinearMLPBridge(
            name=old.name, config=old.config, submodules=old.submodules, optional=old.optional
        )


def check_finite(model: nn.Module) -> None:
    """Refuse weights that are NaN or infinite.

    Raises:
        ValueError: naming the first such parameter.
    """
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{name} holds NaN or infinite weights: reload or repair the model.")
