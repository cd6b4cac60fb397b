"""Interaction tables: which input tokens a layer listens for when it writes to an output."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import combinations
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from bilinear_lens.analysis.pairs import Pairs, labelled, top_cross_pairs, top_pairs
from bilinear_lens.analysis.sources import join, source_basis
from bilinear_lens.basis import Basis
from bilinear_lens.models.directions import Output
from bilinear_lens.models.transformer import HookedBilinearTransformer
from bilinear_lens.models.vocabulary import Token
from bilinear_lens.spectrum import Spectrum
from bilinear_lens.tensor import BilinearTensor


@dataclass(frozen=True, eq=False)
class InteractionTable:
    """The top eigenvectors of an interaction, read in a basis of labelled input directions."""

    model: str
    layer: int
    output: str
    """What is written, such as `' girl' - mean`."""
    direction: Float[Tensor, " d_out"]
    interaction: Float[Tensor, "coords coords"]
    """The symmetric matrix Q with `direction . mlp(x) = x^T Q x`."""
    spectrum: Spectrum
    """Its top k eigenpairs, each signed so that the largest projection of a token is positive."""
    tokens: Basis
    """What the eigenvectors are read in: token directions, or those of the `sources`."""
    n_tokens: int
    """How many tokens are listed at each end of an eigenvector."""
    effective_rank: float
    """Of the whole spectrum, not of the k pairs."""
    random_effective_rank: float
    """The same for Gaussian factors of the same shape."""
    random_top_share: float
    sources: tuple[int, ...] = ()
    """How many of `tokens` are of each source; none if they are the tokens alone."""

    @property
    def shares(self) -> Float[Tensor, " k"]:
        """Each eigenvector's share of `||Q||_F^2`, with the sign of its eigenvalue."""
        values = self.spectrum.values
        return values.sign() * values**2 / self.interaction.square().sum()

    @property
    def top_share(self) -> float:
        """The share of `||Q||_F^2` that the k eigenvectors hold together."""
        return self.shares.abs().sum().item()

    def to_pandas(self) -> pd.DataFrame:
        """A row for each listed token: eigenvector, value, share, end, token and what it adds.

        End "+" lists the largest values of `projection` = v . e, end "-" the smallest;
        `contribution` is `value * projection^2`, what the token alone makes the layer write along
        the direction.
        """
        projections = self.spectrum.projections(self.tokens.directions)
        contributions = self.spectrum.activations(self.tokens.directions)
        rows = []
        for i, (value, share) in enumerate(
            zip(self.spectrum.values.tolist(), self.shares.tolist(), strict=True)
        ):
            for end, largest in (("+", True), ("-", False)):
                tokens = projections[:, i].topk(self.n_tokens, largest=largest).indices
                for token in tokens.tolist():
                    rows.append(
                        {
                            "eigenvector": i,
                            "value": value,
                            "share": share,
                            "end": end,
                            "token": self.tokens.labels[token],
                            "token_id": token,
                            "projection": projections[token, i].item(),
                            "contribution": contributions[token, i].item(),
                        }
                    )
        return pd.DataFrame(rows)

    def pairs(self, k: int = 20) -> pd.DataFrame:
        """The token pairs with the largest interaction `e_a^T Q e_b` by magnitude, exactly.

        Each unordered pair stands once; a pair of different tokens adds its interaction twice when
        the input is their sum. Of a layer with biases, it is the part quadratic in the tokens.
        Of a table of several sources, pairs are of two different ones.
        `pairs.top_pairs` says what that costs.

        Raises:
            ValueError: if `k` is not between 1 and the number of pairs (of two sources).
        """
        tokens = self.tokens.directions
        matrix = self.interaction[: tokens.shape[1], : tokens.shape[1]]
        if len(self.sources) < 2:
            return labelled(top_pairs(matrix, tokens, k), self.tokens)
        starts = [sum(self.sources[:i]) for i in range(len(self.sources))]
        parts = zip(starts, tokens.split(self.sources), strict=True)
        found = []
        for (start, first), (other, second) in combinations(parts, 2):
            pairs = top_cross_pairs(matrix, first, second, k)
            found.append(Pairs(pairs.first + start, pairs.second + other, pairs.values))
        pairs = Pairs(*map(torch.cat, zip(*found, strict=True)))
        top = pairs.values.abs().topk(k).indices
        return labelled(Pairs(*(each[top] for each in pairs)), self.tokens)

    @property
    def header(self) -> str:
        """Where the table comes from, and how concentrated its spectrum is."""
        return (
            f"{self.output}, written by layer {self.layer} of {self.model}: effective rank "
            f"{self.effective_rank:.1f} (random {self.random_effective_rank:.1f}), top "
            f"{self.spectrum.k} hold {self.top_share:.0%} (random {self.random_top_share:.0%})"
        )

    def _summary(self, n_tokens: int) -> pd.DataFrame:
        """A row for each eigenvector, its first tokens in one cell for each end."""
        listed = self.to_pandas().groupby(["eigenvector", "end"]).head(n_tokens)
        shown = str if self.sources else repr  # the labels of sources have their quotes
        cells = listed.groupby(["eigenvector", "end"])["token"].agg(
            lambda tokens: (", " if self.sources else " ").join(map(shown, tokens))
        )
        return pd.DataFrame(
            {
                "eigenvalue": [f"{value:+.3g}" for value in self.spectrum.values.tolist()],
                "share": [f"{share:+.1%}" for share in self.shares.tolist()],
                "+ end": cells.xs("+", level="end").tolist(),
                "- end": cells.xs("-", level="end").tolist(),
            }
        )

    def __repr__(self) -> str:
        summary = self._summary(min(5, self.n_tokens))
        return f"{self.header}\n{summary.to_string(max_colwidth=64, justify='left')}"

    def _repr_html_(self) -> str:
        table = self._summary(self.n_tokens).to_html(escape=True, border=0, justify="left")
        return f"<p>{escape(self.header)}</p>{table}"


