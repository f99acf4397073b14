"""Worker processes that call a user's reward, several at a time, within limits of time and memory.

A worker that hangs, crashes, runs out of memory or writes what is no reply is replaced.

A job is one call of the user's code. A worker has one job at a time or, if that code is async,
several. When such a worker is lost, nothing says which of its jobs is to blame: all of them are
done again, one at a time, in a worker that has no other.
"""

import asyncio
import concurrent.futures
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any, NamedTuple

from shardes.config.limits import MOST_PARTS, REWARD_RANGE, is_part_name, is_reward
from shardes.config.schema import TaskConfig
from shardes.rewards.worker_process import ScoringFailure, Worker

# Seconds after which a worker whose async calls mind the time themselves must have said so.
ASYNC_GRACE = 2.0
POLL_INTERVAL = 0.2  # seconds


class Scored(NamedTuple):
    """What a response is worth; `parts` are the other named numbers of the reward."""

    reward: float
    parts: dict[str, float]


JobResult = Scored | ScoringFailure | list[Scored | ScoringFailure]  # the last: of a batch
Results = concurrent.futures.Future[list[JobResult]]


class Slot:
    """A place for one worker, which is started when it is needed, and again after it was lost.

    Attributes:
        busy: the number of lanes that use it.
    """

    def __init__(self, start: Callable[[], Awaitable[Worker]]):
        self._start, self._lock = start, asyncio.Lock()
        self.worker: Worker | None = None
        self.busy = 0

    async def request(self, job: list, limit: float, timeout: float) -> dict:
        """The reply of the slot's worker; see `Worker.request`."""
        async with self._lock:  # one of several lanes starts it
            if self.worker and not self.worker.alive:
                await self.end()
            self.worker = worker = self.worker or await self._start()
        try:
            reply = await worker.request(job, limit, timeout)
            if "error" in reply:
                lost, timed_out = bool(reply.get("end")), bool(reply.get("timed_out"))
                raise ScoringFailure(str(reply["error"]), lost, timed_out)
        except ScoringFailure as failure:
            if failure.worker_lost:
                worker.kill()
            raise
        except asyncio.CancelledError:
            worker.kill()  # it may be busy with the job
            raise
        return reply

    async def end(self) -> None:
        if self.worker:
            await self.worker.end()
        self.worker = None


