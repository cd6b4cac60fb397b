"""The token pairs that interact most, exactly, without computing every product.

- in eigenvectors of Q, with `x = sqrt(|values|) * (vectors . e)`, the product `e_a^T Q e_b` is
  `x_a^T S x_b`, S a diagonal of signs
- it is at most the product of the first coordinates plus that of the norms of the others
  (Cauchy-Schwarz); a 16-bit dtype makes the first part cheap for all pairs, and the bound includes
  its rounding
- only pairs whose bound passes the k-th largest product found so far are computed
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bilinear_lens.basis import Basis
from bilinear_lens.spectrum import Spectrum
from bilinear_lens.tensor import BilinearTensor

ROWS, COLUMNS = 512, 4096
"""The block of pairs that is held at once."""


class Pairs(NamedTuple):
    """Pairs of tokens, the largest interaction by magnitude first."""

    first: Int[Tensor, " k"]
    second: Int[Tensor, " k"]
    """Not below `first`."""
    values: Float[Tensor, " k"]


def top_pairs(
    matrix: Float[Tensor, "d d"], tokens: Float[Tensor, "n d"], k: int, *, distinct: bool = False
) -> Pairs:
    """The k unordered pairs with the largest `|e_a^T Q e_b|`.

    Exact but for the rounding of the products themselves, which is taken to be that of float32
    (not TF32) and to grow as the root of `d`; of pairs that tie, any may be listed.
    Costs an eigendecomposition, `n d^2` products and, for each pair, 16-bit products of the
    coordinates that matter; where nothing can be left out, brute force on top. Needs memory for
    blocks of pairs and for 16-bit copies of the tokens (32-bit on processors without fast 16-bit
    products).

    Args:
        matrix: symmetric.
        distinct: only pairs of two different tokens; otherwise a token pairs with itself, too.

    Raises:
        ValueError: if `k` is not between 1 and the number of pairs.
    """
    n, d = tokens.shape
    n_pairs = n * (n - 1 if distinct else n + 1) // 2
    if not 1 <= k <= n_pairs:
        raise ValueError(f"k={k} must be between 1 and the {n_pairs} pairs there are.")
    # all products of few tokens cost less than a spectrum
    bound = _Bound.of(matrix, tokens) if n > 2 * d else None
    order = torch.arange(n, device=tokens.device) if bound is None else bound.order
    best = Pairs(order[:0], order[:0], tokens.new_zeros(0))
    for top in range(0, n, ROWS):
        mapped = None
        for left in range(top, n, COLUMNS):
            full = len(best.values) == k
            least = best.values[-1].abs().item() if full else -1.0
            survivors = bound.survivors(top, left, least) if bound and full else None
            if survivors is not None and distinct:
                apart = survivors[0] != survivors[1]
                survivors = survivors[0][apart], survivors[1][apart]
            if survivors is None:
                if mapped is None:
                    mapped = tokens[order[top : top + ROWS]] @ matrix
                products = mapped @ tokens[order[left : left + COLUMNS]].mT
                rows, columns = _largest(products, top - left + distinct, least, k)
                values = products[rows, columns]
                first, second = rows + top, columns + left
            else:
                first, second = survivors
                rows, position = first.unique(return_inverse=True)
                images = tokens[order[rows]] @ matrix
                values = (images[position] * tokens[order[second]]).sum(1)
            if len(first):
                found = zip(best, (first, second, values), strict=True)
                best = Pairs(*(torch.cat(both) for both in found))
                kept = best.values.abs().topk(min(k, len(best.values))).indices
                best = Pairs(*(each[kept] for each in best))
    ends = torch.stack([order[best.first], order[best.second]])
    first, second = ends.amin(0), ends.amax(0)
    by_token = (first * n + second).argsort()
    by_size = best.values[by_token].abs().argsort(descending=True, stable=True)
    listed = by_token[by_size]
    return Pairs(first[listed], second[listed], best.values[listed])


def top_cross_pairs(
    matrix: Float[Tensor, "d d"], first: Float[Tensor, "n d"], second: Float[Tensor, "m d"], k: int
) -> Pairs:
    """The k pairs of a row of each with the largest `|a^T Q b|`, exactly, as `top_pairs`.

    Raises:
        ValueError: if `k` is not between 1 and the number of pairs.
    """
    if not 1 <= k <= len(first) * len(second):
        raise ValueError(
            f"k={k} must be between 1 and the {len(first) * len(second)} pairs there are."
        )
    # in twice the coordinates, with Q beside the diagonal, only rows of different sources interact
    zero = torch.zeros_like(matrix)
    crossed = torch.cat([torch.cat([zero, matrix], 1), torch.cat([matrix, zero], 1)])
    pairs = top_pairs(crossed, torch.block_diag(first, second), k)
    apart = (pairs.first < len(first)) & (pairs.second >= len(first))
    found = Pairs(pairs.first[apart], pairs.second[apart] - len(first), pairs.values[apart])
    if len(found.values) == k:
        return found
    # the others are exactly zero, like those within a source
    listed = found.first * len(second) + found.second
    every = torch.arange(len(first) * len(second), device=listed.device)
    zeros = every[~torch.isin(every, listed)][: k - len(listed)]
    return Pairs(
        torch.cat([found.first, zeros // len(second)]),
        torch.cat([found.second, zeros % len(second)]),
        torch.cat([found.values, zeros.new_zeros(len(zeros)).to(found.values)]),
    )


def token_pairs(
    tensor: BilinearTensor, directions: Float[Tensor, "*n d_out"], tokens: Basis, k: int = 20
) -> pd.DataFrame:
    """The k token pairs with the largest interaction, for an output direction or each of several.

    Of an affine tensor, the part that is quadratic in the tokens.

    Args:
        tensor: such as `model.bilinear_tensor(0)`.
        directions: such as `model.output_directions([" he", " she"])`.
        tokens: such as `model.token_basis()`.

    Returns:
        Columns `direction` (its number), `token_a`, `token_b` and `interaction`, the largest
        magnitude of each direction first.

    Raises:
        ValueError: if sizes do not fit, a direction is zero, or `k` is not between 1 and the
            number of pairs.
    """
    quadratic = tensor.quadratic()
    if tokens.directions.shape[1] != tensor.d_in:
        raise ValueError(
            f"tokens have size {tokens.directions.shape[1]}; this tensor needs {tensor.d_in}."
        )
    if not directions.numel() or directions.shape[-1] != tensor.d_out:
        raise ValueError(
            f"directions have shape {list(directions.shape)}; give at least one, "
            f"[..., d_out={tensor.d_out}]."
        )
    rows = tokens.directions.to(tensor.left)
    frames = []
    for number, direction in enumerate(directions.reshape(-1, tensor.d_out)):
        pairs = top_pairs(quadratic.interaction(direction), rows, k)
        frame = labelled(pairs, tokens)
        frame.insert(0, "direction", number)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def labelled(pairs: Pairs, tokens: Basis) -> pd.DataFrame:
    """Pairs by name: columns `token_a`, `token_b` and `interaction`."""
    return pd.DataFrame(
        {
            "token_a": [tokens.labels[token] for token in pairs.first.tolist()],
            "token_b": [tokens.labels[token] for token in pairs.second.tolist()],
            "interaction": pairs.values.tolist(),
        }
    )


@dataclass(frozen=True, eq=False)
class _Bound:
    """What bounds the product of any two tokens; tokens stand in the order `order`.

    Lengths are scaled so that no token's coordinates are longer than 1.
    """

    order: Int[Tensor, " n"]
    """First the tokens that interact most in all: their pairs soon give a high k-th product."""
    coordinates: Float[Tensor, "n d"]
    signs: Float[Tensor, " d"]
    widths: list[int]
    rests: Float[Tensor, "n widths"]
    """What the first coordinates leave out, and rounding: `|product - theirs| <= r_a r_b`."""
    reach: Float[Tensor, " n"]
    """`|product| <= reach_a reach_b`."""
    scale: float

    @classmethod
    def of(cls, matrix: Float[Tensor, "d d"], tokens: Float[Tensor, "n d"]) -> "_Bound":
        n, d = tokens.shape
        dtype = _fast_dtype(tokens.device)
        unit = torch.finfo(dtype).eps / 2
        single = 4 * math.sqrt(d) * torch.finfo(torch.float32).eps  # of a product of d numbers
        spectrum = Spectrum.of(matrix.double())
        lengths = torch.linalg.vector_norm(tokens, dim=1)
        largest = spectrum.values[0].abs().item() or 1.0
        longest = 2.0 ** math.frexp(lengths.max().item())[1]  # a power of two divides exactly
        roots = (spectrum.values.abs() / largest).sqrt()
        exact = max(1, d // 8)  # these hold most of the tokens: 32 bits for what makes them
        projection = spectrum.vectors * roots
        first, others = projection[:, :exact].float(), projection[:, exact:].to(dtype)
        lost = (projection - torch.cat([first.double(), others.double()], dim=1)).float()
        # weights and tokens in `dtype`; a spectral norm is at most the root of the Gram matrix's
        error = (lost.mT @ lost).double().norm().sqrt() + single * roots.norm()
        error = error.item() + unit * roots[exact : exact + 1].sum().item()

        widths = sorted({math.ceil(d * i / 32) for i in range(1, 33)})
        left_out = torch.arange(d, device=tokens.device)[:, None] >= lengths.new_tensor(
            [0, *widths]
        )
        weights = torch.cat([roots.square()[:, None], left_out], dim=1).float()
        coordinates = torch.empty(n, d, dtype=dtype, device=tokens.device)
        sums = torch.empty(n, weights.shape[1], device=tokens.device)
        for start in range(0, n, COLUMNS):
            block = slice(start, start + COLUMNS)
            coordinates[block, :exact] = tokens[block].float() @ (first / longest)
            coordinates[block, exact:] = tokens[block].to(dtype) @ (others / longest)
            sums[block] = coordinates[block].float().square() @ weights

        order = sums[:, 0].argsort(descending=True)
        squares, tails = sums[order, 1], sums[order, 2:]
        size = squares.sqrt()
        # a token's coordinates are off by `off`: by rounding of themselves and of what made them
        off = 1.01 * (unit * size + error * (lengths[order] / longest).float())
        share = (off.sum() / size.sum().clamp(min=1e-30)).clamp(1e-6, 1)
        # off_a size_b + size_a off_b + off_a off_b <= r_a r_b, again by Cauchy-Schwarz
        rounding = (4 * unit + single + share) * squares + (1 / share + 1) * off.square()
        return cls(
            order=order,
            coordinates=coordinates[order],
            signs=spectrum.values.sign().to(dtype),
            widths=widths,
            rests=((1 + single) * tails + rounding[:, None]).sqrt(),
            reach=size + off,
            scale=longest**2 * largest,
        )

    def survivors(
        self, top: int, left: int, least: float
    ) -> tuple[Int[Tensor, " hits"], Int[Tensor, " hits"]] | None:
        """The pairs of a block that can exceed `least`; None if they are too many to list."""
        least /= self.scale
        rows, columns = slice(top, top + ROWS), slice(left, left + COLUMNS)
        if self.reach[rows].max() * self.reach[columns].max() <= least:
            return self.order[:0], self.order[:0]
        # with fewer coordinates too many pairs pass, with more the products cost too much
        last = len(self.widths) - 1
        narrow = int((self.typical_rests.square() > 0.55 * least).sum())
        narrow = last if narrow > last // 2 else narrow
        for width in sorted({narrow, last}):
            hits = self._passing(rows, columns, width, least)
            if hits is not None:
                return self._passing_in_full(*hits, least)
        return None

    @cached_property
    def typical_rests(self) -> Float[Tensor, " widths"]:
        return self.rests.median(dim=0).values

    def _passing(
        self, rows: slice, columns: slice, width: int, least: float
    ) -> tuple[Int[Tensor, " hits"], Int[Tensor, " hits"]] | None:
        """The block's pairs whose bound from the first coordinates reaches `least`."""
        used = slice(self.widths[width])
        left = self.coordinates[rows, used] * self.signs[used]
        products = (left @ self.coordinates[columns, used].mT).abs_()
        rests, others = self.rests[rows, width], self.rests[columns, width]
        needed = least - rests * others.max()
        near = (products.amax(1) >= needed).nonzero()[:, 0]
        row, second = (products[near] >= needed[near, None].to(products)).nonzero().unbind(1)
        first = near[row]
        if len(first) > products.numel() // 256:  # then all products of the block cost less
            return None
        passing = products[first, second] >= least - rests[first] * others[second]
        first, second = first[passing] + rows.start, second[passing] + columns.start
        return first[first <= second], second[first <= second]

    def _passing_in_full(
        self, first: Int[Tensor, " hits"], second: Int[Tensor, " hits"], least: float
    ) -> tuple[Int[Tensor, " passing"], Int[Tensor, " passing"]]:
        """Those of some pairs whose bound from all coordinates reaches `least`."""
        left, right = (self.coordinates.index_select(0, tokens) for tokens in (first, second))
        products = ((left * right) @ self.signs).abs()
        passing = products >= least - self.rests[first, -1] * self.rests[second, -1]
        return first[passing], second[passing]


def _fast_dtype(device: torch.device) -> torch.dtype:
    """The dtype of which products are cheapest, of those with the range of float32."""
    slow = device.type == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability()
    return torch.float32 if slow else torch.bfloat16


def _largest(
    products: Float[Tensor, "rows columns"], diagonal: int, least: float, k: int
) -> tuple[Int[Tensor, " hits"], Int[Tensor, " hits"]]:
    """Where products on or above `diagonal` exceed `least`: the k largest, and those that tie."""
    magnitudes = products.abs()
    inside = (magnitudes > least).triu_(diagonal)
    if inside.sum() > k:
        magnitudes.masked_fill_(~inside, -1)
        inside = magnitudes >= magnitudes.flatten().topk(k).values[-1]
    rows, columns = inside.nonzero().unbind(1)
    return rows, columns
