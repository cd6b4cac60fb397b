"""What an MLP wrote on a prompt, as an exact sum over eigenvectors and pairs of what it read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bilinear_lens.analysis.interactions import output_label
from bilinear_lens.analysis.paths import FrozenRun, Part
from bilinear_lens.models.directions import Output
from bilinear_lens.models.transformer import HookedBilinearTransformer
from bilinear_lens.models.vocabulary import Token
from bilinear_lens.spectrum import Spectrum


@dataclass(frozen=True, eq=False)
class Attribution:
    """`direction . mlp(x)` at one position of each prompt, with attention and norms held.

    It is the sum over eigenvectors i and parts a, b of the input of
    `value_i projections[a, i] projections[b, i]`, and of `rest`.
    """

    layer: int
    output: str
    spectrum: Spectrum
    """The top k eigenpairs of the output's interaction."""
    tokens: list[list[str]]
    """Of each prompt."""
    parts: list[Part]
    projections: Float[Tensor, "batch part k"]
    """Of each part of the input on each eigenvector; those of a prompt's padding are zero."""
    rest: Float[Tensor, " batch"]
    """What the eigenvectors beyond the top k add."""
    written: Float[Tensor, " batch"]
    """`direction . hook_out`, as the model computed it."""

    @property
    def activations(self) -> Float[Tensor, "batch k"]:
        """What each eigenvector adds: the sum of its products."""
        return self.spectrum.values * self.projections.sum(1) ** 2

    @property
    def completeness_error(self) -> float:
        """The largest difference between `written` and the sum of all parts, relative to the
        largest that was written."""
        error = self.activations.sum(-1) + self.rest - self.written
        return (error.abs().max() / self.written.abs().max()).item()

    def __repr__(self) -> str:
        title = f"What layer {self.layer} wrote along {self.output}: {len(self.tokens)} prompt(s)"
        return f"{title}; the first:\n{self.products(8).to_string(index=False)}"

    def _check_prompt(self, prompt: int) -> None:
        if not 0 <= prompt < len(self.tokens):
            raise ValueError(f"prompt={prompt} must be between 0 and {len(self.tokens) - 1}.")

    def label(self, part: Part, prompt: int = 0) -> str:
        """A part by name: `' girl' via L0H3`."""
        if part.position is None:
            token = self.tokens[prompt][-1]
            return f"{token!r} here" if part.writer == "embedding" else part.writer
        source = f"{self.tokens[prompt][part.position]!r}@{part.position}"
        if part.read == "embedding":
            return f"{source} via {part.writer}"
        return f"{part.read} at {source} via {part.writer}"

    def by_part(self, prompt: int = 0) -> pd.DataFrame:
        """What each part adds, its products with all parts summed over eigenvectors.

        Returns:
            Columns `part`, `adds`, the largest magnitude first; `adds` sums to what the
            eigenvectors write.

        Raises:
            ValueError: if there is no such prompt.
        """
        self._check_prompt(prompt)
        each, n_tokens = self.projections[prompt], len(self.tokens[prompt])
        adds = (self.spectrum.values * each * each.sum(0)).sum(1)
        order = adds.abs().argsort(descending=True).tolist()
        # the rest is padding
        order = [i for i in order if (self.parts[i].position or 0) < n_tokens]
        return pd.DataFrame(
            {
                "part": [self.label(self.parts[i], prompt) for i in order],
                "adds": adds[order].tolist(),
            }
        )

    def products(self, n: int = 20, prompt: int = 0) -> pd.DataFrame:
        """The n largest products, exactly: of an eigenvector and two parts.

        Returns:
            Columns `eigenvector`, `part_a`, `part_b`, `adds`: both orders of two parts together.

        Raises:
            ValueError: if n is less than 1, or there is no such prompt.
        """
        self._check_prompt(prompt)
        if n < 1:
            raise ValueError(f"n={n} must be at least 1.")
        each = self.projections[prompt]
        # no product among the n largest of an eigenvector has a part that ranks below n + 1
        top = each.abs().topk(min(n + 1, len(each)), dim=0).indices
        high = each.gather(0, top)
        products = self.spectrum.values * high[:, None] * high
        twice = 2 - torch.eye(len(high)).to(products)
        products = products * (twice.triu()[:, :, None])
        best = products.abs().flatten().topk(min(n, products.numel())).indices
        rows = []
        for index in best.tolist():
            first, second, i = (
                int(axis) for axis in torch.unravel_index(torch.tensor(index), products.shape)
            )
            if products[first, second, i] != 0:
                names = [self.label(self.parts[top[row, i]], prompt) for row in (first, second)]
                rows.append((i, *names, products[first, second, i].item()))
        return pd.DataFrame(rows, columns=["eigenvector", "part_a", "part_b", "adds"])


@torch.no_grad()
def attribute(
    model: HookedBilinearTransformer,
    prompts: str | Sequence[str] | Int[Tensor, "batch pos"],
    output: Output,
    *,
    layer: int,
    k: int | None = None,
    composed: bool = False,
    contrast: Token | Literal["mean"] | None = "mean",
) -> Attribution:
    """What a layer's MLP writes along an output at the end of each prompt, taken apart exactly.

    Attention patterns and norm scales are held at the prompt's values: the rest of what brings
    the input is linear, and the MLP is a product.

    Costs a run with its cache, and of each layer below the values of all heads at all positions,
    split by what they read: `composed`, by all writers, is so many times as much.

    Args:
        prompts: texts, or token ids of equal length.
        output, contrast: as for `output_direction`.
        k: eigenvectors of the output's interaction; by default all.
        composed: split what heads read by its writers (embedding, heads, MLPs); otherwise into
            the embedding, the direct path, and the rest.

    Raises:
        ValueError: if the output, layer or k is out of range, a prompt is empty or too long, or
            an activation is not finite.
    """
    tensor = model.bilinear_tensor(layer)
    direction = model.output_direction(output, contrast, layer=layer)
    whole = tensor.eigh(direction)
    spectrum = whole if k is None else whole.top(k)
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if len(prompts) == 0 or (isinstance(prompts, Tensor) and prompts.ndim != 2):
        raise ValueError("prompts must be texts, or token ids [batch, pos], and one at least.")
    if isinstance(prompts, Tensor):
        rows = list(prompts)
    else:
        rows = [model.to_tokens(text)[0] for text in prompts]
    ends = torch.tensor([len(row) - 1 for row in rows])
    run = FrozenRun(model, pad_sequence(rows, batch_first=True))
    vectors = spectrum.vectors[: spectrum.d_in]
    parts, projections = run.into_mlp(layer, ends, vectors, composed=composed)
    if spectrum.affine:
        projections[:, parts.index(Part("biases"))] += spectrum.vectors[-1]
    at = (torch.arange(len(rows)), ends)
    x, out = (run.cache[f"blocks.{layer}.mlp.hook_{end}"][at] for end in ("in", "out"))
    return Attribution(
        layer=layer,
        output=output_label(model, output, contrast),
        spectrum=spectrum,
        tokens=[[model.token_labels[token] for token in row.tolist()] for row in rows],
        parts=parts,
        projections=projections,
        rest=whole.activations(x)[:, spectrum.k :].sum(1),
        written=out @ direction,
    )
