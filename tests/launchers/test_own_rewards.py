"""Runs with a reward function of the user's: what it does wrong is counted or ends the run, and
nothing outlives it.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch import run

REWARD = """
import os, time

def reward(response, example):
    with open(os.environ.get("PIDS", "{pids}"), "a") as file:
        print(os.getpid(), os.getppid(), file=file)
    {body}
    return float(sum(map(ord, response)) % 97)
"""
HARM = "example['id'] == 't1' and os._exit(1)\n    example['id'] == 't2' and time.sleep(1000)"


@pytest.fixture
def home(tmp_path, uneven_llama):
    """A writer of a config and its reward function, whose calls leave process ids in the file
    `pids`.
    """
    for split, count in (("train", 4), ("test", 2)):
        rows = [{"id": f"{split[0]}{n + 1}", "prompt": f"{n} " + "word " * n} for n in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def write(body: str = "pass", **task) -> str:
        (tmp_path / "my_reward.py").write_text(REWARD.format(pids=tmp_path / "pids", body=body))
        settings = {
            "model": {"path": str(uneven_llama), "dtype": "float32"},
            "es": {"population_size": 4, "sigma": 0.05, "alpha": 0.05, "iterations": 2},
            "generation": {"max_new_tokens": 8},
            "task": {
                "name": "jsonl",
                "train": f"{tmp_path}/train.jsonl",
                "test": f"{tmp_path}/test.jsonl",
                "reward": f"{tmp_path}/my_reward.py:reward",
                "workers": 2,
            }
            | task,
            "eval": {"every": 0},
            "run": {"dir": str(tmp_path / "run"), "timeout": 120},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        return str(tmp_path / "config.yaml")

    return write


def processes(file: Path) -> tuple[set[int], set[int]]:
    """The workers that scored, and their parents."""
    pairs = [line.split() for line in file.read_text().splitlines()]
    return {int(pid) for pid, _ in pairs}, {int(parent) for _, parent in pairs}


def left(pids: set[int], seconds: float = 10) -> set[int]:
    """Those that are still there after so many seconds."""
    until = time.monotonic() + seconds
    while (
        there := {pid for pid in pids if Path(f"/proc/{pid}").exists()}
    ) and time.monotonic() < until:
        time.sleep(0.05)
    return there


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(
    "layout",
    [pytest.param(["sharding.shard=2"], marks=pytest.mark.slow), []],
    ids=["ZeRO 2", "2 replicas"],
)
def test_failures_are_counted_and_get_their_reward(zygote, home, tmp_path, layout):
    run = zygote.start(home(HARM, on_error=-5, timeout=1.0), *layout, ranks=2, log=tmp_path / "log")
    assert run.wait(120) == [0, 0], run.text()
    for row in rows(tmp_path / "run" / "metrics.jsonl"):
        assert (row["scoring_failures"], row["scoring_timeouts"]) == (2 * 4, 4)
    first, _ = rows(tmp_path / "run" / "metrics.jsonl")
    assert (first["evaluation_scoring_failures"], first["evaluation_scoring_timeouts"]) == (4, 2)
    assert run.text().count("  8 not scored") == 2
    samples = rows(tmp_path / "run" / "samples.jsonl")
    assert all(
        (row["reward"] == -5) == row["prompt"][0]["content"].startswith(("0", "1"))
        for row in samples
    )
    failed = json.loads((tmp_path / "run" / "failed_scoring.json").read_text())
    assert {row["error"] for row in failed} == {
        "it ended its process (exit code 1)",
        "not done within 1 s",
    }
    workers, parents = processes(tmp_path / "pids")
    assert parents == ({run.pids[0]} if layout else set(run.pids))  # a replica's leading rank alone
    assert not left(workers)


def test_a_failure_ends_the_run_with_prompt_and_response(zygote, home, tmp_path):
    run = zygote.start(
        home(HARM.splitlines()[0]), "sharding.shard=2", ranks=2, log=tmp_path / "log"
    )
    assert run.wait(120) == [2, 2], run.text()
    (error,) = [line for line in run.text().splitlines() if line.startswith("error:")]
    saved = tmp_path / "run" / "failed_scoring.json"
    assert (
        "scoring prompt 0 of train: it ended its process (exit code 1)" in error
        and str(saved) in error
    )
    (row,) = json.loads(saved.read_text())
    assert row["prompt"] == [{"role": "user", "content": "0 "}] and isinstance(row["response"], str)
    assert "Traceback" not in run.text()
    assert not left(processes(tmp_path / "pids")[0])
    # The reward that it names lets the run go on.
    keys = ["task.on_error=0", "resume.allow_changes=[task.on_error]"]
    run = zygote.start(home(HARM.splitlines()[0]), *keys, ranks=1, log=tmp_path / "log")
    assert run.wait(120) == [0], run.text()


@pytest.mark.parametrize(
    "tool, options", [("train", []), ("evaluate", ["--split", "train", "--out", "report.json"])]
)
def test_a_mistake_in_the_reward_is_known_from_the_first_response(
    zygote, home, tmp_path, tool, options
):
    options = [f"{tmp_path}/{option}" if "." in option else option for option in options]
    run = zygote.start(home("example['answr']"), *options, log=tmp_path / "log", tool=tool)
    assert run.wait(120) == [2], run.text()
    assert "KeyError: 'answr'" in run.text() and "Traceback" not in run.text()
    assert len((tmp_path / "pids").read_text().splitlines()) == 1  # of four


def test_a_batch_is_scored_whole_also_at_the_start(zygote, home, tmp_path):
    sizes = tmp_path / "sizes"
    code = f"""
