"""Runs that are killed or stopped, and what changed meanwhile: they reach the undisturbed run's
center, to the bit, or are refused by name.
"""

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from outcome import TASK, finish, killed_often, outcome, rows, stopped_run
from shardes.noise.definition import LOW_RANK_NOISE
from shardes.storage import journal, snapshots
from shardes.storage.checkpoint import verify
from shardes.storage.export import center_of_run, write_export
from shardes.storage.verify import replayed_digests

pytestmark = pytest.mark.faults


def test_killed_at_a_few_instants(zygote, configure, undisturbed, arrived, tmp_path):
    def start(directory: Path):
        return zygote.start(configure(directory), ranks=2, log=directory.with_suffix(".log"))

    for directory in killed_often(start, tmp_path, undisturbed[1], 4):
        finish(zygote, configure(directory), directory)
        arrived(directory)


@pytest.mark.parametrize(
    "fault",
    [
        {"kill_in_append": ["header", 1]},
        {"kill_in_append": ["iteration", 4]},
        {"kill_in_write": 50},
        pytest.param({"kill_in_append": ["reward", 2]}, marks=pytest.mark.slow),
        pytest.param({"kill_in_append": ["iteration", 1]}, marks=pytest.mark.slow),
        pytest.param({"kill_in_append": ["evaluation", 2]}, marks=pytest.mark.slow),
        pytest.param({"kill_in_write": 1}, marks=pytest.mark.slow),
    ],
    ids=lambda fault: " ".join(map(str, *fault.items())),
)
def test_killed_within_a_write(zygote, configure, arrived, tmp_path, fault):
    directory = tmp_path / "run"
    config = configure(directory)
    run = zygote.start(config, ranks=2, log=tmp_path / "killed.log", **fault)
    assert run.wait() == [-signal.SIGKILL] * 2, run.text()
    if "kill_in_write" in fault:
        assert list((directory / "snapshots").glob("*.partial"))
        assert (fault["kill_in_write"] > 1) == bool(snapshots.by_iteration(directory))
    history = journal.read(directory / "journal.jsonl")
    output = finish(zygote, config, directory)
    if history and not history.is_empty:
        assert "resuming at iteration" in output
    arrived(directory)


def test_an_evaluation_that_a_kill_interrupted_is_made_up_for(zygote, configure, arrived, tmp_path):
    directory = tmp_path / "run"
    config = configure(directory)
    # Without the best center, answers are scored after the record that moves the center.
    keys = ["checkpoint.best=false"]
    fault = {"kill_in_append": ["evaluation", 2]}
    run = zygote.start(config, *keys, ranks=2, log=tmp_path / "killed.log", **fault)
    assert run.wait() == [-signal.SIGKILL] * 2, run.text()
    history = journal.read(directory / "journal.jsonl")
    assert len(history.records) == 4 and list(history.evaluations) == [0]
    finish(zygote, config, directory, *keys)
    arrived(directory, best=False)


def test_an_extended_run_is_the_longer_run(zygote, configure, arrived, tmp_path):
    directory = tmp_path / "run"
    finish(zygote, configure(directory, iterations=3), directory)
    finish(zygote, configure(directory), directory)
    arrived(directory)


def test_an_evaluation_that_only_the_shorter_run_had_is_kept(zygote, configure, tmp_path):
    directory = tmp_path / "run"
    finish(zygote, configure(directory, iterations=1), directory)
    finish(zygote, configure(directory, iterations=2), directory)
    assert ["held_out_reward" in row for row in rows(directory / "metrics.jsonl")] == [True, True]
    assert {row["iteration"] for row in rows(directory / "samples.jsonl")} == {0, 1, 2}


def test_a_snapshot_of_an_earlier_run_is_not_used(zygote, configure, arrived, tmp_path):
    directory = tmp_path / "run"
    finish(zygote, configure(directory, sigma=0.01, iterations=1), directory)
    for name in ("journal.jsonl", "metrics.jsonl", "samples.jsonl"):
        (directory / name).unlink()
    config = configure(directory)
    run = zygote.start(config, ranks=2, log=tmp_path / "killed.log", kill_in_append=["reward", 5])
    assert run.wait() == [-signal.SIGKILL] * 2, run.text()
    assert "belongs to another run" in finish(zygote, config, directory)
    shutil.rmtree(directory / "snapshots" / "iteration_1")  # left alone: it is not this run's
    arrived(directory)


