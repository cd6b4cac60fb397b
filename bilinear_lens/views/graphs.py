"""A circuit, drawn in layers: the output above, tokens below, what carries more drawn thicker."""

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

import pandas as pd

from bilinear_lens.views.checks import check_columns, check_finite
from bilinear_lens.views.document import Fragment
from bilinear_lens.views.style import GREY, NEGATIVE, POSITIVE, rgba, visible

MOST_NODES = 120
"""More cannot be read."""

_NODE_COLUMNS = (
    "node",
    "kind",
    "layer",
    "eigenvalue",
    "position",
    "token",
    "score",
    "reads_most",
    "reads_least",
)
_EDGE_COLUMNS = ("lower", "upper", "score")

# In pixels: text keeps its size, and what is too wide scrolls.
_ACROSS = 6
"""Nodes beside each other; more of a layer are broken into rows."""
_WIDTH, _HEIGHT = 126, 42
_BESIDE, _BELOW, _BETWEEN = 20, 28, 52
"""Space between nodes, between rows of a layer, and between layers."""
_NAMES = 84
"""For the layers' names at the left, which do not scroll."""
_NOTE = 200
"""A node with its note is at most this high."""

# Colours are inherited or half transparent: the page or notebook around decides light or dark.
# A note lies over the drawing, so that it has its own: those of the figures' hover labels.
_STYLE = """
.bl-circuit { font: 13px/1.45 system-ui, sans-serif; color: inherit; }
.bl-circuit label { display: flex; flex-wrap: wrap; gap: 0 .7em; align-items: center; }
.bl-circuit input { width: 220px; accent-color: @grey; }
.bl-circuit .key { margin-left: auto; }
.bl-circuit .key i {
  display: inline-block; width: 1.6em; height: 4px; margin: 0 .4em .2em .8em; border-radius: 2px;
}
.bl-circuit .frame { display: flex; margin: .5em 0; }
.bl-circuit .names { position: relative; flex: 0 0 @namespx; }
.bl-circuit .names > * { position: absolute; }
@media (max-width: 480px) { .bl-circuit .names { display: none; } }
.bl-circuit .view { overflow-x: auto; flex: 1; min-width: 0; }
.bl-circuit .canvas { position: relative; }
.bl-circuit .canvas > * { position: absolute; }
.bl-circuit svg { inset: 0; width: 100%; height: 100%; }
.bl-circuit .layer { font-size: 12px; opacity: .8; }
.bl-circuit .node {
  box-sizing: border-box; margin: 0; padding: 0 6px; border: 1.5px solid; border-radius: 7px;
  font: inherit; font-size: 12px; color: inherit; cursor: pointer;
}
.bl-circuit .node > span {
  display: block; overflow: hidden; white-space: nowrap; text-overflow: ellipsis;
}
.bl-circuit .node:is(:hover, :focus-visible) {
  outline: 2px solid; outline-offset: 1px; z-index: 1;
}
.bl-circuit .node[aria-pressed=true] { outline: 3px solid; outline-offset: 1px; }
.bl-circuit .node > .note {
  display: none; position: absolute; top: calc(100% + 6px); box-sizing: border-box;
  width: max-content; max-width: 300px; max-height: 150px; padding: 6px 10px;
  border-radius: 7px; background: #2b2f36; color: white; text-align: left;
  white-space: normal; overflow-wrap: anywhere; pointer-events: none;
}
.bl-circuit .node > .note.over { top: auto; bottom: calc(100% + 6px); }
.bl-circuit .node:is(:hover, :focus-visible) > .note { display: block; }
.bl-circuit .faint:not(:hover, :focus-visible) { opacity: .12; }
.bl-circuit .gone { display: none; }
""".replace("@grey", GREY).replace("@names", str(_NAMES))

