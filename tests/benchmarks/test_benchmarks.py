"""Every row of the benchmarks runs at a small size; nothing is timed."""

import json
import sys

import pytest
import torch

from benchmarks import gpu, plan_error
from benchmarks.measure import Row, ratios, slope
from benchmarks.noise import _extra_bytes
from launch import run
from shardes.config.schema import Noise


@pytest.mark.slow
def test_every_row_runs(tied_llama, tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.run",
        "--toy",
        "--model",
        str(tied_llama),
        "--out",
        str(tmp_path),
    ]
    done = run(command, seconds=300)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "benchmarks.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    expected = {"perturb", "restore", "update", "floor", "memory", "generation", "overhead"}
    expected |= {"resident", "replicas", "gather"}
    assert expected <= set(rows)
    assert sum(name.startswith("growth") for name in rows) == 3
    skipped = [name for name, row in rows.items() if not row["ratios"]]
    assert skipped == ["vllm"] and "--vllm" in rows["vllm"]["note"]
    assert (tmp_path / "benchmarks.png").read_bytes().startswith(b"\x89PNG")
    for row in rows.values():
        assert row["what"] in done.stdout


def test_a_missing_model_is_named():
    done = run([sys.executable, "-m", "benchmarks.run", "--model", "no/such"], seconds=120)
    assert done.returncode == 2
    assert "--model no/such" in done.stderr and "get-smollm2" in done.stderr


@pytest.mark.parametrize(
    "values, at_most, verdict",
    [
        ([1.0, 3.0, 2.5], False, "yes"),
        ([1.0, 3.0, 1.5], False, "MISSED"),
        ([3.0], True, "MISSED"),
        ([], True, "skipped"),
    ],
)
def test_verdicts(values, at_most, verdict):
    assert Row("n", "what", "against", 2, values, at_most=at_most).verdict == verdict


def test_ratios_are_the_baselines_time_over_the_works(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def works(seconds):
        def work():
            now[0] += seconds

        return work

    assert ratios(works(2.0), works(5.0), 3) == ([2.5] * 3, 2.0)


def test_slope():
    assert slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_extra_memory_is_measured_although_it_is_freed():
    assert 39e6 < _extra_bytes(lambda: torch.ones(10**7)) < 60e6
    assert _extra_bytes(lambda: None) < 1e6


@pytest.mark.slow
def test_every_part_of_the_gpu_benchmark_runs_in_rehearsal(tmp_path):
    command = [sys.executable, "-m", "benchmarks.run", "--gpu", "--device", "cpu"]
    done = run([*command, "--out", str(tmp_path)], seconds=900)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "gpu_rehearsal.json").read_text())["figures"]
    assert {figure["part"] for figure in figures} == set(gpu.PARTS)
    assert all(figure["values"] for figure in figures)
    rows = (tmp_path / "gpu_rehearsal.md").read_text().splitlines()
    assert sum(row.startswith("| ") for row in rows) == len(figures) + 2


def test_without_a_gpu_the_gpu_benchmark_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "--device cpu" in capsys.readouterr().err


def test_a_part_that_fails_or_has_no_time_leaves_the_others(monkeypatch, tmp_path):
    def run_part(name, device, work, seconds, show):
        if name == "noise":
            return "exit code 1: no such kernel"
        show(gpu.Figure(name, "speed", "x/s", [4.0, 1.0, 2.0], "another", [1.0]))

    monkeypatch.setattr(gpu, "run_part", run_part)
    monkeypatch.setitem(gpu.PARTS, "load", 1)  # less than a part needs
    options = ["--device", "cpu", "--parts", "noise", "decode", "load", "--out", str(tmp_path)]
    assert gpu.main(options) == 1
    failed, made, late = json.loads((tmp_path / "gpu_rehearsal.json").read_text())["figures"]
    assert "no such kernel" in failed["note"] and "--seconds" in late["note"]
    assert made["ratio"] == 2.0
    table = (tmp_path / "gpu_rehearsal.md").read_text()
    assert "| decode | speed | 2 x/s | 1 to 4 | another: 1 | 2 |  |" in table


@pytest.mark.slow
def test_a_whole_run_is_planned_and_measured(tmp_path, monkeypatch):
    """Its marks are one for each member, and two for the evaluations of the center."""
    monkeypatch.setattr(plan_error, "RUN_LOAD", (2, 4))
    plan_error.make(tmp_path, (2, 64, 128, 4, 2))
    planned, each = plan_error.train(tmp_path, Noise.full)
    assert planned > 0 and len(each) == plan_error.ITERATIONS - 2 and min(each) > 0
