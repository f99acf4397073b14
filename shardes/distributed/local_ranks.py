"""Starts the ranks of a job on this host, passes signals on to them, and leaves none behind.

A rank gets the environment variables that torchrun sets, and a session of its own: a Ctrl-C in the
terminal reaches only this process, which asks the ranks to stop. What a rank has to say beyond its
output (an error, a stop, an iteration's metrics) comes through a pipe, a JSON object per line.
Nothing here imports torch.
"""

import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType

from shardes.distributed import environment
from shardes.distributed.ports import free_port
from shardes.errors import CODES, PREEMPTED, ConfigError, RunError, Stopped

INTERVAL = 0.2  # seconds between two looks at the ranks
FAILED_GRACE = 15.0  # seconds that the other ranks have to end once one has failed
STOP_GRACE = 60.0  # seconds that all ranks have to end once they were asked to stop
KILL_GRACE = 10.0  # seconds for the system to end killed processes
# What the ranks get. Until a rank watches for signals, it dies of these; of SIGINT, Python would
# print a traceback.
FORWARDED: dict[int, int] = {
    signal.SIGINT: signal.SIGTERM,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
}


def run_ranks(
    command: Sequence[str],
    ranks: int,
    on_metrics: Callable[[dict[str, float]], None] = lambda metrics: None,
) -> None:
    """Run a command as every rank of a job; returns once all ranks have ended.

    SIGINT, SIGTERM and SIGUSR1 stop the job, if this is the main thread.

    Args:
        on_metrics: is called with each iteration's metrics. If it raises, the ranks are killed.

    Raises:
        ConfigError, RunError: a rank failed.
        Stopped: the job was asked to stop.
    """
    with LocalRanks(command, ranks) as job:
        job.wait(on_metrics)


class LocalRanks:
    """The processes of a job, as a context, after which none of them is left."""

    def __init__(self, command: Sequence[str], ranks: int):
        self._processes: list[subprocess.Popen] = []
        self._asked: int | None = None  # the first signal that asked for a stop
        self._failed: tuple[int, int] | None = None  # the first rank that failed; its exit code
        self._deadline = float("inf")  # by the monotonic clock, for all ranks to have ended
        self._overdue = ""  # the ranks that had not ended by then
        self._stopped: int | None = None  # the exit code that a stopped rank reported
        self._errors: list[ConfigError | RunError] = []
        self._unread = b""
        self._reports, writing = os.pipe()
        with ExitStack() as failed:
            failed.callback(os.close, self._reports)
            failed.callback(self._kill)
            self._start(command, ranks, writing)
            failed.pop_all()

    def _start(self, command: Sequence[str], ranks: int, reports: int) -> None:
        """Start the ranks; `reports` is the end of the pipe that they write to."""
        shared = environment.inherited() | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            environment.STARTED_BY: f"{os.getpid()} {reports}",
        }
        try:
            for rank in range(ranks):
                self._processes.append(
                    subprocess.Popen(
                        command,
                        env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdin=subprocess.DEVNULL,
                        pass_fds=[reports],
                        start_new_session=True,
                    )
                )
        finally:
            os.close(reports)

    def __enter__(self) -> "LocalRanks":
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        os.close(self._reports)

    def wait(self, on_metrics: Callable[[dict[str, float]], None]) -> None:
        """Wait until all ranks have ended; see `run_ranks`."""
        with self._signals_passed_on():
            while running := [p for p in self._processes if p.poll() is None]:
                self._read_reports(on_metrics)
                self._look(len(running))
                time.sleep(INTERVAL)
        self._look(0)
        self._read_reports(on_metrics)
        self._raise_outcome()

    def _look(self, running: int) -> None:
        """Give the other ranks a limit once one has failed or stopped; end them when it is over."""
        codes = {rank: p.returncode for rank, p in enumerate(self._processes) if p.returncode}
        stops = {PREEMPTED}
        if self._asked:  # a rank that did not watch for signals yet dies of them
            stops |= {-number for number in FORWARDED.values()}
        for rank, code in codes.items():
            if code not in stops and not self._failed and not self._overdue:
                self._failed = rank, code
                # What the others would say of a killed rank is less than what is known here.
                self._limit(FAILED_GRACE if code > 0 else 0.0)
        if codes:
            self._limit(STOP_GRACE)
        if running and time.monotonic() > self._deadline:
            self._overdue = ", ".join(
                f"rank {rank}" for rank, p in enumerate(self._processes) if p.returncode is None
            )
            self._kill()

    def _limit(self, seconds: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _read_reports(self, on_metrics: Callable[[dict[str, float]], None]) -> None:
        while select.select([self._reports], [], [], 0)[0]:
            data = os.read(self._reports, 1 << 16)
            if not data:  # all ranks have ended
                break
            *lines, self._unread = (self._unread + data).split(b"\n")
            for event in map(json.loads, lines):
                if "metrics" in event:
                    on_metrics(event["metrics"])
                elif "error" in event:
                    kind = ConfigError if event["code"] == 2 else RunError
                    self._errors.append(kind(event["error"]))
                else:
                    self._stopped = event["stopped"]

    def _raise_outcome(self) -> None:
        again = "the journal is complete: start the same command again to go on"
        rank, code = self._failed or (0, 0)
        if self._errors and code >= 0:
            raise self._errors[0]
        if code > 0:
            raise RunError(f"rank {rank} ended with exit code {code}; its output says why")
        if code < 0:
            memory = " (was the host out of memory?)" if code == -signal.SIGKILL else ""
            raise RunError(
                f"rank {rank} was ended by {signal.Signals(-code).name}{memory}; {again}"
            )
        if self._overdue:
            raise RunError(f"{self._overdue} did not end in {STOP_GRACE:.0f} s; {again}")
        preempted = any(process.returncode == PREEMPTED for process in self._processes)
        if self._asked or self._stopped is not None or preempted:
            code = PREEMPTED if self._stopped is None else self._stopped
            code = CODES[self._asked] if self._asked else code
            raise Stopped(code, said=self._stopped is not None)

    @contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        """A context in which the signals that stop a job stop the ranks, not this process."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: FrameType | None) -> None:
            self._asked = self._asked or number
            self._limit(STOP_GRACE)
            for process in self._processes:
                if process.poll() is None:
                    process.send_signal(FORWARDED[number])

        with environment.signals_handled(ask):
            yield

    def _kill(self) -> None:
        """Kill the ranks, and what they have started and left in their sessions."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(KILL_GRACE)