def interactions(
    model: HookedBilinearTransformer,
    output: Output,
    *,
    layer: int,
    k: int = 8,
    n_tokens: int = 10,
    contrast: Token | Literal["mean"] | None = "mean",
    sources: Sequence[str] = (),
) -> InteractionTable:
    """Read from the weights what layer `layer` listens for when it writes to an output.

    Args:
        output: a token, a pair of tokens (the first against the second) or a direction, as in
            `output_direction`, like `contrast`.
        k: how many eigenvectors.
        n_tokens: how many tokens at each end of each eigenvector.
        sources: read the eigenvectors in what reaches the layer by these ways, `["embedding",
            "L0H3"]`, and not in the tokens alone; see `source_basis`.

    Raises:
        ValueError: if the output, layer or a source is unknown, or k or n_tokens is out of range.
    """
    if isinstance(sources, str) or not all(isinstance(each, str) for each in sources):
        raise ValueError(f"sources={sources!r} must be a list of names: ['embedding', 'L0H3'].")
    tensor = model.bilinear_tensor(layer)
    direction = model.output_direction(output, contrast, layer=layer)
    bases = [source_basis(model, source, layer=layer) for source in sources]
    tokens = join(bases) if bases else model.token_basis()
    if not 1 <= n_tokens <= len(tokens):
        raise ValueError(f"n_tokens={n_tokens} must be between 1 and {len(tokens)}.")
    if not 1 <= k <= tensor.d_in:
        raise ValueError(f"k={k} must be between 1 and d_in={tensor.d_in}.")
    whole = tensor.eigh(direction)
    if k > whole.k:  # the pairs beyond have eigenvalue zero
        whole = tensor.eigh(direction, k)
    if not whole.values.any():
        raise ValueError(
            f"Layer {layer} writes nothing along this direction: its weights are zero."
        )
    random = [random_spectrum(tensor, seed=seed) for seed in range(3)]
    return InteractionTable(
        model=model.cfg.model_name,
        layer=layer,
        output=output_label(model, output, contrast),
        direction=direction,
        interaction=tensor.interaction(direction),
        spectrum=whole.top(k).oriented(tokens.directions),
        tokens=tokens,
        n_tokens=n_tokens,
        effective_rank=whole.effective_rank().item(),
        random_effective_rank=sum(r.effective_rank().item() for r in random) / len(random),
        random_top_share=sum(
            (r.values[:k].square().sum() / r.values.square().sum()).item() for r in random
        )
        / len(random),
        sources=tuple(map(len, bases)),
    )


def random_spectrum(tensor: BilinearTensor, *, seed: int, norm: float = 1.0) -> Spectrum:
    """The control for a spectrum: that of an output of Gaussian factors of the same shape.

    Args:
        norm: the Frobenius norm to scale the interaction to.
    """
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(2, *tensor.left.shape, generator=generator).to(tensor.left)
    down = torch.randn(1, tensor.rank, generator=generator).to(tensor.left)
    spectrum = BilinearTensor(left, right, down, tensor.affine).eigh(0)
    return Spectrum(
        spectrum.values * (norm / spectrum.values.norm()), spectrum.vectors, tensor.affine
    )


def output_label(
    model: HookedBilinearTransformer, output: Output, contrast: Token | Literal["mean"] | None
) -> str:
    """What an output is called in tables and pictures."""

    def name(token: Token) -> str:
        return repr(model.token_labels[model.token_id(token)])

    if isinstance(output, Tensor):
        return "a direction"
    if isinstance(output, tuple):
        return f"{name(output[0])} - {name(output[1])}"
    if contrast is None:
        return name(output)
    return f"{name(output)} - {'mean' if contrast == 'mean' else name(contrast)}"
