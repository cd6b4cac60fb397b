"""Pages in a real browser: they draw, answer the mouse, stay harmless and ask for nothing."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_graphs import EVIL as EVIL_TOKEN
from test_graphs import small

from bilinear_lens.spectrum import Spectrum
from bilinear_lens.views import graphs, images, plots, report, tables, tokens
from bilinear_lens.views.report import Fragment, Section

pytest.importorskip("selenium", reason="selenium is not installed")
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium or chromedriver is not installed"
)

EVIL = "</script><script>window.hacked=1</script><img/src=x/onerror=window.hacked=1>"
WORDS = [" Once", " upon", EVIL, "&lt;b&gt;", " girl"]
ACTIVATIONS = torch.tensor([[1.5, -2.0], [0.0, 0.25], [-0.5, 4.0], [4.0, 0.0], [-4.0, 0.125]])

CONTRAST = """
const read = (css) => {
  const [r, g, b, a = 1] = css.match(/[\\d.]+/g).map(Number);
  return [r, g, b, a];
};
const over = ([r, g, b, a], under) => [r, g, b].map((c, i) => c * a + under[i] * (1 - a));
const light = (rgb) => rgb.map((c) => c / 255)
  .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
return [...document.querySelectorAll(arguments[0])].map((element) => {
  const style = getComputedStyle(element), layers = [];
  for (let at = element; at; at = at.parentElement) layers.unshift(at);
  const under = layers.reduce(
    (below, at) => over(read(getComputedStyle(at).backgroundColor), below), [255, 255, 255]);
  const ink = read(element instanceof SVGElement ? style.fill : style.color);
  ink[3] *= Number(style.opacity);
  const [a, b] = [light(over(ink, under)), light(under)].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05);
});
"""
READ = (
    "h1, h2, nav a, .lead, section > p, .lens th, .lens td, .chip, "
    ".xtick text, .ytick text, .legendtext, .xtitle, .ytitle, .y2tick text, .annotation-text, "
    ".bl-circuit :is(strong, label, .layer, .node span, .node bdi)"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    table = pd.DataFrame(
        [(0, 3.0, 0.75, "+", " girl", 0.5, 0.75), (0, 3.0, 0.75, "-", EVIL, -0.25, 0.1875)],
        columns=["eigenvector", "value", "share", "end", "token", "projection", "contribution"],
    )
    curve = pd.DataFrame(
        [("top", k, -k, -k - 1, -k + 1) for k in (1, 2, 10)],
        columns=["eigenvectors", "k", "logit", "logit_low", "logit_high"],
    )
    patterns = torch.rand(2, 5, 5, generator=torch.Generator().manual_seed(0)).tril()
    html = report.page(
        EVIL,
        lead=EVIL,
        sections=[
            Section(
                "Spectrum", EVIL, plots.spectrum(Spectrum(torch.tensor([3.0, -1]), torch.eye(2)))
            ),
            Section("Table", "", tables.eigenvectors(table)),
            Section("Text", "", tokens.text(WORDS, ACTIVATIONS, labels=["first", EVIL])),
            Section(
                "Both",
                "",
                [
                    plots.interaction_matrix(torch.eye(5), labels=WORDS, title=EVIL),
                    plots.ablation_curve(curve, title="Logit"),
                ],
            ),
            Section("Attention", "", tokens.attention(WORDS, patterns, labels=["0.1", EVIL])),
            Section(
                "Pictures",
                "",
                images.eigenvectors(
                    Spectrum(
                        torch.tensor([[3.0, -1], [2.0, 1]]), torch.eye(4)[:, :2].repeat(2, 1, 1)
                    ),
                    shape=(1, 2, 2),
                    labels=["first", EVIL],
                ),
            ),
            Section("Circuit", "", graphs.circuit(*small(), title=EVIL)),
        ],
    )
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.save_page(path, html)
    return path


@pytest.fixture
def browser(tmp_path) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "no-first-run",
        "window-size=1200,900",
        f"user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.get("about:blank")
    driver.get_log("performance")  # the browser's own start page
    yield driver
    driver.quit()


def show(browser: webdriver.Chrome, path: Path, *, theme: str = "light") -> None:
    feature = {"name": "prefers-color-scheme", "value": theme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(path.as_uri())


def coloured(browser: webdriver.Chrome) -> list:
    """The tokens of the text view, once it is drawn."""
    WebDriverWait(browser, 60).until(
        lambda driver: len(driver.find_elements(By.CSS_SELECTOR, TOKEN)) == len(WORDS)
    )
    return browser.find_elements(By.CSS_SELECTOR, TOKEN)


TOKEN = ".colored-tokens > span > span"


def faults(browser: webdriver.Chrome) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def requests(browser: webdriver.Chrome) -> list[str]:
    """Addresses outside the page that it asked for."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in urls if not url.startswith(("data:", "blob:", "file:"))]


