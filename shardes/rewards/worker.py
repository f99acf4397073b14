"""The program of a worker process, which scores responses; `shardes.rewards.worker_pool` starts it.

    python worker.py PARENT MEMORY KEY PATH

It loads the user's reward: the function or class that PATH names; KEY is the setting it comes from,
task.reward or task.path. It then writes a line {"request": 0}. After that each line of input is a
JSON array of a request's number and its arguments, and each line of output {"request": number,
"reward": number} or {"request": number, "error": message}. The user's code prints to stderr. The
process ends when its parent, process PARENT, ends, even if that is killed.
"""

import ctypes
import io
import json
import numbers
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any, TextIO

MAX_ERROR = 1000  # characters
PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, even in a call that never returns."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def limit_memory(gigabytes: float) -> None:
    """Make allocations beyond the limit fail.

    If the host runs out of memory first, the kernel kills this process before others.
    """
    limit = int(gigabytes * 1e9)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with suppress(OSError):  # not every container allows it
        Path("/proc/self/oom_score_adj").write_text("1000")


def take_pipes() -> tuple[TextIO, TextIO]:
    """The pipes of requests and replies, moved to where the user's prints and reads cannot reach.

    Standard input is then empty, and standard output goes to stderr.
    """
    requests, replies = (
        os.fdopen(os.dup(0), encoding="utf-8"),
        os.fdopen(os.dup(1), "w", encoding="utf-8"),
    )
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    assert isinstance(sys.stdout, io.TextIOWrapper)
    # So that what was printed is seen even if the process crashes.
    sys.stdout.reconfigure(line_buffering=True)
    return requests, replies


def set_import_path() -> None:
    """Make the package importable, last of all, and this file's directory not.

    Python puts the directory of a program at the front of the path, where its modules would hide
    the user's.
    """
    sys.path.pop(0)
    sys.path.append(str(Path(__file__).parents[2]))


def score(function: Callable[..., Any], arguments: list) -> dict:
    """The reply to a request. With "end", the process must be replaced."""
    try:
        value = function(*arguments)
        if getattr(value, "shape", None) == ():  # a NumPy scalar, or an array or tensor of one
            value = value.item()
        if not isinstance(value, numbers.Real | Decimal):
            error = f"the reward is {value!r}"[:MAX_ERROR]
            return {"error": f"{error}, of type {type(value).__name__}, not a number"}
        return {"reward": float(value)}  # whether it is in range: see worker_pool
    except BaseException as error:
        from shardes.errors import described  # only now importable in a worker

        end = isinstance(error, MemoryError) or not isinstance(error, Exception)
        return {"error": described(error), "end": end}


def answer(replies: TextIO, process: int, request: int, content: dict) -> None:
    """Write a reply, in process `process` only.

    A child that the user's code forked may return here, too: it ends.
    """
    if os.getpid() != process:
        os._exit(1)
    print(json.dumps({"request": request, **content}), file=replies, flush=True)


def main(parent: str, memory: str, key: str, path: str) -> None:
    process = os.getpid()
    end_with_parent(int(parent))
    requests, replies = take_pipes()
    set_import_path()
    from shardes.errors import ConfigError
    from shardes.tasks.user_code import load_reward_function, load_user_task

    limit_memory(float(memory))
    try:
        function = (
            load_reward_function(path) if key == "task.reward" else load_user_task(path).reward
        )
    except ConfigError as error:
        answer(replies, process, 0, {"error": str(error)})
        return
    answer(replies, process, 0, {})
    for line in requests:
        request, arguments = json.loads(line)
        answer(replies, process, request, score(function, arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
