"""The studies of language models: trains them, measures them, writes a table.

    python notebooks/language_study.py DATA MODELS TABLE

DATA holds `checkpoints/stories260K`, a SwiGLU model of TinyStories in Hugging Face form, and the text
`tinystories/{train,heldout}.txt.gz`. The second model to convert is trained first. Each run is saved
as it is done, so that an interrupted study goes on; TABLE is a CSV file, a row for each measurement,
which the notebook sums up.

- recipes: ways from SwiGLU to bilinear, all with the same short budget; the best two, three seeds
- conversion: the recommended way and its controls, three seeds (from scratch: one)
- twin: the same on a larger model
- long: the recommended way and continued training, on half an hour of two cores
- reading: what the weights of the converted models say, beside models from scratch
- regularisers: latent noise and weight decay, for models from scratch
"""

import argparse
import json
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

import bilinear_lens as bl
from bilinear_lens.models.checkpoints import load_checkpoint
from bilinear_lens.training.evaluation import continuation_choices
from bilinear_lens.training.language import train_language
from bilinear_lens.training.recipe import LanguageRecipe

SEEDS = range(3)
STEPS = {"recipes": 300, "conversion": 1000, "twin": 1000, "long": 7000}
"""Of 16 windows of 256 tokens: from 1 to 29 million tokens, of a text of 4.1 million."""

SETTINGS = {"bf16": True, "disable_tqdm": True}

TWIN = LanguageRecipe(
    n_layers=4, d_model=192, d_mlp=576, n_heads=6, epochs=6, weight_decay=2.0, activation="silu"
)
"""A SwiGLU model of the shape and training of `tinystories-4l`."""

NOISES, DECAYS = (0.0, 0.1, 0.33), (0.0, 0.1, 1.0)
SMALL = {"n_layers": 2, "d_model": 128, "d_mlp": 384, "n_heads": 4, "vocab_size": 1024}
SMALL |= {"tokens": 1_000_000, "batch_size": 8, "learning_rate": 4e-3}
"""Many small steps rather than a few large ones: decay is by the step."""

STUDIES = ["recipes", "conversion", "twin", "long", "reading", "regularisers"]
KEYS = ["study", "model", "label", "method", "budget", "seed", "layer", "quantity"]

FREQUENT, WORDS = 200, 4
"""Tokens for the correlation with bigrams; words to ablate."""

PLAIN = {"anneal": 0.0, "least_squares": False, "distill": 0.0}
FITTED = {**PLAIN, "least_squares": True}
TAUGHT = {**FITTED, "distill": 0.8, "distill_end": 0.0}
RECIPES: dict[str, tuple[dict, float]] = {
    "abrupt": (PLAIN, 2e-3),
    "abrupt, 3e-3": (PLAIN, 3e-3),
    "linear .3": ({**PLAIN, "anneal": 0.3}, 2e-3),
    "linear .3, scales": ({**PLAIN, "anneal": 0.3, "learn_scale": True}, 2e-3),
    "linear .6, layer by layer": ({**PLAIN, "anneal": 0.6, "layer_by_layer": True}, 2e-3),
    "fitted": (FITTED, 2e-3),
    "fitted, linear .3": ({**FITTED, "anneal": 0.3}, 2e-3),
    "fitted, cosine .3": ({**FITTED, "anneal": 0.3, "schedule": "cosine"}, 2e-3),
    "fitted, distilled .8 to 0, 1e-3": (TAUGHT, 1e-3),
    "fitted, distilled .8 to 0": (TAUGHT, 2e-3),
    "fitted, distilled .8 to 0, 4e-3": (TAUGHT, 4e-3),
    "fitted, distilled .8 to 0, linear .3": ({**TAUGHT, "anneal": 0.3}, 2e-3),
    "fitted, distilled .8 to 0, MLPs alone": ({**TAUGHT, "train": "mlp"}, 2e-3),
    "fitted, distilled .5": ({**TAUGHT, "distill": 0.5, "distill_end": 0.5}, 2e-3),
    "fitted, distilled 1": ({**TAUGHT, "distill": 1.0, "distill_end": 1.0}, 2e-3),
    "distilled .8 to 0": ({**TAUGHT, "least_squares": False}, 2e-3),
}
"""Changes to the recipe, and the learning rate. "fitted" is by least squares."""

FINALISTS = ("fitted, distilled .8 to 0", "fitted, distilled .5")
"""With three seeds."""

CONTINUED = {f"continued, {rate:g}": rate for rate in (5e-4, 1e-3, 2e-3)}
"""Learning rates for the control that the others are measured against."""

CONTROLS = {"continued": 1e-3, "abrupt": 3e-3, "scratch": 3e-3}
"""And the learning rate of each."""


