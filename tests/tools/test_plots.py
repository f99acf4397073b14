"""The numbers that the plotting tools draw."""

import json
import math
import re

import numpy as np
import pytest
import torch
import yaml

from launch import call, script
from shardes.commands import plot, sweep
from shardes.engines import open_model
from shardes.storage.journal import read

shifts = script("tools/shift_histogram.py")


@pytest.fixture(scope="module")
def runs(zygote, uneven_llama, tmp_path_factory):
    """An exact run and one with es.restore=subtract, in bfloat16."""
    folder = tmp_path_factory.mktemp("plots")
    directories = {}
    for restore in ("copy", "subtract"):
        settings = {
            "model": {"path": str(uneven_llama), "dtype": "bfloat16"},
            "es": {
                "population_size": 4,
                "sigma": 0.01,
                "alpha": 0.0001,
                "iterations": 3,
                "restore": restore,
            },
            "generation": {"max_new_tokens": 4},
            "task": {"name": "conciseness"},
            "run": {"dir": str(folder / restore)},
        }
        file = folder / f"{restore}.yaml"
        file.write_text(yaml.safe_dump(settings))
        run = zygote.start(str(file), log=folder / f"{restore}.log")
        assert run.wait() == [0], run.text()
        directories[restore] = folder / restore
    return directories


def test_curves_are_those_of_the_metrics(runs):
    rows = [json.loads(line) for line in (runs["copy"] / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((runs["copy"] / "summary.json").read_text())
    members = plot.curve(runs["copy"], "reward_mean")
    assert members == {row["iteration"]: row["reward_mean"] for row in rows}
    held_out = plot.curve(runs["copy"], "held_out_reward")
    assert held_out == {0: rows[0]["held_out_reward"], 3: summary["held_out_reward_last"]}
    iterations, values = plot.band([{0: 1.0, 1: 2.0, 5: 0.0}, {0: 3.0, 1: 5.0}])
    assert iterations == [0, 1]
    assert values.tolist() == [[1.0, 2.0], [3.0, 5.0]]


def test_runs_are_drawn_as_png_and_svg(runs, tmp_path):
    done = call(
        plot.main,
        f"both={runs['copy']},{runs['subtract']}",
        runs["copy"],
        "--out",
        tmp_path / "p",
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "p.svg").read_text()
    assert "no run directory" in call(plot.main, tmp_path).stderr


def test_a_run_under_way_and_any_title_are_drawn(runs, tmp_path):
    rows = (runs["copy"] / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(rows[:-9])  # while a line is written
    done = call(plot.main, tmp_path, "--title", r"5 $\foo$", "--out", tmp_path / "p")
    assert done.returncode == 0, done.stderr
    (tmp_path / "summary.json").write_text("{")
    assert "summary.json: damaged" in call(plot.main, tmp_path, "--out", tmp_path / "p").stderr


def test_an_exact_center_walks_and_a_rounded_one_stands_still(runs, uneven_llama, tmp_path):
    labelled = [f"{name}={run}" for name, run in runs.items()]
    done = call(shifts.main, uneven_llama, *labelled, "--out", tmp_path / "s")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "s.json").read_text())
    coefficients = [
        c for record in read(runs["copy"] / "journal.jsonl").records for c in record.coefficients
    ]
    assert report["walk"] == pytest.approx(math.sqrt(sum(c * c for c in coefficients)))
    whole = {name: kinds["all"] for name, kinds in report["runs"].items()}
    assert whole["copy"]["weights"] == sum(
        p.numel() for p in open_model(uneven_llama, torch.float32)[1].parameters()
    )
    assert whole["copy"]["spread"] == pytest.approx(report["walk"], rel=0.05)
    assert np.allclose(
        whole["copy"]["shares"], shifts.walk(np.array(report["edges"]), report["walk"]), atol=0.01
    )
    assert whole["copy"]["unmoved"] < 0.01
    assert {"q_proj", "down_proj", "embed_tokens"} <= report["runs"]["copy"].keys()
    assert (tmp_path / "s.png").exists() and (tmp_path / "s.svg").exists()
    assert call(shifts.main, uneven_llama, tmp_path).returncode == 2


def test_sweeps_are_summed_up_by_setting():
    runs = [
        dict(sigma=0.1, alpha=0.2, seed=seed, reward=reward, kl=kl)
        for seed, (reward, kl) in enumerate([(-10.0, 0.1), (-20.0, 0.3)])
    ] + [dict(sigma=0.2, alpha=0.2, seed=0, reward=-12.0, kl=0.1)]
    rows = sweep.rows_of(runs)
    assert [(row["sigma"], row["seeds"], row["reward"], row["reward_std"]) for row in rows] == [
        (0.1, 2, -15.0, 5.0),
        (0.2, 1, -12.0, 0.0),
    ]
    assert "| 0.1 | 0.2 | 2 | -15.0 ± 5.0 | 0.2000 ± 0.1000 |" in sweep.table(rows)
    assert [row["reward"] for row in sweep.front(rows)] == [-12.0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--setting", "-1", "0.1"], r"es\.sigma=-1\.0: must be positive"),
        (["--seeds", "-1"], r"es\.seed=-1: must"),
        (["es.sigma=1"], r"es\.sigma=1: a sweep sets it, by --setting, .*; leave it out"),
        (["run.dir=mine"], r"run\.dir=mine: a sweep sets it"),
        (["checkpoint.every=0"], r"checkpoint\.every=0: a sweep evaluates"),
    ],
)
def test_a_sweep_begins_only_if_all_of_it_can_be_run(tmp_path, arguments, message):
    (tmp_path / "config.yaml").write_text("model: {path: m}\ntask: {name: conciseness}\n")
    options = [tmp_path / "config.yaml", tmp_path / "out", *arguments, "--setting", 0.1, 0.1]
    done = call(sweep.main, *options)
    assert done.returncode == 2 and re.match(f"error: {message}", done.stderr), done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_sweep_trains_judges_and_draws(uneven_llama, tmp_path):
    settings = {
        "model": {"path": str(uneven_llama), "dtype": "float32"},
        "es": {"population_size": 2, "iterations": 1},
        "generation": {"max_new_tokens": 4},
        "task": {"name": "conciseness"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings | {"run": {"dir": "overridden"}}))
    arguments = [
        tmp_path / "config.yaml",
        tmp_path / "out",
        "--setting",
        0.01,
        0.01,
        "--seeds",
        0,
        1,
        "--samples",
        2,
    ]
    assert call(sweep.main, *arguments).returncode == 0
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| 0.01 | 0.01 | 2 |" in table
    assert (tmp_path / "out" / "pareto.png").exists()
    (tmp_path / "out" / "table.md").unlink()
    assert call(sweep.main, *arguments).returncode == 0  # from what is there
    assert (tmp_path / "out" / "table.md").read_text() == table
