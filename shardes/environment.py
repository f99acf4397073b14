"""The process's environment, set before torch, numba or deepspeed are imported: they read it once."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


def prepare() -> None:
    """Give this process its part of the host's cores. What the user set stands."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # torchrun, deepspeed
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(len(os.sched_getaffinity(0)) // processes, 1)))
    # More threads than their part of the cores would spin, waiting for work, on those of the other ranks.
    os.environ.setdefault("NUMBA_NUM_THREADS", threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@contextmanager
def quiet() -> Iterator[None]:
    """A context in which libraries may be imported without each rank printing what they have to say."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