@dataclass(frozen=True)
class Conversion:
    """One run that makes a model bilinear, or a control."""

    study: str
    model: str
    label: str
    method: str
    seed: int
    recipe: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)

    def folder(self) -> str:
        return f"{self.study} {self.model} {self.label} {STEPS[self.study]}".replace(" ", "_")

    def run(self, data: Path, models: Path) -> pd.DataFrame:
        folder = {"stories260K": data / "checkpoints/stories260K", "twin": models / "twin"}
        model, tokenizer = load_checkpoint(folder[self.model])
        held_out = bl.load_text(data / "tinystories/heldout.txt.gz")
        out = models / self.folder()
        table = bl.bilinearize_study(
            model,
            bl.load_text(data / "tinystories/train.txt.gz"),
            held_out,
            args=bl.recommended_arguments(
                out, max_steps=STEPS[self.study], **{**SETTINGS, **self.settings}
            ),
            out=out,
            choices=continuation_choices(held_out["text"], tokenizer, start=64, length=8),
            recipe=bl.BilinearizeRecipe(**self.recipe),
            methods=(self.method,),
            seeds=(self.seed,),
            tokenizer=tokenizer,
            resume=True,
        )
        return table.melt(id_vars=["method", "seed"], var_name="quantity").assign(
            study=self.study, model=self.model, label=self.label, budget=STEPS[self.study]
        )


@dataclass(frozen=True)
class Regularised:
    """One small bilinear model from scratch."""

    noise: float
    decay: float
    seed: int

    def run(self, data: Path, models: Path) -> pd.DataFrame:
        label = f"latent noise {self.noise:g}, weight decay {self.decay:g}"
        folder = models / "regularisers" / f"{self.noise:g}-{self.decay:g}-{self.seed}"
        losses = folder.with_suffix(f"{folder.suffix}.json")
        if not losses.exists():
            if folder.exists():  # cut off between the two
                shutil.rmtree(folder)
            results = train_language(
                folder,
                text=data / "tinystories/train.txt.gz",
                held_out=data / "tinystories/heldout.txt.gz",
                recipe=LanguageRecipe(
                    **SMALL,
                    latent_noise=self.noise,
                    weight_decay=self.decay,
                    seed=self.seed,
                ),
                resume=True,
            )
            losses.write_text(json.dumps(results["linear"].per_token))
        table = bl.overview(bl.HookedBilinearTransformer.from_pretrained(folder), n_tokens=256)
        rows = table.melt(id_vars="layer", var_name="quantity")
        loss = pd.DataFrame([{"quantity": "loss", "value": json.loads(losses.read_text())}])
        return pd.concat([rows, loss]).assign(
            study="regularisers", model="small", label=label, method="scratch", seed=self.seed
        )


@dataclass(frozen=True)
class Reading:
    """What the weights of a trained model say, and whether the text bears it out."""

    model: str
    method: str
    seed: int

    def run(self, data: Path, models: Path) -> pd.DataFrame:
        study = "twin" if self.model == "twin" else "conversion"
        label = "recommended" if self.method == "bilinearized" else self.method
        runs = Conversion(study, self.model, label, self.method, self.seed)
        folder = models / runs.folder() / f"{self.method}-{self.seed}"
        if (self.model, self.method) == ("twin", "scratch"):
            # of the twin's shape, text and tokenizer, and trained for as long as the twin
            model = bl.HookedBilinearTransformer.from_pretrained("tinystories-4l")
        else:
            model = bl.HookedBilinearTransformer.from_pretrained(
                folder, tokenizer=models / "twin" if study == "twin" else "stories260k"
            )
        stories = bl.load_text(data / "tinystories/heldout.txt.gz")["text"][:1000]
        windows = [model.to_tokens(story, truncate=True)[0] for story in stories]
        rows = bl.overview(model, n_tokens=256).melt(id_vars="layer", var_name="quantity")
        checks = [
            {"layer": layer, "quantity": quantity, "value": value}
            for layer in range(model.cfg.n_layers)
            for quantity, value in {
                **bigram_correlation(model, windows, layer),
                **ablation_effects(model, stories[:20], windows, layer),
            }.items()
        ]
        return pd.concat([rows, pd.DataFrame(checks)]).assign(
            study="reading", model=self.model, label=label, method=self.method, seed=self.seed
        )


