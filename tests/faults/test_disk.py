"""Disks that are full, read-only or damaged cost no more than they must."""

import signal
import subprocess

import pytest
from transformers import AutoModelForCausalLM

from outcome import finish, finish_of, rows, stopped_run
from shardes.storage import journal, snapshots
from shardes.storage.checkpoint import verify

pytestmark = pytest.mark.faults


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB; skips the test if it cannot be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], capture_output=True
    )
    if done.returncode:
        pytest.skip(f"cannot mount a tmpfs: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_costs_a_snapshot_and_nothing_else(zygote, configure, arrived, small_disk):
    directory = small_disk / "run"
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 150_000)
    config = configure(directory)
    run = zygote.start(config, ranks=2, log=small_disk.with_suffix(".log"))
    assert run.wait() == [0, 0], run.text()
    for iteration in (2, 4, 5):
        assert (
            f"WARNING: no snapshot of iteration {iteration}: rank 0: [Errno 28] No space left"
            in run.text()
        )
    assert not list((directory / "snapshots").iterdir())
    arrived(directory, best=False)


@pytest.mark.slow
def test_a_disk_without_inodes_costs_snapshots_and_reports(
    zygote, configure, undisturbed, small_disk
):
    directory, log = small_disk / "run", small_disk.with_suffix(".log")
    remount = ["mount", "-o", "remount,size=4m,nr_inodes={}", str(small_disk)]
    subprocess.run([part.format(14) for part in remount], check=True)
    config = configure(directory)
    run = zygote.start(config, ranks=2, log=log)
    assert run.wait() == [0, 0], run.text()
    assert "WARNING: no snapshot of iteration 2" in run.text()
    assert "warning: no summary.json" in run.text()
    assert finish_of(directory) == finish_of(undisturbed[0])
    subprocess.run([part.format(1000) for part in remount], check=True)
    finish(zygote, config, directory)
    assert (directory / "summary.json").exists()


@pytest.mark.slow
def test_a_read_only_run_directory_is_refused_and_goes_on_later(
    zygote, configure, arrived, tmp_path, small_disk
):
    directory = small_disk / "run"
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    config = configure(directory)
    run = zygote.start(config, ranks=2, log=tmp_path / "log", kill_in_append=["iteration", 3])
    assert run.wait() == [-signal.SIGKILL] * 2, run.text()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    run = zygote.start(config, ranks=2, log=tmp_path / "log")
    assert run.wait() == [2, 2], run.text()
    (line,) = run.text().splitlines()
    assert f"run.dir={directory}: cannot be written" in line and "Read-only" in line
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    finish(zygote, config, directory)
    arrived(directory)


def test_a_disk_too_full_for_the_journal_stops_the_run(zygote, configure, tmp_path, small_disk):
    directory, filler, log = small_disk / "run", small_disk / "filler", tmp_path / "log"
    # The journal grows to several pages before any other file grows.
    es = {"population_size": 40, "iterations": 1}
    config = configure(directory, **es)
    run = zygote.start(config, ranks=2, log=log, fill_in_append=str(filler))
    assert run.wait() == [1, 1]
    assert "journal.jsonl: cannot be written ([Errno 28] No space left on device)" in run.text()
    assert "Traceback" not in run.text()
    history = journal.read(directory / "journal.jsonl")
    assert not history.incomplete_line and not history.records and history.rewards
    filler.unlink()
    finish(zygote, config, directory, "checkpoint.every=0", "checkpoint.best=false")
    finish(zygote, configure(tmp_path / "other", **es), tmp_path / "other")
    assert (
        journal.read(directory / "journal.jsonl").finish
        == journal.read(tmp_path / "other/journal.jsonl").finish
    )


@pytest.mark.slow
def test_damaged_reports_do_not_stop_a_run(zygote, configure, undisturbed, tmp_path):
    config, directory = stopped_run(zygote, configure, tmp_path)
    for name in ("metrics", "samples", "extremes"):
        file = directory / f"{name}.jsonl"
        first, *others = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join([b"\xff" + first, *others, b'{"iteration": nu\n']))
    (directory / "logs" / "attempt_1.bak").mkdir()
    finish(zygote, config, directory)
    assert finish_of(directory) == finish_of(undisturbed[0])
    assert [row["iteration"] for row in rows(directory / "metrics.jsonl")] == list(range(5))


def test_a_damaged_snapshot_is_named_and_not_used(zygote, configure, arrived, tmp_path):
    config, directory = stopped_run(zygote, configure, tmp_path)
    newest = max(snapshots.by_iteration(directory))
    path = snapshots.by_iteration(directory)[newest]
    file = sorted(path.glob("*.safetensors"))[-1]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    output = finish(zygote, config, directory)
    assert f"WARNING: a snapshot is not used: {file}: damaged" in output
    assert journal.read(directory / "journal.jsonl").finish
    assert "resuming at iteration 4" in output


def test_a_killed_export_leaves_no_half_checkpoint(zygote, configure, tmp_path):
    _, directory = stopped_run(zygote, configure, tmp_path)
    arguments = [str(directory), str(tmp_path / "out"), "--shard-size", "100KB"]
    for n in (1, 8):
        run = zygote.start(*arguments, tool="export", log=tmp_path / "export.log", kill_in_write=n)
        assert run.wait() == [-signal.SIGKILL], run.text()
        assert not (tmp_path / "out").exists()
    run = zygote.start(*arguments, tool="export", log=tmp_path / "export.log")
    assert run.wait() == [0], run.text()
    assert not list(tmp_path.glob("*.partial"))
    assert verify(tmp_path / "out").iteration == 4
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
