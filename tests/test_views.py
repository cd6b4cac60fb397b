"""Views: the numbers read back from figures, nothing escapes its escaping, bad input is refused."""

import json
import re
import socket
import sys

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

from bilinear_lens.spectrum import Spectrum
from bilinear_lens.views import document, plots, report, tables, tokens
from bilinear_lens.views.report import Fragment, Section
from bilinear_lens.views.style import visible

EVIL = "</script><img src=x onerror=alert(1)>"


def trace(figure: go.Figure, name: str) -> dict:
    (found,) = (each for each in figure.to_plotly_json()["data"] if each.get("name") == name)
    return found


def props(markup: str) -> dict:
    """What a token view hands to CircuitsVis, read back from the page."""
    (found,) = re.findall(r"CircuitsVis\.\w+, (\{.*\})\);$", markup, flags=re.MULTILINE)
    return json.loads(found)


@pytest.fixture
def table() -> pd.DataFrame:
    rows = [
        (0, 3.0, 0.75, "+", " girl", 0.5, 0.75),
        (0, 3.0, 0.75, "-", EVIL, -0.25, 0.1875),
        (1, -1.5, -0.25, "+", "\n", 0.125, -0.0234),
    ]
    return pd.DataFrame(
        rows,
        columns=["eigenvector", "value", "share", "end", "token", "projection", "contribution"],
    )


@pytest.fixture
def curve() -> pd.DataFrame:
    rows = [
        (kind, k, -k / scale, -k / scale - 0.5, -k / scale + 0.25)
        for kind, scale in (("top", 2), ("bottom", 70), ("random", 30))
        for k in (300, 2, 1, 7)
    ]
    return pd.DataFrame(rows, columns=["eigenvectors", "k", "logit", "logit_low", "logit_high"])


@pytest.fixture
def view() -> tokens.TokenView:
    activations = torch.tensor([[1.5, -2.0], [0.0, 0.25], [-0.5, 4.0]])
    return tokens.text([" a", "<b>&lt;", EVIL], activations, labels=["v0", EVIL])


def test_spaces_and_control_characters_are_visible():
    assert visible(" girl\n") == "␣girl⏎"
    assert visible("a\x00\u00a0") == "a␀⍽"
    assert visible("plain") == "plain"


def test_the_spectrum_shows_magnitudes_by_rank_and_tells_signs_apart():
    spectrum = Spectrum(torch.tensor([-3.0, 2.0, 0.5, -0.25]), torch.eye(5)[:, :4])
    control = Spectrum(torch.tensor([1.0, -0.75]), torch.eye(5)[:, :2])
    figure = plots.spectrum(spectrum, top=3, title="t", control=control)
    positive, negative = trace(figure, "positive"), trace(figure, "negative")
    assert (list(positive["x"]), list(positive["y"])) == ([1, 2], [2.0, 0.5])
    assert (list(negative["x"]), list(negative["y"])) == ([0], [3.0])
    assert list(negative["customdata"]) == [-3.0]
    assert list(trace(figure, "control")["y"]) == [1.0, 0.75]
    assert positive["marker"]["color"] != negative["marker"]["color"]
    assert len(plots.spectrum(spectrum).to_plotly_json()["data"]) == 2


def test_the_interaction_matrix_names_both_tokens_and_diverges_around_zero():
    matrix = torch.tensor([[1.0, -4.0, 0.0], [-4.0, 2.0, 0.5], [0.0, 0.5, 0.0]])
    figure = plots.interaction_matrix(matrix, labels=[" a", "<b>", " a"])
    (heat,) = figure.to_plotly_json()["data"]
    assert torch.equal(torch.tensor(heat["z"]), matrix)
    assert (heat["zmin"], heat["zmax"]) == (-4.0, 4.0)
    assert heat["hovertext"][0][1] == "␣a and &lt;b&gt;"
    assert list(figure.layout.xaxis.ticktext) == ["␣a", "&lt;b&gt;", "␣a"]


def test_the_ablation_curve_shows_lines_and_intervals(curve):
    figure = plots.ablation_curve(curve)
    top, interval = trace(figure, "top"), trace(figure, "top interval")
    assert list(top["y"]) == [-0.5, -1.0, -3.5, -150.0]
    assert [row[0] for row in top["customdata"]] == [1, 2, 7, 300]
    assert list(interval["y"])[:4] == [-0.25, -0.75, -3.25, -149.75]
    assert list(interval["y"])[4:] == [-150.5, -4.0, -1.5, -1.0]
    assert list(figure.layout.xaxis.ticktext) == ["1", "3", "10", "30", "100", "300"]


