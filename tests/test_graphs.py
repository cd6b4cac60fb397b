"""The drawing of a circuit: all is there, nothing overlaps, no token leaves its place."""

import math
import re
from html import escape
from html.parser import HTMLParser

import pandas as pd
import pytest

import bilinear_lens as bl
from bilinear_lens.views import graphs
from bilinear_lens.views.document import Fragment
from bilinear_lens.views.style import NEGATIVE, POSITIVE, rgba

EVIL = "</script></title><img/src=x/onerror=window.hacked=1>&amp;\"'"
MINUS = "\u2212"
TAGS = "b bdi br button div i input label output p path script span strong style svg title"
Point = tuple[float, float]


def node(
    name: str,
    kind: str,
    layer: int,
    score: float,
    *,
    position: int | None = None,
    token: str | None = None,
    eigenvalue: float | None = None,
) -> dict:
    reads = [] if kind == "embedding" else [f" most of {name}", EVIL]
    least = [] if kind == "embedding" else [f" least of {name}", "&lt;"]
    return {
        "node": name,
        "kind": kind,
        "layer": layer,
        "eigenvalue": eigenvalue,
        "position": position,
        "token": token,
        "score": score,
        "reads_most": reads,
        "reads_least": least,
    }


def small() -> tuple[pd.DataFrame, pd.DataFrame]:
    """A circuit on a prompt, with several ways through it; some edges skip layers."""
    nodes = [
        node("' named'", "output", 2, 1.0, position=7, token=" girl"),
        node("MLP 1 e0@7", "eigenvector", 1, 0.6, position=7, token=" girl", eigenvalue=0.25),
        node("L1H3@5", "head", 1, -0.125, position=5, token=EVIL),
        node("MLP 0 e2@7", "eigenvector", 0, -0.05, position=7, token=" girl", eigenvalue=-1.5),
        node("embedding@5", "embedding", -1, 0.3, position=5, token=EVIL),
        node("embedding@7", "embedding", -1, 0.2, position=7, token=" girl"),
    ]
    edges = [
        ("MLP 1 e0@7", "' named'", 0.5),
        ("L1H3@5", "' named'", -0.125),
        ("MLP 0 e2@7", "MLP 1 e0@7", -0.05),
        ("embedding@7", "MLP 1 e0@7", 0.15),
        ("embedding@7", "MLP 0 e2@7", 0.04),
        ("embedding@5", "L1H3@5", 0.3),
        ("embedding@5", "MLP 0 e2@7", 0.001),
    ]
    return pd.DataFrame(nodes), pd.DataFrame(edges, columns=["lower", "upper", "score"])


def large(n: int = graphs.MOST_NODES) -> tuple[pd.DataFrame, pd.DataFrame]:
    """From weights: five layers of very different sizes; a node writes to up to three above."""
    nodes, edges = [node("o", "output", 2, 1.0)], []
    places = [("head", 1), *[("eigenvector", 0)] * 2, *[("head", 0)] * 5, *[("embedding", -1)] * 3]
    for i in range(1, n):
        kind, layer = places[i % len(places)]
        nodes.append(node(f"n{i}", kind, layer, 1 / i))
    for lower in nodes[1:]:
        above = [
            each["node"]
            for each in nodes
            if (each["layer"], each["kind"] == "eigenvector")
            > (lower["layer"], lower["kind"] == "eigenvector")
        ]
        k = len(edges)
        edges += [
            (lower["node"], upper, (-1) ** k / (k + 1))
            for upper in dict.fromkeys([above[0], above[k % len(above)], above[-1]])
        ]
    return pd.DataFrame(nodes), pd.DataFrame(edges, columns=["lower", "upper", "score"])


