"""The comparison with GRPO: its tables from made runs, and both halves with a tiny model."""

import importlib.util
import json
import sys
from itertools import count

import pytest

from benchmarks.grpo import __main__ as grpo
from benchmarks.grpo.points import Points
from benchmarks.grpo.runs import Iterations
from benchmarks.grpo.table import best_settings, compared, last_within, read_runs
from launch import call, run

PROBLEMS = 10
# The method, the learning rate, the seed, and the points' seconds, tokens and solved problems
RUNS = [
    ("es", None, 0, [(30, 4e6, 3), (60, 8e6, 6)]),
    ("es", None, 1, [(30, 4e6, 4), (60, 8e6, 7)]),
    ("grpo", 1e-4, 0, [(30, 3e6, 2), (60, 5e6, 4)]),
    ("grpo", 1e-3, 0, [(30, 3e6, 5), (60, 6e6, 1)]),
    ("grpo", 1e-4, 1, [(30, 3e6, 2), (60, 5.5e6, 5)]),
]


@pytest.fixture
def directories(tmp_path):
    for method, rate, seed, values in RUNS:
        points = [
            dict(step=step, seconds=seconds, tokens=tokens, problems=PROBLEMS, correct=correct)
            for step, (seconds, tokens, correct) in enumerate([(0, 0, 1), *values])
        ]
        for point in (points[0], points[-1]):
            point["sampled_correct"] = 2
        # A killed run leaves points without an evaluation.
        points.insert(1, dict(step=0, seconds=1, tokens=1))
        report = dict(
            method=method, seed=seed, seconds=60, config_lines=17,
            peak_resident_bytes=int(2e9), peak_private_bytes=int(1e9), points=points,
        )  # fmt: skip
        if rate:
            report |= dict(learning_rate=rate, responses=64)
        directory = tmp_path / f"{method}_{rate}_{seed}"
        directory.mkdir()
        (directory / "run.json").write_text(json.dumps(report))
    return sorted(tmp_path.iterdir())


def test_grpos_settings_are_the_best_at_the_end_of_the_sweep(directories):
    runs = read_runs(directories)
    assert best_settings(runs) == (1e-4, 64)
    groups = compared(runs)
    assert [run["seed"] for run in groups["es"]] == [0, 1]
    assert [(run["learning_rate"], run["seed"]) for run in groups["grpo"]] == [(1e-4, 0), (1e-4, 1)]
    assert call(grpo.main, "best", *directories).stdout == "0.0001 64\n"


def test_the_tables_compare_at_equal_time_and_at_equal_tokens(directories, tmp_path):
    out = tmp_path / "out"
    printed = call(grpo.main, "table", *directories, "--out", out).stdout
    table = (out / "table.md").read_text()
    assert table.strip() == printed.strip()
    sections = dict(part.split("\n", 1) for part in table.split("## ")[1:])
    time = sections["After 60 s"].strip().splitlines()
    assert time[2].startswith("| ES | 60 | 8.00 million | 60.0 % (31.3 to 83.2) | 70.0 % ")
    assert time[2].endswith("| 65.0 % |") and time[3].endswith("| 45.0 % |")
    # GRPO generates 5 million tokens; after 4 million ES solves 3 and 4 problems.
    tokens = sections["After at most 5.00 million generated tokens"].strip().splitlines()
    assert tokens[2].startswith("| ES | 30 | 4.00 million | ") and tokens[2].endswith("| 35.0 % |")
    assert "| 0.001 | 64 | 2 | 6.00 million | 10.0 % " in table
    assert len(json.loads((out / "runs.json").read_text())) == len(RUNS)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_point_is_the_last_within_the_tokens(directories):
    for report in read_runs(directories):
        assert last_within(report, 0)["step"] == 0
        assert last_within(report, 1e9) == report["points"][-1]


def test_points_are_due_at_marks_of_time_and_of_tokens(tmp_path):
    points = Points(tmp_path, 120)
    values = [(1, 0), (10, 0), (11, 0), (12, 1e5), (13, 1.2e5), (14, 9e5), (15, 9e5), (35, 9e5)]
    due = [points.due(seconds, tokens) for seconds, tokens in values]
    assert due == [False, True, False, True, False, True, False, True]
    points.write(3, 1.5, 7)
    assert points.read() == [dict(step=3, seconds=1.5, tokens=7)]


def test_an_es_run_counts_from_the_start_of_its_first_iteration(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    points, metrics = Points(tmp_path, 12), tmp_path / "metrics.jsonl"
    rows = Iterations(metrics, points, 12)
    assert not rows.follow()
    for iteration, at in zip(count(), (100, 105, 107.5, 111)):  # the last one is too late
        now[0] = at
        row = dict(iteration=iteration, seconds=4.0, generated_tokens=10)
        with open(metrics, "a") as file:
            file.write(json.dumps(row) + "\n")
            file.write('{"iteration": ')  # being written
        over = rows.follow()
        metrics.write_text(metrics.read_text().rpartition("\n")[0] + "\n")
    assert over
    rows.finish()
    assert points.read() == [
        dict(step=1, seconds=4.0, tokens=10),
        dict(step=2, seconds=9.0, tokens=20),
        dict(step=3, seconds=11.5, tokens=30),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("method, options", [("es", []), ("grpo", ["--learning-rate", "1e-3"])])
def test_a_run_trains_and_is_evaluated(method, options, tied_llama, tmp_path):
    if method == "grpo" and not importlib.util.find_spec("trl"):
        pytest.skip("no trl: pip install -e '.[grpo]'")
    problem = dict(numbers=[1, 2], target=3)
    for split, number in (("train", 8), ("test", 5)):
        (tmp_path / f"{split}.json").write_text(json.dumps([problem] * number))
    config, out = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text(json.dumps({
        "model": {"path": str(tied_llama), "dtype": "float32"},
        "es": {"population_size": 4},
        "generation": {"max_new_tokens": 3},
        "run": {"dir": "unused"},
        "task": {
            "name": "countdown",
            "train": str(tmp_path / "train.json"),
            "test": str(tmp_path / "test.json"),
        },
    }))  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.grpo", "train", "--method", method, "--seed", "1"]
    command += ["--seconds", "3", "--config", str(config), "--out", str(out), *options]
    done = run(command, seconds=240)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((out / "run.json").read_text())
    assert report["peak_resident_bytes"] > report["peak_private_bytes"] > 50e6
    base, *points = report["points"]
    assert points and base["step"] == 0
    assert all(point["problems"] == 5 and 0 <= point["correct"] <= 5 for point in report["points"])
    assert 0 < points[-1]["seconds"] < 30 and points[-1]["tokens"] > 0
    if method == "es":
        assert points[-1]["tokens"] <= 4 * 8 * 3 * points[-1]["step"]
    killed = json.loads(json.dumps(report))
    del killed["points"][-1]["correct"], killed["points"][-1]["sampled_correct"]
    (out / "run.json").write_text(json.dumps(killed))
    done = run([sys.executable, "-m", "benchmarks.grpo", "evaluate", str(out)])
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "run.json").read_text()) == report
