"""The comparison of a probe's σ with its neighbours: which runs it makes, and its table."""

import json

import pytest

from launch import call, script
from shardes.errors import RunError

tool = script("tools/compare_sigmas.py")

ROWS = [
    dict(sigma=sigma, gain=gain, drop=2.0, fitness_rms=1.0)
    for sigma, gain in ((0.001, 100.0), (0.003, 300.0), (0.01, 200.0))
]
REPORT = {
    "suggestion": {"sigma": 0.003, "alpha": 0.002, "population_size": 16},
    "sigmas": [{"sigma": 0.0003}, *ROWS, {"sigma": 0.03}],
}


def test_only_sigma_differs_between_the_suggestion_and_its_neighbours():
    groups = tool.settings(REPORT, (0.03, 0.1, 8))
    assert [(g["name"], g["sigma"], g["alpha"], g["size"]) for g in groups] == [
        ("smaller", 0.001, 0.002, 16),
        ("suggested", 0.003, 0.002, 16),
        ("larger", 0.01, 0.002, 16),
        ("config", 0.03, 0.1, 8),
    ]
    step = 0.002 / 4
    assert groups[1]["expected"] == pytest.approx(0.002 * 300 - (step / 0.003) ** 2 * 2)
    assert groups[3]["expected"] is None
    at_the_edge = REPORT | {"suggestion": REPORT["suggestion"] | {"sigma": 0.03}}
    assert [g["name"] for g in tool.settings(at_the_edge, (0.03, 0.1, 8))] == [
        "smaller", "suggested", "config",
    ]  # fmt: skip
    with pytest.raises(RunError, match="suggests no σ"):
        tool.settings(REPORT | {"suggestion": None}, (0.03, 0.1, 8))


def test_finished_runs_are_compared_without_being_run_again(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "{model: {path: m}, run: {dir: r}, task: {name: conciseness}}"
    )
    (tmp_path / "out" / "probe").mkdir(parents=True)
    (tmp_path / "out" / "probe" / "probe.json").write_text(json.dumps(REPORT))
    for name in ("smaller", "suggested", "larger", "config"):
        for seed in (0, 1):
            run = tmp_path / "out" / f"{name}_seed{seed}"
            run.mkdir()
            summary = dict(center_reward_first=1.0, center_reward_last=2.0 + seed)
            (run / "summary.json").write_text(json.dumps(summary))
            rows = [dict(iteration=i, reward_mean=0.5 * i) for i in range(4)]
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = call(tool.main, tmp_path / "config.yaml", tmp_path / "out", "--seeds", 0, 1)
    assert done.returncode == 0, done.stderr
    assert "| suggested | 0.003 | 0.002 | 16 | 1 ± 0 | 2.5 ± 0.5 | 0.5 ± 0 | 0.544 |" in done.stdout
    assert (tmp_path / "out" / "table.md").read_text() == done.stdout
