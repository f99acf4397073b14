"""Starts runs quickly: each rank is forked from this process, which has imported everything.

It reads commands, one JSON object per line, and answers each with one JSON object:
    {"start": [ARGUMENT, ...], "tool": NAME, "directory": WORKING DIRECTORY, "ranks": N, "port": P,
     "log": FILE, "faults": {...}}
        -> {"pids": [...]}
    {"wait": FIRST PID, "seconds": S}
        -> {"codes": [each rank's exit code, or null if it still runs]}
All ranks of a run are one process group. Their reports (`launch.report`) are written beside the
log. `inject` describes the faults.
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from functools import wraps
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
# A process that forks must not have threads.
os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from torch.utils.file_baton import FileBaton
from transformers import LlamaForCausalLM

from launch import script
from shardes.commands import evaluate, export, probe, train
from shardes.distributed import environment
from shardes.es.center import CopyCenter
from shardes.storage import journal

TOOLS = {"train": train, "evaluate": evaluate, "probe": probe, "export": export} | {
    name: script(f"tests/workers/{name}.py") for name in ("layout", "architectures")
}


def die() -> None:
    os.killpg(0, signal.SIGKILL)


def inject(faults: dict, rank: int) -> None:
    """Inject faults into this rank.

    "kill in append": [kind, n]  kill the job after half of the journal's n-th line of this kind
    "fill in append": FILE  fill the disk with this file before the journal's 4th line
    "kill in write": n      kill the job at the n-th write to a checkpoint
    "kill in build": true   kill the job while a rank holds torch's lock on an extension's build
    "stop in append": n     hang at the journal's n-th line
    "flip": [rank, n]       flip a bit of this rank's center before the n-th update
    "slow": SECONDS         sleep before every decode step
    """
    if rank == 0 and {"kill in append", "fill in append", "stop in append"} & set(faults):
        journal.open = lambda *arguments, **named: FaultyFile(open(*arguments, **named), faults)
    if "kill in build" in faults:
        FileBaton.release = lambda self: die()
    if "kill in write" in faults:
        kill_in_write(faults["kill in write"])
    if "slow" in faults:
        slow_down(faults["slow"])
    if "flip" in faults and faults["flip"][0] == rank:
        flip_before_update(faults["flip"][1])


class FaultyFile:
    """The journal's file, with faults in its lines."""

    def __init__(self, file, faults: dict):
        self._file, self._faults = file, faults
        self._lines, self._of_kind = 0, Counter()

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data):
        if not data.startswith(b'{"kind"'):
            return self._file.write(data)  # the remainder of a line that a full disk cut
        kind = json.loads(data)["kind"]
        self._lines += 1
        self._of_kind[kind] += 1
        if [kind, self._of_kind[kind]] == self._faults.get("kill in append"):
            self._file.write(data[: len(data) // 2])
            die()
        while self._lines == self._faults.get("stop in append"):
            time.sleep(1)
        if self._lines == 4 and "fill in append" in self._faults:
            fill(self._faults["fill in append"])
        return self._file.write(data)


def kill_in_write(number: int) -> None:
    pwrite, calls = os.pwrite, count(1)

    def faulty(*arguments):
        if next(calls) == number:
            die()
        return pwrite(*arguments)

    os.pwrite = faulty


def slow_down(seconds: float) -> None:
    forward = LlamaForCausalLM.forward

    @wraps(forward)  # checks of the model look at its parameters
    def slow(*arguments, **named):
        time.sleep(seconds)
        return forward(*arguments, **named)

    LlamaForCausalLM.forward = slow


def flip_before_update(number: int) -> None:
    update, calls = CopyCenter.update, count(1)

    def faulty(self, *arguments):
        if next(calls) == number:
            values = self.values(self._shards[1])
            values.numpy().view("uint32")[3] ^= 1 << 9
        return update(self, *arguments)

    CopyCenter.update = faulty


def fill(file: str) -> None:
    with open(file, "wb", buffering=0) as opened:
        try:
            while True:
                opened.write(b"x" * 1024)
        except OSError:
            pass


def start(command: dict) -> list[int]:
    """Fork the ranks; returns their process ids. The first is also the process group's."""
    pids: list[int] = []
    for rank in range(command["ranks"]):
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, pids[0] if pids else 0)
            log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            null = os.open(os.devnull, os.O_RDONLY)
            for source, target in ((null, 0), (log, 1), (log, 2)):
                os.dup2(source, target)
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {"WORLD_SIZE": str(command["ranks"]), "LOCAL_SIZE": str(command["ranks"])}
            os.environ |= {
                "MASTER_PORT": str(command["port"]),
                "RESULTS": str(Path(command["log"]).parent),
            }
            inject(command.get("faults", {}), rank)
            os.chdir(command["directory"])
            sys.argv = [command["tool"], *command["start"]]
            environment.run(TOOLS[command["tool"]].main)
        os.setpgid(pid, pids[0] if pids else pid)
        pids.append(pid)
    return pids


def main() -> None:
    running: dict[int, list[int]] = {}
    codes: dict[int, int] = {}
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if "start" in command:
            pids = start(command)
            running[pids[0]] = pids
            answer = {"pids": pids}
        else:
            pids, until = running[command["wait"]], time.monotonic() + command["seconds"]
            while True:
                for pid in pids:
                    if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                        codes[pid] = os.waitstatus_to_exitcode(ended[1])
                if all(pid in codes for pid in pids) or time.monotonic() > until:
                    break
                time.sleep(0.01)
            answer = {"codes": [codes.get(pid) for pid in pids]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
