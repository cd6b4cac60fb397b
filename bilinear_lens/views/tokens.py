"""Token views, drawn by CircuitsVis from the script in its wheel: no network, ever.

- `text` colours tokens by each eigenvector's activation, `attention` shows heads
- `examples` lists the text at which latents are most active
- the tokens at an eigenvector's ends are a table (`tables.eigenvectors`): CircuitsVis's TopkTokens
  writes tokens into the page as HTML, shades on a fixed scale from 0 to 1, and opens on one column
- a page or notebook holds the script (1.3 MB) once; a view without it waits, and says so
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any
from uuid import uuid4

from jaxtyping import Float
from torch import Tensor

from bilinear_lens.views.document import Fragment, document, save_page, script_json
from bilinear_lens.views.style import NEGATIVE, POSITIVE, rgba, visible

_CARD = "padding:12px;border-radius:8px;background:#fff;color:#1d2127;color-scheme:light"
_shown_here = False


@dataclass(frozen=True, repr=False)
class TokenView:
    """A CircuitsVis component and what it shows; the last line of a notebook cell draws it."""

    component: str
    props: Mapping[str, Any]
    """JSON values, by the component's own names."""

    def __repr__(self) -> str:
        return f"TokenView({self.component})"

    def markup(self, name: str) -> Fragment:
        """The view as HTML for a page that holds CircuitsVis's script, or will.

        Args:
            name: the element's id, unique on the page.
        """
        # React replaces the line of text by the view. Outputs of a notebook may come to the page
        # in any order, so a view that comes before the script waits for it in a queue.
        return Fragment(
            f'<div id="{name}" class="circuitsvis {self.component}" style="{_CARD}">'
            "To draw this view, run a cell with <code>from bilinear_lens.views import tokens; "
            "tokens.script()</code></div>\n"
            "<script>{\n"
            f'const draw = () => document.getElementById("{name}") && CircuitsVis.render('
            f'"{name}", CircuitsVis.{self.component}, {script_json(dict(self.props))});\n'
            "window.CircuitsVis ? draw() : (window.circuitsVisQueue ??= []).push(draw);\n"
            "}</script>"
        )

    def save(self, path: str | Path) -> None:
        """Writes the view as a page of its own.

        Raises:
            ValueError: if the folder cannot be written.
        """
        body = Fragment(f'<div class="card">{self.markup("view")}</div>')
        save_page(path, document("Token view", body=body, scripts=[circuitsvis_js()]))

    def _repr_html_(self) -> str:
        global _shown_here
        # Google Colab gives each output a frame of its own: nothing is shared between them.
        carries = not _shown_here or "google.colab" in sys.modules
        _shown_here = True
        view = self.markup(f"view-{uuid4().hex}")
        return script() + view if carries else view


def script() -> Fragment:
    """CircuitsVis's script for a notebook: every token view that waits for it is then drawn."""
    return Fragment(f"<script>{circuitsvis_js()}</script>\n")


@cache
def circuitsvis_js() -> str:
    """The script of the installed wheel, fit to stand inside a script element."""
    source = files("circuitsvis").joinpath("dist/cdn/iife.js").read_text(encoding="utf-8")
    source = re.sub(r"^//# sourceMappingURL=.*$", "", source, flags=re.MULTILINE)
    return (
        source.replace("</script", "<\\/script")
        + "window.CircuitsVis = CircuitsVis;"
        + "(window.circuitsVisQueue ?? []).splice(0).forEach((draw) => draw());"
    )


