"""What a reconstruction of an activation loses: its error, and what the model loses with it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from bilinear_lens.models.activations import Hooks, activations_at
from bilinear_lens.models.checkpoints import write_folder
from bilinear_lens.models.saes import SparseAutoencoder
from bilinear_lens.models.transcoder import BilinearTranscoder
from bilinear_lens.training.card import made_by
from bilinear_lens.training.text import pack

Reconstructs = SparseAutoencoder | BilinearTranscoder
Made = TypeVar("Made", SparseAutoencoder, BilinearTranscoder)


@dataclass(frozen=True, eq=False)
class Trained(Generic[Made]):
    """What a run made, and how well it does on held-out text."""

    made: Made
    reconstruction: "Reconstruction"


@dataclass(frozen=True)
class Reconstruction:
    """How well an activation is reconstructed, on text."""

    nmse: float
    """Squared error over squared norm, as the bilinear papers' authors count it."""
    variance_explained: float
    """1 less the squared error over the variance."""
    loss: float
    """Of the model as it is, in nats per token."""
    patched: float
    """Of the model with the reconstruction in the activation's place."""
    ablated: float
    """With zero in its place."""
    l0: float | None
    """How many latents are active at a token, the mean; None without latents."""
    dead: float | None
    """Share of latents that are never active on this text."""

    @property
    def recovered(self) -> float:
        """1 where patching loses nothing, 0 where it loses as much as zero does."""
        return 1 - (self.patched - self.loss) / (self.ablated - self.loss)

    @property
    def added(self) -> float:
        """What patching adds to the loss, as a share of it."""
        return (self.patched - self.loss) / self.loss

    def to_dict(self) -> dict[str, float | None]:
        """All figures by name."""
        return {**asdict(self), "recovered": self.recovered, "added": self.added}


@torch.no_grad()
def evaluate_reconstruction(
    model: TransformerBridge,
    reconstruction: Reconstructs,
    text: Dataset | Sequence[str],
    *,
    window: int = 256,
    batch_size: int = 16,
) -> Reconstruction:
    """Measure a sparse autoencoder, or a transcoder, on text that it was not trained on.

    Args:
        text: documents, or a dataset of them (`load_text`).
        window: tokens that the model reads at a time, at most its context.

    Raises:
        ValueError: if it is another model's, an activation is not finite, or the text does not fill
            a window.
    """
    reconstruction.check_model(model)
    reconstruction = reconstruction.to(str(model.cfg.device))
    windows = windows_of(model, text, window=window)
    totals = _Totals()
    hook_in, hook_out = reconstruction.hook_in, reconstruction.hook_out
    for batch in tqdm(windows.split(batch_size), desc="Evaluating", leave=False):
        seen = activations_at(model, batch, [hook_in, hook_out])
        x, y = (seen[name].float().flatten(0, 1) for name in (hook_in, hook_out))
        totals.activations(y, reconstruction(x))
        if isinstance(reconstruction, SparseAutoencoder):
            totals.latents(reconstruction.encode(x))
        zero: Hooks = [(hook_out, lambda out, hook: torch.zeros_like(out))]
        totals.losses(
            model(batch, return_type="loss"),
            model.run_with_hooks(batch, fwd_hooks=reconstruction.hooks(), return_type="loss"),
            model.run_with_hooks(batch, fwd_hooks=zero, return_type="loss"),
            n=batch[:, 1:].numel(),
        )
    return totals.result()


def windows_of(
    model: TransformerBridge, text: Dataset | Sequence[str], *, window: int
) -> Int[Tensor, "n window"]:
    """Documents as windows of token ids, on the model's device.

    Raises:
        ValueError: if the model has no tokenizer, or the text does not fill a window.
    """
    packed = packed_for(model, text, window=window)
    return packed[:]["input_ids"].to(model.cfg.device)  # pyright: ignore