class Drawing(HTMLParser):
    """What stands in the fragment, as a browser reads it."""

    def __init__(self, fragment: str):
        super().__init__()
        self.tags: set[str] = set()
        self.boxes: dict[int, dict] = {}
        self.lines: list[dict] = []
        self.layers: list[tuple[str, float]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside: list[tuple[str, dict]] = []
        self.feed(fragment)
        assert not self._inside

    def handle_starttag(self, tag: str, attrs: list) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        style = dict(re.findall(r"([\w-]+): ?([^;]+)", given.get("style") or ""))
        given |= {"text": "", "note": "", "css": style}
        if tag == "button":
            self.boxes[int(given["data-node"])] = given
        elif tag == "path":
            self.lines.append(given)
        elif given.get("class") == "canvas":
            self.size = pixels(style["width"]), pixels(style["height"])
        if tag not in ("input", "br"):
            self._inside.append((tag, given))

    def handle_endtag(self, tag: str) -> None:
        opened, given = self._inside.pop()
        assert opened == tag
        if given.get("class") == "layer":
            self.layers.append((given["text"], pixels(given["css"]["top"])))

    def handle_data(self, data: str) -> None:
        if self._inside[-1][0] == "script":
            self.scripts.append(data)
        elif self._inside[-1][0] != "style":
            self.text += data
            noted = any("note" in each.get("class", "") for _, each in self._inside)
            for _, given in self._inside:
                given["note" if noted else "text"] += data

    def corner(self, number: int) -> Point:
        css = self.boxes[number]["css"]
        return pixels(css["left"]), pixels(css["top"])

    def rectangle(self, number: int) -> tuple[float, float, float, float]:
        (x, y), css = self.corner(number), self.boxes[number]["css"]
        return x, y, x + pixels(css["width"]), y + pixels(css["height"])


def pixels(length: str) -> float:
    return float(length.removesuffix("px"))


def points(way: str) -> list[Point]:
    """Along a path of curves and vertical lines, closely."""
    found: list[Point] = []
    for command, numbers in re.findall(r"([MCv])([^MCv]+)", way):
        values = [float(number) for number in numbers.split()]
        if command == "M":
            found.append((values[0], values[1]))
            continue
        x, y = found[-1]
        corners = [(x, y + values[0] * i / 3) for i in range(4)]
        if command == "C":
            corners = [(x, y), *zip(values[::2], values[1::2], strict=True)]
        for step in range(1, 13):
            t = step / 12
            parts = [math.comb(3, i) * t**i * (1 - t) ** (3 - i) for i in range(4)]
            x, y = (sum(p * c[k] for p, c in zip(parts, corners, strict=True)) for k in (0, 1))
            found.append((x, y))
    return found


def straight(ends: list[Point]) -> list[Point]:
    (x0, y0), (x1, y1) = ends[0], ends[-1]
    return [(x0 + (x1 - x0) * i / 100, y0 + (y1 - y0) * i / 100) for i in range(101)]


def covered(line: list[Point], drawing: Drawing) -> bool:
    """Whether it runs behind a node."""
    rectangles = [drawing.rectangle(number) for number in drawing.boxes]
    return any(
        left < x < right and top < y < bottom
        for x, y in line
        for left, top, right, bottom in rectangles
    )


CIRCUITS = pytest.mark.parametrize(
    ("nodes", "edges"), [small(), large(), *(large(n) for n in (2, 3, 17, 40))]
)


@CIRCUITS
def test_every_node_is_there_with_its_score_and_sign(nodes, edges):
    drawing = Drawing(graphs.circuit(nodes, edges))
    assert sorted(drawing.boxes) == list(range(len(nodes)))
    for number, row in enumerate(nodes.to_dict("records")):
        box = drawing.boxes[number]
        assert float(box["data-score"]) == pytest.approx(row["score"], rel=1e-5)
        colour = POSITIVE if row["score"] > 0 else NEGATIVE
        assert box["css"]["border-color"].startswith(rgba(colour)[:-3])
        assert box["css"]["background"].startswith(rgba(colour)[:-3])
        assert box["text"].startswith(row["node"])


@CIRCUITS
def test_every_edge_is_there_with_its_score_and_sign(nodes, edges):
    drawing = Drawing(graphs.circuit(nodes, edges))
    names = nodes["node"].tolist()
    drawn = {
        (names[int(line["data-lower"])], names[int(line["data-upper"])]): line
        for line in drawing.lines
    }
    assert len(drawing.lines) == len(drawn) == len(edges)
    widths = []
    for row in edges.to_dict("records"):
        line = drawn[row["lower"], row["upper"]]
        assert float(line["data-score"]) == pytest.approx(row["score"], rel=1e-5)
        colour = POSITIVE if row["score"] > 0 else NEGATIVE
        assert line["stroke"].startswith(rgba(colour)[:-3])
        assert f"{row['lower']} to {row['upper']}" in line["text"]
        widths.append((abs(row["score"]), float(line["stroke-width"])))
    widths.sort()
    assert [width for _, width in widths] == sorted(width for _, width in widths)
    assert len(edges) < 3 or widths[0][1] < widths[-1][1]


@CIRCUITS
def test_no_two_nodes_overlap(nodes, edges):
    drawing = Drawing(graphs.circuit(nodes, edges))
    width, height = drawing.size
    rectangles = [drawing.rectangle(number) for number in drawing.boxes]
    for i, (left, top, right, bottom) in enumerate(rectangles):
        assert left > 0 and top > 0 and right < width and bottom < height
        for a, b, c, d in rectangles[:i]:
            assert right < a or c < left or bottom < b or d < top
    assert width < 1000  # a page is no wider


@CIRCUITS
def test_layers_go_from_above_to_below(nodes, edges):
    drawing = Drawing(graphs.circuit(nodes, edges))
    number = {name: i for i, name in enumerate(nodes["node"])}
    for lower, upper in zip(edges["lower"], edges["upper"], strict=True):
        assert drawing.corner(number[lower])[1] > drawing.corner(number[upper])[1]
    tops = [top for _, top in sorted(drawing.layers, key=lambda layer: layer[1])]
    assert tops == sorted(set(tops))
    order = ["output", "MLP 1", "attention 1", "MLP 0", "attention 0", "tokens"]
    assert [name for name, _ in sorted(drawing.layers, key=lambda layer: layer[1])] == [
        name for name in order if name in dict(drawing.layers)
    ]
    # each layer is alone between its name and the next
    for name, kind, layer in (("tokens", "embedding", -1), ("MLP 0", "eigenvector", 0)):
        rows = {
            drawing.corner(i)[1]
            for i, row in enumerate(nodes.to_dict("records"))
            if (row["kind"], row["layer"]) == (kind, layer)
        }
        if rows:
            below = [top for top in tops if top > dict(drawing.layers)[name]]
            assert min(rows) <= dict(drawing.layers)[name] < min(rows) + 40
            assert not below or max(rows) < below[0]


def test_on_a_prompt_tokens_go_from_left_to_right():
    nodes, edges = small()
    drawing = Drawing(graphs.circuit(nodes, edges))
    assert drawing.corner(4)[0] < drawing.corner(5)[0]
    nodes["position"] = 9 - nodes["position"]
    drawing = Drawing(graphs.circuit(nodes, edges))
    assert drawing.corner(4)[0] > drawing.corner(5)[0]


def test_from_weights_nodes_stand_below_what_they_write_to():
    nodes = [node("o", "output", 1, 1.0)]
    nodes += [node(name, "eigenvector", 0, 0.5) for name in ("a", "b")]
    nodes += [node(name, "head", 0, 0.25) for name in ("below b", "below a")]
    edges = [("a", "o", 0.5), ("b", "o", 0.5), ("below a", "a", 0.25), ("below b", "b", 0.25)]
    table = pd.DataFrame(edges, columns=["lower", "upper", "score"])
    drawing = Drawing(graphs.circuit(pd.DataFrame(nodes), table))
    a, b, below_b, below_a = (drawing.corner(i)[0] for i in range(1, 5))
    assert a == below_a < b == below_b


@CIRCUITS
def test_edges_join_their_nodes_and_run_behind_none(nodes, edges):
    drawing = Drawing(graphs.circuit(nodes, edges))
    for line in drawing.lines:
        way = points(line["d"])
        left, _, right, bottom = drawing.rectangle(int(line["data-upper"]))
        assert way[0] == pytest.approx(((left + right) / 2, bottom), abs=1)
        left, top, right, _ = drawing.rectangle(int(line["data-lower"]))
        assert way[-1] == pytest.approx(((left + right) / 2, top), abs=1)
        assert not covered(way, drawing)
    if len(nodes) == graphs.MOST_NODES:
        assert any(covered(straight(points(line["d"])), drawing) for line in drawing.lines)


def test_a_note_says_what_a_node_reads_and_carries():
    nodes, edges = small()
    drawing = Drawing(graphs.circuit(nodes, edges))
    note = drawing.boxes[3]["note"]
    assert note.startswith("MLP 0 e2@7 at ␣girl")
    assert f"{MINUS}5 % of the output" in note and f"eigenvalue {MINUS}1.5" in note
    assert f"reads most: ␣most␣of␣MLP␣0␣e2@7 {EVIL}" in note
    assert "least: ␣least␣of␣MLP␣0␣e2@7 &lt;" in note
    assert "measured" not in drawing.text
    assert "eigenvalue" not in drawing.boxes[2]["note"]
    assert "reads" not in drawing.boxes[5]["note"]
    nodes["measured"], edges["measured"] = nodes["score"] / 2, edges["score"] / 4
    drawing = Drawing(graphs.circuit(nodes, edges))
    assert f"{MINUS}5 % of the output, measured {MINUS}2.5 %" in drawing.boxes[3]["note"]
    assert "50 % of the output, measured 12.5 %" in drawing.lines[-1]["text"]


def test_a_node_shows_its_token_or_without_a_prompt_what_it_reads():
    nodes, edges = small()
    assert (
        Drawing(graphs.circuit(nodes, edges))
        .boxes[1]["text"]
        .startswith("MLP 1 e0@7␣girl · ␣most␣of")
    )
    drawing = Drawing(graphs.circuit(nodes.assign(token=None, position=None), edges))
    assert drawing.boxes[1]["text"].startswith("MLP 1 e0@7␣most␣of␣MLP␣1␣e0@7 ")
    assert " at " not in drawing.boxes[1]["note"]


def test_no_token_can_leave_its_place():
    nodes, edges = small()
    nodes["node"], edges["lower"], edges["upper"] = (
        names + EVIL for names in (nodes["node"], edges["lower"], edges["upper"])
    )
    html = graphs.circuit(nodes, edges, title=EVIL)
    assert isinstance(html, Fragment)
    drawing = Drawing(html)
    assert " ".join(sorted(drawing.tags)) == TAGS
    assert len(drawing.scripts) == 1 and "hacked" not in drawing.scripts[0]
    assert "onerror" not in "".join(re.findall(r"<[^>]*>", html))
    assert drawing.text.startswith(EVIL)
    assert drawing.boxes[0]["text"].startswith(f"' named'{EVIL}␣girl · ")
    assert all(line["text"].count(EVIL) == 2 for line in drawing.lines)


def test_a_fragment_asks_for_nothing_and_is_the_same_each_time():
    html = graphs.circuit(*small(), title="t").replace(escape(EVIL), "")
    assert not re.search(r"http|//|url\(|\bsrc|href|@import|fetch|import\(", html)
    assert graphs.circuit(*small()) == graphs.circuit(*small())


@pytest.mark.parametrize("prompt", ["Once upon a time there was a little girl", None])
def test_a_traced_circuit_is_drawn(model, prompt):
    circuit = bl.trace(model, " named", prompt=prompt)
    drawing = Drawing(graphs.circuit(circuit.nodes, circuit.edges, title=circuit.title))
    assert len(drawing.boxes) == len(circuit.nodes) > 10
    assert len(drawing.lines) == len(circuit.edges) > 10
    assert drawing.text.startswith(circuit.title)


def test_a_circuit_that_carries_nothing_is_drawn():
    nodes, edges = small()
    drawing = Drawing(graphs.circuit(nodes.assign(score=0.0), edges.assign(score=0.0)))
    assert "nan" not in str(drawing.lines) and len(drawing.lines) == len(edges)


def test_bad_input_is_refused_with_its_remedy():
    nodes, edges = small()
    with pytest.raises(ValueError, match=r"121 nodes cannot be read; 120 can.*circuit\.top\(60\)"):
        graphs.circuit(*large(graphs.MOST_NODES + 1))
    with pytest.raises(ValueError, match=r"nodes lacks the columns \['kind', 'reads_least'\]"):
        graphs.circuit(nodes.drop(columns=["kind", "reads_least"]), edges)
    with pytest.raises(ValueError, match=r"edges lacks the columns \['upper'\]"):
        graphs.circuit(nodes, edges.drop(columns="upper"))
    with pytest.raises(ValueError, match="edges has no rows"):
        graphs.circuit(nodes, edges.head(0))
    with pytest.raises(ValueError, match=r"join \['embedding@5'\], not in nodes; circuit\.top"):
        graphs.circuit(nodes.drop(index=4), edges)
    with pytest.raises(ValueError, match="first of nodes must be the output"):
        graphs.circuit(nodes.iloc[::-1], edges)
    with pytest.raises(ValueError, match="The nodes' score holds NaN"):
        graphs.circuit(nodes.assign(score=math.nan), edges)
    with pytest.raises(ValueError, match="The edges' score holds NaN"):
        graphs.circuit(nodes, edges.assign(score=math.inf))


def test_colours_are_explained_where_there_are_two():
    nodes, edges = small()
    drawing = Drawing(graphs.circuit(nodes, edges))
    assert "with the output's sign" in drawing.text and "against it" in drawing.text
    positive = graphs.circuit(nodes, edges.assign(score=edges["score"].abs()))
    assert "against it" not in Drawing(positive).text