def score_batch(responses, examples):
    with open({str(sizes)!r}, "a") as file:
        print(len(responses), file=file)
    return list(range(len(responses)))
"""
    config = home(reward=f"{tmp_path}/batch.py:score_batch")
    (tmp_path / "batch.py").write_text(code)
    run = zygote.start(config, "es.iterations=1", log=tmp_path / "log")
    assert run.wait(120) == [0], run.text()
    assert sorted(map(int, sizes.read_text().split())) == [2, 2, *[4] * 6]  # 4 members, 2 centers


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "stopped"])
def test_workers_do_not_outlive_a_run_that_is_ended(zygote, home, tmp_path, number):
    loops = home("while True: pass", timeout=1000.0, on_error=0)
    run = zygote.start(loops, ranks=1, log=tmp_path / "log")
    until = time.monotonic() + 100
    while not (tmp_path / "pids").exists() or len(processes(tmp_path / "pids")[0]) < 2:
        assert time.monotonic() < until and run.poll(0.1) == [None], run.text()
    os.kill(run.pids[0], number)
    assert run.wait() == [-signal.SIGKILL if number == signal.SIGKILL else 0], run.text()
    assert not left(processes(tmp_path / "pids")[0])


def test_a_model_is_judged_by_it(home, tmp_path):
    out = tmp_path / "report.json"
    options = ["--split", "test", "more", "--samples", "1", "--out", str(out)]
    config = home(HARM.splitlines()[0], on_error=-5, tests={"more": f"{tmp_path}/train.jsonl"})
    done = run([sys.executable, "launchers/evaluate.py", config, *options])
    assert done.returncode == 0, done.stderr[-3000:]
    splits = json.loads(out.read_text())["splits"]
    assert [split["scoring_failures"] for split in splits.values()] == [2, 2]
    told = f"2 not scored, and given task.on_error; the latest: {tmp_path}/report.failed.json"
    assert f"test: {told}" in done.stdout and f"more: {told}" in done.stdout
    assert [row["reward"] for row in splits["more"]["responses"] if row["prompt"] == 0] == [
        -5.0,
        -5.0,
    ]
    assert len(splits["more"]["responses"]) == 8
    assert not left(processes(tmp_path / "pids")[0])
