"""Ablation: is an eigenvector table true? Take eigenvectors out of a running model and measure.

An intervention is data: a list of `(hook name, hook)`, for `model.hooks(fwd_hooks=...)` and
`model.run_with_hooks(..., fwd_hooks=...)`. Lists add with `+`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from bilinear_lens.models.activations import Hooks
from bilinear_lens.models.transformer import HookedBilinearTransformer
from bilinear_lens.models.vocabulary import Token
from bilinear_lens.spectrum import Spectrum
from bilinear_lens.tensor import BilinearTensor


def ablate_eigenvectors(
    spectrum: Spectrum, direction: Float[Tensor, " d_out"], *, layer: int
) -> Hooks:
    """What the layer writes along `direction` loses the part that `spectrum` explains.

    Args:
        spectrum: the eigenvectors to take out, such as `tensor.eigh(direction).top(4)`.

    Raises:
        ValueError: if `direction` is zero or not finite.
    """
    return _rewrite_along(spectrum, direction, layer, keep=False)


def keep_eigenvectors(
    spectrum: Spectrum, direction: Float[Tensor, " d_out"], *, layer: int
) -> Hooks:
    """What the layer writes along `direction` becomes the part that `spectrum` explains.

    With every eigenvector of the layer's interaction, nothing changes.

    Raises:
        ValueError: if `direction` is zero or not finite.
    """
    return _rewrite_along(spectrum, direction, layer, keep=True)


def project_out(spectrum: Spectrum, *, layer: int) -> Hooks:
    """The layer's MLP no longer sees the eigenvectors: its input loses its projection on them."""
    if spectrum.values.ndim != 1:
        raise ValueError("Project out the eigenvectors of one direction at a time.")
    seen, sizes, _ = torch.linalg.svd(spectrum.vectors[: spectrum.d_in], full_matrices=False)
    seen = seen[:, sizes > 1e-6]  # with biases, an eigenvector may be the constant alone

    def blind(x: Tensor, hook: object) -> Tensor:
        _check_size(x, spectrum.d_in, layer)
        wide = x.to(seen)  # 16-bit activations, too, lose the whole projection
        return (wide - wide @ seen @ seen.mT).to(x)

    return [(f"blocks.{layer}.mlp.hook_in", blind)]


def _rewrite_along(spectrum: Spectrum, direction: Tensor, layer: int, *, keep: bool) -> Hooks:
    direction = direction.to(spectrum.vectors)
    norm = direction.norm()
    if spectrum.values.ndim != 1 or direction.ndim != 1:
        raise ValueError(
            f"values {list(spectrum.values.shape)} and direction {list(direction.shape)}: give the "
            "spectrum of one direction; lists of hooks add with +."
        )
    if not norm.isfinite() or norm == 0:
        raise ValueError("direction is zero or not finite: nothing is written along it.")
    unit = direction / norm
    seen: dict[str, Tensor] = {}

    def remember(x: Tensor, hook: object) -> None:
        _check_size(x, spectrum.d_in, layer)
        seen["x"] = x

    def rewrite(out: Tensor, hook: object) -> Tensor:
        _check_size(out, len(unit), layer)
        wide = out.to(unit)
        explained = spectrum.activations(seen.pop("x")).sum(-1).to(unit) / norm
        change = explained - wide @ unit if keep else -explained
        return (wide + change[..., None] * unit).to(out)

    return [
        # the gate's own input: what every hook on the MLP's input has left
        (f"blocks.{layer}.mlp.gate.hook_in", remember),
        (f"blocks.{layer}.mlp.hook_out", rewrite),
    ]


def _check_size(x: Tensor, size: int, layer: int) -> None:
    if x.shape[-1] != size:
        raise ValueError(
            f"Layer {layer}'s MLP has width {x.shape[-1]}, but the spectrum or direction has "
            f"{size}: take both from this model (of a "
            'classifier: bilinear_tensor(layer, inputs="hidden")).'
        )


