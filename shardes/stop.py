"""Ending a run early: a signal that any rank gets ends all of them, soon, with nothing lost.

What a run must keep is in the journal, and rank 0 writes it. So rank 0 stops by itself, between two decode steps,
and the other ranks, who may be waiting for each other in the midst of a collective, end once it has.
"""

import os
import signal
import sys
import threading

from shardes.environment import leave
from shardes.world import Job, connect_anew

PREEMPTED = 75  # EX_TEMPFAIL: start the same command again
HOME_LOST = 1
CODES: dict[int, int] = {signal.SIGINT: 0, signal.SIGTERM: 0, signal.SIGUSR1: PREEMPTED}  # SLURM warns by SIGUSR1
INTERVAL = 0.2  # seconds between looks at the store


class Stopped(Exception):
    """The run was asked to stop; `code` is the exit code."""

    def __init__(self, code: int):
        why = {PREEMPTED: "preempted", HOME_LOST: "the run's home is gone"}.get(code, "stopped as asked")
        super().__init__(f"{why}; nothing is lost: start the same command again to go on")
        self.code = code


class StopWatch:
    """Watches, in a thread, for a signal to this process and for the job's end."""

    def __init__(self, job: Job):
        self._job = job
        self._store = connect_anew(job.store)  # for the main thread may be waiting on the other
        # Python calls handlers in the main thread, which may be waiting in a collective; the pipe hears at once.
        self._signals, heard = os.pipe()
        for end in (self._signals, heard):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(heard, warn_on_full_buffer=False)
        self._code: int | None = None
        self._patient = False
        self._closed = threading.Event()
        for number in CODES:
            signal.signal(number, lambda number, frame: None)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Raise Stopped, on rank 0, where the run has been asked to stop."""
        if self._code is not None and self._job.rank == 0:
            raise Stopped(self._code)

    def stop(self, code: int) -> None:
        """Ask, from any rank and thread, for the launch to end with `code`."""
        self._store.set("stop", str(code))

    def wait_for_polls(self) -> None:
        """From now on rank 0 calls `poll`, and stops there; before, it ends at once."""
        self._patient = True
        self.poll()

    def end(self, code: int) -> None:
        """Tell the other ranks, from rank 0, to end with `code`."""
        if self._job.rank == 0:
            self._store.set("end", str(code))

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()
        self._thread.join()

    def _heard(self) -> list[int]:
        """The signals since the last look that ask for a stop."""
        try:
            return [number for number in os.read(self._signals, 64) if number in CODES]
        except BlockingIOError:
            return []

    def _watch(self) -> None:
        try:
            while not self._closed.wait(INTERVAL):
                for number in self._heard():
                    self.stop(CODES[number])
                if self._store.check(["end"]) and self._job.rank:
                    self._store.set(f"parted/{self._job.rank}", "")
                    leave(int(self._store.get("end")))
                if self._code is None and self._store.check(["stop"]):
                    self._code = int(self._store.get("stop"))
                    if self._job.rank == 0 and not self._patient:
                        self.end(self._code)
                        self._closed.wait(5 * INTERVAL)
                        leave(self._code)
        except RuntimeError as error:
            if not self._closed.is_set():
                print(f"error: rank {self._job.rank}: rank 0's store is gone: {error}", file=sys.stderr, flush=True)
                leave(1)
