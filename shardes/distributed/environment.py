"""Environment variables that torch, numba and tokenizers read when they are imported; exit codes.

`shardes.commands` calls `prepare` once, before any of these libraries is imported.
"""

import ctypes
import errno
import json
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import TextIOWrapper
from types import FrameType
from typing import Any, NoReturn

from shardes.distributed.hosts import slurm_hosts
from shardes.errors import CODES, ConfigError, one_line, stop_reason

SLURM_TASK = (  # what SLURM tells each task of a step, after SLURM_
    "JOB_ID",
    "STEP_ID",
    "STEP_NUM_TASKS",
    "STEP_TASKS_PER_NODE",
    "NODEID",
    "PROCID",
    "LOCALID",
)
STARTED_BY = "SHARDES_STARTED_BY"  # process and pipe of `distributed.local_ranks`, for its ranks
PR_SET_PDEATHSIG = 1
_started_by = os.environ.pop(STARTED_BY, "")  # not for this process's children
_own: dict[str, str] = {}  # what `prepare` set for this process alone


def prepare() -> None:
    """Limit this process to its share of the host's cores; make a task of `srun` a rank.

    Variables that are set already stay. A rank that `distributed.local_ranks` started ends with
    the process that did, even if that is killed.
    """
    if _started_by:
        starter, pipe = map(int, _started_by.split())
        os.set_inheritable(pipe, False)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != starter:
            os._exit(1)
    _adopt_slurm_task()
    # torchrun sets LOCAL_WORLD_SIZE, deepspeed LOCAL_SIZE
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    cores = str(max(len(os.sched_getaffinity(0)) // processes, 1))
    threads = os.environ.get("OMP_NUM_THREADS", cores)
    # More threads would busy-wait on the cores of the other ranks.
    wanted = {"OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
    wanted |= {"TOKENIZERS_PARALLELISM": "false"}
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    _own.update(missing)
    os.environ |= missing


def inherited() -> dict[str, str]:
    """The variables for processes started from here: each takes its own share of the cores."""
    return {name: value for name, value in os.environ.items() if _own.get(name) != value}


def report(**event: Any) -> bool:
    """Report to the process that started this rank; false if `distributed.local_ranks` did not."""
    if not _started_by:
        return False
    with suppress(OSError):  # the process is gone, and this one ends with it
        os.write(int(_started_by.split()[1]), (json.dumps(event) + "\n").encode())
    return True


def complain(message: str, code: int = 1) -> None:
    """Say why the job ends: to the process that started this rank, or else to the user."""
    if not report(error=one_line(message), code=code):
        print(f"error: {one_line(message)}", file=sys.stderr, flush=True)


def _adopt_slurm_task() -> None:
    """Set a launcher's variables from SLURM's, in a step of several tasks without a launcher."""
    slurm = {key: os.environ.get(f"SLURM_{key}", "") for key in SLURM_TASK}
    if "RANK" in os.environ or not all(slurm.values()) or slurm["STEP_NUM_TASKS"] == "1":
        return
    port = 15000 + (31 * int(slurm["JOB_ID"]) + int(slurm["STEP_ID"])) % 15000
    local_size = _tasks_per_node(slurm["STEP_TASKS_PER_NODE"])[int(slurm["NODEID"])]
    os.environ |= {
        "RANK": slurm["PROCID"],
        "WORLD_SIZE": slurm["STEP_NUM_TASKS"],
        "LOCAL_RANK": slurm["LOCALID"],
        "LOCAL_WORLD_SIZE": str(local_size),
    }
    with suppress(ConfigError):  # without scontrol the user must set MASTER_ADDR
        os.environ.setdefault("MASTER_ADDR", slurm_hosts()[0])
    os.environ.setdefault("MASTER_PORT", str(port))


def _tasks_per_node(text: str) -> list[int]:
    """SLURM's number of tasks of each node, which it writes as `2(x3),1`."""
    counts: list[int] = []
    for part in text.split(","):
        count, _, repeat = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(repeat or 1)
    return counts


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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal may lack ±, → and users' letters
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main(sys.argv[1:])
    except SystemExit as error:  # argparse's
        code = error.code if isinstance(error.code, int) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 128 + signal.SIGINT
    except BaseException as error:
        code = 1
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            code = 128 + signal.SIGPIPE
        elif isinstance(error, OSError) and error.errno == errno.ENOSPC and not error.filename:
            _complain_of_output(error)
        else:
            traceback.print_exc()
    exit_process(code)


def _complain_of_output(error: OSError) -> None:
    with suppress(OSError):
        print(f"error: the output cannot be written: {error}", file=sys.stderr, flush=True)


def _reader_is_gone() -> bool:
    """Whether nobody reads this process's output any more, as with `| head`."""
    if sys.stdout is None:
        return False
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in output.poll(0))


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """A context in which the signals that stop a job end this process, until a job handles them.

    Nothing has begun yet. A KeyboardInterrupt would be lost where a library's import or a
    destructor catches it.
    """

    def end(number: int, frame: FrameType | None) -> None:
        # The main thread may be within a print.
        os.write(1, f"{stop_reason(CODES[number])}, before the work began\n".encode())
        os._exit(CODES[number])

    with signals_handled(end):
        yield


@contextmanager
def signals_handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """A context in which `handler` gets the signals that stop a job; for the main thread."""
    before = {number: signal.signal(number, handler) for number in CODES}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, signal.SIG_DFL if former is None else former)


def exit_process(code: int) -> NoReturn:
    """Flush the output and end the process."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:  # it was closed when the process started
                stream.flush()
        except BrokenPipeError:
            pass
        except OSError as error:
            code = code or 1
            _complain_of_output(error)
    # Not sys.exit: the interpreter may abort on exit while threads of a process group still run.
    os._exit(code)
