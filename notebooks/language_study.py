"""The studies of language models: trains them, measures them, writes a table.

    python notebooks/language_study.py DATA MODELS TABLE

DATA holds `checkpoints/stories260K`, a SwiGLU model of TinyStories in Hugging Face form, and the text
`tinystories/{train,heldout}.txt.gz`. The second model to convert is trained first. Each run is saved
as it is done, so that an interrupted study goes on; TABLE is a CSV file, a row for each measurement,
which the notebook sums up.

- recipes: ways from SwiGLU to bilinear, all with the same short budget
- conversion: the recommended way and its controls, on two models, three seeds
- regularisers: latent noise and weight decay, for models from scratch
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import bilinear_lens as bl
from bilinear_lens.training.controls import METHODS
from bilinear_lens.training.evaluation import continuation_choices
from bilinear_lens.training.language import train_language
from bilinear_lens.training.recipe import LanguageRecipe

SEEDS = range(3)
SHORT, LONG = 500, 2000
"""Steps of 16 windows of 256 tokens: 2.0 and 8.2 million tokens."""

TWIN = LanguageRecipe(
    n_layers=4, d_model=192, d_mlp=576, n_heads=6, epochs=6, weight_decay=2.0, activation="silu"
)
"""A SwiGLU model of the shape and training of `tinystories-4l`."""

NOISES, DECAYS = (0.0, 0.1, 0.33), (0.0, 0.1, 1.0)
SMALL = {"n_layers": 2, "d_model": 128, "d_mlp": 384, "n_heads": 4, "vocab_size": 1024}
SMALL_TOKENS = 3_000_000

KEYS = ["study", "model", "label", "method", "seed", "layer", "quantity"]

PLAIN = {"anneal": 0.0, "least_squares": False, "distill": 0.0}
RECIPES: dict[str, tuple[dict, dict]] = {
    "abrupt, lr 3e-3": (PLAIN, {"learning_rate": 3e-3}),
    "abrupt": (PLAIN, {}),
    "least squares, lr 3e-3": ({**PLAIN, "least_squares": True}, {"learning_rate": 3e-3}),
    "least squares": ({**PLAIN, "least_squares": True}, {}),
    "distilled .5": ({**PLAIN, "distill": 0.5}, {}),
    "least squares, distilled .5": ({**PLAIN, "least_squares": True, "distill": 0.5}, {}),
    "least squares, distilled .9": ({**PLAIN, "least_squares": True, "distill": 0.9}, {}),
}
"""By name: changes to the recipe, and to the Trainer's arguments."""


@dataclass(frozen=True)
class Conversion:
    """One run that makes a model bilinear, or a control."""

    study: str
    model: str
    label: str
    method: str
    seed: int
    steps: int
    recipe: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)

    def run(self, data: Path, models: Path) -> pd.DataFrame:
        folder = (
            data / "checkpoints/stories260K" if self.model == "stories260K" else models / "twin"
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        held_out = bl.load_text(data / "tinystories/heldout.txt.gz")
        out = models / self.study / self.model / self.label.replace(" ", "_")
        args = bl.recommended_arguments(
            out, max_steps=self.steps, disable_tqdm=True, **self.settings
        )
        study = bl.conversion_study(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            bl.load_text(data / "tinystories/train.txt.gz"),
            held_out,
            args=args,
            out=out,
            choices=continuation_choices(held_out["text"], tokenizer, start=64, length=12),
            recipe=bl.BilinearizeRecipe(**self.recipe),
            methods=(self.method,),
            seeds=(self.seed,),
            tokenizer=tokenizer,
            resume=True,
        )
        rows = study.melt(id_vars=["method", "seed"], var_name="quantity")
        return rows.assign(study=self.study, model=self.model, label=self.label)


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
        if not folder.exists():
            results = train_language(
                folder,
                text=data / "tinystories/train.txt.gz",
                held_out=data / "tinystories/heldout.txt.gz",
                recipe=LanguageRecipe(
                    **SMALL,
                    tokens=SMALL_TOKENS,
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


def jobs(studies: list[str]) -> list[Conversion | Regularised]:
    """Every run; those of the first study come first."""
    everything: dict[str, list[Conversion | Regularised]] = {
        "recipes": [
            Conversion("recipes", "stories260K", label, method, 0, SHORT, *options)
            for label, options in RECIPES.items()
            for method in ["continued" if label.startswith("continued") else "bilinearized"]
        ],
        "conversion": [
            Conversion("conversion", model, "recommended", method, seed, LONG)
            for seed in SEEDS
            for model in ("stories260K", "twin")
            for method in METHODS
        ],
        "regularisers": [
            Regularised(noise, decay, seed)
            for seed in SEEDS
            for noise in NOISES
            for decay in DECAYS
        ],
    }
    return [job for study in studies for job in everything[study]]


def run(job: Conversion | Regularised, data: Path, models: Path) -> pd.DataFrame:
    torch.set_num_threads(1)  # two runs with a thread each are faster than one with two
    return job.run(data, models)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("models", type=Path)
    parser.add_argument("table", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--studies", nargs="+", default=["recipes", "conversion", "regularisers"])
    arguments = parser.parse_args()
    data, models = arguments.data, arguments.models
    if "conversion" in arguments.studies and not (models / "twin").exists():
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
