"""A process that scores responses, one after the other, for `shardes.scoring`, which starts it.

    python scoring_worker.py PARENT MEMORY KEY PLACE

Calls the function or the class's `reward` that PLACE names (KEY is task.reward or task.path). Reads a JSON array of
arguments per line; answers each with a line {"reward": number} or {"error": words}, after a first {} once it is ready.
What the user's code prints goes to stderr. It ends with its parent, process PARENT, however that ends.
"""

import sys

sys.path.pop(0)  # this file's directory: to the user's code its modules are not there

import ctypes
import io
import json
import math
import numbers
import os
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

sys.path.append(str(Path(__file__).parent.parent))

from shardes.config import ConfigError
from shardes.tasks.own import load_class, load_function

LONGEST = 1000  # characters of an error
PR_SET_PDEATHSIG = 1


def end_with(parent: int) -> None:
    """Be killed when the parent ends, even in the midst of a call that never returns."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def limit_memory(gigabytes: float) -> None:
    """Let allocations beyond a limit fail; where the host's memory ends first, let this process be the one to go."""
    most = int(gigabytes * 1e9)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    with suppress(OSError):  # not every container allows it
        Path("/proc/self/oom_score_adj").write_text("1000")


def own_pipes() -> tuple[TextIO, TextIO]:
    """Where requests come from and replies go to, out of the way of the user's prints and inputs."""
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(line_buffering=True)  # what was printed is seen, however the process ends
    return requests, replies


def load(key: str, place: str) -> Callable[..., float]:
    return load_function(place) if key == "task.reward" else load_class(place).reward


def score(function: Callable[..., float], arguments: list) -> dict:
    """The reply to a request. With `end`, the process is no longer fit for another."""
    try:
        value = function(*arguments)
        if not isinstance(value, numbers.Real):
            return {"error": f"the reward is {value!r}"[:LONGEST] + f", of type {type(value).__name__}, no number"}
        return {"reward": float(value)} if math.isfinite(value) else {"error": f"the reward is {value}"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:LONGEST], "end": isinstance(error, MemoryError)}
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}"[:LONGEST], "end": True}


def main(parent: str, memory: str, key: str, place: str) -> None:
    end_with(int(parent))
    requests, replies = own_pipes()
    limit_memory(float(memory))
    try:
        function = load(key, place)
    except ConfigError as error:
        print(json.dumps({"error": str(error)}), file=replies, flush=True)
        return
    print(json.dumps({}), file=replies, flush=True)
    for line in requests:
        print(json.dumps(score(function, json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