def test_the_vocabulary_has_a_point_for_each_token_and_medians_of_tenths():
    tokens = pd.DataFrame(
        {
            "output": [f" <b>{i}" for i in range(40)],
            "frequency": [i + 0.5 for i in range(40)],
            "effective_rank": [100.0 - i for i in range(40)],
        }
    )
    figure = plots.vocabulary(tokens, x="frequency", y="effective_rank", control=150)
    points, medians = trace(figure, "tokens"), trace(figure, "medians")
    assert list(points["x"]) == tokens["frequency"].tolist()
    assert list(points["y"]) == tokens["effective_rank"].tolist()
    assert points["hovertext"][3] == "␣&lt;b&gt;3"
    assert list(medians["y"]) == [98.5 - 4 * i for i in range(10)]
    assert list(trace(figure, "random weights")["y"]) == [150, 150]
    assert figure.layout.xaxis.type == "log"
    with pytest.raises(ValueError, match="must be positive"):
        plots.vocabulary(tokens.assign(frequency=0.0), x="frequency", y="effective_rank")
    with pytest.raises(ValueError, match="lacks the columns"):
        plots.vocabulary(tokens, x="counts", y="effective_rank")


def test_figures_bring_no_background_and_offer_no_upload(curve):
    for figure in (
        plots.spectrum(Spectrum(torch.ones(2), torch.eye(2))),
        plots.interaction_matrix(torch.eye(2), labels=["a", "b"], title=EVIL),
        plots.ablation_curve(curve, title="t"),
    ):
        assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0, 0, 0, 0)"
        assert "sendChartToCloud" in figure.layout.modebar.remove
        assert "<img" not in figure.to_plotly_json()["layout"]["title"]["text"]


def test_the_eigenvector_table_shows_both_ends_of_each(table):
    html = tables.eigenvectors(table)
    first, second = re.findall(r"<tr><td.*?</tr>", html)
    assert "+3" in first and "+75.0%" in first and "&minus;1.5" in second
    plus, minus = re.findall(r'<td class="end".*?</td>', first)
    assert "␣girl" in plus and 'title="projection +0.5, contribution +0.75"' in plus
    assert "&lt;/script&gt;" in minus and "projection &minus;0.25" in minus
    assert "⏎" in second
    assert "<img" not in html


def test_the_pair_table_shows_every_interaction():
    table = pd.DataFrame(
        [(" a", "b", -2.0), (EVIL, " c", 0.5)], columns=["token_a", "token_b", "interaction"]
    )
    html = tables.pairs(table)
    first, second = re.findall(r"<tr><td.*?</tr>", html)
    assert "&minus;2" in first and ">␣a<" in first and ">b<" in first
    assert "+0.5" in second and "<img" not in second


def test_text_hands_over_every_activation_on_one_symmetric_scale(view):
    shown = props(view.markup("here"))
    assert view.component == "ColoredTokensMulti"
    assert shown["values"] == [[1.5, -2.0], [0.0, 0.25], [-0.5, 4.0]]
    assert (shown["positiveBounds"], shown["negativeBounds"]) == ([4.0, 4.0], [-4.0, -4.0])
    assert shown["labels"] == ["v0", EVIL]
    assert shown["tokens"][0] == "␣a"


def test_attention_masks_what_no_head_uses():
    causal = torch.rand(2, 3, 3, generator=torch.Generator().manual_seed(0)).tril()
    view = tokens.attention([" a", "b", "c"], causal, labels=["0.1", "0.2"])
    assert torch.equal(torch.tensor(view.props["attention"]), causal)
    assert view.props["attentionHeadNames"] == ["0.1", "0.2"]
    assert view.props["maskUpperTri"]
    assert not tokens.attention(["a"] * 3, causal.mT, labels=["x", "y"]).props["maskUpperTri"]


