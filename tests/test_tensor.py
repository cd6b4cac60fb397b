"""The algebra against a dense oracle, and its laws, each with a control that can fail."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, einsum

from bilinear_lens import Basis, BilinearTensor

N_IN, N_OUT, RANK = 5, 3, 7


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_tensor(seed: int = 0, *, rank: int = RANK, affine: bool = False) -> BilinearTensor:
    left, right = normal(seed, 2, rank, N_IN)
    down = normal(seed + 1, N_OUT, rank)
    if not affine:
        return BilinearTensor(left, right, down)
    left_bias, right_bias = normal(seed + 2, 2, rank)
    return BilinearTensor.with_biases(
        left,
        right,
        down,
        left_bias=left_bias,
        right_bias=right_bias,
        down_bias=normal(seed + 3, N_OUT),
    )


def oracle(tensor: BilinearTensor) -> Tensor:
    """The tensor by its definition: one product at a time."""
    dense = einsum("or,ri,rj->oij", tensor.down, tensor.left, tensor.right)
    return (dense + dense.transpose(1, 2)) / 2


tensors = st.builds(
    a_tensor,
    st.integers(0, 10_000),
    rank=st.sampled_from([1, 2, RANK]),  # 1 and 2: the path in the span of the factors
    affine=st.booleans(),
)
checked = settings(max_examples=25, deadline=None)


@checked
@given(tensors)
def test_to_dense_is_the_definition(tensor):
    torch.testing.assert_close(tensor.to_dense(), oracle(tensor))
    assert not torch.allclose(oracle(tensor), einsum("or,ri,rj->oij", *factors(tensor)))


def factors(tensor: BilinearTensor) -> tuple[Tensor, Tensor, Tensor]:
    return tensor.down, tensor.left, tensor.right


@checked
@given(tensors)
def test_a_call_is_a_contraction_with_the_input_twice(tensor):
    x = normal(9, 2, 11, N_IN)
    full = torch.cat([x, torch.ones(2, 11, 1, dtype=x.dtype)], -1) if tensor.affine else x
    torch.testing.assert_close(
        tensor(x), einsum("oij,abi,abj->abo", oracle(tensor), full, full), atol=1e-9, rtol=1e-9
    )


@checked
@given(tensors)
def test_interactions_are_contractions_batched_over_directions(tensor):
    directions = normal(9, 2, 4, N_OUT)
    expected = einsum("abo,oij->abij", directions, oracle(tensor))
    torch.testing.assert_close(tensor.interaction(directions), expected)
    torch.testing.assert_close(tensor.interaction(2), oracle(tensor)[2])


@checked
@given(tensors)
def test_eigenpairs_are_those_of_the_dense_interaction(tensor):
    directions = normal(9, 2, N_OUT)
    spectrum = tensor.eigh(directions)
    expected = torch.linalg.eigvalsh(einsum("ao,oij->aij", directions, oracle(tensor)))
    order = expected.abs().argsort(-1, descending=True)[:, : spectrum.k]
    torch.testing.assert_close(
        spectrum.values.abs(), expected.gather(-1, order).abs(), atol=1e-9, rtol=1e-9
    )
    torch.testing.assert_close(
        spectrum.matrix(), tensor.interaction(directions), atol=1e-9, rtol=1e-9
    )
    gram = spectrum.vectors.mT @ spectrum.vectors
    torch.testing.assert_close(gram, torch.eye(spectrum.k, dtype=gram.dtype).expand_as(gram))


@checked
@given(tensors)
def test_what_a_layer_writes_is_the_sum_of_its_eigenvectors_activations(tensor):
    x, direction = normal(9, 11, N_IN), normal(8, N_OUT)
    spectrum = tensor.eigh(direction)
    written = tensor(x) @ direction
    activations = spectrum.activations(x)
    torch.testing.assert_close(activations.sum(-1), written, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(activations[:, 1:].sum(-1), written)


def test_activations_keep_batches_of_directions_apart():
    tensor, directions, x = a_tensor(affine=True), normal(9, 2, 4, N_OUT), normal(8, 11, N_IN)
    activations = tensor.eigh(directions, k=2).activations(x)
    assert activations.shape == (11, 2, 4, 2)
    torch.testing.assert_close(
        activations[:, 1, 3], tensor.eigh(directions[1, 3], k=2).activations(x)
    )


@pytest.mark.parametrize("affine", [False, True])
def test_doubling_the_input(affine):
    tensor, x = a_tensor(affine=affine), normal(9, 11, N_IN)
    quadratic = torch.allclose(tensor(2 * x), 4 * tensor(x))
    assert quadratic == (not affine)  # biases add a linear and a constant part


def test_left_and_right_may_be_swapped_and_left_and_down_not():
    tensor, x = a_tensor(), normal(9, 11, N_IN)
    swapped = BilinearTensor(tensor.right, tensor.left, tensor.down)
    torch.testing.assert_close(swapped(x), tensor(x))
    torch.testing.assert_close(swapped.to_dense(), tensor.to_dense())
    doubled = BilinearTensor(tensor.left, tensor.left, tensor.down)
    assert not torch.allclose(doubled(x), tensor(x))


def test_an_orthogonal_change_of_basis_keeps_eigenvalues_and_another_does_not():
    tensor, direction = a_tensor(), normal(9, N_OUT)
    rotation = torch.linalg.qr(normal(8, N_IN, N_IN)).Q
    values = tensor.eigh(direction).values
    torch.testing.assert_close(tensor.change_basis(inputs=rotation).eigh(direction).values, values)
    sheared = tensor.change_basis(inputs=normal(7, N_IN, N_IN)).eigh(direction).values
    assert not torch.allclose(sheared, values)


@checked
@given(tensors)
def test_a_change_of_basis_is_two_contractions(tensor):
    inputs, outputs = normal(9, 4, N_IN), normal(8, 2, N_OUT)
    changed = tensor.change_basis(inputs=inputs, outputs=Basis(outputs, ["a", "b"]))
    y = normal(7, 11, 4)
    assert (changed.d_in, changed.d_out) == (4, 2)
    torch.testing.assert_close(changed(y), tensor(y @ inputs) @ outputs.mT, atol=1e-8, rtol=1e-8)


@checked
@given(st.booleans(), st.integers(0, 100))
def test_inner_products_are_those_of_the_dense_tensors(affine, seed):
    one, other = a_tensor(seed, affine=affine), a_tensor(seed + 50, rank=4, affine=affine)
    expected = (oracle(one) * oracle(other)).sum()
    torch.testing.assert_close(one.inner(other), expected, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(one.norm(), oracle(one).norm())
    similarity = expected / oracle(one).norm() / oracle(other).norm()
    torch.testing.assert_close(one.similarity(other), similarity, atol=1e-8, rtol=1e-8)


def test_similarity_sees_the_function_and_not_its_factors():
    tensor = a_tensor()
    other = BilinearTensor(tensor.right * 3, tensor.left / 5, tensor.down * 2)
    assert tensor.similarity(other).item() == pytest.approx(1)
    assert tensor.similarity(tensor * -1.5).item() == pytest.approx(-1)
    assert abs(tensor.similarity(a_tensor(50)).item()) < 0.9


@checked
@given(tensors)
def test_the_norm_is_the_trace_of_the_output_gram(tensor):
    gram = tensor.output_gram()
    flat = oracle(tensor).flatten(1)
    torch.testing.assert_close(gram, flat @ flat.mT)
    torch.testing.assert_close(tensor.norm() ** 2, gram.trace())
    if tensor.rank == 1:
        return  # one output direction holds everything, so the next law has no control
    assert not torch.allclose(tensor.norm() ** 2, gram.sum())


@checked
@given(tensors)
def test_output_grams_with_another_tensor_are_inner_products_of_interactions(tensor):
    other = a_tensor(50, rank=4, affine=tensor.affine).change_basis(outputs=normal(9, 2, N_OUT))
    gram = tensor.output_gram(other)
    expected = einsum("oij,pij->op", oracle(tensor), oracle(other))
    assert gram.shape == (N_OUT, 2)
    torch.testing.assert_close(gram, expected, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(other.output_gram(tensor), expected.mT, atol=1e-8, rtol=1e-8)
    assert not torch.allclose(gram, tensor.output_gram()[:, :2])


@checked
@given(tensors, st.booleans())
def test_input_grams_are_those_of_the_dense_tensor(tensor, with_metric):
    root = normal(9, N_OUT, N_OUT)
    metric = root + root.mT if with_metric else None
    expected = einsum(
        "oij,op,pkj->ik",
        oracle(tensor),
        torch.eye(N_OUT, dtype=root.dtype) if metric is None else metric,
        oracle(tensor),
    )
    gram = tensor.input_gram(metric)
    torch.testing.assert_close(gram, expected, atol=1e-8, rtol=1e-8)
    assert torch.equal(gram, gram.mT)
    assert torch.allclose(gram, tensor.input_gram()) == (not with_metric)


@checked
@given(tensors)
def test_input_modes_are_the_svd_of_the_other_flattening(tensor):
    flat = oracle(tensor).movedim(1, 0).flatten(1)
    expected = torch.linalg.svd(flat, full_matrices=False)
    values, vectors = torch.linalg.eigh(tensor.input_gram())
    squares = expected.S.square()
    torch.testing.assert_close(values.flip(0), squares, atol=1e-8 * squares[0].item(), rtol=1e-8)
    assert (vectors[:, -1] @ expected.U[:, 0]).abs().item() == pytest.approx(1)
    torch.testing.assert_close(tensor.input_gram().trace(), tensor.norm() ** 2)


@checked
@given(tensors)
def test_a_linear_part_is_exact(tensor):
    weight, x = normal(9, N_OUT, N_IN), normal(8, 2, 11, N_IN)
    changed = tensor.with_linear(weight)
    expected = tensor(x) + einsum("abi,oi->abo", x, weight)
    torch.testing.assert_close(changed(x), expected, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(tensor(x), expected)
    assert changed.affine and (changed.d_in, changed.d_out) == (N_IN, N_OUT)
    dense = oracle(tensor)
    if not tensor.affine:
        dense = torch.nn.functional.pad(dense, (0, 1, 0, 1))
    dense[:, :-1, -1] += weight / 2
    dense[:, -1, :-1] += weight / 2
    torch.testing.assert_close(changed.to_dense(), dense)
    back = changed.with_linear(-weight)
    torch.testing.assert_close(back(x), tensor(x), atol=1e-9, rtol=1e-9)


def test_a_linear_part_takes_the_tensors_dtype():
    tensor, weight = a_tensor(), normal(9, N_OUT, N_IN).float()
    assert tensor.with_linear(weight).left.dtype == torch.float64


@checked
@given(tensors)
def test_hosvd_is_the_svd_of_the_flattened_tensor(tensor):
    modes = tensor.hosvd()
    expected = torch.linalg.svd(oracle(tensor).flatten(1), full_matrices=False)
    torch.testing.assert_close(modes.singular_values, expected.S, atol=1e-6, rtol=1e-6)
    cosine = (modes.directions[0] @ expected.U[:, 0]).abs().item()
    assert cosine == pytest.approx(1)
    first = tensor.hosvd(1)
    torch.testing.assert_close(
        tensor.interaction(first.directions[0]).norm(), first.singular_values[0]
    )


def test_sums_and_multiples():
    one, other, x = a_tensor(), a_tensor(50, rank=4), normal(9, 11, N_IN)
    torch.testing.assert_close((one + other)(x), one(x) + other(x))
    torch.testing.assert_close((3 * one)(x), 3 * one(x))
    assert (one + one * -1).norm() < 1e-6 * one.norm()


@pytest.mark.parametrize("given_biases", [("left",), ("right",), ("down",), ("left", "down")])
def test_every_bias_counts(given_biases):
    plain = a_tensor()
    biases = {
        f"{name}_bias": normal(20 + i, N_OUT if name == "down" else RANK)
        for i, name in enumerate(given_biases)
    }
    tensor = BilinearTensor.with_biases(plain.left, plain.right, plain.down, **biases)
    x, zero = normal(9, 11, N_IN), torch.zeros(())
    left = x @ plain.left.mT + biases.get("left_bias", zero)
    right = x @ plain.right.mT + biases.get("right_bias", zero)
    expected = (left * right) @ plain.down.mT + biases.get("down_bias", zero)
    torch.testing.assert_close(tensor(x), expected)
    assert not torch.allclose(plain(x), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_weights_are_upcast(dtype):
    tensor = a_tensor()
    left, right, down = (w.to(dtype) for w in (tensor.left, tensor.right, tensor.down))
    half = BilinearTensor(left, right, down)
    assert half.left.dtype == half.eigh(0).values.dtype == torch.float32
    exact = BilinearTensor(left.double(), right.double(), down.double())
    largest = exact.eigh(0).values[0].abs().item()
    error = (half.eigh(0).values.double() - exact.eigh(0).values).abs().max().item()
    assert error < 1e-6 * largest
    assert half(normal(9, N_IN).to(dtype)).dtype == torch.float32


def test_only_to_dense_materialises():
    """A tensor of 4096 x 4096 x 4096 numbers would take 256 GiB."""
    size, rank = 4096, 2
    factors = torch.randn(3, size, rank, generator=torch.Generator().manual_seed(0))
    tensor = BilinearTensor(factors[0].mT, factors[1].mT, factors[2])
    assert tensor.similarity(tensor).item() == pytest.approx(1)
    direction = factors[2, :, 0]
    x = factors[0, :, 1] / 64
    torch.testing.assert_close(
        tensor.eigh(direction).activations(x).sum(), tensor(x) @ direction, rtol=1e-3, atol=1e-3
    )


def message(call, error=ValueError) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def test_bad_input_is_named(as_users):
    tensor = a_tensor()
    left, right, down = tensor.left, tensor.right, tensor.down
    assert "[7, 4]" in message(lambda: BilinearTensor(left, right[:, :4], down))
    assert "W_gate.mT" in message(lambda: BilinearTensor(left, right, down.mT))
    assert "float64" in message(lambda: BilinearTensor(left.float(), right, down))
    bias = normal(9, RANK + 1)
    wrong_bias = lambda: BilinearTensor.with_biases(left, right, down, left_bias=bias)  # noqa: E731
    assert "left_bias has shape [8]" in message(wrong_bias)
    assert "d_in=5" in message(lambda: tensor(normal(9, 11, N_IN + 1)))
    assert "d_in=5" in message(lambda: tensor.eigh(0).activations(normal(9, N_IN - 1)))
    half = BilinearTensor(left.float(), right.float(), down.float())
    assert "torch.float32" in message(lambda: tensor.inner(half))
    assert "left holds NaN" in message(lambda: BilinearTensor(left / 0 * 0, right, down))
    for k in (0, -1, N_IN + 1):
        assert f"k={k}" in message(lambda k=k: tensor.eigh(0, k=k))
        assert f"k={k}" in message(lambda k=k: tensor.eigh(0).top(k))
        assert f"k={k}" in message(lambda k=k: tensor.eigh(0).bottom(k))
    for k in (0, -1, N_OUT + 1):
        assert f"k={k}" in message(lambda k=k: tensor.hosvd(k))
    assert "d_out=3" in message(lambda: tensor.eigh(normal(9, N_OUT + 1)))
    assert "zero" in message(lambda: tensor.eigh(torch.zeros(N_OUT)))
    assert "NaN" in message(lambda: tensor.interaction(torch.full((N_OUT,), float("nan"))))
    assert "Output 3" in message(lambda: tensor.interaction(3))
    assert "d_in=5" in message(lambda: tensor.change_basis(inputs=normal(9, 2, N_IN + 1)))
    assert "d_out=3" in message(lambda: tensor.change_basis(outputs=normal(9, N_OUT)))
    assert "with biases" in message(lambda: tensor.inner(a_tensor(affine=True)))
    assert "change_basis" in message(lambda: tensor + tensor.change_basis(outputs=down[:2, :3]))
    assert "[3, 5]" in message(lambda: tensor.with_linear(normal(9, N_IN, N_OUT)))
    assert "[3, 3]" in message(lambda: tensor.input_gram(normal(9, N_IN, N_IN)))
    other = tensor.change_basis(inputs=normal(9, 4, N_IN))
    assert "change_basis" in message(lambda: tensor.output_gram(other))
    assert "with biases" in message(lambda: tensor.output_gram(a_tensor(affine=True)))
    assert "zero tensor" in message(lambda: tensor.similarity(tensor * 0.0))


def test_the_quadratic_part_leaves_the_rest_out():
    left, right, down = (*torch.randn(2, 5, 3).unbind(), torch.randn(2, 5))
    plain = BilinearTensor(left, right, down)
    biased = BilinearTensor.with_biases(
        left, right, down, left_bias=torch.randn(5), down_bias=torch.randn(2)
    ).with_linear(torch.randn(2, 3))
    x = torch.randn(7, 3)
    torch.testing.assert_close(biased.quadratic()(x), plain(x))
    assert not torch.allclose(biased(x), plain(x))