def ablation_curve(
    model: HookedBilinearTransformer,
    output: Token | tuple[Token, Token],
    text: Sequence[str],
    *,
    layer: int,
    contrast: Token | Literal["mean"] | None = "mean",
    ks: Sequence[int] | None = None,
    window: int = 256,
    n_random: int = 3,
    n_bootstrap: int = 1000,
    batch_size: int = 4,
    seed: int = 0,
) -> pd.DataFrame:
    """What ablating k eigenvectors does to a token on real text, against two controls.

    Measured where the token is the right answer: the change of its logit, against the same contrast
    as the direction (the mean logit, the other token's, or nothing), and of the loss. The controls
    are the k eigenvectors of smallest magnitude, and k random orthonormal directions, of which the
    interaction's best rank-k part within their span is taken out. At k = d_in all three are the
    same: nothing is written along the direction.

    Args:
        text: documents the model was not trained on.
        ks: numbers of eigenvectors; by default 1, 2, 4, ... up to all.
        window: tokens that the model reads at a time, at most its context.
        n_random: random draws; the interval covers them too.
        n_bootstrap: resamples of windows of text (and of draws) for the 95 % interval.
        batch_size: windows at a time; a few are fastest on a CPU, more on an accelerator.

    Returns:
        Columns `eigenvectors` ("top", "bottom" or "random"), `k`, `logit`, `logit_low`,
        `logit_high`, `loss`, `loss_low`, `loss_high` (nats), `n_positions`.

    Raises:
        ValueError: if the output, layer or a k is out of range, or the token is never the answer.
    """
    if isinstance(output, Tensor):
        raise ValueError("The curve measures the logit of a token: give a token or a pair.")
    if min(n_random, n_bootstrap, batch_size) < 1:
        raise ValueError(
            f"n_random={n_random}, n_bootstrap={n_bootstrap} and batch_size={batch_size} must be "
            "at least 1."
        )
    if not isinstance(output, tuple) and contrast is not None and contrast != "mean":
        output, contrast = (output, contrast), "mean"
    tensor = model.bilinear_tensor(layer)
    direction = model.output_direction(output, contrast, layer=layer)
    spectrum = tensor.eigh(direction)
    ks = sorted(set(ks)) if ks is not None else _powers_of_two(spectrum.k)
    if not ks or ks[0] < 1 or ks[-1] > spectrum.k:
        raise ValueError(f"ks={ks} must lie between 1 and the {spectrum.k} eigenpairs there are.")
    answer, against = (
        (model.token_id(output[0]), model.token_id(output[1]))
        if isinstance(output, tuple)
        else (model.token_id(output), contrast)
    )
    windows = text_windows(model, text, n_tokens=min(window, model.cfg.n_ctx))
    windows = windows[(windows[:, 1:] == answer).any(dim=1)]
    if len(windows) == 0:
        raise ValueError(f"{output!r} is never the right answer in this text: give other text.")

    def measure(hooks: Hooks) -> Float[Tensor, "positions 2"]:
        return _answers(model, windows, answer, against, hooks, batch_size)

    clean = measure([])
    position_window = (windows[:, 1:] == answer).nonzero()[:, 0]
    generator = torch.Generator().manual_seed(seed)
    random = [_random_basis(tensor.left.shape[1], generator) for _ in range(n_random)]
    candidates: dict[str, Callable[[int], Iterator[Spectrum]]] = {
        "top": lambda k: iter([spectrum.top(k)]),
        "bottom": lambda k: iter([spectrum.bottom(k)]),
        "random": lambda k: (_within(tensor, direction, basis[:, :k]) for basis in random),
    }
    rows = []
    with tqdm(total=len(ks) * (2 + n_random), desc="Ablating", leave=False) as progress:
        for name, spectra in candidates.items():
            for k in ks:
                changes = []
                for ablated in spectra(k):
                    hooks = ablate_eigenvectors(ablated, direction, layer=layer)
                    changes.append(measure(hooks) - clean)
                    progress.update()
                rows.append(
                    {"eigenvectors": name, "k": k}
                    | _interval(torch.stack(changes), position_window, n_bootstrap, seed)
                    | {"n_positions": len(clean)}
                )
    return pd.DataFrame(rows)


