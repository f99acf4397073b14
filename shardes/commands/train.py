"""Fine-tune a language model with evolution strategies.

    shardes train CONFIG.yaml --gpus 2 [key=value ...]
    deepspeed --num_gpus 2 launchers/train.py CONFIG.yaml [key=value ...]

The launcher's ranks become replicas × shard × tensor ranks; without a launcher it is a world of one.
Started again with the same run.dir, it goes on where it was.
Exit codes: 0 done or stopped by SIGINT or SIGTERM, 75 stopped by SIGUSR1 (start it again), 2 the user's mistake,
1 anything else.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from shardes import environment

environment.prepare()
with environment.quiet():
    import deepspeed  # noqa: F401

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from shardes import launch, settings  # noqa: E402
from shardes.center import open_center  # noqa: E402
from shardes.config import ConfigError, RunError  # noqa: E402
from shardes.generation import encode  # noqa: E402
from shardes.joining import Joined, join_run, join_world, open_door  # noqa: E402
from shardes.launch import Parser, Plan  # noqa: E402
from shardes.meeting import Meeting  # noqa: E402
from shardes.plan import Layout, Work, memory, read_model  # noqa: E402
from shardes.resume import Opened, Start, open_run, outlook  # noqa: E402
from shardes.stop import StopWatch  # noqa: E402
from shardes.trainer import Trainer  # noqa: E402
from shardes.weights import WeightFiles  # noqa: E402
from shardes.world import Job, connect_anew  # noqa: E402

EXAMPLES = """examples:
  shardes train configs/quickstart.yaml --gpus 2                   two ranks on this host (--nproc is the same)
  shardes train configs/quickstart.yaml --gpus 2 sharding.tensor=2 es.seed=1
  shardes train configs/quickstart.yaml --gpus 8 --dry-run         check, print the settings, start nothing
  deepspeed --num_gpus 2 launchers/train.py configs/quickstart.yaml
  torchrun --nproc_per_node 2 launchers/train.py configs/quickstart.yaml
"""


@dataclass
class Training(Plan):
    """`encoded` holds each split's prompts as token ids; `place` is this launch's in the run, on rank 0."""

    encoded: dict[str, list[list[int]]]
    place: Opened | Joined | None


def parser() -> Parser:
    return Parser("train", "[--gpus N] [--dry-run]", __doc__.splitlines()[0], EXAMPLES)


def prepare(argv: list[str], job: Job) -> Training:
    _, config = parser().read(argv)
    plan = launch.check(config, job)
    encoded = encoded_prompts(plan)
    take = open_run if config.replicas.join is None else join_run
    return Training(**vars(plan), encoded=encoded, place=take(config, plan.files) if job.rank == 0 else None)


def dry_run(argv: list[str], ranks: int) -> int:
    """Make the checks that a start on so many ranks makes, and print, as YAML, what it would run; write nothing."""
    try:
        _, config = parser().read(argv)
        plan = launch.check(config, Job(0, ranks, dist.HashStore()))
        lengths = {split: list(map(len, found)) for split, found in encoded_prompts(plan).items()}
        state = outlook(config)
    except ConfigError as error:
        launch.complain(str(error))
        return 2
    s, generation = config.sharding, config.generation
    layout = Layout(plan.replicas, s.shard, s.tensor, s.gather, s.offload)
    train, test = tuple(lengths["train"]), tuple(lengths["test"])
    asked = Work(train, test, generation.max_new_tokens, generation.batch_tokens)
    device = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    need = memory(read_model(config)[0], layout, asked, config.es.restore, device)
    on_device = f"{sum(need.gpu.values()) / 1e9:.3g} GB on its GPU, " if device else ""
    prompts = ", ".join(f"{len(found)} {split}, up to {max(found)} tokens" for split, found in lengths.items())
    print(f"# run.dir: {Path(config.run.dir).absolute()}, {state}")
    print(f"# layout: {ranks} ranks, {plan.replicas} replicas × shard {s.shard} × tensor {s.tensor}")
    print(f"# prompts: {prompts}")
    print(f"# memory of a rank: about {on_device}{sum(need.host.values()) / 1e9:.3g} GB on its host")
    print(settings.to_yaml(config), end="")
    return 0


def encoded_prompts(plan: Plan) -> dict[str, list[list[int]]]:
    """The token ids of both splits' prompts."""
    return {split: encode(plan.tokenizer, plan.task.prompts(split)) for split in ("train", "test")}


def work(job: Job, plan: Training, watch: StopWatch) -> None:
    """Build the replica and train."""
    config, place = plan.config, plan.place
    if place:
        place.start.send(job.store)
    start = Start.receive(job.store)
    world, engine, responder = launch.build_replica(job, plan)
    beats = connect_anew(world.near) if world.leads else None
    if config.replicas.join is not None:
        beats = join_world(world, place if isinstance(place, Joined) else None)
    source = plan.files
    if start.source:
        if not Path(start.source).is_dir():
            raise RunError(f"rank {job.rank}: no {start.source} here; run.dir must be where all hosts see it")
        source = WeightFiles(Path(start.source))
        source.stack(plan.module)
    center = open_center(config.es.restore, engine.shards, world, source, plan.files, config.es.evolve)
    journal = place.journal if isinstance(place, Opened) else None
    meeting = Meeting(world, beats, config.replicas.timeout, config.run.timeout, watch.stop)
    trainer = Trainer(
        config, world, center, plan.files, plan.task, responder, plan.encoded, watch, meeting, start, journal
    )
    try:
        with ExitStack() as stack:
            notes = list(place.notes) if place else []
            if isinstance(place, Opened):
                stack.callback(place.close)
                if config.replicas.port is not None:
                    address = stack.enter_context(open_door(config, plan.files, world, place.records))
                    notes.append(f"replicas can join this run with replicas.join={address}")
            stack.callback(trainer.close)
            stack.enter_context(meeting)
            for note in notes:
                trainer.say(note)
            trainer.run()
            dist.barrier()
    except dist.DistError as error:
        if world.joined:
            raise RunError(f"replicas.join={config.replicas.join}: the run's home is gone ({error})") from error
        raise


def main(argv: list[str]) -> int:
    return launch.launch(argv, parser(), prepare, work)


if __name__ == "__main__":
    environment.run(main)