def test_no_token_can_leave_its_place(view):
    markup = view.markup("here")
    data = markup[markup.index("CircuitsVis.Colored") : markup.rindex("</script>")]
    assert not set("<>&") & set(data.split("\n")[0])
    assert document.script_json("<>&\u2028\u2029") == r'"\u003c\u003e\u0026\u2028\u2029"'
    # CircuitsVis writes tokens as HTML: no "<" may open a tag, no "&" an entity
    for token in props(markup)["tokens"]:
        assert not re.search(r"<[a-zA-Z/!?]|&[a-zA-Z#]", token)
    assert "&" in props(markup)["tokens"][1]


def test_a_process_shows_the_script_once(view, monkeypatch):
    monkeypatch.setattr(tokens, "_shown_here", False)
    first, second = view._repr_html_(), view._repr_html_()
    assert tokens.circuitsvis_js() in first
    assert len(second) < 5000 and "tokens.script()" in second
    monkeypatch.setitem(sys.modules, "google.colab", sys)
    assert tokens.circuitsvis_js() in view._repr_html_()


def test_views_ask_nothing_of_the_network(view, monkeypatch, tmp_path):
    def refuse(*_: object) -> None:
        raise AssertionError("a view opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    tokens.circuitsvis_js.cache_clear()
    view._repr_html_()
    view.save(tmp_path / "view.html")
    assert "sourceMappingURL" not in tokens.circuitsvis_js()


def test_a_page_holds_each_script_once_and_only_if_needed(view, curve, tmp_path):
    figure = plots.ablation_curve(curve)
    html = report.page(
        EVIL,
        lead=EVIL,
        sections=[
            Section(EVIL, EVIL, [view, figure]),
            Section("Again", "", [view, figure]),
            Section("Words", "", EVIL),
            Section("Markup", "", Fragment("<b>bold</b>")),
        ],
    )
    assert html.count("var CircuitsVis=") == 1
    assert html.count("plotly.js v") == 1
    assert html.count("Plotly.newPlot(") - report.get_plotlyjs().count("Plotly.newPlot(") == 2
    assert "<img" not in html.split("<main>")[1]
    assert "<b>bold</b>" in html and 'href="#section-4"' in html
    assert "default-src 'none'" in html and "unsafe-eval" not in html
    plain = report.page("t", lead="l", sections=[Section("h", "t", "b")])
    assert "CircuitsVis=" not in plain and "plotly.js" not in plain
    report.save_page(tmp_path / "page.html", plain)
    assert (tmp_path / "page.html").read_text() == plain
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tokens.text(["a"], torch.ones(2, 3), labels=["x"] * 3), "1 tokens"),
        (lambda: tokens.text([], torch.ones(0, 3), labels=["x"] * 3), "at least one"),
        (lambda: tokens.text(["a"], torch.tensor([[torch.nan]]), labels=["x"]), "NaN"),
        (lambda: tokens.attention(["a"], torch.ones(2, 1, 1), labels=["x"]), "n_heads"),
        (lambda: plots.spectrum(Spectrum(torch.ones(3, 2), torch.ones(3, 5, 2))), "one direction"),
        (lambda: plots.spectrum(Spectrum(torch.ones(2), torch.eye(2)), top=0), "top=0"),
        (lambda: plots.interaction_matrix(torch.ones(2, 2), labels=["a"]), "1 labels"),
        (
            lambda: plots.interaction_matrix(torch.tensor([[0.0, 1], [2, 0]]), labels=["a", "b"]),
            "symmetric",
        ),
        (lambda: plots.ablation_curve(pd.DataFrame({"k": [1]})), "lacks"),
        (lambda: tables.pairs(pd.DataFrame({"token_a": ["x"]})), "token_b"),
        (lambda: report.page("t", lead="l", sections=[]), "at least one section"),
        (lambda: report.save_page("/nowhere/page.html", "x"), "/nowhere/page.html"),
    ],
)
def test_bad_input_is_refused_with_its_remedy(call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        call()


def test_unknown_kinds_are_refused(curve, table):
    with pytest.raises(ValueError, match="loss_low"):
        plots.ablation_curve(curve, measure="loss")
    with pytest.raises(ValueError, match="middle"):
        plots.ablation_curve(curve.replace("top", "middle"))
    with pytest.raises(ValueError, match="no rows"):
        plots.ablation_curve(curve.head(0))
    with pytest.raises(ValueError, match="both"):
        tables.eigenvectors(table.replace("-", "both"))
