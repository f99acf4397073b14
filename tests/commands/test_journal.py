"""The command `shardes journal`: show, verify and diff."""

import shutil

import pytest
import torch

from launch import call
from models import paper_coefficients
from shardes.commands.journal import main
from shardes.engines import empty_model
from shardes.es.population import member_seeds
from shardes.noise import add_noise
from shardes.sharding.digest import digest, format_digest
from shardes.sharding.regions import Region
from shardes.sharding.weight_files import WeightFiles
from shardes.storage import journal
from shardes.storage.checkpoint import Checkpoint, Manifest
from shardes.storage.files import fingerprint


@pytest.fixture
def directory(tmp_path, tied_llama):
    """A run of three iterations with a snapshot before the third, computed tensor by tensor."""
    base = shutil.copytree(tied_llama, tmp_path / "base")
    files, module = WeightFiles(base), empty_model(base, torch.float32)
    thetas = {}
    for name, param in module.named_parameters():
        thetas[name] = torch.empty(param.numel())
        files.read(name, [Region.contiguous(0, param.numel())], thetas[name])

    def total() -> str:
        parts = (
            digest(name, [Region.contiguous(0, theta.numel())], theta)
            for name, theta in thetas.items()
        )
        return format_digest(sum(parts))

    run = tmp_path / "run"
    run.mkdir()
    settings = {"model.dtype": "float32", "es.restore": "copy", "es.sigma": 0.01, "es.alpha": 0.01}
    written = journal.Journal(run / "journal.jsonl", None)
    written.append(journal.Header(str(base), fingerprint(files), settings))
    for iteration, rewards in enumerate([[1.0, 2.0, 4.0], [3.0, 2.5, -1.0], [0.0, 9.0, 1.0]]):
        seeds, coefficients = member_seeds(0, iteration, 3), paper_coefficients(rewards, 0.01)
        if iteration == 2:
            snapshot = run / "snapshots" / "iteration_2"
            checkpoint = Checkpoint(snapshot, files, thetas, torch.float32, "5GB")
            checkpoint.create()
            for name, theta in thetas.items():
                checkpoint.write(name, [Region.contiguous(0, theta.numel())], theta)
            checkpoint.flush()
            shas = {file: checkpoint.read_back(file)[0] for file in checkpoint.files}
            checkpoint.publish(Manifest(2, total(), shas))
        written.append(journal.Record(iteration, seeds, rewards, coefficients, 0.01, 0.01, total()))
        for name, theta in thetas.items():
            add_noise(theta, name, [Region.contiguous(0, theta.numel())], seeds, coefficients)
    written.append(journal.Finish(3, total()))
    written.close()
    return run


def tool(*arguments):
    done = call(main, *arguments)
    return done.returncode, done.stdout + done.stderr


def rewrite(directory, change) -> None:
    """Write the journal again with changed entries and matching checksums."""
    path = directory / "journal.jsonl"
    history = journal.read(path)
    path.unlink()
    written = journal.Journal(path, None)
    for entry in (history.header, *history.records, history.finish):
        change(entry)
        written.append(entry)


def test_show(directory):
    code, text = tool(directory)
    assert code == 0
    for part in ("2.333", "snapshot", "finished after 3 iterations", "es.sigma=0.01"):
        assert part in text


def test_verify_replays_every_center(directory):
    code, text = tool(directory, "verify")
    assert code == 0
    assert "3 iterations, every checksum matches" in text and "all match" in text


def test_verify_finds_a_wrong_center(directory):
    def change(entry):
        if isinstance(entry, journal.Record) and entry.iteration == 1:
            entry.coefficients[0] *= 1.001

    rewrite(directory, change)
    code, text = tool(directory, "verify")
    assert code == 1 and "INVALID: replayed, the center before iteration 2" in text


def test_verify_finds_damage(directory):
    (file,) = (directory / "snapshots" / "iteration_2").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-5] ^= 4
    file.write_bytes(data)
    code, text = tool(directory, "verify")
    assert code == 1 and "model.safetensors: damaged" in text
    path = directory / "journal.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"iteration": 1', b'"iteration": 7'))
    code, text = tool(directory, "verify")
    assert code == 2 and "line 3: damaged" in text


def test_diff(directory, tmp_path):
    other = shutil.copytree(directory, tmp_path / "other")
    assert tool(directory, "diff", other) == (0, "the same for 3 iterations\n")

    def change(entry):
        if isinstance(entry, journal.Header):
            entry.settings["es.seed"] = 4
        if isinstance(entry, journal.Record) and entry.iteration == 1:
            entry.rewards[2] = -7.0

    rewrite(other, change)
    code, text = tool(directory, "diff", other)
    assert code == 1
    assert "settings: es.seed: None and 4" in text
    assert "iteration 1, the first to differ: rewards (of members 2)" in text


def test_mistakes(directory, tmp_path):
    code, text = tool(tmp_path)
    assert code == 2 and "no journal there" in text
    assert tool(directory, "diff")[0] == 2
