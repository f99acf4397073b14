"""One worker process, and the requests that are in flight to it.

It is a program of its own (shardes/rewards/worker.py), started rather than forked, because this
process holds GPU contexts, threads and store connections. It talks JSON over pipes. A reply carries
the number of its request, so that no response gets another one's reward.
"""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from pathlib import Path

from shardes.config.schema import TaskConfig
from shardes.errors import ConfigError

WORKER = str(Path(__file__).with_name("worker.py"))
START_TIMEOUT = 300.0  # seconds for a worker to load the user's code
KILL_TIMEOUT = 10.0  # seconds for the system to end a killed process
LONGEST_REPLY = 2**24  # bytes


class ScoringFailure(Exception):
    """A response, or a batch of them, could not be scored.

    Attributes:
        worker_lost: whether its worker cannot score another one.
        timed_out: whether it took longer than task.timeout.
        job: its job's number.
    """

    def __init__(self, reason: str, worker_lost: bool, timed_out: bool = False):
        super().__init__(reason)
        self.worker_lost, self.timed_out, self.job = worker_lost, timed_out, -1


class Worker:
    """One worker process."""

    def __init__(self, process: Process):
        self._process = process
        self._requests = 0  # sent so far
        self._replies: dict[int, asyncio.Future[dict]] = {}  # by request, those in flight
        self._reader: asyncio.Task | None = None
        self._writing = asyncio.Lock()
        self._lost = False

    @classmethod
    async def start(cls, settings: TaskConfig, key: str, path: str) -> "Worker":
        """Start a worker, and wait until it is ready.

        Raises:
            ConfigError: it cannot load the user's code, or takes longer than START_TIMEOUT.
        """
        limits = str(settings.memory), str(settings.timeout)
        # In a session of its own, so that processes which the user's code starts can be killed with
        # it, and a Ctrl-C in the terminal does not reach it.
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            WORKER,
            str(os.getpid()),
            *limits,
            key,
            path,
            stdin=PIPE,
            stdout=PIPE,
            limit=LONGEST_REPLY,
            start_new_session=True,
        )
        worker = cls(process)
        try:
            reply = await worker.request(None, START_TIMEOUT, START_TIMEOUT)
            if "error" in reply:
                raise ConfigError(f"{reply['error']} (in a scoring process)")
        except BaseException as error:
            await worker.end()
            if isinstance(error, ScoringFailure):
                raise ConfigError(
                    f"{key}={path}: a scoring process did not get ready: {error}"
                ) from None
            raise
        return worker

    async def request(self, job: list | None, limit: float, timeout: float) -> dict:
        """The worker's reply to a job, which is the list of arguments of the user's code.

        Args:
            limit: seconds to wait for the reply.
            timeout: seconds that a message names.

        Raises:
            ScoringFailure: there is no valid reply.
        """
        try:
            return await asyncio.wait_for(self._exchange(job), limit)
        except (asyncio.TimeoutError, TimeoutError):
            reason = f"not done within {timeout:g} s"
            raise ScoringFailure(reason, worker_lost=True, timed_out=True) from None

    async def _exchange(self, job: list | None) -> dict:
        stdin = self._process.stdin
        assert stdin
        if job is not None:
            self._requests += 1
        reply = self._replies[self._requests] = asyncio.get_running_loop().create_future()
        if job is not None:
            request = json.dumps([self._requests, job], default=str)
            with suppress(ConnectionError):  # the process has ended: there will be no reply either
                async with self._writing:
                    stdin.write(request.encode() + b"\n")
                    await stdin.drain()
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read())
        return await reply

    async def _read(self) -> None:
        """Read replies as long as one is to come."""
        try:
            while self._replies:
                reply = await self._next_reply()
                future = self._replies.pop(reply["request"])
                if not future.done():
                    future.set_result(reply)
        # The user's code closed or wrote to the pipes, or forked a process that did.
        except (OSError, ValueError, RecursionError) as error:
            self._lose(f"its process sent no valid reply: {error}")

    async def _next_reply(self) -> dict:
        """Raises ValueError if a line is no reply to a request."""
        assert self._process.stdout
        line = await self._process.stdout.readline()
        if not line:
            code = await self._process.wait()
            cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self._lose(f"it ended its process ({cause})")
            raise ConnectionError(cause)
        reply = json.loads(line)
        number = reply.get("request") if isinstance(reply, dict) else None
        if type(number) is not int or number not in self._replies:
            raise ValueError(f"{line[:80]!r} to request {self._requests}")
        return reply

    def _lose(self, reason: str) -> None:
        """Say to all who wait for a reply that none will come."""
        self._lost = True
        for reply in self._replies.values():
            if not reply.done():
                reply.set_exception(ScoringFailure(reason, worker_lost=True))
        self._replies.clear()

    @property
    def alive(self) -> bool:
        if self._lost:
            return False
        # Not Process.returncode: the event loop updates it only while it runs.
        try:
            state = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return state is None

    def kill(self) -> None:
        """Kill the process, and all that the user's code has started in its session."""
        self._lose("its process was replaced")
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def end(self) -> None:
        """Kill the process, and wait until it has ended and its pipes are closed."""
        self.kill()
        if self._reader:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._process.communicate(), KILL_TIMEOUT)
        # asyncio closes the pipes in its next rounds; the loop must not be closed before.
        await asyncio.sleep(0.01)
