"""Eigenvectors as hook points: what each of them adds to an MLP's output, cached and edited."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from bilinear_lens.spectrum import Spectrum
from bilinear_lens.tensor import BilinearTensor


class Eigenbasis(nn.Module):
    """The top eigenvectors of some output directions of an MLP, with a hook on what they add.

    `hook_acts` is `[batch, pos, direction, k]`: `value (vector . x)^2`, which over all eigenvectors
    of a direction sums to `direction . mlp(x)`. An edit of it moves the MLP's output by the
    shortest vector that moves `direction . out` by as much as the edit did, for each of the
    directions and not the others. What the k eigenvectors leave out is not touched, so that
    without an edit the output stays as it is, to the last bit.
    """

    def __init__(
        self, tensor: BilinearTensor, directions: Float[Tensor, "direction d_out"], k: int
    ) -> None:
        """Raises ValueError if a direction is a combination of the others, or as `eigh` does."""
        super().__init__()
        n = len(directions)
        rows = torch.nn.functional.normalize(directions.double(), dim=-1)
        if n == 0 or torch.linalg.matrix_rank(rows, rtol=1e-5) < n:
            raise ValueError(
                f"The {n} directions must be linearly independent, and at least one: otherwise an "
                "edit of one cannot leave the others alone."
            )
        # no buffers: they are no weights of the model, and stay exact where those become 16 bits
        self.spectrum = tensor.eigh(directions, k)
        """Of each direction, `[direction, k]`."""
        self.write = torch.linalg.pinv(directions.double()).mT.to(directions)
        self.hook_acts = HookPoint()

    def forward(
        self, x: Float[Tensor, "*batch d_in"], out: Float[Tensor, "*batch d_out"]
    ) -> Float[Tensor, "*batch d_out"]:
        """The MLP's output for the input `x`, moved by what the hook changed."""
        spectrum, write = self.spectrum, self.write.to(x.device)
        vectors = spectrum.vectors.to(x.device)
        spectrum = Spectrum(spectrum.values.to(x.device), vectors, spectrum.affine)
        acts = spectrum.activations(x.to(vectors))
        edited = self.hook_acts(acts.clone())  # which hooks may change in place
        if edited.shape != acts.shape:
            raise ValueError(
                f"A hook on {self.hook_acts.name} gave {list(edited.shape)}; what it edits is "
                f"{list(acts.shape)}: [batch, pos, direction, k]."
            )
        return out + ((edited - acts).sum(-1).to(write) @ write).to(out)
