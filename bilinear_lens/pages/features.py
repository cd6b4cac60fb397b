"""A browser of latents: a page for each, linked by interactions, and an index that is searched."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from tqdm.auto import tqdm

from bilinear_lens.analysis.examples import LatentExamples, latent_examples
from bilinear_lens.analysis.features import (
    feature_interactions,
    latent_basis,
    written_layer,
)
from bilinear_lens.models.checkpoints import check_new, write_folder
from bilinear_lens.models.saes import SparseAutoencoder
from bilinear_lens.models.transformer import HookedBilinearTransformer
from bilinear_lens.views import features as views
from bilinear_lens.views.report import Fragment, Section, page, save_page
from bilinear_lens.views.style import visible

Key = tuple[str, int]
"""Whether a latent is of the "in" or the "out" SAE, and its number."""

WORDS = 5
"""Tokens that tell what a latent means, in links and in the index."""


@torch.no_grad()
def feature_browser(
    model: HookedBilinearTransformer,
    inputs: SparseAutoencoder,
    outputs: SparseAutoencoder,
    text: Sequence[str],
    folder: str | Path,
    *,
    latents: Sequence[int] | None = None,
    k: int = 12,
    n: int = 10,
    side: str = "encoder",
    source: str,
) -> None:
    """Write a folder of pages about latents on both sides of an MLP: open its `index.html`.

    A page says where its latent is most active, what tokens it has to do with, and, with links,
    which latents before the MLP build it, or which behind it it builds. Each page stands alone and
    asks for nothing: no network, no server. The folder appears whole or not at all.

    Args:
        inputs, outputs, side: as in `feature_interactions`.
        text: documents.
        latents: which output latents have pages; all otherwise. Of input latents, those that one of
            them is built of.
        k: interactions on a page.
        n: examples on a page.
        source: where the text is from.

    Raises:
        ValueError: if `folder` exists, or as `feature_interactions` and `latent_examples`.
    """
    check_new(folder)
    latent_basis(model, inputs)
    chosen = list(range(outputs.n_latents)) if latents is None else list(latents)
    outputs.check_latents(chosen)
    layer = written_layer(outputs)
    behind_norm = outputs.hook_out.endswith("hook_mlp_out")
    directions = model.output_directions(
        range(model.cfg.d_vocab), layer=None if behind_norm else layer
    )
    normed = inputs.hook_in.endswith("mlp.hook_in")
    ids = range(model.cfg.d_vocab)
    tokens = model.token_directions(ids) if normed else model.embedded(ids)
    found: dict[int, _Built] = {}
    for latent in tqdm(chosen, desc="Reading weights", leave=False):
        features = feature_interactions(
            model, latent, inputs=inputs, outputs=outputs, side=side, k=k
        )
        rank = features.spectrum.effective_rank().item()
        found[latent] = _Built(features.pairs, rank, features.listed, layer)
    builds: dict[int, list[tuple[int, float]]] = defaultdict(list)
    for latent, features in found.items():
        pairs = features.pairs[features.pairs["kind"] != "constant"]
        for row in pairs.itertuples():
            for each in {int(row.a), int(row.b)}:  # pyright: ignore
                builds[each].append((latent, float(row.interaction)))  # pyright: ignore
    read = sorted(builds)
    of = {
        "in": latent_examples(model, inputs, text, latents=read, n=n),
        "out": latent_examples(model, outputs, text, latents=chosen, n=n),
    }
    browser = _Browser(of)
    written = outputs.decoder_basis.directions.to(directions)
    reads = inputs.encoder_basis.directions.to(tokens)
    with write_folder(folder) as new:
        for side_name in of:
            (new / side_name).mkdir()
        for latent in tqdm(chosen, desc="Writing pages", leave=False):
            logits = _ends(directions @ written[latent], model.token_labels)
            sections = [
                *browser.about("out", latent),
                *_logits(logits),
                browser.built(found[latent]),
            ]
            browser.write(new, "out", latent, outputs, sections, source)
        for latent in tqdm(read, desc="Writing pages", leave=False):
            nearest = _ends(tokens @ reads[latent], model.token_labels)[:1]
            sections = [
                *browser.about("in", latent),
                _tokens(nearest[0]),
                browser.building(builds[latent]),
            ]
            browser.write(new, "in", latent, inputs, sections, source)
        entries = [browser.entry(key) for key in browser.keys]
        body = Section(
            "Latents",
            "By what they mean: the tokens at which a latent is most active. Search for a number "
            "or a token.",
            views.index(entries),
        )
        title = f"Latents around an MLP of {model.cfg.model_name}"
        lead = (
            f"{len(read)} latents of {inputs.hook_in}, out of {inputs.n_latents}, build "
            f"{len(chosen)} of {outputs.hook_out}; interactions are read from the weights, "
            f"examples are from {source}."
        )
        save_page(new / "index.html", page(title, lead=lead, sections=[body]))


class _Built(NamedTuple):
    """What is kept of the interactions that build a latent."""

    pairs: pd.DataFrame
    effective_rank: float
    listed: float
    layer: int


class _Browser:
    """What the pages know of each other."""

    def __init__(self, of: dict[str, LatentExamples]) -> None:
        self.of = of
        self.keys: list[Key] = [(side, i) for side in ("out", "in") for i in of[side].latents]
        self.words = {(side, i): of[side].words(i, WORDS) for side, i in self.keys}

    def entry(self, key: Key) -> views.Entry:
        side, latent = key
        density = self.of[side].density(latent)
        return views.Entry(_name(*key), f"{side}/{latent}.html", density, self.words[key])

    def note(self, key: Key) -> str:
        return " ".join(map(visible, self.words[key])) or "dead on this text"

    def about(self, side: str, latent: int) -> list[Section]:
        examples = self.of[side]
        if not examples.density(latent):
            return [Section("Examples", "This latent is dead: never active on this text.", "")]
        shown = [views.Piece(e.tokens, e.activations, e.peak) for e in examples.of(latent)]
        text = (
            f"Active at {examples.density(latent):.2%} of {examples.n_tokens:,} tokens, where it "
            f"is {examples.mean(latent):.2f} in the mean. The number is the largest activation, at "
            "the outlined token."
        )
        return [Section("Examples", text, views.pieces(shown))]

    def built(self, features: "_Built") -> Section:
        """Which input latents build an output latent."""
        cards: list[Fragment] = []
        for kind, heading in (("cross", "two latents"), ("self", "a latent with itself")):
            rows = []
            for row in features.pairs[features.pairs["kind"] == kind].itertuples():
                keys = [("in", int(row.a)), ("in", int(row.b))][: 1 + (kind == "cross")]  # pyright: ignore
                rows.append(self._link(float(row.interaction), keys))  # pyright: ignore
            cards.append(views.links(rows, heading))
        text = (
            f"What multiplies to make it active, read from the weights of layer {features.layer}: "
            f"effective rank {features.effective_rank:.1f}; the listed pairs "
            f"hold {features.listed:.1%} of all squared interactions."
        )
        return Section("Built of", text, cards)

    def building(self, built: Sequence[tuple[int, float]]) -> Section:
        """Which output latents an input latent builds."""
        largest = sorted(built, key=lambda each: -abs(each[1]))
        rows, seen = [], set()
        for latent, value in largest:
            if latent not in seen:
                seen.add(latent)
                rows.append(self._link(value, [("out", latent)]))
        text = "Of the output latents with pages, those of whose largest interactions it is a part."
        return Section("Builds", text, views.links(rows, "latents behind the MLP"))

    def _link(self, value: float, keys: Sequence[Key]) -> views.Link:
        return views.Link(
            value,
            [_name(*key) for key in keys],
            [f"../{side}/{latent}.html" for side, latent in keys],
            [self.note(key) for key in keys],
        )

    def write(
        self,
        folder: Path,
        side: str,
        latent: int,
        sae: SparseAutoencoder,
        sections: list[Section],
        source: str,
    ) -> None:
        hook = sae.hook_in if side == "in" else sae.hook_out
        back = Section(
            "All latents", "", Fragment('<p><a href="../index.html">Search all latents</a></p>')
        )
        lead = f"One of {sae.n_latents} latents of {hook}. Text is from {source}."
        html = page(_name(side, latent).capitalize(), lead=lead, sections=[*sections, back])
        save_page(folder / side / f"{latent}.html", html)


def _name(side: str, latent: int) -> str:
    return f"{'input' if side == 'in' else 'output'} latent {latent}"


def _ends(
    values: torch.Tensor, labels: Sequence[str], n: int = 10
) -> list[list[tuple[str, float]]]:
    """The tokens of largest, and of smallest values."""
    ends = []
    for largest in (True, False):
        top = values.topk(min(n, len(values)), largest=largest)
        numbers = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ends.append([(labels[token], value) for token, value in numbers])
    return ends


def _logits(ends: Sequence[Sequence[tuple[str, float]]]) -> list[Section]:
    text = (
        "What it writes, along each token's output direction (against the mean), before the last "
        "norm."
    )
    cards = [
        views.tokens_by_value(end, heading)
        for end, heading in zip(ends, ("raises", "lowers"), strict=True)
    ]
    return [Section("Logit effect", text, cards)]


def _tokens(nearest: Sequence[tuple[str, float]]) -> Section:
    text = "How much of it each token's embedding has, alone, as the MLP would see it."
    return Section("Tokens", text, views.tokens_by_value(nearest, "projects"))
