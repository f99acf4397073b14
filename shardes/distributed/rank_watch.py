"""Ends a process whose replica has lost a rank, wherever its main thread waits.

A collective of gloo or NCCL fails after a time limit; DeepSpeed's all-reduces through shared memory
wait for ever. So a thread of each rank gives signs of life in the job's store. A process that is
stopped gives none; one that is busy does, in Python and in C code that releases the interpreter's
lock. The leader of a replica watches its other ranks, and they watch the leader, so that the store
has few requests.
"""

import threading
import time
from contextlib import suppress
from typing import NoReturn

import torch.distributed as dist

from shardes.distributed.environment import complain, exit_process
from shardes.distributed.job_store import JobStore, RendezvousStore
from shardes.distributed.lost_ranks import PATIENCE, STORE_LOST
from shardes.distributed.store import clone_store
from shardes.distributed.world import Job

SIGNS = 12  # of life, per `run.timeout`
LONGEST = 5.0  # seconds between two signs of life
LEFT = 1 << 40  # signs of life of a rank that has done its work: no other has so many
TELL = 1.0  # seconds in which the other ranks learn that the job has ended


class Silence:
    """For how long a counter has stood still.

    The time between two looks counts for at most `longest` seconds: this process may have been
    stopped itself.
    """

    def __init__(self, longest: float):
        self.seconds, self._longest = 0.0, longest
        self._count, self._looked = -1, time.monotonic()

    def look(self, count: int) -> None:
        now = time.monotonic()
        self.seconds += min(now - self._looked, self._longest)
        if count != self._count or count >= LEFT:
            self.seconds = 0.0
        self._count, self._looked = count, now


class RankWatch:
    """Ends this process if another rank of its replica, or the job's store, is silent; a context.

    Args:
        ranks: the job's ranks that form this rank's replica.
        timeout: seconds without a sign of life after which a rank is missing.
    """

    def __init__(self, job: Job, ranks: range, timeout: float):
        self._job, self._timeout = job, timeout
        leader = ranks[0]
        self._watched = list(ranks[1:]) if job.rank == leader else [leader]
        self._first = job.rank == leader or job.rank == leader + 1  # of those that watch the same
        self._interval = min(timeout / SIGNS, LONGEST)
        self._names = {rank: f"rank {rank}" for rank in self._watched}
        self._counts = dict.fromkeys(self._watched, 0)  # the ranks' signs of life
        self._rounds = 0  # of requests that the store has answered
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._sign, self._watch)
        ]

    def __enter__(self) -> "RankWatch":
        if self._job.size > 1:
            self._keys = JobStore(clone_store(self._job.store))  # others wait on the main thread's
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(PATIENCE)

    def _sign(self) -> None:
        """Give signs of life, and read those of the watched ranks."""
        with suppress(dist.DistError):  # the `ShutdownWatcher` says that the store is gone
            hosts = RendezvousStore(self._job.store)
            self._names = {rank: f"rank {rank} on {hosts.host(rank)}" for rank in self._watched}
            while not self._closed.wait(self._interval):
                self._keys.sign(self._job.rank, 1)
                self._counts = {rank: self._keys.sign(rank, 0) for rank in self._watched}
                self._rounds += 1
            self._keys.sign(self._job.rank, LEFT)

    def _watch(self) -> None:
        """Look at what the other thread has read; it may wait for the store without a limit."""
        store, *others = [Silence(2 * self._interval) for _ in [0, *self._watched]]
        while not self._closed.wait(self._interval):
            store.look(self._rounds)
            if store.seconds:  # what the ranks say is not known
                if store.seconds > self._timeout and self._job.rank:
                    self._end([STORE_LOST], store_answers=False)
                continue
            for rank, silence in zip(self._watched, others, strict=True):
                silence.look(self._counts[rank])
            if any(silence.seconds > self._timeout for silence in others):
                # Those that were lost together do not exceed the limit at the same time.
                limit = self._timeout - 2 * self._interval
                silent = zip(self._watched, others, strict=True)
                self._end([self._names[rank] for rank, s in silent if s.seconds > limit])

    def _end(self, missing: list[str], store_answers: bool = True) -> NoReturn:
        if not self._first:  # the first rank says so; then this one ends, unless that is lost, too
            time.sleep(PATIENCE)
        complain(
            f"{', '.join(missing)}: no sign of life for run.timeout={self._timeout:.0f} "
            "seconds. The journal is complete: start the same command again to go on"
        )
        if store_answers:
            with suppress(dist.DistError):
                JobStore(clone_store(self._job.store)).end(1)
                time.sleep(TELL)
        exit_process(1)
