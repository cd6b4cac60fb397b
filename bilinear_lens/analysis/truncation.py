"""Truncation: how many eigenvectors an output needs, in which order, and what the rest can do.

A spectrum is cut after its first k pairs. Which come first is a question of its own: by magnitude
(`tensor.eigh`), `paired`, by mean activation (`by_activation`), or eigenvectors that are orthogonal
on data instead of in pixels (`activation_spectrum`), the best of these.
"""

from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilinear_lens.analysis.whitening import whiten
from bilinear_lens.spectrum import Spectrum, coordinates
from bilinear_lens.tensor import BilinearTensor


def paired(spectrum: Spectrum) -> Spectrum:
    """The pairs reordered: the largest positive, the most negative, the next positive, ...

    The order of arXiv 2406.03947's truncations. Where one sign runs out, the other goes on.
    """
    positive = spectrum.values > 0
    # the rank of each pair among those of its sign; the positive of a rank before the negative
    ranks = torch.where(positive, positive.cumsum(-1), (~positive).cumsum(-1))
    return _reordered(spectrum, (2 * ranks + ~positive).argsort(dim=-1, stable=True))


def by_activation(spectrum: Spectrum, inputs: Float[Tensor, "n d_in"]) -> Spectrum:
    """The pairs reordered by the magnitude of their mean activation `value E[(vector . x)^2]`."""
    means = mean_activations(spectrum, inputs)
    return _reordered(spectrum, means.abs().argsort(dim=-1, descending=True))


def mean_activations(
    spectrum: Spectrum, inputs: Float[Tensor, "n d_in"]
) -> Float[Tensor, "*batch k"]:
    """What each eigenvector adds on average over `inputs`."""
    sums = [spectrum.activations(batch).sum(0) for batch in inputs.split(1024)]
    return torch.stack(sums).sum(0) / len(inputs)


def activation_spectrum(
    tensor: BilinearTensor,
    direction: Float[Tensor, "*batch d_out"] | int,
    inputs: Float[Tensor, "n d_in"],
) -> Spectrum:
    """Eigenvectors that are orthogonal on data, so that none repeats what another does there.

    With `C = E[x x^T]`, the generalised eigenvectors of `Q` and the inverse of `C`: vectors `w`
    with `Q = sum_i value_i w_i w_i^T` exactly, and `E[(w_i . x)(w_j . x)]` 1 if i = j, else 0.
    An eigenvalue is then the pair's mean activation, and the first k are the best rank-k
    approximation of what is written, in mean square, over Gaussian inputs of covariance C.

    Args:
        inputs: data, such as training images.

    Raises:
        ValueError: as `BilinearTensor.eigh` and `whiten`.
    """
    whitened, filters = whiten(tensor, inputs)
    spectrum = whitened.eigh(direction)
    return Spectrum.signed(spectrum.values, filters @ spectrum.vectors, affine=tensor.affine)


def truncation_curve(
    spectrum: Spectrum,
    inputs: Float[Tensor, "n d_in"],
    labels: Int[Tensor, " n"],
    *,
    ks: Sequence[int],
    rest: Float[Tensor, " n_classes k"] | None = None,
) -> pd.DataFrame:
    """Accuracy when each class keeps its first k pairs (arXiv 2410.08417, section 4.3).

    Args:
        spectrum: of all classes, `[n_classes, k]`: of `tensor.eigh(torch.eye(n_classes))` or
            reordered, with every pair that is not zero.
        ks: numbers of pairs that each class keeps.
        rest: mean activations, which stand for the pairs that are cut; by default 0 does.

    Returns:
        Columns `k`, `accuracy`, `lost` (against all pairs), `agreement` (share of inputs with the
        same prediction as with all pairs).

    Raises:
        ValueError: if the spectrum is not of several classes, or a k is not in 1..k.
    """
    logits = _kept(spectrum, inputs, [*ks, spectrum.k])
    if rest is not None:
        cut = rest.sum(-1, keepdim=True) - rest.cumsum(-1)
        logits[:-1] += cut.mT[torch.tensor(ks) - 1][:, None]
    predictions = logits.argmax(-1)
    right = (predictions == labels).float().mean(1).tolist()
    agreement = (predictions == predictions[-1]).float().mean(1).tolist()
    return pd.DataFrame(
        {
            "k": list(ks),
            "accuracy": right[:-1],
            "lost": [right[-1] - accuracy for accuracy in right[:-1]],
            "agreement": agreement[:-1],
        }
    )