_SCRIPT = """
for (const root of document.querySelectorAll('.bl-circuit:not([data-ready])')) {
  root.dataset.ready = '';
  const nodes = [...root.querySelectorAll('.node')], edges = [...root.querySelectorAll('path')];
  const view = root.querySelector('.view'), slider = root.querySelector('input');
  let least = 0, chosen = null;
  const carries = edge => Math.abs(edge.dataset.score) >= least;
  const follow = (start, from, to) => {
    const seen = new Set([start]);
    for (const at of seen)
      for (const edge of edges)
        if (edge.dataset[from] === at && carries(edge)) seen.add(edge.dataset[to]);
    return seen;
  };
  const draw = () => {
    const reached = follow('0', 'upper', 'lower');
    if (!reached.has(chosen)) chosen = null;
    const ways = chosen && [follow(chosen, 'lower', 'upper'), follow(chosen, 'upper', 'lower')];
    const off = (...ends) => !!ways && !ways.some(way => ends.every(end => way.has(end)));
    for (const node of nodes) {
      const id = node.dataset.node;
      node.classList.toggle('gone', !reached.has(id));
      node.classList.toggle('faint', off(id));
      node.setAttribute('aria-pressed', id === chosen);
    }
    for (const edge of edges) {
      const {lower, upper} = edge.dataset;
      edge.classList.toggle('gone', !carries(edge) || !reached.has(upper));
      edge.classList.toggle('faint', off(lower, upper));
    }
    root.querySelector('output').textContent = +(100 * least).toPrecision(2) + ' %';
  };
  const choose = id => { chosen = id === chosen ? null : id; draw(); };
  const keepInView = ({target}) => {
    const node = target.closest('.node'), note = node?.lastElementChild;
    if (!note) return;
    const most = view.scrollLeft + view.clientWidth - note.offsetWidth;
    const left = Math.max(view.scrollLeft, Math.min(node.offsetLeft, most));
    note.style.left = left - node.offsetLeft - node.clientLeft + 'px';
  };
  view.addEventListener('mouseover', keepInView);
  view.addEventListener('focusin', keepInView);
  view.addEventListener('click', ({target}) => {
    choose(target.closest('.node')?.dataset.node ?? null);
  });
  root.addEventListener('keydown', ({key}) => { if (key === 'Escape') choose(null); });
  slider.addEventListener('input', () => {
    least = +slider.value ? slider.dataset.most * 10 ** (3 * (slider.value / 100 - 1)) : 0;
    draw();
  });
  draw();
  view.scrollLeft = nodes[0].offsetLeft + (nodes[0].offsetWidth - view.clientWidth) / 2;
}
"""


