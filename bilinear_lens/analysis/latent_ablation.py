"""Is a circuit of latents true? Take latents before an MLP out of the running model and measure."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bilinear_lens.analysis.ablation import text_windows
from bilinear_lens.analysis.features import FeatureInteractions, check_unnormed, latent_basis
from bilinear_lens.analysis.streaming import stream
from bilinear_lens.models.activations import Hooks
from bilinear_lens.models.saes import SparseAutoencoder
from bilinear_lens.models.transformer import HookedBilinearTransformer


def ablate_latents(sae: SparseAutoencoder, latents: Sequence[int]) -> Hooks:
    """Hooks that take what some latents write out of the activation; all else stays, also what the
    SAE does not reconstruct.

    Raises:
        ValueError: if a latent is out of range, or it is a transcoder.
    """
    sae.check_latents(list(latents))
    if sae.is_transcoder:
        raise ValueError("A transcoder's latents are not part of what it reads: give an SAE.")
    written = sae.decoder_basis.directions[list(latents)]

    def ablate(x: Tensor, hook: object) -> Tensor:
        acts = sae.encode(x)[..., list(latents)]
        return (x - (acts @ written).to(x)).to(x)

    return [(sae.hook_in, ablate)]


@torch.no_grad()
def latent_effects(
    model: HookedBilinearTransformer,
    features: FeatureInteractions,
    text: Sequence[str],
    groups: Mapping[str, Sequence[int]] | None = None,
    *,
    window: int = 128,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """What an output loses on text without some of the latents that build it, against a control.

    Measured at the tokens where the output latent is active (of an output that is no latent, at all
    tokens) and one of the group is: what the latents write is taken out of what the MLP reads. The
    control takes out, at the same tokens, as many of the other latents that are active there (or
    all, if there are fewer), drawn at random.

    Args:
        features: from `feature_interactions`.
        groups: lists of input latents by name, each taken out together; by default each of the most
            important latents alone, and all of them.
        window: tokens that the model reads at a time, at most its context.
        n_bootstrap: resamples of windows of text, for the 95 % intervals of the means.
        seed: of the control and the resamples.

    Returns:
        A row for each group and `ablated` ("group" or "random"): `n_tokens`; `output`, the mean of
        `direction . mlp(x)` as it is; `change`, its mean change, with `change_low` and
        `change_high`; `predicted`, the same change computed from latents alone, without what the
        SAE does not reconstruct; `correlation` of both over tokens; `still_active`, at which share
        of the tokens the output latent then still is.

    Raises:
        ValueError: if a latent is out of range, the text does not fill a window, or no group is
            active where the output is.
    """
    device = str(model.cfg.device)
    sae, basis = features.inputs.to(device), latent_basis(model, features.inputs)
    if features.outputs is not None:
        check_unnormed(model, features.outputs)
        features = replace(features, outputs=features.outputs.to(device))
    tensor, direction = model.bilinear_tensor(basis.layer), features.direction.to(device)
    if groups is None:
        important = [int(i) for i in features.latents["latent"]]
        groups = {f"latent {i}": [i] for i in important} | {"all of these": important}
    for group in groups.values():
        sae.check_latents(list(group))
    windows = text_windows(model, text, n_tokens=min(window, model.cfg.n_ctx))
    generator = torch.Generator().manual_seed(seed)
    parts: dict[tuple[str, str], list[Tensor]] = {}
    for number, read in enumerate(stream(model, windows, [sae.hook_in], title="Ablating")):
        x = read[sae.hook_in]
        window_of = torch.arange(len(x)).repeat_interleave(x.shape[1]) + number * 10**6
        x = x.flatten(0, 1)
        into = _into_mlp(model, basis.layer, sae, x)
        written = tensor(into)
        there = _latent_active(features, into, written)
        x, written, window_of = x[there], written[there], window_of.to(there.device)[there]
        acts = sae.encode(x)
        made = tensor(_into_mlp(model, basis.layer, sae, sae.decode(acts)))
        for name, group in groups.items():
            chosen = torch.zeros(sae.n_latents, dtype=torch.bool, device=x.device)
            chosen[list(group)] = True
            inside = (acts != 0) & chosen
            at = inside.any(1)
            for kind, out in (
                ("group", inside[at]),
                ("random", _as_many_others(acts[at], inside[at], generator)),
            ):
                taken = (acts[at] * out) @ sae.decoder_basis.directions
                into = _into_mlp(model, basis.layer, sae, x[at] - taken)
                after = tensor(into)
                without = sae.decode(acts[at] * ~out)
                predicted = tensor(_into_mlp(model, basis.layer, sae, without)) - made[at]
                parts.setdefault((name, kind), []).append(
                    torch.stack(
                        [
                            window_of[at].double(),
                            (written[at] @ direction).double(),
                            ((after - written[at]) @ direction).double(),
                            (predicted @ direction).double(),
                            _latent_active(features, into, after).double(),
                        ]
                    ).cpu()
                )
    rows = []
    for (name, kind), found in parts.items():
        row = _row(torch.cat(found, dim=1).numpy(), n_bootstrap, seed)
        rows.append({"group": name, "ablated": kind, **row})
    if not any(row["n_tokens"] for row in rows):
        raise ValueError(
            f"None of these latents is active where {features.output} is, on this text: give more."
        )
    return pd.DataFrame(rows)


def _into_mlp(
    model: HookedBilinearTransformer, layer: int, sae: SparseAutoencoder, x: Float[Tensor, "n d"]
) -> Float[Tensor, "n d"]:
    """What the MLP reads where the SAE's activation is `x`."""
    block = model.blocks[layer]
    if sae.hook_in.endswith("mlp.hook_in") or not hasattr(block, "ln2"):
        return x
    return block.ln2(x[None].to(model.cfg.dtype))[0].float()


