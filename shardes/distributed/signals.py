"""Stopping a job early: a signal to any rank ends all ranks, soon, without loss.

Rank 0 writes the journal, so it stops by itself, between two decode steps. The user's code, which
does not poll, is interrupted as by Ctrl-C. The other ranks may be inside a collective; they exit
once rank 0 has stopped.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from shardes.distributed.environment import complain, exit_process, report
from shardes.distributed.job_store import JobStore
from shardes.distributed.store import clone_store
from shardes.distributed.world import Job
from shardes.errors import CODES, Stopped

INTERVAL = 0.2  # seconds between two reads of the store
INTERRUPT = signal.SIGURG  # wakes the main thread; ignored by default, and hardly used
GRACE = 5.0  # seconds for the user's code to end after it was interrupted


class ShutdownWatcher:
    """Watches, in a thread, for a signal to this process and for the end of the job.

    Args:
        owns_process: whether the process is there for the job only, so that a stop may end it.
            Where it is not (a notebook), a stop raises KeyboardInterrupt in what does not poll,
            and the handlers of signals are as before once the watcher is closed. Outside the main
            thread there is then no handler, and no stop by a signal.
    """

    def __init__(self, job: Job, owns_process: bool = True):
        self._job, self.owns_process = job, owns_process
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        self._keys = JobStore(clone_store(job.store))  # the main thread may wait on the other
        # Python calls signal handlers in the main thread, which may wait in a collective; the pipe
        # is written at once.
        self._signals, self._written = os.pipe()
        for end in (self._signals, self._written):
            os.set_blocking(end, False)
        self._code: int | None = None
        self._main_thread_polls = self._in_users_code = self._raises = False
        self._interrupted: float | None = None  # when, by the monotonic clock
        self._closed = threading.Event()
        self._handlers: dict[int, Any] = {}  # before this
        if self._in_main_thread:
            self._wakeup = signal.set_wakeup_fd(self._written, warn_on_full_buffer=False)
            for number in (*CODES, INTERRUPT):
                self._handlers[number] = signal.signal(number, self._handle)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def poll(self) -> None:
        """Raise Stopped, on rank 0, if the run has been asked to stop."""
        if self._code is not None and self._job.rank == 0:
            raise Stopped(self._code)

    def stop(self, code: int) -> None:
        """Ask, from any rank and thread, for the job to end with `code`."""
        self._keys.request_stop(code)

    def expect_polls(self) -> None:
        """From now on rank 0 calls `poll`, and stops there. Before, it exits at once."""
        self._main_thread_polls = True
        self.poll()

    @contextmanager
    def users_code(self) -> Iterator[None]:
        """A context for code of the main thread that does not poll: a stop raises
        KeyboardInterrupt in it; if it still runs GRACE seconds later, the process exits.

        Python raises nothing in C code, and this thread does not run while C code holds the
        interpreter's lock.
        """
        try:
            self._in_users_code = self._raises = True
            yield
        finally:
            self._in_users_code = self._raises = False

    @property
    def asked(self) -> int | None:
        """The exit code with which the job was asked to end, if it was."""
        return self._code

    def end(self, code: int) -> None:
        """Tell the other ranks, from rank 0, to exit with `code`."""
        if self._job.rank == 0:
            self._keys.end(code)

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        self._thread.join()
        if not self.owns_process and self._in_main_thread:
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            for number in self._received():  # after the thread's last look
                self._code = CODES[number]
            os.close(self._signals)
            os.close(self._written)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Called by Python in the main thread."""
        if self._raises and self._code is not None and self._job.rank == 0:
            self._raises = False  # once: what handles the exception is not interrupted
            raise KeyboardInterrupt

    def _received(self) -> list[int]:
        """The signals since the last call that ask for a stop."""
        try:
            return [number for number in os.read(self._signals, 64) if number in CODES]
        except BlockingIOError:
            return []

    def _watch(self) -> None:
        try:
            while not self._closed.wait(INTERVAL):
                for number in self._received():
                    self.stop(CODES[number])
                if self._job.rank and (ended := self._keys.ended()) is not None:
                    self._keys.leave(self._job.rank)
                    exit_process(ended)
                if self._code is None and (code := self._keys.stop_requested()) is not None:
                    self._code = code
                if self._code is not None and self._job.rank == 0:
                    self._stop_main_thread(self._code)
        except RuntimeError as error:
            if not self._closed.is_set():
                complain(f"rank {self._job.rank}: the store of rank 0 is gone: {error}")
                exit_process(1)

    def _stop_main_thread(self, code: int) -> None:
        """Interrupt the user's code; exit, if the main thread neither polls nor ends that code."""
        if not self.owns_process:
            may_interrupt = self._in_users_code or not self._main_thread_polls
            if may_interrupt and self._interrupted is None and self._in_main_thread:
                self._raises = self._raises or not self._main_thread_polls
                self._interrupt()
        elif self._in_users_code and self._interrupted is None:
            self._interrupt()
        elif self._in_users_code:
            assert self._interrupted is not None
            if time.monotonic() - self._interrupted > GRACE:
                self._exit(code)
        elif not self._main_thread_polls:
            self._exit(code)

    def _interrupt(self) -> None:
        self._interrupted = time.monotonic()
        ident = threading.main_thread().ident
        assert ident is not None
        signal.pthread_kill(ident, INTERRUPT)

    def _exit(self, code: int) -> None:
        print(Stopped(code), flush=True)
        report(stopped=code)
        self.end(code)
        self._closed.wait(5 * INTERVAL)
        exit_process(code)