def bigram_correlation(
    model: bl.HookedBilinearTransformer, windows: list[torch.Tensor], layer: int
) -> dict[str, float]:
    """Does what a token alone makes the layer write agree with what follows it in text?

    For the most frequent outputs: the rank correlation, over the input tokens that are frequent
    too, of u . mlp(x_t) with the log of how much more often u follows t than it stands anywhere;
    and the same with the inputs shuffled.
    """
    n = model.cfg.d_vocab
    pairs = torch.zeros(n, n)
    for window in windows:
        pairs.index_put_((window[:-1], window[1:]), torch.ones(len(window) - 1), accumulate=True)
    frequent = pairs.sum(dim=1).topk(FREQUENT).indices
    counts = pairs[frequent][:, frequent]
    lift = (counts + 0.5) / (counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum() + 0.5)
    written = model.bilinear_tensor(layer)(model.token_basis().directions[frequent])
    effect = written @ model.output_directions(frequent.tolist()).mT
    order = torch.randperm(FREQUENT, generator=torch.Generator().manual_seed(0))

    def correlation(effect: torch.Tensor) -> float:
        ranks = [each.argsort(0).argsort(0).double() for each in (effect, lift)]
        ours, theirs = ((each - each.mean(0)) / each.std(0) for each in ranks)
        return (ours * theirs).sum(0).mean().item() / (FREQUENT - 1)

    return {"bigrams": correlation(effect), "bigrams, shuffled": correlation(effect[order])}


def ablation_effects(
    model: bl.HookedBilinearTransformer,
    stories: list[str],
    windows: list[torch.Tensor],
    layer: int,
) -> dict[str, float]:
    """The share of what the layer adds to a token's logit, where it is right, that the top 8
    eigenvectors carry, and that 8 random directions do: the median over frequent words."""
    labels, counts = model.token_labels, torch.cat(windows).bincount(minlength=model.cfg.d_vocab)
    words = [t for t in counts.argsort(descending=True).tolist() if labels[t].strip().isalpha()]
    shares = []
    for token in words[:WORDS]:
        curve = bl.ablation_curve(
            model, token, stories, layer=layer, ks=(8, model.cfg.d_model), n_random=1, n_bootstrap=1
        ).pivot(index="k", columns="eigenvectors", values="logit")
        shares.append(curve.loc[8, ["top", "random"]] / curve.loc[model.cfg.d_model, "top"])
    medians = pd.DataFrame(shares).median()
    return {f"ablation, {name} 8": float(value) for name, value in medians.items()}


def jobs(studies: list[str]) -> list[Conversion | Reading | Regularised]:
    """Every run, study by study."""

    def conversions(study: str, model: str, seed: int) -> list[Conversion]:
        ours = Conversion(study, model, "recommended", "bilinearized", seed)
        return [
            ours,
            *(
                Conversion(study, model, name, name, seed, PLAIN, {"learning_rate": rate})
                for name, rate in CONTROLS.items()
            ),
        ]

    everything: dict[str, list[Any]] = {
        "recipes": [
            Conversion(
                "recipes",
                "stories260K",
                label,
                "bilinearized",
                seed,
                recipe,
                {"learning_rate": rate},
            )
            for label, (recipe, rate) in RECIPES.items()
            for seed in (SEEDS if label in FINALISTS else (0,))
        ]
        + [
            Conversion(
                "recipes", "stories260K", label, "continued", 0, PLAIN, {"learning_rate": rate}
            )
            for label, rate in CONTINUED.items()
        ],
        "conversion": [
            job
            for seed in SEEDS
            for job in conversions("conversion", "stories260K", seed)
            if job.method != "scratch" or seed == 0
        ],
        "twin": conversions("twin", "twin", 0)[:3],
        "long": conversions("long", "stories260K", 0)[:2],
        "reading": [
            Reading(model, method, seed=0)
            for model in ("stories260K", "twin")
            for method in ("bilinearized", "scratch")
        ],
        "regularisers": [
            Regularised(noise, decay, seed)
            for seed in SEEDS
            for noise in NOISES
            for decay in DECAYS
        ],
    }
    return [job for study in studies for job in everything[study]]


def run(job: Conversion | Reading | Regularised, data: Path, models: Path) -> pd.DataFrame:
    torch.set_num_threads(1)  # two runs with a thread each are faster than one with two
    return job.run(data, models)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("models", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--studies", nargs="+", default=STUDIES)
    arguments = parser.parse_args()
    data, models = arguments.data, arguments.models
    if "twin" in arguments.studies and not (models / "twin").exists():
        train_language(
            models / "twin",
            text=data / "tinystories/train.txt.gz",
            held_out=data / "tinystories/heldout.txt.gz",
            recipe=TWIN,
            resume=True,
        )
    with ProcessPoolExecutor(arguments.processes) as pool:
        todo = [pool.submit(run, job, data, models) for job in jobs(arguments.studies)]
        tables = [done.result() for done in tqdm(todo, desc="Runs")]
    table = pd.concat(tables).drop_duplicates(KEYS)
    if arguments.table.exists():  # keep the studies that were not asked for
        before = pd.read_csv(arguments.table)
        table = pd.concat([before, table]).drop_duplicates(KEYS, keep="last")
    table.sort_values(KEYS)[[*KEYS, "value"]].to_csv(arguments.table, index=False)


if __name__ == "__main__":
    main()
