"""Where a run resumes, and when resuming is refused."""

import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from shardes.config.loading import center_settings
from shardes.config.schema import Config, Noise
from shardes.errors import ConfigError
from shardes.sharding.weight_files import WeightFiles
from shardes.storage.files import fingerprint
from shardes.storage.journal import Header, Record, Resumption, Reward, read
from shardes.storage.resume import (
    Lock,
    ResumePoint,
    RunDirectory,
    describe_run_directory,
)
from shardes.storage.resume import open_run_directory as open_without_recording

pytestmark = pytest.mark.faults


def open_run_directory(*arguments, **named) -> RunDirectory:
    """Open a run directory as a start does that no rank refuses."""
    run = open_without_recording(*arguments, **named)
    run.begin()
    return run


REWARD = Reward(2, 1, 0.25, 7, f"{2:016x}")


@pytest.fixture
def base(tied_llama, tmp_path) -> WeightFiles:
    return WeightFiles(shutil.copytree(tied_llama, tmp_path / "base"))


@pytest.fixture
def config(tmp_path, base) -> Config:
    config = Config()
    config.model.path, config.run.dir = str(base.directory), str(tmp_path / "run")
    config.task.name, config.es.iterations = "conciseness", 5
    return config


def record(iteration: int) -> Record:
    return Record(iteration, [1, 2], [0.0, 1.0], [-0.1, 0.1], 0.001, 0.0005, f"{iteration:016x}")


@pytest.fixture
def begun(config, base):
    """The config of a run of two iterations and a member, whose process has ended."""
    run = open_run_directory(config, base)
    for entry in (record(0), record(1), REWARD):
        run.journal.append(entry)
    run.close()
    return config


def test_a_new_run_begins_at_the_base_model(config, base):
    run = open_run_directory(config, base)
    assert run.resume == ResumePoint() and not run.notes
    header = read(run.journal.path).header
    model = str(base.directory.resolve())
    assert header == Header(model, fingerprint(base), center_settings(config))
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(header.files)


def test_a_run_goes_on_where_it_was(begun, base):
    resume = open_run_directory(begun, base).resume
    assert (resume.iteration, resume.source, resume.target) == (2, None, f"{2:016x}")
    assert resume.records == [record(0), record(1)] and resume.reward_means == [0.5, 0.5]
    assert resume.rewards == {1: REWARD}


def test_recorded_rewards_that_no_update_could_be_computed_from_are_measured_again(begun, base):
    run = open_run_directory(begun, base)
    bad = [
        Reward(2, 0, 1e200, 7, f"{2:016x}"),
        Reward(2, 2, 0.5, 7, f"{2:016x}", [-1.1e100, 1.1e100]),
        Reward(2, 3, 1e100, 7, f"{2:016x}"),
    ]
    for entry in bad:
        run.journal.append(entry)
    run.close()
    run = open_run_directory(begun, base)
    assert run.resume.rewards == {1: REWARD, 3: bad[2]}
    assert run.resume.target == f"{2:016x}"
    again = [note for note in run.notes if "is evaluated again" in note]
    assert [note.partition(" is")[0] for note in again] == [
        "member 0 of iteration 2",
        "member 2 of iteration 2",
    ]
    run.journal.append(Reward(2, 0, 0.5, 7, f"{2:016x}"))
    run.close()
    assert sorted(open_run_directory(begun, base).resume.rewards) == [0, 1, 3]


def test_a_resume_point_survives_the_store(begun, base):
    resume = open_run_directory(begun, base).resume
    assert ResumePoint.from_json(resume.to_json()) == resume


def test_never_refuses_and_says_what_to_do(begun, base):
    begun.resume.source = "never"
    with pytest.raises(ConfigError, match=r"run\.dir=.*holds a run already, and resume=never"):
        open_run_directory(begun, base)


def test_a_run_that_recorded_nothing_may_begin_anew_with_other_settings(config, base):
    open_run_directory(config, base).close()
    config.es.sigma = 0.5
    config.resume.source = "never"
    assert open_run_directory(config, base).resume == ResumePoint()


