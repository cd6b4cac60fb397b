"""A circuit, drawn in layers: the output above, tokens below, what carries more drawn thicker."""

from collections.abc import Mapping
from html import escape
from typing import Any

import pandas as pd

from bilinear_lens.views.document import Fragment
from bilinear_lens.views.style import GREY, NEGATIVE, POSITIVE, rgba, visible

MOST_NODES = 120
"""More cannot be read."""

_ACROSS = 8
"""Nodes beside each other; more of a layer are broken into rows."""
_WIDTH, _HEIGHT, _GAP, _BETWEEN = 112, 40, 8, 46
_LABEL = 84
"""For the layers' names at the left."""

_STYLE = """
.bl-circuit { font: 13px/1.45 system-ui, sans-serif; color: inherit; overflow-x: auto; }
.bl-circuit svg { display: block; width: 100%; min-width: 620px; max-width: 1060px; height: auto; }
.bl-circuit text { fill: currentColor; font-size: 12px; }
.bl-circuit .quiet { opacity: .72; font-size: 11px; }
.bl-circuit .node { cursor: pointer; outline: none; }
.bl-circuit .node rect { stroke: @grey; stroke-width: 1; }
.bl-circuit .node .back {
  fill: var(--card, var(--jp-layout-color0, var(--vscode-editor-background, Canvas)));
}
.bl-circuit .node:is(:hover, :focus-visible) rect { stroke: currentColor; stroke-width: 2; }
.bl-circuit .faint { opacity: .1; }
.bl-circuit .gone { display: none; }
.bl-circuit label { display: flex; flex-wrap: wrap; gap: .7em; align-items: center; }
.bl-circuit input { width: 220px; accent-color: @grey; }
.bl-circuit .about { min-height: 6.2em; margin: .4em 0 0; overflow-wrap: anywhere; }
.bl-circuit .about > div { display: none; }
.bl-circuit .about > .shown { display: block; }
""".replace("@grey", GREY)

_SCRIPT = """
for (const root of document.querySelectorAll('.bl-circuit:not([data-ready])')) {
  root.dataset.ready = '';
  const nodes = [...root.querySelectorAll('.node')], edges = [...root.querySelectorAll('.edge')];
  const about = [...root.querySelectorAll('.about > div')], slider = root.querySelector('input');
  let least = 0, chosen = null;
  const follow = (start, from, to) => {
    const seen = new Set([start]), left = [start];
    while (left.length) {
      const at = left.pop();
      for (const edge of edges)
        if (edge.dataset[from] === at && +edge.dataset.score >= least) {
          const next = edge.dataset[to];
          if (!seen.has(next)) { seen.add(next); left.push(next); }
        }
    }
    return seen;
  };
  const draw = () => {
    const reached = follow('0', 'upper', 'lower');
    if (chosen !== null && !reached.has(chosen)) chosen = null;
    const up = chosen && follow(chosen, 'lower', 'upper');
    const down = chosen && follow(chosen, 'upper', 'lower');
    for (const node of nodes) {
      const id = node.dataset.node;
      node.classList.toggle('gone', !reached.has(id));
      node.classList.toggle('faint', !!chosen && !up.has(id) && !down.has(id));
      node.setAttribute('aria-pressed', id === chosen);
    }
    for (const edge of edges) {
      const {lower, upper, score} = edge.dataset;
      edge.classList.toggle('gone', +score < least || !reached.has(upper));
      const on = !chosen || [up, down].some(way => way.has(lower) && way.has(upper));
      edge.classList.toggle('faint', !on);
    }
    root.querySelector('output').textContent = (100 * least).toPrecision(2) + ' %';
  };
  const show = id => {
    for (const each of about) each.classList.toggle('shown', each.dataset.node === id);
  };
  for (const node of nodes) {
    const id = node.dataset.node;
    const choose = () => { chosen = chosen === id ? null : id; show(id); draw(); };
    node.addEventListener('mouseenter', () => show(id));
    node.addEventListener('focus', () => show(id));
    node.addEventListener('click', event => { event.stopPropagation(); choose(); });
    node.addEventListener('keydown', event => {
      if (event.key === 'Enter' || event.key === ' ') { event.preventDefault(); choose(); }
    });
  }
  root.querySelector('svg').addEventListener('click', () => { chosen = null; draw(); });
  slider.addEventListener('input', () => {
    const most = +slider.dataset.most;
    least = +slider.value ? most * 10 ** (3 * (slider.value / 100 - 1)) : 0;
    draw();
  });
  draw();
}
"""


