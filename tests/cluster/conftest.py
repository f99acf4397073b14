"""A small run that the tests on SLURM and on two hosts share, and its center on one rank."""

import json
from pathlib import Path

import pytest
import yaml

from shardes.storage import journal

TASK = '''
import time
from pathlib import Path

class Letters:
    """A reward that differs from member to member."""
    def prompts(self, split):
        return ["abc", "a much longer prompt", "x"] if split == "train" else ["hello"]
    def score(self, split, responses):
        return [float(sum(map(ord, text)) % 97) for text in responses]

class SlowLetters(Letters):
    """A member takes a second."""
    def score(self, split, responses):
        time.sleep(1)
        return super().score(split, responses)

def joined(log):
    return log.exists() and "joined the run" in log.read_text()

class PatientLetters(Letters):
    """Its run does not end before a replica has joined it."""
    def score(self, split, responses):
        log = Path(Path(__file__).with_name("log_to_watch").read_text())
        deadline = time.monotonic() + 400
        while time.monotonic() < deadline and not joined(log):
            time.sleep(0.1)
        time.sleep(0.2)
        return super().score(split, responses)
'''


@pytest.fixture(scope="session")
def settings(tied_llama, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "task.py").write_text(TASK)
    return {
        "model": {"path": str(tied_llama), "dtype": "float32"},
        "es": {"population_size": 4, "sigma": 0.05, "alpha": 0.05, "iterations": 8},
        "generation": {"max_new_tokens": 8},
        "task": {"path": f"{folder}/task.py:Letters"},
        "eval": {"every": 4},
        "checkpoint": {"every": 4},
        "run": {"dir": "", "timeout": 300},
    }


@pytest.fixture
def run_dir(tmp_path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def config(settings, tmp_path, run_dir) -> str:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings | {"run": settings["run"] | {"dir": str(run_dir)}}))
    return str(file)


@pytest.fixture(scope="session")
def undisturbed(zygote, settings, tmp_path_factory) -> journal.Journal:
    """What one rank of one host records."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "config.yaml").write_text(
        yaml.safe_dump(settings | {"run": settings["run"] | {"dir": f"{folder}/run"}})
    )
    run = zygote.start(str(folder / "config.yaml"), log=folder / "log")
    assert run.wait(300) == [0], run.text()
    return journal.read(folder / "run" / "journal.jsonl")


@pytest.fixture
def arrived(undisturbed, run_dir):
    """A check that the run has arrived where the undisturbed one has; returns its journal."""

    def check():
        history = journal.read(run_dir / "journal.jsonl")
        assert [record.rewards for record in history.records] == [
            record.rewards for record in undisturbed.records
        ]
        assert history.finish == undisturbed.finish
        assert (
            json.loads((run_dir / "summary.json").read_text())["digest"]
            == undisturbed.finish.digest
        )
        return history

    return check