@pytest.mark.parametrize(
    "section, name, value",
    [
        ("es", "sigma", 0.5),
        ("es", "alpha", 0.5),
        ("es", "seed", 9),
        ("es", "population_size", 7),
        ("generation", "stop", ["x"]),
        ("task", "template", "{question}"),
        ("task", "chat", False),
        ("task", "reward", "my_reward.py:other"),
        ("task", "on_error", "-1.0"),
    ],
)
def test_what_decides_the_center_may_change_on_purpose_only(begun, base, section, name, value):
    old = getattr(getattr(begun, section), name)
    setattr(getattr(begun, section), name, value)
    with pytest.raises(ConfigError, match=rf"{section}\.{name}=.*allow_changes"):
        open_run_directory(begun, base)
    begun.resume.allow_changes = [f"{section}.{name}"]
    run = open_run_directory(begun, base)
    run.close()
    assert run.resume.rewards == {} and any(f"{section}.{name}" in note for note in run.notes)
    history = read(run.journal.path)
    assert history.resumptions == [Resumption(2, {f"{section}.{name}": [old, value]})]
    begun.resume.allow_changes = []
    assert open_run_directory(begun, base).resume.iteration == 2  # it is the setting now


@pytest.mark.parametrize("name, value", [("noise", Noise.low_rank), ("rank", 2)])
def test_the_kind_of_noise_cannot_change_within_a_run(begun, base, name, value):
    setattr(begun.es, name, value)
    with pytest.raises(ConfigError, match=rf"es\.{name}=.* cannot change within a run"):
        open_run_directory(begun, base)
    begun.resume.allow_changes = [f"es.{name}"]
    with pytest.raises(ConfigError, match=rf"allow_changes: es\.{name} cannot change within a run"):
        open_run_directory(begun, base)


def test_what_does_not_decide_it_may_change(begun, base):
    begun.sharding.tensor, begun.es.iterations = 2, 9
    begun.eval.every, begun.checkpoint.every = 1, 3
    begun.task.workers, begun.task.timeout, begun.task.memory = 1, 2.0, 3.0
    assert open_run_directory(begun, base).resume.iteration == 2


def test_a_wrong_name_in_allow_changes(begun, base):
    begun.resume.allow_changes = ["sigma"]
    with pytest.raises(ConfigError, match=r"resume\.allow_changes: sigma.*es\.sigma"):
        open_run_directory(begun, base)


def test_fewer_iterations_than_there_are(begun, base):
    begun.es.iterations = 1
    with pytest.raises(ConfigError, match=r"es\.iterations=1: .* has 2 already"):
        open_run_directory(begun, base)


def test_another_directory_begins_from_a_runs_journal(begun, base, tmp_path):
    before = (tmp_path / "run" / "journal.jsonl").read_bytes()
    begun.run.dir, begun.resume.source = str(tmp_path / "branch"), str(tmp_path / "run")
    run = open_run_directory(begun, base)
    assert run.resume.iteration == 2 and run.resume.rewards
    run.journal.append(record(2))
    run.close()
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == before
    assert len(read(tmp_path / "branch" / "journal.jsonl").records) == 3
    begun.run.dir, begun.resume.source = str(tmp_path / "third"), str(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"resume=.*nothing: neither"):
        open_run_directory(begun, base)


@pytest.mark.parametrize("parents", ["", "a/b"])
def test_a_refused_start_leaves_nothing(config, base, tmp_path, parents):
    config.run.dir = str(tmp_path / parents / "run")
    before = sorted(tmp_path.rglob("*"))
    open_without_recording(config, base).abandon()  # another rank cannot start
    assert sorted(tmp_path.rglob("*")) == before
    config.resume.source = str(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="neither"):
        open_without_recording(config, base)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_refused_start_leaves_a_run_as_it_was(begun, base, tmp_path):
    def contents():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = contents()
    begun.es.alpha = 0.5
    with pytest.raises(ConfigError, match=r"es\.alpha=0\.5: the run in"):
        open_without_recording(begun, base)
    assert contents() == before
    begun.es.alpha = Config().es.alpha
    run = open_without_recording(begun, base)
    assert not any("lock" in note for note in run.notes)
    run.abandon()
    assert contents() == before


