"""Everything that the documentation names exists: pages, anchors, files, settings, tests."""

import ast
import html
import json
import re
from itertools import chain

import pytest

from launch import ROOT, script
from shardes.config.schema import CENTER_SETTINGS, SETTINGS, shown
from shardes.storage.sources import PROMPTS

FOLDERS = ("docs", "benchmarks", "launchers", "examples", "results")
PAGES = sorted(chain(ROOT.glob("*.md"), *((ROOT / folder).rglob("*.md") for folder in FOLDERS)))
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(
    r"(?<![\w./-])((?:\.ci|benchmarks|configs|docs|examples|launchers|shardes|tests|tools)"
    r"/[\w./-]*\w/?)"
)
TESTS = ROOT / "tests"
TEST = re.compile(r"`(?:([\w/]+\.py))?::(\w+)`")
MADE_UP = {"configs/mine.yaml"}  # written by the reader


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings, as mkdocs and GitHub generate them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    dead = []
    for target in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in slugs(file.read_text(encoding="utf-8"))):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    named = {name.rstrip("/.") for name in FILE.findall(page.read_text(encoding="utf-8"))} - MADE_UP
    assert [
        name for name in sorted(named) if not (ROOT / name).exists() and not (TESTS / name).exists()
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_that_are_named_exist(page):
    keys = set(SETTINGS)
    sections = {key.partition(".")[0] for key in keys if "." in key}
    key = re.compile(rf"(?<![\w./-])((?:{'|'.join(sections)})\.[a-z_]+)(?=[=`\]:, ])(?!\()")
    named = set(key.findall(page.read_text(encoding="utf-8")))
    files = {
        name for name in named if name.rpartition(".")[2] in ("md", "py", "safetensors", "sbatch")
    }
    assert sorted(named - keys - files - {PROMPTS}) == []


def test_the_configuration_page_has_every_key():
    page = script("docs/hooks.py").rendered(
        (ROOT / "docs/configuration.md").read_text(encoding="utf-8"), ROOT / "docs"
    )
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| (.+) \|$", page, re.MULTILINE)
    assert sorted(key for key, _, _ in rows) == sorted(SETTINGS)
    for key, default, meaning in rows:
        assert shown(SETTINGS[key].default) in default, key
        assert meaning.replace("\\", "") == SETTINGS[key].help.replace("\\", ""), key


def test_links_that_leave_the_site_become_names():
    rendered = script("docs/hooks.py").rendered
    text = (
        "[loop](../shardes/trainer.py) [`tools/shift_histogram.py`](../tools/shift_histogram.py) "
        "[here](start.md#install) ![p](regions.svg)"
    )
    assert rendered(text, ROOT / "docs") == (
        "loop (`shardes/trainer.py`) `tools/shift_histogram.py` [here](start.md#install) "
        "![p](regions.svg)"
    )
    assert rendered("[s](SECURITY.md) [t](docs/tasks.md)", ROOT) == "[s](security.md) [t](tasks.md)"
    text = "![c](quickstart/curves.png) [e](../examples/README.md)"
    assert (
        rendered(text, ROOT / "results") == "![c](results/quickstart/curves.png) [e](examples.md)"
    )


def test_every_marker_is_explained():
    block = (ROOT / "pyproject.toml").read_text().partition("\nmarkers = [\n")[2].partition("]")[0]
    markers = re.findall(r'^ +"(\w+):', block, re.MULTILINE)
    explained = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert len(markers) >= 4
    for marker in markers:
        assert f"| `{marker}` |" in explained


def test_tests_that_are_named_exist():
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    named, file = [], ""
    for path, name in TEST.findall(text):
        file = path or file
        named.append((file, name))
    assert len(named) > 15
    for file, name in named:
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert name in {
            node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
        }, (file, name)


def test_the_reliability_page_says_which_settings_can_change():
    text = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (es|generation|task) \| .+ \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) == 3
    for section, changeable in rows:
        keys = {key for key in SETTINGS if key.startswith(f"{section}.")}
        assert {f"{section}.{name}" for name in re.findall(r"`(\w+)`", changeable)} == (
            keys - set(CENTER_SETTINGS)
        )


def test_the_readme_shows_the_first_answers_of_the_quickstarts_run():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"<tr><td>(.*?)</td>\s*<td>(.*?)</td>\s*<td>(.*?)</td></tr>", text, re.S)
    run = (ROOT / "results/quickstart/seed0/samples.jsonl").read_text(encoding="utf-8")
    samples = [json.loads(line) for line in run.splitlines()]
    iterations = sorted({sample["iteration"] for sample in samples})
    before, after = ([row for row in samples if row["iteration"] == k] for k in iterations)
    assert len(rows) == 5
    for row, old, new in zip(rows, before, after, strict=False):
        assert row[0] == old["prompt"][-1]["content"] == new["prompt"][-1]["content"]
        for cell, sample in zip(row[1:], (old, new), strict=True):
            answer = f"{sample['reward']:.2f}{sample['response']}"
            cell = html.unescape(re.sub("</?code>", "", cell))
            assert "".join(cell.split()) == "".join(answer.split())


def test_the_readme_is_narrow_and_short():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) < 100


def test_every_page_is_in_the_sites_contents():
    # Not by a YAML reader: mkdocs.yml has tags that only mkdocs knows.
    contents = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    pages = re.findall(r"- ([\w-]+\.md)$", contents, re.MULTILINE)
    assert sorted(pages) == sorted(page.name for page in (ROOT / "docs").rglob("*.md"))
