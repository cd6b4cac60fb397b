"""One HTML page that needs nothing but itself: the shell around reports and saved token views."""

import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

# 'unsafe-inline' because everything is inline; nothing can be fetched, sent or evaluated.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; base-uri 'none'; form-action 'none'"
)

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbf9; --card: #ffffff; --ink: #1d2127; --quiet: #5b6370; --line: #dfe1e4;
  --link: #1f5fb4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #111112; --card: #1a1a1a; --ink: #e8e8e6; --quiet: #a8acb2; --line: #323436;
    --link: #8ab8f5;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: clamp(20px, 5vw, 64px) clamp(14px, 4vw, 40px); }
h1 {
  margin: 0 0 .4em; font-size: clamp(1.7rem, 1.2rem + 2vw, 2.6rem); line-height: 1.15;
  letter-spacing: -.02em; text-wrap: balance; overflow-wrap: anywhere;
}
a { color: var(--link); }
.lead { max-width: 44em; margin: 0; font-size: 1.12rem; color: var(--quiet); }
nav { margin: 2rem 0 0; padding: .7rem 0; border-block: 1px solid var(--line); font-size: .92rem; }
nav ol {
  display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; margin: 0; padding: 0; list-style: none;
  counter-reset: entry;
}
nav li::before { counter-increment: entry; content: counter(entry) "  "; color: var(--quiet); }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { margin-top: 3.2rem; scroll-margin-top: 1rem; }
section > h2 {
  margin: 0 0 .3em; font-size: 1.4rem; line-height: 1.25; letter-spacing: -.01em;
  overflow-wrap: anywhere;
}
section > p { max-width: 44em; margin: 0 0 1rem; color: var(--quiet); text-wrap: pretty; }
.words { margin: 0; white-space: pre-line; }
.card {
  min-width: 0; padding: clamp(8px, 1.6vw, 20px); border: 1px solid var(--line);
  border-radius: 12px; background: var(--card);
}
.beside { display: grid; gap: 16px; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
@media (max-width: 860px) { .beside { grid-template-columns: minmax(0, 1fr); } }
/* Figures come in a grey that any background bears; here the theme is known. */
.js-plotly-plot :is([class$=title], .legendtext, [class$=tick] text, .cbaxis text, .cbtitle text,
  .annotation-text) { fill: var(--ink) !important; }
/* CircuitsVis draws zero as white: in the dark, lightness turns around, and white is the card's. */
.circuitsvis { padding: 0 !important; background: none !important; }
.circuitsvis > div { padding-bottom: 0 !important; }
.AttentionHeads { max-width: 720px; }
@media (prefers-color-scheme: dark) { .circuitsvis { filter: invert(.9) hue-rotate(180deg); } }
@media print { section { break-inside: avoid; } }
"""


class Fragment(str):
    """A piece of HTML that is safe to show as it is; every other string is escaped."""

    def _repr_html_(self) -> str:
        return str(self)


def script_json(value: Any) -> str:
    """JSON that may stand inside a script element: no character of it can end the element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def document(title: str, *, body: Fragment, scripts: Iterable[str]) -> str:
    """A page that makes no request, light or dark as the reader's system is.

    Args:
        scripts: JavaScript to run before the body.
    """
    elements = "\n".join(f"<script>{script}</script>" for script in scripts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
{elements}
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def save_page(path: str | Path, html: str) -> None:
    """Writes a page whole or not at all: into a neighbouring file, which is then renamed.

    Raises:
        ValueError: if the folder cannot be written.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(html, encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ValueError(
            f"Cannot write {path}: {error.strerror}. Name a file in a folder that exists and "
            "that you may write."
        ) from error
