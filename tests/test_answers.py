"""Runs whose members answer side by side: one journal, however the members are grouped."""

import json
from pathlib import Path

import pytest
import yaml

from outcome import TASK
from shardes.answers import OneBatch
from shardes.config.schema import Config, Noise
from shardes.es.population import Iteration
from shardes.storage import journal


@pytest.fixture(scope="module")
def start(zygote, tied_llama, tmp_path_factory):
    """A starter of runs with low-rank noise that returns their directories."""
    folder = tmp_path_factory.mktemp("answers")
    (folder / "task.py").write_text(TASK)

    def run(name: str, *keys: str, ranks: int = 1) -> Path:
        es = dict(noise="low_rank", rank=2, population_size=6, sigma=0.05, alpha=0.05)
        settings = {
            "model": {"path": str(tied_llama), "dtype": "float32"},
            "es": es | dict(iterations=2, antithetic=True),
            "generation": {"max_new_tokens": 12},
            "task": {"path": f"{folder}/task.py:Letters"},
            "checkpoint": {"every": 0},
            "run": {"dir": str(folder / name), "timeout": 60},
        }
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(settings))
        started = zygote.start(str(config), *keys, ranks=ranks, log=folder / f"{name}.log")
        assert started.wait(120) == [0] * ranks, started.text()
        return folder / name

    return run


def test_the_journal_does_not_depend_on_how_members_are_grouped(start):
    alone = journal.read(start("alone", "es.members_per_batch=1") / "journal.jsonl")
    for name, ranks, *keys in (
        ("all", 1),
        ("four", 1, "es.members_per_batch=4"),
        ("replicas", 2),
        ("gathered", 2, "sharding.shard=2", "sharding.gather=layer"),
        ("split", 2, "engine=fsdp", "sharding.tensor=2", "generation.batch_tokens=150"),
    ):
        directory = start(name, *keys, ranks=ranks)
        history = journal.read(directory / "journal.jsonl")
        assert history.records == alone.records, name
        assert history.finish == alone.finish, name
        rows = (directory / "metrics.jsonl").read_text().splitlines()
        assert all(json.loads(row)["seconds_restore"] == 0 for row in rows), name


@pytest.mark.parametrize(
    "members, prompts, tokens, shard, replicas, expected",
    [
        (10, 2, 65536, 1, 1, 10),  # all
        (10, 2, 65536, 1, 4, 2),  # half a replica's share
        (10, 2, 100, 1, 1, 2),  # 5 rows of 20 tokens
        (10, 2, 100, 4, 1, 10),  # on each of four ranks
        (10, 50, 100, 1, 1, 1),  # never less
    ],
)
def test_as_many_members_as_a_batch_holds(members, prompts, tokens, shard, replicas, expected):
    config = Config()
    config.es.noise = Noise.low_rank
    config.generation.batch_tokens, config.generation.max_new_tokens = tokens, 12
    config.sharding.shard, config.es.population_size = shard, members

    class World:
        pass

    world = World()
    world.replicas, world.is_client = replicas, False
    answers = OneBatch(config, world, None, None, None, None)
    iteration = Iteration.derive(config, 0, "", [[1] * 8] * prompts)
    assert answers.group_size(iteration) == expected
    config.es.members_per_batch = 7
    assert answers.group_size(iteration) == 7
