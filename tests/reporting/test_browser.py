"""The report in a real browser: every figure is drawn, and nothing is amiss on any screen."""

from pathlib import Path

import pytest

from browser import Browser
from launch import call
from shardes.commands import report
from written_run import write_run

pytestmark = pytest.mark.browser

# Of each figure: its title, the number of its traces, of its drawn lines and bars, of its tick
# labels, and the color of the last.
DRAWN = """
[...document.querySelectorAll("figure")].map(figure => ({
  title: figure.querySelector("figcaption").textContent,
  traces: JSON.parse(figure.querySelector("script").textContent).data.length,
  shapes: [...figure.querySelectorAll(".trace .js-line, .trace .point path, .trace path.point")]
    .filter(shape => shape.getBBox().width + shape.getBBox().height > 0).length,
  labels: figure.querySelectorAll(".xtick, .ytick").length,
  color: getComputedStyle([...figure.querySelectorAll(".xtick text")].at(-1)).fill,
  width: figure.querySelector("svg.main-svg").getBoundingClientRect().width,
  buttons: [...figure.querySelectorAll(".modebar-btn")].map(button => button.dataset.title),
}))
"""
PAGE = """({
  width: document.documentElement.scrollWidth,
  background: getComputedStyle(document.body).backgroundColor,
  scripts: document.scripts.length,
  images: document.images.length,
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    """The pages of one and of two runs."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [folder / "<b>one", folder / "two"]
    for run in runs:
        write_run(run)
    for name, shown in (("one", runs[:1]), ("two", runs)):
        assert call(report.main, *shown, "--out", folder / f"{name}.html").returncode == 0
    return {name: folder / f"{name}.html" for name in ("one", "two")}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name, figures", [("one", 6), ("two", 7)])
def test_a_report_is_drawn(browser, reports, tmp_path, name, figures, width, dark):
    browser.errors.clear()
    browser.requests.clear()
    browser.show(reports[name], width, dark=dark)
    browser.screenshot(tmp_path / "page.png")  # to look at: pytest --basetemp=DIR
    assert browser.errors == []
    drawn, page = browser.run(DRAWN), browser.run(PAGE)
    assert browser.requests == [reports[name].as_uri()]
    assert page["width"] == width  # nothing is cut off
    assert page["scripts"] == figures + 2 and page["images"] == 0  # none came from the samples
    lightness = sum(channels(page["background"])) / 3
    assert lightness < 50 if dark else lightness > 200
    assert len(drawn) == figures
    for figure in drawn:
        assert figure["shapes"] >= 1 and figure["labels"] >= 2, figure
        assert width / 2 < figure["width"] <= width, figure
        contrast = abs(sum(channels(figure["color"])) / 3 - lightness)
        assert contrast > 100, figure
        assert [title.split()[0] for title in figure["buttons"]] == [
            "Download", "Zoom", "Pan", "Reset"
        ]  # fmt: skip


def test_a_change_of_theme_keeps_the_zoom(browser, reports):
    browser.show(reports["one"], 1280)
    before = browser.run(DRAWN)[0]["color"]
    plot = 'document.querySelector("figure .js-plotly-plot")'
    browser.run(f"Plotly.relayout({plot}, {{'xaxis.range': [0.5, 1.5]}}).then(() => 0)")
    browser.theme(dark=True)
    browser.settle()
    assert browser.run(DRAWN)[0]["color"] != before
    assert browser.run(f"{plot}.layout.xaxis.range") == [0.5, 1.5]


def test_values_are_shown_under_the_pointer(browser, reports):
    browser.show(reports["two"], 1280)
    x, y = browser.run("""(() => {
      document.querySelector("figure").scrollIntoView();
      const box = document.querySelector("figure .point").getBoundingClientRect();
      return [box.left + box.width / 2, box.top + box.height / 2];
    })()""")
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    for _ in range(100):
        browser.settle()
        shown = browser.run('[...document.querySelectorAll(".hoverlayer text")].map('
                            "text => text.textContent)")  # fmt: skip
        if shown:
            break
    assert shown[1:] == ["<b>one : 0", "two : 0"], shown


def test_a_runs_name_is_text_in_legends_too(browser, reports):
    browser.show(reports["two"], 1280)
    names = browser.run('[...document.querySelectorAll(".legendtext")].map(t => t.textContent)')
    assert names[:2] == ["<b>one", "two"]
    assert browser.errors == []


def channels(color: str) -> list[int]:
    """Red, green and blue of rgb(…)."""
    return [int(value) for value in color.partition("(")[2].rstrip(")").split(",")[:3]]
