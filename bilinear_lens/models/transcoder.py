"""BilinearTranscoder: a bilinear layer in the place of an MLP that is none."""

import json
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from bilinear_lens.models.activations import Hooks, replacing
from bilinear_lens.models.checkpoints import (
    check_weight_files,
    read_config,
    subfolder_of,
    write_folder,
)
from bilinear_lens.models.saes import check_digest, check_width
from bilinear_lens.tensor import BilinearTensor

_ARCHITECTURE = "BilinearTranscoder"
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True, eq=False)
class BilinearTranscoder:
    """`down ((left x) * (right x)) + bias + skip x`: what an MLP writes, nearly, as a tensor.

    It reads any TransformerLens model's `hook_in` and stands for what the model has at `hook_out`.

    Raises:
        ValueError: if shapes do not fit each other, or a weight is not finite.
    """

    left: Float[Tensor, "rank d_in"]
    right: Float[Tensor, "rank d_in"]
    down: Float[Tensor, "d_out rank"]
    bias: Float[Tensor, " d_out"]
    skip: Float[Tensor, "d_out d_in"] | None
    hook_in: str
    hook_out: str
    model_digest: str | None = None
    """Of the model that it was trained on, as `saes.model_digest` has it."""

    def __post_init__(self) -> None:
        self.tensor  # noqa: B018 - which checks them

    @cached_property
    def tensor(self) -> BilinearTensor:
        """The layer, exactly: affine, because of the bias; of it `eigh` and all else are had."""
        tensor = BilinearTensor.with_biases(self.left, self.right, self.down, down_bias=self.bias)
        return tensor if self.skip is None else tensor.with_linear(self.skip)

    def __repr__(self) -> str:
        rank, d_in = self.left.shape
        skip = "" if self.skip is None else ", with a skip"
        return f"BilinearTranscoder({self.hook_in} -> {self.hook_out}: d={d_in}, rank={rank}{skip})"

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """What it writes for the activation `x` at `hook_in`."""
        return self.tensor(x.to(self.left))

    def to(self, device: str | torch.device) -> "BilinearTranscoder":
        """The same on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {n: v.to(device) for n, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def hooks(self) -> Hooks:
        """For `run_with_hooks`: the model goes on with what this writes."""
        return replacing(self, self.hook_in, self.hook_out)

    def check_model(self, model: TransformerBridge) -> None:
        """Refuse a model that this was not made for.

        Raises:
            ValueError: if the model lacks a hook point, an activation there has another width, or
                it is known to be another model.
        """
        check_width(model, self.hook_in, self.left.shape[1])
        check_width(model, self.hook_out, self.down.shape[0])
        check_digest(model, self.hook_in, self.model_digest)

    def save_pretrained(self, path: str | Path) -> None:
        """Save as a folder with `config.json` and safetensors, which appears whole or not at all.

        Raises:
            ValueError: if `path` exists or cannot be made.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        weights = {n: v.contiguous() for n, v in values.items() if isinstance(v, Tensor)}
        config = {n: v for n, v in values.items() if isinstance(v, str)}
        with write_folder(path) as folder:
            text = json.dumps({"architecture": _ARCHITECTURE, **config}, indent=1)
            (folder / "config.json").write_text(text, encoding="utf-8")
            save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, subfolder: str | None = None, *, revision: str | None = None
    ) -> "BilinearTranscoder":
        """Load one from a folder or the Hub.

        Raises:
            KeyError: if the name is not known.
            ValueError: if the folder holds something else.
        """
        folder = subfolder_of(name_or_path, subfolder, revision)
        config = read_config(folder)
        if config.pop("architecture", None) != _ARCHITECTURE:
            raise ValueError(
                f"{folder} holds no {_ARCHITECTURE}: give a folder that its save_pretrained made."
            )
        check_weight_files(folder)
        return cls(**{"skip": None, **load_file(folder / _WEIGHTS), **config})
