"""The program of a worker process, which scores responses; `shardes.rewards.worker_pool` starts it.

    python worker.py PARENT MEMORY TIMEOUT KEY PATH

It loads the user's reward: the function or class that PATH names; KEY is the setting it comes from,
task.reward or task.path. It then writes a line {"request": 0}. After that each line of input is a
JSON array of a request's number and its arguments, and each line of output a reply: {"request":
number} with

    "reward": number, and "parts": {name: number} if the reward is a dict
    "rewards": [...], of a batch: one such object, or one with "error", for each response
    "error": message, and "end": true if the process must be replaced, or "timed_out": true

Calls of an async function run beside each other, each for at most TIMEOUT seconds; other functions
are called in turn, and the parent minds the time. The user's code prints to stderr. The process
ends when its parent, process PARENT, ends, even if that is killed.
"""

import asyncio
import ctypes
import io
import json
import numbers
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, TextIO

MAX_ERROR = 1000  # characters
CANCEL_TIMEOUT = 1.0  # seconds that an async call may take to end once it is cancelled
PR_SET_PDEATHSIG = 1
Reply = dict[str, Any]


class NotAReward(Exception):
    """A value is not a reward; says why."""


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


def split_parts(value: Any) -> tuple[Any, dict[str, Any]]:
    """A reward as the user's code gave it, and its other named parts if it is a dict.

    Raises:
        NotAReward: a dict has no "reward", or other parts than `config.limits` allows.
    """
    from shardes.config.limits import MOST_PARTS, is_part_name  # only now importable in a worker

    if not isinstance(value, Mapping):
        return value, {}
    parts = dict(value)
    if "reward" not in parts:
        names = ", ".join(map(str, parts)) or "nothing"
        raise NotAReward(f"the reward is a dict without 'reward'; it has {names}"[:MAX_ERROR])
    reward = parts.pop("reward")
    if wrong := [name for name in parts if not is_part_name(name)]:
        raise NotAReward(
            f"a part of the reward is named {wrong[0]!r:.100}; a name is a letter and at most 31 "
            "further letters, digits, points, _ or -"
        )
    if len(parts) > MOST_PARTS:
        raise NotAReward(f"the reward has {len(parts)} other parts; at most {MOST_PARTS} are kept")
    return reward, parts


def number(name: str, value: Any) -> float:
    """A number of Python, NumPy or torch; whether it is in range: see worker_pool.

    Raises:
        NotAReward: the value is none.
    """
    if getattr(value, "shape", None) == ():  # a NumPy scalar, or an array or tensor of one
        value = value.item()
    if not isinstance(value, numbers.Real | Decimal):
        problem = f"{name} is {value!r}"[:MAX_ERROR]
        raise NotAReward(f"{problem}, of type {type(value).__name__}, not a number")
    return float(value)


def of_one(value: Any) -> Reply:
    """The reply that says what one response is worth."""
    try:
        reward, parts = split_parts(value)
        reply: Reply = {"reward": number("the reward", reward)}
        if parts:
            named = {name: number(f"the reward's {name}", part) for name, part in parts.items()}
            reply["parts"] = named
        return reply
    except Exception as error:
        return failure(error)


def of_batch(count: int, values: Any) -> Reply:
    """The reply that says what each of `count` responses is worth."""
    rewards = list(map(of_one, values))
    if len(rewards) != count:
        return {"error": f"it gave {len(rewards)} rewards for {count} responses"}
    return {"rewards": rewards}


def failure(error: BaseException, function: Callable[..., Any] | None = None) -> Reply:
    """The reply that says what the user's code raised, and in which line of the function's file."""
    if isinstance(error, NotAReward):
        return {"error": str(error)}
    from shardes.errors import described

    end = isinstance(error, MemoryError) or not isinstance(error, Exception)
    return {"error": described(error) + where(error, function)} | ({"end": True} if end else {})


def where(error: BaseException, function: Callable[..., Any] | None) -> str:
    """The last line of the function's file that an exception passed through; "": none."""
    code = getattr(function, "__code__", None)
    lines = [
        line
        for frame, line in traceback.walk_tb(error.__traceback__)
        if code is not None and frame.f_code.co_filename == code.co_filename
    ]
    return f" ({Path(code.co_filename).name}, line {lines[-1]})" if code and lines else ""


def score(
    function: Callable[..., Any], arguments: list, read: Callable[[Any], Reply] = of_one
) -> Reply:
    """The reply to a request; `read` makes it of what the function returns."""
    try:
        return read(function(*arguments))
    except BaseException as error:
        return failure(error, function)


async def score_async(
    function: Callable[..., Any],
    arguments: list,
    read: Callable[[Any], Reply],
    timeout: float,
) -> Reply:
    """The reply to a request to an async function, within `timeout` seconds."""

    async def called() -> Reply:
        try:
            return read(await function(*arguments))
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # sys.exit would end the event loop
            return failure(error, function)

    call = asyncio.create_task(called())
    done, _ = await asyncio.wait([call], timeout=timeout)
    if not done:
        call.cancel()
        ended, _ = await asyncio.wait([call], timeout=CANCEL_TIMEOUT)
        reply: Reply = {"error": f"not done within {timeout:g} s", "timed_out": True}
        return reply if ended else reply | {"end": True}
    return failure(asyncio.CancelledError()) if call.cancelled() else call.result()


def answer(replies: TextIO, process: int, request: int, content: Reply) -> None:
    """Write a reply, in process `process` only.

    A child that the user's code forked may return here, too: it ends.
    """
    if os.getpid() != process:
        os._exit(1)
    print(json.dumps({"request": request, **content}), file=replies, flush=True)


async def serve_async(
    requests: TextIO,
    reply: Callable[[int, Reply], None],
    scored: Callable[..., Any],
) -> None:
    """Answer requests as they come, several at a time, until there are no more."""
    calls: set[asyncio.Task] = set()

    async def call(request: int, arguments: list) -> None:
        reply(request, await scored(arguments))

    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as reader:  # not the loop's own, which the user's code may fill
        while line := await loop.run_in_executor(reader, requests.readline):
            task = loop.create_task(call(*json.loads(line)))
            calls.add(task)
            task.add_done_callback(calls.discard)


def main(parent: str, memory: str, timeout: str, key: str, path: str) -> None:
    process = os.getpid()
    end_with_parent(int(parent))
    requests, replies = take_pipes()
    set_import_path()
    from shardes.errors import ConfigError
    from shardes.tasks.user_code import is_async, is_batch, load_reward_function, load_user_task

    reply = partial(answer, replies, process)
    limit_memory(float(memory))
    try:
        function = (
            load_reward_function(path) if key == "task.reward" else load_user_task(path).reward
        )
    except ConfigError as error:
        reply(0, {"error": str(error)})
        return
    batch = key == "task.reward" and is_batch(path)

    def read_for(arguments: list) -> Callable[[Any], Reply]:
        return partial(of_batch, len(arguments[0])) if batch else of_one

    async def scored(arguments: list) -> Reply:
        return await score_async(function, arguments, read_for(arguments), float(timeout))

    reply(0, {})
    if is_async(function):
        asyncio.run(serve_async(requests, reply, scored))
        return
    for line in requests:
        request, arguments = json.loads(line)
        reply(request, score(function, arguments, read_for(arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