def test_the_page_draws_and_is_harmless(browser, page):
    show(browser, page)
    words = [token.text.replace("\u2060", "") for token in coloured(browser)]
    assert words == ["␣Once", "␣upon", EVIL, "&lt;b&gt;", "␣girl"]
    marks = browser.find_elements(By.CSS_SELECTOR, ".bars .point, .hm image, .scatter .point")
    assert len(marks) == 2 + 1 + 3 + 4
    canvases = browser.find_elements(By.CSS_SELECTOR, ".AttentionHeads canvas")
    assert len(canvases) == 3
    for element in [*coloured(browser), *marks, *canvases]:
        assert element.size["width"] > 5 and element.size["height"] > 5
    assert not browser.execute_script("return window.hacked")
    assert not browser.find_elements(By.CSS_SELECTOR, "main img")
    assert faults(browser) == []
    assert requests(browser) == []


def test_a_breach_would_be_seen(browser, tmp_path):
    body = Fragment("<script>window.hacked=1</script><img src='http://127.0.0.1:9/x.png'>")
    path = tmp_path / "breach.html"
    report.save_page(path, report.page("t", lead="", sections=[Section("h", "", body)]))
    show(browser, path)
    assert browser.execute_script("return window.hacked") == 1
    assert "Content Security Policy" in faults(browser)[0]
    path.write_text(path.read_text().replace("img-src", "img-src *"))
    show(browser, path)
    assert set(requests(browser)) == {"http://127.0.0.1:9/x.png"}


def test_hovering_a_token_shows_its_value(browser, page):
    show(browser, page)
    token = coloured(browser)[0]
    assert "1.500000" not in browser.find_element(By.CSS_SELECTOR, "#section-3").text
    browser.execute_script(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", token
    )
    ActionChains(browser).move_to_element(token).perform()
    WebDriverWait(browser, 20).until(
        lambda driver: "1.500000" in driver.find_element(By.CSS_SELECTOR, "#section-3").text
    )


def test_selecting_another_eigenvector_changes_the_colours(browser, page):
    show(browser, page)

    def colours() -> list[str]:
        return [token.value_of_css_property("background-color") for token in coloured(browser)]

    before = colours()
    choice = browser.find_element(
        By.XPATH, "//*[@id='section-3']//div[text()[contains(., 'hack')]]"
    )
    browser.execute_script(
        "arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", choice
    )
    choice.click()
    WebDriverWait(browser, 20).until(lambda _: colours() != before)
    blue, white = before[3], before[1]
    assert colours()[2] == blue  # 4.0 by the first eigenvector, then by the second
    assert colours()[3] == white


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_theme_is_readable(browser, page, theme):
    show(browser, page, theme=theme)
    coloured(browser)
    ratios = browser.execute_script(CONTRAST, READ)
    assert len(ratios) > 30
    assert min(ratios) > 4.5
    view = browser.find_element(By.CSS_SELECTOR, ".circuitsvis")
    assert ("invert" in view.value_of_css_property("filter")) == (theme == "dark")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 1200


