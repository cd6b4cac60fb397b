"""A report: token views, figures and tables on one page that opens offline."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from bilinear_lens.views.document import Fragment, document, save_page
from bilinear_lens.views.tokens import TokenView, circuitsvis_js

__all__ = ["Fragment", "Section", "page", "save_page"]

View = TokenView | go.Figure | str
"""What a section shows; a string that is no `Fragment` is escaped."""


@dataclass(frozen=True)
class Section:
    """A part of a report."""

    heading: str
    text: str
    """What to see in the body; empty for nothing."""
    body: View | Sequence[View]
    """One view, or several to stand side by side."""

    @property
    def views(self) -> list[View]:
        return [self.body] if isinstance(self.body, View) else list(self.body)


def page(title: str, *, lead: str, sections: Sequence[Section]) -> str:
    """A self-contained HTML page, light or dark, that makes no network request.

    CircuitsVis's and Plotly's scripts are each on it once, and only if something needs them.

    Args:
        lead: what the page says, in a sentence or two.

    Raises:
        ValueError: if there are no sections.
    """
    if not sections:
        raise ValueError("A page needs at least one section.")
    views = [view for section in sections for view in section.views]
    scripts = []
    if any(isinstance(view, TokenView) for view in views):
        scripts.append(circuitsvis_js())
    if any(isinstance(view, go.Figure) for view in views):
        scripts.append(get_plotlyjs())
    entries = "".join(
        f'<li><a href="#section-{number}">{escape(section.heading)}</a></li>'
        for number, section in enumerate(sections, start=1)
    )
    body = Fragment(
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>'
        f'<nav aria-label="Contents"><ol>{entries}</ol></nav></header>\n'
        + "\n".join(_section(section, number) for number, section in enumerate(sections, start=1))
    )
    return document(title, body=body, scripts=scripts)


def _section(section: Section, number: int) -> str:
    cards = "".join(
        f'<div class="card">{_view(view, f"view-{number}-{place}")}</div>'
        for place, view in enumerate(section.views, start=1)
    )
    text = f"<p>{escape(section.text)}</p>" if section.text else ""
    return (
        f'<section id="section-{number}"><h2>{escape(section.heading)}</h2>{text}'
        f'<div class="beside" style="--columns: {len(section.views)}">{cards}</div></section>'
    )


def _view(view: View, name: str) -> str:
    match view:
        case TokenView():
            return view.markup(name)
        case go.Figure():
            return view.to_html(
                full_html=False,
                include_plotlyjs=False,
                div_id=name,
                config={"displaylogo": False, "modeBarButtons": [["toImage"]]},
                default_height="400px",
            )
        case Fragment():
            return view
        case _:
            return f'<p class="words">{escape(view)}</p>'
