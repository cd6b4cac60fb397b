"""HookedBilinearClassifier: bilinear layers between an embedding and an unembedding, norm-free.

- for images, and for toys: whatever is a vector in and some outputs out
- hooks and weights are named as in the transformer
- without norms the whole model is a chain of tensors, `tensors()`; of one layer, a single tensor
  from pixels to logits
"""

import json
import operator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import pandas as pd
import torch
from jaxtyping import Float, Integer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformer_lens import ActivationCache, HookedRootModule
from transformer_lens.hook_points import HookPoint

from bilinear_lens.models.checkpoints import CLASSIFIER, classifier_files, write_folder
from bilinear_lens.models.fitting import FitRecipe, check_targets, fit
from bilinear_lens.models.layers import BilinearBlock, ClassifierConfig, Embed, Unembed
from bilinear_lens.tensor import BilinearTensor

PIXEL_SLACK = 1e-3
"""How far past 0 and 1 rounding may bring a pixel."""


class HookedBilinearClassifier(HookedRootModule):
    """Embedding, bilinear layers, unembedding; no norms (arXiv 2410.08417, section 4).

    Make one with `from_config` or `from_pretrained`. Hooks: `hook_embed`; for each layer
    `blocks.{l}.hook_resid_pre`, `blocks.{l}.mlp.{hook_in, gate.hook_in, hook_pre, hook_pre_linear,
    hook_post, hook_out}`, `blocks.{l}.hook_mlp_out`, `blocks.{l}.hook_resid_post`. The hooks of
    `ablate_eigenvectors` and its like fit `bilinear_tensor(layer, inputs="hidden")`.
    """

    def __init__(self, cfg: ClassifierConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        generator = torch.Generator().manual_seed(seed)
        self.embed = Embed(cfg, generator)
        self.hook_embed = HookPoint()
        self.blocks = nn.ModuleList(BilinearBlock(cfg, generator) for _ in range(cfg.n_layers))
        self.unembed = Unembed(cfg, generator)
        self.setup()

    @classmethod
    def from_config(
        cls, config: ClassifierConfig | None = None, *, seed: int = 0, **fields: Any
    ) -> "HookedBilinearClassifier":
        """A model with random weights, from a `ClassifierConfig` or its fields.

        For example `from_config(input_shape=(1, 28, 28), n_classes=10)`.

        Raises:
            ValueError: as `ClassifierConfig`, or if both or neither are given.
        """
        if (config is None) == (not fields):
            raise ValueError("Give a ClassifierConfig, or its fields as keywords.")
        return cls(ClassifierConfig(**fields) if config is None else config, seed=seed)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype | Literal["auto"] = torch.float32,
    ) -> "HookedBilinearClassifier":
        """A saved model: a built-in one, "mnist-1l", or from a folder or a Hugging Face Hub id.

        Args:
            dtype: "auto" is what the weights are saved in.

        Raises:
            KeyError: if there is no such folder.
            ValueError: if the folder holds no classifier, or its weights contradict its config.
        """
        config, weights_file = classifier_files(name_or_path, revision)
        weights = load_file(weights_file)
        try:
            fields: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in config.items()
            }  # JSON has lists
            model = cls(ClassifierConfig(**fields))
            model.to(weights["embed.W_E"].dtype if dtype == "auto" else dtype)
            model.load_state_dict(weights)
        except (TypeError, KeyError, RuntimeError) as error:
            raise ValueError(
                f"Config and weights of {name_or_path} do not fit each other: {error}"
            ) from error
        return model

    def save_pretrained(self, path: str | Path, *, card: str | None = None) -> None:
        """Save config and safetensors to a new folder, which appears whole or not at all.

        Args:
            card: Markdown that says how the model was made, for a `README.md` beside them.

        Raises:
            ValueError: if `path` exists or cannot be made.
        """
        config = {"architecture": CLASSIFIER, **asdict(self.cfg)}
        with write_folder(path) as folder:
            (folder / "config.json").write_text(json.dumps(config, indent=1))
            weights = {name: weight.contiguous() for name, weight in self.state_dict().items()}
            save_file(weights, folder / "model.safetensors")
            if card is not None:
                (folder / "README.md").write_text(card, encoding="utf-8")

    def forward(self, images: Float[Tensor, "..."]) -> Float[Tensor, "*batch n_classes"]:
        """Logits for images `[*batch, *input_shape]` (0 to 1), or flat ones `[*batch, d_in]`.

        Raises:
            ValueError: if the images are of another shape, or integers.
        """
        x = self.hook_embed(self.embed(self.flatten(images)))
        for block in self.blocks:
            x = block(x)
        return self.unembed(x)

    def run_with_cache(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *args, return_cache_object: bool = True, remove_batch_dim: bool = False, **kwargs
    ) -> tuple[Tensor, ActivationCache | dict[str, Tensor]]:
        """As TransformerLens's: what `forward` returns, and an `ActivationCache` of every hook."""
        out, cache = super().run_with_cache(*args, remove_batch_dim=remove_batch_dim, **kwargs)
        if not return_cache_object:
            return out, cache
        return out, ActivationCache(cache, self, has_batch_dim=not remove_batch_dim)

    def flatten(self, images: Float[Tensor, "..."]) -> Float[Tensor, "*batch {self.cfg.d_in}"]:
        """Images as vectors of pixels.

        Raises:
            ValueError: as `forward`.
        """
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(
                f"The images are {kind}; give a tensor of floats from 0 to 1: "
                "torch.as_tensor(images).float() / 255."
            )
        shape = self.cfg.input_shape
        if images.shape[-len(shape) :] == shape:
            images = images.flatten(-len(shape))
        elif images.shape[-1:] != (self.cfg.d_in,):
            raise ValueError(
                f"Inputs {list(images.shape)} do not fit this model, which takes "
                f"[..., {', '.join(map(str, shape))}] or flat [..., {self.cfg.d_in}]."
            )
        return images.to(self.W_E)

    def fit(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        held_out: tuple[Tensor, Tensor] | None = None,
        progress: bool = True,
        **options: Any,
    ) -> pd.DataFrame:
        """Train in place with AdamW, a cosine schedule and the papers' regularisers.

        Args:
            inputs: images `[n, *input_shape]` from 0 to 1, or vectors.
            targets: class numbers `[n]`, trained with cross-entropy; or floats `[n, n_classes]`,
                trained with the mean squared error.
            held_out: inputs and targets to measure after every epoch.
            progress: whether to show a progress bar.
            **options: fields of `FitRecipe`: epochs, batch_size, learning_rate, weight_decay,
                input_noise, salt_and_pepper, latent_noise, dropout, l1, seed, bf16.

        Returns:
            A row for each epoch: `epoch`, `loss`, and with class numbers `accuracy`; the same
            with the prefix `held_out_` where that was given.

        Raises:
            ValueError: if inputs or targets do not fit the model, hold NaN, lack a class, or an
                option is out of range; before any training. Also if the loss diverges.
            TypeError: if there is no such option.
        """
        recipe = FitRecipe(**options)
        return fit(
            self,
            self._checked(inputs, targets, every_class=True),
            recipe,
            reads=[f"blocks.{layer}.mlp.hook_in" for layer in range(self.cfg.n_layers)],
            held_out=None if held_out is None else self._checked(*held_out, every_class=False),
            progress=progress,
        )

    def _checked(
        self, inputs: Tensor, targets: Tensor, *, every_class: bool
    ) -> tuple[Tensor, Tensor]:
        """Inputs as vectors, and targets, on the model's device, once they are known to fit it."""
        x = self.flatten(inputs)
        if x.ndim != 2:
            raise ValueError(
                f"Inputs {list(inputs.shape)} must be one batch: [n, *{self.cfg.input_shape}] or "
                f"[n, {self.cfg.d_in}]."
            )
        check_targets(x, targets, self.cfg.n_classes, every_class=every_class)
        self.check_pixels(x)
        dtype = torch.float32 if targets.is_floating_point() else torch.int64
        return x, targets.to(self.W_E.device, dtype)

    def check_pixels(self, x: Float[Tensor, "*batch d_in"]) -> None:
        """Refuse images with pixels that are NaN or not from 0 to 1; vectors may have any numbers.

        Raises:
            ValueError: if `x` has such a pixel.
        """
        low, high = x.aminmax() if x.numel() else (x.new_zeros(()), x.new_zeros(()))
        if not (low.isfinite() and high.isfinite()):  # NaN is passed on
            raise ValueError("The input holds NaN or infinite values: remove or repair those.")
        if len(self.cfg.input_shape) == 3 and (low < -PIXEL_SLACK or high > 1 + PIXEL_SLACK):
            raise ValueError(
                f"Pixels run from {low:.3g} to {high:.3g}: give them from 0 to 1 (bytes / 255)."
            )

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Integer[Tensor, " n"]) -> float:
        """The share of images whose largest logit is their label's.

        Raises:
            ValueError: if images or labels do not fit the model.
        """
        x, labels = self._checked(images, labels, every_class=False)
        if labels.is_floating_point():
            raise ValueError("Labels are floats; accuracy needs class numbers: labels.argmax(-1).")
        hits = [
            (self(batch).argmax(-1) == batch_labels).sum()
            for batch, batch_labels in zip(x.split(4096), labels.split(4096), strict=True)
        ]
        return torch.stack(hits).sum().item() / len(labels)

    def bilinear_tensor(
        self, layer: int = 0, *, inputs: Literal["pixels", "hidden"] = "pixels"
    ) -> BilinearTensor:
        """What layer `layer`'s MLP writes, at `blocks.{layer}.mlp.hook_out`, exactly.

        Args:
            inputs: "pixels" folds the embedding in, so that eigenvectors are orthonormal images;
                "hidden" takes the activation at `blocks.{layer}.mlp.hook_in`, as the papers'
                code does, whose eigenvectors are not orthogonal any more once drawn as pixels.

        Raises:
            ValueError: if there is no such layer, or pixels reach it through other layers.
        """
        if not 0 <= layer < self.cfg.n_layers:
            raise ValueError(
                f"layer={layer} must be between 0 and {self.cfg.n_layers - 1}: "
                f"this model has {self.cfg.n_layers}."
            )
        if inputs not in ("pixels", "hidden"):
            raise ValueError(f'inputs={inputs!r} must be "pixels" or "hidden".')
        tensor = self.blocks[layer].mlp.bilinear_tensor()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        if inputs == "hidden":
            return tensor
        if layer > 0:
            raise ValueError(
                f"Layer {layer} is of degree {2 ** (layer + 1)} in the pixels, no tensor of them: "
                'read it with inputs="hidden", or the chain of all layers with tensors().'
            )
        return tensor.change_basis(inputs=self.W_E.detach())

    def tensors(self) -> list[BilinearTensor]:
        """The model as a chain, one tensor a layer: `logits = tensors[-1](...(tensors[0](x)))`.

        The embedding is folded into the first, the unembedding into the last, and residual
        connections and biases are exact, by a constant coordinate. A model of one layer is its
        only tensor.
        """
        chain = [block.tensor() for block in self.blocks]  # pyright: ignore[reportCallIssue]
        chain[0] = chain[0].change_basis(inputs=self.W_E.detach())
        chain[-1] = chain[-1].change_basis(outputs=self.W_U.detach().mT)
        return chain

    def output_direction(
        self, label: str | SupportsIndex, contrast: str | SupportsIndex | None = "mean"
    ) -> Float[Tensor, " d_model"]:
        """The direction in the residual stream that raises a class.

        Args:
            label: a class, by name or number.
            contrast: what it is measured against: "mean" is the mean over the classes (logits are
                shift-invariant), a class is that class, None is nothing.

        Raises:
            ValueError: if a class is unknown, or is its own contrast.
        """
        unembedding = self.W_U.detach()
        direction = unembedding[:, self.class_number(label)]
        if contrast == "mean":
            direction = direction - unembedding.mean(dim=1)
        elif contrast is not None:
            direction = direction - unembedding[:, self.class_number(contrast)]
        if not direction.any():
            raise ValueError(
                f"{label!r} against {contrast!r} is zero: nothing writes along it. Contrast it "
                "with another class, or with None."
            )
        return direction

    def class_number(self, label: str | SupportsIndex) -> int:
        """The number of a class given by name or number.

        Raises:
            ValueError: if there is no such class.
        """
        if label in self.cfg.labels:
            return self.cfg.labels.index(label)  # pyright: ignore[reportArgumentType]
        if hasattr(label, "__index__") and 0 <= operator.index(label) < self.cfg.n_classes:  # pyright: ignore[reportArgumentType]
            return operator.index(label)  # pyright: ignore[reportArgumentType]
        raise ValueError(f"There is no class {label!r}; the classes are {list(self.cfg.labels)}.")

    @property
    def W_E(self) -> Float[Tensor, "d_in d_model"]:
        return self.embed.W_E

    @property
    def W_U(self) -> Float[Tensor, "d_model n_classes"]:
        return self.unembed.W_U

    @property
    def W_gate(self) -> Float[Tensor, "n_layers d_model d_mlp"]:
        return self._stacked("W_gate")

    @property
    def W_in(self) -> Float[Tensor, "n_layers d_model d_mlp"]:
        return self._stacked("W_in")

    @property
    def W_out(self) -> Float[Tensor, "n_layers d_mlp d_model"]:
        return self._stacked("W_out")

    @property
    def b_gate(self) -> Float[Tensor, "n_layers d_mlp"]:
        return self._stacked("b_gate")

    @property
    def b_in(self) -> Float[Tensor, "n_layers d_mlp"]:
        return self._stacked("b_in")

    @property
    def b_out(self) -> Float[Tensor, "n_layers d_model"]:
        return self._stacked("b_out")

    def _stacked(self, name: str) -> Tensor:
        if getattr(self.blocks[0].mlp, name) is None:
            raise ValueError(f"This model has no {name}: it was made with bias=False.")
        return torch.stack([getattr(block.mlp, name) for block in self.blocks])
