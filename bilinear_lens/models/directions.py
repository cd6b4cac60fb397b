"""What one contracts an MLP's tensor with: directions of tokens and outputs, and what norms do.

In the coordinates of a model whose norm gains are folded into its weights.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from bilinear_lens.basis import Basis
from bilinear_lens.models import vocabulary
from bilinear_lens.models.vocabulary import Token
from bilinear_lens.tensor import BilinearTensor

Output = Token | tuple[Token, Token] | Tensor


class DirectionsBridge(TransformerBridge):
    """A TransformerLens model with its tensors, and the directions to contract them with."""

    _folded: bool

    @property
    def folded(self) -> bool:
        """Whether norm gains are folded into the weights."""
        return self._folded

    def bilinear_tensor(self, layer: int) -> BilinearTensor:
        """What layer `layer`'s MLP computes, exactly.

        Its input is the activation at `blocks.{layer}.mlp.hook_in`, its output that at
        `blocks.{layer}.mlp.hook_out`, which is `blocks.{layer}.hook_mlp_out` unless the
        architecture norms what an MLP writes (Gemma 2 and 3, OLMo 2): see `output_direction`.

        Raises:
            ValueError: if there is no such layer, or its weights are not finite.
        """
        if not 0 <= layer < self.cfg.n_layers:
            raise ValueError(
                f"layer={layer} must be between 0 and {self.cfg.n_layers - 1}: "
                f"this model has {self.cfg.n_layers}."
            )
        try:
            return self.blocks[layer].mlp.bilinear_tensor()
        except ValueError as error:
            raise ValueError(f"Layer {layer}: {error}") from error

    def output_direction(
        self,
        output: Output,
        contrast: Token | Literal["mean"] | None = "mean",
        *,
        layer: int | None = None,
    ) -> Float[Tensor, " d_model"]:
        """The direction in the residual stream that raises an output, in float32.

        Args:
            output: a token (string or id), a pair of tokens (the first against the second), or a
                direction, which is returned as it is.
            contrast: what a token is measured against: "mean" is the mean over the vocabulary
                (logits are shift-invariant), a token is that token, None is nothing.
            layer: where that layer's MLP output passes a norm on its way to the residual stream
                (Gemma 2 and 3, OLMo 2), take its gain into the direction: it then fits
                `bilinear_tensor(layer)`, up to that norm's positive scale. Elsewhere, no change.

        Raises:
            ValueError: if a token is unknown, a pair or direction is given with a contrast, or a
                direction has another size than `d_model`, is zero or is not finite.
        """
        if isinstance(output, (tuple, Tensor)) and contrast != "mean":
            raise ValueError(
                f"contrast={contrast!r} is what a single token is measured against: a pair or a "
                "direction has its own."
            )
        if isinstance(output, Tensor):
            direction = output.detach().float()
            if direction.shape != (self.cfg.d_model,):
                raise ValueError(
                    f"direction has shape {list(direction.shape)}; it must be "
                    f"[d_model={self.cfg.d_model}]."
                )
            if layer is not None:
                direction = direction * self.output_gain(layer)
        else:
            if isinstance(output, tuple):
                if len(output) != 2:
                    raise ValueError(f"{output!r} must be a pair of tokens.")
                output, contrast = output
            direction = self.output_directions([output], contrast, layer=layer)[0]
        if not direction.isfinite().all() or not direction.any():
            raise ValueError(
                "The output direction is zero (is the contrast the output itself?) or not finite: "
                "nothing writes along it."
            )
        return direction

    @torch.no_grad()
    def output_directions(
        self,
        tokens: Sequence[Token],
        contrast: Token | Literal["mean"] | None = "mean",
        *,
        layer: int | None = None,
    ) -> Float[Tensor, "n d_model"]:
        """`output_direction` of many tokens at once; a token's against itself is zero.

        Raises:
            ValueError: if a token is unknown.
        """
        self._require_folded()
        ids = [self.token_id(token) for token in tokens]
        if contrast == "mean":
            against = self.W_U.mean(dim=1, dtype=torch.float32)
        elif contrast is None:
            against = torch.zeros_like(self.W_U[:, 0], dtype=torch.float32)
        else:
            against = self.W_U[:, self.token_id(contrast)].float()
        # the final norm's gain is ones, unless the architecture cannot be folded
        directions = (self.W_U[:, ids].float() - against[:, None]).mT * self.norm_gain(
            self.ln_final
        )
        return directions if layer is None else directions * self.output_gain(layer)

    def token_basis(self) -> Basis:
        """Each token as an MLP would see it alone: its embedding, normed.

        That is `e / rms(e)`, up to the norm's epsilon, in the folded coordinates of `mlp.hook_in`;
        where an architecture has no norm before its MLPs (OLMo 2), it is `e`.
        """
        return Basis(self.token_directions(range(self.cfg.d_vocab)), self.token_labels)

    @torch.no_grad()
    def token_directions(self, ids: range) -> Float[Tensor, "n d_model"]:
        """The rows of `token_basis` for some ids."""
        self._require_folded()
        self.norm_gain(self.ln_final)  # refuses norms that do more than scale
        embedding = self.embedded(ids)
        if hasattr(self.blocks[0], "ln2"):
            embedding /= (embedding.square().mean(dim=1, keepdim=True) + self.cfg.eps).sqrt()
        return embedding

    @torch.no_grad()
    def embedded(self, ids: range) -> Float[Tensor, "n d_model"]:
        """What some tokens' embeddings write to the residual stream, in float32."""
        factor = getattr(self.cfg, "embedding_multiplier", 1.0)  # Granite
        return factor * self.embed(torch.tensor(ids, device=self.cfg.device)).float()

    @torch.no_grad()
    def head_values(self, layer: int) -> Float[Tensor, "head d_model d_head"]:
        """`W_V` of each head, in float32; heads that share it have it each."""
        values = self.blocks[layer].attn.W_V.float()
        return values.repeat_interleave(self.cfg.n_heads // len(values), dim=0)

    @torch.no_grad()
    def head_weight(self, layer: int, head: int) -> Float[Tensor, "d_model d_model"]:
        """What a head makes of what it attends to, `x @ W_V @ W_O`, in float32."""
        return self.head_values(layer)[head] @ self.blocks[layer].attn.W_O[head].float()

    @cached_property
    def token_labels(self) -> list[str]:
        """A readable string for each token id; `#id` without a tokenizer.

        A token that is a fragment of a character reads as its piece in the vocabulary.
        """
        return vocabulary.labels(self.tokenizer, self.cfg.d_vocab)

    def token_id(self, token: Token) -> int:
        """The id of a token given as a string or an id.

        Raises:
            ValueError: if the id is out of range, or the string is not exactly one token.
        """
        return vocabulary.token_id(token, self.token_labels, self.tokenizer)

    def output_gain(self, layer: int) -> Tensor | float:
        """What a layer's MLP output is multiplied by on its way to the residual stream."""
        block = self.blocks[layer]
        return self.norm_gain(block.ln2_post) if hasattr(block, "ln2_post") else 1.0

    @torch.no_grad()
    def norm_gain(self, norm: nn.Module) -> Float[Tensor, " d_model"]:
        """What a norm multiplies by: its output for an input of equal entries.

        Raises:
            ValueError: if it does more than scale, as LayerNorm does.
        """
        # large ones, beside which its eps is nothing
        equal = torch.full((1, 1, self.cfg.d_model), 1024.0)
        gain = norm(equal.to(self.cfg.device, self.cfg.dtype))[0, 0].float()
        if not gain.any():
            raise ValueError(
                f"The norms of {self.cfg.model_name} subtract the mean (LayerNorm): directions are "
                "read here through norms that only scale (RMSNorm)."
            )
        return gain

    def _require_folded(self) -> None:
        if not self.folded:
            raise ValueError(
                "Token and output directions are read in folded coordinates: load the model with "
                "fold=True."
            )
