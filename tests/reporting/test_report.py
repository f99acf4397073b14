"""The report of a run: complete, self-contained, and with models' text escaped."""

import base64
import hashlib
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launch import call
from shardes.commands import report
from written_run import write_run

JSON = {"type": "application/json"}


class Page(HTMLParser):
    """The tags of a page, its text, and its scripts with their attributes."""

    def __init__(self, file: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.styles = ""
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            attributes, text = self.scripts.pop()
            self.scripts.append((attributes, text + data))
        elif self.open[-1:] == ["style"]:
            self.styles += data
        else:
            self.text += data

    @property
    def figures(self) -> list[dict[str, Any]]:
        """Plotly's figures, in order."""
        return [json.loads(text) for attributes, text in self.scripts if attributes == JSON]

    def answers(self) -> list[str]:
        """The captions of answers, each with its reward."""
        lines = [" ".join(line.split()) for line in self.text.replace("reward\n", "").split("\n")]
        return [line for line in lines if "training:" in line or "iterations:" in line]


@pytest.fixture
def run(tmp_path) -> Path:
    directory = tmp_path / "<b>run"
    write_run(directory)
    return directory


def test_a_report_is_complete_and_self_contained(run, tmp_path):
    out = tmp_path / "report.html"
    done = call(report.main, run, "--out", out)
    assert (done.returncode, done.stdout.strip()) == (0, str(out)), done.stderr
    page = Page(out)
    assert page.open == []
    assert not {tag for tag, _ in page.tags} & {"img", "link", "iframe", "object"}
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("src", "srcset") for name in attributes), (
            tag,
            attributes,
        )
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in page.styles and "@import" not in page.styles
    for part in (
        "<b>run", "3 of 3", "0 → 1.25", "held-out accuracy",
        "before training", "after 2 iterations",
        "1 gained reward, 1 lost, 1 kept it", "best, by member 1",
        "es.alpha: 0.1 → 0.2", "attempt_1", "torch", "generate", "4.5 s", "75.0%", "conciseness",
        "f" * 16, "(nothing)",
        "</pre><script>alert(1)</script><img src=x onerror=alert(2)>␀␛[31m & \"quoted\" 'too'",
    ):  # fmt: skip
        assert part in page.text, part


def test_a_page_opens_with_the_answers(run):
    assert call(report.main, run).returncode == 0
    text = Page(run / "report.html").text
    parts = ("3 held-out prompts: mean reward 0.1667 → 0.1667.", "before training", "answer 0",
             "answer 2", "3 of 3", "75.0%")  # fmt: skip
    places = list(map(text.index, parts))
    assert places == sorted(places)


def test_only_its_own_scripts_can_run(run):
    """A sample's script is text, and would not run if it were none."""
    assert call(report.main, run).returncode == 0
    page = Page(run / "report.html")
    (policy,) = (a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for attributes, text in page.scripts
        if attributes != JSON
    ]
    assert len(hashes) == 2 and rules.pop("script-src") == " ".join(hashes)
    assert rules == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data: blob:",
    }
    data = [text for attributes, text in page.scripts if attributes == JSON]
    assert data and not any("<" in text for text in data)


def test_the_figures_have_the_runs_values(run):
    assert call(report.main, run).returncode == 0
    rewards, accuracy, distance, parts, seconds, speed = Page(run / "report.html").figures
    curves = {trace["name"]: trace for trace in rewards["data"]}  # a curve is after its band
    assert curves["center, held-out prompts"]["x"] == [0, 1, 2, 3]
    assert curves["center, held-out prompts"]["y"] == [0, 1 / 3, 2 / 3, 1.25]
    assert [(t["x"], t["y"]) for t in rewards["data"][:3]] == [
        ([0, 1, 2], y) for y in ([0, 1, 2], [1, 2, 3], [0.5, 1.5, 2.5])
    ]
    assert accuracy["data"][0]["y"] == [0.5] * 3 and distance["data"][0]["x"] == [3]
    assert [(t["name"], t["y"]) for t in parts["data"]] == [("format", [0, 0.5, 1])]
    bars = {trace["name"]: trace["y"] for trace in seconds["data"]}
    assert bars["generate"] == [1.5] * 3 and bars["rest"] == [0.25] * 3
    assert speed["data"][0]["y"] == [50] * 3


def test_several_runs_are_compared(run, tmp_path, monkeypatch):
    other = tmp_path / "other"
    write_run(other, sigma=0.002)
    rows = [json.loads(line) for line in (other / "samples.jsonl").read_text().splitlines()]
    for row in rows[-4:]:  # of the last evaluation
        row["reward"] += 1
    (other / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    done = call(report.main, run, other)
    assert (done.returncode, done.stdout) == (0, "report.html\n"), done.stderr
    page = Page(tmp_path / "report.html")
    assert "<b>run · other" in page.text and "0.002" in page.text.partition("that differ")[2]
    assert "mean reward 0.1667 → 0.1667 (<b>run), 0.1667 → 1.167 (other)" in page.text
    assert page.answers()[:3] == [
        "before training: 0", "<b>run, after 2 iterations: 2", "other, after 2 iterations: 3"
    ]  # fmt: skip
    assert len(page.figures) == 7
    for figure in page.figures:
        assert [trace["name"] for trace in figure["data"]] == ["&lt;b&gt;run", "other"]


def test_runs_of_one_name_are_told_apart(run, tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        write_run(tmp_path / folder / "same")
    done = call(report.main, *(tmp_path / f / "same" for f in "ab"), "--out", tmp_path / "out.html")
    assert done.returncode == 0 and "a/same · b/same" in Page(tmp_path / "out.html").text


def test_a_run_under_way_has_a_report(run):
    for name in ("summary.json", "samples.jsonl", "extremes.jsonl", "metrics.jsonl"):
        (run / name).unlink()
    done = call(report.main, run)
    assert done.returncode == 0, done.stderr
    page = Page(run / "report.html")
    assert "not two evaluations" in page.text and "No iteration is done." in page.text


def test_error_messages(tmp_path, run):
    done = call(report.main, tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {tmp_path}: no run directory: it has no journal.jsonl\n",
    )
    done = call(report.main, run, "--out", "/proc/report.html")
    assert done.returncode == 2 and "choose another place with --out" in done.stderr


def test_damaged_files_and_infinite_rewards_leave_a_report(run):
    metrics = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(
        "\n".join(
            [
                metrics[0],
                metrics[1][:20],
                metrics[2].replace('"iteration"', '"it"'),
                '{"iteration": 1, "reward_mean": Infinity, "reward_min": -1e308, "reward_max": 1}',
                '{"iteration": 2, "reward_mean": 1e308, "seconds": "x"}',
                "[1]\n",
            ]
        )
    )
    (run / "samples.jsonl").write_bytes(b'{"iteration": 0, "split": "test"}\n\xff\n')
    (run / "extremes.jsonl").write_text(
        '{"iteration": 0, "kind": "\\ud800", "member": 1, "response": "", "reward": 0, '
        '"prompt": ""}\n'
    )
    (run / "summary.json").write_text("{")
    (run / "config.yaml").write_text("- a")
    (run / "logs" / "attempt_1.bak").mkdir()
    (run / "logs" / "attempt_1" / "environment.json").write_text("[1]")
    done = call(report.main, run)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert f"WARNING: {run}/metrics.jsonl: damaged and left out: line 2, 3, 6" in done.stderr
    page = Page(run / "report.html")
    assert "damaged and left out" in page.text and "Held-out accuracy" in page.text
    assert "\ufffd, by member 1" in page.text
    assert page.figures[0]["data"][-1]["name"] == "center, held-out prompts"
