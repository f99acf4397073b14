"""Names the ranks that are missing when a collective of a replica fails.

gloo and NCCL say that a collective timed out, or that a connection broke, but not which rank did
not take part. Every rank whose collective failed says so in the job's store; the others are
missing.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from threading import Thread

import torch.distributed as dist

from shardes.distributed.job_store import RendezvousStore
from shardes.distributed.world import Job
from shardes.errors import RunError, one_line

PATIENCE = 5.0  # seconds; gloo closes the connections of all ranks once one of them times out
GLOO = ("gloo/", "Application timeout caused pair closure", "Connection closed by peer")
STORE_LOST = "rank 0, whose store does not answer"


class LostRank(RunError):
    """A collective failed. `reports` is true on the first rank that is there to say so;
    `store_answers` is false if the job's store is lost too.
    """

    def __init__(self, message: str, reports: bool, store_answers: bool):
        super().__init__(message)
        self.reports, self.store_answers = reports, store_answers


@contextmanager
def lost_ranks_named(job: Job, ranks: range, timeout: float) -> Iterator[None]:
    """A context in which an error of a collective becomes a LostRank.

    Args:
        ranks: the job's ranks that form this rank's replica.
        timeout: seconds that a collective may take.
    """
    try:
        yield
    except Exception as error:
        if len(ranks) == 1 or not _of_collective(error):
            raise
        missing = _missing_ranks(job, ranks)
        present = [rank for rank in ranks if rank not in missing]
        message = (
            f"ranks {ranks[0]} to {ranks[-1]}: a collective failed, and no rank is missing: one of "
            f"them was busy for longer than run.timeout={timeout:.0f} seconds, or a connection "
            f"broke. Start the same command again to go on ({one_line(error)})"
        )
        if missing:
            message = (
                f"{', '.join(missing.values())}: did not take part in a collective within "
                f"run.timeout={timeout:.0f} seconds, or has ended. If it was busy, for example "
                "with a slow reward function, raise run.timeout. The journal is complete: start "
                "the same command again to go on"
            )
        store_answers = STORE_LOST not in missing.values()
        raise LostRank(message, job.rank == present[0], store_answers) from error


def _of_collective(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, dist.DistBackendError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in GLOO)
    )


def _missing_ranks(job: Job, ranks: Sequence[int]) -> dict[int, str]:
    """The ranks without a failed collective of their own, with their hosts.

    Rank 0 serves the store: if that does not answer, rank 0 is missing.
    """
    answer: SimpleQueue[dict[int, str]] = SimpleQueue()

    def ask() -> None:
        with suppress(dist.DistError):  # rank 0 is gone
            answer.put(missing_ranks())

    def missing_ranks() -> dict[int, str]:
        job.keys.set_collective_failed(job.rank)
        until, missing = time.monotonic() + PATIENCE, list(ranks)
        while missing and time.monotonic() < until:
            time.sleep(0.1)
            missing = [rank for rank in missing if not job.keys.collective_failed(rank)]
        hosts = RendezvousStore(job.store)
        return {rank: f"rank {rank} on {hosts.host(rank)}" for rank in missing}

    Thread(target=ask, daemon=True).start()
    try:
        return answer.get(timeout=2 * PATIENCE)
    except Empty:
        return {0: STORE_LOST}