class WorkerPool:
    """A run's worker processes. They start when first needed, and live until `close`.

    A thread serves them, so that they score while this process decodes.

    Args:
        poll: called every POLL_INTERVAL by `wait`; an exception from it ends the scoring.
        is_async: whether the user's code is, so that a worker takes several jobs at once.
    """

    def __init__(self, settings: TaskConfig, poll: Callable[[], None], is_async: bool = False):
        self._settings, self._poll = settings, poll
        self._code = (
            ("task.reward", settings.reward)
            if settings.reward
            else ("task.path", settings.path or "")
        )
        self._lanes = settings.concurrency if is_async else 1  # jobs of a worker at a time
        self._limit = settings.timeout + (ASYNC_GRACE if is_async else 0)
        self._loop = asyncio.new_event_loop()
        self._slots = [Slot(self._start_worker) for _ in range(settings.workers)]
        self._alone, self._alone_lock = Slot(self._start_worker), asyncio.Lock()
        self._free = asyncio.Semaphore(settings.workers * self._lanes)
        self._scoring: set[asyncio.Task] = set()
        # The system kills workers when this thread ends, not only when the process does.
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    @property
    def idle(self) -> list[Worker]:
        """The workers that have no job."""
        workers = [slot.worker for slot in self._slots if not slot.busy]
        return [worker for worker in workers if worker and worker.alive]

    async def _start_worker(self) -> Worker:
        return await Worker.start(self._settings, *self._code)

    def start(self, jobs: Sequence[list]) -> Results:
        """Start to score jobs, after those that were started before; `wait` has their results."""
        return asyncio.run_coroutine_threadsafe(self._score(jobs), self._loop)

    def wait(self, results: Results) -> list[JobResult]:
        """The result of each job, in the order of the jobs.

        Raises:
            ScoringFailure: the first job that failed, with task.on_error=fail.
        """
        done: set[Results] = set()
        while not done:
            done, _ = concurrent.futures.wait([results], POLL_INTERVAL)
            self._poll()
        return results.result()

    async def _score(self, jobs: Sequence[list]) -> list[JobResult]:
        results: list[Any] = [None] * len(jobs)
        queue = iter(enumerate(jobs))
        lanes = [
            asyncio.create_task(self._serve(queue, results))
            for _ in range(min(self._settings.workers * self._lanes, len(jobs)))
        ]
        scoring = asyncio.current_task()
        assert scoring
        self._scoring.add(scoring)
        try:
            if lanes:
                # Not `gather`, which would cancel them, too: once more, while they clean up.
                await asyncio.wait(lanes, return_when=asyncio.FIRST_EXCEPTION)
            for lane in lanes:
                if lane.done():
                    lane.result()
        finally:
            # Before Python 3.12 a task can miss its cancellation. An empty queue ends it too.
            list(queue)
            for lane in lanes:
                lane.cancel()
            await asyncio.gather(*lanes, return_exceptions=True)
            self._scoring.discard(scoring)
        return results

    async def _serve(self, queue: Iterator[tuple[int, list]], results: list) -> None:
        """A lane: score jobs from the queue, one at a time, until none is left."""
        async with self._free:
            slot = min(self._slots, key=lambda slot: (slot.busy, slot.worker is None))
            slot.busy += 1
            try:
                for number, job in queue:
                    try:
                        results[number] = await self._result(slot, job)
                    except ScoringFailure as failure:
                        results[number], failure.job = failure, number
                        if self._settings.on_error == "fail":
                            raise
            finally:
                slot.busy -= 1

    async def _result(self, slot: Slot, job: list) -> JobResult:
        """The result of a job.

        Raises:
            ScoringFailure: the user's code gave none.
        """
        limits = self._limit, self._settings.timeout
        try:
            return _result_of(job, await slot.request(job, *limits))
        except ScoringFailure as failure:
            if self._lanes == 1 or not failure.worker_lost:
                raise
        async with self._alone_lock:
            return _result_of(job, await self._alone.request(job, *limits))

    def close(self) -> None:
        """End all workers, also those that score."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        for scoring in self._scoring:
            scoring.cancel()
        await asyncio.gather(*self._scoring, return_exceptions=True)
        for slot in [*self._slots, self._alone]:
            await slot.end()


def _result_of(job: list, reply: dict) -> JobResult:
    """What a worker's reply says: of a batch, whose job begins with a list, each response's reward.

    Raises:
        ScoringFailure: that is not a reward.
    """
    if not isinstance(job[0], list):
        return _scored(reply)
    entries = reply.get("rewards")
    if type(entries) is not list or len(entries) != len(job[0]):
        raise ScoringFailure("its process sent no valid reply: no reward for each response", False)
    results: list[Scored | ScoringFailure] = []
    for entry in entries:
        try:
            results.append(_scored(entry))
        except ScoringFailure as failure:
            results.append(failure)
    return results


def _scored(entry: Any) -> Scored:
    entry = entry if isinstance(entry, dict) else {}
    if "error" in entry:
        raise ScoringFailure(str(entry["error"]), worker_lost=False)
    reward, parts = entry.get("reward"), entry.get("parts", {})
    if not (isinstance(parts, dict) and len(parts) <= MOST_PARTS and all(map(is_part_name, parts))):
        raise ScoringFailure("its process sent no valid reply: no parts", worker_lost=False)
    values = {"the reward": reward} | {f"the reward's {name}": parts[name] for name in parts}
    for name, value in values.items():
        if not is_reward(value):
            reason = f"{name} is {str(value)[:100]}, not {REWARD_RANGE}"
            raise ScoringFailure(reason, worker_lost=False)
    return Scored(float(reward), {name: float(part) for name, part in parts.items()})
