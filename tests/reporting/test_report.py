"""The report of a run: complete, self-contained, and with models' text escaped."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from launch import call
from shardes.commands import report
from shardes.config.loading import center_settings, to_yaml
from shardes.config.schema import Config, ModelConfig, RunConfig
from shardes.reporting.charts import ticks
from shardes.reporting.reporter import RunReporter
from shardes.storage.journal import JOURNAL, Finish, Header, Journal, Record, Resumption
from shardes.storage.resume import ResumePoint

EVIL = (
    "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\x00\x1b[31m "
    "& \"quoted\" 'too' \u202eright to left"
)


class Page(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory of three iterations, as a run that was resumed before the last writes it."""
    directory = tmp_path / "<b>run"
    config = Config(model=ModelConfig("models/small"), run=RunConfig(str(directory)))
    config.task.name, config.es.iterations, config.es.population_size = "conciseness", 3, 2
    config.tracking.loggers = []
    directory.mkdir()
    (directory / "config.yaml").write_text(to_yaml(config))
    journal = Journal(directory / JOURNAL, None)
    journal.append(Header("models/small", {}, center_settings(config)))
    reporter = RunReporter(config, ResumePoint())
    for iteration in range(3):
        if iteration == 2:
            journal.append(Resumption(2, {"es.alpha": [0.1, 0.2]}))
        rewards = [float(iteration), iteration + 1.0]
        journal.append(Record(iteration, [1, 2], rewards, [0.1, -0.1], 0.1, 0.2, "0" * 16))
        chat = [{"role": "user", "content": EVIL}]
        reporter.responses(1, [chat, "second"], [EVIL, EVIL], rewards)
        reporter.samples(
            iteration, "test", [chat, EVIL, "same"], [EVIL, "", "x"], [iteration, -iteration, 0.5]
        )
        metrics = dict(
            iteration=iteration, reward_mean=iteration + 0.5, reward_std=0.5, reward_min=iteration
        )
        metrics |= dict(
            reward_max=iteration + 1, seconds=2.0, seconds_generate=1.5, seconds_exchange=0.25
        )
        metrics |= dict(
            seconds_idle=0.1,
            generated_tokens=100,
            held_out_reward=iteration / 3,
            held_out_accuracy=0.5,
        )
        reporter.log_iteration(metrics)
    journal.append(Finish(3, "f" * 16))
    journal.close()
    last = dict(center_reward=1.0, held_out_reward=1.25, distance=2.0, distance_relative=0.1)
    reporter.summary([0.5, 1.5, 2.5], {3: last}, "f" * 16, 6.0)
    reporter.close()
    return directory


def test_a_report_is_complete_and_self_contained(run, tmp_path):
    out = tmp_path / "report.html"
    done = call(report.main, run, "--out", out)
    assert (done.returncode, done.stdout.strip()) == (0, str(out)), done.stderr
    page = Page(out.read_text())
    assert page.open == []
    kinds = {tag for tag, _ in page.tags}
    assert not kinds & {"script", "img", "link", "iframe", "object"} and "svg" in kinds
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("src", "srcset") for name in attributes), (
            tag,
            attributes,
        )
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in out.read_text() and "@import" not in out.read_text()
    for part in (
        "<b>run", "3 of 3", "0 → 1.25", "held-out accuracy",
        "after 0 iterations", "after 2 iterations",
        "1 are worth more than before, 1 less, 1 the same", "best, by member 1",
        "es.alpha: 0.1 → 0.2", "attempt_1", "torch", "generate", "4.5 s", "75.0%", "conciseness",
        "f" * 16, "(nothing)",
        "</pre><script>alert(1)</script><img src=x onerror=alert(2)>␀␛[31m & \"quoted\" 'too'",
    ):  # fmt: skip
        assert part in page.text, part


def test_a_run_under_way_has_a_report(run):
    for name in ("summary.json", "samples.jsonl", "extremes.jsonl", "metrics.jsonl"):
        (run / name).unlink()
    done = call(report.main, run)
    assert done.returncode == 0, done.stderr
    page = Page((run / "report.html").read_text())
    assert (
        "There are not two evaluations yet." in page.text and "No iteration is done." in page.text
    )


def test_error_messages(tmp_path, run):
    done = call(report.main, tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {tmp_path}: no run directory: it has no journal.jsonl\n",
    )
    done = call(report.main, run, "--out", "/proc/report.html")
    assert done.returncode == 2 and "choose another place with --out" in done.stderr


@pytest.mark.parametrize(
    "low, high", [(0, 1), (-144.7, -56.5), (0.2343, 0.2344), (1e-9, 3e-9), (0, 123456)]
)
def test_ticks_are_round_and_inside(low, high):
    values = ticks(low, high, 5)
    assert 3 <= len(values) <= 11 and low <= values[0] and values[-1] <= high * (1 + 1e-9) + 1e-12
    assert all(len(f"{value:.6g}") <= 9 for value in values)


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
    (run / "summary.json").write_text("{")
    (run / "config.yaml").write_text("- a")
    (run / "logs" / "attempt_1.bak").mkdir()
    (run / "logs" / "attempt_1" / "environment.json").write_text("[1]")
    done = call(report.main, run)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert f"WARNING: {run}/metrics.jsonl: damaged and left out: line 2, 3, 6" in done.stderr
    text = Page((run / "report.html").read_text(encoding="utf-8")).text
    assert "damaged and left out" in text and "members' mean" in text
