"""Runs with a task class of the user's: whatever its code does, the run ends in one line, and soon
when it is asked to.
"""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch import free_port, run
from shardes.storage import journal

pytestmark = pytest.mark.faults

TASK = """
import os, sys, time

class Own:
    def prompts(self, split):
        return ["abc", "x"] if split == "train" else ["hello"]

    def score(self, split, responses):
        if os.path.exists("{home}/does"):
            open("{home}/called", "a").write(str(os.getpid()))
            {body}
        return [float(sum(map(ord, text)) % 97) for text in responses]
"""
UNMOVED = """
            while True:
                try:
                    time.sleep(60)
                except BaseException:
                    pass
"""


@pytest.fixture
def home(tmp_path, uneven_llama):
    """A writer of a config and its task, whose `score` does something while the file `does` exists,
    after it has written the file `called`.
    """

    def write(body: str) -> str:
        (tmp_path / "own.py").write_text(TASK.format(home=tmp_path, body=body))
        (tmp_path / "does").touch()
        settings = {
            "model": {"path": str(uneven_llama), "dtype": "float32"},
            "es": {"population_size": 4, "sigma": 0.05, "alpha": 0.05, "iterations": 2},
            "generation": {"max_new_tokens": 8},
            "task": {"path": f"{tmp_path}/own.py:Own"},
            "checkpoint": {"every": 0},
            "run": {"dir": str(tmp_path / "run"), "timeout": 120},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        return str(tmp_path / "config.yaml")

    return write


def finish(zygote, config: str, directory: Path) -> None:
    """The run goes on once its task no longer does that."""
    (directory / "does").unlink()
    run = zygote.start(config, ranks=1, log=directory / "finished.log")
    assert run.wait(60) == [0], run.text()
    assert journal.read(directory / "run" / "journal.jsonl").finish


@pytest.mark.parametrize(
    "body, signalled",
    [
        ("time.sleep(60)", 0),
        pytest.param("while True: pass", 1, marks=pytest.mark.slow),
        pytest.param(UNMOVED, 0, marks=pytest.mark.slow),
    ],
    ids=["sleeps", "loops", "catches everything"],
)
def test_a_stop_does_not_wait_for_score(zygote, home, tmp_path, body, signalled):
    config = home(body)
    run = zygote.start(config, ranks=2, log=tmp_path / "log")
    until = time.monotonic() + 60
    while len((tmp_path / "called").read_text() if (tmp_path / "called").exists() else "") < 2:
        assert time.monotonic() < until and run.poll(0.05) == [None, None], run.text()
    os.kill(run.pids[signalled], signal.SIGUSR1 if signalled else signal.SIGTERM)
    started = time.monotonic()
    assert run.wait(10) == [75 * signalled] * 2, run.text()
    assert time.monotonic() - started < 10
    assert "start the same command again" in run.text() and "Traceback" not in run.text()
    assert not (tmp_path / "run" / "failed_scoring.json").exists()
    finish(zygote, config, tmp_path)


@pytest.mark.parametrize(
    "body, error",
    [
        ("sys.exit(0)", "scoring train raised SystemExit: 0"),
        pytest.param(
            "return [1e200, 0.0]",
            "gave prompt 0 of train the reward 1e+200, not a number from -1e+100 to 1e+100",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_mistake_in_score_ends_all_ranks_and_can_be_mended(zygote, home, tmp_path, body, error):
    config = home(body)
    run = zygote.start(config, "sharding.shard=2", ranks=2, log=tmp_path / "log")
    assert run.wait(60) == [2, 2], run.text()
    (line,) = [line for line in run.text().splitlines() if line.startswith("error:")]
    assert error in line and str(tmp_path / "run" / "failed_scoring.json") in line
    assert "Traceback" not in run.text()
    finish(zygote, config, tmp_path)


@pytest.mark.slow
def test_ranks_that_torchrun_starts_again_go_on(home, tmp_path):
    config = home('os.remove("{home}/does"); os._exit(1)'.replace("{home}", str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--max-restarts", "1", "--master_port", str(free_port())]
    done = run([*command, "launchers/train.py", config, "sharding.shard=2"])
    assert done.returncode == 0, done.stderr[-4000:]
    assert journal.read(tmp_path / "run" / "journal.jsonl").finish
