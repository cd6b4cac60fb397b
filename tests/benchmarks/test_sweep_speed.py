"""What a sweep costs: ratios within one run. `pytest -n 0 -s tests/benchmarks`, on idle cores.

Nothing here asserts a time; what is asserted is that both sides agree.
"""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import duckdb
import pandas as pd
import pytest
import torch
from torch import Tensor

import bilinear_lens as bl
from bilinear_lens.kernels import fast_float32
from bilinear_lens.subspace import block_size

K, N_TOKENS = 8, 10


def show(title: str, rows: list[dict]) -> None:
    versions = f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}"
    print(f"\n{title} ({versions}, DuckDB {duckdb.__version__})")
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.4g}".format))


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def race(rounds: int, **calls: Callable[[], object]) -> dict[str, float]:
    """Medians of interleaved rounds, after one of each to warm up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call))
    return {name: median(found) for name, found in times.items()}


def lists(values: Tensor, vectors: Tensor, tokens: Tensor) -> Tensor:
    """Top eigenvalues, and the tokens at both ends of their eigenvectors: what a sweep writes."""
    top = values.abs().topk(K).indices
    vectors = vectors.gather(-1, top[:, None, :].expand(-1, vectors.shape[1], -1))
    projections = vectors.mT.flatten(0, 1) @ tokens.mT
    for largest in (True, False):
        projections.topk(N_TOKENS, largest=largest)
    return values.gather(-1, top)


def published(tensor: bl.BilinearTensor, directions: Tensor, tokens: Tensor) -> Tensor:
    """The papers' formula: one sum of products over four factors, 32 directions at a time."""
    found = []
    for some in directions.split(32):
        matrices = torch.einsum(
            "ri,rj,or,...o->...ij", tensor.left, tensor.right, tensor.down, some
        )
        values, vectors = torch.linalg.eigh((matrices + matrices.mT) / 2)
        found.append(lists(values, vectors, tokens))
    return torch.cat(found)


def dense(tensor: bl.BilinearTensor, directions: Tensor, tokens: Tensor) -> Tensor:
    """The best dense form: scaled factors in one product, batches that fit a cache."""
    found = []
    for some in directions.split(64 if tensor.d_in <= 256 else 8):
        scaled = tensor.left.mT * (some @ tensor.down)[:, None, :]
        half = scaled @ tensor.right
        values, vectors = torch.linalg.eigh((half + half.mT) / 2)
        found.append(lists(values, vectors, tokens))
    return torch.cat(found)


def dense_fast(tensor: bl.BilinearTensor, directions: Tensor, tokens: Tensor) -> Tensor:
    with fast_float32():
        return dense(tensor, directions, tokens)


def agree(ours: Tensor, theirs: Tensor) -> None:
    scale = theirs[:, :1].abs()
    assert ((ours.abs() - theirs.abs()).abs() / scale).max() < 2e-5


@torch.no_grad()
def test_the_vocabulary_of_a_built_in_model(tmp_path):
    model = bl.HookedBilinearTransformer.from_pretrained("tinystories-1l")
    tensor, tokens = model.bilinear_tensor(0), model.token_basis().directions
    n, sample = model.cfg.d_vocab, 512
    generator = torch.Generator().manual_seed(0)
    ids = torch.randperm(n, generator=generator)[:sample].tolist()
    directions = model.output_directions(ids)
    made = iter(range(99))
    times = race(
        3,
        ours=lambda: bl.sweep(model, out=tmp_path / str(next(made)), k=K, n_tokens=N_TOKENS),
        published=lambda: published(tensor, directions[:64], tokens),
        dense=lambda: dense(tensor, directions, tokens),
        dense_fast=lambda: dense_fast(tensor, directions, tokens),
    )
    each = {
        "sweep": times["ours"] / n,
        "published formula": times["published"] / 64,
        "best dense form": times["dense"] / sample,
        "best dense form, our matrix products": times["dense_fast"] / sample,
    }
    swept = bl.load_sweep(tmp_path / "0").query("SELECT token_id, eigenvector, value FROM sweep")
    values = swept.pivot(index="token_id", columns="eigenvector", values="value").loc[ids]
    agree(torch.tensor(values.to_numpy()), dense(tensor, directions, tokens))
    show(
        f"all {n} tokens of tinystories-1l, top {K} and token lists",
        [
            {"way": way, "ms a direction": 1e3 * t, "ratio": t / each["sweep"]}
            for way, t in each.items()
        ],
    )


def wide_tensor(strong: int, noise: float) -> bl.BilinearTensor:
    """Strong terms of falling weight among weak ones: low rank and noise."""
    d, rank = 1024, 4096
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, rank, d, generator=generator) / d**0.5
    weight = torch.full((rank,), noise / rank**0.5)
    weight[:strong] = 1 / torch.arange(1, strong + 1) ** 0.5
    return bl.BilinearTensor(left, right, torch.randn(d, rank, generator=generator) * weight)


@torch.no_grad()
@pytest.mark.parametrize("strong", [12, 32, 256])
def test_a_sample_of_a_wide_layer(strong):
    tensor, n, sample = wide_tensor(strong, 0.02), 32_000, 64
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(n, 1024, generator=generator)
    directions = torch.randn(sample, 1024, generator=generator)
    rows = []
    for memory in (2**30, 2**33):
        start = time.perf_counter()
        solver = tensor.eigensolver(K, n=n, memory=memory)
        once = time.perf_counter() - start

        def ours(solver=solver) -> Tensor:
            spectrum = solver(directions)
            with fast_float32():
                return lists(spectrum.values, spectrum.vectors, tokens)

        agree(ours()[:8], dense(tensor, directions[:8], tokens))
        times = race(
            2,
            ours=ours,
            dense=lambda: dense(tensor, directions[:16], tokens),
            dense_fast=lambda: dense_fast(tensor, directions[:16], tokens),
        )
        mine = times["ours"] / sample + once / n  # what is computed once, shared by all tokens
        rows.append(
            {
                "memory GiB": memory / 2**30,
                "ours ms": 1e3 * mine,
                "of it once": 1e3 * once / n,
                "dense ms": 1e3 * times["dense"] / 16,
                "ratio": times["dense"] / 16 / mine,
                "ratio, our products": times["dense_fast"] / 16 / mine,
            }
        )
    values = tensor.eigh(directions[0]).values.abs()
    falls = ", ".join(f"{i}: {values[i - 1] / values[0]:.3f}" for i in (8, 16, 32, 64))
    show(f"1024 wide, 4096 hidden, {strong} strong terms (|value| / first, {falls})", rows)


