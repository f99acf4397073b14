"""A job from its start to its end: as a rank of a launcher's, or alone in a process of others."""

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import TypeVar

import torch.distributed as dist

from shardes.config import loading
from shardes.distributed.environment import complain, exit_process, report
from shardes.distributed.lost_ranks import LostRank, lost_ranks_named
from shardes.distributed.rank_watch import RankWatch
from shardes.distributed.signals import ShutdownWatcher
from shardes.distributed.world import Job, agree, join_job, leave_job
from shardes.engines import release
from shardes.errors import ConfigError, RunError, Stopped, unusable_files
from shardes.launch import PreparedRun, now
from shardes.reporting.progress import slow_step

CHECKING = "checking the settings, the prompts and the SHA-256s of the model's files"
RENDEZVOUS = 300.0  # seconds that the launcher's processes wait for each other
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

_occupied = Lock()  # by a run in this process

Prepared = TypeVar("Prepared", bound=PreparedRun)


def launch(
    argv: list[str],
    parser: argparse.ArgumentParser,
    prepare: Callable[[list[str], Job], Prepared],
    work: Callable[[Job, Prepared, ShutdownWatcher], None],
) -> int:
    """Run this rank from its start to its end; returns the exit code.

    Args:
        prepare: makes the cheap checks.
        work: is called once no rank has reported a mistake and all have the same settings.
    """
    if {"-h", "--help"} & set(argv):
        if os.environ.get("RANK", "0") == "0":
            parser.print_help()
        return 0
    try:
        with slow_step("waiting for all ranks to start", os.environ.get("RANK", "0") == "0"):
            job = join_job(RENDEZVOUS)
    except (ConfigError, RunError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # all ranks of a host have the same error
            complain(str(error), _exit_code(error))
        return _exit_code(error)
    prepared, problem, code = None, None, 2
    try:
        with unusable_files(), slow_step(CHECKING, job.rank == 0):
            prepared = prepare(argv, job)
    except (ConfigError, RunError) as error:
        problem, code = str(error), _exit_code(error)
        if job.rank == 0:
            job.keys.set_date(now())  # for ranks that wait for it and have no problem
    settings = loading.to_yaml(prepared.config) if prepared else ""
    sources = prepared.sources if prepared else {}
    with slow_step("waiting for the other ranks' checks", job.rank == 0):
        agreed = agree(job, problem, settings, partial(complain, code=code), sources)
    if not agreed or prepared is None:
        if prepared:
            prepared.abandon()
        return code
    return _work(job, prepared, work)


def _work(
    job: Job, prepared: Prepared, work: Callable[[Job, Prepared, ShutdownWatcher], None]
) -> int:
    """Do the work and leave the job; returns the exit code."""
    code, timeout = 1, prepared.config.run.timeout
    watcher = ShutdownWatcher(job)
    sharding = prepared.config.sharding
    size = sharding.shard * sharding.tensor
    first = job.rank // size * size
    ranks = range(first, first + size)
    try:
        with lost_ranks_named(job, ranks, timeout), RankWatch(job, ranks, timeout):
            work(job, prepared, watcher)
        code = 0
    except Stopped as stopped:
        code = stopped.code
        if job.rank == 0:
            if not stopped.said:
                print(stopped, flush=True)
            report(stopped=code)
        watcher.end(code)
    except LostRank as error:
        if error.reports:
            complain(str(error))
        if not error.store_answers:
            exit_process(1)  # the others cannot be told
        watcher.end(1)
    except (ConfigError, RunError) as error:
        code = _exit_code(error)
        if not dist.is_initialized() or dist.get_rank() == 0:  # a replica's ranks have the same one
            complain(str(error), code)
        watcher.end(code)
    except BaseException:
        watcher.end(1)
        raise
    finally:
        watcher.close()
        missing = leave_job(job, timeout if code == 0 else 10)
    if missing and code == 0:
        complain(f"the run is done, but after {timeout:.0f} s ranks {missing} have not ended")
        return 1
    return code


def _exit_code(error: ConfigError | RunError) -> int:
    return 2 if isinstance(error, ConfigError) else 1


def run_alone(
    prepare: Callable[[Job], Prepared], work: Callable[[Job, Prepared, ShutdownWatcher], None]
) -> None:
    """Run a job of one rank in this process, which goes on afterwards.

    Args:
        prepare, work: as in `launch`.

    Raises:
        ConfigError, RunError: the job failed.
        Stopped: a signal asked for a stop.
        KeyboardInterrupt: as Stopped, before anything began.
    """
    with _alone() as job:
        with unusable_files():
            prepared = prepare(job)
        watcher = ShutdownWatcher(job, owns_process=False)
        try:
            work(job, prepared, watcher)
        finally:
            watcher.close()
        if watcher.asked is not None:  # too late for the work to notice
            raise Stopped(watcher.asked)


@contextmanager
def _alone() -> Iterator[Job]:
    """A context in which this process is a job of one rank.

    It leaves neither a process group nor a launcher's variables.
    """
    if not _occupied.acquire(blocking=False):
        raise ConfigError("another run takes place in this process: wait for it, or start ranks")
    try:
        with _as_rank() as job:
            yield job
    finally:
        _occupied.release()


@contextmanager
def _as_rank() -> Iterator[Job]:
    if "RANK" in os.environ:
        raise ConfigError(
            "RANK is set: a launcher started this process as a rank; from Python, start without "
            "one, or use launchers/train.py and launchers/evaluate.py"
        )
    if dist.is_initialized():
        raise ConfigError(
            "torch.distributed is initialized in this process, and a run needs a process group of "
            "its own: call torch.distributed.destroy_process_group() first, or start ranks (gpus=1)"
        )
    excepthook = sys.excepthook  # torch's names the rank
    try:
        yield join_job(RENDEZVOUS)
    finally:
        release()
        if dist.is_initialized():
            dist.destroy_process_group()
        for name in RANK_VARIABLES:
            os.environ.pop(name, None)
        sys.excepthook = excepthook
        gc.collect()  # the model is in cycles; its memory is for the next run
