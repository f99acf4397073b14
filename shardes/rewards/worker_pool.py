"""Worker processes that call a user's reward, several at a time, within limits of time and memory.

A worker is a program of its own (shardes/rewards/worker.py), started rather than forked, because
this process holds GPU contexts, threads and store connections. It talks JSON over pipes. A reply
carries the number of its request, so that no response gets another one's reward. A worker that
hangs, crashes, runs out of memory or writes anything else is replaced.
"""

import asyncio
import concurrent.futures
import json
import os
import signal
import sys
import threading
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from shardes.config.limits import REWARD_RANGE, is_reward
from shardes.config.schema import TaskConfig
from shardes.errors import ConfigError

WORKER = str(Path(__file__).with_name("worker.py"))
START_TIMEOUT = 300.0  # seconds for a worker to load the user's code
KILL_TIMEOUT = 10.0  # seconds for the system to end a killed process
POLL_INTERVAL = 0.2  # seconds


class ScoringFailure(Exception):
    """A response could not be scored.

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

    @classmethod
    async def start(cls, memory: float, key: str, path: str) -> "Worker":
        """Start a worker, and wait until it is ready.

        Raises:
            ConfigError: it cannot load the user's code, or takes longer than START_TIMEOUT.
        """
        arguments = (WORKER, str(os.getpid()), str(memory), key, path)
        # In a session of its own, so that processes which the user's code starts can be killed with
        # it, and a Ctrl-C in the terminal does not reach it.
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdin=PIPE, stdout=PIPE, start_new_session=True
        )
        worker = cls(process)
        try:
            reply = await worker._request(None, START_TIMEOUT)
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

    async def score(self, job: list, timeout: float) -> float:
        """The reward for a job, which is the list of arguments of the user's code.

        Raises:
            ScoringFailure: the code gave no reward.
        """
        reply = await self._request(job, timeout)
        if "error" in reply:
            raise ScoringFailure(str(reply["error"]), bool(reply.get("end")))
        reward: Any = reply.get("reward")
        if not is_reward(reward):
            reason = f"the reward is {str(reward)[:100]}, not {REWARD_RANGE}"
            raise ScoringFailure(reason, worker_lost=False)
        return float(reward)

    async def _request(self, job: list | None, timeout: float) -> dict:
        try:
            return await asyncio.wait_for(self._exchange(job), timeout)
        except (asyncio.TimeoutError, TimeoutError):
            reason = f"not done within {timeout:g} s"
            raise ScoringFailure(reason, worker_lost=True, timed_out=True) from None
        # The user's code closed or wrote to the pipes, or forked a process that did.
        except (OSError, ValueError, RecursionError) as error:
            reason = f"its process sent no valid reply: {error}"
            raise ScoringFailure(reason, worker_lost=True) from None

    async def _exchange(self, job: list | None) -> dict:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin and stdout
        if job is not None:
            self._requests += 1
            request = json.dumps([self._requests, job], default=str)
            with suppress(ConnectionError):  # the process has ended: there will be no reply either
                stdin.write(request.encode() + b"\n")
                await stdin.drain()
        line = await stdout.readline()
        if not line:
            code = await self._process.wait()
            cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise ScoringFailure(f"it ended its process ({cause})", worker_lost=True)
        reply = json.loads(line)
        if not isinstance(reply, dict) or reply.get("request") != self._requests:
            raise ValueError(f"{line[:80]!r} to request {self._requests}")
        return reply

    @property
    def alive(self) -> bool:
        # Not Process.returncode: the event loop updates it only while it runs.
        try:
            state = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return state is None

    async def end(self) -> None:
        """Kill the process, and all that the user's code has started in its session."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._process.communicate(), KILL_TIMEOUT)
        # asyncio closes the pipes in its next rounds; the loop must not be closed before.
        await asyncio.sleep(0.01)


Results = concurrent.futures.Future[list[float | ScoringFailure]]


class WorkerPool:
    """A run's worker processes. They start when first needed, and live until `close`.

    A thread serves them, so that they score while this process decodes.

    Args:
        poll: called every POLL_INTERVAL by `wait`; an exception from it ends the scoring.
    """

    def __init__(self, settings: TaskConfig, poll: Callable[[], None]):
        self._settings, self._poll = settings, poll
        self._code = (
            ("task.reward", settings.reward)
            if settings.reward
            else ("task.path", settings.path or "")
        )
        self._loop = asyncio.new_event_loop()
        self._free = asyncio.Semaphore(settings.workers)
        self.idle: list[Worker] = []
        # The system kills workers when this thread ends, not only when the process does.
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def start(self, jobs: Sequence[list]) -> Results:
        """Start to score jobs, after those that were started before; `wait` has their results."""
        return asyncio.run_coroutine_threadsafe(self._score(jobs), self._loop)

    def wait(self, results: Results) -> list[float | ScoringFailure]:
        """The result of each job, in the order of the jobs.

        Raises:
            ScoringFailure: the first one, with task.on_error=fail.
        """
        done: set[Results] = set()
        while not done:
            done, _ = concurrent.futures.wait([results], POLL_INTERVAL)
            self._poll()
        return results.result()

    async def _score(self, jobs: Sequence[list]) -> list[float | ScoringFailure]:
        results: list[Any] = [None] * len(jobs)
        queue = iter(enumerate(jobs))
        tasks = [
            asyncio.create_task(self._serve(queue, results))
            for _ in range(min(self._settings.workers, len(jobs)))
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            # Before Python 3.12 a task can miss its cancellation. An empty queue ends it too.
            list(queue)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return results

    async def _serve(self, queue: Iterator[tuple[int, list]], results: list) -> None:
        """Score jobs from the queue, with one worker at a time, until none is left."""
        async with self._free:
            await self._serve_with(self.idle.pop() if self.idle else None, queue, results)

    async def _serve_with(
        self, worker: Worker | None, queue: Iterator[tuple[int, list]], results: list
    ) -> None:
        try:
            for number, job in queue:
                if worker and not worker.alive:
                    await worker.end()  # closes its pipes
                    worker = None
                worker = worker or await Worker.start(self._settings.memory, *self._code)
                try:
                    results[number] = await worker.score(job, self._settings.timeout)
                except ScoringFailure as failure:
                    results[number], failure.job = failure, number
                    if failure.worker_lost:
                        await worker.end()
                        worker = None
                    if self._settings.on_error == "fail":
                        raise
        except asyncio.CancelledError:
            if worker:
                await worker.end()  # it may be busy with a job
                worker = None
            raise
        finally:
            if worker:
                self.idle.append(worker)

    def close(self) -> None:
        """End all workers, also those that score."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        scoring = asyncio.all_tasks() - {asyncio.current_task()}
        for task in scoring:
            task.cancel()
        await asyncio.gather(*scoring, return_exceptions=True)
        for worker in self.idle:
            await worker.end()
