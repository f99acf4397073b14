"""Environment variables that torch, numba and tokenizers read when they are imported; exit codes.

`shardes.commands` calls `prepare` once, before any of these libraries is imported.
"""

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

INHERITED = dict(os.environ)  # before `prepare`: what processes started from here should inherit


def prepare() -> None:
    """Limit this process to its share of the host's cores. Variables that are set already stay."""
    # torchrun sets LOCAL_WORLD_SIZE, deepspeed LOCAL_SIZE
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    threads = os.environ.setdefault(
        "OMP_NUM_THREADS", str(max(len(os.sched_getaffinity(0)) // processes, 1))
    )
    # More threads would busy-wait on the cores of the other ranks.
    os.environ.setdefault("NUMBA_NUM_THREADS", threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@contextmanager
def quiet() -> Iterator[None]:
    """A context without log messages, for imports of libraries that log on every rank."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def run(main: Callable[[list[str]], int]) -> NoReturn:
    """End the process with the exit code that `main(arguments)` returns, or 1 if it raises."""
    try:
        code = main(sys.argv[1:])
    except SystemExit as error:  # argparse's
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    exit_process(code)


def exit_process(code: int) -> NoReturn:
    """Flush the output and end the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: the interpreter may abort on exit while threads of a process group still run.
    os._exit(code)
