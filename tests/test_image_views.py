"""Pictures: the numbers read back from figures of every shape, and bad input refused."""

import json
import re
from collections import Counter
from collections.abc import Callable

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

import bilinear_lens as bl
from bilinear_lens.spectrum import Spectrum
from bilinear_lens.tensor import BilinearTensor
from bilinear_lens.views import images, measures

SHAPES = [(1, 5, 7), (3, 2, 5), (7,), (5, 7), (2, 5, 7)]
EVIL = "<b>x</b>"


def random(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0))


def spectra(n_classes: int, size: int, *, affine: bool = False) -> Spectrum:
    matrices = random(n_classes, size + affine, size + affine)
    return Spectrum.of(matrices + matrices.mT, affine=affine)


def size_of(shape: tuple[int, ...]) -> int:
    return int(torch.tensor(shape).prod())


def traces(figure: go.Figure, kind: str) -> list[dict]:
    return [trace for trace in figure.to_plotly_json()["data"] if trace["type"] == kind]


def pictures(figure: go.Figure) -> list[dict]:
    """Traces of pictures: all that have a place in a grid."""
    return [trace for trace in figure.to_plotly_json()["data"] if "x0" in trace]


def drawn(vector: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Rows of a picture that is not in colour: its channels side by side."""
    rows, width = (1, *shape)[-2:]
    return torch.cat([*vector.reshape(-1, rows, width)], dim=1)


def captions(figure: go.Figure) -> list[str]:
    return [note.text.replace("\N{MINUS SIGN}", "-") for note in figure.layout.annotations]


def close(shown: object, values: torch.Tensor) -> bool:
    return torch.allclose(torch.tensor(shown), values, rtol=5e-3)


@pytest.fixture
def curves() -> pd.DataFrame:
    rows = [
        (order, k, 1 / k, 0.5 / k, 2 / k) for order in ("eigenvectors", EVIL) for k in (7, 2, 1, 8)
    ]
    return pd.DataFrame(rows, columns=["order", "k", "lost", "lost_low", "lost_high"])


@pytest.fixture
def points() -> pd.DataFrame:
    rows = [
        ("noise", "a", 0.9, 0.8, 0.95, 0.5, 0.25, 0.75),
        (EVIL, EVIL, 0.7, 0.6, 0.75, 0.125, 0.1, 0.25),
    ]
    names = "group label accuracy accuracy_low accuracy_high lost lost_low lost_high"
    return pd.DataFrame(rows, columns=names.split())


@pytest.fixture
def explained() -> tuple[torch.Tensor, pd.Series, pd.DataFrame, Spectrum]:
    """An image of 2 x 5, the logits of three classes, and two of them explained."""
    spectrum = spectra(2, 10, affine=True)
    logits = pd.Series([2.0, -5.0, 7.0], index=["a", EVIL, "c"])
    rows = [
        ("c", 2, 3.0, -1.5, 6.75),
        ("c", -1, None, None, 0.25),
        (EVIL, 0, -1.0, 2.0, -4.0),
        (EVIL, 3, -0.5, 1.0, -0.5),
        (EVIL, -1, None, None, -0.5),
    ]
    names = ["class", "eigenvector", "value", "projection", "activation"]
    return torch.linspace(0, 1, 10), logits, pd.DataFrame(rows, columns=names), spectrum


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_eigenvectors_stand_in_a_row_for_each_class(shape, affine):
    size = size_of(shape)
    spectrum = spectra(3, size, affine=affine)
    figure = images.eigenvectors(spectrum, shape=shape, labels=["a", EVIL, "c"], k=2, title=EVIL)
    shown = pictures(figure)
    assert [trace["yaxis"] for trace in shown] == ["y", "y", "y2", "y2", "y3", "y3"]
    assert captions(figure) == [f"{value:+.3g}" for value in spectrum.values[:, :2].flatten()]
    assert figure.layout.yaxis2.ticktext == ("&lt;b&gt;x&lt;/b&gt;",)
    assert figure.layout.title.text == "&lt;b&gt;x&lt;/b&gt;"
    last = spectrum.vectors[2, :, 1]
    assert ("constant" in shown[-1]["name"]) == affine
    if affine:
        constant = f"constant {last[-1]:+.3g}"
        assert shown[-1]["name"].replace("\N{MINUS SIGN}", "-").endswith(constant)
        last = last[:-1]
    if shape[0] == 3:
        colours = (127.5 + 127.5 * last / last.abs().max()).round().reshape(shape)
        assert torch.equal(torch.tensor(shown[-1]["z"]), colours.permute(1, 2, 0).int().long())
    else:
        assert close(shown[-1]["z"], drawn(last, shape))
        assert shown[-1]["zmax"] == -shown[-1]["zmin"] == pytest.approx(last.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_picture_fills_its_frame_row_after_row_downwards(shape):
    figure = images.pictures(
        random(5, size_of(shape)), shape=shape, labels=list("abcde"), signed=True, columns=2
    )
    height, width = (1, *shape)[-2:]
    width *= 2 if shape[0] == 2 else 1
    for number, (trace, frame) in enumerate(
        zip(pictures(figure), figure.layout.shapes, strict=True)
    ):
        left, top = trace["x0"] - trace["dx"] / 2, trace["y0"] - trace["dy"] / 2
        assert (left, top) == (pytest.approx(frame.x0), pytest.approx(frame.y0, abs=1e-9))
        assert left + width * trace["dx"] == pytest.approx(frame.x1)
        assert top + height * trace["dy"] == pytest.approx(frame.y1)
        assert (frame.x0 + frame.x1) / 2 == pytest.approx(number % 2)
        assert frame.yref == ["y", "y2", "y3"][number // 2]
        if len(shape) > 1:
            assert trace["dx"] == pytest.approx(trace["dy"])
    first, last = figure.layout.yaxis, figure.layout.yaxis3
    assert first.domain[0] > last.domain[1] and first.range[0] > first.range[1] == 0
    assert first.scaleanchor == last.scaleanchor == "x"


def test_one_class_has_one_row_and_fewer_pairs_than_asked_for():
    spectrum = Spectrum(torch.tensor([3.0, -2.0]), torch.eye(7)[:, :2])
    figure = images.eigenvectors(spectrum, shape=(7,), k=5)
    assert captions(figure) == ["+3", "-2"]
    assert pictures(figure)[1]["name"] == "eigenvector 1: \N{MINUS SIGN}2"
    assert figure.layout.yaxis.ticktext == ("",)
    assert images.eigenvectors(spectra(2, 7), shape=(7,)).layout.yaxis2.ticktext == ("1",)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_spectrum_of_a_class_shows_both_ends(shape):
    spectrum = spectra(2, size_of(shape), affine=True)
    one = Spectrum(spectrum.values[1], spectrum.vectors[1], affine=True)
    figure = images.class_spectrum(one, shape=shape, k=2)
    positive, negative = traces(figure, "bar")
    values = one.values.sort(descending=True).values
    assert positive["y"] == values[values > 0].tolist()
    assert negative["y"] == values[values < 0].flip(0).tolist()
    assert one.values[negative["customdata"]].tolist() == negative["y"]
    ends = [*values[:2], *values.flip(0)[:2]]
    assert captions(figure) == [f"{value:+.3g}" for value in ends]
    assert [trace["yaxis"] for trace in pictures(figure)] == ["y2", "y2", "y3", "y3"]


@pytest.mark.parametrize(
    ("values", "shown"),
    [([3.0, 2.0, -1.0], ["+3", "+2", "-1"]), ([-3.0, -2.0, 0.0], ["-3", "-2"]), ([0.0], [])],
)
def test_a_spectrum_may_lack_a_sign(values, shown):
    spectrum = Spectrum(torch.tensor(values), torch.eye(5)[:, : len(values)])
    figure = images.class_spectrum(spectrum, shape=(5,))
    assert captions(figure) == shown
    assert len(traces(figure, "bar")) == 2


def test_the_axis_of_a_spectrum_begins_with_what_matters():
    spectrum = Spectrum(torch.tensor([3.0, -2.0, -1.0, 0.001, -0.001]), torch.eye(5))
    assert images.class_spectrum(spectrum, shape=(5,)).layout.xaxis.range == (-0.5, 1.5)


def test_an_explanation_shows_what_adds_up_to_each_logit(explained):
    image, logits, table, spectrum = explained
    figure = images.explanation(image, logits, table, spectrum, shape=(1, 2, 5), title="t")
    (bars,) = traces(figure, "bar")
    assert (bars["x"], bars["y"]) == ([2.0, -5.0, 7.0], [0, 1, 2])
    assert figure.layout.yaxis.ticktext == ("a", "&lt;b&gt;x&lt;/b&gt;", "c")
    faint = [float(colour.split(", ")[-1][:-1]) < 1 for colour in bars["marker"]["color"]]
    assert faint == [True, False, False]
    picture, first, *others = pictures(figure)
    assert close(picture["z"], image.view(2, 5)) and (picture["zmin"], picture["zmax"]) == (0, 1)
    assert close(first["z"], spectrum.vectors[0, :-1, 2].view(2, 5))
    assert close(others[-1]["z"], spectrum.vectors[1, :-1, 3].view(2, 5))
    assert len(figure.layout.shapes) == len(pictures(figure)) == 4
    assert [trace["yaxis"] for trace in (first, *others)] == ["y3", "y4", "y4"]
    assert "value +3, projection \N{MINUS SIGN}1.5, activation +6.75, constant" in first["name"]
    rows = [figure.layout.yaxis3.ticktext[0], figure.layout.yaxis4.ticktext[0]]
    assert rows == ["c  +7", "&lt;b&gt;x&lt;/b&gt;  \N{MINUS SIGN}5"]
    for axis, label in (("y3", "c"), ("y4", EVIL)):
        notes = [note.text for note in figure.layout.annotations if note.yref == axis]
        assert notes.count("rest") == 1
        numbers = [float(note.replace("\N{MINUS SIGN}", "-")) for note in notes if note != "rest"]
        assert sum(numbers) == logits[label]


def test_an_explanation_takes_colours_vectors_and_rows_without_a_rest(explained):
    image, logits, table, spectrum = explained
    named = table[table["eigenvector"] >= 0]
    figure = images.explanation(image, logits, named, spectrum, shape=(10,))
    assert [len(trace["z"]) for trace in pictures(figure)] == [1] * 4
    assert "rest" not in captions(figure)
    colours = spectra(2, 6)
    figure = images.explanation(2 * torch.ones(6), logits, table, colours, shape=(3, 1, 2))
    assert traces(figure, "image")[0]["z"] == [[[255] * 3] * 2]  # drawn as 1


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_atoms_stand_by_norm_over_their_weights(shape, affine):
    coords = size_of(shape) + affine
    left, right, down = random(2, coords), random(5, coords)[3:], torch.tensor([[1.0, -2]] * 3)
    down[1] = torch.tensor([0.5, 30.0])
    tensor = BilinearTensor(left, right, down, affine)
    terms = [BilinearTensor(left[i : i + 1], right[i : i + 1], down[:, i : i + 1]) for i in (0, 1)]
    assert terms[1].norm() > terms[0].norm()
    figure = images.atoms(tensor, shape=shape, labels=["a", EVIL, "c"])
    assert figure.layout.xaxis.ticktext == ("1", "0")
    assert figure.layout.yaxis3.ticktext == ("a", "&lt;b&gt;x&lt;/b&gt;", "c")
    weights = traces(figure, "heatmap")[-1]
    scale = left.norm(dim=1) * right.norm(dim=1)
    assert close(weights["z"], (down * scale).flip(1))
    # the eigenpairs of the first atom's matrix: a term's interaction is this times its weight
    spectrum = terms[1].eigh(0)
    values, vectors = spectrum.values / (down * scale)[0, 1], spectrum.vectors
    shown = pictures(figure)
    assert len(shown) == 4
    for row in (0, 1):
        caption = captions(figure)[2 * row]
        pair = 0 if (values[0] > 0) == (row == 0) else 1
        assert float(caption) == pytest.approx(values[pair].item(), abs=0.006)
        assert ("constant" in shown[2 * row]["name"]) == affine
        if shape[0] != 3:
            pixels = torch.tensor(shown[2 * row]["z"]).flatten()
            pattern = drawn(vectors[: len(pixels), pair], shape).flatten()
            assert (pixels @ pattern).abs() == pytest.approx((pattern @ pattern).item(), rel=0.01)


def test_atoms_that_are_parallel_or_zero_are_drawn():
    left = torch.tensor([[0.0, 0, 0], [1, 0, 0]])
    tensor = BilinearTensor(left, left, torch.ones(5, 2))
    figure = images.atoms(tensor, shape=(3,), labels=list("abcde"), k=7)
    assert figure.layout.xaxis.ticktext == ("1", "0")
    assert pictures(figure)[2]["z"] == [[0.0, 0.0, 0.0]]  # l - r
    assert len(pictures(images.atoms(tensor, shape=(3,), labels=list("abcde"), k=1))) == 2


def test_truncation_shows_a_line_and_a_band_for_each_order(curves):
    figure = measures.truncation(curves, title="t")
    band, line, other_band, other = traces(figure, "scatter")
    assert (line["name"], other["name"]) == ("eigenvectors", "&lt;b&gt;x&lt;/b&gt;")
    assert (line["x"], line["y"]) == ([1, 2, 7, 8], [1.0, 0.5, 1 / 7, 0.125])
    assert line["customdata"][1] == [0.25, 1.0]
    assert band["y"] == [2.0, 1.0, 2 / 7, 0.25, 0.0625, 0.5 / 7, 0.25, 0.5]
    assert line["line"] != other["line"] and line["marker"] != other["marker"]
    assert band["fillcolor"] != other_band["fillcolor"]
    assert (figure.layout.xaxis.type, figure.layout.xaxis.tickvals) == ("log", (1, 2, 7))
    assert figure.layout.yaxis.title.text == "accuracy lost"
    renamed = curves.rename(columns=lambda name: name.replace("lost", "left"))
    assert measures.truncation(renamed, y="left").layout.yaxis.title.text == "left"
    many = pd.concat([curves.assign(order=str(number)) for number in range(7)])
    assert len(traces(measures.truncation(many), "scatter")) == 14


def test_a_truncation_curve_is_drawn_as_it_is_measured():
    inputs = random(20, 5)
    curve = bl.truncation_curve(spectra(3, 5), inputs, torch.arange(20) % 3, ks=[1, 2, 5])
    (line,) = traces(measures.truncation(curve, y="agreement"), "scatter")
    assert (line["name"], line["x"]) == ("agreement", [1, 2, 5])
    assert line["y"] == curve["agreement"].tolist()
    assert "customdata" not in line
    assert line["hovertemplate"] == "%{fullData.name}, k = %{x}: %{y:.4g}<extra></extra>"


def test_orders_need_no_intervals_and_intervals_no_order(curves):
    plain = traces(measures.truncation(curves[["order", "k", "lost"]]), "scatter")
    assert [line["name"] for line in plain] == ["eigenvectors", "&lt;b&gt;x&lt;/b&gt;"]
    band, line = traces(measures.truncation(curves.head(4).drop(columns="order")), "scatter")
    assert (band["fill"], line["name"]) == ("toself", "lost")
    assert line["customdata"][1] == [0.25, 1.0]


def test_the_trade_off_has_error_bars_both_ways(points):
    figure = measures.trade_off(points)
    noise, other = traces(figure, "scatter")
    assert (noise["x"], noise["y"]) == ([0.9], [0.5])
    assert noise["error_x"]["array"] == pytest.approx([0.05])
    assert noise["error_x"]["arrayminus"] == pytest.approx([0.1])
    assert noise["error_y"]["array"] == noise["error_y"]["arrayminus"] == [0.25]
    assert other["name"] == other["hovertext"][0] == "&lt;b&gt;x&lt;/b&gt;"
    assert noise["marker"] != other["marker"]
    assert figure.layout.yaxis.type == "log"
    assert measures.trade_off(points.assign(lost_low=0.0)).layout.yaxis.type is None


def test_faithfulness_shows_the_traced_circuit_and_the_range_of_random_ones():
    lefts = {("traced", 0): [0.0, 0.5, 0.75], ("random", 0): [0.0, 0.1], ("random", 1): [0.0, 0.3]}
    curve = pd.DataFrame(
        [
            {"circuit": name, "draw": draw, "nodes": n, "left": left}
            for (name, draw), row in lefts.items()
            for n, left in enumerate(row)
        ]
    )
    figure = measures.faithfulness(curve, title="t")
    _, traced, band, random = traces(figure, "scatter")
    assert (traced["name"], traced["x"], traced["y"]) == ("traced", [1, 2], [0.5, 0.75])
    assert (random["name"], random["x"], random["y"]) == ("random", [1], [0.2])
    assert sorted(band["y"]) == [0.1, 0.3] and figure.layout.xaxis.title.text == "nodes"
    with pytest.raises(ValueError, match="left"):
        measures.faithfulness(curve.drop(columns="left"))


def test_a_trade_off_needs_no_more_than_two_measures(points):
    figure = measures.trade_off(points[["accuracy", "lost"]])
    (both,) = traces(figure, "scatter")
    assert (both["name"], both["x"], both["y"]) == ("lost", [0.9, 0.7], [0.5, 0.125])
    assert not {"error_x", "error_y", "hovertext"} & set(both)
    assert both["hovertemplate"] == "accuracy %{x:.4g}, accuracy lost %{y:.4g}<extra></extra>"
    assert figure.layout.yaxis.type == "log"
    one_way = points.drop(columns=["accuracy_low", "accuracy_high", "label"])
    noise, _ = traces(measures.trade_off(one_way), "scatter")
    assert "error_x" not in noise and noise["error_y"]["array"] == [0.25]
    zero = points[["accuracy", "lost"]].assign(lost=[0.0, 0.5])
    assert measures.trade_off(zero).layout.yaxis.type is None


@pytest.mark.parametrize("shape", SHAPES)
def test_real_pictures_are_grey_or_coloured_between_0_and_1(shape):
    pixels = torch.linspace(-0.5, 1, size_of(shape)).expand(3, -1)
    figure = images.pictures(pixels, shape=shape, labels=[EVIL, "b", "c"], signed=False, columns=2)
    shown = pictures(figure)
    assert captions(figure) == ["&lt;b&gt;x&lt;/b&gt;", "b", "c"]
    if shape[0] == 3:
        assert shown[2]["z"][0][0] == [0, 4, 136]
        assert shown[2]["z"][-1][-1][-1] == 255
    else:
        assert (shown[2]["zmin"], shown[2]["zmax"]) == (0, 1)
        assert close(shown[2]["z"][-1], drawn(pixels[0], shape)[-1])


def test_channels_that_are_no_colours_stand_side_by_side():
    for channels in (2, 4, 8):
        pixels = torch.arange(channels * 4.0)
        figure = images.pictures(pixels[None], shape=(channels, 2, 2), labels=["a"], signed=True)
        (picture,) = pictures(figure)
        starts = range(0, 4 * channels, 4)
        assert picture["type"] == "heatmap"
        assert picture["z"] == [
            [pixel for start in starts for pixel in (start, start + 1)],
            [pixel for start in starts for pixel in (start + 2, start + 3)],
        ]


def test_rows_and_columns_alone_are_one_grey_channel():
    flat, grey = (
        images.pictures(random(2, 6), shape=shape, labels=["a", "b"], signed=False)
        for shape in ((3, 2), (1, 3, 2))
    )
    assert flat.to_plotly_json() == grey.to_plotly_json()


@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 1, 2)])
def test_many_pictures_take_no_more_calls_than_few(shape, monkeypatch):
    calls = Counter()

    def count(name: str, method: Callable) -> Callable:
        return lambda *args, **kwargs: (calls.update([name]), method(*args, **kwargs))[1]

    for name in dir(go.Figure):
        if name.startswith(("add_", "update_")):
            monkeypatch.setattr(go.Figure, name, count(name, getattr(go.Figure, name)))

    def calls_of(draw: Callable[[int], go.Figure], n: int) -> Counter:
        calls.clear()
        draw(n)
        return calls.copy()

    size = size_of(shape)
    vectors = random(40, size)
    for draw in (
        lambda n: images.eigenvectors(spectra(n, size), shape=shape),
        lambda n: images.pictures(vectors[:n], shape=shape, labels=["x"] * n, signed=True),
        lambda n: images.atoms(
            BilinearTensor(vectors[:n], vectors[:n], torch.ones(2, n)),
            shape=shape,
            labels=["a"] * 2,
        ),
    ):
        few, many = calls_of(draw, 1), calls_of(draw, 40)
        assert few == many and few["add_traces"]


def test_a_hundred_pictures_stay_light():
    figure = images.pictures(
        random(100, 784), shape=(1, 28, 28), labels=["x"] * 100, signed=True, columns=10
    )
    assert len(json.dumps(figure.to_plotly_json())) < 900_000


def test_figures_bring_no_background(explained, curves, points):
    image, logits, table, spectrum = explained
    tensor = BilinearTensor(random(2, 7), random(2, 7), random(3, 2))
    for figure in (
        images.eigenvectors(spectra(3, 7), shape=(7,)),
        images.class_spectrum(ONE, shape=(7,)),
        images.explanation(image, logits, table, spectrum, shape=(10,)),
        images.atoms(tensor, shape=(7,), labels=["a", "b", "c"]),
        measures.truncation(curves),
        measures.trade_off(points),
        images.pictures(image[None], shape=(10,), labels=["a"], signed=False),
    ):
        assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0, 0, 0, 0)"


ONE = Spectrum(torch.tensor([3.0, -2.0]), torch.eye(7)[:, :2])
TENSOR = BilinearTensor(torch.ones(2, 7), torch.ones(2, 7), torch.ones(3, 2))
NAN = Spectrum(torch.tensor([torch.nan, -2.0]), torch.eye(7)[:, :2])


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: images.eigenvectors(ONE, shape=(1, 2, 3)), "asks for 6 numbers, but eigenvectors"),
        (lambda: images.eigenvectors(ONE, shape=()), "shape=() must be"),
        (lambda: images.eigenvectors(ONE, shape=(1, 1, 7, 1)), "shape=(1, 1, 7, 1) must be"),
        (lambda: images.eigenvectors(ONE, shape=(2, 5, 7)), "shape=(2, 5, 7) asks for 70"),
        (lambda: images.eigenvectors(ONE, shape=(1, -7, -1)), "(1, -7, -1) must be"),
        (lambda: images.eigenvectors(ONE, shape=(7,), k=0), "k=0"),
        (lambda: images.eigenvectors(ONE, shape=(7,), labels=["a", "b"]), "2 labels for 1"),
        (lambda: images.eigenvectors(NAN, shape=(7,)), "NaN"),
        (
            lambda: images.eigenvectors(
                Spectrum(torch.ones(5, 3, 2), torch.ones(5, 3, 7, 2)), shape=(7,)
            ),
            "[5, 3, 2]",
        ),
        (lambda: images.class_spectrum(spectra(3, 7), shape=(7,)), "[3, 7]"),
        (lambda: images.class_spectrum(ONE, shape=(7,), k=0), "k=0"),
        (lambda: images.class_spectrum(NAN, shape=(7,)), "NaN"),
        (lambda: images.class_spectrum(ONE, shape=(5,)), "asks for 5"),
        (lambda: images.atoms(TENSOR, shape=(5,), labels=["a", "b", "c"]), "asks for 5"),
        (lambda: images.atoms(TENSOR, shape=(7,), labels=["a"]), "1 labels for 3"),
        (lambda: images.atoms(TENSOR, shape=(7,), labels=["a", "b", "c"], k=0), "k=0"),
        (
            lambda: images.pictures(torch.ones(2, 7), shape=(5,), labels=["a", "b"], signed=True),
            "images have 7",
        ),
        (
            lambda: images.pictures(torch.ones(2, 7), shape=(7,), labels=["a"], signed=True),
            "1 labels for 2",
        ),
        (
            lambda: images.pictures(
                torch.ones(1, 7), shape=(7,), labels=["a"], signed=True, columns=0
            ),
            "columns=0",
        ),
        (
            lambda: images.pictures(torch.ones(0, 7), shape=(7,), labels=[], signed=True),
            "at least one",
        ),
        (
            lambda: images.pictures(torch.ones(1, 1, 7), shape=(7,), labels=["a"], signed=True),
            "[1, 1, 7]",
        ),
        (
            lambda: images.pictures(
                torch.full((1, 7), torch.nan), shape=(7,), labels=["a"], signed=True
            ),
            "NaN",
        ),
    ],
)
def test_bad_input_is_refused_with_its_remedy(call: Callable[[], object], words: str):
    with pytest.raises(ValueError, match=re.escape(words)):
        call()


@pytest.mark.usefixtures("as_users")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i, y, t, s: (i[:-1], y, t, s), "image have 9"),
        (lambda i, y, t, s: (i * torch.nan, y, t, s), "image holds NaN"),
        (lambda i, y, t, s: (i, y * float("nan"), t, s), "logits holds NaN"),
        (lambda i, y, t, s: (i, y.drop("c"), t, s), "['a', '<b>x</b>']"),
        (lambda i, y, t, s: (i, pd.concat([y, y]), t, s), "must be different"),
        (lambda i, y, t, s: (i, y, t.drop(columns="value"), s), "['value']"),
        (lambda i, y, t, s: (i, y, t.head(0), s), "no rows"),
        (lambda i, y, t, s: (i, y, t.head(2), s), "the table has 1 classes"),
        (lambda i, y, t, s: (i, y, t.assign(eigenvector=11), s), "between 0 and 10"),
        (lambda i, y, t, s: (i, y, t.assign(activation=float("nan")), s), "activation holds NaN"),
        (lambda i, y, t, s: (i, y, t.assign(value=float("nan")), s), "value or projection"),
        (lambda i, y, t, s: (i, y, t, Spectrum(s.values[0], s.vectors[0], True)), "[2, k]"),
    ],
)
def test_an_explanation_that_does_not_fit_is_refused(explained, change, words):
    image, logits, table, spectrum = change(*explained)
    with pytest.raises(ValueError, match=re.escape(words)):
        images.explanation(image, logits, table, spectrum, shape=(1, 2, 5))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda table: table.drop(columns="lost_low"), "['lost_low']"),
        (lambda table: table.head(0), "no rows"),
        (lambda table: table.assign(lost=float("nan")), "NaN"),
    ],
)
def test_curves_and_points_that_lack_something_are_refused(curves, points, change, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        measures.truncation(change(curves))
    with pytest.raises(ValueError, match=re.escape(words)):
        measures.trade_off(change(points))


def test_no_part_is_kept_at_k_0(curves):
    with pytest.raises(ValueError, match="k=0"):
        measures.truncation(curves.replace({"k": 1}, 0))
