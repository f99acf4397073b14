"""Fine-tune a language model with evolution strategies.

    shardes train CONFIG.yaml --gpus 2 [key=value ...]
    deepspeed --num_gpus 2 launchers/train.py CONFIG.yaml [key=value ...]

The launcher's ranks form replicas × shard × tensor ranks; without a launcher there is one rank.
Started again with the same run.dir, it goes on where the run stopped. Exit codes: 0 done or stopped
by SIGINT or SIGTERM, 75 stopped by SIGUSR1 (start it again), 2 a mistake of the user, 1 any other
failure.
"""

from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from shardes.distributed import environment

with environment.quiet():
    import deepspeed  # noqa: F401

import torch
import torch.distributed as dist

from shardes import launch, lifecycle
from shardes.commands.arguments import LaunchParser, reports_errors
from shardes.config import loading as settings
from shardes.config.schema import Config
from shardes.distributed.signals import ShutdownWatcher
from shardes.distributed.world import Job
from shardes.errors import ConfigError, RunError, Stopped, one_line, unusable_files
from shardes.es.population import held_out_numbers, select
from shardes.es.side_by_side import members_together
from shardes.launch import PreparedRun
from shardes.planning.layouts import Layout
from shardes.planning.memory import center_on_device, rank_memory
from shardes.planning.shapes import read_shapes
from shardes.planning.workload import Workload
from shardes.replicas.joining import JoinedRun, connect_to_run, join_run
from shardes.reporting.attempts import record_failure
from shardes.reporting.reporter import OnMetrics, ignore
from shardes.roles import ClientJob, PreparedTraining, PrimaryJob
from shardes.storage.resume import (
    RunDirectory,
    describe_run_directory,
    open_run_directory,
    recorded_date,
)
from shardes.storage.sources import run_sources
from shardes.tasks import Task
from shardes.words import counted

EXAMPLES = """examples:
  shardes train configs/quickstart.yaml --gpus 2            two ranks on this host (or --nproc 2)
  shardes train configs/quickstart.yaml --gpus 2 sharding.tensor=2 es.seed=1
  shardes train configs/quickstart.yaml --gpus 8 --dry-run  check, print the settings, start nothing
  deepspeed --num_gpus 2 launchers/train.py configs/quickstart.yaml
  torchrun --nproc_per_node 2 launchers/train.py configs/quickstart.yaml
"""


def parser() -> LaunchParser:
    return LaunchParser("train", "[--gpus N] [--dry-run]", __doc__.splitlines()[0], EXAMPLES)


def prepare(argv: list[str], job: Job) -> PreparedTraining:
    """The settings of the command line, checked; of a rank of `--gpus`, metrics are reported."""
    return prepare_run(parser().read(argv)[1], job, on_metrics=report_metrics)


def report_metrics(metrics: dict[str, float]) -> None:
    environment.report(metrics=metrics)


def prepare_run(
    config: Config, job: Job, task: Task | None = None, on_metrics: OnMetrics = ignore
) -> PreparedTraining:
    """Make the cheap checks, and open the run directory.

    Args:
        task: the user's object, in place of the task that the settings name.
        on_metrics: is called, on the primary rank, with the metrics of each iteration.

    Raises:
        ConfigError: the run cannot start.
    """
    joins = config.replicas.join is not None
    connection = connect_to_run(config) if joins and job.rank == 0 else None
    date = launch.shared_date(job, lambda: connection.date if connection else recorded_date(config))
    prepared = launch.check(config, job, task)
    prompts = encode_prompts(prepared, date)
    prepared.sources = run_sources(config.task, prompts, task, config.es.update)
    stateful = prepared.rule is not None and prepared.rule.buffers > 0
    run: RunDirectory | JoinedRun | None = None
    if connection:
        run = join_run(connection, config, prepared.files, prepared.sources, stateful)
    elif job.rank == 0:
        run = open_run_directory(
            config, prepared.files, prepared.sources, date.isoformat(), stateful
        )
    return PreparedTraining(**vars(prepared), prompts=prompts, run=run, on_metrics=on_metrics)


