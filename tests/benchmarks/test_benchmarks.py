"""Every row of the benchmarks runs at a small size; nothing is timed."""

import json
import sys

import pytest
import torch

from benchmarks.measure import Row, ratios, slope
from benchmarks.noise import _extra_bytes
from launch import run


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
    assert "--model no/such" in done.stderr and "get_smollm2" in done.stderr


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
