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

from bilinear_lens.analysis.checks import check_inputs, check_labels
from bilinear_lens.analysis.whitening import whiten
from bilinear_lens.spectrum import Spectrum, coordinates
from bilinear_lens.tensor import BilinearTensor


def paired(spectrum: Spectrum) -> Spectrum:
    """The pairs reordered: the largest positive, the most negative, the next positive, ...

    The order of arXiv 2406.03947's truncations. Where one sign runs out, the other goes on.
    """
    order = spectrum.values.abs().argsort(dim=-1, descending=True, stable=True)
    spectrum = spectrum.reordered(order)
    positive = spectrum.values > 0
    # the rank of each pair among those of its sign; the positive of a rank before the negative
    ranks = torch.where(positive, positive.cumsum(-1), (~positive).cumsum(-1))
    return spectrum.reordered((2 * ranks + ~positive).argsort(dim=-1, stable=True))


def by_activation(spectrum: Spectrum, inputs: Float[Tensor, "n d_in"]) -> Spectrum:
    """The pairs reordered by the magnitude of their mean activation `value E[(vector . x)^2]`.

    Raises:
        ValueError: as `mean_activations`.
    """
    means = mean_activations(spectrum, inputs)
    return spectrum.reordered(means.abs().argsort(dim=-1, descending=True))


def mean_activations(
    spectrum: Spectrum, inputs: Float[Tensor, "n d_in"]
) -> Float[Tensor, "*batch k"]:
    """What each eigenvector adds on average over `inputs`.

    Raises:
        ValueError: if there are no inputs, or they are of another size or hold NaN.
    """
    check_inputs(inputs, spectrum.d_in)
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
    An eigenvalue is then the pair's mean activation. Over Gaussian inputs of mean 0 and without
    biases, the first k, with the mean activations of the rest in place of these, are the best
    rank-k approximation of what is written, in mean square. (With 0 in their place the means
    count as well, and another order may win.)

    The moments, but not `Q`, are up to the ridge of `whiten`: where the data does not vary, a
    pair's mean activation is smaller than its eigenvalue.

    Args:
        inputs: data, such as training images.

    Raises:
        ValueError: as `BilinearTensor.eigh` and `whiten`.
    """
    # in float64: the filters undo scales that differ by orders of magnitude
    whitened, filters = whiten(tensor.double(), inputs)
    spectrum = whitened.eigh(direction)
    return Spectrum.signed(
        spectrum.values.to(tensor.left),
        (filters @ spectrum.vectors).to(tensor.left),
        affine=tensor.affine,
    )


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
        ValueError: if the spectrum is not of several classes, a k is not in 1..k, `labels` or
            `rest` do not fit, or the inputs hold NaN.
    """
    logits = _kept(spectrum, inputs, ks)
    check_labels(labels, len(inputs), logits.shape[-1])
    if rest is not None:
        if rest.shape != spectrum.values.shape:
            raise ValueError(
                f"rest {list(rest.shape)} must be one mean activation for each of the spectrum's "
                f"values {list(spectrum.values.shape)}: mean_activations(spectrum, data)."
            )
        cut = rest.sum(-1, keepdim=True) - rest.cumsum(-1)
        logits[:-1] += cut.mT[torch.tensor(ks) - 1][:, None].to(logits)
    predictions = logits.argmax(-1)
    right = (predictions == labels).double().mean(1).tolist()
    agreement = (predictions == predictions[-1]).double().mean(1).tolist()
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
    *kept, full = _kept(spectrum, inputs, ks)
    gram = spectrum.vectors.mT @ spectrum.vectors
    rounding = torch.linalg.matrix_norm(gram - torch.eye(spectrum.k).to(gram)).double()
    if rounding.max() > 1e-3:
        raise ValueError(
            "The eigenvectors are not orthonormal: the bound is of tensor.eigh's, in any order."
        )
    sizes = coordinates(inputs.to(full), spectrum.d_in, spectrum.affine).square().sum(-1)
    prediction = full.argmax(-1)
    margins = full.gather(1, prediction[:, None]) - full
    rows = []
    for k, logits in zip(ks, kept, strict=True):
        cut = spectrum.values[:, k:].double().abs()
        bounds = cut.amax(-1) * (1 + rounding) if k < spectrum.k else cut.new_zeros(len(cut))
        slack = (bounds[prediction][:, None] + bounds) * sizes[:, None]
        safe = (margins > slack).scatter(1, prediction[:, None], True).all(1)
        rows.append(
            {
                "k": k,
                "bound": bounds.max().item(),
                # an input of zeros writes zeros
                "error": ((full - logits).abs() / sizes[:, None].clamp(min=1e-300)).max().item(),
                "certified": safe.double().mean().item(),
                "agreement": (logits.argmax(-1) == prediction).double().mean().item(),
            }
        )
    return pd.DataFrame(rows)


def _kept(
    spectrum: Spectrum, inputs: Float[Tensor, "n d_in"], ks: Sequence[int]
) -> Float[Tensor, "ks_and_all n n_classes"]:
    """What the first k pairs of each class add up to, for each k and at last all, in float64."""
    if spectrum.values.ndim != 2 or len(spectrum.values) < 2:
        raise ValueError(
            f"values {list(spectrum.values.shape)}: give the spectrum of all classes, "
            "tensor.eigh(torch.eye(n_classes))."
        )
    if not ks or not all(1 <= k <= spectrum.k for k in ks):
        raise ValueError(
            f"ks={list(ks)} must be numbers between 1 and the {spectrum.k} eigenpairs there are."
        )
    check_inputs(inputs, spectrum.d_in)
    columns = torch.tensor([*ks, spectrum.k], device=spectrum.values.device) - 1
    logits = spectrum.values.new_empty(
        len(columns), len(inputs), len(spectrum.values), dtype=torch.float64
    )
    for c, (values, vectors) in enumerate(zip(spectrum.values, spectrum.vectors, strict=True)):
        activations = Spectrum(values, vectors, spectrum.affine).activations(inputs)
        logits[:, :, c] = activations.double().cumsum(-1)[:, columns].mT
    return logits
