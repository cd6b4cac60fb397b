"""SparseAutoencoder: a trained dictionary of an activation, frozen, whatever tool made it.

- `encoder_basis` reads latents from an activation, `decoder_basis` is what they stand for
- a transcoder is one whose output is another activation than its input
"""

import hashlib
import re
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from bilinear_lens.basis import Basis
from bilinear_lens.models import sae_layouts
from bilinear_lens.models.activations import Hooks, activations_at, replacing
from bilinear_lens.models.checkpoints import subfolder_of, write_folder

Activation = Literal["topk", "signed_topk", "relu", "jumprelu"]
"""Of latents; `signed_topk` keeps the largest values as they are, `topk` no negative ones."""


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """Latents `f` of an activation `x`, and the activation made of them again.

    `f = activation(encoder ((x / scale) - decoder_bias) + encoder_bias)`, without `decoder_bias` if
    not `centred`; `y = scale * (decoder^T f + decoder_bias) + skip x`.

    Raises:
        ValueError: if shapes do not fit each other, a weight is not finite, `k` is out of range, or
            an activation lacks what it needs.
    """

    encoder: Float[Tensor, "n_latents d_in"]
    decoder: Float[Tensor, "n_latents d_out"]
    encoder_bias: Float[Tensor, " n_latents"]
    decoder_bias: Float[Tensor, " d_out"]
    hook_in: str
    """The hook point that it reads."""
    hook_out: str
    """The one that it reconstructs; a transcoder's is another one."""
    activation: Activation = "topk"
    k: int | None = None
    """Of `topk` and `signed_topk`: how many latents are active at most."""
    threshold: Float[Tensor, " n_latents"] | None = None
    """Of `jumprelu`: what a latent must exceed to be active."""
    centred: bool = True
    scale: float = 1.0
    skip: Float[Tensor, "d_out d_in"] | None = None
    model_digest: str | None = None
    """Of the model that it was trained on, as `model_digest` has it; None if not known."""

    def __post_init__(self) -> None:
        n, d_in = self.encoder.shape
        d_out = self.decoder.shape[1]
        shapes = {
            "decoder": (n, d_out),
            "encoder_bias": (n,),
            "decoder_bias": (d_out,),
            "threshold": (n,),
            "skip": (d_out, d_in),
        }
        for name in ("encoder", *shapes):
            weight = getattr(self, name)
            if weight is None:
                continue
            if weight.shape != shapes.get(name, weight.shape):
                raise ValueError(
                    f"{name} has shape {list(weight.shape)}; with {n} latents of an activation of "
                    f"width {d_in} it must be {list(shapes[name])}."
                )
            if not weight.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinite weights: reload or repair them.")
            object.__setattr__(self, name, weight.detach().float())
        if self.centred and d_in != d_out:
            raise ValueError(
                f"An activation of width {d_in} cannot be centred by a bias of width {d_out}."
            )
        if self.activation.endswith("topk") and not (self.k and 1 <= self.k <= n):
            raise ValueError(f"k={self.k} must be between 1 and the {n} latents there are.")
        if self.activation == "jumprelu" and self.threshold is None:
            raise ValueError("jumprelu needs the threshold of each latent.")
        if not 0 < self.scale < float("inf"):
            raise ValueError(f"scale={self.scale} must be above 0 and finite.")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        subfolder: str | None = None,
        *,
        hook: str | None = None,
        revision: str | None = None,
    ) -> "SparseAutoencoder":
        """Load one from a folder, the Hub or the package, in any of three layouts.

        - sparsify (EleutherAI): `cfg.json`, `sae.safetensors`, in a folder named by hook point
        - SAELens: `cfg.json`, `sae_weights.safetensors`
        - that of the bilinear papers' authors, `{layer}-{point}-x{expansion}-k{k}`: `config.json`,
          `model.safetensors`

        SAEs of activations that pass a norm's gain (a raw model's MLP inputs) fit a model that is
        loaded with `fold=False`; the authors' norms have no gain.

        Args:
            name_or_path: a folder, a Hub id or `tinystories-4l-saes`, which ships with the package.
            subfolder: such as `blocks.2.mlp.hook_in`, where there are several.
            hook: TransformerLens's name of the hook point, where the files do not tell.
            revision: branch, tag or commit on the Hub.

        Raises:
            KeyError: if the name is not known.
            ValueError: if the layout is not known (lists what is), what it asks for is not
                supported here, or its hook point cannot be told.
        """
        folder = subfolder_of(name_or_path, subfolder, revision)
        return cls(**sae_layouts.read(folder, hook=hook))

    def save_pretrained(self, path: str | Path, *, layout: sae_layouts.Layout = "sparsify") -> None:
        """Save as a folder, which appears whole or not at all.

        Raises:
            ValueError: if `path` exists, or the layout has no place for what this one does.
        """
        writer = sae_layouts.writer(self, layout)
        with write_folder(path) as folder:
            writer(folder)

    @property
    def n_latents(self) -> int:
        return self.encoder.shape[0]

    @property
    def d_in(self) -> int:
        return self.encoder.shape[1]

    @property
    def d_out(self) -> int:
        return self.decoder.shape[1]

    @property
    def is_transcoder(self) -> bool:
        return self.hook_in != self.hook_out

    def __repr__(self) -> str:
        at = f"{self.hook_in} -> {self.hook_out}" if self.is_transcoder else self.hook_in
        k = f", k={self.k}" if self.k else ""
        return f"SparseAutoencoder({at}: {self.n_latents} latents, {self.activation}{k})"

    @cached_property
    def encoder_basis(self) -> Basis:
        """For each latent, what its preactivation is the projection on, but for a constant."""
        return Basis(self.encoder / self.scale, self.labels)

    @cached_property
    def decoder_basis(self) -> Basis:
        """What an activation of 1 of each latent writes."""
        return Basis(self.decoder * self.scale, self.labels)

    @property
    def offset(self) -> Float[Tensor, " d_out"]:
        """What is written without any latent."""
        return self.decoder_bias * self.scale

    @cached_property
    def labels(self) -> list[str]:
        return [f"latent {i}" for i in range(self.n_latents)]

    @cached_property
    def constants(self) -> Float[Tensor, " n_latents"]:
        """Preactivations of an activation that is zero."""
        if not self.centred:
            return self.encoder_bias
        return self.encoder_bias - self.encoder @ self.decoder_bias

    def preactivations(
        self, x: Float[Tensor, "*batch {self.d_in}"]
    ) -> Float[Tensor, "*batch {self.n_latents}"]:
        """Of all latents, before any is chosen.

        Raises:
            ValueError: if `x` has another width, or is not finite.
        """
        if x.shape[-1] != self.d_in:
            raise ValueError(
                f"The activation has width {x.shape[-1]}; this SAE reads {self.d_in} at "
                f"{self.hook_in}: give it the model and hook point that it was trained on."
            )
        x = x.to(self.encoder) / self.scale
        if not x.isfinite().all():
            raise ValueError(f"The activation at {self.hook_in} holds NaN or infinite entries.")
        if self.centred:
            x = x - self.decoder_bias
        return x @ self.encoder.mT + self.encoder_bias

    def encode(
        self, x: Float[Tensor, "*batch {self.d_in}"]
    ) -> Float[Tensor, "*batch {self.n_latents}"]:
        """The activations of all latents, most of them 0.

        Raises:
            ValueError: as `preactivations`.
        """
        before = self.preactivations(x)
        match self.activation:
            case "jumprelu":
                assert self.threshold is not None
                return before.relu() * (before > self.threshold)
            case "relu":
                return before.relu()
            case _:
                values, latents = before.topk(self.k or 1, dim=-1)
                values = values if self.activation == "signed_topk" else values.relu()
                return torch.zeros_like(before).scatter_(-1, latents, values)

    def decode(
        self, latents: Float[Tensor, "*batch {self.n_latents}"]
    ) -> Float[Tensor, "*batch {self.d_out}"]:
        """What latents write, without the `skip` of a transcoder, which reads `x`."""
        return (latents @ self.decoder + self.decoder_bias) * self.scale

    def __call__(
        self, x: Float[Tensor, "*batch {self.d_in}"]
    ) -> Float[Tensor, "*batch {self.d_out}"]:
        """The reconstruction of an activation."""
        out = self.decode(self.encode(x))
        return out if self.skip is None else out + x.to(self.skip) @ self.skip.mT

    def to(self, device: str | torch.device) -> "SparseAutoencoder":
        """The same on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {n: v.to(device) for n, v in moved.items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def hooks(self) -> Hooks:
        """For `run_with_hooks`: the model goes on with the reconstruction at `hook_out`."""
        return replacing(self, self.hook_in, self.hook_out)

    def check_latents(self, latents: list[int]) -> None:
        """Refuse numbers that are none of its latents.

        Raises:
            ValueError: if there are none, or one is out of range.
        """
        wrong = [each for each in latents if not 0 <= each < self.n_latents]
        if wrong or not latents:
            raise ValueError(
                f"Latents {wrong or latents} must be numbers between 0 and {self.n_latents - 1}."
            )

    def check_model(self, model: TransformerBridge) -> None:
        """Refuse a model that this was not made for.

        Raises:
            ValueError: if the model lacks a hook point, an activation there has another width, or
                it is known to be another model.
        """
        for hook, width in ((self.hook_in, self.d_in), (self.hook_out, self.d_out)):
            check_width(model, hook, width)
        check_digest(model, self.hook_in, self.model_digest)


def check_width(model: TransformerBridge, hook: str, width: int) -> None:
    """Refuse a model without a hook point, or with an activation of another width there.

    Raises:
        ValueError: naming both.
    """
    actual = width_at(model, hook)
    if actual != width:
        raise ValueError(
            f"{hook} of {model.cfg.model_name} has width {actual}; this was trained on a width of "
            f"{width}: it is another model's, or of another hook point."
        )


def check_digest(model: TransformerBridge, hook: str, digest: str | None) -> None:
    """Refuse a model that is known to be another one, or to be folded otherwise.

    Raises:
        ValueError: if `digest` is neither None nor the model's.
    """
    if digest in (None, model_digest(model, hook)):
        return
    if digest is not None and digest.partition(" ")[0] == embedding_digest(model):
        raise ValueError(
            f"This was trained on {hook} of a model that was loaded with another fold=, which "
            "decides whether a norm's gain is in that activation: load the model as it was."
        )
    raise ValueError(
        f"This was trained on another model than {model.cfg.model_name}: their embeddings "
        "differ. If it is meant for both, dataclasses.replace(..., model_digest=None) says so."
    )


def model_digest(model: TransformerBridge, hook: str) -> str:
    """`embedding_digest`, and, of a hook point behind a norm, whether its gain is folded."""
    behind = re.search(r"mlp\.hook_in|attn\.hook_in|ln\d\.hook_(out|normalized)", hook)
    raw = behind and not model._weights_processed
    return embedding_digest(model) + " raw" * bool(raw)


@torch.no_grad()
def width_at(model: TransformerBridge, hook: str) -> int:
    """The width of the activation at a hook point.

    Raises:
        ValueError: if there is none (the near ones are listed), or nothing passes it.
    """
    if hook not in model.hook_dict:
        near = get_close_matches(hook, model.hook_dict, n=4, cutoff=0.6)
        raise ValueError(f"{model.cfg.model_name} has no hook point {hook!r}; near ones: {near}.")
    probe = torch.zeros(1, 2, dtype=torch.long, device=model.cfg.device)
    seen = activations_at(model, probe, [hook])
    if hook not in seen or seen[hook].ndim != 3:
        raise ValueError(
            f"No vector for each token passes {hook!r} of {model.cfg.model_name}: choose a hook "
            "point such as 'blocks.0.mlp.hook_in'."
        )
    return seen[hook].shape[-1]


@torch.no_grad()
def embedding_digest(model: TransformerBridge) -> str:
    """What tells models apart, whatever their dtype and whether they are folded: a SHA-256 of the
    signs of the embedding, which no rounding changes."""
    return hashlib.sha256(model.W_E.detach().cpu().signbit().numpy().data).hexdigest()