def k_reaching(curve: pd.DataFrame, share: float = 0.9, *, measure: str = "logit") -> pd.Series:
    """The smallest k of an `ablation_curve` from which on the effect is at least `share` of all.

    "All" is the effect at the largest k, where every eigenvector is ablated.

    Returns:
        A k for each of "top", "bottom" and "random".

    Raises:
        ValueError: if the curve does not reach all eigenvectors, where top, bottom and random have
            the same effect, or that effect is zero.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be above 0 and at most 1.")
    last = curve.loc[curve["k"] == curve["k"].max(), measure]
    everything = last.mean()
    if everything == 0 or (last - everything).abs().max() > 1e-3 * abs(everything):
        raise ValueError(
            f"The effects at k={curve['k'].max()}, {last.round(3).tolist()}, are not one effect of "
            "all eigenvectors: make the curve with ks up to all of them."
        )

    def first(rows: pd.DataFrame) -> int:
        rows = rows.sort_values("k", ascending=False)
        enough = (rows[measure] / everything >= share - 1e-6).cummin()
        return int(rows.loc[enough, "k"].min())

    return pd.Series({name: first(rows) for name, rows in curve.groupby("eigenvectors")})


def text_windows(
    model: TransformerBridge, text: Sequence[str], *, n_tokens: int
) -> Int[Tensor, "n_windows n_tokens"]:
    """Documents as the model was trained on them: joined, each after the first token, and cut.

    Raises:
        ValueError: if the model has no tokenizer, or the text does not fill one window.
    """
    if model.tokenizer is None:
        raise ValueError("This model has no tokenizer: load it with tokenizer=...")
    if isinstance(text, str) or not text:
        raise ValueError("text must be a list of documents, at least one.")
    first = model.tokenizer.bos_token_id
    encoded = model.tokenizer(list(text), add_special_tokens=False, verbose=False)["input_ids"]
    stream = [token for ids in encoded for token in (first, *ids)]
    if len(stream) < n_tokens:
        raise ValueError(f"The text has {len(stream)} tokens, fewer than one window of {n_tokens}.")
    n_windows = len(stream) // n_tokens
    windows = torch.tensor(stream[: n_windows * n_tokens]).unflatten(0, (n_windows, n_tokens))
    return windows.to(model.cfg.device)


@torch.no_grad()
def _answers(
    model: HookedBilinearTransformer,
    windows: Int[Tensor, "n n_tokens"],
    answer: int,
    against: Token | None,
    hooks: Hooks,
    batch_size: int,
) -> Float[Tensor, "positions 2"]:
    """Logit and loss of `answer` at each position where it comes next."""
    measured = []
    for batch in windows.split(batch_size):
        logits = model.run_with_hooks(batch, fwd_hooks=hooks)[:, :-1][batch[:, 1:] == answer]
        logit = logits[:, answer]
        if against is not None:
            logit = logit - (logits.mean(dim=1) if against == "mean" else logits[:, against])
        measured.append(torch.stack([logit, -logits.log_softmax(-1)[:, answer]], dim=1))
    return torch.cat(measured).float().cpu()


def _powers_of_two(largest: int) -> list[int]:
    return [*(2**i for i in range(largest.bit_length()) if 2**i < largest), largest]


def _random_basis(size: int, generator: torch.Generator) -> Float[Tensor, "size size"]:
    return torch.linalg.qr(torch.randn(size, size, generator=generator))[0]


def _within(
    tensor: BilinearTensor, direction: Tensor, basis: Float[Tensor, "coords k"]
) -> Spectrum:
    """The eigenpairs of the interaction restricted to a subspace with an orthonormal basis."""
    basis = basis.to(tensor.left)
    restricted = Spectrum.of(basis.mT @ tensor.interaction(direction) @ basis)
    return Spectrum(restricted.values, basis @ restricted.vectors, tensor.affine)


def _interval(
    changes: Float[Tensor, "draws positions 2"],
    position_window: Int[Tensor, " positions"],
    n_bootstrap: int,
    seed: int,
) -> dict[str, float]:
    """Mean change, with a 95 % bootstrap interval over windows of text and random draws.

    Positions of one window are not independent, so whole windows are drawn.
    """
    n_windows = int(position_window.max()) + 1
    onehot = torch.nn.functional.one_hot(position_window.cpu(), n_windows).float()
    sums = torch.einsum("dpm,pw->dwm", changes, onehot).numpy()
    counts = onehot.sum(0).numpy()
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n_windows, np.full(n_windows, 1 / n_windows), size=n_bootstrap)
    draws = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=n_bootstrap)
    totals = np.einsum("bd,dwm,bw->bm", draws / len(sums), sums, weights)
    resampled = totals / (weights @ counts)[:, None]
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    mean = changes.mean(dim=(0, 1))
    return {
        f"{measure}{end}": float(values[i])
        for i, measure in enumerate(("logit", "loss"))
        for end, values in (("", mean), ("_low", low), ("_high", high))
    }