def _latent_active(
    features: FeatureInteractions, read: Float[Tensor, "n d_in"], written: Float[Tensor, "n d_out"]
) -> Bool[Tensor, " n"]:
    if features.outputs is None or features.latent is None:
        return torch.ones(len(written), dtype=torch.bool, device=written.device)
    seen = read if features.outputs.is_transcoder else written
    return features.outputs.encode(seen)[:, features.latent] != 0


def _as_many_others(
    acts: Float[Tensor, "n latents"], inside: Bool[Tensor, "n latents"], generator: torch.Generator
) -> Bool[Tensor, "n latents"]:
    """As many active latents that are not in the group, drawn at each token."""
    draw = torch.rand(acts.shape, generator=generator).to(acts)
    others = (acts != 0) & ~inside
    order = torch.where(others, draw, 2.0).argsort(dim=1).argsort(dim=1)
    return others & (order < inside.sum(1, keepdim=True))


def _row(found: np.ndarray, n_bootstrap: int, seed: int) -> dict[str, float | int]:
    window_of, output, change, predicted, still = found
    if not len(change):
        names = ("output", "change", "change_low", "change_high", "predicted", "correlation")
        return {"n_tokens": 0} | dict.fromkeys((*names, "still_active"), np.nan)
    _, index = np.unique(window_of, return_inverse=True)
    sums, counts = np.bincount(index, change), np.bincount(index)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=n_bootstrap)
    low, high = np.quantile((weights @ sums) / (weights @ counts), [0.025, 0.975])
    varies = len(change) > 2 and change.std() > 0 and predicted.std() > 0
    return {
        "n_tokens": len(change),
        "output": float(output.mean()),
        "change": float(change.mean()),
        "change_low": float(low),
        "change_high": float(high),
        "predicted": float(predicted.mean()),
        "correlation": float(np.corrcoef(change, predicted)[0, 1]) if varies else np.nan,
        "still_active": float(still.mean()),
    }
