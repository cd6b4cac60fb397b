"""BilinearTensor: what a bilinear layer computes, as a third-order tensor kept in its factors.

- B[o, i, j] = sum_r down[o, r] left[r, i] right[r, j], symmetrised in i and j
- contract it with an output direction: a symmetric interaction matrix, and its eigenvectors
- inner products, norms and the HOSVD go through rank x rank Gram matrices
- biases are exact: the input gains one last coordinate, which is always 1
- only `to_dense` builds the tensor itself
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from bilinear_lens.basis import Basis
from bilinear_lens.eigensolver import Eigensolver, TooLittleMemory
from bilinear_lens.spectrum import Spectrum, coordinates


class OutputModes(NamedTuple):
    """Output directions of a tensor, by the share of it that they carry."""

    singular_values: Float[Tensor, " k"]
    directions: Float[Tensor, "k d_out"]
    """Orthonormal rows."""


@dataclass(frozen=True, eq=False)
class BilinearTensor:
    """The symmetric third-order tensor of a bilinear layer (arXiv 2410.08417, section 3).

    16-bit factors are upcast to float32: eigenvectors need it.

    Args:
        left: the gate's weights; TransformerLens's `W_gate.mT`.
        right: the other input weights; TransformerLens's `W_in.mT`.
        down: the output weights; TransformerLens's `W_out.mT`.
        affine: whether the last input coordinate is a constant 1, which the caller does not pass.

    Raises:
        ValueError: if the shapes do not fit each other, or a factor is not finite.
    """

    left: Float[Tensor, "rank coords"]
    right: Float[Tensor, "rank coords"]
    down: Float[Tensor, "d_out rank"]
    affine: bool = False

    def __post_init__(self) -> None:
        shapes = {name: tuple(getattr(self, name).shape) for name in ("left", "right", "down")}
        if (
            any(len(shape) != 2 for shape in shapes.values())
            or shapes["left"] != shapes["right"]
            or shapes["down"][1] != shapes["left"][0]
        ):
            given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise ValueError(
                f"{given} must be [rank, d_in], [rank, d_in] and [d_out, rank]. TransformerLens "
                "stores weights as [in, out]: pass W_gate.mT, W_in.mT and W_out.mT."
            )
        dtypes = {getattr(self, name).dtype for name in shapes}
        if len(dtypes) > 1:
            raise ValueError(f"The factors have dtypes {sorted(map(str, dtypes))}: give one dtype.")
        for name in shapes:
            factor = getattr(self, name)
            if not factor.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinite weights: reload or repair them.")
            if factor.dtype in (torch.float16, torch.bfloat16):
                object.__setattr__(self, name, factor.float())

    @classmethod
    def with_biases(
        cls,
        left: Float[Tensor, "rank d_in"],
        right: Float[Tensor, "rank d_in"],
        down: Float[Tensor, "d_out rank"],
        *,
        left_bias: Float[Tensor, " rank"] | None = None,
        right_bias: Float[Tensor, " rank"] | None = None,
        down_bias: Float[Tensor, " d_out"] | None = None,
    ) -> "BilinearTensor":
        """The exact tensor of `down @ ((left @ x + left_bias) * (right @ x + right_bias)) + ...`.

        Without any bias it is the plain tensor; with one, the input gains a constant coordinate.

        Raises:
            ValueError: as the constructor, or if a bias has another size than its weights.
        """
        plain = cls(left, right, down)
        biases = {"left": left_bias, "right": right_bias, "down": down_bias}
        for name, bias in biases.items():
            if bias is not None and bias.shape != getattr(plain, name).shape[:1]:
                raise ValueError(
                    f"{name}_bias has shape {list(bias.shape)}; {name} needs "
                    f"[{len(getattr(plain, name))}]."
                )
        if left_bias is None and right_bias is None and down_bias is None:
            return plain
        zero = left.new_zeros(len(left))
        left = torch.cat([left, (zero if left_bias is None else left_bias)[:, None]], dim=1)
        right = torch.cat([right, (zero if right_bias is None else right_bias)[:, None]], dim=1)
        if down_bias is not None:  # one more rank: the constant times the constant
            constant = torch.eye(left.shape[1], dtype=left.dtype, device=left.device)[-1:]
            left, right = torch.cat([left, constant]), torch.cat([right, constant])
            down = torch.cat([down, down_bias[:, None]], dim=1)
        return cls(left, right, down, affine=True)

    def with_linear(self, weight: Float[Tensor, "{self.d_out} {self.d_in}"]) -> "BilinearTensor":
        """The exact tensor of `B(x) + weight @ x`, such as a layer with its residual connection.

        Each row of `weight` times the constant coordinate, which a tensor without biases gains.

        Raises:
            ValueError: if `weight` has another shape than `[d_out, d_in]`.
        """
        if weight.shape != (self.d_out, self.d_in):
            raise ValueError(
                f"weight has shape {list(weight.shape)}; it must be [{self.d_out}, {self.d_in}]."
            )
        left, right = self.left, self.right
        if not self.affine:
            left, right = (torch.cat([w, w.new_zeros(self.rank, 1)], dim=1) for w in (left, right))
        rows = torch.cat([weight.to(left), left.new_zeros(self.d_out, 1)], dim=1)
        constant = torch.zeros_like(rows)
        constant[:, -1] = 1
        outputs = torch.eye(self.d_out, dtype=left.dtype, device=left.device)
        return BilinearTensor(
            torch.cat([left, rows]),
            torch.cat([right, constant]),
            torch.cat([self.down, outputs], dim=1),
            affine=True,
        )

    def double(self) -> "BilinearTensor":
        """The same tensor in float64, for differences and Gram matrices that lose digits."""
        left, right, down = (w.double() for w in (self.left, self.right, self.down))
        return BilinearTensor(left, right, down, self.affine)

    def quadratic(self) -> "BilinearTensor":
        """The part that is quadratic in the input: without biases and what `with_linear` added."""
        return BilinearTensor(self.left[:, : self.d_in], self.right[:, : self.d_in], self.down)

    @property
    def d_in(self) -> int:
        """Size of the input that the caller passes."""
        return self.left.shape[1] - self.affine

    @property
    def d_out(self) -> int:
        return self.down.shape[0]

    @property
    def rank(self) -> int:
        return self.left.shape[0]

    def __repr__(self) -> str:
        biases = ", affine" * self.affine
        return f"BilinearTensor(d_out={self.d_out}, d_in={self.d_in}, rank={self.rank}{biases})"

    def __call__(self, x: Float[Tensor, "*batch {self.d_in}"]) -> Float[Tensor, "*batch d_out"]:
        """What the layer writes for the input `x`.

        Raises:
            ValueError: if `x` has another size than `d_in`.
        """
        x = coordinates(x.to(self.left.dtype), self.d_in, self.affine)
        return ((x @ self.left.mT) * (x @ self.right.mT)) @ self.down.mT

    def __add__(self, other: "BilinearTensor") -> "BilinearTensor":
        """The tensor whose output is the sum of both outputs."""
        self._check_same_space(other)
        return BilinearTensor(
            torch.cat([self.left, other.left]),
            torch.cat([self.right, other.right]),
            torch.cat([self.down, other.down], dim=1),
            self.affine,
        )

    def __mul__(self, factor: float | int) -> "BilinearTensor":
        return BilinearTensor(self.left, self.right, self.down * factor, self.affine)

    __rmul__ = __mul__

    def interaction(
        self, direction: Float[Tensor, "*batch {self.d_out}"] | int
    ) -> Float[Tensor, "*batch coords coords"]:
        """The symmetric matrix `Q` with `direction . B(x) = x^T Q x`.

        An affine layer's is one larger than `d_in`: the last row and column are the constant's.

        Args:
            direction: output directions, or the number of one output coordinate.

        Raises:
            ValueError: if a direction has another size than `d_out`, is zero or is not finite.
        """
        weight = self._direction(direction) @ self.down
        half = (self.left.mT * weight[..., None, :]) @ self.right
        return (half + half.mT) / 2

    def eigh(
        self,
        direction: Float[Tensor, "*batch {self.d_out}"] | int,
        k: int | None = None,
        *,
        tol: float = 1e-5,
        memory: int | None = None,
    ) -> Spectrum:
        """Eigenvalues and eigenvectors of the interaction that writes to `direction`.

        A few pairs of many wide interactions come from an iteration, all others from a dense
        decomposition: see `eigensolver`. Not differentiable.

        Args:
            direction: output directions, or the number of one output coordinate.
            k: how many pairs, largest magnitude first; None gives all that can differ from zero.
            tol: the largest residual of a pair that an iteration may return.
            memory: bytes of working space, beside the tensor and the result; by default 1 GiB,
                and more where one direction needs it.

        Raises:
            ValueError: as `interaction`, if `k` is not in 1..d_in (one more with biases), or if
                `memory` is given and too little for one direction.
        """
        coords = self.left.shape[1]
        if k is not None and not 1 <= k <= coords:
            raise ValueError(f"k={k} must be between 1 and the {coords} coordinates of the input.")
        directions = self._direction(direction)
        batch = directions.shape[:-1]
        n_pairs = min(2 * self.rank, coords) if k is None else k
        solver = self.eigensolver(n_pairs, n=batch.numel(), tol=tol, memory=memory)
        spectrum = solver(directions.reshape(-1, self.d_out))
        return Spectrum(
            spectrum.values.view(*batch, n_pairs),
            spectrum.vectors.view(*batch, coords, n_pairs),
            self.affine,
            None if spectrum.residuals is None else spectrum.residuals.view(*batch, n_pairs),
        )

    def eigensolver(
        self, k: int, *, n: int, tol: float = 1e-5, memory: int | None = None
    ) -> Eigensolver:
        """What `eigh` calls, with what it computes once for all directions.

        Args:
            n: how many directions there will be; they may come in parts.
        """

        def solver(memory: int) -> Eigensolver:
            return Eigensolver(
                self.left,
                self.right,
                self.down,
                affine=self.affine,
                gram=lambda: self.double().output_gram(),
                n=n,
                k=k,
                tol=tol,
                memory=memory,
            )

        if memory is not None:
            return solver(memory)
        try:
            return solver(2**30)
        except TooLittleMemory as error:
            return solver(error.needed)

    def change_basis(
        self,
        *,
        inputs: Float[Tensor, "n {self.d_in}"] | Basis | None = None,
        outputs: Float[Tensor, "m {self.d_out}"] | Basis | None = None,
    ) -> "BilinearTensor":
        """The tensor between other coordinates.

        Args:
            inputs: a direction for each new input coordinate: `x = sum_a y[a] inputs[a]`.
            outputs: a direction for each new output coordinate: `out[b] = outputs[b] . B(x)`.

        Raises:
            ValueError: if directions have another size than `d_in` or `d_out`.
        """
        left, right, down = self.left, self.right, self.down
        if inputs is not None:
            rows = _rows(inputs, self.d_in, "inputs", "d_in").to(left)
            if self.affine:
                rows = torch.block_diag(rows, rows.new_ones(1, 1))
            left, right = left @ rows.mT, right @ rows.mT
        if outputs is not None:
            down = _rows(outputs, self.d_out, "outputs", "d_out").to(down) @ down
        return BilinearTensor(left, right, down, self.affine)

    def inner(self, other: "BilinearTensor") -> Float[Tensor, ""]:
        """The sum over all entries of the product of both tensors, without building either."""
        self._check_same_space(other)
        return ((self.down.mT @ other.down) * self._factor_gram(other)).sum()

    def norm(self) -> Float[Tensor, ""]:
        """The Frobenius norm of the tensor."""
        return self.inner(self).clamp(min=0).sqrt()

    def similarity(self, other: "BilinearTensor") -> Float[Tensor, ""]:
        """The cosine between both tensors: 1 for equal functions, whatever their factors.

        Raises:
            ValueError: if the spaces differ, or a tensor is zero.
        """
        norms = self.norm() * other.norm()
        if norms == 0:
            raise ValueError("The similarity to a zero tensor is not defined.")
        return self.inner(other) / norms

    def output_gram(self, other: "BilinearTensor | None" = None) -> Float[Tensor, "d_out others"]:
        """Inner products `tr(A_o B_p)` between the interactions of the output coordinates.

        Args:
            other: a tensor of the same inputs, for the columns; by default this one.

        Raises:
            ValueError: if the inputs differ.
        """
        other = self if other is None else other
        self._check_same_space(other, outputs=False)
        gram = self.down.new_zeros(self.d_out, other.d_out)
        block = max(1, 2**20 // other.rank)  # of the rank x rank products
        for start in range(0, self.rank, block):
            rows = slice(start, start + block)
            part = BilinearTensor(
                self.left[rows], self.right[rows], self.down[:, rows], self.affine
            )
            gram += part.down @ (part._factor_gram(other) @ other.down.mT)
        return gram

    def input_gram(
        self, outputs: Float[Tensor, "{self.d_out} {self.d_out}"] | None = None
    ) -> Float[Tensor, "coords coords"]:
        """`sum over o, p, j of B[o, i, j] outputs[o, p] B[p, k, j]`: what each input carries.

        Its leading eigenvectors are the input modes of the HOSVD.

        Args:
            outputs: a symmetric metric of the output coordinates; by default the identity.

        Raises:
            ValueError: if `outputs` has another shape than `[d_out, d_out]`.
        """
        if outputs is not None and outputs.shape != (self.d_out, self.d_out):
            raise ValueError(
                f"outputs has shape {list(outputs.shape)}; it must be [{self.d_out}, {self.d_out}]."
            )
        metric = self.down if outputs is None else outputs.to(self.down) @ self.down
        weight = self.down.mT @ metric
        half = (
            self.left.mT @ (weight * (self.right @ self.right.mT)) @ self.left
            + self.right.mT @ (weight * (self.left @ self.left.mT)) @ self.right
            + self.left.mT @ (weight * (self.right @ self.left.mT)) @ self.right
            + self.right.mT @ (weight * (self.left @ self.right.mT)) @ self.left
        )
        return (half + half.mT) / 8

    def hosvd(self, k: int | None = None) -> OutputModes:
        """Left singular vectors of the tensor flattened to `[d_out, d_in^2]`.

        The interaction of the first direction has the largest norm that any unit direction's
        can have, and so on (arXiv 2410.08417, appendix D).

        Raises:
            ValueError: if `k` is not in 1..d_out.
        """
        if k is not None and not 1 <= k <= self.d_out:
            raise ValueError(f"k={k} must be between 1 and d_out={self.d_out}.")
        # Singular values are roots of the Gram matrix's eigenvalues, which costs half the digits.
        modes = Spectrum.of(self.double().output_gram())
        values, directions = modes.values.clamp(min=0).sqrt(), modes.vectors.mT
        return OutputModes(values[:k].to(self.down), directions[:k].to(self.down))

    def to_dense(self) -> Float[Tensor, "d_out coords coords"]:
        """The tensor itself: `d_out * d_in^2` numbers. For small layers and tests."""
        half = einsum(self.down, self.left, self.right, "out r, r in1, r in2 -> out in1 in2")
        return (half + half.mT) / 2

    def _factor_gram(self, other: "BilinearTensor") -> Float[Tensor, "rank other_rank"]:
        """Inner products between the symmetrised rank-one terms of both tensors."""
        parallel = (self.left @ other.left.mT) * (self.right @ other.right.mT)
        crossed = (self.left @ other.right.mT) * (self.right @ other.left.mT)
        return (parallel + crossed) / 2

    def _check_same_space(self, other: "BilinearTensor", *, outputs: bool = True) -> None:
        mine, theirs = (
            (t.d_in, t.d_out, "with biases" if t.affine else "without biases", t.left.dtype)
            for t in (self, other)
        )
        if mine[::2] != theirs[::2] or mine[3] != theirs[3] or (outputs and mine != theirs):
            raise ValueError(
                f"Both tensors need the same (d_in, d_out), dtype, and both biases or none: {mine} "
                f"and {theirs}. Bring one to the other's coordinates with change_basis."
            )

    def _direction(self, direction: Tensor | int) -> Tensor:
        if isinstance(direction, int):
            if not 0 <= direction < self.d_out:
                raise ValueError(f"Output {direction} must be between 0 and {self.d_out - 1}.")
            return torch.eye(self.d_out, dtype=self.down.dtype, device=self.down.device)[direction]
        if direction.shape[-1:] != (self.d_out,):
            raise ValueError(
                f"direction has shape {list(direction.shape)}; its last axis must be "
                f"d_out={self.d_out}."
            )
        if not direction.isfinite().all():
            raise ValueError("direction holds NaN or infinite entries.")
        if not direction.any(dim=-1).all():
            raise ValueError("direction is zero: nothing can be written along it.")
        return direction.to(self.down)


def _rows(directions: Tensor | Basis, size: int, name: str, axis: str) -> Tensor:
    rows = directions.directions if isinstance(directions, Basis) else directions
    if rows.ndim != 2 or rows.shape[1] != size:
        raise ValueError(
            f"{name} has shape {list(rows.shape)}; it needs a row of size {axis}={size} for each "
            "new coordinate."
        )
    return rows
