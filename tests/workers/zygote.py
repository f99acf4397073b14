"""Starts runs without the seconds that importing takes: each rank is forked from this process, which has all loaded.

Reads commands, JSON objects one to a line, and answers each with one:
    {"start": [ARGUMENT, ...], "tool": NAME, "ranks": N, "port": P, "log": FILE, "faults": {...}}  ->  {"pids": [...]}
    {"wait": FIRST PID, "seconds": S}  ->  {"codes": [exit code of each rank], or null where a rank still runs}
All ranks of a run are one process group. What they hand to `report` comes to lie beside the log. `faults` are described
in `inject`.
"""

import json
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}  # a fork must not find threads

from shardes import environment

environment.prepare()


from launch import script  # noqa: E402

TOOLS = {
    "train": script("launchers/train.py"),
    "export": script("tools/export_safetensors.py"),
    "layout": script("tests/workers/layout.py"),
}

from torch.utils.file_baton import FileBaton  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402

from shardes import joining, journal  # noqa: E402
from shardes.center import CopyCenter  # noqa: E402


def die() -> None:
    os.killpg(0, signal.SIGKILL)


def inject(faults: dict, rank: int) -> None:
    """Make something go wrong in this rank.

    "kill in append": [kind, n]  kill the job when half of the journal's n-th line of this kind is written
    "fill in append": FILE  before the journal's 4th line fill the disk with this file
    "kill in write": n      kill the job at the n-th write of a part of a checkpoint
    "kill in build": true   kill the job when a rank holds torch's lock on an extension that it builds or loads
    "stop in append": n     at the journal's n-th line stand still
    "flip": [rank, n]       before the n-th update flip a bit of this rank's center
    "slow": SECONDS         sleep before every decode step
    "noise": NAME           be a version whose noise has this name
    """
    count: Counter[str] = Counter()

    class File:
        def __init__(self, *arguments, **named):
            self._file = open(*arguments, **named)

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, data):
            if not data.startswith(b'{"kind"'):
                return self._file.write(data)  # what a full disk left of a line
            count["append"] += 1
            kind = json.loads(data)["kind"]
            count[kind] += 1
            if [kind, count[kind]] == faults.get("kill in append"):
                self._file.write(data[: len(data) // 2])
                die()
            while count["append"] == faults.get("stop in append"):
                time.sleep(1)
            if count["append"] == 4 and "fill in append" in faults:
                fill(faults["fill in append"])
            return self._file.write(data)

    pwrite, update = os.pwrite, CopyCenter.update

    def write_at(*arguments):
        count["write"] += 1
        if count["write"] == faults.get("kill in write"):
            die()
        return pwrite(*arguments)

    def flipped(self, *arguments):
        count["update"] += 1
        if [rank, count["update"]] == faults.get("flip"):
            shard = self._shards[1]
            self.values(shard).view(dtype=self.values(shard).dtype).numpy().view("uint32")[3] ^= 1 << 9
        return update(self, *arguments)

    if rank == 0 and {"kill in append", "fill in append", "stop in append"} & set(faults):
        journal.open = File
    if "kill in build" in faults:
        FileBaton.release = lambda self: die()
    if "kill in write" in faults:
        os.pwrite = write_at
    if "slow" in faults:
        forward = LlamaForCausalLM.forward

        def slowly(*arguments, **named):
            time.sleep(faults["slow"])
            return forward(*arguments, **named)

        LlamaForCausalLM.forward = slowly
    if "flip" in faults:
        CopyCenter.update = flipped
    if "noise" in faults:
        joining.NOISE = faults["noise"]


def fill(file: str) -> None:
    with open(file, "wb", buffering=0) as opened:
        try:
            while True:
                opened.write(b"x" * 1024)
        except OSError:
            pass


def start(command: dict) -> list[int]:
    """Fork the ranks; returns their process ids, of which the first is the group's."""
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
            os.environ |= {"MASTER_PORT": str(command["port"]), "RESULTS": str(Path(command["log"]).parent)}
            inject(command.get("faults", {}), rank)
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
                    if pid not in codes and (found := os.waitpid(pid, os.WNOHANG))[0]:
                        codes[pid] = os.waitstatus_to_exitcode(found[1])
                if all(pid in codes for pid in pids) or time.monotonic() > until:
                    break
                time.sleep(0.01)
            answer = {"codes": [codes.get(pid) for pid in pids]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
