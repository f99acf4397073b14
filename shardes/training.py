"""A training job: the cheap checks before it, and the work of a rank."""

from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

import torch.distributed as dist

from shardes import launch
from shardes.config.schema import Config
from shardes.distributed.signals import ShutdownWatcher
from shardes.distributed.world import Job
from shardes.errors import RunError, Stopped
from shardes.es.population import check_prompts_per_iteration, held_out_numbers, select
from shardes.launch import PreparedRun
from shardes.replicas.joining import JoinedRun, connect_to_run, join_run
from shardes.reporting.attempts import record_failure
from shardes.reporting.reporter import OnMetrics, ignore
from shardes.roles import ClientJob, PreparedTraining, PrimaryJob
from shardes.storage.resume import RunDirectory, open_run_directory, recorded_date
from shardes.storage.sources import run_sources
from shardes.tasks import Task
from shardes.words import counted


def prepare(
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


def encode_prompts(prepared: PreparedRun, date: datetime) -> dict[str, list[list[int]]]:
    """The token ids of both splits' prompts; of the held-out ones, those that evaluations ask.

    Raises:
        ConfigError: they cannot be encoded, or are fewer than an iteration is to have.
    """
    prompts = {split: launch.encode_split(prepared, split, date) for split in ("train", "test")}
    check_prompts_per_iteration(prepared.config, len(prompts["train"]))
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