def test_two_processes_against_one(tmp_path):
    pytest.importorskip("datatrove")
    made = iter(range(99))

    def run(workers: int) -> None:
        bl.sweep(
            "tinystories-4l",
            out=tmp_path / str(next(made)),
            executor="local",
            workers=workers,
            effective_rank=True,  # long enough to outweigh the start of a process
        )

    times = race(3, one=lambda: run(1), two=lambda: run(2))
    show(
        "16,384 outputs of tinystories-4l with effective ranks, the same threads in all",
        [
            {
                "one process s": times["one"],
                "two s": times["two"],
                "ratio": times["one"] / times["two"],
            }
        ],
    )


RUN = """
import json, sys, time
from pathlib import Path
import bilinear_lens as bl

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024

model = bl.HookedBilinearTransformer.from_pretrained("tinystories-1l")
n, memory = int(sys.argv[2]), int(sys.argv[3])
Path("/proc/self/clear_refs").write_text("5")  # the peak so far was of loading
before, start = status("VmRSS"), time.perf_counter()
bl.sweep(model, out=sys.argv[1], outputs=range(n), memory=memory)
took = time.perf_counter() - start
print(json.dumps({"outputs": n, "budget MiB": memory / 2**20, "s": took,
    "ms an output": 1e3 * took / n, "more memory at peak, MiB": status("VmHWM") - before}))
"""


def test_time_and_memory_against_the_number_of_outputs(tmp_path):
    rows = []
    for memory in (2**30, 2**28, 2**27):
        for n in (1024, 2048, 4096):
            done = subprocess.run(
                [sys.executable, "-c", RUN, str(tmp_path / f"{n}-{memory}"), str(n), str(memory)],
                capture_output=True,
                check=True,
                env=os.environ,
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            assert rows[-1]["more memory at peak, MiB"] < rows[-1]["budget MiB"]
    show("tinystories-1l", rows)


@torch.no_grad()
def test_accuracy_over_whole_models(tmp_path):
    rows = []
    for name in ("tinystories-1l", "tinystories-4l"):
        model = bl.HookedBilinearTransformer.from_pretrained(name)
        made = bl.sweep(model, out=tmp_path / name)
        assert made is not None
        for layer in made.manifest.layers:
            tensor = model.bilinear_tensor(layer).double()
            directions = model.output_directions(range(model.cfg.d_vocab), layer=layer).double()
            found = made.query(
                f"SELECT value, residual FROM sweep WHERE layer = {layer} "
                "ORDER BY token_id, eigenvector"
            )
            values = torch.tensor(found["value"].to_numpy()).view(-1, K).double()
            exact = torch.cat(
                [torch.linalg.eigvalsh(tensor.interaction(some)) for some in directions.split(256)]
            )
            exact = exact.gather(-1, exact.abs().argsort(-1, descending=True))
            error = ((values.abs() - exact[:, :K].abs()).abs() / exact[:, :1].abs()).max().item()
            rows.append(
                {
                    "layer": f"{name} {layer}",
                    "largest residual": found["residual"].max(),
                    "largest error of an eigenvalue": error,
                    "values missed": int(
                        ((values.abs() - exact[:, :K].abs()) < -1e-5 * exact[:, :1].abs()).sum()
                    ),
                }
            )
            assert max(error, *found["residual"].tolist()) <= 1e-5
    show("against float64 eigenvalues of every output, relative to the first", rows)


@torch.no_grad()
def test_share_of_the_floor(tmp_path):
    """The floor: forming each matrix, as float32 products of the symmetrised tensor."""
    model = bl.HookedBilinearTransformer.from_pretrained("tinystories-1l")
    tensor, n = model.bilinear_tensor(0), 4096
    d = tensor.d_in
    directions = model.output_directions(range(n))
    solver = tensor.eigensolver(K, n=n)
    group = directions[: solver.plan.group]
    made = iter(range(99))
    square = torch.randn(2048, 2048)
    with fast_float32():
        rate = 2 * 2048**3 / race(5, product=lambda: square @ square)["product"]
        times = race(
            3,
            sweep=lambda: bl.sweep(model, out=tmp_path / str(next(made))),
            table=lambda: tensor.eigensolver(K, n=n),
            solver=lambda: solver(directions),
            build=lambda: [solver._matrices(group) for _ in range(n // len(group))],
        )
    once = times["table"]
    parts = {
        "floor: n d^3 products at the rate of a large product": 2 * n * d**3 / rate,
        "the symmetrised tensor, once": once,
        "forming the matrices": times["build"],
        f"subspace iteration, {block_size(K, d)} columns": times["solver"] - times["build"],
        "token lists, Parquet, checks": times["sweep"] - times["solver"] - once,
        "all": times["sweep"],
    }
    show(
        f"where the time of tinystories-1l goes; products at {rate / 1e9:.0f} Gflop/s",
        [{"part": p, "s": t, "share": t / times["sweep"]} for p, t in parts.items()],
    )
