"""Fine-tune a language model with evolution strategies.

    deepspeed --num_gpus 2 launchers/train.py CONFIG.yaml [key=value ...]

The launcher's ranks become replicas × shard × tensor ranks; without a launcher it is a world of one.
Started again with the same run.dir, it goes on where it was.
Exit codes: 0 done or stopped by SIGINT or SIGTERM, 75 stopped by SIGUSR1 (start it again), 2 the user's mistake,
1 anything else.
"""

from dataclasses import dataclass
from pathlib import Path

from shardes import environment

environment.prepare()
with environment.quiet():
    import deepspeed  # noqa: F401

import torch.distributed as dist  # noqa: E402

from shardes import launch  # noqa: E402
from shardes.center import open_center  # noqa: E402
from shardes.config import RunError  # noqa: E402
from shardes.generation import encode  # noqa: E402
from shardes.launch import Parser, Plan  # noqa: E402
from shardes.resume import Opened, Start, open_run  # noqa: E402
from shardes.stop import Stopped, StopWatch  # noqa: E402
from shardes.trainer import Trainer  # noqa: E402
from shardes.weights import WeightFiles  # noqa: E402
from shardes.world import Job  # noqa: E402


@dataclass
class Training(Plan):
    """`encoded` holds each split's prompts as token ids; `opened` is there on rank 0."""

    encoded: dict[str, list[list[int]]]
    opened: Opened | None


def parser() -> Parser:
    return Parser("deepspeed [--num_gpus N] launchers/train.py CONFIG.yaml [key=value ...]", __doc__.splitlines()[0])


def prepare(argv: list[str], job: Job) -> Training:
    _, config = parser().read(argv)
    plan = launch.check(config, job)
    encoded = {split: encode(plan.tokenizer, plan.task.prompts(split)) for split in ("train", "test")}
    opened = open_run(config, plan.files) if job.rank == 0 else None
    return Training(**vars(plan), encoded=encoded, opened=opened)


def work(job: Job, plan: Training, watch: StopWatch) -> None:
    """Build the replica and train."""
    if plan.opened:
        plan.opened.start.send(job.store)
    start = Start.receive(job.store)
    world, engine, responder = launch.build_replica(job, plan)
    source = plan.files
    if start.source:
        if not Path(start.source).is_dir():
            raise RunError(f"rank {job.rank}: no {start.source} here; run.dir must be where all hosts see it")
        source = WeightFiles(Path(start.source))
        source.stack(plan.module)
    center = open_center(plan.config.es.restore, engine.shards, world, source, plan.files, plan.config.es.evolve)
    journal = plan.opened.journal if plan.opened else None
    trainer = Trainer(plan.config, world, center, plan.files, plan.task, responder, plan.encoded, watch, start, journal)
    try:
        for note in plan.opened.notes if plan.opened else ():
            trainer.say(note)
        trainer.run()
        dist.barrier()
    except Stopped as stopped:
        trainer.say(str(stopped))
        raise
    finally:
        trainer.close()
        if plan.opened:
            plan.opened.close()


def main(argv: list[str]) -> int:
    return launch.launch(argv, parser(), prepare, work)


if __name__ == "__main__":
    environment.run(main)
