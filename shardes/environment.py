"""The process's environment, set before torch, numba or deepspeed are imported: they read it once."""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn


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


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """End the process with the exit code of `main(arguments)`; 1, with a traceback, where it raises."""
    try:
        code = main(sys.argv[1:])
    except SystemExit as error:  # argparse's
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code)


def leave(code: int) -> NoReturn:
    """End the process, with what it has printed."""
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: while threads of a process group still run, the interpreter's own teardown may abort.
    os._exit(code)
