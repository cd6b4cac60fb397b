"""Bilinear layers trained to write what the MLPs of another model write, on the Trainer."""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments, set_seed

from bilinear_lens.models.activations import activations_at
from bilinear_lens.models.checkpoints import check_new
from bilinear_lens.models.saes import model_digest, width_at
from bilinear_lens.models.transcoder import BilinearTranscoder
from bilinear_lens.training.reconstruction import Trained, packed_for, save_trained
from bilinear_lens.training.runs import train


@dataclass(frozen=True)
class TranscoderRecipe:
    """How bilinear transcoders are trained.

    Raises:
        ValueError: if an option is out of range.
    """

    rank: int | None = None
    """Products that a layer computes; as wide as the model's MLPs otherwise."""
    skip: bool = True
    """Add a linear map of the input."""
    epochs: int = 1
    """Passes over the text."""
    batch_size: int = 16
    """Windows a step."""
    window: int = 256
    """Tokens that the model reads at a time, at most its context."""
    learning_rate: float = 3e-3
    """AdamW's highest; it falls to 0 by a cosine."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be 1 or more.")
        if self.window < 2:
            raise ValueError(f"window={self.window} must be 2 tokens or more.")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0 and finite.")


def train_transcoders(
    model: TransformerBridge,
    text: Dataset | Sequence[str],
    *,
    out: str | Path,
    held_out: Dataset | Sequence[str],
    layers: Sequence[int] | None = None,
    recipe: TranscoderRecipe | None = None,
    resume: bool = False,
    command: str | None = None,
    data: str | None = None,
) -> dict[str, Trained[BilinearTranscoder]]:
    """Train a bilinear layer to write what each MLP of a model writes, all at once, and save them.

    The layers read what the MLPs read, `blocks.{l}.mlp.hook_in`, so that the tensor lens can be put
    on models that are not bilinear (bilinear transcoders). `out` gets a folder `blocks.{l}.mlp` for
    each, and a card with what they lose on held-out text. It appears whole; until then
    `<out>.checkpoints` holds what a killed run goes on from.

    Args:
        model: any TransformerBridge, such as `load_bridge("gpt2")`.
        text: documents, or a dataset of them (`load_text`).
        layers: which; all otherwise.
        resume: go on from the last whole checkpoint, which must be of the same run.
        command: the command line, for the card.
        data: name, origin and licence of the text, for the card.

    Returns:
        What came of each MLP.

    Raises:
        ValueError: before any training, if a layer is out of range, the text is too short, `out`
            exists or checkpoints of another run are in the way; in training, if an activation or
            the loss is not finite.
    """
    recipe, out = recipe or TranscoderRecipe(), Path(out)
    check_new(out)
    chosen = list(range(model.cfg.n_layers)) if layers is None else sorted(set(layers))
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < model.cfg.n_layers:
        raise ValueError(f"layers={layers} must be between 0 and {model.cfg.n_layers - 1}.")
    windows = packed_for(model, text, window=recipe.window)
    packed_for(model, held_out, window=recipe.window)  # refuses what is too short, before training
    digests = {layer: model_digest(model, f"blocks.{layer}.mlp.hook_in") for layer in chosen}
    set_seed(recipe.seed)
    first = windows[: recipe.batch_size]["input_ids"]
    layers_of = _Transcoders(model, chosen, recipe, first)  # pyright: ignore[reportArgumentType]
    checkpoints = Path(f"{out}.checkpoints")
    steps = recipe.epochs * math.ceil(len(windows) / recipe.batch_size)
    args = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=recipe.batch_size,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.0,
        adam_beta2=0.99,
        max_grad_norm=1.0,
        use_cpu=torch.device(str(model.cfg.device)).type == "cpu",
        seed=recipe.seed,
        data_seed=recipe.seed,
        save_steps=max(1, steps // 10),
        save_total_limit=2,
        logging_steps=max(1, steps // 10),
        report_to="none",
    )
    train(
        layers_of,
        windows,
        args=args,
        note={"recipe": asdict(recipe), "layers": chosen, "model": digests[chosen[0]]},
        resume=resume,
    )
    with_skip = ", with a linear skip" if recipe.skip else ""
    n_tokens = recipe.epochs * len(windows) * min(recipe.window, model.cfg.n_ctx)
    trained = save_trained(
        out,
        model,
        layers_of.transcoders(digests),
        held_out,
        introduction=f"Bilinear layers of rank {layers_of.rank}{with_skip}, in the places of MLPs "
        f"of `{model.cfg.model_name}`: trained on {n_tokens:,} "
        f"tokens{f' of {data}' if data else ''}.",
        window=recipe.window,
        command=command,
    )
    shutil.rmtree(checkpoints)
    return trained


class _Transcoders(PreTrainedModel):
    """The layers that are trained, as the Trainer takes a model; the model they read is none of
    their parameters."""

    config_class = PretrainedConfig

    def __init__(
        self,
        model: TransformerBridge,
        layers: Sequence[int],
        recipe: TranscoderRecipe,
        first: Tensor,
    ) -> None:
        super().__init__(PretrainedConfig())
        self.layers, self.rank = list(layers), recipe.rank or int(model.cfg.d_mlp or 0)
        self.reads = [f"blocks.{layer}.mlp.hook_in" for layer in layers]
        self.writes = [f"blocks.{layer}.hook_mlp_out" for layer in layers]
        self._read = (lambda tokens: activations_at(model, tokens, [*self.reads, *self.writes]),)
        d_in, d_out = width_at(model, self.reads[0]), width_at(model, self.writes[0])
        shape = (len(layers), self.rank)
        self.left = nn.Parameter(torch.randn(*shape, d_in) / d_in**0.5)
        self.right = nn.Parameter(torch.randn(*shape, d_in) / d_in**0.5)
        self.down = nn.Parameter(torch.zeros(len(layers), d_out, self.rank))
        self.bias = nn.Parameter(torch.zeros(len(layers), d_out))
        self.skip = nn.Parameter(torch.zeros(len(layers), d_out, d_in)) if recipe.skip else None
        x, y = self._activations(first.to(model.cfg.device))
        # so that one learning rate fits layers that read and write in any size
        self.register_buffer("scale_in", x.square().mean((1, 2)).sqrt())
        self.register_buffer(
            "scale_out", (y - y.mean(1, keepdim=True)).square().mean((1, 2)).sqrt()
        )
        self.to(torch.device(str(model.cfg.device)))  # pyright: ignore[reportArgumentType]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: they are."""

    @torch.no_grad()
    def _activations(
        self, tokens: Tensor
    ) -> tuple[Float[Tensor, "layer token d_in"], Float[Tensor, "layer token d_out"]]:
        seen = self._read[0](tokens)
        x, y = (
            torch.stack([seen[name].float().flatten(0, 1) for name in names])
            for names in (self.reads, self.writes)
        )
        return x, y

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        x, y = self._activations(input_ids)
        x, y = x / self.scale_in[:, None, None], y / self.scale_out[:, None, None]  # pyright: ignore
        product = (x @ self.left.mT) * (x @ self.right.mT)
        made = product @ self.down.mT + self.bias[:, None]
        if self.skip is not None:
            made = made + x @ self.skip.mT
        return {"loss": (made - y).square().mean()}

    @torch.no_grad()
    def transcoders(self, digests: Mapping[int, str]) -> dict[str, BilinearTranscoder]:
        """What was trained, in the model's own sizes."""
        made = {}
        for row, layer in enumerate(self.layers):
            size_in, size_out = self.scale_in[row], self.scale_out[row]  # pyright: ignore
            made[f"blocks.{layer}.mlp"] = BilinearTranscoder(
                left=self.left[row] / size_in,
                right=self.right[row] / size_in,
                down=self.down[row] * size_out,
                bias=self.bias[row] * size_out,
                skip=None if self.skip is None else self.skip[row] * size_out / size_in,
                hook_in=self.reads[row],
                hook_out=self.writes[row],
                model_digest=digests[layer],
            )
        return made
