"""The study of MNIST and Fashion-MNIST classifiers: trains the models, measures, writes tables.

    python notebooks/images_study.py DATA MODELS TABLES

DATA holds the folders `mnist` and `fashion-mnist` with their idx files. Each model is saved as it
is done, so that an interrupted study goes on; TABLES are CSV files, which the notebook draws.
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

import bilinear_lens as bl

SEEDS = range(5)


@dataclass(frozen=True)
class Job:
    """One training run."""

    group: str
    data: str
    seed: int
    fit: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        options = {**self.model, **self.fit}
        parts = [f"{key}={value}" for key, value in options.items()]
        return "__".join([self.data, *parts, f"seed={self.seed}"])


def jobs() -> list[Job]:
    """Every run, the most important first; several groups may ask for the same one."""
    long, short = {"epochs": 100}, {"epochs": 20}
    quiet = {"input_noise": 0.0, "weight_decay": 0.0}
    regularisers = {
        "none": {},
        "noise 0.4": {"input_noise": 0.4},
        "decay 1": {"weight_decay": 1.0},
        "latent noise 0.33": {"latent_noise": 0.33},
        "dropout 0.2": {"dropout": 0.2},
        "L1 1e-5": {"l1": 1e-5},
        "salt and pepper 0.1": {"salt_and_pepper": 0.1},
    }
    table = [
        ("reference", "mnist", long, {}),
        *[
            ("trade-off", "mnist", {"epochs": epochs, "weight_decay": decay}, {})
            for epochs, decays in ((20, (0.5, 1.0, 2.0)), (50, (0.5, 1.0, 2.0)), (100, (0.5, 2.0)))
            for decay in decays
        ],
        ("masks", "mnist", {"epochs": 30, "input_noise": 0.15, "weight_decay": 0.0},
         {"d_model": 512, "residual": True}),
        *[("depth", "mnist", short, {"d_model": 100, "n_layers": layers}) for layers in (2, 3)],
        *[
            ("regulariser", "mnist", {**short, **quiet, **options}, {})
            for options in regularisers.values()
        ],
        ("rank", "mnist", {**long, **quiet}, {}),
        ("rank", "mnist", {**long, **quiet, "input_noise": 0.4}, {}),
        ("rank", "mnist", {**long, **quiet, "weight_decay": 0.5}, {}),
        ("rank", "mnist", {**long, **quiet, "weight_decay": 1.0}, {}),
        *[("size", "mnist", long, {"d_model": width}) for width in (30, 100)],
        ("reference", "fashion-mnist", {"epochs": 50}, {}),
        *[
            ("regulariser", "fashion-mnist", {**short, **quiet, **options}, {})
            for options in regularisers.values()
        ],
        ("trade-off", "mnist", {"epochs": 50, "batch_size": 512}, {}),
    ]  # fmt: skip
    return [
        Job(group, data, seed, fit, model) for group, data, fit, model in table for seed in SEEDS
    ]


def train(job: Job, data: Path, models: Path) -> None:
    """Train one model, unless it is there."""
    folder = models / job.name
    if folder.exists():
        return
    torch.set_num_threads(1)
    images = bl.load_images(data / job.data)
    model = bl.HookedBilinearClassifier.from_config(
        input_shape=(1, 28, 28), n_classes=10, seed=job.seed, **job.model
    )
    start = time.perf_counter()
    model.fit(images.images, images.labels, seed=job.seed, bf16=True, progress=False, **job.fit)
    seconds = time.perf_counter() - start
    model.save_pretrained(folder, card=f"{job}\n\nTrained in {seconds:.1f} s on one core.\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "models", "tables"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--workers", type=int, default=2, help="processes that train")
    given = parser.parse_args()
    unique = list({job.name: job for job in jobs()}.values())
    with ProcessPoolExecutor(given.workers) as pool:
        runs = [pool.submit(train, job, given.data, given.models) for job in unique]
        for run in tqdm(runs, desc="Training", unit="model"):
            run.result()


if __name__ == "__main__":
    main()
