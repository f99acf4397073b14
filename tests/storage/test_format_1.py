"""A run directory that an earlier version wrote resumes, and gives that version's centers.

format_1/ holds a run that was killed while it wrote the reward of a member of iteration 3.
format_1/expected.jsonl holds the records and the finish of the undisturbed run, without checksums.
"""

import json
import shutil
from pathlib import Path

import pytest

from launch import call
from shardes.commands import export
from shardes.commands import journal as journal_command
from shardes.storage import journal
from shardes.storage.checkpoint import verify

pytestmark = pytest.mark.faults

FIXTURE = Path(__file__).parent / "format_1"
EXPECTED = (FIXTURE / "expected.jsonl").read_text().splitlines()
DIGEST = "20c24fc7604e0a3d"


@pytest.fixture
def folder(tmp_path) -> Path:
    return shutil.copytree(FIXTURE, tmp_path / "format_1")


def records(run: Path) -> list[str]:
    """The records and the finish of a run's journal, with the fields of format 1."""
    lines = map(json.loads, (run / "journal.jsonl").read_text().splitlines())
    later = ("checksum", "tokens", "failures", "rank", "parts", "rule")
    return [
        json.dumps({key: value for key, value in line.items() if key not in later})
        for line in lines
        if line["kind"] in ("iteration", "finish")
    ]


def assert_valid(folder: Path, iterations: int) -> None:
    """`shardes journal verify` accepts the run."""
    done = call(journal_command.main, folder / "run", "verify", "--base", folder / "model")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{iterations} iterations, every checksum matches" in done.stdout
    assert "all match" in done.stdout and "INVALID" not in done.stdout


def test_it_is_read(folder):
    history = journal.read(folder / "run" / "journal.jsonl")
    assert len(history.records) == 3 and "line 26" in history.incomplete_line
    assert {member: reward.reward for member, reward in history.rewards.items()} == {
        0: 17.5,
        1: 35.5,
        2: 15.0,
    }
    assert_valid(folder, 3)


def test_it_resumes_and_arrives_at_the_same_center(zygote, folder, tmp_path):
    before = (folder / "run" / "journal.jsonl").read_bytes()
    complete = before[: before.rindex(b"\n") + 1]
    run = zygote.start("config.yaml", log=tmp_path / "log", cwd=folder)
    assert run.wait() == [0], run.text()
    assert (
        "resuming at iteration 3, of which 3 members are evaluated: "
        "snapshot run/snapshots/iteration_2 and 1 iteration replayed" in run.text()
    )
    assert (folder / "run" / "journal.jsonl").read_bytes().startswith(complete)
    assert records(folder / "run") == EXPECTED
    history = journal.read(folder / "run" / "journal.jsonl")
    assert "task.path" in history.sources and history.date  # as from the resumption on
    assert json.loads(EXPECTED[-1])["digest"] == DIGEST
    metrics = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in metrics] == list(range(6))
    assert_valid(folder, 6)
    out = tmp_path / "exported"
    done = call(export.main, folder / "run", out, "--base", folder / "model")
    assert done.returncode == 0, done.stderr
    assert verify(out).digest == DIGEST
