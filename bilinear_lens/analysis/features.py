"""Interactions between latents: which latents before an MLP build one behind it.

- with `x = sum_i f_i d_i + c`, latents `f_i` and decoder directions `d_i`, what an MLP writes along
  `u` is `sum_ij f_i f_j d_i^T Q d_j`, and terms with the constant `c`
- Q comes from the weights (arXiv 2410.08417, section 5); of the matrix between latents only what is
  listed is ever computed
"""

import re
from dataclasses import dataclass
from html import escape
from operator import index

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from bilinear_lens.analysis.interactions import output_label
from bilinear_lens.analysis.pairs import Pairs, top_pairs
from bilinear_lens.models.directions import Output
from bilinear_lens.models.saes import SparseAutoencoder
from bilinear_lens.models.transformer import HookedBilinearTransformer
from bilinear_lens.spectrum import Spectrum
from bilinear_lens.tensor import BilinearTensor

_READS = re.compile(r"blocks\.(\d+)\.(mlp\.hook_in|hook_resid_mid)")
_WRITES = re.compile(r"blocks\.(\d+)\.(mlp\.hook_out|hook_mlp_out)")


@dataclass(frozen=True, eq=False)
class LatentBasis:
    """Latents before an MLP, as directions of its input."""

    layer: int
    sae: SparseAutoencoder
    directions: Float[Tensor, "n_latents coords"]
    """What each writes, in the coordinates that the layer's tensor has."""
    constant: Float[Tensor, " coords"]
    """What is there without any latent."""

    @property
    def metric(self) -> Float[Tensor, "coords coords"]:
        """`sum_i d_i d_i^T`, by which norms over all latents need no latent any more."""
        return self.directions.mT @ self.directions


@dataclass(frozen=True, eq=False)
class FeatureInteractions:
    """The pairs of latents before an MLP that build an output behind it."""

    model: str
    layer: int
    output: str
    """What is written, such as `latent 12 of blocks.2.mlp.hook_out`."""
    latent: int | None
    """Its number, if it is a latent."""
    direction: Float[Tensor, " d_out"]
    interaction: Float[Tensor, "coords coords"]
    """The symmetric Q with `direction . mlp(x) = x^T Q x`."""
    spectrum: Spectrum
    inputs: SparseAutoencoder
    outputs: SparseAutoencoder | None
    pairs: pd.DataFrame
    """Columns `kind` (self, cross or constant), `a`, `b` (latents; None is the constant),
    `interaction`, which a cross or constant pair adds twice, and `share` of the total."""
    latents: pd.DataFrame
    """The most important latents: columns `latent`, and `share`, of the total that its row and
    column hold together."""
    matrix: Float[Tensor, "n n"]
    """The interactions between those."""
    self_share: float
    """Of the total, the sum of all squares of interactions between latents: the diagonal's."""

    @property
    def listed(self) -> float:
        """The share of the total that the listed pairs of latents hold."""
        return float(self.pairs.loc[self.pairs["kind"] != "constant", "share"].sum())

    @property
    def header(self) -> str:
        """Where it comes from, and how much of it is listed."""
        return (
            f"{self.output}, written by layer {self.layer} of {self.model}, in the "
            f"{self.inputs.n_latents} latents of {self.inputs.hook_in}: effective rank "
            f"{self.spectrum.effective_rank().item():.1f}, {self.self_share:.1%} on the diagonal, "
            f"listed pairs hold {self.listed:.1%}"
        )

    def __repr__(self) -> str:
        return f"{self.header}\n{self._shown().to_string(index=False)}"

    def _repr_html_(self) -> str:
        table = self._shown().to_html(index=False, border=0, justify="left")
        return f"<p>{escape(self.header)}</p>{table}"

    def _shown(self) -> pd.DataFrame:
        shown = self.pairs.copy()
        for end in ("a", "b"):
            shown[end] = ["constant" if pd.isna(i) else f"latent {i}" for i in shown[end]]
        shown["interaction"] = [f"{value:+.3g}" for value in shown["interaction"]]
        shown["share"] = ["" if pd.isna(share) else f"{share:.2%}" for share in shown["share"]]
        return shown