def packed_for(model: TransformerBridge, text: Dataset | Sequence[str], *, window: int) -> Dataset:
    """Documents as a dataset of windows.

    Raises:
        ValueError: as `windows_of`.
    """
    if model.tokenizer is None:
        raise ValueError("This model has no tokenizer: load it with tokenizer=...")
    if isinstance(text, str):
        raise ValueError("text must be a list of documents, or a dataset: bl.load_text(file).")
    documents = text if isinstance(text, Dataset) else Dataset.from_dict({"text": list(text)})
    n_ctx = min(window, model.cfg.n_ctx)
    try:
        return pack(documents, model.tokenizer, n_ctx=n_ctx, vocab_size=model.cfg.d_vocab)
    except ValueError as error:
        if "fewer than one window" not in str(error):
            raise
        raise ValueError(
            f"{len(documents)} documents, to train or to measure on, fill fewer than one window of "
            f"{n_ctx} tokens: give more text, or a smaller window (--window)."
        ) from None


def save_trained(
    out: Path,
    model: TransformerBridge,
    made: Mapping[str, Made],
    held_out: Dataset | Sequence[str],
    *,
    introduction: str,
    window: int,
    command: str | None,
) -> dict[str, Trained[Made]]:
    """Measure what a run made and save it: a folder for each, a card and the figures.

    Args:
        made: by the name of its folder.
        introduction: what the card begins with.
        command: the command line, for the card.

    Raises:
        ValueError: if `out` exists or cannot be made.
    """
    trained = {
        name: Trained(each, evaluate_reconstruction(model, each, held_out, window=window))
        for name, each in made.items()
    }
    rows = []
    for name, each in trained.items():
        m = each.reconstruction
        latents = "" if m.l0 is None else f" {m.l0:.1f} | {m.dead:.2%} |"
        rows.append(
            f"| `{name}` | {m.nmse:.4f} | {m.variance_explained:.4f} | {m.recovered:.4f} | "
            f"{m.added:.4f} |{latents}"
        )
    columns = ["normalised MSE", "variance explained", "loss recovered", "loss added"]
    losses = next(iter(trained.values())).reconstruction
    note = ""
    if losses.l0 is not None:
        columns += ["L0", "dead"]
        note = "; dead latents are never active on that text"
    card = f"""# {out.name}

{introduction}

| | {" | ".join(columns)} |
|{"---|" * (1 + len(columns))}
{chr(10).join(rows)}

On held-out text, where the model has {losses.loss:.4f} nats per token. Normalised MSE is that over
the mean square; what is recovered is measured against zero in the activation's place; what is added
is a share of the loss{note}.
{made_by(command)}"""
    with write_folder(out) as folder:
        for name, each in trained.items():
            each.made.save_pretrained(folder / name)
        (folder / "README.md").write_text(card, encoding="utf-8")
        figures = {name: each.reconstruction.to_dict() for name, each in trained.items()}
        (folder / "metrics.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return trained


class _Totals:
    """Sums over batches, in double precision."""

    def __init__(self) -> None:
        self.n, self.n_losses = 0, 0
        self.error, self.square, self.sum = (torch.zeros((), dtype=torch.float64) for _ in range(3))
        self.l0 = self.fired = None
        self.loss = torch.zeros(3, dtype=torch.float64)

    def activations(self, y: Tensor, made: Tensor) -> None:
        y, made = y.double(), made.double()
        self.error = self.error + (y - made).square().sum().cpu()
        self.square = self.square + y.square().sum().cpu()
        self.sum = self.sum + y.sum(0).cpu()
        self.n += len(y)

    def latents(self, latents: Tensor) -> None:
        active = latents != 0
        fired, l0 = active.any(0), active.sum()
        self.fired = fired if self.fired is None else self.fired | fired
        self.l0 = l0 if self.l0 is None else self.l0 + l0

    def losses(self, *losses: Tensor, n: int) -> None:
        self.loss += n * torch.stack(list(losses)).double().cpu()
        self.n_losses += n

    def result(self) -> Reconstruction:
        variance = self.square - self.sum.square().sum() / self.n
        loss, patched, ablated = (self.loss / self.n_losses).tolist()
        return Reconstruction(
            nmse=(self.error / self.square).item(),
            variance_explained=(1 - self.error / variance).item(),
            loss=loss,
            patched=patched,
            ablated=ablated,
            l0=None if self.l0 is None else self.l0.item() / self.n,
            dead=None if self.fired is None else 1 - self.fired.double().mean().item(),
        )
