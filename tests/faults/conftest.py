"""A run that is not disturbed, and the means to compare others with it."""

import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from models import SIZES, save_model
from outcome import TASK, outcome, settings
from shardes.storage import journal, snapshots
from shardes.storage.checkpoint import verify


@pytest.fixture(scope="package")
def model(tmp_path_factory) -> Path:
    """Four key-value heads; large enough for snapshots of several files and many writes."""
    torch.manual_seed(6)
    sizes = SIZES | dict(hidden_size=64, intermediate_size=300)
    return save_model(tmp_path_factory.mktemp("model"), LlamaForCausalLM(LlamaConfig(**sizes)))


@pytest.fixture(scope="package")
def configure(model, tmp_path_factory):
    """A writer of config files for runs in a given directory."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "task.py").write_text(TASK)

    def write(directory: Path, **es) -> str:
        values = settings(model, folder, directory)
        values["es"] |= es
        file = folder / f"{len(list(folder.iterdir()))}.yaml"
        file.write_text(yaml.safe_dump(values))
        return str(file)

    return write


@pytest.fixture(scope="package")
def undisturbed(zygote, configure, tmp_path_factory):
    """The directory of an undisturbed run, and the seconds that it takes."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    started = time.monotonic()
    run = zygote.start(configure(directory), ranks=2, log=directory.with_suffix(".log"))
    assert run.wait() == [0, 0], run.text()
    history = journal.read(directory / "journal.jsonl")
    assert len(history.records) == 5 and len({record.digest for record in history.records}) == 5
    return directory, time.monotonic() - started


@pytest.fixture
def arrived(undisturbed):
    """A check that all that a run has written is what the undisturbed run wrote."""
    undisturbed_directory, _ = undisturbed

    def check(directory: Path, best: bool = True) -> None:
        assert outcome(directory) == outcome(undisturbed_directory)
        history = journal.read(directory / "journal.jsonl")
        if best:
            assert snapshots.best_iteration(directory) == history.best
        for iteration, path in snapshots.by_iteration(directory).items():
            assert verify(path).digest == history.digest(iteration)
        assert not list((directory / "snapshots").glob("*.partial"))

    return check
