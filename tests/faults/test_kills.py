"""Kills at random instants, over variants of a run and with another layout at every restart: what
a user reads afterwards is what the undisturbed run wrote.

`pytest -m "faults and slow" tests/faults/test_kills.py --kills 1000` makes so many.
"""

import random
import time
from functools import partial
from pathlib import Path

import pytest
import yaml

from outcome import TASK, killed_often, outcome, settings
from shardes.storage import journal, snapshots
from shardes.storage.checkpoint import verify

pytestmark = [pytest.mark.faults, pytest.mark.slow]

LAYOUTS = [  # settings, ranks
    ([], 2),
    ([], 1),
    (["sharding.shard=2"], 2),
    (["sharding.shard=2", "sharding.gather=layer"], 2),
    (["sharding.tensor=2"], 2),
    (["engine=fsdp", "sharding.shard=2"], 2),
    (["engine=fsdp", "sharding.tensor=2"], 2),
]
VARIANTS = {
    "paper": [],
    "pairs": ["es.antithetic=true", "es.fitness=centered_rank"],
    "prompts": ["es.standardize_prompts=true", "task.prompts_per_iteration=2"],
    "schedule": ["es.sigma_final=0.01", "es.alpha_final=0.01", "es.schedule=cosine"],
    "decay": ["es.weight_decay=0.01", "es.decay_to=base"],
    "evolve": ["es.evolve=mlp"],
    "low rank": ["es.noise=low_rank", "es.rank=2"],
    "low rank, alone": ["es.noise=low_rank", "es.members_per_batch=1", "es.antithetic=true"],
    "no best": ["checkpoint.best=false", "checkpoint.keep=1"],
    "bfloat16": ["model.dtype=bfloat16"],  # its rounding depends on the layout
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_that_a_user_reads_changes(zygote, model, tmp_path, request, variant):
    (tmp_path / "task.py").write_text(TASK)
    generator = random.Random(variant)

    def start(directory: Path, layout: tuple[list[str], int] | None = None):
        config = directory.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(settings(model, tmp_path, directory)))
        fixed = variant == "bfloat16"
        keys, ranks = layout or (LAYOUTS[0] if fixed else generator.choice(LAYOUTS))
        log = directory.with_suffix(".log")
        return zygote.start(str(config), *VARIANTS[variant], *keys, ranks=ranks, log=log)

    undisturbed = tmp_path / "undisturbed"
    started = time.monotonic()
    finish(partial(start, layout=LAYOUTS[0]), undisturbed)
    expected = outcome(undisturbed)
    kills = -(-request.config.getoption("--kills") // len(VARIANTS))
    for directory in killed_often(start, tmp_path, time.monotonic() - started, kills):
        finish(start, directory)
        assert outcome(directory) == expected
        history = journal.read(directory / "journal.jsonl")
        if variant != "no best":
            assert snapshots.best_iteration(directory) == history.best
        for iteration, path in snapshots.by_iteration(directory).items():
            assert verify(path).digest == history.digest(iteration)


def finish(start, directory: Path) -> None:
    run = start(directory)
    codes = run.wait()
    assert not any(codes), run.text()
