"""Runs that start quickly, for tests that kill them; see workers/zygote.py."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from launch import ROOT, free_port


class Run:
    """A running training run or other tool."""

    def __init__(self, zygote: "Zygote", pids: list[int], log: Path):
        self._zygote, self.pids, self.group, self.log = zygote, pids, pids[0], log

    def wait(self, seconds: float = 60) -> list[int]:
        """The ranks' exit codes; fails if one still runs after `seconds`."""
        codes = self.poll(seconds)
        if None in codes:
            self.kill()
            raise AssertionError(f"after {seconds} s: exit codes {codes}\n{self.text()}")
        return codes

    def poll(self, seconds: float) -> list[int | None]:
        return self._zygote.send({"wait": self.group, "seconds": seconds})["codes"]

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, number)

    def text(self) -> str:
        return self.log.read_text()


class Zygote:
    """A process that forks runs, as a context."""

    def __enter__(self) -> "Zygote":
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "workers" / "zygote.py")],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._groups: list[int] = []
        assert "ready" in self._read()
        return self

    def __exit__(self, *_) -> None:
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self._process.kill()
        self._process.wait()

    def _read(self) -> dict:
        return json.loads(self._process.stdout.readline())

    def send(self, command: dict) -> dict:
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read()

    def start(
        self,
        *arguments: str,
        ranks: int = 1,
        log: Path,
        tool: str = "train",
        cwd: Path = ROOT,
        **faults,
    ) -> Run:
        """Start ranks of `shardes train ARGUMENTS`, or of another tool of workers/zygote.py."""
        log.unlink(missing_ok=True)
        command = {
            "start": list(arguments),
            "ranks": ranks,
            "port": free_port(),
            "log": str(log),
            "tool": tool,
            "directory": str(cwd),
        }
        pids = self.send(
            command | {"faults": {key.replace("_", " "): value for key, value in faults.items()}}
        )["pids"]
        self._groups.append(pids[0])
        return Run(self, pids, log)