def test_killed_while_an_extension_is_built(zygote, configure, arrived, tmp_path):
    directory = tmp_path / "run"
    config = configure(directory)
    run = zygote.start(config, ranks=2, log=tmp_path / "killed.log", kill_in_build=True)
    assert run.wait() == [-signal.SIGKILL] * 2, run.text()
    finish(zygote, config, directory)
    arrived(directory)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(("deepspeed", 2, 1, 2), marks=pytest.mark.slow),
        ("fsdp", 2, 1, 2),
        ("deepspeed", 1, 2, 2),
        pytest.param(("deepspeed", 1, 1, 1), marks=pytest.mark.slow),
    ],
    ids=["ZeRO 2", "FSDP 2", "TP 2", "1 rank"],
)
def test_another_layout_goes_on(zygote, configure, arrived, tmp_path, layout):
    engine, shard, tensor, ranks = layout
    directory = tmp_path / "run"
    config = configure(directory)
    run = zygote.start(
        config, ranks=2, log=tmp_path / "killed.log", kill_in_append=["iteration", 3]
    )
    assert run.wait() == [-signal.SIGKILL] * 2, run.text()
    # Without snapshots it resumes from the journal and the base model.
    shutil.rmtree(directory / "snapshots")
    keys = [f"engine={engine}", f"sharding.shard={shard}", f"sharding.tensor={tensor}"]
    output = finish(zygote, config, directory, *keys, ranks=ranks)
    assert "the base model and 2 iterations replayed" in output
    arrived(directory)


def test_a_run_with_low_rank_noise_goes_on_verifies_and_exports(zygote, configure, model, tmp_path):
    keys = ["es.noise=low_rank", "es.rank=3"]
    directory, other = tmp_path / "run", tmp_path / "other"
    config = configure(directory)
    fault = {"kill_in_append": ["iteration", 4]}
    run = zygote.start(config, *keys, ranks=2, log=tmp_path / "killed.log", **fault)
    assert run.wait() == [-signal.SIGKILL] * 2, run.text()
    finish(zygote, config, directory, *keys, "engine=fsdp", "sharding.shard=2")
    finish(zygote, configure(other), other, *keys, ranks=1)
    assert outcome(directory) == outcome(other)
    history = journal.read(directory / "journal.jsonl")
    assert history.header.noise == LOW_RANK_NOISE
    assert [record.rank for record in history.records] == [3] * 5
    digests = [*(record.digest for record in history.records), history.finish.digest]
    assert replayed_digests(history, None) == digests and len(set(digests)) == 6
    # By replaying the journal: nothing else has the center before iteration 3.
    source = center_of_run(directory, history, None, 3)
    write_export(source, tmp_path / "out", torch.float32, "5GB")
    assert verify(tmp_path / "out").digest == digests[3]
    exported, base = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (tmp_path / "out", model)
    )
    for name, values in exported.items():
        assert torch.equal(values, base[name]) == (values.ndim == 1), name


def test_members_that_were_evaluated_are_not_evaluated_again(zygote, configure, arrived, tmp_path):
    directory = tmp_path / "run"
    config = configure(directory)
    run = zygote.start(config, log=tmp_path / "killed.log", kill_in_append=["reward", 8])
    assert run.wait() == [-signal.SIGKILL], run.text()
    assert "iteration 1, of which 3 members are evaluated" in finish(
        zygote, config, directory, ranks=1
    )
    entries = rows(directory / "journal.jsonl")
    for iteration in range(5):
        members = [
            row["member"]
            for row in entries
            if row["kind"] == "reward" and row["iteration"] == iteration
        ]
        assert sorted(members) == [0, 1, 2, 3]
    arrived(directory)