def circuit(nodes: pd.DataFrame, edges: pd.DataFrame, *, title: str = "") -> Fragment:
    """An interactive drawing, inline in a notebook or as a view in a report; needs no network.

    Point at a node for what it reads; click it for the paths through it, and beside it (or press
    Escape) for all; the slider hides what carries less.

    Args:
        nodes, edges: of a `Circuit`, the output first.

    Raises:
        ValueError: if a column is missing, a table has no rows, a score is not finite, an edge
            names no node, or there are more nodes than can be read.
    """
    check_columns(nodes, _NODE_COLUMNS, "nodes")
    check_columns(edges, _EDGE_COLUMNS, "edges")
    check_finite(nodes["score"], "The nodes' score")
    check_finite(edges["score"], "The edges' score")
    if len(nodes) > MOST_NODES:
        raise ValueError(
            f"A drawing of {len(nodes)} nodes cannot be read; {MOST_NODES} can. Draw "
            f"circuit.top({MOST_NODES // 2}), or trace with a smaller width or depth."
        )
    if nodes["kind"].iloc[0] != "output":
        raise ValueError("The first of nodes must be the output, as in circuit.nodes.")
    if unknown := sorted({*edges["lower"], *edges["upper"]} - {*nodes["node"]}):
        raise ValueError(f"edges join {unknown}, not in nodes; circuit.top(n) cuts both.")
    boxes: list[dict[str, Any]] = nodes.to_dict("records")
    lines: list[dict[str, Any]] = edges.to_dict("records")
    rows = _rows(boxes, lines)
    places = {name: (x, y) for y, row in rows for name, x in row.items()}
    width = max(x for x, _ in places.values()) + _WIDTH + _BESIDE
    height = max(max(y for _, y in places.values()) + _HEIGHT + 8, 3 * _NOTE // 2)
    most = max(map(abs, edges["score"])) or 1.0
    number = {box["node"]: i for i, box in enumerate(boxes)}
    drawn = "".join(
        f'<path data-lower="{number[line["lower"]]}" data-upper="{number[line["upper"]]}" '
        f'd="{_way(places[line["lower"]], places[line["upper"]], rows)}" '
        f"{_stroke(line['score'], most)}><title>{_said(line)}</title></path>"
        for line in sorted(lines, key=lambda line: abs(line["score"]))
    )
    names = "".join(
        f'<span class="layer" style="top:{y + _HEIGHT // 2 - 9}px">{escape(name)}</span>'
        for name, y in _layers(boxes, places).items()
    )
    buttons = "".join(
        _button(number[box["node"]], box, *places[box["node"]], height)
        for box in sorted(boxes, key=lambda box: places[box["node"]][::-1])  # as Tab goes on
    )
    caption = f"<p><strong>{escape(title)}</strong></p>" if title else ""
    # The attribute leaves keys that are pressed in the drawing to it, not to JupyterLab.
    return Fragment(
        f'<div class="bl-circuit" data-lm-suppress-shortcuts="true"><style>{_STYLE}</style>'
        f"{caption}<label>Hide what carries less than "
        f'<input type="range" min="0" max="100" value="0" data-most="{most:.6g}"> '
        f"<span><output>0 %</output> of the output</span>{_key(lines)}</label>"
        f'<div class="frame"><div class="names">{names}</div><div class="view">'
        f'<div class="canvas" style="width:{width}px;height:{height}px">'
        f'<svg fill="none">{drawn}</svg>{buttons}</div></div></div><script>{_SCRIPT}</script></div>'
    )


def _key(lines: list[dict[str, Any]]) -> str:
    """What the colours say, where there are two."""
    if all(line["score"] >= 0 for line in lines):
        return ""
    names = {POSITIVE: "with the output's sign", NEGATIVE: "against it"}
    marks = (f'<i style="background:{rgba(colour)}"></i>{name}' for colour, name in names.items())
    return f'<span class="key">{"".join(marks)}</span>'


_Row = tuple[int, dict[str, int]]
"""Its upper edge, and the left edge of each of its nodes, from left to right."""


def _rows(boxes: list[dict[str, Any]], lines: list[dict[str, Any]]) -> list[_Row]:
    """Layers from above to below, in each of them by position, then by what the nodes write to."""
    above: dict[str, list[str]] = {}
    for line in lines:
        above.setdefault(line["lower"], []).append(line["upper"])
    layers: dict[tuple[int, bool], list[dict[str, Any]]] = {}
    for box in boxes:
        layers.setdefault((box["layer"], box["kind"] == "eigenvector"), []).append(box)
    across = min(_ACROSS, max(map(len, layers.values())))
    x: dict[str, int] = {}
    rows: list[_Row] = []
    y = 6

    def order(box: Mapping[str, Any]) -> tuple[float, float]:
        uppers = [x[name] for name in above.get(box["node"], [])]
        position = float(box["position"]) if _known(box["position"]) else -1.0
        return position, sum(uppers) / len(uppers) if uppers else 0.0

    for _, layer in sorted(layers.items(), reverse=True):
        layer.sort(key=order)
        n_rows = -(-len(layer) // across)
        for i in range(n_rows):
            part = layer[i::n_rows]  # neighbours stand above each other
            first = (across - len(part)) // 2  # all gaps stand above each other
            lefts = [_BESIDE + (first + j) * (_WIDTH + _BESIDE) for j in range(len(part))]
            rows.append((y, {box["node"]: left for box, left in zip(part, lefts, strict=True)}))
            x |= rows[-1][1]
            y += _HEIGHT + _BELOW
        y += _BETWEEN - _BELOW
    return rows


def _layers(boxes: list[dict[str, Any]], places: dict[str, tuple[int, int]]) -> dict[str, int]:
    """The name of each layer, and where it begins."""
    named: dict[str, int] = {}
    for box in boxes:
        name = {
            "output": "output",
            "embedding": "tokens",
            "eigenvector": f"MLP {box['layer']}",
            "head": f"attention {box['layer']}",
        }[box["kind"]]
        y = places[box["node"]][1]
        named[name] = min(y, named.get(name, y))
    return named


def _way(lower: tuple[int, int], upper: tuple[int, int], rows: list[_Row]) -> str:
    """From below the upper node to above the lower one, through the gaps of the rows between."""
    x, y, end = upper[0] + _WIDTH // 2, upper[1] + _HEIGHT, lower[0] + _WIDTH // 2
    way = f"M{x} {y}"
    for top, row in rows:
        if y < top <= lower[1]:
            straight = x + (end - x) * (top - y) // (lower[1] - y)
            to = end if top == lower[1] else _beside(straight, list(row.values()))
            middle = (y + top) // 2
            way += f"C{x} {middle} {to} {middle} {to} {top}"
            if top < lower[1]:
                way += f"v{_HEIGHT}"
            x, y = to, top + _HEIGHT
    return way


def _beside(x: int, lefts: list[int]) -> int:
    """The nearest place where an edge does not run behind a node."""
    margin = 5  # half of the thickest edge, and a little
    starts = [0, *(left + _WIDTH + margin for left in lefts)]
    ends = [*(left - margin for left in lefts), max(x, starts[-1])]
    gaps = zip(starts, ends, strict=True)
    return min((min(max(x, start), end) for start, end in gaps), key=lambda at: abs(at - x))


def _stroke(score: float, most: float) -> str:
    size = abs(score) / most
    return (
        f'data-score="{score:.6g}" stroke-width="{1 + 6 * size:.2f}" '
        f'stroke="{rgba(_colour(score), 0.6 + 0.3 * size)}"'
    )


def _button(number: int, box: Mapping[str, Any], x: int, y: int, height: int) -> str:
    colour, share = _colour(box["score"]), min(abs(box["score"]), 1.0)
    reads = box["reads_most"]
    if _known(box["token"]):
        reads = [box["token"], *(["·", *reads] if reads else [])]
    over = "" if y + _NOTE <= height else " over"
    return (
        f'<button type="button" class="node" data-node="{number}" data-score="{box["score"]:.6g}" '
        f'style="left:{x}px;top:{y}px;width:{_WIDTH}px;height:{_HEIGHT}px;'
        f"background:{rgba(colour, 0.06 + 0.5 * share)};"
        f'border-color:{rgba(colour, 0.8)}"><span>{escape(box["node"])}</span>'
        f'<span>{_tokens(reads)}</span><span class="note{over}">{_note(box)}</span></button>'
    )


def _note(box: Mapping[str, Any]) -> str:
    where = f" at {_tokens([box['token']])}" if _known(box["token"]) else ""
    lines = [f"<b>{escape(box['node'])}</b>{where}", _share(box)]
    if _known(box["eigenvalue"]):
        lines.append(_minus(f"eigenvalue {box['eigenvalue']:+.3g}"))
    if box["reads_most"]:
        lines.append(f"reads most: {_tokens(box['reads_most'])}")
        lines.append(f"least: {_tokens(box['reads_least'])}")
    return "<br>".join(lines)


def _said(line: Mapping[str, Any]) -> str:
    return escape(f"{line['lower']} to {line['upper']}: {_share(line)}")


def _share(row: Mapping[str, Any]) -> str:
    said = f"{100 * row['score']:.3g} % of the output"
    if _known(row.get("measured")):
        said += f", measured {100 * row['measured']:.3g} %"
    return _minus(said)


def _tokens(tokens: Iterable[str]) -> str:
    return " ".join(f"<bdi>{escape(visible(token))}</bdi>" for token in tokens)


def _minus(number: str) -> str:
    """A hyphen is too short beside a plus."""
    return number.replace("-", "\u2212")


def _known(value: Any) -> bool:
    return not pd.isna(value)


def _colour(score: float) -> tuple[int, int, int]:
    return POSITIVE if score >= 0 else NEGATIVE