def circuit(nodes: pd.DataFrame, edges: pd.DataFrame, *, title: str = "") -> Fragment:
    """An interactive drawing, inline in a notebook or as a view in a report; needs no network.

    Point at a node for what it reads; click it for the paths through it, and beside it for all;
    the slider hides what carries less.

    Args:
        nodes, edges: of a `Circuit`, the output first.

    Raises:
        ValueError: if there are more nodes than can be read.
    """
    if len(nodes) > MOST_NODES:
        raise ValueError(
            f"A drawing of {len(nodes)} nodes cannot be read; {MOST_NODES} can. Draw "
            f"circuit.top({MOST_NODES // 2}), or trace with a smaller width or depth."
        )
    rows: list[dict[str, Any]] = nodes.to_dict("records")
    places = _places(rows, edges)
    number = {row["node"]: i for i, row in enumerate(rows)}
    width = _LABEL + _ACROSS * (_WIDTH + _GAP)
    height = max(y for _, y in places) + _HEIGHT + 10
    most = max([*edges["score"].abs(), 1e-12])
    lines = "".join(
        _line(places, number[edge["lower"]], number[edge["upper"]], edge["score"], most)
        for edge in sorted(edges.to_dict("records"), key=lambda edge: abs(edge["score"]))
    )
    boxes = "".join(_box(i, row, *places[i]) for i, row in enumerate(rows))
    names = "".join(
        f'<text class="quiet" x="0" y="{y + _HEIGHT / 2 + 4:.0f}">{escape(name)}</text>'
        for name, y in _layers(rows, places).items()
    )
    about = "".join(
        f'<div data-node="{i}"{" class=shown" if i == 0 else ""}>{_about(row)}</div>'
        for i, row in enumerate(rows)
    )
    caption = f"<p><strong>{escape(title)}</strong></p>" if title else ""
    return Fragment(
        f'<div class="bl-circuit"><style>{_STYLE}</style>{caption}'
        '<label>Hide what carries less than <input type="range" min="0" max="100" value="0" '
        f'data-most="{most:.6g}"> <output>0 %</output> of the output</label>'
        f'<svg viewBox="0 0 {width} {height:.0f}" role="group" aria-label="{escape(title)}">'
        f'{names}<g fill="none">{lines}</g>{boxes}</svg>'
        f'<div class="about" aria-live="polite">{about}</div><script>{_SCRIPT}</script></div>'
    )


