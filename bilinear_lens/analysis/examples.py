"""What a latent means: the text at which it is most active, for many latents in one pass."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from bilinear_lens.analysis.ablation import text_windows
from bilinear_lens.analysis.streaming import BATCH, stream
from bilinear_lens.models import vocabulary
from bilinear_lens.models.saes import SparseAutoencoder


@dataclass(frozen=True)
class Example:
    """A piece of text at which a latent is active."""

    tokens: list[str]
    activations: list[float]
    """Of the latent, at each token."""
    peak: int
    """The token of the largest."""


@dataclass(frozen=True, eq=False, repr=False)
class LatentExamples:
    """For each of some latents, where it is most active, and how often it is at all."""

    sae: SparseAutoencoder
    latents: list[int]
    values: Float[Tensor, "n_latents n"]
    """The sizes of the largest activations, one a window of text, largest first; 0 where there are
    no more."""
    ids: Int[Tensor, "n_latents n length"]
    """The tokens around each; -1 past an end of the window."""
    activations: Float[Tensor, "n_latents n length"]
    active: Int[Tensor, " n_latents"]
    """At how many tokens each is active."""
    sums: Float[Tensor, " n_latents"]
    """Of its activations."""
    n_tokens: int
    labels: list[str]
    """Of all tokens."""

    def __repr__(self) -> str:
        return (
            f"LatentExamples({len(self.latents)} latents of {self.sae.hook_in}, on "
            f"{self.n_tokens:,} tokens)"
        )

    def shown(self, latents: Sequence[int]) -> dict[str, Any]:
        """What `views.tokens.examples` takes: `tokens.examples(**found.shown([156, 215]))`.

        Raises:
            ValueError: as `of`.
        """
        pieces = [self.of(latent) for latent in latents]
        return {
            "tokens": [[each.tokens for each in some] for some in pieces],
            "activations": [[each.activations for each in some] for some in pieces],
            "labels": [f"latent {latent}" for latent in latents],
            "name": self.sae.hook_in,
        }

    def density(self, latent: int) -> float:
        """The share of tokens at which a latent is active."""
        return self.active[self._row(latent)].item() / self.n_tokens

    def mean(self, latent: int) -> float:
        """The mean activation where a latent is active; 0 if it never is."""
        row = self._row(latent)
        return self.sums[row].item() / max(1, int(self.active[row]))

    def of(self, latent: int) -> list[Example]:
        """Where a latent is most active, the largest activation first.

        Raises:
            ValueError: if it was not collected, or is dead: never active on this text.
        """
        row, examples = self._row(latent), []
        if not self.active[row]:
            raise ValueError(
                f"Latent {latent} of {self.sae.hook_in} is dead: it is active at none of the "
                f"{self.n_tokens:,} tokens of this text."
            )
        for place in (self.values[row] != 0).nonzero().flatten().tolist():
            ids, activations = self.ids[row, place], self.activations[row, place]
            inside = ids >= 0
            shown = activations[inside].tolist()
            examples.append(
                Example(
                    tokens=[self.labels[i] for i in ids[inside].tolist()],
                    activations=shown,
                    peak=int(inside[: len(ids) // 2].sum()),
                )
            )
        return examples

    def words(self, latent: int, n: int) -> list[str]:
        """The tokens at which a latent is most often largest; none if it is dead on this text."""
        if not self.active[self._row(latent)]:
            return []
        counts = Counter(each.tokens[each.peak] for each in self.of(latent))
        return [token for token, _ in counts.most_common(n)]

    def _row(self, latent: int) -> int:
        if latent not in self.latents:
            raise ValueError(f"No examples were collected of latent {latent}.")
        return self.latents.index(latent)


@torch.no_grad()
def latent_examples(
    model: TransformerBridge,
    sae: SparseAutoencoder,
    text: Sequence[str],
    *,
    latents: Sequence[int] | None = None,
    n: int = 10,
    around: int = 12,
    window: int = 128,
    batch: int = BATCH,
) -> LatentExamples:
    """Collect the text at which latents are most active, in one pass.

    Of each latent the n windows of text of largest activation are kept, with the tokens around
    that; memory is for those, and for the latents' activations at a batch of tokens.

    Args:
        text: documents.
        latents: which; all otherwise.
        n: examples of each.
        around: tokens shown on both sides of the largest activation.
        window: tokens that the model reads at a time, at most its context.
        batch: tokens that are run at once.

    Raises:
        ValueError: if the SAE is another model's, a latent or a number is out of range, the text
            does not fill a window, or an activation is not finite.
    """
    sae.check_model(model)
    chosen = list(range(sae.n_latents)) if latents is None else list(latents)
    sae.check_latents(chosen)
    if n < 1 or around < 0:
        raise ValueError(f"n={n} must be at least 1, and around={around} at least 0.")
    windows = text_windows(model, text, n_tokens=min(window, model.cfg.n_ctx))
    length = 2 * around + 1
    best = torch.zeros(len(chosen), n)
    ids = torch.full((len(chosen), n, length), -1)
    kept = torch.zeros(len(chosen), n, length)
    active, sums = torch.zeros(len(chosen), dtype=torch.long), torch.zeros(len(chosen))
    start = 0
    for read in stream(model, windows, [sae.hook_in], title="Collecting", batch=batch):
        acts = sae.encode(read[sae.hook_in])[..., chosen].cpu()  # [windows, pos, latents]
        tokens = windows[start : start + len(acts)].cpu()
        start += len(acts)
        active += (acts != 0).sum((0, 1))
        sums += acts.sum((0, 1))
        peaks, at = acts.abs().max(1)  # of each window
        peaks, at = peaks.mT, at.mT
        top = peaks.topk(min(n, len(acts)), dim=1)
        larger = top.values > best[:, -1:]
        latent, place = larger.nonzero().unbind(1)
        which = top.indices[latent, place]
        spread = at[latent, which][:, None] + torch.arange(-around, around + 1)
        inside = (spread >= 0) & (spread < acts.shape[1])
        spread = spread.clamp(0, acts.shape[1] - 1)
        new_ids = torch.full((len(chosen), top.values.shape[1], length), -1)
        new_ids[latent, place] = tokens[which[:, None], spread].masked_fill(~inside, -1)
        new_acts = torch.zeros(new_ids.shape)
        new_acts[latent, place] = acts[which[:, None], spread, latent[:, None]] * inside
        both = torch.cat([best, top.values.where(larger, -1.0)], dim=1)
        best, order = both.topk(n, dim=1)
        order = order[..., None].expand(-1, -1, length)
        ids = torch.cat([ids, new_ids], dim=1).gather(1, order)
        kept = torch.cat([kept, new_acts], dim=1).gather(1, order)
    return LatentExamples(
        sae=sae,
        latents=chosen,
        values=best,
        ids=ids,
        activations=kept,
        active=active,
        sums=sums,
        n_tokens=windows.numel(),
        labels=token_labels(model),
    )


def token_labels(model: TransformerBridge) -> list[str]:
    """A readable string for each token of any model."""
    return vocabulary.labels(model.tokenizer, model.cfg.d_vocab)