@torch.no_grad()
def feature_interactions(
    model: HookedBilinearTransformer,
    output: int | Output,
    *,
    inputs: SparseAutoencoder,
    outputs: SparseAutoencoder | None = None,
    side: str = "encoder",
    k: int = 20,
    n_latents: int = 12,
) -> FeatureInteractions:
    """Read from the weights which input latents an MLP multiplies to write to an output.

    Args:
        output: with `outputs` the number of one of its latents; without, a token, a pair of tokens
            or a direction, as in `output_direction`.
        inputs: of `blocks.{layer}.mlp.hook_in`, or of `blocks.{layer}.hook_resid_mid`: then up to
            the norm's scale, which is positive.
        outputs: of `blocks.{layer}.mlp.hook_out` or `hook_mlp_out`.
        side: "encoder" reads what makes the latent active, "decoder" what writes along the
            direction that it stands for.
        k: how many pairs of two latents, how many of a latent with itself, and how many with the
            constant, are listed: exactly those of largest magnitude.
        n_latents: how many of the most important latents are listed.

    Raises:
        ValueError: if an SAE is of another model, width or hook point, both are of different
            layers, or a latent or a number is out of range.
    """
    basis = latent_basis(model, inputs)
    tensor = model.bilinear_tensor(basis.layer)
    if outputs is None:
        if isinstance(output, int):
            raise ValueError(
                f"output={output} is a number: give outputs=, the SAE whose latent it is, or a "
                "token as a string."
            )
        direction = model.output_direction(output, layer=basis.layer)  # pyright: ignore
        name, latent = output_label(model, output, "mean"), None  # pyright: ignore
    else:
        try:
            output = index(output)  # pyright: ignore[reportArgumentType] - NumPy's, too
        except TypeError:
            raise ValueError(
                f"output={output!r} must be the number of a latent of `outputs`."
            ) from None
        outputs.check_latents([output])
        direction = latent_directions(model, outputs, layer=basis.layer, side=side)[output]
        name, latent = f"latent {output} of {outputs.hook_out}", output
    n = inputs.n_latents
    if not 1 <= k <= n or not 1 <= n_latents <= n:
        raise ValueError(
            f"k={k} and n_latents={n_latents} must be between 1 and the {n} latents of "
            f"{inputs.hook_in}."
        )
    interaction = tensor.interaction(direction)
    mapped = basis.directions @ interaction  # [n_latents, coords]
    weighted = mapped @ basis.metric
    rows = (weighted * mapped).sum(1).clamp(min=0)  # of squared interactions with all latents
    total = rows.sum()
    if total == 0:
        raise ValueError(f"Layer {basis.layer} writes nothing along {name}: its weights are zero.")
    alone = (mapped * basis.directions).sum(1)
    first = top_pairs(interaction, basis.directions, min(k, n * (n - 1) // 2), distinct=True)
    own = alone.abs().topk(k).indices
    linear = mapped @ basis.constant
    with_constant = linear.abs().topk(k).indices
    important = (2 * rows - alone.square()).topk(n_latents)
    chosen = important.indices
    return FeatureInteractions(
        model=model.cfg.model_name,
        layer=basis.layer,
        output=name,
        latent=latent,
        direction=direction,
        interaction=interaction,
        spectrum=tensor.eigh(direction),
        inputs=inputs,
        outputs=outputs,
        pairs=pd.concat(
            [
                _listed("cross", first, 2 * first.values.square() / total),
                _listed("self", Pairs(own, own, alone[own]), alone[own].square() / total),
                _listed("constant", Pairs(with_constant, with_constant, linear[with_constant])),
            ],
            ignore_index=True,
        ),
        latents=pd.DataFrame(
            {"latent": chosen.tolist(), "share": (important.values / total).tolist()}
        ),
        matrix=mapped[chosen] @ basis.directions[chosen].mT,
        self_share=(alone.square().sum() / total).item(),
    )


def latent_basis(model: HookedBilinearTransformer, sae: SparseAutoencoder) -> LatentBasis:
    """The latents of an SAE that stands before an MLP, in the coordinates of the MLP's tensor.

    Raises:
        ValueError: if it is of another model or width, or stands elsewhere.
    """
    if not isinstance(model, HookedBilinearTransformer):
        raise ValueError(
            f"{type(model).__name__} has no bilinear MLPs: make it bilinear (bl.bilinearize), or "
            "train a layer that is (bl.train_transcoders), and read its tensor."
        )
    match = _READS.fullmatch(sae.hook_in)
    if match is None or sae.is_transcoder:
        raise ValueError(
            f"inputs must be an SAE of what an MLP reads, blocks.N.mlp.hook_in or "
            f"blocks.N.hook_resid_mid; this one is of {sae.hook_in}"
            f"{f', a transcoder to {sae.hook_out}' if sae.is_transcoder else ''}."
        )
    sae.check_model(model)
    layer = int(match[1])
    tensor = model.bilinear_tensor(layer)
    directions = sae.decoder_basis.directions.to(tensor.left)
    constant = sae.offset.to(tensor.left)
    if match[2] == "hook_resid_mid" and hasattr(model.blocks[layer], "ln2"):
        gain = model.norm_gain(model.blocks[layer].ln2).to(tensor.left)
        directions, constant = directions * gain, constant * gain
    if tensor.affine:
        directions = torch.cat([directions, directions.new_zeros(len(directions), 1)], dim=1)
        constant = torch.cat([constant, constant.new_ones(1)])
    return LatentBasis(layer, sae, directions, constant)


def written_layer(sae: SparseAutoencoder) -> int:
    """The layer whose MLP writes what an SAE is of.

    Raises:
        ValueError: if it stands elsewhere.
    """
    match = _WRITES.fullmatch(sae.hook_out)
    if match is None:
        raise ValueError(
            "outputs must be an SAE of what an MLP writes, blocks.N.mlp.hook_out or "
            f"blocks.N.hook_mlp_out; this one is of {sae.hook_out}."
        )
    return int(match[1])


def check_unnormed(model: HookedBilinearTransformer, outputs: SparseAutoencoder) -> None:
    """Refuse an SAE that reads what an MLP writes behind a norm, whose scale depends on all of it.

    Raises:
        ValueError: if there is such a norm before its hook point.
    """
    layer = written_layer(outputs)
    if outputs.hook_out.endswith("hook_mlp_out") and hasattr(model.blocks[layer], "ln2_post"):
        raise ValueError(
            f"{model.cfg.model_name} norms what its MLPs write, by a scale that the weights do not "
            f"know: give an SAE of blocks.{layer}.mlp.hook_out."
        )


def latent_directions(
    model: HookedBilinearTransformer, sae: SparseAutoencoder, *, layer: int, side: str
) -> Float[Tensor, "n_latents d_out"]:
    """The output directions of the latents of an SAE behind an MLP.

    Raises:
        ValueError: if it is of another model, width or layer, stands elsewhere, or there is no such
            side.
    """
    if written_layer(sae) != layer:
        raise ValueError(
            f"outputs must be an SAE of what layer {layer}'s MLP writes, as inputs are of what it "
            f"reads; this one is of {sae.hook_out}."
        )
    if side not in ("encoder", "decoder"):
        raise ValueError(f"side={side!r} must be 'encoder' or 'decoder'.")
    if side == "encoder" and sae.is_transcoder:
        raise ValueError("A transcoder's encoder reads the MLP's input: take side='decoder'.")
    sae.check_model(model)
    basis = sae.encoder_basis if side == "encoder" else sae.decoder_basis
    directions = basis.directions.to(str(model.cfg.device))
    if sae.hook_out.endswith("hook_mlp_out"):
        directions = directions * model.output_gain(layer)
    return directions


def latent_tensor(
    model: HookedBilinearTransformer,
    inputs: SparseAutoencoder,
    outputs: SparseAutoencoder,
    *,
    side: str = "encoder",
) -> BilinearTensor:
    """An MLP between latents: affine, since an SAE's bias is a constant of the input.

    What it gives for latents is `direction . mlp(inputs.decode(latents))`; with inputs of
    `hook_resid_mid`, for a norm's scale of 1.

    Raises:
        ValueError: as `feature_interactions`.
    """
    basis = latent_basis(model, inputs)
    tensor = model.bilinear_tensor(basis.layer)
    directions = latent_directions(model, outputs, layer=basis.layer, side=side)
    rows = torch.cat([basis.directions, basis.constant[None]])
    down = directions.to(tensor.down) @ tensor.down
    return BilinearTensor(tensor.left @ rows.mT, tensor.right @ rows.mT, down, affine=True)


def _listed(kind: str, pairs: Pairs, shares: Tensor | None = None) -> pd.DataFrame:
    constant = kind == "constant"
    second = [None] * len(pairs.second) if constant else pairs.second.tolist()
    return pd.DataFrame(
        {
            "kind": kind,
            "a": pd.array(pairs.first.tolist(), dtype="Int64"),
            "b": pd.array(second, dtype="Int64"),
            "interaction": pairs.values.tolist(),
            "share": [float("nan")] * len(second) if shares is None else shares.tolist(),
        }
    )
