"""The loop, step by step, on one rank that no launcher started."""

import json
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml

from shardes.answers import InPlace
from shardes.commands import train
from shardes.distributed.signals import ShutdownWatcher
from shardes.distributed.world import join_job, leave_job
from shardes.errors import ConfigError
from shardes.es.fitness import coefficients, fitness
from shardes.es.population import Member, member_seeds
from shardes.es.update import Update
from shardes.replicas import protocol
from shardes.roles import PrimaryJob
from shardes.storage.journal import read

TASK = """
import time

class Letters:
    def prompts(self, split):
        return ["abc", "a longer prompt", "x"] if split == "train" else ["hello"]
    def score(self, split, responses, which=None):
        return [float(sum(map(ord, text)) % 97) for text in responses]

class Slow:  # in worker processes
    def prompts(self, split):
        return ["abc"]
    def reward(self, split, number, response):
        open("SCORED", "a").write(f"{time.monotonic()} ")
        time.sleep(0.4)
        return float(sum(map(ord, response)) % 97)

class Named:  # the reward of Letters, and a part that has a name
    prompts = Letters.prompts
    async def reward(self, split, number, response):
        return {"reward": sum(map(ord, response)) % 97, "length": len(response)}
"""
SETTINGS = [
    "model.dtype=float32",
    "es.population_size=4",
    "es.sigma=0.05",
    "es.alpha=0.05",
    "es.iterations=3",
    "generation.max_new_tokens=4",
    "task.prompts_per_iteration=2",
    "eval.every=2",
    "checkpoint.every=2",
]


SIDE_BY_SIDE = [
    "es.noise=low_rank",
    "es.members_per_batch=6",
    "es.population_size=6",
    "generation.max_new_tokens=8",
    "generation.batch_tokens=24",  # two rows
    "task.prompts_per_iteration=null",
    "task.workers=1",
]


@pytest.fixture
def trainer(request, tmp_path, tied_llama, monkeypatch):
    """A trainer of one rank; a test's parameters are a class of TASK and further keys."""
    task, *keys = getattr(request, "param", ["Letters"])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that what the job sets is undone
        monkeypatch.delenv(name)
    (tmp_path / "task.py").write_text(TASK.replace("SCORED", str(tmp_path / "scored")))
    config = tmp_path / "config.yaml"
    settings = {
        "model": {"path": str(tied_llama)},
        "task": {"path": f"{tmp_path}/task.py:{task}"},
        "run": {"dir": str(tmp_path / "run")},
    }
    config.write_text(yaml.safe_dump(settings))
    job = join_job(20)
    prepared = train.prepare([str(config), *SETTINGS, *keys], job)
    watcher = ShutdownWatcher(job)
    try:
        with ExitStack() as stack:
            yield PrimaryJob(job, prepared, watcher, stack).trainer()
    finally:
        watcher.close()
        leave_job(job, 1)
        dist.destroy_process_group()


def live_weights(trainer) -> torch.Tensor:
    return torch.cat([shard.values for shard in trainer.center._shards])


def test_an_iteration_is_algorithm_2(trainer):
    trainer.replay_journal()
    iteration = trainer.iteration(0)
    assert iteration.seeds == member_seeds(0, 0, 4)
    assert iteration.members == [Member(seed, 0.05) for seed in iteration.seeds]
    assert len(iteration.prompt_numbers) == len(iteration.prompts) == 2
    base = trainer.digest

    trainer.before_iteration(iteration)
    assert trainer.center.digest() == base
    results = trainer.evaluate_members(iteration)
    assert trainer.center.digest() == base  # θ is restored after every member
    assert len(results.members) == trainer.members_evaluated == 4
    trainer.evaluator.complete()
    record = trainer.coordinator.commit(iteration, results)
    journal = read(Path(trainer.config.run.dir) / "journal.jsonl")
    assert journal.records == [record]  # on disk before θ moves

    rewards = [member.reward for member in results.members]
    es = trainer.config.es
    weights = coefficients(es, 0.05, fitness(es, [[reward] for reward in rewards]))
    assert record.update == Update(iteration.seeds, weights)
    trainer.center.update(record.update)
    assert trainer.center.digest() != base


@pytest.mark.parametrize("trainer", [["Slow", *SIDE_BY_SIDE]], indirect=True)
def test_finished_members_are_scored_while_others_decode(trainer, tmp_path):
    trainer.replay_journal()
    iteration, steps = trainer.iteration(0), []

    def slow_step():
        steps.append(time.monotonic())
        time.sleep(0.05)

    alone = replace(iteration, index=1)
    answers, trainer.answers = trainer.answers, InPlace(trainer.center, trainer.sampler)
    expected = trainer.evaluate_members(alone)  # starts the worker, too
    trainer.answers = answers
    (tmp_path / "scored").unlink()
    trainer.coordinator._poll = slow_step
    started = time.monotonic()
    results = trainer.evaluate_members(iteration)
    seconds = time.monotonic() - started
    assert [member.reward for member in results.members] == [m.reward for m in expected.members]
    scored = list(map(float, (tmp_path / "scored").read_text().split()))
    assert len(scored) == 6 and sum(when < max(steps) for when in scored) >= 2
    assert seconds < max(steps) - started + 6 * 0.4  # one after the other


