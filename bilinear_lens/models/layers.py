"""What a classifier is made of: its config, and layers hooked and named as in TransformerLens."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from bilinear_lens.tensor import BilinearTensor


@dataclass(frozen=True)
class ClassifierConfig:
    """The shape of a classifier.

    Raises:
        ValueError: if a size is no positive integer, or there is not one label for each class.
    """

    input_shape: tuple[int, ...]
    """`(channels, height, width)` of images, `(n,)` of vectors."""
    n_classes: int
    """Outputs: the classes of images, the targets of a toy."""
    d_model: int = 300
    d_mlp: int | None = None
    """Products a layer computes. None: as many as d_model, and they are what the layer writes
    (`W_out` is the identity and not trained), as in arXiv 2410.08417, section 4."""
    n_layers: int = 1
    residual: bool = False
    """Whether a layer adds to its input instead of replacing it."""
    bias: bool = False
    """Whether layers have biases."""
    labels: tuple[str, ...] = ()
    """A name for each class; by default their numbers."""

    def __post_init__(self) -> None:
        if not isinstance(self.input_shape, Sequence):
            raise ValueError(
                f"input_shape={self.input_shape!r} must be (channels, height, width) or (n,)."
            )
        object.__setattr__(self, "input_shape", tuple(self.input_shape))
        sizes = {
            "input_shape": self.input_shape,
            "n_classes": (self.n_classes,),
            "d_model": (self.d_model,),
            "d_mlp": () if self.d_mlp is None else (self.d_mlp,),
            "n_layers": (self.n_layers,),
        }
        if len(self.input_shape) not in (1, 3):
            raise ValueError(
                f"input_shape={self.input_shape} must be (channels, height, width) or (n,): grey "
                "images have one channel, (1, height, width)."
            )
        wrong = [
            name
            for name, given in sizes.items()
            if not all(isinstance(size, int) and size >= 1 for size in given)
        ]
        if wrong:
            raise ValueError(f"{wrong} must be integers of at least 1: {asdict(self)}.")
        labels = tuple(map(str, self.labels or range(self.n_classes)))
        object.__setattr__(self, "labels", labels)
        if len(labels) != self.n_classes or len(set(labels)) != len(labels):
            raise ValueError(
                f"labels {labels} must be {self.n_classes} different names: one for each class."
            )

    @property
    def d_in(self) -> int:
        """Numbers in an input."""
        return math.prod(self.input_shape)


class BilinearMLP(nn.Module):
    """`W_out^T ((W_gate^T x + b_gate) * (W_in^T x + b_in)) + b_out`, hooked as in TransformerLens.

    Without `d_mlp`, `W_out` is the identity.
    """

    def __init__(self, cfg: ClassifierConfig, generator: torch.Generator) -> None:
        super().__init__()
        d_mlp = cfg.d_mlp or cfg.d_model
        self.W_gate = _uniform(cfg.d_model, d_mlp, generator=generator)
        self.W_in = _uniform(cfg.d_model, d_mlp, generator=generator)
        self.W_out: Tensor
        if cfg.d_mlp is None:
            self.register_buffer("W_out", torch.eye(d_mlp), persistent=False)
        else:
            self.W_out = _uniform(d_mlp, cfg.d_model, generator=generator)
        self.b_gate = nn.Parameter(torch.zeros(d_mlp)) if cfg.bias else None
        self.b_in = nn.Parameter(torch.zeros(d_mlp)) if cfg.bias else None
        self.b_out = nn.Parameter(torch.zeros(cfg.d_model)) if cfg.bias else None
        self.hook_in = HookPoint()
        self.gate = nn.ModuleDict({"hook_in": HookPoint()})  # named as the transformer's component
        self.hook_pre = HookPoint()
        self.hook_pre_linear = HookPoint()
        self.hook_post = HookPoint()
        self.hook_out = HookPoint()

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        x = self.hook_in(x)
        gate, linear = self.gate["hook_in"](x) @ self.W_gate, x @ self.W_in
        if self.b_gate is not None and self.b_in is not None:
            gate, linear = gate + self.b_gate, linear + self.b_in
        out = self.hook_post(self.hook_pre(gate) * self.hook_pre_linear(linear))
        if isinstance(self.W_out, nn.Parameter):
            out = out @ self.W_out
        return self.hook_out(out if self.b_out is None else out + self.b_out)

    def bilinear_tensor(self) -> BilinearTensor:
        """What the layer computes, from `hook_in` to `hook_out`."""
        left_bias, right_bias, down_bias = (
            None if bias is None else bias.detach() for bias in (self.b_gate, self.b_in, self.b_out)
        )
        return BilinearTensor.with_biases(
            self.W_gate.detach().mT,
            self.W_in.detach().mT,
            self.W_out.detach().mT,
            left_bias=left_bias,
            right_bias=right_bias,
            down_bias=down_bias,
        )


class BilinearBlock(nn.Module):
    """A layer: its MLP's output, added to its input if the model is residual."""

    def __init__(self, cfg: ClassifierConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.residual = cfg.residual
        self.mlp = BilinearMLP(cfg, generator)
        self.hook_resid_pre = HookPoint()
        self.hook_mlp_out = HookPoint()
        self.hook_resid_post = HookPoint()

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        x = self.hook_resid_pre(x)
        out = self.hook_mlp_out(self.mlp(x))
        return self.hook_resid_post(x + out if self.residual else out)

    def tensor(self) -> BilinearTensor:
        """What the layer computes, from `hook_resid_pre` to `hook_resid_post`."""
        mlp = self.mlp.bilinear_tensor()
        return mlp.with_linear(torch.eye(mlp.d_in)) if self.residual else mlp


class Embed(nn.Module):
    """`x W_E`: pixels to the residual stream."""

    def __init__(self, cfg: ClassifierConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.W_E = _uniform(cfg.d_in, cfg.d_model, generator=generator)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_model"]:
        return x @ self.W_E


class Unembed(nn.Module):
    """`x W_U`: the residual stream to logits."""

    def __init__(self, cfg: ClassifierConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.W_U = _uniform(cfg.d_model, cfg.n_classes, generator=generator)

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch n_classes"]:
        return x @ self.W_U


def _uniform(d_in: int, d_out: int, *, generator: torch.Generator) -> nn.Parameter:
    """As `nn.Linear` starts its weights."""
    return nn.Parameter(
        torch.empty(d_in, d_out).uniform_(-(d_in**-0.5), d_in**-0.5, generator=generator)
    )