def test_a_base_model_that_changed_is_refused_by_name(zygote, configure, model, tmp_path):
    config, directory = stopped_run(zygote, configure, tmp_path)
    changed = shutil.copytree(model, tmp_path / "changed")
    data = bytearray((changed / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (changed / "model.safetensors").write_bytes(data)
    run = zygote.start(config, f"model.path={changed}", ranks=2, log=tmp_path / "refused.log")
    assert run.wait() == [2, 2]
    assert "model.safetensors is not what the run began with" in run.text()
    # If it is allowed, rebuilding the center from it still fails.
    shutil.rmtree(directory / "snapshots")
    keys = [f"model.path={changed}", "resume.allow_changes=[model.path]"]
    run = zygote.start(config, *keys, ranks=2, log=tmp_path / "refused.log")
    assert run.wait() == [1, 1]
    assert "the center before iteration 0 is rebuilt with digest" in run.text()


def test_changed_settings_are_refused_unless_allowed(zygote, configure, tmp_path):
    config, directory = stopped_run(zygote, configure, tmp_path)
    run = zygote.start(config, "es.sigma=0.04", ranks=2, log=tmp_path / "refused.log")
    assert run.wait() == [2, 2]
    assert "es.sigma=0.04: the run in" in run.text() and "has 0.05" in run.text()
    output = finish(zygote, config, directory, "es.sigma=0.04", "resume.allow_changes=[es.sigma]")
    assert "es.sigma: changed from 0.05 to 0.04" in output
    history = journal.read(directory / "journal.jsonl")
    assert history.resumptions[-1].changes == {"es.sigma": [0.05, 0.04]}
    assert [record.sigma for record in history.records] == [0.05] * 4 + [0.04]


def test_a_directory_in_use_is_refused_and_that_of_a_dead_process_is_not(
    zygote, configure, arrived, tmp_path
):
    directory = tmp_path / "run"
    config = configure(directory)
    first = zygote.start(config, ranks=2, log=tmp_path / "first.log", stop_in_append=8)
    while not first.text() or "iteration 0" not in first.text():
        assert first.poll(0.05) == [None, None], first.text()
    second = zygote.start(config, ranks=2, log=tmp_path / "second.log")
    assert second.wait() == [2, 2]
    assert f"in use by process {first.group} on {os.uname().nodename}" in second.text()
    first.kill()
    first.wait()
    assert f"taking over the lock that process {first.group}" in finish(zygote, config, directory)
    arrived(directory)


@pytest.mark.parametrize(
    "number, code",
    [
        pytest.param(signal.SIGTERM, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow),
        (signal.SIGUSR1, 75),
    ],
)
def test_a_signal_to_any_rank_stops_all_and_nothing_is_lost(
    zygote, configure, arrived, tmp_path, number, code
):
    directory = tmp_path / "run"
    config = configure(directory)
    keys = ["sharding.shard=2", "sharding.gather=layer"] if number == signal.SIGINT else []
    run = zygote.start(config, *keys, ranks=2, log=tmp_path / "stopped.log", slow=0.02)
    while (
        not (directory / "journal.jsonl").exists()
        or '"reward"' not in (directory / "journal.jsonl").read_text()
    ):
        assert run.poll(0.05) == [None, None], run.text()
    started = time.monotonic()
    os.kill(run.group if number == signal.SIGTERM else run.pids[1], number)
    assert run.wait(10) == [code, code], run.text()
    assert time.monotonic() - started < 10
    assert "start the same command again" in run.text() and "Traceback" not in run.text()
    history = journal.read(directory / "journal.jsonl")
    assert not history.incomplete_line and not history.finish
    finish(zygote, config, directory, *keys)
    if not keys:
        arrived(directory)


def test_a_center_that_went_wrong_stops_the_run(zygote, configure, arrived, tmp_path):
    directory = tmp_path / "run"
    config = configure(directory)
    run = zygote.start(config, ranks=2, log=tmp_path / "flipped.log", flip=[1, 2])
    assert run.wait() == [1, 1]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (
        f"iteration 2: the centers differ from that of replica 0 in replica 1, rank 1, {name}."
        in run.text()
    )
    assert "Traceback" not in run.text()
    finish(zygote, config, directory)
    arrived(directory)


@pytest.mark.slow
def test_centers_that_drift_are_not_compared_and_go_on_from_their_snapshot(
    zygote, configure, tmp_path
):
    directory = tmp_path / "run"
    config = configure(directory)
    keys = ["es.restore=subtract", "model.dtype=bfloat16"]
    run = zygote.start(
        config,
        *keys,
        ranks=2,
        log=tmp_path / "killed.log",
        kill_in_append=["iteration", 5],
        slow=0.02,
    )
    assert run.wait() == [-signal.SIGKILL] * 2, run.text()
    manifest = verify(snapshots.by_iteration(directory)[4])
    assert "/iteration_4\n" in finish(zygote, config, directory, *keys)
    history = journal.read(directory / "journal.jsonl")
    assert len(history.records) == 5 and history.records[4].digest == manifest.digest


SHARDED = ["engine=fsdp", "sharding.shard=2", "sharding.gather=layer"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("layout", [SHARDED, ["sharding.tensor=2"]], ids=["gloo", "shared memory"])
def test_a_rank_that_does_not_answer_is_named(zygote, configure, tmp_path, layout, lost, number):
    config = configure(tmp_path / "run")
    run = zygote.start(config, *layout, "run.timeout=5", ranks=2, log=tmp_path / "log", slow=0.02)
    try:
        while "iteration 0" not in run.text():
            assert run.poll(0.05) == [None, None], run.text()
        os.kill(run.pids[lost], number)
        started = time.monotonic()
        while run.poll(0.1)[1 - lost] is None:
            assert time.monotonic() - started < 30, run.text()
    finally:
        run.kill()
        run.wait()
    named = rf"rank {lost} on {os.uname().nodename}: (did not take part|no sign of life)"
    if lost == 0:  # it served the store
        named = r"rank 0, whose store does not answer|the store of rank 0 is gone"
    assert re.search(named, run.text()), run.text()
    assert run.text().count("error: ") == 1 and "Traceback" not in run.text()


@pytest.mark.slow
def test_a_score_longer_than_the_time_limit_is_named(zygote, configure, tmp_path):
    config, task = configure(tmp_path / "run"), tmp_path / "slow.py"
    task.write_text(
        TASK.replace("    def score", "    def _score") + "    def score(self, *arguments):\n"
        "        import time; time.sleep(6); return self._score(*arguments)\n"
    )
    keys = [f"task.path={task}:Letters", "run.timeout=3", "engine=fsdp", "sharding.tensor=2"]
    run = zygote.start(config, *keys, ranks=2, log=tmp_path / "log")
    assert run.wait(60) == [1, 1], run.text()
    assert "rank 0 on" in run.text() and "slow reward function" in run.text()
    assert "Traceback" not in run.text()
