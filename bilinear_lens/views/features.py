"""Pieces of a page about a latent: text at which it is active, tokens, links to other latents."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from bilinear_lens.views.document import Fragment, script_json
from bilinear_lens.views.style import NEGATIVE, POSITIVE, rgba, visible

_STYLE = """<style>
.latent-text { margin: 0; padding: 0; list-style: none; }
.latent-text li {
  padding: 7px 0; border-top: 1px solid rgba(127, 133, 141, .25); line-height: 1.9;
  overflow-wrap: anywhere;
}
.latent-text li:first-child { border-top: 0; }
.latent-text b {
  float: right; margin-left: 1em; font-weight: 400; font-variant-numeric: tabular-nums; opacity: .8;
}
.latent-text span { white-space: pre-wrap; border-radius: 3px; padding: 2px 0; }
.latent-text .peak { outline: 1.5px solid currentColor; }
.latent-links { width: 100%; border-collapse: collapse; }
.latent-links :is(th, td) {
  padding: 6px 14px 6px 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid rgba(127, 133, 141, .25);
}
.latent-links th { font-size: 12px; opacity: .8; }
.latent-links .number { text-align: right; font-variant-numeric: tabular-nums; width: 1%; }
.latent-links small { display: block; opacity: .8; overflow-wrap: anywhere; }
.latent-search { width: 100%; padding: 10px 12px; font: inherit; color: inherit; background: none;
  border: 1px solid rgba(127, 133, 141, .6); border-radius: 8px; }
</style>
"""

_SEARCH = """
(() => {
  const latents = %s, most = 200;
  const field = document.getElementById("search"), body = document.getElementById("found");
  const count = document.getElementById("count");
  const cell = (text, of) => { const td = of.insertCell(); td.textContent = text; return td; };
  const show = () => {
    const words = field.value.toLowerCase().split(/\\s+/).filter(Boolean);
    const found = latents.filter((each) => words.every((word) => each.find.includes(word)));
    body.replaceChildren();
    for (const each of found.slice(0, most)) {
      const row = body.insertRow(), link = document.createElement("a");
      link.href = each.href; link.textContent = each.name;
      row.insertCell().append(link);
      const share = cell(each.density, row); share.className = "number";
      cell(each.text, row);
    }
    const shown = Math.min(found.length, most);
    count.textContent = `${found.length} of ${latents.length} latents`
      + (shown < found.length ? `, the first ${shown} shown` : "");
  };
  field.addEventListener("input", show);
  show();
})();
"""


class Piece(NamedTuple):
    """A piece of text with a latent's activation at each token."""

    tokens: Sequence[str]
    activations: Sequence[float]
    peak: int
    """The token of the largest."""


class Link(NamedTuple):
    """A row of a table: latents that interact, each with its page and what it means."""

    value: float
    names: Sequence[str]
    hrefs: Sequence[str | None]
    notes: Sequence[str]


class Entry(NamedTuple):
    """A latent in the index."""

    name: str
    href: str
    density: float
    """The share of tokens at which it is active."""
    words: Sequence[str]
    """By which it can be found: tokens at which it is most active, and that it raises."""


def pieces(examples: Sequence[Piece]) -> Fragment:
    """Pieces of text, each token shaded by its activation, the largest outlined."""
    largest = max((abs(v) for piece in examples for v in piece.activations), default=0) or 1.0
    rows = []
    for piece in examples:
        spans = "".join(
            f"<span{' class=peak' if place == piece.peak else ''} "
            f'style="background:{rgba(NEGATIVE if v < 0 else POSITIVE, 0.6 * abs(v) / largest)}" '
            f'title="{v:.3g}">{escape(token)}</span>'
            for place, (token, v) in enumerate(zip(piece.tokens, piece.activations, strict=True))
        )
        rows.append(f"<li><b>{piece.activations[piece.peak]:.2f}</b>{spans}</li>")
    return Fragment(f'{_STYLE}<ul class="latent-text">{"".join(rows)}</ul>')


def tokens_by_value(tokens: Sequence[tuple[str, float]], heading: str) -> Fragment:
    """Tokens in a table with a number each."""
    rows = "".join(
        f'<tr><td class="number">{_signed(value)}</td><td>{escape(visible(token))}</td></tr>'
        for token, value in tokens
    )
    return Fragment(
        f'{_STYLE}<table class="latent-links"><thead><tr><th></th><th>{escape(heading)}</th></tr>'
        f"</thead><tbody>{rows}</tbody></table>"
    )


def links(rows: Sequence[Link], heading: str) -> Fragment:
    """Latents that interact, with links to their pages."""
    shown = []
    for row in rows:
        cells = "".join(
            f"<td>{_linked(name, href)}<small>{escape(note)}</small></td>"
            for name, href, note in zip(row.names, row.hrefs, row.notes, strict=True)
        )
        shown.append(f'<tr><td class="number">{_signed(row.value)}</td>{cells}</tr>')
    width = max((len(row.names) for row in rows), default=1)
    return Fragment(
        f'{_STYLE}<table class="latent-links"><thead><tr><th class="number">interaction</th>'
        f'<th colspan="{width}">{escape(heading)}</th></tr></thead>'
        f"<tbody>{''.join(shown)}</tbody></table>"
    )


def index(entries: Sequence[Entry]) -> Fragment:
    """A list of latents with a field to search it, by number or by the tokens that they mean."""
    latents = [
        {
            "name": each.name,
            "href": each.href,
            "density": f"{each.density:.2%}",
            "text": " ".join(map(visible, each.words)),
            "find": " ".join([each.name, *each.words]).lower(),
        }
        for each in entries
    ]
    return Fragment(
        f'{_STYLE}<p><input id="search" class="latent-search" type="search" autocomplete="off" '
        'aria-label="Search latents" placeholder="A number, or a token: latent 12, happy"></p>'
        '<p id="count" role="status"></p><table class="latent-links"><thead><tr><th>latent</th>'
        '<th class="number">active at</th><th>tokens</th></tr></thead><tbody id="found"></tbody>'
        f"</table><script>{_SEARCH % script_json(latents)}</script>"
    )


def _linked(name: str, href: str | None) -> str:
    return escape(name) if href is None else f'<a href="{escape(href)}">{escape(name)}</a>'


def _signed(value: float) -> str:
    return f"{value:+.3g}".replace("-", "&minus;")