@pytest.mark.parametrize(
    "trainer, expected",
    [
        (["Named"], "answer start answer start wait answer start wait answer start wait wait"),
        (["Letters"], "answer start wait answer start wait answer start wait answer start wait"),
    ],
    indirect=["trainer"],
)
def test_workers_score_a_member_while_the_next_one_answers(trainer, expected, monkeypatch):
    """A class's `score` is called at once: it must not run beside the decoding."""
    trainer.replay_journal()
    events = []
    generate, start = trainer.sampler.generate, trainer.scorer.start

    def answering(*arguments, **keys):
        events.append("answer")
        return generate(*arguments, **keys)

    def starting(*arguments):
        events.append("start")
        wait = start(*arguments)
        return lambda: events.append("wait") or wait()

    monkeypatch.setattr(trainer.sampler, "generate", answering)
    monkeypatch.setattr(trainer.scorer, "start", starting)
    assert len(trainer.evaluate_members(trainer.iteration(0)).members) == 4
    assert " ".join(events) == expected


@pytest.mark.parametrize("trainer", [["Named"]], indirect=True)
def test_named_parts_of_rewards_are_logged_and_decide_nothing(trainer):
    directory = Path(trainer.config.run.dir)
    trainer.train()
    lines = [json.loads(line) for line in (directory / "journal.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for record, row in zip(read(directory / "journal.jsonl").records, rows, strict=True):
        members = [
            line["parts"]["length"]
            for line in lines
            if line["kind"] == "reward" and line["iteration"] == record.iteration
        ]
        assert len(members) == 4 and record.parts == {"length": pytest.approx(np.mean(members))}
        assert row["reward/length"] == record.parts["length"] > 0
        weights = fitness(trainer.config.es, [[reward] for reward in record.rewards])
        assert record.coefficients == coefficients(trainer.config.es, 0.05, weights)
        assert len({*record.rewards}) > 1


def test_the_loop_trains_and_finishes(trainer):
    directory = Path(trainer.config.run.dir)
    trainer.train()
    history = read(directory / "journal.jsonl")
    assert len(history.records) == 3 and history.finish.digest == trainer.digest
    assert torch.equal(
        live_weights(trainer),
        torch.cat([trainer.center.values(shard) for shard in trainer.center._shards]),
    )
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    assert ["held_out_reward" in row for row in rows] == [True, False, True]
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["digest"] == trainer.digest
    assert {path.name for path in (directory / "snapshots").iterdir()} == {
        "iteration_2",
        "iteration_3",
    }


def test_the_same_iteration_is_derived_again(trainer):
    trainer.digest = "digest"
    assert trainer.iteration(2) == trainer.iteration(2)
    assert trainer.iteration(2).seeds != trainer.iteration(1).seeds
    assert trainer.iteration(2).prompts != trainer.iteration(1).prompts


def test_logits_that_are_not_finite_name_the_model_that_gave_them(trainer):
    trainer.replay_journal()
    iteration = trainer.iteration(0)
    norm = next(s for s in trainer.center._shards if s.name == "model.norm.weight")
    trainer.center.values(norm).fill_(3e38)
    reason = r"gave logits that are NaN or infinite, in model\.dtype=float32; .*task\.on_error"
    member = rf"prompt \d of train: member 0 of iteration 0 \(seed {iteration.seeds[0]}\)"
    with pytest.raises(ConfigError, match=f"{member} {reason}"):
        trainer.evaluate_members(iteration)
    with pytest.raises(ConfigError, match=f"train: the center before iteration 0 {reason}"):
        trainer.evaluator.start(iteration)
    trainer.config.task.on_error = "-2"
    trainer.evaluator.start(trainer.iteration(1))
    metrics = trainer.evaluator.finish(1)
    assert metrics["center_reward"] == metrics["held_out_reward"] == -2
    assert metrics["evaluation_scoring_failures"] == 3


def test_the_store_of_a_long_run_does_not_grow(trainer, monkeypatch):
    """With a snapshot and an evaluation at every other iteration."""
    monkeypatch.setattr(protocol, "KEPT_RECORDS", 4)
    trainer.config.es.iterations = 24
    store, before_iteration, counts = trainer.world.job.store, trainer.before_iteration, []

    def counted(iteration):
        counts.append(store.num_keys())
        before_iteration(iteration)

    trainer.before_iteration = counted
    trainer.train()
    # Snapshots are written meanwhile: of two of them there can be keys.
    assert max(counts[16:]) <= max(counts[6:12]) + 4, counts