def _places(rows: list[dict[str, Any]], edges: pd.DataFrame) -> list[tuple[float, float]]:
    """The upper left corner of each node: layers from above to below, in each of them by position,
    or near the nodes above."""
    above: dict[str, list[str]] = {}
    for edge in edges.to_dict("records"):
        above.setdefault(edge["lower"], []).append(edge["upper"])
    x: dict[str, float] = {}
    found: dict[str, tuple[float, float]] = {}
    y = 6.0
    for level in sorted({_level(row) for row in rows}, reverse=True):
        layer = [row for row in rows if _level(row) == level]

        def order(row: Mapping[str, Any]) -> tuple[float, float]:
            uppers = [x[name] for name in above.get(row["node"], []) if name in x]
            position = -1 if pd.isna(row["position"]) else row["position"]
            return position, sum(uppers) / len(uppers) if uppers else 0.0

        layer.sort(key=order)
        n_rows = -(-len(layer) // _ACROSS)
        for i in range(n_rows):
            part = layer[i::n_rows]  # neighbours stand above each other
            left = _LABEL + (_ACROSS - len(part)) * (_WIDTH + _GAP) / 2
            for j, row in enumerate(part):
                x[row["node"]] = left + j * (_WIDTH + _GAP)
                found[row["node"]] = x[row["node"]], y
            y += _HEIGHT + _GAP
        y += _BETWEEN
    return [found[row["node"]] for row in rows]


def _level(row: Mapping[str, Any]) -> tuple[int, bool]:
    return row["layer"], row["kind"] == "eigenvector"


def _layers(rows: list[dict[str, Any]], places: list[tuple[float, float]]) -> dict[str, float]:
    """The name of each layer, and where it begins."""
    named: dict[str, float] = {}
    for row, (_, y) in zip(rows, places, strict=True):
        kind, layer = row["kind"], row["layer"]
        name = {
            "output": "output",
            "embedding": "tokens",
            "eigenvector": f"MLP {layer}",
            "head": f"attention {layer}",
        }[kind]
        named[name] = min(y, named.get(name, y))
    return named


def _line(
    places: list[tuple[float, float]], lower: int, upper: int, score: float, most: float
) -> str:
    (x0, y0), (x1, y1) = places[lower], places[upper]
    x0, x1, y1 = x0 + _WIDTH / 2, x1 + _WIDTH / 2, y1 + _HEIGHT
    middle = (y0 + y1) / 2
    colour = rgba(POSITIVE if score >= 0 else NEGATIVE, 0.35 + 0.5 * abs(score) / most)
    return (
        f'<path class="edge" data-lower="{lower}" data-upper="{upper}" '
        f'data-score="{abs(score):.6g}" stroke="{colour}" '
        f'stroke-width="{0.7 + 7 * abs(score) / most:.2f}" '
        f'd="M{x0:.0f} {y0:.0f}C{x0:.0f} {middle:.0f} {x1:.0f} {middle:.0f} {x1:.0f} {y1:.0f}"/>'
    )


def _box(number: int, row: Mapping[str, Any], x: float, y: float) -> str:
    share = min(abs(row["score"]), 1.0)
    fill = rgba(POSITIVE if row["score"] >= 0 else NEGATIVE, 0.06 + 0.5 * share)
    first, second = row["node"], _tokens(row)
    return (
        f'<g class="node" data-node="{number}" tabindex="0" role="button" '
        f'aria-label="{escape(first)} {escape(second)}" transform="translate({x:.1f} {y:.1f})">'
        f'<rect class="back" width="{_WIDTH}" height="{_HEIGHT}" rx="7"/>'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" rx="7" fill="{fill}"/>'
        f'<text x="{_WIDTH / 2}" y="16" text-anchor="middle">{escape(_cut(first, 17))}</text>'
        f'<text class="quiet" x="{_WIDTH / 2}" y="31" text-anchor="middle">'
        f"{escape(_cut(second, 18))}</text></g>"
    )


def _tokens(row: Mapping[str, Any]) -> str:
    """In a node: its token on a prompt, or what it reads."""
    if row["token"] is not None:
        return visible(row["token"])
    return " ".join(map(visible, row["reads_most"]))


def _about(row: Mapping[str, Any]) -> str:
    measured = f", measured {row['measured']:.3g}" if "measured" in row else ""
    where = "" if row["token"] is None else f" at {visible(row['token'])}"
    weight = "" if pd.isna(row["eigenvalue"]) else f"; eigenvalue {row['eigenvalue']:+.3g}"
    reads = ""
    if row["reads_most"]:
        most, least = (" ".join(map(visible, row[end])) for end in ("reads_most", "reads_least"))
        reads = f"<br>reads most: {escape(most)}<br>least: {escape(least)}"
    return (
        f"<strong>{escape(row['node'])}</strong>{escape(where)}: share of the output "
        f"{row['score']:.3g}{measured}{weight}{reads}"
    )


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
