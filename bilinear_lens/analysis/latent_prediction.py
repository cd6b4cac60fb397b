"""Do a few eigenvectors, from weights alone, predict when a latent behind an MLP is active?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from bilinear_lens.analysis.ablation import text_windows
from bilinear_lens.analysis.features import check_unnormed, latent_directions, written_layer
from bilinear_lens.analysis.streaming import stream
from bilinear_lens.models.saes import SparseAutoencoder
from bilinear_lens.models.transformer import HookedBilinearTransformer
from bilinear_lens.spectrum import Spectrum, coordinates
from bilinear_lens.tensor import BilinearTensor

TAIL = 0.1
"""Of the tokens at which a latent is active, the share with the largest activations."""
KS = (1, 2, 8, 32, 64)
LATENTS = 256
"""At most so many are taken by default."""


@torch.no_grad()
def latent_prediction(
    model: HookedBilinearTransformer,
    outputs: SparseAutoencoder,
    text: Sequence[str],
    *,
    latents: Sequence[int] | None = None,
    ks: Sequence[int] | None = None,
    least_active: int = 100,
    window: int = 128,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """How well the top k eigenvectors of a latent's interaction predict its activation on text.

    The prediction of a latent with direction `u`, the encoder's row, is `sum_i value_i (vector_i .
    x)^2 + constant` over the k eigenvalues of largest magnitude of the interaction, with `x` what
    the MLP reads, after its norm: with all of them it is the latent's preactivation exactly. It is
    compared with the activation that the SAE gives for what the MLP writes (arXiv 2410.08417,
    section 5.2), at the same tokens for every k and control:

    - tokens "active": where the latent is active; "tail": the tenth of those with the largest
      activations; "all": every token
    - predictor "eigenvectors"; "shuffled": the eigenvectors of another latent; "random": k random
      orthonormal directions, with the best prediction of that form that the interaction allows

    Args:
        outputs: of `blocks.{layer}.mlp.hook_out` or `hook_mlp_out`.
        text: documents that neither was trained on.
        latents: which; otherwise 256 drawn at random of those that are active often enough.
        ks: numbers of eigenvectors; by default 1, 2, 8, 32 and 64, if there are as many.
        least_active: leave out latents that are active at fewer tokens.
        window: tokens that the model reads at a time, at most its context.
        n_bootstrap: resamples, of windows of text and of latents, for the 95 % intervals.
        seed: of the latents drawn, the controls and the resamples.

    Returns:
        A row for each `tokens`, `predictor` and `k`: `correlation`, the mean over latents, and
        `r2`, the median over latents of 1 less squared error over variance (of the prediction as it
        is: it falls below 0 where a constant would do better); each with `_low` and `_high`,
        percentiles of the resamples; and `n_latents`.

    Raises:
        ValueError: if the SAE is another model's or of another place, a k or a latent is out of
            range, the text is too short, or no latent is active often enough.
    """
    layer = written_layer(outputs)
    directions = latent_directions(model, outputs, layer=layer, side="encoder")
    check_unnormed(model, outputs)
    tensor = model.bilinear_tensor(layer)
    most = min(2 * tensor.rank, tensor.left.shape[1])
    ks = [k for k in KS if k <= most] if ks is None else sorted(set(ks))
    if not ks or ks[0] < 1 or ks[-1] > most:
        raise ValueError(f"ks={ks} must lie between 1 and the {most} eigenvectors there are.")
    if n_bootstrap < 1 or window < 1:
        raise ValueError(f"n_bootstrap={n_bootstrap} and window={window} must be at least 1.")
    windows = text_windows(model, text, n_tokens=min(window, model.cfg.n_ctx))
    x, found = _read(model, outputs, windows, f"blocks.{layer}.mlp.hook_in")
    chosen = _chosen(outputs, found, latents, least_active, seed)
    acts = found.dense(chosen, len(x))
    seen = coordinates(x.to(tensor.left), tensor.d_in, tensor.affine).cpu()
    rng = np.random.default_rng(seed)
    other = _others(chosen, outputs.n_latents, rng)
    spectra, of_others = (
        tensor.eigh(directions[rows].to(tensor.left), ks[-1]) for rows in (chosen, other)
    )
    generator = torch.Generator().manual_seed(seed)
    size = windows.shape[1]
    weights = rng.multinomial(
        len(windows), np.full(len(windows), 1 / len(windows)), size=n_bootstrap
    )
    weights = torch.from_numpy(np.concatenate([np.ones((1, len(windows))), weights]))
    measured: dict[tuple[str, str], list[Tensor]] = {}
    for row, latent in enumerate(tqdm(chosen, desc="Predicting", leave=False)):
        constant = outputs.constants[latent].cpu()
        ours = _by_eigenvectors(spectra, row, seen, ks) + constant
        theirs = _by_eigenvectors(of_others, row, seen, ks) + outputs.constants[other[row]].cpu()
        drawn = _by_random(tensor, directions[latent], seen, ks, generator) + constant
        actual = acts[:, row]
        for tokens, mask in _masks(actual).items():
            for name, predicted in (
                ("eigenvectors", ours),
                ("shuffled", theirs),
                ("random", drawn),
            ):
                sums = _sums(predicted, actual, mask, size)
                measured.setdefault((tokens, name), []).append(_scores(weights, sums))
    rows = []
    draws = rng.integers(len(chosen), size=(n_bootstrap, len(chosen)))
    for (tokens, name), scores in measured.items():
        table = _summary(torch.stack(scores).numpy(), draws)
        for k, row in zip(ks, table, strict=True):
            rows.append({"tokens": tokens, "predictor": name, "k": k, **row})
    return pd.DataFrame(rows).assign(n_latents=len(chosen))


@dataclass(frozen=True, eq=False)
class _Active:
    """Activations that are not 0."""

    token: Int[Tensor, " n"]
    latent: Int[Tensor, " n"]
    value: Float[Tensor, " n"]

    def dense(self, latents: Sequence[int], n_tokens: int) -> Float[Tensor, "n_tokens n_latents"]:
        acts = torch.zeros(n_tokens, len(latents))
        for column, latent in enumerate(latents):
            at = self.latent == latent
            acts[self.token[at], column] = self.value[at]
        return acts


def _read(
    model: HookedBilinearTransformer,
    outputs: SparseAutoencoder,
    windows: Int[Tensor, "n n_tokens"],
    hook_in: str,
) -> tuple[Float[Tensor, "tokens d_in"], _Active]:
    """What the MLP reads at each token, and which latents are then active."""
    read, parts, n = [], [], 0
    for batch in stream(model, windows, [hook_in, outputs.hook_out], title="Reading"):
        acts = outputs.encode(batch[outputs.hook_out]).flatten(0, 1).cpu()
        token, latent = acts.nonzero().unbind(1)
        parts.append((token + n, latent, acts[token, latent]))
        read.append(batch[hook_in].flatten(0, 1).cpu())
        n += len(acts)
    return torch.cat(read), _Active(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _chosen(
    outputs: SparseAutoencoder,
    found: _Active,
    latents: Sequence[int] | None,
    least_active: int,
    seed: int,
) -> list[int]:
    counts = torch.bincount(found.latent, minlength=outputs.n_latents)
    if latents is not None:
        outputs.check_latents(list(latents))
        if rare := [i for i in latents if counts[i] < max(2, least_active)]:
            raise ValueError(
                f"Latents {rare} are active at {counts[rare].tolist()} tokens of this text, fewer "
                f"than {max(2, least_active)}: give more text, or a smaller least_active."
            )
        return list(latents)
    often = (counts >= max(2, least_active)).nonzero().flatten()
    if not len(often):
        raise ValueError(
            f"No latent of {outputs.hook_out} is active at {least_active} tokens of this text: "
            "give more text, or a smaller least_active."
        )
    order = torch.randperm(len(often), generator=torch.Generator().manual_seed(seed))[:LATENTS]
    return sorted(often[order].tolist())


def _others(chosen: Sequence[int], n_latents: int, rng: np.random.Generator) -> list[int]:
    """For each latent another one of the SAE, if it has one."""
    steps = rng.integers(1, max(2, n_latents), size=len(chosen))
    return [int(i) for i in (np.array(chosen) + steps) % n_latents]


def _by_eigenvectors(
    spectra: Spectrum, row: int, seen: Float[Tensor, "tokens coords"], ks: Sequence[int]
) -> Float[Tensor, "tokens ks"]:
    parts = spectra.values[row].cpu() * (seen @ spectra.vectors[row].cpu()).square()
    return parts.cumsum(1)[:, [k - 1 for k in ks]]


def _by_random(
    tensor: BilinearTensor,
    direction: Tensor,
    seen: Float[Tensor, "tokens coords"],
    ks: Sequence[int],
    generator: torch.Generator,
) -> Float[Tensor, "tokens ks"]:
    """With the interaction's part within the span of the first k of some random directions."""
    basis = torch.linalg.qr(torch.randn(seen.shape[1], ks[-1], generator=generator)).Q.to(seen)
    inside = basis.mT @ tensor.interaction(direction).cpu() @ basis
    along = seen @ basis
    return torch.stack([((along[:, :k] @ inside[:k, :k]) * along[:, :k]).sum(1) for k in ks], dim=1)


def _masks(actual: Float[Tensor, " tokens"]) -> dict[str, Bool[Tensor, " tokens"]]:
    active = actual != 0
    least = actual[active].quantile(1 - TAIL)
    return {
        "active": active,
        "all": torch.ones_like(active),
        "tail": active & (actual >= least),
    }


def _sums(
    predicted: Float[Tensor, "tokens ks"],
    actual: Float[Tensor, " tokens"],
    mask: Bool[Tensor, " tokens"],
    size: int,
) -> Float[Tensor, "windows ks sums"]:
    """What correlations need, for each window of text: n, p, a, p^2, a^2, p a."""
    at = mask.nonzero().flatten()
    p, a = predicted[at].double(), actual[at, None].double().expand(-1, predicted.shape[1])
    each = torch.stack([torch.ones_like(p), p, a, p * p, a * a, p * a], dim=-1)
    sums = each.new_zeros(len(actual) // size, *each.shape[1:])
    return sums.index_add_(0, at // size, each)


def _scores(
    weights: Float[Tensor, "draws windows"], sums: Float[Tensor, "windows ks six"]
) -> Float[Tensor, "draws ks two"]:
    """Correlation and R^2 for each resample of windows; of the first, all stand once."""
    n, p, a, pp, aa, pa = torch.tensordot(weights, sums, dims=1).unbind(-1)
    variance = aa - a * a / n
    variance = torch.where(variance > 1e-9 * aa, variance, torch.nan)  # rounding is no variance
    correlation = (pa - p * a / n) / ((pp - p * p / n) * variance).clamp(min=0).sqrt()
    return torch.stack([correlation, 1 - (aa - 2 * pa + pp) / variance], dim=-1)


def _summary(scores: np.ndarray, draws: np.ndarray) -> list[dict[str, float]]:
    """Over latents, for each k: the mean correlation and the median R^2, with 95 % intervals."""
    scores = np.where(np.isfinite(scores), scores, np.nan)
    correlation, r2 = np.nanmean(scores[:, 0, :, 0], 0), np.nanmedian(scores[:, 0, :, 1], 0)
    resampled = [
        scores[draw, 1 + number] for number, draw in enumerate(draws)
    ]  # other windows and other latents, for each
    correlations = np.array([np.nanmean(each[..., 0], 0) for each in resampled])
    r2s = np.array([np.nanmedian(each[..., 1], 0) for each in resampled])
    bounds = [np.quantile(each, [0.025, 0.975], axis=0) for each in (correlations, r2s)]
    return [
        {
            "correlation": correlation[i],
            "correlation_low": bounds[0][0, i],
            "correlation_high": bounds[0][1, i],
            "r2": r2[i],
            "r2_low": bounds[1][0, i],
            "r2_high": bounds[1][1, i],
        }
        for i in range(len(correlation))
    ]
