"""`shardes probe`: the same figures on any layout, nothing but its own directory, and stops."""

import json
import signal
from pathlib import Path

import pytest
import yaml

from launch import call
from outcome import TASK
from shardes.commands import cli, report
from shardes.storage.journal import read

OPTIONS = ("--sigmas", "0.001", "0.03", "0.1", "--pairs", "4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    (folder / "task.py").write_text(TASK)
    return folder


@pytest.fixture(scope="module")
def configure(folder, tied_llama):
    """Writes the config of a run directory; returns both."""

    def configure(name: str) -> tuple[str, Path]:
        settings = {
            "model": {"path": str(tied_llama), "dtype": "float32"},
            "es": {"population_size": 4, "sigma": 0.03, "alpha": 0.05, "iterations": 1},
            "generation": {"max_new_tokens": 8},
            "task": {"path": f"{folder}/task.py:Letters"},
            "checkpoint": {"every": 0},
            "run": {"dir": str(folder / name), "timeout": 60},
        }
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings))
        return str(config), folder / name

    return configure


@pytest.fixture(scope="module")
def probe(zygote, configure, folder):
    """Runs a probe; returns its report and what it printed."""

    def probe(name: str, *keys: str, ranks: int = 1) -> tuple[dict, str]:
        config, directory = configure(name)
        run = zygote.start(
            config, *keys, *OPTIONS, ranks=ranks, log=folder / f"{name}.log", tool="probe"
        )
        assert run.wait(120) == [0] * ranks, run.text()
        return json.loads((directory / "probe" / "probe.json").read_text()), run.text()

    return probe


def leaves(value: object, name: str = "") -> dict[str, object]:
    """The values of nested mappings and lists, by path."""
    if not isinstance(value, dict | list):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {k: v for key, entry in items for k, v in leaves(entry, f"{name}/{key}").items()}


LOW_RANK = pytest.param(("es.noise=low_rank", "es.rank=2"), marks=pytest.mark.slow)


@pytest.mark.parametrize("noise", [(), LOW_RANK])
def test_the_figures_do_not_depend_on_the_layout(probe, noise):
    alone, text = probe(f"alone{len(noise)}", *noise)
    assert [row["sigma"] for row in alone["sigmas"]] == [0.001, 0.03, 0.1]
    assert [len(row["rewards"]) for row in alone["sigmas"]] == [4, 4, 4]
    assert alone["evaluated"] == alone["members"] == 24
    assert "ρ(R₊, R₋)" in text and "probe.json" in text
    split = probe(f"split{len(noise)}", "engine=fsdp", "sharding.tensor=2", *noise, ranks=2)[0]
    replicas = probe(f"replicas{len(noise)}", *noise, ranks=2)[0]
    for other in (split, replicas):
        assert leaves(other) == pytest.approx(leaves(alone))


def test_a_probe_leaves_the_run_alone_and_is_in_its_report(probe, configure, zygote, folder):
    found, _ = probe("run", "es.seed=1")
    config, directory = configure("run")
    assert [path.name for path in directory.rglob("*")] == ["probe", "probe.json"]
    page = call(report.main, directory)
    assert page.returncode == 0 and "Probe of σ" in (directory / "report.html").read_text()
    run = zygote.start(config, "es.seed=1", log=folder / "train.log")
    assert run.wait(60) == [0], run.text()
    journal = (directory / "journal.jsonl").read_bytes()
    # The run's members are those of the probe with its σ: the same seeds and prompts.
    rewards = read(directory / "journal.jsonl").records[0].rewards
    probed = next(row["rewards"] for row in found["sigmas"] if row["sigma"] == 0.03)
    assert rewards == [plus for plus, _ in probed]
    assert found == probe("run", "es.seed=1")[0]
    assert (directory / "journal.jsonl").read_bytes() == journal
    assert call(report.main, directory).returncode == 0
    html = (directory / "report.html").read_text()
    assert "Probe of σ" in html and "Share of answers" in html


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_stopped_probe_reports_what_it_has(zygote, configure, folder, ranks):
    config, directory = configure(f"stopped{ranks}")
    log = folder / f"stopped{ranks}.log"
    run = zygote.start(config, "--pairs", "200", ranks=ranks, log=log, tool="probe", slow=0.01)
    for _ in range(300):
        run.poll(0.2)
        if log.exists() and "members:" in run.text():
            break
    assert run.poll(1) == [None] * ranks, run.text()
    run.kill(signal.SIGINT)
    assert run.wait(30) == [0] * ranks, run.text()
    found = json.loads((directory / "probe" / "probe.json").read_text())
    assert 0 < found["evaluated"] < found["members"] == 2400
    assert f"stopped after {found['evaluated']} of 2400 members" in run.text()
    assert "Traceback" not in run.text()


def test_a_file_that_cannot_be_written_does_not_cost_the_table(zygote, configure, folder):
    config, directory = configure("unwritable")
    (directory / "probe" / "probe.json").mkdir(parents=True)
    run = zygote.start(config, *OPTIONS, log=folder / "unwritable.log", tool="probe")
    assert run.wait(60) == [1], run.text()
    assert "gain per α" in run.text() and "probe.json: cannot be written" in run.text()
    assert "Traceback" not in run.text()


def test_mistakes_are_one_line(configure, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that what the job sets is undone
        monkeypatch.delenv(name)
    config, directory = configure("mistakes")
    for options, message in (
        (["--pairs", "2"], "--pairs 2: must be at least 3"),
        (["--sigmas", "0"], "--sigmas 0: must be positive"),
        (["--sigmas", "nan"], "--sigmas nan: must be positive"),
        (["--sigmas", "0.1", "0.1"], "--sigmas: a value is given twice"),
        (["--sigmas", "x"], "argument --sigmas: x: not a number; see shardes probe --help"),
        (["--sigmas", "1", "es.seed=1"], "argument --sigmas: es.seed=1: write settings (key=value"),
        (["replicas.port=0"], "replicas.port=0: a probe has no other jobs' help; set"),
        (["replicas.join=a:1"], "replicas.join=a:1: a probe has no other jobs' help; set"),
        (["es.sigam=1"], "es.sigam: no such key; did you mean es.sigma?"),
        (["--dry-run"], "--dry-run: only for train"),
    ):
        done = call(cli.main, "probe", config, *options)
        assert done.returncode == 2 and done.stdout == "", done.stdout
        assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"error: {message}")
    assert not directory.exists()
