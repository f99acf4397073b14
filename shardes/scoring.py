"""What responses are worth: a task's rewards, guarded.

A task with `score` is asked for all rewards at once, in this process. One with `reward`, and a reward function of the
user's, are called for one response at a time in worker processes: several side by side, each response within limits of
time and memory. What a worker cannot score gets what task.on_error says, and a worker that came to harm is replaced.
Nothing is forked from this process: workers are programs of their own, and speak JSON over pipes.
"""

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from shardes.config import ConfigError, TaskConfig
from shardes.tasks import Task
from shardes.tasks.jsonl import Jsonl

WORKER = str(Path(__file__).with_name("scoring_worker.py"))  # a program; it is not imported
STARTING = 300.0  # seconds for a worker to load the user's code
ENDING = 10.0  # seconds for the system to end a process that is killed
INTERVAL = 0.2  # seconds between polls
FAILURES = ("scoring_failures", "scoring_timeouts")  # all, and those of them that took too long


class Failure(Exception):
    """A response that could not be scored: why. `ended`: nor can its worker score another. `number` is the job's."""

    def __init__(self, why: str, ended: bool, late: bool = False):
        super().__init__(why)
        self.ended, self.late, self.number = ended, late, -1


class Worker:
    """One process that scores; see `shardes.scoring_worker`."""

    def __init__(self, process: Process):
        self._process = process

    @classmethod
    async def start(cls, memory: float, key: str, place: str) -> "Worker":
        """A worker that is ready.

        Raises:
            ConfigError: it cannot load the user's code, or does not within STARTING seconds.
        """
        arguments = (WORKER, str(os.getpid()), str(memory), key, place)
        # A session of its own: what the user's code starts ends with it, and a terminal's Ctrl-C is not for it.
        process = await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdin=PIPE, stdout=PIPE, start_new_session=True
        )
        worker = cls(process)
        try:
            reply = await worker._within(STARTING, None)
            if "error" in reply:
                raise ConfigError(f"{reply['error']} (in a scoring process)")
        except BaseException as error:
            await worker.end()
            if isinstance(error, Failure):
                raise ConfigError(f"{key}={place}: a scoring process did not get ready: {error}") from None
            raise
        return worker

    async def score(self, job: list, seconds: float) -> float:
        """The reward for a job: the arguments of the user's code.

        Raises:
            Failure: there is none.
        """
        reply = await self._within(seconds, job)
        if "reward" not in reply:
            raise Failure(reply["error"], reply.get("end", False))
        return reply["reward"]

    async def _within(self, seconds: float, job: list | None) -> dict:
        try:
            return await asyncio.wait_for(self._ask(job), seconds)
        except (asyncio.TimeoutError, TimeoutError):
            raise Failure(f"not done within {seconds:g} s", ended=True, late=True) from None
        except (OSError, ValueError) as error:  # it closed its pipes, or answered with something else
            raise Failure(f"its process cannot be understood: {error}", ended=True) from None

    async def _ask(self, job: list | None) -> dict:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin and stdout
        if job is not None:
            with suppress(ConnectionError):  # it is gone: the empty answer says so
                stdin.write(json.dumps(job, default=str).encode() + b"\n")
                await stdin.drain()
        line = await stdout.readline()
        if not line:
            code = await self._process.wait()
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            raise Failure(f"it ended its process ({how})", ended=True)
        return json.loads(line)

    @property
    def alive(self) -> bool:
        # Not returncode, which the event loop learns of only while it runs.
        try:
            return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:
            return False

    async def end(self) -> None:
        """Kill it, with all that the user's code has started in its session."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._process.communicate(), ENDING)  # to the end of its pipes
        await asyncio.sleep(0.01)  # asyncio closes them in its next rounds; the loop must not be closed before


class Workers:
    """The processes of a run that score; they start when they are first needed, and live until `close`.

    Args:
        poll: called now and then meanwhile; what it raises ends the scoring.
    """

    def __init__(self, settings: TaskConfig, poll: Callable[[], None]):
        self._settings, self._poll = settings, poll
        self._what = ("task.reward", settings.reward) if settings.reward else ("task.path", settings.path or "")
        self._loop = asyncio.new_event_loop()
        self._idle: list[Worker] = []

    def score(self, jobs: Sequence[list]) -> list[float | Failure]:
        """What became of each job, in their order.

        Raises:
            Failure: the first one, where task.on_error is fail.
        """
        return self._loop.run_until_complete(self._score(jobs))

    async def _score(self, jobs: Sequence[list]) -> list[float | Failure]:
        found: list[Any] = [None] * len(jobs)
        queue = iter(enumerate(jobs))
        tasks = [asyncio.create_task(self._serve(queue, found)) for _ in range(min(self._settings.workers, len(jobs)))]
        pending = set(tasks)
        try:
            while pending:
                done, pending = await asyncio.wait(pending, timeout=INTERVAL, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
                self._poll()
        finally:
            list(queue)  # before Python 3.12 a cancellation can be missed: then there is no more to do
            for task in pending:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return found

    async def _serve(self, queue, found: list) -> None:
        """Score jobs of the queue with one worker, and with those that replace it, until none is left."""
        worker = self._idle.pop() if self._idle else None
        try:
            for number, job in queue:
                if worker and not worker.alive:
                    await worker.end()  # closes its pipes
                    worker = None
                worker = worker or await Worker.start(self._settings.memory, *self._what)
                try:
                    found[number] = await worker.score(job, self._settings.timeout)
                except Failure as failure:
                    found[number], failure.number = failure, number
                    if failure.ended:
                        await worker.end()
                        worker = None
                    if self._settings.on_error == "fail":
                        raise
        except asyncio.CancelledError:
            if worker:
                await worker.end()  # in the midst of a job
                worker = None
            raise
        finally:
            if worker:
                self._idle.append(worker)

    def close(self) -> None:
        for worker in self._idle:
            self._loop.run_until_complete(worker.end())
        self._loop.close()


class Scorer:
    """A task's rewards.

    Args:
        saved: the file for prompts and responses that could not be scored, the latest ones.
        poll: as for `Workers`.
    """

    def __init__(self, settings: TaskConfig, task: Task, saved: Path, poll: Callable[[], None] = lambda: None):
        self._settings, self._task, self._poll = settings, task, poll
        self.saved = saved
        self._workers: Workers | None = None
        self._failures: Counter[str] = Counter()

    def __call__(self, split: str, texts: list[str], which: Sequence[int] | None = None) -> list[float]:
        """One reward per response; `which` are the prompts that were answered, by number (None: all).

        Raises:
            ConfigError: the task failed, with task.on_error=fail or in this process, or gave another count;
                prompts and responses are then saved.
        """
        prompts = self._task.prompts(split)
        numbers = range(len(prompts)) if which is None else which
        rows = [dict(prompt=prompts[number], response=text) for number, text in zip(numbers, texts, strict=True)]
        if hasattr(self._task, "score"):
            return self._whole(self._task.score, split, texts, which, rows)
        return self._each(split, texts, numbers, rows)

    def take_failures(self) -> dict[str, int]:
        """How many responses could not be scored since the last call, and got task.on_error; see FAILURES."""
        taken, self._failures = self._failures, Counter()
        return {name: taken[name] for name in FAILURES}

    def post_failures(self, store: dist.Store, iteration: int) -> None:
        """Add them to those of an iteration's members, on all replicas."""
        for name, count in self.take_failures().items():
            if count:
                store.add(f"{name}/{iteration}", count)

    def failures(self, store: dist.Store, iteration: int) -> dict[str, int]:
        """What was posted of an iteration."""
        return {name: store.add(f"{name}/{iteration}", 0) for name in FAILURES}

    def close(self) -> None:
        """End the workers."""
        if self._workers:
            self._workers.close()
            self._workers = None

    def _whole(self, score: Callable, split, texts, which, rows) -> list[float]:
        try:
            found = score(split, texts) if which is None else score(split, texts, which)
            rewards = list(map(float, found))
        except Exception as error:
            problem = f"task: scoring {split} raised {type(error).__name__}: {error}"
            raise ConfigError(f"{problem}; the responses: {self._save(rows)}") from error
        if len(rewards) != len(texts):
            raise ConfigError(f"task: score gave {len(rewards)} rewards for {len(texts)} responses")
        return rewards

    def _each(self, split, texts, numbers, rows) -> list[float]:
        if isinstance(self._task, Jsonl):
            jobs = [[text, self._task.example(split, n)] for n, text in zip(numbers, texts, strict=True)]
        else:
            jobs = [[split, n, text] for n, text in zip(numbers, texts, strict=True)]
        self._workers = self._workers or Workers(self._settings, self._poll)
        try:
            found = self._workers.score(jobs)
        except Failure as failure:
            place = self._save([rows[failure.number] | {"error": str(failure)}])
            raise ConfigError(
                f"task: scoring prompt {numbers[failure.number]} of {split}: {failure}; prompt and response: {place}; "
                "to go on with a fixed reward for such responses, set task.on_error to it (and list it in "
                "resume.allow_changes)"
            ) from None
        failed = [(row, failure) for row, failure in zip(rows, found, strict=True) if isinstance(failure, Failure)]
        if failed:
            self._failures["scoring_failures"] += len(failed)
            self._failures["scoring_timeouts"] += sum(failure.late for _, failure in failed)
            self._save([row | {"error": str(failure)} for row, failure in failed])
        return [float(self._settings.on_error) if isinstance(value, Failure) else value for value in found]

    def _save(self, rows: list[dict]) -> str:
        """Write the file of what could not be scored; returns where it is, or why it is not."""
        beside = self.saved.with_name(f"{self.saved.name}.{os.getpid()}")
        try:
            beside.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            beside.replace(self.saved)
        except (OSError, ValueError) as error:
            return f"not saved ({error})"
        return str(self.saved)
