"""Interactions between latents at full size. `pytest -n 0 -s tests/benchmarks`."""

import multiprocessing
import resource
import time

import pandas as pd
import torch
from torch import Tensor

from bilinear_lens.analysis.feature_summary import summarize_interactions
from bilinear_lens.tensor import BilinearTensor

N_LATENTS, D, RANK = 8192, 1024, 4096
MEMORY = 2**30
OURS, DENSE = 64, 4
"""Outputs of which each way is measured; both take the same time for every output."""


def made(n: int, d: int, rank: int) -> tuple[BilinearTensor, Tensor, Tensor]:
    """Random weights, decoder directions and output directions."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensor = BilinearTensor(normal(rank, d), normal(rank, d), normal(d, rank))
    latents = torch.nn.functional.normalize(normal(n, d), dim=1)
    return tensor, latents, normal(n, d)


def dense(tensor: BilinearTensor, latents: Tensor, direction: Tensor) -> dict[str, float]:
    """The same numbers from the whole matrix between latents."""
    interaction = tensor.interaction(direction)
    matrix = latents @ interaction @ latents.mT
    values, own = torch.linalg.eigvalsh(interaction), matrix.diagonal().clone()
    norm = matrix.double().norm()  # float32 loses a half per cent over so many
    off = matrix.fill_diagonal_(0).double()
    pairs = len(off) * (len(off) - 1)
    mean = off.sum() / pairs
    centred = off.sub_(mean)
    centred.fill_diagonal_(0)
    square = centred.square_()
    variance = square.sum() / pairs
    return {
        "effective_rank": (values.abs().sum() ** 2 / values.square().sum()).item(),
        "norm": norm.item(),
        "self_share": (own.square().sum() / norm**2).item(),
        "kurtosis": (square.square().sum() / pairs / variance**2 - 3).item(),
        "deviations": (square.max() / variance).sqrt().item(),
    }


def left_to_right(n: int, d: int, rank: int) -> float:
    """Seconds of one product of three weights and a direction, contracted as it is written."""
    tensor, _, _ = made(n, d, rank)
    start = time.perf_counter()
    cube = torch.einsum("mi,mj->mij", tensor.left, tensor.right)
    torch.einsum("om,mij->oij", tensor.down, cube)
    return time.perf_counter() - start


def _peak(queue) -> None:
    tensor, latents, directions = made(N_LATENTS, D, RANK)
    start = time.perf_counter()
    table = summarize_interactions(tensor, directions[:OURS], latents, memory=MEMORY)
    seconds = (time.perf_counter() - start) / OURS
    queue.put((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, table))


def test_interactions_of_a_layer():
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(queue,))
    process.start()
    ours, peak, table = queue.get()
    process.join()
    tensor, latents, directions = made(N_LATENTS, D, RANK)
    start = time.perf_counter()
    expected = pd.DataFrame([dense(tensor, latents, each) for each in directions[:DENSE]])
    theirs = (time.perf_counter() - start) / DENSE
    pd.testing.assert_frame_equal(
        table[expected.columns][:DENSE], expected, rtol=2e-3, atol=1e-3, check_dtype=False
    )
    small = left_to_right(64, D // 4, RANK // 4)
    product = torch.randn(2048, D)
    start = time.perf_counter()
    for _ in range(4):
        torch.mm(product, product.mT)
    per_flop = (time.perf_counter() - start) / 4 / (2 * 2048 * 2048 * D)
    floor = per_flop * 2 * (N_LATENTS**2 / 2 * D + N_LATENTS * D**2 + RANK * D**2)
    print(f"\n{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"F={N_LATENTS}, d={D}, rank={RANK}, random weights; a budget of {MEMORY / 2**30:g} GiB")
    print(
        f"ours: {ours:.3g} s an output ({OURS} measured), all {N_LATENTS}: "
        f"{ours * N_LATENTS / 60:.0f} minutes, extrapolated; peak of the process {peak:.2f} GiB, "
        f"weights and directions included"
    )
    print(
        f"floor, the products alone: {floor:.3g} s an output; we take {ours / floor:.2f} times that"
    )
    print(
        f"dense, the same numbers, an output at a time: {theirs:.3g} s ({DENSE} measured), ratio "
        f"{theirs / ours:.2f}; all at once would need {N_LATENTS**3 * 4 / 2**40:.1f} TiB"
    )
    print(
        f"einsum left to right: {small:.3g} s at a quarter of each size, so {256 * small:.0f} s at "
        f"this one (scaled by its arithmetic), with {RANK * D * D * 4 / 2**30:.0f} GiB, for each "
        f"batch of 32 outputs, before their matrices: {8 * small:.2g} s an output"
    )
    assert peak < 2