def text(
    tokens: Sequence[str],
    activations: Float[Tensor, "n_tokens n_eigenvectors"],
    *,
    labels: Sequence[str],
) -> TokenView:
    """A text coloured by one eigenvector's activation at each token, chosen by its label.

    All eigenvectors share one scale, symmetric around 0, so that colours can be compared.

    Args:
        labels: a name for each eigenvector.

    Raises:
        ValueError: if counts differ, nothing is given, or an activation is not finite.
    """
    if activations.shape != (len(tokens), len(labels)) or not activations.numel():
        raise ValueError(
            f"activations {list(activations.shape)}, {len(tokens)} tokens and {len(labels)} "
            "labels: give [n_tokens, n_eigenvectors] activations, at least one of each."
        )
    _check_finite(activations, "activations")
    # CircuitsVis rounds its bounds to 6 digits and divides by them
    bound = max(activations.abs().max().item(), 1e-6)
    props = {
        "tokens": [_inert(visible(token)) for token in tokens],
        "values": activations.tolist(),
        "labels": list(labels),
        "positiveBounds": [bound] * len(labels),
        "negativeBounds": [-bound] * len(labels),
    }
    return TokenView("ColoredTokensMulti", props)


def examples(
    tokens: Sequence[Sequence[Sequence[str]]],
    activations: Sequence[Sequence[Sequence[float]]],
    *,
    labels: Sequence[str],
    name: str,
) -> TokenView:
    """Pieces of text at which latents are most active, for a latent chosen by its label.

    Args:
        tokens: of each piece, for each latent.
        activations: the latent's at each token.
        labels: a name for each latent.
        name: of what they are latents, such as a hook point.

    Raises:
        ValueError: if counts differ, nothing is given, or an activation is not finite.
    """
    counts = [[list(map(len, pieces)) for pieces in each] for each in (tokens, activations)]
    if (
        counts[0] != counts[1]
        or len(tokens) != len(labels)
        or not all(map(len, tokens))
        or not labels
    ):
        raise ValueError(
            f"{len(tokens)} and {len(activations)} lists of pieces for {len(labels)} labels: give "
            "at least one piece for each label, with an activation for each token."
        )
    if not all(isfinite(value) for latent in activations for piece in latent for value in piece):
        raise ValueError("activations hold NaN or infinite entries: a colour needs a number.")
    props = {
        "tokens": [[[[_inert(visible(t)) for t in piece] for piece in each] for each in tokens]],
        "activations": [[[list(piece) for piece in each] for each in activations]],
        "zerothDimensionName": "Hook point",
        "firstDimensionName": "Latent",
        "zerothDimensionLabels": [name],
        "firstDimensionLabels": list(labels),
    }
    return TokenView("TopkSamples", props)


def attention(
    tokens: Sequence[str],
    patterns: Float[Tensor, "n_heads n_tokens n_tokens"],
    *,
    labels: Sequence[str],
) -> TokenView:
    """Attention patterns of several heads, one of them large.

    All heads share one scale. The upper triangle is greyed where no head uses it.

    Args:
        patterns: from destination (second axis) to source (last axis).
        labels: a name for each head.

    Raises:
        ValueError: if counts differ, nothing is given, or an entry is not finite.
    """
    if patterns.shape != (len(labels), len(tokens), len(tokens)) or not patterns.numel():
        raise ValueError(
            f"patterns {list(patterns.shape)}, {len(tokens)} tokens and {len(labels)} labels: "
            "give [n_heads, n_tokens, n_tokens] patterns, at least one of each."
        )
    _check_finite(patterns, "patterns")
    bound = patterns.abs().max().item() or 1.0
    props = {
        "tokens": [visible(token) for token in tokens],
        "attention": patterns.tolist(),
        "attentionHeadNames": list(labels),
        "maxValue": bound,
        "minValue": -bound,
        "positiveColor": rgba(POSITIVE),
        "negativeColor": rgba(NEGATIVE),
        "maskUpperTri": not patterns.triu(diagonal=1).any().item(),
    }
    return TokenView("AttentionHeads", props)


def _inert(token: str) -> str:
    """The token as text, both where CircuitsVis writes it as HTML and where it does not.

    Escaping would show as `&lt;` in the second place. A word joiner, which is invisible, after
    each `<` and `&` leaves neither a tag nor an entity.
    """
    return re.sub("[<&]", "\\g<0>\u2060", token)


def _check_finite(values: Tensor, name: str) -> None:
    if not values.isfinite().all():
        raise ValueError(f"{name} hold NaN or infinite entries: a colour needs a number.")
