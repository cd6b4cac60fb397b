"""The study of MNIST and Fashion-MNIST classifiers: trains the models, measures them, writes a table.

    python notebooks/images_study.py DATA MODELS TABLE

DATA holds the folders `mnist` and `fashion-mnist` with their idx files. Each model is saved as it
is done, so that an interrupted study goes on; TABLE is a CSV file, a row for each measurement, which the notebook
sums up.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

import bilinear_lens as bl
from bilinear_lens.analysis.depth import chain_distance
from bilinear_lens.analysis.factorize import tucker
from bilinear_lens.analysis.legibility import (
    class_templates,
    compressibility,
    random_directions,
    smoothness,
    template_match,
)
from bilinear_lens.analysis.similarity import eigenvector_similarity, interaction_similarity
from bilinear_lens.analysis.truncation import (
    by_activation,
    mean_activations,
    paired,
    truncation_errors,
)
from bilinear_lens.spectrum import Spectrum

KS = (1, 2, 3, 5, 8, 10, 15, 20, 30, 50)
MASK_SIZES = (0.1, 0.2, 0.3)
MASKED = 2_000
"""Test images to which each mask is added."""
SAMPLE = 10_000
"""Training images that stand for the data where a measure needs it."""

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
    short, middle, long = {"epochs": 20}, {"epochs": 50}, {"epochs": 100}
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
            for epochs, decays in ((20, (0.5, 1.0, 2.0)), (50, (0.5, 1.0, 2.0)), (100, (2.0,)))
            for decay in decays
        ],
        ("masks", "mnist", {"epochs": 30, "input_noise": 0.15, "weight_decay": 0.0},
         {"d_model": 512, "residual": True}),
        *[("depth", "mnist", short, {"d_model": 100, "n_layers": layers}) for layers in (2, 3)],
        *[
            ("regulariser", "mnist", {**short, **quiet, **options}, {})
            for options in regularisers.values()
        ],
        ("rank", "mnist", {**middle, **quiet}, {}),
        ("rank", "mnist", {**middle, **quiet, "input_noise": 0.4}, {}),
        ("rank", "mnist", {**middle, **quiet, "weight_decay": 0.5}, {}),
        ("rank", "mnist", {**middle, **quiet, "weight_decay": 1.0}, {}),
        *[("size", "mnist", long, {"d_model": width}) for width in (30, 100)],
        ("reference", "fashion-mnist", middle, {}),
        *[
            ("regulariser", "fashion-mnist", {**short, **quiet, **options}, {})
            for options in list(regularisers.values())[:4]
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
    options = {"input_noise": 0.4, **job.fit, "seed": job.seed, "bf16": True}
    model.fit(images.images, images.labels, progress=False, **options)
    seconds = time.perf_counter() - start
    model.save_pretrained(folder, card=f"{job}\n\nTrained in {seconds:.1f} s on one core.\n")


def measured(job: Job, data: Path, models: Path) -> list[dict]:
    """The measurements of a model, from the file of an earlier run if there is one."""
    file = models / f"{job.name}.json"
    if not file.exists():
        partial = file.with_suffix(".part")
        partial.write_text(json.dumps(measure(job, data, models)))
        partial.rename(file)
    return json.loads(file.read_text())


def measure(job: Job, data: Path, models: Path) -> list[dict]:
    """Everything that is measured on one model: a row for each quantity, method and k."""
    torch.set_num_threads(1)
    model = bl.HookedBilinearClassifier.from_pretrained(models / job.name)
    train, test = (bl.load_images(data / job.data, split) for split in ("train", "test"))
    accuracy = model.accuracy(test.images, test.labels)
    tensors = model.tensors()
    rows = Rows(job)
    rows.add("accuracy", accuracy)
    inputs, sample = test.images.flatten(1), train.images.flatten(1)[:SAMPLE]
    if len(tensors) > 1:
        _depth(rows, tensors, inputs, test.labels, accuracy)
        return rows.rows
    (tensor,) = tensors
    classes = torch.eye(tensor.d_out)
    if job.group in ("masks", "reference"):
        _masks(rows, tensor, inputs[:MASKED], test.labels[:MASKED])
    if job.group == "masks":
        return rows.rows
    spectrum = tensor.eigh(classes)
    hidden = model.bilinear_tensor(0, inputs="hidden").change_basis(outputs=model.W_U.detach().mT)
    rows.add("effective rank", spectrum.effective_rank().mean().item())
    rows.add("effective rank, hidden", hidden.eigh(classes).effective_rank().mean().item())
    _legibility(rows, spectrum, train, job.data)
    if job.group in ("reference", "trade-off"):
        methods = {
            "magnitude": spectrum,
            "paired": paired(spectrum),
            "activation": by_activation(spectrum, sample),
            "orthogonal on data": bl.activation_spectrum(tensor, classes, sample),
        }
        for method, ordered in methods.items():
            curve = bl.truncation_curve(ordered, inputs, test.labels, ks=KS)
            rows.add_all("lost", curve["lost"], method=method, k=KS)
        ordered = methods["orthogonal on data"]
        curve = bl.truncation_curve(
            ordered, inputs, test.labels, ks=KS, rest=mean_activations(ordered, sample)
        )
        rows.add_all("lost", curve["lost"], method="orthogonal on data, rest at its mean", k=KS)
        errors = truncation_errors(spectrum, inputs, ks=KS)
        for column in ("bound", "error", "certified", "agreement"):
            rows.add_all(f"truncation {column}", errors[column], method="magnitude", k=KS)
    if job.name in factorized():
        _factorizations(rows, tensor, inputs, sample, test.labels, accuracy)
    return rows.rows


class Rows:
    """Measurements of one model."""

    def __init__(self, job: Job) -> None:
        self.rows: list[dict] = []
        self.about = {"data": job.data, "model": job.name.split("__seed=")[0], "seed": job.seed}

    def add(self, quantity: str, value: float, *, method: str = "", k: float = 0) -> None:
        self.rows.append(
            {**self.about, "quantity": quantity, "method": method, "k": k, "value": value}
        )

    def add_all(self, quantity: str, values, *, k, method: str = "") -> None:
        for each, value in zip(k, values, strict=True):
            self.add(quantity, value, method=method, k=each)


def factorized() -> set[str]:
    """The models whose tensors are factorized: one at .98 accuracy, one that is simpler."""
    return {
        job.name
        for job in jobs()
        if job.data == "mnist"
        and job.fit in ({"epochs": 100}, {"epochs": 20, "weight_decay": 1.0})
        and not job.model
    }


def _depth(rows: Rows, tensors, inputs, labels, accuracy: float) -> None:
    chain = bl.diagonalize(tensors)
    for share in (0.05, 0.1, 0.2, 0.3, 0.5, 0.75):
        widths = [max(1, round(share * len(weights))) for weights in chain.weights]
        cut = chain.truncate(widths)
        right = (cut(inputs.double()).argmax(-1) == labels).float().mean().item()
        rows.add("lost, ODT", accuracy - right, k=share)
        rows.add("distance, ODT", chain_distance(chain.tensors, cut.tensors), k=share)
        rows.add("bound, ODT", chain.bound(widths), k=share)
    for cut, weights in enumerate(chain.weights):
        rows.add(f"directions for 99 %, cut {cut}", 1 + (weights.cumsum(0) < 0.99).sum().item())


def _masks(rows: Rows, tensor, inputs, labels) -> None:
    spectrum = tensor.quadratic().eigh(torch.eye(tensor.d_out))
    for k in (1, 3, 10):
        masks = bl.adversarial_masks(spectrum, k=k)[:, :3]
        table = bl.masked_predictions(tensor, inputs, labels, masks, sizes=MASK_SIZES)
        means = table.groupby(["mask", "size"])[["accuracy", "targeted"]].mean()
        for (kind, size), row in means.iterrows():
            method = f"{kind}, {k} eigenvectors a class"
            rows.add("accuracy under masks", row["accuracy"], method=method, k=size)
            rows.add("targeted", row["targeted"], method=method, k=size)


def _legibility(rows: Rows, spectrum, train, data: str) -> None:
    """Of the top five eigenvectors by magnitude; templates against the most positive one."""
    shape = train.images.shape[1:]
    pixels = train.images.flatten(1)
    vectors = spectrum.top(5).vectors.mT.flatten(0, 1)
    n_classes = len(spectrum.values)
    sets = {
        "eigenvectors": vectors,
        "random, white": random_directions(50, pixels.shape[1], seed=rows.about["seed"]),
        "random, data covariance": random_directions(50, pixels[:SAMPLE], seed=rows.about["seed"]),
    }
    templates = class_templates(pixels, train.labels, n_classes)
    top = torch.stack(
        [
            vectors[:, values.argmax()]
            for values, vectors in zip(spectrum.values, spectrum.vectors, strict=True)
        ]
    )
    for name, directions in sets.items():
        rows.add("smoothness", smoothness(directions, shape).mean().item(), method=name)
        rows.add("compressibility", compressibility(directions, shape).mean().item(), method=name)
        matched = top if name == "eigenvectors" else directions[:n_classes]
        match = template_match(matched, templates).mean().item()
        rows.add("template match", match, method=name)
    other = template_match(top, templates.roll(1, 0)).mean().item()
    rows.add("template match", other, method="eigenvectors, another class")


def _factorizations(rows: Rows, tensor, inputs, sample, labels, accuracy: float) -> None:
    def record(method: str, n_atoms: int, found: bl.Factorization) -> None:
        right = (found.tensor(inputs).argmax(-1) == labels).float().mean().item()
        rows.add("similarity", found.similarity, method=method, k=n_atoms)
        rows.add("lost", accuracy - right, method=method, k=n_atoms)

    quiet = {"progress": False, "seed": rows.about["seed"]}
    for n_atoms in (8, 16, 32, 64):
        record("CP", n_atoms, bl.factorize(tensor, n_atoms, restarts=1, **quiet))

        cut = tucker(tensor, n_atoms)
        right = (cut(inputs).argmax(-1) == labels).float().mean().item()
        rows.add("similarity", tensor.similarity(cut).item(), method="Tucker", k=n_atoms)
        rows.add("lost", accuracy - right, method="Tucker", k=n_atoms)
    sparse = {"contrast": True, "inputs": sample, "restarts": 1, **quiet}
    record("CP, 5 atoms a class", 30, bl.factorize(tensor, 30, atoms_per_output=5, **sparse))


def compare(group: list[Job], others: list[Job], models: Path) -> list[dict]:
    """Agreement between seeds of one model, and with those of another size.

    The pairs share seeds and are not independent: no interval is stated for them.
    """
    torch.set_num_threads(1)
    classes = torch.eye(10)

    def load(jobs: list[Job]):
        tensors = [
            bl.HookedBilinearClassifier.from_pretrained(models / job.name).tensors()[0]
            for job in jobs
        ]
        return [(tensor, tensor.eigh(classes)) for tensor in tensors]

    mine, theirs = load(group), load(others)
    name, other = (jobs[0].name.split("__seed=")[0] for jobs in (group, others))
    rows = []
    for i, (tensor, spectrum) in enumerate(mine):
        for j, (tensor_b, spectrum_b) in enumerate(theirs):
            if name == other and j <= i:
                continue
            rolled = Spectrum(spectrum_b.values.roll(1, 0), spectrum_b.vectors.roll(1, 0))
            values = {
                "top eigenvector": eigenvector_similarity(spectrum, spectrum_b),
                "top eigenvector, another class": eigenvector_similarity(spectrum, rolled),
                "top five eigenvectors": eigenvector_similarity(spectrum, spectrum_b, k=5),
                "interactions": interaction_similarity(tensor, tensor_b),
                "tensor": tensor.similarity(tensor_b),
            }
            for method, value in values.items():
                rows.append(
                    {
                        "data": group[0].data,
                        "model": name if name == other else f"{name} and {other}",
                        "seed": f"{i}-{j}",
                        "quantity": "stability",
                        "method": method,
                        "k": 0,
                        "value": value.mean().item(),
                    }
                )
    return rows


def race(data: Path, *, epochs: int = 10, rounds: int = 5) -> pd.DataFrame:
    """Seconds an epoch: `fit`, and the same model and recipe in a plain PyTorch loop, in turn."""
    train = bl.load_images(data / "mnist")
    x, y = train.images.flatten(1), train.labels

    def plain(bf16: bool) -> None:
        embed = torch.nn.Linear(784, 300, bias=False)
        layer = torch.nn.Linear(300, 600, bias=False)
        head = torch.nn.Linear(300, 10, bias=False)
        parameters = [*embed.parameters(), *layer.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1.0, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30 * epochs)
        for _ in range(epochs):
            for batch in torch.randperm(len(x)).split(2048):
                noisy = x[batch]
                noisy = noisy + 0.4 * torch.randn_like(noisy)
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    left, right = layer(embed(noisy)).chunk(2, dim=-1)
                    logits = head(left * right)
                loss = torch.nn.functional.cross_entropy(logits.float(), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()

    def ours(bf16: bool) -> None:
        model = bl.HookedBilinearClassifier.from_config(input_shape=(1, 28, 28), n_classes=10)
        options = {"epochs": epochs, "input_noise": 0.4, "bf16": bf16}
        model.fit(train.images, train.labels, progress=False, **options)

    rows = []
    for number in range(rounds):
        for bf16 in (False, True):
            seconds = {}
            for run in (plain, ours) if number % 2 else (ours, plain):
                start = time.perf_counter()
                run(bf16)
                seconds[run.__name__] = (time.perf_counter() - start) / epochs
            rows.append({"bf16": bf16, **seconds, "ratio": seconds["ours"] / seconds["plain"]})
    return pd.DataFrame(rows).groupby("bf16").median()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "models", "table"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--workers", type=int, default=2, help="processes that train")
    parser.add_argument("--race", action="store_true", help="time `fit` against a plain loop first")
    given = parser.parse_args()
    if given.race:
        print(race(given.data))
    unique = list({job.name: job for job in jobs()}.values())
    shallow = [job for job in unique if "n_layers" not in job.model and job.group != "masks"]
    groups: dict[str, list[Job]] = {}
    for job in shallow:
        groups.setdefault(job.name.split("__seed=")[0], []).append(job)
    sizes = [group for name, group in groups.items() if "d_model" in name]
    reference = groups["mnist__epochs=100"]
    pairs = [(group, group) for group in groups.values()]
    pairs += [(group, reference) for group in sizes] + [(sizes[0], sizes[1])]
    where = (given.data, given.models)
    with ProcessPoolExecutor(given.workers) as pool:
        start = time.perf_counter()
        for run in tqdm([pool.submit(train, job, *where) for job in unique], desc="Training"):
            run.result()
        trained = time.perf_counter()
        runs = [pool.submit(measured, job, *where) for job in unique]
        runs += [pool.submit(compare, *pair, given.models) for pair in pairs]
        rows = [row for run in tqdm(runs, desc="Measuring") for row in run.result()]
    given.table.parent.mkdir(parents=True, exist_ok=True)
    partial = given.table.with_suffix(".part")
    pd.DataFrame(rows).to_csv(partial, index=False, float_format="%.6g")
    partial.rename(given.table)
    done = time.perf_counter()
    print(f"Trained in {trained - start:.0f} s, measured in {done - trained:.0f} s.")


if __name__ == "__main__":
    main()