def hold(directory, ready, done):
    lock = Lock(directory)
    ready.set()
    done.wait()
    del lock


def test_a_lock_is_its_processs_while_it_lives(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path, ready, done))
    process.start()
    try:
        assert ready.wait(60)
        holder = f"process {process.pid} on {os.uname().nodename}"
        with pytest.raises(ConfigError, match=f"in use by {holder}"):
            Lock(tmp_path)
    finally:
        process.kill()
        process.join()
    lock = Lock(tmp_path)
    assert f"process {process.pid}" in lock.note
    lock.release()
    assert not Lock(tmp_path).note


@pytest.mark.parametrize("place", ["", "snapshots/iteration_2"])
def test_the_command_that_began_from_another_run_goes_on(begun, base, tmp_path, place):
    other = tmp_path / "run"
    begun.run.dir, begun.resume.source = str(tmp_path / "branch"), str(other)
    begun.es.sigma, begun.resume.allow_changes = 0.5, ["es.sigma"]
    for iteration in range(2, 4):
        run = open_run_directory(begun, base)
        assert run.resume.iteration == iteration
        run.journal.append(record(iteration))
        run.close()
        # A snapshot that the run began from may be gone by now, and the other run has gone on.
        begun.resume.source = str(other / place)
    begun.run.dir, begun.resume.source, begun.es.sigma = str(other), "auto", 0.001
    run = open_run_directory(begun, base)
    run.journal.append(record(2))
    run.close()
    begun.run.dir, begun.resume.source, begun.es.sigma = str(tmp_path / "branch"), str(other), 0.5
    assert "4 iterations so far" in describe_run_directory(begun, {})
    assert open_run_directory(begun, base).resume.iteration == 4


def test_a_copy_of_a_journal_that_a_kill_left_goes_on(begun, base, tmp_path):
    (tmp_path / "branch").mkdir()
    shutil.copy(tmp_path / "run" / "journal.jsonl", tmp_path / "branch")
    begun.run.dir, begun.resume.source = str(tmp_path / "branch"), str(tmp_path / "run")
    assert open_run_directory(begun, base).resume.iteration == 2


def test_an_unrelated_run_is_not_taken_for_one_that_began_from_another(begun, base, tmp_path):
    begun.run.dir = str(tmp_path / "unrelated")
    run = open_run_directory(begun, base, date="2026-01-01")
    run.journal.append(record(0))
    run.close()
    begun.resume.source = str(tmp_path / "run")
    with pytest.raises(ConfigError, match="not one that began from"):
        open_run_directory(begun, base)


def test_a_run_with_a_schedule_can_be_extended_on_purpose(config, base):
    config.es.sigma_final = 0.0001
    run = open_run_directory(config, base)
    run.journal.append(record(0))
    run.close()
    config.es.iterations = 9
    with pytest.raises(ConfigError, match=r"es\.iterations=9: the run in .* has 5; .*list es\.ite"):
        open_run_directory(config, base)
    config.resume.allow_changes = ["es.iterations"]
    open_run_directory(config, base).close()
    config.resume.allow_changes = []
    assert open_run_directory(config, base).resume.iteration == 1


def test_a_schedule_can_be_added_on_purpose(begun, base):
    begun.es.sigma_final, begun.resume.allow_changes = 0.0001, ["es.sigma_final"]
    open_run_directory(begun, base).close()
    begun.resume.allow_changes, begun.es.iterations = [], 9
    with pytest.raises(ConfigError, match=r"es\.iterations=9: the run in .* has 5"):
        open_run_directory(begun, base)


def test_a_start_that_another_rank_refuses_changes_nothing(begun, base):
    directory = Path(begun.run.dir)
    before = {name: (directory / name).read_bytes() for name in ("journal.jsonl", "config.yaml")}
    begun.es.sigma, begun.resume.allow_changes = 0.5, ["es.sigma"]
    run = open_without_recording(begun, base)
    run.close()
    assert {name: (directory / name).read_bytes() for name in before} == before
    assert "taking over" not in "".join(open_without_recording(begun, base).notes)