@reports_errors
@unusable_files()
def dry_run(argv: list[str], ranks: int) -> int:
    """Make the checks of a start on `ranks` ranks and print the settings; write nothing."""
    _, config = parser().read(argv)
    prepared = launch.check(config, Job(0, ranks, dist.HashStore()))
    date = datetime.fromisoformat(recorded_date(config) or launch.now())
    prompts = encode_prompts(prepared, date)
    state = describe_run_directory(
        config, run_sources(config.task, prompts, update=config.es.update)
    )
    sharding, generation = config.sharding, config.generation
    shard, tensor = sharding.shard, sharding.tensor
    layout = Layout(prepared.replicas, shard, tensor, sharding.gather, sharding.offload)
    lengths = {split: tuple(map(len, rows)) for split, rows in prompts.items()}
    workload = Workload(
        lengths["train"],
        lengths["test"],
        generation.max_new_tokens,
        generation.batch_tokens,
        members_together(config, lengths["train"], prepared.replicas),
        generation.decode,
    )
    counts = ", ".join(
        f"{len(rows)} {split}, up to {max(rows)} tokens" for split, rows in lengths.items()
    )
    print(f"# run.dir: {Path(config.run.dir).absolute()}, {state}")
    degrees = f"shard {shard} × tensor {tensor}"
    replicas = counted(prepared.replicas, "replica")
    print(f"# layout: {counted(ranks, 'rank')}, {replicas} × {degrees}")
    print(f"# prompts: {counts}")
    if applied := prepared.decoder.applied:
        print(f"# greedy decoding: {applied} (the checkpoint's generation config)")
    print(f"# memory of a rank: {_memory(config, layout, workload)}")
    print(settings.to_yaml(config), end="")
    return 0


def _memory(config: Config, layout: Layout, workload: Workload) -> str:
    """The estimated memory of a rank; of models that the planner does not know, why there is none.

    They may run nevertheless.
    """
    device = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    try:
        shapes, module = read_shapes(config)
        on_device = center_on_device(config, shapes, module.config, device)
        memory = rank_memory(
            shapes, layout, workload, config.es, device, center_on_device=on_device
        )
    except (ConfigError, TypeError, AttributeError, ArithmeticError) as error:
        return f"not estimated ({one_line(error)})"
    on_gpu = f"{sum(memory.gpu.values()) / 1e9:.3g} GB on its GPU, " if device else ""
    return f"about {on_gpu}{sum(memory.host.values()) / 1e9:.3g} GB on its host"


def encode_prompts(prepared: PreparedRun, date: datetime) -> dict[str, list[list[int]]]:
    """The token ids of both splits' prompts; of the held-out ones, those that evaluations ask.

    Raises:
        ConfigError: they cannot be encoded, or are fewer than an iteration is to have.
    """
    prompts = {split: launch.encode_split(prepared, split, date) for split in ("train", "test")}
    size, count = prepared.config.task.prompts_per_iteration, len(prompts["train"])
    if size is not None and size > count:
        raise ConfigError(
            f"task.prompts_per_iteration={size}: the task has {count} training prompts; use at "
            "most so many, or null for all"
        )
    asked = held_out_numbers(prepared.config.eval.prompts, len(prompts["test"]))
    return prompts | {"test": select(prompts["test"], asked)}


def work(job: Job, prepared: PreparedTraining, watcher: ShutdownWatcher) -> None:
    """Put this rank's trainer together, and train."""
    config = prepared.config
    is_client = config.replicas.join is not None
    with ExitStack() as stack:
        trainer = (ClientJob if is_client else PrimaryJob)(job, prepared, watcher, stack).trainer()
        try:
            watcher.expect_polls()
            trainer.train()
        except Stopped as stopped:
            trainer.reporter.say(str(stopped))
            stopped.said = True
            raise
        except Exception as error:
            if is_client and isinstance(error, dist.DistError):
                join = f"replicas.join={config.replicas.join}"
                raise RunError(
                    f"{join}: the primary job is gone or refuses this ({error})"
                ) from error
            if not is_client:  # the run directory belongs to the primary job
                record_failure(Path(config.run.dir), job.rank, error)
            raise
        if is_client:
            trainer.reporter.say(
                f"done: this replica evaluated {counted(trainer.members_evaluated, 'member')}; "
                f"center {trainer.digest}"
            )
        dist.barrier()


def main(argv: list[str]) -> int:
    return lifecycle.launch(argv, parser(), prepare, work)


if __name__ == "__main__":
    environment.run(main)