def test_a_narrow_page_does_not_scroll_sideways(browser, page):
    size = {"width": 400, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    show(browser, page)
    coloured(browser)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400


def test_a_notebook_draws_every_view_from_one_script(browser, tmp_path, monkeypatch):
    view = tokens.text(WORDS, ACTIVATIONS, labels=["first", "second"])
    monkeypatch.setattr(tokens, "_shown_here", False)
    first, second = view._repr_html_(), view._repr_html_()
    path = tmp_path / "notebook.html"
    path.write_text(f"<!DOCTYPE html><meta charset=utf-8>{second}{first}{second}", encoding="utf-8")
    show(browser, path)
    WebDriverWait(browser, 60).until(
        lambda driver: len(driver.find_elements(By.CSS_SELECTOR, TOKEN)) >= 2 * len(WORDS)
    )
    assert faults(browser) == []


def test_a_view_without_the_script_says_how_to_draw_it(browser, tmp_path):
    view = tokens.text(WORDS, ACTIVATIONS, labels=["first", "second"])
    path = tmp_path / "notebook.html"
    path.write_text(f"<!DOCTYPE html><meta charset=utf-8>{view.markup('v')}", encoding="utf-8")
    show(browser, path)
    assert "tokens.script()" in browser.find_element(By.ID, "v").text
    # a notebook puts the output of another cell on the page by making its script element anew
    browser.execute_script(
        "const cell = document.createElement('script'); cell.textContent = arguments[0];"
        "document.body.append(cell);",
        tokens.script().removeprefix("<script>").removesuffix("</script>\n"),
    )
    coloured(browser)
    assert "tokens.script()" not in browser.find_element(By.ID, "v").text
    assert faults(browser) == []


def test_a_saved_view_stands_alone(browser, tmp_path):
    tokens.text(WORDS, ACTIVATIONS, labels=["first", "second"]).save(tmp_path / "view.html")
    show(browser, tmp_path / "view.html")
    coloured(browser)
    assert faults(browser) == []
    assert requests(browser) == []


SEEN = """
const state = (element) => {
  const style = getComputedStyle(element);
  return style.display === 'none' ? 'gone' : style.opacity < 0.5 ? 'faint' : 'shown';
};
const root = document.querySelectorAll('.bl-circuit')[arguments[0]], found = {};
for (const node of root.querySelectorAll('.node'))
  found[node.firstElementChild.textContent] = state(node);
for (const edge of root.querySelectorAll('path'))
  found[edge.textContent.split(':')[0]] = state(edge);
return found;
"""
OUTSIDE = """
const inside = (inner, outer) => {
  const [a, b] = [inner, outer].map((element) => element.getBoundingClientRect());
  return a.width > 0 && a.left >= b.left - 1 && a.right <= b.right + 1 &&
    a.top >= b.top - 1 && a.bottom <= b.bottom + 1;
};
const [node] = arguments, [name, , note] = node.children;
return [[name, node], [note, node.closest('.view')]]
  .filter(([inner, outer]) => !inside(inner, outer) || inner.scrollWidth > inner.clientWidth)
  .map(([inner]) => inner.textContent);
"""


@pytest.fixture
def drawings(tmp_path) -> Path:
    """Two, as a notebook would show them, without any style of ours."""
    path = tmp_path / "drawings.html"
    body = graphs.circuit(*small(), title=EVIL) + graphs.circuit(*small())
    path.write_text(f"<!DOCTYPE html><meta charset=utf-8>{body}", encoding="utf-8")
    return path


def seen(browser: webdriver.Chrome, state: str = "shown", *, drawing: int = 0) -> set[str]:
    """The names of nodes, and of edges as in `lower to upper`."""
    found = browser.execute_script(SEEN, drawing)
    assert len(found) == sum(map(len, small()))
    return {name for name, its in found.items() if its == state}


def node(browser: webdriver.Chrome, name: str, *, drawing: int = 0) -> WebElement:
    root = browser.find_elements(By.CSS_SELECTOR, ".bl-circuit")[drawing]
    return root.find_element(By.XPATH, f'.//button[span[1][text()="{name}"]]')


def note(browser: webdriver.Chrome) -> str:
    """Of all nodes, what can be read."""
    notes = browser.find_elements(By.CSS_SELECTOR, ".bl-circuit .note")
    return "".join(each.text for each in notes if each.is_displayed())


EVERYTHING = {*small()[0]["node"]} | {f"{a} to {b}" for a, b, _ in small()[1].to_numpy()}
THROUGH_HEAD = {
    "' named'",
    "L1H3@5",
    "embedding@5",
    "L1H3@5 to ' named'",
    "embedding@5 to L1H3@5",
}


def test_pointing_at_a_node_shows_what_it_reads(browser, drawings):
    show(browser, drawings)
    assert note(browser) == ""
    ActionChains(browser).move_to_element(node(browser, "MLP 0 e2@7")).perform()
    assert note(browser).splitlines()[:3] == [
        "MLP 0 e2@7 at ␣girl",
        "\u22125 % of the output",
        "eigenvalue \u22121.5",
    ]
    assert f"␣most␣of␣MLP␣0␣e2@7 {EVIL_TOKEN}" in note(browser)
    ActionChains(browser).move_to_element(node(browser, "embedding@5", drawing=1)).perform()
    assert note(browser).startswith(f"embedding@5 at {EVIL_TOKEN}")
    assert not browser.execute_script("return window.hacked")
    assert faults(browser) == []
    assert requests(browser) == []


def test_clicking_a_node_leaves_the_paths_through_it(browser, drawings):
    show(browser, drawings)
    assert seen(browser) == EVERYTHING
    ActionChains(browser).click(node(browser, "L1H3@5")).perform()
    assert seen(browser) == THROUGH_HEAD
    assert seen(browser, "faint") == EVERYTHING - THROUGH_HEAD
    assert seen(browser, drawing=1) == EVERYTHING
    ActionChains(browser).click(node(browser, "MLP 1 e0@7")).perform()
    assert seen(browser, "faint") == THROUGH_HEAD - {"' named'", "embedding@5"}
    beside = ActionChains(browser).move_to_element(node(browser, "' named'")).move_by_offset(120, 0)
    beside.click().perform()
    assert seen(browser) == EVERYTHING
    for expected in (THROUGH_HEAD, EVERYTHING):  # a second click takes the first back
        ActionChains(browser).click(node(browser, "L1H3@5")).perform()
        assert seen(browser) == expected


def test_a_drawing_can_be_used_with_the_keyboard(browser, drawings):
    show(browser, drawings)

    def press(key: str) -> WebElement:
        ActionChains(browser).send_keys(key).perform()
        return browser.switch_to.active_element

    assert press(Keys.TAB).tag_name == "input"
    order = [press(Keys.TAB) for _ in range(3)]
    assert order == [node(browser, name) for name in ("' named'", "MLP 1 e0@7", "L1H3@5")]
    assert note(browser).startswith("L1H3@5 at")
    press(Keys.ENTER)
    assert seen(browser) == THROUGH_HEAD
    assert order[-1].get_attribute("aria-pressed") == "true"
    press(Keys.ESCAPE)
    assert seen(browser) == EVERYTHING
    assert order[-1].get_attribute("aria-pressed") == "false"
    press(Keys.SPACE)
    assert seen(browser) == THROUGH_HEAD


def test_the_slider_hides_what_carries_less(browser, drawings):
    show(browser, drawings)
    slider, shown = (browser.find_elements(By.CSS_SELECTOR, tag)[1] for tag in ("input", "output"))
    strongest = {"' named'", "MLP 1 e0@7", "MLP 1 e0@7 to ' named'"}
    ActionChains(browser).click(node(browser, "L1H3@5", drawing=1)).perform()
    slider.send_keys(Keys.END)
    assert shown.text == "50 %"
    # what was chosen is gone, so that nothing is faint
    assert seen(browser, drawing=1) == strongest
    assert seen(browser, "gone", drawing=1) == EVERYTHING - strongest
    assert seen(browser) == EVERYTHING
    slider.send_keys(Keys.ARROW_LEFT * 10)
    assert shown.text == "25 %"
    # 30 % reach a node that carries less to the output
    assert seen(browser, drawing=1) == strongest
    slider.send_keys(Keys.ARROW_LEFT * 13)
    assert shown.text == "10 %"
    below = {"embedding@7", "embedding@7 to MLP 1 e0@7"}
    assert seen(browser, drawing=1) == strongest | THROUGH_HEAD | below
    slider.send_keys(Keys.HOME)
    assert shown.text == "0 %"
    assert seen(browser, drawing=1) == EVERYTHING


@pytest.mark.parametrize(("ink", "paper"), [("#000", "#fff"), ("#ddd", "#111")])
def test_a_drawing_is_readable_wherever_it_stands(browser, drawings, ink, paper):
    style = f"<style>body {{ color: {ink}; background: {paper}; }}</style>"
    drawings.write_text(drawings.read_text(encoding="utf-8") + style, encoding="utf-8")
    size = {"width": 350, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    show(browser, drawings)
    ratios = browser.execute_script(CONTRAST, ".bl-circuit :is(strong, label, .layer, bdi, span)")
    assert len(ratios) > 50
    assert min(ratios) > 4.5
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 350
    for each in browser.find_elements(By.CSS_SELECTOR, ".bl-circuit .node"):
        browser.execute_script("arguments[0].scrollIntoView({inline: 'center'})", each)
        ActionChains(browser).move_to_element(each).perform()
        assert browser.execute_script(OUTSIDE, each) == []