def truncation_errors(
    spectrum: Spectrum, inputs: Float[Tensor, "n d_in"], *, ks: Sequence[int]
) -> pd.DataFrame:
    """What cutting a spectrum can do at most, what it does, and which predictions are safe.

    The pairs that are cut form a matrix of spectral norm `|value_{k+1}|`, so no output moves by
    more than `|value_{k+1}| |x|^2` (with biases, `|x|^2 + 1`).

    Args:
        spectrum: of all classes, `[n_classes, k]`, with orthonormal eigenvectors.

    Returns:
        Columns `k`, `bound` (the largest over the classes, per `|x|^2`), `error` (the largest that
        occurs, over inputs and classes, per `|x|^2`), `certified` (share of inputs whose prediction
        the bounds of their classes prove unchanged), `agreement` (share that is unchanged).

    Raises:
        ValueError: as `truncation_curve`, or if the eigenvectors are not orthonormal.
    """
    *kept, full = _kept(spectrum, inputs, [*ks, spectrum.k])
    gram = spectrum.vectors.mT @ spectrum.vectors
    if (gram - torch.eye(spectrum.k).to(gram)).abs().max() > 1e-3:
        raise ValueError(
            "The eigenvectors are not orthonormal: the bound is of tensor.eigh's, in any order."
        )
    sizes = coordinates(inputs, spectrum.d_in, spectrum.affine).square().sum(-1)
    prediction = full.argmax(-1)
    margins = full.gather(1, prediction[:, None]) - full
    rows = []
    for k, logits in zip(ks, kept, strict=True):
        cut = spectrum.values[:, k:].abs()
        bounds = cut.amax(-1) if k < spectrum.k else cut.new_zeros(len(cut))
        slack = (bounds[prediction][:, None] + bounds) * sizes[:, None]
        safe = (margins > slack).scatter(1, prediction[:, None], True).all(1)
        rows.append(
            {
                "k": k,
                "bound": bounds.max().item(),
                "error": ((full - logits).abs() / sizes[:, None]).max().item(),
                "certified": safe.float().mean().item(),
                "agreement": (logits.argmax(-1) == prediction).float().mean().item(),
            }
        )
    return pd.DataFrame(rows)


def _kept(
    spectrum: Spectrum, inputs: Float[Tensor, "n d_in"], ks: Sequence[int]
) -> Float[Tensor, "ks n n_classes"]:
    """What the first k pairs of each class add up to, for each k."""
    if spectrum.values.ndim != 2:
        raise ValueError(
            f"values {list(spectrum.values.shape)}: give the spectrum of all classes, "
            "tensor.eigh(torch.eye(n_classes))."
        )
    if not ks or not all(1 <= k <= spectrum.k for k in ks):
        raise ValueError(
            f"ks={list(ks)} must be numbers between 1 and the {spectrum.k} eigenpairs there are."
        )
    logits = torch.empty(len(ks), len(inputs), len(spectrum.values))
    for c, (values, vectors) in enumerate(zip(spectrum.values, spectrum.vectors, strict=True)):
        activations = Spectrum(values, vectors, spectrum.affine).activations(inputs)
        logits[:, :, c] = activations.cumsum(-1)[:, torch.tensor(ks) - 1].mT
    return logits


def _reordered(spectrum: Spectrum, order: Int[Tensor, "*batch k"]) -> Spectrum:
    vectors = spectrum.vectors.gather(-1, order[..., None, :].expand_as(spectrum.vectors))
    return Spectrum(spectrum.values.gather(-1, order), vectors, spectrum.affine)
